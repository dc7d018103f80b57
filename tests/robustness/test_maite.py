"""MAITE's own evaluation, given a candidate and a data set of ours: its protocols are met, its figures are ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dfmcl.common.errors import BadInput
from dfmcl.robustness.data import CIFAR10_CLASSES, Dataset, load_dataset
from dfmcl.robustness.maite import MaiteDataset, MaiteModel
from tests.deploying import ROOT

RELEASE = ROOT / "model_repository" / "resnet18-cifar10" / "1"
DIGITS = load_dataset("digits")


@pytest.fixture(scope="module")
def model() -> MaiteModel:
    return MaiteModel(RELEASE)


def test_maite_evaluates_it_by_its_own_tasks(model: MaiteModel) -> None:
    """Both are what its protocols ask for, and the predictions of its loop are the logits that the gate recorded."""
    protocols = pytest.importorskip("maite.protocols.image_classification", reason="maite, of the extra dev")
    from maite.tasks import evaluate

    with np.load(RELEASE / "probes.npz") as probes:
        images, labels, logits = (probes[name][:5] for name in ("images", "labels", "clean_logits"))

    data = MaiteDataset(Dataset("probes", images[:0], labels[:0], images, labels, CIFAR10_CLASSES))
    assert isinstance(model, protocols.Model)
    assert isinstance(data, protocols.Dataset)
    _, predictions, _ = evaluate(model=model, dataset=data, batch_size=2, return_preds=True)
    found = [row for batch in predictions for row in batch]
    np.testing.assert_allclose(np.stack(found), logits, atol=1e-2)
    assert model.metadata["index2label"][8] == "ship"


def test_a_data_set_is_its_test_part() -> None:
    """Channels first, one-hot, in its order; the end is an IndexError, so that a loop over it ends."""
    data = MaiteDataset(DIGITS)
    image, label, about = data[3]
    assert len(data) == len(DIGITS.x_test)
    np.testing.assert_array_equal(image.transpose(1, 2, 0), DIGITS.x_test[3])
    assert (label.argmax(), label.sum(), about) == (DIGITS.y_test[3], 1, {"id": 3})
    assert data.metadata["index2label"] == {number: str(number) for number in range(10)}
    with pytest.raises(IndexError):
        data[len(data)]


def test_floats_are_the_bytes_they_came_from(model: MaiteModel) -> None:
    """In [0, 1]; other numbers and sizes are told, and not guessed."""
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8)
    (one,), (other,) = model([image]), model([image.astype(np.float32) / 255])
    np.testing.assert_array_equal(one, other)
    assert list(model([])) == []
    for wrong, said in (
        (image.astype(np.float32), "floats in"),
        (image.astype(np.int64), "floats in"),
        (image[0], "(C, H, W)"),
        (image[:, :16], "resize it"),
        (image.transpose(1, 2, 0), "resize it"),
        (np.full((3, 32, 32), np.nan), "floats in"),
    ):
        with pytest.raises(BadInput) as told:
            model([wrong])
        assert said in str(told.value)


def test_what_is_no_candidate_is_told(tmp_path: Path) -> None:
    """One line."""
    with pytest.raises(BadInput, match="is no candidate"):
        MaiteModel(tmp_path)
    (tmp_path / "labels.txt").write_text("a\n")
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(BadInput, match="cannot be loaded"):
        MaiteModel(tmp_path)
