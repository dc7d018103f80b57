"""Keys that lie elsewhere: a command signs, such as OpenSSL or an HSM's tool; nothing that it prints is believed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)

import dfmcl.gating.signing.command
from dfmcl.common.errors import BadInput
from dfmcl.gating.order import Draw, Matter
from dfmcl.gating.signing.command import CommandSigner, command_signer
from dfmcl.gating.signing.evidence import ATTESTATION
from dfmcl.gating.signing.keys import read_public, read_signer
from dfmcl.gating.signing.signer import made_by, seal_of
from tests.exports import Export
from tests.processes import wait_until
from tests.serving.workshop import write_run
from tests.signing import code_of, ec_key, make_key, report_on, write_report, write_trust

MATTER = Matter("a" * 64, "b" * 64, "c" * 64, 10)
PAYLOAD = b"DSSEv1 1 a 1 b\0\xff"
MODULES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so")


RAW = """
import sys
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
sys.stdout.buffer.write(b"".join(n.to_bytes(32) for n in decode_dss_signature(sys.stdin.buffer.read())))
"""
SPELLED = {  # how tools of the kind print: {key} is a private PEM
    "ed25519, bytes": "openssl pkeyutl -sign -rawin -inkey {key} -in /dev/stdin",
    "ed25519, base64": "sh -c 'openssl pkeyutl -sign -rawin -inkey {key} -in /dev/stdin | base64'",
    "P-256, DER": "openssl dgst -sha256 -sign {key}",
    "P-256, base64 of DER": "sh -c 'openssl dgst -sha256 -sign {key} | base64 -w 20'",
    "P-256, r and s": f"sh -c 'openssl dgst -sha256 -sign {{key}} | {sys.executable} raw.py'",
}


@pytest.mark.parametrize("spelling", SPELLED)
def test_a_command_signs_in_place_of_a_file(spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL, which knows nothing of us, signs the bytes of its stdin; the signature is the key's, by its id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw.py").write_text(RAW)
    key = ec_key(tmp_path) if spelling.startswith("P-256") else make_key(tmp_path)
    signer = command_signer(SPELLED[spelling].format(key=key), read_public(key.with_suffix(".pub")))
    signature = signer.sign(PAYLOAD)
    assert signature.keyid == read_signer(key).public_key.keyid
    assert made_by(read_signer(key).public_key, signature, PAYLOAD)
    assert not made_by(read_signer(key).public_key, signature, PAYLOAD + b" ")


def test_an_ed25519_command_draws_as_its_file_does(tmp_path: Path) -> None:
    """The order and the seal of a gate's state are the same whether the key lies here or behind a command."""
    key = make_key(tmp_path)
    here, there = (
        read_signer(key),
        command_signer(SPELLED["ed25519, bytes"].format(key=key), read_public(key.with_suffix(".pub"))),
    )
    assert Draw.by(there, MATTER) == Draw.by(here, MATTER)
    assert seal_of(there) == seal_of(here)
    chooser = command_signer("openssl dgst -sha256 -sign x", read_public(ec_key(tmp_path).with_suffix(".pub")))
    with pytest.raises(BadInput, match="cannot draw an order; name an ed25519 key first"):
        Draw.by(chooser, MATTER)


LIES = {
    "": "is empty",
    "a 'b": "cannot be split into words",
    "./none-such": "cannot be run: No such file or directory",
    "sh -c 'echo first >&2; echo the HSM is locked >&2; exit 3'": "ended with 3: first the HSM is locked; nothing is",
    "sh -c 'kill -9 $$'": "ended with -9; nothing is signed",
    "true": "printed 0 bytes that are no ed25519 signature",
    "cat": "printed 16 bytes that are no ed25519 signature by key",
    "sh -c 'head -c 64 /dev/zero'": "printed 64 bytes that are no ed25519 signature",
    "openssl pkeyutl -sign -rawin -inkey other.key -in /dev/stdin": "printed 64 bytes that are no",
    "sh -c 'echo more | cat - /dev/stdin | openssl dgst -sha256 -binary'": "printed 32 bytes that are no",
    "yes": "bytes that are no ed25519 signature",
    "sleep 300": "did not end within 0.5 s; nothing is signed",
    "sh -c 'setsid sleep 300 & exit 0'": "did not end within 0.5 s; nothing is signed",
    "sh -c 'exec >&-; sleep 300'": "did not end within 0.5 s; nothing is signed",
}


