"""Whatever it is: its answers are those of what was named, and its gradients those of the network behind it."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torchvision
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.gating.conversion import NoGradients, differentiable
from dfmcl.gating.endpoint import Asked, QueriesSpent
from dfmcl.gating.foreign import state_digest
from dfmcl.gating.subject import Subject
from dfmcl.gating.subjects.candidate import candidate_subject
from dfmcl.gating.subjects.endpoint import endpoint_subject
from dfmcl.gating.subjects.module import module_subject
from dfmcl.gating.subjects.onnx_file import onnx_subject, reopened
from dfmcl.gating.subjects.registry import open_subject
from dfmcl.release.export import export
from dfmcl.robustness.contract import InputContract
from dfmcl.robustness.gradients import attack_pass
from dfmcl.robustness.models import frozen
from dfmcl.robustness.onnx_graph import noise, read_graph
from dfmcl.robustness.provider import Provider
from dfmcl.robustness.runs import load_run
from tests.serving.workshop import write_run

SAME = 1e-4  # of the largest value: float32 sums in another order, measured at 1e-6


class Tiny(nn.Module):
    """A smooth classifier of images (N, channels, ., .) in [0, 1]: no kink may make two gradients differ."""

    def __init__(self, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.get_buffer("body.1.running_mean").uniform_(-0.2, 0.2)
        self.get_buffer("body.1.running_var").uniform_(0.5, 2)
        self.head = nn.Linear(8, classes)
        nn.init.normal_(self.head.weight)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body((x - 0.4) / 0.3).flatten(1))
        return logits


class Wired(nn.Module):
    """A network behind the wire format of a contract, as its owner would have exported it."""

    def __init__(self, net: nn.Module, contract: InputContract, through: torch.dtype | None = None) -> None:
        super().__init__()
        self.net, self.contract, self.through = net, contract, through
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        x = images if self.through is None else images.to(self.through)
        height, width, channels = self.contract.shape
        first = self.contract.channels_first
        x = x.reshape(-1, *((channels, height, width) if first else self.contract.shape)) if self.contract.flat else x
        x = x if first else x.permute(0, 3, 1, 2)
        logits: Tensor = self.net(x.to(torch.float32) / 255 if self.contract.dtype == "uint8" else x)
        return logits


def to_onnx(
    path: Path,
    net: nn.Module,
    example: Tensor,
    *,
    dynamo: bool = False,
    free: bool = True,
) -> Path:
    """What torch's exporter, the old or the new one, makes of a module; batches of any size, or of the example's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of the exporters
        if dynamo:
            shapes = ({0: torch.export.Dim("batch")},) if free else None
            torch.onnx.export(net, (example,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        else:
            axes = {"entry": {0: "n"}, "scores": {0: "n"}} if free else None
            names: dict[str, Any] = {"input_names": ["entry"], "output_names": ["scores"]}
            torch.onnx.export(net, (example,), path, dynamo=False, dynamic_axes=axes, **names)
    return path


def zeros(contract: InputContract, images: int = 2) -> Tensor:
    return torch.zeros(images, *contract.dims, dtype=getattr(torch, contract.dtype))


def gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 3, reduction="sum")
    return torch.autograd.grad(loss, x)[0]


def assert_same(found: Tensor, expected: Tensor, tolerance: float = SAME) -> None:
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


def assert_is(subject: Subject, net: nn.Module, images: int = 3, *, tolerance: float = SAME) -> None:
    """Answers and gradients of a subject are those of a network, for batches of several sizes."""
    x = noise(subject.contract, images, seed=1)
    with torch.no_grad():
        expected = net(x)
    for size in (1, images):
        assert_same(subject.decide(x[:size]), expected[:size])
    assert subject.model is not None, subject.no_gradients
    with frozen(subject.model) as model:
        assert_same(gradient(model, x), gradient(net, x), tolerance)


CONTRACTS = ["uint8 NHWC 12x10x3", "uint8 NCHW 9x9x1", "float32 NCHW 10x14x4", "float32 NHWC 8x8x3"]
SCALED = [
    "uint8 NHWC 8x8x3 BGR",
    "float32 NCHW 8x8x3 imagenet",
    "float32 NHWC 6x8x3 caffe",
    "float32 NCHW 8x8x1 0..255",
]


class Behind(nn.Module):
    """A network as pixels in [0, 1] reach it behind a contract."""

    def __init__(self, net: nn.Module, contract: InputContract) -> None:
        super().__init__()
        self.net, self.scale = net, contract.scale

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(self.scale.applied(x))
        return logits


@pytest.mark.parametrize("dynamo", [False, True], ids=["old", "dynamo"])
@pytest.mark.parametrize("text", CONTRACTS + SCALED)
def test_onnx_answers_and_gradients_are_the_networks(tmp_path: Path, text: str, dynamo: bool) -> None:
    """Of any layout, type, size, number of channels and scale, from either of torch's exporters; in pixels' units."""
    contract = InputContract.parse(text)
    net = Tiny(contract.channels)
    path = to_onnx(tmp_path / "model.onnx", Wired(net, contract), zeros(contract), dynamo=dynamo)
    subject = onnx_subject(path, " ".join(word for word in text.split() if word[0] not in "1689"))  # the size is there
    assert subject.contract == contract
    assert (subject.kind, subject.classes, subject.no_gradients, subject.files) == ("onnx", 5, "", {})
    assert_is(subject, Behind(net, contract))


def test_the_provider_that_was_handed_in_computes(tmp_path: Path) -> None:
    """Every session is its own, also that of answers afresh; ONNX Runtime's silent ways back to the CPU are refused.

    Azure's provider comes first in its sessions, and leaves every standard operator to the CPU.
    """
    contract = InputContract.parse("uint8 NHWC 8x8x3")
    path = to_onnx(tmp_path / "model.onnx", Wired(Tiny(), contract), zeros(contract))
    images = (noise(contract, 3) * 255).byte().permute(0, 2, 3, 1).numpy()
    said = {"NoExecutionProvider": r"NoExecutionProvider: .* fell back .*CPUExecutionProvider"}
    for name in {"AzureExecutionProvider"} & set(ort.get_available_providers()):
        said[name] = rf"{name}: .* leaves .*Conv.* to another provider"
    for name, words in said.items():
        with pytest.raises(BadInput, match=words):
            open_subject(str(path), contract=str(contract), provider=Provider(name))
        with pytest.raises(BadInput, match=words):
            reopened(path, str(contract), Provider(name), images)


@pytest.mark.parametrize("dynamo", [False, True], ids=["old", "dynamo"])
@pytest.mark.parametrize("batch", [1, 2])
def test_fixed_batch_size_is_no_matter(tmp_path: Path, batch: int, dynamo: bool) -> None:
    """A file that takes one batch size only answers any number of images, with gradients."""
    contract = InputContract.parse("float32 NCHW 8x8x3")
    net = Tiny()
    path = to_onnx(tmp_path / "model.onnx", net, zeros(contract, batch), dynamo=dynamo, free=False)
    assert read_graph(path, "float32 NCHW").batch == batch
    subject = onnx_subject(path, "float32 NCHW")
    assert subject.model is not None
    assert subject.model.batch is None  # one pass for the whole batch
    assert_is(subject, net, images=5)


class Expanded(nn.Module):
    """A network whose batch size of 2 is part of its file: the exporter folds a constant that was expanded to it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Tiny()
        self.token = nn.Parameter(torch.linspace(-1, 1, 5))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.net(x), self.token.expand(2, 5)]).sum(dim=0)


def test_batch_size_that_is_built_in_is_asked_in_parts(tmp_path: Path) -> None:
    """Where no rewriting frees a file from its batch size, answers and gradients come in parts, filled up."""
    contract = InputContract.parse("float32 NCHW 8x8x3")
    expanded = Expanded()
    path = to_onnx(tmp_path / "model.onnx", expanded, zeros(contract), free=False)
    subject = onnx_subject(path, "float32 NCHW")
    assert subject.model is not None
    assert subject.model.batch == 2
    assert_is(subject, nn.Sequential(expanded.net, Shift(expanded.token)), images=5)


class Shift(nn.Module):
    def __init__(self, by: Tensor) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def test_gradient_passes_a_detour_over_whole_numbers(tmp_path: Path) -> None:
    """A uint8 input that becomes int32 before it becomes float loses nothing: those are the same numbers."""
    contract = InputContract.parse("uint8 NHWC 8x8x3")
    net = Tiny()
    path = to_onnx(tmp_path / "model.onnx", Wired(net, contract, torch.int32), zeros(contract))
    assert sum(node.op_type == "Cast" for node in onnx.load(path).graph.node) == 2
    assert_is(onnx_subject(path, "uint8 NHWC"), net)


def test_file_that_computes_in_float16_has_gradients(tmp_path: Path) -> None:
    """Half-precision weights, input and arithmetic: answers in float32, gradients within float16's rounding."""
    contract = InputContract.parse("float32 NCHW 8x8x3")
    path = to_onnx(tmp_path / "model.onnx", Tiny().half(), zeros(contract).half())
    subject = onnx_subject(path, "float32 NCHW")
    x = noise(contract, 3)
    assert_same(subject.decide(x), Tiny()(x).detach(), 5e-3)
    assert subject.model is not None
    assert_same(gradient(subject.model, x), gradient(Tiny(), x), 2e-2)
    assert_same(subject.model(x), subject.decide(x))  # rounded at the same places


class Wide(nn.Module):
    """Linear layers in float64: ONNX Runtime has those, and no convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Sigmoid(), nn.Linear(16, 5))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


def test_float64_is_declared_as_the_message_says(tmp_path: Path) -> None:
    """The answer to a wrong declaration can be followed; answers and gradients are the network's, in float32."""
    contract = InputContract.parse("float64 NCHW 8x8x3")
    path = to_onnx(tmp_path / "model.onnx", Wide().double(), zeros(contract))
    with pytest.raises(BadInput, match=r"--input '.*'") as caught:
        onnx_subject(path, "float32 NCHW")
    advised = str(caught.value).partition("--input '")[2].rstrip("'")
    subject = onnx_subject(path, advised)
    assert subject.contract == contract
    assert_is(subject, Wide())


def test_float64_that_nobody_computes_says_what_to_export(tmp_path: Path) -> None:
    """ONNX Runtime has no convolution of doubles: the line names it, and the way out."""
    path = to_onnx(tmp_path / "model.onnx", Tiny().double(), zeros(InputContract.parse("float64 NCHW 8x8x3")))
    with pytest.raises(BadInput, match=r"Conv.*; export it in float32 \(`model\.float\(\)`\)"):
        onnx_subject(path, "float64 NCHW")


@pytest.mark.parametrize(("name", "dynamo"), [("resnet18", True), ("mobilenet_v2", False), ("densenet121", False)])
def test_torchvision_file_has_the_networks_gradients(tmp_path: Path, name: str, dynamo: bool) -> None:
    """Real architectures as they come from torch, weights beside the file where the exporter puts them there."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None, num_classes=7).eval()
    for module in net.modules():  # smooth, as above
        for key, part in module.named_children():
            if isinstance(part, nn.ReLU | nn.ReLU6):
                setattr(module, key, nn.SiLU())
    path = to_onnx(tmp_path / "model.onnx", net, torch.zeros(2, 3, 64, 64), dynamo=dynamo)
    assert (tmp_path / "model.onnx.data").exists() == dynamo
    assert_is(onnx_subject(path, "float32 NCHW"), net, images=2, tolerance=1e-2)  # max-pooling has kinks, see below


def test_digest_of_a_file_is_its_own_and_covers_weights_beside_it(tmp_path: Path) -> None:
    """SHA-256 of the bytes; where weights lie in another file, one changed weight there changes it."""
    alone = to_onnx(tmp_path / "alone.onnx", Tiny(), torch.zeros(2, 3, 8, 8))
    assert onnx_subject(alone, "float32 NCHW").digest == hashlib.sha256(alone.read_bytes()).hexdigest()
    beside = tmp_path / "beside.onnx"
    onnx.save(onnx.load(alone), beside, save_as_external_data=True, location="weights", size_threshold=0)
    before = onnx_subject(beside, "float32 NCHW")
    weights = bytearray((tmp_path / "weights").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "weights").write_bytes(weights)
    assert (
        onnx_subject(beside, "float32 NCHW").digest != before.digest != hashlib.sha256(beside.read_bytes()).hexdigest()
    )


def test_a_value_in_another_file_is_bad_input(tmp_path: Path) -> None:
    """A node's own tensor is looked for where the reader stands, not beside the file: two readers, two models."""
    outside = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="labels.txt")
    model = graph_of(
        helper.make_node("Constant", [], ["c"], value=outside),
        *means("x", "m"),
        helper.make_node("Add", ["m", "c"], ["y"]),
        axes=np.array([2, 3]),
    )
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "labels.txt").write_bytes(bytes(12))
    with pytest.raises(BadInput, match="a node's value lies in another file"):
        read_graph(tmp_path / "model.onnx", "float32 NCHW")


