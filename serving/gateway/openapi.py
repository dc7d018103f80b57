"""The gateway's interface as an OpenAPI 3.1 document, with the limits of the configuration in it."""

from __future__ import annotations

from typing import Any

from dfmcl.serving.gateway import openapi_v2
from dfmcl.serving.gateway.config import GatewayConfig
from dfmcl.serving.gateway.images import FIELD, FORM, TENSOR, TYPES
from dfmcl.serving.gateway.problems import OF_IMAGES, STATUSES

# What an endpoint may say in place of an answer; 495 and 499 are for nobody to see.
CLASSIFY_REASONS = frozenset(STATUSES) - {"client_left", "handshake", "not_found", "method_not_allowed"}
SUMMARIES = {
    "/healthz": "Whether the process lives.",
    "/readyz": "Whether a Triton answers, and this gateway is not about to stop.",
    "/metrics": "Figures for Prometheus.",
    "/openapi.json": "This document.",
    "/docs": "This document, to read.",
    "/": "A page that classifies an image.",
}
KINDS = {"/healthz": "application/json", "/readyz": "application/json", "/metrics": "text/plain"}
KINDS |= {"/openapi.json": "application/json", "/docs": "text/html", "/": "text/html"}


def describe(config: GatewayConfig, version: str) -> dict[str, Any]:
    """The document. version: of this program."""
    key: list[dict[str, list[str]]] = [] if config.open else [{"bearer": []}, {"header": []}]
    paths: dict[str, Any] = {"/v1/classify": {"post": {**_classify(config), "security": key}}}
    paths["/v1/model"] = {"get": {**_about(), "security": key}}
    paths |= openapi_v2.operations(config.triton.model, HEADERS, lambda reasons: _problems(reasons, v2=True), key)
    for path, summary in SUMMARIES.items():
        if path == "/metrics" and config.listen.admin:  # it is not here
            continue
        reasons = {"/readyz": {"unavailable"}, "/metrics": set() if config.listen.public_metrics else {"unauthorized"}}
        operation = {
            "summary": summary,
            "operationId": path.strip("/").partition(".")[0] or "index",
            "responses": {
                "200": {
                    "description": "So it is.",
                    "headers": HEADERS,
                    "content": {KINDS[path]: {"schema": _kind(path)}},
                },
                **_problems(reasons.get(path, set())),
            },
        }
        private = path == "/metrics" and not config.listen.public_metrics
        paths[path] = {"get": operation | ({"security": key} if private else {})}
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"Gateway to {config.triton.model}",
            "version": version,
            "description": "Classifies images with an adversarially hardened model behind NVIDIA Triton.",
        },
        **({"servers": [{"url": config.listen.root_path}]} if config.listen.root_path else {}),
        "paths": paths,
        "components": {"schemas": _schemas(config), **({} if config.open else {"securitySchemes": schemes})},
    }


