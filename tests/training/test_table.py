"""The tables say what the records say: each figure against a computation of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dfmcl.training.figures import reach
from dfmcl.training.plan import Campaign, load_campaign
from dfmcl.training.table import table
from tests.training.workshop import TINY, first_of, synthetic


def varied(tmp_path: Path, extra: str = "") -> Campaign:
    """The tiny campaign with alpha varied."""
    text = TINY.replace('preset = "quickstart"\n', 'preset = "quickstart"\nvary = { "masking.alpha" = [0, 1, 2] }\n')
    text = text.replace('["dfmcl", "standard"]', '["dfmcl-1", "dfmcl-0"]') + extra
    (tmp_path / "varied.toml").write_text(text)
    return load_campaign(str(tmp_path / "varied.toml"))


def test_regression_is_least_squares(tmp_path: Path) -> None:
    """Slope and R2 of accuracy on alpha, over values and seeds, against numpy's own fit."""
    campaign = varied(tmp_path, '[regression]\nkey = "masking.alpha"\neps = "8/255"\nattack = "pgd-2"\n')
    points = [(0, 0, 40), (1, 0, 50), (2, 0, 55), (0, 1, 42), (1, 1, 47), (2, 1, 61)]
    records = [synthetic(f"dfmcl-{alpha}", seed, {"8/255": first_of(100, k)}, alpha=alpha) for alpha, seed, k in points]
    x, y = np.array([p[0] for p in points]), np.array([p[2] for p in points])
    slope = np.polyfit(x, y, 1)[0]
    squared = np.corrcoef(x, y)[0, 1] ** 2
    page = table(campaign, [], records)
    assert "## pgd-2 at 8/255 on masking.alpha" in page
    line = next(line for line in page.splitlines() if line.startswith("| 8/255 | dfmcl | +"))
    cells = [cell.strip() for cell in line.split("|")[3:-1]]
    assert cells[0] == f"{slope:+.3g}"
    assert cells[3] == f"{squared:.2f}"
    assert cells[4] == "6 (0 to 2)"


def test_several_seeds_are_mean_and_spread(tmp_path: Path) -> None:
    """40 % and 50 %: 45.0 with a standard deviation of 7.1; each run by itself keeps its exact interval."""
    records = [synthetic("dfmcl-1", seed, {"8/255": first_of(100, k)}) for seed, k in enumerate((40, 50))]
    page = table(varied(tmp_path), [], records)
    assert "| dfmcl-1 | - | 100.0 ± 0.0 | - | not measured | - | 45.0 ± 7.1 |" in page
    assert "| dfmcl-1_beta8_seed0 | 100.0 | 50.0 | 100.0 [96.4, 100.0] | not measured | 40.0 [30.3, 50.3] |" in page


def test_comparison_of_one_seed(tmp_path: Path) -> None:
    """Ten images that only the first holds and none that only the second does: +10 points and p = 2 * (1/2)^10."""
    records = [synthetic(f"dfmcl-{a}", 0, {"8/255": first_of(100, k)}, alpha=a) for a, k in ((1, 50), (0, 40))]
    page = table(varied(tmp_path), [], records)
    line = next(line for line in page.splitlines() if "dfmcl-1 - dfmcl-0 | worst case at 8/255" in line)
    assert "| +10.0 [+" in line
    assert "| 10:0 | 0.002 | 1 x 100 |" in line


def test_radius_up_to_which_a_claim_holds() -> None:
    """Clean 100 %, 60 % at 4/255 and 20 % at 8/255: 50 % holds up to 5/255, 10 % beyond what was measured."""
    record = synthetic("x", 0, {"4/255": first_of(100, 60), "8/255": first_of(100, 20)})
    assert reach([record], "pgd-2", 50.0) == "5/255"
    assert reach([record], "pgd-2", 10.0) == "8/255 or more"
    assert reach([record], "pgd-2", 100.5) == "nowhere, not even clean"