@pytest.mark.parametrize("line", LIES)
def test_a_command_that_fails_hangs_or_lies_signs_nothing(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line that names the command, soon, and nothing is left running or said beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dfmcl.gating.signing.command, "SECONDS", 0.5)
    make_key(tmp_path, "other")
    public, began = read_public(make_key(tmp_path).with_suffix(".pub")), time.monotonic()
    with pytest.raises(BadInput) as caught:
        command_signer(line, public).sign(PAYLOAD)
    assert time.monotonic() - began < 5
    assert LIES[line] in str(caught.value)
    assert str(caught.value).startswith("--key-command")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_what_a_hanging_command_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell and the process that it waits for."""
    monkeypatch.setattr(dfmcl.gating.signing.command, "SECONDS", 1.0)
    monkeypatch.chdir(tmp_path)
    public = read_public(make_key(tmp_path).with_suffix(".pub"))
    with pytest.raises(BadInput, match="did not end"):
        command_signer("sh -c 'sleep 300 & echo $! > child; wait'", public).sign(PAYLOAD)
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "cmdline")
    wait_until(lambda: not child.exists() or child.read_bytes() == b"")  # nobody may have reaped it yet


@pytest.fixture(scope="module")
def home(export_once: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("key-command")
    export_once(write_run(home / "run"), home / "candidate")
    (home / "evidence").mkdir()
    write_report(home / "evidence", report_on(home / "candidate", home / "evidence"))
    return home


@pytest.mark.parametrize("kind", ["ed25519, bytes", "P-256, DER"])
def test_the_commands_sign_and_verify_by_a_command(kind: str, home: Path, tmp_path: Path) -> None:
    """`dfmcl sign --key-command`, then verify with a trust file that names the public key alone."""
    evidence = shutil.copytree(home / "evidence", tmp_path / "evidence")
    key = (ec_key if kind.startswith("P-256") else make_key)(tmp_path)
    line, public, trust = SPELLED[kind].format(key=key), str(key.with_suffix(".pub")), str(write_trust(key))
    checked = ("verify", str(home / "candidate"), "--evidence", str(evidence), "--trust", trust)
    assert code_of(*checked) == 1
    assert code_of("sign", str(evidence), "--key-command", line, "--public", public) == 0
    assert code_of(*checked) == 0
    (evidence / ATTESTATION).unlink()
    assert code_of("sign", str(evidence), "--key", str(key)) == 0  # the same key as a file
    assert code_of(*checked) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "name who signs: --key FILE, or --key-command CMD with --public FILE"),
        (["--key-command", "true"], "--key-command is given 1 times, --public 0 times"),
        (["--public", "release.pub"], "--key-command is given 0 times, --public 1 times"),
        (["--key-command", "true", "--public", "release.pub"], "--key-command true: printed 0 bytes"),
        (["--key-command", "true", "--public", "none.pub"], "none.pub: No such file"),
    ],
)
def test_a_wrong_call_is_one_line(
    options: list[str],
    reason: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, and the evidence is as it was."""
    monkeypatch.chdir(tmp_path)
    evidence = shutil.copytree(home / "evidence", tmp_path / "evidence")
    make_key(tmp_path)
    assert code_of("sign", "evidence", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dfmcl: {reason}")
    assert not (evidence / ATTESTATION).exists()


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A new token of SoftHSM, as PKCS#11's environment; skipped where it or OpenSC's tool is not installed."""
    module = next((path for path in MODULES if Path(path).exists()), None)
    missing = [name for name in ("softhsm2-util", "pkcs11-tool") if shutil.which(name) is None]
    if module is None or missing:
        pytest.skip(f"{', '.join(missing) or 'libsofthsm2.so'} is not installed: apt-get install softhsm2 opensc")
    folder = tmp_path_factory.mktemp("softhsm")
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder / 'tokens'}\nobjectstore.backend = file\n")
    environment = {**os.environ, "SOFTHSM2_CONF": str(folder / "softhsm2.conf"), "MODULE": module}
    words = ["softhsm2-util", "--init-token", "--free", "--label", "dfmcl", "--pin", "1234", "--so-pin", "1234"]
    subprocess.run(words, env=environment, check=True, capture_output=True)
    return environment


# The token signs a digest: SoftHSM, like many a token, has ECDSA without a hash of its own.
HSM = {
    "EC:prime256v1": "openssl dgst -sha256 -binary | {tool} --sign --mechanism ECDSA",
    # EdDSA takes a text in one piece, and OpenSC's tool hands on 1 KB at a time.
    "EC:edwards25519": f"{sys.executable} {{script}}",
}
PIECE = """
import os, sys, pkcs11
token = pkcs11.lib(os.environ["MODULE"]).get_token(token_label="dfmcl")
with token.open(user_pin="1234") as session:
    key = session.get_key(label="EC:edwards25519", object_class=pkcs11.ObjectClass.PRIVATE_KEY)
    sys.stdout.buffer.write(key.sign(sys.stdin.buffer.read(), mechanism=pkcs11.Mechanism.EDDSA))
"""


@pytest.mark.parametrize("kind", HSM)
def test_a_key_in_an_hsm_signs(
    kind: str, token: dict[str, str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that SoftHSM made and never gives out signs evidence through PKCS#11; a trust file believes it by its
    public half."""
    if "edwards" in kind:
        pytest.importorskip("pkcs11")
    tool = f"pkcs11-tool --module {token['MODULE']} --token-label dfmcl --login --pin 1234 --label {kind}"
    made = subprocess.run(
        [*shlex.split(tool), "--keypairgen", "--key-type", kind], env=token, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    read = [*shlex.split(tool), "--read-object", "--type", "pubkey"]
    der = subprocess.run(read, env=token, capture_output=True, check=True).stdout
    public = tmp_path / "hsm.pub"
    # Of an Edwards curve this tool gives PEM, of others DER.
    pem = der.startswith(b"-----BEGIN")
    key = load_pem_public_key(der) if pem else load_der_public_key(der)
    public.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "hsm.toml").write_text('keys = ["hsm.pub"]\n')
    evidence = shutil.copytree(home / "evidence", tmp_path / "evidence")
    monkeypatch.setenv("SOFTHSM2_CONF", token["SOFTHSM2_CONF"])
    monkeypatch.setenv("MODULE", token["MODULE"])
    (script := tmp_path / "piece.py").write_text(PIECE)
    line = f"sh -c {shlex.quote(HSM[kind].format(tool=tool, script=script))}"
    assert isinstance(command_signer(line, read_public(public)), CommandSigner)
    assert code_of("sign", str(evidence), "--key-command", line, "--public", str(public)) == 0
    trusted = ("--trust", str(tmp_path / "hsm.toml"))
    assert code_of("verify", str(home / "candidate"), "--evidence", str(evidence), *trusted) == 0
