"""A report as the gate writes it, with all its parts: ten classes, 200 of 450 digits, four attacks, four radii."""

from __future__ import annotations

import copy
import hashlib
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfmcl.gating.formats.summary import flags
from dfmcl.gating.pairs import Pairs
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.records import AttackRecord, Evaluation
from dfmcl.robustness.sequential import ConfidenceSequence
from dfmcl.robustness.statistics import lower_bound, upper_bound
from dfmcl.robustness.threats.registry import threat_of

IMAGES, POPULATION, BLOCK = 200, 450, 8
CLASSES = tuple(f"digit {number}" for number in range(10))
ATTACKS = {"apgd-ce-50": (50, 50), "apgd-t-20": (63, 60), "fab-t-20": (60, 60), "square-1000": (640, 0)}
CHECKS = {
    "outputs_differ": ("two passes over the same images give different logits", "make the model deterministic"),
    "fgsm_beats_pgd": ("FGSM flips images that PGD does not, more than chance explains", "repair the gradients"),
    "black_box_beats_white_box": ("Square flips images that no white-box attack flips", "attack the model's own loss"),
    "scale_matters": ("PGD flips more images when the logits are divided by ten", "judge with margin attacks"),
    "artefact_disagrees": ("checkpoint and ONNX file label adversarial images differently", "export the run again"),
    "seen_images": ("the manifest says that the model was trained on these images", "judge on other images"),
}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _drawn() -> dict[str, NDArray[Any]]:
    """Images, labels and what they resist: the radius in 255ths at which each falls (0: wrong from the start)."""
    stream = np.random.default_rng(6)
    digits = load_dataset("digits")
    index = stream.permutation(POPULATION)[:IMAGES]
    labels = digits.y_test[index]
    resists = np.where(stream.random(IMAGES) < 0.05, 0, stream.gamma(4.5, 4 + 0.5 * (labels % 4), IMAGES))
    killer = stream.choice(len(ATTACKS), IMAGES, p=[0.72, 0.2, 0.05, 0.03])
    return {"index": index, "images": digits.x_test[index], "labels": labels, "resists": resists, "killer": killer}


def evaluation(eps: int, gain: float = 1.0, about: dict[str, Any] | None = None) -> dict[str, Any]:
    """At radius eps/255. gain: how much more an image resists than under the model's own gradients."""
    drawn = _drawn()
    correct = drawn["resists"] > 0
    falls = drawn["resists"] * gain <= eps
    names = dict(list(ATTACKS.items())[: 1 if gain > 1 else None])
    left, records = correct.copy(), []
    for number, (name, cost) in enumerate(names.items()):
        tried = left.copy()
        left = left & ~(falls & ((drawn["killer"] == number) | (gain > 1)))
        share = np.where(tried & ~left, 0.2, 1.0) * tried
        passes = [tuple(np.ceil(share * passes).astype(int).tolist()) for passes in cost]
        parameters = {"steps": cost[0]}
        seconds = float(0.4 + sum(passes[0]) / 1500)
        held, shown = tuple(left.tolist()), tuple(tried.tolist())
        records.append(AttackRecord(name, parameters, held, shown, 0, seconds, 0, *passes))
    made = Evaluation(
        threat_of("linf", f"{eps}/255"), True, 0, tuple(correct.tolist()), tuple(records), 151.0, about or {}
    )
    return made.to_json()


