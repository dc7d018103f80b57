"""KServe's v2 routes in the OpenAPI document: what each asks and answers, with examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dfmcl.serving.gateway.images import TENSOR
from dfmcl.serving.gateway.problems import STATUSES
from dfmcl.serving.gateway.v2 import EXTENSIONS, PLATFORM

BYTES = "application/octet-stream"
LENGTH = "Inference-Header-Content-Length"
REFUSALS = frozenset(STATUSES) - {
    *("client_left", "handshake", "method_not_allowed", "bad_image", "unsupported_type"),
}  # of an inference
_INPUT = {"name": "images", "shape": [1, 1, 2, 3], "datatype": "UINT8"}
_PIXELS = [0, 9, 255, 7, 0, 31]
_OUTPUT = {"name": "logits", "datatype": "FP32", "shape": [1, 3]}
_SAID = {"model_name": "resnet18-cifar10", "model_version": "1"}
REQUESTS: dict[str, Any] = {
    "logits": {
        "summary": "one image as pixels, of a model that takes 1 x 2 of them",
        "value": {"id": "42", "inputs": [{**_INPUT, "data": _PIXELS}]},
    },
    "classes": {
        "summary": "its two best classes in place of logits",
        "value": {
            "inputs": [{**_INPUT, "data": _PIXELS}],
            "outputs": [{"name": "logits", "parameters": {"classification": 2}}],
        },
    },
}
ANSWERS: dict[str, Any] = {
    "logits": {
        "summary": "logits, in the order of the classes",
        "value": {**_SAID, "id": "42", "outputs": [{**_OUTPUT, "data": [-1.25, 3.5, 0.75]}]},
    },
    "classes": {
        "summary": "the two best classes: logit, index and label",
        "value": {
            **_SAID,
            "outputs": [{"name": "logits", "datatype": "BYTES", "shape": [1, 2], "data": ["3.5:1:car", "0.75:2:bird"]}],
        },
    },
}
BINARY = (
    f"With the header {LENGTH}, a body is so many bytes of JSON and then the pixels as they lie in memory:"
    " the input has parameters.binary_data_size in place of data. An output with parameters.binary_data, or a request"
    " with parameters.binary_data_output, is answered likewise: float32, little-endian; classes as strings, each after"
    " its length in four bytes."
)


Problems = Callable[[frozenset[str]], dict[str, Any]]


def operations(
    model: str, headers: dict[str, Any], problems: Problems, key: list[dict[str, list[str]]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Operation by path and method.

    model: the one that is served
    headers: those that each answer has
    problems: the responses that say these reasons
    key: the security of what needs one
    """

    def get(name: str, summary: str, schema: str, *reasons: str, **more: Any) -> dict[str, Any]:
        content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
        content["examples"] = {name: {"summary": summary, "value": EXAMPLES.get(name, EXAMPLES[schema])}}
        answer = {"description": "So it is.", "headers": headers, "content": {TENSOR: content}}
        responses = {"200": answer, **problems(frozenset(reasons))}
        return {"summary": summary, "operationId": name, "responses": responses, **more}

    found: dict[str, dict[str, dict[str, Any]]] = {
        "/v2": {"get": get("v2", "The server, and the protocol's extensions that it has.", "V2Server")},
        "/v2/health/live": {"get": get("v2_live", "Whether the process lives.", "V2Status")},
        "/v2/health/ready": {"get": get("v2_ready", "Whether a Triton answers.", "V2Status", "unavailable")},
    }
    for name, place, known in (
        ("model", "/v2/models/{model}", {"parameters": [_model(model)]}),
        ("version", "/v2/models/{model}/versions/{version}", {"parameters": [_model(model), VERSION]}),
    ):
        which, lost = f"The {'model' if name == 'model' else 'version that is served'}", ("not_found", "unavailable")
        about = get(
            f"v2_{name}", f"{which}: input and output.", "V2Model", "unauthorized", *lost, security=key, **known
        )
        ready = get(f"v2_{name}_ready", f"{which}: whether it answers.", "V2Status", *lost, **known)
        infer = _infer(which, known["parameters"], headers, problems)
        found[place], found[f"{place}/ready"] = {"get": about}, {"get": ready}
        found[f"{place}/infer"] = {"post": {**infer, "operationId": f"v2_{name}_infer", "security": key}}
    return found


