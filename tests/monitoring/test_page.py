"""The page, opened by a real browser: it says what is, shows it, asks nobody for anything, and takes no markup."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfmcl.monitoring import page as rendered
from dfmcl.monitoring.journal import Journal
from dfmcl.monitoring.page import _ago, render
from dfmcl.monitoring.releases import Release
from dfmcl.monitoring.results import GATEWAY, Example, Replayed, ReplayResult, Round
from dfmcl.robustness.statistics import Share
from docs.pictures import make, screens
from tests.deploying import ROOT
from tests.devtools import Browser, browser
from tests.gating.browser import BROWSER, MISSING, Visit, visit
from tests.monitoring.test_watch_metrics import (
    IDENTITY,
    RELEASES,
    SEARCH,
    failure,
    journal,
    result,
    search,
    skip,
    snapshot,
)

HOSTILE = '"><script>document.title="owned"</script><img src=http://evil.test/x onerror=alert(1)>'
LABELS = ("zero", "one", "two", HOSTILE)
NOW = 10_000.0
RUNBOOKS = ROOT / "docs" / "runbooks"
needs_browser = pytest.mark.skipif(BROWSER is None, reason=MISSING)


def page(seen: Journal, target: str = "digits at 127.0.0.1:8001", **changes: Any) -> str:
    return render(target, replace(IDENTITY, labels=LABELS), snapshot(seen, **changes), now=NOW)


def verdict(text: str) -> str:
    """The sentence at the top."""
    found = re.search(r'<p class="verdict[^>]*>(.*?)</p>', text)
    assert found is not None
    return re.sub(r"<[^>]*>", "", found[1])


def picture(attack: str, answer: int, channels: int = 3) -> Example:
    image = np.full((16, 16, channels), 100, np.uint8)
    return Example(attack, image, image + 8, 1, answer)


@pytest.mark.parametrize(
    ("outcomes", "changes", "said"),
    [
        ([], {}, "No round has been measured yet."),
        ([result()], {}, "Version 1. Nothing speaks against what the gate found. (signature verified)"),
        (
            [result()],
            {"losses": {"1": frozenset({"threshold", "clean"})}},
            "Version 1. Robustness is lost for certain: clean, threshold. (signature verified)",
        ),
        (
            [result()],
            {"releases": {"1": Release("invalid", why="other bytes")}},
            "Version 1. What answers has not passed the gate: invalid: other bytes. (signature not verified)",
        ),
        ([result()], {"paused": True}, "Version 1. Paused: the kill switch is on, and nothing is known of now."),
        ([result(), failure(2)], {}, "Version 1. No answer in the last round by triton."),
        ([result(), failure(2, "bad_output")], {}, "Version 1. Nothing speaks against what the gate found."),
        (
            [result(), failure(2, "unavailable"), failure(2, "unavailable", GATEWAY)],
            {},
            "Version 1. No answer in the last round by triton and by gateway.",
        ),
        ([result(), result(2, "2")], {}, "Version 2. What answers has not passed the gate: missing."),
    ],
)
def test_the_first_sentence_is_the_answer(outcomes: list[Round], changes: dict[str, Any], said: str) -> None:
    """What is lost comes before what is missing, and a server that is down is never called fine."""
    assert verdict(page(journal(*outcomes), **changes)).startswith(said)


def test_figures_stand_beside_the_gates() -> None:
    """Live, proven and gated, each where it belongs; what the gate did not record is called so."""
    text = page(journal(result(), search()))
    rows = [re.sub(r"</?time[^>]*>", "", re.sub(r"<t[rd]>", "|", row)) for row in re.findall(r"<tr><td>.*?</tr>", text)]
    assert any(
        row.startswith(
            "||clean|75.0 %|0.0 % to 100.0 %|1, 1970-01-01 00:16:40|below 100.0 %|97.0 % [91.5, 99.4], asked for 90.0 %"
        )
        for row in rows
    )
    assert any(row.startswith("||worst case, linf 8/255|25.0 %|") and "asked for 45.0 %" in row for row in rows)
    assert any(row.startswith("||pgd-10 transfer|50.0 %|") and "60.0 % [49.7, 69.7]" in row for row in rows)
    assert any(row.startswith(f"||{SEARCH} query|50.0 %|") and row.endswith("not recorded</tr>") for row in rows)
    assert "Asked about 4 times, the gate's own images got the recorded answer 3 times" in text


FURTHER = (Replayed("patch", 8, 1), Replayed("corruption", 30, 0))


def with_further() -> str:
    """A watch whose gate had a patch and two corruptions: they are replayed."""
    assert RELEASES["1"].attested is not None
    judged = (
        ("patch", "5x5", Share(30, 100)),
        ("corruption", "fog@3", Share(71, 100)),
        ("corruption", "contrast@5", Share(34, 100)),
    )
    release = replace(RELEASES["1"], attested=replace(RELEASES["1"].attested, further=judged))
    rounds = [replace(result(number), replay=ReplayResult(40, 1, 1.5, FURTHER)) for number in (1, 2)]
    return page(journal(rounds[0], replace(rounds[1], examples=(picture("pgd-10", 2),))), releases={"1": release})


def test_further_threats_have_a_line_each() -> None:
    """How often their images were asked about, and what the gate found; none where there are none."""
    lines = [re.sub(r"<[^>]*>", "", line) for line in re.findall(r"<li>.*?(?=<li>|</ul>)", with_further())]
    assert lines == [
        "patch 5x5: asked about 16 times, answered as recorded 14 times; accuracy under it at the gate 30.0 %"
        " [21.2, 40.0].",
        "corruption, 2 threats: asked about 60 times, answered as recorded 60 times; accuracy under it at the gate"
        " 34.0 % to 71.0 %.",
    ]
    assert "<li>" not in page(journal(result()))


def test_a_search_of_long_ago_is_called_so() -> None:
    """Never NaN."""
    text = page(journal(search(), *(result(number) for number in range(1, 25))))
    assert "not in recent rounds" in text
    assert "nan" not in text


def test_the_curve_stays_in_its_frame() -> None:
    """Also where the clock fell back by a day, and for two rounds of one moment."""
    fallen = replace(result(2), started=-86_400.0)
    for seen in (journal(result(1), fallen, result(3)), journal(result(1), result(1))):
        points = re.findall(r'points="([^"]*)"', page(seen))
        assert len(points) == 2
        for x, y in (map(float, point.split(",")) for text in points for point in text.split()):
            assert 0 <= x <= 720
            assert 0 <= y <= 260


@given(st.floats(0, 1), st.floats(0, 1))
def test_words_at_lines_do_not_meet(threshold: float, gated: float) -> None:
    """Wherever the two lines are, their words are a line of letters apart, and neither leaves the frame."""
    assert RELEASES["1"].attested is not None
    attested = replace(RELEASES["1"].attested, robust_threshold=threshold, robust=Share(round(1000 * gated), 1000))
    text = page(journal(result(1), result(2)), releases={"1": replace(RELEASES["1"], attested=attested)})
    first, second = (float(y) for y in re.findall(r'<text x="706" y="([\d.]+)" text-anchor="end">(?:the)', text))
    assert second - first >= 25.9  # rounded to a tenth
    assert 26 <= first < second <= 230 - 4


def test_ages_say_how_old_the_figures_are() -> None:
    """Of the page, of the newest figures by each path, and of each round; what is of now is not of the future."""
    text = re.sub(r"<[^>]*>", "", page(journal(search(9), result(5), result(9))))
    assert "As of 1970-01-01 02:46:40 UTC; renews itself every 15 s." in text
    assert (
        "Last measured by gRPC 1970-01-01 02:30:03 (16 min ago), by gateway 1970-01-01 02:30:40 (16 min ago)." in text
    )
    assert "1970-01-01 01:23:20 83 min ago" in text
    ages = {0.4: "just now", -5: "just now", 12: "12 s ago", 119: "119 s ago", 120: "2 min ago", 7200: "2 h ago"}
    assert {seconds: _ago(seconds) for seconds in ages} == ages
    assert _ago(400_000) == "4 d ago"


def test_bad_news_names_its_runbook() -> None:
    """A file of docs/runbooks, or where it is published; good news none."""
    lost: dict[str, Any] = {"losses": {"1": frozenset({"clean"})}}
    assert "docs/runbooks/RobustnessLost.md" in page(journal(result()), **lost)
    published = replace(IDENTITY, runbooks='https://w.test/a"b/')
    link = render("m", published, snapshot(journal(result()), **lost), now=NOW)
    assert 'href="https://w.test/a&quot;b/RobustnessLost"' in link
    assert "What to do" not in page(journal(result()))
    named = set(re.findall(r'"((?:Robustness)[A-Za-z]+)"', Path(rendered.__file__).read_text(encoding="utf-8")))
    assert len(named) == 5
    assert {name for name in named if not (RUNBOOKS / f"{name}.md").is_file()} == set()


def test_a_service_that_is_well_again_is_called_so() -> None:
    """Since when, and after which failure; not while it is down, and not for ever."""
    healed = page(journal(result(1), failure(2, "unavailable"), result(3), result(4)))
    said = re.sub(r"<[^>]*>", "", healed)
    assert "Well again by gRPC since 1970-01-01 00:50:00 (116 min ago): measured 2 times after the last round" in said
    assert "1970-01-01 00:33:20" in said
    assert "No answer in the last round" not in said
    assert "Well again" not in page(journal(result(1), failure(2, "unavailable")))
    assert "Well again" not in page(journal(result(1), failure(2, "bad_output"), result(3)))
    assert "Well again" not in page(journal(failure(1, "unavailable"), *(result(number) for number in range(2, 30))))


def test_one_point_is_no_curve() -> None:
    """Nor are examples shown where there are none."""
    text = page(journal(result()))
    assert "<svg" not in text
    assert "What got through" not in text


def full() -> str:
    """A page with everything on it, the target and messages of a hostile server."""
    examples = (picture("mi-fgsm-10", 2), picture(SEARCH, -1), picture("pgd-10", 3, channels=1))
    seen = journal(
        result(1),
        replace(result(2), examples=examples),
        search(1),
        replace(failure(3), message=HOSTILE),
        skip(4),
        result(5),
    )
    releases = {"1": replace(RELEASES["1"], state="invalid", why=HOSTILE)}
    return page(seen, f"digits at {HOSTILE}", releases=releases)


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory) -> Visit:
    folder = tmp_path_factory.mktemp("page")
    (folder / "page.html").write_text(full(), encoding="utf-8")
    return visit(folder / "page.html", folder / "profile")


@needs_browser
def test_nothing_is_asked_of_anybody(visited: Visit) -> None:
    """No request leaves, not even for an icon, and the console is silent."""
    assert visited.requests == []
    assert visited.console == []


@needs_browser
def test_what_others_say_is_text(visited: Visit) -> None:
    """Markup in a target, a failure or a reason is shown as it is written, and is none."""
    assert "<title>dfmcl watch</title>" in visited.dom
    assert "<script" not in visited.dom
    assert "onerror=alert(1)&gt;" in visited.dom
    assert not re.search(r"<img[^>]*(onerror|evil)", visited.dom)


@needs_browser
def test_everything_is_shown(visited: Visit) -> None:
    """Curve with band, threshold and the gate's figure; three examples of three images; all kinds of rounds."""
    for kind in ("curve", "band", "asked", "gated"):
        assert visited.dom.count(f'class="{kind}"') == 1
    assert visited.dom.count("<figure>") == 4
    assert visited.dom.count('<img alt="" src="data:image/png;base64,') == 9
    assert f"{SEARCH}: one, taken for another" in visited.dom
    assert "mi-fgsm-10: one, taken for two" in visited.dom
    assert {kind for kind in ("measured", "failed", "skipped") if f'<tr class="{kind}">' in visited.dom} == {
        "measured",
        "failed",
        "skipped",
    }


