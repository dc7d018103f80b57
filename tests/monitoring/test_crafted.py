"""A pool crafted beforehand: what lies in the files, when they are refused, and that rounds then only ask."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfmcl.common.errors import BadInput, Broken
from dfmcl.monitoring.config import WatchConfig
from dfmcl.monitoring.crafted import MANIFEST, Recipe, craft_pool, load_crafted, prepared_scenes
from dfmcl.monitoring.crafting import ImagePool, draw
from dfmcl.monitoring.sidecar import watch
from dfmcl.monitoring.surrogates import load_surrogates
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.threats.registry import threat_of

Make = Callable[..., Any]
FEW = 100  # more than one batch


@pytest.fixture
def recipe(write_config: Make) -> Recipe:
    """A watch's, on its first images."""
    whole = Recipe.of(write_config(1))
    return replace(whole, pool=ImagePool(whole.pool.images[:FEW], whole.pool.labels[:FEW], whole.pool.classes))


def tensor(images: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


def test_files_hold_what_rounds_ask_about(recipe: Recipe, tmp_path: Path) -> None:
    """Each image under each attack, in its place, changed, inside the ball; a round takes those it draws."""
    craft_pool(recipe, tmp_path / "crafted")
    crafted = load_crafted(recipe, tmp_path / "crafted")
    whole = {name: made.take(np.arange(FEW)) for name, made in crafted.items()}
    assert set(whole) == {"mi-fgsm-2", "pgd-2"}
    for images in whole.values():
        assert (images.dtype, images.shape) == (np.dtype(np.uint8), recipe.pool.images.shape)
        assert bool(recipe.threat.contains_uint8(tensor(images), tensor(recipe.pool.images)).all())
        assert (images != recipe.pool.images).any(axis=(1, 2, 3)).mean() > 0.9
    assert not np.array_equal(whole["mi-fgsm-2"], whole["pgd-2"])
    made = prepared_scenes(recipe.pool, recipe.threat, crafted, seed=3, count=8, first=5)
    for number, scene in enumerate(islice(made, 20), 5):
        chosen = draw(FEW, 8, 3, number)
        assert scene.number == number
        assert np.array_equal(scene.images, recipe.pool.images[chosen])
        for name, images in scene.adversarial.items():
            assert np.array_equal(images, whole[name][chosen])


def test_an_l2_ball_and_a_step_size_in_the_name(recipe: Recipe, tmp_path: Path) -> None:
    """A name that is no file name is no hindrance, and bytes lie in an L2 ball too."""
    attacks = (Attack.parse_transfer("pgd-2@2/255"), Attack.parse_transfer("pgd-2@eps/4"))
    other = replace(recipe, threat=threat_of("l2", "1.0"), attacks=attacks)
    craft_pool(other, tmp_path / "crafted")
    one, two = (made.take(np.arange(FEW)) for made in load_crafted(other, tmp_path / "crafted").values())
    assert not np.array_equal(one, two)


def test_crafting_repeats_byte_for_byte(recipe: Recipe, tmp_path: Path) -> None:
    """The same recipe gives the same files; another seed gives others where an attack draws."""
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        craft_pool(replace(recipe, seed=seed), tmp_path / name)
    one, two, three = ((tmp_path / name / "pgd-2.bytes").read_bytes() for name in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_a_batch_has_chances_of_its_own(recipe: Recipe, tmp_path: Path) -> None:
    """The same image in two batches is started from two places."""
    twice = np.concatenate([recipe.pool.images[:64]] * 2)
    pool = ImagePool(twice, np.concatenate([recipe.pool.labels[:64]] * 2), recipe.pool.classes)
    craft_pool(replace(recipe, pool=pool), tmp_path / "crafted")
    images = load_crafted(replace(recipe, pool=pool), tmp_path / "crafted")["pgd-2"].take(np.arange(128))
    assert not np.array_equal(images[:64], images[64:])


def test_what_was_crafted_for_another_watch_is_refused(recipe: Recipe, make_run: Make, tmp_path: Path) -> None:
    """Whatever differs is named, with what to do."""
    craft_pool(recipe, tmp_path / "crafted")
    others = {
        "pool": replace(recipe, pool=ImagePool(recipe.pool.images, recipe.pool.labels[::-1], 10)),
        "surrogates": replace(recipe, surrogates=load_surrogates([make_run(5)], load_dataset("digits"))),
        "threat": replace(recipe, threat=threat_of("linf", "37/255")),
        "seed": replace(recipe, seed=1),
    }
    assert set(others) == set(recipe.to_json())
    for key, other in others.items():
        with pytest.raises(BadInput, match=f"other {key} than this watch has; make it with dfmcl craft"):
            load_crafted(other, tmp_path / "crafted")


def test_attacks_are_taken_by_name_and_parameters(recipe: Recipe, tmp_path: Path) -> None:
    """Fewer of them, in another order: at hand. One more, or one that a later release runs otherwise: refused."""
    craft_pool(recipe, tmp_path / "crafted")
    two, one = reversed(recipe.attacks), recipe.attacks[:1]
    for attacks in (tuple(two), one):
        assert list(load_crafted(replace(recipe, attacks=attacks), tmp_path / "crafted")) == [a.name for a in attacks]
    longer = replace(recipe.attacks[0], parameters={**recipe.attacks[0].parameters, "steps": 3})
    for attacks in ((longer,), (*one, Attack.parse_transfer("fgsm"))):
        with pytest.raises(BadInput, match=f"holds no {attacks[-1].name}, or one with other parameters"):
            load_crafted(replace(recipe, attacks=attacks), tmp_path / "crafted")


def test_other_attacks_take_the_place_of_earlier_ones(recipe: Recipe, tmp_path: Path) -> None:
    """An earlier run's files go; other files are not touched."""
    craft_pool(recipe, tmp_path / "crafted")
    craft_pool(replace(recipe, attacks=recipe.attacks[1:]), tmp_path / "crafted")
    assert {path.name for path in (tmp_path / "crafted").iterdir()} == {MANIFEST, "pgd-2.bytes"}
    (tmp_path / "crafted" / "mine.txt").touch()
    with pytest.raises(BadInput, match=r"holds mine.txt, which this command did not write"):
        craft_pool(recipe, tmp_path / "crafted")


def spoil_byte(folder: Path) -> None:
    content = bytearray((folder / "pgd-2.bytes").read_bytes())
    content[-1] ^= 1
    (folder / "pgd-2.bytes").write_bytes(content)


def spoil_format(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": "dfmcl.crafted/0"}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_byte, "pgd-2.bytes: is not the file that crafted.json names"),
        (spoil_format, "format is 'dfmcl.crafted/0'"),
        (lambda folder: (folder / "mi-fgsm-2.bytes").unlink(), "mi-fgsm-2.bytes: not readable: No such file"),
        (lambda folder: (folder / MANIFEST).write_text('{"format": "dfmcl.crafted/1", "recipe": []}'), "other pool"),
        (lambda folder: (folder / MANIFEST).unlink(), "holds no crafted.json"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "not readable as JSON"),
    ],
)
def test_files_that_changed_are_refused(
    recipe: Recipe, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    """A byte, a file, the manifest: an accident is noticed before anything is asked."""
    craft_pool(recipe, tmp_path / "crafted")
    spoil(tmp_path / "crafted")
    with pytest.raises(BadInput, match=said):
        load_crafted(recipe, tmp_path / "crafted")


def test_a_file_that_is_replaced_or_written_over(recipe: Recipe, tmp_path: Path) -> None:
    """A watch keeps to the files that it opened, whatever takes their place; in those, it notices what cannot be."""
    path = tmp_path / "crafted"
    craft_pool(recipe, path)
    crafted = load_crafted(recipe, path)["pgd-2"]
    before = crafted.take(np.arange(8))
    craft_pool(replace(recipe, seed=1), path)
    assert np.array_equal(crafted.take(np.arange(8)), before)
    crafted = load_crafted(replace(recipe, seed=1), path)["pgd-2"]
    content = (path / "pgd-2.bytes").read_bytes()
    for other in (bytes(255 - byte for byte in content), content[: len(content) // 20]):
        (path / "pgd-2.bytes").write_bytes(other)
        with pytest.raises(Broken, match="was written over since this watch began"):
            crafted.take(np.arange(8))


def test_a_full_disk_is_said(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system refuses is one line, exit code 5, and nothing stays."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    opened = Path.open

    def full(path: Path, *how: Any) -> Any:
        return opened(Path("/dev/full"), "wb") if path.suffix == ".bytes" else opened(path, *how)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(Broken, match="crafted: cannot be written: No space left on device"):
        craft_pool(recipe, tmp_path / "crafted")
    assert list(tmp_path.glob("*craft*")) == []


def test_nothing_half_written(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crafting that dies in its second batch leaves what was there before."""
    craft_pool(recipe, tmp_path / "crafted")
    before = {path.name: path.read_bytes() for path in (tmp_path / "crafted").iterdir()}

    def dies(*arguments: Any, part: int, **options: Any) -> Any:
        if part:
            raise MemoryError
        return np.zeros((64, 16, 16, 3), np.uint8)

    monkeypatch.setattr("dfmcl.monitoring.crafted.craft", dies)
    with pytest.raises(MemoryError):
        craft_pool(replace(recipe, seed=1), tmp_path / "crafted")
    assert {path.name: path.read_bytes() for path in (tmp_path / "crafted").iterdir()} == before
    assert [path.name for path in tmp_path.glob("*craft*")] == ["crafted"]


def test_a_watch_that_finds_them_crafts_nothing(
    endpoint: Any, write_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds are measured with crafting forbidden; without the files they would not be."""
    settings: WatchConfig = write_config(endpoint.port, probe={"crafted": "crafted"})
    craft_pool(Recipe.of(settings), Path(settings.probe.crafted))

    def forbidden(*arguments: Any, **options: Any) -> None:
        raise AssertionError("somebody crafts")

    monkeypatch.setattr("dfmcl.monitoring.crafting.craft", forbidden)
    said: list[str] = []
    assert watch(settings, rounds=3, stop=threading.Event(), log=said.append) == 0
    assert sum("transfer pgd-2" in line for line in said) == 3
    without = settings.model_copy(update={"probe": settings.probe.model_copy(update={"crafted": ""})})
    assert watch(without, rounds=1, stop=threading.Event(), log=said.append) == 5
