"""Who signs and who is believed: the little that is asked of a key, so that no private byte need leave an HSM or a KMS.

Every signer and key of securesystemslib fits; `read_signer` and `read_public` of keys.py make the ones on disk,
`command_signer` of command.py the ones that a command reaches.
"""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

from securesystemslib.exceptions import Error as SignatureError
from securesystemslib.signer import Signature

from dfmcl.common.errors import BadInput

# Always the same signature for a text (RFC 8032), so that its holder cannot choose one. ECDSA draws each anew.
DETERMINISTIC = ("ed25519",)
SEALING = b"dfmcl gate state/2"  # signed for this and nothing else, shown to nobody; no DSSE payload, no order's text


class PublicKey(Protocol):
    """keyid: as trust files and signatures know it. scheme: how it signs, such as ed25519. keyval: PEM, as "public"."""

    keyid: str
    scheme: str
    keyval: dict[str, Any]

    def verify_signature(self, signature: Signature, data: bytes) -> None:
        """SignatureError where the signature is not this key's over these bytes."""


class Signer(Protocol):
    """One key that signs, wherever it lies."""

    @property
    def public_key(self) -> PublicKey: ...
    def sign(self, payload: bytes) -> Signature: ...


def made_by(key: PublicKey, signature: Signature | None, text: bytes) -> bool:
    """Whether a signature names this key and is its, over just this text."""
    if signature is None or signature.keyid != key.keyid:
        return False
    try:
        key.verify_signature(signature, text)
    except SignatureError:
        return False
    return True


def only_signature(signer: Signer, text: bytes) -> str:
    """The one signature that this key can give a text, in hex; BadInput where it could give many."""
    key = signer.public_key
    if key.scheme not in DETERMINISTIC:
        raise BadInput(
            f"key {key.keyid[:12]}: {key.scheme} signs a text differently each time, so it cannot draw an order; name"
            " an ed25519 key first"
        )
    return signer.sign(text).signature


def seal_of(signer: Signer) -> bytes:
    """32 bytes that only the key's holder can make, the same each time; BadInput as above."""
    return hashlib.sha256(bytes.fromhex(only_signature(signer, SEALING))).digest()
