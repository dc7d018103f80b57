"""The values inside an ONNX file, and whether each has as many of them as it says."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import onnx
from onnx import TensorProto

from dfmcl.common.errors import BadInput

COMPLEX = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)  # two numbers a value


def all_tensors(message: Any) -> Iterator[TensorProto]:
    """Every tensor inside a protobuf message: initializers, attributes, subgraphs, functions, sparse ones."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in value if hasattr(value, "add") else [value]:  # repeated, or one
            if isinstance(part, TensorProto):
                yield part
            else:
                yield from all_tensors(part)


def require_whole(model: onnx.ModelProto, where: object) -> None:
    """BadInput where a tensor holds fewer or more values than its shape says; ONNX Runtime reads no unused ones."""
    for tensor in all_tensors(model):
        if min(tensor.dims, default=1) < 0 or tensor.data_type not in onnx.helper.get_all_tensor_dtypes():
            raise BadInput(f"{where}: its tensor {tensor.name!r} has no shape or type; export the model again")
        expected = math.prod(tensor.dims)
        if (found := _held(tensor)) != expected:
            shape = "x".join(map(str, tensor.dims)) or "one value"
            raise BadInput(
                f"{where}: its tensor {tensor.name!r} is {shape}, and holds {found:,} values of {expected:,};"
                " export the model again"
            )


def _held(tensor: TensorProto) -> int:
    """How many values a tensor has; those of less than a byte are packed, and the last byte may be filled up."""
    kind, expected = tensor.data_type, math.prod(tensor.dims)
    bits = _bits(kind)
    if tensor.HasField("raw_data"):
        size = len(tensor.raw_data)
        return expected if size == -(-expected * bits // 8) else size * 8 // bits
    stored = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(kind)))
    if kind in COMPLEX:
        return stored // 2
    if bits in (2, 4):  # values of 6 bits lie in a field one by one
        return expected if stored == -(-expected * bits // 8) else stored * 8 // bits
    return stored


def _bits(kind: int) -> int:
    """Of a value, in raw bytes."""
    told = re.match(r"U?INT(\d+)|FLOAT(\d)E", TensorProto.DataType.Name(kind))
    bits = (told[1] or told[2]) if told else 8 * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    return int(bits)
