"""Attacks by queries on live traffic, noticed and told to the operator of the service, never to the client.

    Gateway, after an answer --> queue --> one thread: Fingerprint --> History of the key --> Alarm --> log, metrics

An attacker who knows what this does can avoid it (OARS, Feng et al., CCS 2023): it is a smoke detector, no lock.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Any

from dfmcl.common import webhook
from dfmcl.serving.detection.campaigns import Alarm, QueryCampaign, Rule
from dfmcl.serving.detection.fingerprints import Fingerprinter, Image
from dfmcl.serving.detection.history import History
from dfmcl.serving.gateway.api_keys import Caller
from dfmcl.serving.gateway.config import Detection
from dfmcl.serving.gateway.metrics import DetectionMetrics

# Of similarity, from which on two images are near-duplicates: half of the tags, as Blacklight's authors have it; and
# nine tenths of the contrasts, the most that different photographs do not reach (benchmarks/results/detection.md).
THRESHOLDS = {"salted_hash": 0.5, "perceptual": 0.9}
TICK_SECONDS = 1.0  # between looks at what has ended
STOP_SECONDS = 1.0  # that a gateway which stops waits for the thread; a webhook may take longer

Log = Callable[[dict[str, Any]], None]


class Watched:
    """One key: its questions, and an alarm for each detector."""

    def __init__(self, caller: Caller, settings: Detection) -> None:
        self.caller = caller
        self.history = History(settings.queries, settings.seconds)
        rule = Rule(settings.matches, settings.queries, settings.seconds, settings.quiet_seconds)
        self.alarms = {detector: Alarm(caller.name, detector, rule) for detector in settings.detectors}


class Examiner:
    """What is remembered of all keys, and what follows from a new image. Not for several threads at once."""

    def __init__(self, settings: Detection, salt: bytes, metrics: DetectionMetrics, log: Log) -> None:
        """salt: secret bytes, new ones for each process."""
        self._settings, self._metrics, self._log = settings, metrics, log
        self._fingerprint = Fingerprinter(salt)
        self._watched: OrderedDict[str, Watched] = OrderedDict()  # the key that asked last is last

    def examine(self, caller: Caller, image: Image, now: float) -> None:
        """Compare an image (H, W, C) with the earlier ones of its key, and remember it. now: in seconds."""
        watched = self._watch(caller)
        resemblance = watched.history.resemblance(self._fingerprint(image), now)
        self._metrics.examined(caller.probe, repeat=resemblance is None)
        for detector, alarm in watched.alarms.items():
            if resemblance and resemblance[detector] >= THRESHOLDS[detector]:
                self._match(caller, alarm, watched.history.seen, now)
        self._metrics.remembered.set(sum(other.history.held for other in self._watched.values()))

    def tick(self, now: float) -> None:
        """End what has been quiet for long enough, and forget keys without an image that counts."""
        for watched in list(self._watched.values()):
            for alarm in watched.alarms.values():
                self._end(watched.caller, alarm.end(now))
            if watched.history.newest < now - self._settings.seconds:
                self._forget(watched)

    def _watch(self, caller: Caller) -> Watched:
        if caller.name not in self._watched:
            if len(self._watched) == self._settings.keys:
                self._forget(next(iter(self._watched.values())))
            self._watched[caller.name] = Watched(caller, self._settings)
        self._watched.move_to_end(caller.name)
        return self._watched[caller.name]

    def _forget(self, watched: Watched) -> None:
        for alarm in watched.alarms.values():
            self._end(watched.caller, alarm.end())
        del self._watched[watched.caller.name]

    def _match(self, caller: Caller, alarm: Alarm, number: int, now: float) -> None:
        begins = alarm.match(number, now)
        self._metrics.matched(caller.probe, alarm.detector)
        if alarm.campaign is None:
            return
        settings = self._settings
        if settings.throttle_images_per_second and caller.bucket and not caller.probe:
            caller.bucket.slow(settings.throttle_images_per_second, settings.throttle_seconds)
        if begins:
            self._metrics.begun(caller.probe, alarm.detector)
            self._tell("begun", caller, alarm.campaign)

    def _end(self, caller: Caller, campaign: QueryCampaign | None) -> None:
        if campaign is not None:
            self._metrics.ended(caller.probe, campaign.detector)
            self._tell("ended", caller, campaign)

    def _tell(self, phase: str, caller: Caller, campaign: QueryCampaign) -> None:
        """The log and the webhook, of a user's campaign; a probe's is no news."""
        if caller.probe:
            return
        entry = {
            "event": "campaign",
            "phase": phase,
            "key": campaign.key,
            "detector": campaign.detector,
            "matches": campaign.matches,
            "seconds": round(campaign.last - campaign.begun, 1),
        }
        self._log(entry)
        if self._settings.webhook:
            sent = webhook.post(self._settings.webhook, entry, self._settings.webhook_seconds)
            self._metrics.webhooks.labels("sent" if sent else "failed").inc()


class Worker:
    """The thread that examines, for the length of a with block, and the bounded queue before it."""

    def __init__(
        self,
        settings: Detection,
        salt: bytes,
        metrics: DetectionMetrics,
        log: Log,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """salt: secret bytes. log: told of campaigns, by the thread."""
        self._settings, self._metrics, self._log, self._clock = settings, metrics, log, clock
        self._examiner = Examiner(settings, salt, metrics, log)
        self._waiting: queue.SimpleQueue[tuple[Caller, Image, float] | None] = queue.SimpleQueue()
        self._stopping, self._failed = False, False
        self._thread = threading.Thread(target=self._work, name="detection", daemon=True)
        metrics.queue.set_function(self._waiting.qsize)

    def offer(self, caller: Caller, images: Image) -> None:
        """Have images (N, H, W, C) examined some time; images that find the queue full are dropped. Never waits.

        For one thread: two that ask for the queue's length at once might both find the last place.
        """
        if not caller.detect or (caller.canary and not caller.probe):
            return
        now, room = self._clock(), max(0, self._settings.queue - self._waiting.qsize())
        for image in images[:room]:
            self._waiting.put((caller, image, now))
        self._metrics.dropped.inc(max(0, len(images) - room))

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        self._waiting.put(None)  # wakes it
        self._thread.join(STOP_SECONDS)

    def _work(self) -> None:
        next_tick = self._clock() + TICK_SECONDS
        while not self._stopping:
            try:
                waiting = self._waiting.get(timeout=TICK_SECONDS)
            except queue.Empty:
                waiting = None
            try:
                if waiting is not None:
                    with self._metrics.seconds.time():
                        self._examiner.examine(*waiting)
                if self._clock() >= next_tick:
                    next_tick = self._clock() + TICK_SECONDS
                    self._examiner.tick(self._clock())
            except Exception as error:  # noqa: BLE001 - the next image is another one
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Count a failure; the first of them is told to the log, because one bug may strike with every image."""
        self._metrics.failed.inc()
        if not self._failed:
            self._failed = True
            self._log({"event": "detection failed", "detail": f"{type(error).__name__}: {error}"})
