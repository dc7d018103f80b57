"""However a classifier's file ends, its logits (N, K) are found, and they lead back to the image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.gating.subject import Subject
from dfmcl.gating.subjects.candidate import candidate_subject
from dfmcl.gating.subjects.onnx_file import onnx_subject
from dfmcl.release.export import wrap
from dfmcl.robustness.onnx_graph import noise, read_graph
from dfmcl.robustness.onnx_labels import apart
from tests.gating.test_subject import Tiny, assert_is, assert_same, gradient, graph_of, means, to_onnx

LOUD = 1000.0  # logits so far apart that their softmax is 0 and 1, and has no slope


class Ended(nn.Module):
    """A network with something behind its logits."""

    def __init__(self, end: Callable[[Tensor], object], classes: int = 5, loud: float = 1.0) -> None:
        super().__init__()
        self.net, self.end, self.loud = Tiny(classes=classes), end, loud
        self.eval()

    def forward(self, x: Tensor) -> object:
        return self.end(self.net(x) * self.loud)

    def logits(self, x: Tensor) -> Tensor:
        """What the file should be judged by."""
        found: Tensor = self.net(x) * self.loud
        return found


def subject_of(path: Path, net: nn.Module, *, batch: int = 2, free: bool = True, **options: object) -> Subject:
    to_onnx(path, net, torch.zeros(batch, 3, 8, 8), free=free)
    return onnx_subject(path, **options)  # type: ignore[arg-type]  # of the test's own parameters


ENDS: dict[str, Callable[[Tensor], object]] = {
    "softmax": lambda z: z.softmax(1),
    "softmax of the last axis": lambda z: z.softmax(-1),
    "log-softmax": lambda z: z.log_softmax(1),
    "log of softmax": lambda z: z.softmax(1).log(),
    "softmax of maps": lambda z: z[:, :, None, None].softmax(1).flatten(1),
    "maps of one pixel": lambda z: z[:, :, None, None],
    "softmax in maps of one pixel": lambda z: z[:, :, None, None].softmax(1),
    "channels last": lambda z: z[:, None, None, :],
    "a sigmoid a class": torch.sigmoid,
}


@pytest.mark.parametrize("end", ENDS)
def test_what_stands_behind_the_logits_is_left_out(tmp_path: Path, end: str) -> None:
    """Answers and gradients are those of the logits, be they so large that the file's own output has no slope."""
    for loud in (1.0, LOUD):
        net = Ended(ENDS[end], loud=loud)
        path = tmp_path / f"{loud}.onnx"
        subject = subject_of(path, net)
        assert subject.classes == 5
        x = noise(subject.contract, 3, seed=1)
        assert_same(subject.decide(x), net.logits(x).detach())
        assert subject.model is not None, subject.no_gradients
        assert_same(gradient(subject.model, x), gradient(net.logits, x), 1e-3)
        assert subject.digest == read_graph(path).digest


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("end", ["softmax", "softmax in maps of one pixel", "channels last"])
def test_a_fixed_batch_changes_nothing(tmp_path: Path, end: str, batch: int) -> None:
    """A file for one batch size is freed from it, whatever its end."""
    net = Ended(ENDS[end])
    subject = subject_of(tmp_path / "model.onnx", net, batch=batch, free=False)
    assert_is(subject, nn.Sequential(net.net), images=5)


@pytest.mark.parametrize("opset", [11, 13])
def test_a_softmax_of_old_is_read_as_it_was_meant(tmp_path: Path, opset: int) -> None:
    """Before opset 13 it is over all axes from its own on: of (N, K, 1, 1) from axis 1 that is K numbers."""
    for opset_axis, squashed in ((1, True), (2, False)):
        nodes = [
            helper.make_node("GlobalAveragePool", ["x"], ["m"]),
            helper.make_node("Softmax", ["m"], ["s"], axis=opset_axis),
            helper.make_node("Flatten", ["s"], ["y"], axis=1),
        ]
        model = graph_of(*nodes)
        model.opset_import[0].version, model.ir_version = opset, 6
        path = tmp_path / f"{opset_axis}.onnx"
        onnx.save(model, path)
        graph = read_graph(path, "float32 NCHW")
        assert graph.head.squash == ("Softmax" if squashed else "")
        found = onnx_subject(path, "float32 NCHW").decide(x := noise(graph.contract, 3))
        assert_same(found, x.mean((2, 3)) if squashed else torch.ones(3, 3))


