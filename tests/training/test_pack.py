"""A packed run is the run, rounded, and tells where it came from but not where its data lay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dfmcl.common.errors import BadInput
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.models import to_float
from dfmcl.robustness.runs import load_run
from dfmcl.training.pack import pack
from tests.networks import network


@pytest.fixture(scope="module")
def standard_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Moved a little, as the pinned weights are numbers of float16 already."""
    return network("standard", tmp_path_factory.mktemp("runs") / "standard", jitter=1)


@pytest.fixture(scope="module")
def packed(standard_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pack") / "surrogate"
    pack(standard_run, out)
    return out


def test_weights_are_the_nearest_float16(packed: Path, standard_run: Path) -> None:
    """numpy's rounding is the oracle; what is no float stays what it is; the file is about half as large."""
    before, after = (load_file(run / "checkpoint.safetensors") for run in (standard_run, packed))
    assert before.keys() == after.keys()
    for name, value in before.items():
        expected = value.numpy().astype(np.float16) if value.is_floating_point() else value.numpy()
        np.testing.assert_array_equal(after[name].numpy(), expected)
    sizes = [(run / "checkpoint.safetensors").stat().st_size for run in (standard_run, packed)]
    assert sizes[1] < 0.6 * sizes[0]


def test_packed_run_is_a_run_that_answers_as_before(packed: Path, standard_run: Path) -> None:
    """`load_run` takes it, computes in float32, and labels test images as the run does."""
    x = to_float(torch.from_numpy(load_dataset("digits").x_test[:200]))
    with torch.no_grad():
        before, after = (load_run(run).model(x) for run in (standard_run, packed))
    assert after.dtype == torch.float32
    assert (before.argmax(dim=1) == after.argmax(dim=1)).float().mean() >= 0.99
    assert 0 < (before - after).abs().max() < 0.1


def test_manifest_names_the_origin_and_no_local_path(packed: Path, standard_run: Path) -> None:
    """All is kept but the digest, the paths, and the origin that is added."""
    before, after = (json.loads((run / "manifest.json").read_text()) for run in (standard_run, packed))
    assert after["origin"] == {"checkpoint_sha256": before["files"]["checkpoint.safetensors"]}
    assert after["data"] == {**before["data"], "path": ""}
    assert after["config"]["data"] == {**before["config"]["data"], "path": ""}
    changed = {key for key in after if before.get(key) != after[key]}
    assert changed <= {"data", "config", "files", "origin"}


def test_a_path_in_the_run_is_not_in_the_pack(standard_run: Path, tmp_path: Path) -> None:
    """Where the data lay is nobody's business."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint.safetensors").write_bytes((standard_run / "checkpoint.safetensors").read_bytes())
    manifest = json.loads((standard_run / "manifest.json").read_text())
    manifest["data"]["path"] = manifest["config"]["data"]["path"] = "/secret/place.npz"
    (run / "manifest.json").write_text(json.dumps(manifest))
    pack(run, tmp_path / "packed")
    assert "/secret" not in (tmp_path / "packed" / "manifest.json").read_text()


def test_a_pack_is_not_packed_again(packed: Path, tmp_path: Path) -> None:
    """Its origin would be the pack, and the run it came from forgotten."""
    with pytest.raises(BadInput, match="is packed already"):
        pack(packed, tmp_path / "again")
    assert not (tmp_path / "again").exists()
