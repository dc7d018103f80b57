"""What one key has asked about lately: fingerprints in rings of fixed size, and how much a new one resembles them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dfmcl.serving.detection.fingerprints import TAGS, Fingerprint, Words

ONES = np.array([word.bit_count() for word in range(1 << 16)], np.uint8)  # numpy counts bits itself only from 2.0 on


class History:
    """The last `queries` different images of one key; images older than `seconds` do not count."""

    def __init__(self, queries: int, seconds: float) -> None:
        self.seen = 0  # images remembered so far, forgotten ones too
        self.newest = float("-inf")  # when the last of them came
        self._queries, self._seconds = queries, seconds
        self._times = np.zeros(queries)
        self._exact = np.zeros(queries, np.uint64)
        self._tags = np.zeros((queries, TAGS), np.uint16)
        self._tagged = np.zeros(queries, np.uint8)
        self._outlines: Words = np.zeros((queries, 0), np.uint16)
        self._outlined = np.zeros(queries, np.uint16)

    @property
    def held(self) -> int:
        """How many fingerprints are in memory."""
        return min(self.seen, self._queries)

    def resemblance(self, new: Fingerprint, now: float) -> dict[str, float] | None:
        """By detector the similarity, in [0, 1], to the most similar image that counts; None for exactly the same.

        0 where there is none, or nothing to compare: an image without contrast resembles nothing. Remembers the new
        one, unless it was there. now: seconds of any clock that only goes forward.
        """
        counts = self._times[: self.held] >= now - self._seconds
        if (self._exact[: self.held][counts] == new.exact).any():
            return None
        if self._outlines.shape[1] != len(new.outline):  # the first image, or a model that takes others
            self._outlines = np.zeros((self._queries, len(new.outline)), np.uint16)
        found = {
            "salted_hash": float(self._tags_shared(new.tags)[counts].max(initial=0)),
            "perceptual": float(self._outlines_shared(new.outline)[counts].max(initial=0)),
        }
        self._remember(new, now)
        return found

    def _tags_shared(self, tags: Words) -> npt.NDArray[np.float64]:
        """Tags in common with each that is held, as a share of the larger number of the two.

        A pass over two bytes a tag takes less memory and, for some thousands of images, no more time than an index of
        all tags would. Two images without anything in common share a tag by chance in one case of 26.
        """
        tags = tags[tags > 0]
        wanted = np.zeros(1 << 16, np.uint8)
        wanted[tags] = 1
        shared = wanted[self._tags[: self.held]].sum(axis=1, dtype=np.uint8)
        return np.asarray(shared / np.maximum(np.maximum(self._tagged[: self.held], len(tags)), 1))

    def _outlines_shared(self, bits: Words) -> npt.NDArray[np.float64]:
        """Bits in common with each that is held, as a share of the bits that either has set (Jaccard 1901).

        Unlike Hamming's distance it gives no credit for areas without contrast, in which all images agree.
        """
        both = ONES[self._outlines[: self.held] & bits].sum(axis=1, dtype=np.uint16).astype(np.int64)
        either = self._outlined[: self.held] + int(ONES[bits].sum()) - both
        return np.asarray(both / np.maximum(either, 1))

    def _remember(self, new: Fingerprint, now: float) -> None:
        place = self.seen % self._queries
        self._times[place], self._exact[place] = now, new.exact
        self._tags[place], self._tagged[place] = new.tags, np.count_nonzero(new.tags)
        self._outlines[place], self._outlined[place] = new.outline, ONES[new.outline].sum()
        self.seen, self.newest = self.seen + 1, now
