"""A span of each round, where the environment names a collector of traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dfmcl.common.tracing import Tracing, Value, tracing
from dfmcl.monitoring.results import Round, RoundFailure, RoundResult


@contextmanager
def round_spans() -> Iterator[Callable[[Round | None], None]]:
    """A function that is told each round that ended; it does nothing where nothing is traced."""
    traces = tracing("dfmcl-watch")
    if traces is None:
        yield lambda outcome: None
        return
    try:
        yield lambda outcome: None if outcome is None else _span(traces, outcome)
    finally:
        traces.close()


def _span(traces: Tracing, outcome: Round) -> None:
    about: dict[str, Value | None] = {
        "dfmcl__round": outcome.number,
        "dfmcl__via": outcome.via,
        "dfmcl__model": outcome.model,
    }
    seconds, failed = 0.0, ""
    if isinstance(outcome, RoundResult):
        seconds = outcome.seconds
        about |= {"dfmcl__outcome": "measured", "dfmcl__version": outcome.version}
        about |= {"dfmcl__images": len(outcome.correct), "dfmcl__clean_accuracy": outcome.clean.value}
        about |= {"dfmcl__worst_case_accuracy": outcome.worst_case.value}
    elif isinstance(outcome, RoundFailure):
        seconds, failed = outcome.seconds, outcome.reason
        about |= {"dfmcl__outcome": "failed", "dfmcl__reason": outcome.reason}
    else:
        about |= {"dfmcl__outcome": "skipped", "dfmcl__reason": outcome.reason}
    traces.past("watch.round", outcome.started, seconds, about, failed=failed)
