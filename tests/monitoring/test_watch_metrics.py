"""The exposition: what a Prometheus parser reads equals the rounds, and the series are few and closed."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from scipy.stats import binomtest

from dfmcl.monitoring.bounds import Bounds, limit
from dfmcl.monitoring.budget import Budget
from dfmcl.monitoring.journal import KEPT_EXAMPLES, KEPT_FAILURES, POINTS, RECENT, VERSIONS, Histogram, Journal
from dfmcl.monitoring.lost import LOSSES
from dfmcl.monitoring.metrics import RoundsCollector
from dfmcl.monitoring.mitigation import ACTIONS, OUTCOMES
from dfmcl.monitoring.releases import STATES, Attested, Release
from dfmcl.monitoring.results import (
    GATEWAY,
    PATHS,
    REASONS,
    SKIPS,
    TRITON,
    AttackResult,
    Example,
    Query,
    ReplayResult,
    Round,
    RoundFailure,
    RoundResult,
    RoundSkipped,
)
from dfmcl.monitoring.snapshot import AttackInfo, Identity, Snapshot
from dfmcl.robustness.statistics import Share

ATTACKS = ("mi-fgsm-10", "pgd-10")
SEARCH = "square-100"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]  # by name and labels
OURS = "a" * 64
LIMIT = limit(43_200, 10)
ATTESTED = Attested(
    state="passed",
    model_sha256="e" * 64,
    policy_sha256="f" * 64,
    checkpoint_sha256="c" * 64,
    norm="linf",
    epsilon="8/255",
    clean=Share(97, 100),
    robust=Share(55, 100),
    clean_threshold=0.9,
    robust_threshold=0.45,
    evaluated=1.7e9,
    transfer={(OURS, "pgd-10"): Share(60, 100), ("b" * 64, "pgd-10"): Share(99, 100)},
)
RELEASES = {"1": Release("passed", ATTESTED, verified=True, expires=1.9e9)}
IDENTITY = Identity(
    version="0.1.0",
    revision="abc",
    model="digits",
    norm="linf",
    epsilon="8/255",
    attacks=(
        *(AttackInfo(name, 10, "small+wide", "d" * 64) for name in ATTACKS),
        AttackInfo(SEARCH, 100, "", "d" * 64),
    ),
    surrogates_sha256=OURS,
    interval_seconds={TRITON: 60.0, GATEWAY: 300.0},
)


def result(number: int = 1, version: str = "1") -> RoundResult:
    """Four images: three right; the first attack flips one of them and the second another; four replayed."""
    return RoundResult(
        number=number,
        via=TRITON,
        model="digits",
        version=version,
        norm="linf",
        epsilon="8/255",
        started=1000.0 * number,
        seconds=3.0,
        correct=(True, True, True, False),
        attacks=(
            AttackResult("mi-fgsm-10", (True, True, False, False), 3),
            AttackResult("pgd-10", (True, False, True, False), 3),
        ),
        queries=(Query(4, 0.004), Query(3, 0.02), Query(3, 0.02)),
        replay=ReplayResult(4, 1, 1.5),
    )


def search(number: int = 1, version: str = "1") -> RoundResult:
    """Two images through the gateway, both right; the search flips one after 30 questions."""
    held = AttackResult(SEARCH, (True, False), 130)
    return replace(
        result(number, version), via=GATEWAY, correct=(True, True), attacks=(held,), replay=None, seconds=40.0
    )


def failure(number: int = 1, reason: str = "timeout", via: str = TRITON) -> RoundFailure:
    queries = (Query(4, 0.1), Query(3, 5.0, reason))
    return RoundFailure(number, via, "digits", reason, "late", 1000.0 * number, 5.0, queries)


def skip(number: int = 1, reason: str = "budget") -> RoundSkipped:
    return RoundSkipped(number, TRITON, "digits", reason, "no room", 1000.0 * number)


def journal(*outcomes: Round) -> Journal:
    seen = Journal(LIMIT)
    for outcome in outcomes:
        seen = seen.after(outcome)
    return seen


def snapshot(seen: Journal, **changes: Any) -> Snapshot:
    """Of a journal, with the evidence of version 1."""
    fields = {
        "releases": RELEASES,
        "losses": {},
        "bars": {"1": {("clean", "clean"): 0.9}},
        "budget": Budget(20_000, 3600.0, used=113),
    }
    return Snapshot(**{"journal": seen, **fields, **changes})


def samples(seen: Journal, identity: Identity = IDENTITY, **changes: Any) -> Samples:
    """Every sample that Prometheus would read, by name and labels; both formats say the same."""
    registry = CollectorRegistry()
    registry.register(RoundsCollector(identity, lambda: snapshot(seen, **changes)))
    plain = _flat(parse(generate_latest(registry).decode()))
    assert plain == _flat(parse_openmetrics(generate_openmetrics(registry).decode()))
    return plain


def _flat(families: Iterable[Metric]) -> Samples:
    found: Samples = {}
    for family in families:
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def value(seen: Journal, name: str, **labels: str) -> float:
    return samples(seen)[name, frozenset({"model": "digits", **labels}.items())]


V = {"version": "1"}
BALL = {**V, "norm": "linf", "epsilon": "8/255"}
A1, A2, A3 = ({**BALL, "attack": name} for name in (*ATTACKS, SEARCH))
DIRECT, OUTSIDE = {"via": TRITON}, {"via": GATEWAY}


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("robustness_clean_samples_total", V, 8),
        ("robustness_clean_correct_total", V, 6),
        ("robustness_clean_accuracy_ratio", V, 0.75),
        ("robustness_attack_samples_total", A1, 8),
        ("robustness_attack_correct_total", A1, 4),
        ("robustness_attack_attempts_total", A1, 6),
        ("robustness_attack_successes_total", A1, 2),
        ("robustness_attack_queries_total", A1, 6),
        ("robustness_attack_samples_total", A3, 2),
        ("robustness_attack_queries_total", A3, 130),
        ("robustness_robust_accuracy_ratio", A1, 0.5),
        ("robustness_robust_accuracy_ratio", A3, 0.5),
        ("robustness_attack_success_ratio", A1, 1 / 3),
        ("robustness_worst_case_accuracy_ratio", BALL, 0.25),
        ("robustness_replay_samples_total", V, 8),
        ("robustness_replay_mismatches_total", V, 2),
        ("robustness_replay_difference_ratio", V, 1.5),
        ("robustness_target_integrity", V, 0),
        ("robustness_target_up", DIRECT, 0),
        ("robustness_target_up", OUTSIDE, 1),
        ("robustness_probe_rounds_total", DIRECT, 3),
        ("robustness_probe_rounds_total", OUTSIDE, 1),
        ("robustness_probe_round_failures_total", {**DIRECT, "reason": "timeout"}, 1),
        ("robustness_probe_round_failures_total", {**DIRECT, "reason": "unavailable"}, 0),
        ("robustness_probe_round_failures_total", {**OUTSIDE, "reason": "timeout"}, 0),
        ("robustness_probe_rounds_skipped_total", {**DIRECT, "reason": "budget"}, 1),
        ("robustness_probe_rounds_skipped_total", {**DIRECT, "reason": "paused"}, 0),
        ("robustness_probe_queries_total", DIRECT, 8),
        ("robustness_probe_query_failures_total", {**DIRECT, "reason": "timeout"}, 1),
        ("robustness_probe_images_total", DIRECT, 27),
        ("robustness_probe_query_duration_seconds_count", DIRECT, 8),
        ("robustness_probe_query_duration_seconds_sum", DIRECT, 5.188),
        ("robustness_probe_query_duration_seconds_bucket", {**DIRECT, "le": "0.005"}, 2),
        ("robustness_probe_query_duration_seconds_bucket", {**DIRECT, "le": "0.025"}, 6),
        ("robustness_probe_query_duration_seconds_bucket", {**DIRECT, "le": "0.1"}, 7),
        ("robustness_probe_query_duration_seconds_bucket", {**DIRECT, "le": "5.0"}, 8),
        ("robustness_probe_round_duration_seconds_sum", DIRECT, 11),
        ("robustness_probe_round_duration_seconds_sum", OUTSIDE, 40),
        ("robustness_probe_last_round_duration_seconds", DIRECT, 5),
        ("robustness_probe_last_success_timestamp_seconds", DIRECT, 2003),
        ("robustness_probe_last_attempt_timestamp_seconds", DIRECT, 3000),
        ("robustness_probe_interval_seconds", DIRECT, 60),
        ("robustness_probe_interval_seconds", OUTSIDE, 300),
        ("robustness_probe_query_budget", {}, 20_000),
        ("robustness_probe_query_budget_used", {}, 113),
        ("robustness_probe_query_budget_window_seconds", {}, 3600),
        ("robustness_probe_paused", {}, 0),
        ("robustness_probe_low_priority", {}, 0),
        ("robustness_probe_prepared_rounds", {}, 0),
        ("robustness_probe_record_failures_total", {}, 0),
        ("robustness_mitigations_total", {"action": "webhook", "outcome": "ok"}, 0),
        ("robustness_gate_threshold_ratio", BALL, 0.45),
        ("robustness_gate_clean_threshold_ratio", V, 0.9),
        ("robustness_gate_accuracy_ratio", BALL, 0.55),
        ("robustness_gate_clean_accuracy_ratio", V, 0.97),
        ("robustness_gate_transfer_accuracy_ratio", A2, 0.6),
        ("robustness_gate_evaluated_timestamp_seconds", V, 1.7e9),
        ("robustness_gate_expires_timestamp_seconds", V, 1.9e9),
        ("robustness_gate_verified", V, 1),
        ("robustness_gate_state", {**V, "state": "passed"}, 1),
        ("robustness_gate_state", {**V, "state": "failed"}, 0),
        ("robustness_target_info", {**V, "sha256": "e" * 64, "policy_sha256": "f" * 64}, 1),
        ("robustness_loss_proven", {**V, "reason": "integrity"}, 0),
    ],
)
def test_each_metric_says_what_the_rounds_said(name: str, labels: dict[str, str], expected: float) -> None:
    """Two equal rounds, a search, one that failed and one left out, counted by hand."""
    seen = journal(result(1), result(2), search(1), failure(3), skip(4))
    assert value(seen, name, **labels) == pytest.approx(expected)


def test_what_the_loop_does_is_said_as_it_is() -> None:
    """Kill switch, priority, rounds ahead, lost records, what was done, and which losses are proven."""
    found = samples(
        journal(result()),
        paused=True,
        low_priority=True,
        prepared=2,
        record_failures=3,
        mitigations={("webhook", "failed"): 4},
        losses={"1": frozenset({"integrity", "clean"})},
    )

    def one(name: str, **labels: str) -> float:
        return found[f"robustness_{name}", frozenset({"model": "digits", **labels}.items())]

    assert one("probe_paused") == one("probe_low_priority") == 1
    assert (one("probe_prepared_rounds"), one("probe_record_failures_total")) == (2, 3)
    assert one("mitigations_total", action="webhook", outcome="failed") == 4
    proven = {reason for reason in LOSSES if one("loss_proven", reason=reason, **V)}
    assert proven == {"integrity", "clean"}


@pytest.mark.parametrize(
    ("name", "labels", "of"),
    [
        ("robustness_clean_accuracy", V, "clean"),
        ("robustness_robust_accuracy", A1, ATTACKS[0]),
        ("robustness_robust_accuracy", A3, SEARCH),
        ("robustness_worst_case_accuracy", BALL, "worst_case"),
    ],
)
def test_live_bounds_are_those_of_their_window(name: str, labels: dict[str, str], of: str) -> None:
    """Against Bounds on the counts of every round, while the ratio is over the recent ones; the search counts once."""
    outcomes = [one for number in range(1, 61) for one in (result(number), search(number))]
    seen = journal(*outcomes)
    counts = {"clean": (3, 4), ATTACKS[0]: (2, 4), SEARCH: (1, 2), "worst_case": (1, 4)}
    expected = Bounds(LIMIT)
    for number in range(1, 61):
        expected = expected.after(*counts[of], 1000.0 * number)
    assert value(seen, f"{name}_mean_upper_ratio", **labels) == expected.upper < 1
    assert value(seen, f"{name}_mean_lower_ratio", **labels) == expected.lower
    assert value(seen, f"{name}_mean_rounds", **labels) == expected.rounds == 60
    assert value(seen, f"{name}_mean_start_timestamp_seconds", **labels) == expected.start == 1000
    assert value(seen, f"{name}_stretch_upper_ratio", **labels) == expected.stretch_upper < expected.upper
    assert value(seen, f"{name}_ratio", **labels) == counts[of][0] / counts[of][1]


@pytest.mark.parametrize(
    ("name", "labels", "k", "n"),
    [
        ("robustness_gate_accuracy", BALL, 55, 100),
        ("robustness_gate_clean_accuracy", V, 97, 100),
        ("robustness_gate_transfer_accuracy", A2, 60, 100),
    ],
)
def test_the_gates_bounds_are_exact(name: str, labels: dict[str, str], k: int, n: int) -> None:
    """Lower and upper are the Clopper-Pearson interval as scipy computes it."""
    interval = binomtest(k, n).proportion_ci(0.95, "exact")
    seen = journal(result())
    assert value(seen, f"{name}_lower_ratio", **labels) == pytest.approx(interval.low)
    assert value(seen, f"{name}_upper_ratio", **labels) == pytest.approx(interval.high)


def test_only_recent_rounds_make_the_ratio() -> None:
    """After twenty rounds of another kind nothing of the first is in it; totals keep all, and the bounds are of the
    rounds since the change."""
    good = [replace(result(number), correct=(True,) * 4) for number in range(1, 31)]
    seen = journal(*(result(number) for number in range(1, 31)), *good)
    assert value(seen, "robustness_clean_accuracy_ratio", **V) == 1
    assert value(seen, "robustness_clean_correct_total", **V) == 30 * 3 + 30 * 4
    assert value(seen, "robustness_clean_accuracy_mean_rounds", **V) <= 45


def test_a_search_that_was_not_lately_has_no_ratio() -> None:
    """No figure is NaN: what is not in recent rounds is left out, and its bounds stay."""
    seen = journal(search(), *(result(number) for number in range(1, RECENT + 1)))
    found = samples(seen)
    attacks = {dict(labels)["attack"] for name, labels in found if name == "robustness_robust_accuracy_ratio"}
    bounded = {
        dict(labels)["attack"] for name, labels in found if name == "robustness_robust_accuracy_mean_upper_ratio"
    }
    assert attacks == set(ATTACKS)
    assert bounded == {*ATTACKS, SEARCH}
    assert not any(math.isnan(number) for number in found.values())


@pytest.mark.parametrize(
    "outcome", [failure(2), failure(2, via=GATEWAY), skip(2)], ids=["failed", "gateway", "skipped"]
)
def test_a_round_without_figures_changes_none(outcome: Round) -> None:
    """Counts and ratios stay those of the rounds that were measured; only the sidecar's own metrics move."""

    def figures(seen: Journal) -> Samples:
        own = ("robustness_probe_", "robustness_target_up")
        return {key: number for key, number in samples(seen).items() if not key[0].startswith(own)}

    assert figures(journal(result(1))) == figures(journal(result(1), outcome))


