"""What is judged, whatever it is: a candidate, an ONNX file, a module in Python, or an endpoint that is live."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.common.preprocessing import Preprocessing
from dfmcl.gating.afresh import asked_afresh
from dfmcl.gating.conversion import NoGradients, differentiable
from dfmcl.gating.endpoint import Asked, Connect, Described, Predict
from dfmcl.gating.foreign import Foreign, guarded, imported, kept, state_digest, without_gradients
from dfmcl.gating.signing.evidence import candidate_files, read_candidate
from dfmcl.robustness.contract import InputContract
from dfmcl.robustness.data import Bytes
from dfmcl.robustness.models import device_of, exactly, frozen, to_float
from dfmcl.robustness.onnx_graph import apart, artefact, count_classes, noise, read_graph
from dfmcl.robustness.provider import CPU, Provider
from dfmcl.robustness.runs import load_run

MODEL = "model.onnx"
MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
ENDPOINT = re.compile(r"grpc://(?P<url>[^/]+:\d+)/(?P<model>[^/]+)")
ONE_OF = "a candidate's directory, an ONNX file, module:callable or grpc://HOST:PORT/MODEL"

ODD_BATCH = 7  # as no attack asks
Decide = Callable[[Tensor], Tensor]


# Of the largest logit, on noise: weights stored as float16 move it by less than 0.01, another network by far more.
SAME_NETWORK = 0.05


@dataclass(frozen=True)
class Subject:
    """A model to judge.

    kind: candidate, onnx, module or endpoint. name: as the user named it. digest: SHA-256 of what is judged: the bytes
    of model.onnx, the state of a module, the metadata of an endpoint. files: SHA-256 by file name, of a candidate.
    classes: K labels, or only K. decide: float images (N, C, H, W) in [0, 1] (on the uint8 grid where the contract is
    uint8) to logits (N, K) float32 on the CPU: the answer that counts. model: the same, differentiable; None where
    there is no way to gradients, and `no_gradients` says why. run: what is known of the training: checkpoint_sha256,
    and data, the digest of the data set that it saw. state: what a module keeps, by place. afresh: the answers to uint8
    images (n, H, W, C) of what the user named, opened anew: of a module by a new process. output: of a file with
    several, which is judged. preprocessing: how a candidate's pictures become its images, where they are files.
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
    preprocessing: Preprocessing | None = None


def open_subject(
    text: str,
    *,
    run: Path | None = None,
    contract: str | None = None,
    labels: tuple[str, ...] | None = None,
    output: str | None = None,
    connect: Connect | None = None,
    budget: int | None = None,
    provider: Provider = CPU,
) -> Subject:
    """The subject that a text names.

    run: a candidate's, where its gradients come from.
    contract, labels: of an ONNX file or a module; the others know theirs.
    output: of an ONNX file with several: the name of its scores.
    connect, budget: of an endpoint: how it is reached, and the most images that it is asked about.
    provider: what computes a candidate or an ONNX file.
    """
    path = Path(text)
    remote = ENDPOINT.fullmatch(text)
    if remote:
        kind = "endpoint"
    elif path.exists():
        kind = "candidate" if path.is_dir() else "onnx"
    elif MODULE.fullmatch(text):
        kind = "module"
    else:
        raise BadInput(f"{text}: names no model; expected {ONE_OF}")
    takes = {
        "candidate": {"run"},
        "onnx": {"contract", "labels", "output"},
        "module": {"contract", "labels"},
        "endpoint": {"budget"},
    }
    given = {"run": run, "contract": contract, "labels": labels, "output": output, "budget": budget}
    if strange := sorted(key for key, value in given.items() if value is not None and key not in takes[kind]):
        raise BadInput(f"{text}: is of kind {kind}, which takes no {' or '.join(strange)}; leave it out")
    if kind == "candidate":
        return candidate_subject(path, run, provider)
    if remote:
        if connect is None or budget is None:
            raise BadInput(f"{text}: an endpoint is asked within a budget of queries; name one")
        described, predict = connect(remote["url"], remote["model"])
        return endpoint_subject(described, predict, name=text, budget=budget)
    if kind == "onnx":
        return onnx_subject(path, contract or "", labels, output, provider)
    if contract is None:
        raise BadInput(f"{text}: what images does it take? Say so, such as --input 'float32 NCHW 224x224x3 imagenet'")
    return module_subject(text, contract, labels)


