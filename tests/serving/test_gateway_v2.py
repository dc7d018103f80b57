"""KServe's protocol at the gateway: tritonclient.http, unchanged, asks it as it would ask Triton."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfmcl.robustness.data import load_dataset
from dfmcl.serving.clients.triton import Contract
from dfmcl.serving.gateway import v2
from dfmcl.serving.gateway.endpoints import Reply
from dfmcl.serving.gateway.problems import Problem
from dfmcl.serving.triton.environment import find_environment
from tests.serving.doors import KEY, PRIVILEGED, Door, opened, settings
from tests.serving.workshop import Served, onnx_logits

IMAGES = load_dataset("digits").x_test[:5]
CONTRACT = Contract("", "images", (16, 16, 3), "logits", 10, 64)
CLIENT = Path(__file__).with_name("v2_client.py")


@pytest.fixture(scope="module")
def door(served: Served) -> Iterator[Door]:
    with opened(settings([served.ready["grpc"]])) as door:
        yield door


def asked(address: str, key: str, tmp_path: Path) -> dict[str, Any]:
    """What Triton's own client for HTTP finds there."""
    np.save(tmp_path / "images.npy", IMAGES)
    command = [str(find_environment(None).python), str(CLIENT), address, "digits", key, str(tmp_path / "images.npy")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def test_tritons_own_client_hears_what_the_model_says(door: Door, candidate: Path, tmp_path: Path) -> None:
    """Logits by bytes and by JSON, classes, metadata, versions, readiness; and each refusal with its status."""
    found = asked(door.address.removeprefix("http://"), PRIVILEGED, tmp_path)
    expected = onnx_logits(candidate / "model.onnx", IMAGES)
    for name in ("binary", "json", "version", "no outputs"):
        np.testing.assert_allclose(found[name]["logits"], expected, atol=1e-5)
    version = found["metadata"]["versions"][0]
    assert {found[name]["about"]["model_version"] for name in ("binary", "json")} == {version}
    assert found["version"]["about"]["id"] == "question-7"
    order = np.argsort(-expected, axis=1)[:, :3]
    for name in ("classes", "classes in JSON"):
        rows = [[text.split(":") for text in row] for row in found[name]]
        assert [[int(place) for _, place, _ in row] for row in rows] == order.tolist()
        scores = [[float(score) for score, _, _ in row] for row in rows]
        np.testing.assert_allclose(scores, np.take_along_axis(expected, order, axis=1), atol=1e-4)
        assert all(label == place for row in rows for _, place, label in row)  # digits are called by their numbers
    for name in ("live", "ready", "model_ready", "other_ready"):
        assert found[name] == (name != "other_ready"), name
    metadata = found["metadata"]
    assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 16, 16, 3]}]
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]
    assert found["server"]["extensions"] == list(v2.EXTENSIONS)
    refused = {name: found[name] for name in ("another size", "another type", "too many", "another version")}
    assert [status for status, _ in refused.values()] == ["422", "422", "413", "404"]
    assert "the model takes 'images', UINT8, of shape [N, 16, 16, 3]" in refused["another size"][1]


def test_a_key_is_needed_and_its_rights_hold(door: Door) -> None:
    """No key: metadata and inference are refused in the protocol's words; without the right to logits, inference is."""
    entry = {"name": "images", "shape": [1, 16, 16, 3], "datatype": "UINT8", "data": IMAGES[0].ravel().tolist()}
    body = json.dumps({"inputs": [entry]})
    for key, status, words in ((None, 401, "key"), (KEY, 403, "may not see logits; /v1/classify answers without")):
        headers = {} if key is None else {"X-API-Key": key}
        refused = door.ask("POST", "/v2/models/digits/infer", body, headers)
        assert refused.status == status
        assert set(refused.json) == {"error"}
        assert words in refused.json["error"]
    assert door.get("/v2/models/digits").status == 401
    assert door.get("/v2/models/digits", **{"X-API-Key": KEY}).status == 200
    assert door.get("/v2/models/other/ready").status == 404
    assert door.get("/v2/models/digits/versions/9/ready").status == 404
    lines = [line for line in door.lines() if line["path"] == "/v2/models/digits/infer"]
    assert [(line["status"], line["reason"]) for line in lines[-2:]] == [(401, "unauthorized"), (403, "forbidden")]


