"""Searches by queries through a real gateway, with real keys, before a gRPC endpoint that knows the digits."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dfmcl.common.errors import BadInput
from dfmcl.monitoring.results import RoundFailure, RoundResult
from dfmcl.monitoring.sidecar import watch
from dfmcl.serving.gateway.api_keys import digest_of
from tests.serving.doors import PLENTY, Door, Relay, opened, settings

Make = Callable[..., Any]
ATTACK, BENIGN, CUSTOMER, POOR = (f"dfmcl_of-{name}" for name in ("the-attacker", "the-harmless", "a-user", "a-miser"))
KEYS = [
    {"name": "attack", "sha256": digest_of(ATTACK), "canary": True, "logits": True, **PLENTY},
    {"name": "benign", "sha256": digest_of(BENIGN), "canary": True, **PLENTY},
    {"name": "customer", "sha256": digest_of(CUSTOMER), **PLENTY},
    {"name": "miser", "sha256": digest_of(POOR), "logits": True, "images_per_second": 0.001, "burst_images": 1},
]


@pytest.fixture
def gateway(endpoint: Any) -> Iterator[Door]:
    """Before the endpoint, in a thread."""
    with opened(settings([f"127.0.0.1:{endpoint.port}"], keys=KEYS)) as door:
        yield door


@pytest.fixture
def through(endpoint: Any, write_config: Make, tmp_path: Path) -> Make:
    """`through(url, key, clean="", **query)`: a watch that searches in every round."""

    def write(url: str, key: str = ATTACK, clean: str = "", **query: Any) -> Any:
        files = {}
        for name, secret in (("key_file", key), ("clean_key_file", clean)):
            if secret:
                files[name] = tmp_path / name
                files[name].write_text(f"{secret}\n")
        search = {"gateway": url, "attack": "square-5", "images": 2, "every": 1, "timeout_seconds": 5.0}
        return write_config(endpoint.port, query=search | files | query)

    return write


def outcomes(config: Any, rounds: int = 1) -> list[str]:
    """The lines of so many rounds by each way, through Triton first."""
    lines: list[str] = []
    watch(config, rounds=rounds, stop=threading.Event(), log=lines.append)
    return [line for line in lines if line.startswith("round")]


def keys_that_asked(door: Door) -> list[str]:
    """Names, in the order of the requests to classify."""
    return [entry["key"] for entry in door.lines() if entry["path"] == "/v1/classify"]


def test_a_search_is_measured_beside_the_direct_round(gateway: Door, through: Make) -> None:
    """Both ways, each with its figures; every perturbed digit becomes another class there."""
    direct, outside = outcomes(through(gateway.url))
    assert direct.startswith("round 1 by triton: model digits v1, 8 images, clean 100.0 %, transfer ")
    assert outside.startswith("round 1 by gateway: model digits v1, 2 images, clean 100.0 %, query square-5 at 38/255 ")
    assert set(keys_that_asked(gateway)) == {"attack"}


def test_harmless_and_attacking_images_come_with_their_own_keys(gateway: Door, through: Make) -> None:
    """Clean ones first with one key, whose holder need not see logits, and the search with the other."""
    outcomes(through(gateway.url, clean=BENIGN))
    keys = keys_that_asked(gateway)
    assert keys[0] == "benign"
    assert set(keys[1:]) == {"attack"}


def test_the_canary_gives_way_and_counts_apart(endpoint: Any, gateway: Door, through: Make) -> None:
    """The gateway knows the key: its requests go behind users', and stand in metrics of their own."""
    outcomes(through(gateway.url, clean=BENIGN))
    asked = len(keys_that_asked(gateway))
    text = gateway.get("/metrics").body.decode()
    counts = re.findall(r"^gateway_canary_requests_total\{[^}]*\} ([0-9.]+)$", text, re.MULTILINE)
    assert sum(map(float, counts)) == asked >= 2
    assert endpoint.priorities.count(2) == asked  # the direct round had no levels to go by


@pytest.mark.parametrize(
    ("key", "attack", "status"),
    [("dfmcl_wrong", "square-5", "401"), (CUSTOMER, "square-5", "403"), ("", "rays-5", "401")],
)
def test_a_key_that_may_not_is_rejected(gateway: Door, through: Make, key: str, attack: str, status: str) -> None:
    """Unknown, without the right to logits, or none at all: the search fails with the gateway's word for it, and the
    direct round is measured."""
    direct, outside = outcomes(through(gateway.url, key, attack=attack))
    assert "clean 100.0 %" in direct
    assert outside.startswith(f"round 1 by gateway: failed (rejected): model 'digits' at {gateway.url}: {status} ")
    assert "dfmcl_" not in outside


def test_labels_are_enough_for_a_search_by_labels(gateway: Door, through: Make) -> None:
    """RayS with the key of any customer."""
    _, outside = outcomes(through(gateway.url, CUSTOMER, attack="rays-5"))
    assert outside.startswith("round 1 by gateway: model digits v1, 2 images, clean 100.0 %, query rays-5 ")


