"""The gateway before a real Triton: its answers, its refusals, and its words about itself."""

from __future__ import annotations

import io
import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2

from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.folder import read_image
from dfmcl.serving.clients.triton import Contract
from dfmcl.serving.gateway import images
from dfmcl.serving.gateway.api_keys import Bucket, digest_of
from dfmcl.serving.gateway.exchange import softmax
from dfmcl.serving.gateway.listener import affordable, bind
from dfmcl.serving.gateway.metrics import OUTCOMES
from dfmcl.serving.gateway.problems import STATUSES, Problem
from tests.common.pictures import readable, unreadable
from tests.processes import wait_until
from tests.serving.doors import CANARY, KEY, KEYS, PRIVILEGED, Door, Relay, encoded, opened, settings
from tests.serving.workshop import ROOT, Served, onnx_logits

IMAGES = load_dataset("digits").x_test[:8]
PNG = encoded(IMAGES[0])
LOGITS = "?logits=true"


@pytest.fixture(scope="module")
def door(served: Served) -> Iterator[Door]:
    """One gateway for all tests that only ask it questions."""
    with opened(settings([served.ready["grpc"]], limits={"body_bytes": 300_000, "pixels": 1_000_000})) as door:
        yield door


def tensor(data: object, shape: Sequence[object], **changes: object) -> bytes:
    entry = {"name": "images", "shape": shape, "datatype": "UINT8", "data": data}
    return json.dumps({"inputs": [entry | changes]}).encode()


