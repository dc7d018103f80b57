"""The exported graph is the checkpoint, and nothing but it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn

from dfmcl.common.errors import BadInput, Broken, Refused
from dfmcl.common.files import sha256_of
from dfmcl.gating.signing.attestation import Trust
from dfmcl.gating.subjects.candidate import candidate_subject
from dfmcl.gating.subjects.registry import open_subject
from dfmcl.release import export as exporting
from dfmcl.release import graphs, promotion
from dfmcl.release.candidate import FILES, Manifest, read_manifest
from dfmcl.release.stores.directory import Directory
from dfmcl.robustness.contract import InputContract
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.models import to_bytes, to_float
from dfmcl.robustness.onnx_graph import noise
from dfmcl.robustness.onnx_random import RANDOM, random_operators
from dfmcl.robustness.onnx_wire import with_wire_format
from dfmcl.robustness.runs import Run, load_run
from dfmcl.serving.clients.triton import Client
from dfmcl.training.pack import pack
from tests.gating.test_subject import Tiny, Wired, graph_of, means, to_onnx, zeros
from tests.serving.workshop import ROOT, Served, onnx_logits, write_evidence, write_run


def graph_with(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    """A graph that holds nodes; it need not run."""
    return helper.make_graph(list(nodes), "graph", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])


def model_with(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """A model around such a graph."""
    return helper.make_model(graph_with(*nodes))


@pytest.mark.parametrize("images", [1, 5])
def test_exported_model_equals_the_checkpoint(candidate: Path, run_directory: Path, images: int) -> None:
    """uint8 (N, H, W, C) in, the checkpoint's logits out, for any N."""
    x = load_dataset("digits").x_test[:images]
    with torch.no_grad():
        expected = load_run(run_directory).model(to_float(torch.from_numpy(x))).numpy()
    found = onnx_logits(candidate / "model.onnx", x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())  # float32 sums in another order


def test_manifest_tells_the_parity_and_the_origin(candidate: Path, run_directory: Path) -> None:
    """The manifest ties the files to the run, and says how equal they are and on how many images."""
    manifest = read_manifest(candidate)
    assert dict(manifest.files) == {name: sha256_of(candidate / name) for name in FILES}
    assert manifest.checkpoint_sha256 == load_run(run_directory).checkpoint_sha256
    assert manifest.parity.images == 2 * exporting.PARITY_IMAGES
    assert 0 <= manifest.parity.max_abs_difference <= manifest.parity.tolerance
    assert manifest.parity.label_agreement == 1
    assert manifest.parity.checkpoint_label_agreement == 1
    assert manifest.parity.checkpoint_max_abs_difference == manifest.parity.max_abs_difference
    assert manifest.weights == "float32"


def test_exported_bytes_tell_nothing_of_this_machine(candidate: Path, run_directory: Path) -> None:
    """The exporter writes stack traces with paths; none of them is left."""
    run = load_run(run_directory)
    raw = exporting.to_onnx(run.model, run.input_shape)
    assert str(ROOT).encode() in raw.SerializeToString()  # else this test proves nothing
    with pytest.raises(Broken, match="still names"):
        graphs.require_no_paths(raw)
    data = (candidate / "model.onnx").read_bytes()
    for trace in (str(ROOT), str(Path.home()), "site-packages", "stack_trace", ".py"):
        assert trace.encode() not in data
    assert [path.name for path in candidate.iterdir() if path.suffix == ".data"] == []


RANDOM_NODES = [helper.make_node(name, [], ["y"]) for name in sorted(RANDOM)] + [
    helper.make_node("Dropout", ["x", "ratio", "training"], ["y"])
]


