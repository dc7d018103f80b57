"""A bare ONNX file as a subject."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dfmcl.gating.conversion import Converted, NoGradients, differentiable
from dfmcl.gating.subject import Subject, classes_of
from dfmcl.robustness.data import Bytes
from dfmcl.robustness.models import to_float
from dfmcl.robustness.onnx_graph import artefact, count_classes, read_graph
from dfmcl.robustness.onnx_labels import OwnLabels
from dfmcl.robustness.provider import CPU, Provider

ODD_BATCH = 7  # as no attack asks


def onnx_subject(
    path: Path,
    contract: str | None = None,
    labels: tuple[str, ...] | None = None,
    output: str | None = None,
    provider: Provider = CPU,
) -> Subject:
    """A bare ONNX classifier.

    contract: see InputContract.parse; what the file gives may be left out.
    labels: its classes in order.
    output: the name of its scores, where it has several.
    provider: what computes it.
    """
    graph = read_graph(path, contract or "", output, len(labels) if labels else None)
    decide = artefact(graph, provider)
    classes = count_classes(decide, graph.contract, path)
    model, why = gradients_of(lambda: differentiable(graph, decide, provider))
    return Subject(
        kind="onnx",
        name=str(path),
        digest=graph.digest,
        files={},
        contract=graph.contract,
        classes=classes_of(labels, classes, path),
        decide=decide,
        model=model,
        no_gradients=why,
        state=dict,  # a file keeps nothing
        afresh=partial(reopened, path, str(graph.contract), provider, output=graph.head.output or None),
        output=graph.head.output,
        twin=model.twin if model is not None else "",
        provider=provider,
        own_labels=OwnLabels.of(graph, decide, provider),
    )


def reopened(
    path: Path,
    contract: str,
    provider: Provider,
    images: Bytes,
    *,
    output: str | None = None,
    whole: bool = False,
) -> NDArray[np.float32]:
    """Logits `(n, K)` of uint8 images `(n, H, W, C)` by the file as it lies there now, in a session of its own.

    A file holds no code, so that another process would answer the same.
    """
    graph = read_graph(path, contract, output, whole=whole)
    decide = artefact(graph, provider)
    parts = to_float(torch.from_numpy(images)).split(ODD_BATCH)
    found: NDArray[np.float32] = torch.cat([decide(part) for part in parts]).numpy()
    return found


def gradients_of(convert: Callable[[], Converted]) -> tuple[Converted | None, str]:
    try:
        return convert(), ""
    except NoGradients as why:
        return None, str(why)
