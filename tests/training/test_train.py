"""The loop: resumes bit for bit, stops cleanly, never trains on what it selects by."""

from __future__ import annotations

import csv
import inspect
import json
import os
import signal
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dfmcl.cli.release
import dfmcl.cli.robustness
from dfmcl.common.errors import BadInput, Broken, Interrupted
from dfmcl.common.files import sha256_of
from dfmcl.robustness.data import load_dataset
from dfmcl.robustness.runs import CHECKPOINT, load_run
from dfmcl.training import course
from dfmcl.training import train as loop
from dfmcl.training.augmentation import augment, crop, flip
from dfmcl.training.config import TrainConfig, load_config, preset_names
from dfmcl.training.learner import Learner
from dfmcl.training.limits import Limits
from dfmcl.training.objectives import OBJECTIVES
from dfmcl.training.state import STATE
from dfmcl.training.train import split, train
from tests.processes import wait_until
from tests.training.workshop import StopAfter, quiet

TINY = [
    "model.width=4",
    "data.train_images=180",
    "optimization.epochs=3",
    "heldout.images=20",
    "heldout.attack_steps=2",
]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uncut") / "run"
    train(load_config("quickstart", TINY), out, log=quiet)
    return out


def test_a_run_on_a_folder_says_what_it_did_not_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In training's log, in the manifest, and again where the run is evaluated."""
    digits = load_dataset("digits")
    for part, images, labels in (("train", digits.x_train, digits.y_train), ("test", digits.x_test, digits.y_test)):
        for number in range(40):
            place = tmp_path / "images" / part / str(labels[number] % 2)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number]).save(place / f"{number}.gif")
    (tmp_path / "images" / "train" / "0" / "photo.heic").write_text("not read")
    (tmp_path / "images" / "test" / "1" / ".DS_Store").write_text("not read")
    small = ["model.width=4", "optimization.epochs=1", "optimization.batch_size=8", "data.heldout_images=8"]
    data = ["data.name=folder", f"data.path={tmp_path / 'images'}", "data.image_size=16"]
    log: list[str] = []
    manifest = train(load_config("quickstart_standard", [*small, *data]), tmp_path / "run", log=log.append)
    remark = f"{tmp_path / 'images'}: skipped 2 files: 1 .heic, 1 hidden (supported: "
    assert log[0].startswith(remark)
    assert manifest["data"]["skipped"] == {".heic": 1, "hidden": 1}
    inspect.unwrap(dfmcl.cli.robustness.evaluate)(tmp_path / "run", attack=["fgsm"], images=8)
    assert capfd.readouterr().out.startswith(remark)
    inspect.unwrap(dfmcl.cli.release.export)(tmp_path / "run", tmp_path / "candidate")
    assert capfd.readouterr().out.startswith(remark)


@pytest.mark.parametrize(
    ("place", "classes", "lacking"), [(-1, "abcd", "'d' .* 0 held out"), (0, "abc", "'c' .* 1 held out")]
)
def test_a_class_that_cannot_be_learned_is_refused(tmp_path: Path, place: int, classes: str, lacking: str) -> None:
    """A class that is only named, or whose one image is held out: the network would never see it."""
    config = load_config("quickstart_standard", ["data.name=npz", "data.heldout_images=1", "optimization.batch_size=2"])
    x, y = np.zeros((41, 8, 8, 3), np.uint8), np.arange(41) % 2
    y[np.random.default_rng(config.seed).permutation(41)[place]] = 2  # held out first, or never
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=list(classes))
    with pytest.raises(BadInput, match=f"class {lacking}"):
        split(load_dataset("npz", str(tmp_path / "data.npz")), config)


@pytest.mark.parametrize("stops", [(1,), (3,), (2, 4)], ids=["mid-epoch", "at an epoch's end", "twice"])
def test_resumed_run_equals_the_uncut_one(tmp_path: Path, uncut: Path, stops: tuple[int, ...]) -> None:
    """Cut anywhere and resumed, the checkpoint has the same bytes and the record the same figures."""
    out, config = tmp_path / "run", load_config("quickstart", TINY)
    for number, steps in enumerate(stops):
        with pytest.raises(Interrupted, match=r"repeat the command with --resume"):
            train(config, out, resume=number > 0, limits=Limits(StopAfter(steps)), log=quiet)
        assert not (out / CHECKPOINT).exists()
    train(config, out, resume=True, log=quiet)
    assert sha256_of(out / CHECKPOINT) == sha256_of(uncut / CHECKPOINT)
    assert record_of(out) == record_of(uncut)