@pytest.mark.parametrize("node", RANDOM_NODES, ids=lambda node: node.op_type)
def test_random_operators_are_found_wherever_they_hide(node: onnx.NodeProto) -> None:
    """In the graph, in a branch of a branch, and in a function."""
    branch = helper.make_node("If", ["c"], ["y"], then_branch=graph_with(node), else_branch=graph_with())
    nested = helper.make_node("If", ["c"], ["y"], then_branch=graph_with(), else_branch=graph_with(branch))
    function = model_with()
    function.functions.append(helper.make_function("own", "F", [], ["y"], [node], [helper.make_opsetid("", 20)]))
    for model in (model_with(node), model_with(nested), function):
        assert random_operators(model) == [node.op_type]


def test_dropout_of_an_inference_graph_is_not_random() -> None:
    """Without a training mode, or with one that is false, Dropout does nothing; with one that is true it draws."""
    assert random_operators(model_with(helper.make_node("Dropout", ["x", "ratio"], ["y"]))) == []
    model = model_with(helper.make_node("Dropout", ["x", "ratio", "mode"], ["y"]))
    for training in (False, True):
        del model.graph.initializer[:]
        model.graph.initializer.append(numpy_helper.from_array(np.array(training), "mode"))
        assert random_operators(model) == (["Dropout"] if training else [])


