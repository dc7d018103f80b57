"""Stand-ins for the served model: what an outsider without its weights would take gradients from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.transfer import ensemble, ensemble_sha256
from dfmcl.robustness.data import Dataset
from dfmcl.robustness.runs import Run, load_run


@dataclass(frozen=True)
class Surrogates:
    """An ensemble in eval mode without weight gradients. name: of its runs; sha256: of all of them together.

    checkpoints: SHA-256 of each, of the run that a packed one was rounded from.
    """

    model: nn.Module
    name: str
    sha256: str
    checkpoints: tuple[str, ...]

    def require_apart(self, checkpoint: str, where: str) -> None:
        """BadInput where one of them is the served model: the figures would not be those of an outsider."""
        if checkpoint and checkpoint in self.checkpoints:
            raise BadInput(f"{where}: is one of the surrogates ({self.name}); a surrogate must be another run")


def load_surrogates(paths: Sequence[str | Path], dataset: Dataset) -> Surrogates:
    """The ensemble of runs, which must fit the data set and be different ones; else BadInput."""
    runs: list[Run] = []
    for path in paths:
        run = load_run(path)
        if run.origin_sha256 in [other.origin_sha256 for other in runs]:
            raise BadInput(f"{path}: holds the same weights as another surrogate; name each run once")
        if run.input_shape != dataset.input_shape or run.classes != dataset.classes:
            raise BadInput(
                f"{path}: takes {run.input_shape} and knows {len(run.classes)} classes; data {dataset.name} has "
                f"{dataset.input_shape} and {len(dataset.classes)}, or other names: train it on that data"
            )
        runs.append(run)
    checkpoints = tuple(run.origin_sha256 for run in runs)
    model = ensemble([run.model for run in runs]).eval().requires_grad_(False)
    return Surrogates(model, "+".join(Path(path).name for path in paths), ensemble_sha256(checkpoints), checkpoints)
