"""The gate's own network is learnt without a byte out of place, whatever layout and threads the machine brings."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from tests.deploying import ROOT

CHECKED = "libc_malloc_debug.so.0"  # glibc's: whoever wrote beyond a block dies where that is freed
LEARN = """
import numpy as np, torch
from dfmcl.robustness.substitute import learnt
from dfmcl.robustness.threats.linf import Linf
torch.set_num_threads(3)
images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
brightness = lambda x: torch.stack([x.flatten(1).mean(1), 1 - x.flatten(1).mean(1)], 1)
learnt(brightness, images, Linf(8 / 255), answers=240, seed=0, device=torch.device("cpu"))
"""
TRAIN = """
import torch
from tests.training.workshop import batch, learner
from dfmcl.robustness.data import load_dataset
torch.set_num_threads(3)
digits = load_dataset("digits")
for width in (8, 12):
    one = learner(digits, f"model.width={width}", "masking.enabled=false")
    for step in (1, 2, 3):
        one.update(*batch(digits, size=64), step)
"""


@pytest.mark.parametrize("what", [LEARN, TRAIN], ids=["substitute", "training"])
def test_no_convolution_writes_past_its_buffer(what: str) -> None:
    """oneDNN does for the weight gradient of narrow shortcuts in channels_last: on AVX512 with more than one thread."""
    try:
        ctypes.CDLL(CHECKED)
    except OSError:
        pytest.skip(f"needs {CHECKED} of glibc")
    environment = {**os.environ, "LD_PRELOAD": CHECKED, "MALLOC_CHECK_": "3", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", what], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
