"""The report as a page: it loads and runs nothing, shows what the report says, and takes no orders from names."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dfmcl.gating.formats.charts import Known, Reading, accuracy_over_eps, bounds_over_images, interval
from dfmcl.gating.formats.gallery import BESIDE, SHOWN, SPOILED, galleries
from dfmcl.gating.formats.html import confused, html
from dfmcl.gating.formats.markdown import markdown
from dfmcl.gating.formats.summary import Probes, class_rows, confusion
from dfmcl.gating.signing.evaluation import ThreatEntry
from dfmcl.gating.signing.report import Report
from dfmcl.robustness.threats.registry import parse_threat
from tests.gating.browser import BROWSER, MISSING, visit
from tests.gating.sample import CLASSES, edited, probes, sample
from tests.present import present

browsing = pytest.mark.skipif(BROWSER is None, reason=MISSING)
RAISED = ("fgsm_beats_pgd",)
HOSTILE = '<script>console.error("inert")</script><img src="http://probe.invalid/x.png">'


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def plain() -> tuple[Report, Probes]:
    return sample(), probes(sample())


def hostile() -> tuple[Report, Probes]:
    """A sample whose every name from outside is markup."""

    def edit(report: dict[str, Any]) -> None:
        report["data"]["classes"][3] = HOSTILE
        report["candidate"]["name"] = HOSTILE
        report["checks"][1] |= {"why": HOSTILE, "figures": {HOSTILE: HOSTILE}}
        report["findings"][0]["why"] = HOSTILE
        report["evaluation"]["attacks"][0]["name"] = HOSTILE
        report["criteria"][3] |= {"class": HOSTILE, "criterion": HOSTILE}
        report["transfer"][0]["about"]["surrogate"] = HOSTILE
        report["versions"][HOSTILE] = HOSTILE

    report = edited(sample(raised=RAISED), edit)
    return report, probes(report)


@pytest.mark.parametrize(
    ("report", "verdict", "said"),
    [
        (sample(), "PASSED", "robust_accuracy >= 0.3 at 95 %: met after"),
        (sample(0.85), "BLOCKED", "robust_accuracy >= 0.85 at 95 %: missed after"),
        (sample(0.6), "INCONCLUSIVE", "cap on images was reached"),
        (sample(raised=RAISED), "SUSPECT", "fgsm_beats_pgd was raised: one step breaks"),
    ],
    ids=["passed", "failed", "inconclusive", "suspect"],
)
def test_the_verdict_stands_first_with_what_decided_it(report: Report, verdict: str, said: str) -> None:
    """A reader of the page meets the verdict, its reason, and whose model by which policy, before anything else."""
    text = " ".join(Page(html(report, probes(report))).text.split())
    begin = text.index("</style>") if "</style>" in text else 0
    head = text[begin : text.index("To pass, every lower bound")]
    for words in (verdict, said, report.candidate.model_sha256[:16], report.policy.sha256[:16]):
        assert words in head
    assert "Linf 16/255 as uint8" in head
    assert f"{len(report.per_image.index)} of 450" in head


def test_the_claim_is_told_in_words() -> None:
    """Sequential statistics speak of exactly these images, fixed ones of the population behind them."""
    pages = {kind: html(report := sample(kind=kind), probes(report)) for kind in ("sequential", "fixed")}
    assert "about exactly the 450 images of digits" in pages["sequential"]
    assert "The bounds as the gate went" in pages["sequential"]
    assert "about the population that the images of digits" in pages["fixed"]
    assert "exactly the 450 images" not in pages["fixed"]


@pytest.mark.parametrize("kind", ["sequential", "fixed"])
def test_what_the_loader_skipped_is_told(kind: str) -> None:
    """On the page and on the terminal, beside the claim; nothing where every file was read."""
    report = sample(kind=kind)
    assert "The loader" not in html(report, probes(report)) + markdown(report, details=False)
    report = replace(report, data=replace(report.data, skipped={".heic": 3, "hidden": 1}))
    for page in (html(report, probes(report)), markdown(report, details=False)):
        assert "The loader skipped 4 files: 3 .heic, 1 hidden (supported: " in page


def test_the_page_has_all_its_parts() -> None:
    """Curves, attacks, classes, confusion, gallery, checks with what to do, transfer as a bound, baseline, origin."""
    report = sample(raised=RAISED)
    page = Page(html(report, probes(report)))
    text = " ".join(page.text.split())
    for attack in report.evaluation.attacks:
        assert f"{attack.name} {100 * attack.accuracy.value:.1f} % {attack.flipped}" in text
    for check in report.checks:
        for words in (check.check, check.when, check.do, check.why):
            assert words in text
    for name in CLASSES:
        assert name in text
    assert "transfer from surrogate-pgd" in text
    assert "upper bound of robust accuracy" in text
    assert str(present(sample().baseline).newly_broken[0]) in text.partition("Newly broken:")[2]
    for figure in (report.statistics.order_sha256, report.code.revision, "a CPU", "2.8.0", "2 min 31 s"):
        assert figure in text
    drawn = {step.criterion for step in report.progress}
    assert sum(tag == "svg" and attributes["class"] == "chart" for tag, attributes in page.tags) == 1 + len(drawn)
    assert sum(tag == "img" for tag, _ in page.tags) == 3 * SHOWN


def test_nothing_is_loaded_and_nothing_runs() -> None:
    """Every source is a data URL; no script, event handler, link or style from elsewhere; a policy forbids them."""
    for report, arrays in (plain(), hostile()):
        page = Page(html(report, arrays))
        assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "form", "base", "a"}
        names = {name for _, attributes in page.tags for name in attributes}
        assert not {name for name in names if name.startswith("on")}
        sources = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
        assert sources
        assert all(str(source).startswith("data:image/png;base64,") for source in sources)
        policy = next(attributes for _, attributes in page.tags if "http-equiv" in attributes)
        assert str(policy["content"]).startswith("default-src 'none'")
        assert not re.search(r"@import|url\(", html(report, arrays))


def test_a_report_with_little_in_it_is_still_a_page() -> None:
    """No baseline, no transfer, no further radius, no flipped image, no check, a class without images: no error."""
    classes = (*CLASSES, "never seen", *(f"more {number}" for number in range(10)))
    report = replace(sample(), baseline=None, transfer=(), radii=(), checks=(), progress=())
    report = replace(report, data=replace(report.data, classes=classes))
    arrays = dict(probes(report))
    arrays["clean_logits"] = arrays["adversarial_logits"]
    text = " ".join(Page(html(report, arrays)).text.split())
    for words in ("never seen 0 no image of it", "No check was run", "no attack flipped an image", "commonest wrong"):
        assert words in text
    assert "Against the baseline" not in text


def test_class_rows_count_what_the_record_says() -> None:
    """Per class: images, right and held by hand; the classes' counts add up to the evaluation's."""
    report = sample()
    rows = class_rows(report)
    assert [row.name for row in rows] == list(CLASSES)
    assert sum(row.images for row in rows) == report.evaluation.images
    assert sum(row.right for row in rows) == report.evaluation.clean.k
    assert sum(row.held for row in rows) == report.evaluation.robust.k
    bits, labels = report.evaluation.per_image.robust, report.per_image.label
    assert rows[4].held == sum(bit == "1" for bit, label in zip(bits, labels, strict=True) if label == 4)
    unasked = class_rows(replace(report, criteria=report.criteria[:3]))
    assert (rows[4].threshold, rows[4].outcome, unasked[4].outcome) == (0.1, "met", None)
    assert all(row.lower <= row.held / row.images <= row.upper for row in rows)


def test_confusion_is_true_class_by_answer() -> None:
    """Three images by hand: two of class 0, one of them answered 2, and one of class 1."""
    counts = confusion(3, {"labels": np.array([0, 0, 1]), "adversarial_logits": np.eye(3)[[0, 2, 1]]})
    assert counts.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert confused(["a", "b", "c"], counts).commonest == [("a", "c", 1)]


def test_gallery_shows_images_that_flipped_as_they_are() -> None:
    """The pictures decode to the probes' bytes; the difference is multiplied by what the page says, around grey."""
    report = sample()
    arrays = probes(report)
    (shown,) = galleries(arrays, report)
    assert (len(shown.exhibits), shown.largest, shown.amplified, shown.reduced) == (SHOWN, 16, 127 // 16, False)
    for one in shown.exhibits:
        row = report.per_image.index.index(one.index)
        assert one.before == one.label == CLASSES[arrays["labels"][row]] != one.after
        original, adversarial, grey = (pixels(url) for url in (one.original, one.adversarial, one.perturbation))
        assert (original == arrays["images"][row]).all()
        assert (adversarial == (arrays["images"] + arrays["change"])[row]).all()
        change = adversarial.astype(int) - original
        assert (grey.astype(int) - 128 == np.clip(shown.amplified * change, -128, 127)).all()


def test_each_threat_has_a_gallery_of_its_own() -> None:
    """A patch by itself, corruptions together, one of each kind before a second of one; another radius of the same ball
    and a threat that flipped nothing have none. All pictures are the probes' bytes."""
    report, arrays = beside(("2/255", "patch:2x2", "fog@1", "snow@2", "fog@5", "rotation:10"))
    own, patch, spoiled = galleries(arrays, report)
    assert (own.threat, patch.threat, spoiled.threat) == ("Linf 16/255", "patch 2x2", "corruptions")
    assert (len(patch.exhibits), len(spoiled.exhibits)) == (BESIDE, SPOILED)
    assert [one.threat for one in spoiled.exhibits[:6]] == ["fog@1", "snow@2", "fog@5", "snow@2", "fog@1", "snow@2"]
    for one in (*patch.exhibits, *spoiled.exhibits):
        row, number = report.per_image.index.index(one.index), {"": 2, "fog@1": 3, "snow@2": 4, "fog@5": 5}[one.threat]
        assert (pixels(one.adversarial) == (arrays["images"][:9] + arrays[f"change{number}"])[row]).all()
        assert one.before == one.label != one.after
    text = " ".join(Page(html(report, arrays)).text.split())
    assert "patch 2x2 Original, as attacked" in text
    assert "corruptions Original, as attacked" in text


def beside(threats: tuple[str, ...]) -> tuple[Report, dict[str, NDArray[Any]]]:
    """The sample's report with evaluations at other threats, of which the first nine images were kept; all that were
    right were flipped, but by the last."""
    report = sample()
    parsed = [parse_threat(text).to_json() for text in threats]
    main, arrays = report.evaluation, dict(probes(report))
    radii = tuple(replace(main, threat=ThreatEntry.from_json(threat)) for threat in parsed)
    for number in range(1, len(threats) + 1):
        clean = arrays["clean_logits"][:9]
        arrays[f"change{number}"] = np.full_like(arrays["images"][:9], number)
        arrays[f"adversarial_logits{number}"] = clean if number == len(threats) else np.roll(clean, 1, axis=1)
    return replace(report, radii=radii), arrays


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_gallery_takes_any_image(channels: int) -> None:
    """Grey, colour and more channels, and images too large for a page, become pictures."""
    images = np.zeros((1, 200, 300, channels), np.uint8)
    arrays = {"images": images, "change": np.full_like(images, 2), "labels": np.array([0])}
    arrays |= {"clean_logits": np.array([[1, 0]]), "adversarial_logits": np.array([[0, 1]])}
    report = sample()
    report = replace(report, per_image=replace(report.per_image, index=(7,), label=(0,)))
    (shown,) = galleries(arrays, report)
    assert pixels(shown.exhibits[0].adversarial).shape[:2] == (85, 128)
    assert (shown.reduced, shown.largest, shown.amplified) == (True, 2, 63)


def test_drawings_put_figures_where_they_belong() -> None:
    """Higher accuracy is higher up, larger radii further right, a threshold at its height and radius."""
    drawing = accuracy_over_eps(
        [Reading(0, 0.9, 0.8, 1.0, "clean", "clean"), Reading(0.1, 0.5, 0.4, 0.6, "x", "robust")], [(0.1, 0.5)]
    )
    (x0, y0), (x1, y1) = re.findall(r'<circle class="dot \w+" cx="([\d.]+)" cy="([\d.]+)"', drawing)
    assert float(x0) < float(x1)
    assert float(y0) < float(y1)
    (threshold,) = re.findall(r'class="threshold" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)"', drawing)
    assert float(threshold[0]) < float(x1) < float(threshold[2])
    assert threshold[1] == y1
    steps = bounds_over_images([Known(8, 0.2, 0.9), Known(16, 0.4, 0.8)], 0.5)
    assert "threshold 50.0 %" in steps
    assert "40.0 %" in steps
    assert "80.0 %" in steps
    assert 'class="bounds" x="20.00" width="30.00"' in interval(0.2, 0.5, 0.3, None)


@pytest.mark.parametrize("threshold", [0.1, 0.44, 0.47, 0.5, 0.53, 0.9])
@pytest.mark.parametrize(("lower", "upper"), [(0.45, 0.55), (0.49, 0.51), (0.0, 1.0)])
def test_labels_of_bounds_lie_apart(lower: float, upper: float, threshold: float) -> None:
    """The two do not cover each other, nor the threshold's line, wherever the three are; they stay on the drawing."""
    drawing = bounds_over_images([Known(16, lower, upper)], threshold)
    top, bottom = (float(y) for y in re.findall(r'class="tick strong" x="\S+" y="(\S+)"', drawing))
    (line,) = (float(y) for y in re.findall(r'class="threshold" x1="\S+" y1="(\S+)"', drawing))
    assert bottom - top >= 12
    assert 12 <= top <= bottom <= 230
    assert not any(y - 10 < line < y for y in (top, bottom))


@browsing
def test_a_browser_finds_nothing_to_complain_of(tmp_path: Path) -> None:
    """Chromium, light: the page renders, no console message, no request; and the same with hostile names in it."""
    for name, (report, arrays) in {"plain": plain(), "hostile": hostile()}.items():
        page = tmp_path / f"{name}.html"
        page.write_text(html(report, arrays), encoding="utf-8")
        seen = visit(page, tmp_path / "profile")
        assert (seen.console, seen.requests) == ([], [])
        assert "Reasons to disbelieve" in seen.dom


@browsing
def test_the_browser_would_have_noticed(tmp_path: Path) -> None:
    """The same markup unescaped, without and with the page's policy: a message and a request; messages alone."""
    bare, guarded = tmp_path / "bare.html", tmp_path / "guarded.html"
    bare.write_text(HOSTILE)
    report = sample()
    guarded.write_text(html(report, probes(report)).replace("</main>", f"{HOSTILE}</main>"), encoding="utf-8")
    seen = visit(bare, tmp_path / "profile")
    assert "inert" in seen.console[0]
    assert seen.requests == ["GET http://probe.invalid/x.png HTTP/1.1"]
    seen = visit(guarded, tmp_path / "profile")
    assert len(seen.console) == 2
    assert all("Content Security Policy" in line for line in seen.console)
    assert seen.requests == []


@browsing
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_screen(tmp_path: Path, width: int) -> None:
    """On a phone and on a laptop: a picture of the verdict's colour, and nothing beyond the right edge."""
    report = sample(0.85)
    (tmp_path / "report.html").write_text(html(report, probes(report)), encoding="utf-8")
    # Chromium's windows are at least 500 wide; a frame is as narrow as it is told.
    frame = tmp_path / "frame.html"
    frame.write_text(f'<body style="margin:0"><iframe src="report.html" width={width} height=900 style="border:0">')
    picture = tmp_path / "shot.png"
    visit(frame, tmp_path / "profile", size=(max(width, 500), 900), screenshot=picture)
    shot = np.asarray(Image.open(picture).convert("RGB"))[:, :width].astype(int)
    red = (abs(shot - np.array([0xC0, 0x2B, 0x2B])) < 12).all(axis=2)
    assert red[:40].sum() > width  # the header's stripe
    assert red.sum() > 2 * width  # and the word itself
    page = np.array([0xF6, 0xF7, 0xF9])
    assert (abs(shot[:, width - 4 : width] - page) < 4).all()  # the margin on the right is empty


def pixels(url: str) -> np.ndarray[Any, Any]:
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return np.asarray(picture)
