"""Digests that are kept: the same as those that are read, for as long as a file is the same."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from PIL import Image

from dfmcl.common.errors import BadInput
from dfmcl.common.files import sha256_of
from dfmcl.robustness import digests as room
from dfmcl.robustness import folder
from dfmcl.robustness.data import open_dataset
from dfmcl.robustness.digests import Kept, digests_of
from dfmcl.robustness.members import Member, Source

T = TypeVar("T")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read, as they are."""
    names: list[str] = []
    digest = folder.file_digest

    def noting(source: Source) -> str:
        names.append(Path(str(source)).name)
        return digest(source)

    monkeypatch.setattr(room, "file_digest", noting)
    return names


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Of five hundred bytes each, more than a thread takes at once; one with a name that is no UTF-8."""
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{number}.png" for number in range(150)] + [tmp_path / "images" / "\udcff\n.png"]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 500)
    return [str(path) for path in paths]


def test_digests_are_read_once(tmp_path: Path, files: list[str], read: list[str]) -> None:
    """They are SHA-256 of the bytes, in order; a second run reads nothing, one with a new file that file alone."""
    kept = Kept(tmp_path / "kept")
    expected = [sha256_of(Path(path)) for path in files]
    assert digests_of(files) == expected
    read.clear()
    assert digests_of(files, kept=kept, place="images") == expected
    assert len(read) == len(files)
    read.clear()
    assert digests_of(files[::-1], kept=kept, place="images") == expected[::-1]
    assert read == []
    new = tmp_path / "images" / "new.png"
    new.write_bytes(b"new")
    assert digests_of([*files, str(new)], kept=kept, place="images")[-1] == sha256_of(new)
    assert read == ["new.png"]
    assert digests_of(files, kept=kept, place="others") == expected
    assert len(read) == 1 + len(files)


def test_a_file_that_changed_is_read_again(tmp_path: Path, files: list[str], read: list[str]) -> None:
    """Of another size, of another time, and one that somebody gave its old time back."""
    kept = Kept(tmp_path / "kept")
    before = digests_of(files, kept=kept, place="images")
    read.clear()
    Path(files[0]).write_bytes(b"longer" * 100)
    Path(files[1]).write_bytes(b"x" * 500)
    was = Path(files[2]).stat()
    Path(files[2]).write_bytes(b"y" * 500)
    os.utime(files[2], ns=(was.st_atime_ns, was.st_mtime_ns))
    after = digests_of(files, kept=kept, place="images")
    assert sorted(read) == ["0.png", "1.png", "2.png"]
    assert [number for number, pair in enumerate(zip(before, after, strict=True)) if len(set(pair)) > 1] == [0, 1, 2]


def test_a_kept_digest_that_is_wrong_is_found_where_it_is_asked_for(tmp_path: Path, files: list[str]) -> None:
    """`--verify-data` reads all files, and says which one is not what the place says; else nothing is read."""
    kept = Kept(tmp_path / "kept")
    good = digests_of(files, kept=kept, place="images")
    assert digests_of(files, kept=Kept(kept.folder, verify=True), place="images") == good
    (file,) = kept.folder.iterdir()
    file.write_bytes(file.read_bytes().replace(good[7].encode(), b"0" * 64))
    assert digests_of(files, kept=kept, place="images")[7] == "0" * 64
    with pytest.raises(BadInput, match=rf"7\.png: holds other bytes than its kept digest .* remove {file},"):
        digests_of(files, kept=Kept(kept.folder, verify=True), place="images")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"dfmcl.digests/1\0a\0b", b"dfmcl.digests/1\0a\0b\0c\0d\0e", b"\xff"]
)
def test_a_damaged_place_costs_time_only(tmp_path: Path, files: list[str], content: bytes) -> None:
    """Whatever lies there."""
    kept = Kept(tmp_path / "kept")
    expected = digests_of(files, kept=kept, place="images")
    (file,) = kept.folder.iterdir()
    file.write_bytes(content)
    assert digests_of(files, kept=kept, place="images") == expected
    assert file.stat().st_size > 10_000


def test_a_place_that_cannot_be_written_costs_time_only(tmp_path: Path, files: list[str]) -> None:
    """Such as the home of a container's user."""
    (tmp_path / "file").write_text("no folder")
    assert digests_of(files, kept=Kept(tmp_path / "file" / "kept"), place="images") == digests_of(files)


def test_members_of_a_shard_are_as_old_as_the_shard(tmp_path: Path, read: list[str]) -> None:
    """Digests of stretches of one file; that file's change is theirs."""
    path, kept = tmp_path / "0.tar", Kept(tmp_path / "kept")

    def made(colour: int) -> list[Member]:
        with tarfile.open(path, "w") as archive:
            for name in "ab":
                info = tarfile.TarInfo(name)
                info.size = 9
                archive.addfile(info, io.BytesIO(bytes([colour]) * 8 + name.encode()))
        with tarfile.open(path) as archive:
            return [Member(str(path), info.name, info.offset_data, info.size) for info in archive]

    first = digests_of(made(1), kept=kept, place="shards")
    read.clear()
    second = digests_of(made(2), kept=kept, place="shards")
    assert len({*first, *second}) == 4
    assert read == ["a", "b"]


def test_a_data_set_keeps_its_digests_and_says_how_far_it_is(tmp_path: Path, read: list[str]) -> None:
    """Both parts where one trains; of a gate the training part alone, because its verdict is about the test images."""
    for number in range(12):
        place = tmp_path / "own" / ("train", "test")[number % 2] / ("cat", "dog")[number // 2 % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number * 20, 0, 0)).save(place / f"{number}.png")
    told: list[tuple[str, int | None]] = []

    def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        told.append((label, total))
        yield from items

    def digest(kept: Kept | None) -> str:
        read.clear()
        return open_dataset("folder", str(tmp_path / "own"), 16, track, kept=kept).sha256

    plain = digest(None)
    assert told == [("digests of train images", 6), ("digests of test images", 6)]
    for kept, first, later in ((Kept(tmp_path / "a"), 12, 0), (Kept(tmp_path / "b", test=False), 12, 6)):
        assert (digest(kept), len(read)) == (plain, first)
        assert (digest(kept), len(read)) == (plain, later)
    assert np.unique(read).size == 6


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Kept or not."""
    for kept in (None, Kept(tmp_path / "kept")):
        with pytest.raises(BadInput, match=r"no\.png: No such file or directory; remove it"):
            digests_of([str(tmp_path / "no.png")], kept=kept, place="x")
