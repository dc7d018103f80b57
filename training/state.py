"""A run on disk: the state that it resumes from, the record of its epochs, and the checkpoint that it ends in."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from dfmcl.common.errors import BadInput, Broken, lacks_memory
from dfmcl.common.files import dump_json, sha256_of, write_bytes, write_text
from dfmcl.robustness.arch import is_code
from dfmcl.robustness.models import Classifier
from dfmcl.robustness.provenance import now, provenance
from dfmcl.robustness.runs import CHECKPOINT, FORMAT, MANIFEST
from dfmcl.robustness.user_code import answers
from dfmcl.training.compact import expand, shrink
from dfmcl.training.config import TrainConfig

STATE = Path("state") / "state.pt"
HISTORY = "metrics.csv"


@dataclass(frozen=True)
class Epoch:
    """One line of the record. Accuracies are shares of held-out training images, not a number where none were measured.

    eps is S(t) at the epoch's end; p_* describe p in its last step, p_counts in ten equal bins from p_low to p_high.
    """

    epoch: int
    step: int
    train_loss: float
    heldout_clean: float
    heldout_pgd: float
    eps: float
    alpha: float
    p_mean: float
    p_std: float
    p_low: float
    p_high: float
    p_counts: str
    fell_back: bool
    images_per_second: float

    def line(self, epochs: int) -> str:
        mask = f", alpha {self.alpha:.4f}, p {self.p_mean:.4f} +- {self.p_std:.1e}" if self.p_mean else ""
        heldout = (
            ""
            if math.isnan(self.heldout_pgd)
            else (f", held-out clean {100 * self.heldout_clean:.1f} %, PGD {100 * self.heldout_pgd:.1f} %")
        )
        return (
            f"epoch {self.epoch}/{epochs}: loss {self.train_loss:.3f}{heldout}, eps {self.eps * 255:.1f}/255{mask},"
            f" {self.images_per_second:.0f} images/s"
        )


def write_state(out: Path, config: TrainConfig, state: dict[str, Any], compact: bool = False) -> None:
    """Write what `--resume` needs; a reader finds the old state or the new one, never a part of it."""
    (out / STATE).parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    header = {"config": config.digest, "threads": torch.get_num_threads(), "compact": compact}
    learner = shrink(state["learner"]) if compact else state["learner"]
    torch.save({**header, **state, "learner": learner}, buffer)
    write_bytes(out / STATE, buffer.getvalue())


def read_state(out: Path, config: TrainConfig, data_sha256: str) -> dict[str, Any] | None:
    """The last state of this very run, or None where there is none; another config's, or other data's, is refused."""
    path = out / STATE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        digest = state["config"]
    except Exception as error:  # torch.load raises whatever its unpickler meets
        if lacks_memory(error):
            raise
        raise BadInput(f"{path}: not a state ({type(error).__name__}); remove the directory and train again") from None
    if digest != config.digest:
        raise BadInput(f"{path}: is another config's; repeat the preset and every --set, or use another directory")
    if state["data"] != data_sha256:
        raise BadInput(f"{path}: is of other data; name the run's own with data.path, or use another directory")
    return {**state, "learner": expand(state["learner"])} if state["compact"] else state


def saved_step(out: Path) -> int | None:
    """After how many steps the state was saved that `--resume` goes on from; None where there is none."""
    try:
        return int(torch.load(out / STATE, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception:  # noqa: BLE001  # torch.load raises whatever its unpickler meets; none to go on from, in any case
        return None


def write_history(out: Path, history: list[Epoch]) -> None:
    """One row an epoch, rewritten whole."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(epoch) for epoch in history)
    write_text(out / HISTORY, text.getvalue())


def write_run(
    out: Path,
    config: TrainConfig,
    model: Classifier,
    labels: tuple[str, ...],
    data: dict[str, Any],
    result: dict[str, Any],
    begun: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The finished run: weights first, the manifest that vouches for them last. Broken where a weight is not finite.

    config, model, labels, data, result: what the manifest says of the run.
    begun: the pretrained weights that it began with; None: from scratch.
    """
    spec = model.spec
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if wild := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise Broken(f"{out}: {wild[0]} is not finite after the last step; lower optimization.lr and train again")
    write_bytes(out / CHECKPOINT, save(tensors))
    manifest = {
        "format": FORMAT,
        "created": now(),
        "model": spec.to_json(),
        "labels": list(labels),
        "data": data,
        "seed": config.seed,
        "config": config.model_dump(),
        "config_sha256": config.digest,
        "files": {CHECKPOINT: sha256_of(out / CHECKPOINT)},
        "result": result,
        **({"weights": begun} if begun else {}),
        **({"answers": answers(model.eval(), spec.input_shape)[0].tolist()} if is_code(spec.arch) else {}),
        **provenance(),
    }
    write_text(out / MANIFEST, dump_json(manifest))
    return manifest
