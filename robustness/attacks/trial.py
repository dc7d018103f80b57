"""What an attack costs and whom it fools, kept by the frame: an attack shows every point that it looks at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dfmcl.robustness.losses import right

Confirm = Callable[[Tensor, Tensor], Tensor]
"""Rows `(M,)` and points `(M, C, H, W)` on which the attack's model errs; returns which of them count, `(M,)` bool."""


class Trial:
    """One attack on one batch of N images.

    forward, backward: passes spent on each image so far, `(N,)`; what an image needed when it fell, once it fell.
    fooled: which images fell, `(N,)`; unconfirmed: on which the attack's model erred at a point that did not count.
    Without `confirm` the attack's own logits decide.
    """

    def __init__(self, y: Tensor, confirm: Confirm | None = None) -> None:
        self._y, self._confirm = y, confirm
        self.forward = torch.zeros(len(y), dtype=torch.int64, device=y.device)
        self.backward = torch.zeros_like(self.forward)
        self.fooled = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        self.unconfirmed = torch.zeros_like(self.fooled)

    def spend(self, rows: Tensor, *, forward: int = 0, backward: int = 0) -> None:
        """Count passes from which nothing can be concluded. rows: positions in the batch `(M,)`, each once."""
        self.forward[rows] += forward
        self.backward[rows] += backward

    def look(self, rows: Tensor, points: Tensor, logits: Tensor, *, gradient: bool) -> Tensor:
        """Count one pass and say who is done: rows `(M,)`, points `(M, C, H, W)`, logits `(M, K)` to `(M,)` bool.

        An image that is done needs no further pass. One whose point did not count goes on: its adversarial point
        was lost in rounding to bytes, or the model that gives gradients is not quite the one that decides.
        """
        self.spend(rows, forward=1, backward=int(gradient))
        done = ~right(logits, self._y[rows])
        if self._confirm is not None and done.any():
            claimed = torch.nonzero(done).squeeze(1)
            counts = self._confirm(rows[claimed], points[claimed])
            self.unconfirmed[rows[claimed[~counts]]] = True
            done[claimed] = counts
        self.fooled[rows[done]] = True
        return done
