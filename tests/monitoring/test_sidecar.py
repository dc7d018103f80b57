"""The sidecar over real gRPC and real HTTP: it reports, it survives, it stops."""

from __future__ import annotations

import json
import socket
import threading
import urllib.error
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from monitoring.rounds import RoundResult, round_from_json
from monitoring.sidecar import Sidecar, watch
from monitoring.surrogates import MeanLogits
from robustness.errors import BadInput, Broken
from robustness.files import sha256_of

Make = Callable[..., Any]


def figures(text: str, parser: Make = parse) -> dict[str, float]:
    """Samples by name and, where there is one, reason or version."""
    found = {}
    for family in parser(text):
        for sample in family.samples:
            detail = sample.labels.get("reason") or sample.labels.get("attack") or ""
            found[f"{sample.name} {detail}".strip()] = sample.value
    return found


def one_round(config: Any) -> tuple[int, list[str]]:
    lines: list[str] = []
    return watch(config, rounds=1, stop=threading.Event(), log=lines.append), lines


def test_one_round_reports_and_leaves_nothing_behind(endpoint: Any, write_config: Make) -> None:
    """A round against an endpoint that knows the clean digits and no changed one: exit 0, one line with the figures."""
    threads = threading.active_count()
    code, lines = one_round(write_config(endpoint.port))
    assert code == 0
    assert len(lines) == 2
    assert lines[1].startswith("round 1: model digits v1, 8 images, clean 100.0 %, transfer mi-fgsm-2 at 38/255 ")
    assert endpoint.requests == 3
    assert threading.active_count() <= threads + 4  # the endpoint's own workers


def test_a_dead_server_fails_the_one_round(write_config: Make) -> None:
    """Nobody listens: exit 5 and a line that says unavailable."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    code, lines = one_round(write_config(port))
    assert code == 5
    assert lines[1].startswith("round 1: failed (unavailable): model 'digits' at 127.0.0.1:")


def test_a_slow_server_is_a_timeout(endpoint: Any, write_config: Make) -> None:
    """An answer after the deadline is no answer."""
    release = threading.Event()
    endpoint.answer = lambda images: (release.wait(5), np.zeros((len(images), 10), np.float32))[1]
    code, lines = one_round(write_config(endpoint.port, timeout=0.3))
    release.set()
    assert code == 5
    assert lines[1].startswith("round 1: failed (timeout): ")


@pytest.mark.parametrize(
    "answer",
    [
        lambda images: np.full((len(images), 10), np.nan),
        lambda images: np.zeros((len(images), 9)),
        lambda images: np.zeros((len(images) + 1, 10)),
    ],
    ids=["nan", "a class too few", "a row too many"],
)
def test_a_server_that_answers_nonsense_is_bad_output(endpoint: Any, write_config: Make, answer: Make) -> None:
    """What cannot be logits is counted, not measured."""
    endpoint.answer = answer
    code, lines = one_round(write_config(endpoint.port))
    assert code == 5
    assert lines[1].startswith("round 1: failed (bad_output): ")


def test_a_bug_in_a_round_is_counted_as_internal(
    endpoint: Any, write_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a round dies of, the watch goes on and says what it was."""

    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("monitoring.sidecar.run_round", broken)
    code, lines = one_round(write_config(endpoint.port))
    assert code == 5
    assert lines[1].startswith("round 1: failed (internal): ZeroDivisionError: division by zero")