def test_a_round_that_was_left_out_is_no_attempt() -> None:
    """up, attempts and durations stay; images that were asked about before the kill switch are counted."""
    before, after = journal(result(1)).paths[TRITON], journal(result(1), skip(2, "paused")).paths[TRITON]
    assert replace(after, skips=before.skips) == before
    broken_off = replace(skip(2, "paused"), queries=(Query(5, 0.1),))
    assert journal(result(1), broken_off).paths[TRITON].images == before.images + 5


def test_before_the_first_round_nothing_is_claimed() -> None:
    """Counters of failures are there at 0 for rate(); up, accuracies and versions are unknown and absent."""
    found = samples(Journal(LIMIT), releases={}, bars={})
    names = {name for name, _ in found}
    for name, reasons in (
        ("robustness_probe_round_failures_total", REASONS),
        ("robustness_probe_query_failures_total", REASONS),
        ("robustness_probe_rounds_skipped_total", SKIPS),
    ):
        counts = {
            (dict(labels)["via"], dict(labels)["reason"]): count for (n, labels), count in found.items() if n == name
        }
        assert counts == {(via, reason): 0 for via in PATHS for reason in reasons}
    assert not names & {"robustness_target_up", "robustness_clean_accuracy_ratio", "robustness_clean_samples_total"}
    assert "version" not in {key for name, labels in found for key, _ in labels if name != "robustness_build_info"}


