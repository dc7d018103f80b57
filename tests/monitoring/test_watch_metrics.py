"""The exposition: what a Prometheus parser reads equals the rounds, and the series are few and closed."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from scipy.stats import binomtest

from monitoring.journal import KEPT_FAILURES, RECENT, Histogram, Journal
from monitoring.metrics import AttackInfo, Identity, RoundsCollector
from monitoring.release import STATES, Attested
from monitoring.rounds import REASONS, AttackResult, Query, RoundFailure, RoundResult
from robustness.statistics import Share

ATTACKS = ("mi-fgsm-10", "pgd-10")
RELEASE = Attested("passed", "c" * 64, "linf", "8/255", Share(97, 100), Share(55, 100), 0.9, 0.45, 1.7e9)
IDENTITY = Identity(
    version="0.1.0",
    revision="abc",
    model="digits",
    norm="linf",
    epsilon="8/255",
    attacks=tuple(AttackInfo(name, 10, "small+wide", "d" * 64) for name in ATTACKS),
    release=RELEASE,
)
ATTACK_LABELS = {"model": "digits", "norm": "linf", "epsilon": "8/255"}


def result(number: int = 1, version: str = "1") -> RoundResult:
    """Four images: three right, of which the first attack flips one and the second another."""
    return RoundResult(
        number=number,
        model="digits",
        version=version,
        norm="linf",
        epsilon="8/255",
        started=1000.0 * number,
        seconds=3.0,
        correct=(True, True, True, False),
        attacks=(
            AttackResult("mi-fgsm-10", (True, True, False, False)),
            AttackResult("pgd-10", (True, False, True, False)),
        ),
        queries=(Query(4, 0.004), Query(3, 0.02), Query(3, 0.02)),
    )


def failure(number: int = 1, reason: str = "timeout") -> RoundFailure:
    return RoundFailure(number, "digits", reason, "late", 1000.0 * number, 5.0, (Query(4, 0.1), Query(3, 5.0, reason)))


def journal(*outcomes: RoundResult | RoundFailure) -> Journal:
    seen = Journal()
    for outcome in outcomes:
        seen = seen.begun(outcome.started).after(outcome)
    return seen


def samples(seen: Journal, identity: Identity = IDENTITY) -> dict[tuple[str, frozenset], float]:
    """Every sample that Prometheus would read, by name and labels; both formats say the same."""
    registry = CollectorRegistry()
    registry.register(RoundsCollector(identity, lambda: seen))
    plain = _flat(parse(generate_latest(registry).decode()))
    assert plain == _flat(parse_openmetrics(generate_openmetrics(registry).decode()))
    return plain


def _flat(families) -> dict[tuple[str, frozenset], float]:
    found: dict[tuple[str, frozenset], float] = {}
    for family in families:
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def value(seen: Journal, name: str, **labels: str) -> float:
    return samples(seen)[name, frozenset({"model": "digits", **labels}.items())]


A1 = {"version": "1", "attack": "mi-fgsm-10", "norm": "linf", "epsilon": "8/255"}
BALL = {"version": "1", "norm": "linf", "epsilon": "8/255"}


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("robustness_clean_samples_total", {"version": "1"}, 8),
        ("robustness_clean_correct_total", {"version": "1"}, 6),
        ("robustness_clean_accuracy_ratio", {"version": "1"}, 0.75),
        ("robustness_attack_samples_total", A1, 8),
        ("robustness_attack_correct_total", A1, 4),
        ("robustness_attack_attempts_total", A1, 6),
        ("robustness_attack_successes_total", A1, 2),
        ("robustness_robust_accuracy_ratio", A1, 0.5),
        ("robustness_attack_success_ratio", A1, 1 / 3),
        ("robustness_round_samples", A1, 4),
        ("robustness_worst_case_accuracy_ratio", BALL, 0.25),
        ("robustness_target_up", {}, 0),
        ("robustness_probe_rounds_total", {}, 3),
        ("robustness_probe_round_failures_total", {"reason": "timeout"}, 1),
        ("robustness_probe_round_failures_total", {"reason": "unavailable"}, 0),
        ("robustness_probe_queries_total", {}, 8),
        ("robustness_probe_query_failures_total", {"reason": "timeout"}, 1),
        ("robustness_probe_images_total", {}, 27),
        ("robustness_probe_query_duration_seconds_count", {}, 8),
        ("robustness_probe_query_duration_seconds_sum", {}, 5.188),
        ("robustness_probe_query_duration_seconds_bucket", {"le": "0.005"}, 2),
        ("robustness_probe_query_duration_seconds_bucket", {"le": "0.025"}, 6),
        ("robustness_probe_query_duration_seconds_bucket", {"le": "0.1"}, 7),
        ("robustness_probe_query_duration_seconds_bucket", {"le": "5.0"}, 8),
        ("robustness_probe_round_duration_seconds_sum", {}, 11),
        ("robustness_probe_last_round_duration_seconds", {}, 5),
        ("robustness_probe_last_success_timestamp_seconds", {}, 2003),
        ("robustness_probe_last_attempt_timestamp_seconds", {}, 3000),
        ("robustness_gate_threshold_ratio", {"norm": "linf", "epsilon": "8/255"}, 0.45),
        ("robustness_gate_clean_threshold_ratio", {}, 0.9),
        ("robustness_gate_accuracy_ratio", {"norm": "linf", "epsilon": "8/255"}, 0.55),
        ("robustness_gate_clean_accuracy_ratio", {}, 0.97),
        ("robustness_gate_evaluated_timestamp_seconds", {}, 1.7e9),
        ("robustness_gate_state", {"state": "passed"}, 1),
        ("robustness_gate_state", {"state": "failed"}, 0),
    ],
)
def test_each_metric_says_what_the_rounds_said(name: str, labels: dict[str, str], expected: float) -> None:
    """Two equal rounds and a failed one, counted by hand: totals add up, gauges show the last successful round."""
    seen = journal(result(1), result(2), failure(3))
    assert value(seen, name, **labels) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "labels", "k", "n"),
    [
        ("robustness_clean_accuracy", {"version": "1"}, 3, 4),
        ("robustness_robust_accuracy", A1, 2, 4),
        ("robustness_worst_case_accuracy", BALL, 1, 4),
        ("robustness_gate_accuracy", {"norm": "linf", "epsilon": "8/255"}, 55, 100),
    ],
)
def test_bounds_are_exact(name: str, labels: dict[str, str], k: int, n: int) -> None:
    """Lower and upper are the Clopper-Pearson interval as scipy computes it."""
    interval = binomtest(k, n).proportion_ci(0.95, "exact")
    seen = journal(result())
    assert value(seen, f"{name}_lower_ratio", **labels) == pytest.approx(interval.low)
    assert value(seen, f"{name}_upper_ratio", **labels) == pytest.approx(interval.high)


def test_a_failed_round_changes_no_figure() -> None:
    """Counts and ratios stay those of the rounds that succeeded; only the sidecar's own metrics move."""

    def figures(seen: Journal) -> dict[tuple[str, frozenset], float]:
        return {
            key: number
            for key, number in samples(seen).items()
            if not key[0].startswith(("robustness_probe_", "robustness_target_up"))
        }

    assert figures(journal(result(1))) == figures(journal(result(1), failure(2)))


