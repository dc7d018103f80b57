"""An ONNX classifier behind the wire format, uint8 (N, H, W, C) RGB: its contract becomes the file's first layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dfmcl.robustness.contract import InputContract
from dfmcl.robustness.onnx_graph import FREE, Graph
from dfmcl.robustness.scale import PLAIN

Step = tuple[str, dict[str, Any], Any]
"""An operator, its attributes, and its second input, None where it has one only."""


def with_wire_format(graph: Graph, classes: int, entry: str, answer: str) -> onnx.ModelProto:
    """The graph behind a conversion of uint8 (N, H, W, C) to its input, in the order of `InputContract.wire`.

    classes: K. entry, answer: the names of the new input and of the float32 logits (N, K).
    """
    model = onnx.compose.add_prefix(graph.model, "wrapped.")  # so that no name in it is one of ours
    inner = replace(graph, model=model)
    steps = conversion(graph.contract, inner.input.type.tensor_type.elem_type)
    nodes, at = [], entry
    for number, (operator, attributes, second) in enumerate(steps, 1):
        after = inner.input.name if number == len(steps) else f"wire.{number}"
        inputs = [at]
        if second is not None:
            inputs.append(f"wire.{number}.{operator.lower()}")
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(second), inputs[-1]))
        nodes.append(helper.make_node(operator, inputs, [after], **attributes))
        at = after
    last = helper.make_node("Cast", [inner.output.name], [answer], to=TensorProto.FLOAT)
    every = [*nodes, *model.graph.node, last]
    for field, values in (
        ("node", every),
        ("input", [helper.make_tensor_value_info(entry, TensorProto.UINT8, [FREE, *graph.contract.shape])]),
        ("output", [helper.make_tensor_value_info(answer, TensorProto.FLOAT, [FREE, classes])]),
    ):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(values)
    return model


def conversion(contract: InputContract, held: int) -> list[Step]:
    """What makes bytes (N, H, W, C) the images of a contract; held: the type of the file's input."""
    scale, first = contract.scale, contract.channels_first
    steps: list[Step] = [("Transpose", {"perm": [0, 3, 1, 2]}, None)] if first else []
    if scale.order != "RGB":
        steps.append(("Gather", {"axis": 1 if first else 3}, np.array([2, 1, 0])))
    if contract.dtype != "uint8":
        steps.append(("Cast", {"to": TensorProto.FLOAT}, None))
        steps += [("Div", {}, np.float32(255))] if scale.top == 1 else []
        for operator, values, plain in (("Sub", scale.mean, PLAIN.mean), ("Div", scale.std, PLAIN.std)):
            if values != plain:
                steps.append((operator, {}, np.array(values, np.float32).reshape((-1, 1, 1) if first else -1)))
        steps += [("Cast", {"to": held}, None)] if held != TensorProto.FLOAT else []
    steps += [("Reshape", {}, np.array([0, *contract.dims]))] if contract.flat else []  # 0: as many images as come
    return steps or [("Identity", {}, None)]
