"""The operators of an ONNX file that draw random numbers: an answer by one of them is not the model's next answer."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from dfmcl.robustness.onnx_float import constants_of

DROPOUT = "Dropout"  # which draws in training mode only
# All that have a seed, in any version of the operator set.
RANDOM = frozenset(one.name for one in onnx.defs.get_all_schemas_with_history() if "seed" in one.attributes) - {DROPOUT}


def random_operators(model: onnx.ModelProto) -> list[str]:
    """Names of the operators anywhere in a model whose output is random; empty for a deterministic model."""
    return sorted(
        {
            node.op_type
            for graph in graphs(model)
            for node in graph.node
            if node.op_type in RANDOM or _drops(node, graph)
        }
    )


def graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The graph of a model, its functions, and all graphs inside their nodes."""
    pending: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while pending:
        graph = pending.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                pending += [attribute.g] if attribute.HasField("g") else []
                pending += attribute.graphs


def _drops(node: onnx.NodeProto, graph: onnx.GraphProto | onnx.FunctionProto) -> bool:
    """Whether a Dropout is in training mode, or nobody can say before it runs."""
    if node.op_type != DROPOUT or len(node.input) < 3 or not node.input[2]:
        return False
    mode = constants_of(graph).get(node.input[2]) if isinstance(graph, onnx.GraphProto) else None
    return mode is None or bool(mode.any())