def graph_of(*nodes: onnx.NodeProto, dtype: int = TensorProto.FLOAT, **constants: np.ndarray) -> onnx.ModelProto:
    """A graph from "x" (N, 3, 4, 4) to "y" by hand."""
    graph = helper.make_graph(
        list(nodes),
        "hand",
        [helper.make_tensor_value_info("x", dtype, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def means(entry: str, name: str = "y") -> list[onnx.NodeProto]:
    """One score a channel, its mean."""
    return [helper.make_node("ReduceMean", [entry, "axes"], [name], keepdims=0)]


AXES = np.array([2, 3])
COARSE = graph_of(  # two levels between black and white
    helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
    helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["r"]),
    *means("r"),
    axes=AXES,
    scale=np.array(0.9, np.float32),
    zero=np.array(0, np.uint8),
)
WRAPS = graph_of(  # 200 + 100 is 44 in bytes, and 300 in floats
    helper.make_node("Add", ["x", "hundred"], ["sum"]),
    helper.make_node("Cast", ["sum"], ["r"], to=TensorProto.FLOAT),
    *means("r"),
    dtype=TensorProto.UINT8,
    axes=AXES,
    hundred=np.array(100, np.uint8),
)
UNKNOWN = graph_of(
    helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=0),
    helper.make_node("BiasGelu", ["m", "bias"], ["y"], domain="com.microsoft"),
    axes=AXES,
    bias=np.zeros(3, np.float32),
)
UNKNOWN.opset_import.append(helper.make_opsetid("com.microsoft", 1))


@pytest.mark.parametrize(
    ("model", "contract", "reason"),
    [
        (COARSE, "float32 NCHW", "its roundings move its logits by .* so that gradients without them are another"),
        (WRAPS, "uint8 NCHW", r"its logits differ by .* of the largest"),
        (UNKNOWN, "float32 NCHW", "onnx2pytorch cannot convert it"),
    ],
    ids=["coarse", "wraps", "unknown"],
)
def test_file_that_cannot_be_differentiated_is_a_black_box(
    tmp_path: Path, model: onnx.ModelProto, contract: str, reason: str
) -> None:
    """Whole numbers on the way, an arithmetic that differs, a foreign operator: no model, why, and still an answer."""
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    subject = onnx_subject(path, contract)
    assert subject.model is None
    graph = read_graph(path, contract)
    with pytest.raises(NoGradients, match=reason):
        differentiable(graph, subject.decide)
    assert subject.no_gradients
    assert subject.decide(noise(subject.contract, 4)).shape == (4, 3)


def test_pixels_are_rounded_to_bytes_and_not_cut(tmp_path: Path) -> None:
    """What a uint8 model is sent is the nearest byte of a float, so that 254.9999 / 255 is 255."""
    onnx.save(graph_of(helper.make_node("Cast", ["x"], ["r"], to=1), *means("r"), dtype=2, axes=AXES), tmp_path / "m")
    subject = onnx_subject(tmp_path / "m", "uint8 NCHW")
    assert subject.decide(torch.full((1, 3, 4, 4), 254.9999 / 255)).tolist() == [[255, 255, 255]]


DOUBLE = graph_of(*means("x"), dtype=TensorProto.DOUBLE, axes=AXES)
DOUBLE.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
WHOLE_INPUT = graph_of(*means("x"), dtype=TensorProto.INT64, axes=AXES)
UNLOADABLE = graph_of(helper.make_node("Nonsense", ["x"], ["y"], domain="nobody.knows"))
UNLOADABLE.opset_import.append(helper.make_opsetid("nobody.knows", 1))
IDENTITY = helper.make_node("Identity", ["x"], ["y"])
TWO_INPUTS = graph_of(*means("x"), axes=AXES)
TWO_INPUTS.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["n"]))
TWO_OUTPUTS = graph_of(*means("x"), helper.make_node("Neg", ["y"], ["z"]), axes=AXES)
TWO_OUTPUTS.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
ARGMAX = graph_of(*means("x", "m"), helper.make_node("ArgMax", ["m"], ["y"], axis=1, keepdims=0), axes=AXES)
ARGMAX.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
NOISY = graph_of(
    *means("x", "m"),
    helper.make_node("RandomUniformLike", ["m"], ["u"], seed=7.0),
    helper.make_node("Add", ["m", "u"], ["y"]),
    axes=AXES,
)
TRAINED = graph_of(
    *means("x", "m"),
    helper.make_node("Dropout", ["m", "ratio", "mode"], ["y"]),
    axes=AXES,
    ratio=np.array(0.1, "f"),
    mode=np.array(True),
)
WHOLE = graph_of(*means("x", "m"), helper.make_node("Cast", ["m"], ["y"], to=TensorProto.INT64), axes=AXES)
WHOLE.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64