def test_a_run_without_numbers_is_refused(tmp_path: Path, run_directory: Path) -> None:
    """A weight that is no number is the model's fault, not the versions': exit code 1."""
    run = shutil.copytree(run_directory, tmp_path / "run")
    weights = load_file(run / "checkpoint.safetensors")
    weights["net.fc.bias"][0] = torch.nan
    save_file(weights, run / "checkpoint.safetensors")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["files"]["checkpoint.safetensors"] = sha256_of(run / "checkpoint.safetensors")
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Refused, match="its logits are not finite for 128 of 128 images of the test set") as caught:
        exporting.export(run, tmp_path / "candidate")
    assert (caught.value.exit_code, "versions" in str(caught.value)) == (1, False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("wild", [np.nan, np.inf])
def test_a_file_without_numbers_is_refused(tmp_path: Path, wild: float) -> None:
    """The same of a foreign file, and how many of the images that it was asked about."""
    last = helper.make_node("Add", ["m", "wild"], ["y"])
    model = graph_of(*means("x", "m"), last, axes=AXES, wild=np.array([0, wild, 0], np.float32))
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(Refused, match="its logits are not finite for 64 of 64 images of smooth colours and noise"):
        exporting.wrap(tmp_path / "foreign.onnx", tmp_path / "out", contract="float32 NCHW", labels=tuple("abc"))
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.onnx"]


def test_a_file_of_float64_is_wrapped(tmp_path: Path) -> None:
    """Its candidate takes bytes and answers in float32, as all do; what the gate knows as float64 Triton never sees."""
    model = graph_of(*means("x"), dtype=TensorProto.DOUBLE, axes=AXES)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    onnx.save(model, tmp_path / "foreign.onnx")
    exporting.wrap(tmp_path / "foreign.onnx", tmp_path / "out", contract="float64 NCHW", labels=tuple("abc"))
    images = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    found = onnx_logits(tmp_path / "out" / "model.onnx", images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, images.mean(axis=(1, 2)) / 255, rtol=1e-6)  # float32's own digits


def test_random_graph_is_refused_and_nothing_is_written(
    tmp_path: Path, run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose graph draws random numbers ends with exit code 1."""
    node = helper.make_node("RandomNormal", [], ["y"], shape=[1])
    monkeypatch.setattr(exporting, "to_onnx", lambda *_: model_with(node))
    with pytest.raises(Refused, match="RandomNormal") as caught:
        exporting.export(run_directory, tmp_path / "candidate")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_model_that_differs_from_its_checkpoint_is_not_written(
    tmp_path: Path, run_directory: Path, candidate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight off by a hundredth is over the tolerance: exit code 5, and an older candidate stays as it was."""
    model = onnx.load(candidate / "model.onnx")
    bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [10])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.01), bias.name))
    monkeypatch.setattr(exporting, "to_onnx", lambda *_: model)
    with pytest.raises(Broken, match=r"differ from the checkpoint's by 0\.01") as caught:
        exporting.export(run_directory, tmp_path / "candidate")
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []
    older = shutil.copytree(candidate, tmp_path / "candidate")
    with pytest.raises(Broken):
        exporting.export(run_directory, older)
    assert sha256_of(older / "model.onnx") == sha256_of(candidate / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["candidate"]


def test_directory_of_something_else_is_not_replaced(tmp_path: Path, run_directory: Path) -> None:
    """`out` is replaced only where it is a candidate."""
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("dear")
    with pytest.raises(BadInput, match=r"holds love\.txt, which this command did not write"):
        exporting.export(run_directory, tmp_path / "letters")
    assert (tmp_path / "letters" / "love.txt").read_text() == "dear"


def test_candidate_is_replaced(
    tmp_path: Path, run_directory: Path, candidate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second export into the same place leaves exactly the new candidate."""
    out = shutil.copytree(candidate, tmp_path / "candidate")
    (out / "labels.txt").write_text("old")
    monkeypatch.setattr(exporting, "to_onnx", lambda *_: onnx.load(candidate / "model.onnx"))
    manifest = exporting.export(run_directory, out)
    assert manifest == read_manifest(out).to_json()
    assert {path.name for path in out.iterdir()} == {*FILES, "manifest.json"}
    assert (out / "labels.txt").read_text() != "old"


def test_run_with_another_checkpoint_is_bad_input(tmp_path: Path, run_directory: Path) -> None:
    """A checkpoint that is not the one of its manifest is not exported."""
    run = shutil.copytree(run_directory, tmp_path / "run")
    with (run / "checkpoint.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BadInput, match="checkpoint"):
        exporting.export(run, tmp_path / "candidate")
    assert not (tmp_path / "candidate").exists()


@pytest.fixture(scope="module")
def small(run_directory: Path) -> Path:
    """The same run, exported with its weights as float16."""
    out = run_directory.parent / "small"
    exporting.export(run_directory, out, weights="float16")
    return out


def folded_kernels(run: Run) -> dict[str, np.ndarray]:
    """Each kernel times its batch normalisation's scale, by name: He et al.'s order of layers, spelled out."""
    state = {name: value.numpy() for name, value in run.model.state_dict().items()}
    folded = {}
    for name, kernel in state.items():
        if kernel.ndim == 4 and name.startswith("net."):
            norm = name.removesuffix(".weight").replace("downsample.0", "downsample.1").replace("conv", "bn")
            scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + 1e-5)
            folded[f"classifier.{name}"] = kernel * scale[:, None, None, None]
    return folded


def test_float16_weights_are_the_rounded_checkpoint(small: Path, run_directory: Path) -> None:
    """Every folded kernel is stored as float16, to the nearest; the largest tensors are, and computing is float32."""
    model = onnx.load(small / "model.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    expected = folded_kernels(load_run(run_directory))
    assert len(expected) == 20
    for name, kernel in expected.items():
        found = stored[f"{name}.float16"]
        assert found.dtype == np.float16
        # Half of float16's last place, and what summing in another order does before it is rounded.
        np.testing.assert_allclose(found, kernel, rtol=2.0**-11 + 1e-6, atol=2.0**-25)
    assert stored["classifier.net.fc.weight.float16"].dtype == np.float16
    assert max(value.size for value in stored.values() if value.dtype == np.float32) < 100
    consumers = {node.op_type for node in model.graph.node if any(name.endswith("float16") for name in node.input)}
    assert consumers == {"Cast"}


def test_onnx_runtime_folds_the_casts_when_it_loads(small: Path, candidate: Path, tmp_path: Path) -> None:
    """What runs has the operators of the float32 export: one Cast, of the image."""
    operators = []
    for directory in (small, candidate):
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns that what it writes is for this machine
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        ort.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])
        operators.append(sorted(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node))
    assert operators[0] == operators[1]
    assert operators[0].count("Cast") == 1


def test_float16_manifest_tells_both_parities(small: Path, candidate: Path) -> None:
    """Close to the rounded checkpoint, further from the trained one, with its labels; smaller, for the same run."""
    manifest = read_manifest(small)
    parity = manifest.parity
    assert manifest.weights == "float16"
    assert manifest.checkpoint_sha256 == read_manifest(candidate).checkpoint_sha256
    assert parity.max_abs_difference <= parity.tolerance < 1e-3
    assert parity.max_abs_difference < parity.checkpoint_max_abs_difference < 0.01
    assert parity.checkpoint_label_agreement >= exporting.MIN_LABEL_AGREEMENT
    images = load_dataset("digits").x_test[: exporting.PARITY_IMAGES]
    gap = np.abs(onnx_logits(small / "model.onnx", images) - onnx_logits(candidate / "model.onnx", images)).max()
    assert 0 < gap <= parity.checkpoint_max_abs_difference + 1e-5
    assert (small / "model.onnx").stat().st_size < 0.7 * (candidate / "model.onnx").stat().st_size


def test_float16_that_is_not_the_rounded_checkpoint_is_not_written(
    tmp_path: Path, run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stored weight off by a hundredth is over the tolerance, although the labels stay."""

    def spoil(model: onnx.ModelProto) -> None:
        graphs.store_as_float16(model)
        weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("fc.weight.float16"))
        values = numpy_helper.to_array(weight).copy()
        values[0, 0] += np.float16(0.01)
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))

    monkeypatch.setattr(exporting, "store_as_float16", spoil)
    with pytest.raises(Broken, match="differ from the checkpoint's by"):
        exporting.export(run_directory, tmp_path / "candidate", weights="float16")
    assert list(tmp_path.iterdir()) == []


