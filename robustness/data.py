"""Images as bytes: uint8 `(N, H, W, C)` with int64 labels, in a training and a test part, and a digest of both."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dfmcl.common.errors import BadInput
from dfmcl.common.preprocessing import Preprocessing
from dfmcl.common.progress import Track, silent
from dfmcl.common.text import why_not_local
from dfmcl.robustness.archive import KEYS, classes_of, listed, read_archive
from dfmcl.robustness.classes import require_names
from dfmcl.robustness.digests import Kept, digests_of
from dfmcl.robustness.folder import Part, described, list_part
from dfmcl.robustness.image_set import Images, Pictures
from dfmcl.robustness.manifest import list_manifest
from dfmcl.robustness.mapped import Mapped
from dfmcl.robustness.parquet import list_parquet
from dfmcl.robustness.shards import list_shards
from dfmcl.robustness.sources import FITTED

Bytes = NDArray[np.uint8]
Labels = NDArray[np.int64]
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Seed of the digits' training/test split; part of what "digits" means, like its order.
DIGITS_SPLIT_SEED = 20260


@dataclass(frozen=True)
class Dataset:
    """A named data set; `path`, `image_size` and `preprocessing` load it again; skipped: files, by reason."""

    name: str
    x_train: Images
    y_train: Labels
    x_test: Images
    y_test: Labels
    classes: tuple[str, ...]
    path: str = ""
    image_size: int = 0
    preprocessing: str = ""
    skipped: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        """Digest of all images and labels, in order; of a folder, of its files, their classes and how they are read."""
        digest = hashlib.sha256()
        if isinstance(self.x_train, Pictures) and isinstance(self.x_test, Pictures):
            for pictures in (self.x_train, self.x_test):
                digest.update(str((pictures.shape, pictures.mode, str(pictures.preprocessing))).encode())
                named = (pictures.part.classes[label] for label in pictures.part.labels)
                digest.update("".join(map("{}\0{}\n".format, named, pictures.digests)).encode())
            return digest.hexdigest()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            if isinstance(array, Mapped):
                digest.update(str((array.shape, np.dtype(np.uint8).str)).encode())
                for block in array.blocks():
                    digest.update(block.data)
                continue
            digest.update(str((array.shape, np.asarray(array).dtype.str)).encode())
            digest.update(np.ascontiguousarray(np.asarray(array)).data)
        return digest.hexdigest()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.x_train.shape[1:]
        return int(height), int(width), int(channels)

    def describe(self) -> dict[str, Any]:
        """The entry that manifests keep."""
        entry = {"name": self.name, "path": self.path, "image_size": self.image_size, "sha256": self.sha256}
        entry |= {"preprocessing": self.preprocessing} if self.preprocessing else {}
        return entry | ({"skipped": dict(self.skipped)} if self.skipped else {})

    @property
    def remark(self) -> str:
        """One line about files that were not read, and classes that nobody can learn; nothing where all is there."""
        lacking = [self.classes[i] for i in np.setdiff1d(np.arange(len(self.classes)), self.y_train)]
        untold = (
            f"no training image of {listed([repr(name) for name in lacking])}" if lacking and len(self.y_train) else ""
        )
        said = "; ".join(filter(None, (described(self.skipped), untold)))
        return f"{self.path}: {said}" if said else ""


def in_memory(data: Dataset, track: Track = silent, *, test: bool = False) -> Dataset:
    """The same with its training images as arrays, and, where asked, its test images."""

    def read(images: Images, part: str) -> Bytes:
        if isinstance(images, Pictures):
            return images.read(np.arange(len(images)), track, f"reading {part} images")
        return np.asarray(images)

    digest = data.sha256
    x_test = read(data.x_test, "test") if test else data.x_test
    read_in = replace(data, x_train=read(data.x_train, "train"), x_test=x_test)
    read_in.__dict__["sha256"] = digest
    return read_in


def labelled_as(data: Dataset, names: tuple[str, ...]) -> Dataset:
    """The same images with their labels in the order of a model's classes, which include all of the data's.

    BadInput where one of these is the name of two classes of the model.
    """
    count, number = Counter(names), {name: number for number, name in enumerate(names)}
    if doubled := [name for name in data.classes if count[name] > 1]:
        raise BadInput(f"labels: class {doubled[0]!r} stands twice, and the data has images of it; tell the two apart")
    place = np.array([number[name] for name in data.classes], np.int64)
    return replace(data, y_train=place[data.y_train], y_test=place[data.y_test], classes=names)


def load_dataset(
    name: str, path: str = "", image_size: int = 0, track: Track = silent, preprocessing: str = ""
) -> Dataset:
    """The data set as `open_dataset` opens it, its images as arrays, because all are needed, or many times."""
    return in_memory(open_dataset(name, path, image_size, track, preprocessing=preprocessing), track, test=True)


def open_dataset(
    name: str,
    path: str = "",
    image_size: int = 0,
    track: Track = silent,
    mode: str = "RGB",
    preprocessing: str = "",
    kept: Kept | None = None,
) -> Dataset:
    """A data set by its kind (dfmcl.robustness.sources); files of FITTED kinds are decoded when they are asked for.

    path: a file or folder.
    image_size: the side that files are fitted to.
    mode: RGB, or L, to read files for a network that takes grey images.
    preprocessing: how they are fitted, in the words of Preprocessing; empty: `fit bilinear`.
    kept: where digests of files are kept; None: nowhere.
    """
    if why := why_not_local(path):  # a path that no configuration gave, such as --data-path
        raise BadInput(f"data: path {path}: {why}")
    loaders = {
        "digits": lambda: _digits(),
        "cifar10": lambda: _npz(path, "cifar10", track) if path.endswith(".npz") else _cifar10(path),
        "npz": lambda: _npz(path, "npz", track),
    } | {kind: functools.partial(_fitted, kind, path, image_size, mode, preprocessing, track, kept) for kind in FITTED}
    if name not in loaders:
        raise BadInput(f"data: name is {name!r}; choose one of {', '.join(loaders)}")
    dataset = loaders[name]()
    _require_alike(f"data {name} ({path or 'built in'})", dataset)
    return dataset


def _require_alike(where: str, data: Dataset) -> None:
    if data.x_train.shape[1:] != data.x_test.shape[1:]:
        shapes = f"{data.x_train.shape[1:]} and {data.x_test.shape[1:]}"
        raise BadInput(f"{where}: training and test images are {shapes}; they must be alike")
    if len(data.classes) < 2:
        raise BadInput(f"{where}: has one class only, {data.classes[0]!r}: nothing to tell apart; add another class")
    require_names(data.classes, where)


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


def _npz(path: str, name: str, track: Track) -> Dataset:
    if not path:
        raise BadInput(f"data: {name} needs a path to an .npz file with {', '.join(KEYS)}")
    held = read_archive(path, track)
    classes = classes_of(held, path, CIFAR10_CLASSES if name == "cifar10" else ())
    x_train, y_train, x_test, y_test = (held[key] for key in KEYS)
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


def _folder(path: str) -> tuple[Part, Part]:
    """`path`/train/CLASS/* and `path`/test/CLASS/*, or, where it has neither, `path`/CLASS/*, all of it test images."""
    parted = any((Path(path) / part).is_dir() for part in ("train", "test"))
    test = list_part(Path(path) / "test" if parted else Path(path))
    train = list_part(Path(path) / "train") if parted else test.without_images()
    for one, others, part, other in ((train, test, "train", "test"), (test, train, "test", "train")):
        lacking = [name for name in others.classes if name not in one.classes]
        if lacking:
            raise BadInput(
                f"{path}: {part} has no folder {lacking[0]!r} ({len(lacking)} of {other}'s {len(others.classes)}"
                f" classes are missing); add {Path(path) / part / lacking[0]}, or remove it from {other}"
            )
    return train, test


LISTS: dict[str, Callable[[str], tuple[Part, Part]]] = {
    "folder": _folder,
    "csv": lambda path: list_manifest(Path(path)),
    "shards": lambda path: list_shards(Path(path)),
    "parquet": lambda path: list_parquet(Path(path)),
}
EXPECTED = {
    "folder": "PATH/train/CLASS/*.png and PATH/test/CLASS/*.png",
    "csv": "a file with the columns path, label and split",
    "shards": "PATH/train/*.tar and PATH/test/*.tar",
    "parquet": "PATH/train-*.parquet and PATH/test-*.parquet",
}


def _fitted(
    name: str, path: str, image_size: int, mode: str, preprocessing: str, track: Track, kept: Kept | None
) -> Dataset:
    """Files of any size, brought to image_size squared."""
    if not path:
        raise BadInput(f"data: {name} needs a path, with {EXPECTED[name]}")
    if image_size < 8:
        raise BadInput(f"data: image_size is {image_size}; {name} needs a side to resize to, such as 32")
    try:
        told = Preprocessing.parse(preprocessing)
    except ValueError as error:
        raise BadInput(f"data: preprocessing: {error}") from None
    told.require_side(image_size)
    train, test = LISTS[name](path)

    def pictures(part: Part, which: str, place: Kept | None) -> Pictures:
        digesting = functools.partial(
            digests_of, track=track, label=f"digests of {which} images", kept=place, place=f"{path}/{which}"
        )
        return Pictures(part, image_size, mode, told, digesting)

    return Dataset(
        name=name,
        x_train=pictures(train, "train", kept),
        y_train=train.labels,
        x_test=pictures(test, "test", kept if kept is not None and kept.test else None),
        y_test=test.labels,
        classes=train.classes,
        path=path,
        image_size=image_size,
        preprocessing=str(told),
        skipped=dict(train.skipped + test.skipped),
    )
