"""What the gateway shows to people and to programs that read about it: its pages and its OpenAPI document."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from dfmcl.gating.signing.evidence import read_report
from dfmcl.robustness.data import load_dataset
from dfmcl.serving.gateway.claims import reader
from docs.pictures import make, screens
from tests.devtools import Browser, browser
from tests.gating.browser import BROWSER, MISSING
from tests.serving.doors import KEY, PRIVILEGED, Door, encoded, opened, settings
from tests.serving.workshop import Served

DATA = load_dataset("digits")
IMAGE = DATA.x_test[0]
PNG = encoded(IMAGE)


@pytest.fixture(scope="module")
def door(served: Served, trust_file: Path) -> Iterator[Door]:
    """One gateway for all of them."""
    release = {"repository": str(served.repository), "trust": str(trust_file)}
    with opened(settings([served.ready["grpc"]], limits={"body_bytes": 20_000}, release=release)) as door:
        yield door


needs_browser = pytest.mark.skipif(BROWSER is None, reason=MISSING)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


def text(chromium: Browser, selector: str) -> str:
    """What a reader sees in an element."""
    return str(chromium.value(f"document.querySelector({json.dumps(selector)}).innerText"))


def answered(chromium: Browser, images: int) -> list[str]:
    """The cards of so many images, once none is asked about any more."""
    done = f"document.querySelectorAll('article').length === {images}"
    chromium.wait(f"{done} && !document.querySelector('#answers').innerText.includes('asking')")
    return list(chromium.value("[...document.querySelectorAll('article')].map(card => card.innerText)"))


def written(folder: Path, **files: bytes) -> list[Path]:
    """Files for a user to choose."""
    paths = [folder / f"{name}.png" for name in files]
    for path, data in zip(paths, files.values(), strict=True):
        path.write_bytes(data)
    return paths


@needs_browser
def test_page_classifies_what_is_dropped_on_it(door: Door, chromium: Browser, tmp_path: Path) -> None:
    """Without a key it says what is missing, with one it shows label and shares; nobody else is asked, nothing kept."""
    expected, (picture,) = door.classify(PNG).json, written(tmp_path, digit=PNG)
    chromium.open(f"{door.url}/")
    assert chromium.wait("document.querySelector('#ready').innerText") == "ready"
    assert "With an API key" in chromium.wait("document.querySelector('#meaning').innerText")
    chromium.choose("#file", picture)
    assert "Type an API key above" in answered(chromium, 1)[0]
    type_key(chromium)
    chromium.choose("#file", picture)
    (card,) = answered(chromium, 1)
    assert "Type an API key" not in card
    best = expected["top"][0]
    assert best["label"] in text(chromium, "article h3")
    rows = chromium.value("[...document.querySelectorAll('article tr')].map(row => row.innerText)")
    assert [row.split("\t")[0] for row in rows] == [entry["label"] for entry in expected["top"]]
    assert f"{100 * best['probability']:.1f} %" in rows[0]
    assert chromium.value("document.querySelector('article img').naturalWidth") == 16
    assert chromium.value("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    assert {url.removeprefix(door.url) for url in chromium.requested if not url.startswith(("blob:", "data:"))} == {
        *("/", "/readyz", "/v1/model", "/v1/classify?resize=true"),
    }
    # The 401 above is logged as an error, as it should be; nothing else is.
    assert [said for said in chromium.complaints if "401" not in said] == []


def type_key(chromium: Browser) -> None:
    chromium.value(f"(at('key').value = {json.dumps(KEY)}, at('key').dispatchEvent(new Event('change')))")
    chromium.wait("!document.querySelector('#version').hidden")


@needs_browser
def test_page_says_what_the_model_is(door: Door, chromium: Browser) -> None:
    """Verdict, figures and what they mean, as the release's own report has them, and which version answers."""
    report, _ = read_report(Path(door.config.release.repository) / "digits" / "1" / "report.json")
    robust = report.evaluation.robust
    chromium.open(f"{door.url}/")
    type_key(chromium)
    assert text(chromium, "#version") == "version 1"
    assert text(chromium, "#meaning").startswith(f"{robust.k} of {robust.n} test images of digits were recognised")
    facts = text(chromium, "#facts")
    assert "passed, signature verified, holds until" in facts
    assert f"{100 * robust.value:.1f} % of {robust.n} images" in facts
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in facts


