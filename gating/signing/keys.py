"""Signing keys on disk, in PEM: ed25519, as `dfmcl keygen` writes them, or ECDSA on P-256, as others do.

keygen's OUT.key is the private one, which only its owner reads; OUT.pub the public one.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner, SSlibKey

from dfmcl.common.errors import BadInput, unwritable
from dfmcl.common.reader import TEXT_BYTES, Unfit, read_plain, why_unread

UNKNOWN = "neither an ed25519 key nor one of ECDSA on P-256"


def keygen(out: Path) -> str:
    """Write a new key pair as OUT.key (mode 0600) and OUT.pub; returns its key id. BadInput where one is there."""
    signer = CryptoSigner.generate_ed25519()
    private, public = Path(f"{out}.key"), Path(f"{out}.pub")
    for path in (private, public):
        if path.exists() or path.is_symlink():
            raise BadInput(f"{path}: exists, and a key is never overwritten; name another")
    if not out.parent.is_dir():
        raise BadInput(f"{out}: {out.parent} is no directory; make it first")
    _write_new(private, signer.private_bytes, 0o600)
    try:
        key = load_pem_private_key(signer.private_bytes, None).public_key()
        _write_new(public, key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)
    except BaseException:
        private.unlink()
        raise
    return signer.public_key.keyid


def read_signer(path: Path) -> CryptoSigner:
    """The signer behind a private key; BadInput where the file holds no unencrypted key of a kind that is known."""
    try:
        key = load_pem_private_key(_read(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BadInput(f"{path}: no private key in unencrypted PEM; `dfmcl keygen` writes one") from None
    if isinstance(key, Ed25519PrivateKey) or (isinstance(key, EllipticCurvePrivateKey) and _is_p256(key)):
        return CryptoSigner(key)
    raise BadInput(f"{path}: {UNKNOWN}; `dfmcl keygen` writes one")


def read_public(path: Path) -> SSlibKey:
    """A public key with its id; BadInput where the file holds none of a kind that is known."""
    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm):
        raise BadInput(f"{path}: no public key in PEM; name the .pub file that `dfmcl keygen` wrote") from None
    if isinstance(key, Ed25519PublicKey) or (isinstance(key, EllipticCurvePublicKey) and _is_p256(key)):
        return SSlibKey.from_crypto(key)
    raise BadInput(f"{path}: {UNKNOWN}; name the .pub file that `dfmcl keygen` wrote")


def _is_p256(key: EllipticCurvePrivateKey | EllipticCurvePublicKey) -> bool:
    return isinstance(key.curve, SECP256R1)


def _read(path: Path) -> bytes:
    try:
        return read_plain(path, TEXT_BYTES, named=True)
    except (OSError, Unfit) as error:
        raise BadInput(f"{path}: {why_unread(error)}; `dfmcl keygen` writes keys") from None


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Create a file that was not there, with its mode from the first moment on."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise BadInput(f"{path}: exists, and a key is never overwritten; name another") from None
    except OSError as error:
        raise unwritable(path, error) from None
