"""A model lives while it answers anybody."""

from __future__ import annotations

import socket
from typing import Any

import numpy as np
import pytest

from dfmcl.common.errors import Unavailable
from dfmcl.serving.clients.triton import Client
from dfmcl.serving.triton import pulse
from dfmcl.serving.triton.process import Server
from tests.processes import wait_until
from tests.serving.workshop import Served


def port_of(served: Served) -> int:
    return int(served.ready["metrics"].removesuffix("/metrics").rpartition(":")[2])


def test_answers_are_counted_by_triton(served: Served) -> None:
    """Each good one, of this model only; not the requests that failed. Without metrics nothing is known."""
    before = pulse.answered(port_of(served), "digits")
    assert before
    assert pulse.answered(port_of(served), "others") == {}
    with Client(served.ready["grpc"], "digits") as client:
        client.describe()

    def more() -> int:
        after = pulse.answered(port_of(served), "digits")
        assert after is not None
        return sum(after.values()) - sum(before.values())

    wait_until(more)  # it counts after it has answered
    assert more() == 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert pulse.answered(free.getsockname()[1], "digits") is None


@pytest.mark.parametrize(
    ("before", "after", "lives"),
    [
        ({"v1": 3}, {"v1": 4}, True),
        ({"v1": 3}, {"v2": 1}, True),
        ({"v1": 3}, {"v1": 3}, False),
        ({"v1": 3}, {}, False),
        ({}, {"v1": 0}, False),
        (None, {"v1": 4}, False),
        ({"v1": 3}, None, False),
    ],
)
def test_progress_is_a_count_that_grew(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, int] | None, after: dict[str, int] | None, lives: bool
) -> None:
    """A question that fails is forgiven where others were answered meanwhile, and only then."""
    answers = iter([before, after])
    monkeypatch.setattr(pulse, "answered", lambda port, model: next(answers))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens: connections are refused
        server: Any = Server(None, None, {"grpc": free.getsockname()[1], "metrics": 0}, "")  # type: ignore[arg-type]  # no process is asked for
        error = pulse.silence(server, "digits", np.zeros((1, 16, 16, 3), np.uint8))
    assert (error is None) is lives
    assert error is None or isinstance(error, Unavailable)
