"""What is done, once, when a loss is proven: somebody is told, or a command is run. By default neither."""

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
    """Acts once for each version and reason, beside the rounds. counts: by (action, outcome)."""

    def __init__(self, actions: dict[str, Act], log: Callable[[str], None]) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._actions, self._log, self._told = actions, log, set[tuple[str, str]]()

    def consider(self, model: str, version: str, losses: frozenset[str]) -> None:
        """Act on losses that were not there before; one that went and comes back is new."""
        new = sorted(reason for reason in losses if (version, reason) not in self._told)
        gone = {(told, reason) for told, reason in self._told if told == version and reason not in losses}
        self._told = (self._told - gone) | {(version, reason) for reason in new}
        if new and self._actions:
            text = json.dumps({"event": "robustness_lost", "model": model, "version": version, "reasons": new})
            Thread(target=self._act, args=(text,), name="mitigation", daemon=True).start()

    def _act(self, text: str) -> None:
        for name, act in self._actions.items():
            try:
                act(text)
                outcome, detail = "ok", ""
            except Exception as error:  # noqa: BLE001 - whatever it is, the rounds go on, and it is counted
                outcome, detail = "failed", f": {' '.join(str(error).split())}"
            self.counts[name, outcome] += 1
            self._log(f"mitigation by {name} {outcome}{detail}")
