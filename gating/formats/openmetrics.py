"""The report as OpenMetrics text, under the names that the sidecar uses: all gauges, so that Prometheus' older text
format reads the file too (node exporter's textfile collector, a Pushgateway)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.registry import Collector

from dfmcl.common import metric_names
from dfmcl.gating.formats import summary
from dfmcl.gating.formats.corruptions import corruption_rows
from dfmcl.gating.signing.evaluation import EvaluationEntry, ShareEntry
from dfmcl.gating.signing.report import Report
from dfmcl.gating.verdict import EXIT_CODES

Labels = Mapping[str, str]
Rows = Iterable[tuple[Labels, float | None]]
INTERVAL = "exact 95 % of one look (Clopper-Pearson), 0 to 1."
TRANSFER = "Upper bound of robust accuracy: the attack knows only the surrogate."


def openmetrics(report: Report) -> str:
    """All figures of a report, without digests in labels: series keep their names from one run to the next."""
    registry = CollectorRegistry()
    registry.register(_Once(list(_metrics(report))))
    text: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]  # it carries no annotations
    return text.decode("utf-8")


class _Once(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def _metrics(report: Report) -> Iterator[Metric]:
    model = {"model": report.candidate.name}
    yield from _verdict(report, model)
    yield from _reasons(report, model)
    yield from _criteria(report, model)
    yield from _accuracies(report, model)
    yield from _attacks(report, model)
    checks = [
        ({**model, "check": row.check, "state": state}, float(row.outcome == state))
        for row in report.checks
        for state in ("clear", "raised", "not_run")
    ]
    yield _gauge("robustness_gate_check_state", "1 for what the check found.", checks)
    if report.baseline is not None:
        broken = len(report.baseline.newly_broken)
        yield _gauge(
            "robustness_gate_newly_broken_images", "Images that only the baseline model holds.", [(model, broken)]
        )
        named = "Mean corruption error relative to the baseline's, on the same images; 1: as many errors."
        yield _gauge("robustness_gate_mean_corruption_error_ratio", named, [(model, report.baseline.mce)])


def _verdict(report: Report, model: Labels) -> Iterator[Metric]:
    about = {
        **model,
        "sha256": report.candidate.model_sha256,
        "policy_sha256": report.policy.sha256,
        "data_sha256": report.data.sha256,
        "statistics": report.statistics.kind,
        "revision": report.code.revision,
    }
    yield _gauge("robustness_gate_info", "What was judged, by which policy, on which data.", [(about, 1)])
    states = [({**model, "state": state}, float(report.verdict == state)) for state in EXIT_CODES]
    yield _gauge(metric_names.GATE_STATE, "1 for the gate's verdict.", states)
    ran = datetime.fromisoformat(report.created).timestamp()
    yield _gauge(metric_names.GATE_EVALUATED, "When the gate ran, unix time.", [(model, ran)])
    yield _gauge("robustness_gate_duration_seconds", "Wall time of the gate.", [(model, report.seconds)])
    yield _gauge("robustness_gate_attacked_images", "Images attacked.", [(model, report.statistics.attacked)])
    yield _gauge(
        "robustness_gate_population_images",
        "Images of the data set that the order runs through.",
        [(model, report.statistics.population)],
    )


def _reasons(report: Report, model: Labels) -> Iterator[Metric]:
    named = zip(report.reasons, summary.reasons(report), strict=True)
    rows = [({**model, "reason": name, "why": sentence}, 1.0) for name, sentence in named]
    yield _gauge("robustness_gate_reason", "1 for each reason why no evidence of this kind will do to pass.", rows)


def _criteria(report: Report, model: Labels) -> Iterator[Metric]:
    rows = report.criteria
    labels = [{**model, "criterion": row.criterion} for row in rows]
    states = [
        ({**label, "state": state}, float(row.outcome == state))
        for label, row in zip(labels, rows, strict=True)
        for state in ("met", "missed", "open")
    ]
    yield _gauge("robustness_gate_criterion_state", "1 for the criterion's outcome.", states)
    for name, shares, text in (
        (
            "robustness_gate_criterion_value_ratio",
            [row.value for row in rows],
            "What was counted for the criterion, 0 to 1.",
        ),
        (
            "robustness_gate_criterion_lower_ratio",
            [row.lower for row in rows],
            "The lower bound that a criterion must reach to be met, 0 to 1.",
        ),
        (
            "robustness_gate_criterion_upper_ratio",
            [row.upper for row in rows],
            "The upper bound that stays below the threshold of a missed criterion, 0 to 1.",
        ),
        (
            "robustness_gate_criterion_threshold_ratio",
            [row.threshold for row in rows],
            "What the policy asks for, 0 to 1.",
        ),
    ):
        yield _gauge(name, text, zip(labels, shares, strict=True))


def _accuracies(report: Report, model: Labels) -> Iterator[Metric]:
    yield from _shares(
        metric_names.GATE_CLEAN_ACCURACY, "Clean accuracy that the gate measured", [(model, report.evaluation.clean)]
    )
    yield from _shares(
        metric_names.GATE_ACCURACY,
        f"Robust accuracy that the gate measured {_means(report)}, worst case per image",
        [(_ball(model, one), one.robust) for one in (report.evaluation, *report.radii)],
    )
    if report.transfer:
        transfer = [({**_ball(model, one), "surrogate": one.about.surrogate}, one.robust) for one in report.transfer]
        yield from _shares(metric_names.GATE_TRANSFER_ACCURACY, f"{TRANSFER} Accuracy under transfer", transfer)
    kinds = [({**model, "corruption": row.kind}, row.mean) for row in corruption_rows(report)]
    named = "Accuracy under a kind of corruption, mean over the severities that the policy names, 0 to 1."
    yield _gauge("robustness_gate_corruption_accuracy_ratio", named, kinds)
    overall = [row for row in report.criteria if row.class_name is None]
    main = _ball(model, report.evaluation)
    robust = [
        ({**main, "epsilon": row.eps or report.evaluation.threat.label}, row.threshold)
        for row in overall
        if row.metric == "robust_accuracy"
    ]
    yield _gauge(metric_names.GATE_THRESHOLD, "Robust accuracy that the policy asks for, 0 to 1.", robust)
    asked = [(model, row.threshold) for row in overall if row.metric == "clean_accuracy"]
    yield _gauge(metric_names.GATE_CLEAN_THRESHOLD, "Clean accuracy that the policy asks for, 0 to 1.", asked)


def _means(report: Report) -> str:
    return "without gradients" if "no_gradients" in report.reasons else "with the model's own gradients"


def _attacks(report: Report, model: Labels) -> Iterator[Metric]:
    rows = [
        ({**_ball(model, one), "attack": row.name}, row)
        for one in (report.evaluation, *report.radii)
        for row in summary.attack_rows(one)
    ]
    tried, flipped = ([(labels, float(getattr(row, part))) for labels, row in rows] for part in ("tried", "flipped"))
    yield _gauge("robustness_gate_attack_tried_images", "Images that the attack was shown.", tried)
    yield _gauge("robustness_gate_attack_flipped_images", "Images that the attack flipped.", flipped)
    passes = [
        ({**labels, "direction": direction}, float(getattr(row, direction)))
        for labels, row in rows
        for direction in ("forward", "backward")
    ]
    yield _gauge("robustness_gate_attack_passes", "Passes of the model spent by the attack, over its images.", passes)
    times = [(labels, row.seconds) for labels, row in rows]
    yield _gauge("robustness_gate_attack_duration_seconds", "Wall time of the attack.", times)


def _ball(model: Labels, evaluation: EvaluationEntry[Any]) -> dict[str, str]:
    threat = evaluation.threat.parsed
    return {**model, "norm": threat.kind, "epsilon": threat.label}


def _shares(
    names: metric_names.Interval, documentation: str, rows: Sequence[tuple[Labels, ShareEntry]]
) -> Iterator[Metric]:
    for name, found, text in (
        (names.ratio, [(labels, share.value) for labels, share in rows], f"{documentation}, 0 to 1."),
        (
            names.lower,
            [(labels, share.lower_95) for labels, share in rows],
            f"Lower bound of {names.ratio}, {INTERVAL}",
        ),
        (
            names.upper,
            [(labels, share.upper_95) for labels, share in rows],
            f"Upper bound of {names.ratio}, {INTERVAL}",
        ),
    ):
        yield _gauge(name, text, found)


def _gauge(name: str, documentation: str, rows: Rows) -> Metric:
    """One sample for each set of labels, the last one; none where nothing was measured."""
    family = GaugeMetricFamily(name, documentation)
    found = {tuple(sorted(labels.items())): (labels, value) for labels, value in rows if value is not None}
    for labels, value in found.values():
        family.add_sample(name, {key: str(text) for key, text in labels.items()}, value)
    return family
