"""A span of each round, where the environment names a collector of traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dfmcl.common.tracing import Tracing, tracing
from dfmcl.monitoring.results import Round, RoundFailure, RoundResult, RoundSkipped


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
    about = {"dfmcl__round": outcome.number, "dfmcl__via": outcome.via, "dfmcl__model": outcome.model}
    if isinstance(outcome, RoundResult):
        traces.past(
            "watch.round",
            outcome.started,
            outcome.seconds,
            dfmcl__outcome="measured",
            dfmcl__version=outcome.version,
            dfmcl__images=len(outcome.correct),
            dfmcl__clean_accuracy=outcome.clean.value,
            dfmcl__worst_case_accuracy=outcome.worst_case.value,
            **about,
        )
    elif isinstance(outcome, RoundFailure):
        traces.past(
            "watch.round", outcome.started, outcome.seconds, outcome.reason, dfmcl__outcome="failed",
            dfmcl__reason=outcome.reason, **about,
        )  # fmt: skip
    elif isinstance(outcome, RoundSkipped):
        traces.past(
            "watch.round", outcome.started, 0.0, dfmcl__outcome="skipped", dfmcl__reason=outcome.reason, **about
        )