def candidate_subject(candidate: Path, run: Path | None = None, provider: Provider = CPU) -> Subject:
    """A candidate as `dfmcl export` wrote it; its gradients come from the run, else from the file itself."""
    manifest = read_candidate(candidate)
    path = candidate / MODEL
    contract = InputContract.from_json(manifest.get("input", {}))
    labels = tuple(str(label) for label in manifest.get("labels", ()))
    named = (manifest.get("run") or {}).get("checkpoint_sha256")
    graph = read_graph(path, str(contract), whole=True)
    if graph.digest != manifest["files"][MODEL]:
        raise BadInput(f"{path}: changed while it was read; export the candidate again")
    decide = artefact(graph, provider)
    model: nn.Module | None
    if run is None:
        model, why = _gradients(lambda: differentiable(graph, decide))
        known = {"checkpoint_sha256": named} if named else {}
    else:
        trained = load_run(run)
        if named != trained.checkpoint_sha256:
            origin = f"from {str(named)[:12]}..." if named else "from no run"
            raise BadInput(
                f"{run}: its checkpoint is {trained.checkpoint_sha256[:12]}..., {candidate} was exported {origin};"
                " name the run that the candidate was exported from"
            )
        if trained.input_shape != contract.shape or trained.classes != labels:
            raise BadInput(
                f"{candidate}: its manifest contradicts {run} on input or labels; export the candidate again"
            )
        model, why = trained.model, ""
        _require_same_network(candidate, run, decide, model, contract)
        known = {"checkpoint_sha256": trained.checkpoint_sha256, "data": trained.data.get("sha256")}
    return Subject(
        kind="candidate",
        name=str(candidate),
        digest=graph.digest,
        files=candidate_files(candidate),
        contract=contract,
        classes=_named(labels, count_classes(decide, contract, path), candidate),
        decide=decide,
        model=model,
        run=known,
        no_gradients=why,
        state=dict,
        afresh=partial(reopened, path, str(contract), provider, whole=True),
        preprocessing=Preprocessing.parse(str(manifest.get("preprocessing", ""))),
    )


def _require_same_network(
    candidate: Path, run: Path, decide: Decide, model: nn.Module, contract: InputContract
) -> None:
    """Gradients of another network than the one that is judged would be no attack at all; BadInput then."""
    images = noise(contract, 8)
    with frozen(model), torch.no_grad():
        found = apart(decide(images), exactly(model)(images).cpu())
    if not found <= SAME_NETWORK:
        raise BadInput(
            f"{candidate}: on random images its logits are {found:.2g} of the largest away from those of {run};"
            " export the candidate again"
        )


def onnx_subject(
    path: Path,
    contract: str = "",
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
    graph = read_graph(path, contract, output, len(labels) if labels else None)
    decide = artefact(graph, provider)
    classes = count_classes(decide, graph.contract, path)
    model, why = _gradients(lambda: differentiable(graph, decide))
    return Subject(
        kind="onnx",
        name=str(path),
        digest=graph.digest,
        files={},
        contract=graph.contract,
        classes=_named(labels, classes, path),
        decide=decide,
        model=model,
        no_gradients=why,
        state=dict,  # a file keeps nothing
        afresh=partial(reopened, path, str(graph.contract), provider, output=graph.head.output or None),
        output=graph.head.output,
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


def module_subject(text: str, contract: str, labels: tuple[str, ...] | None = None) -> Subject:
    """What `module:callable` returns: an nn.Module from float images (N, C, H, W) to logits (N, K).

    It is judged in eval mode and in the contract's floats. contract: its images' size, dtype and scale; uint8 means
    that it is asked on the uint8 grid only, in float32 and [0, 1]. The module is looked for beside the user first, in
    the current directory.
    """
    parsed = InputContract.parse(contract)
    if parsed.layout != "NCHW":
        raise BadInput(f"{text}: a module is asked in NCHW; declare it so, such as --input 'float32 NCHW 32x32x3'")
    network = Foreign(imported(text), parsed, text)
    answer = exactly(network)

    def decide(x: Tensor) -> Tensor:
        with torch.no_grad(), guarded(f"{text}: its answer cannot be read"):
            return answer(parsed.rounded(x.to(device_of(network)).float())).detach().cpu()

    classes = count_classes(decide, parsed, text)
    why = without_gradients(network)
    with guarded(f"{text}: no digest can be taken of its module's state"):
        digest = state_digest(network.module)
    return Subject(
        kind="module",
        name=text,
        digest=digest,
        files={},
        contract=parsed,
        classes=_named(labels, classes, text),
        decide=decide,
        model=None if why else network,
        no_gradients=why,
        state=partial(kept, network.module),
        afresh=lambda images: asked_afresh(
            text, network.taken(parsed.rounded(to_float(torch.from_numpy(images)))).contiguous().numpy()
        ),
    )


def endpoint_subject(described: Described, predict: Predict, *, name: str, budget: int) -> Subject:
    """A model behind an endpoint, by its answers alone. `decide` is an `Asked`, which knows how much it has spent.

    The digest is of what the endpoint says of itself: its weights cannot be seen.
    """
    if budget < 1:
        raise BadInput(f"{name}: a budget of {budget} queries; it needs at least one")
    height, width, channels = described.input_shape
    contract = InputContract(height, width, channels)
    labels = tuple(described.labels)
    metadata = {
        "model": described.model,
        "version": described.version,
        "input": contract.to_json(),
        "labels": list(labels),
    }
    return Subject(
        kind="endpoint",
        name=name,
        digest=hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest(),
        files={},
        contract=contract,
        classes=labels,
        decide=Asked(predict, contract, budget, name),
        model=None,
        no_gradients="an endpoint gives answers only",
    )


def _gradients(convert: Callable[[], nn.Module]) -> tuple[nn.Module | None, str]:
    try:
        return convert(), ""
    except NoGradients as why:
        return None, str(why)


def _named(labels: tuple[str, ...] | None, classes: int, where: object) -> tuple[str, ...] | int:
    """The labels, if they are as many as the logits; else how many those are."""
    if labels is None:
        return classes
    if len(labels) != classes:
        raise BadInput(f"{where}: answers with {classes} logits, there are {len(labels)} labels; one belongs to each")
    return labels
