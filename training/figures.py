"""The figures that a campaign's page and plots show, from its records: accuracies, radii, pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from dfmcl.robustness.hyperscore import combined_value
from dfmcl.robustness.statistics import Flags, Share
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.linf import Linf, in_255ths
from dfmcl.robustness.threats.registry import threat_of
from dfmcl.training.plan import WORST, Campaign, Method
from dfmcl.training.run_record import RunRecord

NOT_MEASURED = "not measured"


def measured_methods(campaign: Campaign) -> list[tuple[str, Method]]:
    return [(name, method) for name, _, method in campaign.varied() if method.measured]


def methods_at(campaign: Campaign, beta: str, records: Sequence[RunRecord]) -> Iterator[tuple[str, list[RunRecord]]]:
    for name, _ in measured_methods(campaign):
        yield name, of(records, name, beta)


def of(records: Sequence[RunRecord], method: str, beta: str) -> list[RunRecord]:
    return [record for record in records if record.method == method and record.beta == beta]


def at(config: Any, key: str) -> Any:
    """`masking.alpha` of a config as JSON."""
    for name in key.split("."):
        config = config[name]
    return config


def informed(record: RunRecord) -> bool:
    """Whether its masks looked at a gradient; of plain dropout there is nothing to tell."""
    chosen = record.config["masking"]
    return bool(chosen["enabled"]) and chosen["rule"] in ("literal", "ranked")


def cell(records: Sequence[RunRecord], what: str, threat: Ball, measurement: str = "") -> str:
    """One network: accuracy with its exact interval. Several: mean ± standard deviation over seeds."""
    flags = [found for record in records if (found := within(record, measurement).flags(what, threat)) is not None]
    if not flags:
        return NOT_MEASURED
    if len(flags) == 1:
        share = Share(int(flags[0].sum()), len(flags[0]))
        return str(share).replace(" %", "", 1)
    values = [100 * float(found.mean()) for found in flags]
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def within(record: RunRecord, measurement: str) -> RunRecord:
    """The record with one measurement's evaluations only ("": all)."""
    if not measurement:
        return record
    own = tuple(entry for entry in record.evaluations if entry.about["measurement"] == measurement)
    return RunRecord(**{**vars(record), "evaluations": own})


def reach(records: Sequence[RunRecord], attack: str, claimed: float | None) -> str:
    """The radius up to which a claimed accuracy holds, by linear interpolation between the measured radii."""
    if claimed is None or not records:
        return "-"
    points = sorted(accuracy_over_eps(records, attack).items())
    if len(points) < 3:
        return NOT_MEASURED
    for (eps, accuracy), (further, lower) in pairwise(points):
        if accuracy < claimed:
            return "nowhere, not even clean" if eps == 0 else in_255ths(eps)
        if lower < claimed:
            return in_255ths(eps + (further - eps) * (accuracy - claimed) / (accuracy - lower))
    return f"{in_255ths(points[-1][0])} or more"


def accuracy_over_eps(records: Sequence[RunRecord], attack: str) -> dict[float, float]:
    """Mean accuracy in percent over the records by Linf radius; clean at 0."""
    found: dict[float, list[float]] = {}
    for record in records:
        threats = [entry.threat for entry in record.evaluations if isinstance(entry.threat, Linf)]
        for eps, what, threat in [(0.0, "clean", threats[0]), *((threat.eps, attack, threat) for threat in threats)]:
            flags = record.flags(what, threat)
            if flags is not None:
                found.setdefault(eps, []).append(100 * float(flags.mean()))
    return {eps: mean(values) for eps, values in found.items()}


def compared(campaign: Campaign) -> list[tuple[Ball, str]]:
    """Threats and accuracies to compare; clean once."""
    threats = [threat_of("linf", eps) for eps in campaign.comparisons.eps]
    attacks = campaign.comparisons.attacks
    clean = [(threats[0], "clean")] if "clean" in attacks and threats else []
    return clean + [(threat, what) for threat in threats for what in attacks if what != "clean"]


def paired_flags(
    first: Sequence[RunRecord], second: Sequence[RunRecord], what: str, threat: Ball
) -> dict[int, tuple[Flags, Flags]]:
    """By seed, what both methods held, on the images that all of them looked at."""
    found = {
        one.seed: (a, b)
        for one in first
        for other in second
        if one.seed == other.seed
        if (a := one.flags(what, threat)) is not None and (b := other.flags(what, threat)) is not None
    }
    shortest = min((len(flags) for pair in found.values() for flags in pair), default=0)
    return {seed: (a[:shortest], b[:shortest]) for seed, (a, b) in found.items()}


def combined(record: RunRecord, threat: Ball) -> float | None:
    """V of a record at a threat; None where a part of it was not measured."""
    flags = {
        "clean": record.flags("clean", threat),
        "white_box": record.flags(WORST, threat, black_box=False),
        "black_box": record.flags(WORST, threat, black_box=True),
    }
    figures = {name: float(found.mean()) for name, found in flags.items() if found is not None}
    return combined_value(figures, dict.fromkeys(flags, 1.0)) if len(figures) == len(flags) else None
