"""The loop: from images to a hardened checkpoint. `torchrun -m dfmcl.training.train` runs it on several devices."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfmcl.common.errors import BadInput, unwritable
from dfmcl.common.files import clear_parts
from dfmcl.common.locks import LOCK, held
from dfmcl.common.progress import Track, silent
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.data import Bytes, Dataset, Labels, in_memory, open_dataset
from dfmcl.robustness.digests import Kept
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.models import Classifier, ModelSpec
from dfmcl.robustness.ranks import Ranks
from dfmcl.robustness.runs import CHECKPOINT, MANIFEST, load_run
from dfmcl.robustness.scale import Scale
from dfmcl.robustness.threats.linf import Linf
from dfmcl.training.config import TrainConfig
from dfmcl.training.course import ELSEWHERE, Course
from dfmcl.training.feed import fits
from dfmcl.training.learner import Learner
from dfmcl.training.limits import EndedAtOnce, Limits
from dfmcl.training.pretrained import read_pretrained, scale_of
from dfmcl.training.state import HISTORY, STATE, Epoch, read_state, saved_step, write_history, write_run

SEEN = 1024  # images whose mean and deviation are those of all within 0.01, where an image's own mean varies by 0.2


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    limits: Limits | None = None,
    compact: bool = False,
    kept: Kept | None = None,
    track: Track = silent,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train as the config says and write `out`: checkpoint, manifest, metrics.csv, tensorboard/ and state/.

    Where the limits end, the run ends at the next step's boundary, its state saved (Interrupted); `resume` continues
    from there, on a CPU with the same number of threads bit for bit as if nothing had happened. compact: a state under
    60 MB for full width, to be carried to another machine; it resumes closely, not bit for bit. kept: digests of the
    images' files from earlier runs. Under torchrun each
    process takes its part of every batch. Returns the manifest. BadInput where another process trains into `out`;
    EndedAtOnce for a KeyboardInterrupt, which leaves the last saved state.
    """
    ranks, limits = Ranks.join(), limits or Limits()
    try:
        with only_writer(out, ranks):
            return _train(config, out, ranks, resume, limits, compact, kept, track, log)
    except (KeyboardInterrupt, RuntimeError) as error:
        # torch's, for an exchange with a process that the second signal reached first.
        if isinstance(error, RuntimeError) and not (ranks.world > 1 and limits.over):
            raise
        if not ranks.first:
            raise EndedAtOnce(f"{out}: {ELSEWHERE}") from None
        step = saved_step(out)
        left = "no state was saved yet" if step is None else f"its state of step {step} is saved"
        raise EndedAtOnce(f"{out}: ended at once; {left}; repeat the command with --resume") from None
    finally:
        ranks.leave()


@contextmanager
def only_writer(out: Path, ranks: Ranks) -> Iterator[None]:
    """Keep other trainings out of `out`, and remove what killed ones left half written there."""
    with ExitStack() as stack:

        def claim() -> None:
            if out.exists() and not out.is_dir():
                raise BadInput(f"{out}: is a file; name a directory")
            stack.enter_context(held(out / LOCK, out))
            clear_parts(out, {CHECKPOINT, MANIFEST, HISTORY})
            clear_parts(out / STATE.parent, {STATE.name})

        ranks.first_does(claim)
        yield


def _train(
    config: TrainConfig,
    out: Path,
    ranks: Ranks,
    resume: bool,
    limits: Limits,
    compact: bool,
    kept: Kept | None,
    track: Track,
    log: Callable[[str], None],
) -> dict[str, Any]:
    require_room(out, resume)
    if not ranks.first:
        log, track = (lambda line: None), silent
    data = open_dataset(*config.data.named, track, preprocessing=config.data.preprocessing, kept=kept)
    if not len(data.x_train):
        raise BadInput(
            f"data {data.path}: has test images only; training needs {Path(data.path) / 'train'}/CLASS/*.png"
        )
    if (out / MANIFEST).exists():
        return finished(out, config, data)
    fit, heldout = split(data, config)
    if data.remark:
        log(data.remark)
    if fits(config, data):
        data = in_memory(data, track)
    network, begun = begin(config, data, log)
    with closing(Course(config, out, data, fit, network, ranks, limits, compact, begun)) as course:
        _follow(course, data, heldout, resume, track, log)
    if not ranks.first:
        return {}
    last = course.history[-1]
    result = {"train_images": len(fit), "heldout_images": len(heldout), "epochs": len(course.history), **asdict(last)}
    return write_run(out, config, course.learner.result, data.classes, data.describe(), result, begun)


