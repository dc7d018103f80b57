"""Configs: what is in the package is valid, and every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfmcl.common.errors import BadInput
from dfmcl.training.config import TrainConfig, load_config, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid(name: str) -> None:
    """A preset parses."""
    assert load_config(name).optimization.epochs >= 1


def test_paper_preset_is_the_sources_experiment() -> None:
    """Adam 1e-3, batch 128, 100 epochs, layer4, alpha 0.1, beta 0.08, all three attacks, no selection of anything."""
    config = load_config("paper")
    chosen = config.optimization
    assert (chosen.optimizer, chosen.lr, chosen.batch_size, chosen.epochs) == ("adam", 1e-3, 128, 100)
    assert (config.masking.enabled, config.masking.layer, config.masking.alpha) == (True, "layer4", 0.1)
    assert (config.curriculum.beta, config.curriculum.schedule) == ("0.08", "linear")
    assert config.curriculum.attacks == ["fgsm", "pgd", "cw"]
    assert (config.model.width, config.data.name) == (64, "cifar10")


MISTAKES = {
    "unknown key": ("[model]\nwidht = 16", r"unknown key model\.widht"),
    "unknown section": ("[modle]\nwidth = 16", r"unknown key modle"),
    "wrong type": ('[model]\nwidth = "16"', r"model\.width: .*\(found '16'\)"),
    "out of range": ("[optimization]\nepochs = 0", r"optimization\.epochs: .*greater than or equal to 1"),
    "unknown choice": ('[data]\nname = "imagenet"', r"data\.name: .*'digits'"),
    "radius in 255ths": ('[curriculum]\nbeta = "8"', r"curriculum\.beta: .*lies in \(0, 1\]"),
    "radius that is none": ('[curriculum]\nbeta = "a/b"', r"curriculum\.beta: .*no radius"),
    "unknown attack": ('[curriculum]\nattacks = ["pgd", "fgm"]', r"curriculum\.attacks\.1"),
    "not TOML": ("[model\nwidth = 16", r"not TOML: .*line 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named(tmp_path: Path, mistake: str) -> None:
    """The message names the file and the key, in one line."""
    text, message = MISTAKES[mistake]
    path = tmp_path / "train.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        load_config(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override", ["epochs", "=3", "optimization.epochs=none", "seed.x=1", "seed=9999999999999999999", "data.nmae=digits"]
)
def test_wrong_override_is_refused(override: str) -> None:
    """--set with a wrong form, value or key is bad input."""
    with pytest.raises(BadInput):
        load_config("paper", ["seed=3", override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["curriculum.attacks=[]", "objective.name=trades"],
            r"--set objective.name=trades: objective.name: trades needs",
        ),
        (["curriculum.schedule=constant", "curriculum.warmup=0.5", "curriculum.hold=0.5"], "leave nothing of the run"),
        (["curriculum.weights=[1.0]"], r"curriculum.weights: 1 for 3 attacks"),
        (["curriculum.attacks=['pgd']", "curriculum.fgsm_fallback=0.1"], "no fgsm to fall back from"),
        (["masking.rule=dropout", "masking.prior=1.0"], r"masking.prior: only the literal and the ranked rule"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    """In one line that names them, without the whole config in it."""
    with pytest.raises(BadInput, match=message) as refused:
        load_config("paper", overrides)
    assert len(str(refused.value)) < 240


def test_override_reaches_its_key() -> None:
    """--set takes TOML values, and bare words as strings."""
    config = load_config("paper", ["optimization.epochs=3", "data.name=digits", "curriculum.attacks=[]"])
    assert (config.optimization.epochs, config.data.name, config.curriculum.attacks) == (3, "digits", [])


def test_missing_file_lists_the_presets() -> None:
    """A name that is neither file nor preset says which presets there are."""
    with pytest.raises(BadInput, match=r"nowhere\.toml: No such file.*paper"):
        load_config("nowhere.toml")


def test_digest_depends_on_values_only() -> None:
    """Spelling out a default changes nothing; changing a value does."""
    assert TrainConfig(seed=0).digest == TrainConfig().digest
    assert TrainConfig(seed=1).digest != TrainConfig().digest
    assert load_config("paper", ["data.path=elsewhere"]).digest == load_config("paper").digest
