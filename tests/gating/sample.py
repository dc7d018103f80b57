"""A report as the gate writes it, with all its parts: ten classes, 200 digits at most, four attacks, four radii."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfmcl.gating.formats.summary import flags
from dfmcl.gating.order import Matter, order_of
from dfmcl.gating.pairs import Pairs
from dfmcl.gating.signing.report import Report
from dfmcl.robustness.attacks.suites import LAST
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.records import Evaluation
from tests.signing import checked, evaluated, policy_of, true_report

IMAGES, POPULATION, BLOCK = 200, 450, 8
CLASSES = tuple(f"digit {number}" for number in range(10))
ATTACKS = ("apgd-ce-50", "apgd-t-20", "fab-t-20", "square-1000")
FILES = {"model.onnx": "1" * 64, "labels.txt": "2" * 64}
SURROGATE = {"kind": "transfer", "surrogate": "surrogate-pgd", "surrogate_sha256": "3" * 64}
Array = NDArray[Any]


@cache
def sample(threshold: float = 0.3, *, kind: str = "sequential", raised: tuple[str, ...] = ()) -> Report:
    """A report whose main robust criterion asks for `threshold` at 16/255 (62 % hold), as its record makes it.

    raised: checks.
    """
    report = _after(IMAGES, threshold, kind, raised)
    stop = report.statistics.attacked
    return report if stop == IMAGES else _after(stop, threshold, kind, raised)


def edited(report: Report, edit: Callable[[dict[str, Any]], object]) -> Report:
    """The report with another text: what somebody wrote who is not the gate."""
    document = report.to_json()
    edit(document)
    return Report.from_json(document)


def probes(report: Report) -> dict[str, Array]:
    """Arrays that agree with a sample's per-image record: bytes in the ball, logits whose greatest is the answer."""
    return _probes(np.array(report.per_image.index), flags(report.evaluation.per_image.robust))


def _after(count: int, threshold: float, kind: str, raised: tuple[str, ...]) -> Report:
    """The report of a gate that attacked so many images."""
    digits = load_dataset("digits")
    policy = policy_of(
        [
            f"robust_accuracy >= {threshold} at 95 %",
            "robust_accuracy(8/255) >= 0.6 at 95 %",
            "clean_accuracy >= 0.85 at 95 %",
            "class_robust_accuracy >= 0.1 at 95 %",
            "robust_accuracy(4/255) >= 0.6 at 95 %",
            "robust_accuracy(24/255) >= 0.1 at 95 %",
            "no_regression at 95 %",
        ],
        statistics=kind,
        threat={"eps": "16/255"},
        data={"name": "digits", "images": IMAGES},
        attacks={"suite": list(ATTACKS), "substitute": 0, "block": BLOCK},
    )
    index = order_of(Matter(FILES["model.onnx"], "d" * 64, policy.digest, POPULATION))[:count]
    held = _resists()[index] > 16
    report = true_report(
        _probes(index, held),
        FILES,
        policy=policy,
        checks=checked(**dict.fromkeys(raised, "raised")),
        population=POPULATION,
        classes=CLASSES,
        class_images=np.bincount(digits.y_test).tolist(),
        evaluations=[_evaluation(index, eps) for eps in (4, 8, 16, 24)],
        transfer=[_transferred(index)],
        pairs=Pairs(
            "4" * 64, "5" * 64, count, tuple(index.tolist()), tuple(np.roll(held, 3).tolist()), tuple(held.tolist())
        ),
    )
    return replace(
        report,
        versions={"python": "3.11.7", "dfmcl": "0.1.0", "torch": "2.8.0", "onnxruntime": "1.20.0"},
        hardware={"machine": "x86_64", "cpu": "a CPU", "gpu": None, "threads": 2},
        seconds=151.3,
    )


@cache
def _resists() -> Array:
    """The radius in 255ths at which each image falls (0: wrong from the start)."""
    stream, labels = np.random.default_rng(6), load_dataset("digits").y_test
    return np.where(stream.random(POPULATION) < 0.05, 0, stream.gamma(4.5, 4 + 0.5 * (labels % 4), POPULATION))


def _evaluation(index: Array, eps: int) -> Evaluation:
    """At radius eps/255, where each image falls to one of the attacks."""
    resists = _resists()[index]
    killer = np.random.default_rng(7).choice(len(ATTACKS), POPULATION, p=[0.72, 0.2, 0.05, 0.03])[index]
    each = [
        evaluated(resists > 0, (resists > eps) | (killer != number), f"{eps}/255") for number in range(len(ATTACKS))
    ]
    attacks = [replace(one.attacks[0], name=name) for one, name in zip(each, ATTACKS, strict=True)]
    return replace(each[0], attacks=tuple(attacks))


def _transferred(index: Array) -> Evaluation:
    """Images resist more than under the model's own gradients."""
    found = evaluated(_resists()[index] > 0, 1.4 * _resists()[index] > 16, "16/255", SURROGATE)
    return replace(found, attacks=(replace(found.attacks[0], name="mi-fgsm-10", parameters=LAST),))


def _probes(index: Array, held: Array) -> dict[str, Array]:
    digits, right = load_dataset("digits"), _resists()[index] > 0
    labels, images, stream = digits.y_test[index], digits.x_test[index], np.random.default_rng(8)
    wrong = (labels + stream.integers(1, 4, len(index))) % len(CLASSES)
    step = np.sign(stream.standard_normal(images.shape)).astype(np.int16) * 16
    answers = {"clean_logits": np.where(right, labels, wrong), "adversarial_logits": np.where(held, labels, wrong)}
    return {
        "images": images,
        "change": (np.clip(images + step, 0, 255) - images).astype(np.uint8),
        "labels": labels,
        **{name: 8 * np.eye(len(CLASSES), dtype=np.float32)[answer] for name, answer in answers.items()},
    }
