"""`dfmcl serve`: keeps a Triton answering with what the repository holds, as the gate saw it answer.

Long, as it is one machine of states: each function is a way from one to another.

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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dfmcl.common.errors import AnswerError, BadInput, Broken, Crashed, Refused, WrongAnswer
from dfmcl.gating.signing.attestation import BadEvidence, NotAttested, Trust
from dfmcl.release import layout, ledger, promotion
from dfmcl.release.verification import Promoted, verify_release
from dfmcl.serving.clients.triton import Client
from dfmcl.serving.ready import claim_ready, write_ready
from dfmcl.serving.triton.environment import Environment, find_environment, footprint
from dfmcl.serving.triton.known_answers import known_answers, require_known_answers
from dfmcl.serving.triton.process import HOST, Server, claim_ports, hide_token, last_meaningful_line, running
from dfmcl.serving.triton.pulse import Pulse, asking
from dfmcl.serving.triton.sight import Mark, look

STARTUP_SECONDS = 120.0
TICK_SECONDS = 0.5  # how soon a promotion or a dead process is noticed
RETRY_SECONDS = 5.0  # until what could not be read as a whole is tried again though nothing has changed
LIVENESS_SECONDS = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
RESTARTS = 5  # in a row; a server that lived a minute begins a new row
LIVED_SECONDS = 60.0
UNTRUSTED = (Refused, NotAttested, BadEvidence, BadInput)


def serve(
    repository: Path,
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
    sight = look(repository)
    if repository in sight.troubles:
        raise BadInput(sight.troubles[repository])
    names = layout.model_names(repository)
    if not names:
        raise BadInput(f"{repository}: holds no promoted model; `dfmcl promote` adds one")
    environment = find_environment(triton_python)
    pauses = _Pauses(restarts)
    with ExitStack() as stack:
        private = stack.enter_context(footprint())  # first: what a killed server left may hold the ports
        ports = claim_ports(http=http_port, grpc=grpc_port, metrics=metrics_port)
        stop = stop or stack.enter_context(_stop_on_signals())
        post = _Post(repository, private, environment, trust, fixed, ports, ready_file, stop, say, liveness_seconds)
        post.seen = sight.marks
        for name in names:
            post.live[name], post.images[name] = _first(post, name)
        while not stop.is_set():
            post.up_since = None
            try:
                _serve_once(post, log)
            except Broken as error:
                if not post.was_up:
                    raise
                lived = 0.0 if post.up_since is None else time.monotonic() - post.up_since
                pause = pauses.after(lived, error)
                say(f"{error}; starting it again in {pause:.0f} s")
                stop.wait(pause)
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


@dataclass
class _Post:
    """What the loop around a server was told, and its knowledge of the live versions."""

    repository: Path
    private: Path  # where nobody else writes: Triton reads what was verified, not what lies in the repository by then
    environment: Environment
    ask_trust: Callable[[], Trust] | None
    fixed: bool
    ports: dict[str, int]
    ready_file: Path | None
    stop: threading.Event
    say: Callable[[str], None]
    liveness_seconds: float
    live: dict[str, Promoted] = field(default_factory=dict)
    images: dict[str, npt.NDArray[np.uint8]] = field(default_factory=dict)  # one of each, to ask whether it lives
    seen: dict[str, Mark] = field(default_factory=dict)  # each model as it was last acted upon
    pending: dict[str, tuple[float, str]] = field(default_factory=dict)  # when to act again, and why it failed
    troubles: dict[Path, str] = field(default_factory=dict)  # what was said to be unreadable
    up_since: float | None = None
    was_up: bool = False

    def __post_init__(self) -> None:
        self.trust = self.ask_trust and self.ask_trust()

    @property
    def models(self) -> Path:
        """The repository that Triton reads."""
        return self.private / "models"


def _adopted(post: _Post, name: str, into: Path) -> Promoted:
    """A private copy, below `into`, of what the repository says of a model; verified there, and where it came from."""
    source, target = post.repository / name, into / name
    version = verify_release(post.repository, name, post.trust).version
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / layout.CONFIG, target / layout.CONFIG)
    (target / str(version)).mkdir(exist_ok=True)
    for file in layout.VERSION_FILES:
        shutil.copy(source / str(version) / file, target / str(version) / file)
    return verify_release(into, name, post.trust)


def _first(post: _Post, name: str) -> tuple[Promoted, npt.NDArray[np.uint8]]:
    """What a model serves at the start, and an image of its own."""
    try:
        release = _adopted(post, name, post.models)
    except OSError as error:
        raise BadInput(f"{error.filename or post.repository / name}: cannot be copied: {error.strerror}") from None
    return release, known_answers(release)[0][:1]


def _serve_once(post: _Post, log: Path | None) -> None:
    """One life of a server: until `stop`, or Broken."""
    with running(post.environment, post.models, post.ports, list(post.live), log, post.fixed) as server:
        deadline = time.monotonic() + STARTUP_SECONDS
        if not all(_comes_up([server], release, post.stop, deadline) for release in post.live.values()):
            return
        if not hide_token(server):
            post.say("the kernel does not let Triton's arguments be changed: other users here can read its load token")
        with _announced(post):
            post.was_up, post.up_since = True, time.monotonic()
            _watch(server, post)


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
def _announced(post: _Post) -> Iterator[None]:
    """Say where the server is, and keep it in the ready file for as long as it is there."""
    for release in post.live.values():
        _note_success(post, release)
        post.say(f"serving {release.model} version {release.version} (sha256 {release.sha256[:12]})")
    for label, url in _urls(post).items():
        post.say(f"{label:>9}  {url}")
    _write_ready(post)
    try:
        yield
    finally:
        if post.ready_file is not None:
            with suppress(OSError):  # its storage is away; nobody believes it once this process has ended
                post.ready_file.unlink(missing_ok=True)


def _urls(post: _Post) -> dict[str, str]:
    return {
        "http": f"http://{HOST}:{post.ports['http']}",
        "grpc": f"{HOST}:{post.ports['grpc']}",
        "metrics": f"http://{HOST}:{post.ports['metrics']}/metrics",
    }


def _write_ready(post: _Post) -> None:
    if post.ready_file is None:
        return
    models = {name: release.version for name, release in post.live.items()}
    try:
        write_ready(post.ready_file, **_urls(post), models=models)
    except OSError as error:
        raise Broken(f"{post.ready_file}: cannot be written: {error.strerror}") from None


def _watch(server: Server, post: _Post) -> None:
    """Until `stop`: follow the repository; Broken when a process ends, or a model answers nobody any more."""
    pulses: dict[str, Pulse] = {}
    with asking() as askers:
        while not post.stop.wait(min(TICK_SECONDS, post.liveness_seconds)):
            server.require_running()
            _heed_trust(post)
            if not post.fixed:
                _follow(server, post)
            for name in post.live:
                if name not in pulses or pulses[name].image is not post.images[name]:
                    pulses[name] = Pulse(server, name, post.images[name], post.liveness_seconds)
                pulses[name].look(askers)


def _heed_trust(post: _Post) -> None:
    """Take note of whom the trust file names now. What is live goes on where nobody vouches for it any more: to take
    it from its users is a decision of the person who revoked the key, who is told."""
    trust = post.ask_trust and post.ask_trust()
    if trust == post.trust:
        return
    post.trust = trust
    for name, release in post.live.items():
        try:
            verify_release(post.models, name, trust)
        except UNTRUSTED as error:
            reason = str(error).replace(str(post.models), str(post.repository))
            post.say(f"no longer trusted: {reason}; version {release.version} goes on: roll {name} back, or retire it")
    for name in post.seen.keys() - post.live.keys():
        post.pending[name] = 0.0, ""  # may be trusted now


def _follow(server: Server, post: _Post) -> None:
    """Bring the server to what the repository says now, where that has changed."""
    sight = look(post.repository)
    troubles = dict(sight.troubles)
    for name, mark in sight.marks.items():
        again, trouble = post.pending.get(name, (math.inf, ""))
        if mark != post.seen.get(name) or time.monotonic() >= again:
            post.pending.pop(name, None)
            if trouble := _take_over(server, post, name, mark):
                post.pending[name] = time.monotonic() + RETRY_SECONDS, trouble
            if name in look(post.repository).marks:  # else it went away meanwhile, and is judged when it is back
                post.seen[name] = mark
            _renew_ready(post)
        if trouble:
            troubles[post.repository / name] = trouble
    for name in sorted(post.live.keys() - sight.marks.keys()):
        if _retired(post, name):
            _let_go(server, post, name)
            _renew_ready(post)
        elif post.repository not in troubles:
            where = post.repository / name
            troubles.setdefault(where, f"{where}: is gone, and the history does not say that it was retired")
    _tell(post, troubles)


def _tell(post: _Post, troubles: dict[Path, str]) -> None:
    """Say what cannot be read, once, and that it can be read again."""
    if post.repository in troubles:  # of its models nothing is known then
        troubles = post.troubles | troubles
    for path, trouble in troubles.items():
        if trouble != post.troubles.get(path):
            post.say(f"{trouble}; {_goes_on(post, path.name) if path != post.repository else 'what is live goes on'}")
    for path in post.troubles.keys() - troubles.keys():
        post.say(f"{path}: can be read again")
    post.troubles = troubles


def _retired(post: _Post, name: str) -> bool:
    """Only the history ends a model: absence may be a mount's."""
    try:
        return ledger.is_retired(post.repository, name)
    except BadInput:
        return False