def assert_answers(found: dict[str, Any], image: np.ndarray, candidate: Path) -> None:
    """An answer says about one image what ONNX Runtime computes of the same pixels."""
    logits = onnx_logits(candidate / "model.onnx", image[None])
    shares = softmax(logits)[0]
    np.testing.assert_allclose(found["logits"], logits[0], atol=1e-5)
    assert found["index"] == logits[0].argmax()
    assert found["label"] == str(found["index"])
    assert [row["index"] for row in found["top"]] == np.argsort(-logits[0])[:5].tolist()
    for row in found["top"]:
        assert row["probability"] == pytest.approx(shares[row["index"]], abs=0.51e-4)
        assert row["probability"] == round(row["probability"], 4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("told", [True, False], ids=["told", "sniffed"])
def test_image_file_is_answered_as_onnx_runtime_does(door: Door, candidate: Path, kind: str, told: bool) -> None:
    """Whether or not the request says what it is; JPEG loses something, so the oracle sees what Pillow decodes."""
    body = encoded(IMAGES[1], kind)
    answer = door.classify(body, query=LOGITS, **({"Content_Type": f"image/{kind.lower()}"} if told else {}))
    assert answer.status == 200, answer.body
    assert_answers(answer.json, np.asarray(Image.open(io.BytesIO(body)).convert("RGB")), candidate)
    assert (answer.json["model"], answer.json["version"]) == ("digits", "1")
    assert answer.json["request_id"] == answer.headers["x-request-id"]


def test_form_is_answered_like_its_image(door: Door, candidate: Path) -> None:
    """As a browser's form or `curl -F image=@file` sends it."""
    body = b"\r\n".join(
        [
            b"--edge",
            b'Content-Disposition: form-data; name="note"',
            b"",
            b"hello",
            b"--edge",
            b'Content-Disposition: form-data; name="image"; filename="a.png"',
            b"Content-Type: image/png",
            b"",
            PNG,
            b"--edge--",
            b"",
        ]
    )
    kind = "multipart/form-data; boundary=edge"
    answer = door.classify(body, query=LOGITS, Content_Type=kind)
    assert_answers(answer.json, IMAGES[0], candidate)
    assert door.classify(body[:-40], Content_Type=kind).reason == "bad_request"
    assert door.classify(body.replace(b'"image"', b'"photo"'), Content_Type=kind).reason == "bad_request"


@pytest.mark.parametrize("nested", [False, True])
def test_tensor_is_answered_image_by_image(door: Door, candidate: Path, nested: bool) -> None:
    """A KServe v2 request, its data flat or nested, gives one prediction per image, in order."""
    data = IMAGES.tolist() if nested else IMAGES.reshape(-1).tolist()
    answer = door.classify(tensor(data, list(IMAGES.shape)), query=LOGITS, Content_Type="application/json")
    assert answer.status == 200, answer.body
    assert len(answer.json["predictions"]) == len(IMAGES)
    for found, image in zip(answer.json["predictions"], IMAGES, strict=True):
        assert_answers(found, image, candidate)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_kind_of_pixel_becomes_rgb(door: Door, candidate: Path, mode: str) -> None:
    """Grey, palette and whole alpha are answered as Pillow's conversion of them is."""
    image, file = Image.fromarray(IMAGES[2]).convert(mode), io.BytesIO()
    image.save(file, "JPEG" if mode == "CMYK" else "PNG")
    expected = np.asarray(Image.open(file).convert("RGB"))
    assert_answers(door.classify(file.getvalue(), query=LOGITS).json, expected, candidate)


def test_orientation_is_applied(door: Door, candidate: Path) -> None:
    """A picture that lies on its side, and says so, is answered upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    answer = door.classify(encoded(np.rot90(IMAGES[3]).copy(), exif=exif.tobytes()), query=LOGITS)
    assert_answers(answer.json, IMAGES[3], candidate)


def test_other_size_is_resized_only_on_request(door: Door, candidate: Path, tmp_path: Path) -> None:
    """Without a word it is refused, and both sizes are named; with resize=true its middle is what training sees."""
    large = np.asarray(Image.fromarray(IMAGES[4]).resize((400, 300), Image.Resampling.NEAREST))
    body = encoded(large)
    refused = door.classify(body)
    assert (refused.status, refused.reason) == (422, "wrong_input")
    assert {"400 x 300", "16 x 16"} <= set(re.findall(r"\d+ x \d+", refused.json["error"]["message"]))
    (tmp_path / "large.png").write_bytes(body)
    expected = read_image(str(tmp_path / "large.png"), 16)
    assert_answers(door.classify(body, query="?resize=true&logits=true").json, expected, candidate)


@pytest.mark.parametrize("name", ["EXIF 6 JPEG", "RGBA", "palette with alpha", "CMYK JPEG", "wide"])
def test_an_odd_file_is_answered_as_training_sees_it(door: Door, candidate: Path, tmp_path: Path, name: str) -> None:
    """Through the door: turned, on white, its middle; tests/common/test_pictures.py has all the files."""
    body = readable()[name]
    (tmp_path / "odd.png").write_bytes(body)
    expected = read_image(str(tmp_path / "odd.png"), 16)
    assert_answers(door.classify(body, query="?resize=true&logits=true").json, expected, candidate)


def test_image_on_its_side_fits_only_if_it_says_so() -> None:
    """For a model that takes 16 x 24 pixels, 24 x 16 of them are another size, unless EXIF turns them."""
    contract, lying = Contract("", "images", (24, 16, 3), "logits", 10, 64), np.zeros((16, 24, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for file, fits in ((encoded(lying), False), (encoded(lying, exif=exif.tobytes()), True)):
        image = images.open_image(file, "", 1000)
        images.require_size(image, contract)
        if fits:
            assert images.pixels(image, contract, resize=False).shape == (1, 24, 16, 3)
        else:
            with pytest.raises(Problem, match="24 x 16 pixels, the model takes 16 x 24"):
                images.pixels(image, contract, resize=False)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is huge; its data would not even have to follow."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def sixteen_bit() -> bytes:
    return encoded(np.full((16, 16), 40_000, np.uint16))


FLAT = IMAGES[:1].reshape(-1).tolist()
SHAPE = [1, 16, 16, 3]
JSON = {"Content-Type": "application/json"}
BAD: dict[str, tuple[bytes, str, dict[str, str], int, str]] = {
    "nothing": (b"", "", {}, 400, "bad_image"),
    "text": (b"hello", "", {}, 400, "bad_image"),
    "cut off": (PNG[: len(PNG) // 2], "", {}, 400, "bad_image"),
    "cut off webp": (encoded(IMAGES[0], "WEBP")[:-30], "", {}, 400, "bad_image"),
    "another than it says": (PNG, "", {"Content-Type": "image/jpeg"}, 400, "bad_image"),
    "gif": (encoded(IMAGES[0], "GIF"), "", {}, 400, "bad_image"),
    "bomb": (bomb(60_000, 60_000), "?resize=true", {}, 413, "too_large"),
    "small bomb": (bomb(1_001, 1_000), "?resize=true", {}, 413, "too_large"),
    "16 bit": (sixteen_bit(), "", {}, 422, "wrong_input"),
    "16 bit colour": (unreadable()["16-bit RGB"][0], "?resize=true", {}, 422, "wrong_input"),
    "animated": (unreadable()["animated WebP"][0], "?resize=true", {}, 422, "wrong_input"),
    "pdf": (b"%PDF", "", {"Content-Type": "application/pdf"}, 415, "unsupported_type"),
    "compressed": (PNG, "", {"Content-Encoding": "gzip"}, 415, "unsupported_type"),
    "flag": (PNG, "?resize=yes", {}, 400, "bad_request"),
    "parameter": (PNG, "?resise=true", {}, 400, "bad_request"),
    "timeout 0": (PNG, "", {"X-Request-Timeout-Ms": "0"}, 400, "bad_request"),
    "timeout word": (PNG, "", {"X-Request-Timeout-Ms": "soon"}, 400, "bad_request"),
    "form without boundary": (PNG, "", {"Content-Type": "multipart/form-data"}, 400, "bad_request"),
    "no json": (b"{", "", JSON, 400, "bad_request"),
    "deep json": (b"[" * 100_000, "", JSON, 400, "bad_request"),
    "json of another kind": (b"[1]", "", JSON, 400, "bad_request"),
    "no inputs": (b'{"inputs": []}', "", JSON, 400, "bad_request"),
    "shape": (tensor(FLAT, [1, 3, 16, 16]), "", JSON, 422, "wrong_input"),
    "no images": (tensor([], [0, 16, 16, 3]), "", JSON, 422, "wrong_input"),
    "shape of text": (tensor(FLAT, ["1", 16, 16, 3]), "", JSON, 400, "bad_request"),
    "name": (tensor(FLAT, SHAPE, name="pictures"), "", JSON, 422, "wrong_input"),
    "datatype": (tensor(FLAT, SHAPE, datatype="FP32"), "", JSON, 422, "wrong_input"),
    "too few numbers": (tensor(FLAT[:-1], SHAPE), "", JSON, 400, "bad_request"),
    "256": (tensor([*FLAT[:-1], 256], SHAPE), "", JSON, 400, "bad_request"),
    "-1": (tensor([*FLAT[:-1], -1], SHAPE), "", JSON, 400, "bad_request"),
    "a huge number": (tensor([*FLAT[:-1], 10**40], SHAPE), "", JSON, 400, "bad_request"),
    "half a number": (tensor([*FLAT[:-1], 0.5], SHAPE), "", JSON, 400, "bad_request"),
    "a word": (tensor([*FLAT[:-1], "a"], SHAPE), "", JSON, 400, "bad_request"),
    "a count": (tensor(768, SHAPE), "", JSON, 400, "bad_request"),
    "too many images": (tensor([], [65, 16, 16, 3]), "", JSON, 413, "too_large"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_refused_with_its_reason(door: Door, case: str) -> None:
    """Status, reason and one line that says what is wrong; and the next good request is answered."""
    body, query, headers, status, reason = BAD[case]
    answer = door.classify(body, query=query, **{name.replace("-", "_"): value for name, value in headers.items()})
    assert (answer.status, answer.reason) == (status, reason), answer.body
    assert "\n" not in answer.json["error"]["message"]
    assert answer.json["error"]["request_id"] == answer.headers["x-request-id"]
    assert door.classify(PNG).status == 200


CONTRACT = Contract("digits", "images", (16, 16, 3), "logits", 10, 64)
MANY = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("nested", [False, True])
def test_a_large_tensor_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch, nested: bool, indent: int | None) -> None:
    """However it is written, and wherever its data stand: json.loads, which lets nobody else run, gets a bit a time."""
    sizes, loads = list[int](), json.loads
    monkeypatch.setattr(
        "dfmcl.serving.gateway.images.json.loads", lambda text: (sizes.append(len(text)), loads(text))[1]
    )
    entry = {"data": MANY.tolist() if nested else MANY.ravel().tolist(), "shape": MANY.shape, "parameters": {"x": [1]}}
    for about in (entry, dict(reversed(entry.items()))):
        body = json.dumps({"inputs": [about | {"name": "images", "datatype": "UINT8"}]}, indent=indent).encode()
        np.testing.assert_array_equal(images.tensor(body, CONTRACT), MANY)
    assert max(sizes) < 2 * images.PIECE


@pytest.mark.parametrize("wrong", ["256", "-1", "1.5", "1e1", "01", "", "[1", "1]", "[1]]", '"1"', "null", "1 1", "{}"])
@pytest.mark.parametrize("place", [0, 20_000, 49_151])
def test_one_wrong_number_spoils_a_large_tensor(wrong: str, place: int) -> None:
    """Wherever it stands; and a large body of anything else is refused unread."""
    texts = list(map(str, MANY.ravel().tolist()))
    texts[place] = wrong
    body = tensor("DATA", list(MANY.shape)).replace(b'"DATA"', f"[{', '.join(texts)}]".encode())
    with pytest.raises(Problem) as caught:
        images.tensor(body, CONTRACT)
    assert caught.value.reason == "bad_request"


def test_a_large_body_of_something_else_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of objects would hold up everybody for as long as many answers take."""
    monkeypatch.setattr("dfmcl.serving.gateway.images.json.loads", lambda text: pytest.fail("read"))
    for body in (b'{"inputs": [' + b"{}," * 300_000 + b"{}]}", tensor([{}] * 300_000, SHAPE), b"[" * 1_000_000):
        with pytest.raises(Problem, match="expected"):
            images.tensor(body, CONTRACT)


def test_strings_in_a_tensor_cost_nothing(door: Door) -> None:
    """One long string among many short ones, as numpy would pad each of them to the longest."""
    body = tensor(["x" * 100_000, *[""] * 40_000], SHAPE)
    begun = time.monotonic()
    assert door.classify(body, Content_Type="application/json").reason == "bad_request"
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("given", [None, "", "dfmcl_wrong", KEY[:-1], f"{KEY}x", "ü", digest_of(KEY)])
def test_wrong_key_is_refused(door: Door, given: str | None) -> None:
    """None, another, a part of one, more than one, and its digest, which the configuration shows."""
    headers = {} if given is None else {"Authorization": f"Bearer {given}"}
    answer = door.ask("POST", "/v1/classify", PNG, headers)
    assert (answer.status, answer.reason) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_key_goes_in_either_header(door: Door) -> None:
    """Authorization: Bearer, however it is written, or X-API-Key; Basic is no way."""
    for headers, status in (
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer {KEY}"}, 200),
        ({"X-API-Key": KEY}, 200),
        ({"Authorization": f"Basic {KEY}"}, 401),
    ):
        assert door.ask("POST", "/v1/classify", PNG, headers).status == status


def test_logits_are_for_those_who_may(door: Door) -> None:
    """Another key gets 403; and nobody gets them without asking."""
    assert door.classify(PNG, key=KEY, query=LOGITS).reason == "forbidden"
    assert door.classify(PNG, key=KEY, query=LOGITS).status == 403
    assert "logits" not in door.classify(PNG, key=KEY).json
    assert "logits" not in door.classify(PNG, key=PRIVILEGED).json


def test_request_id_comes_back(door: Door) -> None:
    """A sane one is kept; anything else is replaced."""
    assert door.classify(PNG, X_Request_Id="order-17.a").headers["x-request-id"] == "order-17.a"
    for insane in ("", "a b", "x" * 65, "../etc", "ü"):
        made = door.classify(PNG, X_Request_Id=insane).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", made)
    assert "x-request-id" in door.get("/nowhere").headers


def test_paths_and_methods(door: Door) -> None:
    """What is not there is 404, what is called wrongly 405, in the same form as every other problem, counted and logged
    with the path, the method and the client's address."""
    before = {reason: errors(door, reason) for reason in ("not_found", "method_not_allowed")}
    assert (door.get("/nowhere").status, door.get("/nowhere").reason) == (404, "not_found")
    wrong = door.get("/v1/classify")
    assert (wrong.status, wrong.reason, wrong.headers["allow"]) == (405, "method_not_allowed", "POST")
    assert door.ask("POST", "/metrics").status == 405
    assert door.get("/healthz").status == 200
    assert {reason: errors(door, reason) - had for reason, had in before.items()} == {
        "not_found": 2,
        "method_not_allowed": 2,
    }
    lines = [(line["client"], line["method"], line["path"], line["reason"]) for line in door.lines()[-4:]]
    assert lines == [
        *[("127.0.0.1", "GET", "/nowhere", "not_found")] * 2,
        ("127.0.0.1", "GET", "/v1/classify", "method_not_allowed"),
        ("127.0.0.1", "POST", "/metrics", "method_not_allowed"),
    ]


def errors(door: Door, reason: str) -> float:
    return door.metric(f'gateway_errors_total{{reason="{reason}"}}')


def test_path_of_a_stranger_is_cut_and_has_no_secret(door: Door) -> None:
    """Its query is not in the log at all; a key in it is not; control characters are not raw."""
    for path in (f"/v1/{KEY}/classify", f"/{'x' * 5000}", "/a%1b[31m%0aevent", "/a?key=secret"):
        door.get(path)
    found = [line["path"] for line in door.lines()[-4:]]
    assert found[0] == "/v1/dfmcl_.../classify"
    assert len(found[1]) == 128
    assert found[2:] == ["/a\x1b[31m\nevent", "/a"]
    assert "\\u001b" in json.dumps(found[2])


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"hello\r\n\r\n", "bad_request"),
        (b"GET / HTTP/9.9\r\n\r\n", "bad_request"),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000, "bad_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "bad_request"),  # TLS, where none is spoken
    ],
    ids=["no HTTP", "another version", "endless headers", "TLS"],
)
def test_what_is_no_request_is_counted_and_logged(door: Door, sent: bytes, reason: str) -> None:
    """Although there is no method, and no path that could be believed."""
    before = errors(door, reason)
    with socket.create_connection(("127.0.0.1", door.port), timeout=10) as sock:
        sock.sendall(sent)
        assert sock.recv(65536)[9:12] == b"400"
    assert errors(door, reason) == before + 1
    last = door.lines()[-1]
    assert (last["client"], last["method"], last["path"], last["reason"]) == ("127.0.0.1", None, None, reason)


