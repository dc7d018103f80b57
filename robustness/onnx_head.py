"""The end of an ONNX classifier: which of its outputs are the scores, and the logits (N, K) behind them.

A softmax, log-softmax or sigmoid at the very end keeps every decision and takes the gradients away where it saturates,
so it is left out; one sigmoid becomes two logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from dfmcl.common.errors import BadInput
from dfmcl.robustness.onnx_session import observed

# Operators that change no number: behind them a softmax is still the last thing that was computed.
SHAPES = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather"})
SQUASHES = frozenset({"Softmax", "LogSoftmax", "Sigmoid"})
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
COERCED = 13  # before this opset a softmax is over all axes from its own on
PREFIX = "dfmcl.head."


@dataclass(frozen=True)
class Head:
    """Where a classifier ends. output: the name of its scores among several, nothing where there is one; squash: the
    operator that was left out behind the logits, nothing where these are the scores."""

    output: str
    squash: str


def headed(
    model: onnx.ModelProto, images: NDArray[Any], where: object, *, output: str | None, classes: int | None
) -> tuple[onnx.ModelProto, Head, onnx.ModelProto | None]:
    """The model with one output, logits (N, K), and where it ended; the very model where it is so already. And, where a
    squash was left out, the model with the scores that it gives as its one output, (N, K), of one sigmoid (N, 1).

    images: a batch as the file takes it.
    output: the scores' name; else the one output that can be scores.
    classes: K, where that is known.
    """
    names = [output] if output is not None else _outputs(model)
    chains = {name: _ends(model, name) for name in names}
    if len(model.graph.output) == 1 and output is None and not chains[names[0]] and _is_rows(model.graph.output[0]):
        return model, Head("", ""), None
    inner = {name for node in model.graph.node for name in node.output}
    if output is not None and output not in inner:
        raise BadInput(f"{where}: has no tensor {output!r}; its outputs are {', '.join(_outputs(model))}")
    squashed = {nodes[-1].output[0] for nodes in chains.values() if nodes}
    found = observed(model, sorted({*names, *squashed} & inner), images, where)
    name = names[0] if len(names) == 1 else _scores(found, names, len(images), classes, where)
    chosen = name if output is not None or len(model.graph.output) > 1 else ""
    columns = _columns(found[name], len(images)) if name in found else 0
    if not columns:  # no scores of anything: the caller that asks for them says what came
        return model, Head(chosen, ""), None
    nodes = chains[name]
    over_classes = bool(nodes) and _over_classes(nodes[-1], model, found, len(images), columns)
    squash = nodes[-1].op_type if over_classes else ""
    if columns == 1 and squash != "Sigmoid":
        raise BadInput(
            f"{where}: gives one number an image in {name!r}, and no sigmoid made it; export it with a sigmoid at its"
            " end, or with two logits"
        )
    if not squash and found[name].ndim == 2 and [value.name for value in model.graph.output] == [name]:
        return model, Head(chosen, ""), None
    passed = {node.output[0] for node in nodes if node.op_type in (*SQUASHES, "Log")} if squash else set()
    twin = _rewritten(model, name, passed, columns, found[name].dtype)
    return twin, Head(chosen, squash), _rewritten(model, name, set(), columns, found[name].dtype) if squash else None


def _outputs(model: onnx.ModelProto) -> list[str]:
    """The names of all outputs; of skl2onnx's maps from label to probability, the probabilities' own."""
    made = {output: node for node in model.graph.node for output in node.output}
    nodes = [(value.name, made.get(value.name)) for value in model.graph.output]
    return [node.input[0] if node is not None and node.op_type == "ZipMap" else name for name, node in nodes]


def _is_rows(value: onnx.ValueInfoProto) -> bool:
    """Whether an output is declared to be float scores (N, K)."""
    dims, kind = value.type.tensor_type.shape.dim, value.type.tensor_type.elem_type
    return len(dims) == 2 and dims[1].dim_value > 1 and kind in FLOATS


def _rewritten(
    model: onnx.ModelProto, name: str, passed: Set[str], columns: int, dtype: np.dtype[Any]
) -> onnx.ModelProto:
    """The model up to `name`, as rows; the nodes that make the tensors `passed` let their input through."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    for node in twin.graph.node:
        if passed & set(node.output):
            node.op_type = "Identity"
            node.ClearField("attribute")
    twin.graph.initializer.append(numpy_helper.from_array(np.array([-1, columns]), f"{PREFIX}shape"))
    twin.graph.node.append(helper.make_node("Reshape", [name, f"{PREFIX}shape"], [f"{PREFIX}rows"]))
    last, single = f"{PREFIX}rows", columns == 1 and bool(passed)
    if single:  # sigmoid(z) is the second of softmax(-z/2, z/2)
        pair = np.array([[-0.5, 0.5]], dtype)
        twin.graph.initializer.append(numpy_helper.from_array(pair, f"{PREFIX}pair"))
        twin.graph.node.append(helper.make_node("MatMul", [last, f"{PREFIX}pair"], [f"{PREFIX}logits"]))
        last = f"{PREFIX}logits"
    _prune(twin.graph, last)
    twin.graph.ClearField("output")
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    twin.graph.output.append(helper.make_tensor_value_info(last, kind, [None, 2 if single else columns]))
    return twin