def record_of(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, but for the clock's."""
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


EVERYTHING = [
    "objective.name=trades",
    "objective.views=1",
    "objective.view_augmentation=crop-flip",
    "masking.rule=ranked",
    "optimization.precision=bfloat16",
    "optimization.ema=0.9",
    "optimization.awp=0.005",
    "optimization.optimizer=sgd",
    "curriculum.final_steps=3",
]


def test_run_cut_into_three_by_the_clock_equals_the_uncut_one(tmp_path: Path) -> None:
    """With every ingredient on: a deadline stops at a step's boundary, and the pieces make the same bytes."""
    config = load_config("quickstart", [*TINY, *EVERYTHING])
    train(config, tmp_path / "uncut", log=quiet)
    for number in range(2):
        seconds = count()  # each asking takes one
        limits = Limits(deadline=3, clock=partial(next, seconds))
        with pytest.raises(Interrupted, match=rf"stopped and saved at step {3 + 3 * number} of"):
            train(config, tmp_path / "cut", resume=number > 0, limits=limits, log=quiet)
    train(config, tmp_path / "cut", resume=True, log=quiet)
    assert sha256_of(tmp_path / "cut" / CHECKPOINT) == sha256_of(tmp_path / "uncut" / CHECKPOINT)
    assert record_of(tmp_path / "cut") == record_of(tmp_path / "uncut")


def test_compact_state_resumes_closely(tmp_path: Path) -> None:
    """It says that it is one, goes on, and ends near the uncut run: not in the same bytes."""
    config, lines = load_config("quickstart", [*TINY, *EVERYTHING]), list[str]()
    train(config, tmp_path / "uncut", log=quiet)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", limits=Limits(StopAfter(4)), compact=True, log=quiet)
    train(config, tmp_path / "cut", resume=True, log=lines.append)
    assert "from a compact state" in lines[0]
    ours, theirs = (record_of(tmp_path / name)[-1] for name in ("cut", "uncut"))
    assert float(ours["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=0.1)
    assert sha256_of(tmp_path / "cut" / CHECKPOINT) != sha256_of(tmp_path / "uncut" / CHECKPOINT)


def test_killed_run_loses_only_the_steps_since_its_last_state(tmp_path: Path, uncut: Path) -> None:
    """SIGKILL in the middle of a real process, then --resume: the uncut run's bytes."""
    script = "import dfmcl.training.course as t; t.SAVE_SECONDS = 0.0; from dfmcl.cli import main; main()"
    overrides = [part for override in TINY for part in ("--set", override)]
    command = [sys.executable, "-c", script, "train", "quickstart", *overrides, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until((tmp_path / "run" / STATE).exists, process)
    process.kill()
    process.wait()
    train(load_config("quickstart", TINY), tmp_path / "run", resume=True, log=quiet)
    assert sha256_of(tmp_path / "run" / CHECKPOINT) == sha256_of(uncut / CHECKPOINT)


def test_a_cut_run_goes_on_where_its_data_lie_elsewhere(tmp_path: Path, uncut: Path) -> None:
    """The same bytes under another path are the same data; other bytes are refused, also by a finished run."""
    digits = load_dataset("digits")
    parts = {name: getattr(digits, name) for name in ("x_train", "y_train", "x_test", "y_test")}
    for name, pixel in (("here", 0), ("there", 0), ("other", 1)):
        parts["x_train"][0, 0, 0, 0] = pixel
        np.savez(tmp_path / f"{name}.npz", **parts)
    here, there, other = (
        load_config("quickstart", [*TINY, "data.name=npz", f"data.path={tmp_path / name}.npz"])
        for name in ("here", "there", "other")
    )
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(here, out, limits=Limits(StopAfter(4)), log=quiet)
    with pytest.raises(BadInput, match="is of other data"):
        train(other, out, resume=True, log=quiet)
    assert train(there, out, resume=True, log=quiet)["result"]["epochs"] == 3
    assert train(there, out, resume=True, log=quiet)["result"]["epochs"] == 3
    with pytest.raises(BadInput, match="finished run on other data"):
        train(other, out, resume=True, log=quiet)


def test_a_kill_before_the_first_state_begins_anew(tmp_path: Path, uncut: Path) -> None:
    """What a run writes before its first state is no reason to refuse it."""
    (tmp_path / "run" / "state").mkdir(parents=True)
    (tmp_path / "run" / "state" / ".state.pt.77.part").write_bytes(b"half")
    (tmp_path / "run" / "metrics.csv").write_text("epoch\n")
    train(load_config("quickstart", TINY), tmp_path / "run", resume=True, log=quiet)
    assert sha256_of(tmp_path / "run" / CHECKPOINT) == sha256_of(uncut / CHECKPOINT)


def test_weights_that_are_not_finite_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss is looked at before its step; what the last step did is looked at too."""
    apply = Learner.apply

    def diverging(self: Learner, step: int) -> None:
        apply(self, step)
        if step == self.total_steps:
            self.model.get_parameter("net.fc.weight").data[0, 0] = torch.inf

    monkeypatch.setattr(Learner, "apply", diverging)
    with pytest.raises(Broken, match=r"net.fc.weight is not finite after the last step; lower optimization\.lr"):
        train(load_config("quickstart", TINY), tmp_path / "run", log=quiet)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_collapse_is_seen_by_the_loop_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out PGD accuracy of 60 %, then 10 %: N-FGSM from there on, also in a run that is cut and resumed."""
    figures = iter([(0.9, 0.6), (0.9, 0.1), (0.9, 0.2)])
    monkeypatch.setattr(loop, "measure", lambda *arguments: next(figures))
    config = load_config("quickstart", [*TINY, "curriculum.attacks=['fgsm']", "curriculum.fgsm_fallback=0.2"])
    lines: list[str] = []
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", limits=Limits(StopAfter(7)), log=lines.append)
    assert "epoch 2: PGD accuracy has collapsed (catastrophic overfitting); N-FGSM takes FGSM's share" in lines
    train(config, tmp_path / "run", resume=True, log=quiet)
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [dict(zip(rows[0].split(","), row.split(","), strict=True))["fell_back"] for row in rows[1:]] == [
        "False", "False", "True",
    ]  # fmt: skip


def test_another_seed_gives_another_model(tmp_path: Path, uncut: Path) -> None:
    """The equality above is not that of a constant."""
    train(load_config("quickstart", [*TINY, "seed=5"]), tmp_path / "run", log=quiet)
    assert sha256_of(tmp_path / "run" / CHECKPOINT) != sha256_of(uncut / CHECKPOINT)


def test_a_finished_run_is_read_not_repeated(uncut: Path) -> None:
    """--resume on a finished run changes nothing."""
    before = sha256_of(uncut / CHECKPOINT), (uncut / "manifest.json").stat().st_mtime_ns
    train(load_config("quickstart", TINY), uncut, resume=True, log=quiet)
    assert (sha256_of(uncut / CHECKPOINT), (uncut / "manifest.json").stat().st_mtime_ns) == before


def test_a_finished_run_of_another_config_is_not_ours(uncut: Path) -> None:
    """--resume never passes off one config's run as another's."""
    with pytest.raises(BadInput, match="finished run of another config"):
        train(load_config("quickstart", [*TINY, "optimization.epochs=9"]), uncut, resume=True, log=quiet)


def test_a_foreign_directory_is_not_resumed(tmp_path: Path) -> None:
    """--resume needs a state; a directory with other files in it is left alone."""
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="holds no state"):
        train(load_config("quickstart", TINY), tmp_path, resume=True, log=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_broken_state_is_named(tmp_path: Path) -> None:
    """A state that is none is bad input, not a traceback of the unpickler."""
    (tmp_path / "state").mkdir()
    (tmp_path / STATE).write_bytes(b"not a state")
    with pytest.raises(BadInput, match="not a state"):
        train(load_config("quickstart", TINY), tmp_path, resume=True, log=quiet)


def test_a_kill_between_epoch_and_measurement_loses_no_line(
    tmp_path: Path, uncut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving at every step and dying in the measurement after epoch 1, the resumed record is the uncut one."""
    config = load_config("quickstart", TINY)
    monkeypatch.setattr(course, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as context:
        context.setattr(loop, "measure", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "run", log=quiet)
    train(config, tmp_path / "run", resume=True, log=quiet)
    assert record_of(tmp_path / "run") == record_of(uncut)
    assert sha256_of(tmp_path / "run" / CHECKPOINT) == sha256_of(uncut / CHECKPOINT)


def test_a_foreign_state_is_refused(tmp_path: Path) -> None:
    """A state written under another config is never continued."""
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(load_config("quickstart", TINY), out, limits=Limits(StopAfter(2)), log=quiet)
    with pytest.raises(BadInput, match="another config's"):
        train(load_config("quickstart", [*TINY, "optimization.lr=0.1"]), out, resume=True, log=quiet)


def test_an_existing_directory_is_not_overwritten(uncut: Path) -> None:
    """Without --resume a directory with anything in it is left alone."""
    with pytest.raises(BadInput, match="not empty"):
        train(load_config("quickstart", TINY), uncut, log=quiet)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_first(tmp_path: Path, number: signal.Signals) -> None:
    """A real process that gets a signal ends with 130, one line, and a state that resumes."""
    out = tmp_path / "run"
    command = [str(Path(sys.executable).with_name("dfmcl")), "train", "quickstart", "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--set", "model.width=4", "--set", "data.train_images=180", "--set", "optimization.epochs=2000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_until((out / STATE).exists, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith(f"dfmcl: {out}: stopped and saved at step ")
    state = torch.load(out / STATE, weights_only=True)
    assert state["step"] > 0
    assert not list(out.glob("**/*.part"))


@pytest.mark.parametrize("presses", [2, 5])
def test_a_second_signal_ends_at_once_and_says_what_is_saved(tmp_path: Path, presses: int) -> None:
    """Ctrl-C in the middle of a long step, again and again: the first line says what happens, the last one which state
    is on disk, and that state goes on."""
    out, slow = tmp_path / "run", [*TINY, "optimization.epochs=100", "curriculum.attacks=['pgd']"]
    # One step an epoch: the state is there after the first step, and a signal meets the second one near its beginning.
    slow += ["model.width=16", "curriculum.steps=250", "heldout.images=2", "curriculum.schedule=constant"]
    slow += ["data.train_images=60"]
    program = str(Path(sys.executable).with_name("dfmcl"))
    command = [program, "train", "quickstart", "--out", str(out), "--max-minutes", "9"]
    process = subprocess.Popen(
        [*command, *(word for change in slow for word in ("--set", change))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_until((out / STATE).exists, process)
    saved = torch.load(out / STATE, weights_only=True)["step"]
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert next(line for line in lines if line.startswith("dfmcl: ")).startswith("dfmcl: stopping at the next step")
    for _ in range(presses - 1):
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    said = f"ended at once; its state of step {saved} is saved; repeat the command with --resume"
    assert errors == f"dfmcl: {out}: {said}\n"
    assert not list(out.rglob(".*"))
    with pytest.raises(Interrupted, match=rf"stopped and saved at step {saved} of"):
        train(load_config("quickstart", slow), out, resume=True, limits=Limits(StopAfter(0)), log=quiet)


def test_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which batch; the weights are those of the last good step; nothing pretends to be finished."""
    real, calls = OBJECTIVES["ce"], []

    def poisoned(*logits: Any) -> torch.Tensor:
        calls.append(1)
        return real(*logits) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setitem(OBJECTIVES, "ce", poisoned)
    config = load_config("quickstart", [*TINY, "masking.enabled=false", "curriculum.attacks=[]"])
    with pytest.raises(Broken, match=r"loss is nan at epoch 2, step 5, before the optimizer's step"):
        train(config, tmp_path / "run", log=quiet)
    assert torch.load(tmp_path / "run" / STATE, weights_only=True)["step"] == 3
    assert not (tmp_path / "run" / CHECKPOINT).exists()


def test_exploding_training_is_noticed(tmp_path: Path) -> None:
    """A real divergence, by an absurd learning rate, ends the same way."""
    with pytest.raises(Broken, match=r"loss is (nan|inf).*lower optimization\.lr"):
        train(load_config("quickstart", [*TINY, "optimization.lr=1e30"]), tmp_path / "run", log=quiet)


def test_a_half_written_state_is_never_picked_up(tmp_path: Path) -> None:
    """What a killed writer left behind is ignored; the last whole state counts."""
    out, config = tmp_path / "run", load_config("quickstart", TINY)
    with pytest.raises(Interrupted):
        train(config, out, limits=Limits(StopAfter(2)), log=quiet)
    (out / "state" / ".state.pt.123.part").write_bytes(b"half")
    assert train(config, out, resume=True, log=quiet)["result"]["epochs"] == 3


def test_heldout_images_are_never_trained_on() -> None:
    """Split indices are disjoint, of the asked sizes, and depend on the seed only."""
    data = load_dataset("digits")
    config = load_config("quickstart", ["data.train_images=500"])
    fit, heldout = split(data, config)
    assert len(set(fit) & set(heldout)) == 0
    assert (len(fit), len(heldout)) == (500, 147)
    assert all(np.array_equal(a, b) for a, b in zip(split(data, config), (fit, heldout), strict=True))
    assert not np.array_equal(split(data, load_config("quickstart", ["seed=1"]))[1], heldout)


def test_too_few_images_is_bad_input(tmp_path: Path) -> None:
    """More images than there are: one line that names the keys."""
    with pytest.raises(BadInput, match=r"digits has 1347 training images; data\.heldout_images 147"):
        train(load_config("quickstart", ["data.train_images=5000"]), tmp_path / "run", log=quiet)
    with pytest.raises(BadInput, match=r"at least 60 to train on .* 50 are left"):
        train(load_config("quickstart", ["data.train_images=50", "optimization.batch_size=60"]), tmp_path / "run")
    with pytest.raises(BadInput, match=r"model.arch: 'torchvision:resnet999' is unknown"):
        train(load_config("quickstart", ["model.arch=torchvision:resnet999"]), tmp_path / "run", log=quiet)
    assert not (tmp_path / "run").exists()


def test_manifest_tells_how_the_model_was_made(uncut: Path) -> None:
    """Config, seed, data digest, versions, threads and the final figures are there, and load_run reads it."""
    manifest = json.loads((uncut / "manifest.json").read_text())
    assert manifest["config"] == json.loads(json.dumps(load_config("quickstart", TINY).model_dump()))
    assert manifest["data"]["sha256"] == load_dataset("digits").sha256
    assert manifest["hardware"]["threads"] == torch.get_num_threads()
    assert {"torch", "python"} <= set(manifest["versions"])
    assert {"alpha", "p_mean", "p_std", "heldout_clean", "heldout_pgd", "eps"} <= set(manifest["result"])
    assert load_run(uncut).model.training is False
    assert list((uncut / "tensorboard").glob("events.*.epoch0003"))


def test_epochs_that_are_not_measured_train_alike(tmp_path: Path, uncut: Path) -> None:
    """With `heldout.every = 2` the first of three epochs has no accuracies, the last has; the weights are the same."""
    train(load_config("quickstart", [*TINY, "heldout.every=2"]), tmp_path / "run", log=quiet)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        measured = [row["heldout_pgd"] != "nan" for row in csv.DictReader(file)]
    assert measured == [False, True, True]
    assert sha256_of(tmp_path / "run" / CHECKPOINT) == sha256_of(uncut / CHECKPOINT)


def test_saving_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs that are over before a save has paid are not saved; the first and the last are."""
    saved: list[int] = []
    monkeypatch.setattr(course, "write_state", lambda out, config, state, compact: saved.append(state["step"]))
    monkeypatch.setattr(course, "SAVE_SHARE", 1e-12)
    train(load_config("quickstart", TINY), tmp_path / "run", log=quiet)
    assert saved == [3, 9]


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("quickstart")])
def test_presets_train(tmp_path: Path, name: str) -> None:
    """Each preset that needs no download takes its first steps."""
    manifest = train(load_config(name, [*TINY, "optimization.epochs=1"]), tmp_path / "run", log=quiet)
    assert manifest["result"]["epochs"] == 1


@pytest.mark.parametrize("name", [name for name in preset_names() if not name.startswith(("quickstart", "finetune"))])
def test_cifar_presets_train_on_stand_in_data(tmp_path: Path, name: str) -> None:
    """The CIFAR-10 presets take two steps on an .npz of the right shape, narrowed to be quick."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "x_train": rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8), "y_train": np.arange(60) % 10,
        "x_test": rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8), "y_test": np.arange(10),
    }  # fmt: skip
    np.savez(tmp_path / "cifar10.npz", **arrays)
    small = ["model.width=4", "optimization.epochs=1", "optimization.batch_size=16", "data.train_images=32"]
    small += ["data.heldout_images=20", "heldout.images=4", "heldout.attack_steps=1", "curriculum.steps=2"]
    config = load_config(name, [*small, f"data.path={tmp_path / 'cifar10.npz'}"])
    assert train(config, tmp_path / "run", log=quiet)["result"]["step"] == 2


def test_crop_moves_by_at_most_the_padding_and_flip_mirrors() -> None:
    """Every augmented image is the original, shifted within the padding, zeros coming in; or its mirror image."""
    images = torch.arange(1, 1 + 4 * 8 * 8 * 3).reshape(4, 8, 8, 3).to(torch.uint8).clamp(min=1)
    padded = torch.nn.functional.pad(images, (0, 0, 2, 2, 2, 2))
    moved = crop(images, torch.Generator().manual_seed(0), padding=2)
    windows = [padded[:, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    for n in range(4):
        assert any(torch.equal(moved[n], window[n]) for window in windows)
    flipped = flip(images, torch.Generator().manual_seed(0))
    kinds = [torch.equal(flipped[n], images[n]) for n in range(4)]
    assert all(same or torch.equal(flipped[n], images[n].flip(1)) for n, same in enumerate(kinds))
    assert 0 < sum(kinds) < 4
    assert augment(images, torch.Generator(), "none") is images


def test_config_is_all_there_is() -> None:
    """An empty file is the paper's method on CIFAR-10."""
    assert TrainConfig().curriculum.attacks == ["fgsm", "pgd", "cw"]