def test_inferences_are_counted_as_classifications_are(door: Door) -> None:
    """Images, requests and the log's line: nobody gets round the figures, or the detector, by another route."""
    before = door.metric("gateway_images_total")
    entry = {"name": "images", "shape": [5, 16, 16, 3], "datatype": "UINT8", "data": IMAGES.ravel().tolist()}
    answer = door.ask("POST", "/v2/models/digits/infer", json.dumps({"inputs": [entry], "id": "a"}),
                      {"X-API-Key": PRIVILEGED})  # fmt: skip
    assert (answer.status, answer.json["id"], len(answer.json["outputs"][0]["data"])) == (200, "a", 50)
    (line,) = [line for line in door.lines()[-2:] if line["path"] == "/v2/models/digits/infer"]
    assert (line["key"], line["status"], line["version"]) == ("lab", 200, answer.json["model_version"])
    assert door.metric("gateway_images_total") == before + 5


def test_the_document_describes_every_route(door: Door) -> None:
    """Each operation of /v2 in /openapi.json, asked as its example asks but for the pixels, answers by its schema."""
    document, found = door.get("/openapi.json").json, set[str]()
    version = door.get("/v1/model", **{"X-API-Key": KEY}).json["version"]
    pixels = {"shape": [1, 16, 16, 3], "data": IMAGES[0].ravel().tolist()}
    for path, methods in document["paths"].items():
        for method, operation in methods.items() if path.startswith("/v2") else ():
            place = path.replace("{model}", "digits").replace("{version}", version)
            bodies: list[Any] = [None]
            if method == "post":
                examples = operation["requestBody"]["content"]["application/json"]["examples"].values()
                bodies = [one["value"] | {"inputs": [one["value"]["inputs"][0] | pixels]} for one in examples]
            keys = {"X-API-Key": PRIVILEGED} if operation.get("security") else {}
            for body in bodies:
                answer = door.ask(method.upper(), place, body and json.dumps(body), keys)
                content = operation["responses"][str(answer.status)]["content"]["application/json"]
                jsonschema.validate(answer.json, {**content["schema"], "components": document["components"]})
                assert answer.status == 200, answer.body
                found.add(f"{method} {path}")
            if keys:
                refused = door.ask(method.upper(), place, body and json.dumps(body), {})
                schema = operation["responses"][str(refused.status)]["content"]["application/json"]["schema"]
                jsonschema.validate(refused.json, {**schema, "components": document["components"]})
    places = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
    assert found == {
        *("get /v2", "get /v2/health/live", "get /v2/health/ready"),
        *(f"get {place}{end}" for place in places for end in ("", "/ready")),
        *(f"post {place}/infer" for place in places),
    }


def bodied(document: Any, data: bytes = b"") -> tuple[bytes, str]:
    head = json.dumps(document).encode()
    return head + data, str(len(head))


GOOD = {"name": "images", "shape": [1, 16, 16, 3], "datatype": "UINT8", "parameters": {"binary_data_size": 768}}


