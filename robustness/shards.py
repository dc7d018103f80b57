"""Tar shards in the layout of webdataset: an image and its label under one name, `000123.jpg` and `000123.cls`."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dfmcl.common.errors import BadInput
from dfmcl.common.reader import opened
from dfmcl.robustness.classes import numbered
from dfmcl.robustness.folder import BARE, HIDDEN, Part, suffixes
from dfmcl.robustness.members import Member

LABEL, LABEL_BYTES = ".cls", 4096  # a name or a number
UNLABELLED, ALONE = "without a .cls", ".cls without an image"
END_BYTES = 2**20  # behind a shard's end that must be empty; programs that write tar files fill up 10 KiB
ODD = {  # members that are no plain files, by their type
    tarfile.SYMTYPE: "symbolic link",
    tarfile.LNKTYPE: "hard link to no file before it",
    tarfile.FIFOTYPE: "FIFO",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
}
SPARSE, UNKNOWN = "sparse file", "member of an unknown type"


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
            for member in _files(archive, shard, skipped):
                folder, slash, base = member.name.rpartition("/")
                stem, dot, rest = base.partition(".")
                key, suffix = folder + slash + stem, (dot + rest).lower()
                if not stem:
                    skipped[HIDDEN] += 1
                elif suffix == LABEL:
                    if key in labels:
                        raise BadInput(f"{shard}: {member.name} stands in it twice; keep one")
                    labels[key] = _label(raw, member)
                elif suffix in suffixes():
                    if key in images:
                        raise BadInput(f"{shard}: {member.name} and {images[key].name} share a name; keep one")
                    images[key] = member
                else:
                    skipped[suffix or BARE] += 1
            _require_end(raw, archive.offset, shard)
    except BadInput:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise BadInput(f"{shard}: not readable as .tar: {error}") from None
    for key in dict.fromkeys((*images, *labels)):
        yield key, images.get(key), labels.get(key)


def _files(archive: tarfile.TarFile, shard: Path, skipped: Counter[str]) -> Iterator[Member]:
    """All files of a shard; a hard link is the member before it that it names, as GNU tar writes a file's second name.

    Everything else but folders is counted.
    """
    files = dict[str, Member]()
    for info in archive:
        linked = files.get(info.linkname) if info.islnk() else None
        if linked is not None:
            files[info.name] = Member(str(shard), info.name, linked.offset, linked.size)
        elif info.isfile() and not info.issparse():
            files[info.name] = Member(str(shard), info.name, info.offset_data, info.size)
        else:
            if not info.isdir():
                skipped[SPARSE if info.issparse() else ODD.get(info.type, UNKNOWN)] += 1
            continue
        yield files[info.name]


def _label(raw: BinaryIO, member: Member) -> str:
    """A .cls file's text. The place in the shard stays, because its members are still being listed."""
    if member.size > LABEL_BYTES:
        raise BadInput(f"{member}: holds {member.size:,} bytes, at most {LABEL_BYTES:,}; write a class into it")
    place = raw.tell()
    raw.seek(member.offset)
    text = raw.read(member.size).decode("utf-8").strip()
    raw.seek(place)
    return text


def _require_end(raw: BinaryIO, end: int, shard: Path) -> None:
    """BadInput where more follows the last member that could be listed: a damaged header, or another tar file."""
    raw.seek(end)
    if raw.read(END_BYTES).strip(b"\0"):
        raise BadInput(f"{shard}: is damaged behind byte {end}, or two shards in one file; make it again")