def test_without_a_gateway_there_is_no_such_way() -> None:
    """No series of a path that nobody takes."""
    direct = replace(IDENTITY, interval_seconds={TRITON: 60.0}, attacks=IDENTITY.attacks[:2])
    assert {dict(labels).get("via") for _, labels in samples(journal(result()), direct)} == {None, TRITON}


@pytest.mark.parametrize(
    ("outcome", "up"),
    [
        (result(), 1),
        (failure(reason="unavailable"), 0),
        (failure(reason="server_error"), 0),
        (failure(reason="timeout"), 0),
        (failure(reason="version_changed"), 1),
        (failure(reason="queue_full"), 1),
        (failure(reason="bad_output"), 1),
    ],
    ids=lambda value: getattr(value, "reason", None),
)
def test_up_is_whether_the_endpoint_answered(outcome: Round, up: float) -> None:
    """A server that is being replaced, is busy, or answers nonsense is up, although its figures are thrown away."""
    assert value(journal(outcome), "robustness_target_up", **DIRECT) == up


def test_our_own_bugs_say_nothing_about_the_server() -> None:
    """up keeps its value."""
    assert value(journal(result(), failure(2, "internal")), "robustness_target_up", **DIRECT) == 1
    assert value(journal(failure(1, "unavailable"), failure(2, "internal")), "robustness_target_up", **DIRECT) == 0


