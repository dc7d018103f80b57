"""The table that benchmarks/standard.py makes of its measurements, and that it goes on where it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from benchmarks import result, standard
from benchmarks.standard import ATTACKS, RISK, SHIPPED, begun, by_turns, draw, margins, may_fall, rank
from dfmcl.common.errors import BadInput
from dfmcl.gating.signing.evidence import read_report
from dfmcl.gating.signing.probes_file import read_probes
from dfmcl.robustness.records import AttackRecord, Evaluation
from dfmcl.robustness.threats.linf import Linf


def test_a_margin_is_positive_where_an_image_held() -> None:
    """By hand, and on the shipped model's probes: as many as the gate's report says."""
    assert margins(np.array([[3, 1, 2], [3, 5, 1]], np.float32), np.array([0, 0])).tolist() == [1, -2]
    probes = read_probes(SHIPPED / "probes.npz")
    held = margins(probes["adversarial_logits"], probes["labels"]) > 0
    assert held.sum() == read_report(SHIPPED / "report.json")[0].evaluation.robust.k


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40), st.integers(0, 40))
def test_every_image_that_held_has_its_turn(values: list[float], count: int) -> None:
    """Once each; of either order a beginning is done, of the nearest at least half of what is done."""
    margin = np.array(values, np.float32)
    ranked, drawn = rank(margin), draw(margin)
    order = by_turns(ranked, drawn)
    assert sorted(order.tolist()) == sorted(drawn.tolist()) == np.flatnonzero(margin > 0).tolist()
    assert (np.diff(margin[ranked]) >= 0).all()
    done = order[:count]
    assert begun(ranked, done) >= (len(done) + 1) // 2
    assert begun(drawn, done) >= len(done) // 2
    assert set(drawn[: begun(drawn, done)]) <= set(done)


@pytest.mark.parametrize(("images", "drawn"), [(450, 24), (250, 170), (80, 68), (20, 0)])
def test_what_the_draw_allows_is_missed_as_rarely_as_it_says(images: int, drawn: int) -> None:
    """Whatever number falls, the bound is below it with a probability of RISK at most; exact, over all draws."""
    bounds = np.array([may_fall(images, drawn, number) for number in range(drawn + 1)])
    for fall in range(images + 1):
        fell = np.arange(max(0, fall - images + drawn), min(drawn, fall) + 1)
        assert hypergeom.pmf(fell, images, fall, drawn)[bounds[fell] < fall].sum() <= RISK + 1e-9
    assert may_fall(images, images, 3) == 3


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for records, attacks that cost nothing, and fell the second image of each chunk."""

    def attacked(subject: object, images: np.ndarray, labels: np.ndarray, report: Any, number: int) -> Evaluation:
        right = (True,) * len(images)
        held = tuple(place != 1 for place in range(len(images)))
        records = (AttackRecord(ATTACKS[0], {}, held, right, 0, 1.0), AttackRecord(ATTACKS[1], {}, held, held, 0, 1.0))
        return Evaluation(Linf(8 / 255), True, number, right, records, 1.0)

    monkeypatch.setattr(standard, "attacked", attacked)
    for module in (standard, result):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path / "standard.json"


def session(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["standard", *arguments])
    standard.main()


def test_it_goes_on_from_its_record(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions without time make one chunk in all; then all the rest, and the figures are what fell by hand."""
    session(monkeypatch, "--minutes", "0")
    session(monkeypatch, "--minutes", "0")
    first = json.loads(shelf.read_text())
    assert first["rows"][2]["attacked"] == 16
    session(monkeypatch)
    last = json.loads(shelf.read_text())
    held = read_report(SHIPPED / "report.json")[0].evaluation.robust
    assert [row["attacked"] for row in last["rows"]] == [held.k] * 3
    assert last["conditions"]["rows"][:16] == first["conditions"]["rows"]
    fell = sum(start + 1 < held.k for start in range(0, held.k, 16))
    assert last["rows"][2]["fell to fab-t"] == fell
    left = 100 * (held.k - fell) / held.n
    assert last["ratios"]["all_four_at_most"] == last["ratios"]["all_four_at_least"] == pytest.approx(left)
    assert first["ratios"]["all_four_at_least"] < left < first["ratios"]["all_four_at_most"]


def test_a_record_of_other_images_is_not_gone_on_with(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other probes it is begun anew; where the order is another, one line says so."""
    session(monkeypatch, "--minutes", "0")
    record = json.loads(shelf.read_text())
    record["conditions"]["rows"].reverse()
    shelf.write_text(json.dumps(record))
    with pytest.raises(BadInput, match="another order; remove it"):
        session(monkeypatch)
    record["conditions"]["about"]["probes"] = "0" * 64
    shelf.write_text(json.dumps(record))
    session(monkeypatch, "--minutes", "0")
    assert json.loads(shelf.read_text())["rows"][2]["attacked"] == 16
