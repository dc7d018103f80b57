"""Threats of other kinds than the ball, as a watch asks about them: images, figures, bars, metrics and words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfmcl.common.errors import BadInput
from dfmcl.gating.signing.report import CriterionEntry
from dfmcl.monitoring.crafted import Recipe, craft_pool, load_crafted
from dfmcl.monitoring.crafting import ImagePool
from dfmcl.monitoring.lost import bars
from dfmcl.monitoring.metrics import RoundsCollector
from dfmcl.monitoring.page import render
from dfmcl.monitoring.preparation import identity_of, prepare
from dfmcl.monitoring.probes import Scene, craft
from dfmcl.monitoring.releases import Release, _further_thresholds
from dfmcl.monitoring.results import AttackResult, RoundResult, round_from_json
from dfmcl.monitoring.threatened import Threatened
from dfmcl.robustness.threats.linf import Linf
from dfmcl.robustness.threats.registry import FAMILIES, parse_threat
from dfmcl.robustness.threats.transforms import Transforms
from tests.linear import Linear
from tests.monitoring.test_watch_metrics import ATTESTED, IDENTITY, journal, result, snapshot

Make = Callable[..., Any]
NAMED = ["fog@3", "corruptions", "rotation:20", "shift:2", "patch:4x4", "universal-patch:4x4", "fog@2|rotation:10"]
ASKED = ["fog@3", "rotation:20", "patch:4x4"]


def images(count: int = 12) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)


def scene(pictures: np.ndarray) -> Scene:
    return Scene(pictures, np.zeros(len(pictures), np.int64), Linf(1 / 255), 0, 1, {})


def tensor(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("named", NAMED)
def test_each_image_is_a_member_and_most_are_changed(named: str) -> None:
    """Of its threat, which is far outside of the watch's ball; the same draws give the same bytes."""
    before, attack = images(), Threatened.parse(named)
    found = craft(Linear((3, 16, 16)), scene(before), attack)
    assert attack.threat.contains_uint8(tensor(found), tensor(before)).all()
    assert (found != before).any(axis=(1, 2, 3)).mean() > 0.7
    assert (np.abs(found.astype(int) - before).max(axis=(1, 2, 3)) > 1).any()
    assert np.array_equal(found, craft(Linear((3, 16, 16)), scene(before), attack))


