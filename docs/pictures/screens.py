"""The gateway's two pages in a real browser, before the shipped model behind a real Triton: used, and photographed.

`outline` is the structure of a page as it is seen, without its words: tests compare it with the one in structure.json.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.endurance import MODEL, REPOSITORY, ROOT, served
from dfmcl.gating.signing.probes_file import read_probes
from dfmcl.serving.gateway.config import GatewayConfig
from docs.pictures import pages
from tests.devtools import Browser, browser
from tests.serving.doors import KEYS, opened

WIDE, NARROW = 1000, 390
SHOWN = (1, 0, 13)  # of the gate's images: one that it is sure of, one that it is not, and another
SOURCES = [ROOT / "serving" / "gateway" / name for name in ("head.html", "index.html", "docs.html")]
PROGRAMS = ("pages.py", "openapi.py", "openapi_v2.py", "claims.py", "config.py")
# Each element that is seen, by its path of tags, ids and classes; ones of the same path count once. How sure a model
# is, and which rounds it had, is no structure.
OUTLINE = """
(() => {
  const kept = (name) => !["soft", "sure", "unsure", "rival", "skipped"].includes(name);
  const named = (one) => one.tagName.toLowerCase() + (one.id ? "#" + one.id : "")
    + [...one.classList].filter(kept).sort().map((name) => "." + name).join("");
  const path = (one) => (one === document.body ? "body" : path(one.parentElement) + " > " + named(one));
  const seen = [...document.body.querySelectorAll("*")].filter((one) => one.getClientRects().length);
  return [...new Set(seen.map(path))].sort();
})()
"""


def outline(chromium: Browser) -> list[str]:
    """Of the page that is open."""
    return list(chromium.value(OUTLINE))


def gateway(folder: Path) -> Iterator[tuple[str, bytes, list[str]]]:
    """Name, picture and outline of each page in each state; folder: empty, for files."""
    chosen = []
    probes = read_probes(REPOSITORY / MODEL / "1" / "probes.npz")["images"]
    for number in SHOWN:
        chosen.append(folder / f"photo-{number}.png")
        Image.fromarray(np.asarray(probes[number])).save(chosen[-1])
    with served(folder) as grpc, browser(folder / "profile") as chromium:
        with opened(_config(grpc, open_to_all=True)) as door:
            chromium.open(f"{door.url}/")
            chromium.wait("!document.querySelector('#version').hidden")
            asked(chromium, chosen)
            for view, width, height, dark in (
                ("light", WIDE, 1240, False),
                ("dark", WIDE, 1240, True),
                ("phone", NARROW, 1300, False),
            ):
                yield f"gateway-{view}", *_seen(chromium, width, height, dark=dark)
            chromium.open(f"{door.url}/docs")
            tried(chromium, chosen[:2], "good")
            for view, width, height, dark in (
                ("light", WIDE, 1240, False),
                ("dark", WIDE, 1240, True),
                ("phone", NARROW, 1300, False),
            ):
                yield f"docs-{view}", *_seen(chromium, width, height, dark=dark)
        with opened(_config(grpc, open_to_all=False)) as door:
            chromium.open(f"{door.url}/docs")
            tried(chromium, chosen[:1], "bad")
            chromium.value("document.querySelector('#classify .curl').scrollIntoView()")
            yield "docs-failure", *_seen(chromium, WIDE, 420)
        with opened(_config("127.0.0.1:1", open_to_all=True), ready=False) as door:
            chromium.open(f"{door.url}/")
            chromium.wait("!!document.querySelector('#ready.bad')")
            asked(chromium, chosen[:1])
            yield "gateway-failure", *_seen(chromium, WIDE, 620)


def door_shows() -> str:
    """A digest of what can be seen: the pages' text, the words of what fills them, the record that they tell of."""
    written = [path.read_bytes() for path in SOURCES]
    programs = [ROOT / "serving" / "gateway" / name for name in PROGRAMS]
    written += [pages.words(path.read_text(encoding="utf-8")).encode() for path in (*programs, Path(__file__))]
    written.append((REPOSITORY / MODEL / "1" / "report.json").read_bytes())
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in written)).hexdigest()


def watch(views: dict[str, str]) -> Iterator[tuple[str, bytes, list[str]]]:
    """The sidecar's page, by its HTML, in the states that its picture in two colours does not show."""
    with tempfile.TemporaryDirectory() as scratch, browser(Path(scratch) / "profile") as chromium:
        for view, (width, height) in {"phone": (NARROW, 1500), "failure": (WIDE, 420)}.items():
            page = Path(scratch) / f"{view}.html"
            page.write_text(views["failure" if view == "failure" else "well"], encoding="utf-8")
            chromium.open(page.as_uri())
            yield f"watch-{view}", *_seen(chromium, width, height)


def asked(chromium: Browser, files: list[Path]) -> None:
    """Images on the gateway's page, until there is a card for each."""
    chromium.choose("#file", *files)
    chromium.wait(f"document.querySelectorAll('article').length === {len(files)}")
    chromium.wait("!document.querySelector('#answers').innerText.includes('asking')")


def tried(chromium: Browser, files: list[Path], said: str) -> None:
    """Images on the page of the interface, until the answer is there."""
    chromium.choose("#classify .files", *files)
    chromium.value("document.querySelector('#classify .try').click()")
    chromium.wait(f"!!document.querySelector('#classify .said.{said}')")


def small(png: bytes) -> bytes:
    """The same picture in 200 colours: a third of the bytes."""
    with Image.open(io.BytesIO(png)) as picture:
        flat = picture.convert("RGB").quantize(200, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        file = io.BytesIO()
        flat.save(file, "PNG", optimize=True)
    return file.getvalue()


def _seen(chromium: Browser, width: int, height: int, *, dark: bool = False) -> tuple[bytes, list[str]]:
    chromium.look(width, height, dark=dark)
    time.sleep(0.3)  # until it is drawn anew, which nothing tells
    return small(chromium.picture()), outline(chromium)


def _config(grpc: str, *, open_to_all: bool) -> GatewayConfig:
    trust = ROOT / "deploy" / MODEL / "trust.toml"
    return GatewayConfig.model_validate(
        {
            "listen": {"port": 0, "notice_seconds": 0},
            "triton": {"endpoints": [grpc], "model": MODEL},
            "limits": {"timeout_ms": 10_000},  # on a machine that has other work
            "release": {"repository": str(REPOSITORY), "trust": str(trust)},
            **({"open": True} if open_to_all else {"keys": KEYS}),
        }
    )
