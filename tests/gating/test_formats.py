"""report.json in its other forms: valid for any parser, and the same figures in each."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from junitparser import Error, Failure, JUnitXml, Skipped
from junitparser.junitparser import Result
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from dfmcl.common.text import as_markdown
from dfmcl.gating.formats import summary
from dfmcl.gating.formats.github import MOST, commands, publish
from dfmcl.gating.formats.html import html
from dfmcl.gating.formats.junit import junit
from dfmcl.gating.formats.markdown import LIMIT, markdown
from dfmcl.gating.formats.openmetrics import openmetrics
from dfmcl.gating.formats.registry import FILES, FORMATS, write_formats
from dfmcl.gating.kinds import BY_BATCH
from dfmcl.gating.signing.report import Report
from dfmcl.gating.soundness import require_derived
from dfmcl.robustness.onnx_float import DYNAMIC
from tests.gating.sample import edited, probes, sample

ROOT = Path(__file__).parents[2]
VERDICTS = {
    "passed": sample(),
    "failed": sample(0.85),
    "inconclusive": sample(0.6),
    "suspect": sample(raised=("fgsm_beats_pgd", "scale_hides")),
}
verdicts = pytest.mark.parametrize("verdict", VERDICTS)


def schema() -> dict[str, Any]:
    text = (resources.files("dfmcl.gating") / "report.schema.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


@verdicts
def test_samples_follow_the_schema(verdict: str) -> None:
    """What these tests look at is what the schema describes, and what follows from its record; of all four verdicts."""
    report = VERDICTS[verdict]
    assert report.verdict == verdict
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(report.to_json(), schema())
    require_derived(report, Path("report.json"), probes(report))


BREAKS: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown key": lambda report: report.update(extra=1),
    "missing key": lambda report: report.pop("per_image"),
    "unknown verdict": lambda report: report.update(verdict="fine"),
    "share in per cent": lambda report: report["criteria"][0].update(lower=31.5),
    "short digest": lambda report: report["policy"].update(sha256="abc"),
    "unknown outcome": lambda report: report["checks"][0].update(outcome="fine"),
    "bits that are none": lambda report: report["evaluation"]["per_image"].update(robust="012"),
    "attack without passes": lambda report: report["radii"][0]["attacks"][0]["per_image"].pop("forward"),
    "transfer without surrogate": lambda report: report["transfer"][0]["about"].pop("surrogate_sha256"),
    "no baseline entry": lambda report: report.pop("baseline"),
    "unknown reason": lambda report: report["reasons"].append("mood"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_the_schema_refuses_what_is_no_report(broken: str) -> None:
    """Each kind of mistake is seen."""
    report = sample().to_json()
    BREAKS[broken](report)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, schema())


def test_all_forms_are_written(tmp_path: Path) -> None:
    """write_formats leaves exactly the files that FILES names, each with the text of its function."""
    report = sample()
    arrays = probes(report)
    write_formats(report, arrays, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES) == set(FORMATS)
    assert set(FILES) == {"report.md", "report.html", "junit.xml", "robustness.prom"}
    for name, render in FORMATS.items():
        assert (tmp_path / name).read_text(encoding="utf-8") == render(report, arrays)


@verdicts
def test_junit_says_the_verdict_in_its_words(verdict: str) -> None:
    """Read back by junitparser: missed fails, raised is an error, open and not run are skipped, the rest passes."""
    report = VERDICTS[verdict]
    criteria, checks, *reasons = JUnitXml.fromstring(junit(report).encode())
    assert tuple(case.name for suite in reasons for case in suite) == report.reasons
    kinds: dict[str, list[type[Result]]] = {"met": [], "missed": [Failure], "open": [Skipped]}
    kinds |= {"clear": [], "raised": [Error], "not_run": [Skipped]}
    judged = [(row.criterion, row.outcome) for row in report.criteria]
    looked = [(row.check, row.outcome) for row in report.checks]
    for suite, rows in ((criteria, judged), (checks, looked)):
        assert [case.name for case in suite] == [name for name, _ in rows]
        for case, (_, outcome) in zip(suite, rows, strict=True):
            assert [type(result) for result in case.result] == kinds[outcome]
        found = [kind for _, outcome in rows for kind in kinds[outcome]]
        assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (
            len(rows),
            found.count(Failure),
            found.count(Error),
            found.count(Skipped),
        )
    facts = {one.name: one.value for one in criteria.properties()}
    assert facts["verdict"] == verdict
    assert facts["model_sha256"] == report.candidate.model_sha256
    figures = {one.get("name"): one.get("value") for one in criteria._elem.iter("property")}
    assert figures["threshold"] == str(report.criteria[-2].threshold)


def test_junit_is_xml_whatever_the_names_are() -> None:
    """Markup and control characters in names do not break the file."""

    def edit(report: dict[str, Any]) -> None:
        report["criteria"][0]["criterion"] = 'a < b & "c" \x00\x1b]]>'
        next(row for row in report["checks"] if row["outcome"] == "raised").update(why="\ud800 <x>", do="\ud800 <x>")

    criteria, checks = JUnitXml.fromstring(junit(edited(VERDICTS["suspect"], edit)).encode())
    assert next(iter(criteria)).name == 'a < b & "c" \ufffd\ufffd]]>'
    assert next(iter(next(case for case in checks if case.result).result)).message == "\ufffd <x>"


@verdicts
def test_markdown_begins_with_the_verdict(verdict: str) -> None:
    """Headline, what decided it, what to do; then tables; long parts are folded, and left out for a terminal."""
    report = VERDICTS[verdict]
    page = markdown(report)
    heads = {"passed": "PASSED", "failed": "BLOCKED", "inconclusive": "INCONCLUSIVE", "suspect": "SUSPECT"}
    assert page.startswith(f"### {heads[verdict]}: ")
    top, _, _ = page.partition("<details>")
    assert top.strip() == markdown(report, details=False).strip()
    for row in report.criteria:
        share = "-" if row.value is None else f"{100 * row.value:.1f} %"
        assert f"| `{row.criterion}` | {share} ({row.k}/{row.n})" in top
    for finding in report.findings:
        assert f"| `{finding.check}` | {as_markdown(finding.why)} | {as_markdown(finding.do)} |" in top
    for title in ("Radii and transfer", "Classes", "Checks", "Provenance"):
        assert f"<details><summary>{title}</summary>\n\n| " in page
    assert "transfer from `surrogate-pgd` (upper bound)" in page


def test_markdown_tables_hold_whatever_the_names_are() -> None:
    """Pipes, backticks, line breaks and markup in names neither break a table nor become markup."""
    name = "a|b`c\n| d | <script>x</script> [l](http://probe.invalid)"

    def edit(report: dict[str, Any]) -> None:
        report["data"]["classes"][3] = report["evaluation"]["attacks"][0]["name"] = name
        report["findings"][0]["why"] = report["checks"][1]["why"] = name

    report = edited(VERDICTS["suspect"], edit)
    rows = [line for line in markdown(report).splitlines() if "b'c" in line]
    assert len(rows) == 2
    for row in rows:
        assert row.replace("\\|", "").count("|") in (6, 7)  # five columns of attacks, six of classes
        assert row.count("`") == 2
    (found,) = [line for line in markdown(report).splitlines() if line.startswith("| `fgsm_beats_pgd` | a")]
    assert found.replace("\\|", "").count("|") == 4
    assert "<script" not in found
    assert "\\[l\\](" in found


@pytest.mark.parametrize("hostile", ["\x1b[2J\x1b]0;t\x07", "\u202egpj\u2066", "\udcff", "\u2028::error::x"])
def test_no_name_acts_on_a_terminal_or_a_page(hostile: str) -> None:
    """Escapes and marks that turn the direction of reading are written out in every format that people read."""

    def edit(report: dict[str, Any]) -> None:
        report["data"]["classes"][3] = report["candidate"]["name"] = hostile
        report["checks"][1]["why"] = report["findings"][0]["why"] = report["criteria"][3]["criterion"] = hostile

    report = edited(VERDICTS["suspect"], edit)
    lines = "\n".join(commands(report, Path("gate.toml")))
    for page in (markdown(report), html(report, probes(report)), junit(report), lines):
        assert hostile not in page
        assert all(sign.isprintable() for sign in page if sign not in "\n\t")


COMMENT = 65_536  # characters that GitHub takes


def many(classes: int, missed: int = 0, name: str = "class") -> Report:
    """A report with a robust criterion for each of very many classes; the last are missed."""
    report = sample()
    names = tuple(f"{name} {number}" for number in range(classes))
    rows = [
        replace(
            report.criteria[3],
            criterion=f"class_robust_accuracy >= 0.1 at 95 %, class {name}",
            class_name=name,
            outcome="missed" if number >= classes - missed else "met",
        )
        for number, name in enumerate(names)
    ]
    verdict, code = ("failed", 1) if missed else ("passed", 0)
    return replace(
        report,
        data=replace(report.data, classes=names),
        criteria=(*report.criteria[:3], *rows),
        verdict=verdict,
        exit_code=code,
    )


@pytest.mark.parametrize("details", [True, False])
@pytest.mark.parametrize("missed", [0, 3, 1000])
@pytest.mark.parametrize("name", ["class", "x" * 900, "\N{SNOWMAN}" * 300])
def test_a_page_about_a_thousand_classes_fits_a_comment(name: str, missed: int, details: bool) -> None:
    """It keeps the verdict, names what is missed before what is met, and says how much more there is, and where."""
    report = many(1000, missed, name)
    page = markdown(report, details=details)
    assert len(page) <= len(page.encode()) < LIMIT < COMMENT
    top, _, _ = page.partition("<details>")
    assert top.startswith("### BLOCKED" if missed else "### PASSED")
    shown = [line for line in top.splitlines() if line.startswith("| `class_robust_accuracy")]
    assert [line.endswith("| missed |") for line in shown] == [n < missed for n in range(len(shown))]
    assert re.search(r"\nand [\d,]+ more criteria: report\.html", top)
    outcome = "missed" if missed else "met"
    assert f"{outcome} for {missed or 1000} classes" in top
    if details:
        assert re.search(r"\nand [\d,]+ more classes: report\.html", page)
        assert "<summary>Provenance</summary>" in page


def test_the_real_report_of_a_thousand_classes_fits_everywhere(tmp_path: Path) -> None:
    """All formats, and the step's summary, which GitHub drops above 1 MiB; each is written and readable."""
    report = many(1000, 3)
    write_formats(report, probes(sample()), tmp_path)
    assert len((tmp_path / "report.md").read_text()) < COMMENT
    assert sum(len(suite) for suite in JUnitXml.fromfile(str(tmp_path / "junit.xml"))) == 1003 + len(report.checks)
    step, said = tmp_path / "summary.md", list[str]()
    environment = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(step)}
    publish(report, tmp_path / "gate.toml", environment, said.append)
    assert step.stat().st_size < 1 << 20
    assert len(said) == 3


