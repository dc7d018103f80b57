"""Campaigns: cut anywhere and continued they leave the same records, and the tables say what the records say."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

import dfmcl
from robustness.data import load_dataset
from robustness.errors import BadInput
from robustness.records import AttackRecord, Evaluation
from robustness.runs import load_run
from robustness.statistics import PairedCounts, bootstrap_difference
from robustness.threat import Threat
from training.campaign import SHUFFLE_SEED, Limits, Partial, exactly, number, read_records, run_campaign, write_tables
from training.plan import WORST, Campaign, campaign_names, load_campaign, runs
from training.record import Record, pack, read_record, unpack, write_record
from training.table import reach, table

ROOT = Path(__file__).parents[2]
TINY = """
title = "Tiny"
label = "small scale"
betas = ["8/255"]
seeds = [0]
images = 20
batch_size = 12
main = ["fgsm", "pgd-2"]
claims_eps = "8/255"
hyperscore = ["8/255"]
cost_of = "standard"
overrides = [
    "data.name=npz", "data.train_images=240", "data.heldout_images=30", "model.width=4", "optimization.epochs=2",
    "optimization.batch_size=20", "optimization.lr=5e-3", "heldout.images=10", "heldout.attack_steps=1",
    "curriculum.steps=1",
]

[methods.standard]
preset = "quickstart_standard"
claimed = { clean = 94.1, pgd-2 = 48.7 }

[methods.dfmcl]
preset = "quickstart"

[methods.surrogate]
preset = "quickstart_surrogate"
seeds = [7]
measured = false

[measurements.white]
eps = ["1/255", "8/255"]
attacks = ["fgsm", "pgd-2", { attack = "pgd-2", step_size = "eps/4" }]
cascade = true

[measurements.square]
eps = ["8/255"]
attacks = ["square-4"]
kind = "black-box"

[measurements.transfer]
eps = ["8/255"]
attacks = ["mi-fgsm-2"]
source = "surrogate"

[comparisons]
pairs = [["dfmcl", "standard"]]
eps = ["8/255"]
attacks = ["clean", "worst case"]
"""
THREAT = Threat.parse("linf", "8/255")


class StopAfter(threading.Event):
    """An event that is set from its n-th asking on: a signal that arrives at a known place."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self.left = asked

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def quiet(line: str) -> None:
    """A log that nobody reads."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the data and the campaign's file."""
    digits = load_dataset("digits")
    path = tmp_path_factory.mktemp("campaign")
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez(path / "digits.npz", **{name: getattr(digits, name)[:300] for name in names})
    (path / "tiny.toml").write_text(TINY)
    return path


def work(workplace: Path, out: Path, text: str = TINY, log: Any = quiet, **options: Any) -> Any:
    """Run a campaign of this text on the workplace's data."""
    (out.parent / f"{out.name}.toml").write_text(text)
    campaign = load_campaign(str(out.parent / f"{out.name}.toml"))
    overrides = [f"data.path={workplace / 'digits.npz'}"]
    return run_campaign(campaign, "x.toml", out, overrides=overrides, device="cpu", log=log, **options)


@pytest.fixture(scope="module")
def uncut(workplace: Path) -> Path:
    """The whole campaign in one go."""
    progress = work(workplace, workplace / "uncut")
    assert (progress.done, progress.failed, progress.exit_code) == (3, 0, 0)
    return workplace / "uncut"