def test_rounding_that_changes_labels_is_refused(tmp_path: Path) -> None:
    """Weights that differ only in digits that float16 lacks: exit code 1, and nothing is written."""
    run = write_run(tmp_path / "run")
    state = load_file(run / "checkpoint.safetensors")
    state["net.fc.weight"] = 500 + 0.1 * torch.randn(state["net.fc.weight"].shape, generator=torch.manual_seed(0))
    state["net.fc.bias"] = torch.zeros(10)
    rewrite_checkpoint(run, state)
    with pytest.raises(Refused, match="export with --weights float32") as caught:
        exporting.export(run, tmp_path / "small", weights="float16")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "small").exists()


def rewrite_checkpoint(run: Path, state: dict[str, torch.Tensor]) -> None:
    """Give a written run other weights."""
    save_file(state, run / "checkpoint.safetensors")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["files"] = {"checkpoint.safetensors": sha256_of(run / "checkpoint.safetensors")}
    (run / "manifest.json").write_text(json.dumps(manifest))


def test_packed_surrogate_is_not_exported(tmp_path: Path, run_directory: Path) -> None:
    """Its digest is another than its run's, so a watch would not know the served weights again."""
    pack(run_directory, tmp_path / "packed")
    with pytest.raises(BadInput, match="is a packed surrogate; export the run it was packed from"):
        exporting.export(tmp_path / "packed", tmp_path / "candidate")


def test_other_storage_is_bad_input(tmp_path: Path, run_directory: Path) -> None:
    """A precision nobody wrote is refused with the list of existing ones."""
    with pytest.raises(BadInput, match="weights are 'int8'; choose one of float32, float16"):
        exporting.export(run_directory, tmp_path / "candidate", weights="int8")


LETTERS = ("a", "b", "c", "d", "e")