@pytest.mark.parametrize("criteria", [1, 400])
def test_the_sentences_that_decided_are_few(criteria: int) -> None:
    """A policy of hundreds of criteria is summed up."""
    report = replace(VERDICTS["failed"], criteria=VERDICTS["failed"].criteria[:1] * criteria)
    sentences = summary.decided(report)
    assert len(sentences) == min(criteria, summary.MOST + 1)
    assert criteria == 1 or sentences[-1] == f"and {criteria - summary.MOST} more"


WHY = "onnx2pytorch cannot convert it: <QuantizeLinear>"


def without_gradients(verdict: str) -> Report:
    report = replace(VERDICTS[verdict], reasons=("no_gradients",), why={"no_gradients": WHY})
    return replace(report, verdict="inconclusive", exit_code=3) if verdict == "passed" else report


@verdicts
def test_every_format_says_why_there_are_no_gradients(verdict: str, tmp_path: Path) -> None:
    """Whatever the verdict: the line, the page, the test tab, the metrics and the annotations name the reason."""
    report = without_gradients(verdict)
    jsonschema.validate(report.to_json(), schema())
    texts = {name: render(report, probes(report)) for name, render in FORMATS.items()}
    texts["github"] = "\n".join(commands(report, tmp_path / "gate.toml"))
    texts["terminal"] = markdown(report, details=False)
    for name, text in texts.items():
        plain = text.replace("&lt;", "<").replace("&gt;", ">").replace("\\", "")
        assert WHY in plain, name
    assert "the model's own gradients" not in texts["robustness.prom"]
    (reasons,) = [suite for suite in JUnitXml.fromstring(texts["junit.xml"].encode()) if suite.name == "reasons"]
    assert reasons.skipped == 1


