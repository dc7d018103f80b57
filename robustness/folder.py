"""A folder of class folders, CLASS/*.png, as arrays; every file that is not read is counted."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dfmcl.common import pictures
from dfmcl.common.errors import BadInput
from dfmcl.common.preprocessing import USUAL, Preprocessing
from dfmcl.robustness.members import Source, opened

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # as this Pillow has them
MAX_PIXELS = 89_478_485  # of a file, as Pillow has it: a decoded image takes up to a quarter of a gigabyte
SYSTEM = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})  # what archives and desktops leave beside images
HIDDEN, OUTSIDE, BARE = "hidden", "outside a class folder", "without a suffix"  # reasons, where it is no suffix


@dataclass(frozen=True)
class Part:
    """The files of a part, of a folder in the order of `classes` and by name; labels int64 (N,); how many files were
    skipped, by reason."""

    paths: tuple[Source, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    skipped: Counter[str]

    def without_images(self) -> Part:
        """The same classes, and nothing of them."""
        return Part((), self.labels[:0], self.classes, Counter())


def list_part(folder: Path) -> Part:
    """All images of folder/CLASS, none of them opened. BadInput names what is in the way."""
    files, skipped = _found(folder)
    if not files:
        raise BadInput(f"{folder}: has no class folders; expected {folder}/CLASS/*.png{_but(skipped)}")
    empty = [name for name, members in files.items() if not members]
    if empty:
        advice = "add some, or remove the folder from both parts"
        raise BadInput(f"{folder / empty[0]}: holds no image; {advice}{_but(skipped)}")
    labels = np.repeat(np.arange(len(files)), [len(members) for members in files.values()])
    paths = tuple(path for members in files.values() for path in members)
    return Part(paths, labels.astype(np.int64), tuple(files), skipped)


def read_image(path: Source, side: int, mode: str = "RGB", preprocessing: Preprocessing = USUAL) -> NDArray[np.uint8]:
    """One file as uint8 (side, side, C); BadInput that names it where it is none."""
    try:
        with opened(path) as file:
            picture = pictures.opened(file, _readable(), MAX_PIXELS)
            return pictures.to_array(preprocessing.applied(pictures.upright(picture, mode), side, side))
    except pictures.Unusable as error:
        advice = "; replace it, or remove it" if error.reason == "bad_image" else ""
        raise BadInput(f"{path}: {error}{advice}") from None
    except OSError as error:
        raise unreadable(path, error) from None


def file_digest(path: Source) -> str:
    """Hex SHA-256 of a file's bytes; BadInput where it cannot be read."""
    try:
        with opened(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Source, error: OSError) -> BadInput:
    """What is said of a file that the system does not give."""
    return BadInput(f"{path}: {error.strerror or error}; remove it, or make it readable")


def described(skipped: Mapping[str, int]) -> str:
    """`skipped 12 files: 10 .heic, 2 hidden (supported: AVIF, BMP, ...)`; nothing where none was."""
    if not skipped:
        return ""
    total, rows = sum(skipped.values()), sorted(skipped.items(), key=lambda row: (-row[1], row[0]))
    counts = ", ".join(f"{count} {reason}" for reason, count in rows)
    return f"skipped {total} file{'s' if total > 1 else ''}: {counts} (supported: {', '.join(_readable())})"


def _but(skipped: Mapping[str, int]) -> str:
    return f"; {described(skipped)}" if skipped else ""


@functools.cache
def _readable() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def suffixes() -> frozenset[str]:
    """Of the formats that can be read, in small letters, with the dot."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _readable())


def _found(folder: Path) -> tuple[dict[str, list[str]], Counter[str]]:
    """The paths of each class's images, and how many other files there are, by reason."""
    files: dict[str, list[str]] = {}
    skipped: Counter[str] = Counter()
    try:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if not entry.is_dir():
                skipped[HIDDEN if _hidden(entry.name) else OUTSIDE] += 1
                continue
            found = [] if _hidden(entry.name) else files.setdefault(entry.name, [])
            for path, reason in _classified(entry.path, hidden=_hidden(entry.name)):
                if reason:
                    skipped[reason] += 1
                else:
                    found.append(path)
    except OSError as error:
        expected = f"expected {folder}/CLASS/*.png"
        raise BadInput(f"{error.filename or folder}: {error.strerror or error}; {expected}") from None
    return files, skipped


def _classified(top: str, *, hidden: bool) -> Iterator[tuple[str, str]]:
    """Every file below `top`, by name, with the reason why it is none of a class's images, or nothing."""
    for root, names in sorted(_walked(top)):
        inside = hidden or any(map(_hidden, Path(root).relative_to(top).parts))
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122  # as above
            known = "" if suffix in suffixes() else suffix or BARE
            yield os.path.join(root, name), HIDDEN if inside or _hidden(name) else known  # noqa: PTH118  # as above


def _walked(top: str) -> Iterator[tuple[str, list[str]]]:
    """Each folder and its files, links followed. BadInput for a link that leads back, which would be read for ever."""
    seen = set()
    for root, _, names in os.walk(top, onerror=_raise, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            raise BadInput(f"{root}: leads to a folder of the same class, whose images would count twice; remove it")
        seen.add(real)
        yield root, names


def _hidden(name: str) -> bool:
    return name in SYSTEM or name.startswith(".")


def _raise(error: OSError) -> None:
    raise error
