"""ONNX Runtime as this house asks it: quietly, with each failure as one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from dfmcl.common.errors import BadInput, lacks_memory
from dfmcl.common.text import first_line
from dfmcl.robustness.deadline import SECONDS, answered
from dfmcl.robustness.provider import CPU, Provider

LARGE = 2**20  # values in a batch whose memory is given back: 6 images of 224 pixels
FATAL = 4  # ONNX Runtime's severity: its errors are raised too, and each is one line here
WIDE = ("float64", "float16")  # it lacks operators for these types


def opened(
    model: bytes,
    where: object,
    dtype: str,
    provider: Provider = CPU,
    *,
    example: NDArray[Any] | None = None,
) -> ort.InferenceSession:
    """A session of a model; BadInput where ONNX Runtime cannot load it.

    where: for the message; dtype: of its images, for the advice.
    provider: what must compute it; example: images on which that is seen.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # torch computes between two calls, on the same cores: idle threads must sleep, not spin.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = FATAL
    try:
        return provider.session(model, options, example)
    except BadInput:
        raise
    except Exception as error:  # onnxruntime raises its own unrelated classes
        if lacks_memory(error):
            raise
        way = "; export it in float32 (`model.float()`)" if dtype in WIDE else ""
        raise BadInput(f"{where}: ONNX Runtime {ort.__version__} cannot load it: {first_line(error)}{way}") from None


def observed(
    model: onnx.ModelProto, names: Sequence[str], images: NDArray[Any], where: object
) -> dict[str, NDArray[Any]]:
    """The inner tensors of these names for one batch of images: as they are, for what exporters declare has gaps."""
    if not names:
        return {}
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    twin.graph.ClearField("output")
    twin.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = opened(twin.SerializeToString(), where, str(images.dtype))
    return dict(zip(names, asked(session, images, where, f"{images.dtype} {images.shape}"), strict=True))


def asked(
    session: ort.InferenceSession, images: NDArray[Any], where: object, what: str, seconds: float = SECONDS
) -> list[NDArray[Any]]:
    """All outputs of a session with one input.

    BadInput where it cannot take these images, which `what` describes, or takes more than `seconds` for each.
    """
    options = ort.RunOptions()
    if images.size > LARGE and CPU.name in session.get_providers():
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    try:
        found = answered(session, images, where, options, seconds)
    except BadInput:
        raise
    except Exception as error:  # as above
        if lacks_memory(error):
            raise
        raise BadInput(f"{where}: cannot take {what}: {first_line(error)}") from None
    return [np.asarray(value) for value in found]