def content(out: Path) -> dict[str, Any]:
    """All records, but for times, places and what the environment is."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if k not in ("seconds", "minutes", "images_per_second", "path")}
            return {k: timeless(v) for k, v in kept.items() if k not in ("about", "hardware") or "measurement" in v}
        return [timeless(entry) for entry in value] if isinstance(value, list) else value

    return {path.name: timeless(json.loads(path.read_text())) for path in sorted((out / "records").iterdir())}


# --- The work ---------------------------------------------------------------------------------------------------------


def test_a_campaign_leaves_records_and_tables(uncut: Path) -> None:
    """Every run has a record; the page has claimed beside measured, transfer, comparisons, cost and its label."""
    assert set(content(uncut)) == {
        "dfmcl_beta8_seed0.json",
        "standard_beta8_seed0.json",
        "surrogate_beta8_seed7.json",
    }
    page = (uncut / "table.md").read_text()
    assert "# Tiny (small scale)" in page
    assert "3 of 3 runs done, 0 failed; n = 20 test images" in page
    assert "| method | clean claimed | clean measured | fgsm claimed |" in page
    assert "| standard | 94.1 | " in page
    assert "crafted on surrogate" in page
    assert "| 8/255 | dfmcl - standard | clean | " in page
    assert "McNemar" in page
    assert "| 8/255 | 8/255 | dfmcl | 0." in page, "a HyperScore needs white box and black box"
    assert "not measured" not in page
    assert "Failed" not in page
    assert not list((uncut / "partial").iterdir())
    assert not (uncut / "runs" / "dfmcl_beta8_seed0" / "state").exists()


def test_flags_are_those_of_a_direct_computation(uncut: Path, workplace: Path) -> None:
    """Clean and FGSM per image, computed again from the checkpoint with nothing of the frame."""
    data = np.load(workplace / "digits.npz")
    order = np.random.default_rng(SHUFFLE_SEED).permutation(300)[:20]
    x = torch.from_numpy(data["x_test"][order]).permute(0, 3, 1, 2).float() / 255
    y = torch.from_numpy(data["y_test"][order]).long()
    model = load_run(uncut / "runs" / "dfmcl_beta8_seed0").model
    point = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(point), y, reduction="sum"), point)
    x_adv = (x + THREAT.eps * gradient.sign()).clamp(0, 1)
    clean, held = (model(images).argmax(dim=1) == y for images in (x, x_adv))
    record = read_record(uncut / "records" / "dfmcl_beta8_seed0.json")
    assert (record.flags("clean", THREAT) == clean.numpy()).all()
    assert (record.flags("fgsm", THREAT) == (clean & held).numpy()).all()
    assert 0 < clean.sum() < 20


def test_worst_case_and_cascade(uncut: Path) -> None:
    """The worst case is the conjunction of all attacks; in a cascade nothing that fell stands up again."""
    record = read_record(uncut / "records" / "standard_beta8_seed0.json")
    names = ("fgsm", "pgd-2", "pgd-2 (step eps/4)", "mi-fgsm-2", "square-4")
    columns = [record.flags(name, THREAT) for name in names]
    assert all(column is not None for column in columns)
    assert (np.all(columns, axis=0) == record.flags(WORST, THREAT)).all()
    assert (columns[1] <= columns[0]).all()
    assert (columns[2] <= columns[1]).all()
    assert (record.flags(WORST, THREAT, black_box=True) == (columns[3] & columns[4])).all()
    sizes = [dict(attack.parameters).get("step_size") for attack in record.evaluations[1].attacks]
    assert sizes == [None, None, pytest.approx(8 / 255 / 4)]


def test_cut_and_continued_equals_uncut(workplace: Path, uncut: Path, tmp_path: Path) -> None:
    """Stopped again and again, in training and between batches of a measurement, the records are the uncut ones."""
    cuts = 0
    for asked in (1, 3, 5, 12, 20, 25, 30, 1_000_000):
        progress = work(workplace, tmp_path / "out", limits=Limits(StopAfter(asked)))
        assert progress.exit_code == (130 if progress.cut else 0)
        cuts += progress.cut
        if progress.cut:
            assert "repeat the command to continue" in str(progress)
    assert cuts >= 4
    assert progress.done == 3
    assert content(tmp_path / "out") == content(uncut)


def test_measured_batches_are_kept(workplace: Path, uncut: Path, tmp_path: Path) -> None:
    """What a partial file holds is not measured again, unless it was another checkpoint's."""
    shutil.copytree(uncut, tmp_path / "out")
    record = tmp_path / "out" / "records" / "standard_beta8_seed0.json"
    known = read_record(record)
    record.unlink()
    key, false = (
        "white, Linf 8/255, fgsm",
        [{"held": bits, "outside": 0, "seconds": 0.0} for bits in ("1" * 12, "1" * 8)],
    )
    partial = tmp_path / "out" / "partial" / record.name
    for checkpoint, kept in ((known.training["checkpoint_sha256"], True), ("another", False)):
        partial.write_text(json.dumps({"identity": known.identity + checkpoint, "batches": {key: false}}))
        work(workplace, tmp_path / "out")
        flags = read_record(record).flags("fgsm", THREAT)
        assert flags is not None
        assert flags.all() == kept
        record.unlink()


