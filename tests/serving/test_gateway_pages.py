"""What the gateway shows to people and to programs that read about it: its pages and its OpenAPI document."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dfmcl.robustness.data import load_dataset
from tests.gating.browser import BROWSER, MISSING, OPTIONS, OWN
from tests.serving.doors import KEY, Door, encoded, opened, settings
from tests.serving.workshop import Served

IMAGE = load_dataset("digits").x_test[0]
PNG = encoded(IMAGE)


@pytest.fixture(scope="module")
def door(served: Served) -> Iterator[Door]:
    """One gateway for all of them."""
    with opened(settings([served.ready["grpc"]], limits={"body_bytes": 20_000})) as door:
        yield door


class Browser:
    """A headless Chromium that is spoken to over a pipe (DevTools protocol)."""

    def __init__(self, commands: int, events: int) -> None:
        self._commands, self._events = os.fdopen(commands, "wb", 0), os.fdopen(events, "rb")
        self._number, self._session = 0, None
        self.seen: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that come before it are kept in `seen`."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        command |= {"sessionId": self._session} if self._session else {}
        self._commands.write(json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])
            self.seen.append(message)

    def value(self, expression: str) -> Any:
        """What a piece of JavaScript is."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 15) -> Any:
        """What a piece of JavaScript is once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.value(expression)):
            assert time.monotonic() < deadline, expression
            time.sleep(0.05)  # the browser can only be asked
        return value

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is there."""
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href === {json.dumps(url)}")

    def choose(self, selector: str, file: Path) -> None:
        """A file for an <input type=file>, as a user would pick it."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    @property
    def requested(self) -> set[str]:
        """URLs that pages asked for."""
        sent = [event for event in self.seen if event.get("method") == "Network.requestWillBeSent"]
        return {url for event in sent if not OWN.search(url := event["params"]["request"]["url"])}

    @property
    def complaints(self) -> list[str]:
        """Warnings and errors that Chromium logged, such as what the page's policy kept from happening."""
        entries = [event["params"]["entry"] for event in self.seen if event.get("method") == "Log.entryAdded"]
        thrown = [str(event["params"]) for event in self.seen if event.get("method") == "Runtime.exceptionThrown"]
        return thrown + [entry["text"] for entry in entries if entry["level"] in ("warning", "error")]

    def _read(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._events.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            data += byte
        return dict(json.loads(data))


@contextmanager
def browser(scratch: Path) -> Iterator[Browser]:
    """Chromium reads commands from its descriptor 3 and writes events to 4."""
    assert BROWSER is not None
    (commands_out, commands_in), (events_out, events_in) = os.pipe(), os.pipe()
    options = " ".join([*OPTIONS, f"--user-data-dir={scratch}", "--remote-debugging-pipe", "about:blank"])
    process = subprocess.Popen(
        ["bash", "-c", f"exec {BROWSER} {options} 3<&{commands_out} 4>&{events_in}"],
        pass_fds=(commands_out, events_in),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_out)
    os.close(events_in)
    try:
        yield Browser(commands_in, events_out)
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(BROWSER is None, reason=MISSING)
def test_page_classifies_what_is_dropped_on_it(door: Door, tmp_path: Path) -> None:
    """In a real browser: without a key it says what is missing, with one it shows the label; nobody else is asked."""
    picture = tmp_path / "digit.png"
    picture.write_bytes(PNG)
    expected = door.classify(PNG).json
    with browser(tmp_path / "chromium") as chromium:
        chromium.open(f"{door.url}/")
        chromium.choose("#file", picture)
        assert "API key" in chromium.wait("document.getElementById('error').textContent")
        chromium.value(f"document.getElementById('key').value = {json.dumps(KEY)}")
        chromium.choose("#file", picture)
        assert chromium.wait("document.getElementById('label').textContent") == expected["label"]
        rows = chromium.value("[...document.querySelectorAll('#top tr')].map(row => row.innerText)")
        assert [row.split("\t")[0] for row in rows] == [entry["label"] for entry in expected["top"]]
        assert f"{100 * expected['top'][0]['probability']:.1f} %" in rows[0]
        assert chromium.value("document.querySelector('#drop img').naturalWidth") == 16
        assert chromium.value("document.getElementById('error').textContent") == ""
        chromium.open(f"{door.url}/docs")
        assert "POST /v1/classify" in chromium.value("document.body.innerText")
        asked = {url for url in chromium.requested if not url.startswith(("blob:", "data:"))}
        assert asked == {f"{door.url}/", f"{door.url}/v1/classify?resize=true", f"{door.url}/docs"}
        # The 401 above is logged as an error, as it should be; nothing else is.
        assert [text for text in chromium.complaints if "401" not in text] == []


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
