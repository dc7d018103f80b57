"""A watch as its metrics and its page see it: who it is, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dfmcl.monitoring.budget import Budget
from dfmcl.monitoring.journal import Journal
from dfmcl.monitoring.releases import Release


@dataclass(frozen=True)
class AttackInfo:
    """An attack's definition. steps: or queries an image; surrogate: names of the runs, "" where none is asked.

    params_sha256: of all parameters that decide its result. threat: kind and label of its own, () for the watch's ball.
    """

    name: str
    steps: int
    surrogate: str
    params_sha256: str
    threat: tuple[str, str] | tuple[()] = ()


@dataclass(frozen=True)
class Identity:
    """What does not change while a watch runs. version, revision: of this program; epsilon such as `8/255`.

    interval_seconds: planned between rounds, by path; labels: names of the classes, by index;
    gated: whether it was told where the gate's evidence is; runbooks: URL of the folder of docs/runbooks, "" for none.
    """

    version: str
    revision: str
    model: str
    norm: str
    epsilon: str
    attacks: tuple[AttackInfo, ...]
    surrogates_sha256: str
    interval_seconds: Mapping[str, float]
    labels: tuple[str, ...] = ()
    gated: bool = True
    runbooks: str = ""

    def ball(self, attack: AttackInfo) -> dict[str, str]:
        """The labels of an attack's threat: of the watch's ball, or kind and label of another."""
        norm, epsilon = attack.threat or (self.norm, self.epsilon)
        return {"norm": norm, "epsilon": epsilon}


@dataclass(frozen=True)
class Snapshot:
    """What a sidecar knows at one moment. releases, losses, bars: by version; mitigations: by (action, outcome).

    stale: no round through Triton was measured for three intervals.
    """

    journal: Journal
    releases: Mapping[str, Release]
    losses: Mapping[str, frozenset[str]]
    budget: Budget
    bars: Mapping[str, Mapping[tuple[str, str], float]] = field(default_factory=dict)
    stale: bool = False
    paused: bool = False
    low_priority: bool = False
    prepared: int = 0
    record_failures: int = 0
    mitigations: Mapping[tuple[str, str], int] | None = None
