"""The report as JUnit XML: one test case a criterion and one a check, for the test tab of any pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from dfmcl.common.text import printable
from dfmcl.gating.formats import summary
from dfmcl.gating.formats.summary import percent
from dfmcl.gating.signing.report import Report

# What XML 1.0 cannot hold, not even escaped.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
FIGURES = ("k", "n", "answers", "value", "lower", "upper", "threshold", "confidence", "decided_after")
KINDS = {"failures": "failure", "errors": "error", "skipped": "skipped"}


def junit(report: Report) -> str:
    """Missed is a failure, raised an error; open and not run are skipped, with the reason.

    A reason why no evidence of this kind will do to pass is skipped too, or a failure where it blocks by itself.
    """
    document = Element("testsuites", name="dfmcl gate")
    for suite in (_criteria(report), _checks(report), *([_reasons(report)] if report.reasons else [])):
        suite.set("tests", str(len(suite.findall("testcase"))))
        for count, kind in KINDS.items():
            suite.set(count, str(len(suite.findall(f"testcase/{kind}"))))
        document.append(suite)
    for count in ("tests", *KINDS):
        document.set(count, str(sum(int(suite.get(count, 0)) for suite in document)))
    indent(document)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + tostring(document, encoding="unicode") + "\n"


def _criteria(report: Report) -> Element:
    suite = Element("testsuite", name="criteria", timestamp=report.created, time=f"{report.seconds:.3f}")
    facts = {
        "verdict": report.verdict,
        "exit_code": report.exit_code,
        "model": report.candidate.name,
        "model_sha256": report.candidate.model_sha256,
        "policy_sha256": report.policy.sha256,
        "data_sha256": report.data.sha256,
        "statistics": report.statistics.kind,
        "images": report.statistics.attacked,
    }
    _properties(suite, facts)
    for row in report.criteria:
        case = _case(suite, "dfmcl.gate.criteria", row.criterion, {name: getattr(row, name) for name in FIGURES})
        of = "" if row.answers is None else " answers"
        said = f"{row.k} of {row.n}{of}, bounds {percent(row.lower)} and {percent(row.upper)}"
        if row.outcome == "missed":
            SubElement(case, "failure", type="missed", message=said)
        elif row.outcome == "open":
            SubElement(case, "skipped", message=f"open: {said}")
    said = "\n".join((summary.headline(report), *summary.decided(report)))
    SubElement(suite, "system-out").text = _legal(said)
    return suite


def _checks(report: Report) -> Element:
    suite = Element("testsuite", name="checks", timestamp=report.created)
    for row in report.checks:
        case = _case(suite, "dfmcl.gate.checks", row.check, row.figures)
        if row.outcome == "raised":
            SubElement(case, "error", type="raised", message=_legal(row.why)).text = _legal(row.do)
        elif row.outcome == "not_run":
            SubElement(case, "skipped", message=_legal(f"not run: {row.why}"))
    return suite


def _reasons(report: Report) -> Element:
    suite = Element("testsuite", name="reasons", timestamp=report.created)
    for name, sentence in zip(report.reasons, summary.reasons(report), strict=True):
        case = _case(suite, "dfmcl.gate.reasons", name, {})
        kind = {"type": name, "message": _legal(sentence)} if name == "not_finite" else {"message": _legal(sentence)}
        SubElement(case, "failure" if name == "not_finite" else "skipped", kind)
    return suite


def _case(suite: Element, group: str, name: str, figures: Mapping[str, Any]) -> Element:
    case = SubElement(suite, "testcase", classname=group, name=_legal(name), time="0")
    _properties(case, figures)
    return case


def _properties(element: Element, facts: Mapping[str, Any]) -> None:
    known = {name: value for name, value in facts.items() if value is not None}
    if known:
        properties = SubElement(element, "properties")
        for name, value in known.items():
            SubElement(properties, "property", name=_legal(name), value=_legal(value))


def _legal(value: object) -> str:
    return printable(_ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", str(value)), keep="\t\r\n")
