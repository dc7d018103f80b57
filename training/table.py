"""A campaign's results as markdown: made from the records alone, so that it can be made again anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

import numpy as np

from dfmcl.robustness.hyperscore import hyperscore
from dfmcl.robustness.statistics import PairedCounts, bootstrap_difference
from dfmcl.robustness.threats.linf import in_255ths
from dfmcl.robustness.threats.registry import threat_of
from dfmcl.robustness.threats.threat import parse_eps
from dfmcl.training.figures import (
    NOT_MEASURED,
    at,
    cell,
    combined,
    compared,
    informed,
    measured_methods,
    methods_at,
    of,
    paired_flags,
    reach,
)
from dfmcl.training.plan import WORST, Campaign
from dfmcl.training.run_record import RunRecord

SWEEP = 4  # a measurement at this many radii or more is shown as accuracy over eps


def table(campaign: Campaign, names: Sequence[str], records: Sequence[RunRecord], plots: Sequence[str] = ()) -> str:
    """The whole page. names: of all runs that the campaign has; plots: files beside it."""
    measured = [record for record in records if record.done and record.evaluations]
    done = [record for record in records if record.done]
    sections = [
        head(campaign, names, records),
        *(claims(campaign, beta, measured) for beta in campaign.betas),
        *(over_eps(campaign, beta, measured) for beta in campaign.betas),
        *(suites(campaign, beta, measured) for beta in campaign.betas),
        comparisons(campaign, measured),
        regressions(campaign, measured),
        hyperscores(campaign, measured),
        masks(measured),
        costs(campaign, done),
        per_run(campaign, measured),
        problems(records),
        *(f"![{plot}]({plot})\n" for plot in plots),
    ]
    return "\n".join(section for section in sections if section)


# --- Sections: each a heading and a table, or nothing -----------------------------------------------------------------


def head(campaign: Campaign, names: Sequence[str], records: Sequence[RunRecord]) -> str:
    """What was done, with what: runs, n, seeds, command, versions."""
    done = [record for record in records if record.done]
    images = sorted({len(record.evaluations[0].correct) for record in done if record.evaluations})
    seeds = sorted({record.seed for record in done if record.evaluations})
    label = f" ({campaign.label})" if campaign.label else ""
    lines = [
        f"# {campaign.title}{label}\n",
        f"{len(done)} of {len(names)} runs done, {len(records) - len(done)} failed;"
        f" n = {joined(images) or '-'} test images, the same for every run; seeds {joined(seeds) or '-'}.",
        "Cells are percent: of one network with its exact 95 % interval (Clopper-Pearson), of several seeds as mean ±"
        " standard deviation over the seeds. eps is Linf in pixel units unless said otherwise. Networks are those of"
        " the last epoch; nothing was selected on test images.",
        f"Command: {joined(distinct(record.about['command'] for record in done)) or '-'}.",
        f"Versions: {joined(distinct(versions(record) for record in done)) or '-'}.",
        f"Hardware: {joined(distinct(hardware(record) for record in done)) or '-'}.\n",
    ]
    return "\n".join(lines)


def claims(campaign: Campaign, beta: str, records: Sequence[RunRecord]) -> str:
    """Claimed beside measured at eps = beta, and up to which radius a claim would hold."""
    threat = threat_of("linf", beta)
    claimed_here = eps_of(campaign.claims_eps) == threat.label
    columns = ["clean", *campaign.main]
    rows = []
    for name, method in measured_methods(campaign):
        own = of(records, name, beta)
        row = [name]
        for what in columns:
            if claimed_here:
                row.append(f"{method.claimed[what]:g}" if what in method.claimed else "-")
            row.append(cell(own, what, threat))
        row.append(cell(own, WORST, threat))
        if claimed_here:
            row.append(reach(own, campaign.main[-1], method.claimed.get(campaign.main[-1])))
        rows.append(row)
    heads = ["method"]
    for what in columns:
        heads += [f"{what} claimed", f"{what} measured"] if claimed_here else [what]
    heads += [WORST] + ([f"claimed {campaign.main[-1]} holds up to"] if claimed_here else [])
    title = "claimed and measured" if claimed_here else "measured"
    return section(f"Trained at {threat.label}: {title} at {threat.label}", heads, rows)


def over_eps(campaign: Campaign, beta: str, records: Sequence[RunRecord]) -> str:
    """For each attack of a measurement at many radii: methods by eps."""
    found = []
    for entry in campaign.measurements.values():
        if len(entry.eps) < SWEEP:
            continue
        for attack in entry.attacks:
            heads = ["method", "clean", *(threat.label for threat in entry.threats)]
            rows = [
                [name, cell(own, "clean", entry.threats[0]), *(cell(own, attack.label, t) for t in entry.threats)]
                for name, own in methods_at(campaign, beta, records)
            ]
            found.append(section(f"Trained at {eps_of(beta)}: {attack.label} over eps", heads, rows))
    return "\n".join(found)


def suites(campaign: Campaign, beta: str, records: Sequence[RunRecord]) -> str:
    """For each measurement at few radii: methods by attack, and the worst case over all that was run there."""
    found = []
    for key, entry in campaign.measurements.items():
        if len(entry.eps) >= SWEEP:
            continue
        for threat in entry.threats:
            labels = [attack.label for attack in entry.attacks]
            rows = [
                [name, *(cell(own, label, threat, key) for label in labels), cell(own, WORST, threat)]
                for name, own in methods_at(campaign, beta, records)
            ]
            source = f", crafted on {entry.source}" if entry.source else ""
            cascade = "; each attack on what those before it left" if entry.cascade else ""
            title = f"Trained at {eps_of(beta)}: {key} at {threat}{source}{cascade}"
            found.append(section(title, ["method", *labels, f"{WORST} of everything at {threat}"], rows))
    return "\n".join(found)


def comparisons(campaign: Campaign, records: Sequence[RunRecord]) -> str:
    """Paired differences: McNemar's exact test for each seed, and a bootstrap over seeds and images."""
    rows = []
    for beta in campaign.betas:
        for first, second in campaign.comparisons.pairs:
            for threat, what in compared(campaign):
                flags = paired_flags(of(records, first, beta), of(records, second, beta), what, threat)
                where = what if what == "clean" else f"{what} at {threat.label}"
                row = [eps_of(beta), f"{first} - {second}", where]
                if not flags:
                    rows.append([*row, NOT_MEASURED, "", "", ""])
                    continue
                firsts, seconds = (np.stack([pair[side] for pair in flags.values()]) for side in (0, 1))
                low, high = bootstrap_difference(firsts, seconds)
                counts = [PairedCounts.of(*pair) for pair in flags.values()]
                rows.append(
                    [
                        *row,
                        f"{100 * (firsts.mean() - seconds.mean()):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
                        ", ".join(f"{count.only_first}:{count.only_second}" for count in counts),
                        ", ".join(f"{count.p:.2g}" for count in counts),
                        f"{len(counts)} x {firsts.shape[1]}",
                    ]
                )
    heads = [
        "trained at",
        "methods",
        "accuracy",
        "difference [95 %]",
        "only first:only second",
        "McNemar p",
        "seeds x n",
    ]
    note = (
        f"\nOne p a seed, not adjusted for the {len(rows)} rows of this table. The interval resamples seeds and images;"
        " of one seed it speaks of those two networks, not of the methods.\n"
    )
    return section("Paired comparisons", heads, rows) + note if rows else ""


