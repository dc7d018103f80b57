"""Threats, projections and the uint8 grid."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfmcl.common.errors import BadInput
from dfmcl.robustness.attacks.confined import PROPOSALS
from dfmcl.robustness.attacks.fab import SPEEDS
from dfmcl.robustness.attacks.registry import ATTACKS, Attack
from dfmcl.robustness.attacks.square import SEARCHES
from dfmcl.robustness.attacks.subspaces import CHARTS
from dfmcl.robustness.attacks.suites import BY_KIND, DEFAULTS, SUITES
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.l1 import L1
from dfmcl.robustness.threats.l2 import L2
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.radius import SUITED
from dfmcl.robustness.threats.registry import (
    BALLS,
    FAMILIES,
    THREATS,
    by_norm,
    parse_ball,
    parse_threat,
    threat_from_json,
    threat_of,
)
from dfmcl.robustness.threats.threat import parse_eps
from dfmcl.robustness.threats.union import Union
from tests.test_arrows import FILES

threats = st.one_of(
    st.floats(0, 1).map(Linf),
    st.floats(0, 5).map(L2),
    st.floats(0, 20).map(L1),
)
seeds = st.integers(0, 2**31)


def random_images(seed: int, count: int = 3, spread: float = 1.0) -> torch.Tensor:
    stream = torch.Generator().manual_seed(seed)
    return (0.5 + spread * (torch.rand(count, 3, 4, 4, generator=stream) - 0.5)).float()


@given(threats, seeds, seeds)
def test_projection_lands_inside(threat: Ball, seed: int, other: int) -> None:
    """Whatever comes in, the projection lies in the ball and in [0, 1]."""
    x, wild = random_images(seed), random_images(other, spread=4.0)
    assert threat.contains(threat.project(wild, x), x).all()


@given(threats, seeds, seeds)
def test_projection_is_idempotent(threat: Ball, seed: int, other: int) -> None:
    """Projecting twice changes nothing beyond float rounding."""
    x, wild = random_images(seed), random_images(other, spread=4.0)
    once = threat.project(wild, x)
    assert torch.allclose(threat.project(once, x), once, atol=1e-6)


@given(threats, seeds, st.floats(0, 0.99))
def test_projection_leaves_interior_points_alone(threat: Ball, seed: int, share: float) -> None:
    """A point well inside the ball and the box stays where it is."""
    x = random_images(seed, spread=0.5)
    stream = torch.Generator().manual_seed(seed + 1)
    direction = threat.steepest(torch.randn(x.shape, generator=stream))
    inside = x + direction * share * min(threat.eps, 0.2)
    assert torch.allclose(threat.project(inside, x), inside, atol=1e-6)


@given(threats, seeds)
def test_random_start_lies_inside(threat: Ball, seed: int) -> None:
    """A random start obeys the threat."""
    x = random_images(seed)
    assert threat.contains(threat.start(x, torch.Generator().manual_seed(seed)), x).all()


@given(threats, seeds, seeds)
def test_bytes_stay_inside_the_ball(threat: Ball, seed: int, other: int) -> None:
    """Quantised adversarial images lie in the ball in integer arithmetic, for every radius and norm."""
    images = (random_images(seed) * 255).round().to(torch.uint8)
    x = images.float() / 255
    adversarial = threat.to_uint8(threat.project(random_images(other, spread=4.0), x), x)
    assert threat.contains_uint8(adversarial, images).all()


@given(st.integers(0, 255), seeds)
def test_bytes_use_the_whole_grid_ball(steps: int, seed: int) -> None:
    """At eps = n/255 a full step survives quantisation exactly: nothing of the radius is wasted."""
    threat = Linf(steps / 255)
    images = (random_images(seed) * 255).round().to(torch.uint8)
    x = images.float() / 255
    moved = threat.to_uint8(threat.project(x + 2.0, x), x)
    assert torch.equal(moved.int(), (images.int() + steps).clamp(max=255))


def test_membership_is_strict_by_one_byte() -> None:
    """One grey level beyond floor(255 eps) is outside."""
    images = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    threat = threat_of("linf", "20.4/255")
    assert threat.contains_uint8(images + 20, images).all()
    assert not threat.contains_uint8(images + 21, images).any()


@pytest.mark.parametrize(("eps", "grid"), [("20.4/255", 20), ("8/255", 8), ("0.5/255", 0), ("0.08", 20), ("1", 255)])
def test_radius_is_rounded_down_to_the_grid(eps: str, grid: int) -> None:
    """20.4/255 becomes 20/255; a whole number of 255ths stays itself."""
    assert threat_of("linf", eps).on_grid().eps == pytest.approx(grid / 255)


@settings(max_examples=255)
@given(st.integers(1, 255))
def test_every_whole_radius_survives_the_grid(steps: int) -> None:
    """n/255 is never rounded down to n - 1 by floating point."""
    threat = threat_of("linf", f"{steps}/255")
    assert threat.on_grid().eps == pytest.approx(steps / 255)
    assert threat.label == f"{steps}/255"


@pytest.mark.parametrize("text", ["8/0", "eight", "", "1/2/3", "8,0/255"])
def test_nonsense_radius_is_refused(text: str) -> None:
    """What is no number is bad input that quotes itself."""
    with pytest.raises(BadInput, match="is no radius"):
        parse_eps(text)


@pytest.mark.parametrize(("norm", "eps"), [("l7", 0.1), ("linf", -1.0), ("l2", math.nan), ("linf", math.inf)])
def test_impossible_threat_is_refused(norm: str, eps: float) -> None:
    """Unknown norms and negative or non-finite radii never become a threat."""
    with pytest.raises(BadInput, match=r"threat|is no radius"):
        threat_of(norm, eps)


def test_a_norm_that_a_table_lacks_is_an_error() -> None:
    """Nothing is taken for another norm's: a table knows the norms that its attack says it can search in."""
    tables: dict[str, Mapping[str, object]] = {
        "square": SEARCHES,
        "fab-t": SPEEDS,
        "subspace": CHARTS,
        "square-subspace": PROPOSALS,
    }
    for name, table in tables.items():
        assert table.keys() == set(ATTACKS[name].threats)
        with pytest.raises(BadInput, match=r"this attack: norm is 'l7'; choose one of linf, l2"):
            by_norm(table, "l7", "this attack")