@pytest.mark.parametrize("dynamo", [False, True], ids=["old", "dynamo"])
@pytest.mark.parametrize(
    "text",
    [
        *("uint8 NHWC 12x10x3", "uint8 NCHW 9x9x1", "float32 NCHW 10x14x4", "float32 NHWC 8x8x3", "half"),
        *("float32 NCHW 8x8x3 imagenet", "float32 NHWC 8x8x3 caffe", "uint8 NHWC 8x8x3 BGR"),
        *("float32 flat-CHW 8x8x3 caffe", "uint8 flat-HWC 8x8x3"),
    ],
)
def test_wrapped_file_takes_images_as_they_come(tmp_path: Path, text: str, dynamo: bool) -> None:
    """Whatever it took, the candidate takes uint8 (N, H, W, C) of any N and answers with the network's logits."""
    contract = InputContract.parse("float32 NCHW 8x8x3" if text == "half" else text)
    net = Tiny(contract.channels)
    wired, example = Wired(net, contract), zeros(contract)
    if text == "half":
        wired, example = wired.half(), example.half()
    path = to_onnx(tmp_path / "foreign.onnx", wired, example, dynamo=dynamo)
    size = "x".join(map(str, contract.shape)) if contract.flat else ""  # a file of rows does not say it
    given = " ".join(filter(None, (contract.dtype, contract.layout, size, str(contract.scale))))
    manifest = exporting.wrap(path, tmp_path / "candidate", contract=given, labels=LETTERS)
    read = read_manifest(tmp_path / "candidate")
    assert manifest == read.to_json()
    assert Manifest.from_json(json.loads(json.dumps(manifest))) == read
    assert (read.input_shape, read.labels, read.checkpoint_sha256) == (contract.shape, LETTERS, None)
    baked = InputContract.from_json(read.origin_input)
    assert baked == replace(contract, dtype="float16" if text == "half" else contract.dtype)
    assert {path.name for path in (tmp_path / "candidate").iterdir()} == {*FILES, "manifest.json"}
    model = tmp_path / "candidate" / "model.onnx"
    (entry,), (answer,) = (
        [(value.name, value.type, value.shape) for value in values]
        for session in [ort.InferenceSession(model)]
        for values in (session.get_inputs(), session.get_outputs())
    )
    assert entry == ("images", "tensor(uint8)", ["batch", *contract.shape])
    assert answer == ("logits", "tensor(float)", ["batch", 5])
    x = noise(contract, 5, seed=2)
    expected = Tiny(contract.channels)(contract.scale.applied(x)).detach().numpy()
    for images in (1, 5):
        found = onnx_logits(model, to_bytes(x[:images]).numpy())
        tolerance = (5e-3 if text == "half" else 1e-5) * np.abs(expected).max()
        np.testing.assert_allclose(found, expected[:images], atol=tolerance)


def test_wrapped_manifest_names_the_original_and_no_run(tmp_path: Path) -> None:
    """Its origin is the file's SHA-256, its parity is with that file; the gate reads it as any candidate."""
    path = to_onnx(tmp_path / "foreign.onnx", Tiny(), torch.zeros(2, 3, 8, 8))
    manifest = exporting.wrap(path, tmp_path / "candidate", contract="float32 NCHW", labels=LETTERS)
    taken = {"dtype": "float32", "layout": "NCHW", "shape": [8, 8, 3]}
    assert manifest["origin"] == {"kind": "onnx", "sha256": sha256_of(path), "input": taken}
    assert "run" not in manifest
    assert manifest["weights"] == "original"
    parity = read_manifest(tmp_path / "candidate").parity
    assert parity.images == exporting.PARITY_IMAGES
    assert 0 <= parity.max_abs_difference == parity.checkpoint_max_abs_difference <= parity.tolerance
    assert parity.label_agreement == 1
    subject = candidate_subject(tmp_path / "candidate")
    assert (subject.classes, subject.run, subject.no_gradients) == (LETTERS, {}, "")
    assert subject.contract == InputContract(8, 8, 3)


@pytest.mark.parametrize("change", [{"weights": "float32"}, {"run": {"checkpoint_sha256": "0"}}, {"origin": {}}])
def test_manifest_of_two_origins_is_malformed(tmp_path: Path, change: dict[str, Any]) -> None:
    """A candidate comes from a run or from a file, and says how that one keeps its weights."""
    path = to_onnx(tmp_path / "foreign.onnx", Tiny(), torch.zeros(2, 3, 8, 8))
    manifest = exporting.wrap(path, tmp_path / "candidate", contract="float32 NCHW", labels=LETTERS)
    with pytest.raises((KeyError, ValueError)):
        Manifest.from_json({**manifest, **change})


