"""A real browser that opens a page without a network, and says what the page tried."""

from __future__ import annotations

import re
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BROWSER = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
MISSING = "needs a Chromium; apt-get install chromium"
# What Chromium asks its maker for, whatever page is open.
OWN = re.compile(r"\.(google|googleapis|gvt1|gstatic)\.com[:/]")
OPTIONS = (
    "--headless",
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)


@dataclass(frozen=True)
class Visit:
    """dom: the page after loading; console: its log; requests: request lines that reached the network's door."""

    dom: str
    console: list[str]
    requests: list[str]


def visit(
    page: Path,
    scratch: Path,
    *,
    size: tuple[int, int] = (1280, 4000),
    screenshot: Path | None = None,
    dark: bool = False,
) -> Visit:
    """Open a file. All requests go to a proxy that writes them down and answers nothing.

    page: the file.
    scratch: where the browser keeps its profile.
    size: of the window, width and height in pixels.
    screenshot: where a picture of it goes, in place of its DOM.
    dark: whether the reader prefers dark pages.
    """
    assert BROWSER is not None
    with _door() as (port, requests):
        made = subprocess.run(
            [
                BROWSER,
                *OPTIONS,
                f"--user-data-dir={scratch}",
                f"--proxy-server=127.0.0.1:{port}",
                "--proxy-bypass-list=<-loopback>",
                f"--window-size={size[0]},{size[1]}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                *([f"--screenshot={screenshot}"] if screenshot else ["--dump-dom"]),
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    console = [line for line in made.stderr.splitlines() if "CONSOLE" in line]
    return Visit(made.stdout, console, [line for line in requests if not OWN.search(line)])


@contextmanager
def _door() -> Iterator[tuple[int, list[str]]]:
    requests: list[str] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            requests.append(self.rfile.readline().decode("latin-1").strip())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], requests
        server.shutdown()
