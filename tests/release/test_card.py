"""The model card says what the records say."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dfmcl.common.errors import BadInput
from dfmcl.gating.signing.evidence import read_report
from dfmcl.release.candidate import read_manifest
from dfmcl.release.card import card, write_card
from dfmcl.release.stores.directory import Directory
from dfmcl.release.verification import verify_release
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.measurements import measure, record
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.threats.registry import parse_threat
from tests.shipping import NAME, ship


@pytest.fixture(scope="module")
def repository(standard_run: Path, other_run: Path) -> Path:
    return ship(standard_run, other_run)


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_metadata_are_the_reports_figures(repository: Path) -> None:
    """A YAML reader finds the model-index with clean and robust accuracy, threat, suite and n."""
    _, metadata, _ = (repository / NAME / "README.md").read_text().split("---\n", 2)
    written = yaml.safe_load(metadata)
    evaluation = read_report(repository / NAME / "1" / "report.json")[0].evaluation
    (index,) = written["model-index"]
    (result,) = index["results"]
    assert (index["name"], result["dataset"]["type"], written["license"]) == (NAME, "digits", "apache-2.0")
    clean, robust = result["metrics"]
    assert (clean["value"], robust["value"]) == (evaluation.clean.value, evaluation.robust.value)
    assert robust["name"] == "robust accuracy, linf 3/255, worst case of fgsm, pgd-3, n = 100"


def test_text_holds_bounds_bytes_training_and_surrogates(repository: Path, standard_run: Path) -> None:
    """Intervals, digest, every training setting and the surrogates stand in the card."""
    text = (repository / NAME / "README.md").read_text()
    robust = read_report(repository / NAME / "1" / "report.json")[0].evaluation.robust
    low, high = 100 * robust.lower_95, 100 * robust.upper_95
    assert f"| robust accuracy, linf 3/255 | {100 * robust.value:.1f} | {low:.1f} to {high:.1f} |" in text
    assert verify_release(Directory(repository), NAME).sha256 in text
    settings = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
    config = read(standard_run / "manifest.json")["config"]
    del config["data"]["path"]
    assert settings == config
    assert "| other | resnet18, width 8, seed 1 |" in text
    assert str(standard_run.parent) not in text


def test_labels_are_no_markup(repository: Path, standard_run: Path) -> None:
    """A class has its folder's name."""
    release = verify_release(Directory(repository), NAME)
    manifest = replace(read_manifest(release.path), labels=("<b>", "[x](y)", "a\n# b", *"3456789"))
    report, _ = read_report(release.path / "report.json")
    text = card(release, manifest, report, read(standard_run / "manifest.json"), {})
    assert "patches, rotations and natural corruptions: not measured." in text
    beside = card(
        release, manifest, replace(report, radii=(report.evaluation,)), read(standard_run / "manifest.json"), {}
    )
    assert "that its criteria name stand in the report; all others: not measured." in beside
    assert r"of these classes: &lt;b>, \[x\](y), a # b, 3, 4" in text


def test_a_gate_that_stopped_by_itself_gives_bounds_that_allow_it(repository: Path, standard_run: Path) -> None:
    """Of sequential evidence the card shows the gate's bounds, which are wider than those of a fixed number."""
    manifest, report = read_manifest(repository / NAME / "1"), read_report(repository / NAME / "1" / "report.json")[0]
    rows = [replace(row, lower=0.0123, upper=0.9876) for row in report.criteria if row.metric == "robust_accuracy"]
    report = replace(report, statistics=replace(report.statistics, kind="sequential"), criteria=tuple(rows))
    training = read(standard_run / "manifest.json")
    text = card(verify_release(Directory(repository), NAME), manifest, report, training, {})
    assert "| bounds that hold whenever it stops |" in text
    assert "| 1.2 to 98.8 |" in text


def test_what_was_measured_beside_the_gate_stands_in_it(
    repository: Path, standard_run: Path, other_run: Path, tmp_path: Path
) -> None:
    """A record of the run adds a row and a metric; another run's is refused. Transfer is named as transfer."""
    copy, data = shutil.copytree(repository, tmp_path / "models"), load_dataset("digits")
    for run, other in ((standard_run, other_run), (other_run, None)):
        evaluations = measure(
            load_run(run), data, [parse_threat("3/255")], attacks=["fgsm"], images=40,
            surrogate=load_run(other) if other else None,
        )  # fmt: skip
        (tmp_path / f"{run.name}.json").write_text(json.dumps(record(load_run(run), data, evaluations)))
    text = Path(write_card(standard_run, Directory(copy), NAME, tmp_path / f"{standard_run.name}.json")).read_text()
    name = "robust accuracy, linf 3/255, worst case of fgsm, n = 40"
    entry, transfer = read(tmp_path / f"{standard_run.name}.json")["evaluations"]
    (result,) = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"]
    assert [metric["value"] for metric in result["metrics"] if metric["name"] == name] == [entry["robust"]["value"]]
    robust = [metric["name"] for metric in result["metrics"] if metric["name"].startswith("robust")]
    assert transfer["about"]["kind"] == "transfer"
    assert all("fgsm-10" not in named for named in robust)
    assert "| mi-fgsm-10; crafted on a surrogate: an upper bound of robust accuracy |" in text
    low, high = 100 * entry["robust"]["lower_95"], 100 * entry["robust"]["upper_95"]
    assert f"| fgsm | {100 * entry['robust']['value']:.1f} [{low:.1f}, {high:.1f}] |" in text
    with pytest.raises(BadInput, match="about another run"):
        write_card(standard_run, Directory(copy), NAME, tmp_path / f"{other_run.name}.json")


def test_card_does_not_keep_the_model_from_being_served(repository: Path) -> None:
    """The release holds with card and surrogates beside it."""
    assert verify_release(Directory(repository), NAME).version == 1


def test_card_of_another_run_is_refused(repository: Path, other_run: Path, tmp_path: Path) -> None:
    """A run that the version was not exported from does not describe it; the old card stays."""
    copy = shutil.copytree(repository, tmp_path / "models")
    before = (copy / NAME / "README.md").read_text()
    with pytest.raises(BadInput, match="was exported from another run"):
        write_card(other_run, Directory(copy), NAME)
    assert (copy / NAME / "README.md").read_text() == before