def test_file_in_our_own_wire_format_is_kept_byte_for_byte(tmp_path: Path, candidate: Path) -> None:
    """What already takes and gives what we serve is not touched: the original's digest is the candidate's."""
    labels = read_manifest(candidate).labels
    manifest = exporting.wrap(candidate / "model.onnx", tmp_path / "same", contract="uint8 NHWC", labels=labels)
    assert manifest["files"] == json.loads((candidate / "manifest.json").read_text())["files"]
    assert isinstance(manifest["origin"], dict)
    assert manifest["origin"]["sha256"] == sha256_of(candidate / "model.onnx")


@pytest.mark.parametrize("dynamo", [False, True], ids=["old", "dynamo"])
def test_fixed_batch_size_is_freed(tmp_path: Path, dynamo: bool) -> None:
    """A file for single images is served in batches of any size."""
    path = to_onnx(tmp_path / "foreign.onnx", Tiny(), torch.zeros(1, 3, 8, 8), dynamo=dynamo, free=False)
    exporting.wrap(path, tmp_path / "candidate", contract="float32 NCHW", labels=LETTERS)
    x = noise(InputContract(8, 8, 3), 7)
    found = onnx_logits(tmp_path / "candidate" / "model.onnx", to_bytes(x).numpy())
    np.testing.assert_allclose(found, Tiny()(x).detach(), atol=1e-5)


def test_our_own_wire_format_for_one_batch_size_is_freed_too(tmp_path: Path, candidate: Path) -> None:
    """Names and types that fit are not enough to be kept: batches of any size are part of the format."""
    model = onnx.load(candidate / "model.onnx")
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "foreign.onnx")
    labels = read_manifest(candidate).labels
    exporting.wrap(tmp_path / "foreign.onnx", tmp_path / "wrapped", contract="uint8 NHWC", labels=labels)
    images = load_dataset("digits").x_test[:5]
    found, expected = (onnx_logits(folder / "model.onnx", images) for folder in (tmp_path / "wrapped", candidate))
    np.testing.assert_allclose(found, expected, atol=1e-5)


AXES = np.array([2, 3])
NOISE = helper.make_node("RandomNormalLike", ["m"], ["noise"])
RANDOM_GRAPH = graph_of(*means("x", "m"), NOISE, helper.make_node("Add", ["m", "noise"], ["y"]), axes=AXES)
BUILT_IN = graph_of(
    *means("x", "m"), helper.make_node("Add", ["m", "rows"], ["y"]), axes=AXES, rows=np.ones((2, 3), "f")
)
BUILT_IN.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
TOO_NEW = graph_of(*means("x"), axes=AXES)
TOO_NEW.opset_import[0].version = exporting.OPSET + 1


@pytest.mark.parametrize(
    ("model", "labels", "error", "message"),
    [
        (RANDOM_GRAPH, "abc", BadInput, "draws random numbers .RandomNormalLike.; export it without"),
        (BUILT_IN, "abc", Refused, "takes batches of 2 only, and cannot be freed; export it with a dynamic batch"),
        (TOO_NEW, "abc", Refused, "opset 21 is not served everywhere; export it with opset 20"),
        (graph_of(*means("x"), axes=AXES), "ab", BadInput, "answers with 3 logits, there are 2 labels"),
        (graph_of(*means("x"), axes=AXES), "ab ", BadInput, "cannot stand on a line of its own"),
        (model_with(helper.make_node("Constant", [], ["y"], value_float=1.0)), "abc", BadInput, "has 0 inputs"),
    ],
    ids=["random", "built-in", "too-new", "labels", "label", "inputs"],
)
def test_file_that_cannot_be_served_is_refused(
    tmp_path: Path, model: onnx.ModelProto, labels: str, error: type[Exception], message: str
) -> None:
    """One line says why, and nothing is written."""
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(error, match=message):
        exporting.wrap(tmp_path / "foreign.onnx", tmp_path / "out", contract="float32 NCHW", labels=tuple(labels))
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.onnx"]