def test_metrics_follow_a_server_that_goes_and_comes_back(
    start_endpoint: Make, write_config: Make, start_watch: Make, until: Make
) -> None:
    """Up, down, up again: /metrics answers all the time, and last_success stands still while the server is away."""
    server = start_endpoint()
    watching = start_watch(write_config(server.port))

    def metric(name: str) -> float:
        return figures(watching.get("/metrics")[0])[name]

    until(lambda: metric("robustness_probe_last_success_timestamp_seconds") > 0)
    assert metric("robustness_target_up") == 1
    assert metric("robustness_clean_accuracy_ratio") == 1
    server.close()
    until(lambda: metric("robustness_target_up") == 0)
    stood, failures = (
        metric("robustness_probe_last_success_timestamp_seconds"),
        metric("robustness_probe_round_failures_total unavailable"),
    )
    until(lambda: metric("robustness_probe_round_failures_total unavailable") >= failures + 3)
    assert metric("robustness_probe_last_success_timestamp_seconds") == stood
    start_endpoint(server.port)
    until(lambda: metric("robustness_target_up") == 1)
    assert metric("robustness_probe_last_success_timestamp_seconds") > stood
    assert watching.close() == 0


def test_a_new_version_replaces_the_old_ones_figures(
    endpoint: Any, write_config: Make, start_watch: Make, until: Make
) -> None:
    """After a promotion the gauges carry the new version's label."""
    watching = start_watch(write_config(endpoint.port))
    until(lambda: 'clean_accuracy_ratio{model="digits",version="1"}' in watching.get("/metrics")[0])
    endpoint.version = "2"
    until(lambda: 'clean_accuracy_ratio{model="digits",version="2"}' in watching.get("/metrics")[0])
    assert 'clean_accuracy_ratio{model="digits",version="1"}' not in watching.get("/metrics")[0]


def test_both_formats_are_negotiated(endpoint: Any, write_config: Make, start_watch: Make, until: Make) -> None:
    """Prometheus gets OpenMetrics when it asks for it, and the text format otherwise; both parse."""
    watching = start_watch(write_config(endpoint.port))
    until(lambda: "robustness_target_up{" in watching.get("/metrics")[0])
    text, kind = watching.get("/metrics")
    assert kind.startswith("text/plain; version=")
    assert figures(text)["robustness_clean_accuracy_ratio"] == 1
    text, kind = watching.get("/metrics", "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    assert figures(text, parse_openmetrics)["robustness_clean_accuracy_ratio"] == 1


def test_the_evidence_stands_beside_the_live_figures(
    endpoint: Any, write_config: Make, start_watch: Make, make_report: Make
) -> None:
    """With evidence, the gate's threshold and measured figures are exported from the start."""
    watching = start_watch(write_config(endpoint.port, evidence=make_report()))
    found = figures(watching.get("/metrics")[0])
    assert found["robustness_gate_threshold_ratio"] == 0.45
    assert found["robustness_gate_accuracy_ratio"] == 0.55


def test_pages_for_humans(endpoint: Any, write_config: Make, start_watch: Make, until: Make) -> None:
    """The page shows target and rounds, /rounds.json holds their records, other paths say where to look."""
    watching = start_watch(write_config(endpoint.port))
    until(lambda: "measured" in watching.get("/")[0])
    page, kind = watching.get("/")
    assert kind == "text/html; charset=utf-8"
    assert f"digits at 127.0.0.1:{endpoint.port}" in page
    assert "clean 100.0 %" in page
    outcome = round_from_json(json.loads(watching.get("/rounds.json")[0])[0])
    assert isinstance(outcome, RoundResult)
    assert outcome.clean.value == 1
    with pytest.raises(urllib.error.HTTPError) as caught:
        watching.get("/admin")
    assert caught.value.code == 404


def test_what_a_server_says_is_escaped_on_the_page(
    endpoint: Any, write_config: Make, start_watch: Make, until: Make
) -> None:
    """A hostile endpoint cannot put markup on the page or into a label."""
    endpoint.version = "<script>alert(1)</script>"
    watching = start_watch(write_config(endpoint.port))
    until(lambda: "failed" in watching.get("/")[0].partition("<h2>")[2])
    assert "&lt;script&gt;" in watching.get("/")[0]
    assert "<script>" not in watching.get("/")[0]
    assert "alert(1)" not in watching.get("/metrics")[0]


class Clock:
    """A clock that stands where it is put."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def test_health_is_that_rounds_begin(write_config: Make) -> None:
    """Healthy up to three intervals and a deadline after the last round began, and no longer."""
    clock = Clock()
    config = write_config(1, interval=10.0, timeout=5.0)
    sidecar = Sidecar(config, None, clock, threading.Event())
    clock.now = 35.0
    assert sidecar.healthy()
    clock.now = 35.1
    assert not sidecar.healthy()


def test_a_running_watch_is_healthy(endpoint: Any, write_config: Make, start_watch: Make) -> None:
    """/-/healthy answers 200 while the loop runs, whether or not the target does."""
    watching = start_watch(write_config(endpoint.port))
    endpoint.close()
    assert watching.get("/-/healthy")[0] == "healthy\n"


@pytest.mark.parametrize("images", [8, 40], ids=["before crafting", "between queries"])
def test_stopping_in_the_middle_publishes_nothing(
    endpoint: Any, write_config: Make, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    """A round that is cut off sends and crafts nothing more, leaves no line, and the watch ends with 0."""
    stop, answer, crafted = threading.Event(), endpoint.answer, []
    monkeypatch.setattr(MeanLogits, "forward", lambda self, x: crafted.append(x))
    endpoint.answer = lambda images: (stop.set(), answer(images))[1]
    lines: list[str] = []
    assert watch(write_config(endpoint.port, images=images), stop=stop, log=lines.append) == 0
    assert endpoint.requests == 1
    assert crafted == []
    assert len(lines) == 1  # where the metrics are; no round


def test_a_stopped_one_shot_is_no_success(endpoint: Any, write_config: Make) -> None:
    """`rounds=1` that was cut off did not do what was asked."""
    stop = threading.Event()
    endpoint.answer = lambda images: (stop.set(), np.zeros((len(images), 10), np.float32))[1]
    assert watch(write_config(endpoint.port), rounds=1, stop=stop, log=lambda line: None) == 5


def test_a_port_in_use_is_one_line(endpoint: Any, write_config: Make) -> None:
    """Exit 5, with the address and what to do, before any round."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(Broken) as caught:
            watch(write_config(endpoint.port, listen=port), stop=threading.Event(), log=lambda line: None)
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{port} (Address already in use); choose another listen.port, or 0 for any"
    )
    assert caught.value.exit_code == 5
    assert endpoint.requests == 0


