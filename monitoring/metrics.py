"""The journal as Prometheus metrics: one collector that translates a snapshot at each scrape.

Labels come from closed sets: names of the configuration, reasons, states, and the last two served versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from monitoring.journal import AttackTotals, Histogram, Journal
from monitoring.release import STATES, Attested
from robustness.statistics import Share

BOUND = "Upper bound of robust accuracy: the attack knows only surrogates."
Labels = Mapping[str, str]


@dataclass(frozen=True)
class AttackInfo:
    """An attack's definition. surrogate: names of the runs; params_sha256: of all that fixes what it does."""

    name: str
    steps: int
    surrogate: str
    params_sha256: str


@dataclass(frozen=True)
class Identity:
    """What does not change while a watch runs. version, revision: of this program; epsilon such as `8/255`."""

    version: str
    revision: str
    model: str
    norm: str
    epsilon: str
    attacks: tuple[AttackInfo, ...]
    release: Attested | None = None


class RoundsCollector(Collector):
    """Metrics of the journal that `read` returns at that moment."""

    def __init__(self, identity: Identity, read: Callable[[], Journal]) -> None:
        self._identity, self._read = identity, read

    def collect(self) -> Iterator[Metric]:
        journal = self._read()
        yield from _about(self._identity)
        yield from _gate(self._identity)
        yield from _probing(self._identity, journal)
        yield from _clean(self._identity, journal)
        yield from _attacks(self._identity, journal)
        yield from _last_round(self._identity, journal)


def _about(identity: Identity) -> Iterator[Metric]:
    yield _info("robustness_build", "This prober.", [{"version": identity.version, "revision": identity.revision}])
    definitions = [
        {
            "attack": attack.name,
            "norm": identity.norm,
            "epsilon": identity.epsilon,
            "surrogate": attack.surrogate,
            "steps": str(attack.steps),
            "params_sha256": attack.params_sha256,
        }
        for attack in identity.attacks
    ]
    yield _info("robustness_attack", "What stands behind the label attack; epsilon in units of [0, 1].", definitions)


def _gate(identity: Identity) -> Iterator[Metric]:
    release, model = identity.release, {"model": identity.model}
    state = release.state if release else "missing"
    yield _gauge(
        "robustness_gate_state",
        "1 for the verdict in the evidence this watch was given; missing where it was given none.",
        [({**model, "state": name}, float(name == state)) for name in STATES],
    )
    if release is None:
        return
    ball = {**model, "norm": release.norm, "epsilon": release.epsilon}
    yield _gauge(
        "robustness_gate_evaluated_timestamp_seconds", "When the gate ran, unix time.", [(model, release.evaluated)]
    )
    if release.robust_threshold is not None:
        yield _gauge(
            "robustness_gate_threshold_ratio",
            "Robust accuracy that the gate's policy asks for, 0 to 1.",
            [(ball, release.robust_threshold)],
        )
    if release.clean_threshold is not None:
        yield _gauge(
            "robustness_gate_clean_threshold_ratio",
            "Clean accuracy that the gate's policy asks for, 0 to 1.",
            [(model, release.clean_threshold)],
        )
    yield from _shares(
        "robustness_gate_accuracy",
        "Robust accuracy that the gate measured with the model's own gradients, worst case per image",
        [(ball, release.robust)],
    )
    yield from _shares(
        "robustness_gate_clean_accuracy", "Clean accuracy that the gate measured", [(model, release.clean)]
    )


def _probing(identity: Identity, journal: Journal) -> Iterator[Metric]:
    model = {"model": identity.model}
    up = [] if journal.up is None else [(model, float(journal.up))]
    yield _gauge("robustness_target_up", "1 if the endpoint answered the last round, else 0.", up)
    for name, documentation, total in (
        ("rounds", "Rounds started.", journal.rounds),
        ("queries", "Inference requests sent.", journal.queries),
        ("images", "Images sent: the load that probing adds.", journal.images),
    ):
        yield _counter(f"robustness_probe_{name}", documentation, [(model, total)])
    for name, documentation, totals in (
        ("round_failures", "Rounds without figures, by reason.", journal.failures),
        ("query_failures", "Inference requests without a usable answer, by reason.", journal.query_failures),
    ):
        rows = [({**model, "reason": reason}, count) for reason, count in totals.items()]
        yield _counter(f"robustness_probe_{name}", documentation, rows)
    for name, documentation, histogram in (
        ("query_duration", "Time of an inference request seen from here, failed ones too.", journal.query_seconds),
        ("round_duration", "Time of a whole round with crafting, failed ones too.", journal.round_seconds),
    ):
        yield _histogram(f"robustness_probe_{name}_seconds", f"{documentation} In seconds.", model, histogram)
    for name, documentation, value in (
        ("last_round_duration_seconds", "Time of the last finished round in seconds.", journal.last_seconds),
        ("last_success_timestamp_seconds", "End of the last successful round, unix time.", journal.last_success),
        ("last_attempt_timestamp_seconds", "Start of the last round, unix time.", journal.last_attempt),
    ):
        yield _gauge(f"robustness_probe_{name}", documentation, [(model, value)])