def test_wrapper_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels first where the file takes them last is noticed by its answers: exit code 5."""
    path = to_onnx(tmp_path / "foreign.onnx", Tiny(8), torch.zeros(2, 8, 8, 8))

    def transposed(*arguments: Any) -> onnx.ModelProto:
        model = with_wire_format(*arguments)
        next(node for node in model.graph.node if node.op_type == "Transpose").attribute[0].ints[:] = [0, 1, 2, 3]
        return model

    monkeypatch.setattr(exporting, "with_wire_format", transposed)
    with pytest.raises(Broken, match="wrapped, its logits differ by") as caught:
        exporting.wrap(path, tmp_path / "candidate", contract="float32 NCHW", labels=LETTERS)
    assert caught.value.exit_code == 5
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.onnx"]


def test_triton_serves_a_wrapped_file(tmp_path: Path, needs_triton: None, key: Path, trust: Trust) -> None:
    """From a float NCHW file with softmax to an answer over gRPC, the logits before it, which the gate can ask for."""
    net = Tiny(3, 10)
    path = to_onnx(
        tmp_path / "foreign.onnx", nn.Sequential(net, nn.Softmax(1)).eval(), torch.zeros(1, 3, 16, 16), free=False
    )
    labels = tuple(f"class {number}" for number in range(10))
    exporting.wrap(path, tmp_path / "candidate", contract="float32 NCHW", labels=labels)
    evidence = write_evidence(tmp_path / "evidence", tmp_path / "candidate", key)
    promotion.promote(tmp_path / "candidate", evidence, Directory(tmp_path / "models"), name="foreign", trust=trust)
    server = Served(tmp_path / "models", tmp_path / "ready.json").start()
    try:
        x = noise(InputContract(16, 16, 3), 6)
        with Client(server.ready["grpc"], "foreign") as client:
            assert client.describe().labels == labels
            found = client.predict(to_bytes(x).numpy()).logits
            live = open_subject(
                f"grpc://{server.ready['grpc']}/foreign",
                connect=lambda url, model: (client.describe(), lambda images: client.predict(images).logits),
                budget=6,
            )
            asked = live.decide(x)
        np.testing.assert_allclose(found, net(x).detach(), atol=1e-5)
        np.testing.assert_array_equal(asked.numpy(), found)
        assert (live.contract, live.classes, live.model) == (InputContract(16, 16, 3), labels, None)
    finally:
        assert server.close() == 0


def test_command_wraps_a_file(tmp_path: Path) -> None:
    """`dfmcl export FILE.onnx --input ... --labels FILE` does the same; it asks for a missing input or labels."""
    path = to_onnx(tmp_path / "foreign.onnx", Tiny(), torch.zeros(2, 3, 8, 8))
    (tmp_path / "labels.txt").write_text("\n".join(LETTERS))
    command = [sys.executable, "-m", "dfmcl", "export", str(path), "--out", str(tmp_path / "candidate")]
    meant = ["--input", "float32 NCHW clip", "--labels", str(tmp_path / "labels.txt")]
    for call, message in (
        (command, "--input 'float32 NCHW' --labels FILE"),
        ([*command, *meant, "--weights", "float16"], "an ONNX file keeps its network and weights"),
        (
            [*command[:4], str(tmp_path), *command[5:], *meant],
            "is no ONNX file; a run knows --input, --labels, --output and --preprocessing",
        ),
    ):
        refused = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
        assert (refused.returncode, message in refused.stderr) == (2, True), refused.stderr
    command += meant
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "100.0 % equal labels" in done.stdout
    assert "turns them into float32 NCHW 8x8x3 clip for" in done.stdout
    assert read_manifest(tmp_path / "candidate").labels == LETTERS
