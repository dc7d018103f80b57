"""The float twin of a quantised ONNX file: the same graph without its roundings, so that gradients pass.

A code is kept as a real number: QuantizeLinear is x / scale + zero point, cut where the code ends, which saturates as
the file does; DequantizeLinear is its inverse. What a quantiser chose anew for each batch (DynamicQuantizeLinear) is
not needed where nothing is rounded. The file itself decides; see Jacob et al. 2018 for the two schemes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]
PREFIX = "dfmcl.float."
OPERATORS = ("QLinear", "QGemm")  # how the names of the QOperator format begin
DYNAMIC = "DynamicQuantizeLinear"
# By the type of a zero point: the least and the largest code.
CODES = {np.dtype(name): (np.iinfo(name).min, np.iinfo(name).max) for name in ("uint8", "int8", "uint16", "int16")}


class NoTwin(Exception):
    """Why a file has no float twin."""


@dataclass
class _Rewriting:
    """constants: the values that no input changes, by name. made: names in the twin so far."""

    graph: onnx.GraphProto
    constants: dict[str, Array]
    made: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def value(self, name: str, of: str) -> Array:
        if name not in self.constants:
            raise NoTwin(f"{of} reads {name!r}, which is computed while it runs")
        return self.constants[name]

    def constant(self, value: Array) -> str:
        self.made += 1
        name = f"{PREFIX}{self.made}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, operator: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        self.made += 1
        output = output or f"{PREFIX}{self.made}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output


def float_twin(model: onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
    """The twin, and in words what was taken out; the model itself and nothing where it does not round so.

    NoTwin where an operator's part in it is not known: scales that are computed, a scale for each channel of an
    activation, codes of other types than CODES, the QOperator format.
    """
    counts = {kind: sum(node.op_type == kind for node in model.graph.node) for kind in REWRITTEN}
    rounding = counts["QuantizeLinear"] + counts[DYNAMIC]
    if not rounding:
        return model, ""
    if whole := next((node.op_type for node in model.graph.node if node.op_type.startswith(OPERATORS)), ""):
        raise NoTwin(f"{whole} rounds inside")
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    work = _Rewriting(twin.graph, constants_of(twin.graph))
    for node in model.graph.node:
        rewrite = REWRITTEN.get(node.op_type)
        if rewrite is None:
            work.nodes.append(node)
        else:
            rewrite(work, node)
    del twin.graph.node[:]
    twin.graph.node.extend(work.nodes)
    twin.graph.ClearField("value_info")  # it says that codes are whole numbers
    told = ", ".join(f"{counts[kind]} {kind}" for kind in ("QuantizeLinear", DYNAMIC) if counts[kind])
    return twin, f"its float twin, without the rounding of {told}"


def by_batch(model: onnx.ModelProto) -> bool:
    """Whether a file chooses its scales by all images that it is asked about at once."""
    return any(node.op_type == DYNAMIC for node in model.graph.node)


def constants_of(graph: onnx.GraphProto) -> dict[str, Array]:
    """The values of initializers and of Constant nodes."""
    tensors = {tensor.name: tensor for tensor in graph.initializer} | {
        node.output[0]: node.attribute[0].t
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    return {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items()}


def _codes(work: _Rewriting, node: onnx.NodeProto) -> tuple[Array, Array]:
    """Scale and zero point of a Q or DQ, both as floats."""
    scale = np.asarray(work.value(node.input[1], node.op_type), np.float32)
    named = len(node.input) > 2 and node.input[2]
    zero = work.value(node.input[2], node.op_type) if named else np.zeros_like(scale, np.uint8)
    if node.op_type == "QuantizeLinear" and zero.dtype not in CODES:
        raise NoTwin(f"its codes are {zero.dtype}")
    return scale, zero


def _quantize(work: _Rewriting, node: onnx.NodeProto) -> None:
    scale, zero = _codes(work, node)
    if scale.size > 1:
        raise NoTwin("QuantizeLinear has a scale for each channel")
    low, high = CODES[zero.dtype]
    code = work.node("Div", [node.input[0], work.constant(scale.reshape(()))])
    code = work.node("Add", [code, work.constant(zero.astype(np.float32).reshape(()))])
    work.node(
        "Clip",
        [code, work.constant(np.array(low, np.float32)), work.constant(np.array(high, np.float32))],
        node.output[0],
    )


def _dequantize(work: _Rewriting, node: onnx.NodeProto) -> None:
    scale, zero = _codes(work, node)
    if node.input[0] in work.constants:
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
        value = _unscaled(work.constants[node.input[0]], scale, zero, axis)
        work.constants[node.output[0]] = value
        work.node("Identity", [work.constant(value)], node.output[0])
        return
    if scale.size > 1:
        raise NoTwin("DequantizeLinear has a scale for each channel of what is computed")
    code = work.node("Sub", [node.input[0], work.constant(zero.astype(np.float32).reshape(()))])
    work.node("Mul", [code, work.constant(scale.reshape(()))], node.output[0])


def _dynamic(work: _Rewriting, node: onnx.NodeProto) -> None:
    work.node("Identity", [node.input[0]], node.output[0])
    for name, value in zip(node.output[1:], (1.0, 0.0), strict=True):
        work.constants[name] = np.array(value, np.float32)
        work.node("Identity", [work.constant(work.constants[name])], name)


def _whole(operator: str, along: int) -> Callable[[_Rewriting, onnx.NodeProto], None]:
    """MatMulInteger and ConvInteger as operations on floats; along: the axis of the weights' zero points."""

    def rewrite(work: _Rewriting, node: onnx.NodeProto) -> None:
        weights = work.value(node.input[1], node.op_type)
        zero = work.value(node.input[3], node.op_type) if len(node.input) > 3 and node.input[3] else np.uint8(0)
        held = work.constant(_unscaled(weights, np.array(1, np.float32), np.asarray(zero), along % weights.ndim))
        begin = node.input[0]
        if len(node.input) > 2 and node.input[2]:
            begin = work.node("Sub", [begin, node.input[2]])
        work.node(operator, [begin, held], node.output[0])
        work.nodes[-1].attribute.extend(node.attribute)

    return rewrite


def _unscaled(codes: Array, scale: Array, zero: Array, axis: int) -> Array:
    """(codes - zero) * scale in float32, where scale and zero are numbers, or rows along an axis."""

    def along(row: Array) -> Array:
        shape = [-1 if place == axis % codes.ndim else 1 for place in range(codes.ndim)]
        return row.reshape(shape) if row.size > 1 else row.reshape(())

    value: Array = (codes.astype(np.float32) - along(zero.astype(np.float32))) * along(scale)
    return value.astype(np.float32)


REWRITTEN: Mapping[str, Callable[[_Rewriting, onnx.NodeProto], None]] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    DYNAMIC: _dynamic,
    "MatMulInteger": _whole("MatMul", -1),
    "ConvInteger": _whole("Conv", 0),
}