def regressions(campaign: Campaign, records: Sequence[RunRecord]) -> str:
    """Least squares of accuracy on one key of the config, over all values and seeds of a method that varies it."""
    from scipy.stats import linregress  # takes as long to load as torch

    chosen = campaign.regression
    if not chosen.key:
        return ""
    threat = threat_of("linf", chosen.eps)
    rows = []
    for beta in campaign.betas:
        for family in distinct(record.family for record in records):
            points = [
                (float(at(record.config, chosen.key)), 100 * float(flags.mean()))
                for record in records
                if record.family == family and record.beta == beta
                if (flags := record.flags(chosen.attack, threat)) is not None
            ]
            x = [point[0] for point in points]
            if len(set(x)) < 3:
                continue
            fit = linregress(x, [point[1] for point in points])
            figures = [f"{fit.slope:+.3g}", f"{fit.stderr:.2g}", f"{fit.pvalue:.2g}", f"{fit.rvalue**2:.2f}"]
            rows.append([eps_of(beta), family, *figures, f"{len(points)} ({min(x):g} to {max(x):g})"])
    heads = ["trained at", "method", f"slope, points per unit of {chosen.key}", "standard error", "p", "R2", "points"]
    return section(f"{chosen.attack} at {threat.label} on {chosen.key}", heads, rows)