def _classify(config: GatewayConfig) -> dict[str, Any]:
    limits = config.limits
    file = {"schema": {"type": "string", "format": "binary", "maxLength": limits.body_bytes}}
    flag = {"type": "boolean", "default": False}
    files = {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
    form = {"type": "object", "required": [FIELD], "properties": {FIELD: files}}
    document = {"oneOf": [{"$ref": "#/components/schemas/Tensor"}, {"$ref": "#/components/schemas/Images"}]}
    answer = {"oneOf": [{"$ref": "#/components/schemas/Classification"}, {"$ref": "#/components/schemas/Batch"}]}
    return {
        "summary": "Classify an image, or several of them.",
        "operationId": "classify",
        "description": f"An image has up to {limits.pixels:,} pixels, a body up to {limits.body_bytes:,} bytes. An"
        " image is turned as its EXIF says, and its alpha lies on white. More than 8 bits a channel and several frames"
        " are refused, and so is another size than the model takes; with resize=true it is brought to that size as the"
        " images were that the model was judged on. Several images come as fields of a form or as base64 in JSON:"
        " they are answered in their order, each by a prediction or its own error, and each costs an image of the key.",
        "parameters": [
            {"name": "resize", "in": "query", "schema": flag, "description": "Resize what has another size."},
            {"name": "logits", "in": "query", "schema": flag, "description": "Raw logits too; not every key may."},
            {
                "name": "X-Request-Timeout-Ms",
                "in": "header",
                "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999, "default": limits.timeout_ms},
                "description": f"The deadline of this request; more than {limits.max_timeout_ms} counts as that.",
            },
            {
                "name": "X-Request-Id",
                "in": "header",
                "schema": {"type": "string"},
                "description": "Comes back with the answer; one that is no such name is replaced.",
            },
        ],
        "requestBody": {
            "required": True,
            "content": {
                **dict.fromkeys(TYPES, file),
                FORM: {"schema": form},
                TENSOR: {"schema": document, "examples": REQUESTS},
            },
        },
        "responses": {
            "200": {
                "description": "One image: a Classification. Several, or a tensor: a Batch.",
                "headers": HEADERS,
                "content": {"application/json": {"schema": answer, "examples": ANSWERS}},
            },
            **_problems(CLASSIFY_REASONS),
        },
    }


def _about() -> dict[str, Any]:
    return {
        "summary": "What the model is that answers now, and what the gate recorded about it.",
        "operationId": "model",
        "responses": {
            "200": {
                "description": "Its classes, the image it takes, and the gate's verdict, as it is recorded.",
                "headers": HEADERS,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/About"}}},
            },
            **_problems({"unauthorized", "unavailable"}),
        },
    }


# A PNG of 8 x 8 pixels, as small as an example must be.
PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAGklEQVR42mP8sEWDAQZUli2As5kYcIDBKQEAcj4DRjmuLHUAAAAASUVORK5CYII="
)
_SHIP = {
    "label": "ship",
    "index": 8,
    "top": [
        {"label": "ship", "index": 8, "probability": 0.8731},
        {"label": "airplane", "index": 0, "probability": 0.0904},
    ],
}
_ABOUT = {"model": "resnet18-cifar10", "version": "1", "request_id": "6f1d5c0e9a7b4f3c8e2d1a0b9c8d7e6f"}
_NO_IMAGE = {"reason": "bad_image", "message": "image: is no image file that can be read"}
REQUESTS: dict[str, Any] = {
    "images": {"summary": "two images, as base64", "value": {"images": [PICTURE, PICTURE]}},
    "tensor": {
        "summary": "one image as pixels, of a model that takes 1 x 2 of them",
        "value": {
            "inputs": [{"name": "images", "shape": [1, 1, 2, 3], "datatype": "UINT8", "data": [0, 9, 255, 7, 0, 31]}]
        },
    },
}
ANSWERS: dict[str, Any] = {
    "classification": {"summary": "one image", "value": {**_SHIP, **_ABOUT}},
    "batch": {
        "summary": "two images, of which the second cannot be read",
        "value": {"predictions": [_SHIP, {"error": _NO_IMAGE}], **_ABOUT},
    },
}
HEADERS: dict[str, Any] = {"X-Request-Id": {"schema": {"type": "string"}, "required": True}}
RETRY_AFTER = {
    "description": "Whole seconds after which there is room again: until the images sent are paid for (429), or until"
    " enough of the waiting ones are answered (503).",
    "schema": {"type": "integer", "minimum": 1},
}


def _problems(reasons: frozenset[str] | set[str], *, v2: bool = False) -> dict[str, Any]:
    """A response for each status of these reasons. v2: in KServe's form, which has a sentence alone."""
    found: dict[str, list[str]] = {}
    for reason in sorted(reasons):
        found.setdefault(str(STATUSES[reason]), []).append(reason)
    schema = {"$ref": f"#/components/schemas/{'V2Problem' if v2 else 'Problem'}"}
    again: dict[str, Any] = {"Retry-After": RETRY_AFTER}
    return {
        status: {
            "description": ", ".join(names),
            "headers": HEADERS | (again if status in ("429", "503") else {}),
            "content": {
                "application/json": {
                    "schema": schema,
                    "examples": {"problem": V2_PROBLEM} if v2 else {name: _problem(name) for name in names},
                }
            },
        }
        for status, names in sorted(found.items())
    }


V2_PROBLEM = {"summary": "a problem, of any status", "value": {"error": "what is wrong, and what to do"}}


def _problem(reason: str) -> dict[str, Any]:
    said = {"reason": reason, "message": "what is wrong, and what to do", "request_id": _ABOUT["request_id"]}
    return {"summary": reason, "value": {"error": said}}