def _prune(graph: onnx.GraphProto, name: str) -> None:
    """Remove, in place, the nodes that do not lead to a tensor: a converter may not know them."""
    needed, kept = {name}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= _read_by(node)
    nodes = kept[::-1]
    graph.ClearField("node")
    graph.node.extend(nodes)


def _read_by(node: onnx.NodeProto) -> set[str]:
    """The tensors that a node reads, those of the graphs inside it too."""
    inside = [inner for entry in node.attribute for graph in (entry.g, *entry.graphs) for inner in graph.node]
    return set(node.input).union(*map(_read_by, inside))


def _ends(model: onnx.ModelProto, name: str) -> list[onnx.NodeProto]:
    """The last nodes before `name`, backwards, up to a squash; empty where something else was computed last."""
    made = {output: node for node in model.graph.node for output in node.output}
    nodes: list[onnx.NodeProto] = []
    while (node := made.get(name)) is not None:
        nodes.append(node)
        if node.op_type in SQUASHES:
            return nodes
        before = made.get(node.input[0]) if node.input else None
        logged = node.op_type == "Log" and before is not None and before.op_type == "Softmax"
        if node.op_type not in SHAPES and not logged:
            return []
        name = node.input[0]
    return []


def _over_classes(
    node: onnx.NodeProto, model: onnx.ModelProto, found: Mapping[str, NDArray[Any]], batch: int, columns: int
) -> bool:
    """Whether a squash is over the classes of each image, and of nothing else."""
    shape = found[node.output[0]].shape
    if shape[:1] != (batch,) or prod(shape) != batch * columns:
        return False
    if node.op_type == "Sigmoid":
        return True
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    coerced = opset < COERCED
    axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1 if coerced else -1) % len(shape)
    return axis > 0 and (prod(shape[axis:]) if coerced else shape[axis]) == columns


def _scores(
    found: Mapping[str, NDArray[Any]], names: Sequence[str], batch: int, classes: int | None, where: object
) -> str:
    """The only output that can be the scores of so many classes; BadInput that lists all where there is no such one."""
    columns = {name: _columns(found[name], batch) for name in names if name in found}
    able = [name for name, count in columns.items() if count == (classes or count) and count > 1]
    if len(able) == 1:
        return able[0]
    told = ", ".join(f"{name} {found[name].dtype} {found[name].shape}" for name in columns)
    raise BadInput(f"{where}: has {len(names)} outputs ({told}); say which one is the scores: --output NAME")


def _columns(scores: NDArray[Any], batch: int) -> int:
    """K of float scores (N, K), (N, K, 1, 1), ..., 1 of (N,); 0 of what is no row an image."""
    floats, sides = np.issubdtype(scores.dtype, np.floating), [side for side in scores.shape[1:] if side != 1]
    return prod(sides) if floats and scores.shape[:1] == (batch,) and len(sides) <= 1 else 0
