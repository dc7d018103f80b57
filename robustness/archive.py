"""A user's .npz of images and labels: its content, or one line that says what to save instead."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfmcl.common.errors import BadInput
from dfmcl.common.progress import Track
from dfmcl.common.reader import opened
from dfmcl.robustness.classes import require_names, twice
from dfmcl.robustness.mapped import Mapped, mapped

Array = NDArray[Any]
KEYS = ("x_train", "y_train", "x_test", "y_test")
TEST = KEYS[2:]  # may stand alone, where nobody trains
CLASSES = "classes"
CHANNELS = (1, 3)
NAMED = 5  # labels that a message lists
PICKLED = "is a pickled array of objects, which is not read because a pickle can run code; save it as one array"


def read_archive(path: str, track: Track) -> dict[str, Any]:
    """The arrays KEYS, and `classes` where it is there, checked: uint8 (N, H, W, C) and int64 (N,).

    Without any of the training part, that is empty. Large images that are not compressed are Mapped.
    """
    held = _arrays(path, track)
    for part in ("train", "test") if KEYS[0] in held else ("test",):
        images, labels = f"x_{part}", f"y_{part}"
        held[images] = images_of(held[images], f"{path}: {images}")
        held[labels] = labels_of(held[labels], f"{path}: {labels}")
        count = len(held[images])
        if count != len(held[labels]):
            raise BadInput(f"{path}: {count} images in {images}, {len(held[labels])} labels; expected one an image")
    return {"x_train": held["x_test"][:0], "y_train": held["y_test"][:0], **held}


def images_of(images: Array | Mapped, where: str) -> NDArray[np.uint8] | Mapped:
    """uint8 (N, H, W, C) of what an archive holds; (N, H, W) is grey. BadInput says how to save another."""
    if isinstance(images, np.ndarray) and images.dtype != np.uint8:
        raise BadInput(f"{where} is {images.dtype}{_instead(images)}")
    shape = tuple(images.shape)
    full = (*shape, 1) if len(shape) == 3 else shape
    if len(full) != 4 or (len(shape) == 3 and not {*CHANNELS}.isdisjoint(shape[1:])):
        raise BadInput(f"{where} has shape {shape}; expected (N, H, W, 3), or (N, H, W) for grey")
    if 0 in shape:
        raise BadInput(f"{where} has shape {shape}, which is no image; put some in")
    if full[3] not in CHANNELS:
        raise BadInput(f"{where} has shape {shape}, {_layout(full)}")
    if (images.max() if isinstance(images, np.ndarray) else images.top) == 1:
        # All but black, and an attack of 1/255 may turn a 0 into a 1.
        raise BadInput(f"{where} is uint8 from 0 to 1; expected uint8 from 0 to 255: save 255 * x")
    if isinstance(images, Mapped):
        return replace(images, shape=full)
    return np.ascontiguousarray(images.reshape(full))


def labels_of(labels: Array, where: str) -> NDArray[np.int64]:
    """int64 (N,) of integers (N,) or (N, 1). BadInput says how to save others."""
    if labels.dtype.kind in "US":
        advice = "save numbers, and the names as `classes`: classes, y = np.unique(y, return_inverse=True)"
        raise BadInput(f"{where} is {labels.dtype}; expected integers: {advice}")
    if labels.ndim == 2 and labels.shape[1] > 1 and len(labels) > 1:
        raise BadInput(f"{where} has shape {labels.shape}, which looks one-hot; save y.argmax(axis=1)")
    if labels.ndim == 0 or labels.size != len(labels):
        raise BadInput(f"{where} has shape {labels.shape}; expected one label an image, (N,)")
    if labels.dtype.kind not in "iu":
        whole = labels.dtype.kind == "b" or (labels.dtype.kind == "f" and bool(np.all(labels == np.floor(labels))))
        raise BadInput(f"{where} is {labels.dtype}; expected integers{': save y.astype(int)' if whole else ''}")
    if labels.dtype == np.uint64 and labels.size and labels.max() > np.iinfo(np.int64).max:
        raise BadInput(f"{where} has a label {labels.max()}; expected 0 to K - 1")
    return labels.reshape(-1).astype(np.int64)


def classes_of(held: Mapping[str, Array], path: str, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The classes' names: `known`, those the archive names, or else the training labels, which run from 0 to K - 1.

    BadInput where a label has no name, or where labels leave out a number that no array `classes` accounts for.
    """
    names = known or (_named(held[CLASSES], f"{path}: {CLASSES}") if CLASSES in held else ())
    told = "y_train" if len(held["y_train"]) else "y_test"
    train, test = np.unique(held[told]), np.unique(held["y_test"])
    if not names and not np.array_equal(train, np.arange(len(train))):
        raise BadInput(f"{path}: {told} {_gaps(train)}")
    count = len(names) or len(train)
    for key, labels in ((told, train), ("y_test", test)):
        outside = labels[(labels < 0) | (labels >= count)]
        if len(outside):
            why = f"{count} classes are named" if names else f"{told} has 0 to {count - 1}"
            raise BadInput(f"{path}: {key} has labels {listed(outside)}; {why}, expected 0 to {count - 1}")
    return names or tuple(map(str, range(count)))