def test_policies_name_the_norms_that_all_suites_can_search_in() -> None:
    """A policy never asks for a norm in which its suite would stop."""
    kinds = [Attack.parse(name).kind for suite in SUITES.values() for name in suite]
    assert set(SUITED) == {norm for norm in BALLS if all(norm in kind.threats for kind in kinds)}


EXAMPLES = [*(example for family in FAMILIES for example in family.examples), *Union.examples]


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_spelling_is_read_again(text: str) -> None:
    """The canonical spelling and the record's JSON give the same threat back; a sentence names it in one line."""
    threat = parse_threat(text)
    assert parse_threat(threat.spelling) == threat
    assert threat_from_json(json.loads(json.dumps(threat.to_json()))) == threat
    assert str(threat)
    assert "\n" not in str(threat)


def test_every_family_can_be_attacked_and_is_known_by_its_words() -> None:
    """A word belongs to one family; each kind has attacks by default, and others in a gate, which search in it."""
    assert sorted(THREATS) == sorted(head for family in FAMILIES for head in family.heads)
    assert DEFAULTS.keys() == {family.kind for family in FAMILIES}
    assert BY_KIND.keys() == DEFAULTS.keys() - set(SUITED)
    for kind, names in [*DEFAULTS.items(), *BY_KIND.items()]:
        assert names
        assert all(kind in Attack.parse(name).kind.threats for name in names)
    assert all(set(kind.threats) <= DEFAULTS.keys() for kind in ATTACKS.values())


@pytest.mark.parametrize("text", EXAMPLES)
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 17, 16)])
def test_the_image_itself_is_a_member(text: str, shape: tuple[int, ...]) -> None:
    """Whatever the threat, an attacker may do nothing; and no threat allows the negative of an image."""
    images = torch.randint(0, 256, (2, *shape), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    threat = parse_threat(text)
    threat.fits(shape)
    x = images.float() / 255
    assert threat.contains_uint8(images, images).all()
    assert threat.contains(x, x).all()
    assert torch.equal(threat.to_uint8(x, x), images)
    assert not threat.contains_uint8(255 - images, images).any()


@pytest.mark.parametrize("text", ["", "l7:3", "patches:5x5", "linf", "linf:8", "linf:0", "8/255|", "nan", "fog@6"])
def test_an_unknown_spelling_is_refused_with_those_that_are_known(text: str) -> None:
    """One line that says which threat is meant and what can be written."""
    with pytest.raises(BadInput, match=r"threat|eps") as caught:
        parse_threat(text)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=r"unknown; write one such as linf:8/255.*words: linf, l2, l1, patch"):
        parse_threat("l7:3")


def test_an_attack_goes_only_where_it_can_search() -> None:
    """No attack is run in a threat that it does not know; the message names some that do."""
    x = torch.zeros(1, 3, 6, 6)
    with pytest.raises(BadInput, match=r"'pgd-5' does not search in rotation 30; choose one of grid"):
        Attack.parse("pgd-5")(lambda x: x, x, torch.zeros(1).long(), parse_threat("rotation:30"), generator=None)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="one by one"):
        Attack.parse("grid").check(parse_threat("fog"))
    with pytest.raises(BadInput, match="no ball"):
        parse_ball("rotation:30")


def test_a_union_holds_what_a_part_holds() -> None:
    """Membership in any part is enough; one part is no union, a part comes once."""
    images = torch.full((2, 1, 6, 6), 100, dtype=torch.uint8)
    union = parse_threat("linf:2/255 | l2:0.04")
    assert [str(part) for part in union.parts] == ["Linf 2/255", "L2 0.04"]
    moved = images.clone()
    moved[0] += 2
    moved[1, 0, 0, 0] += 10
    assert union.contains_uint8(moved, images).all()
    assert union.parts[0].contains_uint8(moved, images).tolist() == [True, False]
    assert union.parts[1].contains_uint8(moved, images).tolist() == [False, True]
    moved[0, 0, 0, 0] += 1
    assert union.contains_uint8(moved, images).tolist() == [False, True]
    assert parse_threat("l2:0.5") == L2(0.5)
    with pytest.raises(BadInput, match="twice"):
        parse_threat("l2:0.5|l2:0.5")


def test_norms_are_told_apart_in_this_room_alone() -> None:
    """Elsewhere a threat is asked, or a table by norm: an `if` would take a new member for one of the old."""
    asked = re.compile(r"\bnorm [!=]= ")
    found = [path for path in FILES if asked.search(path.read_text()) and path.parent.name != "threats"]
    assert found == []
    assert asked.search('if threat.norm == "linf":')


def test_norms_agree_with_numpy() -> None:
    """Lengths equal numpy's, an independent implementation."""
    import numpy as np

    delta = random_images(5)
    flat = delta.flatten(1).numpy()
    assert np.allclose(Linf.lengths(delta), np.linalg.norm(flat, np.inf, axis=1))
    assert np.allclose(L2.lengths(delta), np.linalg.norm(flat, 2, axis=1))
    assert np.allclose(L1.lengths(delta), np.linalg.norm(flat, 1, axis=1))