@pytest.mark.parametrize(
    ("document", "data", "reason"),
    [
        ({"inputs": [GOOD]}, b"x" * 767, "bad_request"),
        ({"inputs": [GOOD]}, b"x" * 769, "bad_request"),
        ({"inputs": [GOOD | {"shape": [2, 16, 16, 3]}]}, b"x" * 768, "bad_request"),
        ({"inputs": [GOOD | {"shape": "all"}]}, b"x" * 768, "bad_request"),
        ({"inputs": [GOOD | {"parameters": {"binary_data_size": True}}]}, b"x" * 768, "bad_request"),
        ({"inputs": [GOOD | {"parameters": [1]}]}, b"x" * 768, "bad_request"),
        ({"inputs": [GOOD, GOOD]}, b"x" * 768, "bad_request"),
        ({"inputs": [GOOD], "outputs": [{"name": "probabilities"}]}, b"x" * 768, "wrong_input"),
        ({"inputs": [GOOD], "outputs": "all"}, b"x" * 768, "bad_request"),
        ({"inputs": [GOOD], "outputs": [{"name": "logits", "parameters": {"classification": "3"}}]}, b"x" * 768,
         "bad_request"),
        ({"inputs": [GOOD], "parameters": 3}, b"x" * 768, "bad_request"),
        ({"inputs": [GOOD], "id": 3}, b"x" * 768, "bad_request"),
        ({"inputs": [GOOD | {"datatype": "FP32"}]}, b"x" * 768, "wrong_input"),
        ([], b"", "bad_request"),
        ("x", b"", "bad_request"),
    ],
)  # fmt: skip
def test_wrong_questions_are_told(document: Any, data: bytes, reason: str) -> None:
    """Each with a reason; never another exception."""
    body, length = bodied(document, data)
    with pytest.raises(Problem) as refused:
        v2.question(body, length, CONTRACT)
    assert refused.value.reason == reason


@given(st.binary(max_size=200), st.one_of(st.none(), st.text(max_size=6), st.integers(0, 220).map(str)))
def test_what_a_stranger_makes_up_is_a_problem(body: bytes, length: str | None) -> None:
    """Never another exception."""
    with pytest.raises(Problem) as refused:
        v2.question(body, length, CONTRACT)
    assert refused.value.reason in ("bad_request", "wrong_input", "too_large")


@given(st.integers(1, 4), st.integers(0, 12), st.booleans(), st.text(max_size=3))
def test_what_is_asked_in_bytes_is_answered_in_bytes(count: int, classes: int, binary: bool, told: str) -> None:
    """The parts that a body says it has are there, in the order of the logits or of the ranks."""
    images = np.arange(count * 768, dtype=np.uint8).reshape(count, 16, 16, 3)
    entry = GOOD | {"shape": [count, 16, 16, 3], "parameters": {"binary_data_size": images.size}}
    output = {"name": "logits", "parameters": {"binary_data": binary, "classification": classes}}
    body, length = bodied({"inputs": [entry], "outputs": [output], "id": told}, images.tobytes())
    asked = v2.question(body, length, CONTRACT)
    np.testing.assert_array_equal(asked.images, images)
    logits = np.random.default_rng(count).normal(size=(count, 10)).astype(np.float32)
    reply = Reply(logits, tuple(f"ä{number}" for number in range(10)), "7", "")
    data, headers = v2.answer(reply, asked, "digits", CONTRACT)
    head = int(headers.get(v2.HEADER_LENGTH, len(data)))
    document = json.loads(data[:head])
    (found,) = document["outputs"]
    assert (document.get("id", ""), found["shape"]) == (told, [count, min(classes, 10) or 10])
    if not classes:
        values = np.frombuffer(data[head:], "<f4") if binary else np.array(found["data"], np.float32)
        np.testing.assert_array_equal(values.reshape(count, 10), logits)
        return
    texts, rest = list[str](), data[head:]
    while binary and rest:
        size = int.from_bytes(rest[:4], "little")
        texts, rest = [*texts, rest[4 : 4 + size].decode()], rest[4 + size :]
    ranked = [text.split(":") for text in (texts if binary else found["data"])]
    places = np.array([int(entry[1]) for entry in ranked]).reshape(count, -1)
    np.testing.assert_array_equal(places, np.argsort(-logits, axis=1)[:, : places.shape[1]])
    assert all(entry[2] == f"ä{entry[1]}" for entry in ranked)
