"""The images of each step: held on the device, or read by worker processes while the step before is on its way.

Which images a step takes follows from the seed and the step's number, and how an image that is read is augmented from
the seed, the epoch and the image's own number: never from the worker that reads it.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as ByNumber

from dfmcl.common.errors import Broken, DfmclError
from dfmcl.robustness.data import Dataset, Labels
from dfmcl.robustness.image_set import Images, Pictures
from dfmcl.robustness.ranks import Ranks
from dfmcl.robustness.seeds import generator
from dfmcl.training.augmentation import augment
from dfmcl.training.config import TrainConfig
from dfmcl.training.noise import Noise

Read = tuple[Tensor, Tensor]  # views uint8 (V, n, H, W, C), labels (n,)
DEATH_SECONDS = 2  # within which a process hears that a child died


class Batch(Protocol):
    """Images of one step."""

    def share(self, kinds: Sequence[str], noise: Noise) -> tuple[list[Tensor], Tensor]:
        """The noise's part: for each augmentation the images uint8 `(n, H, W, C)`, and the labels `(n,)`."""
        ...


@dataclass(frozen=True)
class Whole:
    """Images `(N, H, W, C)` uint8 and labels `(N,)` of all processes, as they are; the step's noise augments them."""

    images: Tensor
    labels: Tensor

    def share(self, kinds: Sequence[str], noise: Noise) -> tuple[list[Tensor], Tensor]:
        return [noise.mine(augment(self.images, noise.generator, kind)) for kind in kinds], noise.mine(self.labels)


@dataclass(frozen=True)
class Ready:
    """What this process is to take of a batch, one of `world`; views: uint8 (V, n, H, W, C), augmented when read."""

    views: Tensor
    labels: Tensor
    world: int

    def share(self, kinds: Sequence[str], noise: Noise) -> tuple[list[Tensor], Tensor]:
        assert len(kinds) == len(self.views)
        parts = noise.world // self.world  # in which this process passes its images one after the other
        own = Noise(noise.generator, noise.rank % parts, parts)
        return [own.mine(view) for view in self.views], own.mine(self.labels)


class Order:
    """The places, among the images to fit, of each step from 1: the next of its epoch's permutation."""

    def __init__(self, seed: int, count: int, size: int) -> None:
        self.seed, self.count, self.size, self.steps = seed, count, size, count // size
        self._epoch, self._places = 0, torch.empty(0, dtype=torch.int64)

    def epoch(self, step: int) -> int:
        """Counted from 1."""
        return (step - 1) // self.steps + 1

    def at(self, step: int) -> Tensor:
        """int64 (size,)."""
        epoch = self.epoch(step)
        if epoch != self._epoch:
            places = torch.randperm(self.count, generator=generator(self.seed, "order", epoch))
            self._epoch, self._places = epoch, places
        return self._places[(step - 1) % self.steps * self.size :][: self.size]


class HeldInMemory:
    """Images and labels that lie on the device."""

    def __init__(self, config: TrainConfig, data: Dataset, fit: Labels, device: torch.device) -> None:
        self.images = torch.from_numpy(data.x_train[fit]).to(device)
        self.labels = torch.from_numpy(data.y_train[fit]).to(device)
        self.order = Order(config.seed, len(fit), config.optimization.batch_size)

    def batches(self, first: int, last: int) -> Generator[Batch]:
        """Of the steps from `first` to `last`."""
        for step in range(first, last + 1):
            places = self.order.at(step).to(self.images.device)
            yield Whole(self.images[places], self.labels[places])


class Streamed:
    """Images that lie elsewhere: worker processes read and augment a batch each, some of them ahead.

    workers: 0 reads in this process, between steps.
    """

    def __init__(self, config: TrainConfig, data: Dataset, fit: Labels, ranks: Ranks, workers: int) -> None:
        self.source = _Steps(config, data.x_train, data.y_train, fit, ranks)
        self.ranks, self.workers, self.order = ranks, workers, self.source.order

    def batches(self, first: int, last: int) -> Generator[Batch]:
        """Of the steps from `first` to `last`; Broken where a worker dies. Its workers end with the iterator."""
        loader = DataLoader(
            self.source,
            batch_size=None,
            sampler=range(first, last + 1),
            num_workers=self.workers,
            multiprocessing_context="fork" if self.workers else None,
            pin_memory=self.ranks.device.type == "cuda",
            worker_init_fn=_deaf,
            generator=torch.Generator(),  # else it draws from the one that networks with dropout draw from
        )
        read = iter(loader)
        try:
            for found in read:
                if isinstance(found, DfmclError):
                    raise found
                views, labels = (part.to(self.ranks.device, non_blocking=True) for part in found)
                yield Ready(views, labels, self.ranks.world)
        except (ConnectionError, EOFError):
            time.sleep(DEATH_SECONDS)  # meanwhile torch's handler hears of the worker's death, and raises here
            raise
        finally:
            del read  # now, and not at the interpreter's end, which would wait for workers that wait for work


