"""A module of foreign code: kept from harming its judge, and each of its failures told in one line."""

from __future__ import annotations

import hashlib
import itertools
import pickle
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.robustness.contract import DTYPES, InputContract
from dfmcl.robustness.onnx_graph import noise
from dfmcl.robustness.user_code import DETACHED, guarded


class Foreign(nn.Module):
    """Float images `(N, C, H, W)` in [0, 1] to float32 logits `(N, K)`, by a module in eval mode.

    It gets them on the contract's scale, as a contiguous copy, because a `view` needs the one and an operation in place
    would reach our images without the other. BadInput where it fails or gives anything else, whatever it raises.
    """

    def __init__(self, module: nn.Module, contract: InputContract, name: str) -> None:
        super().__init__()
        self.dtype = torch.float32 if contract.dtype == "uint8" else DTYPES[contract.dtype]
        self.contract, self.name = contract, name
        with guarded(
            f"{name}: its module cannot be brought into {str(self.dtype).removeprefix('torch.')} and eval mode"
        ):
            self.module = module.to(self.dtype)
            self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            logits: Tensor = _Differentiated.apply(x, self)
            return logits
        return self.answered(x)

    def taken(self, x: Tensor) -> Tensor:
        """The images as the module takes them; under a uint8 contract in [0, 1], too."""
        return self.contract.arranged(self.contract.scale.applied(x).to(self.dtype))

    def answered(self, x: Tensor) -> Tensor:
        """The logits `(N, K)`, checked, with the graph of the module's own operations."""
        copied = self.taken(x).clone(memory_format=torch.contiguous_format)
        with guarded(f"{self.name}: its module cannot take {shown(copied, f' {self.contract.layout}')}"):
            logits: Any = self.module(copied)
        if not isinstance(logits, Tensor):
            raise BadInput(
                f"{self.name}: its module gives a {type(logits).__name__}, expected a tensor of logits (N, K)"
            )
        if logits.ndim != 2 or len(logits) != len(x) or not logits.is_floating_point():
            raise BadInput(f"{self.name}: {len(x)} images gave {shown(logits)}; expected float logits (N, K)")
        if x.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
            raise BadInput(f"{self.name}: {DETACHED}")
        return logits.float()


class _Differentiated(torch.autograd.Function):
    """A module with a backward pass of its own, so that what fails on the way back is told like all else of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, foreign: Foreign) -> Tensor:
        with torch.enable_grad():
            ctx.x, ctx.foreign = x.detach().requires_grad_(), foreign
            ctx.logits = foreign.answered(ctx.x)
        detached: Tensor = ctx.logits.detach()
        return detached

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        with guarded(f"{ctx.foreign.name}: its gradient cannot be computed at {shown(ctx.x, ' NCHW')}"):
            (gradient,) = torch.autograd.grad(ctx.logits, ctx.x, upstream, allow_unused=True)
        if gradient is None:
            raise BadInput(f"{ctx.foreign.name}: {DETACHED}")
        return gradient, None


def shown(x: Tensor, layout: str = "") -> str:
    """`float32 NCHW (2, 3, 8, 8)`."""
    return f"{str(x.dtype).removeprefix('torch.')}{layout} {tuple(x.shape)}"


def without_gradients(foreign: Foreign) -> str:
    """Why no gradient reaches the image; empty where one does."""
    x = noise(foreign.contract, 2).requires_grad_()
    try:
        with torch.enable_grad():
            torch.autograd.grad(foreign(x).sum(), x)
    except BadInput as error:
        return str(error).removeprefix(f"{foreign.name}: ")
    return ""


def state_digest(network: nn.Module) -> str:
    """SHA-256 of a module's state and of the classes it is made of: names, types, shapes and bytes, in sorted order.

    Where the state lies, and what its memory looks like, makes no difference.
    """
    digest = hashlib.sha256()
    for name, part in sorted(network.named_modules()):
        digest.update(f"{name}\0{type(part).__module__}.{type(part).__qualname__}\0".encode())
    for name, value in sorted(network.state_dict().items()):
        for part in parts(value):
            digest.update(f"{name}\0".encode() + part)
    return digest.hexdigest()


def kept(network: nn.Module) -> dict[str, str]:
    """What a module keeps between two calls, a digest by the place: tensors, attributes, also of its class, and the
    plain values that its methods' own files and closures hold. Of values that cannot be told, where they lie."""
    found: dict[str, str] = {}
    told = set[Any]()  # a hundred blocks of one class read the same file
    for name, part in network.named_modules():
        where = f"{name}." if name else ""
        own = {key: value for key, value in vars(part).items() if key not in _OF_TORCH}
        tensors = {**part._parameters, **part._buffers}
        functions = {key: value for key, value in own.items() if callable(value) and hasattr(value, "__code__")}
        shared = {f"{key} of the class": value for key, value in _shared(type(part)).items()}
        for key, value in {**own, **tensors, **shared}.items():
            found[f"{where}{key}"] = _digest(value)
        forward = getattr(type(part), "forward", None)  # a script has none in Python
        for key, function in {**functions, "forward": getattr(forward, "__wrapped__", forward)}.items():
            around = {} if function in told else _around(function)
            found |= {f"{where}{key}: {inner}": _digest(value) for inner, value in around.items()}
            told.add(function)
    return found


_OF_TORCH = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes, list, dict, set, tuple, deque, itertools.count, Tensor, np.ndarray)


def _around(function: Any) -> dict[str, Any]:
    """The plain values that a function of the user's own reads from outside itself."""
    code = getattr(function, "__code__", None)
    if code is None or _of_a_library(function):
        return {}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    closed = {name: cell.cell_contents for name, cell in cells if _filled(cell)}
    globals_ = {name: value for name, value in function.__globals__.items() if not name.startswith("__")}
    return {name: value for name, value in {**globals_, **closed}.items() if isinstance(value, _PLAIN)}


def _shared(kind: type) -> dict[str, Any]:
    """The plain values that all modules of a user's class share, its own and those of its bases."""
    held = {
        name: value for base in reversed(kind.__mro__) if not _of_a_library(base) for name, value in vars(base).items()
    }
    return {name: value for name, value in held.items() if isinstance(value, _PLAIN) and not name.startswith("__")}


def _of_a_library(defined: Any) -> bool:
    # What torch.fx writes lies in no module: its name is None.
    return (getattr(defined, "__module__", None) or "").partition(".")[0] in ("torch", "torchvision", "timm")


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _digest(value: Any) -> str:
    try:
        data = b"".join(parts(value)) if isinstance(value, Tensor) else pickle.dumps(value, protocol=5)
    except Exception:  # noqa: BLE001  # somebody's object: it may forbid pickling in any way
        data = repr(type(value)).encode()
    return hashlib.sha256(data).hexdigest()


def parts(value: Any) -> Iterator[bytes]:
    """The bytes of one entry of a state: a tensor, a tuple of them in quantised layers, or anything picklable."""
    if isinstance(value, Tensor):
        dense = value.detach().cpu()
        dense = (
            dense.dequantize() if dense.is_quantized else dense.to_dense() if dense.layout != torch.strided else dense
        )
        yield f"{value.dtype}\0{tuple(value.shape)}\0".encode()
        yield (
            dense.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy().tobytes()
        )  # in their indices' order
    elif isinstance(value, tuple | list):
        for item in value:
            yield from parts(item)
    else:
        yield pickle.dumps(value, protocol=5)