def test_every_label_value_comes_from_a_closed_set() -> None:
    """Names of the configuration, reasons, states, bucket bounds and versions that are numbers: nothing else."""
    closed = {
        "model": {"digits"},
        "via": set(PATHS),
        "attack": {*ATTACKS, SEARCH},
        "norm": {"linf"},
        "epsilon": {"8/255"},
        "reason": {*REASONS, *SKIPS, *LOSSES},
        "figure": {"clean", "worst_case", *ATTACKS, SEARCH},
        "state": set(STATES),
        "surrogate": {"small+wide", ""},
        "steps": {"10", "100"},
        "params_sha256": {"d" * 64},
        "sha256": {"e" * 64},
        "policy_sha256": {"f" * 64},
        "action": set(ACTIONS),
        "outcome": set(OUTCOMES),
        "revision": {"abc"},
    }
    seen = journal(*(failure(i, reason) for i, reason in enumerate(REASONS, 1)), result(9), search(1), skip(10))
    for name, labels in samples(seen):
        for key, text in labels:
            if key == "version":
                assert text == "0.1.0" if name == "robustness_build_info" else text.isdecimal()
            elif key == "le":
                assert float(text) > 0
            else:
                assert text in closed[key], f"{name}: {key}={text}"


def test_series_are_bounded_and_old_versions_vanish() -> None:
    """Fifty rounds of fifty versions leave as many series as two do."""
    seen = journal(*(result(i, str(i)) for i in range(1, 51)))
    found = samples(seen, releases={}, bars={})
    assert len(found) == len(samples(journal(result(1, "1"), result(2, "2")), releases={}, bars={}))
    versions = {dict(labels).get("version") for name, labels in found if name != "robustness_build_info"}
    assert versions - {None} == {"49", "50"}
    assert VERSIONS == 2


