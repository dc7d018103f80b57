"""The table that benchmarks/standard.py makes of its measurements, and that it goes on where it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import hypergeom

from benchmarks import result, standard
from benchmarks.standard import ATTACKS, RISK, TABLE, drawn, may_fall, table_of
from dfmcl.common.errors import BadInput
from dfmcl.gating.signing.evidence import read_report
from dfmcl.robustness.records import AttackRecord, Evaluation
from dfmcl.robustness.threats.linf import Linf

RELEASE = Path(__file__).parents[1] / "model_repository" / "resnet18-cifar10" / "1"


def test_the_draw_is_of_the_images_that_the_table_left() -> None:
    """Each once, in no order of theirs; the gate's report, which numbers images itself, left the same of its own."""
    order, report = drawn(table_of(TABLE)), read_report(RELEASE / "report.json")[0]
    assert len(set(order.tolist())) == len(order) == table_of(TABLE).robust.k
    assert abs(np.corrcoef(np.arange(len(order)), order)[0, 1]) < 0.1
    flags = zip(report.per_image.index, Evaluation.from_json(report.evaluation.to_json()).robust_images, strict=True)
    assert {index for index, held in flags if held} == set(order.tolist()) & set(report.per_image.index)


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
    """A place for records, a table of 100 images, attacks that fell the second image of each chunk."""

    def attacked(subject: object, data: object, rows: np.ndarray, table: Evaluation, number: int) -> Evaluation:
        right, held = (True,) * len(rows), tuple(place != 1 for place in range(len(rows)))
        none = (0,) * len(rows)
        records = tuple(
            AttackRecord(name, {}, flags, tried, 0, 1.0, 0, none, none)
            for name, flags, tried in zip(ATTACKS, (right, held, held), (right, right, held), strict=True)
        )
        return Evaluation(Linf(8 / 255), True, number, right, records, 1.0)

    held = tuple(place % 2 == 0 for place in range(100))
    table = Evaluation(Linf(8 / 255), False, 0, held, (), 1.0)

    class Found:
        digest = sha256 = "0" * 64

    monkeypatch.setattr(standard, "attacked", attacked)
    monkeypatch.setattr(standard, "table_of", lambda path: table)
    monkeypatch.setattr(standard, "load_dataset", lambda name, path: Found)
    for module in (standard, result):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path / "standard.json"


def session(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["standard", "--data", "none.npz", *arguments])
    standard.main()
    record: dict[str, Any] = json.loads((result.RESULTS / "standard.json").read_text())
    return record


def test_it_goes_on_from_its_record(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions without time make one chunk in all; then all the rest, and the figures are those that fell by hand."""
    session(monkeypatch, "--minutes", "0")
    first = session(monkeypatch, "--minutes", "0")
    assert [row["attacked"] for row in first["rows"]] == [16] * 4
    last = session(monkeypatch)
    assert last["conditions"]["rows"][:16] == first["conditions"]["rows"]
    assert [(row["attacked"], row["fallen_so_far"]) for row in last["rows"]] == [(50, 0), (50, 0), (50, 4), (50, 4)]
    assert last["ratios"]["all_four_at_most"] == last["ratios"]["all_four_at_least"] == pytest.approx(46)
    assert first["ratios"]["all_four_at_least"] < 46 < first["ratios"]["all_four_at_most"] == 49


def test_a_record_of_other_images_is_not_gone_on_with(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other data it is begun anew; where the order is another, one line says so."""
    record = session(monkeypatch, "--minutes", "0")
    record["conditions"]["rows"].reverse()
    shelf.write_text(json.dumps(record))
    with pytest.raises(BadInput, match="another order; remove it"):
        session(monkeypatch)
    record["conditions"]["about"]["data"] = "1" * 64
    shelf.write_text(json.dumps(record))
    assert session(monkeypatch, "--minutes", "0")["rows"][2]["attacked"] == 16
