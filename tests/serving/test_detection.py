"""Detectors of attacks by queries: their near-duplicates, their memory, their messages, and whom they suspect."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from dfmcl.robustness.data import load_dataset
from dfmcl.serving.detection.campaigns import Alarm, Rule
from dfmcl.serving.detection.detector import THRESHOLDS, Examiner, Worker
from dfmcl.serving.detection.fingerprints import (
    CONTRAST,
    DETECTORS,
    STEP,
    TAGS,
    WINDOW,
    Fingerprinter,
    outline,
    salted_tags,
)
from dfmcl.serving.detection.history import History
from dfmcl.serving.gateway.api_keys import Bucket, Caller, digest_of
from dfmcl.serving.gateway.config import Detection, GatewayConfig
from dfmcl.serving.gateway.metrics import DetectionMetrics
from tests.processes import wait_until
from tests.serving.doors import KEY, KEYS, PLENTY, PRIVILEGED, Door, encoded, opened, settings
from tests.serving.queries import Images, Stream, attack, blinded, photograph
from tests.serving.workshop import Served

SALT = b"sixteen bytes of"
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]))
BENIGN, ATTACK, OTHER_CANARY = "dfmcl_benign", "dfmcl_attack", "dfmcl_other"
CANARIES = [
    {"name": "benign-probe", "sha256": digest_of(BENIGN), "canary": True, "probe": "benign", **PLENTY},
    {"name": "attack-probe", "sha256": digest_of(ATTACK), "canary": True, "probe": "attack", "logits": True, **PLENTY},
    {"name": "other-canary", "sha256": digest_of(OTHER_CANARY), "canary": True, **PLENTY},
]


def noise(seed: int, shape: tuple[int, ...] = (32, 32, 3)) -> Images:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def nearly(image: Images, seed: int) -> Images:
    """One pixel of another colour, as seldom the same as there are colours."""
    changed, rng = image.copy(), np.random.default_rng(seed)
    changed[rng.integers(image.shape[0]), rng.integers(image.shape[1])] = rng.integers(0, 256, image.shape[2])
    return changed


def resemblance(first: Images, second: Images, salt: bytes = SALT) -> dict[str, float] | None:
    history, fingerprint = History(10, 100), Fingerprinter(salt)
    history.resemblance(fingerprint(first), 0)
    return history.resemblance(fingerprint(second), 1)


def matches(first: Images, second: Images) -> dict[str, bool]:
    found = resemblance(first, second)
    assert found is not None
    return {name: found[name] >= THRESHOLDS[name] for name in DETECTORS}


# What a fingerprint is


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(shape=SHAPES, seed=st.integers(0, 99))
def test_tags_are_those_of_the_definition(shape: tuple[int, int, int], seed: int) -> None:
    """Written out in whole numbers, window by window, on images of any shape, few-coloured ones too."""
    rng = np.random.default_rng(seed)
    values = rng.choice(rng.integers(0, 256, rng.integers(1, 9), dtype=np.uint8), int(np.prod(shape)))
    offsets = rng.integers(0, STEP, len(values), dtype=np.uint16)
    multipliers = rng.integers(0, 2**64, WINDOW, dtype=np.uint64)
    quantised = [(int(v) + int(o)) // STEP + 1 for v, o in zip(values, offsets, strict=True)]
    length = min(WINDOW, len(values))
    digests = {
        sum(int(m) * q for m, q in zip(multipliers, quantised[start : start + length], strict=False)) % 2**64 >> 8
        for start in range(0, len(values) - length + 1, 2 if len(values) - length + 1 > 4096 else 1)
    }
    expected = sorted({digest % 2**16 for digest in sorted(digests)[-TAGS:]} - {0})
    found = salted_tags(values, offsets, multipliers)
    assert found.shape == (TAGS,)
    assert found[found > 0].tolist() == expected


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(shape=SHAPES, seed=st.integers(0, 99))
def test_outline_is_that_of_the_definition(shape: tuple[int, int, int], seed: int) -> None:
    """Written out block by block: who is brighter, then who is darker, by more than the contrast."""
    image = noise(seed, shape) if seed % 2 else photograph(seed, max(*shape[:2], 2))[: shape[0], : shape[1], : shape[2]]
    value = image.max(axis=2).astype(float)
    height, width = value.shape
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    soft = np.zeros_like(value)
    for y, x in np.ndindex(height, width):
        for dy, dx in np.ndindex(3, 3):
            at = min(max(y + dy - 1, 0), height - 1), min(max(x + dx - 1, 0), width - 1)
            soft[y, x] += kernel[dy, dx] * value[at]
    rows, columns = min(8, height), min(8, width)
    means = np.array(
        [
            [
                soft[
                    r * height // rows : (r + 1) * height // rows, c * width // columns : (c + 1) * width // columns
                ].mean()
                for c in range(columns)
            ]
            for r in range(rows)
        ]
    )
    difference = []
    for dy, dx in ((0, 1), (1, 1), (1, 0), (1, -1)):
        for r, c in np.ndindex(rows, columns):
            at = min(r + dy, rows - 1), min(max(c + dx, 0), columns - 1)
            difference.append(means[at] - means[r, c])
    if min(abs(abs(d) - CONTRAST) for d in difference) < 1e-3:
        return  # float32 may round it to the other side
    bits = np.unpackbits(outline(image).view(np.uint8)).astype(bool).tolist()
    expected = [d > CONTRAST for d in difference] + [d < -CONTRAST for d in difference]
    assert bits[: len(expected)] == expected
    assert not any(bits[len(expected) :])


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(seeds=st.lists(st.integers(0, 3), min_size=1, max_size=20), salt=st.binary(min_size=16, max_size=64))
def test_resemblance_is_that_of_the_definition(seeds: list[int], salt: bytes) -> None:
    """The largest share of tags, and of contrasts, in common with one earlier image, by sets."""
    rng, fingerprint, history = np.random.default_rng(len(seeds)), Fingerprinter(salt), History(50, 100)
    seen: list[tuple[bytes, set[int], set[int]]] = []
    for seed in seeds:
        image = photograph(seed)
        image[1 + seed :] = 0  # few windows differ, so that some images have fewer tags than others
        image = nearly(image, int(rng.integers(1 << 20)))
        made = fingerprint(image)
        tags = set(made.tags.tolist()) - {0}
        bits = set(np.flatnonzero(np.unpackbits(made.outline.view(np.uint8))).tolist())
        found = history.resemblance(made, 0)
        if image.tobytes() in {raw for raw, *_ in seen}:
            assert found is None
            continue
        assert found == {
            "salted_hash": max((len(tags & old) / max(len(tags), len(old)) for _, old, _ in seen), default=0),
            "perceptual": max((len(bits & old) / max(1, len(bits | old)) for *_, old in seen), default=0),
        }
        seen.append((image.tobytes(), tags, bits))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(shape=SHAPES, seed=st.integers(0, 1000), salt=st.binary(min_size=16, max_size=64))
def test_same_image_has_the_same_fingerprint(shape: tuple[int, int, int], seed: int, salt: bytes) -> None:
    """Whatever its shape and the salt; and it is told from one that only resembles it."""
    image, fingerprint = noise(seed, shape), Fingerprinter(salt)
    first, second = fingerprint(image), Fingerprinter(salt)(image.copy())
    assert first.exact == second.exact
    np.testing.assert_array_equal(first.tags, second.tags)
    np.testing.assert_array_equal(first.outline, second.outline)
    assert resemblance(image, image, salt) is None
    changed = image.copy()
    changed[0, 0, 0] ^= 1
    assert resemblance(image, changed, salt) is not None
    if shape[0] != shape[1]:  # the same bytes as another image
        assert fingerprint(image.reshape(shape[1], shape[0], shape[2])).exact != first.exact


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6))
def test_different_images_do_not_match(seed: int) -> None:
    """Neither noise nor smooth pictures."""
    for make in (noise, photograph):
        assert not any(matches(make(seed), make(seed + 1)).values())


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6), top=st.integers(0, 20), left=st.integers(0, 20))
def test_small_perturbation_matches(seed: int, top: int, left: int) -> None:
    """8/255 in a square of an eighth of the image, as Square proposes: both. Noise of 8/255 on all of it: the
    perceptual hash only, as hardly a window of values stays as it was."""
    image, rng = photograph(seed).astype(int), np.random.default_rng(seed)
    square = image.copy()
    square[top : top + 12, left : left + 12] += rng.choice([-8, 8], 3)
    everywhere = image + rng.choice([-8, 8], image.shape)
    square, everywhere = (np.clip(changed, 0, 255).astype(np.uint8) for changed in (square, everywhere))
    assert matches(photograph(seed), square) == {"salted_hash": True, "perceptual": True}
    assert matches(photograph(seed), everywhere) == {"salted_hash": False, "perceptual": True}


def test_large_image_costs_no_more_and_matches_the_same() -> None:
    """Of 224 x 224 pixels: an eighth changed by 8/255 matches, another image does not."""
    first, second = photograph(0, 224), photograph(1, 224)
    changed = first.astype(int)
    changed[50:130, 50:130] += 8
    assert matches(first, np.clip(changed, 0, 255).astype(np.uint8)) == {"salted_hash": True, "perceptual": True}
    assert not any(matches(first, second).values())


def test_salt_decides_the_tags() -> None:
    """Under another salt an image has other tags, so that nobody can work out elsewhere which queries will match."""
    for seed in range(20):
        first, second = (Fingerprinter(salt)(photograph(seed)) for salt in (SALT, SALT[::-1]))
        assert first.exact != second.exact
        assert len(np.intersect1d(first.tags, second.tags)) <= 3  # one in 26 by chance


def test_image_without_contrast_resembles_nothing() -> None:
    """Black and white would have the same outline; that is no evidence."""
    black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    assert matches(black, white) == {"salted_hash": False, "perceptual": False}


# What is remembered, and for how long


def test_horizon_is_kept() -> None:
    """An image is known while it is among the last ones and young enough, and no longer."""
    fingerprint = Fingerprinter(SALT)
    old, changed = photograph(0), nearly(photograph(0), 1)
    for others, seconds, known in ((4, 10.0, True), (5, 10.0, False), (4, 10.1, False), (0, 10.0, True)):
        history = History(5, 10)
        history.resemblance(fingerprint(old), 0)
        for seed in range(others):
            history.resemblance(fingerprint(noise(seed)), seconds)
        found = history.resemblance(fingerprint(changed), seconds)
        assert found is not None
        assert (found["salted_hash"] >= 0.5, found["perceptual"] >= 0.9) == (known, known)


def size_of(history: History) -> int:
    return sum(value.nbytes for value in vars(history).values() if isinstance(value, np.ndarray))


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    sent=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 10**6)), max_size=150),
    queries=st.integers(2, 9),
    keys=st.integers(1, 4),
)
def test_memory_is_bounded(sent: list[tuple[int, int]], queries: int, keys: int) -> None:
    """Whatever is sent under however many keys: so many keys, so many images each, at 190 bytes."""
    stream = Stream(Detection(queries=queries, keys=keys, matches=1))
    for key, seed in sent:
        stream.send([noise(seed)], Caller(f"key {key}"))
        watched = stream.examiner._watched
        assert len(watched) <= keys
        assert stream.value("remembered") == sum(w.history.held for w in watched.values()) <= keys * queries
        assert all(size_of(w.history) <= 190 * queries for w in watched.values())
        assert all(len(a._recent) <= 1 for w in watched.values() for a in w.alarms.values())


def test_the_key_that_asked_longest_ago_is_forgotten() -> None:
    """Least recently used, with its campaign, which ends; and every key that has nothing left to count."""
    stream = Stream(Detection(keys=2, matches=2, seconds=100, quiet_seconds=1000))
    near = [nearly(photograph(0), seed) for seed in range(9)]
    stream.send(near[:4], Caller("a")).send([noise(0)], Caller("b")).send([near[5]], Caller("a"))
    stream.send([noise(1)], Caller("c"))
    assert list(stream.examiner._watched) == ["a", "c"]
    assert stream.value("campaigns_active", detector="salted_hash") == 1
    stream.examiner.tick(stream.now + 101)
    assert stream.examiner._watched == {}
    assert stream.value("campaigns_active", detector="salted_hash") == 0
    assert [(e["phase"], e["detector"], e["key"]) for e in stream.log] == [
        (phase, detector, "a") for phase in ("begun", "ended") for detector in DETECTORS
    ]


def test_a_model_of_another_size_starts_anew() -> None:
    """Outlines of other lengths cannot be compared; the gateway goes on."""
    stream = Stream()
    stream.send([photograph(0, 32), photograph(0, 5), photograph(1, 5), nearly(photograph(1, 5), 1), photograph(0, 32)])
    assert stream.value("repeats_total") == 1
    assert stream.value("remembered") == 4


# When there is a campaign


@hypothesis.given(
    steps=st.lists(st.tuples(st.booleans(), st.one_of(st.floats(0, 3), st.floats(0, 60))), max_size=80),
    wanted=st.integers(1, 5),
    queries=st.integers(6, 20),
)
def test_campaign_begins_and_ends_by_the_rule(steps: list[tuple[bool, float]], wanted: int, queries: int) -> None:
    """Beside the rule written out: enough matches among the last images, in time, and after the last campaign."""
    rule, now, last_end = Rule(wanted, queries, 60, 40), 0.0, -1
    alarm = Alarm("key", "perceptual", rule)
    matched: list[tuple[int, float]] = []
    running = False
    for number, (match, pause) in enumerate(steps):
        now += pause
        quiet = running and now - matched[-1][1] >= 40
        ended = alarm.end(now)
        assert (ended is not None) == quiet
        if quiet:
            running, last_end = False, len(matched)
        if match:
            matched.append((number, now))
            recent = [m for m in matched[max(last_end, 0) :] if number - m[0] < queries and now - m[1] <= 60]
            begins = not running and len(recent) >= wanted
            assert alarm.match(number, now) == begins
            if begins:
                running, last_end = True, last_end
        assert (alarm.campaign is not None) == running


@pytest.mark.parametrize(
    ("number", "now", "begins"), [(5, 60.0, True), (6, 60.0, False), (5, 60.1, False)], ids=["in", "images", "time"]
)
def test_campaign_needs_its_matches_within_the_horizon(number: int, now: float, begins: bool) -> None:
    """Two among the last six images and within a minute, to the image and the moment."""
    alarm = Alarm("key", "perceptual", Rule(2, 6, 60, 40))
    assert not alarm.match(0, 0.0)
    assert alarm.match(number, now) == begins


def test_campaign_is_told_when_it_begins_and_ends() -> None:
    """Once each, with key, detector, matches and duration; the metrics follow; a new one can begin."""
    stream = Stream(Detection(matches=5, quiet_seconds=60, detectors=["salted_hash"]))
    stream.send(nearly(photograph(0), seed) for seed in range(30))
    about = {"event": "campaign", "key": "shop", "detector": "salted_hash"}
    assert stream.log == [about | {"phase": "begun", "matches": 5, "seconds": 0.4}]
    assert stream.value("campaigns_active", detector="salted_hash") == 1
    stream.examiner.tick(stream.now + 59)
    assert len(stream.log) == 1
    stream.examiner.tick(stream.now + 60)
    assert stream.log[1:] == [about | {"phase": "ended", "matches": 29, "seconds": 2.8}]
    assert stream.value("campaigns_active", detector="salted_hash") == 0
    assert stream.value("campaigns_total", detector="salted_hash") == 1
    assert stream.value("matches_total", detector="perceptual") == 0  # it was not asked for
    stream.now += 61
    stream.send(nearly(photograph(0), seed) for seed in range(50, 60))
    assert stream.value("campaigns_total", detector="salted_hash") == 2


def test_repeats_are_no_campaign() -> None:
    """Caches and retries send the same bytes; an attacker learns nothing from that."""
    stream = Stream(Detection(matches=2)).send([photograph(0)] * 100)
    assert (stream.value("images_total"), stream.value("repeats_total")) == (100, 99)
    assert stream.log == []
    assert stream.value("remembered") == 1


def test_camera_that_stands_still_is_taken_for_a_campaign() -> None:
    """Near-duplicates are what is seen, not why they are sent: the page says so, and `detect = false` helps. One that
    pans by a pixel a frame is none."""
    rng, scene = np.random.default_rng(0), photograph(0, 64).astype(int)
    still = [np.clip(scene[:32, :32] + rng.integers(-4, 5, (32, 32, 3)), 0, 255).astype(np.uint8) for _ in range(60)]
    panning = [np.roll(photograph(0, 64), frame, axis=1)[:32, :32] for frame in range(60)]
    assert {entry["detector"] for entry in Stream(Detection(matches=20)).send(still).log} == {"perceptual"}
    assert Stream(Detection(matches=20)).send(panning).log == []


def test_keys_are_apart() -> None:
    """What one key sends is no match for another's, and counts for its campaign alone."""
    near = [nearly(photograph(0), seed) for seed in range(40)]
    stream = Stream(Detection(matches=5))
    for number, image in enumerate(near):
        stream.send([image], Caller(f"key {number}"))
    assert stream.value("matches_total", detector="salted_hash") == 0
    stream.send(near[:3], Caller("a")).send(near[3:30], Caller("b"))
    assert {entry["key"] for entry in stream.log} == {"b"}


