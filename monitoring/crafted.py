"""Adversarial versions of a whole pool, made once and kept as files: who watches with them crafts nothing.

They depend on the pool, the surrogates, the ball and the attacks, not on the served model: one set outlives promotions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monitoring.config import WatchConfig
from monitoring.crafting import Pool
from monitoring.probes import Scene, craft
from monitoring.surrogates import Surrogates, load_surrogates
from robustness.attacks import Attack, Model
from robustness.data import Bytes, load_dataset
from robustness.errors import BadInput
from robustness.files import dump_json, read_json, sha256_of, whole_directory, write_text
from robustness.gradients import attack_pass
from robustness.models import to_float
from robustness.progress import Track, silent
from robustness.threat import Threat

FORMAT = "dfmcl.crafted/1"
MANIFEST = "crafted.json"
BATCH = 64
ROUND = 0  # of which the attacks' randomness is; those of a watch begin at 1


@dataclass(frozen=True)
class Recipe:
    """What adversarial images are made from. labels: of the pool's classes."""

    pool: Pool
    labels: tuple[str, ...]
    surrogates: Surrogates
    threat: Threat
    attacks: tuple[Attack, ...]
    seed: int

    @staticmethod
    def of(config: WatchConfig, track: Track = silent) -> Recipe:
        """A watch's; BadInput for data or surrogates that cannot be used."""
        dataset = load_dataset(config.data.name, config.data.path, config.data.image_size, track)
        return Recipe(
            pool=Pool(dataset.x_test, dataset.y_test, len(dataset.classes)),
            labels=tuple(map(str, dataset.classes)),
            surrogates=load_surrogates(config.surrogates.runs, dataset),
            threat=config.threat.threat,
            attacks=tuple(Attack.parse_transfer(name) for name in config.probe.attacks),
            seed=config.probe.seed,
        )

    def source(self, device: torch.device | str = "cpu") -> Model:
        """Logits (N, K) of the surrogates for images (N, C, H, W) in [0, 1], both on the CPU; computed on `device`."""
        example = to_float(torch.from_numpy(self.pool.images[:8])).to(device)
        fast = attack_pass(self.surrogates.model.to(device), example)
        return lambda x: fast(x.to(device)).to(x.device)

    def to_json(self) -> dict[str, Any]:
        """What must be the same for files to be of use."""
        return {
            "pool": self.pool.digest,
            "surrogates": self.surrogates.sha256,
            "threat": {"norm": self.threat.norm, "eps": self.threat.eps},
            "attacks": [attack.name for attack in self.attacks],
            "seed": self.seed,
        }


def craft_pool(recipe: Recipe, out: Path, *, device: torch.device | str = "cpu", track: Track = silent) -> None:
    """Write `out`: for each attack a .npy of uint8 (M, H, W, C), in the ball, in the pool's order; and a manifest."""
    source = recipe.source(device)
    pool = recipe.pool
    files = {attack.name: f"{attack.name}.npy" for attack in recipe.attacks}
    with whole_directory(out, names=(MANIFEST, *files.values())) as staged:
        scene = Scene(pool.images, pool.labels, recipe.threat, recipe.seed, ROUND, {})
        for attack in recipe.attacks:
            made = np.lib.format.open_memmap(staged / files[attack.name], "w+", np.uint8, pool.images.shape)
            begins = range(0, len(pool.images), BATCH)
            for begin in track(begins, f"craft: {attack.name}", len(begins)):
                chosen = np.zeros(len(pool.images), bool)
                chosen[begin : begin + BATCH] = True
                made[begin : begin + BATCH] = craft(source, scene.only(chosen), attack, part=begin)
            made.flush()
        digests = {name: sha256_of(staged / file) for name, file in files.items()}
        write_text(staged / MANIFEST, dump_json({"format": FORMAT, "recipe": recipe.to_json(), "files": digests}))


def load_crafted(recipe: Recipe, path: Path) -> Mapping[str, Bytes]:
    """By attack, the pool's adversarial versions, read from the file when they are needed.

    BadInput where they were made from something else, or are not what was written.
    """
    again = "make it with dfmcl craft"
    if not (path / MANIFEST).is_file():
        raise BadInput(f"{path}: holds no {MANIFEST}; {again}")
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise BadInput(f"{path / MANIFEST}: format is {manifest.get('format')!r}; expected {FORMAT!r}; {again}")
    found, wanted = manifest.get("recipe"), recipe.to_json()
    other = [key for key, value in wanted.items() if not isinstance(found, dict) or found.get(key) != value]
    if other:
        raise BadInput(f"{path}: was crafted from other {', '.join(other)} than this watch has; {again}")
    crafted: dict[str, Bytes] = {}
    for attack in recipe.attacks:
        file = path / f"{attack.name}.npy"
        if not file.is_file() or sha256_of(file) != manifest.get("files", {}).get(attack.name):
            raise BadInput(f"{file}: is not the file that {MANIFEST} names; {again}")
        crafted[attack.name] = np.load(file, mmap_mode="r")
    return crafted
