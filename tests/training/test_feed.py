"""Images that are read on demand: the same network whoever reads them, and one line where that fails."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Sequence
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfmcl.common.errors import BadInput, Broken, Interrupted
from dfmcl.common.files import sha256_of
from dfmcl.robustness.data import Dataset, load_dataset, open_dataset
from dfmcl.robustness.ranks import Ranks
from dfmcl.robustness.runs import CHECKPOINT
from dfmcl.robustness.seeds import generator
from dfmcl.training import feed as room
from dfmcl.training import train as loop
from dfmcl.training.augmentation import crop, flip
from dfmcl.training.config import TrainConfig, load_config
from dfmcl.training.course import Course
from dfmcl.training.feed import HeldInMemory, Ready, Streamed, Whole, feed_of
from dfmcl.training.limits import Limits
from dfmcl.training.noise import Noise
from dfmcl.training.train import statistics, train
from tests.training.workshop import ALONE, StopAfter, quiet

FEW = ["optimization.batch_size=8", "optimization.epochs=2", "data.heldout_images=6", "data.image_size=16"]
SMALL = [*FEW, "model.width=4", "heldout.images=4", "heldout.attack_steps=1", "curriculum.steps=1", "data.name=folder"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """38 training images in two classes, four to test with."""
    digits, root = load_dataset("digits"), tmp_path_factory.mktemp("pictures")
    for part, count in (("train", 38), ("test", 4)):
        for number in range(count):
            place = root / part / str(number % 2)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.x_train[number]).resize((20, 18)).save(place / f"{number:02}.jpg")
    return root


def told(pictures: Path, *changes: str) -> TrainConfig:
    return load_config("quickstart", [*SMALL, f"data.path={pictures}", "data.memory_bytes=0", *changes])


@pytest.fixture(scope="module")
def by_itself(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The network of a run whose own process reads."""
    out = tmp_path_factory.mktemp("runs") / "0"
    train(told(pictures, "data.workers=0"), out, log=quiet)
    return sha256_of(out / CHECKPOINT)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_network_does_not_hang_on_who_reads(tmp_path: Path, pictures: Path, by_itself: str, workers: int) -> None:
    """0, 1 and 2 workers: equal to the last bit."""
    train(told(pictures, f"data.workers={workers}"), tmp_path / "run", log=quiet)
    assert sha256_of(tmp_path / "run" / CHECKPOINT) == by_itself


def test_a_run_that_was_cut_goes_on_with_another_number_of_workers(
    tmp_path: Path, pictures: Path, by_itself: str
) -> None:
    """In the middle of an epoch, from two workers to one: the uncut run's network, and no worker is left behind."""
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(told(pictures, "data.workers=2"), out, limits=Limits(StopAfter(2)), log=quiet)
    assert children() == set()
    train(told(pictures, "data.workers=1"), out, resume=True, log=quiet)
    assert sha256_of(out / CHECKPOINT) == by_itself


def children() -> set[int]:
    """Workers that still run."""
    return {process.pid or 0 for process in active_children()}


def batches(config: TrainConfig, data: Dataset, ranks: Ranks, count: int) -> list[Ready]:
    found = list(Streamed(config, data, np.arange(24), ranks, workers=0).batches(1, count))
    assert all(isinstance(batch, Ready) for batch in found)
    return found  # type: ignore[return-value]  # as the line above says


def test_processes_and_parts_share_a_batch(pictures: Path) -> None:
    """Two processes read a half each of one's batch; a batch in parts meets what it meets as a whole."""
    config, data = told(pictures, "objective.views=1"), open_dataset("folder", str(pictures), 16)
    whole = batches(config, data, ALONE, 5)
    halves = [batches(config, data, Ranks(rank, 2, torch.device("cpu")), 5) for rank in (0, 1)]
    kinds = room.augmentations(config)
    for one, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(one.views, torch.cat([first.views, second.views], dim=1))
        assert torch.equal(one.labels, torch.cat([first.labels, second.labels]))
        quarters = [half.share(kinds, noise(2 * r + p, 4)) for r, half in enumerate((first, second)) for p in (0, 1)]
        assert torch.equal(one.views[1], torch.cat([views[1] for views, _ in quarters]))
        assert torch.equal(one.labels, torch.cat([labels for _, labels in quarters]))


def noise(rank: int, world: int) -> Noise:
    return Noise(generator(0, "noise"), rank, world)


def test_every_epoch_shows_each_image_once_and_anew(pictures: Path) -> None:
    """24 images in steps of 8: three steps are an epoch, in another order and otherwise augmented each time; both
    feeds take the same images."""
    config, data = told(pictures, "data.augmentation=none"), open_dataset("folder", str(pictures), 16)
    pixels = data.x_train[np.arange(24)]
    first, second = (torch.cat([b.views[0] for b in batches(config, data, ALONE, 6)[part]])
                     for part in (slice(3), slice(3, 6)))  # fmt: skip
    for epoch in (first, second):
        assert sorted(image.tobytes() for image in epoch.numpy()) == sorted(image.tobytes() for image in pixels)
    assert not torch.equal(first, second)
    held = HeldInMemory(config, load_dataset("folder", str(pictures), 16), np.arange(24), torch.device("cpu"))
    taken = [batch.images for batch in held.batches(1, 3) if isinstance(batch, Whole)]
    assert torch.equal(torch.cat(taken), first)
    moved = told(pictures, "data.augmentation=crop")
    again = torch.cat([batch.views[0] for batch in batches(moved, data, ALONE, 6)])
    assert len({image.tobytes() for image in again.numpy()}) > 30