TOUCHING = """
(() => {
  const boxes = [...document.querySelectorAll("svg text")].map((text) => text.getBoundingClientRect());
  const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => meet(a, b))).length;
})()
"""


@needs_browser
@pytest.mark.parametrize("thresholds", [(0.54, 0.55), (0.01, 0.02), (0.99, 1.0), (0.0, 1.0)])
def test_labels_touch_on_no_screen(chromium: Browser, tmp_path: Path, thresholds: tuple[float, float]) -> None:
    """Narrow or wide, words of the curve stand apart, dates are on one line, and the page is as wide as the screen."""
    assert RELEASES["1"].attested is not None
    low, high = thresholds
    attested = replace(RELEASES["1"].attested, robust_threshold=low, robust=Share(round(100 * high), 100))
    text = page(
        journal(result(1), failure(2, "unavailable"), search(1), result(3)),
        releases={"1": replace(RELEASES["1"], attested=attested)},
    )
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    chromium.open((tmp_path / "page.html").as_uri())
    for width in (360, 390, 800, 1600):
        chromium.look(width, 900)
        assert chromium.value(TOUCHING) == 0
        assert chromium.value("document.documentElement.scrollWidth") <= width
        heights = chromium.value("[...document.querySelectorAll('time')].map(time => time.getClientRects().length)")
        assert set(heights) == {1}
        assert len(heights) > 6


