"""Several images in one request: in their order, each with its own fate, each charged."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfmcl.robustness.data import load_dataset
from dfmcl.serving.gateway import images
from dfmcl.serving.gateway.api_keys import digest_of
from dfmcl.serving.gateway.openapi import PICTURE
from dfmcl.serving.gateway.problems import OF_IMAGES, Problem
from tests.serving.doors import KEYS, PRIVILEGED, Door, encoded, opened, settings
from tests.serving.workshop import Served

DIGITS = load_dataset("digits").x_test[:4]
FILES = [encoded(image) for image in DIGITS]
LARGE = encoded(np.zeros((20, 20, 3), np.uint8))
JSON = {"Content_Type": "application/json"}
POOR = "dfmcl_of-a-poor-user"


@pytest.fixture(scope="module")
def door(served: Served) -> Iterator[Door]:
    poor = {"name": "poor", "sha256": digest_of(POOR), "images_per_second": 0.01, "burst_images": 5}
    with opened(settings([served.ready["grpc"]], keys=[*KEYS, poor])) as door:
        yield door


def listed(*files: bytes) -> bytes:
    return json.dumps({"images": [base64.b64encode(file).decode() for file in files]}).encode()


def form(*files: bytes, kind: str = "image/png") -> bytes:
    parts = [
        b'--edge\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n'
        b"Content-Type: " + kind.encode() + b"\r\n\r\n" + file + b"\r\n"
        for file in files
    ]
    return b"".join(parts) + b"--edge--\r\n"


FORM = {"Content_Type": "multipart/form-data; boundary=edge"}
WAYS = pytest.mark.parametrize(("made", "kind"), [(listed, JSON), (form, FORM)], ids=["json", "form"])


def singly(door: Door, file: bytes) -> dict[str, Any]:
    """What an image is answered when it comes alone."""
    answer = door.classify(file, query="?logits=true").json
    return {key: answer[key] for key in ("label", "index", "top", "logits")}


@WAYS
def test_answers_come_in_order_as_if_each_came_alone(door: Door, made: Any, kind: dict[str, str]) -> None:
    """The same figures as singly, position by position; what is no image has an error in its place."""
    answer = door.classify(made(FILES[0], b"no image", *FILES[1:], LARGE), query="?logits=true", **kind)
    assert answer.status == 200, answer.body
    assert set(answer.json) == {"predictions", "model", "version", "request_id"}
    first, broken, *others, large = answer.json["predictions"]
    for found, file in zip([first, *others], FILES, strict=True):
        expected = singly(door, file)
        np.testing.assert_allclose(found.pop("logits"), expected.pop("logits"), atol=1e-5)
        assert [row["index"] for row in found["top"]] == [row["index"] for row in expected["top"]]
        assert (found["label"], found["index"]) == (expected["label"], expected["index"])
    assert broken["error"]["reason"] == "bad_image"
    assert large["error"]["reason"] == "wrong_input"
    assert "20 x 20" in large["error"]["message"]
    resized = door.classify(made(LARGE, LARGE), query="?resize=true", **kind).json["predictions"]
    assert [set(found) for found in resized] == [{"label", "index", "top"}] * 2


def test_one_in_json_is_a_list_of_one_and_one_field_an_image(door: Door) -> None:
    """A list stays a list; a form with one image is answered as ever."""
    assert len(door.classify(listed(FILES[0]), **JSON).json["predictions"]) == 1
    assert "label" in door.classify(form(FILES[0]), **FORM).json
    unknown = door.classify(form(FILES[0], FILES[1], kind="image/gif"), **FORM).json["predictions"]
    assert [found["error"]["reason"] for found in unknown] == ["unsupported_type"] * 2


def test_each_image_is_charged_also_one_that_cannot_be_read(door: Door) -> None:
    """Five at once: three and three pass, as the first token lets any request in, and then nothing does."""
    for _ in range(2):
        assert door.classify(listed(FILES[0], b"no image", FILES[1]), key=POOR, **JSON).status == 200
    assert door.classify(FILES[0], key=POOR).reason == "rate_limited"


def test_where_none_can_be_seen_nothing_is_computed(door: Door) -> None:
    """An answer of errors, with the version that would have answered; the metrics say which."""
    computed, refused = "gateway_images_total", 'gateway_images_refused_total{reason="bad_image"}'
    before = door.metric(computed), door.metric(refused)
    answer = door.classify(listed(b"no image", b"nor this"), **JSON)
    assert (answer.status, answer.json["version"]) == (200, "1")
    assert [found["error"]["reason"] for found in answer.json["predictions"]] == ["bad_image"] * 2
    assert (door.metric(computed), door.metric(refused)) == (before[0], before[1] + 2)


@pytest.mark.parametrize(
    ("body", "status"),
    {
        "none": (b'{"images": []}', 400),
        "numbers": (b'{"images": [1, 2]}', 400),
        "not closed": (b'{"images": ["aGVsbG8="', 400),
        "closed twice": (b'{"images": ["aGVsbG8="]}]}', 400),
        "something more": (b'{"images": ["aGVsbG8="], "more": 1}', 400),
        "a data URL": (b'{"images": ["data:image/png;base64,aGVsbG8="]}', 400),
        "nested": (b'{"images": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        "65": (listed(*[b"x"] * 65), 413),
        "commas": (b'{"images": [' + b"," * 1_000_000 + b"]}", 413),
        "65 in a form": (form(*[b"x"] * 65), 413),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_list_is_refused_as_a_whole(door: Door, body: str, status: tuple[bytes, int]) -> None:
    """Before anything of it is decoded."""
    sent, expected = status
    answer = door.classify(sent, **(FORM if sent[:2] == b"--" else JSON))
    assert (answer.status, answer.reason) == (expected, {400: "bad_request", 413: "too_large"}[expected])


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=8), st.sampled_from([None, 2]), st.booleans())
def test_every_list_is_read_as_json_reads_it(files: list[bytes], indent: int | None, escaped: bool) -> None:
    """However it is spaced, and with slashes escaped as PHP writes them; the JSON parser is the oracle."""
    text = json.dumps({"images": [base64.b64encode(file).decode() for file in files]}, indent=indent)
    body = text.replace("/", "\\/").encode() if escaped else text.encode()
    assert json.loads(body)["images"] == [base64.b64encode(file).decode() for file in files]
    assert images.is_list(body)
    assert [file.data for file in images.listed_files(body, 8)] == files


@given(st.text(alphabet='[]{}",: \n\\aA1=/', max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Files, none, or a Problem: no other error; and whatever is taken is JSON of that form."""
    body = b'{"images": [' + text.encode()
    files = []
    with suppress(Problem):
        files = images.listed_files(body, 8)
    if files and all(file.data is not None for file in files):
        assert len(json.loads(body)["images"]) == len(files)


def test_example_of_the_document_is_an_image(door: Door) -> None:
    """What people copy works."""
    answer = door.classify(json.dumps({"images": [PICTURE]}).encode(), query="?resize=true", **JSON)
    assert set(answer.json["predictions"][0]) == {"label", "index", "top"}
    assert set(OF_IMAGES) < set(door.get("/openapi.json").json["components"]["schemas"]["Problem"]["properties"][
        "error"]["properties"]["reason"]["enum"])  # fmt: skip
    assert door.classify(FILES[0], key=PRIVILEGED).status == 200
