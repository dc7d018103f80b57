"""Images and their adversarial versions, made ahead of the rounds: which, how often, by whom, and until when."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.monitoring import crafting
from dfmcl.monitoring.asker import Stopped
from dfmcl.monitoring.crafting import AHEAD, Crafter, ImagePool, Pace, draw, require_fit, scenes
from dfmcl.monitoring.preparation import unless_stopped
from dfmcl.monitoring.probes import Scene, craft
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.data import open_dataset
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.l2 import L2
from tests.monitoring.clocks import wait_for
from tests.monitoring.greys import BALL, EPS, LABELS, brightness, pictures, pool

FGSM = Attack.parse_transfer("fgsm")


class Source:
    """A surrogate that counts the images it is asked about."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.images += len(x)
        return brightness(x)


def many(count: int = 40) -> ImagePool:
    """Different greys."""
    return pool(np.arange(count, dtype=np.uint8) + 20, np.zeros(count, np.int64))


def made(source: Any = brightness, images: ImagePool | None = None, **options: Any) -> Iterator[Scene]:
    """Scenes under FGSM."""
    return scenes(images or many(), source, BALL, (FGSM,), **{"seed": 0, "count": 8, **options})


@settings(max_examples=50)
@given(st.integers(1, 200), st.floats(0.01, 1), st.integers(0, 99), st.integers(-(10**6), 10**6))
def test_no_image_is_drawn_twice_in_a_round(size: int, share: float, seed: int, number: int) -> None:
    """A round's images are different ones of the pool, and the same each time it is drawn."""
    count = max(1, int(size * share))
    chosen = draw(size, count, seed, number)
    assert len(set(chosen.tolist())) == count
    assert set(chosen.tolist()) <= set(range(size))
    assert np.array_equal(chosen, draw(size, count, seed, number))


def test_rounds_are_drawn_independently() -> None:
    """Images of one round return in the next as often as chance has it, which the bounds build on."""
    drawn = [set(draw(100, 20, 0, number).tolist()) for number in range(1, 401)]
    common = [len(one & two) for one, two in itertools.pairwise(drawn)]
    # Hypergeometric: mean 4, variance 2.586.
    assert abs(np.mean(common) - 4) < 4 * (2.586 / 399) ** 0.5
    counts = np.bincount(np.concatenate([list(one) for one in drawn]), minlength=100)
    assert counts.min() > 80 - 5 * 8
    assert counts.max() < 80 + 5 * 8


def test_scenes_repeat_by_seed_and_differ_by_number() -> None:
    """The same seed and number give the same bytes; another number or seed gives others."""

    def content(seed: int, first: int) -> bytes:
        scene = next(made(seed=seed, first=first))
        return scene.images.tobytes() + scene.adversarial["fgsm"].tobytes()

    assert content(0, 1) == content(0, 1)
    assert content(0, 1) != content(0, 2)
    assert content(0, 1) != content(1, 1)
    one, two = itertools.islice(made(), 2)
    assert (one.number, two.number) == (1, 2)
    assert two.images.tobytes() + two.adversarial["fgsm"].tobytes() == content(0, 2)


def test_crafted_bytes_lie_inside_the_ball() -> None:
    """Every image is moved, none farther than eps, in whole grey levels."""
    for scene in itertools.islice(made(), 5):
        distance = np.abs(scene.adversarial["fgsm"].astype(int) - scene.images).max(axis=(1, 2, 3))
        assert scene.adversarial["fgsm"].dtype == np.uint8
        assert (distance == EPS).all()


def test_an_image_that_returns_is_not_crafted_again() -> None:
    """Over many rounds the surrogates see each image of the pool once, and it returns with the same bytes."""
    source, seen = Source(), dict[bytes, bytes]()
    for scene in itertools.islice(made(source), 60):
        for image, changed in zip(scene.images, scene.adversarial["fgsm"], strict=True):
            assert seen.setdefault(image.tobytes(), changed.tobytes()) == changed.tobytes()
    assert len(seen) == 40
    assert source.images == 40


def test_each_attack_is_remembered_apart() -> None:
    """Two attacks share a scene's images, not their adversarial versions."""
    attacks = (FGSM, Attack.parse_transfer("pgd-2"))
    scene = next(scenes(many(), lambda x: brightness(torch.sin(60 * x)), BALL, attacks, seed=0, count=8))
    assert set(scene.adversarial) == {"fgsm", "pgd-2"}
    assert not np.array_equal(scene.adversarial["fgsm"], scene.adversarial["pgd-2"])


