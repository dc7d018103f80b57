"""What the detectors of attacks cost, find, miss, and mistake: `make bench-detection`.

The images are CIFAR-10's test images, the attacked model is the shipped one, asked in this process; what reaches the
detectors is what the attacks would send through a gateway, ten images a second under one key.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from PIL import Image
from rich.progress import track

from benchmarks.result import write_result
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.provider import CPU
from dfmcl.serving.detection.fingerprints import DETECTORS, STEP, TAGS, WINDOW, Fingerprinter, outline, salted_tags
from dfmcl.serving.detection.history import History
from dfmcl.serving.gateway.api_keys import Caller
from dfmcl.serving.gateway.config import Detection
from tests.serving.queries import Disguise, Images, Stream, attack, blinded, noisy

MODEL = Path("model_repository") / "resnet18-cifar10" / "1" / "model.onnx"
BUDGETS = (100, 500)
SALT = bytes(range(32))
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as cifar10.npz")
    parser.add_argument("--benign", type=int, default=10_000, help="test images sent as benign traffic")
    parser.add_argument("--attacked", type=int, default=16, help="images attacked at the same time")
    arguments = parser.parse_args()
    data = load_dataset("npz", str(arguments.data))
    pictures, labels = np.asarray(data.x_test), data.y_test
    load = os.getloadavg()[0]
    rows = [*costs(pictures), *benign(pictures[: arguments.benign]), *attacks(pictures, labels, arguments.attacked)]
    settings = Detection()
    conditions = {
        "n": f"{arguments.benign} benign images, {arguments.attacked} attacked ones; costs over 2,000 images each",
        "seed": 0,
        "command": f"python -m benchmarks.detection --data {arguments.data.name}"
        f" --benign {arguments.benign} --attacked {arguments.attacked}",
        "note": f"one-minute load of the machine at the start: {load:.1f} on {os.cpu_count()} cores;"
        f" horizon {settings.queries} images; a campaign is {settings.matches} matches in it. Shares are of the"
        " images that are no exact repeat of an earlier one; share 1 cannot be reached, as the first question about an"
        " image resembles nothing. Attacks: Linf 8/255, all images in turn under one key. fooled: the share of images"
        " that is misclassified in the end, of images that all were right; an attacker who disguises queries"
        " pays in answers that say less. Nothing here stops an attack",
    }
    write_result("detection", "Detectors of attacks by queries", rows, ratios_of(rows), conditions)


def costs(pictures: Images) -> list[Row]:
    """Milliseconds an image, with a full history; bytes a remembered image."""
    settings, number = Detection(), 2000
    fingerprint, history = Fingerprinter(SALT), History(settings.queries, settings.seconds)
    for time_, picture in enumerate(pictures[: settings.queries]):
        history.resemblance(fingerprint(picture), time_ / 10)
    prints = [fingerprint(picture) for picture in pictures[settings.queries :][:number]]
    offsets = np.arange(pictures[0].size, dtype=np.uint16) % STEP
    multipliers = np.arange(1, 2 * WINDOW, 2, dtype=np.uint64) << np.uint64(50)
    large = np.random.default_rng(0).integers(0, 256, (100, 224, 224, 3), dtype=np.uint8)
    stream, large_stream = Stream(settings).send(pictures[: settings.queries]), Stream(settings)
    caller, queue = Caller("shop"), iter(prints)
    cases: list[tuple[str, Callable[[Any], object], Any]] = [
        ("salted_hash, fingerprint", lambda p: salted_tags(p.reshape(-1), offsets, multipliers), pictures[:number]),
        ("salted_hash by SHA-256, fingerprint", by_sha256, pictures[:200]),
        ("perceptual, fingerprint", outline, pictures[:number]),
        ("look-up by both, among 2,000", lambda _: history.resemblance(next(queue), settings.queries / 10), prints),
        ("whole examination, 32 x 32", lambda p: stream.examiner.examine(caller, p, stream.now), pictures[2000:4000]),
        ("whole examination, 224 x 224", lambda p: large_stream.examiner.examine(caller, p, 0.0), large),
    ]
    rows = [timed(case, work, items) for case, work, items in cases]
    return [*rows, {"case": "memory", "bytes_per_query": bytes_per_query(prints)}]


def by_sha256(picture: Images) -> list[bytes]:
    """The digests that the salted hash would keep if each window went through SHA-256, for comparison."""
    quantised = (picture.reshape(-1) // STEP).tobytes()
    windows = {quantised[start : start + WINDOW] for start in range(len(quantised) - WINDOW + 1)}
    return sorted(hashlib.sha256(SALT + window).digest() for window in windows)[-TAGS:]


def timed(case: str, work: Callable[[Any], object], items: Any) -> Row:
    """Median and 99th percentile, in milliseconds, and the median of this thread's own time."""
    taken, own = [], []
    for item in items:
        begun, own_begun = time.perf_counter(), time.thread_time()
        work(item)
        taken.append(1000 * (time.perf_counter() - begun))
        own.append(1000 * (time.thread_time() - own_begun))
    median, worst = np.percentile(taken, [50, 99])
    return {"case": case, "p50_ms": float(median), "p99_ms": float(worst), "cpu_p50_ms": float(np.median(own))}


