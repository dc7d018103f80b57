"""Lists of files and tar shards are the same data set as the folder that they were made of; wrong ones are named."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dfmcl.common.errors import BadInput
from dfmcl.robustness.data import open_dataset
from tests.common.pictures import coloured

SIDE = 16


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """train and test of three classes, two images each."""
    for number in range(12):
        place = tmp_path / "tree" / ("train", "test")[number % 2] / ("cat", "dog", "eel")[number // 4]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02}.png").write_bytes(coloured(number * 20))
    return tmp_path / "tree"


def shard(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]  # a mode by its name
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def listed(tree: Path, part: str) -> list[Path]:
    return sorted((tree / part).glob("*/*.png"))


def test_a_list_of_a_folders_files_is_that_folder(tree: Path) -> None:
    """Classes, labels, bytes and digest; paths lie beside the list, quotes and a byte-order mark are none of a name."""
    rows = [f'{path.relative_to(tree)},"{path.parent.name}",{part}' for part in ("test", "train")
            for path in listed(tree, part)]  # fmt: skip
    (tree / "all.csv").write_text("\ufeffpath,label,split\r\n" + "\r\n".join(rows), encoding="utf-8")
    found, folder = open_dataset("csv", str(tree / "all.csv"), SIDE), open_dataset("folder", str(tree), SIDE)
    assert (found.classes, found.sha256) == (folder.classes, folder.sha256)
    np.testing.assert_array_equal(np.asarray(found.x_test), np.asarray(folder.x_test))
    np.testing.assert_array_equal(found.y_train, folder.y_train)


def test_a_list_without_parts_is_test_images(tree: Path) -> None:
    """In the order of its lines, columns in any order, others left alone."""
    paths = listed(tree, "test")[::-1]
    rows = "".join(f"{path.parent.name},by me,{path}\n" for path in paths)
    (tree / "few.csv").write_text("label,note,path\n" + rows)
    found = open_dataset("csv", str(tree / "few.csv"), SIDE)
    assert (len(found.x_train), found.y_test.tolist()) == (0, [2, 2, 1, 1, 0, 0])
    assert found.x_test.part.paths == tuple(map(str, paths))  # type: ignore[attr-defined]  # of Pictures


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line must name path and label; it names nothing, not path, label"),
        ("file,label\na.png,cat\n", "it names file, label, not path"),
        ("path,label\n", "lists no image"),
        ("path,label\na.png,cat\na.png,dog\n", r"line 3: .*a\.png stands on line 2 already"),
        ("path,label\n\na.png,\n", "line 3: label is empty"),
        ("path,label\na.png\n", "line 2: label is empty"),
        ("path,label,split\na.png,cat,val\n", "line 2: split is 'val'; choose train or test"),
        ("path,label,split\na.png,cat\n", "line 2: split is ''; choose"),
        ('path,label\n"a.png,cat\n', "unexpected end of data"),
        ("path,label\na\0.png,cat\n", r"line 2: path 'a\\x00\.png' is no file name"),
        ("path,label\na.png,cat\nx/../a.png,dog\n", r"line 3: .*x/\.\./a\.png stands on line 2 already"),
        ("path,label\nx/../a.png,cat\ny/../a.png,dog\n", r"line 3: .*y/\.\./a\.png stands on line 2 already"),
        ("path,label,split\na.png,cat,train\nb.png,dog,train\n", "lists no test image; write test into the split"),
        ("path,label,label\na.png,cat,dog\n", "its first line names label twice"),
        ("path,label\na.png,cat, big\n", "line 2: has more cells than the first line names, ' big'"),
        ("path,label\na.png,cat\n", "has one class only, 'cat'"),
        ("path,label\na.png,cat\nb.png,\u2028\n", "line 3: label is empty"),
        ("path,label\na.png,cat\nb.png,c\u2028d\n", "is no name in UTF-8 on one line"),
    ],
)
def test_a_wrong_list_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    """One line for each fault, before an image is opened."""
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        open_dataset("csv", str(tmp_path / "list.csv"), SIDE)


def test_a_list_that_is_no_text_is_named(tmp_path: Path) -> None:
    """Other bytes, a folder, nothing at all."""
    (tmp_path / "list.csv").write_bytes(coloured(3))
    for path, message in ((tmp_path / "list.csv", "utf-8"), (tmp_path, "directory"), (tmp_path / "no.csv", "No such")):
        with pytest.raises(BadInput, match=f"{path}: not readable: .*{message}"):
            open_dataset("csv", str(path), SIDE)


def test_a_listed_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """When it is asked for."""
    (tmp_path / "list.csv").write_text("path,label\na.png,cat\nb.png,dog\n")
    data = open_dataset("csv", str(tmp_path / "list.csv"), SIDE)
    with pytest.raises(BadInput, match=r"a\.png: No such file"):
        data.x_test[:1]
    with pytest.raises(BadInput, match=r"a\.png: No such file"):
        _ = data.sha256


def test_a_file_that_is_listed_by_two_names_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the list is named by a path from here."""
    (tmp_path / "list.csv").write_text(f"path,label\na.png,cat\n../{tmp_path.name}/a.png,dog\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"line 3: .*a\.png stands on line 2 already"):
        open_dataset("csv", "list.csv", SIDE)


@pytest.mark.parametrize("named", [True, False])
def test_shards_of_a_folders_files_are_that_folder(tree: Path, tmp_path: Path, *, named: bool) -> None:
    """With names as labels or numbers and their names; over two shards, files and labels in any order."""
    names = ["cat", "dog", "eel"]
    for part in ("train", "test"):
        members = {}
        for path in listed(tree, part):
            label = path.parent.name if named else str(names.index(path.parent.name))
            members[f"./x.y/{path.stem}.cls"] = f"{label}\n".encode()
            members[f"./x.y/{path.name}"] = path.read_bytes()
        rows = list(members.items())
        shard(tmp_path / "shards" / part / "0.tar", dict(rows[:6]))
        shard(tmp_path / "shards" / part / "1.tar", dict(rows[6:]))
    (tmp_path / "shards" / "classes.txt").write_text("\n".join(names))
    found, folder = open_dataset("shards", str(tmp_path / "shards"), SIDE), open_dataset("folder", str(tree), SIDE)
    assert (found.classes, found.sha256, found.remark) == (folder.classes, folder.sha256, "")
    np.testing.assert_array_equal(found.x_test[np.array([3, 0])], folder.x_test[np.array([3, 0])])


def test_members_that_are_not_read_are_counted(tmp_path: Path) -> None:
    """Nothing is left out in silence."""
    members = {
        "a.png": coloured(1),
        "a.cls": b"0",
        "b.png": coloured(2),
        "c.cls": b"1",
        "d.png": coloured(3),
        "d.cls": b"1",
    }
    shard(tmp_path / "0.tar", members | {"a.json": b"{}"})
    data = open_dataset("shards", str(tmp_path), SIDE)
    assert (data.classes, data.y_test.tolist()) == (("0", "1"), [0, 1])
    assert dict(data.skipped) == {"without a .cls": 1, ".cls without an image": 1, ".json": 1}


def test_wrong_shards_are_named(tmp_path: Path) -> None:
    """Not there, packed, cut off, of other bytes, without labels, two images of one name, a label that has no name."""
    good = {"a.png": coloured(1), "a.cls": b"0", "b.png": coloured(2), "b.cls": b"3"}
    cases: dict[str, tuple[dict[str, bytes], str]] = {
        "empty": ({}, "hold no image with a label"),
        "twice": (good | {"a.bmp": coloured(3)}, r"a\.bmp and a\.png share a name"),
        "blank": (good | {"a.cls": b" "}, r"a\.cls: is empty"),
        "other": (good | {"a.cls": b"\xff"}, r"not readable as \.tar"),
        "large": (good | {"a.cls": b"100000000"}, "has a label 100000000; at most 100,000 classes"),
        "long": (good | {"a.cls": b"9" * 4090}, r"has a label 9{60}\.\.\.; at most"),
        "longer": (good | {"a.cls": b"c" * 4097}, r"a\.cls: holds 4,097 bytes"),
        "a long name": (good | {"a.cls": b"c" * 4096}, "has 4,096 letters, at most 1000"),
    }
    for name, (members, message) in cases.items():
        shard(tmp_path / name / "0.tar", members)
        with pytest.raises(BadInput, match=message):
            open_dataset("shards", str(tmp_path / name), SIDE)
    shard(tmp_path / "packed" / "0.tar.gz", good, "w:gz")
    with pytest.raises(BadInput, match=r"holds no shard; .*unpack 0\.tar\.gz"):
        open_dataset("shards", str(tmp_path / "packed"), SIDE)
    whole = shard(tmp_path / "cut" / "0.tar", good)
    whole.write_bytes(coloured(3))
    with pytest.raises(BadInput, match=r"0\.tar: not readable as \.tar"):
        open_dataset("shards", str(tmp_path / "cut"), SIDE)
    shard(whole, good)
    (tmp_path / "cut" / "classes.txt").write_text("zero\none\n")
    with pytest.raises(BadInput, match=r"has a label 3, and classes\.txt names 2 classes, 0 to 1"):
        open_dataset("shards", str(tmp_path / "cut"), SIDE)
    (tmp_path / "cut" / "classes.txt").unlink()
    data = open_dataset("shards", str(tmp_path / "cut"), SIDE)
    assert data.classes == tuple("0123")
    whole.write_bytes(whole.read_bytes()[:540])
    with pytest.raises(BadInput, match=r"0\.tar/a\.png: is cut off"):
        data.x_test[:1]
    with pytest.raises(BadInput, match=r"nowhere: No such file"):
        open_dataset("shards", str(tmp_path / "nowhere"), SIDE)


def tarred(path: Path, members: Sequence[tuple[str, bytes, Mapping[str, Any]]]) -> None:
    """A shard of members of any kind, in order; each has fields of its tarfile.TarInfo."""
    with tarfile.open(path, "w") as archive:
        for name, data, fields in members:
            info = tarfile.TarInfo(name)
            for field, value in {"size": len(data), **fields}.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))


