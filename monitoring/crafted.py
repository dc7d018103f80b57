"""Adversarial versions of a whole pool, made once and kept as files: who watches with them crafts nothing.

They depend on the pool, the surrogates, the ball and the attacks, not on the served model: one set outlives promotions.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from dfmcl.common.errors import BadInput, Broken, unwritable
from dfmcl.common.files import dump_json, read_json, sha256_of, whole_directory, write_text
from dfmcl.common.progress import Track, silent
from dfmcl.common.reader import Unfit, opened, why_unread
from dfmcl.monitoring.config import WatchConfig
from dfmcl.monitoring.crafting import ImagePool, draw
from dfmcl.monitoring.probes import Scene, craft
from dfmcl.monitoring.surrogates import Surrogates, load_surrogates
from dfmcl.monitoring.threatened import Threatened, threat_of
from dfmcl.robustness.attacks.registry import Attack, Model
from dfmcl.robustness.data import Bytes, open_dataset
from dfmcl.robustness.gradients import attack_pass
from dfmcl.robustness.models import to_float
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.threat import Threat

Indices = npt.NDArray[np.int64]

FORMAT = "dfmcl.crafted/1"
MANIFEST = "crafted.json"
AGAIN = "make it with dfmcl craft"
BATCH = 64
ROUND = 0  # the attacks draw as in this round; a watch's own rounds begin at 1


@dataclass(frozen=True)
class Recipe:
    """What adversarial images are made from. labels: of the pool's classes; remark: on data that were not read."""

    pool: ImagePool
    labels: tuple[str, ...]
    surrogates: Surrogates
    threat: Ball
    attacks: tuple[Attack, ...]
    seed: int
    remark: str = ""

    @staticmethod
    def of(config: WatchConfig, track: Track = silent) -> Recipe:
        """A watch's; BadInput for data or surrogates that cannot be used."""
        dataset = open_dataset(*config.data.named, track, preprocessing=config.data.preprocessing)
        return Recipe(
            pool=ImagePool(dataset.x_test, dataset.y_test, len(dataset.classes)),
            labels=tuple(map(str, dataset.classes)),
            surrogates=load_surrogates(config.surrogates.runs, dataset),
            threat=config.threat.threat,
            attacks=attacks_of(config),
            seed=config.probe.seed,
            remark=dataset.remark,
        )

    def source(self, device: torch.device | str = "cpu") -> Model:
        """Logits (N, K) of the surrogates for images (N, C, H, W) in [0, 1], both on the CPU; computed on `device`."""
        example = to_float(torch.from_numpy(self.pool.images[:8])).to(device)
        fast = attack_pass(self.surrogates.model.to(device), example)
        return fast if torch.device(device).type == "cpu" else lambda x: fast(x.to(device)).to(x.device)

    def to_json(self) -> dict[str, Any]:
        """What must be the same for files to be of use; the attacks stand beside it."""
        return {
            "pool": self.pool.digest,
            "surrogates": self.surrogates.sha256,
            "threat": {"norm": self.threat.norm, "eps": self.threat.eps},
            "seed": self.seed,
        }


def attacks_of(config: WatchConfig) -> tuple[Attack, ...]:
    """All that rounds through Triton ask: attacks in the ball, then threats of other kinds."""
    ours = (Attack.parse_transfer(name) for name in config.probe.attacks)
    return (*ours, *(Threatened.parse(text) for text in config.probe.threats))


def craft_pool(recipe: Recipe, out: Path, *, device: torch.device | str = "cpu", track: Track = silent) -> None:
    """Write `out`: for each attack the bytes (M, H, W, C), in the ball and in the pool's order; and a manifest."""
    source, pool = recipe.source(device), recipe.pool
    begins = range(0, len(pool.images), BATCH)
    with whole_directory(out, names={MANIFEST, *_files_in(out)}) as staged:
        entries: dict[str, Any] = {}
        for attack in recipe.attacks:
            path = staged / f"{re.sub('[^a-z0-9.-]', '_', attack.name)}.bytes"
            try:
                with path.open("xb") as file:
                    for begin in track(begins, f"craft: {attack.name}", len(begins)):
                        rows = slice(begin, begin + BATCH)
                        scene = Scene(pool.images[rows], pool.labels[rows], recipe.threat, recipe.seed, ROUND, {})
                        file.write(craft(source, scene, attack, part=begin).tobytes())
            except OSError as error:
                raise unwritable(out, error) from None
            entries[attack.name] = {"parameters": dict(attack.parameters), "file": path.name, "sha256": sha256_of(path)}
        manifest = {"format": FORMAT, "recipe": recipe.to_json(), "attacks": entries}
        write_text(staged / MANIFEST, dump_json(manifest))