def _renew_ready(post: _Post) -> None:
    try:
        _write_ready(post)
    except Broken as error:  # no reason to end a server
        post.say(str(error))


def _let_go(server: Server, post: _Post, name: str) -> None:
    post.live.pop(name, None)
    post.images.pop(name, None)
    post.seen.pop(name, None)
    shutil.rmtree(post.models / name, ignore_errors=True)
    try:
        server.unload(name)
    except AnswerError as error:
        raise Broken(str(error)) from None
    post.say(f"{name} was retired, and is unloaded")


def _take_over(server: Server, post: _Post, name: str, mark: Mark) -> str:
    """Serve what was promoted; or go on with what is live, and bring the repository back to it.

    Returns why what lies there cannot be judged or served now, as in a copy that is still under way, or on a full disk;
    empty where it was.
    """
    try:
        with tempfile.TemporaryDirectory(dir=post.private) as folder:
            try:
                release = _adopted(post, name, Path(folder))
                image = known_answers(release)[0][:1]
                ports = claim_ports(http=0, grpc=0, metrics=0)
            except (*UNTRUSTED, Broken) as error:
                return _not_adopted(post, name, mark, error)
            live = post.live.get(name)
            if live is None or (live.version, live.sha256) != (release.version, release.sha256):
                _try(server, post, release, image, ports)
            return ""  # else it is back from a version that never was live
    except OSError as error:
        return _not_adopted(post, name, mark, error)