def test_probes_count_apart() -> None:
    """The canary's images, matches and campaigns are in series of their own; nobody is told, slowed or alarmed."""
    stream = Stream(Detection(matches=5, throttle_images_per_second=0.1, webhook="http://127.0.0.1:9/"))
    bucket = Bucket(1000.0, 1, lambda: stream.now)
    probe = Caller("probe", canary=True, probe="attack", bucket=bucket)
    stream.send((nearly(photograph(0), seed) for seed in range(20)), probe)
    stream.send((noise(seed) for seed in range(20)), Caller("clean", canary=True, probe="benign"))
    assert stream.value("canary_images_total", probe="attack") == 20
    assert stream.value("canary_images_total", probe="benign") == 20
    for detector in DETECTORS:
        assert stream.value("canary_matches_total", probe="attack", detector=detector) == 19
        assert stream.value("canary_matches_total", probe="benign", detector=detector) == 0
        assert stream.value("canary_campaigns_total", probe="attack", detector=detector) == 1
        for name in ("matches_total", "campaigns_total", "campaigns_active"):
            assert stream.value(name, detector=detector) == 0
    assert stream.value("images_total") == 0
    assert stream.log == []
    stream.now += 1
    assert bucket.take() == 0
    assert bucket.take() == pytest.approx(0.001)