def test_a_search_comes_every_so_many_rounds(gateway: Door, through: Make) -> None:
    """Every third direct round has one after it, with a number of its own."""
    lines = outcomes(through(gateway.url, every=3), 7)
    assert [line.partition(":")[0] for line in lines] == [
        *(f"round {number} by triton" for number in (1, 2, 3)),
        "round 1 by gateway",
        *(f"round {number} by triton" for number in (4, 5, 6)),
        "round 2 by gateway",
        "round 7 by triton",
    ]


def test_a_key_that_may_ask_seldom_is_left_alone(gateway: Door, through: Make) -> None:
    """429 is no room: that way rests for a round, the other goes on."""
    lines = outcomes(through(gateway.url, POOR), 2)
    assert "clean 100.0 %" in lines[0]
    assert lines[1].startswith("round 1 by gateway: failed (queue_full): ")
    assert "clean 100.0 %" in lines[2]
    assert lines[3].startswith("round 2 by gateway: skipped (backpressure): ")


def test_a_gateway_that_is_away_does_not_hide_the_model(
    endpoint: Any, through: Make, start_watch: Make, until: Make
) -> None:
    """Direct rounds are measured all the while; the other way is down until it is back, at once."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    watching = start_watch(through(f"http://127.0.0.1:{port}"))
    until(lambda: watching.metric("probe_round_failures_total gateway unavailable") >= 2)
    assert watching.metric("target_up gateway") == 0
    assert watching.metric("target_up triton") == 1
    assert watching.metric("clean_accuracy_ratio") == 1
    table = settings([f"127.0.0.1:{endpoint.port}"], keys=KEYS, listen={"port": port})
    with opened(table):
        until(lambda: watching.metric("target_up gateway") == 1)
        until(lambda: "robustness_robust_accuracy_ratio square-5" in watching.metrics())
        assert {type(one) for one in watching.rounds() if one.via == "gateway"} == {RoundFailure, RoundResult}
        assert watching.close() == 0


def test_a_gateway_that_freezes_is_a_timeout(gateway: Door, through: Make) -> None:
    """Nothing comes back: the deadline ends the round, and the way is left alone."""
    with Relay(f"127.0.0.1:{gateway.port}") as relay:
        relay.freeze()
        lines = outcomes(through(f"http://{relay.url}", timeout_seconds=0.3), 2)
        relay.thaw()
    assert lines[1].startswith("round 1 by gateway: failed (timeout): ")
    assert lines[3].startswith("round 2 by gateway: skipped (backpressure): ")


def test_a_model_that_is_away_is_a_gateway_without_answers(endpoint: Any, gateway: Door, through: Make) -> None:
    """The gateway answers that nobody answers: both ways are down, for the same reason."""
    config = through(gateway.url)
    endpoint.close()
    direct, outside = outcomes(config)
    assert "failed (unavailable)" in direct
    assert "failed (unavailable)" in outside


def test_the_kill_switch_holds_for_both_ways(gateway: Door, through: Make, tmp_path: Path) -> None:
    """Thrown in the middle of a search: it ends without an opinion, as the next rounds do."""
    switch = tmp_path / "pause"
    config = through(gateway.url)
    config = config.model_copy(update={"probe": config.probe.model_copy(update={"pause_file": str(switch)})})
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if line.startswith("round 1 by triton"):
            switch.touch()

    watch(config, rounds=2, stop=threading.Event(), log=log)
    assert [line.partition(": ")[2][:16] for line in lines if line.startswith("round")][1:] == ["skipped (paused)"] * 3
    assert keys_that_asked(gateway) == []


def test_a_search_has_to_fit_into_the_budget(gateway: Door, through: Make) -> None:
    """Two images, 200 questions about each, and one more: what a round may need at most."""
    config = through(gateway.url, attack="square-200")
    config = config.model_copy(update={"budget": config.budget.model_copy(update={"images": 402})})
    with pytest.raises(BadInput, match=r"budget\.images is 402, a query round may need 403; raise it"):
        outcomes(config)


@pytest.mark.parametrize("content", ["", "\n", "two words", "dfmcl_secret\nand a comment", "dfmcl_s\u00e9cret"])
def test_a_key_file_holds_one_word(gateway: Door, through: Make, tmp_path: Path, content: str) -> None:
    """Anything else would fail each request, with the secret in the message."""
    config = through(gateway.url, "placeholder")
    (tmp_path / "key_file").write_text(content, encoding="utf-8")
    with pytest.raises(BadInput, match=r"key_file: not one word; it should hold an API key") as caught:
        outcomes(config)
    assert "secret" not in str(caught.value)


def test_a_key_file_that_is_not_there_is_named(gateway: Door, through: Make, tmp_path: Path) -> None:
    """With what prints one."""
    config = through(gateway.url, "placeholder")
    (tmp_path / "key_file").unlink()
    with pytest.raises(
        BadInput, match=r"key_file: No such file or directory; it should hold an API key, as `dfmcl apikey"
    ):
        outcomes(config)


def test_a_version_that_changes_between_the_ways_is_two_versions(endpoint: Any, gateway: Door, through: Make) -> None:
    """What the gateway got an answer from is what the figures are about."""
    config = through(gateway.url)
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if line.startswith("round 1 by triton"):
            endpoint.version = "2"

    watch(config, rounds=1, stop=threading.Event(), log=log)
    found = [line for line in lines if line.startswith("round")]
    assert "model digits v1" in found[0]
    assert "model digits v2" in found[1]
