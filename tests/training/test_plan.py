"""Campaign files: whatever is wrong with one is known before any training."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfmcl.common.errors import BadInput
from dfmcl.training.plan import campaign_names, load_campaign, runs
from tests.training.workshop import TINY


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('["mi-fgsm-2"]', '["mi-fgms-2"]', r"x.toml: measurements.transfer: attacks.0: .*'mi-fgms-2' is unknown"),
        ('step_size = "eps/4"', 'step_size = "wide"', r"measurements.white: attacks.2: .*'wide' is no radius"),
        ('{ attack = "pgd-2"', '{ attack = "fgsm"', r"measurements.white: attacks.2: fgsm takes no step_size"),
        ('step_size = "eps/4"', 'step = "eps/4"', r"measurements.white: attacks.2: an attack is"),
        ('source = "surrogate"', 'sourse = "surrogate"', r"measurements.transfer: unknown key sourse"),
        ('source = "surrogate"', 'source = "nobody"', r"measurements.transfer.source: 'nobody' is none of the methods"),
        ('["dfmcl", "standard"]', '["dfmcl", "trades"]', r"comparisons.pairs: 'trades' is none of the methods"),
        ('main = ["fgsm", "pgd-2"]', 'main = ["pgd-3"]', r"main: 'pgd-3' is measured nowhere"),
        ('preset = "quickstart"', 'preset = "quick"', r"x.toml: methods.dfmcl: quick: No such file"),
        ('"8/255"]\nseeds', '"8"]\nseeds', r"x.toml: betas.0: '8' is 8; a radius in pixel units"),
        ("[measurements.white]", '[measurements."a/b"]', r"measurements.'a/b': a name becomes a file's"),
        (
            "[comparisons]",
            '[regression]\nkey = "masking.alfa"\n[comparisons]',
            r"regression.key: 'masking.alfa' is no n",
        ),
        (
            "[comparisons]",
            '[regression]\nkey = "masking.rule"\n[comparisons]',
            r"regression.key: 'masking.rule' is no n",
        ),
        ('betas = ["8/255"]', 'betas = ["8/255", "0.0313725"]', r"standard_beta8_seed0.* more than once"),
        ('title = "Tiny"', "", r"x.toml: title: Field required"),
    ],
)
def test_a_wrong_file_names_its_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    """Whatever is wrong is known before any training, with file and key."""
    assert old in TINY
    (tmp_path / "x.toml").write_text(TINY.replace(old, new))
    with pytest.raises(BadInput, match=message):
        runs(load_campaign(str(tmp_path / "x.toml")), str(tmp_path / "x.toml"))


@pytest.mark.parametrize("name", campaign_names())
def test_packaged_campaigns_are_whole(name: str) -> None:
    """They load, their runs differ in name and config, and every transfer attack has a source other than its target."""
    campaign = load_campaign(name)
    every = runs(campaign, name)
    assert len({run.name for run in every}) == len({run.config.digest for run in every}) == len(every)
    assert campaign.label == ("small scale" if name.endswith("_small") else "")
    first = [run.measured for run in every]
    assert first == sorted(first), "sources come first"