def test_numbers_that_are_none_block_and_are_named_everywhere(tmp_path: Path) -> None:
    """With every criterion met: the headline, a failure in the test tab, an error at the policy."""
    why = {"not_finite": "for 3 of 200 images"}
    report = replace(sample(), verdict="failed", exit_code=1, reasons=("not_finite",), why=why)
    jsonschema.validate(report.to_json(), schema())
    for name, render in FORMATS.items():
        assert "logits are not finite: for 3 of 200 images" in render(report, probes(report)), name
    assert markdown(report).startswith("### BLOCKED: the model does not answer every image with numbers")
    assert "Harden" not in markdown(report)
    assert commands(report, tmp_path / "gate.toml")[0].startswith("::error ")
    (_, _, reasons) = JUnitXml.fromstring(junit(report).encode())
    assert reasons.failures == 1


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("candidate", "Signed, this evidence lets you promote the candidate."),
        ("onnx", "An ONNX file by itself is not promoted"),
        ("module", "A module in Python is not promoted"),
        ("endpoint", "An endpoint is not promoted"),
    ],
)
def test_only_what_can_be_promoted_is_told_to_be(kind: str, said: str) -> None:
    """`promote` takes candidates; the others are told the way there."""
    report = replace(sample(), candidate=replace(sample().candidate, kind=kind))
    assert said in markdown(report)
    assert ("promote the candidate" in markdown(report)) == (kind == "candidate")
    assert said in html(report, probes(report))