@pytest.mark.parametrize(
    ("model", "contract", "message"),
    [
        (TWO_INPUTS, "float32 NCHW", r"has 2 inputs \(x, mask\); export it with one image input"),
        (TWO_OUTPUTS, "float32 NCHW", r"has 2 outputs \(y float32 \(2, 3\), z float32 \(2, 3\)\); say which"),
        (ARGMAX, "float32 NCHW", r"2 images gave int64 \(2,\); a classifier gives one row"),
        (WHOLE, "float32 NCHW", r"2 images gave int64 \(2, 3\)"),
        (graph_of(IDENTITY), "float32 NCHW", r"2 images gave float32 \(2, 3, 4, 4\)"),
        (
            graph_of(*means("x"), axes=AXES),
            "uint8 NCHW",
            "is float32, not uint8; declare it as it is: --input 'float32 NCHW'",
        ),
        (DOUBLE, "float32 NCHW", "'x' is float64, not float32; declare it as it is: --input 'float64 NCHW'"),
        (WHOLE_INPUT, "uint8 NCHW", "its input 'x' is int64; images come as uint8, float32, float64, float16"),
        (graph_of(*means("x"), axes=AXES), "float32 NHWC 4x4x3", "the model says 3x4x4"),
        (graph_of(*means("x"), axes=AXES), "float32 CHWN", "'CHWN' is not known; expected DTYPE LAYOUT"),
        (graph_of(*means("x"), axes=AXES), "bfloat16 NCHW", "expected DTYPE LAYOUT .* one of uint8, float32, float64"),
        (NOISY, "float32 NCHW", r"draws random numbers \(RandomUniformLike\); export it without"),
        (TRAINED, "float32 NCHW", r"draws random numbers \(Dropout\); export it without"),
        (UNLOADABLE, "float32 NCHW", "cannot load it"),
        (onnx.ModelProto(), "float32 NCHW", "not readable as ONNX"),
    ],
)
def test_file_that_is_no_such_classifier_is_bad_input(
    tmp_path: Path, model: onnx.ModelProto, contract: str, message: str
) -> None:
    """Each reason is named in one line, with the file."""
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BadInput, match=message) as caught:
        onnx_subject(tmp_path / "model.onnx", contract)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_bad_input(tmp_path: Path) -> None:
    """Neither bytes that are no ONNX nor a file that is not there are taken."""
    (tmp_path / "text.onnx").write_text("dear reader")
    with pytest.raises(BadInput, match=r"text\.onnx: not readable as ONNX"):
        onnx_subject(tmp_path / "text.onnx", "float32 NCHW 4x4x3")
    with pytest.raises(BadInput, match=r"none\.onnx: cannot be read: No such file"):
        onnx_subject(tmp_path / "none.onnx", "float32 NCHW 4x4x3")