def test_a_batch_in_work_is_not_waited_for(workplace: Path, uncut: Path, tmp_path: Path) -> None:
    """Time that runs out inside a batch ends it at the next forward pass, and keeps the batches before it."""
    shutil.copytree(uncut, tmp_path / "out")
    (tmp_path / "out" / "records" / "standard_beta8_seed0.json").unlink()
    clock = iter(range(1_000_000))
    limits = Limits(deadline=20, clock=lambda: float(next(clock)))
    assert work(workplace, tmp_path / "out", limits=limits).exit_code == 130
    assert next(clock) == 21, "the first asking after the deadline was the last"
    (partial,) = (tmp_path / "out" / "partial").iterdir()
    assert json.loads(partial.read_text())["batches"]
    assert work(workplace, tmp_path / "out").exit_code == 0
    assert content(tmp_path / "out") == content(uncut)


def test_a_kill_before_the_first_state_starts_again(workplace: Path, uncut: Path, tmp_path: Path) -> None:
    """A run's directory with a history but no state to resume from is begun anew, not failed for ever."""
    shutil.copytree(uncut, tmp_path / "out")
    (tmp_path / "out" / "records" / "standard_beta8_seed0.json").unlink()
    (tmp_path / "out" / "runs" / "standard_beta8_seed0" / "manifest.json").unlink()
    assert work(workplace, tmp_path / "out").exit_code == 0
    assert content(tmp_path / "out") == content(uncut)


def test_records_alone_are_enough(workplace: Path, uncut: Path, tmp_path: Path) -> None:
    """On another machine, with the records only, nothing is trained and the table is the same."""
    shutil.copytree(uncut / "records", tmp_path / "out" / "records")
    progress = work(workplace, tmp_path / "out")
    assert (progress.done, progress.exit_code) == (3, 0)
    assert not list((tmp_path / "out" / "runs").iterdir())
    assert (tmp_path / "out" / "table.md").read_text() == (uncut / "table.md").read_text()


def test_a_missing_source_is_not_measured(workplace: Path, uncut: Path, tmp_path: Path) -> None:
    """Without the surrogate's weights the rest is measured; with them it needs no run of the surrogate's."""
    for folder, there in (("without", False), ("with", True)):
        shutil.copytree(uncut / "records", tmp_path / folder / "records")
        (tmp_path / folder / "records" / "standard_beta8_seed0.json").unlink()
        if there:
            shutil.copytree(uncut / "weights", tmp_path / folder / "weights")
        assert work(workplace, tmp_path / folder).exit_code == 0
        record = read_record(tmp_path / folder / "records" / "standard_beta8_seed0.json")
        assert (record.flags("mi-fgsm-2", THREAT) is not None) == there
        assert record.flags("pgd-2", THREAT) is not None
        reason = "the weights of surrogate_beta8_seed7 are missing"
        assert (reason in (tmp_path / folder / "table.md").read_text()) != there


def test_a_failed_run_does_not_stop_the_others(workplace: Path, uncut: Path, tmp_path: Path) -> None:
    """A run that diverges is recorded with its message, the rest is done, and repeating tries it again, last."""
    text = TINY.replace(
        'preset = "quickstart_standard"', 'preset = "quickstart_standard"\noverrides = ["optimization.lr=1e30"]'
    )
    lines: list[str] = []
    shutil.copytree(uncut, tmp_path / "out")
    for name in ("standard", "dfmcl"):
        (tmp_path / "out" / "records" / f"{name}_beta8_seed0.json").unlink()
    shutil.rmtree(tmp_path / "out" / "runs" / "standard_beta8_seed0")
    progress = work(workplace, tmp_path / "out", text)
    assert (progress.done, progress.failed, progress.exit_code) == (2, 1, 5)
    record = read_record(tmp_path / "out" / "records" / "standard_beta8_seed0.json")
    assert record.status == "failed"
    assert "loss is" in record.message
    assert f"| standard_beta8_seed0 | failed | {record.message} |" in (tmp_path / "out" / "table.md").read_text()
    (tmp_path / "out" / "records" / "dfmcl_beta8_seed0.json").unlink()
    assert work(workplace, tmp_path / "out", text, log=lines.append).exit_code == 5
    begun = [line.partition(":")[0] for line in lines if "runs done" in line]
    assert begun == ["dfmcl_beta8_seed0", "standard_beta8_seed0"]


