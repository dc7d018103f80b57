"""Gradients of a model that came as ONNX: the file as a torch module, proven equal to what ONNX Runtime answers.

The way there: ONNX Runtime folds constants (float16 weights behind a Cast, weights behind an Identity), the uint8 input
is widened to floats in [0, 255] so that its gradient is not lost in a cast, and onnx2pytorch builds the module. It
converts what torch's exporters, old and new, make of torchvision's classifiers, convolutional and transformers, with
logits within 3e-6. Of a quantised file it converts the float twin, which answers nearly alike. It cannot: whole-number
arithmetic on pixels; operators from outside the standard, such as com.microsoft's.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto
from torch import Tensor, nn

from dfmcl.common.errors import DfmclError, lacks_memory
from dfmcl.common.text import first_line
from dfmcl.gating.deferred import deferred
from dfmcl.robustness.contract import InputContract
from dfmcl.robustness.logits import apart
from dfmcl.robustness.onnx_float import NoTwin, float_twin
from dfmcl.robustness.onnx_graph import WHOLE_NUMBERS, Graph, artefact, freed, noise
from dfmcl.robustness.onnx_session import FATAL
from dfmcl.robustness.provider import CPU, Provider

# Of the largest logit. Sums in another order cost up to 3e-6 of it (inception_v3); where a file computes in float16, a
# sum may fall on the other side of a rounding, 5e-4. An operator that means something else is off by a tenth.
TOLERANCE = 1e-3
ROUNDING = 0.15  # of the largest logit: what eight bits an activation cost
IMAGES = 8
# Operators that move pixels and do not change them: behind them an image is still whole numbers from 0 to 255.
MOVES = frozenset({"Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Split"})
INTEGERS = frozenset({TensorProto.UINT8, TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64})


class NoGradients(Exception):
    """Why a file cannot be differentiated: the operator, or what did not come out equal."""


class Converted(nn.Module):
    """Float images `(N, C, H, W)` in [0, 1] to logits `(N, K)`, by an ONNX graph as torch operators."""

    def __init__(self, net: nn.Module, contract: InputContract, batch: int | None, twin: str = "") -> None:
        """twin: how it was made of a file that rounds, which it then only resembles."""
        super().__init__()
        self.net, self.contract, self.batch, self.twin = net, contract, batch, twin

    def forward(self, x: Tensor) -> Tensor:
        images = self.contract.relaxed(x)
        return in_parts(self.net, images, self.batch or 1, self.batch).float()


def in_parts(net: nn.Module, images: Tensor, fewest: int, most: int | None) -> Tensor:
    """The logits of images `(N, ...)` by a network that takes batches of these sizes only; None: as large as they are.

    The last image stands in for the images that the last batch lacks.
    """
    parts = images.split(most) if most else (images,)
    short = max(0, fewest - len(parts[-1]))
    last = torch.cat([parts[-1], parts[-1][-1:].expand(short, *images.shape[1:])]) if short else parts[-1]
    answers = [net(part) for part in (*parts[:-1], last)]
    return (torch.cat(answers) if len(answers) > 1 else answers[0])[: len(images)]


def differentiable(graph: Graph, decide: Callable[[Tensor], Tensor], provider: Provider = CPU) -> Converted:
    """The graph as a module, for gradients; `decide` gives the answers that it must equal, or come near to where the
    graph, or the provider that decides, rounds. NoGradients says why not."""
    with deferred("torchvision", "torchvision.io", "torchvision.ops"):
        from onnx2pytorch import ConvertModel

    warnings.filterwarnings("ignore", "Using a non-tuple sequence", UserWarning)  # onnx2pytorch's Gather, each pass
    free = freed(graph) or graph
    try:
        unrounded, made = float_twin(free.model)
        twin = "; ".join(filter(None, (made, provider.rounds)))
        model = folded(folded(unrounded))  # twice: only after the first does ONNX Runtime cast weights of float16
        if graph.contract.dtype == "uint8":
            widen_input(model.graph, graph.input.name)
        forget_defaults(model.graph)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of attributes it does not know: whether they matter, the answers tell
            net = ConvertModel(model)
            converted = Converted(net, graph.contract, free.batch, twin).eval().requires_grad_(False)
            alike = artefact(replace(free, model=unrounded)) if twin else decide
            _prove_equal(converted, alike)
            if twin:
                _prove_near(alike, decide, graph.contract)
    except DfmclError:
        raise
    except (NoGradients, NoTwin) as error:
        raise NoGradients(f"{error}{_whole(graph)}") from None
    except Exception as error:  # a converter of arbitrary graphs may fail in any way
        if lacks_memory(error):
            raise
        raise NoGradients(f"onnx2pytorch cannot convert it: {first_line(error)}{_whole(graph)}") from None
    return converted


def _whole(graph: Graph) -> str:
    """The operators that compute in whole numbers, as the end of a sentence; nothing where there are none."""
    found = sorted(
        {node.op_type for node in graph.model.graph.node if any(part in node.op_type for part in WHOLE_NUMBERS)}
    )
    return (
        f"; it computes in whole numbers ({', '.join(found)}), which let no gradient pass; quantise it in QDQ format"
        if found
        else ""
    )


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model after ONNX Runtime's basic optimizations, all in standard operators: constants are folded."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = FATAL
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        CPU.session(model.SerializeToString(), options)
        return onnx.load(options.optimized_model_filepath)


def widen_input(graph: onnx.GraphProto, name: str) -> None:
    """Let a uint8 input be floats, in place: what casts it to whole numbers on its way casts it to float instead."""
    moved = {name}
    for node in graph.node:  # in the order in which they run
        if not node.input or node.input[0] not in moved:
            continue
        if node.op_type in MOVES:
            moved |= set(node.output)
        elif node.op_type == "Cast":
            target = next(entry for entry in node.attribute if entry.name == "to")
            if target.i in INTEGERS:
                target.i = TensorProto.FLOAT
                moved |= set(node.output)


def forget_defaults(graph: onnx.GraphProto) -> None:
    """Remove, in place, the training_mode of batch normalisations where it is off: onnx2pytorch does not know it."""
    for node in graph.node:
        if node.op_type == "BatchNormalization":
            kept = [entry for entry in node.attribute if entry.name != "training_mode" or entry.i]
            node.ClearField("attribute")
            node.attribute.extend(kept)


def _prove_near(twin: Callable[[Tensor], Tensor], decide: Callable[[Tensor], Tensor], contract: InputContract) -> None:
    """That a file's roundings move its answers little, so that its twin's gradients are worth following."""
    images = noise(contract, IMAGES)
    if not (difference := apart(decide(images), twin(images))) <= ROUNDING:
        raise NoGradients(
            f"its roundings move its logits by {difference:.2g} of the largest, over {ROUNDING:g}, so that gradients"
            " without them are another model's"
        )


def _prove_equal(converted: Converted, decide: Callable[[Tensor], Tensor]) -> None:
    """That it answers as `decide` does, in batches of several sizes, and that a gradient reaches the image."""
    images = noise(converted.contract, IMAGES)
    expected = decide(images)
    with torch.no_grad():
        found = torch.cat([converted(part) for part in images.split((1, 2, IMAGES - 3))])
    if not (difference := apart(expected, found)) <= TOLERANCE:
        raise NoGradients(
            f"converted by onnx2pytorch its logits differ by {difference:.2g} of the largest, over {TOLERANCE:g}"
        )
    x = images[:2].requires_grad_()
    logits = converted(x)
    if not logits.requires_grad:
        raise NoGradients("no gradient reaches the image: the graph casts to whole numbers on the way")
    torch.autograd.grad(logits.sum(), x)
