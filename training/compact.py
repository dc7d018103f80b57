"""A training state made small enough to carry: under 60 MB for the full-width network, no longer bit for bit.

Weights go to float16. What an optimizer remembers goes to 8-bit floats, scaled by each tensor's largest value: momenta
(e4m3: 1 part in 16), Adam's second moments as square roots (e5m2: 1 part in 8 over nine decades). The moving average is
kept as its difference to the weights, in 8 bits too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOP = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
SMALL = 64  # elements: tensors below are kept whole


def eighth(tensor: Tensor, kind: torch.dtype) -> dict[str, Tensor]:
    """8-bit floats and the scale that puts the tensor's largest value at the top of their range."""
    scale = tensor.abs().max().clamp_min(1e-30) / TOP[kind]
    return {"scale": scale, "values": (tensor / scale).to(kind)}


def whole(packed: dict[str, Tensor]) -> Tensor:
    return packed["values"].float() * packed["scale"]


def shrink(state: dict[str, Any]) -> dict[str, Any]:
    """A learner's state (`Learner.state_dict`) made small."""
    networks = [shrunk_weights(weights) for weights in state["networks"]]
    for further in networks[1:]:  # views share all weights with the first network, but for their batch norms
        for name in [name for name, tensor in further.items() if is_large(tensor)]:
            del further[name]
    small = {**state, "networks": networks, "optimizer": map_moments(state["optimizer"], packed_moment)}
    if "average" in state:
        small["average"] = {
            name: eighth(tensor - state["networks"][0][name.removeprefix("network.")], torch.float8_e4m3fn)
            if is_large(tensor)
            else tensor
            for name, tensor in state["average"].items()
        }
    return small


def expand(small: dict[str, Any]) -> dict[str, Any]:
    """What `Learner.load_state_dict` takes, from what `shrink` made."""
    first = {name: tensor.float() if is_large(tensor) else tensor for name, tensor in small["networks"][0].items()}
    state = {**small, "networks": [{**first, **further} for further in [first, *small["networks"][1:]]]}
    state["optimizer"] = map_moments(small["optimizer"], whole_moment)
    if "average" in small:
        state["average"] = {
            name: whole(entry) + first[name.removeprefix("network.")] if isinstance(entry, dict) else entry
            for name, entry in small["average"].items()
        }
    return state


def is_large(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() > 1 and tensor.numel() >= SMALL


def shrunk_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.half() if is_large(tensor) else tensor for name, tensor in weights.items()}


def map_moments(optimizer: dict[str, Any], change: Any) -> dict[str, Any]:
    state = {
        index: {name: change(name, value) for name, value in moments.items()}
        for index, moments in optimizer["state"].items()
    }
    return {**optimizer, "state": state}


def packed_moment(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or not is_large(value):
        return value
    return eighth(value.sqrt(), torch.float8_e5m2) if name == "exp_avg_sq" else eighth(value, torch.float8_e4m3fn)


def whole_moment(name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return whole(value).square() if name == "exp_avg_sq" else whole(value)
