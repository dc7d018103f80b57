"""`dfmcl serve`: keeps a Triton answering with what the repository holds, as the gate saw it answer.

Long, because it is one machine of states: each method is a way from one to another.

It follows the repository. Where a promotion changes what a model serves, the new version is verified, asked the known
answers on a Triton of its own, and only then loaded; where that fails, the repository returns to the version that is
live. Where the repository cannot be read, what is live goes on: a model ends by a `retired` entry of the history alone.
A server that dies, or lives but no longer answers anyone, is replaced, with growing pauses.
"""

from __future__ import annotations

import math
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dfmcl.common.errors import AnswerError, BadInput, Broken, Crashed, Refused, WrongAnswer
from dfmcl.gating.signing.attestation import BadEvidence, NotAttested, Trust
from dfmcl.release import layout, ledger, promotion
from dfmcl.release.stores.directory import STAGING, Directory
from dfmcl.release.stores.store import Store, UnusableStore, told
from dfmcl.release.verification import Promoted, verify_release
from dfmcl.serving.clients.triton import Client
from dfmcl.serving.ready import claim_ready, write_ready
from dfmcl.serving.triton.environment import Environment, find_environment, footprint
from dfmcl.serving.triton.known_answers import known_answers, require_known_answers
from dfmcl.serving.triton.mirror import adopt
from dfmcl.serving.triton.process import HOST, Server, claim_ports, hide_token, last_meaningful_line, running
from dfmcl.serving.triton.pulse import Pulse, asking
from dfmcl.serving.triton.sight import Mark, look

STARTUP_SECONDS = 120.0
TICK_SECONDS = 0.5  # how soon a dead process is noticed; a promotion: as the store has it
RETRY_SECONDS = 5.0  # until what could not be read as a whole is tried again though nothing has changed
LIVENESS_SECONDS = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
RESTARTS = 5  # in a row; a server that lived a minute begins a new row
LIVED_SECONDS = 60.0
UNTRUSTED = (Refused, NotAttested, BadEvidence, BadInput)


def serve(
    store: Store,
    *,
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    trust: Callable[[], Trust] | None = None,
    fixed: bool = False,
    triton_python: Path | None = None,
    ready_file: Path | None = None,
    log: Path | None = None,
    stop: threading.Event | None = None,
    say: Callable[[str], None] = print,
    liveness_seconds: float = LIVENESS_SECONDS,
    restarts: int = RESTARTS,
) -> int:
    """Serve every promoted model until SIGTERM, SIGINT or `stop`; returns 0 then, and leaves no process behind.

    A port of 0 means any free one. trust: whose signatures must vouch for each model, at the start and at each change;
    asked anew all the time, as keys are revoked; without it only digests and verdicts are judged. fixed: serve what is
    there now, and nothing that comes later. ready_file: JSON {http, grpc, metrics, models, pid, started}, there only
    while the server answers; `read_ready` does not believe a dead one's. log: where Triton's own log goes (default: a
    file that vanishes with the server). stop: for callers outside the main thread, which get no signals. restarts: how
    often in a row a server that was up is replaced.
    Raises Refused or NotAttested (1) for a model that promotion did not write, BadInput (2) for a repository without
    models, Broken (5) for a missing environment, a port in use, a server that does not come up, or keeps dying;
    WrongAnswer (5) where it gives other answers than the gate recorded.
    """
    if ready_file is not None:
        claim_ready(ready_file)
    sight = look(store)
    if "" in sight.troubles:
        raise sight.troubles[""]
    names = layout.model_names(store)
    if not names:
        raise BadInput(f"{store.where()}: holds no promoted model; `dfmcl promote` adds one")
    environment = find_environment(triton_python)
    with ExitStack() as stack:
        private = stack.enter_context(footprint())  # first: what a killed server left may hold the ports
        ports = claim_ports(http=http_port, grpc=grpc_port, metrics=metrics_port)
        stop = stop or stack.enter_context(_stop_on_signals())
        supervisor = _Supervisor(
            store,
            private,
            environment,
            ask_trust=trust,
            fixed=fixed,
            ports=ports,
            ready_file=ready_file,
            stop=stop,
            say=say,
            liveness_seconds=liveness_seconds,
        )
        supervisor.begin(names, sight.marks)
        supervisor.keep(_Pauses(restarts), log)
    return 0


