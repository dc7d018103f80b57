"""A module's answers in a process that knows nothing of the gate: torch, numpy and the module are all that is there.

A model that knows how often it was asked, or who asks, starts anew there, and must answer as it answered the gate.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfmcl.common.errors import BadInput

SECONDS = 600
# Images come through standard input and logits leave through standard output; a module may print, to standard error.
SCRIPT = """
import importlib, io, sys
import numpy, torch

answers, sys.stdout = sys.stdout.buffer, sys.stderr
module, _, names = sys.argv[1].partition(":")
made = importlib.import_module(module)
for name in names.split("."):
    made = getattr(made, name)
asked = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=True)
images, network = asked["images"], made()
if asked["state"]:
    network.load_state_dict(asked["state"])
network = network.to(images.dtype).eval()
with torch.no_grad():
    logits = torch.cat([network(part.clone()) for part in images.split(7)])
numpy.save(answers, logits.float().numpy())
"""


def asked_afresh(name: str, images: NDArray[Any], state: Mapping[str, Tensor] | None = None) -> NDArray[np.float32]:
    """Logits `(n, K)` by the module that `name`, MODULE:CALLABLE, makes in a new process.

    images: floats `(n, ...)` of the dtype and the shape that the module takes. state: its weights, where it was made
    without. BadInput where it gives no logits.
    """
    buffer = io.BytesIO()
    torch.save({"images": torch.from_numpy(images), "state": dict(state or {})}, buffer)
    where = f"{name}: asked in a new process"
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, name],
            input=buffer.getvalue(),
            capture_output=True,
            timeout=SECONDS,
            check=True,
        )
        found: NDArray[np.float32] = np.load(io.BytesIO(done.stdout), allow_pickle=False)
    except subprocess.TimeoutExpired:
        raise BadInput(f"{where}, it gives no answer within {SECONDS} s") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise BadInput(f"{where}, it fails: {said[-1]}") from None
    except (ValueError, EOFError):
        raise BadInput(f"{where}, it gives no logits") from None
    if found.ndim != 2 or len(found) != len(images):
        raise BadInput(f"{where}, {len(images)} images gave logits of shape {found.shape}; expected (N, K)")
    return found
