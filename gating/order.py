"""The order in which a gate attacks the test images: a permutation by the digests of model, data and policy.

An author who tries many files of one model can find one that such an order flatters. The signature of a key that he
does not hold, mixed in, takes that away: Ed25519 signatures (RFC 8032) are deterministic, so a gate's holder draws one
order for a file, and nobody else can tell which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from securesystemslib.exceptions import Error as SignatureError
from securesystemslib.signer import CryptoSigner, Signature, SSlibKey

from dfmcl.common.errors import BadInput

PURPOSE = "dfmcl order of images/1"  # such a text is no DSSE payload, which begins with DSSEv1


@dataclass(frozen=True)
class Matter:
    """What an order is of. model, data, policy: hex SHA-256; images: of the data set."""

    model: str
    data: str
    policy: str
    images: int

    @property
    def text(self) -> bytes:
        return "\n".join((PURPOSE, self.model, self.data, self.policy, str(self.images))).encode()


@dataclass(frozen=True)
class Draw:
    """A gate's word for its order. keyid: of the key, as trust files know it; signature: hex, over the matter."""

    keyid: str
    signature: str

    @staticmethod
    def by(signer: CryptoSigner, matter: Matter) -> Draw:
        """The one draw of this key."""
        return Draw(signer.public_key.keyid, signer.sign(matter.text).signature)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Draw:
        """KeyError or BadInput where it is none."""
        found = Draw(value["keyid"], value["signature"])
        for text, size in ((found.keyid, 32), (found.signature, 64)):
            if not isinstance(text, str) or text != text.lower() or not _is_hex(text, size):
                raise BadInput(f"{str(text)[:80]!r} is not {size} bytes in hex")
        return found

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    def is_by(self, key: SSlibKey, matter: Matter) -> bool:
        """Whether `key` made it, over just this."""
        try:
            key.verify_signature(Signature(self.keyid, self.signature), matter.text)
        except SignatureError:
            return False
        return key.keyid == self.keyid


def _is_hex(text: str, size: int) -> bool:
    return len(text) == 2 * size and set(text) <= set("0123456789abcdef")


def order_of(matter: Matter, draw: Draw | None = None) -> NDArray[np.int64]:
    """All images `(images,)` as they are attacked: drawn by the digests, and by the signature where there is one."""
    seeds = (matter.model, matter.data, matter.policy, *(() if draw is None else (draw.signature,)))
    digest = hashlib.sha256("\n".join(seeds).encode()).digest()
    return np.random.default_rng(list(digest)).permutation(matter.images)