@pytest.mark.parametrize(
    "end",
    [
        lambda z: 3 * z.softmax(1) - 1,
        lambda z: z[:, :2].softmax(0),
        lambda z: torch.sigmoid(z[:, :4].reshape(-1, 2))[:, :1],
    ],
    ids=["computed on", "over the batch", "of another shape"],
)
def test_a_softmax_that_is_not_the_end_stays(tmp_path: Path, end: Callable[[Tensor], Tensor]) -> None:
    """One that something was computed from, or that compares images, is a part of the network."""
    net = Ended(end)
    to_onnx(tmp_path / "model.onnx", net, torch.zeros(2, 3, 8, 8))
    try:
        graph = read_graph(tmp_path / "model.onnx")
    except BadInput as error:
        assert "one number an image" in str(error)  # noqa: PT017  # one of the three
    else:
        assert (graph.head.squash, graph.as_it_came) == ("", True)


@pytest.mark.parametrize(
    "end",
    [torch.sigmoid, lambda z: torch.sigmoid(z)[:, 0], lambda z: torch.sigmoid(z[:, :, None, None])],
    ids=["a column", "a number", "a map"],
)
def test_one_sigmoid_is_two_classes(tmp_path: Path, end: Callable[[Tensor], Tensor]) -> None:
    """Their softmax is (1 - p, p), with a slope where p is 0 or 1 in float32."""
    for loud in (1.0, LOUD):
        net = Ended(end, classes=1, loud=loud)
        subject = subject_of(tmp_path / f"{loud}.onnx", net, labels=("no", "yes"))
        assert subject.classes == ("no", "yes")
        x = noise(subject.contract, 4, seed=1)
        p = torch.sigmoid(net.logits(x))[:, 0].detach()
        assert_same(subject.decide(x).softmax(1), torch.stack([1 - p, p], dim=1))
        assert subject.model is not None
        raised = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(subject.model(raised)[:, 1].sum(), raised)
        assert (slope.flatten(1).norm(dim=1) > 0).all()


def test_labels_of_a_file_are_compared_with_those_of_its_logits() -> None:
    """Another highest class, or several highest ones, is another label; where logits are no numbers there is none."""
    logits = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [torch.nan, 1.0]])
    scores = torch.tensor([[0.2, 0.8], [0.2, 0.8], [1.0, 1.0], [torch.nan, torch.nan]])
    assert apart(scores, logits).tolist() == [False, True, True, False]
    assert apart(torch.tensor([[1.0], [0.0], [0.5], [0.5]]), logits).tolist() == [False, False, True, False]
    assert apart(torch.full((1, 2), torch.nan), logits[:1]).tolist() == [True]


@pytest.mark.parametrize("end", [*ENDS, "one sigmoid"])
def test_an_honest_end_gives_the_labels_of_its_logits(tmp_path: Path, end: str) -> None:
    """Whatever stands behind the logits, the file's own labels are theirs."""
    net = Ended(ENDS.get(end, torch.sigmoid), classes=1 if end == "one sigmoid" else 5)
    subject = subject_of(tmp_path / "model.onnx", net)
    assert (subject.own_labels is None) == (end in ("maps of one pixel", "channels last"))
    if subject.own_labels is not None:
        subject.own_labels.require(noise(subject.contract, 40, seed=1), "of noise")


def test_one_number_without_a_sigmoid_says_what_to_export(tmp_path: Path) -> None:
    """Whether it is a probability, a logit or a price nobody knows."""
    with pytest.raises(BadInput, match="gives one number an image in 'scores', and no sigmoid made it; export it with"):
        subject_of(tmp_path / "model.onnx", Ended(lambda z: z, classes=1))


