"""How fast training is, side by side with the loop that everybody writes: `make bench-training`.

Full-width ResNet-18 on 32 x 32 images (random bytes: speed does not depend on what they show), one process. The plain
loop: float32, NCHW, a DataLoader in front, the attack's backward pass also computes weight gradients. Rounds alternate
between all contestants, so that a busy moment hits all of them; a figure is the median of its rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.result import write_result
from dfmcl.robustness.models import Classifier, ModelSpec, to_float
from dfmcl.robustness.ranks import Ranks
from dfmcl.training.config import TrainConfig
from dfmcl.training.learner import Learner

GFLOP_FORWARD = 1.11  # a full-width ResNet-18 on one image: 0.555 GMAC
EPS, PGD_STEPS = 8 / 255, 10
# Dense bfloat16 peak by the maker's data sheet, in TFLOP/s; elsewhere a matrix product is measured instead.
DATA_SHEET = {"NVIDIA H200": 989.0, "NVIDIA H100 80GB HBM3": 989.0, "NVIDIA A100-SXM4-80GB": 312.0}

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=64)
    gpu = torch.cuda.is_available()
    parser.add_argument("--batch-size", type=int, default=512 if gpu else 64)
    parser.add_argument("--rounds", type=int, default=20 if gpu else 5)
    arguments = parser.parse_args()
    contestants = all_contestants(arguments.width, arguments.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(arguments.rounds + 1):  # the first round warms up: compilation, memory
        for name in track(list(contestants), description=f"round {number} of {arguments.rounds}"):
            taken = timed(contestants[name][0])
            if number:
                seconds[name].append(taken)
    peak = peak_flops()
    rows: list[dict[str, Any]] = []
    for name, (_, passes) in contestants.items():
        speed = arguments.batch_size / statistics.median(seconds[name])
        flops = speed * passes * GFLOP_FORWARD * 1e9 * (arguments.width / 64) ** 2
        rows.append(
            {
                "training": name,
                "images_per_s": speed,
                "slowest": arguments.batch_size / max(seconds[name]),
                "fastest": arguments.batch_size / min(seconds[name]),
                "attack_passes_per_s": speed * (passes - 3) / 2 if passes > 3 else None,
                "share_of_peak_flops": flops / peak,
            }
        )
    speeds = {row["training"]: row["images_per_s"] for row in rows}
    ratios = {
        "standard_images_per_s_vs_plain_loop": speeds["standard, ours"] / speeds["standard, plain loop"],
        "pgd10_images_per_s_vs_plain_loop": speeds["PGD-10, ours"] / speeds["PGD-10, plain loop"],
        "pgd10_float32_images_per_s_vs_plain_loop": speeds["PGD-10, ours in float32"] / speeds["PGD-10, plain loop"],
        "masks_images_per_s_vs_same_attack_without": speeds["PGD-10 with DFM masks, ours"] / speeds["PGD-10, ours"],
        "dfmcl_images_per_s_vs_pgd10": speeds["DFMCL, ours"] / speeds["PGD-10, ours"],
    }
    if "PGD-10, torchattacks in the plain loop" in speeds:
        other = speeds["PGD-10, torchattacks in the plain loop"]
        ratios["pgd10_images_per_s_vs_torchattacks_loop"] = speeds["PGD-10, ours"] / other
    conditions = {
        "n": f"median of {arguments.rounds} updates each, batches of {arguments.batch_size}, width {arguments.width}",
        "seed": 0,
        "peak_tflops": peak / 1e12,
        "peak_memory_gib": peak_memory(),
        "note": "share_of_peak_flops: of the data sheet's dense bfloat16 peak on a known GPU, else of a bfloat16 matrix"
        " product measured in this run",
    }
    write_result("training", "Training speed", rows, ratios, conditions)


def all_contestants(width: int, size: int) -> dict[str, tuple[list[Step], float]]:
    """Name to (updates to time, forward-pass equivalents an image: a training pass is 3, an attack pass 2)."""
    torch.manual_seed(0)
    count = 4 * size
    images = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8)
    labels = torch.randint(10, (count,))
    pgd = 3.0 + 2 * PGD_STEPS
    # The source draws one attack of its pool for each update; here each has its turn.
    pool = [ours(width, size, images, labels, attacks=[name], masks=True) for name in ("fgsm", "pgd", "cw")]
    found: dict[str, tuple[list[Step], float]] = {
        "standard, plain loop": ([plain_loop(width, size, images, labels, None)], 3.0),
        "standard, ours": ([ours(width, size, images, labels, attacks=[])], 3.0),
        "PGD-10, plain loop": ([plain_loop(width, size, images, labels, plain_pgd)], pgd),
        "PGD-10, ours": ([ours(width, size, images, labels, attacks=["pgd"])], pgd),
        "PGD-10, ours in float32": ([ours(width, size, images, labels, attacks=["pgd"], precision="float32")], pgd),
        "PGD-10 with DFM masks, ours": ([ours(width, size, images, labels, attacks=["pgd"], masks=True)], pgd),
        "DFMCL, ours": (pool, 3.0 + 2 * (1 + 2 * PGD_STEPS) / 3),
    }
    try:
        import torchattacks
    except ModuleNotFoundError:
        return found

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        made = torchattacks.PGD(model, eps=EPS, alpha=2.5 * EPS / PGD_STEPS, steps=PGD_STEPS)
        adversarial: Tensor = made(x, y)
        return adversarial

    found["PGD-10, torchattacks in the plain loop"] = ([plain_loop(width, size, images, labels, attack)], pgd)
    return found


def fresh(width: int) -> Classifier:
    return Classifier(ModelSpec("resnet18", width, 10, (32, 32, 3), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plain_loop(
    width: int, size: int, images: Tensor, labels: Tensor, attack: Callable[[nn.Module, Tensor, Tensor], Tensor] | None
) -> Step:
    """The usual loop; on a CPU the DataLoader works in the same process, because it is as fast there."""
    model = fresh(width).to(device())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    workers = 4 if torch.cuda.is_available() else 0
    loader = DataLoader(
        TensorDataset(to_float(images), labels), batch_size=size, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    batches = endless(loader)

    def step() -> None:
        x, y = (tensor.to(device()) for tensor in next(batches))
        if attack is not None:
            model.eval()
            x = attack(model, x, y)
        model.train()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return step


def endless(loader: DataLoader[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    while True:
        yield from loader


def plain_pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """As most repositories have it: `loss.backward()`, which also computes the gradients of all weights."""
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(PGD_STEPS):
        x_adv = x_adv.detach().requires_grad_(True)
        functional.cross_entropy(model(x_adv), y).backward()
        assert x_adv.grad is not None
        moved = x_adv + 2.5 * EPS / PGD_STEPS * x_adv.grad.sign()
        x_adv = torch.min(torch.max(moved, x - EPS), x + EPS).clamp(0, 1)
    return x_adv.detach()


def ours(
    width: int, size: int, images: Tensor, labels: Tensor, *, attacks: list[str], precision: str = "bfloat16",
    masks: bool = False,
) -> Step:  # fmt: skip
    """An update of `dfmcl.training.learner`, from bytes to moved weights."""
    config = TrainConfig.model_validate(
        {
            "model": {"width": width},
            "masking": {"enabled": masks},
            "curriculum": {"beta": "8/255", "schedule": "constant", "attacks": attacks, "steps": PGD_STEPS},
            "optimization": {
                "batch_size": size, "optimizer": "sgd", "lr": 0.01, "weight_decay": 5e-4, "precision": precision,
            },
        }
    )  # fmt: skip
    learner = Learner(config, fresh(width), 10_000, Ranks(0, 1, device()))
    images, labels = images.to(device()), labels.to(device())
    numbers = iter(range(1, 10_000))

    def step() -> None:
        number = next(numbers)
        chosen = torch.randperm(len(images), device=device())[:size]
        learner.update(images[chosen], labels[chosen], number)

    return step


def timed(steps: list[Step]) -> float:
    """Seconds an update, over one of each."""
    synchronise()
    begun = time.perf_counter()
    for step in steps:
        step()
    synchronise()
    return (time.perf_counter() - begun) / len(steps)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_flops() -> float:
    """FLOP/s: the data sheet's on a GPU that is known, else the best of five bfloat16 matrix products here."""
    if torch.cuda.is_available() and torch.cuda.get_device_name() in DATA_SHEET:
        return DATA_SHEET[torch.cuda.get_device_name()] * 1e12
    side = 8192 if torch.cuda.is_available() else 2048
    a = torch.randn(side, side, dtype=torch.bfloat16, device=device())
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, a, out=out)

    best = min(timed([product]) for _ in range(5))
    return 2 * side**3 / best


def peak_memory() -> float:
    """GiB: of the accelerator where there is one, else of this process with all contestants in it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


if __name__ == "__main__":
    main()
