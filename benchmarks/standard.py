"""FAB-T and Square on images of the shipped model that APGD-CE and APGD-T left: `make bench-standard DATA=cifar10.npz`.

The table of all 10,000 test images is the first half of AutoAttack's protocol; this is the second, at its whole length,
on images that chance draws of those that the table has left. They are attacked as the gate attacks: on bytes, with
gradients in float32 from the ONNX file, which decides; by `cr` before, so that an image which holds in the table only
counts as lost. From a drawn part that fell an exact bound says how many of all would. It stops after --minutes, and
goes on from its record when called again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from scipy.stats import hypergeom

from benchmarks.result import RESULTS, write_result
from dfmcl.common.errors import BadInput
from dfmcl.gating.subject import Subject
from dfmcl.gating.subjects.registry import open_subject
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.suites import AUTOATTACK, RELAXED
from dfmcl.robustness.data import Bytes, Dataset, load_dataset
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.records import Evaluation, joined

Rows = NDArray[np.int64]

SHIPPED = Path(__file__).parents[1] / "model_repository" / "resnet18-cifar10" / "1"
TABLE = RESULTS / "resnet18_fast_10000.json"
NAME = "standard"
ATTACKS = (RELAXED, *AUTOATTACK[2:])
CHUNK = 16
SEED = 0
RISK = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="cifar10.npz")
    parser.add_argument("--minutes", type=float, default=30.0, help="begin no further chunk after that")
    told = parser.parse_args()
    end = time.perf_counter() + 60 * told.minutes
    table, subject, data = table_of(TABLE), open_subject(str(SHIPPED)), load_dataset("cifar10", str(told.data))
    order = drawn(table)
    about = {"model": subject.digest, "data": data.sha256, "attacks": ", ".join(ATTACKS)}
    found = earlier(RESULTS / f"{NAME}.json", about, order)
    while found is None or (len(found.correct) < len(order) and time.perf_counter() < end):
        done = len(found.correct) if found else 0
        part = attacked(subject, data, order[done : done + CHUNK], table, done)
        found = joined([found, part]) if found else part
        save(found, order, table, about)
    print(f"{len(found.correct)} of {len(order)} images are done")


def table_of(path: Path) -> Evaluation:
    """What holds of all test images under the first two attacks, in the order of seed 0."""
    return Evaluation.from_json(json.loads(path.read_text())["evaluations"][0])


def drawn(table: Evaluation) -> Rows:
    """The test images that the table has left, in an order that chance made: the first n are a sample of all."""
    held = np.array(table.robust_images)
    left = np.random.default_rng(table.seed).permutation(len(held))[held]
    return np.random.default_rng([SEED, len(left)]).permutation(np.sort(left))


def may_fall(images: int, drawn: int, fell: int) -> int:
    """The most of `images` that may fall where `fell` of `drawn` among them did: exact, at 1 - RISK.

    If more fell, so few of those drawn would be seen to with a probability of RISK at most.
    """
    falls = np.arange(fell, images - drawn + fell + 1)
    so_few = hypergeom.pmf(np.arange(fell + 1)[:, None], images, falls, drawn).sum(axis=0)
    return int(falls[so_few > RISK].max())


def earlier(path: Path, about: dict[str, str], order: Rows) -> Evaluation | None:
    """What a record holds of the same model, images and attacks; None where it is of others or there is none."""
    found = json.loads(path.read_text())["conditions"] if path.exists() else {}
    if found.get("about") != about:
        return None
    if found["rows"] != order[: len(found["rows"])].tolist():
        raise BadInput(f"{path}: its images come in another order; remove it to begin again")
    return Evaluation.from_json(found["evaluation"])


def attacked(subject: Subject, data: Dataset, rows: Rows, table: Evaluation, number: int) -> Evaluation:
    """One chunk under the attacks, each on what those before it left."""
    images: Bytes = data.x_test[rows]
    return evaluate(
        subject.model,
        images,
        data.y_test[rows],
        table.threat,
        [Attack.parse(kind) for kind in ATTACKS],
        decide=subject.decide,
        grid=True,
        cascade=True,
        seed=SEED + number,
        precision="float32",
        about={"kind": "white-box", "images": "of the test part, by the numbers of conditions.rows"},
        track=lambda items, label, total=None: iter(track(items, f"from image {number}: {label}", total)),
    ).evaluation


def save(evaluation: Evaluation, order: Rows, table: Evaluation, about: dict[str, str]) -> None:
    """Both files: what fell of the draw, and what that says of all."""
    held = [evaluation.correct, *(record.held for record in evaluation.attacks)]
    rows = [
        {
            "attack": name,
            "attacked": len(flags),
            "fallen_so_far": len(flags) - sum(flags),
            "seconds_an_image": seconds / len(flags),
            "forward": spent / len(flags),
        }
        for name, flags, seconds, spent in zip(
            ("none", *(record.name for record in evaluation.attacks)),
            held,
            (0.0, *(record.seconds for record in evaluation.attacks)),
            (0, *(sum(record.forward) for record in evaluation.attacks)),
            strict=True,
        )
    ]
    count, fell = len(evaluation.correct), len(evaluation.correct) - evaluation.robust.k
    images, left = len(table.correct), len(order)
    ratios = {
        "apgd_ce_and_apgd_t": 100 * left / images,
        "all_four_at_most": 100 * (left - fell) / images,
        "all_four_at_least": 100 * (left - may_fall(left, count, fell)) / images,
    }
    conditions = {
        "n": f"{count} of the {left} images that the table has left of {images}",
        "seed": SEED,
        "note": "robust accuracy of all test images, in %; under all four attacks at most: if of those that were not"
        f" drawn none falls; at least: if as many fall as the draw allows, at {100 * (1 - RISK):g} %, by one look",
        "about": about,
        "rows": order[:count].tolist(),
        "evaluation": evaluation.to_json(),
    }
    write_result(NAME, "The shipped model under FAB-T and Square", rows, ratios, conditions)


if __name__ == "__main__":
    main()
