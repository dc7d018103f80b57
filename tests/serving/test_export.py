"""The exported graph is the checkpoint, and nothing but it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from robustness.data import load_dataset
from robustness.errors import BadInput as RunError
from robustness.models import to_float
from robustness.runs import load_run
from serving import export as exporting
from serving.candidate import FILES, read_manifest, sha256_of
from serving.errors import Broken, Refused
from tests.serving.workshop import ROOT, onnx_logits


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


def test_exported_bytes_tell_nothing_of_this_machine(candidate: Path, run_directory: Path) -> None:
    """The exporter writes stack traces with paths; none of them is left."""
    raw = exporting.to_onnx(load_run(run_directory))
    assert str(ROOT).encode() in raw.SerializeToString()  # else this test proves nothing
    with pytest.raises(Broken, match="still names"):
        exporting.require_no_paths(raw)
    data = (candidate / "model.onnx").read_bytes()
    for trace in (str(ROOT), str(Path.home()), "site-packages", "stack_trace", ".py"):
        assert trace.encode() not in data
    assert [path.name for path in candidate.iterdir() if path.suffix == ".data"] == []


RANDOM_NODES = [helper.make_node(name, [], ["y"]) for name in sorted(exporting.RANDOM)] + [
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
        assert exporting.random_operators(model) == [node.op_type]


def test_dropout_of_an_inference_graph_is_not_random() -> None:
    """Without a training mode Dropout does nothing."""
    assert exporting.random_operators(model_with(helper.make_node("Dropout", ["x", "ratio"], ["y"]))) == []


def test_random_graph_is_refused_and_nothing_is_written(
    tmp_path: Path, run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose graph draws random numbers ends with exit code 1."""
    node = helper.make_node("RandomNormal", [], ["y"], shape=[1])
    monkeypatch.setattr(exporting, "to_onnx", lambda run: model_with(node))
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
    monkeypatch.setattr(exporting, "to_onnx", lambda run: model)
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
    with pytest.raises(RunError, match=r"holds love\.txt, which this command did not write"):
        exporting.export(run_directory, tmp_path / "letters")
    assert (tmp_path / "letters" / "love.txt").read_text() == "dear"


def test_candidate_is_replaced(
    tmp_path: Path, run_directory: Path, candidate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second export into the same place leaves exactly the new candidate."""
    out = shutil.copytree(candidate, tmp_path / "candidate")
    (out / "labels.txt").write_text("old")
    monkeypatch.setattr(exporting, "to_onnx", lambda run: onnx.load(candidate / "model.onnx"))
    manifest = exporting.export(run_directory, out)
    assert manifest == read_manifest(out).to_json()
    assert {path.name for path in out.iterdir()} == {*FILES, "manifest.json"}
    assert (out / "labels.txt").read_text() != "old"


def test_run_with_another_checkpoint_is_bad_input(tmp_path: Path, run_directory: Path) -> None:
    """A checkpoint that is not the one of its manifest is not exported."""
    run = shutil.copytree(run_directory, tmp_path / "run")
    with (run / "checkpoint.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(RunError, match="checkpoint"):
        exporting.export(run, tmp_path / "candidate")
    assert not (tmp_path / "candidate").exists()
