"""Several Tritons behind one gateway: rollouts and deaths that lose no request."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dfmcl.robustness.data import load_dataset
from tests.processes import wait_until
from tests.serving.doors import PRIVILEGED, Door, Relay, encoded, opened, settings
from tests.serving.traffic import Traffic
from tests.serving.workshop import Served, onnx_logits

IMAGE = load_dataset("digits").x_test[0]
PNG = encoded(IMAGE)
EXPECTED = Callable[[], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def expected(candidate: Path) -> dict[str, np.ndarray]:
    """What ONNX Runtime computes, by version."""
    return {"1": onnx_logits(candidate / "model.onnx", IMAGE[None])[0]}


@pytest.fixture
def second(served: Served, tmp_path: Path) -> Iterator[Served]:
    """Another real Triton with the same model, for a test to stop."""
    models = shutil.copytree(served.repository, tmp_path / "models")
    server = Served(models, tmp_path / "ready.json").start()
    yield server
    server.close()


def traffic(door: Door, expected: dict[str, np.ndarray]) -> Traffic:
    """Four clients with a connection each, which ask and compare without a pause."""

    def make() -> Callable[[], tuple[str, np.ndarray]]:
        connection = door.connection()

        def ask() -> tuple[str, np.ndarray]:
            headers = {"X-API-Key": PRIVILEGED, "X-Request-Timeout-Ms": "10000"}
            answer = door.ask("POST", "/v1/classify?logits=true", PNG, headers, connection)
            if answer.status != 200:
                raise AssertionError(answer.body.decode())
            return answer.json["version"], np.asarray(answer.json["logits"])

        return ask

    return Traffic(make, expected)


def answered_by(door: Door, since: int = 0) -> set[str]:
    """The endpoints that computed something, from so many log lines on."""
    return {line["endpoint"] for line in door.lines()[since:] if line["endpoint"]}


def up(door: Door, url: str) -> float:
    return door.metric(f'gateway_endpoint_up{{endpoint="{url}"}}')


def test_stopping_one_of_two_tritons_loses_no_request(
    served: Served, second: Served, expected: dict[str, np.ndarray]
) -> None:
    """As in a rollout: both answer by turns, one gets SIGTERM under load, the other goes on alone."""
    urls = [served.ready["grpc"], second.ready["grpc"]]
    with opened(settings(urls, limits={"max_timeout_ms": 10_000})) as door:
        wait_until(lambda: up(door, urls[1]), seconds=10)
        with traffic(door, expected) as driver:
            driver.flow()
            assert answered_by(door) == set(urls)
            assert second.close() == 0
            driver.flow()
            since = len(door.lines())
            driver.flow()
        assert driver.failures == []
        assert answered_by(door, since) == {urls[0]}
        assert (up(door, urls[0]), up(door, urls[1])) == (1, 0)
        assert door.metric("gateway_resent_total") >= 1
        gone = [line for line in door.lines("endpoint") if line["endpoint"] == urls[1] and not line["up"]]
        assert gone


def test_endpoint_that_comes_back_is_used_again(served: Served, expected: dict[str, np.ndarray]) -> None:
    """Its connections break in the middle of requests, it refuses new ones, and returns: nobody notices."""
    with Relay(served.ready["grpc"]) as relay, opened(settings([served.ready["grpc"], relay.url])) as door:
        wait_until(lambda: up(door, relay.url), seconds=10)
        with traffic(door, expected) as driver:
            for _ in range(3):
                relay.break_off()
                driver.flow()
                wait_until(lambda: not up(door, relay.url), seconds=5)
                relay.mend()
                wait_until(lambda: up(door, relay.url), seconds=5)
                since = len(door.lines())
                driver.flow()
                assert relay.url in answered_by(door, since)
        assert driver.failures == []


def test_request_that_was_under_way_is_sent_again(served: Served) -> None:
    """A server that takes a request and dies with it: the answer comes from the other, within the same deadline."""
    with Relay(served.ready["grpc"]) as relay:
        config = settings([served.ready["grpc"], relay.url], triton={"check_seconds": 60})
        with opened(config) as door:
            wait_until(lambda: up(door, relay.url), seconds=10)
            relay.freeze()
            with ThreadPoolExecutor(2) as clients:
                asked = [clients.submit(door.classify, PNG, X_Request_Timeout_Ms="5000") for _ in range(2)]
                wait_until(lambda: sum(future.done() for future in asked) == 1, seconds=5)  # the other's turn
                time.sleep(0.1)  # time in which it could be asked again
                relay.break_off()
                assert [future.result().status for future in asked] == [200, 200]
            assert door.metric("gateway_resent_total") == 1


def test_second_chance_is_the_only_one_and_keeps_the_deadline(served: Served) -> None:
    """Both gone: 503 at once. One gone, one silent: 504 at the deadline that the request came with."""
    with Relay(served.ready["grpc"]) as first, Relay(served.ready["grpc"]) as other:
        config = settings([first.url, other.url], triton={"check_seconds": 60})
        with opened(config) as door:
            wait_until(lambda: up(door, first.url) and up(door, other.url), seconds=10)
            first.break_off()
            other.freeze()
            begun = time.monotonic()
            answers = [door.classify(PNG, X_Request_Timeout_Ms="400") for _ in range(2)]
            assert {answer.reason for answer in answers} == {"deadline"}
            assert time.monotonic() - begun < 1.2
            other.break_off()
            begun = time.monotonic()
            assert door.classify(PNG, X_Request_Timeout_Ms="5000").reason == "unavailable"
            assert time.monotonic() - begun < 2


def test_dead_port_beside_a_living_triton_costs_nothing(served: Served, expected: dict[str, np.ndarray]) -> None:
    """Configured, but never there: no request goes to it."""
    with Relay("127.0.0.1:9") as dead:
        dead.break_off()
        with opened(settings([dead.url, served.ready["grpc"]])) as door:
            with traffic(door, expected) as driver:
                driver.flow()
            assert driver.failures == []
            assert door.metric("gateway_resent_total") == 0
            assert up(door, dead.url) == 0


def test_silent_endpoint_is_taken_out_by_the_check(
    served: Served, expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It accepts and does not answer: within a check it gets no more requests; when it answers again it does."""
    monkeypatch.setattr("dfmcl.serving.gateway.endpoints.CHECK_DEADLINE_SECONDS", 0.3)
    with Relay(served.ready["grpc"]) as relay, opened(settings([relay.url, served.ready["grpc"]])) as door:
        wait_until(lambda: up(door, relay.url), seconds=10)
        relay.freeze()
        wait_until(lambda: not up(door, relay.url), seconds=5)
        with traffic(door, expected) as driver:
            driver.flow()
        assert driver.failures == []
        relay.thaw()
        wait_until(lambda: up(door, relay.url), seconds=5)


