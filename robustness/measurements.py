"""What `dfmcl evaluate` measures of a run: white-box attacks under several threats, and transfer from a surrogate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from dfmcl.common.errors import BadInput
from dfmcl.common.progress import Track, silent
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.suites import DEFAULTS
from dfmcl.robustness.data import Bytes, Dataset, Labels
from dfmcl.robustness.evaluate import climbed_once, evaluate
from dfmcl.robustness.hyperscore import combined_value, hyperscore
from dfmcl.robustness.image_set import held_at_once
from dfmcl.robustness.portions import ATTACKED, portion
from dfmcl.robustness.provenance import now, provenance
from dfmcl.robustness.records import Evaluation, joined, worst_of
from dfmcl.robustness.runs import Run
from dfmcl.robustness.seeds import derived_seed
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.corruption import Corruption
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.registry import by_norm
from dfmcl.robustness.threats.threat import Threat

FORMAT = "dfmcl.evaluations/1"
BLACK_BOX = ("mi-fgsm-10",)
CPU_BATCH = 128  # images that are attacked together, fewer where they are large
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
    parts; each is attacked by itself, once.

    attacks: names, each used for the threats it can search in; a threat that has none gets DEFAULTS by its kind.
    cascade: each only on what those before it left, which is the same worst case at less cost.
    surrogate: adds, per Linf threat, one evaluation of images crafted on it.
    images: how many test images, drawn by seed (0: all); of a folder only these are decoded, some at a time.
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
    plan = _planned(threats, [Attack.parse(name) for name in attacks], run.input_shape)

    def measured(suites: Mapping[Threat, Sequence[Attack]], **how: Any) -> dict[Threat, Evaluation]:
        found = [
            _by_threat(
                run, data.x_test[rows], data.y_test[rows], suites, batch_size=batch_size, track=track,
                seed=derived_seed(seed, "part", number) if number else seed, **how,
            )
            for number, rows in enumerate(parts)
        ]  # fmt: skip
        return {threat: joined([some[threat] for some in found]) for threat in suites}

    by_part = measured(plan, about={"kind": "white-box"}, cascade=cascade)
    evaluations = [worst_of(threat, [by_part[part] for part in threat.parts]) for threat in threats]
    if surrogate is not None:
        about = {"kind": "transfer", "surrogate_sha256": surrogate.checkpoint_sha256}
        for threat in (threat for threat in threats if isinstance(threat, Linf)):
            suites: dict[Threat, list[Attack]] = {threat: [Attack.parse(name) for name in BLACK_BOX]}
            evaluations.append(measured(suites, about=about, source=surrogate.model, grid=True)[threat])
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


def _by_threat(
    run: Run,
    x: Bytes,
    y: Labels,
    suites: Mapping[Threat, Sequence[Attack]],
    *,
    source: nn.Module | None = None,
    grid: bool = False,
    **told: Any,
) -> dict[Threat, Evaluation]:
    """Each threat by itself; the answers to the clean images, and the fast copy of the source, are asked for once.

    grid: whether balls, too, are measured as bytes.
    """
    found: dict[Threat, Evaluation] = {}
    climbed, clean = climbed_once(source or run.model, x), None
    for threat, suite in suites.items():
        own = grid or not isinstance(threat, Ball)
        outcome = evaluate(run.model, x, y, threat, suite, source=climbed, clean=clean, grid=own, **told)
        found[threat], clean = outcome.evaluation, outcome.clean_logits
    return found


def rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What a table says of an evaluation: titles and figures.

    Of several corruptions each kind's mean accuracy over its severities, and that over all, as benchmarks give it.
    """
    kind, threat, records = evaluation.about["kind"], evaluation.threat, evaluation.attacks
    worst = [(f"worst case, {threat}", str(evaluation.robust))] if len(records) > 1 else []
    parts = [part for part in threat.parts if isinstance(part, Corruption)]
    if 1 < len(parts) == len(threat.parts) == len(records):
        values: dict[str, list[float]] = {}
        for part, one in zip(parts, records, strict=True):
            values.setdefault(part.corruption, []).append(one.accuracy.value)
        each = {f"mean, {name}": float(np.mean(found)) for name, found in values.items()}
        whole = {f"mean, {threat}": float(np.mean([one.accuracy.value for one in records]))}
        return [(title, f"{100 * value:.1f} %") for title, value in (each | whole).items()] + worst
    transfer = "transfer " if kind == "transfer" else ""
    named = len(threat.parts) == 1
    each_attack = [(f"{one.name}, {threat}" if named else one.name, str(one.accuracy)) for one in records]
    return [(f"{transfer}{title}", figure) for title, figure in each_attack] + worst


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