def _try(server: Server, post: _Post, release: Promoted, image: npt.NDArray[np.uint8], ports: dict[str, int]) -> None:
    """Load a version once it was rehearsed, or give it up."""
    folder = release.path.parents[1]
    try:
        _rehearse(post, release, ports, server)
        _heed_trust(post)
        verify_release(folder, release.model, post.trust)  # a key may have been revoked meanwhile
    except (AnswerError, WrongAnswer, Broken, Refused, NotAttested) as error:
        server.require_running()  # where it died meanwhile, that is not the new version's fault
        _give_up(post, release, str(error).replace(str(folder), str(post.repository)))
        return
    if not post.stop.is_set() and not _overtaken(post, release):
        _load(server, post, release, image)


def _not_adopted(post: _Post, name: str, mark: Mark, error: Exception) -> str:
    """Turn down what is not trusted here, by any promoter; why it is left as it is, where it cannot be judged, or
    is the live version with files that were changed: there is nothing to return to."""
    again = look(post.repository).marks.get(name)
    if again is None or again.config != mark.config:
        return ""  # it was changed under our eyes: the next look decides
    live, version = post.live.get(name), mark.version
    if isinstance(error, Refused | NotAttested) and (live is None or live.version != version):
        _give_up(post, Promoted(name, version, post.repository / name / str(version), ""), str(error))
        return ""
    where = getattr(error, "filename", None) or post.repository / name
    return f"{where}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _rehearse(post: _Post, release: Promoted, ports: dict[str, int], live: Server) -> None:
    """Serve a version once with a Triton of its own: a model whose warm-up fails can take its server with it.

    Twice where a signal ends it: Triton's python backend aborts now and then, whatever the model
    (github.com/triton-inference-server/server/issues/8882).
    """
    try:
        _trial(post, release, ports, live)
    except Crashed as error:
        live.require_running()
        post.say(f"{release.model} version {release.version}: {error}; tried once more")
        _trial(post, release, ports, live)


