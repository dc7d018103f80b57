"""An ONNX graph before it is stored: small, without paths, and with nothing that tells where it was made."""

from __future__ import annotations

import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dfmcl.common.errors import Broken
from dfmcl.robustness.onnx_random import graphs


def store_as_float16(model: onnx.ModelProto) -> None:
    """Store, in place, matrices and kernels as float16 with a Cast to float32 where that loses nothing."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        values = numpy_helper.to_array(tensor)
        half = values.astype(np.float16)
        if np.array_equal(half.astype(np.float32), values):
            casts.append(helper.make_node("Cast", [f"{tensor.name}.float16"], [tensor.name], to=TensorProto.FLOAT))
            tensor.CopyFrom(numpy_helper.from_array(half, f"{tensor.name}.float16"))
    nodes = [*casts, *model.graph.node]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)


def strip(model: onnx.ModelProto) -> None:
    """Remove, in place, what only tells how the model was made: stack traces, doc strings, inferred shapes."""
    model.ClearField("doc_string")
    model.ClearField("metadata_props")
    for graph in graphs(model):
        graph.ClearField("value_info")
        described = [graph, *graph.node, *(attribute for node in graph.node for attribute in node.attribute)]
        if isinstance(graph, onnx.GraphProto):
            described += [*graph.input, *graph.output, *graph.initializer]
            graph.ClearField("quantization_annotation")
        for part in described:
            part.ClearField("doc_string")
            if "metadata_props" in part.DESCRIPTOR.fields_by_name:
                part.ClearField("metadata_props")


def require_no_paths(model: onnx.ModelProto) -> None:
    """Raise Broken where a model still holds a path of this machine, outside its weights."""
    here = [Path.home(), Path.cwd(), Path(__file__).parents[2], Path(tempfile.gettempdir()), Path(sys.prefix)]
    places = {str(place) for place in [*here, sysconfig.get_path("purelib")]} - {"/"}
    text = onnx.ModelProto()
    text.CopyFrom(model)
    for tensor in text.graph.initializer:
        tensor.ClearField("raw_data")  # four random bytes of a weight may spell /tmp
    data = text.SerializeToString()
    if found := sorted(place for place in places if place.encode() in data):
        raise Broken(f"the exported graph still names {found[0]}; this version of torch writes it in a new place")
