"""What `dfmcl evaluate` measures of a run: white-box attacks under several threats, and transfer from a surrogate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfmcl.common.errors import BadInput
from dfmcl.common.progress import Track, silent
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.data import Dataset
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.hyperscore import combined_value, hyperscore
from dfmcl.robustness.provenance import now, provenance
from dfmcl.robustness.records import Evaluation, worst_of
from dfmcl.robustness.runs import Run
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.registry import by_norm
from dfmcl.robustness.threats.threat import Threat

FORMAT = "dfmcl.evaluations/1"
# By kind of threat, where the user names no attack.
DEFAULTS = {
    "linf": ("fgsm", "pgd-20", "margin-pgd-20"),
    "l2": ("cw-l2",),
    "l1": ("apgd-ce",),
    "patch": ("patch",),
    "spatial": ("grid",),
    "corruption": ("grid",),
}
BLACK_BOX = ("mi-fgsm-10",)
CPU_BATCH = 128
GPU_VALUES = 2**22  # in a batch: 1,365 images of CIFAR-10, 27 of ImageNet; a ResNet-18 takes a few GB for them


def measure(
    run: Run,
    data: Dataset,
    threats: Sequence[Threat],
    *,
    attacks: Sequence[str] = (),
    cascade: bool = False,
    surrogate: Run | None = None,
    images: int = 0,
    seed: int = 0,
    track: Track = silent,
) -> list[Evaluation]:
    """Evaluate a run on test images: every attack on every image it gets right.

    Balls are measured in float as the literature does, other threats as bytes. A union is the worst case over its
    parts, each of which is attacked by itself, once.

    attacks: names, each used for the threats it can search in; a threat that has none gets DEFAULTS by its kind.
    cascade: each only on what those before it left, which is the same worst case at less cost.
    surrogate: adds, per Linf threat, one evaluation of images crafted on it.
    images: how many test images, drawn by seed (0: all). White-box evaluations come first.
    """
    if data.input_shape != run.input_shape or len(data.classes) != len(run.classes):
        raise BadInput(f"{run.path}: takes images {run.input_shape}, data {data.name} has {data.input_shape}")
    if surrogate is not None and surrogate.checkpoint_sha256 == run.checkpoint_sha256:
        raise BadInput(f"{surrogate.path}: is the evaluated model itself; a surrogate must be another one")
    if images > len(data.x_test):
        raise BadInput(f"--images {images}: the test part of {data.name} has {len(data.x_test)}")
    if surrogate is not None and not any(isinstance(threat, Linf) for threat in threats):
        raise BadInput("--surrogate: transfer is measured in Linf; add a --threat such as 8/255")
    chosen = np.random.default_rng(seed).permutation(len(data.x_test))[: images or None]
    x, y = data.x_test[chosen], data.y_test[chosen]
    on_cpu = next(run.model.parameters()).device.type == "cpu"
    batch_size = CPU_BATCH if on_cpu else max(1, GPU_VALUES // math.prod(run.input_shape))
    by_part: dict[Threat, Evaluation] = {}
    for part, suite in _planned(threats, [Attack.parse(name) for name in attacks], run.input_shape).items():
        outcome = evaluate(
            run.model, x, y, part, suite, grid=not isinstance(part, Ball), cascade=cascade, seed=seed,
            batch_size=batch_size, about={"kind": "white-box"}, track=track,
        )  # fmt: skip
        by_part[part] = outcome.evaluation
    evaluations = [worst_of(threat, [by_part[part] for part in threat.parts]) for threat in threats]
    if surrogate is not None:
        about = {"kind": "transfer", "surrogate_sha256": surrogate.checkpoint_sha256}
        suite = [Attack.parse(name) for name in BLACK_BOX]
        for threat in (threat for threat in threats if isinstance(threat, Linf)):
            outcome = evaluate(
                run.model, x, y, threat, suite, source=surrogate.model, grid=True, seed=seed, batch_size=batch_size,
                about=about, track=track,
            )  # fmt: skip
            evaluations.append(outcome.evaluation)
    return evaluations


def _planned(
    threats: Sequence[Threat], attacks: Sequence[Attack], input_shape: tuple[int, int, int]
) -> dict[Threat, list[Attack]]:
    """The attacks of each part of the threats; BadInput where an attack can search in none, or images have no room."""
    parts = list(dict.fromkeys(part for threat in threats for part in threat.parts))
    for attack in attacks:
        if not any(part.kind in attack.kind.threats for part in parts):
            attack.check(parts[0])
    plan = {}
    for part in parts:
        part.fits((input_shape[2], *input_shape[:2]))
        fitting = [attack for attack in attacks if part.kind in attack.kind.threats]
        plan[part] = fitting or [Attack.parse(name) for name in by_norm(DEFAULTS, part.kind, "default attacks")]
    return plan


def record(run: Run, data: Dataset, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The JSON that `dfmcl evaluate --out` writes, with the HyperScore where black-box figures are there."""
    value = {
        "format": FORMAT,
        "created": now(),
        "run": {"checkpoint_sha256": run.checkpoint_sha256, "config_sha256": run.manifest.get("config_sha256")},
        "data": {**data.describe(), "part": "test"},
        "evaluations": [evaluation.to_json() for evaluation in evaluations],
        **provenance(),
    }
    transfer = next((e for e in evaluations if e.about["kind"] == "transfer"), None)
    if transfer is not None:
        same = (e for e in evaluations if e.about["kind"] == "white-box" and isinstance(e.threat, Linf))
        white = next(e for e in same if e.threat.on_grid() == transfer.threat)
        figures = {
            "threat": str(white.threat),
            "clean": white.clean.value,
            "white_box": white.robust.value,
            "black_box": transfer.robust.value,
        }
        combined = combined_value(figures, dict.fromkeys(("clean", "white_box", "black_box"), 1.0))
        value["hyperscore"] = {**figures, "v": combined, "score": hyperscore(combined) if combined > 0 else 100.0}
    return value