@dataclass
class _Pauses:
    """How long to wait before a server is started again."""

    most: int
    in_a_row: int = 0

    def after(self, lived: float, error: Broken) -> float:
        """Seconds to wait; raises `error` where too many servers in a row died young."""
        self.in_a_row = 1 if lived >= LIVED_SECONDS else self.in_a_row + 1
        if self.in_a_row > self.most:
            raise Broken(f"{error}; started {self.most} times in a row, which did not help")
        return min(FIRST_PAUSE * 2.0 ** (self.in_a_row - 1), LONGEST_PAUSE)


class _Supervisor:
    """What keeps a server going, and what is live on it.

    store: what promotions change.
    private: where nobody else writes: Triton reads what was verified, not what lies in the repository by then.
    environment: Triton's.
    ask_trust: whom the trust file names now; None where nobody is asked.
    fixed, ports, ready_file, stop, say, liveness_seconds: as `serve` has them.
    """

    def __init__(
        self,
        store: Store,
        private: Path,
        environment: Environment,
        *,
        ask_trust: Callable[[], Trust] | None,
        fixed: bool,
        ports: dict[str, int],
        ready_file: Path | None,
        stop: threading.Event,
        say: Callable[[str], None],
        liveness_seconds: float,
    ) -> None:
        self._store, self._private, self._environment = store, private, environment
        self._ask_trust, self._fixed, self._ports, self._ready_file = ask_trust, fixed, ports, ready_file
        self._stop, self._say, self._liveness_seconds = stop, say, liveness_seconds
        self._models = Directory(private / "models")  # what Triton reads
        self._trust = ask_trust and ask_trust()
        self._live: dict[str, Promoted] = {}
        self._images: dict[str, npt.NDArray[np.uint8]] = {}  # one of each, to ask whether it lives
        self._seen: dict[str, Mark] = {}  # each model as it was last acted upon
        self._pending: dict[str, tuple[float, str]] = {}  # when to act again, and why it failed
        self._troubles: dict[str, str] = {}  # what was said to be unreadable
        self._next_look = 0.0  # at the repository, on the monotonic clock
        self._up_since: float | None = None
        self._was_up = False

    def begin(self, names: Sequence[str], marks: Mapping[str, Mark]) -> None:
        """Take over what each model serves now; BadInput or a refusal where one cannot be served."""
        self._seen = dict(marks)
        for name in names:
            self._live[name], self._images[name] = self._first(name)

    def keep(self, pauses: _Pauses, log: Path | None) -> None:
        """Servers one after the other until `stop`; Broken where the first does not come up, or too many die young."""
        while not self._stop.is_set():
            self._up_since = None
            try:
                self._serve_once(log)
            except Broken as error:
                if not self._was_up:
                    raise
                lived = 0.0 if self._up_since is None else time.monotonic() - self._up_since
                pause = pauses.after(lived, error)
                self._say(f"{error}; starting it again in {pause:.0f} s")
                self._stop.wait(pause)

    def _first(self, name: str) -> tuple[Promoted, npt.NDArray[np.uint8]]:
        """What a model serves at the start, and an image of its own."""
        try:
            release = adopt(self._store, name, self._trust, self._models)
        except OSError as error:
            where = error.filename or self._store.where(name)
            raise told(error, f"{where}: cannot be copied: {error.strerror}") from None
        return release, known_answers(release)[0][:1]

    def _serve_once(self, log: Path | None) -> None:
        """One life of a server: until `stop`, or Broken."""
        with running(self._environment, self._models.root, self._ports, list(self._live), log, self._fixed) as server:
            deadline = time.monotonic() + STARTUP_SECONDS
            if not all(_comes_up([server], release, self._stop, deadline) for release in self._live.values()):
                return
            if not hide_token(server):
                self._say(
                    "the kernel does not let Triton's arguments be changed: other users here can read its load token"
                )
            with self._announced():
                self._was_up, self._up_since = True, time.monotonic()
                self._watch(server)

    @contextmanager
    def _announced(self) -> Iterator[None]:
        """Say where the server is, and keep it in the ready file for as long as it is there."""
        for release in self._live.values():
            self._note_success(release)
            self._say(f"serving {release.model} version {release.version} (sha256 {release.sha256[:12]})")
        for label, url in self._urls().items():
            self._say(f"{label:>9}  {url}")
        self._write_ready()
        try:
            yield
        finally:
            if self._ready_file is not None:
                with suppress(OSError):  # its storage is away; nobody believes it once this process has ended
                    self._ready_file.unlink(missing_ok=True)

    def _urls(self) -> dict[str, str]:
        return {
            "http": f"http://{HOST}:{self._ports['http']}",
            "grpc": f"{HOST}:{self._ports['grpc']}",
            "metrics": f"http://{HOST}:{self._ports['metrics']}/metrics",
        }

    def _write_ready(self) -> None:
        if self._ready_file is None:
            return
        models = {name: release.version for name, release in self._live.items()}
        try:
            write_ready(self._ready_file, **self._urls(), models=models)
        except OSError as error:
            raise Broken(f"{self._ready_file}: cannot be written: {error.strerror}") from None

    def _watch(self, server: Server) -> None:
        """Until `stop`: follow the repository; Broken when a process ends, or a model answers nobody any more."""
        pulses: dict[str, Pulse] = {}
        with asking() as askers:
            while not self._stop.wait(min(TICK_SECONDS, self._liveness_seconds)):
                server.require_running()
                self._heed_trust()
                if not self._fixed and time.monotonic() >= self._next_look:
                    self._follow(server)
                    self._next_look = time.monotonic() + self._store.poll_seconds - TICK_SECONDS / 2
                for name in self._live:
                    if name not in pulses or pulses[name].image is not self._images[name]:
                        pulses[name] = Pulse(server, name, self._images[name], self._liveness_seconds)
                    pulses[name].look(askers)

    def _heed_trust(self) -> None:
        """Take note of the keys that the trust file names now.

        A live version goes on where no key vouches for it any more: to take it from its users is a decision for the
        person who revoked the key, and the log tells them.
        """
        trust = self._ask_trust and self._ask_trust()
        if trust == self._trust:
            return
        self._trust = trust
        for name, release in self._live.items():
            try:
                verify_release(self._models, name, trust)
            except UNTRUSTED as error:
                reason = str(error).replace(self._models.where(), self._store.where())
                self._say(
                    f"no longer trusted: {reason}; version {release.version} goes on: roll {name} back, or retire it"
                )
        for name in self._seen.keys() - self._live.keys():
            self._pending[name] = 0.0, ""  # may be trusted now

    def _follow(self, server: Server) -> None:
        """Bring the server to what the repository says now, where that has changed."""
        sight = look(self._store)
        troubles = {name: str(error) for name, error in sight.troubles.items()}
        for name, mark in sight.marks.items():
            again, trouble = self._pending.get(name, (math.inf, ""))
            if mark != self._seen.get(name) or time.monotonic() >= again:
                self._pending.pop(name, None)
                if trouble := self._take_over(server, name, mark):
                    self._pending[name] = time.monotonic() + RETRY_SECONDS, trouble
                if name in look(self._store).marks:  # else it went away meanwhile, and is judged when it is back
                    self._seen[name] = mark
                self._renew_ready()
            if trouble:
                troubles[name] = trouble
        for name in sorted(self._live.keys() - sight.marks.keys()):
            if self._retired(name):
                self._let_go(server, name)
                self._renew_ready()
            elif "" not in troubles:
                where = self._store.where(name)
                troubles.setdefault(name, f"{where}: is gone, and the history does not say that it was retired")
        self._tell(troubles)

    def _tell(self, troubles: dict[str, str]) -> None:
        """Say what cannot be read, once, and that it can be read again."""
        if "" in troubles:  # of its models nothing is known then
            troubles = self._troubles | troubles
        for name, trouble in troubles.items():
            if trouble != self._troubles.get(name):
                self._say(f"{trouble}; {self._goes_on(name) if name else 'what is live goes on'}")
        for name in self._troubles.keys() - troubles.keys():
            self._say(f"{self._store.where(name)}: can be read again")
        self._troubles = troubles

    def _retired(self, name: str) -> bool:
        """Only the history ends a model: absence may be a mount's."""
        try:
            return ledger.is_retired(self._store, name)
        except BadInput:
            return False

    def _renew_ready(self) -> None:
        try:
            self._write_ready()
        except Broken as error:  # no reason to end a server
            self._say(str(error))

    def _let_go(self, server: Server, name: str) -> None:
        self._live.pop(name, None)
        self._images.pop(name, None)
        self._seen.pop(name, None)
        shutil.rmtree(self._models.root / name, ignore_errors=True)
        try:
            server.unload(name)
        except AnswerError as error:
            raise Broken(str(error)) from None
        self._say(f"{name} was retired, and is unloaded")

    def _take_over(self, server: Server, name: str, mark: Mark) -> str:
        """Serve what was promoted; or go on with what is live, and bring the repository back to it.

        Returns why what lies there cannot be judged or served now, as in a copy that is still under way, or on a full
        disk; empty where it was.
        """
        try:
            with tempfile.TemporaryDirectory(dir=self._private) as folder:
                try:
                    release = adopt(self._store, name, self._trust, Directory(Path(folder)))
                    image = known_answers(release)[0][:1]
                    ports = claim_ports(http=0, grpc=0, metrics=0)
                except (*UNTRUSTED, Broken) as error:
                    return self._not_adopted(name, mark, error)
                live = self._live.get(name)
                if live is None or (live.version, live.sha256) != (release.version, release.sha256):
                    self._try(server, release, image, ports)
                return ""  # else it is back from a version that never was live
        except OSError as error:
            return self._not_adopted(name, mark, error)

    def _try(self, server: Server, release: Promoted, image: npt.NDArray[np.uint8], ports: dict[str, int]) -> None:
        """Load a version once it was rehearsed, or give it up."""
        try:
            self._rehearse(release, ports, server)
            self._heed_trust()
            verify_release(release.store, release.model, self._trust)  # a key may have been revoked meanwhile
        except (AnswerError, WrongAnswer, Broken, Refused, NotAttested) as error:
            server.require_running()  # where it died meanwhile, that is not the new version's fault
            self._give_up(release, str(error).replace(release.store.where(), self._store.where()))
            return
        if not self._stop.is_set() and not self._overtaken(release):
            self._load(server, release, image)

    def _not_adopted(self, name: str, mark: Mark, error: Exception) -> str:
        """Turn down what is not trusted here, by any promoter; why it is left as it is, where it cannot be judged, or
        is the live version with files that were changed: there is nothing to return to."""
        again = look(self._store).marks.get(name)
        if again is None or again.config != mark.config:
            return ""  # it was changed under our eyes: the next look decides
        live, version = self._live.get(name), mark.version
        if isinstance(error, Refused | NotAttested) and (live is None or live.version != version):
            self._give_up(Promoted(name, version, self._store, ""), str(error))
            return ""
        where = getattr(error, "filename", None) or self._store.where(name)
        return f"{where}: {error.strerror}" if isinstance(error, OSError) else str(error)

    def _rehearse(self, release: Promoted, ports: dict[str, int], live: Server) -> None:
        """Serve a version once with a Triton of its own: a model whose warm-up fails can take its server with it.

        Twice where a signal ends it: Triton's python backend aborts now and then, whatever the model
        (github.com/triton-inference-server/server/issues/8882).
        """
        try:
            self._trial(release, ports, live)
        except Crashed as error:
            live.require_running()
            self._say(f"{release.model} version {release.version}: {error}; tried once more")
            self._trial(release, ports, live)

    def _trial(self, release: Promoted, ports: dict[str, int], live: Server) -> None:
        with running(self._environment, release.path.parents[1], ports, [release.model], None, True) as server:
            _comes_up([server, live], release, self._stop, time.monotonic() + STARTUP_SECONDS)

    def _load(self, server: Server, release: Promoted, image: npt.NDArray[np.uint8]) -> None:
        """Load a version that was rehearsed; where it fails all the same, load the live one again."""
        model, live = self._models.root / release.model, self._live.get(release.model)
        config = model / layout.CONFIG
        before = config.read_bytes() if live is not None else None
        model.mkdir(parents=True, exist_ok=True)
        for old in layout.version_numbers(self._models, release.model):
            if live is None or old != live.version:
                shutil.rmtree(model / str(old))
        shutil.copytree(release.path, model / str(release.version))
        shutil.copy(release.path.parent / layout.CONFIG, staged := config.with_name(f"{STAGING}{config.name}"))
        staged.replace(config)  # whole, because a Triton that is started again reads it
        release = replace(release, store=self._models)
        try:
            server.load(release.model)
            # In a queue behind everybody else: under a flood, patience is not lost at the first deadline.
            if not _comes_up([server], release, self._stop, time.monotonic() + STARTUP_SECONDS):
                return
        except (AnswerError, WrongAnswer, Broken) as error:
            if live is None or before is None:
                shutil.rmtree(model)
            else:
                config.write_bytes(before)
            self._give_up(release, str(error))
            raise Broken(f"{error}; a server that failed to load is not trusted any more") from None
        self._live[release.model], self._images[release.model] = release, image
        self._note_success(release)
        self._say(f"serving {release.model} version {release.version} (sha256 {release.sha256[:12]})")

    def _overtaken(self, release: Promoted) -> bool:
        """Whether the repository says otherwise by now: the next tick decides then. One that is away says nothing."""
        mark = look(self._store).marks.get(release.model)
        return mark is not None and mark.version != release.version

    def _goes_on(self, name: str) -> str:
        return f"version {self._live[name].version} goes on" if name in self._live else "it is not served"

    def _give_up(self, failed: Promoted, reason: str) -> None:
        """Bring the repository back to the version that is live; where none is, write down that it failed."""
        if self._overtaken(failed):
            return
        self._say(f"{reason}; {failed.model} version {failed.version} is given up, {self._goes_on(failed.model)}")
        live = self._live.get(failed.model)
        try:
            if live is None:
                promotion.note_failure(self._store, failed, reason)
            else:
                promotion.give_back(self._store, failed.model, live.version, reason, instead_of=failed.version)
        except (Broken, BadInput) as error:
            self._say(f"{error}: the repository still names version {failed.version}; roll it back")

    def _note_success(self, release: Promoted) -> None:
        """A version that could not be served once is served now: the history must not go on saying that it is not."""
        try:
            promotion.note_success(self._store, release)
        except BadInput:  # the history cannot be read now
            return
        except Broken as error:
            self._say(f"{error}: the history does not say yet that {release.model} version {release.version} is served")


