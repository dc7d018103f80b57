"""A headless Chromium that pages are opened, used and looked at with, by tests and by `make pictures`."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.gating.browser import BROWSER, OPTIONS, OWN


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

    def choose(self, selector: str, *files: Path) -> None:
        """Files for an <input type=file>, as a user would pick them."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file) for file in files], nodeId=node)

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Be a screen of so many pixels, whose owner prefers dark pages or not."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self) -> bytes:
        """The screen as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

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
