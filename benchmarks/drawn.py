"""How often a claim about the whole suite from a drawn part of the images errs, and its cost: `make bench-drawn`.

Simulated gates: a known share of a data set holds under the cheap suite, a known share of these images is lost to the
dear one; images come in random order, each drawn with one chance, and the gate stops as a sequential gate does. A data
set that just misses the threshold must pass in at most alpha of the gates. Which images are lost, those nearest to the
border or any others, makes no difference, because the draw does not look at them.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks.result import write_result
from dfmcl.gating.criterion import Criterion
from dfmcl.gating.policy import DRAWN
from dfmcl.gating.verdict import Claim, Standing
from dfmcl.robustness.drawn import Fates

LOST = (0.0, 0.01, 0.05, 0.2)
BLOCK = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gates", type=int, default=2000)
    parser.add_argument("--images", type=int, default=300, help="of the data set, which may all be attacked")
    parser.add_argument("--few", type=int, default=200, help="gates a row of data sets that do reach the threshold")
    parser.add_argument("--threshold", type=float, default=0.45)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    criterion = Criterion("robust_accuracy", arguments.threshold, 0.95)
    just_misses = int(np.ceil(arguments.threshold * arguments.images)) - 1
    rows = [
        simulated(
            criterion,
            arguments.images,
            just_misses + above,
            lost,
            arguments.few if above else arguments.gates,
            arguments.seed,
        )
        for above in (0, arguments.images // 20, arguments.images // 10)
        for lost in LOST
    ]
    at_threshold = [row["passed"] for row in rows if row["holds"] < arguments.threshold]
    note = (
        f"each image is drawn with a chance of {DRAWN}; holds: the true share under both suites; lost: of the images"
        " that hold under the cheap suite; passed, failed: of the gates; images, tried: attacked, and by the dear"
        " suite, median"
    )
    conditions = {
        "n": f"{arguments.gates} gates a row at the threshold, {arguments.few} above; {arguments.images} images",
        "seed": arguments.seed,
        "note": note,
    }
    ratios = {"false_passes_vs_alpha_worst": max(at_threshold) / (1 - criterion.confidence)}
    write_result("drawn", "A drawn part for the whole suite", rows, ratios, conditions)


def simulated(criterion: Criterion, images: int, holding: int, lost: float, gates: int, seed: int) -> dict[str, Any]:
    """One row: gates on a data set with `holding` images that hold under both suites."""
    cheap = min(round(holding / (1 - lost)), images)
    stream = np.random.default_rng([seed, holding, round(1000 * lost)])
    label = f"{holding} of {images} hold, {100 * lost:g} % lost"
    found = [gate(criterion, images, holding, cheap, stream) for _ in track(range(gates), label)]
    outcomes = [outcome for outcome, _, _ in found]
    return {
        "holds": holding / images,
        "lost": lost,
        "passed": outcomes.count("met") / gates,
        "failed": outcomes.count("missed") / gates,
        "images": float(np.median([seen for _, seen, _ in found])),
        "tried": float(np.median([tried for _, _, tried in found])),
    }


def gate(
    criterion: Criterion, images: int, holding: int, cheap: int, stream: np.random.Generator
) -> tuple[str, int, int]:
    """The outcome, the images attacked, and the ones that met the dear suite."""
    ranks, drawn = stream.permutation(images), stream.random(images) < DRAWN
    held = ranks < cheap
    fates = Fates(held, drawn, held & drawn & (ranks >= holding))
    standing = Standing.begin(Claim(criterion, images, drawn=True), 1)
    for begin in range(0, images, BLOCK):
        standing = standing.after(fates[slice(begin, begin + BLOCK)])
        if standing.judgement.outcome != "open":
            break
    seen = len(standing.seen)
    return standing.judgement.outcome, seen, int((held & drawn)[:seen].sum())


if __name__ == "__main__":
    main()