# What follows from it


@hypothesis.given(
    rate=st.floats(0.5, 100),
    low=st.floats(0.1, 200),
    seconds=st.floats(0.1, 20),
    waits=st.lists(st.floats(0, 3), min_size=1, max_size=100),
)
def test_slowed_bucket_gives_less_for_a_time(rate: float, low: float, seconds: float, waits: list[float]) -> None:
    """No more than its rates allow, no less after the seconds that it names, and all of it again when time is up."""
    now, taken = 0.0, 0
    bucket = Bucket(rate, 1, lambda: now)
    bucket.slow(low, seconds)
    for wait in waits:
        now += wait
        pause = bucket.take()
        taken += pause == 0
        allowed = min(low, rate) * min(now, seconds) + rate * max(0.0, now - seconds)
        assert taken <= 1 + allowed + 1e-6
    if pause:
        now += pause * (1 + 1e-9) + 1e-9
        assert bucket.take() == 0
    now = max(now, seconds) + 1 / rate + 1e-9
    assert bucket.take() == 0
    assert bucket.take() == pytest.approx(1 / rate, rel=1e-3)


@dataclass
class Hook:
    """An HTTP server that notes what is posted, and answers with these statuses in turn, 200 when they are used up."""

    statuses: list[int] = field(default_factory=list)
    posted: list[Any] = field(default_factory=list)


