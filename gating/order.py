"""The order in which a gate attacks the test images: a permutation by the digests of model, data and policy.

An author who tries many files of one model can find one that such an order flatters. The signature of a key that he
does not hold, mixed in, takes that away: Ed25519 signatures (RFC 8032) are deterministic, so a gate's holder draws one
order for a file, and nobody else can tell which. The attacks and checks of that gate draw from the signature as well.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from securesystemslib.signer import Signature

from dfmcl.common.entry import Digest, Entry, text
from dfmcl.common.errors import BadInput
from dfmcl.gating.signing.signer import PublicKey, Signer, made_by, only_signature
from dfmcl.robustness.seeds import derived_seed
from dfmcl.robustness.statistics import Flags

PURPOSE = "dfmcl order of images/1"  # such a text is no DSSE payload, which begins with DSSEv1
BLOCK = "block"  # what the images of a gate are attacked for, part of the address of its seeds
FIRST_BLOCK = (BLOCK, 0)  # whose seed the record of all blocks has


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
class Draw(Entry):
    """A gate's word for its order. keyid: of the key, as trust files know it; signature: hex, over the matter."""

    keyid: Digest
    signature: Annotated[str, text("^[0-9a-f]{128}$")]

    def __post_init__(self) -> None:
        hex_of(self.keyid, 32)
        hex_of(self.signature, 64)

    @staticmethod
    def by(signer: Signer, matter: Matter) -> Draw:
        """The one draw of this key; BadInput where it could make many, because its holder might choose."""
        return Draw(signer.public_key.keyid, only_signature(signer, matter.text))

    def is_by(self, key: PublicKey, matter: Matter) -> bool:
        """Whether `key` made it, over just this."""
        return made_by(key, Signature(self.keyid, self.signature), matter.text)


def hex_of(value: object, size: int) -> str:
    """So many bytes as lower-case hex, which is one text for one value; BadInput for all else."""
    if not isinstance(value, str) or len(value) != 2 * size or not set(value) <= set("0123456789abcdef"):
        raise BadInput(f"{str(value)[:80]!r} is not {size} bytes in hex")
    return value


def seed_of(seed: int, draw: Draw | None) -> int:
    """Of attacks and checks: the policy's, which an author knows, and the draw, which he does not."""
    return seed if draw is None else derived_seed(seed, "draw", draw.signature)


def order_of(matter: Matter, draw: Draw | None = None) -> NDArray[np.int64]:
    """All images `(images,)` as they are attacked: drawn by the digests, and by the signature where there is one."""
    return _generator(matter, draw).permutation(matter.images)


def drawn_of(matter: Matter, draw: Draw | None, chance: float) -> Flags:
    """Which of the images `(images,)`, as the data set has them, meet the whole suite: each with the same chance."""
    return _generator(matter, draw, "whole").random(matter.images) < chance


def _generator(matter: Matter, draw: Draw | None, *purpose: str) -> np.random.Generator:
    seeds = (matter.model, matter.data, matter.policy, *(() if draw is None else (draw.signature,)), *purpose)
    return np.random.default_rng(list(hashlib.sha256("\n".join(seeds).encode()).digest()))
