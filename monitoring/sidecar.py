"""The loop around rounds, and the small HTTP server that tells Prometheus and humans about them."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from monitoring import page
from monitoring.config import WatchConfig
from monitoring.journal import Journal
from monitoring.metrics import AttackInfo, Identity, RoundsCollector
from monitoring.probes import transfer_attack
from monitoring.release import Attested, read_release
from monitoring.rounds import Clock, Plan, Round, RoundFailure, RoundResult, run_round
from monitoring.surrogates import Surrogates, load_surrogates
from robustness.attacks import Attack
from robustness.data import load_dataset
from robustness.errors import BadInput, Broken
from robustness.progress import Track, silent
from robustness.provenance import revision, versions
from serving.client import Client

PROBE_PRIORITY = 2  # of Triton's queue: users are 1 by default, so probes wait behind them
HEALTHY_INTERVALS = 3

A = TypeVar("A")
R = TypeVar("R")


class Stopped(Exception):
    """The watch was asked to end in the middle of a round, which is then dropped."""


def say(line: str) -> None:
    """Print at once, as what is piped would wait for a full buffer otherwise."""
    print(line, flush=True)


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

    With `rounds`, run that many, serve no HTTP, and return 0 if all succeeded, else 5. One line a round goes to `log`.
    Raises BadInput (2) for data, surrogates or evidence that cannot be used, Broken (5) for a port in use.
    """
    release = read_release(Path(config.release.evidence)) if config.release.evidence else None
    plan, surrogates = _prepare(config, release, stop, track)
    sidecar = Sidecar(config, plan, clock, stop)
    if rounds is not None:
        log(f"watching {sidecar.target}: {rounds} round{'s' * (rounds > 1)}, no HTTP")
        return 0 if all(isinstance(outcome, RoundResult) for outcome in sidecar.run(rounds, log)) else 5
    with _served(sidecar.application(_identity(plan, surrogates, release)), config) as url:
        log(f"watching {sidecar.target} every {config.probe.interval_seconds:g} s; metrics at {url}/metrics")
        for _ in sidecar.run(None, log):
            pass
    return 0