@contextmanager
def hooked(hook: Hook) -> Iterator[str]:
    """Its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            hook.posted.append((self.path, body))
            self.send_response(hook.statuses.pop(0) if hook.statuses else 200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook?to=me"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def campaign(url: str, **changes: Any) -> Stream:
    stream = Stream(Detection(matches=3, detectors=["salted_hash"], webhook=url, **changes))
    return stream.send(nearly(photograph(0), seed) for seed in range(10))


def test_webhook_is_told_what_the_log_is_told() -> None:
    """As JSON, at the begin and the end; a first failure is tried again, once."""
    hook = Hook([503])
    with hooked(hook) as url:
        stream = campaign(url)
        stream.examiner.tick(1e6)
    begun, ended = stream.log
    assert hook.posted == [("/hook?to=me", entry) for entry in (begun, begun, ended)]
    assert stream.value("webhooks_total", outcome="sent") == 2
    assert stream.value("webhooks_total", outcome="failed") == 0


@pytest.mark.parametrize("statuses", [[500, 500], [302, 404]])
def test_webhook_that_fails_is_counted(statuses: list[int]) -> None:
    """Two attempts, no more; a redirection is none that is followed; the log has it all the same."""
    hook = Hook(statuses)
    with hooked(hook) as url:
        stream = campaign(url)
    assert len(hook.posted) == 2
    assert stream.value("webhooks_total", outcome="failed") == 1
    assert len(stream.log) == 1


def test_webhook_is_not_waited_for_long() -> None:
    """A server that takes a connection and never answers costs two timeouts; one that is not there nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url, begun = f"http://127.0.0.1:{silent.getsockname()[1]}/", time.monotonic()
        assert campaign(url, webhook_seconds=0.1).value("webhooks_total", outcome="failed") == 1
        assert time.monotonic() - begun < 5
    assert campaign(url).value("webhooks_total", outcome="failed") == 1