def test_an_image_alone_is_augmented_as_in_a_batch() -> None:
    """Where one image goes a quicker way, its draws mean what they mean in a batch."""
    image = torch.randint(256, (1, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(image, (0, 0, 3, 3, 3, 3))
    for n in range(9):
        top, left = torch.randint(7, (2, 1, 1), generator=generator(n, "crop")).flatten().tolist()
        assert torch.equal(crop(image, generator(n, "crop"), 3), padded[:, top : top + 24, left : left + 24])
        turned = bool(torch.rand(1, generator=generator(n, "flip")) < 0.5)
        assert torch.equal(flip(image, generator(n, "flip")), image.flip(2) if turned else image)


def test_a_byte_limit_decides(pictures: Path) -> None:
    """38 images of 16 x 16 x 3 bytes: at the limit they are held, and read above it; workers are no part of a run."""
    data, size = load_dataset("folder", str(pictures), 16), 38 * 16 * 16 * 3
    at, above = (
        feed_of(told(pictures, f"data.memory_bytes={n}"), data, np.arange(24), ALONE) for n in (size, size - 1)
    )
    assert isinstance(at, HeldInMemory)
    assert isinstance(above, Streamed)
    assert told(pictures, "data.workers=1").digest == told(pictures, "data.workers=2").digest
    assert told(pictures).digest != told(pictures, "data.memory_bytes=1").digest
    assert TrainConfig().data.memory_bytes == 2**29


def test_no_more_is_read_than_a_step_takes(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step of a run: neither the test part nor, beyond a sample, the training part is decoded."""
    read: list[int] = []
    data = open_dataset("folder", str(pictures), 16)
    decode = type(data.x_train).__getitem__

    def counting(self: object, index: Sequence[int]) -> object:
        images = decode(self, index)  # type: ignore[arg-type]  # of Pictures
        read.append(len(images))
        return images

    monkeypatch.setattr(type(data.x_train), "__getitem__", counting)
    monkeypatch.setattr(loop, "SEEN", 5)
    monkeypatch.setattr(Course, "_step", lambda self, step, last: (_ for _ in ()).throw(Interrupted("here")))
    with pytest.raises(Interrupted, match="here"):
        train(told(pictures, "data.workers=0"), tmp_path / "run", log=quiet)
    assert read == [5]


def test_a_sample_says_what_all_say(pictures: Path) -> None:
    """Mean and deviation of a part of the images that are read on demand; of all where they are few."""
    opened, held = open_dataset("folder", str(pictures), 16), load_dataset("folder", str(pictures), 16)
    assert statistics(opened) == statistics(held)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_ends_the_run_in_one_line(tmp_path: Path, pictures: Path, workers: int) -> None:
    """By its name, as bad input, whoever meets it."""
    for path in pictures.rglob("*.jpg"):
        place = tmp_path / "pictures" / path.relative_to(pictures)
        place.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        place.write_bytes(data if path.name != "07.jpg" or "train" not in str(path) else data[:-40])
    config = told(tmp_path / "pictures", f"data.workers={workers}", "data.heldout_images=1", "model.scale=plain")
    with pytest.raises(BadInput, match=r"^\S+/train/1/07\.jpg: is cut off or broken; replace it, or remove it$"):
        train(config, tmp_path / "run", log=quiet)
    assert children() == set()


def test_a_worker_that_dies_is_told(tmp_path: Path, pictures: Path) -> None:
    """As the kernel ends one for lack of memory: what died, why that may be, what to do."""
    feed = Streamed(told(pictures), open_dataset("folder", str(pictures), 16), np.arange(24), ALONE, workers=1)
    found = feed.batches(1, 10**6)
    with pytest.raises(Broken, match=r"a process that reads images has died .* lower data\.workers"), room.told():
        killed(found)
    found.close()


def killed(found: Iterator[object]) -> None:
    """Take what comes after its worker's death."""
    next(found)
    os.kill(children().pop(), signal.SIGKILL)
    for _ in range(10**6):
        next(found)


def test_a_signal_to_all_processes_is_the_trainings(pictures: Path) -> None:
    """Ctrl-C and a service's SIGTERM reach workers too: they go on, because the run ends at a step's boundary."""
    feed = Streamed(told(pictures), open_dataset("folder", str(pictures), 16), np.arange(24), ALONE, workers=1)
    found = feed.batches(1, 40)
    next(found)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(next(iter(children())), number)
    assert len(list(found)) == 39
    assert children() == set()


def test_reading_leaves_the_draws_of_others_alone(pictures: Path) -> None:
    """A network with dropout draws from torch's own generator: no worker's seed is taken from it."""
    before = torch.random.get_rng_state()
    data = open_dataset("folder", str(pictures), 16)
    next(Streamed(told(pictures), data, np.arange(24), ALONE, workers=0).batches(1, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert math.prod(data.x_train.shape) == 38 * 16 * 16 * 3
