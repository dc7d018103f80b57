"""A sidecar in a thread, and its pages."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families as parse

from dfmcl.monitoring.config import WatchConfig
from dfmcl.monitoring.results import Round, round_from_json
from dfmcl.monitoring.sidecar import watch
from tests.monitoring.clocks import wait_for


def series(text: str) -> dict[str, float]:
    """Samples of an exposition by name and what tells them apart: reason, attack, state, action or way."""
    found = {}
    for family in parse(text):
        for sample in family.samples:
            kinds = (sample.labels.get(name, "") for name in ("via", "reason", "attack", "state", "action", "outcome"))
            found[" ".join([sample.name, *filter(None, kinds)])] = sample.value
    return found


@dataclass
class Watching:
    """A sidecar in a thread, as the command line would run it."""

    config: WatchConfig
    clock: Any = time
    stop: threading.Event = field(default_factory=threading.Event)
    lines: list[str] = field(default_factory=list)
    outcome: list[object] = field(default_factory=list)

    def start(self) -> Watching:
        """Returns when the HTTP server is there."""
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        wait_for(lambda: bool(self.lines or self.outcome))
        self.url = self.lines[0].rpartition(" ")[2].removesuffix("/metrics")
        return self

    def get(self, path: str, accept: str = "text/plain") -> tuple[str, str]:
        """Body and content type of a page."""
        request = urllib.request.Request(self.url + path, headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.read().decode(), response.headers["Content-Type"]

    def metric(self, name: str) -> float:
        """A sample's value, such as `target_up triton`."""
        return self.metrics()[f"robustness_{name}"]

    def metrics(self) -> dict[str, float]:
        """All samples."""
        return series(self.get("/metrics")[0])

    def rounds(self) -> list[Round]:
        """What /rounds.json says."""
        return [round_from_json(entry) for entry in json.loads(self.get("/rounds.json")[0])]

    def close(self) -> object:
        """What `watch` returned."""
        self.stop.set()
        self.thread.join(30)
        return self.outcome[0] if self.outcome else "still running"

    def _run(self) -> None:
        try:
            self.outcome.append(watch(self.config, stop=self.stop, log=self.lines.append, clock=self.clock))
        except Exception as error:  # noqa: BLE001 - handed to the test's own thread
            self.outcome.append(error)
