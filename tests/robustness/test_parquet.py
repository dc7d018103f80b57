"""Parquet files of the hub are the same data set as the folder that they were made of; wrong ones are named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dfmcl.common.errors import BadInput
from dfmcl.robustness.data import Dataset, open_dataset
from dfmcl.robustness.digests import Kept
from tests.common.pictures import coloured

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed; pip install 'dfmcl[parquet]'")
from pyarrow import parquet  # noqa: E402  # only where it is there

NAMES, SIDE = ["cat", "dog", "eel"], 16
IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def written(path: Path, images: Sequence[Any], labels: Sequence[Any], *, names: Sequence[str] | None = NAMES) -> Path:
    """As `datasets` writes them: in groups of a few rows, with the features in the schema. images: bytes or paths."""
    cells = [{"bytes": one, "path": None} if isinstance(one, bytes) else {"bytes": None, "path": one} for one in images]
    table = pyarrow.table({"image": pyarrow.array(cells, IMAGE), "label": labels})
    told = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(told)} if names else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=3)
    return path


def opened(path: Path, kept: Kept | None = None) -> Dataset:
    return open_dataset("parquet", str(path), SIDE, kept=kept)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """train and test of three classes, four images each."""
    for number in range(24):
        place = tmp_path / "tree" / ("train", "test")[number % 2] / NAMES[number // 8]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02}.png").write_bytes(coloured(number * 10))
    return tmp_path / "tree"


@pytest.mark.parametrize("kind", ["ClassLabel", "text", "numbers"])
def test_tables_of_a_folders_files_are_that_folder(tree: Path, tmp_path: Path, kind: str) -> None:
    """Over two files and many row groups; classes of the schema, of the labels themselves, or of classes.txt."""
    for part in ("train", "test"):
        paths = sorted((tree / part).glob("*/*.png"))
        labels = [path.parent.name if kind == "text" else NAMES.index(path.parent.name) for path in paths]
        images, names = [path.read_bytes() for path in paths], NAMES if kind == "ClassLabel" else None
        for shard, rows in enumerate((slice(7), slice(7, None))):
            file = tmp_path / "hub" / "data" / f"{part}-0000{shard}-of-00002.parquet"
            written(file, images[rows], labels[rows], names=names)
    (tmp_path / "hub" / "classes.txt").write_text("\n".join(NAMES))
    found, folder = opened(tmp_path / "hub", Kept(tmp_path / "kept")), open_dataset("folder", str(tree), SIDE)
    assert (found.classes, found.sha256, found.remark) == (folder.classes, folder.sha256, "")
    np.testing.assert_array_equal(found.y_train, folder.y_train)
    np.testing.assert_array_equal(found.x_test[np.array([11, 0, 5])], folder.x_test[np.array([11, 0, 5])])
    assert opened(tmp_path / "hub", Kept(tmp_path / "kept")).sha256 == folder.sha256


def test_validation_is_the_test_part_where_there_is_no_other(tmp_path: Path) -> None:
    """Beside a test part it is left alone, and that is said; so are files of no split."""
    written(tmp_path / "validation-0.parquet", [coloured(1), coloured(2)], [0, 1])
    data = opened(tmp_path)
    assert (len(data.x_train), data.y_test.tolist(), data.classes) == (0, [0, 1], ("cat", "dog", "eel"))
    written(tmp_path / "test.parquet", [coloured(3), coloured(4), coloured(5)], [2, 1, 0])
    written(tmp_path / "unlabelled.parquet", [coloured(3)], [-1])
    data = opened(tmp_path)
    assert data.y_test.tolist() == [2, 1, 0]
    assert dict(data.skipped) == {"validation-*.parquet beside test-*.parquet": 1, "parquet files of no split": 1}


def test_an_image_may_lie_beside_its_table(tmp_path: Path) -> None:
    """As `datasets` keeps what it did not embed; nowhere else, because a table comes from strangers."""
    (tmp_path / "hub" / "images").mkdir(parents=True)
    (tmp_path / "hub" / "images" / "a.png").write_bytes(coloured(9))
    (tmp_path / "b.png").write_bytes(coloured(9))
    paths = ["images/a.png", "../b.png", str(tmp_path / "b.png"), None, "a\0b"]
    written(tmp_path / "hub" / "test-0.parquet", paths, [0, 1, 0, 1, 0])
    data = opened(tmp_path / "hub")
    assert data.x_test[:1][0, 0, 0].tolist() == [9, 246, 7]
    for number, message in (
        (1, r"names \.\./b\.png, which lies elsewhere"),
        (2, "lies elsewhere"),
        (3, "no image"),
        (4, "is no file"),
    ):
        with pytest.raises(BadInput, match=rf"test-0\.parquet: row {number}: .*{message}"):
            data.x_test[np.array([number])]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unlabelled": ({"labels": [0, -1]}, r"row 1: label is -1; expected a number from 0 on"),
    "null": ({"labels": [None, 1]}, "row 0: label is None"),
    "a fraction": ({"labels": [0.5, 1.0]}, "row 0: label is 0.5"),
    "no name": ({"labels": [0, 3]}, "has a label 3, and names 3 classes, 0 to 2"),
    "an endless number": ({"labels": ["9" * 5000, "0"]}, r"has a label 9{60}\.\.\."),
    "a large number": ({"labels": [10**8, 0], "names": None}, "has a label 100000000; at most 100,000"),
    "a name twice": ({"labels": [0, 1], "names": ["cat", "cat"]}, "class 'cat' stands twice"),
    "one class": ({"labels": ["a", "a"], "names": None}, "one class only"),
    "empty": ({"images": [], "labels": []}, "hold no row"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_labels_are_named(tmp_path: Path, case: str) -> None:
    """By row, before an image is read."""
    changes, message = WRONG[case]
    written(tmp_path / "test-0.parquet", **{"images": [coloured(1), coloured(2)], **changes})
    with pytest.raises(BadInput, match=message):
        opened(tmp_path)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    """No table, none of a split, other columns, a column twice, another kind of image, different classes."""
    with pytest.raises(BadInput, match=r"has no test-\*\.parquet and no validation"):
        opened(tmp_path)
    (tmp_path / "test-0.parquet").write_bytes(coloured(1))
    with pytest.raises(BadInput, match=r"test-0\.parquet: not readable as \.parquet: "):
        opened(tmp_path)
    parquet.write_table(pyarrow.table({"img": [b"x"], "label": [0]}), tmp_path / "test-1.parquet")
    (tmp_path / "test-0.parquet").unlink()
    with pytest.raises(BadInput, match=r"test-1\.parquet: has no column image; it has img, label"):
        opened(tmp_path)
    parquet.write_table(pyarrow.table({"image": [b"x"], "label": [0]}), tmp_path / "test-1.parquet")
    with pytest.raises(BadInput, match="image is binary; expected a struct of bytes and path"):
        opened(tmp_path)
    two = pyarrow.table([pyarrow.array([{"bytes": b"x"}]), [0], [1]], names=["image", "label", "label"])
    parquet.write_table(two, tmp_path / "test-1.parquet")
    with pytest.raises(BadInput, match=r"test-1\.parquet: has two columns label; keep one"):
        opened(tmp_path)
    written(tmp_path / "test-1.parquet", [coloured(1)], [0])
    written(tmp_path / "train-0.parquet", [coloured(1)], [0], names=["a", "b"])
    with pytest.raises(BadInput, match="name different classes"):
        opened(tmp_path)


def test_without_pyarrow_one_line_says_so(tmp_path: Path) -> None:
    """By the user's command, with exit code 2."""
    written(tmp_path / "test-0.parquet", [coloured(1), coloured(2)], [0, 1])
    code = "import sys; sys.modules['pyarrow'] = None; from dfmcl.cli import main; main()"
    sets = ("data.name=parquet", f"data.path={tmp_path}", "data.image_size=16")
    options = [part for one in sets for part in ("--set", one)]
    command = [sys.executable, "-c", code, "train", "quickstart", *options, "--out", str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "dfmcl: data: parquet needs pyarrow; pip install 'dfmcl[parquet]'\n"
