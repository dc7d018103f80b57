"""The client for people's programs, against a real gateway: it comes back when it may, and gives up when it must."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfmcl.common.errors import BadInput, DeadlineExceeded, Rejected, Unavailable
from dfmcl.robustness.data import load_dataset
from dfmcl.serving.clients.images import KEY_VARIABLE, ImageClient, Patience, Prediction, Unseen, retry_after
from dfmcl.serving.gateway.api_keys import digest_of
from tests.serving.doors import KEY, KEYS, PRIVILEGED, Door, Relay, encoded, opened, settings
from tests.serving.workshop import Served

FILES = [encoded(image) for image in load_dataset("digits").x_test[:3]]
SLOW, SPENT = "dfmcl_of-a-slow-user", "dfmcl_of-a-user-who-has-spent-all"


@pytest.fixture(scope="module")
def door(served: Served) -> Iterator[Door]:
    slow = {"name": "slow", "sha256": digest_of(SLOW), "images_per_second": 1.0, "burst_images": 1}
    spent = {"name": "spent", "sha256": digest_of(SPENT), "images_per_second": 0.01, "burst_images": 1}
    with opened(settings([served.ready["grpc"]], keys=[*KEYS, slow, spent])) as door:
        yield door


def test_results_come_in_order(door: Door, tmp_path: Path) -> None:
    """Files and bytes, one that is no image in its place, logits where the key may see them; as the gateway says it."""
    (tmp_path / "digit.png").write_bytes(FILES[1])
    with ImageClient(door.url, key=PRIVILEGED) as client:
        album = client.classify([FILES[0], tmp_path / "digit.png", b"no image"], logits=True)
        first, second, broken = album.results
        (alone,) = client.classify(FILES[:1]).results
    for found, file in ((first, FILES[0]), (second, FILES[1])):
        assert isinstance(found, Prediction)
        said = door.classify(file, query="?logits=true").json
        assert (found.label, found.index) == (said["label"], said["index"])
        np.testing.assert_allclose(found.logits, said["logits"], atol=1e-5)
        assert found.top[0].probability == pytest.approx(said["top"][0]["probability"], abs=1e-4)
    assert isinstance(alone, Prediction)
    assert isinstance(first, Prediction)
    assert alone.label == first.label
    assert isinstance(broken, Unseen)
    assert broken.reason == "bad_image"
    assert album.version == "1"


def test_key_comes_from_an_argument_or_the_environment(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown one is told at once: another try would not mend it."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with ImageClient(door.url) as client:
        client.classify(FILES[:1])
    assert door.lines()[-1]["key"] == "shop"
    before = len(door.lines())
    with ImageClient(door.url, key="") as client, pytest.raises(Rejected, match="unauthorized"):
        client.classify(FILES[:1])
    assert len(door.lines()) == before + 1


@pytest.mark.parametrize("key", ["a b", "a\r\nX-Other: b", "é"])
def test_what_can_be_no_key_is_bad_input_and_not_repeated(key: str) -> None:
    """It would stand in a log."""
    with pytest.raises(BadInput) as caught:
        ImageClient("http://127.0.0.1:1", key=key)
    assert key not in str(caught.value)


def test_it_comes_back_when_the_gateway_says(door: Door) -> None:
    """429 with Retry-After: the second try comes no earlier, under the same id, and gets an answer."""
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(seconds)

    with ImageClient(door.url, key=SLOW, sleep=sleep) as client:
        client.classify(FILES[:2])
        album = client.classify(FILES[:1])
    assert isinstance(album.results[0], Prediction)
    lines = [line for line in door.lines() if line["id"] == album.request_id]
    assert [line["status"] for line in lines] == [429] * len(waits) + [200]
    assert waits
    assert min(waits) >= 1


def test_a_wait_beyond_its_patience_is_told_at_once(door: Door) -> None:
    """It neither waits for minutes nor asks earlier than it was told to."""
    waits: list[float] = []
    with ImageClient(door.url, key=SPENT, sleep=waits.append) as client:
        client.classify(FILES[:2])
        begun = time.monotonic()
        with pytest.raises(Unavailable, match=r"rate_limited.*come back in \d+ s"):
            client.classify(FILES[:1])
    assert (waits, time.monotonic() - begun < 5) == ([], True)


def test_a_gateway_that_comes_back_is_found(door: Door) -> None:
    """Connections that are refused and broken cost tries, and no answer."""
    with Relay(f"127.0.0.1:{door.port}") as relay:
        pauses: list[float] = []

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 2:
                relay.mend()

        with ImageClient(f"http://{relay.url}", key=KEY, sleep=sleep, chance=lambda: 0.5) as client:
            client.classify(FILES[:1])
            relay.break_off()
            assert isinstance(client.classify(FILES[:1]).results[0], Prediction)
        assert pauses == [0.05, 0.1]


def test_nobody_there_is_told_after_so_many_tries() -> None:
    """Not for ever."""
    pauses: list[float] = []
    patience = Patience(attempts=4)
    with (
        ImageClient("http://127.0.0.1:1", key="", patience=patience, sleep=pauses.append) as client,
        pytest.raises(Unavailable, match="after 4 tries"),
    ):
        client.classify(FILES[:1])
    assert len(pauses) == 3


def test_deadline_is_of_all_tries_together(door: Door) -> None:
    """A gateway that is silent is left at the deadline."""
    with Relay(f"127.0.0.1:{door.port}") as relay:
        relay.freeze()
        begun = time.monotonic()
        with (
            ImageClient(f"http://{relay.url}", key=KEY, patience=Patience(seconds=0.7)) as client,
            pytest.raises(DeadlineExceeded),
        ):
            client.classify(FILES[:1])
        assert 0.5 < time.monotonic() - begun < 5


def test_files_that_are_not_there_are_bad_input(tmp_path: Path) -> None:
    """Before anybody is asked."""
    with ImageClient("http://127.0.0.1:1", key="") as client:
        with pytest.raises(BadInput, match="cannot be read"):
            client.classify([tmp_path / "none.png"])
        with pytest.raises(BadInput, match="none were given"):
            client.classify([])


@given(st.integers(0, 10**8), st.integers(0, 10**6))
def test_retry_after_is_read_both_ways(now: int, seconds: int) -> None:
    """Seconds, or a date as HTTP writes it; one that has passed is no wait."""
    assert retry_after(str(seconds), now) == seconds
    assert retry_after(email.utils.formatdate(now + seconds, usegmt=True), now) == seconds
    assert retry_after(email.utils.formatdate(now, usegmt=True), now + seconds) == 0


@pytest.mark.parametrize("text", ["", "soon", "-1", "1.5", "²", "9" * 40])
def test_what_is_no_retry_after_is_none(text: str) -> None:
    """A proxy's words must not stop a client."""
    assert retry_after(text, 0.0) is None