def test_a_journal_does_not_grow_with_rounds() -> None:
    """After 2,000 rounds of all kinds: recent ones, failures, examples and the curve have their ends."""
    picture = Example("pgd-10", np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8), 1, 2)
    seen = Journal(LIMIT)
    for number in range(1, 1001):
        seen = seen.after(replace(result(number), examples=(picture,) * 3)).after(failure(number, via=GATEWAY))
    assert len(seen.recent) == RECENT
    assert len(seen.kept_failures) == KEPT_FAILURES
    assert len(seen.examples) == KEPT_EXAMPLES
    assert len(seen.points) == POINTS
    assert seen.current is not None
    assert len(seen.current.recent) == RECENT


def test_two_versions_side_by_side_keep_their_counts() -> None:
    """Rounds that alternate between two versions add up for each, and prove something about each alone."""
    seen = journal(result(1, "1"), result(2, "2"), result(3, "1"))
    assert value(seen, "robustness_clean_samples_total", version="1") == 8
    assert value(seen, "robustness_clean_samples_total", version="2") == 4
    assert seen.current is not None
    assert seen.current.version == "1"


def test_a_round_without_attempts_has_no_success_ratio() -> None:
    """Zero of zero flipped is not a ratio; everything else is still said."""
    wrong = (False,) * 4
    hopeless = replace(result(), correct=wrong, attacks=tuple(AttackResult(name, wrong, 0) for name in ATTACKS))
    names = {name for name, _ in samples(journal(hopeless))}
    assert "robustness_attack_success_ratio" not in names
    assert "robustness_robust_accuracy_ratio" in names


