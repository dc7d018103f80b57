"""The `dfmcl` command: how a subcommand is registered, and how each of its errors ends: one line, one exit code."""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dfmcl.cli.arguments import require_local
from dfmcl.cli.output import warn

# What a subcommand needs, if not `train`.
SERVE = ("promote", "rollback", "repair", "status", "history", "prune", "retire", "verify", "card", "serve", "sync")
EXTRAS = {
    **dict.fromkeys(SERVE, "serve"),
    **dict.fromkeys(("push", "pull"), "serve,oci"),
    **dict.fromkeys(("gateway", "apikey"), "gateway"),
    **dict.fromkeys(("watch", "craft"), "monitor"),
}
BROKEN, INTERRUPTED = 5, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Harden an image classifier, gate it on robust accuracy, serve it with Triton, probe it in production.",
    epilog="Exit codes: 0 done, 1 refused (gate: failed), 2 bad input, 3 inconclusive, 4 suspect, 5 broken.",
)


def guarded(function: Callable[..., int | None]) -> Callable[..., None]:
    """The function, with whatever it raises turned into one line and an exit code, never 1 by accident."""

    def attempt(*args: Any, **kwargs: Any) -> None:
        try:
            for value in kwargs.values():
                for path in value if isinstance(value, list) else [value]:
                    require_local(path)
            code = function(*args, **kwargs) or 0
            sys.stdout.flush()
        except SystemExit as error:
            if error.code not in (130, 143):  # a signal's; any other is a model's own code that wants to end us
                warn(f"a model's code called sys.exit({error.code!r}), which decides nothing")
                raise SystemExit(BROKEN) from None
            raise
        except BrokenPipeError:  # the reader of our output has left; nobody is there to be told
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(BROKEN) from None
        except Exception as error:  # noqa: BLE001  # this is where every exception ends, with its meaning
            raise SystemExit(explain(error, function.__name__)) from None
        raise SystemExit(code)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            attempt(*args, **kwargs)
        except KeyboardInterrupt as error:
            raise SystemExit(cut_off(error, function.__name__)) from None

    return call


def cut_off(error: BaseException, subcommand: str) -> int:
    """The exit code of a Ctrl-C, told as the command told the one before that, which this one may have interrupted."""
    while error.__context__ is not None:
        error = error.__context__
        if getattr(error, "exit_code", 0) == INTERRUPTED:
            assert isinstance(error, Exception)
            return explain(error, subcommand)
    return INTERRUPTED


def command(function: Callable[..., int | None]) -> Callable[..., None]:
    """Register a guarded subcommand under the function's name."""
    return app.command(name=function.__name__)(guarded(function))


def explain(error: Exception, subcommand: str) -> int:
    """Print an error as one line (the traceback with --verbose) and return its exit code."""
    from dfmcl.common.errors import lacks_memory, without_memory

    code = getattr(error, "exit_code", BROKEN)
    message = str(error)
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the next Ctrl-C would cut off the line that this one asked for
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != "dfmcl":
        message, code = f"{error.name} is not installed; pip install 'dfmcl[{EXTRAS.get(subcommand, 'train')}]'", 2
    elif lacks_memory(error):
        message, code = f"{subcommand}: {without_memory(message)}", 2
    elif isinstance(error, OSError) and not hasattr(error, "exit_code"):
        message = f"{error.filename or subcommand}: {error.strerror or error}"
    elif not hasattr(error, "exit_code"):
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"internal error: {type(error).__name__}: {message} ({Path(where.filename).name}:{where.lineno})"
        message += "; run again with --verbose and report it"
    if "--verbose" in sys.argv:
        traceback.print_exception(error)
    warn(" ".join(message.split()))
    return int(code)


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")] = False,
) -> None:
    """`--verbose` is taken from anywhere on the command line, see main()."""
