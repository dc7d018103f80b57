"""The loop around rounds: when one is due, whether it may be, what becomes of it, and who is told."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector

from dfmcl.common.errors import BadInput, DfmclError, Rejected
from dfmcl.common.locks import Taken, beside, held
from dfmcl.common.progress import Track, silent
from dfmcl.monitoring import config as config_of
from dfmcl.monitoring import page
from dfmcl.monitoring.asker import Clock, Latencies, Manners, Stopped
from dfmcl.monitoring.bounds import MONTH_SECONDS, limit
from dfmcl.monitoring.budget import BackOff, Budget
from dfmcl.monitoring.config import WatchConfig
from dfmcl.monitoring.journal import VERSIONS, Journal
from dfmcl.monitoring.lost import bars, losses
from dfmcl.monitoring.metrics import RoundsCollector
from dfmcl.monitoring.mitigation import Mitigation
from dfmcl.monitoring.preparation import (
    Preparation,
    actions_of,
    crafter_of,
    gateway_clients,
    identity_of,
    prepare,
    record_of,
    say,
)
from dfmcl.monitoring.releases import Release
from dfmcl.monitoring.results import GATEWAY, TRITON, Round, RoundFailure, RoundResult, RoundSkipped
from dfmcl.monitoring.rounds import RoundPlan, run_query_round, run_round
from dfmcl.monitoring.server import application, served
from dfmcl.monitoring.snapshot import Snapshot
from dfmcl.monitoring.spans import round_spans
from dfmcl.serving.clients.triton import Client

HEALTHY_INTERVALS = 3


def watch(
    config: WatchConfig,
    *,
    rounds: int | None = None,
    stop: threading.Event,
    clock: Clock = time,
    log: Callable[[str], None] = say,
    track: Track = silent,
) -> int:
    """Run rounds until `stop`, with /metrics beside them; returns 0. A failed round is a result and ends nothing.

    With `rounds`, run that many, serve no HTTP, do nothing about a loss, and return 0 if all were
    measured, else 5: a look by hand beside a watch that runs. One line a round goes to `log`.

    Raises BadInput (2) for data, surrogates, keys or evidence that cannot be used, or a record that another watch
    writes; Broken (5) for a port in use.
    """
    if rounds is not None:
        config = config.model_copy(update={"mitigation": config_of.MitigationSection()})
    with _recorded(config, rounds, log) as config:
        return _watch(config, rounds, stop, clock, log, track)


@contextmanager
def _recorded(config: WatchConfig, rounds: int | None, log: Callable[[str], None]) -> Iterator[WatchConfig]:
    """Hold the record, because two that append to it would give two rounds one number; a look by hand does without it.

    Where it cannot be locked, probing goes on, as it does where it cannot be written.
    """
    path = Path(config.record.path)
    with ExitStack() as stack:
        try:
            if config.record.path:
                stack.enter_context(held(beside(path), path))
        except Taken as error:
            if rounds is None:
                raise
            log(f"{error}; these rounds are not written down")
            config = config.model_copy(update={"record": config_of.RecordSection()})
        except DfmclError as error:
            log(str(error))
        yield config


def _watch(
    config: WatchConfig,
    rounds: int | None,
    stop: threading.Event,
    clock: Clock,
    log: Callable[[str], None],
    track: Track,
) -> int:
    work = prepare(config, track)
    if work.recipe.remark:
        log(work.recipe.remark)
    sidecar = Sidecar(config, work, clock, stop, log, rounds)
    http = served(sidecar.application(), config.listen.host, config.listen.port) if rounds is None else nullcontext("")
    with round_spans() as span, http as url, sidecar.crafter:
        every = f"every {config.probe.interval_seconds:g} s; metrics at {url}/metrics"
        log(f"watching {sidecar.target} {every if url else f'{rounds} times, no HTTP'}")
        measured = True
        for outcome in sidecar.run():
            span(outcome)
            measured = measured and isinstance(outcome, RoundResult)
        sidecar.finish()
    return 0 if measured or rounds is None else 5


class Sidecar:
    """The loop and its findings. The loop's thread writes, all others read snapshots.

    crafter: of this watch's scenes; at work while it is entered.
    config, work: what is asked, and with what.
    clock, stop, log: as `watch` has them.
    rounds: how many, None without end.
    """

    def __init__(
        self,
        config: WatchConfig,
        work: Preparation,
        clock: Clock,
        stop: threading.Event,
        log: Callable[[str], None],
        rounds: int | None = None,
    ) -> None:
        self.target = f"{config.target.model} at {config.target.url}"
        self._rounds = rounds
        self._config, self._work, self._clock, self._stop, self._log = config, work, clock, stop, log
        self._identity = identity_of(config, work)
        month = MONTH_SECONDS / config.probe.interval_seconds
        figures = 2 + len(work.direct.attacks) + (work.outside is not None)
        self.journal = Journal(limit(month, 2 * figures))  # each has an upper and a lower bound
        self.begun = self._asked = 0
        self._record = record_of(config, work)
        self._restore()
        self._releases: Mapping[str, Release] = {}
        self._budget = Budget(config.budget.images, config.budget.window_seconds, clock.monotonic())
        self._back_off = {TRITON: BackOff(), GATEWAY: BackOff()}
        self._latencies = {via: Latencies(config.abort.latency_factor) for via in (TRITON, GATEWAY)}
        self._low_priority = False
        self._last_attempt = clock.monotonic()
        self._mitigation = Mitigation(actions_of(config), log)
        self.crafter = crafter_of(config, work, stop, self.begun + 1, rounds)

    def run(self) -> Iterator[Round | None]:
        """Rounds in their rhythm, each yielded as it ends; None for one that `stop` cut off."""
        done = 0
        while not self._stop.is_set() and done != self._rounds:
            done += 1
            begun = self._last_attempt = self._clock.monotonic()
            try:
                yield self._concluded(self._due(TRITON, self._work.direct, self._direct))
                outside = self._work.outside
                if outside is not None and done % self._config.query.every == 0:
                    yield self._concluded(self._due(GATEWAY, outside, self._outside))
            except Stopped:
                yield None
                return
            if done != self._rounds:
                spare = self._config.probe.interval_seconds - (self._clock.monotonic() - begun)
                if spare < 0:
                    self._log("that took longer than probe.interval_seconds; raise it, or ask for less")
                self._stop.wait(max(0.0, spare))

    def snapshot(self) -> Snapshot:
        """What is known now, for a reader in another thread."""
        now, journal = self._clock.time(), self.journal
        releases = {version: found.at(now) for version, found in self._releases.items()}
        return Snapshot(
            journal=journal,
            releases=releases,
            losses={totals.version: self._losses(totals.version) for totals in journal.versions},
            bars={version: self._bars(version) for version in releases},
            budget=self._budget.at(self._clock.monotonic()),
            stale=now - journal.paths[TRITON].last_success > HEALTHY_INTERVALS * self._config.probe.interval_seconds,
            paused=self._paused(),
            low_priority=self._low_priority,
            prepared=self.crafter.ready,
            record_failures=self._record.failures if self._record else 0,
            mitigations=dict(self._mitigation.counts),
        )

    def finish(self) -> None:
        """Wait for what is being done about a loss."""
        self._mitigation.finish(self._config.mitigation.timeout_seconds)

    def healthy(self) -> bool:
        """Whether rounds still begin: the last at most three intervals and a deadline ago, or images are being made."""
        probe = self._config.probe
        if self.crafter.behind:
            return True  # a restart would throw away the crafted images, and begin again
        if self.crafter.dead:
            return False  # no round can be measured any more, and a restart may help
        patience = HEALTHY_INTERVALS * probe.interval_seconds + self._config.target.timeout_seconds
        return self._clock.monotonic() - self._last_attempt <= patience

    def application(self) -> Callable[..., Any]:
        """The WSGI application: /metrics, /-/healthy, /rounds.json and the page."""
        registry = CollectorRegistry()
        registry.register(RoundsCollector(self._identity, self.snapshot))
        ProcessCollector(registry=registry)
        shown = functools.partial(page.render, self.target, self._identity)
        well, ill = ("200 OK", "healthy\n"), ("503 Service Unavailable", "no round has begun for too long\n")

        def health() -> tuple[str, str, str]:
            status, text = well if self.healthy() else ill
            return status, "text/plain", text

        return application(
            registry,
            {
                "/": lambda: ("200 OK", "text/html", shown(self.snapshot(), now=self._clock.time())),
                "/rounds.json": lambda: ("200 OK", "application/json", self._rounds_json()),
                "/-/healthy": health,
            },
        )

    def _due(self, via: str, plan: RoundPlan, attempt: Callable[[int], Round]) -> Round:
        """The next round of a path, or why it is left out."""
        started = self._clock.time()
        number = self.begun + 1 if via == TRITON else self._asked + 1

        def skipped(reason: str, message: str) -> RoundSkipped:
            return RoundSkipped(number, via, plan.model, reason, message, started)

        self._budget = self._budget.at(self._clock.monotonic())
        if self._paused():
            return skipped("paused", f"{self._config.probe.pause_file} is there")
        if self._back_off[via].waits:
            self._back_off[via] = self._back_off[via].skipped()
            return skipped("backpressure", "the server had no room; it is left alone for a while")
        if not self._budget.has(plan.cost):
            used = f"{self._budget.used} of {self._budget.images} images are used"
            return skipped("budget", f"{used}, this round may need {plan.cost}")
        begun = self._clock.monotonic()
        try:
            outcome = attempt(number)
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a round dies of, the next one may live; it is counted
            message = " ".join(f"{type(error).__name__}: {error}".split())
            seconds = max(0.0, self._clock.monotonic() - begun)
            outcome = RoundFailure(number, via, plan.model, "internal", message, started, seconds, ())
        if via == TRITON:
            self.begun = number
        else:
            self._asked = number
        if not isinstance(outcome, RoundSkipped):  # the kill switch says nothing about the server
            reason = outcome.reason if isinstance(outcome, RoundFailure) else ""
            self._back_off[via] = self._back_off[via].after(reason)
        self._budget = self._budget.spent(sum(query.images for query in outcome.queries))
        return outcome

    def _direct(self, number: int) -> Round:
        """Over a connection of its own, so that it meets the server as any newcomer would."""
        target = self._config.target
        scene = self.crafter.take()
        with Client(target.url, target.model, timeout_seconds=target.timeout_seconds) as client:

            def predict(images: Any) -> Any:
                self._low_priority = client.give_way()
                return client.predict(images)

            return run_round(
                self._work.direct, number, scene, predict, self._release, self._clock, self._manners(TRITON)
            )

    def _outside(self, number: int) -> Round:
        """As any customer would ask; what is crafted is crafted while asking."""
        query, plan = self._config.query, self._work.outside
        assert plan is not None
        scene = self._work.recipe.pool.scene(plan.threat, self._config.probe.seed, -number, plan.images)
        attacker, harmless = gateway_clients(query, plan, self._work.keys)
        with attacker, harmless:
            return run_query_round(
                plan, number, scene, attacker.predict, harmless.predict, self._clock, self._manners(GATEWAY)
            )

    def _manners(self, via: str) -> Manners:
        def wait(seconds: float) -> None:
            self._last_attempt = self._clock.monotonic()  # a search takes long, and is alive as long as it asks
            if self._stop.wait(seconds) if seconds > 0 else self._stop.is_set():
                raise Stopped

        return Manners(wait, self._paused, self._config.budget.duty, self._latencies[via])

    def _release(self, version: str) -> Release:
        """The evidence of the version that answers now; Rejected where its own weights are among the surrogates."""
        found = self._work.find(version)
        others = [totals.version for totals in self.journal.versions if totals.version != version]
        kept = {*others[1 - VERSIONS :], version}
        self._releases = {name: one for name, one in {**self._releases, version: found}.items() if name in kept}
        if found.attested is not None:
            try:
                self._work.recipe.surrogates.require_apart(found.attested.checkpoint_sha256, f"version {version}")
            except BadInput as error:
                raise Rejected(str(error), "rejected") from None
        return found

    def _concluded(self, outcome: Round) -> Round:
        """A finished round: in the journal, on disk, in the log; and what follows from it."""
        self.journal = self.journal.after(outcome)
        if self._record is not None:
            self._record.append(outcome)
        self._log(str(outcome))
        if isinstance(outcome, RoundResult):
            lost = self._losses(outcome.version)
            for reason in sorted(lost):
                self._log(f"robustness of version {outcome.version} is lost for certain: {reason}; see docs/sre.md")
            self._mitigation.consider(outcome.model, outcome.version, lost)
        return outcome

    def _losses(self, version: str) -> frozenset[str]:
        totals = next((totals for totals in self.journal.versions if totals.version == version), None)
        return frozenset() if totals is None else losses(totals, self._bars(version))

    def _bars(self, version: str) -> Mapping[tuple[str, str], float]:
        found, threat = self._releases.get(version), self._work.direct.threat
        if found is None or found.attested is None:
            return {}
        attacks = {attack.name: attack.threat for attack in self._identity.attacks}
        return bars(found.attested, threat.norm, threat.label, self._work.recipe.surrogates.sha256, attacks)

    def _paused(self) -> bool:
        return bool(self._config.probe.pause_file) and Path(self._config.probe.pause_file).exists()

    def _restore(self) -> None:
        """What an earlier process wrote down: the same plan's figures go on, and no round is drawn twice."""
        if self._record is None:
            return
        for same, outcome in self._record.rounds():
            if outcome.via == TRITON:
                self.begun = max(self.begun, outcome.number)
            else:
                self._asked = max(self._asked, outcome.number)
            if same:
                self.journal = self.journal.after(outcome)

    def _rounds_json(self) -> str:
        return json.dumps([outcome.to_json() for outcome in self.journal.history], indent=2) + "\n"