# Beside the gateway's requests


def test_full_queue_drops_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """While an examination hangs, images beyond the queue are dropped and counted, at once."""
    hanging, registry = threading.Event(), CollectorRegistry()
    monkeypatch.setattr(Examiner, "examine", lambda *arguments: hanging.wait(20))
    with Worker(Detection(queue=10), SALT, DetectionMetrics(registry), print) as worker:
        begun = time.monotonic()
        for _ in range(100):
            worker.offer(Caller("a"), np.zeros((64, 8, 8, 3), np.uint8))
        assert time.monotonic() - begun < 1
        assert registry.get_sample_value("gateway_detection_queue") in (9, 10)
        dropped = registry.get_sample_value("gateway_detection_dropped_total")
        assert dropped in (6400 - 10, 6400 - 11)  # one is at work, if the thread was quick
        hanging.set()
        wait_until(lambda: registry.get_sample_value("gateway_detection_queue") == 0, seconds=10)
    assert not worker._thread.is_alive()


def test_bug_in_the_detector_is_counted_and_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is told to the log; the thread lives."""
    registry, log = CollectorRegistry(), list[dict[str, Any]]()
    with Worker(Detection(), SALT, DetectionMetrics(registry), log.append) as worker:
        with monkeypatch.context() as broken:
            broken.setattr("dfmcl.serving.detection.fingerprints.outline", lambda image: 1 / 0)
            worker.offer(Caller("a"), np.stack([photograph(seed) for seed in range(5)]))
            wait_until(lambda: registry.get_sample_value("gateway_detection_failures_total") == 5, seconds=10)
        worker.offer(Caller("a"), photograph(0)[None])
        wait_until(lambda: registry.get_sample_value("gateway_detection_images_total") == 1, seconds=10)
    assert log == [{"event": "detection failed", "detail": "ZeroDivisionError: division by zero"}]


def test_only_keys_that_ask_for_it_are_examined() -> None:
    """A user's, unless detect = false; a canary's, if it says what it sends."""
    registry = CollectorRegistry()
    worker = Worker(Detection(), SALT, DetectionMetrics(registry), print)
    images = photograph(0)[None]
    for caller, waiting in (
        (Caller("film", detect=False), 0),
        (Caller("canary", canary=True), 0),
        (Caller("probe", canary=True, probe="benign"), 1),
        (Caller("shop"), 2),
    ):
        worker.offer(caller, images)
        assert registry.get_sample_value("gateway_detection_queue") == waiting


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"detection": {"matches": 2000}}, "must be below queries"),
        ({"detection": {"webhook": "ftp://x"}}, "begins with http"),
        ({"detection": {"detectors": []}}, "at least 1 item"),
        ({"detection": {"detectors": ["perceptual", "perceptual"]}}, "twice"),
        ({"detection": {"throttle_images_per_second": 1.0}, "open": True, "keys": []}, "nobody to slow down"),
        ({"keys": [KEYS[0] | {"probe": "attack"}]}, "needs canary = true"),
        ({"keys": [CANARIES[0] | {"detect": False}]}, "needs canary = true, and detect"),
        ({"keys": [CANARIES[0] | {"probe": "other"}]}, "'benign' or 'attack'"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], complaint: str) -> None:
    """With a line that says what."""
    table = {"triton": {"endpoints": ["a:1"], "model": "m"}, "keys": KEYS} | changes
    with pytest.raises(ValueError, match=complaint):
        GatewayConfig.model_validate(table)


# Through a real gateway, before a real Triton


DIGITS = load_dataset("digits")


@pytest.fixture
def door(served: Served) -> Iterator[Door]:
    """With the probes' keys, and campaigns of 20 matches."""
    detection = {"matches": 20, "queue": 10_000}
    with opened(settings([served.ready["grpc"]], keys=[*KEYS, *CANARIES], detection=detection)) as door:
        yield door