@needs_browser
def test_several_images_stand_in_their_order_each_with_its_own_fate(
    door: Door, chromium: Browser, tmp_path: Path
) -> None:
    """Five at once; one that is no image has a sentence, and the others their answers. New ones replace all of them."""
    images = {f"digit{number}": encoded(DATA.x_test[number]) for number in range(4)}
    chromium.open(f"{door.url}/")
    type_key(chromium)
    chromium.choose("#file", *written(tmp_path, **images, broken=b"no image"))
    cards = answered(chromium, 5)
    for card, (name, image) in zip(cards, images.items(), strict=False):
        assert f"{name}.png" in card
        assert door.classify(image).json["label"] in card
    assert "no image that can be read" in cards[4]
    assert "no picture" in cards[4]
    chromium.choose("#file", tmp_path / "broken.png")
    assert len(answered(chromium, 1)) == 1
    assert chromium.value("document.querySelectorAll('#answers table, #answers img').length") == 0


@needs_browser
@pytest.mark.parametrize(
    ("shares", "said", "sure"),
    [
        ([0.29, 0.27, 0.1], "unsure between bird and cat", False),
        ([0.3, 0.2, 0.16], "unsure between bird, cat and deer", False),
        ([0.2, 0.19, 0.18, 0.17], "unsure: no class stands out", False),
        ([0.45, 0.2, 0.2], "unsure: perhaps bird", False),
        ([0.6, 0.31], "unsure between bird and cat", False),
        ([0.6, 0.29], "bird", True),
        ([1.0], "bird", True),
    ],
)
def test_a_near_miss_is_not_bold(door: Door, chromium: Browser, shares: list[float], said: str, sure: bool) -> None:
    """The best class alone is named where it has more than half of all, and no other has half of its share."""
    if chromium.value("location.href") != f"{door.url}/":
        chromium.open(f"{door.url}/")
    labels = ("bird", "cat", "deer", "dog")
    top = [{"label": label, "probability": share} for label, share in zip(labels, shares, strict=False)]
    assert chromium.value(f"headline({json.dumps(top)})") == [said, sure]


@needs_browser
def test_page_fits_a_phone_and_the_dark(door: Door, chromium: Browser, tmp_path: Path) -> None:
    """At 390 pixels nothing is wider than the screen; who prefers dark pages gets light words on dark."""
    chromium.open(f"{door.url}/")
    type_key(chromium)
    chromium.choose("#file", *written(tmp_path, digit=PNG))
    answered(chromium, 1)
    for width in (390, 1000):
        chromium.look(width, 900)
        assert chromium.value("document.documentElement.scrollWidth") <= width
    paper = "getComputedStyle(document.body).backgroundColor"
    light = chromium.value(paper)
    chromium.look(1000, 900, dark=True)
    assert (light, chromium.value(paper)) == ("rgb(255, 255, 255)", "rgb(21, 24, 28)")


@needs_browser
def test_its_example_works(door: Door, chromium: Browser, tmp_path: Path) -> None:
    """What stands there for curl, as it stands there, with a picture and a key, gets an answer."""
    chromium.open(f"{door.url}/")
    command = text(chromium, "#curl")
    assert door.url in command
    (tmp_path / "picture.jpg").write_bytes(encoded(IMAGE, "JPEG"))
    asked = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path, env=os.environ | {"DFMCL_API_KEY": KEY}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(asked.stdout)["model"] == "digits"


