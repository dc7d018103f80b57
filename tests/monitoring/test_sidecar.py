"""The sidecar over real gRPC and real HTTP: it reports, it keeps out of the way, it survives, it goes on, it stops."""

from __future__ import annotations

import json
import re
import resource
import socket
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from dfmcl.common.errors import BadInput, Broken
from dfmcl.common.files import sha256_of
from dfmcl.monitoring.bounds import MONTH_SECONDS, Bounds, limit
from dfmcl.monitoring.budget import Budget
from dfmcl.monitoring.config import WatchConfig
from dfmcl.monitoring.crafting import Pace
from dfmcl.monitoring.preparation import prepare
from dfmcl.monitoring.results import RoundFailure, RoundResult, RoundSkipped, round_from_json
from dfmcl.monitoring.sidecar import Sidecar, watch
from tests.monitoring.clocks import Still
from tests.monitoring.passed import write_report
from tests.monitoring.watching import series
from tests.present import present

Make = Callable[..., Any]
FULL = "inference request exceeds maximum queue size"  # what Triton says
BUSY = (grpc.StatusCode.UNAVAILABLE, FULL)
LONGER = "that took longer than probe.interval_seconds; raise it, or ask for less"
COST = 1 + 8 + 8 * 3  # of a round: version, replay, eight images clean and under two attacks


def some_rounds(config: WatchConfig, count: int = 1) -> tuple[int, list[str]]:
    """Exit code and lines of a watch that ends by itself; without those about a busy machine's pace."""
    lines: list[str] = []
    code = watch(config, rounds=count, stop=threading.Event(), log=lines.append)
    return code, [line for line in lines if line != LONGER]


def idle(config: WatchConfig, clock: Any = time) -> Sidecar:
    """A sidecar that does nothing yet."""
    stop = threading.Event()
    return Sidecar(config, prepare(config), clock, stop, lambda line: None)


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_one_round_reports_and_leaves_nothing_behind(endpoint: Any, write_config: Make) -> None:
    """A round against an endpoint that knows the clean digits and no changed one: exit 0, one line with the figures."""
    threads = threading.active_count()
    code, lines = some_rounds(write_config(endpoint.port))
    assert code == 0
    assert lines[0] == f"watching digits at 127.0.0.1:{endpoint.port} 1 times, no HTTP"
    assert len(lines) == 2
    assert lines[1].startswith(
        "round 1 by triton: model digits v1, 8 images, clean 100.0 %, transfer mi-fgsm-2 at 38/255 "
    )
    assert endpoint.asked == [1] + [4] * 6
    assert threading.active_count() <= threads + 4  # the endpoint's own workers


def test_a_dead_server_fails_the_one_round(write_config: Make) -> None:
    """Nobody listens: exit 5 and a line that says unavailable."""
    code, lines = some_rounds(write_config(free_port()))
    assert code == 5
    assert lines[1].startswith("round 1 by triton: failed (unavailable): model 'digits' at 127.0.0.1:")


def test_an_answer_after_the_deadline_is_a_timeout(endpoint: Any, write_config: Make) -> None:
    """It is no answer."""
    release = threading.Event()
    endpoint.answer = lambda images: (release.wait(5), np.zeros((len(images), 10), np.float32))[1]
    code, lines = some_rounds(write_config(endpoint.port, target={"timeout_seconds": 0.3}))
    release.set()
    assert code == 5
    assert lines[1].startswith("round 1 by triton: failed (timeout): ")


