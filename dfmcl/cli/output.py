"""Lines for a person or a program on standard output, warnings and progress on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """A progress bar on a terminal; elsewhere a line every ten seconds."""
    if not sys.stderr.isatty():
        shown = time.monotonic()
        for number, item in enumerate(items):
            if time.monotonic() - shown > 10:
                print(f"{label}: {number} of {total or '?'}", file=sys.stderr, flush=True)
                shown = time.monotonic()
            yield item
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(items, total=total, description=label)


def say(line: str) -> None:
    """Print one line at once, also into a pipe; a name or a reason in it, even a stranger's, starts no other."""
    from dfmcl.common.text import printable

    print(printable(line), flush=True)


def say_page(text: str) -> None:
    """Print lines of ours, with what others wrote in them."""
    from dfmcl.common.text import printable

    print(printable(text, keep="\n"), flush=True)


def warn(line: str) -> None:
    """Say one line on stderr."""
    from dfmcl.common.text import printable

    print(f"dfmcl: {printable(line)}", file=sys.stderr, flush=True)


def say_json(line: str) -> None:
    """The same for machines: an object with the time (UTC) and the line."""
    import json

    say(json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "message": line.strip()}))