def test_a_file_that_cannot_be_exported_is_not_told_to_be() -> None:
    """A dynamic INT8 file that passed: `dfmcl export` refuses it, by the operator's name in its gradients' origin."""
    assert BY_BATCH == DYNAMIC
    told = replace(sample().candidate, kind="onnx", gradients=f"its float twin, without the rounding of 3 {DYNAMIC}")
    said = summary.advice(replace(sample(), candidate=told))
    assert "quantise it statically" in said
    assert "make it a candidate" not in said
    static = replace(told, gradients="its float twin, without the rounding of 9 QuantizeLinear")
    assert "make it a candidate" in summary.advice(replace(sample(), candidate=static))


def test_advice_speaks_of_what_is_missed() -> None:
    """Attacks do not make a model right on clean images: who misses that is told to train, not to harden."""
    report = VERDICTS["failed"]
    assert "Harden this one" in summary.advice(report)
    said = {}
    for metric in ("clean_accuracy", "no_regression"):
        missed = replace(report.criteria[0], metric=metric)
        said[metric] = summary.advice(replace(report, criteria=(missed, *report.criteria[1:])))
        assert "Harden" not in said[metric]
    assert "right more often" in said["clean_accuracy"]
    assert "holds what the baseline holds" in said["no_regression"]


def samples_of(report: Report) -> dict[tuple[str, frozenset[str]], float]:
    """OpenMetrics text through prometheus_client's strict parser: name and label values to value."""
    families = text_string_to_metric_families(openmetrics(report))
    return {(one.name, frozenset(one.labels.values())): one.value for family in families for one in family.samples}


@verdicts
def test_metrics_carry_the_reports_figures(verdict: str) -> None:
    """Under the sidecar's names: state, threshold, accuracy with bounds; criteria, attacks and checks beside them."""
    report = VERDICTS[verdict]
    found = samples_of(report)

    def figure(name: str, *labels: str) -> float:
        return found[f"robustness_gate_{name}", frozenset({"candidate", *labels})]

    assert {state: figure("state", state) for state in VERDICTS} == {state: state == verdict for state in VERDICTS}
    ball, robust = ("linf", "16/255"), report.evaluation.robust
    for name, share in (("", robust.value), ("_lower", robust.lower_95), ("_upper", robust.upper_95)):
        assert figure(f"accuracy{name}_ratio", *ball) == share
    assert figure("accuracy_ratio", "linf", "8/255") == report.radii[1].robust.value
    assert figure("threshold_ratio", *ball) == report.criteria[0].threshold
    assert figure("threshold_ratio", "linf", "8/255") == 0.6
    assert figure("clean_threshold_ratio") == 0.85
    assert figure("transfer_accuracy_ratio", *ball, "surrogate-pgd") > robust.value
    assert figure("evaluated_timestamp_seconds") == 1767323045
    assert figure("criterion_lower_ratio", report.criteria[0].criterion) == report.criteria[0].lower
    attack = report.evaluation.attacks[3]
    assert figure("attack_flipped_images", *ball, "square-1000") == attack.flipped
    assert figure("attack_passes", *ball, "square-1000", "forward") == sum(attack.per_image.forward)
    for check in report.checks:
        states = {state: figure("check_state", check.check, state) for state in ("clear", "raised", "not_run")}
        assert states == {state: state == check.outcome for state in states}


