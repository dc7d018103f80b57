"""`dfmcl serve` follows the repository: nothing a user asks is lost, and what does not work is given up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper

from dfmcl.common.errors import Broken, DfmclError, Refused
from dfmcl.common.files import sha256_of
from dfmcl.gating.signing.attestation import Trust
from dfmcl.gating.signing.trust import follow_trust
from dfmcl.release.candidate import FILES
from dfmcl.release.ledger import Aliases, aliases, read_history
from dfmcl.release.promotion import promote, retire, rollback
from dfmcl.release.status import standings
from dfmcl.release.stores.directory import Directory
from dfmcl.release.verification import Promoted
from dfmcl.robustness.data import load_dataset
from dfmcl.serving.clients.triton import Client
from dfmcl.serving.ready import read_ready
from dfmcl.serving.triton import process as triton
from dfmcl.serving.triton import pulse, supervisor
from dfmcl.serving.triton.process import Server, claim_ports, running
from dfmcl.serving.triton.supervisor import wait_until_live
from tests.exports import Export
from tests.present import present
from tests.processes import wait_until
from tests.serving.doors import PRIVILEGED, Door, settings
from tests.serving.traffic import Ask, Traffic
from tests.serving.workshop import Served, command_of, onnx_logits, processes_of, write_evidence, write_run
from tests.signing import make_key, report_on, write_report, write_trust

IMAGES = load_dataset("digits").x_test[:8]


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory, export_once: Export, key: Path) -> tuple[Path, Path]:
    """A second candidate of the same interface, and its evidence."""
    directory = tmp_path_factory.mktemp("another")
    export_once(write_run(directory / "run", seed=1), directory / "candidate")
    return directory / "candidate", write_evidence(directory / "evidence", directory / "candidate", key)


@pytest.fixture
def bring(
    repository: Path, candidate: Path, evidence: Path, another: tuple[Path, Path], trust: Trust
) -> Callable[..., Promoted]:
    """Promotes "another" candidate, or the "first" one again."""
    pairs = {"first": (candidate, evidence), "another": another}
    return lambda which="another", name="digits": promote(*pairs[which], Directory(repository), name=name, trust=trust)


@pytest.fixture
def server(repository: Path, tmp_path: Path, trust: Trust, needs_triton: None) -> Iterator[Served]:
    """A server of its own for each test, that believes in one key."""
    server = Served(repository, tmp_path / "ready.json", trust=trust, liveness_seconds=0.5, restarts=2).start()
    yield server
    server.close()


def sevenths(graph: onnx.GraphProto) -> None:
    """Seven classes leave the graph where its config says ten."""
    graph.node[-1].output[0] = "all"
    for name, value in {"begin": 0, "end": 7, "axis": 1}.items():
        graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    graph.node.append(helper.make_node("Slice", ["all", "begin", "end", "axis"], ["logits"]))


def one_only(graph: onnx.GraphProto) -> None:
    """Only a batch of one fits, so that the warm-up with 64 fails."""
    for node in graph.node:
        node.input[:] = ["one" if name == "images" else name for name in node.input]
    graph.initializer.append(numpy_helper.from_array(np.array([1, 16, 16, 3]), "shape"))
    graph.node.insert(0, helper.make_node("Reshape", ["images", "shape"], ["one"]))


def slow(graph: onnx.GraphProto) -> None:
    """The same logits after a tenth of a second or so of matrix products, whatever the batch."""
    size = 700
    graph.node[-1].output[0] = "fast"
    for name, value in {"side": np.array([size, size]), "tiny": np.float32(1e-9), "each": np.float32(1 / size)}.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=onnx.TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["floats"], ["brightest"], keepdims=0),
        helper.make_node("Mul", ["brightest", "tiny"], ["hint"]),
        helper.make_node("Add", ["hint", "each"], ["entry"]),  # from the input, as what is constant is computed once
        helper.make_node("Expand", ["entry", "side"], ["product0"]),
        *(helper.make_node("MatMul", [f"product{n}", "product0"], [f"product{n + 1}"]) for n in range(8)),
        helper.make_node("ReduceMax", ["product8"], ["highest"], keepdims=0),
        helper.make_node("Mul", ["highest", "tiny"], ["nothing"]),
        helper.make_node("Add", ["fast", "nothing"], ["logits"]),
    ]
    graph.node.extend(nodes)


def changed(change: Callable[[onnx.GraphProto], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        model = onnx.load(path)
        change(model.graph)
        onnx.save(model, path)

    return write


BROKEN: dict[str, Callable[[Path], object]] = {
    "no ONNX file": lambda path: path.write_bytes(b"no model"),
    "another shape": changed(sevenths),
    "a warm-up that fails": changed(one_only),
}


def broken(directory: Path, candidate: Path, evidence: Path, key: Path, change: Callable[[Path], object]) -> Path:
    """A candidate whose model was changed, and passing evidence for those bytes, as a careless gate might give it."""
    shutil.copytree(candidate, directory / "candidate")
    shutil.copytree(evidence, directory / "evidence")
    change(directory / "candidate" / "model.onnx")
    files = {name: sha256_of(directory / "candidate" / name) for name in FILES}
    manifest = json.loads((directory / "candidate" / "manifest.json").read_text()) | {"files": files}
    (directory / "candidate" / "manifest.json").write_text(json.dumps(manifest))
    write_report(directory / "evidence", report_on(directory / "candidate", directory / "evidence"), key)
    return directory


def asking(url: str, pause: float = 0.01) -> Callable[[], Ask]:
    """Clients of Triton itself. pause: seconds between requests, about as long as an answer takes: of four clients one
    nearly always waits for its answer, and the cores are left to the servers that come and go."""

    def make() -> Ask:
        client = Client(url, "digits", timeout_seconds=10)

        def ask() -> tuple[str, npt.NDArray[np.float32]]:
            time.sleep(pause)
            answer = client.predict(IMAGES)
            return answer.version, answer.logits

        return ask

    return make


def test_no_request_is_lost_through_promotions_and_returns(
    server: Served,
    repository: Path,
    candidate: Path,
    evidence: Path,
    another: tuple[Path, Path],
    tmp_path: Path,
    key: Path,
    trust: Trust,
) -> None:
    """Four clients never stop asking; a promotion, a rollback and three promotions that fail cost none an answer."""
    first, second = onnx_logits(candidate / "model.onnx", IMAGES), onnx_logits(another[0] / "model.onnx", IMAGES)
    url, expected = server.ready["grpc"], {"1": first, "2": second, "6": second}
    with Client(url, "digits") as client, Traffic(asking(url), expected) as traffic:
        wait_until_live(client, promote(*another, Directory(repository), name="digits", trust=trust), 60)
        traffic.mark("promoted")
        wait_until_live(client, rollback(Directory(repository), "digits", trust=trust), 60)
        traffic.mark("rolled back")
        for number, (why, change) in enumerate(BROKEN.items(), start=3):
            made = broken(tmp_path / why, candidate, evidence, key, change)
            failing = promote(made / "candidate", made / "evidence", Directory(repository), name="digits", trust=trust)
            assert failing.version == number
            with pytest.raises(Refused, match=f"version {number} was given up"):
                wait_until_live(client, failing, 60)
            traffic.mark(why)
        wait_until_live(client, promote(*another, Directory(repository), name="digits", trust=trust), 60)
        traffic.mark("promoted again")
    assert traffic.failures == [], (traffic.marks, server.said)
    assert traffic.answers.keys() == {"1", "2", "6"}, "what failed answered nobody"
    assert aliases(Directory(repository))["digits"] == Aliases(champion=6, previous=1)
    returned = [change for change in read_history(Directory(repository)) if change.event == "returned"]
    assert [(change.before, change.version) for change in returned] == [(3, 1), (4, 1), (5, 1)]
    assert all(change.reason for change in returned)
    assert json.loads(server.ready_file.read_text())["models"] == {"digits": 6}


def test_no_request_is_lost_in_a_rollout_between_two_servers(
    repository: Path, candidate: Path, another: tuple[Path, Path], tmp_path: Path, trust: Trust, needs_triton: None
) -> None:
    """Control mode none, as on a cluster: the new server comes up beside the old one, which is then stopped."""
    expected = {"1": onnx_logits(candidate / "model.onnx", IMAGES), "2": onnx_logits(another[0] / "model.onnx", IMAGES)}
    old = Served(repository, tmp_path / "old.json", fixed=True).start()
    port = claim_ports(grpc=0)["grpc"]
    patient = settings([old.ready["grpc"], f"127.0.0.1:{port}"], limits={"timeout_ms": 10_000})
    door = Door(patient).start().until_ready()
    body = {"name": "images", "shape": list(IMAGES.shape), "datatype": "UINT8", "data": IMAGES.ravel().tolist()}
    request = json.dumps({"inputs": [body]})

    def make() -> Ask:
        connection = door.connection()

        def ask() -> tuple[str, npt.NDArray[np.float32]]:
            headers = {"Content-Type": "application/json", "X-API-Key": PRIVILEGED}
            answer = door.ask("POST", "/v1/classify?logits=true", request, headers, connection)
            assert answer.status == 200, answer.body
            logits = [prediction["logits"] for prediction in answer.json["predictions"]]
            return answer.json["version"], np.array(logits, np.float32)

        return ask

    try:
        with Traffic(make, expected) as traffic:
            promote(*another, Directory(repository), name="digits", trust=trust)
            new = Served(repository, tmp_path / "new.json", fixed=True, grpc_port=port).start()
            wait_until(lambda: traffic.answers["2"] > 10)
            traffic.mark("both answer")
            assert old.close() == 0
            before = traffic.answers["1"]
            traffic.mark("the old one is gone")
            assert traffic.answers["1"] == before
    finally:
        door.close()
        assert new.close() == 0
    assert traffic.failures == []
    assert traffic.answers["1"] > 10


@pytest.mark.parametrize("victim", ["tritonserver", "triton_python_backend_stub"])
def test_a_server_that_dies_is_replaced(server: Served, repository: Path, victim: str) -> None:
    """On the same ports, with all that the first one left cleared away; meanwhile the ready file is not there."""
    url, before = server.ready["grpc"], set(processes_of(str(server.private)))
    [process] = [pid for pid in before if victim in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]]
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: not server.ready_file.exists())
    wait_until(server.ready_file.exists)
    with Client(url, "digits") as client:
        assert client.describe().version == "1"
    assert not before & set(processes_of(str(server.private)))
    assert any("starting it again in 1 s" in line for line in server.said)


def stub_of(server: Served) -> int:
    """The process of its python backend; of two, the older one ends in a moment."""

    def stubs() -> list[int]:
        return [pid for pid in processes_of(str(server.private)) if "backend_stub" in command_of(pid).split("\0")[0]]

    wait_until(lambda: len(stubs()) == 1)
    return stubs()[0]


def test_a_backend_that_is_killed_is_noticed_at_once(repository: Path, tmp_path: Path, needs_triton: None) -> None:
    """Without a single question: Triton goes on calling itself ready. It took 18 s; a second is what it takes, and what
    is left of the five is for busy machines."""
    server = Served(repository, tmp_path / "ready.json", liveness_seconds=600, restarts=1).start()
    os.kill(stub_of(server), signal.SIGKILL)
    wait_until(lambda: any("starting it again" in line for line in server.said), seconds=5)
    wait_until(server.ready_file.exists)
    with Client(server.ready["grpc"], "digits") as client:
        assert client.describe().version == "1"
    assert server.close() == 0
    assert "a python backend of Triton's was killed or crashed" in "".join(server.said)


@pytest.mark.parametrize("victim", ["tritonserver", "triton_python_backend_stub"])
def test_a_server_that_hangs_is_replaced(server: Served, victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With requests of users waiting in it, and no answer to anybody."""
    monkeypatch.setattr(triton, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(pulse, "METRICS_SECONDS", 0.5)
    [process] = [pid for pid in processes_of(str(server.private)) if victim in command_of(pid).split("\0")[0]]
    with Traffic(asking(server.ready["grpc"]), {"1": onnx_logits(server.repository / "digits/1/model.onnx", IMAGES)}):
        os.kill(process, signal.SIGSTOP)
        wait_until(lambda: any("3 times in a row, and nobody else was answered" in line for line in server.said))
        wait_until(server.ready_file.exists)
    with Client(server.ready["grpc"], "digits") as client:
        assert client.describe().version == "1"


def test_a_flood_is_no_death(
    tmp_path: Path, candidate: Path, evidence: Path, key: Path, trust: Trust, monkeypatch: pytest.MonkeyPatch,
    needs_triton: None,
) -> None:  # fmt: skip
    """64 clients with full batches and no deadline: our own questions fail one after another, others' are answered."""
    made = broken(tmp_path / "slow", candidate, evidence, key, changed(slow))
    promote(
        made / "candidate", made / "evidence", Directory(tmp_path / "models"), name="digits", trust=trust, threads=1
    )
    server = Served(tmp_path / "models", tmp_path / "ready.json", liveness_seconds=0.2).start()
    monkeypatch.setattr(triton, "ANSWER_SECONDS", 1.0)
    real, failed = pulse.silence, []

    def counted(*arguments: Any) -> Any:
        begun = time.monotonic()
        found = real(*arguments)
        failed.append(time.monotonic() - begun >= triton.ANSWER_SECONDS)
        return found

    monkeypatch.setattr(pulse, "silence", counted)
    images = load_dataset("digits").x_test[:64]
    expected = {"1": onnx_logits(candidate / "model.onnx", images)}

    def patient() -> Ask:
        client = Client(server.ready["grpc"], "digits", timeout_seconds=300)

        def ask() -> tuple[str, npt.NDArray[np.float32]]:
            answer = client.predict(images)
            return answer.version, answer.logits

        return ask

    with Traffic(patient, expected, clients=64) as traffic:
        wait_until(lambda: sum(failed) > 4 or server.outcome)  # three killed it
        assert server.outcome == []
        traffic.flow()
    assert traffic.failures == []
    assert not any("starting it again" in line for line in server.said)
    assert server.close() == 0


def moved(models: Path) -> Callable[[], object]:
    away = models.rename(models.with_name("away"))
    return lambda: away.rename(models)


def become_a_file(models: Path) -> Callable[[], object]:
    back = moved(models)
    models.write_text("no directory")
    return lambda: (models.unlink(), back())


def unmounted(models: Path) -> Callable[[], object]:
    back = moved(models)
    models.mkdir()
    return lambda: (models.rmdir(), back())


def without(*names: str) -> Callable[[Path], Callable[[], object]]:
    """Parts of it have not arrived yet."""

    def take(models: Path) -> Callable[[], object]:
        pairs = [(models / name, models.with_name(f"away-{number}")) for number, name in enumerate(names)]
        for path, away in pairs:
            path.rename(away)
        return lambda: [away.rename(path) for path, away in reversed(pairs)]

    return take


def truncated(models: Path) -> Callable[[], object]:
    """Half of the history, and no config."""
    text = (models / "history.jsonl").read_text()
    (models / "history.jsonl").write_text(text[: len(text) // 2])
    back = without("digits/config.pbtxt")(models)
    return lambda: ((models / "history.jsonl").write_text(text), back())


AWAY: dict[str, Callable[[Path], Callable[[], object]]] = {
    "moved": moved,
    "a file": become_a_file,
    "an empty directory": unmounted,
    "no model": without("digits"),
    "no config": without("digits/config.pbtxt"),
    "no version": without("digits/1"),
    "no evidence": without("digits/1/report.json", "digits/1/attestation.intoto.jsonl"),
    "half a history": truncated,
}


def test_a_repository_that_is_away_ends_nothing(
    server: Served, repository: Path, candidate: Path, another: tuple[Path, Path], trust: Trust
) -> None:
    """However it is away, nobody loses an answer, it is said once, and promotions are followed when it is back. What
    dies meanwhile comes back from the private copy. Retirement alone unloads."""
    url = server.ready["grpc"]
    expected = {"1": onnx_logits(candidate / "model.onnx", IMAGES), "2": onnx_logits(another[0] / "model.onnx", IMAGES)}
    with Client(url, "digits") as client:
        with Traffic(asking(url, pause=0.02), expected, clients=2) as traffic:
            for why, leave in AWAY.items():
                server.said.clear()
                back = leave(repository)
                wait_until(lambda: server.said)
                time.sleep(2 * supervisor.TICK_SECONDS)  # in which it would say it again
                back()
                wait_until(
                    lambda: 2 * sum(line.endswith("can be read again") for line in server.said) == len(server.said)
                )
                assert len(server.said) == len(set(server.said)) <= 4, (why, server.said)
                traffic.mark(why)
            wait_until_live(client, promote(*another, Directory(repository), name="digits", trust=trust), 60)
        assert traffic.failures == [], (traffic.marks, server.said)
        back = moved(repository)
        os.kill(stub_of(server), signal.SIGKILL)
        wait_until(lambda: not server.ready_file.exists())
        wait_until(server.ready_file.exists)
        assert client.describe().version == "2"
        back()
        retire(Directory(repository), "digits")
        wait_until(lambda: present(read_ready(server.ready_file))["models"] == {})
        with pytest.raises(DfmclError, match="not served there"):
            client.predict(IMAGES)


def test_a_revoked_key_lets_nothing_new_in(
    repository: Path, bring: Callable[..., Promoted], tmp_path: Path, key: Path, needs_triton: None
) -> None:
    """A running server heeds the trust file: what is live goes on and it is said, what comes is turned down, with the
    reason for the user who promoted it, and the repository goes back. A file that cannot be read revokes nothing."""
    said: list[str] = []
    file = write_trust(make_key(tmp_path / "keys", "ours"))
    ours = file.read_text()
    shutil.copy(key.with_suffix(".pub"), file.with_name("theirs.pub"))
    both = 'keys = ["ours.pub", "theirs.pub"]\n'
    file.write_text(both)
    server = Served(repository, tmp_path / "ready.json", trust=follow_trust(file, said.append)).start()
    file.write_text(both[:20])
    wait_until(lambda: said)
    with Client(server.ready["grpc"], "digits") as client, Client(server.ready["grpc"], "other") as other:
        wait_until_live(client, bring(), 60)
        file.write_text(ours)
        wait_until(lambda: any("no longer trusted" in line and "version 2 goes on" in line for line in server.said))
        assert len(said) == 2, "once that it cannot be read, once that it can"
        third = bring("first")
        with pytest.raises(Refused, match=r"version 3 was given up: .*0 trusted keys signed"):
            wait_until_live(client, third, 60)
        assert client.describe().version == "2"
        assert aliases(Directory(repository))["digits"] == Aliases(champion=2, previous=1)
        [returned] = [change for change in read_history(Directory(repository)) if change.event == "returned"]
        assert (returned.before, returned.version) == (3, 2)

        first = bring("first", "other")
        with pytest.raises(Refused, match=r"version 1 was given up: .*0 trusted keys signed"):
            wait_until_live(other, first, 60)
        assert aliases(Directory(repository))["other"].champion is None
        [_, row] = standings(Directory(repository))
        assert row.trouble.startswith("version 1 was given up: ")
        file.write_text(both)
        wait_until(lambda: aliases(Directory(repository))["other"].champion == 1)
        wait_until_live(other, first, 60)
    assert sum("no longer trusted" in line for line in server.said) == 1
    assert server.close() == 0


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_crash_of_a_trial_is_not_the_versions_fault(
    server: Served,
    repository: Path,
    another: tuple[Path, Path],
    trust: Trust,
    monkeypatch: pytest.MonkeyPatch,
    deaths: int,
) -> None:
    """Triton's python backend aborts now and then: a version is given up only where it happens twice."""
    died: list[int] = []

    @contextmanager
    def dying(*arguments: Any) -> Iterator[Server]:
        with running(*arguments) as made:
            if len(died) < deaths:
                died.append(made.process.pid)
                os.kill(made.process.pid, signal.SIGABRT)
            yield made

    monkeypatch.setattr(supervisor, "running", dying)
    promoted = promote(*another, Directory(repository), name="digits", trust=trust)
    with Client(server.ready["grpc"], "digits") as client:
        if deaths == 1:
            wait_until_live(client, promoted, 60)
        else:
            with pytest.raises(Refused, match="version 2 was given up: Triton was killed by signal 6"):
                wait_until_live(client, promoted, 60)
    assert len(died) == deaths


def test_a_server_that_cannot_be_kept_alive_is_given_up(repository: Path, tmp_path: Path, needs_triton: None) -> None:
    """Exit code 5, and nothing is left."""
    server = Served(repository, tmp_path / "ready.json", liveness_seconds=0.2, restarts=1).start()
    private = str(server.private)
    for alive in (True, False):
        for process in processes_of(private):
            os.kill(process, signal.SIGKILL)
        wait_until(lambda: not server.ready_file.exists())
        if alive:
            wait_until(server.ready_file.exists)
    error = server.result()
    assert isinstance(error, Broken)
    assert error.exit_code == 5
    assert "started 1 times in a row, which did not help" in str(error)
    assert processes_of(private) == []


def test_what_nobody_trusted_signed_is_not_taken_over(
    server: Served, repository: Path, another: tuple[Path, Path]
) -> None:
    """A writer of the repository cannot bring in a model; the version that is live goes on."""
    version = shutil.copytree(repository / "digits" / "1", repository / "digits" / "2")
    shutil.copy(another[0] / "model.onnx", version)
    config = repository / "digits" / "config.pbtxt"
    config.write_text(config.read_text().replace("[ 1 ]", "[ 2 ]").replace('"1/labels.txt"', '"2/labels.txt"'))
    wait_until(lambda: any("version 1 goes on" in line for line in server.said))
    with Client(server.ready["grpc"], "digits") as client:
        assert client.describe().version == "1"


def test_a_dead_server_comes_back_as_it_was(
    server: Served, repository: Path, another: tuple[Path, Path], candidate: Path
) -> None:
    """With what was live and proven, whatever lies in the repository by then: here no config."""
    version = shutil.copytree(repository / "digits" / "1", repository / "digits" / "2")
    shutil.copy(another[0] / "model.onnx", version)
    (repository / "digits" / "config.pbtxt").write_bytes(b"\xff")
    wait_until(lambda: any("version 1 goes on" in line for line in server.said))
    for process in processes_of(str(server.private)):
        os.kill(process, signal.SIGKILL)
    wait_until(lambda: not server.ready_file.exists())
    wait_until(server.ready_file.exists)
    with Client(server.ready["grpc"], "digits") as client:
        answer = client.predict(IMAGES)
    assert answer.version == "1"
    assert np.allclose(answer.logits, onnx_logits(candidate / "model.onnx", IMAGES), rtol=1e-3, atol=1e-4)


def test_a_first_version_that_cannot_be_served_is_told_and_kept(
    server: Served, repository: Path, candidate: Path, evidence: Path, tmp_path: Path, key: Path, trust: Trust
) -> None:
    """There is nothing to return to: `promote --live` says why, the files stay, the other model goes on."""
    made = broken(tmp_path / "made", candidate, evidence, key, BROKEN["no ONNX file"])
    failing = promote(made / "candidate", made / "evidence", Directory(repository), name="other", trust=trust)
    with Client(server.ready["grpc"], "other") as client, pytest.raises(Refused, match="Triton ended with exit code"):
        wait_until_live(client, failing, 60)
    assert failing.path.is_dir()
    with Client(server.ready["grpc"], "digits") as client:
        assert client.describe().version == "1"


def test_shadows_come_and_go(
    server: Served, repository: Path, another: tuple[Path, Path], trust: Trust, candidate: Path
) -> None:
    """A candidate is served beside the champion, under its own name, until it takes over or is retired."""
    shadow = promote(*another, Directory(repository), name="digits", trust=trust, shadow=True)
    with Client(server.ready["grpc"], "digits-shadow") as client:
        wait_until_live(client, shadow, 60)
        answer = client.predict(IMAGES)
        assert np.allclose(answer.logits, onnx_logits(another[0] / "model.onnx", IMAGES), rtol=1e-3, atol=1e-4)
        retire(Directory(repository), "digits-shadow")
        wait_until(lambda: json.loads(server.ready_file.read_text())["models"] == {"digits": 1})
        with pytest.raises(DfmclError, match="not served there"):
            client.predict(IMAGES)


def test_the_last_of_many_promotions_is_served(
    server: Served, repository: Path, candidate: Path, evidence: Path, another: tuple[Path, Path], trust: Trust
) -> None:
    """Changes that come while one is tried are not lost, and none is given up for another's sake."""
    for _ in range(3):
        promote(*another, Directory(repository), name="digits", trust=trust)
        last = promote(candidate, evidence, Directory(repository), name="digits", trust=trust)
    with Client(server.ready["grpc"], "digits") as client:
        wait_until_live(client, last, 60)
    assert not any("given up" in line for line in server.said)
    assert {change.event for change in read_history(Directory(repository))} == {"promoted"}


def test_a_fixed_server_takes_nothing_later(
    repository: Path, tmp_path: Path, another: tuple[Path, Path], trust: Trust, needs_triton: None
) -> None:
    """Control mode none: a promotion is for the next server."""
    server = Served(repository, tmp_path / "ready.json", fixed=True).start()
    promoted = promote(*another, Directory(repository), name="digits", trust=trust)
    with Client(server.ready["grpc"], "digits") as client:
        with pytest.raises(Broken, match="not live after 2 s"):
            wait_until_live(client, promoted, 2)
        assert client.describe().version == "1"
        with pytest.raises(Exception, match="restricted"):
            client.triton.load_model("digits")
    assert server.close() == 0
    [commands] = [command for command in server.said if command.startswith("serving digits")]
    assert "version 1" in commands


def test_the_token_of_the_load_api_is_hidden(server: Served, repository: Path) -> None:
    """The arguments of a process are readable for everyone; there the token is overwritten."""
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in processes_of("tritonserver")]
    [command] = [text for text in commands if str(server.private) in text]
    assert command.count(f"dfmcl={'*' * 32}") == 2
    with Client(server.ready["grpc"], "digits") as client, pytest.raises(Exception, match="restricted"):
        client.triton.load_model("digits", headers={"triton-grpc-protocol-dfmcl": "*" * 32})
