"""Images as a data set holds them: an array, or files that are decoded when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dfmcl.common.preprocessing import Preprocessing
from dfmcl.common.progress import Track, silent
from dfmcl.robustness.digests import digests_of
from dfmcl.robustness.folder import Part, read_image
from dfmcl.robustness.members import Source

HELD = 2**27  # bytes of images at once: 891 of 224 pixels, 43,690 of CIFAR-10; as many again of adversarial ones


class Images(Protocol):
    """uint8 (N, H, W, C); an index gives an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...
    def __array__(self) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class Pictures:
    """The files of a part, brought to (side, side); mode: RGB or L. Nothing is kept of what was decoded.

    digesting: how their digests are had.
    """

    part: Part
    side: int
    mode: str
    preprocessing: Preprocessing
    digesting: Callable[[Sequence[Source]], Sequence[str]] = digests_of

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), self.side, self.side, len(self.mode)

    def __len__(self) -> int:
        return len(self.part.paths)

    def __getitem__(self, index: slice | NDArray[np.int64], /) -> NDArray[np.uint8]:
        """The images at `index`, in its order; BadInput names a file that is none."""
        return self.read(np.arange(len(self))[index], silent)

    def __array__(self) -> NDArray[np.uint8]:
        return self[:]

    def read(
        self,
        index: NDArray[np.int64],
        track: Track = silent,
        label: str = "reading images",
        out: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """The same, with progress. out: where they go."""
        images = np.empty((len(index), *self.shape[1:]), np.uint8) if out is None else out
        for place, number in enumerate(track(index, label, len(index))):
            images[place] = read_image(self.part.paths[number], self.side, self.mode, self.preprocessing)
        return images

    @cached_property
    def digests(self) -> Sequence[str]:
        """SHA-256 of each file's bytes, in order."""
        return self.digesting(self.part.paths)


def held_at_once(images: Images, index: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The index in parts of whose images HELD bytes have room, at least one in each."""
    size = max(1, HELD // math.prod(images.shape[1:]))
    return [index[begin : begin + size] for begin in range(0, len(index), size)]