PAIR: list[tuple[str, bytes, Mapping[str, Any]]] = [
    ("a.png", coloured(1), {}),
    ("a.cls", b"0", {}),
    ("b.png", coloured(2), {}),
    ("b.cls", b"1", {}),
]


def test_a_hard_link_is_the_member_that_it_names(tmp_path: Path) -> None:
    """GNU tar writes a file's second name so, of images and of labels."""
    (tmp_path / "files").mkdir()
    for name, content, _ in PAIR:
        (tmp_path / "files" / name).write_bytes(content)
    (tmp_path / "files" / "c.png").hardlink_to(tmp_path / "files" / "b.png")
    (tmp_path / "files" / "c.cls").hardlink_to(tmp_path / "files" / "a.cls")
    subprocess.run(["tar", "cf", tmp_path / "0.tar", "--sort=name", "-C", tmp_path / "files", "."], check=True)
    with tarfile.open(tmp_path / "0.tar") as archive:
        assert sum(info.islnk() for info in archive) == 2
    data = open_dataset("shards", str(tmp_path), SIDE)
    assert (data.y_test.tolist(), dict(data.skipped)) == ([0, 1, 0], {})
    np.testing.assert_array_equal(data.x_test[1:2], data.x_test[2:3])


def test_members_that_are_no_files_are_counted(tmp_path: Path) -> None:
    """Links to nowhere, pipes, devices, sparse files, names of the system; and the line says so."""
    odd: list[tuple[str, bytes, Mapping[str, Any]]] = [
        ("c.png", b"", {"type": tarfile.LNKTYPE, "linkname": "gone.png"}),
        ("d.png", b"", {"type": tarfile.SYMTYPE, "linkname": "a.png"}),
        ("e.png", b"", {"type": tarfile.FIFOTYPE}),
        ("f.png", b"", {"type": tarfile.CHRTYPE}),
        ("g.png", b"", {"type": b"Z"}),
        ("h.png", b"x", {"type": tarfile.GNUTYPE_SPARSE}),
        ("._a.png", b"x", {}),
        ("folder", b"", {"type": tarfile.DIRTYPE}),
    ]
    tarred(tmp_path / "0.tar", [*PAIR, *odd])
    data = open_dataset("shards", str(tmp_path), SIDE)
    kinds = ("hard link to no file before it", "symbolic link", "FIFO", "device", "member of an unknown type",
             "hidden", "sparse file")  # fmt: skip
    assert dict(data.skipped) == dict.fromkeys(kinds, 1)
    assert "skipped 7 files: " in data.remark
    assert "1 symbolic link" in data.remark


