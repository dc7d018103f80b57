"""A candidate and a data set as MAITE has them: its protocols for image classification, which are structural.

So nothing of MAITE is imported: what it evaluates, augments or measures is given these objects, as any of its own.
An image is `(C, H, W)` there, a target `(K,)`, and a batch a sequence of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dfmcl.common.errors import BadInput
from dfmcl.common.files import sha256_of
from dfmcl.common.reader import TEXT_BYTES, Unfit, read_plain, why_unread
from dfmcl.robustness.data import Dataset
from dfmcl.robustness.provider import CPU


class MaiteModel:
    """A candidate's or a promoted version's folder as a `Model`: what the gate judged is what is asked."""

    def __init__(self, folder: Path) -> None:
        """folder: with model.onnx and labels.txt. BadInput where one of them is missing or is none."""
        path = folder / "model.onnx"
        try:
            labels = read_plain(folder / "labels.txt", TEXT_BYTES).decode().splitlines()
            self._session, digest = CPU.session(path), sha256_of(path)
        except (OSError, Unfit, UnicodeDecodeError) as error:
            raise BadInput(f"{folder}: is no candidate: {why_unread(error)}") from None
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's own kinds
            raise BadInput(f"{path}: cannot be loaded: {' '.join(str(error).split())}") from None
        self._input = self._session.get_inputs()[0]
        self.metadata: dict[str, Any] = {"id": f"sha256:{digest}", "index2label": dict(enumerate(labels))}

    def __call__(self, batch_input: Sequence[ArrayLike]) -> Sequence[NDArray[np.float32]]:
        """Logits `(K,)` of each image `(C, H, W)`: uint8, or floats in [0, 1], which are rounded to bytes.

        BadInput for images of another size, or of other numbers.
        """
        if not len(batch_input):
            return []
        images = np.stack([_bytes(np.asarray(image)) for image in batch_input]).transpose(0, 2, 3, 1)
        if list(images.shape[1:]) != self._input.shape[1:]:
            height, width, channels = self._input.shape[1:]
            raise BadInput(f"an image is {images.shape[1:]}, the model takes {(height, width, channels)}: resize it")
        (logits,) = self._session.run(None, {self._input.name: np.ascontiguousarray(images)})
        return list(logits)


class MaiteDataset:
    """The test images of a data set as a `Dataset`."""

    def __init__(self, data: Dataset) -> None:
        self._data = data
        names = dict(enumerate(data.classes))
        self.metadata: dict[str, Any] = {"id": f"{data.name} sha256:{data.sha256}", "index2label": names}

    def __len__(self) -> int:
        return len(self._data.x_test)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], dict[str, Any]]:
        """Image `(C, H, W)` uint8, one-hot label `(K,)`, and the place as its id; IndexError beyond the last."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        image = np.asarray(self._data.x_test[index : index + 1])[0]
        label = np.zeros(len(self._data.classes), np.float32)
        label[self._data.y_test[index]] = 1
        return np.ascontiguousarray(image.transpose(2, 0, 1)), label, {"id": index}


def _bytes(image: NDArray[Any]) -> NDArray[np.uint8]:
    """An image as it is on the wire."""
    if image.ndim != 3:
        raise BadInput(f"an image has the shape {image.shape}, and MAITE's is (C, H, W)")
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind != "f" or not ((image >= 0) & (image <= 1)).all():
        raise BadInput(f"an image holds {image.dtype}: uint8 is asked for, or floats in [0, 1]")
    found: NDArray[np.uint8] = np.rint(image * 255).astype(np.uint8)
    return found
