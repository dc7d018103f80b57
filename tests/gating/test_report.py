"""The report's tree: it reads its own writing, nothing of another type, and its schema is made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dfmcl.common.files import dump_json
from dfmcl.gating.derivation import derived
from dfmcl.gating.record import recorded
from dfmcl.gating.schema import FILE, text
from dfmcl.gating.signing.report import Report
from tests.gating.sample import sample

SHIPPED = Path(__file__).parents[2] / "model_repository" / "resnet18-cifar10" / "1" / "report.json"


def test_what_is_written_is_read_as_the_same() -> None:
    """Byte for byte, in the order of the keys; format and date first, as other programs look there."""
    report = sample()
    written = dump_json(report.to_json())
    again = Report.from_json(json.loads(written))
    assert (again, dump_json(again.to_json())) == (report, written)
    assert list(json.loads(written))[:3] == ["format", "created", "verdict"]


def test_an_earlier_gates_report_stays_as_it_was_written() -> None:
    """The shipped one, of a gate that knew less: its omissions are absent, also in the policy's digest."""
    document = json.loads(SHIPPED.read_text())
    report = Report.from_json(document)
    assert report.to_json() == document
    assert (report.why, report.statistics.class_images, report.policy.attacks.substitute) == (None, None, 1200)
    assert report.policy.sha256 == report.policy.digest
    assert derived(recorded(report)).to_json("policy") == {"policy": document["policy"]}


def test_the_schema_is_made_of_the_tree() -> None:
    """`make report-schema` wrote the file from the records as they are."""
    assert FILE.read_text(encoding="utf-8") == text()
    assert json.loads(text()) == Report.schema()


def test_numbers_stay_as_they_were_written() -> None:
    """A whole number in the place of a fraction is none of ours, and is not made one: the signature is over it."""
    document = sample().to_json()
    document["seconds"], document["criteria"][0]["lower"] = 151, 0
    document["checks"][0]["figures"] = {"whole": 64, "half": 0.5, "none": "inf"}
    assert dump_json(Report.from_json(document).to_json()) == dump_json(document)


REFUSED: dict[str, Callable[[dict[str, Any]], object]] = {
    "lacks 'verdict'": lambda r: r.pop("verdict"),
    "lacks 'criteria.0.class'": lambda r: r["criteria"][0].pop("class"),
    "lacks 'transfer.0.about.surrogate_sha256'": lambda r: r["transfer"][0]["about"].pop("surrogate_sha256"),
    "lacks 'candidate.input.shape.2'": lambda r: r["candidate"]["input"].update(shape=[16, 16]),
    "note is not known": lambda r: r.update(note=1),
    "criteria.0.class_name is not known": lambda r: r["criteria"][0].update(class_name=None),
    "criteria.0.k (Input should be a valid integer)": lambda r: r["criteria"][0].update(k=True),
    "evaluation.images (Input should be a valid integer)": lambda r: r["evaluation"].update(images=104.0),
    "criteria.0.lower (Input should be a number)": lambda r: r["criteria"][0].update(lower=False),
    "seconds (Input should be a number)": lambda r: r.update(seconds="151"),
    "evaluation.not_finite (Input should be a valid integer)": lambda r: r["evaluation"].update(not_finite=None),
    "statistics.draw (Input should be a dictionary or an instance of Draw)": lambda r: r["statistics"].update(draw=[]),
    "reasons (Input should be a valid tuple)": lambda r: r.update(reasons="cap_reached"),
    "policy.attacks.block (Input should be a valid integer)": lambda r: r["policy"]["attacks"].update(block="8"),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_not_of_its_type_is_refused(said: str) -> None:
    """In one line that names the place: missing, unknown, null for absent, true for 1, 1.0 for 1."""
    document = sample().to_json()
    REFUSED[said](document)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
        Report.from_json(document)
    assert str(caught.value) == said
