"""What a gateway tells Prometheus about itself. Labels come from closed sets: outcomes, reasons, configured endpoints.

The canary's requests are counted in metrics of their own: users' latency and errors stay users'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dfmcl.serving.detection.fingerprints import DETECTORS
from dfmcl.serving.gateway.pool import Pool
from dfmcl.serving.gateway.problems import OF_IMAGES, STATUSES

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
        self._errors = _counter(self.registry, "gateway_errors_total", "Requests without an answer", "reason")
        self._images = Counter(
            "gateway_images_total", "Images classified, the canary's left out.", registry=self.registry
        )
        self._unseen = _counter(
            self.registry, "gateway_images_refused_total", "Images of a list without an answer", "reason"
        )
        self._canary = _counter(
            self.registry, "gateway_canary_requests_total", "The canary's classifications", "outcome"
        )
        self._canary_errors = _counter(
            self.registry, "gateway_canary_errors_total", "The canary's classifications without an answer", "reason"
        )
        for outcome in OUTCOMES:  # a series that appears with its first error has no rate before the second
            self._seconds.labels(outcome)
            self._canary.labels(outcome)
        for reason in OF_IMAGES:
            self._unseen.labels(reason)
        for reason in STATUSES:
            self._errors.labels(reason)
            self._canary_errors.labels(reason)
        build = Gauge("gateway_build_info", "This gateway.", ["version"], registry=self.registry)
        build.labels(version).set(1)
        self.registry.register(_PoolCollector(pool, ready))
        ProcessCollector(registry=self.registry)

    def ended(
        self, status: int, reason: str | None, seconds: float, *, images: int, canary: bool, trace: str = ""
    ) -> None:
        """Count a classification. reason: None where there was an answer; trace: its id, "" where it has none."""
        outcome = "ok" if status < 400 else "refused" if status < 500 else "failed"
        if canary:
            self._canary.labels(outcome).inc()
        else:
            self._seconds.labels(outcome).observe(seconds, {"trace_id": trace} if trace else None)
            self._images.inc(images)
        if reason is not None:
            (self._canary_errors if canary else self._errors).labels(reason).inc()

    def unseen(self, reason: str) -> None:
        """Count an image of a list that the model could not be shown, one of OF_IMAGES."""
        self._unseen.labels(reason).inc()

    def refused(self, reason: str) -> None:
        """Count a request that was no classification, or a connection that was closed before there was one."""
        self._errors.labels(reason).inc()

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def exposition_for(self, accept: str) -> tuple[bytes, str]:
        """The same in the format that a scraper asks for by its Accept, and its content type."""
        encoder, kind = choose_encoder(accept)
        return encoder(self.registry), kind


PROBES = ("benign", "attack")
WEBHOOK_OUTCOMES = ("sent", "failed")
# From half of what a 32 x 32 image takes to a webhook that is waited for.
EXAMINATION_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 1.0, 10.0)


class DetectionMetrics:
    """What the detectors of attacks saw: users' images, and the canary's apart, by the kind that it announces."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, labels, registry=registry)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(name, what, registry=registry)

        self.dropped = counter("gateway_detection_dropped_total", "Images not examined, as the queue was full.")
        self.failed = counter("gateway_detection_failures_total", "Images whose examination broke off: a bug.")
        self.webhooks = counter(
            "gateway_detection_webhooks_total", "Campaigns told to the webhook, by outcome.", "outcome"
        )
        self.queue = gauge("gateway_detection_queue", "Images that wait to be examined.")
        self.remembered = gauge("gateway_detection_remembered", "Fingerprints in memory.")
        self.seconds = Histogram(
            "gateway_detection_seconds",
            "Time to examine an image. In seconds.",
            buckets=EXAMINATION_SECONDS,
            registry=registry,
        )
        self._images = counter("gateway_detection_images_total", "Users' images examined.")
        self._repeats = counter(
            "gateway_detection_repeats_total", "Of them those whose very bytes their key had sent before."
        )
        self._matches = counter(
            "gateway_detection_matches_total", "Of them near-duplicates of an earlier one, by detector.", "detector"
        )
        self._campaigns = counter("gateway_detection_campaigns_total", "Campaigns that began, by detector.", "detector")
        self._active = Gauge(
            "gateway_detection_campaigns_active", "Campaigns now, by detector.", ["detector"], registry=registry
        )
        self._canary_images = counter(
            "gateway_detection_canary_images_total", "The canary's images examined, by probe.", "probe"
        )
        self._canary_repeats = counter(
            "gateway_detection_canary_repeats_total", "Of them exact repeats, by probe.", "probe"
        )
        self._canary_matches = counter(
            "gateway_detection_canary_matches_total",
            "Of them near-duplicates, by probe and detector.",
            "probe",
            "detector",
        )
        self._canary_campaigns = counter(
            "gateway_detection_canary_campaigns_total",
            "The canary's campaigns that began, by probe and detector.",
            "probe",
            "detector",
        )
        for outcome in WEBHOOK_OUTCOMES:
            self.webhooks.labels(outcome)
        for probe in PROBES:
            self._canary_images.labels(probe)
            self._canary_repeats.labels(probe)
        for detector in DETECTORS:
            for family in (self._matches, self._campaigns, self._active):
                family.labels(detector)
            for probe in PROBES:
                self._canary_matches.labels(probe, detector)
                self._canary_campaigns.labels(probe, detector)

    def examined(self, probe: str, *, repeat: bool) -> None:
        """Count an image. probe: "" for a user's, else one of PROBES. repeat: its key had sent the same bytes."""
        (self._canary_images.labels(probe) if probe else self._images).inc()
        if repeat:
            (self._canary_repeats.labels(probe) if probe else self._repeats).inc()

    def matched(self, probe: str, detector: str) -> None:
        """Count a near-duplicate."""
        _of(self._matches, self._canary_matches, probe, detector).inc()

    def begun(self, probe: str, detector: str) -> None:
        """Count a campaign."""
        _of(self._campaigns, self._canary_campaigns, probe, detector).inc()
        if not probe:
            self._active.labels(detector).inc()

    def ended(self, probe: str, detector: str) -> None:
        """A campaign is over."""
        if not probe:
            self._active.labels(detector).dec()


def _of(users: Counter, canary: Counter, probe: str, detector: str) -> Counter:
    return canary.labels(probe, detector) if probe else users.labels(detector)


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
        yield GaugeMetricFamily(
            "gateway_images_waiting", "Images that wait for a turn at a Triton, or are there.", value=self._pool.waiting
        )
        yield CounterMetricFamily(
            "gateway_resent_total", "Requests that a Triton did not take and another one got.", value=self._pool.resent
        )


def _counter(registry: CollectorRegistry, name: str, what: str, label: str) -> Counter:
    return Counter(name, f"{what}, by {label}.", [label], registry=registry)