def _infer(which: str, parameters: list[dict[str, Any]], headers: dict[str, Any], problems: Problems) -> dict[str, Any]:
    answer = {"schema": {"$ref": "#/components/schemas/V2Answer"}, "examples": ANSWERS}
    length = {"schema": {"type": "integer", "minimum": 1}, "description": "Bytes of JSON, where binary data follow."}
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        "summary": f"{which}: logits of images, or the best classes.",
        "description": f"tritonclient.http asks so. The key must be one that may see logits. {BINARY}",
        "parameters": [*parameters, {"name": LENGTH, "in": "header", **length}],
        "requestBody": {
            "required": True,
            "content": {
                TENSOR: {"schema": {"$ref": "#/components/schemas/V2Request"}, "examples": REQUESTS},
                BYTES: binary,
            },
        },
        "responses": {
            "200": {
                "description": "The one output, in JSON or with its values as bytes.",
                "headers": {**headers, LENGTH: length},
                "content": {TENSOR: answer, BYTES: binary},
            },
            **problems(REFUSALS),
        },
    }


EXAMPLES: dict[str, Any] = {
    "V2Server": {"name": "dfmcl-gateway", "version": "0.1.0", "extensions": list(EXTENSIONS)},
    "V2Status": {"status": "ready"},
    "v2_live": {"status": "alive"},
    "V2Model": {
        "name": "resnet18-cifar10",
        "versions": ["1"],
        "platform": PLATFORM,
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
    },
}
VERSION: dict[str, Any] = {
    "name": "version",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": "^[0-9]+$"},
    "example": "1",
    "description": "The one that is served; without it, whichever that is.",
}


def _model(name: str) -> dict[str, Any]:
    schema, why = {"type": "string", "enum": [name]}, "The one that this gateway leads to."
    return {"name": "model", "in": "path", "required": True, "schema": schema, "example": name, "description": why}


def _shaped(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def schemas(image: dict[str, Any]) -> dict[str, Any]:
    """Of requests, answers and errors of the protocol. image: of an input."""
    text, numbers = {"type": "string"}, {"type": "array", "items": {"type": "integer"}}
    tensors = {"type": "array", "items": _shaped(name=text, datatype=text, shape=numbers), "minItems": 1}
    output = _shaped(name=text, datatype={"enum": ["FP32", "BYTES"]}, shape=numbers, data={"type": "array"})
    wish = {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": text,
            "parameters": {
                "type": "object",
                "properties": {
                    "binary_data": {"type": "boolean"},
                    "classification": {"type": "integer", "minimum": 0, "description": "So many of the best classes."},
                },
            },
        },
    }
    answer = _shaped(
        model_name=text,
        model_version=text,
        outputs={"type": "array", "items": output, "minItems": 1, "maxItems": 1},
    )
    return {
        "V2Server": _shaped(name=text, version=text, extensions={"type": "array", "items": text}),
        "V2Status": _shaped(status=text),
        "V2Model": _shaped(
            name=text, versions={"type": "array", "items": text}, platform=text, inputs=tensors, outputs=tensors
        ),
        "V2Answer": {**answer, "properties": {**answer["properties"], "id": text}},
        "V2Problem": {**_shaped(error=text), "additionalProperties": False},
        "V2Request": {
            "type": "object",
            "required": ["inputs"],
            "properties": {
                "id": {"type": "string", "maxLength": 128, "description": "Comes back with the answer."},
                "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": image},
                "outputs": {"type": "array", "maxItems": 1, "items": wish},
                "parameters": {"type": "object", "properties": {"binary_data_output": {"type": "boolean"}}},
            },
        },
    }
