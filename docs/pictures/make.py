"""Every picture of docs/pictures, and pictures.json with a digest of what each shows: `make pictures`.

A name (flow, threats, report, watch, gateway) makes only that one again. Pages need Chromium, watch and gateway Triton
too. What a page looks like besides its words is written to structure.json, which tests compare with pages of now.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from docs.pictures import flow, pages, screens, threats
from tests.gating.browser import BROWSER, MISSING, visit

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORD, STRUCTURE = HERE / "pictures.json", HERE / "structure.json"
MOST_BYTES = 200_000


@dataclass(frozen=True)
class Page:
    """A page to be shown. written: makes it, in an empty folder; shows: its digest; size: width, height in pixels.

    The page is what is called `well` of what is written; others are shown besides.
    """

    written: Callable[[Path], dict[str, str]]
    shows: Callable[[], str]
    size: tuple[int, int]


PAGES = {
    "report": Page(pages.report, pages.report_shows, (1000, 660)),
    "watch": Page(pages.watch, pages.watch_shows, (1000, 1240)),
}


def main(chosen: Sequence[str]) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    drawings = {"flow": drawn, "threats": tiled, "gateway": photographed}
    for name in chosen or (*drawings, *PAGES):
        for path, shows in drawings[name]() if name in drawings else shot(name):
            record[path.name] = {"shows": shows, "sha256": sha256(path)}
            print(f"{path.name}: {path.stat().st_size:,} bytes")
    RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=2) + "\n", encoding="utf-8")


def shows() -> dict[str, str]:
    """What each picture should show now, as a digest, by the name of its file."""
    found = {f"flow-{colour}.svg": flow_shows(colour) for colour in flow.COLOURS}
    found[threats.OUT.name] = threats_show()
    for name, page in PAGES.items():
        found |= dict.fromkeys((f"{name}-light.png", f"{name}-dark.png"), page.shows())
    found |= dict.fromkeys(("watch-phone.png", "watch-failure.png"), PAGES["watch"].shows())
    states = ("light", "dark", "phone", "failure")
    return found | dict.fromkeys(
        (f"{page}-{state}.png" for page in ("gateway", "docs") for state in states), screens.door_shows()
    )


def flow_shows(colour: str) -> str:
    return hashlib.sha256(flow.flow(colour).encode()).hexdigest()


def threats_show() -> str:
    """A digest of all code that makes the tiles."""
    rooms = (ROOT / "robustness" / "threats", ROOT / "robustness" / "corruptions")
    sources = [Path(threats.__file__), *sorted(path for room in rooms for path in room.glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def tiled() -> list[tuple[Path, str]]:
    """One photograph under each threat: the file, and the digest of its tiles."""
    threats.main()
    return [(threats.OUT, threats_show())]


def drawn() -> list[tuple[Path, str]]:
    """The line, in light and in dark: files, and the digest of their content."""
    files = {colour: HERE / f"flow-{colour}.svg" for colour in flow.COLOURS}
    for colour, path in files.items():
        path.write_text(flow.flow(colour), encoding="utf-8")
    return [(path, flow_shows(colour)) for colour, path in files.items()]


def photographed() -> list[tuple[Path, str]]:
    """The gateway's pages in each state: files, and the digest of their content."""
    if BROWSER is None:
        raise SystemExit(MISSING)
    with tempfile.TemporaryDirectory() as scratch:
        return _kept(screens.gateway(Path(scratch)), screens.door_shows())


def _kept(seen: Iterable[tuple[str, bytes, list[str]]], shows: str) -> list[tuple[Path, str]]:
    """Pictures written, and their outlines with the others."""
    found, made = outlines() if STRUCTURE.exists() else {}, []
    for name, png, outline in seen:
        path = HERE / f"{name}.png"
        path.write_bytes(png)
        found[name] = outline
        made.append((path, shows))
    keep(found)
    return made


def outlines() -> dict[str, list[str]]:
    """The outline of each picture of a page, by the picture's name; structure.json holds equal ones once."""
    kept = json.loads(STRUCTURE.read_text(encoding="utf-8"))
    return {name: outline for names, outline in kept.items() for name in names.split()}


def keep(found: Mapping[str, list[str]]) -> None:
    """Write structure.json."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, outline in sorted(found.items()):
        names.setdefault(tuple(outline), []).append(name)
    kept = {" ".join(together): outline for outline, together in names.items()}
    STRUCTURE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def shot(name: str) -> list[tuple[Path, str]]:
    """The upper part of a page, in light and in dark: files, and the digest of their content."""
    if BROWSER is None:
        raise SystemExit(MISSING)
    page, made = PAGES[name], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "files").mkdir()
        written = page.written(folder / "files")
        (folder / "page.html").write_text(written["well"], encoding="utf-8")
        for colour in ("light", "dark"):
            raw, path = folder / f"{colour}.png", HERE / f"{name}-{colour}.png"
            visit(folder / "page.html", folder / "profile", size=page.size, screenshot=raw, dark=colour == "dark")
            with Image.open(raw) as picture:
                flat = picture.convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
                flat.save(path, optimize=True)  # 256 colours, rare ones among them: a third of the bytes
            made.append((path, page.shows()))
    return made + (_kept(screens.watch(written), page.shows()) if "failure" in written else [])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