def _trial(post: _Post, release: Promoted, ports: dict[str, int], live: Server) -> None:
    with running(post.environment, release.path.parents[1], ports, [release.model], None, True) as server:
        _comes_up([server, live], release, post.stop, time.monotonic() + STARTUP_SECONDS)


def _load(server: Server, post: _Post, release: Promoted, image: npt.NDArray[np.uint8]) -> None:
    """Load a version that was rehearsed; where it fails all the same, load the live one again."""
    model, live = post.models / release.model, post.live.get(release.model)
    config = model / layout.CONFIG
    before = config.read_bytes() if live is not None else None
    model.mkdir(parents=True, exist_ok=True)
    for old in layout.version_numbers(model):
        if live is None or old != live.version:
            shutil.rmtree(model / str(old))
    shutil.copytree(release.path, model / str(release.version))
    shutil.copy(release.path.parent / layout.CONFIG, staged := config.with_name(f"{layout.STAGING}{config.name}"))
    staged.replace(config)  # whole, as a Triton that is started again reads it
    release = replace(release, path=model / str(release.version))
    try:
        server.load(release.model)
        # In a queue behind everybody else: under a flood, patience is not lost at the first deadline.
        if not _comes_up([server], release, post.stop, time.monotonic() + STARTUP_SECONDS):
            return
    except (AnswerError, WrongAnswer, Broken) as error:
        if live is None or before is None:
            shutil.rmtree(model)
        else:
            config.write_bytes(before)
        _give_up(post, release, str(error))
        raise Broken(f"{error}; a server that failed to load is not trusted any more") from None
    post.live[release.model], post.images[release.model] = release, image
    _note_success(post, release)
    post.say(f"serving {release.model} version {release.version} (sha256 {release.sha256[:12]})")


def _overtaken(post: _Post, release: Promoted) -> bool:
    """Whether the repository says otherwise by now: then the next tick decides. Where it is away, it says nothing."""
    mark = look(post.repository).marks.get(release.model)
    return mark is not None and mark.version != release.version


def _goes_on(post: _Post, name: str) -> str:
    return f"version {post.live[name].version} goes on" if name in post.live else "it is not served"


def _give_up(post: _Post, failed: Promoted, reason: str) -> None:
    """Bring the repository back to the version that is live; where none is, write down that it failed."""
    if _overtaken(post, failed):
        return
    post.say(f"{reason}; {failed.model} version {failed.version} is given up, {_goes_on(post, failed.model)}")
    live = post.live.get(failed.model)
    try:
        if live is None:
            promotion.note_failure(post.repository, failed, reason)
        else:
            promotion.give_back(post.repository, failed.model, live.version, reason, instead_of=failed.version)
    except (Broken, BadInput) as error:
        post.say(f"{error}: the repository still names version {failed.version}; roll it back")


def _note_success(post: _Post, release: Promoted) -> None:
    """A version that could not be served once is served now: the history must not go on saying that it is not."""
    try:
        promotion.note_success(post.repository, release)
    except BadInput:  # the history cannot be read now
        return
    except Broken as error:
        post.say(f"{error}: the history does not say yet that {release.model} version {release.version} is served")


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
    repository, deadline = promoted.path.parents[1], time.monotonic() + timeout_seconds
    while True:
        try:
            require_known_answers(client, promoted)
            return
        except (AnswerError, WrongAnswer, BadInput) as error:
            missing = str(error)
        if reason := _given_up(repository, promoted):
            raise Refused(f"{promoted.model} version {promoted.version} was given up: {reason}")
        if time.monotonic() > deadline:
            raise Broken(f"not live after {timeout_seconds:g} s: {missing}; `dfmcl rollback` returns")
        time.sleep(0.2)  # the server there can only be asked


def _given_up(repository: Path, promoted: Promoted) -> str:
    try:
        return promotion.given_up(repository, promoted)
    except BadInput:  # half a mount; there is time until the deadline
        return ""