def sample(threshold: float = 0.3, *, kind: str = "sequential", raised: tuple[str, ...] = ()) -> dict[str, Any]:
    """A report whose main robust criterion asks for `threshold` at 16/255 (64 % hold); met: passed. raised: checks."""
    drawn = _drawn()
    main, small = evaluation(16), evaluation(8)
    held = flags(main["per_image"]["robust"])
    sequence = ConfidenceSequence(POPULATION, 0.95).after(held)
    progress = [
        {
            "images": seen,
            "criterion": 0,
            "lower": float(sequence.lower[seen - 1]) / POPULATION,
            "upper": float(sequence.upper[seen - 1]) / POPULATION,
        }
        for seen in range(BLOCK, IMAGES + 1, BLOCK)
    ]
    criteria = [
        _criterion("robust_accuracy", threshold, held),
        _criterion("robust_accuracy", 0.6, flags(small["per_image"]["robust"]), eps="8/255"),
        _criterion("clean_accuracy", 0.85, flags(main["per_image"]["correct"])),
        *(
            _criterion("class_robust_accuracy", 0.1, held[drawn["labels"] == number], name=name)
            for number, name in enumerate(CLASSES[:2])
        ),
    ]
    for row in criteria[:1]:
        row |= {key: progress[-1][key] for key in ("lower", "upper")} if kind == "sequential" else {}
        row |= _outcome(row)
    checks = [
        {
            "check": name,
            "outcome": "raised" if name in raised else "not_run" if name == "seen_images" else "clear",
            "when": when,
            "why": when if name in raised else "the manifest names no training data" if name == "seen_images" else "",
            "do": do,
            "figures": {"images": 64, "p": 0.31},
        }
        for name, (when, do) in CHECKS.items()
    ]
    findings = [{key: row[key] for key in ("check", "why", "do")} for row in checks if row["outcome"] == "raised"]
    outcomes = {row["outcome"] for row in criteria}
    verdict, code = (
        ("failed", 1)
        if "missed" in outcomes
        else ("suspect", 4)
        if findings
        else ("inconclusive", 3)
        if "open" in outcomes
        else ("passed", 0)
    )
    before = np.roll(held, 3)
    index, flags_of = tuple(drawn["index"].tolist()), (tuple(before.tolist()), tuple(held.tolist()))
    pairs = Pairs(digest("baseline"), digest("earlier"), IMAGES, index, *flags_of)
    regression = {**_criterion("no_regression", 0.0, ~(before & ~held)), "criterion": "no_regression at 95 %"}
    criteria.append(regression | {"threshold": None, "lower": None, "upper": None, "outcome": "met"})
    surrogate = {"kind": "transfer", "surrogate": "surrogate-pgd", "surrogate_sha256": digest("surrogate")}
    return copy.deepcopy(
        {
            "format": "dfmcl.report/2",
            "created": "2026-03-04T05:06:07+00:00",
            "verdict": verdict,
            "exit_code": code,
            "reasons": ["cap_reached"] if verdict == "inconclusive" else [],
            "statistics": {
                "kind": kind,
                "population": POPULATION,
                "attacked": IMAGES,
                "cap": IMAGES,
                "order_sha256": digest("order"),
            },
            "criteria": criteria,
            "progress": progress if kind == "sequential" else [],
            "checks": checks,
            "findings": findings,
            "evaluation": main,
            "radii": [evaluation(4), small, evaluation(24)],
            "transfer": [evaluation(16, 1.4, surrogate)],
            "per_image": {"index": drawn["index"].tolist(), "label": drawn["labels"].tolist()},
            "baseline": pairs.to_json(),
            "files": {"probes.npz": digest("probes")},
            "policy": {
                "criteria": [row["criterion"] for row in criteria],
                "seed": 0,
                "threat": {"norm": "linf", "eps": "16/255"},
                "data": {"name": "digits", "path": "", "image_size": 0, "images": IMAGES},
                "attacks": {"suite": list(ATTACKS)},
                "sha256": digest("policy"),
            },
            "candidate": {
                "kind": "candidate",
                "name": "candidate",
                "model_sha256": digest("model"),
                "files": {"model.onnx": digest("model"), "labels.txt": digest("labels")},
                "input": {"dtype": "uint8", "layout": "NHWC", "shape": [16, 16, 3]},
            },
            "run": {"checkpoint_sha256": digest("checkpoint")},
            "data": {
                "name": "digits",
                "path": "",
                "image_size": 0,
                "sha256": digest("data"),
                "part": "test",
                "images": POPULATION,
                "classes": list(CLASSES),
            },
            "code": {"revision": "8be72d8fbe0e8a6a4c1be9e4ad2b0e2d3c6fbb54"},
            "versions": {"python": "3.11.7", "dfmcl": "0.1.0", "torch": "2.8.0", "onnxruntime": "1.20.0"},
            "hardware": {"machine": "x86_64", "cpu": "a CPU", "gpu": None, "threads": 2},
            "seconds": 151.3,
            "processes": 1,
        }
    )


def probes(report: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Arrays that agree with a sample's per-image record: bytes in the ball, logits whose greatest is the answer."""
    drawn, bits = _drawn(), report["evaluation"]["per_image"]
    labels, images = drawn["labels"], drawn["images"]
    stream = np.random.default_rng(7)
    wrong = (labels + stream.integers(1, 4, IMAGES)) % len(CLASSES)
    step = np.sign(stream.standard_normal(images.shape)).astype(np.int16) * 16
    answers = {name: np.where(flags(bits[key]), labels, wrong) for name, key in BITS.items()}
    return {
        "images": images,
        "change": (np.clip(images + step, 0, 255) - images).astype(np.uint8),
        "labels": labels,
        **{name: 8 * np.eye(len(CLASSES), dtype=np.float32)[answer] for name, answer in answers.items()},
    }


BITS = {"clean_logits": "correct", "adversarial_logits": "robust"}


def _criterion(
    metric: str, threshold: float, held: NDArray[np.bool_], eps: str | None = None, name: str | None = None
) -> dict[str, Any]:
    k, n = int(held.sum()), len(held)
    radius, about = f"({eps})" if eps else "", f", class {name}" if name else ""
    row = {
        "criterion": f"{metric}{radius} >= {threshold:g} at 95 %{about}",
        "metric": metric,
        "eps": eps,
        "class": name,
        "threshold": threshold,
        "confidence": 0.95,
        "outcome": "open",
        "decided_after": None,
        "k": k,
        "n": n,
        "value": k / n,
        "lower": lower_bound(k, n, 0.95),
        "upper": upper_bound(k, n, 0.99),
    }
    return row | _outcome(row)


def _outcome(row: dict[str, Any]) -> dict[str, Any]:
    if row["lower"] >= row["threshold"]:
        return {"outcome": "met", "decided_after": row["n"]}
    missed = row["upper"] < row["threshold"]
    return {"outcome": "missed", "decided_after": row["n"]} if missed else {"outcome": "open", "decided_after": None}