def _clean(identity: Identity, journal: Journal) -> Iterator[Metric]:
    rows = [({"model": identity.model, "version": totals.version}, totals) for totals in journal.versions]
    for name, documentation in {
        "samples": "Clean images sent in whole rounds.",
        "correct": "Clean images that were classified correctly.",
    }.items():
        counts = [(labels, getattr(totals, name)) for labels, totals in rows]
        yield _counter(f"robustness_clean_{name}", documentation, counts)


def _attacks(identity: Identity, journal: Journal) -> Iterator[Metric]:
    rows = [
        (_ball(identity, totals.version) | {"attack": attack.name}, totals.attacks.get(attack.name, AttackTotals()))
        for totals in journal.versions
        for attack in identity.attacks
    ]
    for name, documentation in {
        "samples": "Images judged under an attack, clean-wrong ones included.",
        "correct": f"Images that were right before and after the attack. {BOUND}",
        "attempts": "Images attacked: those that were right before.",
        "successes": "Images that the attack flipped.",
    }.items():
        counts = [(labels, getattr(totals, name)) for labels, totals in rows]
        yield _counter(f"robustness_attack_{name}", documentation, counts)


def _last_round(identity: Identity, journal: Journal) -> Iterator[Metric]:
    """Gauges of the last successful round; nothing before it."""
    result = journal.last_result
    if result is None:
        return
    ball = _ball(identity, result.version)
    attacks = [(ball | {"attack": attack.name}, attack) for attack in result.attacks]
    yield from _shares(
        "robustness_clean_accuracy",
        "Clean accuracy in the last successful round",
        [({"model": identity.model, "version": result.version}, result.clean)],
    )
    yield from _shares(
        "robustness_robust_accuracy",
        "Accuracy under this transfer attack in the last successful round",
        [(labels, result.under(attack)) for labels, attack in attacks],
        BOUND,
    )
    yield from _shares(
        "robustness_worst_case_accuracy",
        "Share of images that are right and that no attack of the last successful round flipped",
        [(ball, result.worst_case)],
        BOUND,
    )
    attempts = sum(result.correct)
    yield _gauge(
        "robustness_attack_success_ratio",
        "Share of clean-correct images that the attack flipped in the last successful round, 0 to 1. Lower bound.",
        [(labels, 1 - sum(attack.held) / attempts) for labels, attack in attacks if attempts],
    )
    yield _gauge(
        "robustness_round_samples",
        "Images of the last successful round.",
        [(labels, len(attack.held)) for labels, attack in attacks],
    )


def _ball(identity: Identity, version: str) -> dict[str, str]:
    return {"model": identity.model, "version": version, "norm": identity.norm, "epsilon": identity.epsilon}


def _shares(name: str, documentation: str, rows: Iterable[tuple[Labels, Share]], remark: str = "") -> Iterator[Metric]:
    """Three metrics, as a label for the bound would make sums meaningless."""
    rows = list(rows)
    bounds = [(labels, *share.bounds) for labels, share in rows]
    of = f"of {name}_ratio, exact 95 % (Clopper-Pearson), 0 to 1."
    yield _gauge(
        f"{name}_ratio", f"{documentation}, 0 to 1. {remark}".strip(), [(labels, share.value) for labels, share in rows]
    )
    yield _gauge(f"{name}_lower_ratio", f"Lower bound {of}", [(labels, lower) for labels, lower, _ in bounds])
    yield _gauge(f"{name}_upper_ratio", f"Upper bound {of}", [(labels, upper) for labels, _, upper in bounds])


def _gauge(name: str, documentation: str, rows: Iterable[tuple[Labels, float]]) -> Metric:
    return _filled(GaugeMetricFamily(name, documentation), name, rows)


def _counter(name: str, documentation: str, rows: Iterable[tuple[Labels, float]]) -> Metric:
    return _filled(CounterMetricFamily(name, documentation), f"{name}_total", rows)


def _info(name: str, documentation: str, rows: Iterable[Labels]) -> Metric:
    return _filled(InfoMetricFamily(name, documentation), f"{name}_info", [(labels, 1) for labels in rows])


def _histogram(name: str, documentation: str, labels: Labels, histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(name, documentation, labels=list(labels))
    bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
    family.add_metric(list(labels.values()), buckets, histogram.sum)
    return family


def _filled(family: Metric, sample: str, rows: Iterable[tuple[Labels, float]]) -> Metric:
    for labels, value in rows:
        family.add_sample(sample, dict(labels), value)
    return family