@pytest.mark.parametrize("kind", [*images.TYPES, "IMAGE/JPEG", "image/jpeg; charset=binary", "Image/JPG;q=1"])
def test_every_type_of_the_list_works(door: Door, kind: str) -> None:
    """The list in the refusal is what is taken, however it is written, and what is taken is in the list."""
    bare = images.media_type(kind)
    body, extra = encoded(IMAGES[0], images.FORMATS.get(bare, "PNG")), ""
    if bare == images.TENSOR:
        body = tensor(FLAT, SHAPE)
    if bare == images.FORM:
        extra = "; boundary=edge"
        head = b'--edge\r\nContent-Disposition: form-data; name="image"\r\nContent-Type: image/jpg\r\n\r\n'
        body = head + encoded(IMAGES[0], "JPEG") + b"\r\n--edge--\r\n"
    assert door.classify(body, Content_Type=kind + extra).status == 200
    refused = door.classify(body, Content_Type="image/gif")
    assert (refused.status, refused.reason) == (415, "unsupported_type")
    assert bare in refused.json["error"]["message"]
    assert bare in json.loads(door.get("/openapi.json").body)["paths"]["/v1/classify"]["post"]["requestBody"]["content"]


def test_too_large_body_is_refused_before_it_is_read(door: Door) -> None:
    """By what Content-Length says, when not one byte of it has come."""
    connection = door.connection()
    connection.putrequest("POST", "/v1/classify")
    connection.putheader("X-API-Key", KEY)
    connection.putheader("Content-Length", "300001")
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_too_large_body_is_refused_while_it_comes(door: Door) -> None:
    """Chunked, it says nothing in advance; no more than the limit is kept, and the connection ends in time."""
    connection = door.connection()
    pieces = (b"x" * 50_000 for _ in range(7))
    connection.request("POST", "/v1/classify", pieces, {"X-API-Key": KEY}, encode_chunked=True)
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["reason"]) == (413, "too_large")
    connection.close()
    last = door.lines()[-1]
    assert 300_000 < last["bytes"] <= 300_000 + 2 * 65_536


