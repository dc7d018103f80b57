"""A file of weights as a subject: a state dict in the network that `--arch` names. Nothing in the file is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.gating.afresh import asked_afresh
from dfmcl.gating.subject import Subject
from dfmcl.gating.subjects.network import declared, network_subject
from dfmcl.robustness.arch import is_code
from dfmcl.robustness.models import library_network
from dfmcl.robustness.user_code import guarded, imported
from dfmcl.robustness.weights import read_weights, unwrapped

CLASSES = 1000  # of their networks, where nobody says another number
State = Mapping[str, Tensor]


def weights_subject(
    path: Path, contract: str | None, labels: tuple[str, ...] | None = None, arch: str | None = None
) -> Subject:
    """A state dict, .pth or .safetensors, in torchvision:NAME, timm:NAME or what module:callable returns.

    The last is of kind module, because its code is run; see `network_subject` for the rest.
    """
    if arch is None:
        raise BadInput(
            f"{path}: holds weights alone; name the network that they are of: --arch torchvision:NAME, timm:NAME or"
            " module:callable"
        )
    taken, state = declared(contract, path), read_weights(path)
    name = f"{path} as {arch}"
    if is_code(arch) or ":" not in arch:
        network = imported(arch)
        state = unwrapped(state, network.state_dict().keys())
        afresh = partial(asked_afresh, arch, state=dict(state))
        network = filled(network, state, path, arch)
        return network_subject(network, taken, labels, kind="module", name=f"{arch} with {path.name}", afresh=afresh)
    made = partial(in_library, path, arch, taken.channels, None if labels is None else len(labels))
    again = partial(refilled, path, made)
    return network_subject(made(state), taken, labels, kind="weights", name=name, opened=again)


def refilled(path: Path, made: Callable[[State], nn.Module]) -> nn.Module:
    """The network anew, with the weights as they lie there now."""
    return made(read_weights(path))


def in_library(path: Path, arch: str, channels: int, labels: int | None, state: State) -> nn.Module:
    """The library's network with these weights and as many classes as they have; labels: as many as there should be."""
    network = library_network(arch, labels or CLASSES, channels)
    state = unwrapped(state, network.state_dict().keys())
    counts = {
        (held.shape[0], state[name].shape[0])
        for name, held in network.state_dict().items()
        if name in state and held.ndim and state[name].ndim and held.shape != state[name].shape
    }
    if len(counts) == 1 and (count := next(iter(counts)))[0] == (labels or CLASSES):
        if labels:
            raise BadInput(f"{path}: has {count[1]} classes, there are {labels} labels; one belongs to each")
        network = library_network(arch, count[1], channels)
    return filled(network, state, path, arch)


def filled(network: nn.Module, state: State, path: Path, arch: str) -> nn.Module:
    """The network with these weights; BadInput that names the first key of each kind that does not fit."""
    held = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    state = unwrapped(state, held.keys())
    missing = [name for name in held if name not in state and not name.endswith("num_batches_tracked")]
    strange = [name for name in state if name not in held]
    other = [name for name in held if name in state and held[name].shape != state[name].shape]
    said = [f"lacks {len(missing)} of its {len(held)} keys, first {missing[0]!r}"] if missing else []
    said += [f"has {len(strange)} that are none of its, first {strange[0]!r}"] if strange else []
    if other:
        shapes = " and ".join("x".join(map(str, one[other[0]].shape)) or "a number" for one in (state, held))
        said += [f"has {len(other)} of other shapes, first {other[0]!r}, {shapes}"]
    if said:
        raise BadInput(f"{path}: does not fit {arch}: {'; '.join(said)}; name the network that was saved")
    with guarded(f"{path}: cannot be put into {arch}"):
        network.load_state_dict(dict(state))
    return network