@needs_browser
def test_a_gateway_without_its_triton_says_so(chromium: Browser) -> None:
    """Not ready, and in words."""
    with opened(settings(["127.0.0.1:1"]), ready=False) as door:
        chromium.open(f"{door.url}/")
        assert chromium.wait("document.querySelector('#ready.bad')?.innerText") == "not ready"
        assert "No server answers at the moment" in text(chromium, "#meaning")


@pytest.mark.parametrize(
    ("repository", "trusted", "verdict"),
    [
        ("own", True, "passed"),
        ("own", False, "passed"),
        ("changed", True, "not believed"),
        ("none", True, "not recorded"),
    ],
)
def test_claims_are_the_records(
    served: Served, trust_file: Path, tmp_path: Path, repository: str, trusted: bool, verdict: str
) -> None:
    """Passed only where the record says so; a report that was changed is not believed where a key must have signed."""
    where = tmp_path / "models"
    if repository != "none":
        shutil.copytree(served.repository, where)
    if repository == "changed":
        report = where / "digits" / "1" / "report.json"
        report.write_text(report.read_text().replace('"digits"', '"others"'))
    found = reader(str(where), "digits", str(trust_file) if trusted else "")("1")
    assert found.verdict == verdict
    assert found.signature == ("verified" if trusted and verdict == "passed" else "not checked")
    assert bool(found.robust) == bool(found.meaning) == (verdict == "passed")
    assert str(tmp_path) not in json.dumps(found.to_json())


def test_model_needs_the_key_that_its_images_need(door: Door) -> None:
    """As v2's metadata: who may not ask the model learns nothing of it."""
    assert door.get("/v1/model").reason == "unauthorized"
    answer = door.get("/v1/model", **{"X-API-Key": KEY})
    assert answer.json["limits"] == {"images": 64, "bytes": 20_000, "pixels": 16_000_000}
    assert answer.json["gate"]["signature"] == "verified"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_page_lets_nothing_else_in(door: Door, path: str) -> None:
    """Its policy allows no script but its own, and the page names no other address."""
    page = door.get(path)
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert b"http://" not in page.body
    assert b"https://" not in page.body


def test_docs_say_what_the_document_says(door: Door) -> None:
    """Every operation, parameter and status is on the page."""
    document, page = door.get("/openapi.json").json, door.get("/docs").body.decode()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f"{method.upper()} {path}" in page
            assert all(parameter["name"] in page for parameter in operation.get("parameters", []))
            assert all(f"<td>{status}<td>" in page for status in operation["responses"])


@needs_browser
def test_pages_are_built_as_their_pictures(served: Served, trust_file: Path, chromium: Browser, tmp_path: Path) -> None:
    """In each state of docs/pictures the same elements are seen as there, whatever they say; a lost one is noticed."""
    pictured = make.outlines()
    files = written(tmp_path, **{f"digit{number}": encoded(DATA.x_test[number]) for number in range(3)})
    release = {"repository": str(served.repository), "trust": str(trust_file)}
    with opened(settings([served.ready["grpc"]], open=True, keys=[], release=release)) as door:
        chromium.open(f"{door.url}/")
        chromium.wait("!document.querySelector('#version').hidden")
        screens.asked(chromium, files)
        for view, width in (("light", 1000), ("phone", 390)):
            chromium.look(width, 1240)
            assert screens.outline(chromium) == pictured[f"gateway-{view}"]
        chromium.value("document.querySelector('article progress').remove()")
        assert screens.outline(chromium) == pictured["gateway-light"]
        chromium.value("document.querySelectorAll('article progress').forEach((bar) => bar.remove())")
        assert screens.outline(chromium) != pictured["gateway-light"]
        chromium.open(f"{door.url}/docs")
        screens.tried(chromium, files[:2], "good")
        assert screens.outline(chromium) == pictured["docs-light"]
    with opened(settings(["127.0.0.1:1"], open=True, keys=[]), ready=False) as door:
        chromium.open(f"{door.url}/")
        chromium.wait("!!document.querySelector('#ready.bad')")
        screens.asked(chromium, files[:1])
        assert screens.outline(chromium) == pictured["gateway-failure"]


