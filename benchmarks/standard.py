"""FAB-T and Square on the images of the shipped model that APGD-CE and APGD-T left: `make bench-standard`.

The gate's policy asks for the first half of AutoAttack's protocol; this is the second, at its whole length, on the
gate's own images and as the gate would: bytes, gradients in float32 from the ONNX file, which decides. As two cores
need 47 s an image, they are taken by turns: the one nearest to the border (by the margin at which APGD-T ended), where
an attack has most to gain, and the next of a draw among all, which speaks for the images that nobody attacked.
It stops after --minutes, and goes on from its record when called again.
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
from dfmcl.gating.signing.evidence import read_report
from dfmcl.gating.signing.probes_file import read_probes
from dfmcl.gating.signing.report import Report
from dfmcl.gating.subject import Subject
from dfmcl.gating.subjects.registry import open_subject
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.suites import AUTOATTACK
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.records import Evaluation, joined

Rows = NDArray[np.int64]

SHIPPED = Path(__file__).parents[1] / "model_repository" / "resnet18-cifar10" / "1"
NAME = "standard"
ATTACKS = AUTOATTACK[2:]
CHUNK = 16
SEED = 0
RISK = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="begin no further chunk after that")
    parser.add_argument("--candidate", type=Path, default=SHIPPED, help="with the gate's report and probes beside it")
    arguments = parser.parse_args()
    end = time.perf_counter() + 60 * arguments.minutes
    subject = open_subject(str(arguments.candidate))
    report, _ = read_report(arguments.candidate / "report.json")
    probes = read_probes(arguments.candidate / "probes.npz")
    margin = margins(probes["adversarial_logits"], probes["labels"])
    ranked, drawn = rank(margin), draw(margin)
    order = by_turns(ranked, drawn)
    if not len(order):
        parser.error(f"{arguments.candidate}: the gate's attacks left no image; there is nothing to attack")
    about = {"model": subject.digest, "probes": report.files["probes.npz"], "attacks": ", ".join(ATTACKS)}
    found = earlier(RESULTS / f"{NAME}.json", about, order)
    while found is None or (len(found.correct) < len(order) and time.perf_counter() < end):
        done = len(found.correct) if found else 0
        rows = order[done : done + CHUNK]
        part = attacked(subject, probes["images"][rows], probes["labels"][rows], report, done)
        found = joined([found, part]) if found else part
        save(found, order, ranked, drawn, margin, report, about)
    print(f"{len(found.correct)} of {len(order)} images are done")


def margins(logits: NDArray[np.float32], labels: Rows) -> NDArray[np.float32]:
    """How far the right logit is above the best other one, `(N,)`: not above 0 where the image fell."""
    others, rows = logits.copy(), np.arange(len(labels))
    others[rows, labels] = -np.inf
    found: NDArray[np.float32] = logits[rows, labels] - others.max(axis=1)
    return found


def rank(margin: NDArray[np.float32]) -> Rows:
    """The images of positive margin, the nearest to the border first."""
    order = np.argsort(margin, kind="stable")
    return order[margin[order] > 0]


def draw(margin: NDArray[np.float32]) -> Rows:
    """The same in an order that chance made: the first n are a sample of all, whatever n."""
    return np.random.default_rng(SEED).permutation(np.flatnonzero(margin > 0))


def by_turns(ranked: Rows, drawn: Rows) -> Rows:
    """Each image once, by turns the first that is left of either."""
    left = {0: ranked.tolist(), 1: drawn.tolist()}
    taken: list[int] = []
    for turn in range(len(ranked)):
        taken.append(left[turn % 2][0])
        for images in left.values():
            images.remove(taken[-1])
    return np.array(taken, dtype=np.int64)


def begun(order: Rows, done: Rows) -> int:
    """How many images at the beginning of an order are done."""
    return int(np.logical_and.accumulate(np.isin(order, done)).sum())


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


def attacked(subject: Subject, images: NDArray[np.uint8], labels: Rows, report: Report, number: int) -> Evaluation:
    """One chunk under both attacks, Square on what FAB-T left."""
    threat = report.evaluation.threat
    found = evaluate(
        subject.model,
        images,
        labels,
        threat.parsed,
        [Attack.parse(kind) for kind in ATTACKS],
        decide=subject.decide,
        grid=True,
        cascade=True,
        seed=SEED + number,
        precision="float32",
        about={"kind": "white-box", "images": "those of the gate, in the order of conditions.rows"},
        track=lambda items, label, total=None: iter(track(items, f"from image {number}: {label}", total)),
    ).evaluation
    if not all(found.correct):
        raise BadInput(
            f"{subject.name}: answers otherwise than the gate recorded; an image that it left is wrong as it is"
        )
    return found


def save(
    evaluation: Evaluation,
    order: Rows,
    ranked: Rows,
    drawn: Rows,
    margin: NDArray[np.float32],
    report: Report,
    about: dict[str, str],
) -> None:
    """Both files: what fell of the nearest and of the draw, and what that says of all."""
    done = order[: len(evaluation.correct)]
    nearest, sample = ranked[: begun(ranked, done)], drawn[: begun(drawn, done)]
    fell = ~np.array(evaluation.robust_images)
    rows = [
        {
            "images": name,
            "attacked": len(group),
            "largest_margin": float(margin[group].max(initial=0)),
            **{
                f"fell to {record.name}": int(
                    (np.array(record.tried) & ~np.array(record.held))[np.isin(done, group)].sum()
                )
                for record in evaluation.attacks
            },
        }
        for name, group in (("the nearest to the border", nearest), ("drawn of all", sample), ("together", done))
    ]
    before = report.evaluation.robust
    most = may_fall(len(order), len(sample), int(fell[np.isin(done, sample)].sum()))
    ratios = {
        "apgd_ce_and_apgd_t": 100 * before.k / before.n,
        "all_four_at_most": 100 * (before.k - int(fell.sum())) / before.n,
        "all_four_at_least": 100 * (before.k - max(most, int(fell.sum()))) / before.n,
    }
    conditions = {
        "n": f"{len(done)} of the {len(order)} images that the gate's attacks left of {before.n}",
        "seed": SEED,
        "note": "robust accuracy of the gate's images, in %; under all four attacks at most: if of those that were not"
        f" attacked none falls; at least: if as many fall as the draw allows, at {100 * (1 - RISK):g} %, by one look",
        "about": about,
        "rows": done.tolist(),
        "margins": [round(float(value), 4) for value in margin[done]],
        "evaluation": evaluation.to_json(),
    }
    write_result(NAME, "The shipped model under FAB-T and Square", rows, ratios, conditions)


if __name__ == "__main__":
    main()
