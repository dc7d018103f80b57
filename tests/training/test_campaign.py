"""Campaigns: cut anywhere and continued they leave the same records, and the tables say what the records say."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dfmcl.cli.training
from dfmcl.common.errors import BadInput
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.runs import load_run
from dfmcl.training.campaign import number, read_records, run_campaign, write_tables
from dfmcl.training.limits import Limits
from dfmcl.training.measurement import SHUFFLE_SEED
from dfmcl.training.plan import WORST, load_campaign, runs
from dfmcl.training.run_record import read_record
from tests.present import present
from tests.processes import wait_until
from tests.training.workshop import THREAT, TINY, StopAfter, quiet

ROOT = Path(__file__).parents[2]


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
    columns = [present(record.flags(name, THREAT)) for name in names]
    assert (np.all(columns, axis=0) == record.flags(WORST, THREAT)).all()
    assert (columns[1] <= columns[0]).all()
    assert (columns[2] <= columns[1]).all()
    assert (present(record.flags(WORST, THREAT, black_box=True)) == (columns[3] & columns[4])).all()
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
    for name in ("manifest.json", "checkpoint.safetensors"):
        (tmp_path / "out" / "runs" / "standard_beta8_seed0" / name).unlink()
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


def test_a_run_that_lacks_memory_is_for_the_user_to_repair(workplace: Path, uncut: Path, tmp_path: Path) -> None:
    """It is told as `dfmcl train` tells it, with 2; a failure of another kind beside it is worse."""
    wide = "model.width=10000000000000"  # a petabyte of weights: no machine has it, so that nothing is filled first
    text = TINY.replace('preset = "quickstart_standard"', f'preset = "quickstart_standard"\noverrides = ["{wide}"]')
    shutil.copytree(uncut, tmp_path / "out")
    (tmp_path / "out" / "records" / "standard_beta8_seed0.json").unlink()
    shutil.rmtree(tmp_path / "out" / "runs" / "standard_beta8_seed0")
    progress = work(workplace, tmp_path / "out", text)
    assert (progress.done, progress.failed, progress.exit_code) == (2, 1, 2)
    assert read_record(tmp_path / "out" / "records" / "standard_beta8_seed0.json").message.startswith(
        "not enough memory"
    )


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
    assert not (tmp_path / "out").exists()


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
        dfmcl.cli.training.campaign(str(workplace / "tiny.toml"), budget_minutes=0.0, **options)
    assert caught.value.code == 130
    assert "0 of 3 runs done; repeat the command to continue" in capsys.readouterr().out
    (tmp_path / "out" / "table.md").unlink()
    with pytest.raises(SystemExit) as caught:
        dfmcl.cli.training.campaign(str(workplace / "tiny.toml"), table_only=True, **options)
    assert caught.value.code == 0
    assert "0 of 3 runs done" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(SystemExit) as caught:
        dfmcl.cli.training.campaign(
            str(workplace / "tiny.toml"), table_only=True, **{**options, "out": tmp_path / "elsewhere"}
        )
    assert caught.value.code == 2
    assert "elsewhere: no such directory" in capsys.readouterr().err


def test_killed_and_continued_from_a_bare_checkout(workplace: Path, uncut: Path, tmp_path: Path) -> None:
    """kill -9 in the middle, on a machine where dfmcl and its optional libraries are not installed; then to the end."""
    for folder in ("dfmcl", "common", "robustness", "training"):
        shutil.copytree(ROOT / folder, tmp_path / "checkout" / folder, symlinks=True)
    absent = ("dfmcl", "__editable__", "tensorboard", "sklearn", "scikit_learn", "onnx", "matplotlib")
    (tmp_path / "site").mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(absent):
            (tmp_path / "site" / entry.name).symlink_to(entry)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "GIT_DIR": "none"}
    command = [
        sys.executable,
        "-S",
        "-m",
        "dfmcl.training.campaign",
        str(workplace / "tiny.toml"),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--data-path", str(workplace / "digits.npz"), "--device", "cpu"]
    options: dict[str, Any] = {"cwd": tmp_path / "checkout", "env": environment}
    process = subprocess.Popen(command, **options, stdout=subprocess.DEVNULL)
    wait_until(lambda: list((tmp_path / "out").glob("records/*.json")), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, **options, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("3 of 3 runs done")
    assert content(tmp_path / "out") == content(uncut)
    versions = read_record(tmp_path / "out" / "records" / "dfmcl_beta8_seed0.json").about["versions"]
    assert "torch" in versions
    assert "dfmcl" not in versions, "the environment was not bare"


def test_number_keeps_what_json_cannot_hold_as_text() -> None:
    """A loss that became NaN is still a history."""
    assert [number(text) for text in ("3", "0.5", "nan", "inf", "False")] == [3, 0.5, "nan", "inf", "False"]


def test_plots_are_drawn(uncut: Path, workplace: Path, tmp_path: Path) -> None:
    """Both kinds, from the records, equal byte for byte when drawn again."""
    campaign = load_campaign(str(workplace / "tiny.toml"))
    every = runs(campaign, "x")
    write_tables(campaign, every, read_records(campaign, every, uncut), tmp_path)
    for name in ("accuracy_beta8.svg", "masks_beta8.svg"):
        assert (tmp_path / name).read_bytes() == (uncut / name).read_bytes()
        assert f"![{name}]({name})" in (tmp_path / "table.md").read_text()
