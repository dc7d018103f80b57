"""Traces by OpenTelemetry: W3C trace context in and out, spans by OTLP over HTTP where a collector is named for them.

The environment is OpenTelemetry's own: OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT) turns it on, and the SDK
reads headers, sampler, service name and attributes there as everywhere. Without it nothing is loaded and nothing done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfmcl.common.errors import BadInput

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
TIMEOUTS = ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")
TIMEOUT_SECONDS = (
    3.0  # for a collector that is away, unless the environment says otherwise: nobody waits longer at exit
)
PARENT = "TRACEPARENT"  # of a command, as CI systems hand it on

Value = str | int | float | bool


def traced_to() -> str:
    """The collector that the environment names; "" for none, and where OTEL_SDK_DISABLED says so."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return ""
    return next((url for name in ENDPOINTS if (url := os.environ.get(name, ""))), "")


def tracing(service: str) -> Tracing | None:
    """A service's traces; None where the environment names no collector.

    BadInput where it asks for another protocol than OTLP over HTTP, or where the extra is not installed.
    """
    if not traced_to():
        return None
    asked = next((value for name in PROTOCOLS if (value := os.environ.get(name, ""))), PROTOCOL)
    if asked != PROTOCOL:
        raise BadInput(f"{PROTOCOLS[1]} is {asked!r}: only {PROTOCOL} is spoken; name the collector's port for HTTP")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise BadInput(f"{ENDPOINTS[1]} is set, and {error.name} is not installed; pip install 'dfmcl[otel]'") from None
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    provider = TracerProvider(resource=Resource.create(named))
    timeout = None if any(os.environ.get(name) for name in TIMEOUTS) else TIMEOUT_SECONDS
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=timeout)))
    return Tracing(provider)


@dataclass(frozen=True)
class Told:
    """A span under way. headers: the trace context that the next service is sent; trace: its id, "" unless sampled."""

    span: Span
    context: Context
    headers: Mapping[str, str]
    trace: str

    def note(self, **attributes: Value | None) -> None:
        """Attributes, __ for the dots of their names; None is left out."""
        for name, value in attributes.items():
            if value is not None:
                self.span.set_attribute(name.replace("__", "."), value)

    def fail(self, why: str) -> None:
        """It ended in an error."""
        from opentelemetry.trace import Status, StatusCode

        self.span.set_status(Status(StatusCode.ERROR, why))


class Tracing:
    """Spans of one service. Contexts are handed on, never found: work of one request may be begun by another's."""

    def __init__(self, provider: Any) -> None:
        """provider: OpenTelemetry's TracerProvider, which is this one's to shut down."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._tracer = provider, provider.get_tracer("dfmcl")
        self._propagator = TraceContextTextMapPropagator()

    def extracted(self, headers: Mapping[str, str]) -> Context:
        """The context that a caller has sent; an empty one where it sent none that can be read."""
        from opentelemetry.context import Context

        return self._propagator.extract(headers, context=Context())

    @contextmanager
    def span(self, name: str, kind: str, parent: Context, **attributes: Value | None) -> Iterator[Told]:
        """A span for as long as the block runs, which fails as the block does.

        name: of few different ones; kind: server, client or internal; parent: whose part it is.
        """
        from opentelemetry.trace import SpanKind, set_span_in_context

        span = self._tracer.start_span(name, parent, SpanKind[kind.upper()], record_exception=False)
        context, headers = set_span_in_context(span, parent), dict[str, str]()
        self._propagator.inject(headers, context)
        seen = span.get_span_context()
        told = Told(span, context, headers, f"{seen.trace_id:032x}" if seen.trace_flags.sampled else "")
        told.note(**attributes)
        try:
            yield told
        except BaseException as error:
            told.fail(type(error).__name__)
            raise
        finally:
            span.end()

    def past(
        self, name: str, begun: float, seconds: float, about: Mapping[str, Value | None], *, failed: str = ""
    ) -> None:
        """A span of something that is over. begun: unix seconds; about: attributes; failed: why, "" where it is not."""
        from opentelemetry.context import Context

        start = int(begun * 1e9)
        span = self._tracer.start_span(name, Context(), start_time=start)
        told = Told(span, Context(), {}, "")
        told.note(**about)
        if failed:
            told.fail(failed)
        span.end(start + int(seconds * 1e9))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


@contextmanager
def operation(service: str, name: str, **attributes: Value | None) -> Iterator[Told | None]:
    """One span of a command, part of TRACEPARENT's trace where that is set; None where nothing is traced."""
    traces = tracing(service)
    if traces is None:
        yield None
        return
    try:
        parent = traces.extracted({"traceparent": os.environ.get(PARENT, "")})
        with traces.span(name, "internal", parent, **attributes) as told:
            yield told
    finally:
        traces.close()
