"""A large .npz is read where it lies: the same images and digest as in memory, and damage is found."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dfmcl.common.errors import BadInput
from dfmcl.robustness import mapped as room
from dfmcl.robustness.data import Dataset, load_dataset, open_dataset
from dfmcl.robustness.mapped import Mapped
from dfmcl.robustness.memorisation import repeated

DRAWN = np.random.default_rng(0)
HELD: Mapping[str, Any] = {
    "x_train": DRAWN.integers(0, 256, (40, 12, 10, 3), np.uint8),
    "y_train": np.arange(40) % 4,
    "x_test": DRAWN.integers(0, 256, (8, 12, 10, 3), np.uint8),
    "y_test": np.arange(8) % 4,
}


@pytest.fixture(autouse=True)
def _few_bytes_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SMALLEST", 1)
    monkeypatch.setattr(room, "BLOCK", 3 * 360)


def opened(path: Path, **changes: Any) -> Dataset:
    np.savez(path, **{**HELD, **changes})
    return open_dataset("npz", str(path))


def test_a_mapped_archive_is_the_archive(tmp_path: Path) -> None:
    """Every way to ask gives the same bytes as numpy, as copies; digest and labels are those of the arrays."""
    data, held = opened(tmp_path / "a.npz"), load_dataset("npz", str(tmp_path / "a.npz"))
    assert isinstance(data.x_train, Mapped)
    assert isinstance(held.x_train, np.ndarray)
    for index in (slice(3, 30, 4), np.array([5, 0, 39, 5]), np.arange(40) % 3 == 0):
        np.testing.assert_array_equal(data.x_train[index], HELD["x_train"][index])
    np.testing.assert_array_equal(np.asarray(data.x_test), HELD["x_test"])
    assert (data.sha256, data.classes, data.input_shape) == (held.sha256, held.classes, (12, 10, 3))
    data.x_train[:1][0, 0, 0] = 7  # a copy: the archive stays
    np.testing.assert_array_equal(data.x_train[:1], HELD["x_train"][:1])
    mixed = np.concatenate([HELD["x_train"][[3, 39]], HELD["x_test"][:1]])
    assert repeated(mixed, data.x_train) == 2


def test_grey_images_are_mapped_too(tmp_path: Path) -> None:
    """(N, H, W) is (N, H, W, 1), and the same data set."""
    flat = {key: HELD[key][..., 0] for key in ("x_train", "x_test")}
    data = opened(tmp_path / "flat.npz", **flat)
    assert isinstance(data.x_train, Mapped)
    deep = opened(tmp_path / "deep.npz", **{key: value[..., None] for key, value in flat.items()})
    assert (data.input_shape, data.sha256) == ((12, 10, 1), deep.sha256)


def test_what_cannot_be_mapped_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed, by columns, small: arrays, as ever, of the same bytes."""
    np.savez_compressed(tmp_path / "packed.npz", **HELD)
    packed = open_dataset("npz", str(tmp_path / "packed.npz"))
    columns = opened(tmp_path / "columns.npz", x_train=np.asfortranarray(HELD["x_train"]))
    monkeypatch.setattr(room, "SMALLEST", 10**6)
    small = opened(tmp_path / "small.npz")
    for data in (packed, columns, small):
        assert isinstance(data.x_train, np.ndarray)
        np.testing.assert_array_equal(data.x_train, HELD["x_train"])
    assert packed.sha256 == columns.sha256 == small.sha256


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("x_train", lambda x: x // 200, "x_train is uint8 from 0 to 1; .* save 255"),
        ("x_train", lambda x: x.transpose(0, 3, 1, 2), "looks like NCHW"),
        ("x_train", lambda x: x / 255, "x_train is float64 from 0"),
        ("x_train", lambda x: x.reshape(40, -1), r"shape \(40, 360\); expected"),
        ("x_test", lambda x: x[:, :9], "must be alike"),
        ("y_train", lambda y: y[:9], "40 images in x_train, 9 labels"),
    ],
)
def test_mistakes_are_named_as_in_memory(tmp_path: Path, key: str, change: Any, message: str) -> None:
    """What is mapped is looked at as what is read."""
    with pytest.raises(BadInput, match=message):
        opened(tmp_path / "a.npz", **{key: change(HELD[key])})


def test_damage_is_found(tmp_path: Path) -> None:
    """One other byte is found by the archive's checksum, when all is read; a member that moved is not mapped at all."""
    data = opened(tmp_path / "a.npz")
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    assert isinstance(data.x_train, Mapped)
    whole[data.x_train.offset + 360 * 7] ^= 1
    (tmp_path / "a.npz").write_bytes(whole)
    again = open_dataset("npz", str(tmp_path / "a.npz"))
    with pytest.raises(BadInput, match=r"a\.npz: not readable as \.npz: Bad CRC-32 for file 'x_train\.npy'"):
        _ = again.sha256
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        begin = archive.getinfo("x_train.npy").header_offset
    whole[begin : begin + 4] = b"PK\x01\x02"
    (tmp_path / "a.npz").write_bytes(whole)
    with pytest.raises(BadInput, match=r"not readable as \.npz"):
        open_dataset("npz", str(tmp_path / "a.npz"))
