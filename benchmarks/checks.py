"""Which check catches which trap, and how often honest models raise one: `python -m benchmarks.checks`.

Small networks on digits, trained as the presets say, at a size that leaves time for twenty seeds. An honest run is one
diagnosis of one network at one radius, with the record of a short suite. The traps stand around a plain network that
holds nothing at 8/255, so that whatever they seem to hold is deceit; they are diagnosed without that record.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from benchmarks.result import write_result
from robustness.attacks import Attack
from robustness.checks import CHECKS, Result, diagnose
from robustness.data import Dataset, load_dataset
from robustness.diagnosis import IMAGES
from robustness.evaluate import evaluate
from robustness.memory import repeated
from robustness.models import Classifier, exactly
from robustness.records import Evaluation
from robustness.runs import load_run
from robustness.statistics import upper_bound
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
SUITE = ("apgd-ce-10", "apgd-t-5", "square-50")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="of the small networks")
    parser.add_argument("--seed", type=int, default=0, help="of the attacks")
    arguments = parser.parse_args()
    data = load_dataset("digits")
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
        base, threat = load_run(Path(folder) / "0-0").model, Threat.parse("linf", "8/255")
        for name in track(TRAPS, description="traps"):
            trap = sprung(name, base, data.x_test[:IMAGES], data.y_test[:IMAGES])
            record = recorded(trap, data, threat, arguments.seed)
            caught = [diagnosed(trap, data, threat, arguments.seed)]
            rows.append(described("trap", name, str(threat), caught, record.robust.value))
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


def trained(preset: str, overrides: Sequence[str], out: Path) -> Classifier:
    train(load_config(preset, list(overrides)), out, log=lambda line: None)
    return load_run(out).model


def recorded(model: nn.Module, data: Dataset, threat: Threat, seed: int) -> Evaluation:
    """What the gate would hand in."""
    attacks = [Attack.parse(name) for name in SUITE]
    images, labels = data.x_test[:IMAGES], data.y_test[:IMAGES]
    return evaluate(model, images, labels, threat, attacks, grid=True, cascade=True, seed=seed).evaluation


def diagnosed(
    model: nn.Module, data: Dataset, threat: Threat, seed: int, evaluation: Evaluation | None = None
) -> tuple[list[Result], float]:
    """The results and the seconds they took."""
    begun = time.perf_counter()
    images, labels = data.x_test[:IMAGES], data.y_test[:IMAGES]
    about = {
        "run": {"data": data.sha256},
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
    )
    return results, time.perf_counter() - begun


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
