"""docs/results.md says what the raw records say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.plan import load_campaign, runs
from training.record import read_record
from training.table import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["table1_small", "alpha_small"])
def test_tables_of_campaigns_are_made_from_their_records(name: str) -> None:
    """Made again from the records, every row of every table stands on the page; every planned run has its record."""
    campaign = load_campaign(name)
    planned = [run.name for run in runs(campaign, name)]
    records = [read_record(RESULTS / name / f"{run}.json") for run in planned]
    assert all(record.done for record in records)
    rows = [line for line in table(campaign, planned, records).splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert [row for row in rows if row not in PAGE] == []


def test_speed_on_the_page_is_the_records() -> None:
    """Each ratio of results/training.json stands on the page with two digits after the point."""
    ratios = json.loads((RESULTS / "training.json").read_text(encoding="utf-8"))["ratios"]
    assert ratios["pgd10_images_per_s_vs_plain_loop"] >= 2
    assert [name for name, value in ratios.items() if f"| {name} | {value:.2f} |" not in PAGE] == []


def test_figures_of_the_shipped_model_are_the_reports() -> None:
    """The gate's cascade, attack by attack, with its exact intervals."""
    folder = ROOT / "model_repository" / "resnet18w32-cifar10" / "1"
    evaluation = json.loads((folder / "report.json").read_text(encoding="utf-8"))["evaluation"]
    for share in (evaluation["clean"], *(attack["accuracy"] for attack in evaluation["attacks"])):
        value, low, high = (100 * share[key] for key in ("value", "lower_95", "upper_95"))
        assert f"| {value:.1f} [{low:.1f}, {high:.1f}] |" in PAGE
