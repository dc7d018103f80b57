"""A file of others costs no more than its answer is worth: neither endless time, nor values that are not there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from dfmcl.common.errors import BadInput
from dfmcl.robustness.deadline import answered
from dfmcl.robustness.onnx_graph import artefact, read_graph
from dfmcl.robustness.onnx_session import asked, opened

SHAPE = (3, 4, 4)


def classifier(path: Path, *end: onnx.NodeProto, **values: np.ndarray) -> onnx.ModelProto:
    """Two classes, the sums of two halves of an image, then `end`, which makes `out` of `logits`."""
    weights = np.kron(np.eye(2), np.ones((24, 1))).astype(np.float32)
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "weights"], ["logits"])]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [*nodes, *(end or [helper.make_node("Identity", ["logits"], ["out"])])],
        "g",
        [value("x", TensorProto.FLOAT, ["n", *SHAPE])],
        [value("out", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(array, name) for name, array in {"weights": weights, **values}.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return model


def loop(path: Path, turns: int) -> None:
    """A classifier that adds 0 to its logits, as often as that."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["again"]), helper.make_node("Add", ["v", "zero"], ["sum"])],
        "body",
        [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("v", TensorProto.FLOAT, None)],
        [value("again", TensorProto.BOOL, []), value("sum", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.float32(0), "zero")],
    )
    node = helper.make_node("Loop", ["turns", "yes", "logits"], ["out"], body=body)
    classifier(path, node, turns=np.array(turns), yes=np.array(True))


def test_a_loop_without_an_end_is_given_up(tmp_path: Path) -> None:
    """After the seconds that each image has, in one line; one that ends answers."""
    images = np.ones((2, *SHAPE), np.float32)
    for turns in (3, 2**40):
        loop(tmp_path / "loop.onnx", turns)
        session = opened((tmp_path / "loop.onnx").read_bytes(), "loop.onnx", "float32")
        if turns == 3:
            np.testing.assert_array_equal(answered(session, images, "loop.onnx")[0], np.full((2, 2), 24))
            continue
        with pytest.raises(BadInput, match=r"loop\.onnx: gave no answer to 2 images within 1 s; "):
            answered(session, images, "loop.onnx", seconds=0.5)


def test_each_question_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the decider too, of which nobody says how long they may take."""
    loop(tmp_path / "loop.onnx", 2**40)
    monkeypatch.setattr(asked, "__defaults__", (0.5,))
    with pytest.raises(BadInput, match=r"gave no answer to \d images? within [01](\.5)? s"):
        artefact(read_graph(tmp_path / "loop.onnx", classes=2))(torch.ones(1, *SHAPE))


def test_a_file_that_asks_for_all_memory_says_one_thing(tmp_path: Path) -> None:
    """ONNX Runtime's own log of it, in colours, is not shown beside the one line that follows from its error."""
    end = (
        helper.make_node("ConstantOfShape", ["sides"], ["huge"]),
        helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0),
        helper.make_node("Add", ["logits", "sum"], ["out"]),
    )
    classifier(tmp_path / "huge.onnx", *end, sides=np.array([2**21, 2**21]))  # 16 TiB, which no machine has
    (tmp_path / "labels").write_text("a\nb\n")
    told = ["--input", "float32 NCHW", "--labels", str(tmp_path / "labels"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "dfmcl", "export", str(tmp_path / "huge.onnx"), *told]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert re.fullmatch(r"dfmcl: .*\bnot enough memory: .*\n", ended.stderr)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            TensorProto(data_type=TensorProto.FLOAT, dims=[2**20, 2**20]),
            r"is 1048576x1048576, and holds 0 values of 1,",
        ),
        (TensorProto(data_type=TensorProto.FLOAT, dims=[3], raw_data=bytes(8)), "is 3, and holds 2 values of 3;"),
        (TensorProto(data_type=TensorProto.FLOAT, dims=[1], raw_data=bytes(8)), "is 1, and holds 2 values of 1;"),
        (TensorProto(data_type=TensorProto.FLOAT, dims=[3], float_data=[1, 2]), "is 3, and holds 2 values of 3;"),
        (TensorProto(data_type=TensorProto.INT4, dims=[5], raw_data=bytes(2)), "is 5, and holds 4 values of 5;"),
        (TensorProto(data_type=TensorProto.FLOAT, dims=[-1]), "has no shape or type"),
        (TensorProto(data_type=999, dims=[1]), "has no shape or type"),
    ],
)
def test_a_value_that_is_not_there_is_named(tmp_path: Path, tensor: TensorProto, message: str) -> None:
    """Whether a node uses it or not, because readers of the file take its shape for the truth."""
    model = classifier(tmp_path / "model.onnx")
    tensor.name = "unused"
    model.graph.initializer.append(tensor)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BadInput, match=f"model.onnx: its tensor 'unused' {message}"):
        read_graph(tmp_path / "model.onnx", classes=2)


@pytest.mark.parametrize("kind", sorted(onnx.helper.get_all_tensor_dtypes() - {TensorProto.UNDEFINED}))
def test_a_value_of_any_type_is_read(tmp_path: Path, kind: int) -> None:
    """As onnx itself writes it, in raw bytes and in fields, with an odd number of values, with none, and with one."""
    model = classifier(tmp_path / "model.onnx")
    for count in (5, 0, 1):
        values = ["1"] * count if kind == TensorProto.STRING else [1] * count
        model.graph.initializer.append(helper.make_tensor(f"plain{count}", kind, [count], values))
        if kind != TensorProto.STRING:
            array = np.ones(count).astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
            model.graph.initializer.append(numpy_helper.from_array(array, f"raw{count}"))
    onnx.save(model, tmp_path / "model.onnx")
    assert read_graph(tmp_path / "model.onnx", classes=2).contract.shape == (4, 4, 3)
