"""When robustness is called lost: each reason alone, and none at what the gate recorded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dfmcl.monitoring.bounds import RISK, Bounds, limit
from dfmcl.monitoring.journal import VersionTotals
from dfmcl.monitoring.lost import LOSSES, bars, losses
from dfmcl.monitoring.releases import Attested
from dfmcl.monitoring.results import AttackResult, ReplayResult, RoundResult
from dfmcl.robustness.statistics import Share

ATTACKS = ("mi-fgsm-10", "pgd-10")
OURS = "a" * 64
LIMIT = limit(43_200, 8)
# At the gate: 95 % clean, 50 % with the weights, and 70 % under the transfer attacks of this watch's surrogates.
ATTESTED = Attested(
    state="passed",
    model_sha256="e" * 64,
    policy_sha256="f" * 64,
    checkpoint_sha256="",
    norm="linf",
    epsilon="8/255",
    clean=Share(950, 1000),
    robust=Share(500, 1000),
    clean_threshold=0.9,
    robust_threshold=0.45,
    evaluated=0.0,
    transfer={(OURS, attack): Share(700, 1000) for attack in ATTACKS},
)


def seen(
    clean: float, held: tuple[float, float], *, rounds: int = 150, replay: ReplayResult | None = None
) -> VersionTotals:
    """Totals after so many rounds of 32 images; held: share under each attack of all images."""
    rng, totals = np.random.default_rng(0), VersionTotals("1")
    for number in range(1, rounds + 1):
        luck = rng.random(32)
        correct = tuple((luck < clean).tolist())
        attacks = tuple(
            AttackResult(name, tuple((luck < share).tolist()), 32) for name, share in zip(ATTACKS, held, strict=True)
        )
        result = RoundResult(
            *(number, "triton", "m", "1", "linf", "8/255", 0.0, 1.0), correct, attacks, queries=(), replay=replay
        )
        totals = totals.after(result, LIMIT)
    return totals


def proven(totals: VersionTotals, attested: Attested | None, norm: str, epsilon: str, surrogates: str) -> set[str]:
    """By a watch in that ball, with those surrogates, the transfer attacks and a search."""
    figures: dict[str, tuple[()]] = dict.fromkeys([*ATTACKS, "square-100"], ())
    return set(losses(totals, bars(attested, norm, epsilon, surrogates, figures) if attested else {}))


def found(totals: VersionTotals, attested: Attested | None = ATTESTED, surrogates: str = OURS) -> set[str]:
    return proven(totals, attested, "linf", "8/255", surrogates)


def test_as_gated_nothing_is_lost() -> None:
    """Live figures at the gate's own, over hours: no reason."""
    good = ReplayResult(16, 0, 0.2)
    assert found(seen(0.95, (0.7, 0.7), replay=good)) == set()


def test_before_the_first_round_nothing_is_lost() -> None:
    """Nothing was seen."""
    assert found(VersionTotals("1")) == set()


@pytest.mark.parametrize(
    ("totals", "attested", "expected"),
    [
        (seen(0.95, (0.7, 0.7), rounds=1, replay=ReplayResult(16, 1, 3.0)), ATTESTED, {"integrity"}),
        (seen(0.95, (0.7, 0.7), rounds=1, replay=ReplayResult(16, 1, 3.0)), None, {"integrity"}),
        (seen(0.95, (0.3, 0.3)), replace(ATTESTED, transfer={}), {"threshold"}),
        (seen(0.95, (0.55, 0.7)), ATTESTED, {"transfer"}),
        (seen(0.95, (0.7, 0.55)), ATTESTED, {"transfer"}),
        (seen(0.85, (0.7, 0.7)), ATTESTED, {"clean"}),
        (seen(0.85, (0.7, 0.7)), replace(ATTESTED, clean_threshold=None), {"clean"}),
        (seen(0.8, (0.7, 0.7)), replace(ATTESTED, clean=Share(9, 10)), {"clean"}),
        (seen(0.3, (0.2, 0.2), replay=ReplayResult(16, 16, 99.0)), ATTESTED, set(LOSSES)),
    ],
    ids=[
        *("integrity", "integrity without evidence", "threshold", "transfer", "transfer of another attack"),
        *("clean by both", "clean by the gate's figure", "clean by the threshold", "all"),
    ],
)
def test_each_loss_alone(totals: VersionTotals, attested: Attested | None, expected: set[str]) -> None:
    """What has fallen is named, and nothing else."""
    assert found(totals, attested) == expected


@pytest.mark.parametrize(
    ("attested", "surrogates"),
    [
        (replace(ATTESTED, norm="l2"), OURS),
        (replace(ATTESTED, epsilon="4/255"), OURS),
    ],
    ids=["norm", "radius"],
)
def test_figures_of_another_ball_are_not_compared(attested: Attested, surrogates: str) -> None:
    """The gate's threshold at another radius says nothing about this one."""
    assert found(seen(0.95, (0.2, 0.2)), attested, surrogates) == set()


def test_a_search_below_the_threshold_is_a_loss() -> None:
    """Every attack alone is an upper bound of robust accuracy, one that only asks too."""
    totals = seen(0.95, (0.7, 0.7))
    for number in range(1, 60):
        found_by_asking = AttackResult("square-100", (True,) * 2 + (False,) * 14, 900)
        totals = totals.after(
            RoundResult(
                *(number, "gateway", "m", "1", "linf", "8/255", 0.0, 1.0), (True,) * 16, (found_by_asking,), queries=()
            ),
            LIMIT,
        )
    assert found(totals) == {"threshold"}


def test_figures_of_other_surrogates_are_not_compared() -> None:
    """Images crafted on other surrogates transfer as they do."""
    assert found(seen(0.95, (0.55, 0.55)), surrogates="b" * 64) == set()


def test_without_a_threshold_none_is_missed() -> None:
    """A policy that asks for nothing at its own radius cannot be broken."""
    assert found(seen(0.95, (0.2, 0.2)), replace(ATTESTED, robust_threshold=None, transfer={})) == set()


def test_integrity_comes_back() -> None:
    """It is a fact about the last round that replayed anything."""
    totals = seen(0.95, (0.7, 0.7), rounds=1, replay=ReplayResult(16, 1, 3.0))
    again = totals.after(replace(totals.recent[-1], replay=ReplayResult(16, 0, 0.1)), LIMIT)
    assert found(again) == set()
    without = totals.after(replace(totals.recent[-1], replay=None), LIMIT)
    assert found(without) == {"integrity"}


def test_a_lucky_gate_is_no_loss() -> None:
    """The gate's 100 images may have been luckier than 39 of 40 samples, the most that its 95 % interval allows for:
    what is compared allows for one in 100 versions, all figures together."""
    lucky = replace(ATTESTED, clean=Share(98, 100), clean_threshold=None, transfer={})
    unproven = Bounds(LIMIT).after(922_000, 1_000_000, 0.0)
    assert 0.922 < unproven.stretch_upper < 0.925
    totals = VersionTotals("1", bounds={"clean": unproven})
    assert lucky.clean.bounds[0] > 0.925 > 0.9
    assert found(totals, lucky) == set()
    proven = Bounds(LIMIT).after(897_000, 1_000_000, 0.0)
    assert proven.stretch_upper < 0.9
    assert found(replace(totals, bounds={"clean": proven}), lucky) == {"clean"}
    assert RISK == 0.01