@dataclass(frozen=True)
class Crafted:
    """A pool's adversarial versions under one attack, in an open file: who replaces the directory changes nothing."""

    pool: ImagePool
    threat: Threat
    path: Path
    file: BinaryIO

    def take(self, chosen: Indices) -> Bytes:
        """Of the images `chosen` (N,): bytes (N, H, W, C). Broken where the file was written over."""
        originals = self.pool.images[chosen]
        size = originals[0].nbytes
        found = b"".join(os.pread(self.file.fileno(), size, int(row) * size) for row in chosen)
        if len(found) == originals.nbytes:
            images = np.frombuffer(found, np.uint8).reshape(originals.shape)
            changed, before = (torch.from_numpy(part.copy()).permute(0, 3, 1, 2) for part in (images, originals))
            if bool(self.threat.contains_uint8(changed, before).all()):
                return images
        raise Broken(f"{self.path}: was written over since this watch began; start it again")


def load_crafted(recipe: Recipe, path: Path) -> Mapping[str, Crafted]:
    """By attack, what `craft_pool` wrote; more attacks than the recipe's may be there.

    BadInput where they were made from something else, or are not what was written. The digests are a guard against
    accidents: who can write here decides what is asked, as with the surrogates.
    """
    if not (path / MANIFEST).is_file():
        raise BadInput(f"{path}: holds no {MANIFEST}; {AGAIN}")
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise BadInput(f"{path / MANIFEST}: format is {manifest.get('format')!r}; expected {FORMAT!r}; {AGAIN}")
    entries, made = _object(manifest, "attacks"), _object(manifest, "recipe")
    wanted = recipe.to_json()
    other = [key for key, value in wanted.items() if made.get(key) != value]
    if other:
        raise BadInput(f"{path}: was crafted from other {', '.join(other)} than this watch has; {AGAIN}")
    crafted: dict[str, Crafted] = {}
    for attack in recipe.attacks:
        entry = _object(entries, attack.name)
        if entry.get("parameters") != dict(attack.parameters):
            raise BadInput(f"{path}: holds no {attack.name}, or one with other parameters; {AGAIN}")
        file = path / Path(str(entry.get("file"))).name
        try:
            images = opened(file)
        except (OSError, Unfit) as error:
            raise BadInput(f"{file}: not readable: {why_unread(error)}; {AGAIN}") from None
        if hashlib.file_digest(images, "sha256").hexdigest() != entry.get("sha256"):
            raise BadInput(f"{file}: is not the file that {MANIFEST} names; {AGAIN}")
        crafted[attack.name] = Crafted(recipe.pool, threat_of(attack, recipe.threat), file, images)
    return crafted


def prepared_scenes(
    pool: ImagePool, threat: Ball, crafted: Mapping[str, Crafted], *, seed: int, count: int, first: int = 1
) -> Iterator[Scene]:
    """Scenes of rounds `first`, `first` + 1, ... without any crafting."""
    for number in itertools.count(first):
        chosen = draw(len(pool.images), count, seed, number)
        adversarial = {name: made.take(chosen) for name, made in crafted.items()}
        yield replace(pool.scene(threat, seed, number, count), adversarial=adversarial)


def _files_in(out: Path) -> list[str]:
    """What an earlier run says that it wrote."""
    if not (out / MANIFEST).is_file():
        return []
    entries = _object(read_json(out / MANIFEST), "attacks")
    return [str(_object(entries, name).get("file")) for name in entries]


def _object(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = value.get(key)
    return found if isinstance(found, dict) else {}
