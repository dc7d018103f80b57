"""Turns without a Triton: a clock that is told the time, and a server that takes as long as it says."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from dfmcl.serving.gateway.admission import GREED, LONGEST_PAUSE, PATIENCE, PER_SECOND, Admission
from dfmcl.serving.gateway.problems import Problem
from dfmcl.serving.gateway.turns import COMPANY_SECONDS, Turns


@dataclass
class Server:
    """Computes one slice after another, `fixed` seconds each and `each` an image, in a time of its own."""

    fixed: float = 0.001
    each: float = 0.01
    now: float = 0.0
    hiccups: random.Random | None = None  # then every third slice takes up to twice its time
    computed: list[tuple[str, int, int]] = field(default_factory=list)  # whose, from, to

    def ask(self, who: str) -> Any:
        async def ask(begin: int, end: int) -> tuple[int, int]:
            await asyncio.sleep(0)
            seconds = self.fixed + self.each * (end - begin)
            if self.hiccups is not None and self.hiccups.random() < 1 / 3:
                seconds *= 1 + self.hiccups.random()
            self.now += seconds
            self.computed.append((who, begin, end))
            return begin, end

        return ask


def turns_of(server: Server, most: int = 64) -> Turns:
    turns = Turns(lambda: server.now)
    turns.most = most
    return turns


async def together(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    return list(await asyncio.gather(*work))


def test_every_image_is_computed_once_and_in_order() -> None:
    """However it is cut: the parts of a request follow each other without a gap, and nobody else's are among them."""
    server = Server()
    turns = turns_of(server)

    async def run() -> list[Any]:
        return await together(*(turns.all(who, images, server.ask(who)) for who, images in (("a", 64), ("b", 7))))

    for parts, images in zip(asyncio.run(run()), (64, 7), strict=True):
        assert parts[0][0] == 0
        assert parts[-1][1] == images
        assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))
    assert (turns.computed, turns.waiting) == (71, 0)


def test_flows_share_by_images_and_not_by_requests() -> None:
    """One flow with 20 requests of 64, one with 20 of 8: while both wait, each gets half of the images."""
    server = Server()
    turns = turns_of(server)

    async def run() -> None:
        many = [turns.all("many", 64, server.ask("many")) for _ in range(20)]
        await together(*many, *(turns.all("few", 8, server.ask("few")) for _ in range(20)))

    asyncio.run(run())
    last = max(at for at, (who, *_) in enumerate(server.computed) if who == "few")
    images = {
        name: sum(end - begin for who, begin, end in server.computed[: last + 1] if who == name)
        for name in ("many", "few")
    }
    assert images["few"] == 160
    assert 140 <= images["many"] <= 180


def test_newcomer_waits_for_a_slice_and_not_for_a_queue() -> None:
    """1,000 images of another flow wait: what comes is next, but for what is being computed."""
    server = Server()
    turns = turns_of(server)

    async def run() -> int:
        hog = [asyncio.create_task(turns.all("hog", 50, server.ask("hog"))) for _ in range(20)]
        waits = []
        for _ in range(20):
            for _ in range(5):
                await asyncio.sleep(0)  # the hog's turns
            before = turns.computed
            await turns.all("shopper", 1, server.ask("shopper"))
            waits.append(turns.computed - before - 1)
        await asyncio.gather(*hog)
        return max(waits[1:])

    assert asyncio.run(run()) <= 4  # the slice that is being computed, and one more before this task hears of it


def test_within_a_flow_first_come_is_first_served() -> None:
    """Or all of several would be late together."""
    server = Server()
    turns = turns_of(server)

    async def run() -> None:
        await together(*(turns.all("hog", 30, server.ask(name)) for name in "abc"))

    asyncio.run(run())
    assert [who for who, *_ in server.computed] == sorted(who for who, *_ in server.computed)


