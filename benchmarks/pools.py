"""What training against one threat is worth under the others, and what a mixed pool costs: `make bench-pools`.

Networks of one architecture, data and length, trained on clean images, in one threat, and in a pool of four; each is
attacked under every threat on the same test images. Balls are measured on the float image, other threats on bytes.
It keeps runs and records in --work, stops after --minutes, and goes on from there when called again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks.result import write_result
from dfmcl.common.files import dump_json, write_text
from dfmcl.robustness.data import Dataset, load_dataset
from dfmcl.robustness.measurements import measure
from dfmcl.robustness.runs import MANIFEST, load_run
from dfmcl.robustness.statistics import PairedCounts, clopper_pearson
from dfmcl.robustness.threats.registry import parse_threat
from dfmcl.training.config import load_config
from dfmcl.training.train import train

# Those that are searched, each attack on what the ones before it left; then those of which the mean counts.
SEARCHED = ("4/255", "l2:0.5", "l1:12", "patch:2%", "rotation:30", "shift:10%")
SPOILED = "corruptions"
ATTACKS = ("cr",)  # in the balls that it searches in; other threats have their defaults
PRESET = "cifar10_narrow"
PLAIN = ["masking.enabled=false", "curriculum.warmup=0.1", "curriculum.hold=0.2", "optimization.lr_schedule=cosine"]


@dataclass(frozen=True)
class Pool:
    """Members of the pool, and the name of the one that it is compared with; "" for none."""

    members: tuple[str, ...]
    beside: str = ""


POOLS = {
    "clean": Pool(()),
    "linf": Pool(("pgd",), "clean"),
    "patch": Pool(("patch:2%",), "clean"),
    "corruptions": Pool(("corruptions",), "clean"),
    "mixed": Pool(("pgd", "patch:2%", "corruptions", "rotation:15"), "linf"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="cifar10.npz")
    parser.add_argument("--work", type=Path, required=True, help="where runs and records are kept")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--images", type=int, default=10_000, help="to train on")
    parser.add_argument("--tested", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=list(POOLS))
    parser.add_argument("--minutes", type=float, default=180.0, help="begin no further network after that")
    told = parser.parse_args()
    end = time.monotonic() + 60 * told.minutes
    told.work.mkdir(parents=True, exist_ok=True)
    data = load_dataset("cifar10", str(told.data))
    for name in told.pools:
        record = place(told, name, "json")
        if not record.exists() and time.monotonic() < end:
            write_text(record, dump_json(measured(name, data, told)))
    found = {name: json.loads(path.read_text()) for name in POOLS if (path := place(told, name, "json")).exists()}
    if missing := [name for name in told.pools if name not in found]:
        print(f"bench-pools: the time is over before {', '.join(missing)}; the same command goes on")
    threats = list(next(iter(found.values()))["held"]) if found else []
    write_result(
        f"pools_{told.width}",
        "What a pool of training is worth under each threat",
        [row_of(name, threat, found) for threat in threats for name in found],
        {},
        {
            "n": f"{told.images} training images, {told.epochs} epochs, width {told.width}; {told.tested} test images",
            "seed": told.seed,
            "note": "right: % of the test images, with exact 95 % bounds, worst case per image over the attacks; mean"
            " corruptions: over 75 answers an image, without bounds; more, fewer: images that only it, only `beside`"
            " holds; p: McNemar, exact; cpu_seconds: of the training, on all cores together",
        },
    )


def place(told: argparse.Namespace, name: str, end: str) -> Path:
    """Where a pool's run or record lies."""
    work: Path = told.work
    return work / f"{name}_{told.width}_{told.images}_{told.epochs}_{told.seed}.{end}"


def measured(name: str, data: Dataset, told: argparse.Namespace) -> dict[str, Any]:
    """Train a network, and ask it under each threat: per image whether it holds."""
    out = place(told, name, "run")
    pool = json.dumps(POOLS[name].members)
    overrides = [
        f"data.path={told.data}", f"data.train_images={told.images}", f"model.width={told.width}", f"seed={told.seed}",
        f"optimization.epochs={told.epochs}", f"curriculum.attacks={pool}", *PLAIN,
    ]  # fmt: skip
    config, begun = load_config(PRESET, overrides), time.process_time()
    if not (out / MANIFEST).exists():
        train(config, out, resume=(out / "state").is_dir(), log=lambda line: print(f"{name}: {line}"))
    seconds = time.process_time() - begun

    def shown(items: Any, label: str, total: int | None = None) -> Iterator[Any]:
        return iter(track(items, f"{name}: {label}", total))

    run, asked = load_run(out), {"images": told.tested, "seed": told.seed, "track": shown}
    searched = [parse_threat(text) for text in SEARCHED]
    found = measure(run, data, searched, attacks=ATTACKS, cascade=True, **asked)
    (spoiled,) = measure(run, data, [parse_threat(SPOILED)], **asked)
    held = {text: one.robust_images for text, one in zip(SEARCHED, found, strict=True)}
    answers = np.array([attack.held for attack in spoiled.attacks])
    return {
        "held": {"clean": found[0].correct, **held, f"worst of {SPOILED}": spoiled.robust_images},
        "mean": float(answers.mean()),
        "cpu_seconds": seconds,
    }


def row_of(name: str, threat: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One line of the table."""
    own, other = found[name], found.get(POOLS[name].beside)
    flags = np.array(own["held"][threat])
    low, high = clopper_pearson(int(flags.sum()), len(flags))
    row: dict[str, Any] = {"threat": threat, "pool": name, "right": 100 * float(flags.mean())}
    row |= {"low": 100 * low, "high": 100 * high}
    if other is not None:
        pair = PairedCounts.of(flags, np.array(other["held"][threat]))
        row |= {"beside": POOLS[name].beside, "more": pair.only_first, "fewer": pair.only_second, "p": pair.p}
    if threat == "clean":
        row |= {"mean corruptions": 100 * own["mean"], "cpu_seconds": own["cpu_seconds"]}
    return row


if __name__ == "__main__":
    main()
