"""What a sidecar knows as Prometheus metrics: one collector that translates a snapshot at each scrape.

Long, because every metric has its full name and its help here, once.

Labels come from closed sets: names of the configuration, reasons, states, and the last two served versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dfmcl.common import metric_names
from dfmcl.monitoring.journal import RECENT, AttackTotals, Journal, PathTotals, VersionTotals
from dfmcl.monitoring.lost import LOSSES
from dfmcl.monitoring.metric_families import Labels, counter, gauge, histogram, info
from dfmcl.monitoring.mitigation import ACTIONS, OUTCOMES
from dfmcl.monitoring.releases import STATES, Attested
from dfmcl.monitoring.snapshot import AttackInfo, Identity, Snapshot
from dfmcl.robustness.statistics import Share

T = TypeVar("T")
BOUND = "Upper bound of robust accuracy: the attack does not know the weights."
ANYTIME = "wrong at most once in 100 months with all others together, however often one looks, 0 to 1."


class RoundsCollector(Collector):
    """Metrics of what `read` returns at that moment."""

    def __init__(self, identity: Identity, read: Callable[[], Snapshot]) -> None:
        self._identity, self._read = identity, read

    def collect(self) -> Iterator[Metric]:
        now = self._read()
        yield from _about(self._identity)
        yield from _gate(self._identity, now)
        yield from _paths(self._identity, now.journal)
        yield from _manners(self._identity, now)
        yield from _counted(self._identity, now.journal)
        yield from _replayed(self._identity, now.journal)
        yield from _live(self._identity, now)
        yield from _bars(self._identity, now)


def _about(identity: Identity) -> Iterator[Metric]:
    yield info("robustness_build_info", "This prober.", [{"version": identity.version, "revision": identity.revision}])
    definitions = [
        {
            "attack": attack.name,
            **identity.ball(attack),
            "surrogate": attack.surrogate,
            "steps": str(attack.steps),
            "params_sha256": attack.params_sha256,
        }
        for attack in identity.attacks
    ]
    yield info(
        "robustness_attack_info", "What stands behind the label attack; epsilon in units of [0, 1].", definitions
    )


def _gate(identity: Identity, now: Snapshot) -> Iterator[Metric]:
    """What the gate said of the versions that answered."""
    if not identity.gated:
        return
    found = [({"model": identity.model, "version": v}, release) for v, release in now.releases.items()]
    yield gauge(
        metric_names.GATE_STATE,
        "1 for the state of the evidence for this version: the gate's verdict, or why there is none that holds.",
        [({**labels, "state": name}, float(name == one.state)) for labels, one in found for name in STATES],
    )
    yield gauge(
        "robustness_gate_verified",
        "1 if trusted keys say that these bytes passed, and it has not expired.",
        [(labels, float(release.verified)) for labels, release in found],
    )
    yield gauge(
        "robustness_gate_expires_timestamp_seconds",
        "Until when the attestation holds, unix time.",
        [(labels, release.expires) for labels, release in found if release.expires is not None],
    )
    gated = [(labels, release.attested) for labels, release in found if release.attested is not None]
    yield info(
        "robustness_target_info",
        "What should answer under this version, as it was promoted.",
        [{**labels, "sha256": one.model_sha256, "policy_sha256": one.policy_sha256} for labels, one in gated],
    )
    yield gauge(
        metric_names.GATE_EVALUATED,
        "When the gate ran, unix time.",
        [(labels, one.evaluated) for labels, one in gated],
    )
    yield gauge(
        metric_names.GATE_THRESHOLD,
        "Robust accuracy that the gate's policy asks for, 0 to 1.",
        [(labels | _its_ball(one), one.robust_threshold) for labels, one in gated if one.robust_threshold is not None],
    )
    yield gauge(
        "robustness_gate_threat_threshold_ratio",
        "Accuracy that the gate's policy asks for under a threat of another kind, norm and epsilon, 0 to 1.",
        [
            (labels | {"norm": kind, "epsilon": label}, threshold)
            for labels, one in gated
            for (kind, label), threshold in one.further_thresholds.items()
        ],
    )
    yield gauge(
        metric_names.GATE_CLEAN_THRESHOLD,
        "Clean accuracy that the gate's policy asks for, 0 to 1.",
        [(labels, one.clean_threshold) for labels, one in gated if one.clean_threshold is not None],
    )
    yield from _attested(
        metric_names.GATE_ACCURACY,
        "Robust accuracy that the gate measured with the model's own gradients, worst case per image",
        [(labels | _its_ball(one), one.robust) for labels, one in gated],
    )
    yield from _attested(
        metric_names.GATE_CLEAN_ACCURACY,
        "Clean accuracy that the gate measured",
        [(labels, one.clean) for labels, one in gated],
    )
    yield from _attested(
        metric_names.GATE_TRANSFER_ACCURACY,
        "Accuracy that the gate measured under this attack, crafted on the surrogates of this watch",
        [
            (labels | _its_ball(one) | {"attack": attack}, share)
            for labels, one in gated
            for (source, attack), share in one.transfer.items()
            if source == identity.surrogates_sha256
        ],
    )


def _paths(identity: Identity, journal: Journal) -> Iterator[Metric]:
    """Rounds, requests and times, by the way they went."""
    paths = [({"model": identity.model, "via": via}, journal.paths[via]) for via in identity.interval_seconds]
    yield gauge(
        "robustness_target_up",
        "1 if the model answered the last round, else 0.",
        [(labels, float(path.up)) for labels, path in paths if path.up is not None],
    )
    yield gauge(
        "robustness_probe_interval_seconds",
        "Planned time between two rounds.",
        [({"model": identity.model, "via": via}, seconds) for via, seconds in identity.interval_seconds.items()],
    )

    def each(of: Callable[[PathTotals], T]) -> list[tuple[Labels, T]]:
        return [(labels, of(path)) for labels, path in paths]

    def reasons(of: Callable[[PathTotals], Mapping[str, int]]) -> list[tuple[Labels, int]]:
        return [({**labels, "reason": reason}, count) for labels, path in paths for reason, count in of(path).items()]

    yield counter("robustness_probe_rounds_total", "Rounds begun.", each(lambda path: path.rounds))
    yield counter("robustness_probe_queries_total", "Inference requests sent.", each(lambda path: path.queries))
    yield counter(
        "robustness_probe_images_total", "Images sent: the load that probing adds.", each(lambda path: path.images)
    )
    yield counter(
        "robustness_probe_round_failures_total",
        "Rounds without figures, by reason.",
        reasons(lambda path: path.failures),
    )
    yield counter(
        "robustness_probe_rounds_skipped_total",
        "Rounds left out or broken off without an opinion, by reason.",
        reasons(lambda path: path.skips),
    )
    yield counter(
        "robustness_probe_query_failures_total",
        "Inference requests without a usable answer, by reason.",
        reasons(lambda path: path.query_failures),
    )
    yield histogram(
        "robustness_probe_query_duration_seconds",
        "Time of an inference request seen from here, failed ones too. In seconds.",
        each(lambda path: path.query_seconds),
    )
    yield histogram(
        "robustness_probe_round_duration_seconds",
        "Time of a whole round, failed ones too. In seconds.",
        each(lambda path: path.round_seconds),
    )
    yield gauge(
        "robustness_probe_last_round_duration_seconds",
        "Time of the last finished round in seconds.",
        each(lambda path: path.last_seconds),
    )
    yield gauge(
        "robustness_probe_last_success_timestamp_seconds",
        "End of the last successful round, unix time.",
        each(lambda path: path.last_success),
    )
    yield gauge(
        "robustness_probe_last_attempt_timestamp_seconds",
        "Start of the last round, unix time.",
        each(lambda path: path.last_attempt),
    )


def _manners(identity: Identity, now: Snapshot) -> Iterator[Metric]:
    model, budget = {"model": identity.model}, now.budget
    for name, documentation, value in (
        ("robustness_probe_query_budget", "Images that may be asked about in a window.", budget.images),
        ("robustness_probe_query_budget_used", "Images asked about in this window.", budget.used),
        ("robustness_probe_query_budget_window_seconds", "Length of a window.", budget.window_seconds),
        ("robustness_probe_paused", "1 while the kill switch is on.", now.paused),
        (
            "robustness_probe_low_priority",
            "1 if the server lets users overtake probes; 0 if the budget alone keeps them small.",
            now.low_priority,
        ),
        ("robustness_probe_prepared_rounds", "Rounds whose adversarial images lie ready.", now.prepared),
    ):
        yield gauge(name, documentation, [(model, float(value))])
    yield counter(
        "robustness_probe_record_failures_total",
        "Rounds that could not be written to disk.",
        [(model, now.record_failures)],
    )
    done = now.mitigations or {}
    rows = [
        ({**model, "action": action, "outcome": outcome}, done.get((action, outcome), 0))
        for action in ACTIONS
        for outcome in OUTCOMES
    ]
    yield counter("robustness_mitigations_total", "What was done about proven losses.", rows)


def _counted(identity: Identity, journal: Journal) -> Iterator[Metric]:
    rows = [({"model": identity.model, "version": totals.version}, totals) for totals in journal.versions]
    yield counter(
        "robustness_clean_samples_total",
        "Clean images sent in whole rounds.",
        [(labels, totals.samples) for labels, totals in rows],
    )
    yield counter(
        "robustness_clean_correct_total",
        "Clean images that were classified correctly.",
        [(labels, totals.correct) for labels, totals in rows],
    )
    attacks = [
        (_under(identity, totals.version, attack), totals.attacks.get(attack.name, AttackTotals()))
        for totals in journal.versions
        for attack in identity.attacks
    ]
    for name, part, documentation in (
        ("robustness_attack_samples_total", "samples", "Images judged under an attack, clean-wrong ones included."),
        (
            "robustness_attack_correct_total",
            "correct",
            f"Images that were right before and after the attack. {BOUND}",
        ),
        ("robustness_attack_attempts_total", "attempts", "Images attacked: those that were right before."),
        ("robustness_attack_successes_total", "successes", "Images that the attack flipped."),
        (
            "robustness_attack_queries_total",
            "queries",
            "Questions asked about images: one an image for transfer, many for a search.",
        ),
    ):
        yield counter(name, documentation, [(labels, getattr(totals, part)) for labels, totals in attacks])


def _replayed(identity: Identity, journal: Journal) -> Iterator[Metric]:
    rows = [({"model": identity.model, "version": totals.version}, totals) for totals in journal.versions]
    seen = [(labels, totals) for labels, totals in rows if totals.integrity is not None]
    yield counter(
        "robustness_replay_samples_total",
        "The gate's images asked about again.",
        [(labels, totals.replayed) for labels, totals in rows],
    )
    yield counter(
        "robustness_replay_mismatches_total",
        "Of these, how many got other logits than the gate recorded.",
        [(labels, totals.mismatches) for labels, totals in rows],
    )
    yield gauge(
        "robustness_replay_difference_ratio",
        "Largest difference of a replayed logit in the last round, in units of what is tolerated: 1 is the limit.",
        [(labels, totals.difference) for labels, totals in seen],
    )
    yield gauge(
        "robustness_target_integrity",
        "1 if every replayed answer of the last round was the one that the gate recorded.",
        [(labels, float(bool(totals.integrity))) for labels, totals in seen],
    )


def _live(identity: Identity, now: Snapshot) -> Iterator[Metric]:
    """Shares of recent rounds, and what a window of rounds proves."""
    versions = now.journal.versions
    yield from _bounded(
        "Clean accuracy",
        [({"model": identity.model, "version": totals.version}, totals, "clean") for totals in versions],
        ratio="robustness_clean_accuracy_ratio",
        lower="robustness_clean_accuracy_mean_lower_ratio",
        upper="robustness_clean_accuracy_mean_upper_ratio",
        rounds="robustness_clean_accuracy_mean_rounds",
        start="robustness_clean_accuracy_mean_start_timestamp_seconds",
        stretch="robustness_clean_accuracy_stretch_upper_ratio",
    )
    yield from _bounded(
        "Accuracy under this attack",
        [
            (_under(identity, totals.version, attack), totals, attack.name)
            for totals in versions
            for attack in identity.attacks
        ],
        BOUND,
        ratio="robustness_robust_accuracy_ratio",
        lower="robustness_robust_accuracy_mean_lower_ratio",
        upper="robustness_robust_accuracy_mean_upper_ratio",
        rounds="robustness_robust_accuracy_mean_rounds",
        start="robustness_robust_accuracy_mean_start_timestamp_seconds",
        stretch="robustness_robust_accuracy_stretch_upper_ratio",
    )
    yield from _bounded(
        "Share of images that are right and that no transfer attack flipped",
        [(_ball(identity, totals.version), totals, "worst_case") for totals in versions],
        BOUND,
        ratio="robustness_worst_case_accuracy_ratio",
        lower="robustness_worst_case_accuracy_mean_lower_ratio",
        upper="robustness_worst_case_accuracy_mean_upper_ratio",
        rounds="robustness_worst_case_accuracy_mean_rounds",
        start="robustness_worst_case_accuracy_mean_start_timestamp_seconds",
        stretch="robustness_worst_case_accuracy_stretch_upper_ratio",
    )
    rates = [
        (_under(identity, totals.version, attack), totals.success(attack.name))
        for totals in versions
        for attack in identity.attacks
    ]
    yield gauge(
        "robustness_attack_success_ratio",
        "Share of clean-correct images that the attack flipped in recent rounds, 0 to 1. Lower bound.",
        [(labels, rate) for labels, rate in rates if rate is not None],
    )
    yield gauge(
        "robustness_loss_proven",
        "1 if this loss is a fact, or a mean over some of the last rounds is proven to be below its bar: wrong once in "
        "100 months, and once in 100 versions.",
        [
            ({"model": identity.model, "version": totals.version, "reason": reason}, float(reason in lost))
            for totals in versions
            for lost in [now.losses.get(totals.version, frozenset())]
            for reason in LOSSES
        ],
    )


def _bars(identity: Identity, now: Snapshot) -> Iterator[Metric]:
    rows = [
        ({"model": identity.model, "version": version, "reason": loss, "figure": figure}, bar)
        for version, bars in now.bars.items()
        for (loss, figure), bar in bars.items()
    ]
    yield gauge(
        "robustness_loss_bar_ratio",
        "Where a loss is proven: once the stretch_upper_ratio of this live figure is below, 0 to 1.",
        rows,
    )


def _ball(identity: Identity, version: str) -> dict[str, str]:
    return {"model": identity.model, "version": version, "norm": identity.norm, "epsilon": identity.epsilon}


def _under(identity: Identity, version: str, attack: AttackInfo) -> dict[str, str]:
    return {"model": identity.model, "version": version, **identity.ball(attack), "attack": attack.name}


def _its_ball(attested: Attested) -> dict[str, str]:
    return {"norm": attested.norm, "epsilon": attested.epsilon}


def _bounded(
    documentation: str,
    rows: Iterable[tuple[Labels, VersionTotals, str]],
    remark: str = "",
    *,
    ratio: str,
    lower: str,
    upper: str,
    rounds: str,
    start: str,
    stretch: str,
) -> Iterator[Metric]:
    """Six metrics of a live figure, because a label for the bound would make sums meaningless.

    documentation: the figure, as a sentence begins.
    rows: labels, totals, and the figure's name there.
    remark: a sentence about the figure.
    ratio: the metric's name of its share in recent rounds.
    lower, upper: of the bounds of its mean over a window that ends now.
    rounds, start: of that window's length, and of when it began.
    stretch: of the bound of its mean over some of that window's last rounds.
    """
    rows = list(rows)
    recent = [(labels, totals.lately(of)) for labels, totals, of in rows]
    known = [(labels, totals.bounds[of]) for labels, totals, of in rows if of in totals.bounds]
    mean = f"{documentation}: its mean over the last W rounds, W = {rounds}"
    yield gauge(
        ratio,
        f"{documentation} in the last {RECENT} rounds, 0 to 1. {remark}".strip(),
        [(labels, share.value) for labels, share in recent if share.n],
    )
    yield gauge(lower, f"{mean}, is above this; {ANYTIME}", [(labels, one.lower) for labels, one in known])
    yield gauge(upper, f"{mean}, is below this; {ANYTIME}", [(labels, one.upper) for labels, one in known])
    yield gauge(
        rounds,
        "The W of the bounds of the mean: the longest window that ends now and shows no change.",
        [(labels, float(one.rounds)) for labels, one in known],
    )
    yield gauge(start, "When the first of these W rounds began, unix time.", [(row, one.start) for row, one in known])
    yield gauge(
        stretch,
        f"{documentation}: its mean over the last rounds, some number of them and W at most, is below this; {ANYTIME}",
        [(labels, one.stretch_upper) for labels, one in known],
    )


def _attested(
    names: metric_names.Interval, documentation: str, rows: Iterable[tuple[Labels, Share]]
) -> Iterator[Metric]:
    """The gate's figures, with the exact 95 % interval of their images."""
    rows = list(rows)
    bounds = [(labels, *share.bounds) for labels, share in rows]
    of = f"of {names.ratio}, 95 % (Clopper-Pearson, as if the number of images had been planned), 0 to 1."
    yield gauge(names.ratio, f"{documentation}, 0 to 1.", [(labels, share.value) for labels, share in rows])
    yield gauge(names.lower, f"Lower bound {of}", [(labels, lower) for labels, lower, _ in bounds])
    yield gauge(names.upper, f"Upper bound {of}", [(labels, upper) for labels, _, upper in bounds])
