"""Images of an .npz that numpy stored as they are: mapped where they lie in the archive, and read when asked for."""

from __future__ import annotations

import math
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfmcl.common.errors import BadInput

SMALLEST = 2**27  # bytes; a smaller array is read whole, as ever
BLOCK = 2**26  # bytes that are looked at together
LOCAL, SIGNATURE, NAME_AT = 30, b"PK\x03\x04", 26  # of a zip's local header: its length, its begin, two lengths in it


@dataclass(frozen=True)
class Mapped:
    """uint8 (N, H, W, C); an index gives a copy, and nothing is held.

    path, key: the archive and its array. offset: of the first pixel. crc: of the member; head: of its header alone.
    """

    path: str
    key: str
    offset: int
    shape: tuple[int, ...]
    crc: int
    head: int

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def _file(self) -> tuple[mmap.mmap, NDArray[np.uint8]]:
        with open(self.path, "rb") as file:  # noqa: PTH123  # of a path that is a string everywhere here
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        flat = np.frombuffer(held, np.uint8, math.prod(self.shape), self.offset)
        return held, flat.reshape(self.shape)

    def __getitem__(self, index: Any, /) -> NDArray[np.uint8]:
        held, pixels = self._file
        images = np.array(pixels[index])
        held.madvise(mmap.MADV_DONTNEED)  # else all that was ever read counts as this process's memory
        return images

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.uint8]:
        return self[:]

    def blocks(self) -> Iterator[NDArray[np.uint8]]:
        """All images in order, some at once; BadInput in the end, where the archive's checksum says others."""
        size, crc = max(1, BLOCK // math.prod(self.shape[1:])), self.head
        for begin in range(0, len(self), size):
            block = self[begin : begin + size]
            crc = zlib.crc32(block.data, crc)
            yield block
        if crc != self.crc:
            raise BadInput(f"{self.path}: not readable as .npz: Bad CRC-32 for file '{self.key}.npy'")

    @property
    def top(self) -> int:
        """The largest value, or one above 1, which comes sooner."""
        most = 0
        for block in self.blocks():
            most = max(most, int(block.max()))
            if most > 1:
                break
        return most


def mapped(path: str, key: str) -> Mapped | None:
    """An archive's array, where it is large, uint8, in rows (C order), and neither compressed nor encrypted."""
    with zipfile.ZipFile(path) as archive:
        info = archive.NameToInfo.get(f"{key}.npy")
        if info is None:  # what numpy says of it is said of all that is no array
            return None
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size < SMALLEST:
            return None
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            if version not in ((1, 0), (2, 0)):
                return None
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, columns_first, dtype = read(member)
            header = member.tell()
    pixels = math.prod(shape)
    if dtype != np.uint8 or columns_first or len(shape) < 2 or header + pixels != info.file_size:
        return None
    with open(path, "rb") as file:  # noqa: PTH123  # as above
        file.seek(info.header_offset)
        local = file.read(LOCAL)
        begin = info.header_offset + LOCAL + sum(struct.unpack_from("<HH", local.ljust(LOCAL, b"\0"), NAME_AT))
        file.seek(begin)
        head = file.read(header)
        size = os.fstat(file.fileno()).st_size
    # The directory at an archive's end and the header before the member must mean one and the same array.
    if local[:4] != SIGNATURE or not head.startswith(np.lib.format.MAGIC_PREFIX) or begin + info.file_size > size:
        return None
    return Mapped(path, key, begin + header, tuple(shape), info.CRC, zlib.crc32(head))