def test_a_pool_too_large_to_remember_is_crafted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory for it each round is crafted, with the round's own randomness, and nothing is kept."""
    monkeypatch.setattr(crafting, "REMEMBERED_BYTES", 40 * 4 * 4 * 3 - 1)
    source = Source()
    for scene in itertools.islice(made(source), 10):
        distance = np.abs(scene.adversarial["fgsm"].astype(int) - scene.images).max(axis=(1, 2, 3))
        assert (distance == EPS).all()
    assert source.images == 10 * 8


def test_an_attacks_randomness_belongs_to_the_round() -> None:
    """The same number starts from the same point, another one from another."""

    def rugged(x: torch.Tensor) -> torch.Tensor:
        return brightness(torch.sin(60 * x))

    images = pictures()
    every = [Scene(images, LABELS, BALL, 0, number, {}) for number in (1, 1, 2)]
    first, again, other = (craft(rugged, scene, Attack.parse_transfer("pgd-3")) for scene in every)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_crafting_in_chunks_reaches_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image is attacked wherever its chunk ends, and no chunk is larger than memory allows."""
    monkeypatch.setattr(crafting, "CRAFT_IMAGES", 3)
    sizes: list[int] = []
    source = lambda x: (sizes.append(len(x)), brightness(x))[1]  # noqa: E731  # it notes what it is asked
    scene = next(made(source))
    assert (np.abs(scene.adversarial["fgsm"].astype(int) - scene.images).max(axis=(1, 2, 3)) == EPS).all()
    assert sizes == [3, 3, 2]


def test_an_attack_that_leaves_the_ball_gains_nothing() -> None:
    """Images that an attack leaves outside the L2 ball are sent as they were."""

    def rogue(model: Any, x: Tensor, y: Tensor, threat: Any, *, generator: Any, trial: Any = None) -> Tensor:
        return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == 0, 1 - x, (x + 0.01).clamp(0, 1))

    images = pictures()
    changed = craft(brightness, Scene(images, LABELS, L2(0.5), 0, 1, {}), Attack("rogue", rogue))
    assert np.array_equal(changed[0], images[0])
    assert (changed[1:] != images[1:]).any(axis=(1, 2, 3)).all()


def test_scenes_lie_ready_before_anybody_asks() -> None:
    """Two, no more; one that is taken is made up for, and they come in order."""
    source = Source()
    with Crafter(made(source, count=1), threading.Event()) as crafter:
        wait_for(lambda: crafter.ready == AHEAD)
        assert not crafter.behind
        assert [crafter.take().number for _ in range(5)] == [1, 2, 3, 4, 5]
        wait_for(lambda: crafter.ready == AHEAD)
    assert source.images <= 5 + AHEAD + 1


def test_the_crafter_computes_with_its_own_threads() -> None:
    """As many as it is told, whatever others have."""
    seen: list[int] = []

    def source(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return brightness(x)

    for threads in (1, 2):
        with Crafter(itertools.islice(made(source), 1), threading.Event(), threads) as crafter:
            crafter.take()
    assert seen == [1, 2]


def test_crafting_is_spread_over_time_from_the_second_scene_on() -> None:
    """As much of the time that is given passes as is made of the most expensive scene so far."""
    begins = scene_begins(seconds=20.0, costs=[[2.0, 2.0], [1.0, 3.0], [0.5, 0.5]], share_of_core=1.0)
    assert begins == [[0, 2], [0, 5], [0, 2.5]]


@pytest.mark.parametrize(("share_of_core", "begins"), [(0.5, [0, 5]), (0.1, [0, 10])])
def test_a_scene_that_is_late_does_not_rest(share_of_core: float, begins: list[float]) -> None:
    """What the thread waited for a core counts as rest: a quarter is due at 5 s, whether it took 2 s or 10 s."""
    assert scene_begins(20.0, [[2.0, 2.0], [1.0, 3.0]], share_of_core)[1] == begins


def scene_begins(seconds: float, costs: list[list[float]], share_of_core: float) -> list[list[float]]:
    """When passes of such costs begin, by the clock, since their scene began."""
    now = {"cpu": 0.0, "clock": 0.0}

    def wait(rest: float) -> None:
        now["clock"] += rest

    left = cast(threading.Event, SimpleNamespace(wait=wait))
    pace = Pace(seconds, left, cpu=lambda: now["cpu"], clock=lambda: now["clock"])
    begins: list[list[float]] = []
    for scene in costs:
        started = now["clock"]
        begins.append([])
        for cost in scene:

            def computes(x: torch.Tensor, cost: float = cost, started: float = started) -> torch.Tensor:
                begins[-1].append(now["clock"] - started)
                now["cpu"] += cost
                now["clock"] += cost / share_of_core
                return x

            pace.before(computes)(torch.zeros(1))
        pace.finished()
    return begins


def test_parts_of_a_scene_have_chances_of_their_own() -> None:
    """What an attack draws for one part of the images, it does not draw again for the next."""

    def noisy(model: Any, x: torch.Tensor, y: torch.Tensor, threat: Ball, generator: Any, trial: Any) -> torch.Tensor:
        return x + threat.eps * (2 * torch.rand(x.shape, generator=generator) - 1)

    grey = pool(np.full(16, 100, np.uint8), np.zeros(16, np.int64))
    (scene,) = itertools.islice(scenes(grey, brightness, BALL, (Attack("noisy", noisy),), seed=0, count=16), 1)
    first, second = np.split(scene.adversarial["noisy"], [crafting.CRAFT_IMAGES])
    assert not np.array_equal(first, second)


def test_leaving_ends_a_rest() -> None:
    """A caller that leaves the crafter, for an error of its own say, waits for no rest of an hour."""
    left = threading.Event()
    paced = made(images=many(200), count=40, pace=Pace(3600.0, left))
    begun = time.monotonic()
    with Crafter(paced, threading.Event(), left=left) as crafter:
        crafter.take()  # the first is made at once, the second takes its time
        wait_for(lambda: crafter.behind)
    assert time.monotonic() - begun < 20
    assert not crafter._thread.is_alive()


def test_an_error_in_the_thread_reaches_the_round() -> None:
    """The first one to wait learns the error; later ones that there will be no more."""

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("of a surrogate")

    with Crafter(made(broken), threading.Event()) as crafter:
        with pytest.raises(ZeroDivisionError, match="of a surrogate"):
            crafter.take()
        with pytest.raises(RuntimeError, match="the crafting thread has ended"):
            crafter.take()
        assert not crafter.behind


def test_stop_ends_crafting_within_a_forward_pass() -> None:
    """However long an attack would take: the thread ends, and the waiting thread is told to stop."""
    stop, begun, passes = threading.Event(), threading.Event(), Source()

    def source(x: torch.Tensor) -> torch.Tensor:
        begun.set()
        stop.wait(30)
        return passes(x)

    endless = scenes(
        many(), unless_stopped(source, stop), BALL, (Attack.parse_transfer("pgd-100000"),), seed=0, count=8
    )
    with Crafter(endless, stop) as crafter:
        begun.wait(30)
        assert crafter.behind
        stop.set()
        with pytest.raises(Stopped):
            crafter.take()
    assert not crafter._thread.is_alive()
    assert passes.images == 8


def test_a_pool_is_known_by_its_bytes() -> None:
    """Other images, labels or classes are another pool."""
    one = many()
    others = [
        ImagePool(np.asarray(one.images) + 1, one.labels, 2),
        ImagePool(one.images, one.labels + 1, 2),
        ImagePool(one.images, one.labels, 3),
    ]
    assert one.digest == many().digest
    assert len({one.digest, *(other.digest for other in others)}) == 4


def test_a_folder_is_a_pool_that_is_read_round_by_round(tmp_path: Path) -> None:
    """Scenes are those of the same images in an array; another file is another pool, and is read by nobody else."""
    for number in range(20):
        place = tmp_path / ("cat", "dog")[number // 10]
        place.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 + number, np.uint8)).save(place / f"{number:02}.png")
    opened = open_dataset("folder", str(tmp_path), 8)
    folder = ImagePool(opened.x_test, opened.y_test, 2)
    array, digest = ImagePool(np.asarray(opened.x_test), opened.y_test, 2), folder.digest
    for one, other in itertools.islice(zip(made(images=folder), made(images=array), strict=True), 3):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.adversarial["fgsm"], other.adversarial["fgsm"])
    unasked = next(row for row in range(20) if row not in draw(20, 8, 0, 1))
    place = tmp_path / ("cat", "dog")[unasked // 10] / f"{unasked:02}.png"
    place.write_bytes(b"no image")
    again = ImagePool(open_dataset("folder", str(tmp_path), 8).x_test, opened.y_test, 2)
    assert again.digest != digest
    np.testing.assert_array_equal(next(made(images=again)).images, next(made(images=array)).images)


def test_a_round_that_asks_for_more_than_there_is_is_bad_input() -> None:
    """41 of 40 images cannot be different ones."""
    require_fit(many(), 40, "probe.images")
    with pytest.raises(BadInput, match=r"probe\.images is 41; the data have 40 test images"):
        require_fit(many(), 41, "probe.images")
