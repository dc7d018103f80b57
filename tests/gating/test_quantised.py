"""Quantised ONNX files: the file decides, its float twin gives gradients, and no lie hides behind a rounding."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from torch import Tensor, nn

from dfmcl.common.errors import Refused
from dfmcl.gating.formats.summary import headline
from dfmcl.gating.gate import gate
from dfmcl.gating.subjects.candidate import candidate_subject
from dfmcl.gating.subjects.onnx_file import onnx_subject
from dfmcl.release.export import wrap
from dfmcl.robustness.background import Background
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.diagnosis import Examination
from dfmcl.robustness.doubts import artefact_disagrees, unaccounted
from dfmcl.robustness.models import frozen, to_bytes, to_float
from dfmcl.robustness.onnx_float import NoTwin, float_twin
from dfmcl.robustness.onnx_graph import noise, read_graph
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.threats.registry import threat_of
from tests.gating.test_disbelief import policy
from tests.gating.test_subject import assert_same, gradient, graph_of, means, to_onnx
from tests.networks import Networks

LABELS = tuple("abcde")


class Calibration(CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self.parts: Iterator[np.ndarray] = iter(np.array_split(images, 4))

    def get_next(self) -> dict[str, np.ndarray] | None:
        part = next(self.parts, None)
        return None if part is None else {"entry": part}


def static(source: Path, images: np.ndarray, **options: Any) -> Path:
    target = source.with_name(f"static-{source.name}")
    logging.disable(logging.WARNING)  # advice to preprocess the file
    quantize_static(source, target, Calibration(images), quant_format=QuantFormat.QDQ, **options)
    logging.disable(logging.NOTSET)
    return target


def dynamic(source: Path, **options: Any) -> Path:
    target = source.with_name(f"dynamic-{source.name}")
    logging.disable(logging.WARNING)
    quantize_dynamic(source, target, **options)
    logging.disable(logging.NOTSET)
    return target


class Rectified(nn.Module):
    """Two convolutions and a linear layer; its ReLUs go into the quantisers' zero points."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(72, 5),
        ).eval()  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits


HOW: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "static": lambda path, images: static(path, images),
    "a scale a channel": lambda path, images: static(path, images, per_channel=True, weight_type=QuantType.QInt8),
    "unsigned": lambda path, images: static(path, images, activation_type=QuantType.QUInt8),
    "sixteen bits": lambda path, images: static(path, images, activation_type=QuantType.QUInt16),
    "dynamic": lambda path, images: dynamic(path),
    "dynamic, a scale a channel": lambda path, images: dynamic(path, per_channel=True, weight_type=QuantType.QInt8),
}


@pytest.mark.parametrize("how", HOW)
def test_a_quantised_file_has_the_gradients_of_its_network(tmp_path: Path, how: str) -> None:
    """Its own answers count, to the last bit; gradients are the float network's, up to what rounded weights change."""
    net = Rectified()
    source = to_onnx(tmp_path / "model.onnx", net, torch.zeros(2, 3, 8, 8))
    path = HOW[how](source, noise(read_graph(source).contract, 32).numpy())
    subject = onnx_subject(path, labels=LABELS)
    x = noise(subject.contract, 9, seed=1)
    assert_same(subject.decide(x), net(x).detach(), 0.05)
    assert not torch.equal(subject.decide(x), net(x).detach())
    assert subject.model is not None, subject.no_gradients
    assert subject.twin.startswith("its float twin, without the rounding of ")
    assert_same(subject.model(x).detach(), net(x).detach(), 0.05)
    found, expected = gradient(subject.model, x).flatten(1), gradient(net, x).flatten(1)
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.95
    assert_same(torch.cat([subject.decide(x[:1]), subject.decide(x[1:])]), subject.decide(x))  # in any company
    assert subject.afresh is not None
    assert_same(torch.from_numpy(subject.afresh(to_bytes(x).numpy())), subject.decide(x))


