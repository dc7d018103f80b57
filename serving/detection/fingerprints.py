"""What is kept of an image to know near-duplicates of it by: a fingerprint of some 200 bytes in place of the image.

Attacks by queries ask about many images that hardly differ, so the fingerprints of their questions resemble each other.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

DetectorName = Literal["salted_hash", "perceptual"]
DETECTORS: tuple[DetectorName, ...] = get_args(DetectorName)

# Of the salted hash, as its authors chose them for 32 x 32 images.
STEP = 50  # of the quantisation, in 255ths
WINDOW = 20  # values in a row
TAGS = 50  # digests kept of an image
WINDOWS = 4096  # hashed of a larger image, evenly spread, so that its size does not decide the cost
# Of the perceptual hash.
GRID = 8  # blocks a side
CONTRAST = 8.0  # in 255ths: blocks that differ by less say nothing, because a perturbation of 8/255 can turn them round

Image = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Fingerprint:
    """exact: 64 bits that only the same bytes have; tags: TAGS, 0 where there are fewer; outline: bits, 16 a word."""

    exact: int
    tags: Words
    outline: Words


class Fingerprinter:
    """Makes fingerprints of uint8 images (H, W, C) with a secret salt; those of two salts have nothing in common."""

    def __init__(self, salt: bytes) -> None:
        """salt: 16 to 64 secret bytes, such as `secrets.token_bytes(32)`."""
        self._salt = salt
        self._multipliers = np.frombuffer(self._secret("multipliers", 8 * WINDOW), np.uint64)
        self._offsets = lru_cache(maxsize=2)(self._make_offsets)  # of the model that leaves, and the one that comes

    def __call__(self, image: Image) -> Fingerprint:
        """The fingerprint of one image."""
        exact = hashlib.blake2b(image.tobytes(), digest_size=8, key=self._salt)
        exact.update(repr(image.shape).encode())
        tags = salted_tags(image.reshape(-1), self._offsets(image.size), self._multipliers)
        return Fingerprint(int.from_bytes(exact.digest(), "little"), tags, outline(image))

    def _make_offsets(self, size: int) -> npt.NDArray[np.uint16]:
        return np.frombuffer(self._secret("offsets", 2 * size), np.uint16) % STEP

    def _secret(self, purpose: str, size: int) -> bytes:
        return hashlib.shake_256(self._salt + purpose.encode()).digest(size)


def salted_tags(
    values: npt.NDArray[np.uint8], offsets: npt.NDArray[np.uint16], multipliers: npt.NDArray[np.uint64]
) -> Words:
    """TAGS of an image's values (M,): 16 bits each, ascending, 0 where the image has fewer different ones.

    After Blacklight (Li et al., USENIX Security 2022): values are quantised, at secret borders: offsets (M,) in
    [0, STEP); every window in a row, or about WINDOWS of them, is hashed; the TAGS largest digests stay. A digest is
    the upper part of sum(multiplier * value) modulo 2**64 with secret multipliers, a keyed universal hash (multilinear;
    two windows collide with a chance of 2**-56), in place of SHA-256: one product makes them all. Nobody but the holder
    of the salt ever sees a digest, so that is all the secrecy it needs.
    """
    quantised = ((values + offsets) // STEP + 1).astype(np.uint64)
    windows = sliding_window_view(quantised, min(WINDOW, len(quantised)))
    windows = windows[:: -(-len(windows) // WINDOWS)]
    digests = (windows @ multipliers[: windows.shape[1]]) >> np.uint64(8)
    most = 4 * TAGS  # flat areas repeat a digest, so that TAGS different ones are hardly ever among fewer
    largest = np.unique(np.partition(digests, -most)[-most:] if len(digests) > most else digests)
    if len(largest) < TAGS:
        largest = np.unique(digests)
    kept = np.unique(largest[-TAGS:].astype(np.uint16))  # their lower bits, which the choice says nothing about
    kept = kept[kept > 0]
    return np.concatenate([np.zeros(TAGS - len(kept), np.uint16), kept])


def outline(image: Image) -> Words:
    """Which blocks of an image (H, W, C) are brighter than their neighbours, and which darker: 16 bits a word.

    After PIHA (Choi, Shin & Choi, Future Generation Computer Systems 145, 2023): blur, block means, local patterns.
    Otherwise than there the blocks are of the value, max(R, G, B), not the hue, which greyish pixels have none of; and
    the patterns are ternary (Tan & Triggs 2010): a difference up to CONTRAST sets no bit.
    """
    height, width = (min(GRID, size) for size in image.shape[:2])
    means = _block_means(_blurred(image.max(axis=2).astype(np.float32)), height, width)
    around = _edged(means)
    # Four of the eight neighbours: the other four would tell the same, seen from the other side.
    neighbours = [around[1 + y :, 1 + x :][:height, :width] for y, x in ((0, 1), (1, 1), (1, 0), (1, -1))]
    difference = np.stack(neighbours) - means
    bits = np.packbits(np.concatenate([difference > CONTRAST, difference < -CONTRAST]))
    return np.append(bits, np.zeros(len(bits) % 2, np.uint8)).view(np.uint16)


def _blurred(plane: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Convolved (H, W) with the 3 x 3 binomial kernel, a Gaussian's."""
    padded = _edged(plane)
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return np.asarray((rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16)


def _edged(plane: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(H + 2, W + 2): (H, W) in a border that repeats its edge. As np.pad does in many times the time."""
    padded = np.empty((plane.shape[0] + 2, plane.shape[1] + 2), np.float32)
    padded[1:-1, 1:-1], padded[0, 1:-1], padded[-1, 1:-1] = plane, plane[0], plane[-1]
    padded[:, 0], padded[:, -1] = padded[:, 1], padded[:, -2]
    return padded


def _block_means(plane: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.float32]:
    """Of (H, W) cut into height x width blocks, as even as they can be."""
    rows, columns = (np.arange(n + 1) * size // n for n, size in zip((height, width), plane.shape, strict=True))
    sums = np.add.reduceat(np.add.reduceat(plane, rows[:-1], axis=0), columns[:-1], axis=1)
    return np.asarray(sums / (np.diff(rows)[:, None] * np.diff(columns)), np.float32)
