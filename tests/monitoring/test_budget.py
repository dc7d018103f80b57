"""What probing may cost, and how long a server without room is left alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfmcl.monitoring.budget import NO_ROOM, BackOff, Budget
from dfmcl.monitoring.results import REASONS


def test_a_window_is_spent_and_begins_again() -> None:
    """What fits is allowed up to the last image, and all of it once the window is over; windows keep their rhythm."""
    budget = Budget(10, 60.0, began=100.0).spent(7)
    assert budget.has(3)
    assert not budget.has(4)
    assert budget.at(159.9).used == 7
    later = budget.at(160.0)
    assert (later.used, later.began) == (0, 160.0)
    assert budget.at(290.0).began == 280.0


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 12)), max_size=60))
def test_no_window_holds_more_than_is_allowed(asked: list[tuple[float, int]]) -> None:
    """A caller that asks before spending never spends more in a window, however the questions are spaced."""
    budget, now, spent = Budget(20, 60.0), 0.0, dict[int, int]()
    for pause, images in asked:
        now += pause
        budget = budget.at(now)
        if budget.has(images):
            budget = budget.spent(images)
            spent[int(now // 60)] = spent.get(int(now // 60), 0) + images
    assert all(images <= 20 for images in spent.values())


def left_out(back_off: BackOff) -> tuple[int, BackOff]:
    """Rounds until the next one may be tried."""
    count = 0
    while back_off.waits:
        count, back_off = count + 1, back_off.skipped()
    return count, back_off


@pytest.mark.parametrize("reason", NO_ROOM)
def test_a_server_without_room_is_left_alone_longer_each_time(reason: str) -> None:
    """1, 3, 7, 15 rounds, and 15 from then on; one that is measured ends it."""
    back_off, counts = BackOff(), []
    for _ in range(6):
        count, back_off = left_out(back_off.after(reason))
        counts.append(count)
    assert counts == [1, 3, 7, 15, 15, 15]
    assert left_out(back_off.after("").after(reason))[0] == 1


@pytest.mark.parametrize("reason", [reason for reason in REASONS if reason not in NO_ROOM])
def test_other_failures_leave_out_nothing(reason: str) -> None:
    """A refused connection costs nobody anything, and its end should be seen soon."""
    assert not BackOff().after("timeout").after(reason).waits
