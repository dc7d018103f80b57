"""How many replicas a load needs, what probes take of them, and how long a promotion lasts. Arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dfmcl.common.errors import BadInput
from dfmcl.common.reader import RECORD_BYTES, parse_object, read_plain

MEASURED = Path("benchmarks/results/serving.json")  # what `make bench-serving` writes
CASE = "concurrent 16, Triton"
MIN_REPLICAS = 2  # of deploy/kubernetes/base/autoscaling.yaml: one may go
MAX_SURGE = 0.25  # of deploy/kubernetes/base/triton.yaml, as is maxUnavailable 0


@dataclass(frozen=True)
class Replica:
    """One replica and how it is run.

    images_per_second: its answers when it is saturated. utilisation: how much of that is planned for, as queues
    grow without bound towards 1. ready_seconds: from a new pod to a ready one. hourly: its price, in any currency.
    """

    images_per_second: float
    utilisation: float = 0.6
    ready_seconds: float = 30.0
    hourly: float | None = None


@dataclass(frozen=True)
class Load:
    """What comes in. probes: images a second that the sidecar adds, whatever the load: 113 a minute at most."""

    requests_per_second: float
    images_per_request: int = 1
    probes: float = 1.9

    @property
    def images_per_second(self) -> float:
        """Users' and probes'."""
        return self.requests_per_second * self.images_per_request + self.probes


@dataclass(frozen=True)
class Capacity:
    """What a load needs. utilisation, probe_share: of what all replicas can answer; after_loss: with one gone.

    per_million: the price of a million requests, where replicas have one.
    """

    load: Load
    replicas: int
    utilisation: float
    after_loss: float
    probe_share: float
    rollout_seconds: float
    per_million: float | None


def capacity(load: Load, replica: Replica) -> Capacity:
    """Replicas for the load at the planned utilisation, and one more, so that one may go and the plan still holds."""
    needed = math.ceil(load.images_per_second / (replica.images_per_second * replica.utilisation))
    replicas = max(MIN_REPLICAS, needed + 1)
    total = replicas * replica.images_per_second
    requests_an_hour = 3600 * load.requests_per_second
    return Capacity(
        load=load,
        replicas=replicas,
        utilisation=load.images_per_second / total,
        after_loss=load.images_per_second / (total - replica.images_per_second),
        probe_share=load.probes / total,
        rollout_seconds=rollout_waves(replicas) * replica.ready_seconds,
        per_million=None if replica.hourly is None else 1e6 * replicas * replica.hourly / requests_an_hour,
    )


def rollout_waves(replicas: int) -> int:
    """How often new pods must become ready until all are new, as many at a time as the surge allows."""
    return math.ceil(replicas / math.ceil(replicas * MAX_SURGE))


def measured_images_per_second(path: Path) -> float:
    """A replica's figure from the serving benchmark's record; BadInput where it has none."""
    try:
        rows = parse_object(read_plain(path, RECORD_BYTES, named=True))["rows"]
        return float(next(row["images_per_s"] for row in rows if row["case"] == CASE))
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        raise BadInput(
            f"{path}: has no measured row {CASE!r}; give --images-per-second-per-replica, or run the serving benchmark"
        ) from None


def table(rows: Iterable[Capacity]) -> str:
    """Markdown, one line a load."""
    rows = list(rows)
    priced = any(row.per_million is not None for row in rows)
    heads = ["requests/s", "replicas", "busy", "busy, one gone", "probes", "promotion"]
    heads += ["a million requests"] * priced
    lines = [heads, ["---:"] * len(heads)]
    for row in rows:
        lines.append(
            [
                f"{row.load.requests_per_second:,.10g}",
                f"{row.replicas:,}",
                f"{100 * row.utilisation:.1f} %",
                f"{100 * row.after_loss:.1f} %",
                f"{100 * row.probe_share:.3f} %",
                f"{row.rollout_seconds:,.0f} s",
                *([] if row.per_million is None else [f"{row.per_million:.4g}"]),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
