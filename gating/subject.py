"""What is judged, whatever it is: how it answers, where its gradients come from, and how it is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.common.preprocessing import Preprocessing
from dfmcl.gating.signing.report import DecidedEntry
from dfmcl.robustness.contract import InputContract
from dfmcl.robustness.data import Bytes
from dfmcl.robustness.onnx_labels import OwnLabels
from dfmcl.robustness.provider import Provider, library_version, runtime_version

Decide = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """A model to judge.

    kind: a name of KINDS. name: as the user named it. digest: SHA-256 of what is judged: the bytes of a file, the state
    of a module or of weights in their network, the metadata of an endpoint. files: SHA-256 by file name, of a
    candidate. classes: K labels, or only K. decide: float images (N, C, H, W) in [0, 1] (on the uint8 grid where the
    contract is uint8) to logits (N, K) float32 on the CPU: the answer that counts. model: the same, differentiable;
    None where there is no way to gradients, and `no_gradients` says why. run: what is known of the training:
    checkpoint_sha256, and data, the digest of the data set that it saw. state: what a module keeps, by place. afresh:
    the answers to uint8 images (n, H, W, C) of what the user named, opened anew: of a module by a new process. output:
    of a file with several, which is judged. twin: where the model stands in for a file that rounds, how it was made of
    it; then the two are near, not equal. preprocessing: how a candidate's pictures become its images. provider: what
    computes a file; None of what ONNX Runtime does not compute. own_labels: of a
    file whose softmax or sigmoid was left out.
    """

    kind: str
    name: str
    digest: str
    files: dict[str, str]
    contract: InputContract
    classes: tuple[str, ...] | int
    decide: Decide
    model: nn.Module | None
    run: dict[str, Any] = field(default_factory=dict)
    no_gradients: str = ""
    state: Callable[[], Mapping[str, str]] | None = None
    afresh: Callable[[Bytes], NDArray[np.float32]] | None = None
    output: str = ""
    twin: str = ""
    preprocessing: Preprocessing | None = None
    provider: Provider | None = None
    own_labels: OwnLabels | None = None


def classes_of(labels: tuple[str, ...] | None, logits: int, where: object) -> tuple[str, ...] | int:
    """The labels, if they are as many as the logits; else how many those are."""
    if labels is None:
        return logits
    if len(labels) != logits:
        raise BadInput(f"{where}: answers with {logits} logits, there are {len(labels)} labels; one belongs to each")
    return labels


def decided_by(provider: Provider | None) -> DecidedEntry | None:
    """The provider that decided, and its versions here; None where ONNX Runtime was not asked."""
    if provider is None or provider.decider is None:
        return None
    decider = provider.decider
    return DecidedEntry(
        provider=decider.provider,
        precision=decider.precision,
        tf32=decider.tf32,
        runtime=runtime_version(),
        library=library_version(decider) or None,
    )