def test_labels_are_as_many_as_the_logits(tmp_path: Path) -> None:
    """They are kept where they fit and refused where they do not."""
    path = to_onnx(tmp_path / "model.onnx", Tiny(classes=3), torch.zeros(2, 3, 8, 8))
    assert onnx_subject(path, "float32 NCHW", ("a", "b", "c")).classes == ("a", "b", "c")
    with pytest.raises(BadInput, match="answers with 3 logits, there are 2 labels"):
        onnx_subject(path, "float32 NCHW", ("a", "b"))


@pytest.mark.parametrize("text", [*CONTRACTS, "float32  NCHW  1x2x3 "])
def test_contract_survives_its_round_trips(text: str) -> None:
    """Text and JSON say the same."""
    contract = InputContract.parse(text)
    assert InputContract.parse(str(contract)) == contract == InputContract.from_json(contract.to_json())


def test_contract_takes_the_size_that_a_file_leaves_open() -> None:
    """File and text complete each other; what neither says is asked for."""
    assert InputContract.parse("float32 NCHW 8x9x3", [None, 3, None, None]).dims == (3, 8, 9)
    with pytest.raises(BadInput, match="the size is open; add it"):
        InputContract.parse("float32 NCHW", [None, 3, None, None])
    with pytest.raises(BadInput, match="takes 2 dimensions, images have 4"):
        InputContract.parse("float32 NCHW 8x8x3", [None, 784])


