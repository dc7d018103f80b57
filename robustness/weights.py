"""Weights that somebody else trained: read from a file without running code, and laid into a network by their names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from dfmcl.common.errors import BadInput, lacks_memory
from dfmcl.common.reader import opened, why_unread

Weights = Mapping[str, Tensor]
CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "model_ema", "ema")  # where training scripts put them
PREFIXES = ("", "module.", "model.", "net.", "backbone.", "_orig_mod.")  # that wrappers put before each name


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a `.safetensors` file, or from one that `torch.save` wrote. BadInput for anything else.

    Nothing in the file is run: a pickle that holds more than tensors and plain values is refused.
    """
    try:
        with opened(path, named=True) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about old pickles: what cannot be read is told below
            if path.suffix == ".safetensors":
                found: dict[str, Tensor] = load_safetensors(file.read())
                return found
            held: Any = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise BadInput(f"{path}: not readable as safetensors: {error}") from None
    except Exception as error:  # torch.load raises whatever its unpickler meets
        if lacks_memory(error):
            raise
        said = why_unread(error) if isinstance(error, OSError | ValueError) else _told(error)
        raise BadInput(f"{path}: not readable as weights: {said}") from None
    for name in CONTAINERS:
        if isinstance(held, dict) and isinstance(held.get(name), dict):
            held = held[name]
            break
    tensors = {str(name): value for name, value in held.items() if isinstance(value, Tensor)} if _named(held) else {}
    if not tensors:
        raise BadInput(f"{path}: holds no tensors by name; save model.state_dict()")
    return tensors


def fitted(weights: Weights, network: nn.Module, source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """What `network.load_state_dict` takes, and the parameters of the head, which keep the network's own values.

    A head is the one module whose weights are of another number of classes; all else must be there, in its shape.
    Of the prefixes that wrappers add, the one is taken off that lets most names fit. BadInput names what does not fit.
    """
    wanted = network.state_dict()
    named = max((_without(weights, prefix) for prefix in PREFIXES), key=lambda found: len(found.keys() & wanted.keys()))
    counters = {name for name, value in wanted.items() if not value.is_floating_point()}
    missing = [name for name in wanted if name not in named and name not in counters]
    if missing:
        there = next((name for name in weights if name not in wanted), "nothing else")
        raise BadInput(
            f"{source}: has no {missing[0]} ({len(missing)} of the network's {len(wanted)} tensors are missing); it has"
            f" {there}: is it of this architecture?"
        )
    strange = [name for name in named if name not in wanted]
    if strange and len(strange) > len(named) // 2:
        raise BadInput(f"{source}: {strange[0]} is nowhere in the network: is it of this architecture?")
    head = tuple(name for name, value in wanted.items() if name in named and named[name].shape != value.shape)
    modules = {name.rpartition(".")[0] for name in head}
    for name in head:
        theirs, ours = tuple(named[name].shape), tuple(wanted[name].shape)
        if len(modules) > 1 or theirs[1:] != ours[1:]:
            raise BadInput(f"{source}: {name} is {theirs}, the network's {ours}; only a head may have other classes")
    return {**wanted, **{name: named[name] for name in wanted if name in named and name not in head}}, head


def _without(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _named(held: Any) -> bool:
    return isinstance(held, Mapping)


def _told(error: Exception) -> str:
    """torch's own advice is to trust the file, which is not ours to give."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if "weights_only" in str(error) or "Unsupported" in str(error):
        return "it holds more than tensors, which could run code; save model.state_dict(), or a .safetensors file"
    return line or type(error).__name__
