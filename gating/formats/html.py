"""The report as one HTML page for a person: nothing to load, nothing to run, readable without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from dfmcl.common.text import printable
from dfmcl.gating.formats import charts, summary
from dfmcl.gating.formats.corruptions import corruption_rows
from dfmcl.gating.formats.gallery import galleries
from dfmcl.gating.formats.markdown import NEWLY_BROKEN
from dfmcl.gating.formats.summary import Probes
from dfmcl.gating.policy import threat_in
from dfmcl.gating.signing.evaluation import SuiteEntry
from dfmcl.gating.signing.report import BaselineEntry, CriterionEntry, Report
from dfmcl.robustness.corruptions.severities import LEVELS
from dfmcl.robustness.threats.ball import Ball

# A matrix of more classes than this is no picture any more: the commonest confusions are listed instead.
MATRIX = 16
COMMONEST = 20
# Criteria about all images at one radius: their thresholds have a place on the curve.
PLACED = ("clean_accuracy", "robust_accuracy")


@dataclass(frozen=True)
class Confusion:
    """counts `(K, K)`: true class by answer; shade: of each true class's images, in [0, 1]; commonest: wrong ones."""

    counts: list[list[int]]
    shade: list[list[float]]
    commonest: list[tuple[str, str, int]]


def html(report: Report, probes: Probes) -> str:
    """The whole page. Text from outside is escaped; a content security policy forbids scripts and requests."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: printable(value, keep="\n") if type(value) is str else value,  # what is Markup is ours
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": summary.percent, "duration": summary.duration}
    classes = report.data.classes
    page = environment.get_template("report.html.jinja")
    return page.render(
        report=report,
        headline=summary.headline(report).partition(": "),
        decided=summary.decided(report),
        advice=summary.advice(report),
        criteria=summary.by_weight(report.criteria),
        claim=summary.claim(report),
        threat=summary.threat,
        threat_of=summary.threat(report.evaluation),
        interval=charts.interval,
        remains=charts.remains,
        over_eps=over_eps(report),
        over_images=over_images(report),
        attacks=summary.attack_rows(report.evaluation),
        counted=summary.counted,
        compared=summary.compared,
        corruptions=corruption_rows(report),
        levels=LEVELS,
        others=summary.others(report),
        classes=summary.class_rows(report),
        names=classes,
        confusion=confused(classes, summary.confusion(len(classes), probes)),
        matrix=len(classes) <= MATRIX,
        galleries=galleries(probes, report),
        unions=summary.unions(report),
        checks=summary.checks_by_weight(report),
        newly_broken=newly_broken(report.baseline),
        provenance=provenance(report),
    )


def over_eps(report: Report) -> Markup:
    """The curve of accuracy: clean as radius 0, then every radius of the main norm, and transfer where measured."""
    main, clean = report.evaluation, report.evaluation.clean
    kind_of_main = main.threat.parsed.kind
    points = [charts.Reading(0, clean.value, clean.lower_95, clean.upper_95, "clean", "clean")]
    measured = [("robust", one.threat.parsed, one.robust) for one in (main, *report.radii)]
    measured += [("transfer", one.threat.parsed, one.robust) for one in report.transfer]
    points += [
        charts.Reading(ball.eps, share.value, share.lower_95, share.upper_95, ball.label, kind)
        for kind, ball, share in measured
        if isinstance(ball, Ball) and ball.kind == kind_of_main
    ]
    placed = [row for row in report.criteria if row.class_name is None and row.metric in PLACED]
    found = [(_radius(row, main), row.threshold) for row in placed]
    thresholds = [(eps, threshold) for eps, threshold in found if eps is not None and threshold is not None]
    return charts.accuracy_over_eps(points, thresholds)


def over_images(report: Report) -> list[tuple[str, Markup]]:
    """A drawing for each criterion whose bounds were kept as the gate went: the criterion and the drawing."""
    drawings = []
    for number, row in enumerate(report.criteria):
        steps = [step for step in report.progress if step.criterion == number]
        history = [charts.Known(step.images, step.lower, step.upper) for step in steps]
        if history and row.threshold is not None:
            drawings.append((row.criterion, charts.bounds_over_images(history, row.threshold)))
    return drawings


def confused(names: Sequence[str], counts: NDArray[np.int64]) -> Confusion:
    """The matrix with each row's shares, and the commonest wrong answers."""
    shade = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:COMMONEST]
    pairs = [(int(place) // len(names), int(place) % len(names)) for place in order]
    commonest = [(names[true], names[said], int(wrong[true, said])) for true, said in pairs if wrong[true, said]]
    return Confusion(counts.tolist(), shade.tolist(), commonest)


def newly_broken(baseline: BaselineEntry | None) -> str:
    """The images that only the baseline holds, as far as a page can name them."""
    return summary.listed(baseline.newly_broken, NEWLY_BROKEN) if baseline else ""


def provenance(report: Report) -> list[tuple[str, str]]:
    """Where the figures come from, in the order of a doubter's questions."""
    candidate, statistics = report.candidate, report.statistics
    facts: dict[str, Any] = {
        "created": report.created,
        "code revision": report.code.revision,
        "kind of model": candidate.kind,
        "input": candidate.input.to_json(),
        "model": candidate.model_sha256,
        **({"decided by": str(report.decided)} if report.decided else {}),
        **({"gradients from": candidate.gradients} if candidate.gradients else {}),
        **{f"file {name}": digest for name, digest in candidate.files.items()},
        **{f"run, {name}": value for name, value in report.run.to_json().items()},
        "policy": report.policy.sha256,
        "data": report.data.sha256,
        "statistics": f"{statistics.kind}, cap {statistics.cap:,} of {statistics.population:,} images",
        "order of the images": summary.order(report),
        "seed": report.evaluation.seed,
        **report.files,
        "wall time": summary.duration(report.seconds),
        "processes": report.processes,
        **{f"hardware, {name}": value for name, value in report.hardware.items()},
        **{f"version of {name}": value for name, value in report.versions.items()},
    }
    return [(name, _plain(value)) for name, value in facts.items()]


def _radius(row: CriterionEntry, main: SuiteEntry) -> float | None:
    """Where on the axis a criterion's threshold belongs; the radius as far as the grid lets it count.

    None where it is about a threat that has no place there.
    """
    if row.metric == "clean_accuracy":
        return 0.0
    asked = main.threat.parsed if row.eps is None else threat_in(row.eps, main.threat.parsed.kind)
    if not isinstance(asked, Ball) or asked.kind != main.threat.parsed.kind:
        return None
    return (asked.on_grid() if main.grid == "uint8" else asked).eps


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return " x ".join(str(inner) for inner in value)
    return "none" if value is None else str(value)
