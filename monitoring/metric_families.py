"""Metric families of prometheus-client from rows of labels and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from dfmcl.monitoring.journal import Histogram

Labels = Mapping[str, str]


def gauge(name: str, documentation: str, rows: Iterable[tuple[Labels, float]]) -> Metric:
    return filled(GaugeMetricFamily(name, documentation), name, rows)


def counter(name: str, documentation: str, rows: Iterable[tuple[Labels, float]]) -> Metric:
    return filled(CounterMetricFamily(name, documentation), name, rows)


def info(name: str, documentation: str, rows: Iterable[Labels]) -> Metric:
    return filled(InfoMetricFamily(name.removesuffix("_info"), documentation), name, [(labels, 1) for labels in rows])


def histogram(name: str, documentation: str, rows: Iterable[tuple[Labels, Histogram]]) -> Metric:
    family = HistogramMetricFamily(name, documentation, labels=["model", "via"])
    for labels, histogram in rows:
        bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family.add_metric(list(labels.values()), buckets, histogram.sum)
    return family


def filled(family: Metric, sample: str, rows: Iterable[tuple[Labels, float]]) -> Metric:
    for labels, value in rows:
        family.add_sample(sample, dict(labels), value)
    return family