def test_transforms_are_drawn_alike() -> None:
    """Of a rotation's three angles each comes, and the surrogates are not asked."""

    def forbidden(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("asked")

    before = images(60)
    threat = parse_threat("rotation:30,3x1x1")
    assert isinstance(threat, Transforms)
    found = craft(forbidden, scene(before), Threatened.parse("rotation:30,3x1x1"))
    every = [threat.transformed(tensor(before), torch.full((60,), number)) for number in range(3)]
    counts = [(one == tensor(found)).flatten(1).all(dim=1).sum().item() for one in every]
    assert sum(counts) == 60
    assert min(counts) > 8


def test_a_patch_is_the_surrogates_worst() -> None:
    """It lowers a linear surrogate's score by more than one of random values at a random place does."""
    model, before = Linear((3, 16, 16)), images()
    labels = model(tensor(before).float() / 255).argmax(dim=1)
    shown = replace(scene(before), labels=labels.numpy())
    sign = torch.where(labels == 1, -1.0, 1.0)
    found = craft(model, shown, Threatened.parse("patch:4x4"))
    gained = sign * (model.score(tensor(found).float() / 255) - model.score(tensor(before).float() / 255))
    anywhere = tensor(before).float() / 255
    anywhere[:, :, 3:7, 3:7] = torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert (gained > sign * (model.score(anywhere) - model.score(tensor(before).float() / 255))).all()


def test_each_kind_is_asked_or_refused() -> None:
    """Balls are the watch's own business; a mixture with one, too."""
    for family in FAMILIES:
        for example in family.examples:
            if family.kind in ("linf", "l2", "l1"):
                with pytest.raises(BadInput, match="is a ball"):
                    Threatened.parse(example)
            else:
                assert Threatened.parse(example).threat == parse_threat(example)
    both = [Threatened.parse(text) for text in ("patch:2%", "universal-patch:2%")]
    assert [one.name for one in both] == ["patch 2 %", "universal-patch 2 %"]
    assert both[0].threat == both[1].threat
    with pytest.raises(BadInput, match="'universal-fog@3' is unknown"):
        Threatened.parse("universal-fog@3")
    with pytest.raises(BadInput, match="is a ball"):
        Threatened.parse("linf:4/255|fog@3")
    with pytest.raises(BadInput, match="name each part by itself"):
        Threatened.parse("patch:2x2|fog@3")


@pytest.mark.parametrize(
    ("threats", "said"),
    [
        (["fogg"], "probe.threats.0.*threat 'fogg' is unknown"),
        (["l2:0.5"], "is a ball"),
        (["fog@3", "fog@3"], "probe.threats: fog@3 stands there twice"),
        (["patch:2%", "patch:2.0%"], "probe.threats: patch 2 % stands there twice"),
    ],
)
def test_what_cannot_be_asked_is_refused(write_config: Make, threats: list[str], said: str) -> None:
    """By its key."""
    with pytest.raises(BadInput, match=said):
        write_config(1, probe={"threats": threats})


def test_a_threat_without_room_is_refused(write_config: Make) -> None:
    """Digits have 16 pixels a side."""
    with pytest.raises(BadInput, match="a square of 17 pixels does not fit into images of 16x16"):
        prepare(write_config(1, probe={"threats": ["patch:17x17"]}))


def test_they_are_packed_beside_the_attacks(write_config: Make, tmp_path: Path) -> None:
    """`dfmcl craft` writes members of each threat, and a watch takes them as they lie."""
    whole = Recipe.of(write_config(1, probe={"threats": ASKED}))
    few = ImagePool(whole.pool.images[:20], whole.pool.labels[:20], whole.pool.classes)
    recipe = replace(whole, pool=few)
    craft_pool(recipe, tmp_path / "crafted")
    crafted = load_crafted(recipe, tmp_path / "crafted")
    assert list(crafted) == ["mi-fgsm-2", "pgd-2", "fog@3", "rotation 20", "patch 4x4"]
    for named, made in zip(ASKED, list(crafted.values())[2:], strict=True):
        found = made.take(np.arange(20))
        assert parse_threat(named).contains_uint8(tensor(found), tensor(np.asarray(few.images))).all()


def further(number: int = 1) -> RoundResult:
    """The usual round; fog flips every image that was right."""
    return replace(result(number), further=(AttackResult("fog@3", (False,) * 4, 3),))


WATCHED = replace(
    IDENTITY,
    attacks=(
        *IDENTITY.attacks,
        replace(IDENTITY.attacks[0], name="fog@3", surrogate="", threat=("corruption", "fog@3")),
    ),
)


def test_they_are_no_part_of_the_balls_worst_case() -> None:
    """A figure of their own; written down and read again, also by records that know none."""
    assert further().worst_case == result().worst_case
    assert "fog@3 0 of 4" in str(further()) or "fog@3 0.0 %" in str(further())
    assert round_from_json(further().to_json()) == further()
    old = result().to_json()
    del old["further"]
    assert round_from_json(old) == result()
    bad = further().to_json()
    bad["further"][0]["held"] = "0"
    with pytest.raises(BadInput, match="malformed"):
        round_from_json(bad)


def test_their_series_name_their_threat() -> None:
    """Kind and label stand where the ball's norm and radius do; bounds are counted for each."""
    seen = journal(*(further(number) for number in range(1, 41)))
    families = {one.name: one for one in RoundsCollector(WATCHED, lambda: snapshot(seen)).collect()}
    about = {"model": "digits", "version": "1", "norm": "corruption", "epsilon": "fog@3", "attack": "fog@3"}
    for name, value in (
        ("robustness_robust_accuracy_ratio", 0.0),
        ("robustness_attack_samples", 160.0),
        ("robustness_attack_correct", 0.0),
        ("robustness_attack_success_ratio", 1.0),
    ):
        assert {tuple(sorted(s.labels.items())): s.value for s in families[name].samples}[
            tuple(sorted(about.items()))
        ] == value
    upper = seen.versions[0].bounds["fog@3"].stretch_upper
    assert upper < 0.3
    (worst,) = families["robustness_worst_case_accuracy_ratio"].samples
    assert (worst.labels["norm"], worst.value) == ("linf", 0.25)


def test_a_loss_under_a_threat_is_proven_by_the_gates_own_threshold() -> None:
    """Where its policy asks for one there; no threshold, no bar; the ball's threshold is not theirs."""
    asked = replace(ATTESTED, further_thresholds={("corruption", "fog@3"): 0.6, ("patch", "5x5"): 0.1})
    attacks: dict[str, tuple[str, str] | tuple[()]] = {
        "pgd-10": (),
        "fog@3": ("corruption", "fog@3"),
        "rotation 20": ("spatial", "rotation 20"),
    }
    found = bars(asked, "linf", "8/255", "x", attacks)
    assert found["threshold", "fog@3"] == 0.6
    assert found["threshold", "pgd-10"] == 0.45
    assert ("threshold", "rotation 20") not in found
    assert ("threshold", "fog@3") not in bars(ATTESTED, "linf", "8/255", "x", attacks)


def test_the_page_has_a_line_for_each() -> None:
    """Beside what the gate measured, and asked for."""
    attested = replace(
        ATTESTED,
        further=(("corruption", "fog@3", ATTESTED.robust),),
        further_thresholds={("corruption", "fog@3"): 0.5},
    )
    now = snapshot(journal(further(), further(2)), releases={"1": Release("passed", attested, verified=True)})
    text = render("digits", WATCHED, now, now=10_000.0)
    line = next(row for row in text.split("<tr>") if "fog@3 drawn" in row)
    assert "0.0 %" in line
    assert f"{ATTESTED.robust}, asked for 50.0 %" in line


def test_a_watch_asks_them_of_a_live_endpoint(
    endpoint: Any, write_config: Make, start_watch: Make, until: Make
) -> None:
    """A round through gRPC: one image more for each fresh one and threat, and the series are there."""
    config = write_config(endpoint.port, probe={"threats": ASKED, "images": 4, "replay": 0})
    watching = start_watch(config)
    until(lambda: watching.metrics().get("robustness_attack_samples_total patch 4x4", 0) >= 4, 60)
    done = watching.rounds()[-1]
    assert isinstance(done, RoundResult)
    assert [attack.name for attack in done.further] == ["fog@3", "rotation 20", "patch 4x4"]
    assert [attack.name for attack in done.attacks] == ["mi-fgsm-2", "pgd-2"]
    info = {line for line in watching.get("/metrics")[0].splitlines() if line.startswith("robustness_attack_info")}
    assert any('attack="fog@3"' in line and 'norm="corruption"' in line and 'surrogate=""' in line for line in info)
    assert any('attack="patch 4x4"' in line and 'norm="patch"' in line and 'surrogate=""' not in line for line in info)


def test_another_threat_is_another_plan(write_config: Make) -> None:
    """Figures go on only where the same is asked: a threat of other pixels has another digest, under the same name."""
    digests = set()
    for threats in (["rotation:20"], ["rotation:20,31x1x1,nearest"], ["patch:4x4"]):
        work = prepare(config := write_config(1, probe={"threats": threats}))
        digests.add(identity_of(config, work).attacks[-1].params_sha256)
    assert len(digests) == 3


def test_thresholds_come_from_the_gates_criteria() -> None:
    """Of threats that are no radius: the worst case of each, and means over corruptions; not those of one class."""

    def row(metric: str, eps: str | None, threshold: float | None, **more: Any) -> CriterionEntry:
        bounds = {"confidence": 0.95, "outcome": "met", "decided_after": 9, "k": 9, "n": 9, "value": 1.0}
        rest = {"criterion": "", "class_name": None, "lower": 0.5, "upper": 1.0, **bounds, **more}
        return CriterionEntry(metric=metric, eps=eps, threshold=threshold, **rest)

    rows = [
        row("robust_accuracy", None, 0.3),
        row("robust_accuracy", "4/255", 0.31),
        row("robust_accuracy", "l2:0.5", 0.32),
        row("robust_accuracy", "fog@3", 0.4),
        row("robust_accuracy", "fog@3", 0.5),
        row("class_robust_accuracy", "rotation:15", 0.6, class_name="cat"),
        row("clean_accuracy", None, 0.9),
        row("no_regression", "patch:2%", None),
        row("corruption_accuracy", None, 0.6, answers=75),
        row("corruption_accuracy", None, 0.2, answers=5, corruption="snow"),
    ]
    assert _further_thresholds(rows) == {
        ("corruption", "fog@3"): 0.5,
        ("union", "corruptions"): 0.6,
        ("union", "snow"): 0.2,
    }


@pytest.mark.parametrize("named", ["corruptions", "snow", "fog@3", "rotation:15", "patch:2%"])
def test_a_watch_and_a_criterion_name_a_threat_alike(named: str) -> None:
    """Whatever the spelling: kind and label decide whether a threshold is a bar."""
    threat = Threatened.parse(named).threat
    assert (threat.kind, threat.label) == (parse_threat(named).kind, parse_threat(threat.spelling).label)
