"""The release that answers: what the gate said of it and the answers it recorded, beside which live figures stand.

The version is the server's word; what lies in the repository under that number is looked up, and its replayed answers
prove whether it is what answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dfmcl.common.errors import BadInput
from dfmcl.gating.signing.attestation import BadEvidence, NotAttested, Trust, read_attestation, verify
from dfmcl.gating.signing.evaluation import ShareEntry
from dfmcl.gating.signing.evidence import PROBES, read_evidence
from dfmcl.gating.signing.probes_file import further, read_probes
from dfmcl.gating.signing.report import CriterionEntry
from dfmcl.release.stores.store import Etag, Store, UnusableStore
from dfmcl.robustness.data import Bytes
from dfmcl.robustness.statistics import Share
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.corruption import ALL
from dfmcl.robustness.threats.registry import parse_threat

REPORT = "report.json"
# missing: there is no evidence for this version; invalid: it is not believable; expired: it was, until a date that has
# passed. The others are the gate's verdicts.
STATES = ("passed", "failed", "inconclusive", "suspect", "missing", "invalid", "expired")


@dataclass(frozen=True)
class Attested:
    """The gate's report in numbers, at the policy's own radius. A threshold is None where it has no criterion there.

    checkpoint_sha256: of the run the release was exported from, "" where it came as a file; evaluated: unix seconds;
    clean: on the most images that the gate looked at. transfer: by (SHA-256 of the surrogates, attack), what held
    against images crafted on them; further: the same of its further threats, (kind, label, share), as in the report;
    further_thresholds: what its policy asks for under them, by (kind, label): of corruptions also of their mean.
    """

    state: str
    model_sha256: str
    policy_sha256: str
    checkpoint_sha256: str
    norm: str
    epsilon: str
    clean: Share
    robust: Share
    clean_threshold: float | None
    robust_threshold: float | None
    evaluated: float
    transfer: Mapping[tuple[str, str], Share] = field(default_factory=dict)
    further: tuple[tuple[str, str, Share], ...] = ()
    further_thresholds: Mapping[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True)
class Replay:
    """The gate's own images (N, H, W, C), clean and adversarial, and the logits (N, K) that decided there.

    kinds: of each image the kind of its further threat, "" for one of the policy's own or a clean one; () for none.
    """

    images: Bytes
    logits: npt.NDArray[np.float32]
    kinds: tuple[str, ...] = ()

    def part(self, number: int, count: int) -> Replay:
        """`count` of them, of round `number` (from 1): all of them in turn, and again from the start."""
        chosen = (np.arange(count) + (number - 1) * count) % len(self.images)
        kinds = tuple(self.kinds[place] for place in chosen) if self.kinds else ()
        return Replay(self.images[chosen], self.logits[chosen], kinds)


@dataclass(frozen=True)
class Release:
    """One version's evidence. verified: trusted keys say that exactly these bytes passed; expires: unix seconds.

    attested and replay are None where there is nothing to read them from; why: what is wrong, for a human.
    """

    state: str = "missing"
    attested: Attested | None = None
    replay: Replay | None = None
    verified: bool = False
    expires: float | None = None
    why: str = ""

    def at(self, now: float) -> Release:
        """The release at a later time (unix seconds): attestations expire."""
        if self.expires is None or now < self.expires or self.state != "passed":
            return self
        return replace(self, state="expired", verified=False, why=f"expired on {_date(self.expires)}")


Stamp = frozenset[tuple[str, Etag]]
Find = Callable[[str], Release]
"""The release behind a version number, as the server gives it."""


def always(evidence: Path) -> Find:
    """One evidence directory, whatever version answers; nobody has verified it. BadInput where it is none."""
    attested = read_report(evidence)
    release = Release(attested.state, attested, read_replay(evidence / PROBES, attested))
    return lambda version: release


def follow(store: Store, model: str, trust: Callable[[], Trust] | None) -> Find:
    """What lies in a repository under the version that answers; read again when a file of it changes, or trust.

    Files that are only away contradict nothing: a version's never change, and storage comes back.
    """
    last: _Found | None = None

    def find(version: str) -> Release:
        nonlocal last
        folder, trusted = f"{model}/{version}", trust and trust()
        try:
            seen = store.now()
            stamp = _stamp(seen, folder)
            known = last is not None and (last.version, last.trust) == (version, trusted) and stamp <= last.stamp
            if last is None or not known:
                local = seen.local(folder)
                release = _read(local, trusted)
                release = replace(release, why=release.why.replace(str(local), store.where(folder)))
                last = _Found(version, stamp, trusted, release)
            return last.release
        except UnusableStore as error:
            return last.release if last is not None and last.version == version else Release(why=str(error))

    return find


@dataclass(frozen=True)
class _Found:
    """The content that was read last, and its source."""

    version: str
    stamp: Stamp
    trust: Trust | None
    release: Release


def nothing(version: str) -> Release:
    """For a watch without evidence."""
    return Release(why="this watch was given no evidence (release.repository)")


def _read(directory: Path, trust: Trust | None) -> Release:
    if not (directory / REPORT).is_file():
        return Release(why=f"{directory}: there is no {REPORT}")
    try:
        attested = read_report(directory)
        replay = read_replay(directory / PROBES, attested)
    except BadInput as error:
        return Release("invalid", why=str(error))
    release = Release(attested.state, attested, replay)
    if trust is None:
        return release
    try:
        attestation = read_attestation(directory, trust)
        # At the time it was made, so that what has expired is told apart from what was never true.
        verify(directory, directory, trust, attestation.created)
    except (NotAttested, BadEvidence) as error:
        return replace(release, state="invalid", why=str(error))
    expires = attestation.expires
    if trust.max_age is not None:
        expires = min(expires, attestation.created + trust.max_age)
    return replace(release, verified=True, expires=expires.timestamp())


def read_report(evidence: Path) -> Attested:
    """The report of an evidence directory (a promoted version holds one too); BadInput where it is none.

    All that follows from its own record is derived again, and its files must be the named ones.
    """
    try:
        report, _ = read_evidence(evidence)
    except (NotAttested, BadEvidence) as error:
        raise BadInput(str(error)) from None
    main, threat = report.evaluation, report.evaluation.threat.parsed
    cleans = [main.clean, *(one.clean for one in report.transfer)]
    return Attested(
        state=report.verdict,
        model_sha256=report.candidate.model_sha256,
        policy_sha256=report.policy.sha256,
        checkpoint_sha256=report.run.checkpoint_sha256 or "",
        norm=threat.kind,
        epsilon=threat.label,
        clean=_share(max(cleans, key=lambda share: share.n)),
        robust=_share(main.robust),
        clean_threshold=_strictest(report.criteria, "clean_accuracy", threat.label),
        robust_threshold=_strictest(report.criteria, "robust_accuracy", threat.label),
        evaluated=datetime.fromisoformat(report.created).timestamp(),
        transfer={
            (one.about.surrogate_sha256, attack.name): _share(attack.accuracy)
            for one in report.transfer
            if one.threat.parsed == threat
            for attack in one.attacks
        },
        further=tuple((one.threat.parsed.kind, one.threat.parsed.label, _share(one.robust)) for one in report.radii),
        further_thresholds=_further_thresholds(report.criteria),
    )


def read_replay(path: Path, attested: Attested | None = None) -> Replay | None:
    """The gate's adversarial images, of all its threats, then its clean ones, with their logits; None where there are
    none to replay.

    attested: of the same gate, which names the kinds of its further threats.
    BadInput for a file that is no such archive. Adversarial first: they lie at the border, where a difference shows.
    """
    if not path.exists():
        return None
    try:
        probes = read_probes(path)
    except BadEvidence as error:
        raise BadInput(str(error)) from None
    others = further(probes)
    images = np.concatenate([probes["adversarial"], *(changed for changed, _ in others), probes["images"]])
    logits = np.concatenate([probes["adversarial_logits"], *(found for _, found in others), probes["clean_logits"]])
    names = [kind for kind, _, _ in attested.further] if attested else []
    parts = [("", len(probes["adversarial"])), *zip(names, map(len, (found for _, found in others)), strict=False)]
    kinds = [kind for kind, count in parts for _ in range(count)]
    kinds += [""] * (len(images) - len(kinds))
    return Replay(images, logits.astype(np.float32), tuple(kinds)) if len(images) else None


def _stamp(store: Store, folder: str) -> Stamp:
    """The files of a folder that can be seen, and how each lies there."""
    try:
        return frozenset((entry.name, store.etag(f"{folder}/{entry.name}")) for entry in store.entries(folder))
    except OSError:
        return frozenset()


def _share(entry: ShareEntry) -> Share:
    return Share(entry.k, entry.n)


def _strictest(criteria: Sequence[CriterionEntry], metric: str, radius: str) -> float | None:
    """Of the criteria about all classes at the policy's own radius, which need not be named."""
    own = [row for row in criteria if row.metric == metric and row.eps in (None, radius) and not row.class_name]
    return max((row.threshold for row in own if row.threshold is not None), default=None)


def _further_thresholds(criteria: Sequence[CriterionEntry]) -> dict[tuple[str, str], float]:
    """Of the criteria about all classes under a threat that is no radius, the strictest of each threat.

    A mean over corruptions is what one that is drawn for each image leaves right, on average.
    """
    found: dict[tuple[str, str], float] = {}
    for row in criteria:
        mean = row.answers is not None
        if row.class_name or row.threshold is None or not (mean or (row.metric == "robust_accuracy" and row.eps)):
            continue
        threat = parse_threat(row.corruption or row.eps or ALL)
        if not isinstance(threat, Ball):
            key = threat.kind, threat.label
            found[key] = max(found.get(key, 0.0), row.threshold)
    return found


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
