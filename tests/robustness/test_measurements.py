"""What `dfmcl evaluate` measures of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfmcl.common.errors import BadInput
from dfmcl.robustness import images
from dfmcl.robustness.data import load_dataset, open_dataset
from dfmcl.robustness.measurements import measure, parse_threat
from dfmcl.robustness.runs import load_run


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
    monkeypatch.setattr(images, "HELD", 16 * 16 * 16 * 3)
    (parts,) = measure(run, data, [threat], attacks=["fgsm", "mi-fgsm-2"], images=50)
    assert parts.correct == whole.correct
    assert [one.held for one in parts.attacks] == [one.held for one in whole.attacks]
    assert [len(one.forward) for one in parts.attacks] == [50, 50]
