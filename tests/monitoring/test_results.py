"""Rounds as JSON: what is read back is what was written, and what cannot be a round is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfmcl.common.errors import BadInput
from dfmcl.monitoring.results import (
    PATHS,
    REASONS,
    SKIPS,
    AttackResult,
    Query,
    Replayed,
    ReplayResult,
    Round,
    RoundFailure,
    RoundResult,
    RoundSkipped,
    compared,
    round_from_json,
)
from tests.monitoring.greys import measured, one_round, plan

finite = st.floats(0, 1e12, allow_nan=False)
count = st.integers(0, 10**9)
queries = st.lists(st.builds(Query, st.integers(0, 64), finite, st.sampled_from(["", *REASONS])), max_size=4).map(tuple)
words = st.text(max_size=20)
paths = st.sampled_from(PATHS)


@st.composite
def results(draw_value: st.DrawFn) -> RoundResult:
    size = draw_value(st.integers(1, 12))
    flags = st.lists(st.booleans(), min_size=size, max_size=size).map(tuple)
    attacks = st.lists(st.builds(AttackResult, words, flags, count), max_size=3).map(tuple)
    further = st.lists(st.builds(Replayed, words, count, count), max_size=2).map(tuple)
    replay = st.none() | st.builds(ReplayResult, count, count, finite, further)
    version = st.integers(1, 99).map(str)
    fields = [count, paths, words, version, st.just("linf"), words, finite, finite, flags, attacks, queries, replay]
    values: list[Any] = [draw_value(field) for field in fields]
    return RoundResult(*values)


failures = st.builds(RoundFailure, count, paths, words, st.sampled_from(REASONS), words, finite, finite, queries)
skips = st.builds(RoundSkipped, count, paths, words, st.sampled_from(SKIPS), words, finite, finite, queries)


@given(st.one_of(results(), failures, skips))
def test_a_round_survives_json(outcome: Round) -> None:
    """What is read back equals what was written, through real JSON text."""
    assert round_from_json(json.loads(json.dumps(outcome.to_json(), allow_nan=False))) == outcome


def test_pictures_stay_in_memory() -> None:
    """What got through is shown on the page and written nowhere."""
    result = measured(one_round(plan()))
    assert result.examples
    assert "examples" not in result.to_json()


DAMAGE: dict[str, dict[str, Any]] = {
    "format": {"format": "dfmcl.round/1"},
    "flags": {"correct": "0101"},
    "no flags": {"correct": ""},
    "unknown key": {"surprise": 1},
    "attack": {"attacks": [{"name": "fgsm"}]},
    "query": {"queries": [{"images": 1}]},
    "query's reason": {"queries": [{"images": 1, "seconds": 1.0, "reason": "weather"}]},
    "query's images": {"queries": [{"images": "1", "seconds": 1.0, "reason": ""}]},
    "queries": {"queries": 3},
    "outcome": {"outcome": "failed"},
    "outcome of another kind": {"outcome": "splendid"},
    "way": {"via": "carrier pigeon"},
    "version": {"version": "<b>1</b>"},
    "number": {"number": "1"},
    "number that is true": {"number": True},
    "time": {"started": "yesterday"},
    "duration": {"seconds": float("nan")},
    "replay": {"replay": {"images": 3}},
    "replay's counts": {"replay": {"images": 3.5, "mismatches": 0, "difference": 0.0}},
    "further threats": {"replay": {"images": 3, "mismatches": 0, "difference": 0.0, "further": [{"kind": "patch"}]}},
    "further threats' counts": {
        "replay": {
            **{"images": 3, "mismatches": 0, "difference": 0.0},
            "further": [{"kind": "patch", "images": "1", "mismatches": 0}],
        }
    },
    "a further threat's name": {
        "replay": {
            **{"images": 3, "mismatches": 0, "difference": 0.0},
            "further": [{"kind": 7, "images": 1, "mismatches": 0}],
        }
    },
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_is_bad_input(damage: dict[str, object]) -> None:
    """Of another format, with missing, unknown or contradictory entries, or words that would become labels."""
    whole = measured(one_round(plan())).to_json()
    with pytest.raises(BadInput, match=r"^round: "):
        round_from_json(whole | damage)


@pytest.mark.parametrize("outcome", ["failed", "skipped"])
def test_an_unknown_reason_is_bad_input(outcome: str) -> None:
    """Reasons are a closed set on disk too."""
    fields = {"number": 1, "via": "triton", "model": "m", "message": "", "started": 0.0, "seconds": 0.0, "queries": []}
    value = {"format": "dfmcl.round/2", "outcome": outcome, **fields}
    assert round_from_json(value | {"reason": {"failed": "slow", "skipped": "budget"}[outcome]})
    with pytest.raises(BadInput, match="unknown words"):
        round_from_json(value | {"reason": "weather"})


@pytest.mark.parametrize("value", [[], None, "dfmcl.round/2", 3])
def test_what_is_no_object_is_bad_input(value: object) -> None:
    """A line of JSON may be anything."""
    with pytest.raises(BadInput, match=r"^round: format is"):
        round_from_json(value)  # type: ignore[arg-type]  # which is the point


EXPECTED = np.array([[4.0, -8.0], [1.0, 2.0]], np.float32)


@pytest.mark.parametrize(
    ("off", "mismatches", "difference"),
    [(0.0, 0, 0.0), (0.0799, 0, 0.99875), (0.0801, 1, 1.00125), (8.0, 1, 100.0)],
)
def test_logits_are_compared_by_the_largest_one(off: float, mismatches: int, difference: float) -> None:
    """Tolerated is a share of the largest logit of all; beyond it an image is a mismatch, whatever its label."""
    found = EXPECTED + np.array([[0.0, off], [0.0, 0.0]], np.float32)
    result = compared(found, EXPECTED, 0.01)
    assert (result.images, result.mismatches) == (2, mismatches)
    assert result.difference == pytest.approx(difference, rel=1e-4)


def test_small_logits_are_not_held_to_smaller_differences() -> None:
    """Below 1 the tolerance is absolute."""
    assert compared(np.full((1, 2), 0.009, np.float32), np.zeros((1, 2), np.float32), 0.01).mismatches == 0


def test_a_difference_is_always_a_number() -> None:
    """Also of the largest floats, of logits for other classes, and where one side is not finite."""
    huge = np.full((1, 2), np.finfo(np.float32).max)
    wild = np.array([[0, np.nan]], np.float32)
    pairs = [(-huge, huge / 1e30), (np.zeros((1, 3), np.float32), huge), (wild, huge), (huge, wild), (wild, wild)]
    for found, expected in pairs:
        result = compared(found, expected, 1e-3)
        assert result.mismatches == 1
        json.dumps(result.difference, allow_nan=False)
