"""Randomness by address: the same seed and the same address give the same stream, whatever ran before.

A step that draws from `generator(seed, "attack", step)` needs no saved generator state to be repeated or resumed.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derived_seed(seed: int, *address: str | int) -> int:
    """A 63-bit seed from a base seed and an address such as `("attack", 17)`."""
    digest = hashlib.sha256(repr((seed, *address)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *address: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device`, seeded by address."""
    import torch  # here, as a reader of records asks for seeds only

    return torch.Generator(device=device).manual_seed(derived_seed(seed, *address))
