"""What one network of a campaign is measured on: attacks at radii on the same images, batch by batch, and resumable."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfmcl.common.errors import BadInput
from dfmcl.common.files import dump_json, read_json, write_text
from dfmcl.common.progress import Track
from dfmcl.robustness.data import Bytes, Dataset, Labels
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.models import Classifier, exactly, frozen, to_float
from dfmcl.robustness.records import AttackRecord, Evaluation
from dfmcl.robustness.seeds import derived_seed
from dfmcl.robustness.statistics import Flags
from dfmcl.robustness.threats.ball import Ball
from dfmcl.training.plan import Campaign, PlannedAttack

SHUFFLE_SEED = 0  # of the test images, the same for every run, so that any two can be compared image by image
SAVE_SECONDS = 20.0  # what a kill costs a measurement at most, besides the batch that it hit


class Partial:
    """Batches that are measured already: lists by measurement, threat and attack, in a file that survives a kill."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity, self.saved = path, identity, time.monotonic()
        value = read_json(path) if path.exists() else {}
        # Of a training that was repeated elsewhere the checkpoint may differ, and with it every answer.
        self.batches: dict[str, list[dict[str, Any]]] = value["batches"] if value.get("identity") == identity else {}

    def add(self, key: str, entry: dict[str, Any]) -> None:
        self.batches.setdefault(key, []).append(entry)
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        write_text(self.path, dump_json({"identity": self.identity, "batches": self.batches}))
        self.saved = time.monotonic()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside: whatever ends the work, what is measured is saved."""
        try:
            yield
        finally:
            self.save()


def measure(
    name: str,
    model: Classifier,
    data: Dataset,
    campaign: Campaign,
    sources: Mapping[str, Classifier | str],
    partial: Partial,
    track: Track,
) -> tuple[tuple[Evaluation, ...], tuple[dict[str, str], ...]]:
    """All measurements of a network, one evaluation a measurement and threat; and what could not be measured, and why.

    sources: by measurement, the network to craft on, or why there is none. Batches that `partial` holds are not
    repeated; each has its own randomness, so that it does not matter which were done when.
    """
    x, y = chosen_images(data, campaign)
    correct = right(model, x, y, campaign.batch_size)
    evaluations, missing = [], []
    plan = [(key, entry, threat) for key, entry in campaign.measurements.items() for threat in entry.threats]
    work = [(key, entry, threat, attack) for key, entry, threat in plan for attack in entry.attacks]
    done: dict[str, AttackRecord] = {}
    for key, entry, threat, attack in track(work, f"measuring {name}", len(work)):
        source = sources.get(key, model)
        if isinstance(source, str):
            continue
        earlier = [done[address(key, threat, other)] for other in entry.attacks if address(key, threat, other) in done]
        left = correct[: entry.images or None]
        if entry.cascade:
            left = np.all([left, *(np.array(record.held) for record in earlier)], axis=0)
        done[address(key, threat, attack)] = attacked(
            model, source, x, y, left, threat, attack, address(key, threat, attack), campaign.batch_size, partial
        )
    for key, entry, threat in plan:
        source = sources.get(key, model)
        if isinstance(source, str):
            missing.append({"measurement": key, "threat": str(threat), "reason": source})
            continue
        records = tuple(done[address(key, threat, attack)] for attack in entry.attacks)
        seconds = sum(record.seconds for record in records)
        flags = tuple(correct[: entry.images or None].tolist())
        about = {"measurement": key, "black_box": entry.black_box, "source": entry.source, "cascade": entry.cascade}
        evaluations.append(Evaluation(threat, False, SHUFFLE_SEED, flags, records, seconds, about))
    return tuple(evaluations), tuple(missing)


def address(key: str, threat: Ball, attack: PlannedAttack) -> str:
    return f"{key}, {threat}, {attack.label}"


def attacked(
    model: Classifier,
    source: Classifier,
    x: Bytes,
    y: Labels,
    tried: Flags,
    threat: Ball,
    attack: PlannedAttack,
    key: str,
    batch_size: int,
    partial: Partial,
) -> AttackRecord:
    """One attack at one threat on the images that are to be tried, batch by batch."""
    for begin in range(0, len(tried), batch_size):
        where = begin + np.flatnonzero(tried[begin : begin + batch_size])
        held = np.zeros(min(batch_size, len(tried) - begin), dtype=bool)
        number = begin // batch_size
        if number < len(partial.batches.get(key, [])):
            continue
        outside, seconds = 0, 0.0
        if len(where):
            outcome = evaluate(
                model,
                x[where],
                y[where],
                threat,
                [attack.at(threat)],
                source=source,
                seed=derived_seed(SHUFFLE_SEED, key, number),
                batch_size=batch_size,
                precision="float32",  # as in the literature that a campaign is compared with
            )
            (record,) = outcome.evaluation.attacks
            held[where - begin] = record.held
            outside, seconds = record.outside, record.seconds
        bits = "".join("01"[flag] for flag in held.tolist())
        partial.add(key, {"held": bits, "outside": outside, "seconds": seconds})
    batches = partial.batches[key]
    return AttackRecord(
        name=attack.label,
        parameters=dict(attack.at(threat).parameters),
        held=tuple(bit == "1" for batch in batches for bit in batch["held"]),
        tried=tuple(tried.tolist()),
        outside=sum(batch["outside"] for batch in batches),
        seconds=sum(batch["seconds"] for batch in batches),
    )


def chosen_images(data: Dataset, campaign: Campaign) -> tuple[Bytes, Labels]:
    """The campaign's test images, the same for every run."""
    wanted = max([campaign.images, *(entry.images for entry in campaign.measurements.values())])
    if wanted > len(data.x_test):
        raise BadInput(f"images: {wanted} are asked for, the test part of {data.name} has {len(data.x_test)}")
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(data.x_test))[: campaign.images or None]
    return data.x_test[order], data.y_test[order]


def right(model: Classifier, x: Bytes, y: Labels, batch_size: int) -> Flags:
    """Per image whether the network is right, in float32: `(N,)` bool."""
    device, decide = next(model.parameters()).device, exactly(model)
    answers = []
    with frozen(model), torch.no_grad():
        for begin in range(0, len(x), batch_size):
            batch = to_float(torch.from_numpy(x[begin : begin + batch_size])).to(device)
            answers.append(decide(batch).argmax(dim=1).cpu().numpy())
    flags: Flags = np.concatenate(answers) == y
    return flags