def test_before_the_first_round_nothing_is_claimed() -> None:
    """Counters of failures are there at 0 for rate(); up, accuracies and versions are unknown and absent."""
    found = samples(Journal())
    names = {name for name, _ in found}
    for name in ("robustness_probe_round_failures_total", "robustness_probe_query_failures_total"):
        assert {dict(labels)["reason"]: number for (n, labels), number in found.items() if n == name} == dict.fromkeys(
            REASONS, 0
        )
    assert not names & {"robustness_target_up", "robustness_clean_accuracy_ratio", "robustness_clean_samples_total"}
    assert "version" not in {key for name, labels in found for key, _ in labels if name != "robustness_build_info"}


@pytest.mark.parametrize(
    ("outcome", "up"),
    [(result(), 1), (failure(reason="unavailable"), 0), (failure(reason="version_changed"), 1)],
    ids=["measured", "unavailable", "version changed"],
)
def test_up_is_whether_the_endpoint_answered(outcome: RoundResult | RoundFailure, up: float) -> None:
    """A server that is being replaced is up, although its figures are thrown away."""
    assert value(journal(outcome), "robustness_target_up") == up


def test_every_label_value_comes_from_a_closed_set() -> None:
    """Names of the configuration, reasons, states, bucket bounds and versions that are numbers: nothing else."""
    closed = {
        "model": {"digits"},
        "attack": set(ATTACKS),
        "norm": {"linf", "l2"},
        "epsilon": {"8/255"},
        "reason": set(REASONS),
        "state": set(STATES),
        "surrogate": {"small+wide"},
        "steps": {"10"},
        "params_sha256": {"d" * 64},
        "revision": {"abc"},
    }
    seen = journal(*(failure(i, reason) for i, reason in enumerate(REASONS, 1)), result(9))
    for name, labels in samples(seen):
        for key, text in labels:
            if key == "version":
                assert text == "0.1.0" if name == "robustness_build_info" else text.isdecimal()
            elif key == "le":
                assert float(text) > 0
            else:
                assert text in closed[key], f"{name}: {key}={text}"