@needs_browser
def test_page_is_built_as_its_pictures(chromium: Browser, tmp_path: Path) -> None:
    """Well, and without its Triton: the same elements are seen as in docs/pictures, whatever they say."""
    pictured = make.outlines()
    well = (result(1), replace(result(2), examples=(picture("pgd-10", 2),)))
    for name, outcomes in (("watch-phone", well), ("watch-failure", (*well, failure(3, "unavailable")))):
        (tmp_path / "page.html").write_text(page(journal(*outcomes)), encoding="utf-8")
        chromium.open((tmp_path / "page.html").as_uri())
        assert screens.outline(chromium) == pictured[name]
    assert pictured["watch-phone"] != pictured["watch-failure"]
    (tmp_path / "page.html").write_text(with_further(), encoding="utf-8")
    chromium.open((tmp_path / "page.html").as_uri())
    assert set(screens.outline(chromium)) ^ set(pictured["watch-phone"]) == {"body > ul", "body > ul > li"}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


@needs_browser
def test_it_fits_a_phone(tmp_path: Path) -> None:
    """At 360 pixels the browser draws it without a complaint."""
    (tmp_path / "page.html").write_text(full(), encoding="utf-8")
    shot = tmp_path / "page.png"
    seen = visit(tmp_path / "page.html", tmp_path / "profile", size=(360, 2400), screenshot=shot)
    assert seen.console == []
    assert shot.stat().st_size > 10_000