def ask(door: Door, images: Images, key: str) -> np.ndarray:
    """Logits, or for a key that may not see them one for the label's class."""
    may = key in (PRIVILEGED, ATTACK)
    entry = {"name": "images", "shape": list(images.shape), "datatype": "UINT8", "data": images.reshape(-1).tolist()}
    body = json.dumps({"inputs": [entry]}).encode()
    answer = door.classify(body, key=key, query="?logits=true" if may else "", Content_Type="application/json")
    assert answer.status == 200, answer.body
    found = answer.json["predictions"]
    return np.array([p["logits"] if may else np.eye(10)[p["index"]] for p in found], np.float32)


def examined(door: Door, **series: float) -> None:
    """Wait until a series of images that were examined has this value."""
    [(name, value)] = series.items()
    labels = {"benign": '{probe="benign"}', "attack": '{probe="attack"}', "users": ""}[name]
    metric = f"gateway_detection_{'images' if name == 'users' else 'canary_images'}_total{labels}"
    wait_until(lambda: door.metric(metric) == value, seconds=30)


def recall(door: Door, detector: str, probe: str) -> float:
    """As Prometheus computes it of the canary's series."""
    of = f'{{probe="{probe}"}}'
    different = door.metric(f"gateway_detection_canary_images_total{of}") - door.metric(
        f"gateway_detection_canary_repeats_total{of}"
    )
    series = f'gateway_detection_canary_matches_total{{detector="{detector}",probe="{probe}"}}'
    return door.metric(series) / different


