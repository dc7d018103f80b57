"""Evidence of a gate that passed a model of the digits, and that model's answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dfmcl.common.files import sha256_of
from dfmcl.gating.signing.probes_file import as_npz
from dfmcl.gating.signing.report import RunEntry
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.records import Evaluation
from tests.signing import evaluated, policy_of, true_report

SHAPE, CLASSES = (16, 16, 3), 10
GATED = (
    "robust_accuracy >= 0.45 at 95 %",
    "robust_accuracy(38/255) >= 0.40 at 95 %",
    "robust_accuracy(8/255) >= 0.80 at 95 %",
    "clean_accuracy >= 0.9 at 95 %",
)


def answered(logits: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    """Probes as the gate leaves them, of 100 digits: 97 right as they came, 55 as the attacks left them."""
    data = load_dataset("digits")
    images, labels, change = data.x_test[:100], data.y_test[:100].copy(), np.zeros((100, *SHAPE), np.uint8)
    fell = np.flatnonzero(labels != 0)[:42]
    change[fell, 0, 0] = 1
    labels[[number for number in range(100) if number not in fell][:3]] += 1
    labels %= CLASSES
    arrays = {"images": images, "change": change, "labels": labels}
    return arrays | {"clean_logits": logits(images), "adversarial_logits": logits(images + change)}


def write_report(
    directory: Path,
    checkpoint_sha256: str = "0" * 64,
    *,
    logits: Callable[[np.ndarray], np.ndarray] | None = None,
    criteria: Sequence[str] = GATED,
    transfer: Sequence[Evaluation] = (),
    **changes: object,
) -> Path:
    """A whole evidence directory of a gate that passed. logits: those it recorded; changes: of top-level entries."""
    directory.mkdir(parents=True, exist_ok=True)
    probes = answered(oracle)
    right, held = (probes[name].argmax(axis=1) == probes["labels"] for name in ("clean_logits", "adversarial_logits"))
    small = np.arange(100) % 97 >= 5
    threats = {"8/255": held | small, "38/255": held}
    named = {eps: flags for eps, flags in threats.items() if eps == "38/255" or any(eps in text for text in criteria)}
    report = true_report(
        probes,
        {"model.onnx": "e" * 64},
        policy=policy_of(criteria),
        run=RunEntry(checkpoint_sha256=checkpoint_sha256),
        evaluations=[evaluated(right, flags, eps) for eps, flags in named.items()],
        transfer=transfer,
    )
    if logits is not None:
        probes |= {name: logits(probes["images"]) for name in ("clean_logits", "adversarial_logits")}
    (directory / "probes.npz").write_bytes(as_npz(probes))
    report = replace(report, files={"probes.npz": sha256_of(directory / "probes.npz")})
    (directory / "report.json").write_text(json.dumps(report.to_json() | changes))
    return directory


def write_probes(directory: Path, images: np.ndarray, logits: np.ndarray) -> Path:
    """Recorded images and answers, the adversarial ones being the clean ones."""
    same = np.zeros_like(images)
    arrays: dict[str, Any] = {"images": images, "change": same, "labels": np.zeros(len(images), np.int64)}
    arrays |= {"clean_logits": logits, "adversarial_logits": logits}
    np.savez(directory / "probes.npz", **arrays)
    return directory


def oracle(images: np.ndarray) -> np.ndarray:
    """The right digit for every test image, by looking it up; class 0 for images that were changed."""
    logits = np.zeros((len(images), CLASSES), np.float32)
    known = _known()
    for row, image in enumerate(images):
        logits[row, known.get(image.tobytes(), 0)] = 1
    return logits


def _known() -> dict[bytes, int]:
    if not _KNOWN:
        data = load_dataset("digits")
        _KNOWN.update({image.tobytes(): int(y) for image, y in zip(np.asarray(data.x_test), data.y_test, strict=True)})
    return _KNOWN


_KNOWN: dict[bytes, int] = {}