@needs_browser
def test_docs_can_be_tried_and_copied_from(door: Door, chromium: Browser, tmp_path: Path) -> None:
    """Two images by the form of /v1/classify, an answer in place; the words for curl are this gateway's, and work."""
    chromium.open(f"{door.url}/docs")
    chromium.value(f"document.getElementById('key').value = {json.dumps(KEY)}")
    chromium.choose("#classify .files", *written(tmp_path, one=PNG, two=encoded(DATA.x_test[1])))
    chromium.value("document.querySelector('#classify .try').click()")
    assert chromium.wait("document.querySelector('#classify .said.good')?.innerText").startswith("200 in ")
    shown = json.loads(text(chromium, "#classify .result"))
    assert [row["label"] for row in shown["predictions"]] == [
        door.classify(encoded(DATA.x_test[number])).json["label"] for number in range(2)
    ]
    chromium.value("document.querySelector('#model .try').click()")
    assert '"signature": "verified"' in chromium.wait("document.querySelector('#model .result').innerText")
    assert text(chromium, "#v2_version .curl").endswith("/v2/models/digits/versions/1'")
    chromium.value(f"document.getElementById('key').value = {json.dumps(PRIVILEGED)}")
    chromium.value("document.querySelector('#v2_model_infer .try').click()")
    chromium.wait("!!document.querySelector('#v2_model_infer .said.good')")
    (output,) = json.loads(text(chromium, "#v2_model_infer .result"))["outputs"]
    assert output["shape"] == [1, 10], "of a black image of the model's own size"
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_bytes(PNG)
    command = text(chromium, "#classify .curl")
    environment = os.environ | {"DFMCL_API_KEY": KEY}
    asked = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert len(json.loads(asked.stdout)["predictions"]) == 2
    chromium.look(390, 900)
    assert chromium.value("document.documentElement.scrollWidth") <= 390


def test_examples_keep_to_their_schemas(door: Door) -> None:
    """Each example of the document is what its own schema allows, so nobody copies a mistake."""
    document = door.get("/openapi.json").json
    found = 0
    for methods in document["paths"].values():
        for operation in methods.values():
            bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
            for content in (content for body in bodies for content in body.get("content", {}).values()):
                schema = {**content["schema"], "components": document["components"]}
                for example in content.get("examples", {}).values():
                    jsonschema.validate(example["value"], schema)
                    found += 1
    assert found > 20


# Not positive_data_acceptance: a schema cannot say which bytes are an image.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "ignored_auth",
)

# A deadline of 1 ms may be missed; 413 is a way to refuse what is too long.
CHECKED = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "4xx", 504]
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 413, 415, 422, 504]
"""


def test_gateway_keeps_to_its_own_document(door: Door, tmp_path: Path) -> None:
    """Requests made from the OpenAPI document, right and wrong ones: every answer is one that it allows."""
    (tmp_path / "st.toml").write_text(CHECKED)
    # Both headers: either opens, so that a wrong one beside the other is no fault, as schemathesis takes it for.
    keys = ("--header", f"X-API-Key: {KEY}", "--header", f"Authorization: Bearer {KEY}")
    command = [
        *(str(Path(sys.executable).with_name("st")), "--config-file", "st.toml", "run", f"{door.url}/openapi.json"),
        *(*keys, "--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing"),
        *("--max-examples", "30", "--seed", "0", "--generation-database", "none", "--no-color"),
    ]
    before = len(door.lines())
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert made.returncode == 0, made.stdout.partition("FAILURES")[2][:6000] + made.stderr[-1000:]
    found = [line for line in door.lines()[before:] if line["path"] == "/v1/classify"]
    assert len(found) > 100
    assert {line["reason"] for line in found} >= {"bad_image", "bad_request", "unauthorized", "wrong_input"}
