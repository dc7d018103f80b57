"""Data sets and runs: what is malformed is named, in one line, before anything is trained on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from robustness.data import DIGITS_SPLIT_SEED, load_dataset
from robustness.errors import BadInput
from robustness.runs import load_run

GOOD = {
    "x_train": np.zeros((4, 8, 8, 3), np.uint8),
    "y_train": np.arange(4),
    "x_test": np.zeros((2, 8, 8, 3), np.uint8),
    "y_test": np.arange(2),
}

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "float images": ({"x_train": np.zeros((4, 8, 8, 3))}, "images are float64"),
    "grey images": ({"x_test": np.zeros((2, 8, 8), np.uint8)}, r"expected uint8 \(N, H, W, C\)"),
    "other sizes": ({"x_test": np.zeros((2, 9, 9, 3), np.uint8)}, "must be alike"),
    "too few labels": ({"y_train": np.arange(3)}, "expected one label an image"),
    "label out of range": ({"y_test": np.array([0, 7])}, "labels run from 0 to 7; expected 0 to 3"),
    "negative label": ({"y_train": np.array([0, 1, 2, -1])}, "labels run from -1"),
    "text labels": ({"y_train": np.array(["a", "b", "c", "d"])}, "y_train is <U1; expected integers"),
    "float labels": ({"y_test": np.array([0.0, np.nan])}, "y_test is float64; expected integers"),
    "no images": ({"x_test": np.zeros((0, 8, 8, 3), np.uint8), "y_test": np.arange(0)}, "0 images"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_malformed_arrays_are_named(tmp_path: Path, mistake: str) -> None:
    """Wrong dtype, shape or labels: bad input that says which."""
    change, message = MISTAKES[mistake]
    np.savez(tmp_path / "data.npz", **{**GOOD, **change})
    with pytest.raises(BadInput, match=message):
        load_dataset("npz", str(tmp_path / "data.npz"))


def test_files_that_are_no_archive_are_named(tmp_path: Path) -> None:
    """Empty, truncated, a single array, missing keys, not there: one line each."""
    path = tmp_path / "data.npz"
    np.savez(path, **GOOD)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:200], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(BadInput, match="not readable as"):
            load_dataset("npz", str(path))
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(BadInput, match="single array"):
        load_dataset("npz", str(path))
    np.savez(path, x_train=GOOD["x_train"])
    with pytest.raises(BadInput, match="lacks y_train, x_test, y_test"):
        load_dataset("npz", str(path))
    with pytest.raises(BadInput, match="no such file"):
        load_dataset("npz", str(tmp_path / "none.npz"))
    with pytest.raises(BadInput, match="choose one of digits"):
        load_dataset("mnist")


def test_npz_is_what_it_holds(tmp_path: Path) -> None:
    """A good archive arrives unchanged, and its digest follows its content."""
    np.savez(tmp_path / "data.npz", **GOOD)
    data = load_dataset("npz", str(tmp_path / "data.npz"))
    assert all(np.array_equal(getattr(data, key), value) for key, value in GOOD.items())
    assert data.classes == ("0", "1", "2", "3")
    np.savez(tmp_path / "data.npz", **{**GOOD, "y_test": np.array([1, 0])})
    assert load_dataset("npz", str(tmp_path / "data.npz")).sha256 != data.sha256


def test_folder_of_folders(tmp_path: Path) -> None:
    """ImageFolder: classes by name, images resized to the asked side; a missing part or size is named."""
    for part in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (20, 30), (number * 200, i, 7)).save(tmp_path / part / name / f"{i}.png")
    data = load_dataset("folder", str(tmp_path), 16)
    assert (data.x_train.shape, data.classes) == ((4, 16, 16, 3), ("cat", "dog"))
    assert data.y_test.tolist() == [0, 0, 1, 1]
    assert data.x_train[2:, :, :, 0].min() == 200
    with pytest.raises(BadInput, match="image_size is 0"):
        load_dataset("folder", str(tmp_path))
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(BadInput, match=r"test: No such file or directory; expected PATH/test/CLASS"):
        load_dataset("folder", str(tmp_path), 16)


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
    monkeypatch.setattr("robustness.data.find_spec", lambda name: None)
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
    with pytest.raises(BadInput, match="is not finished"):
        load_run(run)
    with pytest.raises(BadInput, match="is no run"):
        load_run(tmp_path / "nowhere")
