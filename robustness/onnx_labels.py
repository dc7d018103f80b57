"""Whether an ONNX file as it came gives the labels of the logits that it is judged by, without its softmax or sigmoid.

A sigmoid whose scores have all become 1 in floating point labels nothing, while the logits behind it still differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dfmcl.common.errors import BadInput
from dfmcl.robustness.onnx_graph import Graph, artefact
from dfmcl.robustness.portions import answered
from dfmcl.robustness.provider import CPU, Provider

FEW = 16  # images at a time


@dataclass(frozen=True)
class OwnLabels:
    """A file's own answers beside the judged ones.

    scores: float images (N, C, H, W) in [0, 1] to what the file gives, (N, K), or (N, 1) of one sigmoid; logits: to
    the logits (N, K) behind it.
    name: of the file; end: the operator that was left out.
    """

    scores: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]
    name: str
    end: str

    @staticmethod
    def of(graph: Graph, logits: Callable[[Tensor], Tensor], provider: Provider = CPU) -> OwnLabels | None:
        """None where nothing was left out."""
        if graph.scored is None:
            return None
        scores = artefact(replace(graph, model=graph.scored), provider)
        return OwnLabels(scores, logits, str(graph.path), graph.head.squash)

    def require(self, x: Tensor, which: str) -> None:
        """BadInput where it labels one of the images `(N, C, H, W)`, which `which` describes, otherwise, or not."""
        scores, logits = (
            torch.cat([answered(one, part) for part in x.split(FEW)]) for one in (self.scores, self.logits)
        )
        if wrong := int(apart(scores, logits).sum()):
            raise BadInput(
                f"{self.name}: the {self.end} at its end gives {wrong} of {len(x)} images {which} another label than"
                " the logits before it, or its highest score to several classes; export it without, so that the logits"
                " are served"
            )


def apart(scores: Tensor, logits: Tensor) -> Tensor:
    """Which images `(N,)` scores `(N, K)` label otherwise than logits `(N, K)`, or leave between several classes.

    One column of scores is the probability of the second of two classes. Where logits are not finite there is no label.
    """
    rows = torch.cat([1 - scores, scores], dim=1) if scores.shape[1] == 1 else scores
    highest = (rows == rows.amax(dim=1, keepdim=True)).sum(dim=1)
    other = (highest != 1) | (rows.argmax(dim=1) != logits.argmax(dim=1))
    return other & logits.isfinite().all(dim=1)
