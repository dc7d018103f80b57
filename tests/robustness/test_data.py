"""Data sets and runs: what is malformed is named, in one line, before anything is trained on it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import ImageFolder

from dfmcl.common.errors import BadInput
from dfmcl.robustness.data import DIGITS_SPLIT_SEED, labelled_as, load_dataset, open_dataset
from dfmcl.robustness.runs import load_run
from tests.common.pictures import readable

READABLE = readable()

RNG = np.random.default_rng(0)
GOOD: dict[str, Any] = {
    "x_train": RNG.integers(0, 256, (8, 12, 10, 3), np.uint8),
    "y_train": np.arange(8) % 4,
    "x_test": RNG.integers(0, 256, (2, 12, 10, 3), np.uint8),
    "y_test": np.arange(2),
}


def changed(**changes: Callable[[Any], Any]) -> dict[str, Any]:
    """GOOD with some arrays changed; `x` and `y` stand for those of both parts."""
    by_key = {key: changes.get(key) or changes.get(key[0]) or (lambda array: array) for key in GOOD}
    return {key: by_key[key](array) for key, array in GOOD.items()}


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "NCHW": (changed(x=lambda x: x.transpose(0, 3, 1, 2)), r"x_train .* looks like NCHW; .* x.transpose\(0, 2, 3, 1\)"),
    "NCHW, grey": (changed(x=lambda x: x[..., :1].transpose(0, 3, 1, 2)), r"\(8, 1, 12, 10\), which looks like NCHW"),
    "NCHW in the test part": (changed(x_test=lambda x: x.transpose(0, 3, 1, 2)), "x_test .* looks like NCHW"),
    "HWCN": (changed(x=lambda x: x.transpose(1, 2, 3, 0)), "8 channels; expected 1 or 3 as the last axis"),
    "RGBA": (changed(x=lambda x: np.concatenate([x, x[..., :1]], 3)), r"4 channels; .* leave alpha out, x\[..., :3\]"),
    "two channels": (changed(x=lambda x: x[..., :2]), "2 channels; expected 1 or 3"),
    "flat": (changed(x=lambda x: x.reshape(len(x), -1)), r"shape \(8, 360\); expected \(N, H, W, 3\)"),
    "flat planes": (changed(x=lambda x: x.reshape(len(x), -1, 3)), r"shape \(8, 120, 3\); expected \(N, H, W, 3\)"),
    "floats in [0, 1]": (
        changed(x=lambda x: x / 255),
        r"float64 from 0 to 1; .* \(255 \* x\).round\(\).astype\('uint8'\)",
    ),
    "floats in [0, 255]": (changed(x=lambda x: x.astype(np.float32)), r"float32 from 0 to 255; .* save x.round\(\)"),
    "normalised": (changed(x=lambda x: x / 64 - 2), "from -2 to 1.98438; .* undo the normalisation"),
    "NaN": (changed(x_train=lambda x: np.full(x.shape, np.nan)), "float64 and holds NaN or infinity"),
    "int64 images": (changed(x=lambda x: x.astype(int)), r"int64 from 0 to 255; .* save x.astype\('uint8'\)"),
    "boolean images": (changed(x=lambda x: x > 9), "x_train is bool; expected uint8"),
    "pickled images": (changed(x_train=lambda x: x.astype(object)), "x_train is a pickled array of objects"),
    "other sizes": (changed(x_test=lambda x: x[:, :9]), "must be alike"),
    "grey and coloured": (changed(x_test=lambda x: x[..., 0]), "must be alike"),
    "too few labels": (changed(y_train=lambda y: y[:7]), "8 images in x_train, 7 labels; expected one an image"),
    "one label": (changed(y_train=lambda y: np.array(3)), r"y_train has shape \(\); expected one label an image"),
    "labels from 1": (changed(y=lambda y: y + 1), r"labels 1 to 4, but no image of 0; .* save y - 1, in both parts"),
    "labels with gaps": (
        changed(y=lambda y: y * 3),
        "0 to 9, but no image of 1, 2, 4, 5, 7, ...; .* renumbered",
    ),
    "huge labels": (
        changed(y=lambda y: y + 10**15),
        "labels 1000000000000000 to 1000000000000003, but no image of 0, 1",
    ),
    "negative label": (changed(y_train=lambda y: y - 1), "y_train has labels -1 to 2; expected 0 to K - 1"),
    "unknown label in the test part": (changed(y_test=lambda y: y + 3), "y_test has labels 4; y_train has 0 to 3"),
    "one class": (changed(y=lambda y: y * 0), "one class only, '0': nothing to tell apart"),
    "text labels": (changed(y=lambda y: y.astype("U1")), "y_train is <U1; expected integers: .* `classes`"),
    "whole floats": (
        changed(y=lambda y: y.astype(float)),
        r"y_train is float64; .* save y.astype\(int\)",
    ),
    "NaN labels": (changed(y_test=lambda y: y * np.nan), "y_test is float64; expected integers$"),
    "one-hot labels": (changed(y=lambda y: np.eye(4)[y]), r"\(8, 4\), which looks one-hot; save y.argmax\(axis=1\)"),
    "pickled labels": (changed(y_test=lambda y: y.astype(object)), "y_test is a pickled array of objects"),
    "no test images": (changed(x_test=lambda x: x[:0], y_test=lambda y: y[:0]), "x_test .* which is no image"),
    "no training images": (changed(x_train=lambda x: x[:0], y_train=lambda y: y[:0]), "x_train .* which is no image"),
    "a label beyond the names": (GOOD | {"classes": list("abc")}, "y_train has labels 3; 3 classes are named"),
    "a name twice": (GOOD | {"classes": list("abca")}, "classes: class 'a' stands twice"),
    "an empty name": (GOOD | {"classes": ["a", "b", "", "d"]}, "classes: class '' is no name"),
    "a blank name": (GOOD | {"classes": ["a", "b", " ", "d"]}, "classes: class ' ' is blank"),
    "a name that does not show": (GOOD | {"classes": ["a", "b", "\x01", "d"]}, "classes: class .* is blank"),
    "names alike": (GOOD | {"classes": ["a", "b", "b ", "d"]}, "classes: class 'b ' looks like class 'b'"),
    "beyond int64": (
        changed(y=lambda y: y.astype(np.uint64) + 2**63),
        "y_train has a label 9223372036854775811; expected 0 to K - 1",
    ),
    "names in two rows": (GOOD | {"classes": [["a", "b"], ["c", "d"]]}, r"classes is <U1 \(2, 2\); expected one name"),
    "names of other bytes": (GOOD | {"classes": [b"a", b"b", b"c", b"\xff"]}, "classes holds bytes that are no UTF-8"),
    "a name of two lines": (
        GOOD | {"classes": ["a", "b", "c", "d\ne"]},
        r"class 'd.*e' is no name in UTF-8 on one line",
    ),
    "from 0 to 1": (changed(x=lambda x: x // 200), "x_train is uint8 from 0 to 1; .* save 255 . x"),
    "labels in a row": (changed(y=lambda y: y[None]), r"y_train has shape \(1, 8\); expected one label an image"),
    "pickled names": (GOOD | {"classes": np.array(list("abcd"), object)}, "classes is a pickled array of objects"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_malformed_arrays_are_named(tmp_path: Path, mistake: str) -> None:
    """Wrong dtype, shape, layout or labels: bad input, one line, that says which array and what to save instead."""
    arrays, message = MISTAKES[mistake]
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(BadInput, match=message) as refused:
        load_dataset("npz", str(tmp_path / "data.npz"))
    assert str(tmp_path / "data.npz") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_label_that_two_classes_share_is_named(tmp_path: Path) -> None:
    """Because its images could be of either; one that no image has does no harm."""
    np.savez(tmp_path / "data.npz", **GOOD)
    data = load_dataset("npz", str(tmp_path / "data.npz"))
    assert labelled_as(data, ("3", "crane", "2", "1", "0", "crane")).y_test.tolist() == [4, 3]
    with pytest.raises(BadInput, match="labels: class '2' stands twice, and the data has images of it"):
        labelled_as(data, ("0", "1", "2", "3", "2"))


@pytest.mark.parametrize("name", ["y_test.npy", "y_test"])
def test_an_array_that_stands_twice_is_named(tmp_path: Path, name: str) -> None:
    """Because nobody can say which of two sets of labels holds."""
    np.savez(tmp_path / "data.npz", **GOOD)
    second = io.BytesIO()
    np.save(second, 1 - GOOD["y_test"])
    with zipfile.ZipFile(tmp_path / "data.npz", "a") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr(name, second.getvalue())
    with pytest.raises(BadInput, match=r"data\.npz: y_test stands in it twice"):
        load_dataset("npz", str(tmp_path / "data.npz"))


def test_many_names_are_read_at_once(tmp_path: Path) -> None:
    """In a time that grows with their number, not with its square."""
    classes = np.arange(100_000).astype(str)
    np.savez(tmp_path / "data.npz", **{**GOOD, "classes": classes})
    begin = time.process_time()
    assert len(load_dataset("npz", str(tmp_path / "data.npz")).classes) == len(classes)
    assert time.process_time() - begin < 20  # it takes 1 s, and comparing each with each half an hour
    np.savez(tmp_path / "data.npz", **{**GOOD, "classes": np.arange(100_001).astype(str)})
    with pytest.raises(BadInput, match="has 100,001 classes; at most 100,000 are read"):
        load_dataset("npz", str(tmp_path / "data.npz"))


SPELLINGS: dict[str, dict[str, Any]] = {
    "as Keras has labels": changed(y=lambda y: y[:, None].astype(np.uint8)),
    "big-endian labels": changed(y=lambda y: y.astype(">i4")),
    "unsigned labels": changed(y=lambda y: y.astype(np.uint64)),
    "columns first": changed(x=np.asfortranarray),
    "a test part that lacks classes": changed(y_test=lambda y: y * 0),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_same_data_in_other_words(tmp_path: Path, spelling: str) -> None:
    """(N, 1) labels, any integers, any order of bytes: read as (N,) int64 and uint8 (N, H, W, C)."""
    np.savez(tmp_path / "data.npz", **SPELLINGS[spelling])
    data = load_dataset("npz", str(tmp_path / "data.npz"))
    assert (data.classes, data.y_train.tolist()) == (tuple("0123"), [0, 1, 2, 3] * 2)
    assert data.y_train.dtype == np.int64
    assert np.array_equal(data.x_train, GOOD["x_train"])
    assert isinstance(data.x_train, np.ndarray)
    assert data.x_train.flags.c_contiguous


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    """(N, H, W), as MNIST comes, is what (N, H, W, 1) is."""
    for name, arrays in (("flat", changed(x=lambda x: x[..., 0])), ("deep", changed(x=lambda x: x[..., :1]))):
        np.savez(tmp_path / f"{name}.npz", **arrays)
    flat, deep = (load_dataset("npz", str(tmp_path / f"{name}.npz")) for name in ("flat", "deep"))
    assert (flat.input_shape, flat.sha256) == ((12, 10, 1), deep.sha256)


def test_a_class_that_nobody_can_learn_is_told(tmp_path: Path) -> None:
    """A network is trained all the same, and its answers never name that class."""
    np.savez(tmp_path / "data.npz", **GOOD, classes=list("abcdef"))
    data = load_dataset("npz", str(tmp_path / "data.npz"))
    assert data.remark == f"{tmp_path / 'data.npz'}: no training image of 'e', 'f'"


def test_a_class_folder_of_other_bytes_is_named(tree: Path) -> None:
    """Its name can stand in no file of labels."""
    for part in ("train", "test"):
        shutil.copytree(
            next(path for path in sorted((tree / part).iterdir()) if path.is_dir()), tree / part / "x\udcff"
        )
    with pytest.raises(BadInput, match=r"class 'x\\udcff' is no name in UTF-8"):
        load_dataset("folder", str(tree), 16)


def test_named_classes_may_lack_images(tmp_path: Path) -> None:
    """An array `classes` says how many there are, so that images to judge with need not hold them all."""
    few = changed(y=lambda y: y * 0 + 2)
    for names in (np.array(list("abcd")), np.array([b"a", b"b", b"c", b"d"])):
        np.savez(tmp_path / "data.npz", **few, classes=names)
        assert load_dataset("npz", str(tmp_path / "data.npz")).classes == tuple("abcd")


def test_files_that_are_no_archive_are_named(tmp_path: Path) -> None:
    """Empty, cut off, damaged, another kind of file, missing keys, not there: one line each, that names the file."""
    path = tmp_path / "data.npz"
    np.savez(path, **GOOD)
    whole = path.read_bytes()
    broken = {
        b"": "not readable as .npz: no archive of numpy's",
        b"hello": "no archive of numpy's",
        READABLE["RGB"]: "no archive of numpy's",
        whole[:200]: "cut off or damaged",
        whole[: len(whole) // 2]: "cut off or damaged",
        whole[:-30]: "cut off or damaged",
        whole[:1000] + bytes([whole[1000] ^ 255]) + whole[1001:]: "Bad CRC-32 for file 'x_train.npy'",
        zipped({"a.png": b"x"}): "lacks x_test, y_test; .* holds a.png",
        zipped(dict.fromkeys(GOOD, b"text")): "x_train is no array",
    }
    for content, message in broken.items():
        path.write_bytes(content)
        with pytest.raises(BadInput, match=message) as refused:
            load_dataset("npz", str(path))
        assert str(path) in str(refused.value)
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(BadInput, match="a single array"):
        load_dataset("npz", str(path))
    np.savez(path, x_train=GOOD["x_train"])
    with pytest.raises(BadInput, match="lacks y_train, x_test, y_test"):
        load_dataset("npz", str(path))
    with pytest.raises(BadInput, match=r"none\.npz: no such file"):
        load_dataset("npz", str(tmp_path / "none.npz"))
    with pytest.raises(BadInput, match=r"not readable as \.npz: Is a directory"):
        load_dataset("npz", str(tmp_path))
    with pytest.raises(BadInput, match="choose one of digits"):
        load_dataset("mnist")


def zipped(members: dict[str, bytes]) -> bytes:
    """A zip archive that numpy did not write."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def test_npz_is_what_it_holds(tmp_path: Path) -> None:
    """A good archive arrives unchanged, and its digest follows its content."""
    np.savez(tmp_path / "data.npz", **GOOD)
    data = load_dataset("npz", str(tmp_path / "data.npz"))
    assert all(np.array_equal(getattr(data, key), value) for key, value in GOOD.items())
    assert data.classes == ("0", "1", "2", "3")
    np.savez(tmp_path / "data.npz", **{**GOOD, "y_test": np.array([1, 0])})
    assert load_dataset("npz", str(tmp_path / "data.npz")).sha256 != data.sha256


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with two images of cats and dogs in each part."""
    for part in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (20, 30), (number * 200, i, 7)).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_folder_of_folders(tree: Path) -> None:
    """Classes by name, images fitted to the asked side; nothing is said where nothing was skipped."""
    data = load_dataset("folder", str(tree), 16)
    assert (data.x_train.shape, data.classes) == ((4, 16, 16, 3), ("cat", "dog"))
    assert data.y_test.tolist() == [0, 0, 1, 1]
    assert data.x_train[2:, :, :, 0].min() == 200
    assert (data.remark, "skipped" in data.describe()) == ("", False)


def test_a_folder_is_read_in_the_order_of_torchvision(tree: Path) -> None:
    """ImageFolder is the oracle: classes, files and folders inside a class, links too, by name."""
    for place in ("train/cat/more/deep", "train/cat/more-and-more", "train/ant", "test/ant"):
        (tree / place).mkdir(parents=True)
        for name in ("b.PNG", "a.png"):
            Image.new("RGB", (16, 16), (len(place), len(name), 9)).save(tree / place / name)
    (tree / "train" / "dog" / "linked").symlink_to(tree / "train" / "ant")
    data, oracle = load_dataset("folder", str(tree), 16), ImageFolder(str(tree / "train"))
    assert data.classes == tuple(oracle.classes)
    assert data.y_train.tolist() == oracle.targets
    assert [tuple(image[0, 0]) for image in np.asarray(data.x_train)] == [image.getpixel((0, 0)) for image, _ in oracle]


def test_what_is_skipped_is_counted(tree: Path) -> None:
    """By suffix, with what is supported: in one line, and in the record; GIF and others are read."""
    cat, nowhere = tree / "train" / "cat", tree / "train" / "__MACOSX"
    Image.new("RGB", (9, 9)).save(cat / "read.gif")
    (nowhere / "deep").mkdir(parents=True)
    (tree / "test" / ".ipynb_checkpoints").mkdir()
    (cat / ".git").mkdir()
    skipped = [cat / "a.heic", cat / "b.HEIC", cat / "notes.txt", cat / "README"]
    hidden = [cat / ".DS_Store", cat / "._0.png", cat / "Thumbs.db", cat / ".git" / "a.png", nowhere / "deep" / "a.png"]
    outside = [tree / "test" / "labels.csv", tree / "test" / "stray.png"]
    for path in (*skipped, *hidden, *outside, tree / "test" / ".ipynb_checkpoints" / "0.png"):
        path.write_text("no image")
    data = load_dataset("folder", str(tree), 16)
    assert (len(data.x_train), len(data.x_test), data.classes) == (5, 4, ("cat", "dog"))
    counts = "6 hidden, 2 .heic, 2 outside a class folder, 1 .txt, 1 without a suffix"
    assert data.remark.startswith(f"{tree}: skipped 12 files: {counts} (supported: ")
    assert {"GIF", "JPEG", "PNG", "TIFF", "WEBP"} <= set(re.findall(r"\w+", data.remark.partition("supported:")[2]))
    assert data.describe()["skipped"] == {
        "hidden": 6, ".heic": 2, "outside a class folder": 2, ".txt": 1, "without a suffix": 1
    }  # fmt: skip


def _emptied(tree: Path, place: str) -> None:
    for path in (tree / place).iterdir():
        path.rename(path.with_suffix(".heic"))


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no test part": (
        lambda tree: shutil.rmtree(tree / "test"),
        r"test: No such file or directory; expected .*/test/CLASS",
    ),
    "a class without images": (
        lambda tree: _emptied(tree, "test/dog"),
        r"test/dog: holds no image; .*skipped 2 files: 2 \.heic \(supported: ",
    ),
    "a class only in training": (lambda tree: shutil.rmtree(tree / "test/dog"), r"test has no folder 'dog' .*test/dog"),
    "a class only in the test": (lambda tree: shutil.rmtree(tree / "train/dog"), r"train has no folder 'dog'"),
    "one class": (
        lambda tree: [shutil.rmtree(tree / part / "dog") for part in ("train", "test")],
        "one class only, 'cat': nothing to tell apart",
    ),
    "no class folders": (
        lambda tree: [shutil.move(tree / "train" / name, tree) for name in ("cat", "dog")],
        r"train: has no class folders; expected .*/train/CLASS/\*\.png",
    ),
    "a cut file": (
        lambda tree: (tree / "train/dog/1.png").write_bytes(READABLE["RGB"][:-200]),
        r"train/dog/1\.png: is cut off or broken; replace it, or remove it",
    ),
    "HTML": (
        lambda tree: (tree / "test/cat/0.png").write_text("<html>404</html>"),
        r"test/cat/0\.png: is no readable AVIF or .*; replace it, or remove it",
    ),
    "a link to nowhere": (
        lambda tree: (tree / "train/cat/2.png").symlink_to(tree / "gone.png"),
        r"train/cat/2\.png: No such file or directory; remove it, or make it readable",
    ),
    "a link that leads back": (
        lambda tree: (tree / "train/cat/again").symlink_to(tree / "train/cat"),
        r"train/cat/again: leads to a folder of the same class",
    ),
    "a pipe": (lambda tree: os.mkfifo(tree / "train/cat/2.png"), r"train/cat/2\.png: is no regular file"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_read_is_named(tree: Path, case: str) -> None:
    """The class or the file that is in the way, by its path, in one line; never a reader's name for it."""
    change, message = FOLDERS[case]
    change(tree)
    with pytest.raises(BadInput, match=message) as refused:
        load_dataset("folder", str(tree), 16)
    assert str(refused.value).startswith(f"{tree}") or case == "one class"
    assert "Buffered" not in str(refused.value)