@dataclass(frozen=True)
class Shipped:
    run: Path
    plain: Path
    half: Path


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    """A run and its candidates, weights as float32 and as float16."""
    folder = tmp_path_factory.mktemp("shipped")
    shipped = Shipped(write_run(folder / "run"), folder / "plain", folder / "half")
    export(shipped.run, shipped.plain)
    export(shipped.run, shipped.half, weights="float16")
    return shipped


@pytest.mark.parametrize("which", ["plain", "half"])
def test_candidate_without_its_run_has_the_runs_gradients(shipped: Shipped, which: str) -> None:
    """They come from model.onnx alone, float16 weights included, from the floats behind the uint8 input."""
    candidate = getattr(shipped, which)
    alone, known = candidate_subject(candidate), candidate_subject(candidate, shipped.run)
    x = noise(alone.contract, 4)
    assert alone.model is not None
    assert known.model is not None
    torch.testing.assert_close(alone.decide(x), known.decide(x), rtol=0, atol=0)
    # ReLUs have kinks; float16 weights are other weights. A wrong gradient is off by its own size.
    assert_same(gradient(alone.model, x), gradient(known.model, x), 5e-2 if which == "half" else 1e-2)


@pytest.mark.parametrize("which", ["plain", "half"])
def test_candidate_without_its_run_is_climbed_in_bfloat16(shipped: Shipped, which: str) -> None:
    """Half the time of a gate, where the hardware has it; its logits keep float32's resolution."""
    alone = candidate_subject(getattr(shipped, which))
    assert alone.model is not None
    x = noise(alone.contract, 4)
    made = attack_pass(alone.model, x, precision="bfloat16")
    assert made.precision == "bfloat16"
    with torch.no_grad():
        logits = made(x)
    assert (logits != logits.bfloat16().float()).any()
    torch.testing.assert_close(logits, alone.decide(x), rtol=0.05, atol=0.05)


