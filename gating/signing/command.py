"""A key that never lies here: a command of the user's gets the bytes on stdin and prints the signature (KMS, HSM).

What it prints is the signature's bytes, or base64 of them; of ECDSA as DER, or as r and s of 32 bytes each. Nothing of
it is believed: a signature that the public key does not confirm is an error.
"""

from __future__ import annotations

import base64
import os
import select
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from securesystemslib.signer import Signature, SSlibKey

from dfmcl.common.errors import BadInput
from dfmcl.gating.signing.signer import made_by

SECONDS = 60.0  # a KMS answers in one, an HSM that asks for a touch waits for a hand
MOST_BYTES = 4096  # a signature has 64 to 72, in base64 96
SHOWN = 300  # characters of the end of its stderr


@dataclass(frozen=True)
class CommandSigner:
    """words: the command, run without a shell and without a terminal. public_key: its signatures must fit it."""

    words: tuple[str, ...]
    public_key: SSlibKey

    def sign(self, payload: bytes) -> Signature:
        """BadInput where the command cannot run, fails, does not end, or prints no signature of this key's."""
        printed = _output(self.words, payload)
        for spelled in _spellings(printed):
            signature = Signature(self.public_key.keyid, spelled.hex())
            if made_by(self.public_key, signature, payload):
                return signature
        raise BadInput(
            f"--key-command {self.words[0]}: printed {len(printed)} bytes that are no"
            f" {self.public_key.scheme} signature by key {self.public_key.keyid[:12]} of --public; name its public half"
        )


def command_signer(command: str, public_key: SSlibKey) -> CommandSigner:
    """The signer of a command line; BadInput where it holds no command."""
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise BadInput(f"--key-command {command}: cannot be split into words: {error}") from None
    if not words:
        raise BadInput("--key-command: is empty; name a program that signs its standard input")
    return CommandSigner(words, public_key)


def _spellings(printed: bytes) -> Iterator[bytes]:
    """The signatures that the output may mean, in the form that securesystemslib checks."""
    found = [printed]
    with suppress(ValueError):  # no base64
        found.append(base64.b64decode(b"".join(printed.split()), altchars=None, validate=True))
    for one in found:
        yield one
        if len(one) == 64:  # ECDSA as PKCS#11 and JWS spell it
            yield encode_dss_signature(int.from_bytes(one[:32]), int.from_bytes(one[32:]))


def _output(words: tuple[str, ...], payload: bytes) -> bytes:
    said = f"--key-command {words[0]}"
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as errors:
        given.write(payload)
        given.seek(0)
        try:  # a session of its own, so that its children end with it
            process = subprocess.Popen(
                words, stdin=given, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL byte
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"{said}: cannot be run: {reason}; name a program that signs its stdin") from None
        assert process.stdout is not None
        until = time.monotonic() + SECONDS
        try:
            printed = _read(process.stdout, until)
            long = len(printed) > MOST_BYTES  # a program such as `yes` would go on; the caller refuses it
            code = 0 if long else process.wait(max(0.0, until - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            raise BadInput(f"{said}: did not end within {SECONDS:g} s; nothing is signed") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
        if code != 0:
            raise BadInput(f"{said}: ended with {code}{_last_words(errors)}; nothing is signed")
        return printed


def _read(pipe: IO[bytes], until: float) -> bytes:
    """All that a pipe gives, cut off where no signature is as long; TimeoutError where it does not end."""
    printed = b""
    while len(printed) <= MOST_BYTES:
        if not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            raise TimeoutError
        if not (more := os.read(pipe.fileno(), MOST_BYTES)):
            break
        printed += more
    return printed


def _last_words(errors: IO[bytes]) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - SHOWN))
    words = " ".join(errors.read().decode("utf-8", "replace").split())
    return f": {words}" if words else ""