@pytest.mark.parametrize(
    ("status", "text", "reason"),
    [
        (grpc.StatusCode.INTERNAL, "stub process is not healthy", "server_error"),
        (grpc.StatusCode.UNAVAILABLE, FULL, "queue_full"),
        (grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape", "rejected"),
        (grpc.StatusCode.NOT_FOUND, "unknown model: digits", "rejected"),
    ],
    ids=["stub", "queue", "shape", "model"],
)
def test_what_a_server_says_is_understood(
    endpoint: Any, write_config: Make, status: Any, text: str, reason: str
) -> None:
    """Each kind of refusal by its reason."""
    endpoint.refusal = status, text
    code, lines = some_rounds(write_config(endpoint.port))
    assert code == 5
    assert lines[1].startswith(f"round 1 by triton: failed ({reason}): ")


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
    code, lines = some_rounds(write_config(endpoint.port))
    assert code == 5
    assert lines[1].startswith("round 1 by triton: failed (bad_output): ")


def test_a_server_that_always_says_the_same_is_measured(endpoint: Any, write_config: Make) -> None:
    """Constant logits are answers, and bad ones: nobody robust, but a tenth of the digits right."""
    endpoint.answer = lambda images: np.eye(10)[np.zeros(len(images), int)]
    code, lines = some_rounds(write_config(endpoint.port))
    assert code == 0
    result = re.search(r"clean ([0-9.]+) %.*worst case ([0-9.]+) %", lines[1])
    assert result is not None
    assert result[1] == result[2]
    assert float(result[1]) < 50


def test_a_bug_in_a_round_is_counted_as_internal(
    endpoint: Any, write_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a round dies of, the watch goes on and names it."""

    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("dfmcl.monitoring.sidecar.run_round", broken)
    code, lines = some_rounds(write_config(endpoint.port), 2)
    assert code == 5
    assert lines[1].startswith("round 1 by triton: failed (internal): ZeroDivisionError: division by zero")
    assert lines[2].startswith("round 2 by triton: failed (internal)")


def test_a_surrogate_that_dies_is_counted_as_internal(
    endpoint: Any, write_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crafting happens in another thread; the round that waits for it names its error."""

    def broken(*arguments: object, **options: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("dfmcl.monitoring.crafting.craft", broken)
    code, lines = some_rounds(write_config(endpoint.port), 2)
    assert code == 5
    assert lines[1].startswith("round 1 by triton: failed (internal): MemoryError: no room")
    assert "the crafting thread has ended" in lines[2]
    assert endpoint.requests == 0


def test_a_version_that_changes_in_a_round_is_no_result(endpoint: Any, write_config: Make, make_report: Make) -> None:
    """Swapped after two answers: failed, and the next round measures the new one."""
    answer = endpoint.answer

    def swap(images: np.ndarray) -> np.ndarray:
        if endpoint.requests == 3:
            endpoint.version = "2"
        return answer(images)

    endpoint.answer = swap
    _, lines = some_rounds(write_config(endpoint.port), 2)
    assert lines[1].startswith("round 1 by triton: failed (version_changed): version 1 answered first, 2 later")
    assert lines[2].startswith("round 2 by triton: model digits v2, ")


def test_what_does_not_fit_into_the_budget_is_left_out(endpoint: Any, write_config: Make) -> None:
    """One round is paid for; the others wait for the next window, and nothing is asked."""
    config = write_config(endpoint.port, budget={"images": COST, "window_seconds": 3600.0})
    code, lines = some_rounds(config, 3)
    assert code == 5
    assert lines[1].startswith("round 1 by triton: model digits v1")
    used = sum(endpoint.asked)
    expected = f"round 2 by triton: skipped (budget): {used} of {COST} images are used, this round may need {COST}"
    assert lines[2:4] == [expected, expected]
    assert endpoint.requests == 7


def test_a_new_window_pays_for_new_rounds(endpoint: Any, write_config: Make, until: Make, start_watch: Make) -> None:
    """What is left out once is done when the window is over."""
    watching = start_watch(write_config(endpoint.port, budget={"images": COST, "window_seconds": 0.5}))
    until(lambda: watching.metric("probe_rounds_total triton") >= 3)
    found = watching.metrics()
    assert found["robustness_probe_rounds_skipped_total triton budget"] > 0
    assert found["robustness_probe_query_budget"] == COST
    assert found["robustness_probe_query_budget_used"] <= COST


def test_a_budget_below_one_round_is_bad_input(endpoint: Any, write_config: Make) -> None:
    """It would never ask anything."""
    with pytest.raises(BadInput, match=rf"budget\.images is {COST - 1}, a probe round may need {COST}; raise it"):
        some_rounds(write_config(endpoint.port, budget={"images": COST - 1}))


def test_the_kill_switch_stops_rounds_and_lets_them_go_on(
    endpoint: Any, write_config: Make, start_watch: Make, until: Make, tmp_path: Path
) -> None:
    """While the file is there nothing is asked, and the metrics say so; without it rounds go on."""
    switch = tmp_path / "pause"
    switch.touch()
    watching = start_watch(write_config(endpoint.port, probe={"pause_file": switch}))
    until(lambda: watching.metric("probe_rounds_skipped_total triton paused") >= 2)
    assert watching.metric("probe_paused") == 1
    assert endpoint.requests == 0
    assert "robustness_target_up triton" not in watching.metrics()
    switch.unlink()
    until(lambda: watching.metric("probe_rounds_total triton") >= 1)
    assert watching.metric("probe_paused") == 0


def test_the_kill_switch_ends_a_round_that_is_under_way(
    endpoint: Any, write_config: Make, start_watch: Make, until: Make, tmp_path: Path
) -> None:
    """Thrown while the second question is answered: the third is not asked, and the round has no opinion."""
    switch, answer = tmp_path / "pause", endpoint.answer
    endpoint.answer = lambda images: (endpoint.requests == 2 and switch.touch(), answer(images))[1]
    watching = start_watch(write_config(endpoint.port, probe={"pause_file": switch}))
    until(lambda: watching.metric("probe_rounds_skipped_total triton paused") >= 2)
    first = watching.rounds()[0]
    assert isinstance(first, RoundSkipped)
    assert [query.images for query in first.queries] == [1, 4]
    assert endpoint.requests == 2
    assert watching.metric("probe_images_total triton") == 5
    assert watching.metric("probe_query_budget_used") == 5


def test_a_full_queue_is_left_alone(endpoint: Any, write_config: Make) -> None:
    """One round is left out after the first refusal, three after the second; one answer ends it."""
    endpoint.refusal = BUSY
    _, lines = some_rounds(write_config(endpoint.port), 7)
    assert [present(re.search(r"\((\w+)\)", line))[1] for line in lines[1:]] == [
        *("queue_full", "backpressure", "queue_full"),
        *("backpressure", "backpressure", "backpressure", "queue_full"),
    ]
    assert endpoint.requests == 3


def test_rounds_come_back_when_there_is_room(endpoint: Any, write_config: Make, start_watch: Make, until: Make) -> None:
    """A full queue is no outage: up stays, and the next answer resets the pauses."""
    endpoint.refusal = BUSY
    watching = start_watch(write_config(endpoint.port))
    until(lambda: watching.metric("probe_rounds_skipped_total triton backpressure") >= 1)
    assert watching.metric("target_up triton") == 1
    endpoint.refusal = None
    until(lambda: watching.metric("probe_last_success_timestamp_seconds triton") > 0)


def test_a_server_that_becomes_slow_is_left_alone(
    endpoint: Any, write_config: Make, start_watch: Make, until: Make
) -> None:
    """Once its usual latency is known, two answers far above it end a round, and the next one is left out."""
    watching = start_watch(write_config(endpoint.port, abort={"latency_factor": 20.0}, probe={"attacks": ["fgsm"]}))
    until(lambda: watching.metric("probe_rounds_total triton") >= 10)
    answer, release = endpoint.answer, threading.Event()
    endpoint.answer = lambda images: (release.wait(1.5), answer(images))[1]
    until(lambda: watching.metric("probe_round_failures_total triton slow") >= 1)
    release.set()
    until(lambda: watching.metric("probe_rounds_skipped_total triton backpressure") >= 1)
    slow = next(one for one in watching.rounds() if isinstance(one, RoundFailure) and one.reason == "slow")
    assert sum(query.seconds > 1 for query in slow.queries) >= 2
    done = watching.metric("probe_last_success_timestamp_seconds triton")
    until(lambda: watching.metric("probe_last_success_timestamp_seconds triton") > done)


@pytest.mark.parametrize("levels", [0, 2])
def test_users_overtake_where_the_server_lets_them(endpoint: Any, write_config: Make, levels: int) -> None:
    """With priority levels every request asks behind all others; without them none pretends to."""
    endpoint.levels = levels
    sidecar = idle(write_config(endpoint.port))
    assert some_rounds(write_config(endpoint.port))[0] == 0
    assert set(endpoint.priorities) == {levels}
    assert sidecar.snapshot().low_priority is False  # nobody has been asked yet


def test_low_priority_is_exported(endpoint: Any, write_config: Make, start_watch: Make, until: Make) -> None:
    """As a dashboard shows it."""
    endpoint.levels = 2
    watching = start_watch(write_config(endpoint.port))
    until(lambda: watching.metric("probe_rounds_total triton") >= 1)
    assert watching.metric("probe_low_priority") == 1


def test_requests_are_under_way_for_a_share_of_the_time(endpoint: Any, write_config: Make) -> None:
    """With a duty of one fifth a round takes five times what its answers took, less the last one's rest."""
    answer = endpoint.answer
    endpoint.answer = lambda images: (threading.Event().wait(0.05), answer(images))[1]
    lines: list[str] = []
    config = write_config(endpoint.port, budget={"duty": 0.2}, record={"path": "rounds.jsonl"})
    assert watch(config, rounds=1, stop=threading.Event(), log=lines.append) == 0
    [entry] = [json.loads(line) for line in Path(config.record.path).read_text().splitlines()]
    result = round_from_json(entry["round"])
    seconds = [query.seconds for query in result.queries]
    assert min(seconds) >= 0.05
    assert result.seconds >= 5 * sum(seconds[:-1]) + seconds[-1]


def test_metrics_follow_a_server_that_goes_and_comes_back(
    start_endpoint: Make, write_config: Make, start_watch: Make, until: Make
) -> None:
    """Up, down, up again: /metrics answers all the time, and last_success stands still while the server is away."""
    server = start_endpoint()
    watching = start_watch(write_config(server.port))
    until(lambda: watching.metric("probe_last_success_timestamp_seconds triton") > 0)
    assert watching.metric("target_up triton") == 1
    assert watching.metric("clean_accuracy_ratio") == 1
    server.close()
    until(lambda: watching.metric("target_up triton") == 0)
    found = watching.metrics()
    stood, failures = (
        found["robustness_probe_last_success_timestamp_seconds triton"],
        found["robustness_probe_round_failures_total triton unavailable"],
    )
    until(lambda: watching.metric("probe_round_failures_total triton unavailable") >= failures + 3)
    assert watching.metric("probe_last_success_timestamp_seconds triton") == stood
    start_endpoint(server.port)
    until(lambda: watching.metric("target_up triton") == 1)
    assert watching.metric("probe_last_success_timestamp_seconds triton") > stood
    assert watching.close() == 0


def test_two_versions_stand_side_by_side_and_no_more(
    endpoint: Any, write_config: Make, start_watch: Make, until: Make, tmp_path: Path
) -> None:
    """After a promotion both have figures, after the next one the first is gone, with its evidence."""
    watching = start_watch(write_config(endpoint.port, release={"evidence": write_report(tmp_path / "evidence")}))

    def versions(metric: str) -> set[str]:
        return set(re.findall(rf'robustness_{metric}{{[^}}]*version="(\d+)"', watching.get("/metrics")[0]))

    for version, expected in (("1", {"1"}), ("2", {"1", "2"}), ("3", {"2", "3"})):
        endpoint.version = version
        until(lambda expected=expected: versions("clean_accuracy_ratio") == expected)
        assert versions("gate_state") == expected


def test_both_formats_are_negotiated(endpoint: Any, write_config: Make, start_watch: Make, until: Make) -> None:
    """Prometheus gets OpenMetrics when it asks for it, and the text format otherwise; both parse."""
    watching = start_watch(write_config(endpoint.port))
    until(lambda: "robustness_target_up{" in watching.get("/metrics")[0])
    text, kind = watching.get("/metrics")
    assert kind.startswith("text/plain; version=")
    assert series(text)["robustness_clean_accuracy_ratio"] == 1
    more, kind = watching.get("/metrics", "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    names = [
        {sample.name for family in families for sample in family.samples}
        for families in (parse_openmetrics(more), parse(text))
    ]
    assert names[0] == names[1]


def test_the_evidence_stands_beside_the_live_figures(
    endpoint: Any, write_config: Make, start_watch: Make, until: Make, tmp_path: Path
) -> None:
    """Of the version that answers: threshold, measured figures, and that its recorded answers are given."""
    watching = start_watch(write_config(endpoint.port, release={"evidence": write_report(tmp_path / "evidence")}))
    until(lambda: "robustness_target_integrity" in watching.metrics())
    found = watching.metrics()
    assert found["robustness_gate_threshold_ratio"] == 0.45
    assert found["robustness_gate_accuracy_ratio"] == 0.55
    assert found["robustness_gate_state passed"] == 1
    assert found["robustness_target_integrity"] == 1
    assert found["robustness_replay_difference_ratio"] == 0
    assert found["robustness_gate_verified"] == 0  # nobody was named who could
    assert not any(found[f"robustness_loss_proven {reason}"] for reason in ("integrity", "clean", "transfer"))


def test_evidence_shows_without_replay(
    endpoint: Any, write_config: Make, start_watch: Make, until: Make, tmp_path: Path
) -> None:
    """A watch that replays nothing still sees the gate's figures."""
    config = write_config(endpoint.port, probe={"replay": 0}, release={"evidence": write_report(tmp_path / "evidence")})
    watching = start_watch(config)
    until(lambda: "robustness_gate_threshold_ratio" in watching.metrics())
    assert "robustness_target_integrity" not in watching.metrics()


def test_other_bytes_behind_the_endpoint_are_a_proven_loss_and_acted_on(
    endpoint: Any, write_config: Make, start_watch: Make, until: Make, tmp_path: Path
) -> None:
    """A recorded answer that differs: integrity 0, the loss is proven at once, and the command is run once."""
    told = tmp_path / "told"
    command = ["/bin/sh", "-c", f"cat >> {told}; echo >> {told}"]
    evidence = write_report(tmp_path / "evidence", logits=lambda images: np.zeros((len(images), 10), np.float32))
    watching = start_watch(write_config(endpoint.port, release={"evidence": evidence}, mitigation={"command": command}))
    until(lambda: watching.metrics().get("robustness_mitigations_total command ok") == 1)
    assert watching.metric("target_integrity") == 0
    assert watching.metric("loss_proven integrity") == 1
    until(lambda: watching.metric("probe_rounds_total triton") >= 4)
    [line] = told.read_text().splitlines()
    expected = {"event": "robustness_lost", "model": "digits", "version": "1", "reasons": ["integrity"]}
    assert json.loads(line) == expected
    assert watching.metric("mitigations_total command ok") == 1
    said = "robustness of version 1 is lost for certain: integrity; see docs/sre.md"
    assert said in watching.lines


def test_pages_for_humans(endpoint: Any, write_config: Make, start_watch: Make, until: Make) -> None:
    """The page shows target and rounds, /rounds.json holds their records, other paths say where to look."""
    watching = start_watch(write_config(endpoint.port))
    until(lambda: 'class="measured"' in watching.get("/")[0])
    page, kind = watching.get("/")
    assert kind == "text/html; charset=utf-8"
    assert f"digits at 127.0.0.1:{endpoint.port}" in page
    assert "clean 100.0 %" in page
    outcome = watching.rounds()[0]
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
    until(lambda: "failed" in watching.get("/")[0].partition("<h2>Rounds")[2])
    assert "&lt;script&gt;" in watching.get("/")[0]
    assert "<script>" not in watching.get("/")[0]
    assert "alert(1)" not in watching.get("/metrics")[0]


def test_health_is_that_rounds_begin(write_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Healthy up to three intervals and a deadline after the last round began, or while it waits for its images."""
    made = threading.Event()

    def late(*_: Any, **__: Any) -> Iterator[Any]:
        made.wait()
        yield from ()

    monkeypatch.setattr("dfmcl.monitoring.preparation.scenes", late)
    clock = Still()
    sidecar = idle(write_config(1, probe={"interval_seconds": 10.0}), clock)
    clock.now = 35.0
    assert sidecar.healthy()
    clock.now = 35.1
    assert not sidecar.healthy()
    with sidecar.crafter:
        assert sidecar.healthy()
        made.set()
    assert not sidecar.healthy()


def test_a_running_watch_is_healthy(endpoint: Any, write_config: Make, start_watch: Make) -> None:
    """/-/healthy answers 200 while the loop runs, whether or not the target does."""
    watching = start_watch(write_config(endpoint.port))
    endpoint.close()
    assert watching.get("/-/healthy")[0] == "healthy\n"


class Fallen(Still):
    """A wall clock that falls back by a day at every look; the other one is real."""

    def time(self) -> float:
        self.now -= 86_400.0
        return 1_800_000_000.0 + self.now

    def monotonic(self) -> float:
        return time.monotonic()


def test_a_clock_that_falls_back_spoils_nothing(
    endpoint: Any, write_config: Make, start_watch: Make, until: Make, tmp_path: Path
) -> None:
    """Durations stay those that passed, counts and shares those of the rounds, the page is drawn; the record too."""
    config = write_config(
        endpoint.port, record={"path": "rounds.jsonl"}, release={"evidence": write_report(tmp_path / "evidence")}
    )
    watching = start_watch(config, clock=Fallen())
    until(lambda: watching.metric("probe_rounds_total triton") >= 4)
    assert "<svg" in watching.get("/")[0]
    found, rounds = watching.metrics(), watching.rounds()
    assert watching.close() == 0
    assert found["robustness_clean_accuracy_ratio"] == 1
    assert found["robustness_clean_samples_total"] >= 32
    assert 0 < found["robustness_probe_last_round_duration_seconds triton"] < 60
    assert found["robustness_probe_round_duration_seconds_sum triton"] > 0
    assert all(0 <= query.seconds < 60 for one in rounds for query in one.queries)
    assert [one.started for one in rounds] == sorted((one.started for one in rounds), reverse=True)
    assert [outcome.number for _, outcome in present(idle(config)._record).rounds()] == list(
        range(1, len(Path(config.record.path).read_text().splitlines()) + 1)
    )


@pytest.mark.parametrize("spared", [1, 3, 6])
def test_stopping_in_the_middle_publishes_nothing(endpoint: Any, write_config: Make, spared: int) -> None:
    """A round that is cut off sends nothing more, leaves no line and no record, and the watch ends with 0."""
    stop, answer = threading.Event(), endpoint.answer
    endpoint.answer = lambda images: (endpoint.requests == spared and stop.set(), answer(images))[1]
    lines: list[str] = []
    config = write_config(endpoint.port, record={"path": "rounds.jsonl"})
    assert watch(config, stop=stop, log=lines.append) == 0
    assert endpoint.requests == spared
    assert len(lines) == 1  # where the metrics are; no round
    assert not Path(config.record.path).exists()


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
            watch(write_config(endpoint.port, listen={"port": port}), stop=threading.Event(), log=lambda line: None)
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
    with pytest.raises(BadInput, match="is one of the surrogates"):
        some_rounds(write_config(endpoint.port, release={"evidence": evidence}))


def test_a_repository_is_looked_at_before_the_first_round(
    endpoint: Any, write_config: Make, surrogate: Path, tmp_path: Path
) -> None:
    """Surrogates among its versions are refused; a report that cannot be read is no reason not to start."""
    models = tmp_path / "models" / "digits"
    write_report(models / "1")
    write_report(models / "2", format="dfmcl.report/9")
    config = write_config(endpoint.port, release={"repository": tmp_path / "models"})
    assert some_rounds(config)[0] == 0
    write_report(models / "3", sha256_of(surrogate / "checkpoint.safetensors"))
    with pytest.raises(BadInput, match=r"models/digits/3: is one of the surrogates"):
        some_rounds(config)
    with pytest.raises(BadInput, match=r"no such directory; name what `dfmcl promote` writes"):
        some_rounds(write_config(endpoint.port, release={"repository": tmp_path}))


def test_a_surrogate_that_is_promoted_later_fails_the_rounds(
    endpoint: Any, write_config: Make, surrogate: Path, tmp_path: Path, start_watch: Make, until: Make
) -> None:
    """Its figures would not be an outsider's; the watch says so until another version answers."""
    models = tmp_path / "models" / "digits"
    write_report(models / "1")
    watching = start_watch(write_config(endpoint.port, release={"repository": tmp_path / "models"}))
    until(lambda: watching.metric("probe_rounds_total triton") >= 1)
    write_report(models / "2", sha256_of(surrogate / "checkpoint.safetensors"))
    endpoint.version = "2"
    until(lambda: watching.metric("probe_round_failures_total triton rejected") >= 2)
    assert any("version 2: is one of the surrogates" in line for line in watching.lines)
    endpoint.version = "1"
    done = watching.metric("probe_last_success_timestamp_seconds triton")
    until(lambda: watching.metric("probe_last_success_timestamp_seconds triton") > done)


def test_more_images_than_there_are_is_bad_input(endpoint: Any, write_config: Make) -> None:
    """A round cannot draw 451 of 450 images without replacement."""
    with pytest.raises(BadInput, match=r"probe.images is 451; the data have 450 test images"):
        some_rounds(write_config(endpoint.port, probe={"images": 451}))


def test_rounds_longer_than_the_interval_are_mentioned(endpoint: Any, write_config: Make) -> None:
    """The log says so, as such rounds follow one another without a pause."""
    lines: list[str] = []
    config = write_config(endpoint.port, probe={"interval_seconds": 0.001})
    assert watch(config, rounds=2, stop=threading.Event(), log=lines.append) == 0
    assert lines[2] == LONGER


def test_the_limit_is_shared_by_all_bounds(endpoint: Any, write_config: Make) -> None:
    """A month of rounds; two attacks, clean and worst case, each with an upper and a lower bound."""
    sidecar = idle(write_config(endpoint.port, probe={"interval_seconds": 60.0}))
    assert sidecar.journal.limit == limit(MONTH_SECONDS / 60, 8)
    more = {"gateway": "http://127.0.0.1:1", "attack": "rays-10"}
    assert idle(write_config(endpoint.port, query=more)).journal.limit == limit(MONTH_SECONDS / 0.05, 10)


def test_a_restart_goes_on_where_the_record_ends(endpoint: Any, write_config: Make) -> None:
    """Numbers, totals, recent rounds and bounds: as if it had never stopped; no round is drawn again."""
    config = write_config(endpoint.port, record={"path": "rounds.jsonl"}, probe={"images": 4})
    some_rounds(config, 3)
    _, lines = some_rounds(config, 2)
    assert [line.partition(" by")[0] for line in lines[1:]] == ["round 4", "round 5"]
    written = [json.loads(line)["round"] for line in Path(config.record.path).read_text().splitlines()]
    rounds = [round_from_json(entry) for entry in written]
    assert [one.number for one in rounds] == [1, 2, 3, 4, 5]
    sidecar = idle(config)
    assert (sidecar.begun, sidecar.journal.paths["triton"].rounds) == (5, 5)
    assert sidecar.journal.recent == tuple(rounds)
    totals = sidecar.journal.current
    assert totals is not None
    assert totals.samples == 20
    expected = Bounds(sidecar.journal.limit)
    for one in rounds:
        assert isinstance(one, RoundResult)
        expected = expected.after(one.worst_case.k, 4, one.started)
    found = totals.bounds["worst_case"]
    for part in ("limit", "rounds", "start", "lower", "upper", "stretch_upper"):
        assert getattr(found, part) == getattr(expected, part)


@pytest.mark.parametrize(
    "change", [{"probe": {"attacks": ["fgsm"]}}, {"threat": {"eps": "8/255"}}], ids=["attacks", "radius"]
)
def test_figures_of_another_plan_are_not_continued(
    endpoint: Any, write_config: Make, change: dict[str, dict[str, Any]]
) -> None:
    """Numbers go on, so that no image is drawn by a number twice; figures begin anew."""
    some_rounds(write_config(endpoint.port, record={"path": "rounds.jsonl"}), 3)
    sidecar = idle(write_config(endpoint.port, record={"path": "rounds.jsonl"}, **change))
    assert sidecar.begun == 3
    assert sidecar.journal.versions == ()
    assert sidecar.journal.recent == ()


def test_a_disk_that_takes_nothing_does_not_end_the_watch(
    endpoint: Any, write_config: Make, start_watch: Make, until: Make, tmp_path: Path
) -> None:
    """Rounds go on, and what was not written is counted."""
    (tmp_path / "rounds.jsonl").mkdir()
    watching = start_watch(write_config(endpoint.port, record={"path": "rounds.jsonl"}))
    until(lambda: watching.metric("probe_record_failures_total") >= 2)
    assert watching.metric("clean_accuracy_ratio") == 1


def test_images_lie_ready_before_their_round(
    endpoint: Any, write_config: Make, start_watch: Make, until: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds ahead."""
    monkeypatch.setattr("dfmcl.monitoring.preparation.SPREAD_SECONDS", 1.0)  # each would take 21
    watching = start_watch(write_config(endpoint.port, probe={"interval_seconds": 30.0}))
    until(lambda: watching.metric("probe_prepared_rounds") == 2)


@pytest.mark.parametrize(("interval", "seconds"), [(30.0, 21.0), (600.0, 60.0)])
def test_crafting_takes_its_time_unless_somebody_waits(
    endpoint: Any,
    write_config: Make,
    start_watch: Make,
    monkeypatch: pytest.MonkeyPatch,
    interval: float,
    seconds: float,
) -> None:
    """Most of an interval and a minute at most for a watch; who asks for one round gets it at once."""
    paces: list[float] = []
    monkeypatch.setattr(
        "dfmcl.monitoring.preparation.Pace", lambda given, left: paces.append(given) or Pace(given, left)
    )
    config = write_config(endpoint.port, probe={"interval_seconds": interval})
    assert some_rounds(config)[0] == 0
    assert paces == []
    start_watch(config)
    assert paces == [pytest.approx(seconds)]


def test_sixty_rounds_leave_no_more_than_twenty(
    endpoint: Any, write_config: Make, start_watch: Make, until: Make, tmp_path: Path
) -> None:
    """Neither series nor threads nor memory grow with rounds; `make bench-endurance` runs a thousand."""
    config = write_config(
        endpoint.port,
        probe={"interval_seconds": 0.001, "images": 4},
        release={"evidence": write_report(tmp_path / "evidence")},
        record={"path": "rounds.jsonl"},
    )
    watching = start_watch(config)

    def held(rounds: int) -> tuple[int, int, float]:
        until(lambda: watching.metric("probe_rounds_total triton") >= rounds, 60)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(watching.metrics()), threading.active_count(), pages * resource.getpagesize() / 2**20

    (series_20, threads_20, mb_20), (series_60, threads_60, mb_60) = held(20), held(60)
    assert series_60 == series_20
    assert threads_60 <= threads_20 + 4  # requests that are being answered right now
    assert mb_60 < mb_20 + 30


def test_a_budget_of_a_window_is_that_of_the_snapshot(write_config: Make) -> None:
    """A window that is over shows as empty, also while nobody asks."""
    clock = Still()
    sidecar = idle(write_config(1, budget={"images": 100, "window_seconds": 60.0}), clock)
    sidecar._budget = Budget(100, 60.0, used=40)
    assert sidecar.snapshot().budget.used == 40
    clock.now = 60.0
    assert sidecar.snapshot().budget.used == 0
