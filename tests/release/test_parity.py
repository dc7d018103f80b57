"""Every way of computing that is present answers as the gate recorded; one that does not is told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from dfmcl.common.errors import BadInput
from dfmcl.release.parity import ELSEWHERE, compare, counted


def test_each_way_of_computing_is_compared(repository: Path) -> None:
    """On the CPU with and without graph optimisation; both are the gate's answers up to rounding."""
    found = [row for row in compare(repository / "digits" / "1") if row.provider == "CPUExecutionProvider"]
    assert [row.setting for row in found] == ["float32", "float32, graph as it is"]
    assert all(row.equal for row in found)
    assert {row.provider for row in compare(repository / "digits" / "1")} == (
        set(ort.get_available_providers()) - ELSEWHERE
    )


@pytest.mark.parametrize("part", ["clean_logits", "adversarial_logits"])
def test_other_answers_are_seen(repository: Path, part: str) -> None:
    """A provider that decides one image in eighty otherwise, clean or adversarial, is not the one that was judged."""
    version = repository / "digits" / "1"
    with np.load(version / "probes.npz") as probes:
        arrays = dict(probes)
    row = arrays[part][0]
    row[[row.argmax(), row.argmin()]] = row[[row.argmin(), row.argmax()]]
    np.savez(version / "probes.npz", **arrays)
    rows = list(compare(version))
    assert not any(row.equal for row in rows)
    agreement = "clean_agreement" if part == "clean_logits" else "adversarial_agreement"
    assert getattr(rows[-1], agreement) == pytest.approx(79 / 80)


def test_images_of_further_threats_are_compared_too(repository: Path) -> None:
    """What the gate kept of a patch or of fog is asked as well: one answer that is another is seen."""
    version = repository / "digits" / "1"
    with np.load(version / "probes.npz") as probes:
        arrays = dict(probes)
    arrays |= {"change1": arrays["change"][:20], "adversarial_logits1": arrays["adversarial_logits"][:20].copy()}
    np.savez(version / "probes.npz", **arrays)
    assert all(row.equal for row in compare(version) if row.provider == "CPUExecutionProvider")
    row = arrays["adversarial_logits1"][3]
    row[[row.argmax(), row.argmin()]] = row[[row.argmin(), row.argmax()]]
    np.savez(version / "probes.npz", **arrays)
    (found, *_) = [row for row in compare(version) if row.provider == "CPUExecutionProvider"]
    assert found.clean_agreement == 1
    assert found.adversarial_agreement == pytest.approx(99 / 100)


def test_logits_that_are_no_numbers_are_no_agreement(repository: Path) -> None:
    """Told in words, where a difference would be "off by nan"."""
    version = repository / "digits" / "1"
    with np.load(version / "probes.npz") as probes:
        arrays = dict(probes)
    arrays["clean_logits"][0, 0] = np.nan
    np.savez(version / "probes.npz", **arrays)
    for row in compare(version):
        assert (row.equal, row.trouble) == (False, "recorded logits are not finite for 1 of 160 images")


def test_a_provider_that_cannot_run_is_no_agreement(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is listed, with its reason."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    if "CUDAExecutionProvider" in ort.get_available_providers() and ort.get_device() == "GPU":
        pytest.skip("has a GPU")
    rows = list(compare(repository / "digits" / "1"))
    assert [(row.provider, row.setting) for row in rows] == [
        ("CPUExecutionProvider", "float32"), ("CUDAExecutionProvider", "float32"), ("CUDAExecutionProvider", "TF32")
    ]  # fmt: skip
    assert all(row.trouble and not row.equal for row in rows)


def test_the_one_that_decided_comes_first_and_counts(repository: Path) -> None:
    """Also where it is not here; of a version of the CPU all ways count, as its configs name more than one."""
    version = repository / "digits" / "1"
    rows = list(compare(version))
    assert [row.judged for row in rows] == [True] + [False] * (len(rows) - 1)
    assert counted(rows) == rows
    report = json.loads((version / "report.json").read_text())
    decided = {"provider": "tensorrt", "precision": "fp16", "tf32": True}
    (version / "report.json").write_text(json.dumps({**report, "decided": decided}))
    first, *others = rows = list(compare(version))
    assert (first.provider, first.setting, first.judged) == ("TensorrtExecutionProvider", "float16", True)
    assert "fell back to another provider" in first.trouble
    assert counted(rows) == [first]
    assert any(row.equal for row in others)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:2000])])
def test_a_version_without_whole_probes_is_bad_input(repository: Path, damage: Callable[[Path], object]) -> None:
    """There is nothing to compare with."""
    damage(repository / "digits" / "1" / "probes.npz")
    with pytest.raises(BadInput, match="run dfmcl gate again"):
        list(compare(repository / "digits" / "1"))