def test_metrics_take_any_name() -> None:
    """Quotes, line breaks and backslashes in a name arrive as they are, and two equal rows make one sample."""
    report = sample()
    named = replace(report.candidate, name='a"b\\c\nd')
    report = replace(report, candidate=named, criteria=(*report.criteria, report.criteria[0]))
    assert ("robustness_gate_duration_seconds", frozenset({'a"b\\c\nd'})) in samples_of(report)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool; apt-get install prometheus")
def test_promtool_finds_nothing_to_say() -> None:
    """The same file as Prometheus' older text format, as node exporter's textfile collector reads it."""
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=openmetrics(sample()).encode(), capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_annotations_point_at_the_policy(tmp_path: Path) -> None:
    """One error for each missed criterion and raised check, at the criterion's line; a notice where all is met."""
    policy = tmp_path / "gate.toml"
    policy.write_text('seed = 0\n# robust_accuracy below\ncriteria = [\n  "robust_accuracy >= 0.85 at 95 %",\n]\n')
    line, *others = commands(VERDICTS["failed"], policy)
    assert {other.partition(" ")[0] for other in others} == {"::warning"}
    assert line.startswith(f"::error file={policy},line=4,title=robust_accuracy >= 0.85 at 95 %25 is missed::")
    assert f"after {VERDICTS['failed'].criteria[0].decided_after} images" in line
    assert [line.partition(" ")[0] for line in commands(VERDICTS["suspect"], policy)] == ["::error", "::error"]
    assert commands(VERDICTS["inconclusive"], policy)[0].startswith("::warning ")
    assert commands(VERDICTS["passed"], tmp_path / "none.toml")[0].startswith("::notice ")


def test_annotations_are_few_and_each_is_one_command() -> None:
    """At most ten; a line break, a colon or a comma in a name neither ends a command nor begins another."""
    row = replace(VERDICTS["failed"].criteria[0], criterion="a,b::c\n::error::x")
    lines = commands(replace(VERDICTS["failed"], criteria=(row,) * 30), Path("x,y.toml"))
    assert len(lines) == MOST
    for line in lines:
        assert "\n" not in line
        assert line.startswith("::error file=x%2Cy.toml,line=1,title=a%2Cb%3A%3Ac%0A%3A%3Aerror%3A%3Ax is missed::")


def test_publishing_happens_on_github_only(tmp_path: Path) -> None:
    """Elsewhere nothing; there the annotations are said, and the summary is appended to what stands there already."""
    said: list[str] = []
    step = tmp_path / "summary.md"
    step.write_text("before\n")
    publish(sample(), Path("gate.toml"), {"GITHUB_STEP_SUMMARY": str(step)}, said.append)
    assert (said, step.read_text()) == ([], "before\n")
    publish(sample(), Path("gate.toml"), {"GITHUB_ACTIONS": "true"}, said.append)
    assert said == commands(sample(), Path("gate.toml"))
    publish(sample(), Path("gate.toml"), {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(step)}, said.append)
    assert step.read_text() == f"before\n{markdown(sample())}\n"


def test_formats_load_no_training_library() -> None:
    """A report is rendered where neither torch nor ONNX Runtime is wanted."""
    code = "import sys, dfmcl.gating.formats.registry, dfmcl.gating.formats.github; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "onnxruntime", "onnx", "matplotlib"} & set(loaded.stdout.split())
