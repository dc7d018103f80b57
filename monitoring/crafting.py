"""Rounds' images and their adversarial versions, made before the round by one thread: a round only asks.

An image that comes again needs no second crafting as long as the pool's adversarial versions fit into memory.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from queue import Empty, Full, Queue
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.monitoring.asker import Stopped
from dfmcl.monitoring.probes import Scene, craft
from dfmcl.robustness.attacks.registry import Attack, Model
from dfmcl.robustness.data import Bytes, Labels
from dfmcl.robustness.image_set import Images, Pictures
from dfmcl.robustness.seeds import derived_seed
from dfmcl.robustness.threats.ball import Ball

AHEAD = 2  # rounds that lie ready; more would only be older when they are used
CRAFT_IMAGES = 8  # a server on the same cores waits for a pass; fewer would cost more in all
REMEMBERED_BYTES = 256 * 2**20
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class ImagePool:
    """Labelled images that the model was not trained on. images: uint8 (M, H, W, C); labels: (M,) of `classes`.

    Those of a folder are decoded when a round asks for them.
    """

    images: Images
    labels: Labels
    classes: int

    @property
    def digest(self) -> str:
        """Of all images and labels: what figures are about. Of a folder, of its files, and how they are read."""
        digest = hashlib.sha256(str((self.images.shape, self.classes)).encode())
        if isinstance(self.images, Pictures):
            digest.update("\n".join((self.images.mode, *self.images.digests)).encode())
        else:
            digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()

    def scene(self, threat: Ball, seed: int, number: int, count: int) -> Scene:
        """`count` different images of round `number`, drawn anew from all of them: rounds are independent."""
        chosen = draw(len(self.images), count, seed, number)
        return Scene(self.images[chosen], self.labels[chosen], threat, seed, number, {})


def draw(pool: int, count: int, seed: int, number: int) -> npt.NDArray[np.int64]:
    """Indices of round `number`, none twice in a round."""
    order = np.random.default_rng(derived_seed(seed, "images", number))
    chosen: npt.NDArray[np.int64] = order.choice(pool, count, replace=False)
    return chosen


class Pace:
    """Spreads the passes of a scene over `seconds`; the first scene is made at once, and shows what one costs.

    In a burst a core is gone for seconds, and a server on the same cores takes twice as long meanwhile: users see that
    in their 99th percentile. The same work in small parts delays each answer a little.
    cpu: seconds that this thread has computed, which say how much of a scene is made; the most expensive scene counts,
    because later ones know images already. clock: seconds; a scene with little of a core is late, and does not rest.
    """

    def __init__(
        self,
        seconds: float,
        left: threading.Event,
        *,
        cpu: Callable[[], float] = time.thread_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds, self._left, self._cpu, self._clock = seconds, left, cpu, clock
        self._cost = 0.0
        self._begun: tuple[float, float] | None = None  # this scene, by cpu and clock

    def before(self, source: Model) -> Model:
        """The same passes, each not before it is due."""

        def rested(x: Tensor) -> Tensor:
            if self._begun is None:
                self._begun = self._cpu(), self._clock()
            elif self._cost:
                made = min(1.0, (self._cpu() - self._begun[0]) / self._cost)
                self._left.wait(max(0.0, self._begun[1] + made * self._seconds - self._clock()))
            return source(x)

        return rested

    def finished(self) -> None:
        """A scene is made."""
        if self._begun is not None:
            self._cost = max(self._cost, self._cpu() - self._begun[0])
        self._begun = None


def scenes(
    pool: ImagePool,
    source: Model,
    threat: Ball,
    attacks: tuple[Attack, ...],
    *,
    seed: int,
    count: int,
    first: int = 1,
    pace: Pace | None = None,
) -> Iterator[Scene]:
    """Scenes of rounds `first`, `first` + 1, ... with adversarial images by attack, crafted when they are asked for."""
    source = pace.before(source) if pace else source
    remembers = math.prod(pool.images.shape) * len(attacks) <= REMEMBERED_BYTES
    known = {attack.name: np.zeros(len(pool.images), bool) for attack in attacks}
    crafted = {attack.name: np.zeros(pool.images.shape, np.uint8) for attack in attacks} if remembers else {}
    number = first
    while True:
        scene, chosen = pool.scene(threat, seed, number, count), draw(len(pool.images), count, seed, number)
        adversarial: dict[str, Bytes] = {}
        for attack in attacks:
            if not remembers:
                adversarial[attack.name] = _crafted(source, scene, attack)
                continue
            new = ~known[attack.name][chosen]
            crafted[attack.name][chosen[new]] = _crafted(source, scene.only(new), attack)
            known[attack.name][chosen] = True
            adversarial[attack.name] = crafted[attack.name][chosen]
        if pace:
            pace.finished()
        yield replace(scene, adversarial=adversarial)
        number += 1


def _crafted(source: Model, scene: Scene, attack: Attack) -> Bytes:
    parts = [scene.images[:0]]
    for begin in range(0, len(scene.images), CRAFT_IMAGES):
        part = np.zeros(len(scene.images), bool)
        part[begin : begin + CRAFT_IMAGES] = True
        parts.append(craft(source, scene.only(part), attack, part=begin))
    return np.concatenate(parts)


class Crafter:
    """Takes scenes from an iterator in a thread of its own, and keeps `AHEAD` of them ready. A context manager.

    threads: that this one may compute with. left: is set when the context is left.
    """

    def __init__(
        self, made: Iterator[Scene], stop: threading.Event, threads: int = 1, left: threading.Event | None = None
    ) -> None:
        self._threads = threads
        self._made, self._stop, self._left, self._died = made, stop, left or threading.Event(), False
        self._ready: Queue[Scene | Exception] = Queue(AHEAD)
        self._thread = threading.Thread(target=self._run, name="crafter", daemon=True)

    @property
    def ready(self) -> int:
        """Scenes that lie ready."""
        return self._ready.qsize()

    @property
    def behind(self) -> bool:
        """Whether it is still at work on the scene that a round would have to wait for."""
        return self._thread.is_alive() and self._ready.empty()

    @property
    def dead(self) -> bool:
        """Whether crafting has died of something, which a round was told."""
        return self._died

    def take(self) -> Scene:
        """The next scene; waits for it. Stopped where it is time to end; what crafting died of, where it died."""
        while not self._stop.is_set():
            try:
                item = self._ready.get(timeout=POLL_SECONDS)
            except Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("the crafting thread has ended; see the first failure") from None
                continue
            if isinstance(item, Exception):
                raise item
            return item
        raise Stopped

    def __enter__(self) -> Crafter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join(60)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # of this thread
        try:
            for scene in self._made:
                if not self._put(scene):
                    return
        except Stopped:
            return
        except Exception as error:  # noqa: BLE001 - told to the round that waits for it
            self._died = True
            self._put(error)

    def _put(self, item: Scene | Exception) -> bool:
        while not (self._left.is_set() or self._stop.is_set()):
            try:
                self._ready.put(item, timeout=POLL_SECONDS)
                return True
            except Full:
                continue
        return False


def require_fit(pool: ImagePool, images: int, where: str) -> None:
    """BadInput where a round asks for more images than there are."""
    if images > len(pool.images):
        raise BadInput(f"{where} is {images}; the data have {len(pool.images)} test images")