@pytest.mark.parametrize(
    ("name", "least"),
    # A short Square keeps large patches: its salted hashes agree in 0.70 of the queries.
    [("square", {"salted_hash": 0.6, "perceptual": 0.85}), ("rays", {"salted_hash": 0.25, "perceptual": 0.75})],
    ids=["square", "rays"],
)
def test_attack_through_the_gateway_is_a_campaign(door: Door, name: str, least: dict[str, float]) -> None:
    """Most of what Square asks is noticed, and of RayS by one of the two; and answers are what they were before."""
    images, sent = DIGITS.x_test[:8], 65
    # The model's weights are random: it calls everything an 8, so what is attacked is how far each logit is from usual.
    usual = ask(door, DIGITS.x_train[:64], PRIVILEGED).mean(axis=0)
    clean = door.classify(encoded(images[0]))

    def predict(batch: Images) -> np.ndarray:
        nonlocal sent
        sent += len(batch)
        return ask(door, batch, PRIVILEGED) - usual

    attack(name, predict, images, predict(images).argmax(axis=1), queries=80)
    examined(door, users=sent)
    different = sent - door.metric("gateway_detection_repeats_total") - 64
    for detector in DETECTORS:
        found = door.metric(f'gateway_detection_matches_total{{detector="{detector}"}}') / different
        assert found > least[detector], detector
        assert door.metric(f'gateway_detection_campaigns_active{{detector="{detector}"}}') == 1
    assert {(entry["key"], entry["phase"]) for entry in door.lines("campaign")} == {("lab", "begun")}
    after = door.classify(encoded(images[0]))
    assert after.status == 200
    assert {**after.json, "request_id": ""} == {**clean.json, "request_id": ""}
    assert set(after.headers) == set(clean.headers)
    assert door.metric("gateway_detection_dropped_total") == 0


