"""The loop: from images to a hardened checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import nn

from robustness.attacks import Attack
from robustness.data import Bytes, Dataset, Labels, load_dataset
from robustness.errors import BadInput, Broken, DfmclError
from robustness.evaluate import evaluate
from robustness.losses import cross_entropy
from robustness.models import Classifier, ModelSpec, frozen, to_float
from robustness.progress import Track, silent
from robustness.runs import MANIFEST, load_run
from robustness.seeds import generator
from robustness.threat import Threat, parse_eps
from training.augmentation import augment
from training.config import TrainConfig
from training.curriculum import draw, strength, training_attack
from training.masking import DynamicFeatureMask, MaskStatistics, find_layer
from training.state import STATE, Epoch, read_state, write_history, write_run, write_state

SAVE_SECONDS = 60.0  # what a kill can cost at most, besides the step that it hit


class Interrupted(DfmclError):
    """The run was asked to stop and has saved its state."""

    exit_code = 130


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    stop: Event | None = None,
    track: Track = silent,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train as the config says and write `out`: checkpoint, manifest, metrics.csv, tensorboard/ and state/.

    `stop`, once set, ends the run at the next step's boundary with its state saved (Interrupted); `resume` continues
    from there, on a CPU with the same number of threads bit for bit as if nothing had happened. Returns the manifest.
    """
    stop = stop or Event()
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: is a file; name a directory")
    if out.exists() and any(out.iterdir()):
        if not resume:
            raise BadInput(f"{out}: exists and is not empty; use --resume to continue it, or another directory")
        if (out / MANIFEST).exists():
            return finished(out, config)
        if not (out / STATE).exists():
            raise BadInput(f"{out}: holds no state of a run; name another directory, or the run's own")
    data = load_dataset(config.data.name, config.data.path, config.data.image_size, track)
    fit, heldout = split(data, config)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Broken(f"{out}: cannot be written: {error.strerror}") from None

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = torch.from_numpy(data.x_train[fit]).to(device), torch.from_numpy(data.y_train[fit]).to(device)
    model = build(config, data).to(device).to(memory_format=torch.channels_last)
    mask = DynamicFeatureMask(**config.masking.model_dump(exclude={"enabled"})).to(device)
    if config.masking.enabled:
        find_layer(model, config.masking.layer)
    optimizer = build_optimizer(config, model, mask)
    beta = parse_eps(config.curriculum.beta)
    steps_an_epoch = len(images) // config.optimization.batch_size
    total_steps = steps_an_epoch * config.optimization.epochs
    parts: dict[str, Any] = {"model": model, "mask": mask, "optimizer": optimizer}
    done, history, sums = 0, [], {"loss": 0.0, "seconds": 0.0}

    state = read_state(out, config) if resume else None
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done, sums = state["step"], state["sums"]
        history = [Epoch(**row) for row in state["history"]]
        if state["threads"] != torch.get_num_threads():
            log(f"resuming with {torch.get_num_threads()} threads, saved with {state['threads']}: not bit for bit")
        log(f"resuming at step {done} of {total_steps}")

    def save() -> None:
        rows = {"sums": sums, "history": [asdict(epoch) for epoch in history]}
        write_state(out, config, done, {**{name: part.state_dict() for name, part in parts.items()}, **rows})

    saved = time.monotonic()
    statistics = MaskStatistics(0.0, 0.0, 0.0, 0.0)
    for epoch in range(done // steps_an_epoch + 1, config.optimization.epochs + 1):
        first = (epoch - 1) * steps_an_epoch
        order = torch.randperm(len(images), generator=generator(config.seed, "order", epoch)).to(device)
        label = f"epoch {epoch}/{config.optimization.epochs}"
        for step in track(range(done + 1, first + steps_an_epoch + 1), label, first + steps_an_epoch - done):
            if stop.is_set():
                save()
                raise Interrupted(
                    f"{out}: stopped and saved at step {done} of {total_steps}; repeat the command with --resume"
                )
            begun = time.perf_counter()
            batch = order[(step - first - 1) * config.optimization.batch_size :][: config.optimization.batch_size]
            noise = generator(config.seed, "step", step, device=device)
            x, y = to_float(augment(images[batch], noise, config.data.augmentation)), labels[batch]
            eps = strength(step, total_steps, beta, config.curriculum.schedule)
            if config.curriculum.attacks:
                attack = draw(config.curriculum.attacks, config.seed, step)
                with frozen(model):
                    run_attack = training_attack(attack, config.curriculum.steps)
                    x = run_attack(model, x, y, Threat("linf", eps), generator=noise)
            model.train()
            if config.masking.enabled:
                logits, statistics = mask(model, x, y, cross_entropy, noise)
            else:
                logits = model(x)
            loss = cross_entropy(logits, y).mean()
            if not math.isfinite(loss.item()):
                raise Broken(
                    f"{out}: loss is {loss.item()} at epoch {epoch}, batch {step - first} (step {step}), before the"
                    f" optimizer step; lower optimization.lr ({config.optimization.lr}) or look at the data"
                )
            set_lr(optimizer, config, step, total_steps)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done = step
            sums = {"loss": sums["loss"] + loss.item(), "seconds": sums["seconds"] + time.perf_counter() - begun}
            # Not on an epoch's last step: its line is written, and saved with it, only after the measurement below.
            if time.monotonic() - saved > SAVE_SECONDS and step < first + steps_an_epoch:
                save()
                saved = time.monotonic()
        clean, robust = measure(model, data, heldout, config, beta)
        speed = steps_an_epoch * config.optimization.batch_size / max(sums["seconds"], 1e-9)
        history.append(
            Epoch(
                epoch=epoch,
                step=done,
                train_loss=sums["loss"] / steps_an_epoch,
                heldout_clean=clean,
                heldout_pgd=robust,
                eps=eps if config.curriculum.attacks else 0.0,
                alpha=mask.alpha.item(),
                p_mean=statistics.mean,
                p_std=statistics.std,
                p_low=statistics.low,
                p_high=statistics.high,
                images_per_second=speed,
            )
        )
        log(history[-1].line(config.optimization.epochs))
        sums = {"loss": 0.0, "seconds": 0.0}
        write_history(out, history)
        write_tensorboard(out, history[-1])
        save()
        saved = time.monotonic()
    manifest = {
        "train_images": len(fit),
        "heldout_images": len(heldout),
        "epochs": len(history),
        **asdict(history[-1]),
    }
    return write_run(out, config, model, data.classes, data.describe(), manifest)


def finished(out: Path, config: TrainConfig) -> dict[str, Any]:
    """The manifest of a run that is complete, if it was this config's."""
    manifest = load_run(out).manifest
    if manifest.get("config_sha256") != config.digest:
        raise BadInput(f"{out}: is a finished run of another config; train into another directory")
    return manifest


def split(data: Dataset, config: TrainConfig) -> tuple[Labels, Labels]:
    """Indices into the training part: those to fit, and the held-out ones that only selection may look at."""
    order = np.random.default_rng(config.seed).permutation(len(data.x_train))
    heldout, rest = order[: config.data.heldout_images], order[config.data.heldout_images :]
    fit = rest[: config.data.train_images] if config.data.train_images else rest
    needed = config.data.train_images or config.optimization.batch_size
    if len(fit) < needed or len(heldout) < config.data.heldout_images:
        raise BadInput(
            f"data: {config.data.name} has {len(order)} training images; data.heldout_images"
            f" {config.data.heldout_images} and at least {needed} to train on (data.train_images or"
            " optimization.batch_size) are more than that; lower them"
        )
    return fit, heldout


def build(config: TrainConfig, data: Dataset) -> Classifier:
    """A fresh network for this data, its weights drawn from the config's seed."""
    pixels = data.x_train.reshape(-1, data.input_shape[2])
    mean, std = pixels.mean(axis=0) / 255, pixels.std(axis=0) / 255
    spec = ModelSpec(
        arch=config.model.arch,
        width=config.model.width,
        classes=len(data.classes),
        input_shape=data.input_shape,
        mean=tuple(round(float(v), 4) for v in mean),
        std=tuple(round(max(float(v), 1e-3), 4) for v in std),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Classifier(spec)


def build_optimizer(config: TrainConfig, model: nn.Module, mask: nn.Module) -> torch.optim.Optimizer:
    """Adam or SGD with Nesterov momentum; alpha is exempt from weight decay, which would pull it towards no masking."""
    chosen = config.optimization
    groups: list[dict[str, Any]] = [
        {"params": list(model.parameters()), "weight_decay": chosen.weight_decay},
        {"params": list(mask.parameters()), "weight_decay": 0.0},
    ]
    if chosen.optimizer == "adam":
        return torch.optim.Adam(groups, lr=chosen.lr)
    return torch.optim.SGD(groups, lr=chosen.lr, momentum=chosen.momentum, nesterov=chosen.momentum > 0)


def set_lr(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, total_steps: int) -> None:
    """The learning rate of step 1..T: constant, or a half cosine that starts at lr and nears zero at the last step."""
    lr = config.optimization.lr
    if config.optimization.lr_schedule == "cosine":
        lr *= 0.5 * (1 + math.cos(math.pi * (step - 1) / total_steps))
    for group in optimizer.param_groups:
        group["lr"] = lr


def measure(model: Classifier, data: Dataset, heldout: Labels, config: TrainConfig, beta: float) -> tuple[float, float]:
    """Clean and PGD accuracy at beta on the first held-out images, in eval mode."""
    chosen = heldout[: config.heldout.images]
    images: Bytes = data.x_train[chosen]
    outcome = evaluate(
        model,
        images,
        data.y_train[chosen],
        Threat("linf", beta),
        [Attack.parse(f"pgd-{config.heldout.attack_steps}")],
        seed=config.seed,
        batch_size=256,
    )
    return outcome.evaluation.clean.value, outcome.evaluation.robust.value


def write_tensorboard(out: Path, epoch: Epoch) -> None:
    """One event file an epoch, so that a resumed run never writes an epoch twice."""
    from torch.utils.tensorboard import SummaryWriter

    directory = out / "tensorboard"
    for stale in directory.glob(f"*.epoch{epoch.epoch:04d}"):
        stale.unlink()
    writer = SummaryWriter(str(directory), filename_suffix=f".epoch{epoch.epoch:04d}")
    for name, value in asdict(epoch).items():
        if name not in ("epoch", "step"):
            writer.add_scalar(name, value, epoch.epoch)
    writer.close()