def test_candidate_says_what_it_is(shipped: Shipped) -> None:
    """Digest, files, labels, input and origin are the manifest's; the run adds the data that it was trained on."""
    trained = load_run(shipped.run)
    alone, known = candidate_subject(shipped.plain), candidate_subject(shipped.plain, shipped.run)
    digest = hashlib.sha256((shipped.plain / "model.onnx").read_bytes()).hexdigest()
    assert known.digest == known.files["model.onnx"] == digest
    assert (known.kind, known.contract, known.classes) == ("candidate", InputContract(16, 16, 3), trained.classes)
    assert alone.run == {"checkpoint_sha256": trained.checkpoint_sha256}
    assert known.run == {**alone.run, "data": trained.data["sha256"]}


def test_candidate_of_another_run_is_bad_input(shipped: Shipped, standard_run: Path) -> None:
    """Gradients of other weights than the ones that are served are refused."""
    with pytest.raises(BadInput, match="name the run that the candidate was exported from"):
        candidate_subject(shipped.plain, standard_run)


def test_a_run_whose_network_is_another_is_bad_input(shipped: Shipped, tmp_path: Path) -> None:
    """A manifest can be edited; attacks on another network than the judged one would prove nothing."""
    other = write_run(tmp_path / "other", seed=1)
    candidate = shutil.copytree(shipped.plain, tmp_path / "candidate")
    manifest = json.loads((candidate / "manifest.json").read_text())
    manifest["run"]["checkpoint_sha256"] = load_run(other).checkpoint_sha256
    (candidate / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="of the largest away from those of"):
        candidate_subject(candidate, other)


MADE = """
import sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.head = nn.Linear(12, 4)
        nn.init.constant_(self.head.bias, scale)
        nn.init.eye_(self.head.weight)
    def forward(self, x):
        return self.head(x.flatten(1))

def make(): return Net().double()
def other(): return Net(2.0)
def number(): return 7
def broken(): raise RuntimeError("no weights here")
def leaves(): sys.exit(0)
def pair():
    class Pair(Net):
        def forward(self, x): return super().forward(x), x
    return Pair()
class Holder:
    @staticmethod
    def make(): return Net()
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's, in the current directory."""
    (tmp_path / "dfmcl_made_by_a_user.py").write_text(MADE)
    monkeypatch.chdir(tmp_path)
    return "dfmcl_made_by_a_user"


