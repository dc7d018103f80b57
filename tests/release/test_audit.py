"""The document for an auditor: each sentence is a field of a record, and what no record shows is said to be unknown."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dfmcl.common.errors import BadInput
from dfmcl.gating.signing.attestation import NotAttested, Trust
from dfmcl.gating.signing.trust import load_trust
from dfmcl.release.audit import SHOWS, SIGNED, audit, found
from dfmcl.release.stores.directory import Directory
from dfmcl.release.topics import CHAPTERS, REPORT, Line
from tests.deploying import ROOT

MODEL, REPOSITORY = "resnet18-cifar10", ROOT / "model_repository"
TRUST = ROOT / "deploy" / MODEL / "trust.toml"
SENTENCE = re.compile(r"^- (?P<topic>[^:]+(?:: [^:]+)?): (?P<text>.*) \((?P<file>\S+) (?P<links>\[`/.*)\)$")


@pytest.fixture(scope="module")
def trusted() -> Trust:
    return load_trust(TRUST)


@pytest.fixture(scope="module")
def text(trusted: Trust) -> str:
    return audit(Directory(REPOSITORY), MODEL, trusted)


def sentences(text: str) -> list[str]:
    """What is said after the head, which lists the files."""
    return [line for line in text.partition("## ")[2].splitlines() if line.startswith("- ")]


def fields(sentence: str) -> tuple[str, list[str], str]:
    """Its words, the pointers that it ends with, and their file."""
    match = SENTENCE.fullmatch(sentence)
    assert match, sentence
    return match["text"], re.findall(r"\[`(/[^`]*)`\]", match["links"]), match["file"]


def test_every_sentence_names_fields_that_are_there(text: str) -> None:
    """Followed in the files themselves, each pointer ends at a value; the rest says that nothing is recorded."""
    said = [line for line in sentences(text) if not line.endswith(": not recorded.")]
    assert len(said) > 40
    history = (REPOSITORY / "history.jsonl").read_text().splitlines()
    for words, pointers, file in map(fields, said):
        assert pointers, words
        for pointer in pointers:
            if file.endswith("attestation.intoto.jsonl"):
                assert pointer.startswith("/robustness/")
                continue
            lines = {"history.jsonl": lambda: [json.loads(line) for line in history]}
            document = lines.get(file, lambda file=file: json.loads((REPOSITORY / file).read_text()))()
            assert found(document, pointer) not in (None, "", [], {}), pointer


def test_figures_are_the_reports(text: str) -> None:
    """Threat, suite, bounds, verdict, key and date, as report and trust file have them."""
    report: dict[str, Any] = json.loads((REPOSITORY / MODEL / "1" / "report.json").read_text())
    robust = report["evaluation"]["robust"]
    assert f"{robust['k']} of 1,000 images were right and stayed so" in text
    assert f"{100 * robust['lower_95']:.1f} % to {100 * robust['upper_95']:.1f} %" in text
    assert "An attacker may change an image within linf 8/255." in text
    for attack in report["evaluation"]["attacks"]:
        assert f"The attack {attack['name']} was tried on {attack['tried']} images" in text
    assert "The verdict is: passed." in text
    (key,) = load_trust(TRUST).keys
    assert f"Key `{key.keyid}` signed the robustness statement." in text
    assert "The signature holds until 2036-11-25." in text


def test_what_no_record_shows_is_not_asserted(text: str) -> None:
    """Without the run nothing is said of training; oversight, risks and purpose are nobody's record here."""
    unknown = {line[2:].removesuffix(": not recorded.") for line in sentences(text) if line.endswith(": not recorded.")}
    assert unknown >= {"Training", "Network", "Training data", "Intended purpose, and who may use the system"}
    assert unknown >= {"Assessment of the measures of human oversight", "Risk management system"}
    assert unknown >= {line.topic for chapter in CHAPTERS for line in chapter.lines if not line.document}


# Points of Annex IV, Regulation (EU) 2024/1689; (a) to (h) of its second.
POINTS = ("1", "2 (a) to (c)", *(f"2 ({part})" for part in "defgh"), *"3456789")
# Of ISO/IEC 42001:2023: how many controls each objective of Annex A has, numbered from 2 on, and its clauses.
CONTROLS = {"A.2": 3, "A.3": 2, "A.4": 5, "A.5": 4, "A.6.1": 2, "A.6.2": 7, "A.7": 5, "A.8": 4, "A.9": 3, "A.10": 3}
KNOWN = {f"{place}.{number}" for place, count in CONTROLS.items() for number in range(2, count + 2)}
CLAUSES = {"clause 6.1", "clause 6.3", "clause 9.1"}


def test_points_stand_in_the_order_of_annex_iv_beside_controls_that_there_are(text: str) -> None:
    """Each of the nine once, in its order; a control or a clause that the standard has not would be nobody's."""
    assert tuple(chapter.annex for chapter in CHAPTERS) == POINTS
    assert re.findall(r"^Annex IV, ([^;\n]+)", text, flags=re.MULTILINE) == list(POINTS)
    assert len(KNOWN) == 38
    named = {name for chapter in CHAPTERS for name in re.split(", | to ", chapter.iso) if name}
    assert named <= KNOWN | CLAUSES


def test_a_field_that_is_missing_is_not_recorded_and_another_threat_is_named(trusted: Trust) -> None:
    """A line without a value is no sentence; a threat that is no ball has its spelling."""
    from dfmcl.release.audit import _said

    threat = next(line for chapter in CHAPTERS for line in chapter.lines if line.topic == "Threat model")
    for said, expected in (
        ({"norm": "linf", "label": "8/255"}, "within linf 8/255"),
        ({"spelling": "patch:5x5", "label": "patch 5x5"}, "by patch:5x5"),
        ({}, "not recorded"),
    ):
        (sentence,) = _said(threat, {REPORT: {"evaluation": {"threat": said}}}, {REPORT: "report.json"})
        assert expected in sentence
    assert [*_said(Line("A topic"), {}, {})] == ["- A topic: not recorded."]


def test_every_slot_can_be_shown() -> None:
    """As many slots as braces, each shown in a known way, of a known document."""
    for line in (line for chapter in CHAPTERS for line in chapter.lines):
        assert line.text.count("{}") == len(line.slots)
        assert {slot.partition("|")[2] for slot in line.slots} <= set(SHOWS)
        assert not line.document or line.document in SIGNED


def test_what_does_not_hold_is_no_document(trusted: Trust, tmp_path: Path) -> None:
    """A changed report, another key, another run: refused before a word is written."""
    copy = shutil.copytree(REPOSITORY, tmp_path / "models")
    report = copy / MODEL / "1" / "report.json"
    report.write_text(report.read_text() + " ")
    with pytest.raises(NotAttested):
        audit(Directory(copy), MODEL, trusted)
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_text(json.dumps({"files": {"checkpoint.safetensors": "0" * 64}}))
    with pytest.raises(BadInput, match="exported from another run"):
        audit(Directory(REPOSITORY), MODEL, trusted, run)


def test_command_prints_it_and_asks_for_trust(text: str) -> None:
    """On standard output; without --trust one line and 2."""
    command: list[str | Path] = [
        Path(sys.executable).with_name("dfmcl"),
        "card",
        "--audit",
        "--repository",
        REPOSITORY,
        "--name",
        MODEL,
    ]
    made = subprocess.run([*command, "--trust", TRUST], capture_output=True, text=True, check=True, cwd=ROOT)
    assert made.stdout.strip() == text.strip()
    refused = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "needs --trust" in refused.stderr
