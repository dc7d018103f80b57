"""Traces, received by a real OTLP receiver: a request from its caller to Triton, a promotion, the sidecar's rounds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from dfmcl.common.errors import BadInput
from dfmcl.common.tracing import operation, tracing
from dfmcl.monitoring.spans import round_spans
from dfmcl.robustness.data import load_dataset
from tests.collector import Collector, collecting
from tests.monitoring.test_watch_metrics import failure, result, skip
from tests.serving.doors import KEY, Relay, encoded, opened, settings
from tests.serving.workshop import ROOT, Served

PNG = encoded(load_dataset("digits").x_test[0])
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{CALLER}-01"
OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        yield collector


def test_a_request_is_one_trace_from_its_caller_to_triton(served: Served, collector: Collector) -> None:
    """The gateway's span is the caller's child, Triton's call the gateway's, and Triton is sent its id; what the span
    says is what the log says. The histogram has the trace as an exemplar, for who asks in OpenMetrics."""
    with Relay(served.ready["grpc"]) as relay, opened(settings([relay.url])) as door:
        answer = door.classify(PNG, key=KEY, traceparent=PARENT)
        refused = door.classify(PNG, key=None)
        exposed = door.get("/metrics", **OPENMETRICS)
        plain = door.get("/metrics")
        passed = bytes(relay.passed)
    (gateway, other) = collector.named("POST /v1/classify")
    (triton,) = collector.named("triton.infer")
    assert (gateway.service, gateway.kind, gateway.trace, gateway.parent) == ("dfmcl-gateway", 2, TRACE, CALLER)
    assert (triton.kind, triton.trace, triton.parent) == (3, TRACE, gateway.id)
    assert gateway.begun <= triton.begun <= triton.begun + triton.seconds <= gateway.begun + gateway.seconds
    assert gateway.about["dfmcl.request_id"] == answer.json["request_id"]
    assert (gateway.about["http.response.status_code"], gateway.about["dfmcl.key"]) == (200, "shop")
    assert (triton.about["dfmcl.version"], triton.about["dfmcl.images"]) == ("1", 1)
    assert other.trace != TRACE
    assert (other.about["dfmcl.reason"], refused.status, other.error) == ("unauthorized", 401, "")
    assert not [span for span in collector.spans if "metrics" in span.name]
    assert f"00-{TRACE}-{triton.id}-01".encode() in passed
    families = {family.name: family for family in text_string_to_metric_families(exposed.body.decode())}
    samples = families["gateway_request_duration_seconds"].samples
    assert {sample.exemplar.labels["trace_id"] for sample in samples if sample.exemplar} >= {TRACE}
    assert TRACE.encode() not in plain.body


def test_what_fails_is_an_error_and_what_is_not_sampled_is_not_sent(
    served: Served, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Triton that is gone; a caller whose trace is not kept; words that are no trace context."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_on")
    with Relay(served.ready["grpc"]) as relay, opened(settings([relay.url])) as door:
        assert door.classify(PNG, key=KEY, traceparent=f"00-{TRACE}-{CALLER}-00").status == 200
        assert door.classify(PNG, key=KEY, traceparent="00-none").status == 200
        relay.break_off()
        assert door.classify(PNG, key=KEY, traceparent=PARENT).status == 503
    garbled, failed = collector.named("POST /v1/classify")
    assert (garbled.trace == TRACE, garbled.parent) == (False, "")
    assert (failed.trace, failed.error) == (TRACE, "unavailable")
    assert {span.error for span in collector.named("triton.infer") if span.trace == TRACE} == {"Unavailable"}


def test_without_a_collector_nothing_happens(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """No context goes to Triton, the text format is as ever, and not even the library is loaded."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    with Relay(served.ready["grpc"]) as relay, opened(settings([relay.url])) as door:
        assert door.classify(PNG, key=KEY, traceparent=PARENT).status == 200
        assert door.get("/metrics", **OPENMETRICS).headers["content-type"].startswith("text/plain; version=0.0.4")
        assert b"traceparent" not in relay.passed
    code = (
        "import sys, dfmcl.serving.gateway.service, dfmcl.common.tracing as t; assert t.tracing('x') is None;"
        " print(*[name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == ""


def test_a_promotion_is_a_span(
    collector: Collector, candidate: Path, evidence: Path, trust_file: Path, tmp_path: Path
) -> None:
    """By the command, part of the pipeline's trace; one that is refused is an error, and a rollback has its own."""
    command: list[str | Path] = [Path(sys.executable).with_name("dfmcl"), "promote", candidate, "--evidence", evidence]
    command += ["--repository", tmp_path / "models", "--name", "digits", "--trust", trust_file]
    environment = os.environ | {"TRACEPARENT": PARENT, "OTEL_SERVICE_NAME": "our-pipeline"}
    subprocess.run(command, check=True, env=environment, capture_output=True, cwd=ROOT)
    (span,) = collector.named("promote")
    assert (span.service, span.trace, span.parent) == ("our-pipeline", TRACE, CALLER)
    assert (span.about["dfmcl.model"], span.about["dfmcl.version"]) == ("digits", 1)
    assert re.fullmatch("[0-9a-f]{64}", span.about["dfmcl.sha256"])
    (tmp_path / "empty").mkdir()
    command[command.index(evidence)] = tmp_path / "empty"
    refused = subprocess.run(command, check=False, env=environment, capture_output=True, cwd=ROOT)
    assert refused.returncode == 1
    assert [one.error for one in collector.named("promote")] == ["", "NotAttested"]


def test_rounds_of_the_sidecar_are_spans(collector: Collector) -> None:
    """Measured, failed and left out, when they were and for as long as they took."""
    with round_spans() as told:
        for outcome in (result(1), failure(2, "timeout"), skip(3), None):
            told(outcome)
    measured, failed, skipped = collector.named("watch.round")
    assert measured.service == "dfmcl-watch"
    assert (measured.begun, round(measured.seconds, 3)) == (1000.0, 3.0)
    assert measured.about["dfmcl.clean_accuracy"] == 0.75
    assert measured.about["dfmcl.worst_case_accuracy"] == 0.25
    assert (failed.error, failed.about["dfmcl.outcome"]) == ("timeout", "failed")
    assert (skipped.about["dfmcl.reason"], skipped.error) == ("budget", "")


def test_a_collector_that_is_away_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was to be done is done, and its end waits for a few seconds at most."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    begun = time.monotonic()
    with operation("dfmcl-test", "work") as told:
        assert told is not None
    assert time.monotonic() - begun < 15


def test_another_protocol_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at the start; no traces would arrive. A switched-off SDK asks for nothing."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(BadInput, match="only http/protobuf"):
        tracing("x")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing("x") is None
