"""What `dfmcl evaluate` measures of a run: white-box attacks at several radii, and transfer from a surrogate."""

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
from dfmcl.robustness.images import held_at_once
from dfmcl.robustness.portions import ATTACKED, portion
from dfmcl.robustness.provenance import now, provenance
from dfmcl.robustness.records import Evaluation, joined
from dfmcl.robustness.runs import Run
from dfmcl.robustness.seeds import derived_seed
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.registry import by_norm, threat_of
from dfmcl.robustness.threats.threat import RADIUS, Threat

FORMAT = "dfmcl.evaluations/1"
WHITE_BOX = {"linf": ("fgsm", "pgd-20", "margin-pgd-20"), "l2": ("cw-l2",)}
BLACK_BOX = ("mi-fgsm-10",)
CPU_BATCH = 128  # images that are attacked together, fewer where they are large
GPU_VALUES = 2**22  # in a batch: 1,365 images of CIFAR-10, 27 of ImageNet; a ResNet-18 takes a few GB for them


def parse_threat(text: str) -> Threat:
    """`8/255` or `linf:8/255` in Linf, `l2:0.5` in L2."""
    norm, colon, eps = text.rpartition(":")
    threat = threat_of(norm if colon else "linf", eps)
    if not threat.sensible:
        raise BadInput(f"--threat {text}: {RADIUS}")
    return threat


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
    """Evaluate a run on test images, in float as the literature does: every attack on every image it gets right.

    attacks: names for all threats (default: WHITE_BOX by norm). cascade: each only on what those before it left, which
    is the same worst case at less cost. surrogate: adds, per Linf threat, one evaluation of images crafted on it.
    images: how many test images, drawn by seed (0: all); of a folder only these are decoded, part by part.
    White-box evaluations come first.
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
    parts = held_at_once(data.x_test, chosen)
    on_cpu = next(run.model.parameters()).device.type == "cpu"
    values = math.prod(run.input_shape)
    batch_size = min(CPU_BATCH, portion(values, ATTACKED)) if on_cpu else portion(values, GPU_VALUES)

    def measured(threat: Threat, names: Sequence[str], about: dict[str, str], **how: Any) -> Evaluation:
        suite, found = [Attack.parse(name) for name in names], []
        for number, part in enumerate(parts):
            own = derived_seed(seed, "part", number) if number else seed
            outcome = evaluate(
                run.model, data.x_test[part], data.y_test[part], threat, suite, seed=own, batch_size=batch_size,
                about=about, track=track, **how,
            )  # fmt: skip
            found.append(outcome.evaluation)
        return joined(found)

    evaluations = []
    for threat in threats:
        names = attacks or by_norm(WHITE_BOX, threat.norm, "white box")
        evaluations.append(measured(threat, names, {"kind": "white-box"}, cascade=cascade))
    if surrogate is not None:
        about = {"kind": "transfer", "surrogate_sha256": surrogate.checkpoint_sha256}
        for threat in (threat for threat in threats if isinstance(threat, Linf)):
            evaluations.append(measured(threat, BLACK_BOX, about, source=surrogate.model, grid=True))
    return evaluations


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