def test_probes_measure_recall_and_false_positives(door: Door) -> None:
    """What the sidecar does: fresh images under one key, Square under another; users' series stay at 0."""
    fresh = DIGITS.x_train[:192]
    for start in range(0, 192, 64):
        ask(door, fresh[start : start + 64], BENIGN)
    images, sent = DIGITS.x_test[:8], 8
    labels = ask(door, images, ATTACK).argmax(axis=1)

    def predict(batch: Images) -> np.ndarray:
        nonlocal sent
        sent += len(batch)
        return ask(door, batch, ATTACK)

    attack("square", predict, images, labels, queries=60)
    ask(door, images, OTHER_CANARY)
    examined(door, benign=192)
    examined(door, attack=sent)
    assert recall(door, "salted_hash", "benign") == 0
    assert recall(door, "perceptual", "benign") < 0.05  # digits are alike: black, with a few strokes
    for detector in DETECTORS:
        assert (
            recall(door, detector, "attack") > 0.6
        )  # a short Square keeps large patches: 0.70 by salted hashes, measured
        assert door.metric(f'gateway_detection_campaigns_total{{detector="{detector}"}}') == 0
    assert door.metric("gateway_detection_images_total") == 0
    assert door.lines("campaign") == []


def test_adaptive_attack_is_not_noticed(door: Door) -> None:
    """Who turns, moves and covers each query with noise is seen by neither detector: it is recorded, not hidden."""
    images, sent = np.stack([photograph(seed, 16) for seed in range(8)]), 0
    labels = ask(door, images, ATTACK).argmax(axis=1)

    def predict(batch: Images) -> np.ndarray:
        nonlocal sent
        sent += len(batch)
        return ask(door, batch, ATTACK)

    attack("square", predict, images, labels, queries=60, disguise=blinded)
    examined(door, attack=8 + sent)
    assert sent > 100
    assert recall(door, "salted_hash", "attack") < 0.02
    assert recall(door, "perceptual", "attack") < 0.3


def test_requests_do_not_wait_for_the_detector(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an examination that hangs, answers come as ever, and what does not fit is counted."""
    hanging = threading.Event()
    monkeypatch.setattr(Examiner, "examine", lambda *arguments: hanging.wait(60))
    with opened(settings([served.ready["grpc"]], detection={"queue": 4})) as door:
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(lambda _: door.classify(encoded(DIGITS.x_test[0])).status, range(20)))
        assert answers == [200] * 20
        assert door.metric("gateway_detection_dropped_total") in (15, 16)
        hanging.set()


def test_throttle_slows_a_campaign_and_nobody_else(served: Served) -> None:
    """The attacker's key gets 429, the other its answers; without the option nobody is slowed (see above)."""
    detection = {"matches": 5, "throttle_images_per_second": 0.01}
    keys = [KEYS[0] | {"burst_images": 30, "images_per_second": 1000.0}, KEYS[1]]
    with opened(settings([served.ready["grpc"]], keys=keys, detection=detection)) as door:
        statuses = []
        for seed in range(200):
            statuses.append(door.classify(encoded(nearly(DIGITS.x_test[0], seed)), key=KEY).status)
            if statuses[-1] == 429:
                break
        assert statuses[-1] == 429
        assert set(statuses[:-1]) == {200}
        assert door.classify(encoded(DIGITS.x_test[0])).status == 200
        assert {entry["key"] for entry in door.lines("campaign")} == {"shop"}


def test_detection_can_be_off(served: Served) -> None:
    """No thread, no series, no memory."""
    with opened(settings([served.ready["grpc"]], detection={"enabled": False})) as door:
        assert door.classify(encoded(DIGITS.x_test[0])).status == 200
        assert "detection" not in door.get("/metrics").body.decode()
        assert "detection" not in {thread.name for thread in threading.enumerate()}