def _kind(path: str) -> dict[str, Any]:
    return {"type": "object" if KINDS[path] == "application/json" else "string"}


def _schemas(config: GatewayConfig) -> dict[str, Any]:
    top = {
        "type": "object",
        "required": ["label", "index", "probability"],
        "additionalProperties": False,
        "properties": {
            "label": {"type": "string"},
            "index": {"type": "integer", "minimum": 0},
            "probability": {"type": "number", "minimum": 0, "maximum": 1},
        },
    }
    prediction = {
        "label": {"type": "string", "description": "Of the most probable class."},
        "index": {"type": "integer", "minimum": 0},
        "top": {
            "type": "array",
            "items": {"$ref": "#/components/schemas/Class"},
            "minItems": 1,
            "maxItems": config.answers.top,
            "description": f"Best first, probabilities rounded to {config.answers.decimals} decimals.",
        },
        "logits": {"type": "array", "items": {"type": "number"}, "description": "In class order; with logits=true."},
    }
    about = {
        "model": {"type": "string"},
        "version": {"type": "string", "description": "Of the model, which computed all of it."},
        "request_id": {"type": "string"},
    }
    problem = {
        "reason": {"type": "string", "enum": sorted(STATUSES)},
        "message": {"type": "string"},
        "request_id": {"type": ["string", "null"]},
    }
    one = {"oneOf": [{"$ref": "#/components/schemas/Prediction"}, {"$ref": "#/components/schemas/ImageProblem"}]}
    predictions = {"type": "array", "minItems": 1, "items": one, "description": "In the order of the images."}
    unseen = {"reason": {"type": "string", "enum": sorted(OF_IMAGES)}, "message": {"type": "string"}}
    base64 = {"type": "string", "contentEncoding": "base64", "pattern": "^[A-Za-z0-9+/]+={0,2}$"}
    return {
        "Class": top,
        "Prediction": _closed(prediction, optional={"logits"}),
        "Classification": _closed(prediction | about, optional={"logits"}),
        "Batch": _closed({"predictions": predictions} | about),
        "Problem": _closed({"error": _closed(problem)}),
        "ImageProblem": _closed({"error": _closed(unseen)}),
        "Images": _closed({"images": {"type": "array", "minItems": 1, "items": base64}}),
        "About": _about_schema(),
        "Tensor": {
            "type": "object",
            "required": ["inputs"],
            "description": "KServe v2: one input of uint8 images, (N, height, width, channels), flat or nested.",
            "properties": {"inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": _input()}},
        },
        **openapi_v2.schemas(_input()),
    }


def _about_schema() -> dict[str, Any]:
    text, count = {"type": "string"}, {"type": "integer", "minimum": 0}
    ratio = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
    share = {**_closed({"value": ratio, "images": count, "lower": ratio, "upper": ratio}), "type": ["object", "null"]}
    gate = {
        "verdict": {**text, "description": "The gate's; or that it is not recorded, or not believed."},
        "signature": {"type": "string", "enum": ["verified", "not checked"]},
        "meaning": {**text, "description": "Of the robust accuracy, in one sentence."},
        "threat": text,
        "data": text,
        "attacks": {"type": "array", "items": text},
        "clean": share,
        "robust": share,
        "until": {**text, "description": "The day on which the signature expires."},
        "why": text,
    }
    return _closed(
        {
            "model": text,
            "version": text,
            "ready": {"type": "boolean"},
            "labels": {"type": "array", "items": text},
            "image": _closed(dict.fromkeys(("height", "width", "channels"), count)),
            "limits": _closed(dict.fromkeys(("images", "bytes", "pixels"), count)),
            "logits": {"type": "boolean", "description": "Whether this key may see them."},
            "gate": _closed(gate),
        }
    )


def _input() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["name", "shape", "datatype", "data"],
        "properties": {
            "name": {"type": "string"},
            "shape": {"type": "array", "minItems": 4, "maxItems": 4, "items": {"type": "integer", "minimum": 1}},
            "datatype": {"const": "UINT8"},
            "data": {"type": "array"},
        },
    }


def _closed(properties: dict[str, Any], optional: set[str] | None = None) -> dict[str, Any]:
    """An object with these properties and no others."""
    required = [name for name in properties if name not in (optional or set())]
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}
