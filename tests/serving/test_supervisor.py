"""`dfmcl serve` follows the repository: nothing a user asks is lost, and what does not work is given up."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper

from gating.attestation import Trust
from robustness.data import load_dataset
from serving import supervisor
from serving.candidate import FILES, sha256_of
from serving.client import Client
from serving.errors import Broken, Refused, ServingError
from serving.export import export
from serving.ledger import Aliases, aliases, read_history
from serving.promotion import promote, retire, rollback
from serving.supervisor import wait_until_live
from serving.triton import Server, claim_ports
from tests.processes import wait_until
from tests.serving.doors import PRIVILEGED, Door, settings
from tests.serving.traffic import Ask, Traffic
from tests.serving.workshop import Served, onnx_logits, processes_of, write_evidence, write_run
from tests.signing import report_on, write_report

IMAGES = load_dataset("digits").x_test[:8]


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory, key: Path) -> tuple[Path, Path]:
    """A second candidate of the same interface, and its evidence."""
    directory = tmp_path_factory.mktemp("another")
    export(write_run(directory / "run", seed=1), directory / "candidate")
    return directory / "candidate", write_evidence(directory / "evidence", directory / "candidate", key)


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


def asking(url: str) -> Callable[[], Ask]:
    """Clients of Triton itself."""

    def make() -> Ask:
        client = Client(url, "digits", timeout_seconds=10)

        def ask() -> tuple[str, npt.NDArray[np.float32]]:
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
        wait_until_live(client, promote(*another, repository, name="digits", trust=trust), 60)
        traffic.mark("promoted")
        wait_until_live(client, rollback(repository, "digits", trust=trust), 60)
        traffic.mark("rolled back")
        for number, (why, change) in enumerate(BROKEN.items(), start=3):
            made = broken(tmp_path / why, candidate, evidence, key, change)
            failing = promote(made / "candidate", made / "evidence", repository, name="digits", trust=trust)
            assert failing.version == number
            with pytest.raises(Refused, match=f"version {number} was given up"):
                wait_until_live(client, failing, 60)
            traffic.mark(why)
        wait_until_live(client, promote(*another, repository, name="digits", trust=trust), 60)
        traffic.mark("promoted again")
    assert traffic.failures == [], (traffic.marks, server.said)
    assert traffic.answers.keys() == {"1", "2", "6"}, "what failed answered nobody"
    assert aliases(repository)["digits"] == Aliases(champion=6, previous=1)
    returned = [change for change in read_history(repository) if change.event == "returned"]
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
    door = Door(settings([old.ready["grpc"], f"127.0.0.1:{port}"])).start().until_ready()
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
            promote(*another, repository, name="digits", trust=trust)
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
    start, died = supervisor.running, []

    @contextmanager
    def dying(*arguments: Any) -> Iterator[Server]:
        with start(*arguments) as made:
            if len(died) < deaths:
                died.append(made.process.pid)
                os.kill(made.process.pid, signal.SIGABRT)
            yield made

    monkeypatch.setattr(supervisor, "running", dying)
    promoted = promote(*another, repository, name="digits", trust=trust)
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
    """Whoever can write the repository cannot bring in a model; the version that is live goes on."""
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
    failing = promote(made / "candidate", made / "evidence", repository, name="other", trust=trust)
    with Client(server.ready["grpc"], "other") as client, pytest.raises(Refused, match="Triton ended with exit code"):
        wait_until_live(client, failing, 60)
    assert failing.path.is_dir()
    with Client(server.ready["grpc"], "digits") as client:
        assert client.describe().version == "1"


def test_shadows_come_and_go(
    server: Served, repository: Path, another: tuple[Path, Path], trust: Trust, candidate: Path
) -> None:
    """A candidate is served beside the champion, under its own name, until it takes over or is retired."""
    shadow = promote(*another, repository, name="digits", trust=trust, shadow=True)
    with Client(server.ready["grpc"], "digits-shadow") as client:
        wait_until_live(client, shadow, 60)
        answer = client.predict(IMAGES)
        assert np.allclose(answer.logits, onnx_logits(another[0] / "model.onnx", IMAGES), rtol=1e-3, atol=1e-4)
        retire(repository, "digits-shadow")
        wait_until(lambda: json.loads(server.ready_file.read_text())["models"] == {"digits": 1})
        with pytest.raises(ServingError, match="not served there"):
            client.predict(IMAGES)


def test_the_last_of_many_promotions_is_served(
    server: Served, repository: Path, candidate: Path, evidence: Path, another: tuple[Path, Path], trust: Trust
) -> None:
    """Changes that come while one is tried are not lost, and none is given up for another's sake."""
    for _ in range(3):
        promote(*another, repository, name="digits", trust=trust)
        last = promote(candidate, evidence, repository, name="digits", trust=trust)
    with Client(server.ready["grpc"], "digits") as client:
        wait_until_live(client, last, 60)
    assert not any("given up" in line for line in server.said)
    assert {change.event for change in read_history(repository)} == {"promoted"}


def test_a_fixed_server_takes_nothing_later(
    repository: Path, tmp_path: Path, another: tuple[Path, Path], trust: Trust, needs_triton: None
) -> None:
    """Control mode none: a promotion is for the next server."""
    server = Served(repository, tmp_path / "ready.json", fixed=True).start()
    promoted = promote(*another, repository, name="digits", trust=trust)
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