def test_names_and_help_follow_the_conventions() -> None:
    """One prefix, base units, no _created series, and a help text that calls the live figures upper bounds."""
    registry = CollectorRegistry()
    registry.register(RoundsCollector(IDENTITY, lambda: snapshot(journal(result(), search(), failure(2)))))
    text = generate_openmetrics(registry).decode()
    families = list(parse_openmetrics(text))
    assert "_created" not in text
    for family in families:
        assert re.fullmatch(r"robustness_[a-z0-9_]+", family.name)
        assert family.documentation.endswith(".")
        if family.name.endswith("_ratio") and family.name != "robustness_replay_difference_ratio":
            assert "0 to 1" in family.documentation
    for name in ("robust_accuracy_ratio", "worst_case_accuracy_ratio", "attack_correct"):
        (family,) = (family for family in families if family.name == f"robustness_{name}")
        assert "Upper bound of robust accuracy" in family.documentation


LIVE = (
    "ratio",
    "mean_lower_ratio",
    "mean_upper_ratio",
    "mean_rounds",
    "mean_start_timestamp_seconds",
    "stretch_upper_ratio",
)
V_, B_, A_, VIA_ = "model version", "model version norm epsilon", "model version norm epsilon attack", "model via"
# What rules, dashboards and others' queries are written for; * stands for the three of a gated figure and its bounds, +
# for the six of a live one.
CONTRACT = {
    "build_info": "version revision",
    "attack_info": "attack norm epsilon surrogate steps params_sha256",
    "target_info": "model version sha256 policy_sha256",
    "gate_state": "model version state",
    **dict.fromkeys(("gate_verified", "gate_evaluated_timestamp_seconds", "gate_expires_timestamp_seconds"), V_),
    "gate_threshold_ratio": B_,
    "gate_clean_threshold_ratio": V_,
    "gate_accuracy_*ratio": B_,
    "gate_clean_accuracy_*ratio": V_,
    "gate_transfer_accuracy_*ratio": A_,
    "clean_accuracy_+": V_,
    "robust_accuracy_+": A_,
    "worst_case_accuracy_+": B_,
    "attack_success_ratio": A_,
    **dict.fromkeys(("clean_samples_total", "clean_correct_total"), V_),
    **{f"attack_{what}_total": A_ for what in ("samples", "correct", "attempts", "successes", "queries")},
    **dict.fromkeys(("replay_samples_total", "replay_mismatches_total", "replay_difference_ratio"), V_),
    "target_integrity": V_,
    "loss_proven": "model version reason",
    "loss_bar_ratio": "model version reason figure",
    "target_up": VIA_,
    **{f"probe_{what}_total": VIA_ for what in ("rounds", "queries", "images")},
    **{f"probe_{what}_total": f"{VIA_} reason" for what in ("round_failures", "rounds_skipped", "query_failures")},
    **dict.fromkeys(("probe_query_budget", "probe_query_budget_used", "probe_query_budget_window_seconds"), "model"),
    "probe_interval_seconds": VIA_,
    **dict.fromkeys(("probe_paused", "probe_low_priority", "probe_prepared_rounds"), "model"),
    **{f"probe_{what}_duration_seconds_{part}": VIA_ for what in ("query", "round") for part in ("count", "sum")},
    **{f"probe_{what}_duration_seconds_bucket": f"{VIA_} le" for what in ("query", "round")},
    "probe_last_round_duration_seconds": VIA_,
    **{f"probe_last_{what}_timestamp_seconds": VIA_ for what in ("success", "attempt")},
    "probe_record_failures_total": "model",
    "mitigations_total": "model action outcome",
}


