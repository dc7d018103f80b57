"""A candidate's manifest and labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dfmcl.common.errors import BadInput
from dfmcl.release.candidate import Manifest, labels_text, read_manifest, verify_files


def test_manifest_survives_its_round_trip(candidate: Path) -> None:
    """What is written is what is read."""
    manifest = read_manifest(candidate)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "dfmcl.candidate/2"),
        ("labels", ["one"]),
        ("files", {"model.onnx": "0"}),
        ("input", {}),
        ("surprise", 1),
        ("parity", {"images": 1}),
        ("weights", "int8"),
    ],
)
def test_malformed_manifest_is_bad_input(tmp_path: Path, candidate: Path, key: str, value: object) -> None:
    """A manifest with one entry wrong is refused with the name of its file."""
    manifest = json.loads((candidate / "manifest.json").read_text()) | {key: value}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match=r"manifest\.json: not a candidate's manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "labels.txt"])
def test_changed_file_is_bad_input(tmp_path: Path, candidate: Path, name: str) -> None:
    """One byte more in any file is noticed."""
    changed = shutil.copytree(candidate, tmp_path / "candidate")
    with (changed / name).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(BadInput, match=f"{name}: sha256"):
        verify_files(changed)


@pytest.mark.parametrize("label", ["", " ", "two\nlines", "trailing ", "line\u2028separator"])
def test_label_that_is_no_line_is_bad_input(label: str) -> None:
    """labels.txt has exactly one line a class."""
    with pytest.raises(BadInput, match="rename the class"):
        labels_text(("fine", label))
