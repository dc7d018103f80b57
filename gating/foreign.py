"""A module of somebody else's code: kept from harming its judge, and each of its failures told in one line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustness.contract import DTYPES, InputContract
from robustness.errors import BadInput, DfmclError
from robustness.graph import first_line, noise

DETACHED = "no gradient reaches the image: its forward detaches it, or computes outside torch's autograd"
SIGNALLED = (130, 143)  # how a process ends that was asked to by SIGINT or SIGTERM


class Foreign(nn.Module):
    """Float images `(N, C, H, W)` in [0, 1] to float32 logits `(N, K)`, by a module in eval mode.

    It gets a contiguous copy, because a `view` needs the one and an operation in place would reach our images
    without the other. BadInput where it fails or gives anything else, whatever it raises.
    """

    def __init__(self, module: nn.Module, contract: InputContract, name: str) -> None:
        super().__init__()
        self.dtype = torch.float32 if contract.dtype == "uint8" else DTYPES[contract.dtype]
        self.module, self.contract, self.name = module.to(self.dtype), contract, name
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        copied = x.to(self.dtype).clone(memory_format=torch.contiguous_format)
        with guarded(f"{self.name}: its module cannot take {shown(copied, ' NCHW')}"):
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


def shown(x: Tensor, layout: str = "") -> str:
    """`float32 NCHW (2, 3, 8, 8)`."""
    return f"{str(x.dtype).removeprefix('torch.')}{layout} {tuple(x.shape)}"


@contextmanager
def guarded(said: str) -> Iterator[None]:
    """Somebody else's code inside: whatever it raises is BadInput, be it sys.exit or no Exception at all."""
    try:
        yield
    except (KeyboardInterrupt, DfmclError):
        raise
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in SIGNALLED:
            raise
        raise BadInput(f"{said}: {type(error).__name__}: {first_line(error)}") from None
    finally:
        torch.set_default_dtype(torch.float32)  # ours are float32, whatever it has set


def imported(text: str) -> nn.Module:
    """What `module:callable` returns, looked for beside the user first. BadInput where that is no nn.Module."""
    module, _, name = text.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        with guarded(f"{text}: cannot be made"):
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
            network = found()
    finally:
        sys.path.remove(here)
    if not isinstance(network, nn.Module):
        raise BadInput(f"{text}: returned a {type(network).__name__}; it must return a torch.nn.Module")
    return network


def without_gradients(foreign: Foreign) -> str:
    """Why no gradient reaches the image; empty where one does."""
    x = noise(foreign.contract, 2).requires_grad_()
    try:
        with torch.enable_grad():
            torch.autograd.grad(foreign(x).sum(), x)
    except BadInput as error:
        return str(error).removeprefix(f"{foreign.name}: ")
    except RuntimeError as error:
        return f"its gradient cannot be computed: {first_line(error)}"
    return ""
