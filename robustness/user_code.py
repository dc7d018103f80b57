"""Code of a user's, `module:callable`: found, run, and each failure of it told in one line."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfmcl.common.errors import BadInput, DfmclError, lacks_memory
from dfmcl.common.text import first_line

SIGNALLED = (130, 143)  # how a process ends that was asked to by SIGINT or SIGTERM
DETACHED = "no gradient reaches the image: its forward detaches it, or computes outside torch's autograd"


@contextmanager
def guarded(said: str) -> Iterator[None]:
    """Foreign code inside: whatever it raises is BadInput, be it sys.exit or no Exception at all."""
    try:
        yield
    except (KeyboardInterrupt, DfmclError):
        raise
    except BaseException as error:
        if (isinstance(error, SystemExit) and error.code in SIGNALLED) or lacks_memory(error):
            raise  # of the machine: fewer images at once may do
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


def trainable(text: str, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """What `module:callable` returns, as training needs it: float images `(N, C, H, W)` to float32 logits `(N, K)` in
    either mode, with gradients that reach the images. BadInput where a copy of it does anything else.

    input_shape: (H, W, C).
    """
    network = imported(text)
    height, width, channels = input_shape
    shape = (2, channels, height, width)
    for training in (True, False):
        with guarded(f"{text}: cannot take float32 NCHW {shape} in {'training' if training else 'eval'} mode"):
            tried = copy.deepcopy(network).train(training)  # whose batch norms count what they see
            x = torch.full(shape, 0.5, requires_grad=True)
            logits: Any = tried(x)
            if not isinstance(logits, Tensor):
                raise BadInput(
                    f"{text}: its module gives a {type(logits).__name__}; expected a tensor of logits (N, K)"
                )
            if logits.shape != (2, classes) or logits.dtype != torch.float32:
                given = f"{str(logits.dtype).removeprefix('torch.')} {tuple(logits.shape)}"
                raise BadInput(f"{text}: 2 images of {classes} classes gave {given}; expected float32 (2, {classes})")
            if not logits.requires_grad:
                raise BadInput(f"{text}: {DETACHED}")
            (gradient,) = torch.autograd.grad(logits.sum(), x, allow_unused=True)
        if gradient is None:
            raise BadInput(f"{text}: {DETACHED}")
    return network


@torch.no_grad()
def answers(network: nn.Module, input_shape: tuple[int, int, int]) -> Tensor:
    """Logits `(1, K)` to a ramp of grey: what code did when its weights were written down. input_shape: (H, W, C)."""
    height, width, channels = input_shape
    ramp = torch.linspace(0, 1, channels * height * width).view(1, channels, height, width)
    where = next((value.device for value in network.state_dict().values()), ramp.device)
    logits: Tensor = network(ramp.to(where))
    return logits.cpu()