def hyperscores(campaign: Campaign, records: Sequence[RunRecord]) -> str:
    """HyperScore of clean, white-box and black-box accuracy with equal weights. It ranks; it adds no information."""
    rows = []
    for beta in campaign.betas:
        for eps in campaign.hyperscore:
            threat = threat_of("linf", eps)
            for name, own in methods_at(campaign, beta, records):
                values = [value for record in own if (value := combined(record, threat)) is not None]
                row = [eps_of(beta), threat.label, name]
                if not values:
                    rows.append([*row, NOT_MEASURED, ""])
                    continue
                v, score = mean(values), mean(hyperscore(value) if value > 0 else 100.0 for value in values)
                rows.append([*row, f"{v:.3f}", f"{score:.4f}"])
    title = "HyperScore (V: mean of clean, white-box and black-box accuracy)"
    return section(title, ["trained at", "measured at", "method", "V", "HyperScore"], rows)


def masks(records: Sequence[RunRecord]) -> str:
    """Where alpha and p ended."""
    rows = []
    for record in records:
        last = record.training["history"][-1]
        if informed(record):
            spread = f"{last['p_mean']:.4f} ± {last['p_std']:.1e}"
            rows.append([record.name, f"{last['alpha']:.4f}", spread, f"{last['p_low']:.4f} to {last['p_high']:.4f}"])
    return section("Masks in the last step of training", ["run", "alpha", "p, mean ± sd", "range of p"], rows)


def costs(campaign: Campaign, records: Sequence[RunRecord]) -> str:
    """Speed and time of training, and both against one method at the same beta."""
    rows = []
    for beta in campaign.betas:
        base = [record.training["minutes"] for record in of(records, campaign.cost_of, beta)]
        for name, _, _ in campaign.varied():
            own = of(records, name, beta)
            if not own:
                continue
            minutes = [record.training["minutes"] for record in own]
            speed = mean(record.training["images_per_second"] for record in own)
            attacks = [sum(record.seconds for record in run.evaluations) / 60 for run in own]
            relative = [f"{mean(minutes) / mean(base):.2f}" if base else NOT_MEASURED] if campaign.cost_of else []
            figures = [f"{speed:.0f}", f"{mean(minutes):.1f}", *relative, f"{mean(attacks):.1f}"]
            rows.append([eps_of(beta), name, *figures])
    against = [f"times {campaign.cost_of}'s"] if campaign.cost_of else []
    heads = ["trained at", "method", "images/s", "training, min", *against, "measuring, min"]
    return section("Cost, mean over seeds", heads, rows)


def per_run(campaign: Campaign, records: Sequence[RunRecord]) -> str:
    """Every network by itself at eps = its beta, with exact bounds, beside what held-out training images said."""
    rows = []
    for record in records:
        threat = threat_of("linf", record.beta)
        heldout = (record.training["result"]["heldout_clean"], record.training["result"]["heldout_pgd"])
        figures = [cell([record], what, threat) for what in ("clean", *campaign.main, WORST)]
        rows.append([record.name, *(f"{100 * value:.1f}" for value in heldout), *figures])
    heads = ["run", "held-out clean", "held-out PGD", "clean", *campaign.main, WORST]
    return section("Each run at the radius it was trained at", heads, rows)


def problems(records: Sequence[RunRecord]) -> str:
    """What failed, and what was not measured."""
    rows = [[record.name, "failed", record.message] for record in records if not record.done]
    for record in records:
        for entry in record.not_measured:
            rows.append([record.name, f"{NOT_MEASURED}: {entry['measurement']}, {entry['threat']}", entry["reason"]])
    return section("Failed or not measured", ["run", "what", "why"], rows)


# --- Words -----------------------------------------------------------------------------------------------------------


def eps_of(beta: str) -> str:
    return in_255ths(parse_eps(beta))


def distinct(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def joined(items: Iterable[Any]) -> str:
    return ", ".join(str(item) for item in items)


def versions(record: RunRecord) -> str:
    revision = record.about["code"]["revision"][:12] or "unknown"
    return joined([f"{name} {version}" for name, version in record.about["versions"].items()] + [f"code {revision}"])


def hardware(record: RunRecord) -> str:
    entry = record.about["hardware"]
    return f"{entry['gpu'] or entry['cpu']}, {entry['threads']} threads"


def section(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A heading and a markdown table; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join([f"## {title}\n", *(f"| {' | '.join(escaped(text) for text in line)} |" for line in lines), ""])


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