class Two(nn.Module):
    """Features (N, 8) beside logits (N, 5) and the label (N,)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Tiny()
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.net.body((x - 0.4) / 0.3).flatten(1)
        logits = self.net.head(features)
        return features, logits.argmax(1), logits.softmax(1)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    path = tmp_path / "two.onnx"
    names = ["features", "label", "probabilities"]
    axes = {name: {0: "n"} for name in ("entry", *names)}
    torch.onnx.export(
        Two(), (torch.zeros(2, 3, 8, 8),), path, dynamo=False, input_names=["entry"], output_names=names,
        dynamic_axes=axes,
    )  # fmt: skip
    return path


def test_of_several_outputs_the_scores_are_judged(two: Path, tmp_path: Path) -> None:
    """The one of K columns, or the one that is named, be it inside; where two could be, one line lists all."""
    with pytest.raises(BadInput, match=r"has 3 outputs \(features float32 \(2, 8\), label int64 .2,., .*--output NAME"):
        onnx_subject(two)
    with pytest.raises(BadInput, match="has no tensor 'logits'; its outputs are features, label, probabilities"):
        onnx_subject(two, output="logits")
    subject = onnx_subject(two, labels=tuple("abcde"))
    assert subject.output == "probabilities"
    assert_is(subject, Tiny())
    assert_is(onnx_subject(two, output="probabilities"), Tiny())
    assert onnx_subject(two, output="features").classes == 8
    images = np.zeros((3, 8, 8, 3), np.uint8)
    assert subject.afresh is not None
    assert_same(torch.from_numpy(subject.afresh(images)), subject.decide(torch.zeros(3, 3, 8, 8)))
    wrap(two, tmp_path / "candidate", contract="float32 NCHW", labels=tuple("abcde"))
    assert_is(candidate_subject(tmp_path / "candidate"), Tiny())


def test_labels_beside_maps_of_probabilities(tmp_path: Path) -> None:
    """As skl2onnx writes a classifier: the label, and a map from label to probability for each image."""
    model = graph_of(
        *means("x", "m"),
        helper.make_node("Softmax", ["m"], ["p"], axis=1),
        helper.make_node("ArgMax", ["m"], ["y"], axis=1, keepdims=0),
        helper.make_node("ZipMap", ["p"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]),
        axes=np.array([2, 3]),
    )
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(1, []))
    )
    model.graph.output.append(helper.make_value_info("z", maps))
    onnx.save(model, tmp_path / "model.onnx")
    subject = onnx_subject(tmp_path / "model.onnx")
    x = noise(subject.contract, 3)
    assert_same(subject.decide(x), x.mean((2, 3)))
    assert subject.model is not None, subject.no_gradients
    assert_same(subject.model(x), x.mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floats_have_logits_too(tmp_path: Path, dtype: torch.dtype) -> None:
    """Half and double precision, from input to softmax, in the words of the file itself; answers are float32."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    net = nn.Sequential(layers, nn.Softmax(1)).to(dtype).eval()
    path = to_onnx(tmp_path / "model.onnx", net, torch.zeros(2, 3, 8, 8, dtype=dtype))
    subject = onnx_subject(path)
    assert str(subject.contract) == f"{str(dtype).removeprefix('torch.')} NCHW 8x8x3"
    x = noise(subject.contract, 3)
    expected = layers.float()(x).detach()
    tolerance = 5e-3 if dtype == torch.float16 else 1e-6
    assert_same(subject.decide(x), expected, tolerance)
    assert subject.model is not None, subject.no_gradients
    assert_same(gradient(subject.model, x), gradient(layers, x), 2e-2 if dtype == torch.float16 else 1e-5)


def test_a_candidate_is_judged_as_it_is_served(tmp_path: Path) -> None:
    """An export leaves the softmax out; the gate of a candidate takes nothing away that Triton would answer with."""
    net = Ended(ENDS["softmax"])
    path = to_onnx(tmp_path / "model.onnx", net, torch.zeros(2, 3, 8, 8))
    manifest = wrap(path, tmp_path / "candidate", contract="float32 NCHW", labels=tuple("abcde"))
    assert_is(candidate_subject(tmp_path / "candidate"), nn.Sequential(net.net))
    assert manifest["origin"]["sha256"] == read_graph(path).digest  # type: ignore[index]  # JSON of our own
    served = read_graph(path, whole=True)
    assert (served.head.squash, served.model.graph.node[-1].op_type) == ("", "Softmax")


