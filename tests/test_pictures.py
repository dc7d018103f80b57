"""A picture shows what there is now: git keeps no times, so each has a digest of what it shows in pictures.json."""

from __future__ import annotations

import json

from PIL import Image

from docs.pictures import make, pages

RECORD = json.loads(make.RECORD.read_text(encoding="utf-8"))
README = (make.HERE.parents[1] / "README.md").read_text(encoding="utf-8")


def stale(shows: dict[str, str]) -> list[str]:
    """Pictures that show something else than they should, by what their record says."""
    return sorted(name for name in {*shows, *RECORD} if RECORD.get(name, {}).get("shows") != shows.get(name))


def test_no_picture_is_older_than_what_it_shows() -> None:
    """The line as its script draws it, the shipped model's report as it is written now, the sidecar's page."""
    assert stale(make.shows()) == [], "these show what is no more: run `make pictures`, and look at them"


def test_a_picture_of_something_else_is_found() -> None:
    """Another digest, a picture without one, and one that nothing makes; a remark in the page's program changes none,
    another sentence does."""
    shown = {name: entry["shows"] for name, entry in RECORD.items()}
    assert stale(shown) == []
    assert stale(shown | {"watch-dark.png": "0" * 64, "new.png": "0" * 64}) == ["new.png", "watch-dark.png"]
    assert stale({name: digest for name, digest in shown.items() if name != "flow-dark.svg"}) == ["flow-dark.svg"]
    program = pages.PAGE.read_text(encoding="utf-8")
    assert pages.words(f"# a remark\n{program}") == pages.words(program)
    assert pages.words(program.replace("What got through", "What fell")) != pages.words(program)


def test_the_record_is_of_these_files() -> None:
    """What lies there is what `make pictures` wrote, and it wrote everything that lies there."""
    files = {path.name: make.sha256(path) for path in make.HERE.iterdir() if path.suffix in (".png", ".svg", ".jpg")}
    assert files == {name: entry["sha256"] for name, entry in RECORD.items()}, "run `make pictures`"


def test_pictures_are_small_and_shown() -> None:
    """A reader on a telephone waits for none, a clone not for all of them; each is on a page, in light and in dark."""
    assert sum((make.HERE / name).stat().st_size for name in RECORD) < 800_000
    pages_of = (make.HERE.parent / name for name in ("sre.md", "threats.md", "gateway.md"))
    written = README + "".join(page.read_text(encoding="utf-8") for page in pages_of)
    for name in RECORD:
        assert (make.HERE / name).stat().st_size <= make.MOST_BYTES
        assert f"pictures/{name}" in written
        if name.endswith(".png"):
            with Image.open(make.HERE / name) as picture:
                assert picture.width == (390 if name.endswith("-phone.png") else 1000)
