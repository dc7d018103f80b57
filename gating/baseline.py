"""No regression: the same images, a model before and a model after, and which images the new one newly loses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gating.attestation import REPORT_FORMAT
from gating.policy import Policy
from robustness.errors import BadInput
from robustness.statistics import PairedCounts


@dataclass(frozen=True)
class Baseline:
    """What an earlier report says of each image, by its position in the data set."""

    report_sha256: str
    model_sha256: str
    index: tuple[int, ...]
    held: tuple[bool, ...]

    @staticmethod
    def read(path: Path, policy: Policy, data_sha256: str, population: int) -> Baseline:
        """From a report.json; BadInput where it is none, or its images were met by another threat or other attacks.

        population: how many images the data set has, among which each of the report's must be, and be once.
        """
        try:
            raw = path.read_bytes()
            report = json.loads(raw)
            if report["format"] != REPORT_FORMAT:
                raise ValueError(f"format {report['format']!r}, expected {REPORT_FORMAT!r}")
            threat = (report["policy"]["threat"]["norm"], report["policy"]["threat"]["eps"])
            suite, data = report["policy"]["attacks"]["suite"], report["data"]["sha256"]
            bits = report["evaluation"]["per_image"]["robust"]
            found = Baseline(
                report_sha256=hashlib.sha256(raw).hexdigest(),
                model_sha256=str(report["candidate"]["model_sha256"]),
                index=tuple(int(i) for i in report["per_image"]["index"]),
                held=tuple(bit == "1" for bit in bits),
            )
            if len(found.index) != len(found.held):
                raise ValueError(f"{len(found.index)} images and {len(found.held)} outcomes")
            if data == data_sha256 and len(set(found.index) & set(range(population))) != len(found.index):
                raise ValueError("an image that is not in the data, or stands there twice")
            if not found.index:
                raise ValueError("no image at all")
        except OSError as error:
            raise BadInput(f"--baseline {path}: {error.strerror}; name the report.json of an earlier gate") from None
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"--baseline {path}: not a gate's report ({error}); gate that model again") from None
        for what, ours, theirs in (
            ("threat", (policy.threat.norm, policy.threat.eps), threat),
            ("attacks", policy.attacks.suite, suite),
            ("data", data_sha256, data),
        ):
            if ours != theirs:
                raise BadInput(f"--baseline {path}: was made with other {what}; gate that model by this policy first")
        return found


def compare(baseline: Baseline, held: Mapping[int, bool]) -> dict[str, Any]:
    """The report's `baseline` entry: paired counts on the baseline's images that `held` knows, and one-sided exact p.

    of: how many images the baseline has; held: how many of those compared it held, which is all that can be lost.
    p: how likely chance alone breaks at least so many of the images on which the two differ. McNemar 1947.
    """
    pairs = [
        (index, before, held[index])
        for index, before in zip(baseline.index, baseline.held, strict=True)
        if index in held
    ]
    before = np.array([pair[1] for pair in pairs], dtype=bool)
    after = np.array([pair[2] for pair in pairs], dtype=bool)
    counts = PairedCounts.of(before, after) if pairs else PairedCounts(0, 0)
    return {
        "report_sha256": baseline.report_sha256,
        "model_sha256": baseline.model_sha256,
        "images": len(pairs),
        "of": len(baseline.index),
        "held": int(before.sum()),
        "only_baseline": counts.only_first,
        "only_candidate": counts.only_second,
        "p": counts.p_more_lost,
        "newly_broken": [index for index, was, now in pairs if was and not now],
    }