@pytest.mark.parametrize(("fixed", "each", "least", "most"), [(0.001, 0.01, 1, 2), (0.01, 0.0001, 15, 64)])
def test_slices_in_company_take_about_as_long_as_one_image(fixed: float, each: float, least: int, most: int) -> None:
    """Few images where each takes its time, as on a CPU; many where they cost little more than one, as on a GPU."""
    server = Server(fixed, each)
    turns = turns_of(server)

    async def run() -> None:
        await turns.all("a", 1, server.ask("a"))
        for _ in range(60):
            await together(*(turns.all(who, 64, server.ask(who)) for who in "ab"))

    asyncio.run(run())
    assert least <= turns.slice <= most
    server.now += COMPANY_SECONDS + 1
    asyncio.run(turns.all("a", 64, server.ask("a")))
    for _ in range(60):
        asyncio.run(turns.all("a", 64, server.ask("a")))
    assert turns.slice > most or turns.slice == 64  # alone it may take larger ones


def test_one_image_at_a_time_stays_so_and_hiccups_do_not_hold_others_back() -> None:
    """Where two images take twice as long, they go together once in a hundred slices at most: whoever comes second
    would wait for both. Where two cost little more than one, slices grow although every third takes too long."""
    for fixed, each, small in ((0.001, 0.01, True), (0.01, 0.0001, False)):
        server = Server(fixed, each, hiccups=random.Random(0))
        turns = turns_of(server)

        async def run(turns: Turns, server: Server) -> None:
            for _ in range(60):
                await together(*(turns.all(who, 64, server.ask(who)) for who in "ab"))

        asyncio.run(run(turns, server))
        sizes = [end - begin for _, begin, end in server.computed][-500:]
        if small:
            assert sum(size > 1 for size in sizes) <= 5
        else:
            assert sum(sizes) / len(sizes) > 8


def test_slices_go_at_the_same_time_where_there_are_servers_for_them() -> None:
    """As many as there are instances; but the first of a request alone, as the others have to match its version."""
    turns, now, most = Turns(lambda: 0.0), set[int](), [0]
    turns.most, turns.parallel = 2, 3

    async def ask(begin: int, end: int) -> int:
        assert begin == 0 or 0 not in now
        now.add(begin)
        most[0] = max(most[0], len(now))
        await asyncio.sleep(0.001)
        now.remove(begin)
        return begin

    assert asyncio.run(turns.all("a", 20, ask)) == list(range(0, 20, 2))
    assert most[0] == 3


@pytest.mark.parametrize("steps", range(6))
def test_who_leaves_takes_nothing_along(steps: int) -> None:
    """Cancelled at any step, waiting or being computed: no place is lost, and others get their turns."""
    server = Server()
    turns = turns_of(server)

    async def run() -> None:
        asked = [asyncio.create_task(turns.all("a", 10, server.ask("a"))) for _ in range(5)]
        for _ in range(steps):
            await asyncio.sleep(0)  # a step
        for task in asked[1:]:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await asyncio.sleep(0)
        assert turns.waiting == 0
        assert await turns.all("b", 3, server.ask("b"))

    asyncio.run(run())


def test_error_of_a_slice_is_that_of_the_request() -> None:
    """Its other slices are not computed, and others' are."""
    server = Server()
    turns = turns_of(server)

    async def broken(begin: int, end: int) -> None:
        raise ValueError("broken")

    async def run() -> list[Any]:
        return await asyncio.gather(
            turns.all("a", 64, broken), turns.all("a", 8, server.ask("b")), return_exceptions=True
        )

    failed, answered = asyncio.run(run())
    assert isinstance(failed, ValueError)
    assert answered[-1][1] == 8
    assert turns.waiting == 0


def test_canary_gives_way() -> None:
    """It has a tenth of a user's share, and makes nobody's slices smaller."""
    server = Server()
    turns = turns_of(server)

    async def run() -> None:
        canary = (turns.all("canary", 20, server.ask("canary"), weight=0.1, counts=False) for _ in range(5))
        await together(*canary, *(turns.all("user", 20, server.ask("user")) for _ in range(5)))

    asyncio.run(run())
    last = max(at for at, (who, *_) in enumerate(server.computed) if who == "user")
    assert sum(end - begin for who, begin, end in server.computed[:last] if who == "canary") <= 30
    assert turns.slice > 2