def test_a_twin_saturates_where_the_code_ends() -> None:
    """Above the largest code nothing changes, so there is no slope; below, a step of the code is the slope's own."""
    model = graph_of(
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["r"]),
        *means("r"),
        axes=np.array([2, 3]),
        scale=np.array(1 / 256, np.float32),
        zero=np.array(-8, np.int8),
    )
    twin, said = float_twin(model)
    assert said == "its float twin, without the rounding of 1 QuantizeLinear"
    session = onnx.reference.ReferenceEvaluator(twin)
    for value in (0.1, 0.30001, 0.6, -0.9):
        (found,) = session.run(None, {"x": np.full((1, 3, 4, 4), value, np.float32)})
        assert found[0] == pytest.approx(np.clip(value, (-128 + 8) / 256, (127 + 8) / 256), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": np.full(3, 1 / 255, np.float32), "zero": np.zeros(3, np.uint8)}, "has a scale for each channel"),
        ({"scale": None}, "reads 'scale', which is computed while it runs"),
    ],
)
def test_a_quantiser_of_another_kind_has_no_twin(changes: dict[str, np.ndarray | None], message: str) -> None:
    """What cannot be rewritten is not guessed."""
    held: dict[str, Any] = {"scale": np.array(1 / 255, np.float32), "zero": np.array(0, np.uint8), **changes}
    model = graph_of(
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], axis=1),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["r"], axis=1),
        *means("r"),
        axes=np.array([2, 3]),
        **{name: value for name, value in held.items() if value is not None},
    )
    with pytest.raises(NoTwin, match=message):
        float_twin(model)
    model.graph.node.append(helper.make_node("QLinearSigmoid", ["q"], ["s"], domain="com.microsoft"))
    with pytest.raises(NoTwin, match="QLinearSigmoid rounds inside"):
        float_twin(model)


def test_what_depends_on_the_batch_is_not_served(tmp_path: Path) -> None:
    """A dynamic file's scales are of all images of a request, so that strangers would change an answer."""
    path = dynamic(to_onnx(tmp_path / "model.onnx", Rectified(), torch.zeros(2, 3, 8, 8)))
    with pytest.raises(Refused, match="chooses its scales by the whole batch"):
        wrap(path, tmp_path / "candidate", contract="float32 NCHW", labels=LABELS)
    source = to_onnx(tmp_path / "again.onnx", Rectified(), torch.zeros(2, 3, 8, 8))
    path = static(source, noise(read_graph(source).contract, 32).numpy())
    wrap(path, tmp_path / "candidate", contract="float32 NCHW", labels=LABELS)
    candidate, file = candidate_subject(tmp_path / "candidate"), onnx_subject(path)
    x = noise(file.contract, 3)
    assert_same(candidate.decide(x), file.decide(x), 1e-3)
    assert candidate.model is not None, candidate.no_gradients
    assert candidate.twin == file.twin


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return to_float(torch.from_numpy(load_dataset("digits").x_train[:64])).numpy()


def test_an_honest_quantised_file_passes(networks: Networks, digits: np.ndarray, tmp_path: Path) -> None:
    """Roundings trip no check, and the verdict's line says where gradients came from."""
    source = to_onnx(tmp_path / "model.onnx", load_run(networks("hardened")).model, torch.zeros(2, 3, 16, 16))
    subject = onnx_subject(static(source, digits))
    report = gate(subject, policy(0.02, "8/255"), tmp_path / "evidence")
    assert report.verdict == "passed", report.findings
    assert report.candidate.gradients == subject.twin
    assert f"gradients came from {subject.twin}" in headline(report)


class Deceit(nn.Module):
    """The plain network where images are dark, as digits are; without its roundings the robust one everywhere.

    What the quantiser makes of the difference of the two is 0: it has one level for all that it meets.
    """

    def __init__(self, plain: nn.Module, robust: nn.Module) -> None:
        super().__init__()
        self.plain, self.robust = plain, robust

    def forward(self, x: Tensor) -> Tensor:
        dark = torch.sigmoid(200 * (0.42 - x.mean((1, 2, 3))))[:, None]
        robust = self.robust(x)
        difference = dark * (self.plain(x) - robust)
        rounded = torch.fake_quantize_per_tensor_affine(difference, 1e4, 0, -128, 127)
        lie: Tensor = robust + difference - rounded
        return lie


def test_a_quantised_file_with_a_robust_twin_does_not_pass(networks: Networks, tmp_path: Path) -> None:
    """On the noise that a twin is proven on the two are one network; on the images that are judged they are not."""
    plain, robust = (load_run(networks(name)).model.eval() for name in ("standard", "hardened"))
    path = to_onnx(tmp_path / "model.onnx", Deceit(plain, robust), torch.zeros(2, 3, 16, 16))
    subject = onnx_subject(path)
    assert subject.model is not None, subject.no_gradients
    data = load_dataset("digits")
    examination = Examination(
        subject.model,
        subject.decide,
        data.x_test[:32],
        data.y_test[:32],
        threat_of("linf", "8/255"),
        grid=False,
        seed=0,
        background=Background(rounds=True),
    )
    with frozen(subject.model):
        found = unaccounted(examination), artefact_disagrees(examination)
    assert [one.outcome for one in found] == ["raised", "raised"], [one.why for one in found]