def test_records_of_another_config_are_refused(workplace: Path, uncut: Path, tmp_path: Path) -> None:
    """Another config or other measurements never pass off old records as theirs; where the data lie does not matter."""
    shutil.copytree(uncut, tmp_path / "out")
    for old, new in (('"optimization.epochs=2"', '"optimization.epochs=3"'), ('"1/255", "8/255"', '"8/255"')):
        with pytest.raises(BadInput, match=r"beta8_seed.\.json: was made with another config"):
            work(workplace, tmp_path / "out", TINY.replace(old, new))
    campaign = load_campaign(str(workplace / "tiny.toml"))
    elsewhere = runs(campaign, "x", ["data.path=elsewhere.npz"])
    assert len(read_records(campaign, elsewhere, uncut)) == 3


def test_too_many_images_are_refused_before_training(workplace: Path, tmp_path: Path) -> None:
    """The data are looked at first."""
    with pytest.raises(BadInput, match="301 are asked for"):
        work(workplace, tmp_path / "out", TINY.replace("images = 20", "images = 301", 1))
    assert not list((tmp_path / "out" / "runs").iterdir())


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def signals_kept() -> Iterator[None]:
    """The command installs handlers; they must not outlive it here."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


@pytest.mark.usefixtures("signals_kept")
def test_command_with_no_time_left(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A budget that is spent ends with 130 and one line; --table-only writes the table without any work."""
    options: dict[str, Any] = {"out": tmp_path / "out", "data_path": str(workplace / "digits.npz"), "device": "cpu"}
    with pytest.raises(SystemExit) as caught:
        dfmcl.campaign(str(workplace / "tiny.toml"), budget_minutes=0.0, **options)
    assert caught.value.code == 130
    assert "0 of 3 runs done; repeat the command to continue" in capsys.readouterr().out
    (tmp_path / "out" / "table.md").unlink()
    with pytest.raises(SystemExit) as caught:
        dfmcl.campaign(str(workplace / "tiny.toml"), table_only=True, **options)
    assert caught.value.code == 0
    assert "0 of 3 runs done" in (tmp_path / "out" / "table.md").read_text()


def test_killed_and_continued_from_a_bare_checkout(workplace: Path, uncut: Path, tmp_path: Path) -> None:
    """kill -9 in the middle, on a machine where dfmcl and its optional libraries are not installed; then to the end."""
    for room in ("robustness", "training"):
        shutil.copytree(ROOT / room, tmp_path / "checkout" / room)
    shutil.copy(ROOT / "dfmcl.py", tmp_path / "checkout")
    absent = ("dfmcl", "__editable__", "tensorboard", "sklearn", "scikit_learn", "onnx", "matplotlib")
    (tmp_path / "site").mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(absent):
            (tmp_path / "site" / entry.name).symlink_to(entry)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "2", "GIT_DIR": "none"}
    command = [
        sys.executable,
        "-S",
        "-m",
        "training.campaign",
        str(workplace / "tiny.toml"),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--data-path", str(workplace / "digits.npz"), "--device", "cpu"]
    options: dict[str, Any] = {"cwd": tmp_path / "checkout", "env": environment}
    process = subprocess.Popen(command, **options, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "out").glob("records/*.json")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, **options, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("3 of 3 runs done")
    assert content(tmp_path / "out") == content(uncut)
    versions = read_record(tmp_path / "out" / "records" / "dfmcl_beta8_seed0.json").about["versions"]
    assert "torch" in versions
    assert "dfmcl" not in versions, "the environment was not bare"


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


# --- The figures ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 20))
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int, both: int) -> None:
    """Against scipy's own binomial test, from the flags."""
    first = np.array([True] * only_first + [False] * only_second + [True] * both + [False])
    second = np.array([False] * only_first + [True] * only_second + [True] * both + [False])
    counts = PairedCounts.of(first, second)
    assert (counts.only_first, counts.only_second) == (only_first, only_second)
    differing = only_first + only_second
    expected = binomtest(only_first, differing, 0.5).pvalue if differing else 1.0
    assert counts.p == pytest.approx(expected)