class _Steps(ByNumber["Read | DfmclError"]):
    """By a step's number what this process takes of its batch; an error of ours is handed over, to be raised there."""

    def __init__(self, config: TrainConfig, images: Images, labels: Labels, fit: Labels, ranks: Ranks) -> None:
        self.images, self.labels, self.fit, self.seed = images, labels, fit, config.seed
        self.kinds = augmentations(config)
        self.order = Order(config.seed, len(fit), config.optimization.batch_size)
        self.share = len(fit[: self.order.size]) // ranks.world
        self.first = ranks.rank * self.share
        self._kept: Tensor | None = None

    def __getitem__(self, step: int) -> Read | DfmclError:
        numbers = self.fit[self.order.at(step)[self.first :][: self.share].numpy()]
        views = _shared(len(self.kinds), len(numbers), *self.images.shape[1:])
        plain = self.kinds == ["none"]
        try:
            found = self._pixels(numbers, views[0] if plain else self._room(views[0]))
        except DfmclError as error:
            return error
        with _one_thread():
            for place, number in () if plain else enumerate(numbers.tolist()):
                draws = generator(self.seed, "image", self.order.epoch(step), number)
                for view, kind in enumerate(self.kinds):
                    views[view, place] = augment(found[place : place + 1], draws, kind)[0]
        return views, torch.from_numpy(self.labels[numbers])

    def _pixels(self, numbers: Labels, out: Tensor) -> Tensor:
        """Images of the training part, in `out`."""
        if isinstance(self.images, Pictures):
            self.images.read(numbers, out=out.numpy())
        else:
            out.numpy()[:] = self.images[numbers]
        return out

    def _room(self, like: Tensor) -> Tensor:
        """The same memory for each batch: fresh pages cost as much as an image's augmentation."""
        if self._kept is None or self._kept.shape != like.shape:
            self._kept = torch.empty_like(like)
        return self._kept


def _shared(*shape: int) -> Tensor:
    """uint8, in memory that a worker hands over without a copy, as torch's own collation makes it."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(math.prod(shape))).view(shape)


def feed_of(config: TrainConfig, data: Dataset, fit: Labels, ranks: Ranks) -> HeldInMemory | Streamed:
    """On the device what fits into `data.memory_bytes`; else read by `data.workers` processes."""
    if fits(config, data):
        return HeldInMemory(config, data, fit, ranks.device)
    workers = config.data.workers
    if workers < 0:
        # On a CPU the passes take the cores, and one worker is soon ahead of them.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = max(1, len(os.sched_getaffinity(0)) // local) if ranks.device.type == "cuda" else 1
    return Streamed(config, data, fit, ranks, workers)


def fits(config: TrainConfig, data: Dataset) -> bool:
    """Whether the training part as bytes may lie in memory."""
    return math.prod(data.x_train.shape) <= config.data.memory_bytes


def augmentations(config: TrainConfig) -> Sequence[str]:
    """Of each view."""
    return [config.data.augmentation] + [config.objective.view_augmentation] * config.objective.views


@contextmanager
def told() -> Iterator[None]:
    """Inside: that a worker died is said in one line; torch's own signal handler may raise it anywhere."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        said = " ".join(str(error).split())
        advice = "workers share memory in /dev/shm and decode a batch each: give it more, or lower data.workers"
        raise Broken(f"a process that reads images has died ({said}); {advice}, and repeat with --resume") from None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside: as in a worker, because sums in several threads differ in their last digit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _deaf(worker: int) -> None:
    """Leave signals to the training: it ends at a step's boundary, and needs images until then."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