def bytes_per_query(prints: list[Any]) -> float:
    """What a full history takes, by Python's own account, for each image that it holds."""
    tracemalloc.start()
    history = History(len(prints), 3600)
    for found in prints:
        history.resemblance(found, 0.0)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / history.held


def benign(pictures: Images) -> list[Row]:
    """Who does no harm: how many of their images are taken for near-duplicates, and whether for a campaign."""
    rng = np.random.default_rng(0)
    thrice = pictures[
        np.argsort(np.arange(3 * len(pictures)) % len(pictures) + rng.uniform(0, 300, 3 * len(pictures)))
        % len(pictures)
    ]
    digits = load_dataset("digits")
    again = np.stack([picture for original in pictures[:2000] for picture in (original, as_jpeg(original))])
    start = rng.integers(0, 2, (200, 2))
    film = np.stack(
        [shifted(pictures[n], *(start[n] + (step // 2, step % 3))) for n in range(200) for step in range(10)]
    )
    cases = {
        "benign: different images": pictures,
        "benign: each three times": thrice,
        "benign: each again as JPEG": again,
        "benign: digits": np.concatenate([digits.x_train, digits.x_test]),
        "benign: films of 10 frames": film,
    }
    return [described(case, Stream(salt=SALT).send(images)) for case, images in track(cases.items(), "benign")]


def as_jpeg(picture: Images) -> Images:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90)
    return np.asarray(Image.open(file))


def shifted(picture: Images, down: int, across: int) -> Images:
    """Moved by some pixels, as a camera that pans; the border repeats."""
    padded = np.pad(picture, ((down, 0), (across, 0), (0, 0)), mode="edge")
    return padded[: picture.shape[0], : picture.shape[1]]


def attacks(pictures: Images, labels: Any, count: int) -> list[Row]:
    """What of the attacks' queries is noticed."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # two libraries' threads would wait for each other, busily
    torch.set_num_threads(1)
    session = CPU.session(MODEL, options)
    correct = np.flatnonzero(
        np.concatenate(session.run(None, {"images": pictures[:200]})).argmax(axis=1) == labels[:200]
    )
    chosen = correct[:count]
    disguises: list[tuple[str, str, Disguise | None, tuple[int, ...]]] = [
        ("square", "square", None, BUDGETS),
        ("rays", "rays", None, BUDGETS),
        ("adaptive square, noise", "square", noisy, BUDGETS[1:]),
        ("adaptive square, blinded", "square", blinded, BUDGETS[1:]),
    ]
    planned = [(case, name, disguise, n) for case, name, disguise, budgets in disguises for n in budgets]
    rows = []
    for case, name, disguise, budget in track(planned, "attacks"):
        stream = Stream(salt=SALT)

        def predict(images: Images, stream: Stream = stream) -> Any:
            stream.send(images)
            return session.run(None, {"images": images})[0]

        fooled = attack(name, predict, pictures[chosen], labels[chosen], queries=budget, disguise=disguise)
        rows.append(described(f"{case}, {budget} queries", stream) | {"fooled": fooled})
    return rows


def described(case: str, stream: Stream) -> Row:
    """A row of what the detectors saw."""
    found: Row = {"case": case, "images": int(stream.value("images_total"))}
    found["repeats"] = int(stream.value("repeats_total"))
    for detector in DETECTORS:
        found[f"{detector}_share"] = stream.shares[detector]
        found[f"{detector}_campaigns"] = int(stream.value("campaigns_total", detector=detector))
        found[f"{detector}_images_to_alarm"] = stream.alarms.get(detector)
    return found


def ratios_of(rows: list[Row]) -> dict[str, float]:
    of = {row["case"]: row for row in rows}
    found = {
        "examination_p50_ms": of["whole examination, 32 x 32"]["p50_ms"],
        "examination_cpu_p50_ms": of["whole examination, 32 x 32"]["cpu_p50_ms"],
        "salted_hash_ms_vs_sha256": of["salted_hash, fingerprint"]["p50_ms"]
        / of["salted_hash by SHA-256, fingerprint"]["p50_ms"],
        "bytes_per_query": of["memory"]["bytes_per_query"],
    }
    for detector in DETECTORS:
        share = f"{detector}_share"
        found |= {
            f"{detector}_false_positive_rate": of["benign: different images"][share],
            f"{detector}_square_recall": of[f"square, {BUDGETS[1]} queries"][share],
            f"{detector}_rays_recall": of[f"rays, {BUDGETS[1]} queries"][share],
            f"{detector}_adaptive_recall": of[f"adaptive square, blinded, {BUDGETS[1]} queries"][share],
        }
    return found


if __name__ == "__main__":
    main()