def test_ready_follows_the_last_endpoint(served: Served) -> None:
    """/readyz says no once nobody answers, without a request to find out, and yes again."""
    with Relay(served.ready["grpc"]) as relay, opened(settings([relay.url])) as door:
        relay.break_off()
        wait_until(lambda: door.get("/readyz").status == 503, seconds=5)
        relay.mend()
        wait_until(lambda: door.get("/readyz").status == 200, seconds=5)
        assert door.classify(PNG).status == 200


def test_model_that_is_not_served_is_not_ready(served: Served) -> None:
    """The server is there, the model is not: 503, and the log says why."""
    with opened(settings([served.ready["grpc"]], triton={"model": "nobody"}), ready=False) as door:
        wait_until(lambda: door.lines("endpoint"), seconds=5)
        assert "nobody" in door.lines("endpoint")[0]["why"]
        assert door.get("/readyz").status == 503
        assert door.classify(PNG).reason == "unavailable"


def test_log_can_be_written_by_machines(served: Served) -> None:
    """All entries are JSON, whatever happened."""
    with opened(settings([served.ready["grpc"]])) as door:
        door.classify(PNG)
    assert {entry["event"] for entry in json.loads(json.dumps(door.log))} >= {
        "listening",
        "endpoint",
        "request",
        "stopping",
    }
    assert threading.active_count() < 100