class Sidecar:
    """The loop and what it has seen. The loop's thread writes `journal`, all others only read it."""

    def __init__(self, config: WatchConfig, plan: Plan, clock: Clock, stop: threading.Event) -> None:
        self.journal = Journal()
        self.target = f"{config.target.model} at {config.target.url}"
        self._config, self._plan, self._clock, self._stop = config, plan, clock, stop
        self._last_attempt = clock.monotonic()

    def run(self, rounds: int | None, log: Callable[[str], None]) -> Iterator[Round | None]:
        """Rounds in their rhythm, each yielded as it ends; None for one that `stop` cut off."""
        number = 0
        while not self._stop.is_set() and number != rounds:
            number += 1
            self._last_attempt = self._clock.monotonic()
            self.journal = self.journal.begun(self._clock.time())
            try:
                outcome = self._attempt(number)
            except Stopped:
                yield None
                return
            self.journal = self.journal.after(outcome)
            log(str(outcome))
            yield outcome
            if number != rounds:
                spare = self._config.probe.interval_seconds - (self._clock.monotonic() - self._last_attempt)
                if spare < 0:
                    log("that took longer than probe.interval_seconds; raise it, or lower probe.images")
                self._stop.wait(max(0.0, spare))

    def healthy(self) -> bool:
        """Whether rounds still begin: the last one at most three intervals and a deadline ago."""
        patience = HEALTHY_INTERVALS * self._config.probe.interval_seconds + self._config.target.timeout_seconds
        return self._clock.monotonic() - self._last_attempt <= patience

    def application(self, identity: Identity) -> Callable[..., Any]:
        """The WSGI application: /metrics, /-/healthy, /rounds.json and the page."""
        registry = CollectorRegistry()
        registry.register(RoundsCollector(identity, lambda: self.journal))
        ProcessCollector(registry=registry)
        metrics = make_wsgi_app(registry)
        routes: dict[str, Callable[[], tuple[str, str, str]]] = {
            "/": lambda: ("200 OK", "text/html", page.render(self.target, self.journal.history)),
            "/rounds.json": lambda: ("200 OK", "application/json", self._rounds_json()),
            "/-/healthy": lambda: (
                ("200 OK", "text/plain", "healthy\n")
                if self.healthy()
                else ("503 Service Unavailable", "text/plain", "no round has begun for too long\n")
            ),
        }

        def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            path = environ["PATH_INFO"]
            if path == "/metrics":
                return metrics(environ, start_response)
            if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
                status, kind, text = "405 Method Not Allowed", "text/plain", "use GET\n"
            elif path in routes:
                status, kind, text = routes[path]()
            else:
                status, kind, text = "404 Not Found", "text/plain", f"try {', '.join(['/metrics', *routes])}\n"
            body = text.encode()
            start_response(status, [("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body)))])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

        return application

    def _attempt(self, number: int) -> Round:
        """One round over a connection of its own, so that it meets the server as any newcomer would."""
        target, started = self._config.target, self._clock.time()
        try:
            with Client(
                target.url, target.model, timeout_seconds=target.timeout_seconds, priority=PROBE_PRIORITY
            ) as client:
                return run_round(
                    self._plan, number, predict=_unless_stopped(client.predict, self._stop), clock=self._clock
                )
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a round dies of, the next one may live; it is counted
            seconds = self._clock.monotonic() - self._last_attempt
            message = " ".join(f"{type(error).__name__}: {error}".split())
            return RoundFailure(number, target.model, "internal", message, started, seconds, ())

    def _rounds_json(self) -> str:
        return json.dumps([outcome.to_json() for outcome in self.journal.history], indent=2) + "\n"


def _prepare(
    config: WatchConfig, release: Attested | None, stop: threading.Event, track: Track
) -> tuple[Plan, Surrogates]:
    dataset = load_dataset(config.data.name, config.data.path, config.data.image_size, track)
    if config.probe.images > len(dataset.x_test):
        raise BadInput(f"probe.images is {config.probe.images}; {dataset.name} has {len(dataset.x_test)} test images")
    served = {release.checkpoint_sha256} if release else set()
    surrogates = load_surrogates(config.surrogates.runs, dataset, served)
    plan = Plan(
        model=config.target.model,
        images=dataset.x_test,
        labels=dataset.y_test,
        classes=len(dataset.classes),
        source=_unless_stopped(surrogates.model, stop),
        threat=config.threat.threat,
        attacks=tuple(transfer_attack(name) for name in config.probe.attacks),
        images_per_round=config.probe.images,
        seed=config.probe.seed,
    )
    return plan, surrogates


def _identity(plan: Plan, surrogates: Surrogates, release: Attested | None) -> Identity:
    def info(attack: Attack) -> AttackInfo:
        definition = [attack.name, dict(attack.parameters), plan.threat.norm, plan.threat.eps, surrogates.sha256]
        digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()
        return AttackInfo(attack.name, attack.parameters.get("steps", 1), surrogates.name, digest)

    return Identity(
        version=versions().get("dfmcl", "unknown"),
        revision=revision() or "unknown",
        model=plan.model,
        norm=plan.threat.norm,
        epsilon=plan.threat.label,
        attacks=tuple(info(attack) for attack in plan.attacks),
        release=release,
    )


def _unless_stopped(function: Callable[[A], R], stop: threading.Event) -> Callable[[A], R]:
    """The same function, which raises Stopped once `stop` is set: a round ends within one query or one forward pass."""

    def guarded(argument: A) -> R:
        if stop.is_set():
            raise Stopped
        return function(argument)

    return guarded


class _QuietServer(ThreadingWSGIServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle, or never asks, is no news."""


class _QuietHandler(WSGIRequestHandler):
    timeout = 10  # seconds that a client may take to send its request; each holds a thread

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""


@contextmanager
def _served(application: Callable[..., Any], config: WatchConfig) -> Iterator[str]:
    """Serve HTTP in threads for as long as the block runs; yields the URL. Broken where the port cannot be had."""
    host, port = config.listen.host, config.listen.port
    try:
        server = make_server(host, port, application, server_class=_QuietServer, handler_class=_QuietHandler)
    except OSError as error:
        raise Broken(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another listen.port, or 0 for any"
        ) from None
    thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