def test_module_is_what_its_callable_returns(made: str) -> None:
    """Found in the current directory, in float32 and eval mode; its own answers count, its own gradients lead."""
    subject = module_subject(f"{made}:make", "float32 NCHW 2x2x3", ("a", "b", "c", "d"))
    x = noise(subject.contract, 3)
    assert_same(subject.decide(x), x.flatten(1)[:, :4] + 1)
    assert subject.model is not None
    assert not subject.model.training
    assert (subject.kind, subject.name, subject.classes) == ("module", f"{made}:make", ("a", "b", "c", "d"))
    assert gradient(subject.model, x).abs().sum() > 0
    assert module_subject(f"{made}:Holder.make", "float32 NCHW 2x2x3").digest == subject.digest


def test_module_under_a_uint8_contract_sees_bytes_only(made: str) -> None:
    """Its decision is on the grid: half a step up or down is rounded away."""
    grid, floats = (module_subject(f"{made}:make", f"{dtype} NCHW 2x2x3") for dtype in ("uint8", "float32"))
    x = noise(grid.contract, 2)
    moved = (x + 0.4 / 255).clamp(0, 1)
    assert torch.equal(grid.decide(x), grid.decide(moved))
    assert not torch.equal(floats.decide(x), floats.decide(moved))


def test_module_is_sent_its_scale(made: str) -> None:
    """Its first logits are the red channel as the network takes it; the gate's gradient is in units of pixels."""
    subject = module_subject(f"{made}:make", "float32 NCHW 2x2x3 caffe")
    x = noise(subject.contract, 3)
    blue = x[:, 2].flatten(1) * 255 - 103.939
    assert_same(subject.decide(x), blue + 1)
    assert subject.model is not None
    raised = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(subject.model(raised).sum(), raised)
    assert (slope[:, 2] == 255).all()
    assert not slope[:, :2].any()
    assert subject.afresh is not None
    assert_same(torch.from_numpy(subject.afresh((x * 255).round().byte().permute(0, 2, 3, 1).numpy())), blue + 1)


def holding(value: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("value", value)
    return module


def test_module_digest_is_of_weights_and_classes(made: str) -> None:
    """The same state in another place has the same digest; another weight, type, name or class has another."""
    first = module_subject(f"{made}:make", "float32 NCHW 2x2x3").digest
    assert module_subject(f"{made}:make", "float32 NCHW 2x2x3").digest == first
    assert module_subject(f"{made}:other", "float32 NCHW 2x2x3").digest != first
    layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    strided = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    strided[0].weight = nn.Parameter(layer.get_parameter("0.weight").detach().t().contiguous().t())
    strided[0].bias = layer[0].bias
    assert state_digest(strided) == state_digest(layer)
    assert state_digest(nn.Sequential(layer[0], nn.SiLU())) != state_digest(layer)
    zeros = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32)]
    assert len({state_digest(holding(value)) for value in zeros}) == 3  # the bytes are all the same


@pytest.mark.parametrize(
    ("name", "contract", "message"),
    [
        ("number", "float32 NCHW 2x2x3", "returned a int; it must return a torch.nn.Module"),
        ("broken", "float32 NCHW 2x2x3", "cannot be made: RuntimeError: no weights here"),
        ("leaves", "float32 NCHW 2x2x3", "cannot be made: SystemExit: 0"),
        ("absent", "float32 NCHW 2x2x3", "cannot be made: AttributeError"),
        ("make", "float32 NCHW 2x2x4", "cannot take float32 NCHW"),
        ("make", "float32 NCHW", "the size is open"),
        ("make", "float32 NCHW 2x2x3 vgg", "'vgg' is not known; .* SCALE of plain, imagenet"),
        ("pair", "float32 NCHW 2x2x3", "gives a tuple, expected a tensor of logits"),
    ],
)
def test_module_that_is_no_classifier_is_bad_input(made: str, name: str, contract: str, message: str) -> None:
    """A wrong return, an error inside, another size: one line that says which."""
    with pytest.raises(BadInput, match=message):
        module_subject(f"{made}:{name}", contract)