def test_mcnemar_closed_form() -> None:
    """Five images, all on one side: 2 * (1/2)^5."""
    assert PairedCounts(5, 0).p == pytest.approx(0.0625)
    assert PairedCounts(3, 3).p == 1.0


def test_bootstrap_interval_is_the_normal_one_on_many_images() -> None:
    """One seed, 4,000 images: difference +- 1.96 standard errors, and mirrored when the methods change places."""
    stream = np.random.default_rng(1)
    first, second = stream.random((1, 4000)) < 0.5, stream.random((1, 4000)) < 0.45
    difference = first.astype(float) - second
    error = 1.96 * difference.std() / np.sqrt(4000)
    low, high = bootstrap_difference(first, second)
    assert (low, high) == pytest.approx((difference.mean() - error, difference.mean() + error), abs=0.001)
    assert bootstrap_difference(second, first) == pytest.approx((-high, -low), abs=0.001)


def test_bootstrap_interval_knows_the_seeds() -> None:
    """Two seeds that disagree, on images without number: the interval spans them both, as a seed may be drawn twice."""
    first = np.array([[True] * 500, [False] * 500])
    second = ~first
    assert bootstrap_difference(first, second) == (-1.0, 1.0)
    assert bootstrap_difference(first, first) == (0.0, 0.0)


def test_pairs_must_be_pairs() -> None:
    """Flags of different images, or of none, are refused."""
    for shapes in (((1, 3), (1, 4)), ((1, 0), (1, 0))):
        with pytest.raises(BadInput, match="are no pairs"):
            bootstrap_difference(np.zeros(shapes[0], bool), np.zeros(shapes[1], bool))


@given(st.lists(st.booleans(), max_size=50))
def test_packed_bits_come_back(flags: list[bool]) -> None:
    """pack and unpack are inverse for any length."""
    bits = "".join("01"[flag] for flag in flags)
    assert unpack(pack(bits), len(bits)) == bits


def test_number_keeps_what_json_cannot_hold_as_text() -> None:
    """A loss that became NaN is still a history."""
    assert [number(text) for text in ("3", "0.5", "nan", "inf", "False")] == [3, 0.5, "nan", "inf", "False"]


def synthetic(
    method: str, seed: int, held: dict[str, np.ndarray[Any, Any]], alpha: float = 0.1, n: int = 100
) -> Record:
    """A record whose PGD-2 flags at each radius are given; all clean images are right."""
    every = (True,) * n
    evaluations = tuple(
        Evaluation(
            Threat.parse("linf", eps),
            False,
            0,
            every,
            (AttackRecord("pgd-2", {}, tuple(flags.tolist()), every, 0, 1.0),),
            1.0,
            {"measurement": "white", "black_box": False},
        )
        for eps, flags in held.items()
    )
    row = {"epoch": 1, "alpha": alpha, "p_mean": 0.5, "p_std": 0.0, "p_low": 0.5, "p_high": 0.5}
    result = {"heldout_clean": 1.0, "heldout_pgd": 0.5}
    return Record(
        name=f"{method}_beta8_seed{seed}",
        method=method,
        family=method.partition("-")[0],
        beta="8/255",
        seed=seed,
        identity="",
        status="done",
        config={"masking": {"enabled": True, "alpha": alpha}},
        about={
            "command": "dfmcl campaign x",
            "code": {"revision": ""},
            "versions": {"torch": "2"},
            "hardware": {"cpu": "c", "gpu": None, "threads": 2},
        },
        training={"history": [row], "result": result, "minutes": 1.0, "images_per_second": 10.0},
        evaluations=evaluations,
    )


