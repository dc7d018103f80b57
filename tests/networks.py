"""The networks that tests look at: pinned in tests/fixtures, or trained anew from another seed.

A test that decides on one of them must hold for any seed, so `--fixture-seed` trains others in their place, and
`--fixture-jitter` moves each weight as another processor's rounding would. `python -m tests.networks` pins them again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dfmcl.common.files import dump_json, sha256_of
from dfmcl.robustness.runs import CHECKPOINT, MANIFEST
from dfmcl.robustness.seeds import generator
from dfmcl.training.config import load_config
from dfmcl.training.train import train

Networks = Callable[[str], Path]  # a name to its run
PINNED = Path(__file__).parent / "fixtures"
TINY = ["model.width=8", "data.train_images=600", "optimization.epochs=5"]
SMALL = ["model.width=8", "optimization.epochs=8", "curriculum.beta=16/255", "curriculum.steps=2"]
HONEST = [
    "model.width=8",
    "data.train_images=600",
    "heldout.images=20",
    "heldout.attack_steps=1",
    "optimization.epochs=4",
    "optimization.batch_size=20",
    "optimization.lr=5e-3",
    "curriculum.beta=8/255",
    "curriculum.schedule=constant",
    "curriculum.steps=1",
]
# By name: a preset, and what is changed in it. Two of one recipe differ by their seed.
RECIPES: dict[str, tuple[str, list[str]]] = {
    "standard": ("quickstart_standard", [*TINY, "seed=0"]),
    "other": ("quickstart_standard", [*TINY, "seed=1"]),
    "hardened": ("quickstart_surrogate", [*SMALL, "heldout.attack_steps=1", "seed=0"]),
    "pgd-at": ("quickstart_surrogate", [*HONEST, "seed=1"]),
    "trades": ("quickstart_surrogate", [*HONEST, "curriculum.attacks=['kl']", "objective.name=trades", "seed=1"]),
    "dfmcl": ("quickstart", [*HONEST, "curriculum.schedule=linear", "seed=0"]),
    "dfmcl-ranked": (
        "quickstart",
        [*HONEST, "masking.rule=ranked", "masking.rate=0.2", "masking.scaling=inverted", "seed=0"],
    ),
}
# The pinned ones come from their own seeds; another draw takes seeds far from those.
APART = 1000
JITTER = 1e-6  # ten roundings of float32: what another order of sums does to a trained weight at the least


def network(name: str, out: Path, *, seed: int = 0, jitter: int = 0) -> Path:
    """A run of that name in the new directory `out`. seed 0: the pinned one; jitter: the draw of noise, 0 for none."""
    if seed == 0:
        shutil.copytree(PINNED / name, out)
    else:
        trained(name, out, APART * seed)
    return rewritten(out, torch.float32, jitter)


def trained(name: str, out: Path, more: int = 0) -> Path:
    """The recipe's run, from its own seed plus `more`."""
    preset, changes = RECIPES[name]
    *rest, seed = changes
    train(load_config(preset, [*rest, f"seed={int(seed.removeprefix('seed=')) + more}"]), out, log=lambda line: None)
    return out


def rewritten(run: Path, dtype: torch.dtype, jitter: int = 0) -> Path:
    """The run with its weights in that dtype, each times 1 + JITTER times a normal draw where one is asked for."""
    weights, stream = load_file(run / CHECKPOINT), generator(jitter, "jitter")
    for key, weight in weights.items():
        if weight.is_floating_point():
            noise = JITTER * torch.randn(weight.shape, generator=stream) if jitter else 0
            weights[key] = (weight.float() * (1 + noise)).to(dtype)
    save_file(weights, run / CHECKPOINT)
    manifest = json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"][CHECKPOINT] = sha256_of(run / CHECKPOINT)
    (run / MANIFEST).write_text(dump_json(manifest), encoding="utf-8")
    return run


def pin(name: str, scratch: Path) -> None:
    """Train a recipe and keep its manifest and its weights, in float16: what counts is that they are the same."""
    made, kept = trained(name, scratch / name), PINNED / name
    kept.mkdir(parents=True, exist_ok=True)
    for file in (CHECKPOINT, MANIFEST):
        shutil.copy(made / file, kept / file)
    rewritten(kept, torch.float16)


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for recipe in RECIPES:
            pin(recipe, Path(folder))
            print(recipe, sha256_of(PINNED / recipe / CHECKPOINT)[:12])