def test_names_and_labels_are_a_contract() -> None:
    """Exactly these series' names, each with exactly these labels."""
    expected = {
        f"robustness_{name.replace('*', part).replace('+', part)}": set(labels.split())
        for name, labels in CONTRACT.items()
        for part in (("", "lower_", "upper_") if "*" in name else LIVE if "+" in name else ("",))
    }
    found = samples(journal(result(), search(), failure(2), skip(3)))
    assert {name: set(dict(labels)) for name, labels in found} == expected


@pytest.mark.parametrize("state", STATES)
def test_exactly_one_state_is_on(state: str) -> None:
    """The state set of a version."""
    found = samples(journal(result()), releases={"1": Release(state)})
    on = [dict(labels)["state"] for (name, labels), x in found.items() if name == "robustness_gate_state" and x]
    assert on == [state]


def test_without_evidence_the_gate_is_missing() -> None:
    """No threshold is exported where none is known, and the state says why."""
    found = samples(journal(result()), releases={"1": Release()})
    labels = frozenset({"model": "digits", "version": "1", "state": "missing"}.items())
    assert found["robustness_gate_state", labels] == 1
    names = {name for name, _ in found if name.startswith(("robustness_gate_", "robustness_target_info"))}
    assert names == {"robustness_gate_state", "robustness_gate_verified"}


def test_failures_outlive_successes() -> None:
    """A failure is still in the history long after as many successes have left it, and both are bounded."""
    seen = journal(failure(1), *(result(i) for i in range(2, 200)))
    assert [outcome.number for outcome in seen.history] == [1, *range(200 - RECENT, 200)]
    assert len(journal(*(failure(i) for i in range(1, 200))).history) == KEPT_FAILURES


def test_rounds_of_two_ways_may_have_one_number() -> None:
    """A kept failure is not hidden by a recent round of the other way."""
    seen = journal(failure(1, via=GATEWAY), *(result(i) for i in range(1, 25)), search(1))
    kept = [(outcome.via, outcome.number) for outcome in seen.history if isinstance(outcome, RoundFailure)]
    assert kept == []  # this very round is in the recent ones again
    seen = journal(failure(5, via=GATEWAY), *(result(i) for i in range(1, 25)))
    assert seen.history[0] == failure(5, via=GATEWAY)


def test_the_curve_follows_the_rounds() -> None:
    """One point a direct round: when, which version, and what was proven then."""
    seen = journal(result(1), search(1), failure(2), result(3, "2"))
    assert [(point.time, point.version, point.value) for point in seen.points] == [
        (1000.0, "1", 0.25),
        (3000.0, "2", 0.25),
    ]
    assert all(0 <= point.lower <= point.upper <= 1 for point in seen.points)


def test_a_new_bound_knows_its_limit() -> None:
    """Whatever the version, what must be won is the watch's."""
    seen = journal(result(1), result(2, "2"))
    limits = {bounds.limit for totals in seen.versions for bounds in totals.bounds.values()}
    assert limits == {LIMIT}


def test_histograms_count_what_lies_on_a_bound_below_it() -> None:
    """Prometheus' buckets are inclusive: le."""
    histogram = Histogram.empty((1.0, 2.0)).observe(1.0).observe(1.5).observe(9.0)
    assert histogram.counts == (1, 1, 1)
    assert histogram.sum == 11.5


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool; apt-get install prometheus")
def test_promtool_finds_nothing_to_say() -> None:
    """Prometheus' own linter accepts names, types and help texts; it does complain about a bad one."""
    registry = CollectorRegistry()
    registry.register(RoundsCollector(IDENTITY, lambda: snapshot(journal(result(), search(), failure(2)))))
    for text, code in ((generate_latest(registry), 0), (b"# TYPE probeCount counter\nprobeCount 1\n", 3)):
        checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
        assert checked.returncode == code, checked.stderr.decode()
