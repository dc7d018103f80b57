"""Surrogates: what stands in for the served model, and what may not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dfmcl.common.errors import BadInput
from dfmcl.common.files import sha256_of
from dfmcl.monitoring.surrogates import load_surrogates
from dfmcl.robustness.attacks.transfer import ensemble_sha256
from dfmcl.robustness.data import Dataset, load_dataset
from dfmcl.robustness.runs import load_run
from dfmcl.training.pack import pack

MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


def test_the_ensemble_is_the_mean_of_the_logits(make_run: MakeRun, digits: Dataset) -> None:
    """Two surrogates of different width answer as one, with the mean of what each says, and give a gradient."""
    runs = [make_run(1), make_run(2, width=8)]
    ensemble = load_surrogates(runs, digits)
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logits = ensemble.model(x)
    expected = sum(load_run(run).model(x) for run in runs) / 2
    assert torch.allclose(logits, expected, atol=1e-6)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), x)
    assert gradient.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in ensemble.model.parameters())
    assert ensemble.name == "+".join(run.name for run in runs)


def test_the_served_weights_are_refused(make_run: MakeRun, digits: Dataset) -> None:
    """A surrogate that is the release itself is bad input, exit 2; one of another run is not, nor an unknown run."""
    run, other = make_run(1), make_run(2)
    served = sha256_of(run / "checkpoint.safetensors")
    surrogates = load_surrogates([other, run], digits)
    with pytest.raises(BadInput) as caught:
        surrogates.require_apart(served, "version 3")
    expected = f"version 3: is one of the surrogates ({other.name}+{run.name}); a surrogate must be another run"
    assert str(caught.value) == expected
    assert caught.value.exit_code == 2
    surrogates.require_apart("0" * 64, "version 3")
    surrogates.require_apart("", "version 3")


def test_a_packed_copy_of_the_served_weights_is_refused(make_run: MakeRun, digits: Dataset, tmp_path: Path) -> None:
    """Rounded to float16 they are other bytes, and the same model."""
    run = make_run(1)
    pack(run, tmp_path / "packed")
    packed = sha256_of(tmp_path / "packed" / "checkpoint.safetensors")
    served = sha256_of(run / "checkpoint.safetensors")
    assert packed != served
    surrogates = load_surrogates([tmp_path / "packed"], digits)
    with pytest.raises(BadInput, match=r"is one of the surrogates \(packed\)"):
        surrogates.require_apart(served, "version 1")
    with pytest.raises(BadInput, match="holds the same weights as another surrogate"):
        load_surrogates([run, tmp_path / "packed"], digits)


def test_an_ensemble_is_known_by_its_runs(make_run: MakeRun, digits: Dataset) -> None:
    """As the gate knows it: its transfer figures are found by this digest."""
    runs = [make_run(1), make_run(2)]
    both, one = load_surrogates(runs, digits), load_surrogates(runs[:1], digits)
    assert both.sha256 == ensemble_sha256(both.checkpoints)
    assert both.sha256 != one.sha256
    assert both.checkpoints == tuple(sha256_of(run / "checkpoint.safetensors") for run in runs)


def test_the_same_weights_twice_are_refused(make_run: MakeRun, digits: Dataset) -> None:
    """One run under two names would count twice in the mean."""
    runs = [make_run(1), make_run(1)]
    with pytest.raises(BadInput, match="holds the same weights as another surrogate; name each run once"):
        load_surrogates(runs, digits)


def test_a_surrogate_for_other_classes_is_refused(make_run: MakeRun, digits: Dataset) -> None:
    """A surrogate must know the data set's classes."""
    with pytest.raises(BadInput, match="knows 7 classes; data digits has"):
        load_surrogates([make_run(1, classes=7)], digits)


def test_a_surrogate_for_other_images_is_refused(make_run: MakeRun, digits: Dataset) -> None:
    """A surrogate must take the data set's images."""
    image, label = np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.int64)
    small = Dataset("npz", image, label, image, label, digits.classes)
    with pytest.raises(BadInput, match=r"takes \(16, 16, 3\) and knows 10 classes; data npz has \(8, 8, 3\)"):
        load_surrogates([make_run(1)], small)
