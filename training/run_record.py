"""What is left of one run of a campaign: a small JSON that says all its tables need, without the checkpoint."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from dfmcl.common.errors import BadInput
from dfmcl.common.files import dump_json, read_json, write_text
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.statistics import Flags
from dfmcl.robustness.threats.ball import Ball
from dfmcl.training.plan import WORST, PlannedRun

FORMAT = "dfmcl.campaign.record/1"
DERIVED = ("accuracy", "clean", "robust", "flipped")  # of an evaluation's JSON; the bits say it again


@dataclass(frozen=True)
class RunRecord:
    """A finished or failed run.

    training: result, history (the rows of metrics.csv), minutes of training steps, images_per_second (median epoch),
    model, checkpoint_sha256. not_measured: measurement, threat and reason of what could not be measured.
    about: command, time, code, versions, hardware.
    """

    name: str
    method: str
    family: str
    beta: str
    seed: int
    identity: str
    status: str  # "done" or "failed"
    config: Mapping[str, Any]
    about: Mapping[str, Any]
    message: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluations: tuple[Evaluation, ...] = ()
    not_measured: tuple[Mapping[str, str], ...] = ()

    @property
    def done(self) -> bool:
        return self.status == "done"

    def flags(self, what: str, threat: Ball, black_box: bool | None = None) -> Flags | None:
        """Per image whether it held, `(N,)`; None where that was not measured.

        what: `clean`, an attack's name, or `worst case` over the evaluations of this threat (black_box: of that kind
        only), on the images that all of them looked at.
        """
        if what == "clean":
            columns = [max((evaluation.correct for evaluation in self.evaluations), key=len, default=())]
        else:
            # By label: 0.08 and 20.4/255 are one radius, but not one float.
            same = [evaluation for evaluation in self.evaluations if str(evaluation.threat) == str(threat)]
            if black_box is not None:
                same = [evaluation for evaluation in same if evaluation.about["black_box"] == black_box]
            if what == WORST:
                columns = [evaluation.robust_images for evaluation in same]
            else:
                columns = [record.held for evaluation in same for record in evaluation.attacks if record.name == what]
                columns = columns[:1]
        if not columns or not columns[0]:
            return None
        shortest = min(len(column) for column in columns)
        flags: Flags = np.all([column[:shortest] for column in columns], axis=0)
        return flags

    def to_json(self) -> dict[str, Any]:
        value = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        evaluations = [_slim(evaluation.to_json()) for evaluation in self.evaluations]
        return {"format": FORMAT, **value, "evaluations": evaluations, "not_measured": list(self.not_measured)}

    @staticmethod
    def from_json(value: Mapping[str, Any], where: str) -> RunRecord:
        if value.get("format") != FORMAT:
            raise BadInput(f"{where}: format is {value.get('format')!r}; expected {FORMAT!r}")
        try:
            entries = {entry.name: value[entry.name] for entry in fields(RunRecord)}
            evaluations = tuple(Evaluation.from_json(_full(entry)) for entry in value["evaluations"])
            not_measured = tuple(value["not_measured"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{where}: malformed record ({error!r}); remove it to make it again") from None
        return RunRecord(**{**entries, "evaluations": evaluations, "not_measured": not_measured})


def read_record(path: Path) -> RunRecord:
    return RunRecord.from_json(read_json(path), str(path))


def write_record(path: Path, record: RunRecord) -> None:
    write_text(path, dump_json(record.to_json()))


def entry_of(run: PlannedRun) -> dict[str, Any]:
    """The fields of a record that say which run it is."""
    entry = asdict(run)
    del entry["measured"]
    return {**entry, "config": run.config.model_dump()}


def pack(bits: str) -> str:
    """A string of 0 and 1 as base64 of its packed bits: a sixth of the length."""
    return base64.b64encode(np.packbits(np.frombuffer(bits.encode(), np.uint8) == ord("1")).tobytes()).decode()


def unpack(packed: str, count: int) -> str:
    """The inverse of pack for `count` bits."""
    flags = np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8), count=count)
    return (flags + ord("0")).tobytes().decode()


def _per_image(value: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    return {**value, "per_image": {name: change(bits) for name, bits in value["per_image"].items()}}


def _slim(value: dict[str, Any]) -> dict[str, Any]:
    value = {key: entry for key, entry in _per_image(value, pack).items() if key not in DERIVED}
    attacks = [{k: v for k, v in _per_image(attack, pack).items() if k not in DERIVED} for attack in value["attacks"]]
    for attack in attacks:  # without a cascade every attack tries what is right; that need not be said each time
        if attack["per_image"]["tried"] == value["per_image"]["correct"]:
            del attack["per_image"]["tried"]
    return {**value, "attacks": attacks}


def _full(value: dict[str, Any]) -> dict[str, Any]:
    def wide(bits: str) -> str:
        return unpack(bits, value["images"])

    correct = value["per_image"]["correct"]
    attacks = [{**attack, "per_image": {"tried": correct, **attack["per_image"]}} for attack in value["attacks"]]
    return {**_per_image(value, wide), "attacks": [_per_image(attack, wide) for attack in attacks]}
