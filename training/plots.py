"""A campaign's plots as SVG, where matplotlib is there: accuracy over eps, and p and alpha over the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dfmcl.robustness.threats.linf import in_255ths
from dfmcl.robustness.threats.threat import parse_eps
from dfmcl.training.figures import accuracy_over_eps, informed, measured_methods, of
from dfmcl.training.plan import Campaign
from dfmcl.training.run_record import RunRecord


def draw(campaign: Campaign, records: Sequence[RunRecord], out: Path) -> list[str]:
    """Write the plots into `out` and return their names; none on a bare machine, without matplotlib."""
    try:
        library = import_module("matplotlib")
        figures = import_module("matplotlib.figure")
    except ImportError:
        return []
    measured = [record for record in records if record.done and record.evaluations]
    written = []
    with library.rc_context({"svg.hashsalt": "dfmcl"}):  # or every file differs from the last by random ids
        for beta in campaign.betas:
            label = in_255ths(parse_eps(beta))
            figure = figures.Figure(figsize=(7, 4.5), layout="constrained")
            if _accuracy(figure.subplots(), campaign, beta, measured):
                figure.suptitle(f"{campaign.main[-1]} accuracy, trained at {label}{_small(campaign)}")
                written.append(_save(figure, out, f"accuracy_beta{label.partition('/')[0]}.svg"))
            figure = figures.Figure(figsize=(7, 6), layout="constrained")
            if _masks(figure.subplots(2, 1, sharex=True), beta, measured):
                figure.suptitle(f"masks, trained at {label}{_small(campaign)}")
                written.append(_save(figure, out, f"masks_beta{label.partition('/')[0]}.svg"))
    return written


def _accuracy(axes: Any, campaign: Campaign, beta: str, records: Sequence[RunRecord]) -> bool:
    for name, _ in measured_methods(campaign):
        points = sorted(accuracy_over_eps(of(records, name, beta), campaign.main[-1]).items())
        if len(points) > 2:
            axes.plot([eps * 255 for eps, _ in points], [value for _, value in points], marker="o", label=name)
    axes.set(xlabel="eps x 255 (Linf)", ylabel="accuracy, %", ylim=(0, None))
    return _legend(axes)


def _masks(both: Any, beta: str, records: Sequence[RunRecord]) -> bool:
    chosen = [record for record in records if record.beta == beta and informed(record)]
    for axes, key in zip(both, ("alpha", "p_mean"), strict=True):
        for record in chosen:
            history = record.training["history"]
            values = [row[key] for row in history]
            epochs = [row["epoch"] for row in history]
            (line,) = axes.plot(epochs, values, label=f"{record.method}, seed {record.seed}")
            if key == "p_mean":
                low, high = ([row[name] for row in history] for name in ("p_low", "p_high"))
                axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15)
        axes.set(ylabel={"alpha": "alpha", "p_mean": "p: mean, lowest to highest"}[key])
    both[1].set(xlabel="epoch")
    return _legend(both[0])


def _legend(axes: Any) -> bool:
    """Whether there is anything to show."""
    found = bool(axes.get_legend_handles_labels()[0])
    if found:
        axes.legend(fontsize="small")
    return found


def _small(campaign: Campaign) -> str:
    return f" ({campaign.label})" if campaign.label else ""


def _save(figure: Any, out: Path, name: str) -> str:
    figure.savefig(out / name, metadata={"Date": None})
    return name
