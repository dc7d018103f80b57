"""The report in every form that a person or a pipeline reads; report.json is the source of all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dfmcl.gating.formats.html import html
from dfmcl.gating.formats.junit import junit
from dfmcl.gating.formats.markdown import markdown
from dfmcl.gating.formats.openmetrics import openmetrics
from dfmcl.gating.formats.summary import Probes
from dfmcl.gating.signing.report import Report

FORMATS: dict[str, Callable[[Report, Probes], str]] = {
    "report.md": lambda report, probes: markdown(report),
    "report.html": html,
    "junit.xml": lambda report, probes: junit(report),
    "robustness.prom": lambda report, probes: openmetrics(report),
}
"""File name in the evidence to the function that writes its text."""

FILES = tuple(FORMATS)


def write_formats(report: Report, probes: Probes, out: Path) -> None:
    """Write all forms of a report into the directory `out`. probes: the arrays of probes.npz."""
    for name, render in FORMATS.items():
        (out / name).write_text(render(report, probes), encoding="utf-8")
