"""The console command `dfmcl`: a file a room; a subcommand imports its room when it is called."""

from __future__ import annotations

import io
import signal
import sys

from dfmcl.cli.command import app
from dfmcl.cli.output import warn
from dfmcl.cli.signals import raising

# In the order in which `dfmcl --help` lists their subcommands.
from dfmcl.cli import training, robustness, gating, release, registry, serving, monitoring  # noqa: F401 - each registers its own  # isort: skip


def main() -> None:
    """Entry point of the console command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks ends nothing
    arguments = sorted(sys.argv[1:], key=lambda argument: argument != "--verbose")  # stable: only --verbose moves
    signal.signal(signal.SIGTERM, raising(SystemExit(128 + signal.SIGTERM)))  # unwinds, so that staging is cleared
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # else a shell wants it ignored
        signal.signal(signal.SIGINT, raising(KeyboardInterrupt()))
    try:
        raise SystemExit(app(arguments or ["--help"], prog_name="dfmcl", standalone_mode=False))
    except Exception as error:  # typer's usage errors have no public class in common
        if not hasattr(error, "format_message"):
            raise
        warn(f"{' '.join(error.format_message().split()).rstrip('.')}; see dfmcl --help")
        raise SystemExit(2) from None
