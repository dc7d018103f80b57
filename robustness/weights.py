"""Weights that somebody else trained: read from a file without running code, and laid into a network by their names."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from dfmcl.common.errors import BadInput, lacks_memory
from dfmcl.common.reader import opened, why_unread

Weights = Mapping[str, Tensor]
CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "model_ema", "ema")  # where training scripts put them
PREFIXES = ("", "module.", "model.", "net.", "backbone.", "_orig_mod.")  # that wrappers put before each name


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name: safetensors, or a state dict that `torch.save` wrote, out of what training scripts
    put around it. Known by its content, whatever its suffix. BadInput for anything else.

    Nothing in the file is run: a pickle that holds more than tensors and plain values is refused.
    """
    try:
        with opened(path, named=True) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about old pickles: what cannot be read is told below
            if is_safetensors(path):
                found: dict[str, Tensor] = load_safetensors(file.read())
                return found
            held: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        told = re.search(r"GLOBAL (\S+)", str(error))  # of torch's advice the one word that is about the file
        held_there = f"holds more than weights{f' ({told[1]})' if told else ''}, which only code could read"
        raise BadInput(f"{path}: {held_there}; save these alone: torch.save(model.state_dict(), FILE)") from None
    except Exception as error:  # torch.load raises whatever its unpickler meets
        if lacks_memory(error):
            raise
        said = (
            why_unread(error)
            if isinstance(error, OSError | ValueError)
            else (str(error).strip().splitlines() or [type(error).__name__])[0]
        )
        raise BadInput(f"{path}: not readable as weights: {said}") from None
    inside = [name for name in CONTAINERS if isinstance(held, Mapping) and isinstance(held.get(name), Mapping)]
    held = held[inside[0]] if inside else held
    named = isinstance(held, Mapping) and all(isinstance(name, str) for name in held)
    if not named or not held or not all(isinstance(value, Tensor) for value in held.values()):
        there = ", ".join(map(str, held)) if isinstance(held, Mapping) else type(held).__name__
        raise BadInput(f"{path}: holds no state dict ({there[:80] or 'nothing'}); torch.save(model.state_dict(), FILE)")
    return dict(held)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as one: the length of a header in JSON, and its brace."""
    with opened(path, named=True) as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def fitted(weights: Weights, network: nn.Module, source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """What `network.load_state_dict` takes, and the parameters of the head, which keep the network's own values.

    A head is the one module whose weights are of another number of classes; all else must be there, in its shape.
    Of the prefixes that wrappers add, the one is taken off that lets most names fit. BadInput names what does not fit.
    """
    wanted = network.state_dict()
    named = unwrapped(weights, wanted.keys())
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


def unwrapped(weights: Weights, wanted: Set[str]) -> dict[str, Tensor]:
    """The weights without a wrapper's prefix: the prefix whose removal lets most names fit the wanted ones."""
    prefix = max(PREFIXES, key=lambda one: len({one + name for name in wanted} & weights.keys()))
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