def _follow(
    course: Course, data: Dataset, heldout: Labels, resume: bool, track: Track, log: Callable[[str], None]
) -> None:
    """All epochs that are not done yet, each measured, written down and saved."""
    config, out, ranks = course.config, course.out, course.ranks
    ranks.agree(False)  # nobody creates the directory before all have looked at it
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from None
    state = read_state(out, config, data.sha256) if resume else None
    if state is not None:
        course.go_on(state, log)
    if ranks.agree(course.done != ranks.told([course.done])[0]):
        raise BadInput(f"{out}: the processes found different states there; use a directory that all nodes share")
    epochs = config.optimization.epochs
    for epoch in range(course.done // course.steps + 1, epochs + 1):
        course.run(epoch, track)
        measured = epoch % config.heldout.every == 0 or epoch == epochs
        nothing = (math.nan, math.nan)
        found = measure(course.learner, data, heldout, config) if ranks.first and measured else nothing
        clean, robust = ranks.told(found)
        course.conclude(epoch, clean, robust, log)
        if ranks.first:
            write_history(out, course.history)
            write_tensorboard(out, course.history[-1], course.learner.p)
        if epoch == epochs or course.due:
            course.save()


def require_room(out: Path, resume: bool) -> None:
    """BadInput where `out` holds something, and no run that may be resumed."""
    found = {path.name for path in out.iterdir()} - {LOCK} if out.exists() else set()
    if not found:
        return
    if not resume:
        raise BadInput(f"{out}: exists and is not empty; use --resume to continue it, or another directory")
    # A kill before the first state leaves what a run writes and nothing to resume from: it begins anew.
    known = (out / MANIFEST).exists() or (out / STATE).exists()
    if not known and not found <= {STATE.parent.name, HISTORY, "tensorboard"}:
        raise BadInput(f"{out}: holds no state of a run; name another directory, or the run's own")


def finished(out: Path, config: TrainConfig, data: Dataset) -> dict[str, Any]:
    """The manifest of a run that is complete, if it was this config's, on these data."""
    manifest = load_run(out, code=config.model.code).manifest
    if manifest.get("config_sha256") != config.digest:
        raise BadInput(f"{out}: is a finished run of another config; train into another directory")
    if manifest["data"]["sha256"] != data.sha256:
        raise BadInput(f"{out}: is a finished run on other data; train into another directory, or name its data.path")
    return manifest


def split(data: Dataset, config: TrainConfig) -> tuple[Labels, Labels]:
    """Indices into the training part: those to fit, and the held-out ones that only selection may look at."""
    order = np.random.default_rng(config.seed).permutation(len(data.x_train))
    heldout, rest = order[: config.data.heldout_images], order[config.data.heldout_images :]
    fit = rest[: config.data.train_images] if config.data.train_images else rest
    needed = max(config.data.train_images, config.optimization.batch_size)
    if len(fit) < needed or len(heldout) < config.data.heldout_images:
        raise BadInput(
            f"data: {config.data.name} has {len(order)} training images; data.heldout_images"
            f" {config.data.heldout_images} and at least {needed} to train on (the larger of data.train_images and"
            f" optimization.batch_size) do not fit: {len(fit)} are left to train on; change one of them"
        )
    require_every_class(data, data.y_train[rest])
    return fit, heldout


def require_every_class(data: Dataset, labels: Labels) -> None:
    """BadInput where a class has no image to train on."""
    counts, all_counts = (np.bincount(part, minlength=len(data.classes)) for part in (labels, data.y_train))
    lacking = np.flatnonzero(counts == 0)
    if len(lacking):
        first = int(lacking[0])
        raise BadInput(
            f"data {data.name} ({data.path}): class {data.classes[first]!r} has no image to train on,"
            f" {all_counts[first]} held out; {len(lacking)} of {len(counts)} classes lack some: add images, hold fewer"
            " out (data.heldout_images), or leave the class out"
        )


def begin(config: TrainConfig, data: Dataset, log: Callable[[str], None]) -> tuple[Classifier, dict[str, Any] | None]:
    """The network at a run's first step, and the manifest's entry of the pretrained weights that it begins with."""
    if not config.model.weights:
        # Code gets what a gate of `module:callable` gives it: pixels from 0 to 1, which it may bring to a scale itself.
        told = config.model.scale or ("plain" if config.model.code else "")
        return build(config, data, scale_of(told, None)), None
    pretrained = read_pretrained(config.model.weights)
    scale = scale_of(config.model.scale, pretrained)
    network = build(config, data, scale)
    entry = pretrained.lay_into(network.net)
    head = f"; {', '.join(entry['fresh'])} begin anew" if entry["fresh"] else ""
    log(f"begins with {pretrained.source}, which expects {scale or 'plain'}{head}")
    return network, entry


def build(config: TrainConfig, data: Dataset, scale: Scale | None = None) -> Classifier:
    """A fresh network for this data, its weights drawn from the config's seed. scale: None: the data's."""
    mean, std = statistics(data) if scale is None else in_pixels(scale, data.input_shape[2])
    spec = ModelSpec(
        arch=config.model.arch,
        width=config.model.width,
        classes=len(data.classes),
        input_shape=data.input_shape,
        mean=mean,
        std=std,
        activation=config.model.activation,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            return Classifier(spec, code=config.model.code)
        except BadInput as error:
            raise BadInput(f"model.arch: {error}") from None


def statistics(data: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel of the training images, in pixels from 0 to 1.

    Where they are read on demand, of SEEN images from all over the training part.
    """
    images = data.x_train
    if not isinstance(images, np.ndarray):
        images = images[np.linspace(0, len(images) - 1, min(len(images), SEEN)).round().astype(np.int64)]
    # From histograms: as floats, the images of CIFAR-10 take more than a gigabyte.
    channels = np.moveaxis(images, 3, 0)
    counts = np.stack([np.bincount(channel.reshape(-1), minlength=256) for channel in channels])
    share, levels = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = share @ levels
    std = np.sqrt((share * (levels - mean[:, None]) ** 2).sum(axis=1))
    return tuple(round(float(v), 4) for v in mean), tuple(round(max(float(v), 1e-3), 4) for v in std)


def in_pixels(scale: Scale, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A scale's mean and deviation for pixels from 0 to 1, one a channel."""
    scale.require_channels(channels)
    mean, std = (values * channels if len(values) == 1 else values for values in (scale.mean, scale.std))
    return tuple(value / scale.top for value in mean), tuple(value / scale.top for value in std)


def measure(learner: Learner, data: Dataset, heldout: Labels, config: TrainConfig) -> tuple[float, float]:
    """Clean and PGD accuracy at beta on the first held-out images, in eval mode and float32."""
    chosen = heldout[: config.heldout.images]
    images: Bytes = data.x_train[chosen]
    outcome = evaluate(
        learner.result,
        images,
        data.y_train[chosen],
        Linf(learner.beta),
        [Attack.parse(f"pgd-{config.heldout.attack_steps}")],
        seed=config.seed,
        batch_size=256,
    )
    return outcome.evaluation.clean.value, outcome.evaluation.robust.value


def write_tensorboard(out: Path, epoch: Epoch, p: torch.Tensor | None) -> None:
    """One event file an epoch, so that a resumed run never writes an epoch twice."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:  # metrics.csv has it all; a bare machine need not have tensorboard
        return
    directory = out / "tensorboard"
    for stale in directory.glob(f"*.epoch{epoch.epoch:04d}"):
        stale.unlink()
    writer = SummaryWriter(str(directory), filename_suffix=f".epoch{epoch.epoch:04d}")
    for name, value in asdict(epoch).items():
        if name not in ("epoch", "step") and not isinstance(value, str) and not math.isnan(value):
            writer.add_scalar(name, value, epoch.epoch)
    if p is not None:
        writer.add_histogram("p", p.float().cpu(), epoch.epoch)
    writer.close()


if __name__ == "__main__":  # `torchrun -m dfmcl.training.train CONFIG --out RUN`, also where nothing is installed
    import runpy

    sys.argv.insert(1, "train")
    runpy.run_module("dfmcl", run_name="__main__")