def _comes_up(servers: list[Server], release: Promoted, stop: threading.Event, deadline: float) -> bool:
    """Wait until a model gives the answers that the gate recorded: Triton's own health says ready when it is not.

    servers: the one that is asked, then others that must go on running meanwhile.
    False where `stop` came first. Raises Broken where it does not answer until the deadline; WrongAnswer or Rejected at
    once, where its answer is not the gate's or none at all.
    """
    server = servers[0]
    with server.client(release.model) as client:
        while not stop.is_set():
            for each in servers:
                each.require_running()
            try:
                require_known_answers(client, release)
            except AnswerError as error:
                if error.reason == "bad_output":
                    raise
                if time.monotonic() > deadline:
                    last = last_meaningful_line(server.log)
                    raise Broken(f"Triton did not come up: {error}; its log: {last}") from None
                stop.wait(0.2)
                continue
            return True
    return False


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        # In a thread: the signal may interrupt stop.wait() while that holds the lock which set() needs.
        threading.Thread(target=stop.set).start()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def wait_until_live(client: Client, promoted: Promoted, timeout_seconds: float) -> None:
    """Wait until an endpoint answers with a promoted version as the gate saw it answer.

    Refused where the repository has returned from it meanwhile; Broken at the timeout, with what was missing.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            require_known_answers(client, promoted)
            return
        except (AnswerError, WrongAnswer, BadInput, UnusableStore) as error:
            missing = str(error)
        if reason := _given_up(promoted):
            raise Refused(f"{promoted.model} version {promoted.version} was given up: {reason}")
        if time.monotonic() > deadline:
            raise Broken(f"not live after {timeout_seconds:g} s: {missing}; `dfmcl rollback` returns")
        time.sleep(promoted.store.poll_seconds / 2)  # server and store can only be asked


def _given_up(promoted: Promoted) -> str:
    try:
        return promotion.given_up(promoted.store, promoted)
    except BadInput:  # half a mount; there is time until the deadline
        return ""