@dataclass(frozen=True)
class Description:
    model: str = "cats"
    version: str = "3"
    input_shape: tuple[int, int, int] = (8, 6, 3)
    labels: tuple[str, ...] = ("a", "b", "c", "d", "e")


def predict(images: np.ndarray) -> np.ndarray:
    """A server's answer: uint8 (N, H, W, C) to logits, by a real network."""
    assert images.dtype == np.uint8
    with torch.no_grad():
        logits: np.ndarray = Tiny()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).numpy()
    return logits


def test_endpoint_is_a_black_box_with_a_budget() -> None:
    """Its answers are the server's on the same bytes; it knows how many images it asked for, to the last one."""
    subject = endpoint_subject(Description(), predict, name="live", budget=7)
    assert isinstance(subject.decide, Asked)
    assert (subject.model, subject.kind, subject.classes) == (None, "endpoint", Description().labels)
    assert subject.no_gradients
    x = noise(subject.contract, 7)
    assert_same(subject.decide(x[:4]), Tiny()(x[:4]).detach())
    assert subject.decide.spent == 4
    with pytest.raises(QueriesSpent, match="4 of 7 queries are spent, 4 more were wanted") as caught:
        subject.decide(x[:4])
    assert caught.value.exit_code == 3
    assert subject.decide.spent == 4  # a question that was not asked costs nothing
    subject.decide(x[4:])
    assert subject.decide.spent == 7
    with pytest.raises(QueriesSpent):
        subject.decide(x[:1])


def test_question_that_fails_is_spent() -> None:
    """A server that broke down over a question was asked it."""

    def down(images: np.ndarray) -> np.ndarray:
        raise ConnectionError("nobody there")

    subject = endpoint_subject(Description(), down, name="live", budget=5)
    with pytest.raises(ConnectionError):
        subject.decide(noise(subject.contract, 2))
    assert isinstance(subject.decide, Asked)
    assert subject.decide.spent == 2


def test_endpoint_digest_is_of_what_it_says_of_itself() -> None:
    """Another version is another subject; a budget is none of its properties."""
    digests = [
        endpoint_subject(described, predict, name="live", budget=budget).digest
        for described, budget in ((Description(), 5), (Description(), 6), (Description(version="4"), 5))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_text_names_the_kind(tmp_path: Path, made: str, shipped: Shipped) -> None:
    """A directory is a candidate, a file is ONNX, a:b is a module and grpc:// is an endpoint."""
    path = to_onnx(tmp_path / "model.onnx", Tiny(), torch.zeros(2, 3, 8, 8))
    asked = []

    def connect(url: str, model: str) -> tuple[Description, Callable[[np.ndarray], np.ndarray]]:
        asked.append((url, model))
        return Description(), predict

    kinds = [
        open_subject(str(shipped.plain), run=shipped.run).kind,
        open_subject(str(path), contract="float32 NCHW", labels=tuple("abcde")).kind,
        open_subject(f"{made}:make", contract="float32 NCHW 2x2x3").kind,
        open_subject("grpc://127.0.0.1:8001/cats", connect=connect, budget=9).kind,
    ]
    assert kinds == ["candidate", "onnx", "module", "endpoint"]
    assert asked == [("127.0.0.1:8001", "cats")]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("nothing/here", {}, "names no model; expected one of: a candidate's directory, an ONNX file, a TorchScript"),
        ("{candidate}", {"contract": "uint8 NHWC"}, "is of kind candidate, which takes no contract; leave it out"),
        ("a:b", {"contract": "uint8 NHWC 2x2x3", "run": Path("x")}, "is of kind module, which takes no run"),
        ("a:b", {}, "what images does it take"),
        ("grpc://host:1/m", {}, "within a budget of queries; name one"),
        ("grpc://host:1/m", {"connect": lambda *_: (Description(), predict)}, "within a budget of queries; name one"),
        ("grpc://host:1/m", {"labels": ("a",), "budget": 1}, "is of kind endpoint, which takes no labels"),
    ],
)
def test_options_of_another_kind_are_refused(
    shipped: Shipped, text: str, options: dict[str, Any], message: str
) -> None:
    """An option that a kind cannot use is not silently ignored, and one that it needs is asked for."""
    with pytest.raises(BadInput, match=message):
        open_subject(text.format(candidate=shipped.plain), **options)