@pytest.mark.parametrize("second", ["a.cls", "a.CLS", "a.png"])
def test_a_member_that_stands_twice_is_named(tmp_path: Path, second: str) -> None:
    """Because nobody can say which of two labels holds."""
    tarred(tmp_path / "0.tar", [*PAIR, (second, b"1", {})])
    with pytest.raises(BadInput, match=rf"0\.tar: {second} (stands in it twice|and a\.png share a name); keep one"):
        open_dataset("shards", str(tmp_path), SIDE)


def test_a_shard_is_read_to_its_end(tmp_path: Path) -> None:
    """tarfile stops in silence at a damaged header and at the end of the first of two files."""
    tarred(tmp_path / "0.tar", PAIR)
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole.rstrip(b"\0").ljust(2 * 512 * len(PAIR), b"\0"))  # of no blocks at its end
    assert len(open_dataset("shards", str(tmp_path), SIDE).y_test) == 2
    for damaged in (whole + whole, whole[: 2 * 1024] + b"?" + whole[2 * 1024 + 1 :]):
        (tmp_path / "0.tar").write_bytes(damaged)
        with pytest.raises(BadInput, match=r"0\.tar: is damaged behind byte \d+, or two shards in one file"):
            open_dataset("shards", str(tmp_path), SIDE)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("\u200b", "is blank"), ("\x01 ", "is blank"), ("\u00a0", "label is empty"),
        ("ice  cream", "class 'ice cream' looks like class 'ice  cream'"),
        ("ice\u00a0cream", "looks like"), ("cafe\u0301", "class 'caf\u00e9' looks like class 'cafe\u0301'"),
        ("ice\u200b cream", "looks like"), ("c" * 1001, "has 1,001 letters, at most 1000; rename it"),
    ],
)  # fmt: skip
def test_classes_that_look_alike_are_named(tmp_path: Path, other: str, message: str) -> None:
    """A reader of a report could not tell them apart."""
    (tmp_path / "list.csv").write_text(
        f"path,label\na.png,ice cream\nb.png,caf\u00e9\nc.png,{other}\n", encoding="utf-8"
    )
    with pytest.raises(BadInput, match=message):
        open_dataset("csv", str(tmp_path / "list.csv"), SIDE)


def test_more_classes_than_a_network_has_are_refused(tmp_path: Path) -> None:
    """Whoever takes a column of numbers for labels hears of it before an image is read."""
    rows = "".join(f"{number}.png,{number}\n" for number in range(100_001))
    (tmp_path / "list.csv").write_text("path,label\n" + rows)
    with pytest.raises(BadInput, match="has 100,001 classes; at most 100,000 are read"):
        open_dataset("csv", str(tmp_path / "list.csv"), SIDE)
