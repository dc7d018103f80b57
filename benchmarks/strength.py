"""The four of AutoAttack in the suite `standard` beside torchattacks' protocol, image by image: `make bench-strength`.

Both attack in AutoAttack's order, each attack only what the ones before it left, at the same budgets: steps of a run,
nine targets, queries. Whether an image fell is decided by the network in float32, and only inside the ball. Shares are
the images that hold after an attack and all before it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchattacks
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn

from benchmarks.attacks import Counted
from benchmarks.result import write_result
from dfmcl.common.errors import BadInput
from dfmcl.gating.subjects.candidate import candidate_subject
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.suites import AUTOATTACK
from dfmcl.robustness.data import Bytes, Labels
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.models import frozen, to_float
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.statistics import PairedCounts
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.registry import parse_ball

SHIPPED = Path("model_repository/resnet18-cifar10")
NETWORKS = (SHIPPED / "1", *(SHIPPED / "surrogates" / f"surrogate-{name}" for name in ("pgd", "pgd-8", "trades")))
BATCH = 100
NORMS = {"linf": "Linf", "l2": "L2"}
Flags = NDArray[np.bool_]

# Attack to its budget and its twin. torchattacks' Square does not count its first query.
TWINS: dict[str, Callable[..., Any]] = {
    "apgd-ce": lambda model, steps, queries, **told: torchattacks.APGD(model, steps=steps, **told),
    "apgd-t": lambda model, steps, queries, **told: torchattacks.APGDT(model, steps=steps, **told),
    "fab-t": lambda model, steps, queries, **told: torchattacks.FAB(model, steps=steps, multi_targeted=True, **told),
    "square": lambda model, steps, queries, **told: torchattacks.Square(model, n_queries=queries - 1, **told),
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=100, help="of APGD and FAB; 100 is AutoAttack's")
    parser.add_argument("--queries", type=int, default=5000, help="of Square; 5,000 is AutoAttack's")
    arguments = parser.parse_args()
    images, labels = images_of(arguments)
    rows: list[dict[str, Any]] = []
    for folder in arguments.networks:
        network = opened(folder)
        for threat in map(parse_ball, arguments.threat):
            budget = {"steps": arguments.steps, "queries": arguments.queries}
            rows += compared(folder.name, network, images, labels, threat, budget, arguments.seed)
    last = [row for row in rows if row["attack"] == AUTOATTACK[-1]]
    ratios = {
        "points_above_autoattack_mean": float(np.mean([row["ours"] - row["torchattacks"] for row in last])),
        "points_above_autoattack_worst": float(max(row["ours"] - row["torchattacks"] for row in last)),
        "forward_passes_vs_autoattack": sum(row["forward"] for row in rows)
        / sum(row["forward_theirs"] for row in rows),
        "seconds_vs_autoattack": sum(row["seconds"] for row in rows) / sum(row["seconds_theirs"] for row in rows),
    }
    note = (
        f"{arguments.steps} steps, nine targets, {arguments.queries} queries, one run each; ours, torchattacks: % of"
        " the images that hold after this attack and those above it; only_ours_holds: images that fell to theirs only;"
        " p: McNemar's exact test on these two counts, two-sided; forward: images that went through the network"
    )
    conditions = {"n": f"{len(images)} images of {arguments.probes}", "seed": arguments.seed, "note": note}
    write_result("strength", "The standard suite beside AutoAttack", rows, ratios, conditions)


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark of attacks: networks, images and labels, threats, a seed."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("networks", nargs="*", type=Path, default=NETWORKS, help="runs or candidates")
    parser.add_argument("--probes", type=Path, default=SHIPPED / "1/probes.npz", help="where images and labels lie")
    parser.add_argument("--threat", nargs="+", default=["linf:8/255", "l2:0.5"], help="such as linf:4/255")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def images_of(arguments: argparse.Namespace) -> tuple[Bytes, Labels]:
    """The first images `(N, H, W, C)` and labels `(N,)` of the probes."""
    with np.load(arguments.probes) as probes:
        return probes["images"][: arguments.images], probes["labels"][: arguments.images]


def opened(folder: Path) -> nn.Module:
    """The network of a run, or of a candidate as it is differentiated by the gate."""
    if not (folder / "model.onnx").exists():
        return load_run(folder).model
    subject = candidate_subject(folder)
    if subject.model is None:
        raise BadInput(f"{folder}: has no gradients ({subject.no_gradients}); take another network")
    return subject.model


def compared(
    name: str, network: nn.Module, images: Bytes, labels: Labels, threat: Ball, budget: dict[str, int], seed: int
) -> list[dict[str, Any]]:
    """A row for each attack of the suite; both orders of attacks begin with the images that the network gets right."""
    kinds, numbers = AUTOATTACK, {"square": budget["queries"]}
    suite = [Attack.parse(f"{kind}-{numbers.get(kind, budget['steps'])}") for kind in kinds]
    title = f"{name}, {threat}, ours"
    found = evaluate(
        network, images, labels, threat, suite, cascade=True, seed=seed, batch_size=BATCH,
        track=lambda items, label, total=None: iter(track(items, f"{title} {label}", total)),
    ).evaluation  # fmt: skip
    x, y = to_float(torch.from_numpy(images)).contiguous(), torch.from_numpy(labels)
    held: Flags = np.array(found.correct)
    rows = []
    with frozen(network):
        for kind, record in zip(kinds, found.attacks, strict=True):
            counted, begun = Counted(network), time.perf_counter()
            twin = TWINS[kind](counted, **budget, norm=NORMS[threat.norm], eps=threat.eps, seed=seed)
            held = left(network, twin, x, y, held, threat, f"{name}, {threat}, torchattacks {kind}")
            pair = PairedCounts.of(np.array(record.held), held)
            rows.append(
                {
                    "network": name,
                    "threat": str(threat),
                    "attack": kind,
                    "ours": 100 * record.accuracy.value,
                    "torchattacks": 100 * float(held.mean()),
                    "only_ours_holds": pair.only_first,
                    "only_theirs_holds": pair.only_second,
                    "p": pair.p,
                    "forward": sum(record.forward),
                    "forward_theirs": counted.images,
                    "seconds": record.seconds,
                    "seconds_theirs": time.perf_counter() - begun,
                }
            )
    return rows


def left(network: nn.Module, twin: Any, x: Tensor, y: Tensor, held: Flags, threat: Ball, title: str) -> Flags:
    """Which of the images that `held` `(N,)` still do after the twin: `(N,)`."""
    after = held.copy()
    where = np.flatnonzero(held)
    for index in track(np.array_split(where, -(-len(where) // BATCH)) if len(where) else [], title):
        x_adv = twin(x[index], y[index])
        with torch.no_grad():
            fooled = network(x_adv).argmax(dim=1) != y[index]
        after[index] = ~(fooled & threat.contains(x_adv, x[index])).numpy()
    return after


if __name__ == "__main__":
    main()
