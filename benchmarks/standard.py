"""FAB-T and Square on the images of the shipped model that APGD-CE and APGD-T left: `make bench-standard`.

The gate's policy asks for the first half of AutoAttack's protocol; this is the second, at its whole length, on the
gate's own images and as the gate would: bytes, gradients in float32 from the ONNX file, which decides. As two cores
need half a minute an image, they are taken by turns: the one nearest to the border (by the margin at which APGD-T
ended), where an attack has most to gain, and one drawn from all others, which speaks for those that nobody attacked.
It stops after --minutes, and goes on from its record when called again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from benchmarks.result import RESULTS, write_result
from gating.subject import Subject, open_subject
from robustness.attacks import SUITES, Attack
from robustness.evaluate import evaluate
from robustness.records import Evaluation, joined
from robustness.statistics import upper_bound
from robustness.threat import Threat

SHIPPED = Path(__file__).parents[1] / "model_repository" / "resnet18-cifar10" / "1"
NAME = "standard"
ATTACKS = tuple(kind for kind in SUITES["standard"] if kind not in SUITES["fast"])
CHUNK = 16
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="begin no further chunk after that")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    subject = open_subject(str(SHIPPED))
    report = json.loads((SHIPPED / "report.json").read_text())
    probes = np.load(SHIPPED / "probes.npz")
    margin = margins(probes["adversarial_logits"], probes["labels"])
    order = by_turns(margin)
    parts = earlier(subject.digest)
    while (done := sum(len(part.correct) for part in parts)) < len(order):
        if parts and time.perf_counter() - begun > 60 * arguments.minutes:
            break
        rows = order[done : done + CHUNK]
        parts = [joined([*parts, attacked(subject, probes["images"][rows], probes["labels"][rows], report, done)])]
        save(parts[0], order, margin, report, subject.digest)


def margins(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """How far the right logit is above the best other one, `(N,)`: negative where the image fell."""
    others = logits.copy()
    rows = np.arange(len(labels))
    others[rows, labels] = -np.inf
    found: NDArray[np.float32] = logits[rows, labels] - others.max(axis=1)
    return found


def by_turns(margin: NDArray[np.float32]) -> NDArray[np.int64]:
    """Images of positive margin, each once: at even places the nearest that is left, at odd ones any that is left."""
    left = [int(row) for row in np.argsort(margin, kind="stable") if margin[row] > 0]
    stream = np.random.default_rng(SEED)
    taken = [left.pop(int(stream.integers(len(left))) if turn % 2 else 0) for turn in range(len(left))]
    return np.array(taken, dtype=np.int64)


def earlier(digest: str) -> list[Evaluation]:
    """What the record holds already of this model."""
    path = RESULTS / f"{NAME}.json"
    found = json.loads(path.read_text())["conditions"] if path.exists() else {}
    return [Evaluation.from_json(found["evaluation"])] if found.get("model_sha256") == digest else []


def attacked(
    subject: Subject, images: NDArray[np.uint8], labels: NDArray[np.int64], report: dict[str, Any], number: int
) -> Evaluation:
    """One chunk under both attacks, Square on what FAB-T left."""
    threat = report["evaluation"]["threat"]
    return evaluate(
        subject.model,
        images,
        labels,
        Threat.parse(threat["norm"], threat["label"]),
        [Attack.parse(kind) for kind in ATTACKS],
        decide=subject.decide,
        grid=True,
        cascade=True,
        seed=SEED + number,
        precision="float32",
        about={"kind": "white-box", "images": "those of the gate, in the order of conditions.rows"},
        track=lambda items, label, total=None: iter(track(items, f"from {number}: {label}", total)),
    ).evaluation


def save(
    evaluation: Evaluation,
    order: NDArray[np.int64],
    margin: NDArray[np.float32],
    report: dict[str, Any],
    digest: str,
) -> None:
    """Both files: what fell of the nearest and of those drawn, and what that says of all."""
    done = len(evaluation.correct)
    fell = ~np.array(evaluation.robust_images)
    nearest, drawn = np.arange(done) % 2 == 0, np.arange(done) % 2 == 1
    rows = [
        {
            "images": name,
            "attacked": int(group.sum()),
            "margin_from": float(margin[order[:done]][group].min()),
            "margin_to": float(margin[order[:done]][group].max()),
            **{
                f"fell_to_{record.name}": int((np.array(record.tried) & ~np.array(record.held) & group).sum())
                for record in evaluation.attacks
            },
        }
        for name, group in (("nearest to the border", nearest), ("drawn", drawn))
    ]
    before = report["evaluation"]["robust"]
    rest = len(order) - done
    found = suite(before["k"], before["n"], int(fell.sum()), rest, int((fell & drawn).sum()), int(drawn.sum()))
    conditions = {
        "n": f"{done} of the {len(order)} images that the gate's attacks left of {before['n']}",
        "seed": SEED,
        "note": "robust accuracy of the gate's images, in %; under all four attacks at most: if of those that were not"
        " attacked none fell; at least: if as many did as those drawn allow, at 95 %",
        "model_sha256": digest,
        "rows": order[:done].tolist(),
        "margins": [round(float(value), 4) for value in margin[order[:done]]],
        "evaluation": evaluation.to_json(),
    }
    write_result(NAME, "The shipped model under FAB-T and Square", rows, found, conditions)


def suite(held: int, images: int, fell: int, rest: int, fell_drawn: int, drawn: int) -> dict[str, float]:
    """Robust accuracy of `images` in %: of those `held`, `fell` fell and `rest` were not attacked.

    At least: of the rest falls what may fall, at 95 %, of those drawn, of which `fell_drawn` fell. That is too much
    rather than too little, as the nearest to the border were no longer among the rest.
    """
    share = upper_bound(fell_drawn, drawn, 0.95) if drawn else 1.0
    return {
        "apgd_ce_and_apgd_t": 100 * held / images,
        "all_four_at_most": 100 * (held - fell) / images,
        "all_four_at_least": 100 * (held - fell - share * rest) / images,
    }


if __name__ == "__main__":
    main()
