"""A training on its way: its learner, how far it has come, and the states that it saves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dfmcl.common.errors import BadInput, Broken, Interrupted
from dfmcl.common.progress import Track
from dfmcl.robustness.data import Dataset, Labels
from dfmcl.robustness.models import Classifier
from dfmcl.robustness.ranks import Ranks
from dfmcl.training.config import TrainConfig
from dfmcl.training.feed import Batch, feed_of, told
from dfmcl.training.learner import Learner
from dfmcl.training.limits import Limits
from dfmcl.training.masking import MaskStatistics
from dfmcl.training.state import Epoch, write_state

ELSEWHERE = "stopped; the first process says which state is saved"
SAVE_SECONDS = 60.0  # what a kill can cost at most, besides the step that it hit
SAVE_SHARE = 1 / 30  # of the time goes to saving at most: not every epoch of a GPU is saved
CHECK_STEPS = {"cpu": 1, "cuda": 20}  # asking a GPU for the loss, or other GPUs for a vote, means waiting for it


class Course:
    """Steps and epochs of one run.

    history: its epochs so far; done: its steps so far, of `total_steps`; loss, seconds: since the last epoch.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        data: Dataset,
        fit: Labels,
        network: Classifier,
        ranks: Ranks,
        limits: Limits,
        compact: bool,
        begun: Mapping[str, Any] | None = None,
    ) -> None:
        """A run at its first step.

        config, data: of the run; out: where its states go.
        fit: indices of the training images that it learns from.
        network: at its first step.
        ranks: the processes that share each batch.
        limits: when it must end.
        compact: whether its states are small, and resume closely only.
        begun: of the pretrained weights in the network, the manifest's entry.
        """
        self.config, self.out, self.data_sha256, self.ranks, self.limits = config, out, data.sha256, ranks, limits
        self.begun = begun
        self.compact, self.every = compact, CHECK_STEPS[ranks.device.type]
        self.feed = feed_of(config, data, fit, ranks)
        self.steps = self.feed.order.steps  # of an epoch
        self.total_steps = self.steps * config.optimization.epochs
        self.learner = Learner(config, network, self.total_steps, ranks)
        self.history: list[Epoch] = []
        self.done, self.seconds = 0, 0.0
        self.loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self._saved, self._cost = time.monotonic(), 0.0  # when, and its seconds
        self._batches: Generator[Batch] | None = None

    def go_on(self, state: Mapping[str, Any], log: Callable[[str], None]) -> None:
        """From a saved state. BadInput where it began with other weights."""
        if state["weights"] != self.begun:
            raise BadInput(
                f"{self.out}: began with other weights than {self.config.model.weights} holds now; name those"
            )
        self.learner.load_state_dict(state["learner"])
        self.done, self.seconds = state["step"], state["seconds"]
        self.loss.fill_(state["loss"])
        self.history = [Epoch(**row) for row in state["history"]]
        if state["threads"] != torch.get_num_threads():
            log(f"resuming with {torch.get_num_threads()} threads, saved with {state['threads']}: not bit for bit")
        log(
            f"resuming at step {self.done} of {self.total_steps}"
            + (" from a compact state" if state["compact"] else "")
        )
        self._saved = time.monotonic()

    def run(self, epoch: int, track: Track) -> None:
        """The steps of an epoch, counted from 1, that are not done yet; Interrupted where a limit ends them."""
        last, label = epoch * self.steps, f"epoch {epoch}/{self.config.optimization.epochs}"
        steps = range(self.done + 1, last + 1)
        with told():
            for step in track(steps, label, len(steps)):
                if step % self.every == 0 and self.ranks.agree(self.limits.over):
                    self._stop()
                self._step(step, last=step == last)
        self.ranks.average([self.loss])

    def close(self) -> None:
        """End the processes that read images."""
        if self._batches is not None:
            self._batches.close()

    def _step(self, step: int, last: bool) -> None:
        begun = time.perf_counter()
        if self._batches is None:  # here, where a run that was resumed knows its first step
            self._batches = self.feed.batches(step, self.total_steps)
        self.loss += self.learner.loss_of(next(self._batches), step)
        # Not on an epoch's last step: its line is written, and saved with it, only after the measurement.
        due = time.monotonic() - self._saved > SAVE_SECONDS and not last
        if last or due or step % self.every == 0:
            self._check(step)
        self.learner.apply(step)
        self.done = step
        self.seconds += time.perf_counter() - begun
        if due:
            self.save()

    def conclude(self, epoch: int, clean: float, robust: float, log: Callable[[str], None]) -> None:
        """Write the epoch's line, with its held-out accuracies (NaN where they were not measured)."""
        speed = self.steps * self.config.optimization.batch_size / max(self.seconds, 1e-9)
        loss = self.loss.item() / self.steps
        self.history.append(summary(self.learner, epoch, self.done, loss, clean, robust, speed))
        log(self.history[-1].line(self.config.optimization.epochs))
        held = [row.heldout_pgd for row in self.history if not math.isnan(row.heldout_pgd)]
        if not math.isnan(robust) and self.learner.falls_back(held):
            log(f"epoch {epoch}: PGD accuracy has collapsed (catastrophic overfitting); N-FGSM takes FGSM's share")
        self.seconds = 0.0
        self.loss.zero_()

    @property
    def due(self) -> bool:
        """Whether saving now keeps its share of the time."""
        return (time.monotonic() - self._saved) * SAVE_SHARE > self._cost

    def save(self) -> None:
        """Write the state, by the first process; Broken where the loss is no number."""
        begun = time.monotonic()
        self._check(self.done)
        if self.ranks.first:
            progress = {
                "step": self.done,
                "seconds": self.seconds,
                "loss": self.loss.item(),
                "data": self.data_sha256,
                "weights": self.begun,
                "history": [asdict(epoch) for epoch in self.history],
            }
            write_state(self.out, self.config, {"learner": self.learner.state_dict(), **progress}, self.compact)
        self._saved = time.monotonic()
        self._cost = self._saved - begun

    def _stop(self) -> None:
        self.save()
        if not self.ranks.first:
            raise Interrupted(f"{self.out}: {ELSEWHERE}")
        raise Interrupted(
            f"{self.out}: stopped and saved at step {self.done} of {self.total_steps}; repeat the command with --resume"
        )

    def _check(self, step: int) -> None:
        if not math.isfinite(self.loss.item()):
            before = f" or up to {self.every - 1} steps before" if self.every > 1 else ", before the optimizer's step"
            raise Broken(
                f"{self.out}: the loss is {self.loss.item()} at epoch {(step - 1) // self.steps + 1}, step"
                f" {step}{before}; lower optimization.lr ({self.config.optimization.lr}) or look at the data"
            )


def summary(learner: Learner, epoch: int, step: int, loss: float, clean: float, robust: float, speed: float) -> Epoch:
    """The record of an epoch; masks as they were in its last step."""
    masks = MaskStatistics.of(learner.p) if learner.p is not None else MaskStatistics(0.0, 0.0, 0.0, 0.0, ())
    return Epoch(
        epoch=epoch,
        step=step,
        train_loss=loss,
        heldout_clean=clean,
        heldout_pgd=robust,
        eps=learner.strength(step),
        alpha=learner.mask.alpha.item(),
        p_mean=masks.mean,
        p_std=masks.std,
        p_low=masks.low,
        p_high=masks.high,
        p_counts=" ".join(map(str, masks.counts)),
        fell_back=learner.fallen_back,
        images_per_second=speed,
    )
