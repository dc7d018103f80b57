"""A candidate as a subject: what `dfmcl export` wrote, with gradients of its run or of its file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from dfmcl.common.errors import BadInput
from dfmcl.common.preprocessing import Preprocessing
from dfmcl.gating.conversion import differentiable
from dfmcl.gating.signing.evidence import candidate_files, read_candidate
from dfmcl.gating.subject import Decide, Subject, classes_of
from dfmcl.gating.subjects.onnx_file import gradients_of, reopened
from dfmcl.robustness.contract import InputContract
from dfmcl.robustness.logits import apart
from dfmcl.robustness.models import exactly, frozen
from dfmcl.robustness.onnx_graph import artefact, count_classes, noise, read_graph
from dfmcl.robustness.provider import CPU, Provider
from dfmcl.robustness.runs import load_run

MODEL = "model.onnx"
# Of the largest logit, on noise: weights stored as float16 move it by less than 0.01, another network by far more.
SAME_NETWORK = 0.05


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
    twin = ""
    if run is None:
        converted, why = gradients_of(lambda: differentiable(graph, decide, provider))
        model, twin = converted, "" if converted is None else converted.twin
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
        model, why, twin = trained.model, "", provider.rounds
        _require_same_network(candidate, run, decide, model, contract)
        known = {"checkpoint_sha256": trained.checkpoint_sha256, "data": trained.data.get("sha256")}
    return Subject(
        kind="candidate",
        name=str(candidate),
        digest=graph.digest,
        files=candidate_files(candidate),
        contract=contract,
        classes=classes_of(labels, count_classes(decide, contract, path), candidate),
        decide=decide,
        model=model,
        run=known,
        no_gradients=why,
        state=dict,
        twin=twin,
        afresh=partial(reopened, path, str(contract), provider, whole=True),
        preprocessing=Preprocessing.parse(str(manifest.get("preprocessing", ""))),
        provider=provider,
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
