"""What `dfmcl evaluate` measures of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfmcl.common.errors import BadInput
from dfmcl.robustness import image_set
from dfmcl.robustness.data import load_dataset, open_dataset
from dfmcl.robustness.image_set import Pictures
from dfmcl.robustness.measurements import measure, rows
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.runs import Run, load_run
from dfmcl.robustness.threats.registry import parse_threat


def test_a_suite_shows_each_attack_what_is_left(standard_run: Path) -> None:
    """In a cascade an attack tries what the ones before left, and its accuracy is the worst case so far."""
    run, data, threat = load_run(standard_run), load_dataset("digits"), parse_threat("8/255")
    (apart,) = measure(run, data, [threat], attacks=["fgsm", "margin-pgd-5"], images=60)
    (suite,) = measure(run, data, [threat], attacks=["fgsm", "margin-pgd-5"], cascade=True, images=60)
    assert suite.correct == apart.correct
    assert suite.attacks[0].held == apart.attacks[0].held
    assert 0 < sum(suite.attacks[1].tried) < sum(apart.attacks[1].tried)
    assert suite.attacks[1].tried == suite.attacks[0].held
    assert suite.robust_images == suite.attacks[1].held
    assert abs(suite.robust.value - apart.robust.value) < 0.05  # other random starts


@pytest.fixture(scope="module")
def run(standard_run: Path) -> Run:
    return load_run(standard_run)


def test_a_union_is_the_worst_of_its_parts(run: Run) -> None:
    """Image by image; a part that is asked for twice is attacked once, and the record survives JSON."""
    data, union = load_dataset("digits"), parse_threat("linf:1/255|shift:10%,1x3x3")
    both, alone = measure(run, data, [union, union.parts[1]], attacks=["fgsm", "grid-4"], images=30)
    assert [one.name for one in both.attacks] == ["fgsm in Linf 1/255", "grid-4 in shift 10 %, 1x3x3"]
    assert alone.attacks[0].held == both.attacks[1].held
    pairs = zip(both.attacks[0].held, both.attacks[1].held, strict=True)
    assert both.robust_images == tuple(one and other for one, other in pairs)
    assert all(record.accuracy.k < both.clean.k for record in both.attacks), "each part breaks some"
    assert Evaluation.from_json(json.loads(json.dumps(both.to_json()))) == both
    titles = [title for title, _ in rows(both)]
    assert titles == [one.name for one in both.attacks] + ["worst case, Linf 1/255 | shift 10 %, 1x3x3"]
    assert rows(alone) == [("grid-4, shift 10 %, 1x3x3", str(alone.robust))]


def test_corruptions_have_a_mean(run: Run) -> None:
    """As benchmarks give it: over the severities of a kind, and over all."""
    (found,) = measure(run, load_dataset("digits"), [parse_threat("fog|contrast")], images=10)
    shares = [record.accuracy.value for record in found.attacks]
    assert len(shares) == 10
    assert max(shares) > min(shares)
    titles, figures = zip(*rows(found), strict=True)
    assert titles == ("mean, fog", "mean, contrast", "mean, fog | contrast", "worst case, fog | contrast")
    means = (sum(shares[:5]) / 5, sum(shares[5:]) / 5, sum(shares) / 10)
    assert figures == (*(f"{100 * mean:.1f} %" for mean in means), str(found.robust))


def test_an_attack_that_can_search_nowhere_is_refused(run: Run) -> None:
    """And so is a threat that has no room in the images; no attack runs before."""
    data = load_dataset("digits")
    with pytest.raises(BadInput, match=r"'patch' does not search in Linf 8/255; choose one of fgsm"):
        measure(run, data, [parse_threat("8/255")], attacks=["patch"])
    with pytest.raises(BadInput, match="does not fit into images of 16x16"):
        measure(run, data, [parse_threat("patch:17x17")])


def test_of_a_folder_only_the_images_that_are_asked_for_are_read(standard_run: Path, tmp_path: Path) -> None:
    """The training part may be no images at all, and of the test part the others: the same figures as from an array."""
    run, digits, threat = load_run(standard_run), load_dataset("digits"), parse_threat("8/255")
    kept = np.random.default_rng(0).permutation(30)[:20]  # as `measure` draws them
    for number in range(30):
        for part in ("train", "test"):
            place = tmp_path / part / digits.classes[number % 10]  # 3 of each class, in the order of the names
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.png").write_bytes(b"no image")
    opened = open_dataset("folder", str(tmp_path), 16)
    assert isinstance(opened.x_test, Pictures)
    for row in kept:
        Image.fromarray(digits.x_test[row]).save(opened.x_test.part.paths[row])
    (found,) = measure(run, open_dataset("folder", str(tmp_path), 16), [threat], attacks=["fgsm"], images=20)
    (whole,) = measure(
        run,
        type(digits)("folder", digits.x_train, digits.y_train, digits.x_test[:30], opened.y_test, digits.classes),
        [threat],
        attacks=["fgsm"],
        images=20,
    )
    assert (found.correct, found.attacks[0].held) == (whole.correct, whole.attacks[0].held)
    with pytest.raises(BadInput, match="is no readable"):
        measure(run, opened, [threat], attacks=["fgsm"])


def test_images_are_measured_part_by_part(standard_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few are held at once, an attack without chance finds the same on each."""
    run, data, threat = load_run(standard_run), load_dataset("digits"), parse_threat("8/255")
    (whole,) = measure(run, data, [threat], attacks=["fgsm", "mi-fgsm-2"], images=50)
    monkeypatch.setattr(image_set, "HELD", 16 * 16 * 16 * 3)
    (parts,) = measure(run, data, [threat], attacks=["fgsm", "mi-fgsm-2"], images=50)
    assert parts.correct == whole.correct
    assert [one.held for one in parts.attacks] == [one.held for one in whole.attacks]
    assert [len(one.forward) for one in parts.attacks] == [50, 50]