def first_of(n: int, count: int) -> np.ndarray[Any, Any]:
    return np.arange(n) < count


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


def test_one_radius_written_in_two_ways_is_one() -> None:
    """0.08 and 20.4/255 differ in their last bit as floats."""
    record = synthetic("x", 0, {"20.4/255": first_of(100, 7)})
    flags = record.flags("pgd-2", Threat.parse("linf", "0.08"))
    assert flags is not None
    assert flags.sum() == 7


@pytest.mark.parametrize(("name", "limit"), [("table1", 400_000), ("table1_small", 60_000), ("alpha_small", 60_000)])
def test_records_are_small(tmp_path: Path, name: str, limit: int) -> None:
    """With bits that nothing compresses, a record of the whole plan stays below the limit and comes back equal."""
    campaign = load_campaign(name)
    n = campaign.images or 10_000
    stream = np.random.default_rng(0)

    def bits(count: int) -> tuple[bool, ...]:
        return tuple((stream.random(count) < 0.5).tolist())

    evaluations = []
    for key, entry in campaign.measurements.items():
        for threat in entry.threats:
            count = entry.images or n
            correct = bits(count)
            attacks = tuple(
                AttackRecord(a.label, {"steps": 5}, bits(count), bits(count) if entry.cascade else correct, 0, 1 / 3)
                for a in entry.attacks
            )
            about = {"measurement": key, "black_box": entry.black_box, "source": "", "cascade": entry.cascade}
            evaluations.append(Evaluation(threat, False, 0, correct, attacks, 1 / 3, about))
    plain = synthetic("x", 0, {})
    epochs = runs(campaign, name)[-1].config.optimization.epochs
    row = {f"column{column}": stream.random() for column in range(14)} | {"p_counts": "12345 " * 10}
    config = runs(campaign, name)[-1].config.model_dump()
    training = {**plain.training, "history": [row] * epochs}
    record = Record(**{**vars(plain), "config": config, "training": training, "evaluations": tuple(evaluations)})
    write_record(tmp_path / "x.json", record)
    assert (tmp_path / "x.json").stat().st_size < limit
    assert read_record(tmp_path / "x.json") == record


def test_a_foreign_record_is_named(tmp_path: Path) -> None:
    """A file that is no record is bad input with its name, not a traceback."""
    (tmp_path / "x.json").write_text('{"format": "other"}')
    with pytest.raises(BadInput, match=r"x.json: format is 'other'"):
        read_record(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"format": "dfmcl.campaign.record/1"}')
    with pytest.raises(BadInput, match=r"x.json: malformed record"):
        read_record(tmp_path / "x.json")


def test_plots_are_drawn_where_matplotlib_is(uncut: Path, workplace: Path, tmp_path: Path) -> None:
    """Both kinds, from the records, equal byte for byte when drawn again."""
    pytest.importorskip("matplotlib")
    campaign = load_campaign(str(workplace / "tiny.toml"))
    every = runs(campaign, "x")
    write_tables(campaign, every, read_records(campaign, every, uncut), tmp_path)
    for name in ("accuracy_beta8.svg", "masks_beta8.svg"):
        assert (tmp_path / name).read_bytes() == (uncut / name).read_bytes()
        assert f"![{name}]({name})" in (tmp_path / "table.md").read_text()


def test_deciding_puts_tf32_back() -> None:
    """The setting is off while the network decides, and as it was afterwards."""
    seen = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return x

    before = torch.backends.cudnn.allow_tf32
    exactly(model)(torch.zeros(1))
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_partial_is_saved_whatever_ends_the_work(tmp_path: Path) -> None:
    """An exception inside loses no batch."""
    partial = Partial(tmp_path / "x.json", "a")

    def fail() -> None:
        with partial.kept():
            partial.add("key", {"held": "1"})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert Partial(tmp_path / "x.json", "a").batches == {"key": [{"held": "1"}]}
    assert Partial(tmp_path / "x.json", "b").batches == {}
