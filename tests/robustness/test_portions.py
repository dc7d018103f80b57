"""How many images go through a network at once decides what memory is taken, and nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dfmcl.robustness.attacks.registry import ATTACKS, Attack
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.gradients import as_it_is
from dfmcl.robustness.models import to_bytes
from dfmcl.robustness.portions import Portions, answered, even, kept_bytes, portion
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.registry import parse_threat


@given(st.integers(0, 2**33), st.integers(0, 2**36))
def test_a_portion_fits_into_the_budget(image: int, budget: int) -> None:
    """As many as the budget holds and no more, but always one; smaller images are never fewer."""
    found = portion(image, budget)
    assert found == 1 or found * image <= budget
    assert image == 0 or (found + 1) * image > budget
    assert portion(image // 2, budget) >= found


@given(st.integers(0, 300), st.integers(1, 300))
def test_portions_are_as_few_and_as_equal_as_can_be(count: int, most: int) -> None:
    """All rows come once and in order, in ceil(count / most) portions whose sizes differ by at most one."""
    seen: list[range] = []

    def work(rows: slice) -> tuple[Tensor]:
        seen.append(range(*rows.indices(count)))
        return (torch.arange(count)[rows],)

    (found,) = Portions(most).joined(work, count)
    assert found.tolist() == list(range(count))
    sizes = [len(rows) for rows in seen]
    assert len(sizes) == max(1, -(-count // most))
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= most
    assert sizes[0] == even(count, most)


LACKING = {
    "Python": MemoryError(),
    "torch": RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    "CUDA": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
}


@pytest.mark.parametrize("error", LACKING.values(), ids=LACKING.keys())
def test_where_memory_runs_out_a_portion_shrinks(error: Exception) -> None:
    """It is halved until it fits, and stays so; where one image is too much, the error comes out."""
    sizes: list[int] = []

    def holds(fitting: int, rows: slice) -> tuple[Tensor]:
        sizes.append(rows.stop - rows.start)
        if sizes[-1] > fitting:
            raise error
        return (torch.arange(rows.start, rows.stop),)

    portions = Portions(40)
    (found,) = portions.joined(lambda rows: holds(5, rows), 40)
    assert (found.tolist(), sizes) == (list(range(40)), [40, 20, 10, *[5] * 8])
    sizes.clear()
    portions.joined(lambda rows: holds(5, rows), 10)
    assert sizes == [5, 5]
    with pytest.raises(type(error)):
        portions.joined(lambda rows: holds(0, rows), 10)


def test_other_errors_are_not_swallowed() -> None:
    """What is no lack of memory comes out at once."""
    asked: list[slice] = []

    def fails(rows: slice) -> tuple[Tensor]:
        asked.append(rows)
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        Portions(8).joined(fails, 8)
    assert len(asked) == 1


class Pointwise(nn.Module):
    """Sums and products of single pixels, which no batch size rounds otherwise; four classes."""

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for number in range(4):
            total = x[:, number % 3, number, number] * 0
            for place in range(8):
                total = total + (x[:, place % 3, place, (place * number) % 8] - 0.1 * number) ** 2 * (place - number)
            rows.append(total)
        return torch.stack(rows, dim=1)


SMALL = {"linf": "8/255", "patch": "patch:3x3", "spatial": "shift:20%"}


def test_an_attack_finds_the_same_in_portions_of_any_size() -> None:
    """Every attack, on images in portions of 3 and all at once: the same images, bit for bit, at the same cost."""
    model = Pointwise()
    x = (torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 255).round() / 255
    images, y = to_bytes(x).numpy(), model(x).argmax(dim=1).numpy()
    for name, kind in ATTACKS.items():
        attack = Attack(
            f"{name}-8" if kind.gradients else name, kind.function, {} if kind.gradients else {"queries": 30}
        )
        threat = parse_threat(next(SMALL[one] for one in kind.threats if one in SMALL))
        found = []
        for most in (3, 100):
            climbed = as_it_is(model, x)
            climbed.portions.most = most
            source, bytes_only = climbed if kind.gradients else None, not isinstance(threat, Ball)
            outcome = evaluate(model, images, y, threat, [attack], source=source, grid=bytes_only)
            (record,) = outcome.evaluation.attacks
            found.append((outcome.adversarial.tobytes(), record.held, record.forward, record.backward))
        assert found[0] == found[1], name


def test_what_a_pass_keeps_is_counted() -> None:
    """Each value that autograd keeps once, weights not at all, the images twice; for twice the images twice as much."""
    square = nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False), nn.Sigmoid()).requires_grad_(False)
    x = torch.rand(6, 3, 2, 2)
    assert kept_bytes(square, x) == 4 * 6 * 5 + 2 * 4 * 6 * 12
    assert kept_bytes(square, x[:3]) * 2 == kept_bytes(square, x)


def test_large_images_are_asked_about_in_portions() -> None:
    """Three of 224 pixels at once, thousands of 16 pixels, and the answers are in order."""
    sizes: list[int] = []

    def decide(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x[:, :, 0, 0]

    for side, expected in ((224, [3, 3, 3, 3]), (16, [12])):
        sizes.clear()
        x = torch.rand(12, 3, side, side)
        assert torch.equal(answered(decide, x), x[:, :, 0, 0])
        assert sizes == expected


# Of a network that keeps 14 MB an image at 96 pixels, weighs nothing, and takes no time.
GROWTH = """
import resource, sys
import numpy as np, torch
from torch import nn
from dfmcl.gating.block import BlockPlan, attack_block
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.background import Background
from dfmcl.robustness.checks import CHECKS
from dfmcl.robustness.diagnosis import Examination
from dfmcl.robustness.gradients import attack_pass
from dfmcl.robustness.models import exactly, to_float
from dfmcl.robustness.threats.registry import parse_threat

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 16, 1), nn.Linear(16, 4)

    def forward(self, x):
        y = self.conv(x)
        for _ in range(24):
            y = y.relu()
        return self.last(y.mean(dim=(2, 3)))

torch.manual_seed(0)
torch.set_num_threads(1)
model, threat = Wide().eval().requires_grad_(False), parse_threat("4/255")
served = Background(largest=64)
plan = BlockPlan(None, exactly(model), (threat,), (Attack.parse("pgd-1"),), True, 0)
peaks = []
for count in (8, 64):
    images = np.random.default_rng(0).integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)
    labels = exactly(model)(to_float(torch.from_numpy(images[:1]))).argmax(dim=1).repeat(count).numpy()
    climbed = attack_pass(model, to_float(torch.from_numpy(images)))
    attack_block(BlockPlan(**{**vars(plan), "model": climbed}), images, labels, 0)
    e = Examination(model, exactly(model), images, labels, threat, grid=True, seed=0, background=served)
    for check in ("outputs_differ", "grad_mode_matters", "bad_gradients", "batch_dependent"):
        CHECKS[check].run(e)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
print(*peaks)
"""


def test_memory_does_not_grow_with_the_images() -> None:
    """A block's attack and the checks' passes on 64 images take at most 200 MB more than on 8, for the images and the
    largest batch that is asked; 64 at once would take 900 MB."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    assert many - few < 200, done.stdout
