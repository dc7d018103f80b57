"""What a gateway tells Prometheus about itself. Labels come from closed sets: outcomes, reasons, configured endpoints.

The canary's requests are counted in metrics of their own: users' latency and errors stay users'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.endpoints import Pool
from serving.problems import STATUSES

OUTCOMES = ("ok", "refused", "failed")  # 2xx; 4xx, the asker's; 5xx, ours
# From a small image on an idle machine (about 3 ms) to the longest deadline that the configuration may allow.
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0, 600.0)


class Metrics:
    """One gateway's metrics, in a registry of their own."""

    def __init__(self, version: str, pool: Pool, ready: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        self.in_flight = Gauge("gateway_in_flight", "Classifications at work now.", registry=self.registry)
        self._seconds = Histogram(
            "gateway_request_duration_seconds",
            "Time from a request that is whole to its answer, by outcome, the canary's left out. In seconds.",
            ["outcome"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._errors = _counter(self.registry, "gateway_errors", "Classifications without an answer", "reason")
        self._images = Counter("gateway_images", "Images classified, the canary's left out.", registry=self.registry)
        self._canary = _counter(self.registry, "gateway_canary_requests", "The canary's classifications", "outcome")
        self._canary_errors = _counter(
            self.registry, "gateway_canary_errors", "The canary's classifications without an answer", "reason"
        )
        for outcome in OUTCOMES:  # a series that appears with its first error has no rate before the second
            self._seconds.labels(outcome)
            self._canary.labels(outcome)
        for reason in STATUSES:
            self._errors.labels(reason)
            self._canary_errors.labels(reason)
        build = Gauge("gateway_build_info", "This gateway.", ["version"], registry=self.registry)
        build.labels(version).set(1)
        self.registry.register(_PoolCollector(pool, ready))
        ProcessCollector(registry=self.registry)

    def ended(self, status: int, reason: str | None, seconds: float, *, images: int, canary: bool) -> None:
        """Count a classification. reason: None where there was an answer."""
        outcome = "ok" if status < 400 else "refused" if status < 500 else "failed"
        if canary:
            self._canary.labels(outcome).inc()
        else:
            self._seconds.labels(outcome).observe(seconds)
            self._images.inc(images)
        if reason is not None:
            (self._canary_errors if canary else self._errors).labels(reason).inc()

    def cut_off(self, reason: str) -> None:
        """Count a connection that was closed before there was a request."""
        self._errors.labels(reason).inc()

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _PoolCollector(Collector):
    """The endpoints as they are at the moment of the scrape."""

    def __init__(self, pool: Pool, ready: Callable[[], bool]) -> None:
        self._pool, self._ready = pool, ready

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("gateway_ready", "1 if /readyz says so.", value=float(self._ready()))
        up = GaugeMetricFamily("gateway_endpoint_up", "1 if this Triton answers, else 0.", labels=["endpoint"])
        for endpoint in self._pool.endpoints:
            up.add_metric([endpoint.url], float(endpoint.up))
        yield up
        yield CounterMetricFamily(
            "gateway_resent", "Requests that a Triton did not take and another one got.", value=self._pool.resent
        )


def _counter(registry: CollectorRegistry, name: str, what: str, label: str) -> Counter:
    return Counter(name, f"{what}, by {label}.", [label], registry=registry)
