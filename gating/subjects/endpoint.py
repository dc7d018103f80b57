"""A live endpoint as a subject: answers alone."""

from __future__ import annotations

import hashlib
import json

from dfmcl.common.errors import BadInput
from dfmcl.gating.endpoint import Asked, Described, Predict
from dfmcl.gating.subject import Subject
from dfmcl.robustness.contract import InputContract


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