def test_the_port_is_free_after_the_watch(endpoint: Any, write_config: Make, start_watch: Make) -> None:
    """Nothing listens once `watch` has returned."""
    watching = start_watch(write_config(endpoint.port))
    port = int(watching.url.rpartition(":")[2])
    assert watching.close() == 0
    with closing(socket.socket()) as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_the_served_weights_are_no_surrogate(
    endpoint: Any, write_config: Make, make_report: Make, surrogate: Path
) -> None:
    """Where the evidence names the surrogate's checkpoint, the watch refuses to start: exit 2."""
    evidence = make_report(sha256_of(surrogate / "checkpoint.safetensors"))
    with pytest.raises(BadInput, match="holds the weights that are served"):
        one_round(write_config(endpoint.port, evidence=evidence))


def test_more_images_than_there_are_is_bad_input(endpoint: Any, write_config: Make) -> None:
    """A round cannot draw 451 of 450 images without replacement."""
    with pytest.raises(BadInput, match=r"probe.images is 451; digits has 450 test images"):
        one_round(write_config(endpoint.port, images=451))


def test_rounds_longer_than_the_interval_are_mentioned(endpoint: Any, write_config: Make) -> None:
    """The log says so, as such rounds follow one another without a pause."""
    lines: list[str] = []
    config = write_config(endpoint.port, interval=0.001)
    assert watch(config, rounds=2, stop=threading.Event(), log=lines.append) == 0
    assert lines[2] == "that took longer than probe.interval_seconds; raise it, or lower probe.images"
