"""Tar shards in the layout of webdataset: an image and its label under one name, `000123.jpg` and `000123.cls`."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dfmcl.common.errors import BadInput
from dfmcl.common.reader import TEXT_BYTES, opened, read_plain, why_unread
from dfmcl.robustness.folder import Part, suffixes
from dfmcl.robustness.members import Member

LABEL, NAMES = ".cls", "classes.txt"  # a name or a number; the numbers' names, one a line, beside the shards
LABEL_BYTES = 4096
UNLABELLED, ALONE = "without a .cls", ".cls without an image"


@dataclass(frozen=True)
class _Sample:
    """An image and its label, as its shard has them."""

    image: Member
    label: str


def list_shards(folder: Path) -> tuple[Part, Part]:
    """The training and the test part, from folder/train/*.tar and folder/test/*.tar, or folder/*.tar, all of them test.

    Samples are in the order of the shards' names and of their members. Images are not read. BadInput names the shard
    that is damaged.
    """
    parted = any((folder / part).is_dir() for part in ("train", "test"))
    places = {"train": folder / "train" if parted else None, "test": folder / "test" if parted else folder}
    found = {part: _samples(place) if place else ([], Counter[str]()) for part, place in places.items()}
    place, classes = numbered({sample.label for samples, _ in found.values() for sample in samples}, folder)
    train, test = (
        Part(
            tuple(sample.image for sample in samples),
            np.array([place[sample.label] for sample in samples], np.int64),
            classes,
            skipped,
        )
        for samples, skipped in found.values()
    )
    return train, test


def numbered(labels: set[str], folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Each label's class, and the names of all: numbers are in their order, names in the alphabet's."""
    if not all(label.isascii() and label.isdecimal() for label in labels):
        return {label: number for number, label in enumerate(sorted(labels))}, tuple(sorted(labels))
    most = max(map(int, labels))
    try:
        names = tuple(read_plain(folder / NAMES, TEXT_BYTES, named=True).decode("utf-8").splitlines())
    except FileNotFoundError:
        names = tuple(map(str, range(most + 1)))
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / NAMES}: not readable: {why_unread(error)}") from None
    if most >= len(names):
        raise BadInput(f"{folder}: has a label {most}, and {NAMES} names {len(names)} classes, 0 to {len(names) - 1}")
    return {label: int(label) for label in labels}, names


def _samples(place: Path) -> tuple[list[_Sample], Counter[str]]:
    """All samples of a folder's shards; BadInput where there is none."""
    try:
        shards = sorted(path for path in place.iterdir() if path.suffix == ".tar")
    except OSError as error:
        raise BadInput(f"{place}: {error.strerror or error}; expected {place}/*.tar") from None
    if not shards:
        packed = next((path.name for path in place.iterdir() if ".tar." in path.name or path.suffix == ".tgz"), "")
        advice = f"; unpack {packed}: only a plain .tar can be read at any place" if packed else ""
        raise BadInput(f"{place}: holds no shard; expected {place}/*.tar{advice}")
    samples, skipped = list[_Sample](), Counter[str]()
    for shard in shards:
        for name, image, label in _keyed(shard, skipped):
            if image is None or label is None:
                skipped[ALONE if image is None else UNLABELLED] += 1
            elif not label:
                raise BadInput(f"{shard}/{name}{LABEL}: is empty; write the class into it, by name or number")
            else:
                samples.append(_Sample(image, label))
    if not samples:
        raise BadInput(f"{place}: its shards hold no image with a label; expected NAME.jpg beside NAME{LABEL}")
    return samples, skipped


def _keyed(shard: Path, skipped: Counter[str]) -> Iterator[tuple[str, Member | None, str | None]]:
    """What belongs together: the name before the first dot, the image, the label."""
    images, labels = dict[str, Member](), dict[str, str]()
    try:
        with opened(shard, named=True) as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
            for info in archive:
                if not info.isfile() or info.issparse():
                    continue
                folder, slash, base = info.name.rpartition("/")
                stem, dot, rest = base.partition(".")
                key, suffix = folder + slash + stem, (dot + rest).lower()
                if suffix == LABEL:
                    file = archive.extractfile(info)
                    labels[key] = file.read(LABEL_BYTES).decode("utf-8").strip() if file else ""
                elif suffix in suffixes():
                    if key in images:
                        raise BadInput(f"{shard}: {info.name} and {images[key].name} share a name; keep one")
                    images[key] = Member(str(shard), info.name, info.offset_data, info.size)
                elif stem:
                    skipped[suffix or "without a suffix"] += 1
    except BadInput:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise BadInput(f"{shard}: not readable as .tar: {error}") from None
    for key in dict.fromkeys((*images, *labels)):
        yield key, images.get(key), labels.get(key)
