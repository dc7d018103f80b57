"""What makes a test portable: the draws are as they are named, and the arithmetic behind "as strong as" is exact."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dfmcl.robustness.runs import CHECKPOINT, load_run
from tests.conftest import LONG, SLOW
from tests.networks import JITTER, PINNED, RECIPES, network
from tests.portable import NOT_NUMERIC, NUMERIC, PERTURBATIONS, ROOT, drawn, margins_in, nearest
from tests.signs import sign_flip_p


@given(st.lists(st.integers(-3, 3), max_size=8))
def test_signs_are_flipped_in_every_way(differences: list[int]) -> None:
    """The p is the share of all sign patterns whose sum is at least as large; so it lies in (0, 1]."""
    sizes = [abs(value) for value in differences]
    sums = [sum(map(int.__mul__, signs, sizes)) for signs in itertools.product((-1, 1), repeat=len(sizes))]
    expected = float(np.mean([total >= sum(differences) for total in sums]))
    assert sign_flip_p(np.array(differences, dtype=np.int64)) == pytest.approx(expected)


def test_every_perturbation_is_drawn_by_some_commit() -> None:
    """A commit draws one of the quick ones; in all there are five other networks, and five other last digits."""
    found = {drawn(f"commit {number}") for number in range(200)}
    assert len(found) >= 7
    assert found <= set(PERTURBATIONS)
    assert len({one.seed for one in PERTURBATIONS.values() if one.seed}) >= 5
    assert len({one.jitter for one in PERTURBATIONS.values() if one.jitter}) >= 5
    assert {one.threads for one in PERTURBATIONS.values()} == {1, 2, 3}


def test_named_files_are_there() -> None:
    """Lists of tests name nothing that is gone."""
    assert {path for path in NUMERIC if not (ROOT / path).exists()} == set()
    for path, _, test in (name.partition("::") for name in NOT_NUMERIC):
        assert f"def {test}(" in (ROOT / path).read_text()
    names = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert {*LONG, *SLOW} <= names
    assert not {*LONG} & {*SLOW}


@pytest.mark.parametrize("name", RECIPES)
def test_pinned_networks_are_whole(name: str, tmp_path: Path) -> None:
    """Each recipe has its run; a draw of jitter moves every weight by about its size, and none by ten times that."""
    still, shaken = (network(name, tmp_path / str(draw), jitter=draw) for draw in (0, 1))
    assert load_run(shaken).input_shape == load_run(PINNED / name).input_shape
    before, after = (load_file(run / CHECKPOINT) for run in (still, shaken))
    moved = torch.cat(
        [(after[key] / value - 1).flatten() for key, value in before.items() if value.is_floating_point()]
    )
    moved = moved[moved.isfinite()]
    assert 0.5 * JITTER < moved.std() < 2 * JITTER
    assert moved.abs().max() < 10 * JITTER


def test_margins_are_the_nearest_to_their_levels(tmp_path: Path) -> None:
    """The least of what must lie above, the largest of what must lie below."""
    rows = "".join(
        f'<testcase name="t"><properties><property name="p {side}" value="{value}"/></properties></testcase>'
        for side, value in (("above", 0.5), ("above", 0.1), ("below", 1e-9), ("below", 1e-7))
    )
    (tmp_path / "junit.xml").write_text(f"<testsuites><testsuite>{rows}</testsuite></testsuites>")
    found = margins_in(tmp_path / "junit.xml")
    assert found == {("t", "p above"): 0.1, ("t", "p below"): 1e-7}
    assert nearest(found, {("t", "p above"): 0.01, ("u", "p below"): 0.0})["t", "p above"] == 0.01