def test_a_file_without_permission_is_named(tree: Path) -> None:
    """To root every file is open, so that root's process becomes another user's before it reads."""
    path = tree / "train" / "dog" / "0.png"
    path.chmod(0)
    code = "import os, sys; from dfmcl.robustness.folder import read_image; os.getuid() or os.seteuid(65534);"
    command = [sys.executable, "-c", f"{code} read_image(sys.argv[1], 16)", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stderr.splitlines()[-1].endswith(f"{path}: Permission denied; remove it, or make it readable")


def test_a_folder_needs_a_path_and_a_size(tree: Path) -> None:
    """Both are named where they are missing."""
    with pytest.raises(BadInput, match="image_size is 0"):
        load_dataset("folder", str(tree))
    with pytest.raises(BadInput, match="folder needs a path"):
        load_dataset("folder", "", 16)


def test_digits_are_the_scanned_ones() -> None:
    """1,797 real images in ten classes, upsampled, three equal channels, a fixed split."""
    data = load_dataset("digits")
    assert (data.x_train.shape, data.x_test.shape) == ((1347, 16, 16, 3), (450, 16, 16, 3))
    assert np.array_equal(data.x_test[..., 0], data.x_test[..., 2])
    assert set(data.y_test.tolist()) == set(range(10))
    assert data.sha256 == load_dataset("digits").sha256


def test_digits_are_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, read without that package, gives what the package gives; where it is missing, its name is said."""
    bunch, data = load_digits(), load_dataset("digits")
    order = np.random.default_rng(DIGITS_SPLIT_SEED).permutation(len(bunch.images))
    assert np.array_equal(np.concatenate([data.y_test, data.y_train]), bunch.target[order])
    # A corner of the enlarged image is the corner of the small one.
    corners = np.concatenate([data.x_test, data.x_train])[:, ::15, ::15, 0]
    assert np.array_equal(corners, np.round(bunch.images[order][:, ::7, ::7] / 16 * 255).astype(np.uint8))
    monkeypatch.setattr("dfmcl.robustness.data.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="sklearn"):
        load_dataset("digits")


def test_malformed_run_is_named(tmp_path: Path, standard_run: Path) -> None:
    """Other weights, a manifest that lacks a part, an unfinished run: bad input, never a model."""
    run = tmp_path / "run"
    shutil.copytree(standard_run, run)
    manifest = json.loads((run / "manifest.json").read_text())
    for change, message in (
        ({"format": "x"}, "format is 'x'"),
        ({"files": []}, "lacks files or data"),
        ({"data": None}, "lacks files or data"),
        ({"model": {**manifest["model"], "width": 4}}, "do not fit"),
        ({"labels": 3}, "do not fit"),
    ):
        (run / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(BadInput, match=message):
            load_run(run)
    (run / "manifest.json").write_text(json.dumps(manifest))
    weights = bytearray((run / "checkpoint.safetensors").read_bytes())
    weights[-1] ^= 1
    (run / "checkpoint.safetensors").write_bytes(weights)
    with pytest.raises(BadInput, match="SHA-256 is"):
        load_run(run)
    (run / "manifest.json").unlink()
    (run / "state").mkdir(exist_ok=True)
    with pytest.raises(BadInput, match="is not finished"):
        load_run(run)
    with pytest.raises(BadInput, match="is no run"):
        load_run(tmp_path / "nowhere")


def test_a_folder_that_is_opened_is_not_read(tmp_path: Path) -> None:
    """Only what is asked for is decoded, the same bytes as all at once; digest and shapes need no image at all."""
    colours = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1) * 40 + np.zeros((16, 16, 3), np.uint8)
    for number, image in enumerate(colours):
        place = tmp_path / ("train", "test")[number % 2] / ("cat", "dog")[number // 2 % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")
    opened, read = open_dataset("folder", str(tmp_path), 16), load_dataset("folder", str(tmp_path), 16)
    assert opened.sha256 == read.sha256
    assert opened.input_shape == (16, 16, 3)
    np.testing.assert_array_equal(opened.x_test[np.array([2, 0])], read.x_test[[2, 0]])
    np.testing.assert_array_equal(np.asarray(opened.x_train), read.x_train)
    broken = next((tmp_path / "train" / "cat").iterdir())
    broken.write_bytes(broken.read_bytes()[:60])
    again = open_dataset("folder", str(tmp_path), 16)
    assert again.sha256 != opened.sha256
    assert again.x_test[:2].shape == (2, 16, 16, 3)
    with pytest.raises(BadInput, match=f"{broken.name}: is cut off or broken"):
        load_dataset("folder", str(tmp_path), 16)
    grey = open_dataset("folder", str(tmp_path), 16, mode="L")
    assert (grey.input_shape, grey.sha256 == again.sha256) == ((16, 16, 1), False)


def test_an_archive_of_test_images_alone_is_a_data_set(tmp_path: Path) -> None:
    """Nobody who gates needs training images; half of them is a mistake all the same."""
    held: dict[str, Any] = {
        "x_test": np.arange(3 * 16 * 16 * 3, dtype=np.uint8).reshape(3, 16, 16, 3),
        "y_test": np.array([0, 1, 1]),
    }
    np.savez(tmp_path / "a.npz", **held)
    data = load_dataset("npz", str(tmp_path / "a.npz"))
    assert (data.classes, len(data.x_train), data.input_shape, data.remark) == (("0", "1"), 0, (16, 16, 3), "")
    np.savez(tmp_path / "b.npz", x_train=held["x_test"], **held)
    with pytest.raises(BadInput, match="lacks y_train"):
        load_dataset("npz", str(tmp_path / "b.npz"))
    np.savez(tmp_path / "c.npz", x_test=held["x_test"], y_test=np.array([1, 2, 2]))
    with pytest.raises(BadInput, match="y_test has labels 1 to 2, but no image of 0"):
        load_dataset("npz", str(tmp_path / "c.npz"))
