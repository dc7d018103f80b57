"""What a job on GitHub Actions shows by itself: annotations at the policy, and the step's summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dfmcl.common.text import printable
from dfmcl.gating.formats import summary
from dfmcl.gating.formats.markdown import markdown
from dfmcl.gating.signing.report import CriterionEntry, Report

# GitHub shows this many of a kind for one step and drops the rest.
MOST = 10


def publish(report: Report, policy: Path, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
    """In a job on GitHub, annotate the policy and append report.md to the step's summary; elsewhere nothing."""
    if environment.get("GITHUB_ACTIONS") != "true":
        return
    for line in commands(report, policy):
        say(line)
    if path := environment.get("GITHUB_STEP_SUMMARY"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(markdown(report) + "\n")


def commands(report: Report, policy: Path) -> list[str]:
    """Workflow commands, at most MOST: errors for what is missed or was raised, why nothing will do, what is open."""
    level = "error" if report.verdict == "failed" else "warning"
    titled = zip(report.reasons, summary.reasons(report), strict=True)
    reasons = [_command(level, policy, 1, name.replace("_", " "), sentence) for name, sentence in titled]
    lines = [
        _command("error", policy, _line(policy, row.criterion), f"{row.criterion} is missed", sentence)
        for row, sentence in _judged(report, "missed")
    ]
    lines += [
        _command("error", policy, 1, f"{row.check} was raised", f"{row.why}; {row.do}") for row in report.findings
    ]
    lines = lines[: MOST - len(reasons)] + reasons
    lines += [
        _command("warning", policy, _line(policy, row.criterion), f"{row.criterion} is open", sentence)
        for row, sentence in _judged(report, "open")
    ]
    if not lines:
        level = "notice" if report.verdict == "passed" else "warning"
        headline = summary.headline(report)
        lines = [_command(level, policy, 1, "dfmcl gate", "; ".join((headline, *summary.decided(report))))]
    return lines[:MOST]


def _judged(report: Report, outcome: str) -> list[tuple[CriterionEntry, str]]:
    return [(row, summary.judged(row)) for row in report.criteria if row.outcome == outcome]


def _line(policy: Path, criterion: str) -> int:
    """Where the policy's file names the criterion's metric and threshold; 1 where it cannot be told."""
    metric = criterion.partition(" ")[0]
    try:
        lines = policy.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return 1
    whole = [number for number, line in enumerate(lines, 1) if criterion in line]
    named = [number for number, line in enumerate(lines, 1) if metric in line.partition("#")[0]]
    return (whole or named or [1])[0]


def _command(level: str, policy: Path, line: int, title: str, message: str) -> str:
    properties = {"file": str(policy), "line": str(line), "title": title}
    given = ",".join(f"{key}={_escaped(value, ':,')}" for key, value in properties.items())
    return f"::{level} {given}::{_escaped(message)}"


def _escaped(text: str, also: str = "") -> str:
    """As workflow commands want it: a line break or a comma of ours must not end the command or a property."""
    text = printable(text, keep="\r\n")
    for sign in ("%", "\r", "\n", *also):
        text = text.replace(sign, f"%{ord(sign):02X}")
    return text
