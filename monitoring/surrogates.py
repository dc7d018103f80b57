"""Stand-ins for the served model: what an outsider without its weights would take gradients from."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from robustness.data import Dataset
from robustness.errors import BadInput
from robustness.runs import load_run


class MeanLogits(nn.Module):
    """Several classifiers as one: the mean of their logits. Liu et al. 2017 (ensembles transfer better than one)."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) in [0, 1]; returns logits (N, K)."""
        return torch.stack([model(x) for model in self.models]).mean(dim=0)


@dataclass(frozen=True)
class Surrogates:
    """An ensemble in eval mode without weight gradients. name: of its runs; sha256: of all its checkpoints."""

    model: MeanLogits
    name: str
    sha256: str


def load_surrogates(runs: Sequence[str | Path], dataset: Dataset, served: Collection[str] = ()) -> Surrogates:
    """The ensemble of `runs`, which must fit the data set; BadInput for one whose checkpoint SHA-256 is in `served`.

    Gradients of the served weights are what no outsider has: the figures would not be those of a transfer attack. A
    packed run counts as the one it was rounded from.
    """
    models, digests = [], []
    for path in runs:
        run = load_run(path)
        digest = run.manifest.get("origin", {}).get("checkpoint_sha256", run.checkpoint_sha256)
        if digest in served:
            raise BadInput(f"{path}: holds the weights that are served; a surrogate must be another run")
        if digest in digests:
            raise BadInput(f"{path}: holds the same weights as another surrogate; name each run once")
        if run.input_shape != dataset.input_shape or run.classes != dataset.classes:
            raise BadInput(
                f"{path}: takes {run.input_shape} and knows {len(run.classes)} classes; data {dataset.name} has "
                f"{dataset.input_shape} and {len(dataset.classes)}, or other names: train it on that data"
            )
        models.append(run.model)
        digests.append(digest)
    ensemble = MeanLogits(models).eval().requires_grad_(False)
    name = "+".join(Path(path).name for path in runs)
    return Surrogates(ensemble, name, hashlib.sha256("".join(digests).encode()).hexdigest())
