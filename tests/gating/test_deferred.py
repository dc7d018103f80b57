"""torchvision is not loaded for a gate that does not need it, and works where something of it is used."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import torch
from dfmcl.gating.deferred import deferred
NAMES = ("torchvision", "torchvision.io", "torchvision.ops")
with deferred(*NAMES):
    import torchvision
    from torchvision.io import ImageReadMode
    from torchvision.ops import nms, roi_align
    import onnx2pytorch
loaded = [name for name in sys.modules if name.partition(".")[0] == "torchvision"]
assert loaded == [], loaded
boxes, scores = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 5], [9, 9, 12, 12]]), torch.tensor([0.9, 0.8, 0.7])
kept = nms(boxes, scores, 0.5)
assert kept.tolist() == [0, 2]
assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [0, 2]
import torchvision.ops, torchvision.io
assert torchvision.ops.nms is not nms
assert ImageReadMode.RGB is torchvision.io.ImageReadMode.RGB
with deferred(*NAMES):
    from torchvision.ops import nms as now
assert now is torchvision.ops.nms
print("done")
"""


def test_what_is_deferred_is_loaded_when_it_is_used() -> None:
    """In a process that has not loaded it: not by imports, also onnx2pytorch's; then each name is the real one."""
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.returncode) == ("done\n", 0), ended.stderr[-2000:]
