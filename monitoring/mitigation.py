"""The answer to a proven loss, once: a webhook is told, or a command is run. By default neither."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Callable
from threading import Thread

ACTIONS = ("webhook", "command")
OUTCOMES = ("ok", "failed")

Act = Callable[[str], None]
"""Does something about the loss that a JSON text describes; raises where it could not."""


def webhook(url: str, timeout_seconds: float) -> Act:
    """POST the text; any answer but a success is a failure."""

    def act(text: str) -> None:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, text.encode(), headers)
        with urllib.request.urlopen(request, timeout=timeout_seconds):
            pass

    return act


def command(arguments: list[str], timeout_seconds: float) -> Act:
    """Run a program with the text on its standard input; it must end with 0."""

    def act(text: str) -> None:
        subprocess.run(arguments, input=text.encode(), timeout=timeout_seconds, check=True)

    return act


class Mitigation:
    """Acts once for a version until it has recovered, beside the rounds: a second rollback would undo the first.

    counts: by (action, outcome).
    """

    def __init__(self, actions: dict[str, Act], log: Callable[[str], None]) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._actions, self._log, self._told = actions, log, set[str]()
        self._threads: list[Thread] = []

    def consider(self, model: str, version: str, losses: frozenset[str]) -> None:
        """Act where a version that had lost nothing has; once it has recovered, a new loss is new."""
        new = bool(losses) and version not in self._told
        self._told = self._told | {version} if losses else self._told - {version}
        if new and self._actions:
            text = json.dumps(
                {"event": "robustness_lost", "model": model, "version": version, "reasons": sorted(losses)}
            )
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self._threads.append(Thread(target=self._act, args=(text,), name="mitigation", daemon=True))
            self._threads[-1].start()

    def finish(self, seconds: float) -> None:
        """Wait for what is under way."""
        for thread in self._threads:
            thread.join(seconds)

    def _act(self, text: str) -> None:
        for name, act in self._actions.items():
            try:
                act(text)
                outcome, detail = "ok", ""
            except Exception as error:  # noqa: BLE001 - whatever it is, the rounds go on, and it is counted
                outcome, detail = "failed", f": {_without_arguments(error)}"
            self.counts[name, outcome] += 1
            self._log(f"mitigation by {name} {outcome}{detail}")


def _without_arguments(error: Exception) -> str:
    """What went wrong, for the log; a command's arguments may hold a secret."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} ended with exit code {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{error.cmd[0]} took longer than {error.timeout:.1f} s"
    return " ".join(str(error).split())
