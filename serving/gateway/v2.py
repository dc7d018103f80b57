"""KServe's v2 protocol over HTTP, so that tritonclient.http asks this gateway as it would ask Triton.

It is the Open Inference Protocol, with Triton's extensions for binary data and for classification.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfmcl.serving.clients.triton import Contract
from dfmcl.serving.gateway.endpoints import Reply
from dfmcl.serving.gateway.images import Batch, document_of, require_tensor, tensor_of
from dfmcl.serving.gateway.problems import Problem

HEADER_LENGTH = "inference-header-content-length"  # bytes of JSON before the binary data
EXTENSIONS = ("binary_tensor_data", "classification")
PLATFORM = "onnxruntime_onnx"


@dataclass(frozen=True)
class Question:
    """What a client asks. images: uint8 (N, H, W, C); id: comes back; binary: whether the output is wanted as bytes;
    classes: how many of the best are wanted in place of logits, 0: none."""

    images: Batch
    id: str
    binary: bool
    classes: int


def question(body: bytes, header_length: str | None, contract: Contract) -> Question:
    """A request's body, JSON alone or JSON and binary data. Problem: bad_request, wrong_input, too_large."""
    if header_length is None:
        document, numbers = document_of(body)
        images = tensor_of(document, numbers, contract)
    else:
        if not re.fullmatch(r"[0-9]{1,9}", header_length) or not 0 < int(header_length) <= len(body):
            raise Problem("bad_request", f"Inference-Header-Content-Length: is no length within {len(body)} bytes")
        head = int(header_length)
        document, _ = document_of(body[:head])
        images = _binary(document, body[head:], contract)
    output, told = _output(document, contract), document.get("id", "")
    if not isinstance(told, str) or len(told) > 128:
        raise Problem("bad_request", "id: expected a string of up to 128 characters")
    return Question(images, told, *output)


def _binary(document: dict[str, Any], data: bytes, contract: Contract) -> Batch:
    entry = document["inputs"][0]
    size = _parameters(entry).get("binary_data_size")
    if size is None:
        return tensor_of(document, b"", contract)
    shape = require_tensor(entry, contract)
    if type(size) is not int or size != len(data) or size != math.prod(shape):
        raise Problem(
            "bad_request", f"inputs: {len(data)} bytes follow, binary_data_size is {size}, the shape {math.prod(shape)}"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _output(document: dict[str, Any], contract: Contract) -> tuple[bool, int]:
    """Whether the one output is wanted as bytes, and how many classes in place of logits."""
    whole = _parameters(document)
    outputs = document.get("outputs") or [{"name": contract.output_name}]
    if not isinstance(outputs, list) or len(outputs) != 1 or not isinstance(outputs[0], dict):
        raise Problem("bad_request", "outputs: expected one entry, or none")
    if outputs[0].get("name") != contract.output_name:
        raise Problem("wrong_input", f"outputs: the model gives {contract.output_name!r}")
    own = _parameters(outputs[0])
    binary, classes = own.get("binary_data", whole.get("binary_data_output", False)), own.get("classification", 0)
    if type(binary) is not bool or type(classes) is not int or classes < 0:
        raise Problem("bad_request", "outputs: binary_data is true or false, classification a number of classes")
    return binary, min(classes, contract.classes)


def _parameters(entry: dict[str, Any]) -> dict[str, Any]:
    found = entry.get("parameters") or {}
    if not isinstance(found, dict):
        raise Problem("bad_request", "parameters: expected an object")
    return found


def answer(reply: Reply, asked: Question, model: str, contract: Contract) -> tuple[bytes, dict[str, str]]:
    """The body, and the headers that go with it."""
    if asked.classes:
        best = np.argsort(-reply.logits, axis=1, kind="stable")[:, : asked.classes]
        rows = [
            [f"{float(logits[place]):f}:{place}:{reply.labels[place]}" for place in places.tolist()]
            for logits, places in zip(reply.logits, best, strict=True)
        ]
        shape, kind = [len(rows), asked.classes], "BYTES"
        values: list[Any] = [text for row in rows for text in row]
        data = b"".join(len(text.encode()).to_bytes(4, "little") + text.encode() for text in values)
    else:
        shape, kind, values = list(reply.logits.shape), "FP32", reply.logits.ravel().tolist()
        data = reply.logits.astype("<f4").tobytes()
    output: dict[str, Any] = {"name": contract.output_name, "datatype": kind, "shape": shape}
    told = {"id": asked.id} if asked.id else {}
    document = {"model_name": model, "model_version": reply.version, **told, "outputs": [output]}
    if not asked.binary:
        output["data"] = values
        return _dumped(document), {"content-type": "application/json"}
    output["parameters"] = {"binary_data_size": len(data)}
    head = _dumped(document)
    return head + data, {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}


def metadata(model: str, version: str, contract: Contract) -> dict[str, Any]:
    """Of the model, as `get_model_metadata` has it."""
    return {
        "name": model,
        "versions": [version],
        "platform": PLATFORM,
        "inputs": [{"name": contract.input_name, "datatype": "UINT8", "shape": [-1, *contract.input_shape]}],
        "outputs": [{"name": contract.output_name, "datatype": "FP32", "shape": [-1, contract.classes]}],
    }


def _dumped(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
