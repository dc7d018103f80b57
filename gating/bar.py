"""A running gate on a terminal: images, bounds, time left. Elsewhere a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from dfmcl.common.progress import Track, silent
from dfmcl.gating.sequence import Progress, unwatched

T = TypeVar("T")
PAUSE = 10.0  # seconds between lines that nobody watches


@contextmanager
def bar(*, shown: bool = True) -> Iterator[tuple[Track, Callable[[Progress], None]]]:
    """What `gate` takes as `track` and `watch`, on standard error; silent where it is not to be shown."""
    if not shown:
        yield silent, unwatched
        return
    with _on_terminal() if sys.stderr.isatty() else _as_lines(time.monotonic) as both:
        yield both


def described(progress: Progress) -> str:
    """`96 of about 140 images, 2:31, about 1:09 left; robust_accuracy >= 0.3 at 95 %: 42.7 % [33.1, 52.9]`."""
    words = f"{progress.images} of about {progress.expected} images"
    if progress.images:
        left = (progress.expected - progress.images) * progress.seconds / progress.images
        words += f", {clock(progress.seconds)}, about {clock(left)} left"
    return f"{words}; {bounds(progress)}"


def bounds(progress: Progress) -> str:
    """The claim that is waited for: the first that is open, a robust one before others."""
    wanted = [judgement for judgement in progress.judgements if judgement.outcome == "open"] or progress.judgements
    judgement = min(wanted, key=lambda judgement: not judgement.criterion.robust)
    share = f"{100 * judgement.share.value:.1f} % " if judgement.share.n else ""
    return f"{judgement.claim}: {share}[{100 * judgement.lower:.1f}, {100 * judgement.upper:.1f}]"


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@contextmanager
def _on_terminal() -> Iterator[tuple[Track, Callable[[Progress], None]]]:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (SpinnerColumn(), TextColumn("{task.fields[attack]:24}"), BarColumn(), TextColumn("{task.description}"))
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("reading the data", total=None, attack="")

        def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
            bars.update(task, attack=label)
            yield from items

        def watch(progress: Progress) -> None:
            bars.update(task, description=described(progress), completed=progress.images, total=progress.expected)

        yield track, watch


@contextmanager
def _as_lines(now: Callable[[], float]) -> Iterator[tuple[Track, Callable[[Progress], None]]]:
    printed, standing = now(), ""

    def tell(line: str) -> None:
        nonlocal printed
        if now() - printed > PAUSE:
            print(f"gate: {line}", file=sys.stderr, flush=True)
            printed = now()

    def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        for item in items:
            tell(f"{label}; {standing}" if standing else label)
            yield item

    def watch(progress: Progress) -> None:
        nonlocal standing
        standing = described(progress)
        tell(standing)

    yield track, watch
