"""What evidence costs is what docs/ci.md says: passes for an image that holds to the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.suites import BY_KIND, SUITES
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.threats.registry import parse_threat

PAGE = (Path(__file__).parents[2] / "docs" / "ci.md").read_text(encoding="utf-8")
# By the beginning of the table's row: the threat, and the attacks, one after the other.
ROWS = {
    "| `fast`:": ("8/255", SUITES["fast"]),
    "| `standard`:": ("8/255", SUITES["standard"]),
    "| `l1:12`": ("l1:12", BY_KIND["l1"]),
    "| `patch:2%`": ("patch:2%", BY_KIND["patch"]),
    "| `rotation:30+shift:10%`": ("rotation:30+shift:10%", BY_KIND["spatial"]),
    "| `corruptions`": ("fog@3", BY_KIND["corruption"]),
}


class Sure(nn.Module):
    """Ten classes, of which the first is far ahead for every image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(192, 10)
        with torch.no_grad():
            self.last.bias[0] = 100.0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(nn.functional.avg_pool2d(x, 4).flatten(1))
        return logits


@pytest.mark.parametrize("row", ROWS)
def test_passes_are_those_of_the_page(row: str) -> None:
    """Attack by attack, forward and backward; of the corruptions one is asked, and the page counts all 75."""
    threat, names = ROWS[row]
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    suite = [Attack.parse(name) for name in names]
    found = evaluate(Sure().eval(), images, np.zeros(2, np.int64), parse_threat(threat), suite, grid=True, cascade=True)
    assert found.evaluation.robust.k == 2
    times = len(parse_threat("corruptions").parts) if threat == "fog@3" else 1
    (line,) = [line for line in PAGE.splitlines() if line.startswith(row)]
    for cell, passes in ((2, "forward"), (3, "backward")):
        counts = [times * getattr(record, passes)[0] for record in found.evaluation.attacks]
        said = line.split("|")[cell].split(";")[0].replace(",", "").strip()
        assert said == " + ".join(map(str, counts))


def test_a_drawn_part_costs_a_fifth_of_the_rest() -> None:
    """The rest is the whole of `standard` but for the attack that `fast` ends with, too."""
    (whole,) = [line for line in PAGE.splitlines() if line.startswith("| `standard`:")]
    (drawn,) = [line for line in PAGE.splitlines() if line.startswith("| `standard`, `whole")]
    for cell in (2, 3):
        counts = [int(count.replace(",", "")) for count in whole.split("|")[cell].split("+")]
        assert drawn.split("|")[cell].split()[-1] == f"{sum(counts[:-1]):,}"