def test_rate_is_kept(served: Served) -> None:
    """The burst is answered, then 429 says when to come back, and then there is an answer again."""
    keys = [KEYS[0] | {"images_per_second": 5.0, "burst_images": 3}, KEYS[1]]
    with opened(settings([served.ready["grpc"]], keys=keys)) as door:
        answers = [door.classify(PNG, key=KEY) for _ in range(5)]
        assert [answer.status for answer in answers][:3] == [200, 200, 200]
        assert (answers[-1].status, answers[-1].reason) == (429, "rate_limited")
        assert door.classify(PNG, key=PRIVILEGED).status == 200  # one key's haste is not another's
        time.sleep(int(answers[-1].headers["retry-after"]))  # what the answer tells a client
        assert door.classify(PNG, key=KEY).status == 200


def test_rate_counts_images(served: Served) -> None:
    """A batch costs as many as it holds, whatever its headers made of it; one more than there is passes, then it waits.

    What is refused costs one, however much it promised.
    """
    keys = [KEYS[0] | {"images_per_second": 2.0, "burst_images": 20}, KEYS[1]]
    batch, flat = tensor(IMAGES.tolist(), list(IMAGES.shape)), {"Content_Type": "application/json"}
    with opened(settings([served.ready["grpc"]], keys=keys)) as door:
        assert [door.classify(batch, key=KEY, **flat).status for _ in range(3)] == [200, 200, 200]  # 24 images
        refused = door.classify(PNG, key=KEY)
        assert (refused.status, refused.reason) == (429, "rate_limited")
        assert 1 <= int(refused.headers["retry-after"]) <= 3  # for 4 to be paid, and one
        assert door.classify(PNG, key=PRIVILEGED).status == 200
    with opened(settings([served.ready["grpc"]], keys=keys)) as door:
        padded = b" " * 200_000 + b"{"  # promises a whole batch, and is none
        assert [door.classify(padded, key=KEY, **flat).status for _ in range(15)] == [400] * 15
        assert door.classify(PNG, key=KEY).status == 200


