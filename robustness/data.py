"""Images as bytes: uint8 `(N, H, W, C)` with int64 labels, in a training and a test part, and a digest of both."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from robustness.errors import BadInput
from robustness.progress import Track, silent
from robustness.text import why_not_local

Bytes = NDArray[np.uint8]
Labels = NDArray[np.int64]
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Seed of the digits' training/test split; part of what "digits" means, like its order.
DIGITS_SPLIT_SEED = 20260


@dataclass(frozen=True)
class Dataset:
    """A named data set; `path` and `image_size` are what it takes to load it again."""

    name: str
    x_train: Bytes
    y_train: Labels
    x_test: Bytes
    y_test: Labels
    classes: tuple[str, ...]
    path: str = ""
    image_size: int = 0

    @cached_property
    def sha256(self) -> str:
        """Digest of all images and labels, in order."""
        digest = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(str((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.x_train.shape[1:]
        return int(height), int(width), int(channels)

    def describe(self) -> dict[str, Any]:
        """The entry that manifests keep."""
        return {"name": self.name, "path": self.path, "image_size": self.image_size, "sha256": self.sha256}


def load_dataset(name: str, path: str = "", image_size: int = 0, track: Track = silent) -> Dataset:
    """Load `digits`, `cifar10`, `npz` or `folder`; `path` is a file or folder, `image_size` a side."""
    if why := why_not_local(path):  # a path that no configuration gave, such as --data-path
        raise BadInput(f"data: path {path}: {why}")
    loaders = {
        "digits": lambda: _digits(),
        "cifar10": lambda: _npz(path, "cifar10") if path.endswith(".npz") else _cifar10(path),
        "npz": lambda: _npz(path, "npz"),
        "folder": lambda: _folder(path, image_size, track),
    }
    if name not in loaders:
        raise BadInput(f"data: name is {name!r}; choose one of {', '.join(loaders)}")
    dataset = loaders[name]()
    for part, images, labels in (
        ("train", dataset.x_train, dataset.y_train),
        ("test", dataset.x_test, dataset.y_test),
    ):
        _check(f"data {name} ({path or 'built in'}), {part} part", images, labels, len(dataset.classes))
    if dataset.x_train.shape[1:] != dataset.x_test.shape[1:]:
        shapes = f"{dataset.x_train.shape[1:]} and {dataset.x_test.shape[1:]}"
        raise BadInput(f"data {name} ({path}): training and test images are {shapes}; they must be alike")
    return dataset


def _check(where: str, images: Bytes, labels: Labels, classes: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4:
        raise BadInput(f"{where}: images are {images.dtype} {images.shape}; expected uint8 (N, H, W, C)")
    if len(images) == 0 or labels.shape != (len(images),):
        raise BadInput(f"{where}: {len(images)} images and labels of shape {labels.shape}; expected one label an image")
    low, high = int(np.min(labels)), int(np.max(labels))
    if low < 0 or high >= classes:
        raise BadInput(f"{where}: labels run from {low} to {high}; expected 0 to {classes - 1}")


def _digits() -> Dataset:
    """scikit-learn's scanned digits (UCI, 1,797 images of 8x8 with 17 grey levels), bilinearly upsampled to 16x16."""
    # As load_digits reads it; to import that takes a second, more than all else that a command loads but torch.
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    pixels, labels = table[:, :-1], table[:, -1]
    small = torch.from_numpy(pixels.reshape(-1, 1, 8, 8) / 16).float()
    large = functional.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    images = (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    order = np.random.default_rng(DIGITS_SPLIT_SEED).permutation(len(images))
    x, y = np.ascontiguousarray(images[order]), labels[order].astype(np.int64)
    return Dataset("digits", x[450:], y[450:], x[:450], y[:450], tuple("0123456789"))


def _npz(path: str, name: str) -> Dataset:
    keys = ("x_train", "y_train", "x_test", "y_test")
    if not path:
        raise BadInput(f"data: {name} needs a path to an .npz file with {', '.join(keys)}")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with archive:
            missing = [key for key in keys if key not in archive]
            if missing:
                raise BadInput(f"{path}: lacks {', '.join(missing)}; expected {', '.join(keys)}")
            x_train, y_train, x_test, y_test = (archive[key] for key in keys)
            named = [str(label) for label in archive["classes"]] if "classes" in archive else None
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; point data.path at an .npz with {', '.join(keys)}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{path}: not readable as .npz: {str(error).splitlines()[0]}") from None
    for key, labels in (("y_train", y_train), ("y_test", y_test)):
        if not np.issubdtype(labels.dtype, np.integer):
            raise BadInput(f"{path}: {key} is {labels.dtype}; expected integers")
    classes: tuple[str, ...]
    if name == "cifar10":
        classes = CIFAR10_CLASSES
    else:
        classes = tuple(named or (str(k) for k in range(int(y_train.max(initial=0)) + 1)))
    y_train, y_test = y_train.astype(np.int64), y_test.astype(np.int64)
    return Dataset(name, x_train, y_train, x_test, y_test, classes, path=path)


def _cifar10(path: str) -> Dataset:
    """CIFAR-10 through torchvision, downloaded into `path` (default `data`) where it is not there yet."""
    from torchvision.datasets import CIFAR10

    root = path or "data"
    try:
        parts = [CIFAR10(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"data: cifar10 is not in {root} and cannot be downloaded ({reason}); set data.path") from None
    (x_train, y_train), (x_test, y_test) = ((p.data, np.asarray(p.targets, dtype=np.int64)) for p in parts)
    return Dataset("cifar10", x_train, y_train, x_test, y_test, CIFAR10_CLASSES, path=root)


def _folder(path: str, image_size: int, track: Track) -> Dataset:
    """`path`/train/CLASS/* and `path`/test/CLASS/*: resized to fit and centre-cropped to image_size squared."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, Resize

    if image_size < 8:
        raise BadInput(f"data: image_size is {image_size}; a folder needs a side to resize to, such as 32")
    fit = Compose([Resize(image_size), CenterCrop(image_size)])
    parts: list[tuple[Bytes, Labels, tuple[str, ...]]] = []
    for part in ("train", "test"):
        try:
            folder = ImageFolder(str(Path(path) / part), transform=lambda image: np.asarray(fit(image)))
            images = [folder[i][0] for i in track(range(len(folder)), f"reading {part} images")]
        except (OSError, FileNotFoundError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise BadInput(f"{Path(path) / part}: {reason}; expected PATH/{part}/CLASS/*.png in data.path") from None
        parts.append((np.stack(images), np.asarray(folder.targets, dtype=np.int64), tuple(folder.classes)))
    (x_train, y_train, classes), (x_test, y_test, test_classes) = parts
    if classes != test_classes:
        raise BadInput(f"{path}: train has classes {classes}, test has {test_classes}; they must be the same")
    return Dataset("folder", x_train, y_train, x_test, y_test, classes, path=path, image_size=image_size)