def test_series_are_bounded_and_old_versions_vanish() -> None:
    """Fifty rounds of fifty versions leave as many series as two do, and the gauges only the last version's."""
    seen = journal(*(result(i, str(i)) for i in range(1, 51)))
    found = samples(seen)
    assert len(found) == len(samples(journal(result(1, "1"), result(2, "2"))))
    versions = {dict(labels).get("version") for name, labels in found if name != "robustness_build_info"}
    assert versions - {None} == {"49", "50"}
    gauges = {dict(labels)["version"] for name, labels in found if name == "robustness_robust_accuracy_ratio"}
    assert gauges == {"50"}


def test_two_versions_side_by_side_keep_their_counts() -> None:
    """Rounds that alternate between two versions add up for each."""
    seen = journal(result(1, "1"), result(2, "2"), result(3, "1"))
    assert value(seen, "robustness_clean_samples_total", version="1") == 8
    assert value(seen, "robustness_clean_samples_total", version="2") == 4


def test_a_round_without_attempts_has_no_success_ratio() -> None:
    """Zero of zero flipped is not a ratio; everything else is still said."""
    wrong = (False,) * 4
    hopeless = replace(result(), correct=wrong, attacks=tuple(AttackResult(name, wrong) for name in ATTACKS))
    names = {name for name, _ in samples(journal(hopeless))}
    assert "robustness_attack_success_ratio" not in names
    assert "robustness_robust_accuracy_ratio" in names


def test_names_and_help_follow_the_conventions() -> None:
    """One prefix, base units, no _created series, and a help text that calls the live figures upper bounds."""
    registry = CollectorRegistry()
    registry.register(RoundsCollector(IDENTITY, lambda: journal(result(), failure(2))))
    text = generate_openmetrics(registry).decode()
    families = list(parse_openmetrics(text))
    assert "_created" not in text
    for family in families:
        assert re.fullmatch(r"robustness_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        if family.name.endswith("_ratio"):
            assert "0 to 1" in family.documentation
    for name in ("robust_accuracy_ratio", "worst_case_accuracy_ratio", "attack_correct"):
        (family,) = (family for family in families if family.name == f"robustness_{name}")
        assert "Upper bound of robust accuracy" in family.documentation


def test_without_evidence_the_gate_is_missing() -> None:
    """No threshold is exported where none is known, and the state says why."""
    found = samples(journal(result()), replace(IDENTITY, release=None))
    assert found["robustness_gate_state", frozenset({"model": "digits", "state": "missing"}.items())] == 1
    assert not [name for name, _ in found if name.startswith("robustness_gate_") and name != "robustness_gate_state"]


def test_failures_outlive_successes() -> None:
    """A failure is still in the history long after as many successes have left it, and both are bounded."""
    seen = journal(failure(1), *(result(i) for i in range(2, 200)))
    assert [outcome.number for outcome in seen.history] == [1, *range(200 - RECENT, 200)]
    assert len(journal(*(failure(i) for i in range(1, 200))).history) == KEPT_FAILURES


def test_histograms_count_what_lies_on_a_bound_below_it() -> None:
    """Prometheus' buckets are inclusive: le."""
    histogram = Histogram.empty((1.0, 2.0)).observe(1.0).observe(1.5).observe(9.0)
    assert histogram.counts == (1, 1, 1)
    assert histogram.sum == 11.5


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool; apt-get install prometheus")
def test_promtool_finds_nothing_to_say() -> None:
    """Prometheus' own linter accepts names, types and help texts; it does complain about a bad one."""
    registry = CollectorRegistry()
    registry.register(RoundsCollector(IDENTITY, lambda: journal(result(), failure(2))))
    for text, code in ((generate_latest(registry), 0), (b"# TYPE probeCount counter\nprobeCount 1\n", 3)):
        checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
        assert checked.returncode == code, checked.stderr.decode()