def _arrays(path: str, track: Track) -> dict[str, Any]:
    expected = f"expected {', '.join(KEYS)}"
    try:
        opened(Path(path), named=True).close()  # neither a FIFO nor a device, which would keep the next line waiting
        if not zipfile.is_zipfile(path):
            raise BadInput(f"{path}: not readable as .npz: {_not_zip(path)}; save it with np.savez: {expected}")
        with np.load(path, allow_pickle=False) as archive:
            if name := twice(archive.files):
                raise BadInput(f"{path}: {name} stands in it twice; save it with np.savez, which writes each once")
            needed = KEYS if {*KEYS[:2]} & {*archive.files} else TEST
            missing = [key for key in needed if key not in archive]
            if missing:
                found = f"holds {', '.join(archive.files[:NAMED]) or 'nothing'}"
                raise BadInput(f"{path}: lacks {', '.join(missing)}; {expected}; it {found}")
            keys = [key for key in (*KEYS, CLASSES) if key in archive]
            places = {key: mapped(path, key) for key in keys if key.startswith("x_")}
            images = {key: place for key, place in places.items() if place is not None}
            read = track([key for key in keys if key not in images], f"reading {path}", len(keys) - len(images))
            return images | {key: _array(archive, key, path) for key in read}
    except (BadInput, MemoryError):
        raise
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; point data.path at an .npz, {expected}") from None
    except Exception as error:  # noqa: BLE001  # a damaged archive may trip zipfile, zlib and numpy in any way
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path}: not readable as .npz: {reason}") from None


def _array(archive: Any, key: str, path: str) -> Array:
    try:
        array = archive[key]
    except ValueError as error:
        if "allow_pickle" in str(error):  # numpy has no class of its own for it
            raise BadInput(f"{path}: {key} {PICKLED}") from None
        raise
    if not isinstance(array, np.ndarray):  # numpy hands over the bytes of what is no .npy
        raise BadInput(f"{path}: not readable as .npz: {key} is no array")
    return array


def _not_zip(path: str) -> str:
    with open(path, "rb") as file:  # noqa: PTH123  # of a path that is a string everywhere here
        head = file.read(6)
    if head == b"\x93NUMPY":
        return "a single array"
    return "cut off or damaged" if head.startswith(b"PK") else "no archive of numpy's"


def _instead(images: Array) -> str:
    """What to save in place of images that are no uint8."""
    expected = "; expected uint8 from 0 to 255"
    if images.dtype.kind not in "iuf" or images.size == 0:
        return expected
    low, high = images.min(), images.max()
    if not np.isfinite([low, high]).all():
        return f" and holds NaN or infinity{expected}"
    if images.dtype.kind == "f" and low >= 0 and high <= 1:
        return f" from {low:g} to {high:g}{expected}: save (255 * x).round().astype('uint8')"
    if low >= 0 and high <= 255:
        whole = "x.round()" if images.dtype.kind == "f" else "x"
        return f" from {low:g} to {high:g}{expected}: save {whole}.astype('uint8')"
    return f" from {low:g} to {high:g}{expected}: undo the normalisation or scaling, then save them as uint8"


def _layout(shape: tuple[int, ...]) -> str:
    if shape[1] in CHANNELS:
        return "which looks like NCHW; expected NHWC: save x.transpose(0, 2, 3, 1)"
    if shape[3] in (2, 4):
        return f"{shape[3]} channels; expected 1 or 3: leave alpha out, x[..., :{shape[3] - 1}]"
    return f"{shape[3]} channels; expected 1 or 3 as the last axis, (N, H, W, C)"


def _named(names: Array, where: str) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise BadInput(f"{where} is {names.dtype} {names.shape}; expected one name a class, np.array(['cat', 'dog'])")
    try:
        texts = np.char.decode(names, "utf-8") if names.dtype.kind == "S" else names.astype(str)
    except UnicodeDecodeError:
        raise BadInput(f"{where} holds bytes that are no UTF-8; save the names as text") from None
    require_names(texts.tolist(), where)
    return tuple(texts.tolist())


def _gaps(labels: NDArray[np.int64]) -> str:
    """labels: sorted, each once."""
    low, high = int(labels[0]), int(labels[-1])
    if low < 0:
        return f"has labels {low} to {high}; expected 0 to K - 1: np.unique(y, return_inverse=True) renumbers"
    first = np.setdiff1d(np.arange(len(labels) + NAMED), labels)
    missing = listed(first[first < high])
    advice = f"y - {low}" if high - low == len(labels) - 1 else "them renumbered (np.unique with return_inverse=True)"
    return (
        f"has labels {low} to {high}, but no image of {missing}; expected each of 0 to K - 1: save {advice},"
        " in both parts, or name every class in an array `classes`"
    )


def listed(items: Sequence[object] | NDArray[np.int64], most: int = NAMED) -> str:
    """The first items."""
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")
