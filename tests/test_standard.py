"""What benchmarks/standard.py makes of what it measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.standard import SHIPPED, by_turns, margins, suite
from robustness.statistics import upper_bound


def test_a_margin_is_positive_where_an_image_held() -> None:
    """By hand, and on the shipped model's probes: as many as the gate's report says."""
    assert margins(np.array([[3, 1, 2], [3, 5, 1]], np.float32), np.array([0, 0])).tolist() == [1, -2]
    with np.load(SHIPPED / "probes.npz") as probes:
        held = margins(probes["adversarial_logits"], probes["labels"]) > 0
    assert held.sum() == json.loads((SHIPPED / "report.json").read_text())["evaluation"]["robust"]["k"]


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40))
def test_every_image_that_held_has_its_turn(values: list[float]) -> None:
    """Once each, always in the same order, and at even places nothing that is left is nearer."""
    margin = np.array(values, np.float32)
    order = by_turns(margin)
    assert sorted(order.tolist()) == np.flatnonzero(margin > 0).tolist()
    assert (by_turns(margin) == order).all()
    assert all(margin[order[place]] == margin[order[place:]].min() for place in range(0, len(order), 2))


def test_those_that_nobody_attacked_count_for_either_side() -> None:
    """400 of 1,000 held; 60 were attacked, 30 of them drawn, 2 fell, 1 of those drawn."""
    found = suite(400, 1000, fell=2, rest=340, fell_drawn=1, drawn=30)
    assert found["all_four_at_most"] == pytest.approx(39.8)
    assert found["all_four_at_least"] == pytest.approx(39.8 - 34 * upper_bound(1, 30, 0.95))
    whole = suite(400, 1000, fell=2, rest=0, fell_drawn=1, drawn=200)
    assert whole["all_four_at_least"] == whole["all_four_at_most"]
