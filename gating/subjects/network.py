"""A network in PyTorch as a subject, wherever it came from: its own answers count, its own gradients lead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.gating.foreign import Foreign, kept, state_digest, without_gradients
from dfmcl.gating.subject import Decide, Subject, classes_of
from dfmcl.robustness.contract import InputContract
from dfmcl.robustness.data import Bytes
from dfmcl.robustness.models import device_of, exactly, to_float
from dfmcl.robustness.onnx_graph import count_classes
from dfmcl.robustness.user_code import guarded

ODD_BATCH = 7  # as no attack asks


def declared(contract: str | None, where: object) -> InputContract:
    """What a network in PyTorch takes: it says nothing of it itself."""
    if contract is None:
        raise BadInput(f"{where}: what images does it take? Say so, such as --input 'float32 NCHW 224x224x3 imagenet'")
    return InputContract.parse(contract)


def network_subject(
    network: nn.Module,
    contract: InputContract,
    labels: tuple[str, ...] | None,
    *,
    kind: str,
    name: str,
    opened: Callable[[], nn.Module] | None = None,
    afresh: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None,
    digest: str | None = None,
    state: Callable[[], Mapping[str, str]] | None = None,
) -> Subject:
    """A module from images as the contract lays them out to logits (N, K), judged in eval mode and in its floats.

    A contract of uint8 means that it is asked on the uint8 grid only, in float32 and [0, 1].
    kind, name: of the subject.
    opened: makes it anew, where no code of others is needed for that.
    afresh: else, a new process's answers to images as the module takes them.
    digest: where it is not that of the module's state.
    state: the values that it keeps, where they are not in the state that Python shows.
    """
    foreign = Foreign(network, contract, name)
    decide = deciding(foreign)
    classes = count_classes(decide, contract, name)
    why = without_gradients(foreign)
    with guarded(f"{name}: no digest can be taken of its module's state"):
        found = digest or state_digest(foreign.module)

    def again(images: Bytes) -> NDArray[np.float32]:
        x = contract.rounded(to_float(torch.from_numpy(images)))
        if opened is None:
            assert afresh is not None, "what holds code is asked in another process"
            return afresh(foreign.taken(x).contiguous().numpy())
        anew = deciding(Foreign(opened(), contract, name))
        answers: NDArray[np.float32] = torch.cat([anew(part) for part in x.split(ODD_BATCH)]).numpy()
        return answers

    return Subject(
        kind=kind,
        name=name,
        digest=found,
        files={},
        contract=contract,
        classes=classes_of(labels, classes, name),
        decide=decide,
        model=None if why else foreign,
        no_gradients=why,
        state=state or partial(kept, foreign.module),
        afresh=again,
    )


def deciding(foreign: Foreign) -> Decide:
    """The module as the decider, in full float32."""
    answer = exactly(foreign)

    def decide(x: Tensor) -> Tensor:
        with torch.no_grad(), guarded(f"{foreign.name}: its answer cannot be read"):
            return answer(foreign.contract.rounded(x.to(device_of(foreign)).float())).detach().cpu()

    return decide