@dataclass
class Bench:
    """An admission whose time and work are told."""

    places: int = 16
    now: float = 0.0
    computed: int = 0

    def __post_init__(self) -> None:
        self.admission = Admission(self.places, lambda: self.computed, lambda: self.now)

    def work(self, images: int, seconds: float) -> None:
        """A request that takes so long."""
        with self.admission.place("a", images, 60) as place:
            self.admission.arrived(place, images)
            self.now += seconds
            self.computed += images


def refused(bench: Bench, flow: str, images: int, seconds: float = 60) -> int | None:
    """Seconds of Retry-After, None where it is let in."""
    try:
        with bench.admission.place(flow, images, seconds):
            return None
    except Problem as problem:
        return problem.retry_seconds if problem.reason == "overloaded" else -1


def test_one_flow_leaves_places_to_others() -> None:
    """It gets as many as leave room for GREED times fewer; others the rest, and all are given back."""
    bench = Bench(places=64)
    with ExitStack() as held:
        while refused(bench, "hog", 1) is None:
            held.enter_context(bench.admission.place("hog", 1, 60))
        assert len(bench.admission) == 57 >= GREED * (64 - 57)
        assert refused(bench, "shopper", 1) is None
    assert refused(bench, "hog", 1) is None
    assert len(bench.admission) == 0


def test_request_that_would_be_late_is_refused_at_once() -> None:
    """100 images a second, 100 of its own before it: 0.4 s are too few, and it is told when to come; 3 s are enough."""
    bench = Bench()
    bench.work(500, 5.0)
    with bench.admission.place("a", 100, 60) as place:
        bench.admission.arrived(place, 100)
        assert refused(bench, "a", 1, 0.4) == 1
        assert refused(bench, "a", 1, 1.01 / PATIENCE + 0.01) is None
        place.images = 5000
        assert refused(bench, "a", 1, 10) == 46  # 50 s of work, and it can bear 5
        assert refused(bench, "b", 1, 0.1) is None  # another flow does not wait behind them
    assert refused(bench, "a", 5000, 0.1) is None  # alone it may try


def test_a_cold_server_is_given_time() -> None:
    """Its first answer came after two seconds, alone of four that are computed together: none is too late yet."""
    bench = Bench()
    with ExitStack() as held:
        for _ in range(3):
            bench.admission.arrived(held.enter_context(bench.admission.place("a", 8, 2)), 8)
        bench.work(8, 2.0)
        assert refused(bench, "a", 8, 2) is None
        bench.work(8, 3.0)
        assert refused(bench, "a", 8, 2) == 10, "after five seconds it is slow, not cold"


def test_throughput_counts_work_and_not_rest() -> None:
    """Idle hours and slow uploads do not make it slower; what was long ago fades."""
    bench = Bench()
    assert bench.admission.throughput == float("inf")
    bench.work(500, 5.0)
    bench.now += 3600
    assert bench.admission.throughput == pytest.approx(100)
    with bench.admission.place("a", 1, 60):
        bench.now += 5  # its body does not come
    assert bench.admission.throughput == pytest.approx(100)
    for _ in range(60):
        bench.work(10, 1.0)
    assert bench.admission.throughput == pytest.approx(10, rel=0.01)


def test_refusals_are_paced() -> None:
    """Now and then at once; in a flood so many a second, and never later than a second; large bodies cost more."""
    bench = Bench()
    assert bench.admission.pause(0) <= 1 / PER_SECOND
    bench.now += 1
    pauses = [bench.admission.pause(0) for _ in range(1000)]
    assert pauses[100] == pytest.approx(101 / PER_SECOND)
    assert max(pauses) == LONGEST_PAUSE
    bench.now += 10
    assert bench.admission.pause(1_000_000) > 10 / PER_SECOND