def test_a_perceptron_as_skl2onnx_writes_it(tmp_path: Path) -> None:
    """Rows of numbers in; the label and a map of probabilities out: judged by the logits, climbed in pixels, served."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    held = [(f"{name}{layer}", value) for layer in (0, 2) for name, value in net[layer].named_parameters()]
    nodes = [
        helper.make_node("Cast", ["X"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Gemm", ["x", "weight0", "bias0"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "weight2", "bias2"], ["z"], transB=1),
        helper.make_node("Softmax", ["z"], ["p"], axis=1),
        helper.make_node("ArgMax", ["p"], ["label"], axis=1, keepdims=0),
        helper.make_node("ZipMap", ["p"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]),
    ]
    maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(1, []))
    )
    graph = helper.make_graph(
        nodes,
        "sklearn",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["n", 48])],
        [helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]), helper.make_value_info("maps", maps)],
        [numpy_helper.from_array(value.detach().numpy(), name) for name, value in held],
    )
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    path, words = tmp_path / "model.onnx", "flat-HWC 4x4x3 imagenet"
    onnx.save(helper.make_model(graph, opset_imports=versions, ir_version=8), path)
    subject = onnx_subject(path, words)

    def expected(images: Tensor) -> Tensor:
        logits: Tensor = net(subject.contract.scale.applied(images).permute(0, 2, 3, 1).flatten(1))
        return logits

    x = noise(subject.contract, 4, seed=1)
    assert (subject.output, subject.classes) == ("p", 3)
    assert_same(subject.decide(x), expected(x).detach())
    assert subject.model is not None, subject.no_gradients
    assert_same(gradient(subject.model, x), gradient(expected, x), 1e-4)
    wrap(path, tmp_path / "candidate", contract=words, labels=tuple("abc"))
    assert_same(candidate_subject(tmp_path / "candidate").decide(x), expected(x).detach())


def test_a_classifier_of_sklearn_by_skl2onnx(tmp_path: Path) -> None:
    """The real converter, with its maps and without."""
    skl2onnx = pytest.importorskip("skl2onnx", reason="skl2onnx is not installed: pip install skl2onnx")
    from sklearn.neural_network import MLPClassifier

    types = pytest.importorskip("skl2onnx.common.data_types")
    rows, labels = np.random.default_rng(0).random((60, 48), np.float32), np.arange(60) % 3
    model = MLPClassifier((8,), max_iter=20).fit(rows, labels)
    for maps in (True, False):
        made = skl2onnx.convert_sklearn(
            model, initial_types=[("X", types.FloatTensorType([None, 48]))], options={"zipmap": maps}
        )
        (tmp_path / f"{maps}.onnx").write_bytes(made.SerializeToString())
        subject = onnx_subject(tmp_path / f"{maps}.onnx", "flat-HWC 4x4x3")
        x = torch.from_numpy(rows).reshape(-1, 4, 4, 3).permute(0, 3, 1, 2)
        assert_same(subject.decide(x).softmax(1), torch.from_numpy(model.predict_proba(rows)).float(), 1e-4)
        assert subject.model is not None, subject.no_gradients


@pytest.mark.parametrize("opset", range(9, 24))
def test_every_opset_is_read(tmp_path: Path, opset: int) -> None:
    """A convolutional classifier in the words of each: logits behind its softmax, with their gradients."""
    torch.manual_seed(0)
    conv, last = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
    held: dict[str, Any] = {"k": conv.weight, "b": conv.bias, "w": last.weight, "c": last.bias}
    norm = {"s": torch.rand(4) + 0.5, "o": torch.rand(4), "m": torch.rand(4), "v": torch.rand(4) + 0.5}
    nodes = [
        helper.make_node("Conv", ["x", "k", "b"], ["f"]),
        helper.make_node("BatchNormalization", ["f", "s", "o", "m", "v"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["h"], axis=1),
        helper.make_node("Gemm", ["h", "w", "c"], ["z"], transB=1),
        helper.make_node("Softmax", ["z"], ["y"], axis=1),
    ]
    model = graph_of(*nodes, **{name: value.detach().numpy() for name, value in {**held, **norm}.items()})
    model.opset_import[0].version = opset
    onnx.save(model, tmp_path / "model.onnx")
    subject = onnx_subject(tmp_path / "model.onnx")

    def expected(x: Tensor) -> Tensor:
        f = nn.functional.batch_norm(conv(x), norm["m"], norm["v"], norm["s"], norm["o"])
        logits: Tensor = last(f.relu().mean((2, 3)))
        return logits

    x = noise(subject.contract, 3, seed=1)
    assert_same(subject.decide(x), expected(x).detach())
    assert subject.model is not None, subject.no_gradients
    assert_same(gradient(subject.model, x), gradient(expected, x), 1e-4)
