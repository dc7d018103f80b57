"""The suite `fast` beside the two attacks that it stands for, APGD-CE and APGD-T at full length: `make bench-evidence`.

Image by image, on the shipped model and its surrogates: what holds under each, and the passes and seconds that each
takes. Both decide in float32 on bytes. Passes are those spent on all images, those that were wrong already among them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.progress import track
from torch import nn

from benchmarks.result import write_result
from benchmarks.strength import images_of, opened, parser_of
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.suites import SUITES
from dfmcl.robustness.data import Bytes, Labels
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.statistics import PairedCounts
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.registry import parse_ball

BATCH = 100
# Subspaces are met by both, and decide nothing on these networks.
CHEAP = SUITES["fast"][:-1]
DEAR = ("apgd-ce", "apgd-t")


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    images, labels = images_of(arguments)
    rows = [
        compared(folder.name, opened(folder), images, labels, parse_ball(threat), arguments.seed)
        for folder in arguments.networks
        for threat in arguments.threat
    ]
    ratios = {
        "fast_backward_passes_vs_apgd_ce_and_apgd_t": _ratio(rows, "backward"),
        "fast_forward_passes_vs_apgd_ce_and_apgd_t": _ratio(rows, "forward"),
        "fast_seconds_vs_apgd_ce_and_apgd_t": _ratio(rows, "seconds"),
        "points_above_apgd_ce_and_apgd_t_worst": max(row["fast"] - row["apgd-ce, apgd-t"] for row in rows),
    }
    note = (
        f"{', '.join(CHEAP)} beside {', '.join(DEAR)} (100 steps, nine targets); fast and the other: % of the images"
        " that hold; only_fast_holds: images that fell to the other only; forward, backward: passes an image"
    )
    conditions = {"n": f"{len(images)} images of {arguments.probes}", "seed": arguments.seed, "note": note}
    write_result("evidence", "Fast beside APGD-CE and APGD-T", rows, ratios, conditions)


def compared(name: str, network: nn.Module, images: Bytes, labels: Labels, threat: Ball, seed: int) -> dict[str, Any]:
    """One row: a network at one radius."""
    found: dict[str, Evaluation] = {}
    for suite in (CHEAP, DEAR):
        title = f"{name}, {threat}, {suite[0]}:"
        found[suite[0]] = evaluate(
            network, images, labels, threat, [Attack.parse(one) for one in suite], grid=True, cascade=True, seed=seed,
            batch_size=BATCH,
            track=lambda items, label, total=None, title=title: iter(track(items, f"{title} {label}", total)),
        ).evaluation  # fmt: skip
    cheap, dear = found[CHEAP[0]], found[DEAR[0]]
    pair = PairedCounts.of(np.array(cheap.robust_images), np.array(dear.robust_images))
    return {
        "network": name,
        "threat": str(threat),
        "fast": 100 * cheap.robust.value,
        "apgd-ce, apgd-t": 100 * dear.robust.value,
        "only_fast_holds": pair.only_first,
        "only_the_other_holds": pair.only_second,
        **{
            f"{key}{of}": sum(sum(getattr(record, key)) for record in one.attacks) / len(images)
            for key in ("forward", "backward")
            for of, one in (("", cheap), ("_theirs", dear))
        },
        "seconds": cheap.seconds,
        "seconds_theirs": dear.seconds,
    }


def _ratio(rows: list[dict[str, Any]], key: str) -> float:
    return float(sum(row[key] for row in rows) / sum(row[f"{key}_theirs"] for row in rows))


if __name__ == "__main__":
    main()