@hypothesis.given(
    rate=st.floats(0.1, 100),
    burst=st.integers(1, 50),
    waits=st.lists(st.tuples(st.floats(0, 3), st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=200),
)
def test_bucket_never_gives_more_than_it_has(rate: float, burst: int, waits: list[tuple[float, int, int]]) -> None:
    """Whenever it is asked, but for what one request holds; after the seconds that it names there is a token; a long
    rest fills it, no more. Each takes what it promised, and is then charged for what it held."""
    now, taken = 0.0, 0
    bucket = Bucket(rate, burst, lambda: now)
    for wait, promised, held in waits:
        now += wait
        pause = bucket.take(promised)
        if pause == 0:
            bucket.correct(held - promised)
            taken += held
            assert taken <= burst + rate * now + held + 1e-6
    if pause:
        now += pause + 1e-9
        assert bucket.take() == 0
    now += 1e6
    assert sum(bucket.take() == 0 for _ in range(burst + 5)) == burst


def test_deadline_is_kept_and_passed_on(served: Served) -> None:
    """A Triton that does not answer costs the deadline, not more; a longer one than allowed is cut to that."""
    with Relay(served.ready["grpc"]) as relay:
        config = settings([relay.url], triton={"check_seconds": 60}, limits={"timeout_ms": 300, "max_timeout_ms": 600})
        with opened(config) as door:
            relay.freeze()
            for headers, least, most in (({}, 0.29, 0.55), ({"X_Request_Timeout_Ms": "999999"}, 0.59, 0.9)):
                begun = time.monotonic()
                answer = door.classify(PNG, **headers)
                assert (answer.status, answer.reason) == (504, "deadline")
                assert least < time.monotonic() - begun < most
            relay.thaw()
            assert door.classify(PNG).status == 200


def test_flood_is_turned_away_at_once(served: Served) -> None:
    """With all places taken a request is told to come back; when there is room again, it is answered."""
    with Relay(served.ready["grpc"]) as relay:
        config = settings([relay.url], triton={"check_seconds": 60}, limits={"concurrency": 4})
        with opened(config) as door:
            relay.freeze()
            with ThreadPoolExecutor(4) as others:
                waiting = [others.submit(door.classify, PNG) for _ in range(4)]
                while door.metric("gateway_in_flight") < 4:
                    time.sleep(0.01)  # seen in its metrics only
                begun = time.monotonic()
                answers = [door.classify(PNG) for _ in range(20)]
                assert time.monotonic() - begun < 1
                assert {(answer.status, answer.reason) for answer in answers} == {(503, "overloaded")}
                assert answers[0].headers["retry-after"] == "1"
                relay.thaw()
                assert {future.result().status for future in waiting} == {200}
            assert door.classify(PNG).status == 200
            assert door.metric("gateway_in_flight") == 0


def test_large_images_hold_up_nobody_else(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for each other where there is one decoder; small ones and the rest of the gateway do not wait."""
    done, decode = threading.Event(), images.pixels

    def slowly(image: Image.Image, *arguments: Any, **options: Any) -> np.ndarray:
        assert image.width == 16 or done.wait(20)
        return decode(image, *arguments, **options)

    monkeypatch.setattr(images, "pixels", slowly)
    large = encoded(np.asarray(Image.fromarray(IMAGES[0]).resize((500, 500))))
    with opened(settings([served.ready["grpc"]], limits={"decoders": 1})) as door, ThreadPoolExecutor(2) as clients:
        late = [
            clients.submit(door.classify, large, query="?resize=true", X_Request_Timeout_Ms="10000") for _ in range(2)
        ]
        while door.metric("gateway_in_flight") < 2:
            time.sleep(0.01)  # seen in its metrics only
        assert door.classify(PNG).status == 200
        done.set()
        assert [future.result().status for future in late] == [200, 200]


def send_on(sock: socket.socket, seconds: float) -> None:
    """Bytes that nobody asked for, for so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        sock.sendall(b"x" * 1000)
        time.sleep(0.01)  # a slow client


def test_slow_clients_are_let_go(served: Served) -> None:
    """A client that takes too long over headers or body, sends nothing, or sends on after a refusal, is cut off."""
    with opened(settings([served.ready["grpc"]], limits={"read_seconds": 0.3})) as door:
        head = f"POST /v1/classify HTTP/1.1\r\nHost: a\r\nX-API-Key: {KEY}\r\n"
        for sent, status in (
            (head, b"408"),  # no end of headers
            (f"{head}Content-Length: 99\r\n\r\nabc", b"408"),
            ("", b""),  # a browser that only made a connection is owed nothing
        ):
            connection = door.connection()
            connection.connect()
            begun = time.monotonic()
            connection.sock.sendall(sent.encode())
            received = connection.sock.makefile("rb").read()  # ends when the server closes
            assert received[9:12] == status
            assert 0.25 < time.monotonic() - begun < 1.5
            connection.close()
        connection = door.connection()
        connection.connect()
        connection.sock.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999\r\n\r\n")
        assert connection.sock.recv(65536)[9:12] == b"401"
        begun = time.monotonic()
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            send_on(connection.sock, 3)
        assert door.classify(PNG).status == 200
        reasons = [line["reason"] for line in door.lines()]
        assert reasons.count("slow_client") == 2  # one of them before there was a request
        assert door.metric('gateway_errors_total{reason="slow_client"}') == 2


def test_slow_sender_within_the_limit_is_answered(served: Served) -> None:
    """Piece by piece, but in time: its slowness is taken neither from the deadline nor for our latency."""
    with opened(settings([served.ready["grpc"]], limits={"read_seconds": 9, "timeout_ms": 800})) as door:
        connection = door.connection()

        def pieces() -> Iterator[bytes]:
            for start in range(0, len(PNG), 50):
                time.sleep(0.1)  # a slow client
                yield PNG[start : start + 50]

        headers = {"X-API-Key": KEY, "Content-Length": str(len(PNG))}
        assert door.ask("POST", "/v1/classify", pieces(), headers, connection).status == 200
        connection.close()
        assert door.lines()[-1]["ms"] > 900
        assert door.metric('gateway_request_duration_seconds_sum{outcome="ok"}') < 0.8


def test_client_that_leaves_is_no_failure_of_ours(served: Served) -> None:
    """Half a body and then nothing: it is counted as what it is, and its place is free again."""
    with opened(settings([served.ready["grpc"]], limits={"concurrency": 1})) as door:
        connection = door.connection()
        connection.connect()
        connection.sock.sendall(
            f"POST /v1/classify HTTP/1.1\r\nHost: a\r\nX-API-Key: {KEY}\r\nContent-Length: 99\r\n\r\nhalf".encode()
        )
        wait_until(lambda: door.metric("gateway_in_flight") == 1, seconds=5)
        connection.close()
        wait_until(lambda: door.metric("gateway_in_flight") == 0, seconds=5)
        assert (door.lines()[-1]["reason"], door.lines()[-1]["bytes"]) == ("client_left", 4)
        assert door.metric('gateway_request_duration_seconds_count{outcome="failed"}') == 0
        assert door.classify(PNG).status == 200


def test_connections_and_headers_are_bounded(served: Served) -> None:
    """One connection too many is told so; endless headers end."""
    with opened(settings([served.ready["grpc"]], limits={"connections": 5})) as door:
        held = [door.connection() for _ in range(5)]
        for connection in held:
            connection.connect()
        time.sleep(0.1)  # connections reach it one by one
        assert door.get("/healthz").reason == "overloaded"
        for connection in held:
            connection.close()
        deadline = time.monotonic() + 5
        while door.get("/healthz").status != 200:
            assert time.monotonic() < deadline
        connection = door.connection()
        connection.connect()
        connection.sock.sendall(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000)
        assert connection.sock.recv(65536)[9:12] == b"400"
        connection.close()


def test_half_sent_requests_keep_no_probe_waiting(served: Served) -> None:
    """More of them than there are connections: the admin address answers probes and scrapes at once all the same."""
    listen, limits = {"admin": "127.0.0.1:0"}, {"connections": 300, "read_seconds": 20}
    with opened(settings([served.ready["grpc"]], listen=listen, limits=limits)) as door, ExitStack() as held:
        head = b"POST /v1/classify HTTP/1.1\r\nHost: a\r\n"
        for _ in range(310):
            sock = held.enter_context(socket.create_connection(("127.0.0.1", door.port), timeout=10))
            sock.sendall(head)
        admin = door.administration()
        wait_until(lambda: admin.metric('gateway_errors_total{reason="overloaded"}') == 10, seconds=10)
        begun = time.monotonic()
        for path in ("/healthz", "/readyz", "/metrics"):
            assert admin.get(path).status == 200
        assert time.monotonic() - begun < 2
        assert door.get("/healthz").reason == "overloaded"


def test_metrics_are_at_the_admin_address_alone(served: Served) -> None:
    """Where there is one: without a key there, and not at the public one, nor in its description; no more than that."""
    config = settings([served.ready["grpc"]], listen={"admin": "127.0.0.1:0", "public_metrics": False})
    with opened(config) as door:
        admin = door.administration()
        assert {path: door.get(path).status for path in ("/metrics", "/healthz", "/readyz")} == {
            "/metrics": 404,
            "/healthz": 200,
            "/readyz": 200,
        }
        assert "/metrics" not in json.loads(door.get("/openapi.json").body)["paths"]
        assert admin.get("/metrics").status == 200
        assert {admin.get(path).status for path in ("/", "/docs", "/openapi.json")} == {404}
        assert admin.classify(PNG).status == 404


def test_as_many_connections_as_files_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is raised as far as it goes; where that is not enough there are fewer connections, not errors."""
    set_to = []
    monkeypatch.setattr("resource.setrlimit", lambda kind, limits: set_to.append(limits))
    for limits, wanted, afforded in (
        ((1024, 20_000), 1000, 1000),
        ((1024, 1024), 1000, 512),
        ((9000, 9000), 1000, 1000),
    ):
        monkeypatch.setattr("resource.getrlimit", lambda kind, limits=limits: limits)
        assert affordable(wanted) == afforded
    assert set_to == [(1512, 20_000), (1024, 1024)]


def test_no_triton_is_503_and_the_process_lives(served: Served) -> None:
    """/healthz speaks of the process, /readyz of the way to an answer; a request is told at once."""
    with Relay("127.0.0.1:9") as nowhere:
        nowhere.break_off()
        with opened(settings([nowhere.url]), ready=False) as door:
            assert (door.get("/healthz").status, door.get("/readyz").status) == (200, 503)
            begun = time.monotonic()
            answer = door.classify(PNG)
            assert (answer.status, answer.reason, answer.headers["retry-after"]) == (503, "unavailable", "1")
            assert time.monotonic() - begun < 1
            assert nowhere.url not in answer.body.decode()  # where servers are is nobody's business
            assert door.metric(f'gateway_endpoint_up{{endpoint="{nowhere.url}"}}') == 0
            assert door.metric("gateway_ready") == 0


def test_canary_counts_apart(served: Served) -> None:
    """Its answers and its errors are in metrics of their own, and change none of the users'."""
    with opened(settings([served.ready["grpc"]])) as door:

        def business() -> list[str]:
            text = door.get("/metrics").body.decode()
            return re.findall(r"^gateway_(?:request|errors|images).*", text, flags=re.MULTILINE)

        before = business()
        assert door.classify(PNG, key=CANARY).status == 200
        assert door.classify(b"junk", key=CANARY).status == 400
        assert business() == before
        assert door.metric('gateway_canary_requests_total{outcome="ok"}') == 1
        assert door.metric('gateway_canary_requests_total{outcome="refused"}') == 1
        assert door.metric('gateway_canary_errors_total{reason="bad_image"}') == 1
        assert door.classify(PNG).status == 200
        assert business() != before
        assert door.metric("gateway_images_total") == 1


def test_canary_gives_way_and_deadlines_are_passed_on(served: Served) -> None:
    """What reaches Triton: priority 2 with the canary's key and none with a user's; and each request's own timeout."""
    with Relay(served.ready["grpc"]) as relay, opened(settings([relay.url], triton={"check_seconds": 60})) as door:
        for key, parameters in ((KEY, {b"timeout"}), (CANARY, {b"timeout", b"priority"})):
            relay.passed.clear()
            assert door.classify(PNG, key=key, X_Request_Timeout_Ms="1234").status == 200
            sent = service_pb2.ModelInferRequest.FromString(message(relay.passed))
            assert {name.encode() for name in sent.parameters} == parameters
            assert 1_000_000 < sent.parameters["timeout"].int64_param < 1_234_000
            assert sent.parameters["priority"].uint64_param == (2 if key == CANARY else 0)


def message(stream: bytes | bytearray) -> bytes:
    """The first gRPC message in an HTTP/2 stream, which comes in DATA frames (type 0) after a prefix of 5 bytes."""
    data, at = b"", 0
    while at < len(stream):
        size, kind = int.from_bytes(stream[at : at + 3]), stream[at + 3]
        data += stream[at + 9 : at + 9 + size] if kind == 0 else b""
        at += 9 + size
        if len(data) >= 5 and len(data) >= (total := 5 + int.from_bytes(data[1:5])):
            return data[5:total]
    raise AssertionError("no whole message came through")


def test_metrics_are_sound(door: Door, tmp_path: Path) -> None:
    """promtool has no complaint, and every series that may come is there from the start."""
    text = door.get("/metrics").body.decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {s.labels["reason"] for s in families["gateway_errors"].samples if s.name.endswith("_total")} == set(
        STATUSES
    )
    durations = families["gateway_request_duration_seconds"].samples
    assert {sample.labels["outcome"] for sample in durations} == set(OUTCOMES)
    assert "0.5" in {sample.labels.get("le") for sample in durations}  # the latency alert's threshold
    count = len(re.findall(r"^gateway_", text, flags=re.MULTILINE))
    door.classify(b"junk", key="nobody", X_Request_Id="new", query="?new=1")
    door.get("/new/path")
    again = door.get("/metrics").body.decode()
    assert len(re.findall(r"^gateway_", again, flags=re.MULTILINE)) == count
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed; apt-get install prometheus")
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    complaints = [line for line in checked.stderr.splitlines() if line.startswith("gateway_")]
    assert complaints == []
    assert checked.returncode in (0, 3)  # 3: complaints, of the process metrics that the library makes


def test_every_request_is_one_line(door: Door) -> None:
    """Who, what came of it, how long, how much, by which model and which server."""
    door.classify(PNG, key=KEY, X_Request_Id="fine")
    door.classify(b"junk", key=KEY, X_Request_Id="junk")
    door.classify(PNG, key="nobody", X_Request_Id="stranger")
    lines = {line["id"]: line for line in door.lines()}
    fine = lines["fine"]
    assert {name: fine[name] for name in ("path", "key", "status", "reason", "bytes", "version", "endpoint")} == {
        "path": "/v1/classify",
        "key": "shop",
        "status": 200,
        "reason": None,
        "bytes": len(PNG),
        "version": "1",
        "endpoint": door.config.triton.endpoints[0],
    }
    assert 0 < fine["ms"] < 5000
    assert (lines["junk"]["status"], lines["junk"]["reason"]) == (400, "bad_image")
    assert (lines["stranger"]["key"], lines["stranger"]["reason"]) == (None, "unauthorized")


def test_keys_are_nowhere(served: Served) -> None:
    """Not in the log, the metrics or an answer: neither a known key nor a stranger's, wherever it is put."""
    secret = "dfmcl_a-strangers-secret"
    with opened(settings([served.ready["grpc"]])) as door:
        answers = [
            door.classify(PNG, key=KEY),
            door.classify(PNG, key=KEY, query=LOGITS),
            door.classify(b"junk", key=secret),
            door.classify(PNG, key=KEY, query=f"?key={secret}"),
            door.get(f"/{secret}"),
            door.get("/metrics", Authorization=f"Bearer {secret}"),
            door.ask("POST", "/v1/classify", PNG, {"Authorization": secret}),
            door.get("/openapi.json"),
            door.get("/"),
        ]
        assert len(door.lines()) >= 7
        told = json.dumps(door.log) + "".join(answer.body.decode() + str(answer.headers) for answer in answers)
        assert not [text for text in (KEY, secret, digest_of(KEY), digest_of(secret)) if text in told]


def test_metrics_can_be_private(served: Served) -> None:
    """With public_metrics = false they ask for a key."""
    with opened(settings([served.ready["grpc"]], listen={"public_metrics": False})) as door:
        assert door.get("/metrics").reason == "unauthorized"
        assert door.get("/metrics", Authorization=f"Bearer {KEY}").status == 200


def test_open_gateway_asks_for_no_key(served: Served) -> None:
    """Who writes open = true gets one; logits stay with those who can be told apart."""
    with opened(settings([served.ready["grpc"]], open=True, keys=[])) as door:
        assert door.classify(PNG, key=None).status == 200
        assert door.classify(PNG, key=None, query=LOGITS).reason == "forbidden"
        assert door.lines()[-1]["key"] == "anyone"


def test_bug_is_500_and_the_next_request_is_answered(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever breaks: a reason, no trace of it for the client, and where it was for the log."""
    with opened(settings([served.ready["grpc"]])) as door:
        with monkeypatch.context() as broken:
            broken.setattr("dfmcl.serving.gateway.app.softmax", lambda logits: 1 / 0)
            answer = door.classify(PNG)
        assert (answer.status, answer.reason) == (500, "internal")
        assert "ZeroDivision" not in answer.body.decode()
        assert "ZeroDivisionError" in door.lines()[-1]["detail"]
        assert door.classify(PNG).status == 200


def test_responses_are_not_held_back() -> None:
    """Without this option on a connection, a response's body waits 40 ms for the client to acknowledge its headers."""
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_many_clients_at_once_get_their_own_answers(door: Door, candidate: Path) -> None:
    """Answers do not get mixed up: each client's logits are those of its image."""
    expected = onnx_logits(candidate / "model.onnx", IMAGES)

    def client(index: int) -> float:
        connection, worst = door.connection(), 0.0
        for _ in range(20):
            answer = door.ask(
                "POST", f"/v1/classify{LOGITS}", encoded(IMAGES[index]), {"X-API-Key": PRIVILEGED}, connection
            )
            worst = max(worst, float(np.abs(np.asarray(answer.json["logits"]) - expected[index]).max()))
        connection.close()
        return worst

    with ThreadPoolExecutor(len(IMAGES)) as clients:
        assert max(clients.map(client, range(len(IMAGES)))) < 1e-4


def test_gateway_needs_no_training_library() -> None:
    """What is installed for it: `pip install 'dfmcl[gateway]'`."""
    code = "import sys, dfmcl.serving.gateway.service; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    loaded = set(output.split())
    assert not {"torch", "onnxruntime", "torchvision", "scipy", "dfmcl.gating", "dfmcl.robustness"} & loaded


def test_threads_end_with_the_gateway(served: Served) -> None:
    """A gateway that was closed leaves no thread that serves."""
    before = threading.active_count()
    with opened(settings([served.ready["grpc"]])) as door:
        assert door.classify(PNG).status == 200
    deadline = time.monotonic() + 5
    while threading.active_count() > before:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.05)  # threads end by themselves
