"""An ONNX classifier as a file: one image input, a row of scores an image, weights inside; answers by ONNX Runtime."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor

from dfmcl.common.errors import BadInput, lacks_memory
from dfmcl.common.providers import FULL, WHOLE, Decider
from dfmcl.common.reader import Unfit, read_plain, why_unread
from dfmcl.common.text import first_line
from dfmcl.robustness.contract import InputContract
from dfmcl.robustness.logits import apart
from dfmcl.robustness.onnx_float import by_batch, constants_of
from dfmcl.robustness.onnx_head import Head, headed
from dfmcl.robustness.onnx_random import random_operators
from dfmcl.robustness.onnx_session import asked, observed, opened
from dfmcl.robustness.onnx_tensors import all_tensors, require_whole
from dfmcl.robustness.provider import CPU, Provider

WHOLE_NUMBERS = ("Quantize", "QLinear", "Integer")  # in the names of operators that compute in whole numbers
FREE = "batch"  # the name of a dimension of any size
DOMAINS = ("", "ai.onnx")  # two names of the standard operators
# What the types of images are called in a contract.
TYPES = {
    TensorProto.UINT8: "uint8",
    TensorProto.FLOAT: "float32",
    TensorProto.DOUBLE: "float64",
    TensorProto.FLOAT16: "float16",
}
# Two forms of one file sum float32 in the same order, or nearly; a wrong axis or a mixed batch is off by a tenth.
SAME = 1e-4
MOST_BYTES = 2**31  # what protobuf can hold


@dataclass(frozen=True)
class Graph:
    """A classifier's file that was read and understood.

    model: with all weights inside, also where the file keeps them beside itself, and with logits as its one output.
    digest: SHA-256 of the file, or of the model in whole where its weights lie elsewhere. batch: the only batch size it
    takes, None where it takes any. head: how the file itself ends; as_it_came: whether it ends as the model does;
    whole: whether it is asked as it is served. scored: where its end was left out, the model that ends in the file's
    own scores.
    """

    path: Path
    model: onnx.ModelProto
    digest: str
    contract: InputContract
    batch: int | None
    head: Head
    as_it_came: bool
    whole: bool = False
    scored: onnx.ModelProto | None = None

    @property
    def input(self) -> onnx.ValueInfoProto:
        """Its only input: an initializer that older files list among them is none."""
        return _inputs(self.model.graph)[0]

    @property
    def output(self) -> onnx.ValueInfoProto:
        return self.model.graph.output[0]

    @property
    def opset(self) -> int:
        return int(next(entry.version for entry in self.model.opset_import if entry.domain in DOMAINS))


def read_graph(
    path: Path, contract: str = "", output: str | None = None, classes: int | None = None, *, whole: bool = False
) -> Graph:
    """Read an ONNX classifier; BadInput where it is none, or draws random numbers.

    contract: see InputContract.parse; the file gives what it leaves out.
    output: the name of its scores, where it has several outputs; else the one of K columns. classes: K, where known.
    whole: keep its end as it is, because it is served so.
    """
    data = _read(path)
    try:
        model = onnx.load_model_from_string(data)
        outside = any(onnx.external_data_helper.uses_external_data(tensor) for tensor in model.graph.initializer)
        model = onnx.load(path) if outside else model
        if any(map(onnx.external_data_helper.uses_external_data, all_tensors(model))):
            raise BadInput(
                f"{path}: a node's value lies in another file, which is read from elsewhere when it is served"
            )
        if random := random_operators(model):
            raise BadInput(f"{path}: draws random numbers ({', '.join(random)}); export it without, in eval mode")
        require_whole(model, path)
    except BadInput:
        raise
    except Exception as error:  # protobuf and onnx raise their own unrelated classes
        if lacks_memory(error):
            raise
        raise BadInput(f"{path}: not readable as ONNX: {first_line(error)}") from None
    if not model.graph.node or not any(entry.domain in DOMAINS for entry in model.opset_import):
        raise BadInput(f"{path}: not readable as ONNX: no operators in it; export the model again")
    inputs = _inputs(model.graph)
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs)
        raise BadInput(f"{path}: has {len(inputs)} inputs ({names}); export it with one image input")
    dims = _dims(inputs[0])
    parsed = InputContract.parse(contract, dims or (), TYPES.get(inputs[0].type.tensor_type.elem_type, "float32"))
    parsed = replace(parsed, dtype=_dtype(inputs[0], parsed, path))
    digest = hashlib.sha256(model.SerializeToString(deterministic=True) if outside else data).hexdigest()
    batch = dims[0] if dims else None
    images = parsed.wire(torch.zeros(batch or 2, parsed.channels, parsed.height, parsed.width)).numpy()
    head, scored = Head("", ""), None
    ended = model
    if not whole:
        ended, head, scored = headed(model, images, path, output=output, classes=classes)
    elif len(model.graph.output) != 1:
        raise BadInput(f"{path}: has {len(model.graph.output)} outputs, a served file has one; export it again")
    return Graph(path, ended, digest, parsed, batch, head, ended is model, whole, scored)


def count_classes(answer: Callable[[Tensor], Tensor], contract: InputContract, where: object) -> int:
    """K, found by asking for two images; BadInput where what comes back is not one row of scores an image."""
    height, width, channels = contract.shape
    scores = answer(torch.zeros(2, channels, height, width))
    if scores.ndim != 2 or len(scores) != 2 or scores.shape[1] < 2 or not scores.is_floating_point():
        found = f"{str(scores.dtype).removeprefix('torch.')} {tuple(scores.shape)}"
        raise BadInput(f"{where}: 2 images gave {found}; a classifier gives one row of float logits an image, (N, K)")
    return int(scores.shape[1])


def artefact(graph: Graph, provider: Provider = CPU) -> Callable[[Tensor], Tensor]:
    """The file as the decider: float images (N, C, H, W) in [0, 1], sent as it takes them through ONNX Runtime.

    Returns logits (N, K) float32. A file of a fixed batch size is asked in parts of that size, one that chooses its
    scales by the batch image by image, but as it is served. BadInput where ONNX Runtime cannot load it, it cannot take
    these images, or the provider computes it otherwise than it is called.
    """
    where, contract = graph.path, graph.contract
    example = contract.wire(noise(contract, graph.batch or 2)).numpy()
    model = graph.model.SerializeToString()
    session = opened(model, where, contract.dtype, provider, example=example)
    require_precision(graph, provider, session, example)
    (entry,) = session.get_inputs()
    size = entry.shape[0] if entry.shape and isinstance(entry.shape[0], int) else None
    if size is None and not graph.whole and by_batch(graph.model):
        size = 1

    def run(images: NDArray[Any]) -> NDArray[Any]:
        (logits,) = asked(session, images, where, f"{contract} x {len(images)}")
        return logits

    def decide(x: Tensor) -> Tensor:
        images = contract.wire(x.cpu()).numpy()
        if size is None:
            logits = run(images)
        else:
            filled = np.concatenate([images, np.repeat(images[-1:], -len(images) % size, axis=0)])
            parts = [run(filled[start : start + size]) for start in range(0, len(filled), size)]
            logits = np.concatenate(parts)[: len(images)]
        return torch.from_numpy(logits.astype(np.float32) if np.issubdtype(logits.dtype, np.floating) else logits)

    return decide


def require_precision(graph: Graph, provider: Provider, session: ort.InferenceSession, example: NDArray[Any]) -> None:
    """BadInput where the precision that a policy names is not the one in which the file is computed.

    Whole numbers are in the file or nowhere. A provider without units for fewer bits computes in float32 and says
    nothing, so its answers to `example` must differ from those in float32.
    """
    decider = provider.decider
    if decider is None or decider == CPU.decider:
        return
    rounded = any(any(part in node.op_type for part in WHOLE_NUMBERS) for node in graph.model.graph.node)
    if decider.precision == WHOLE and not rounded:
        raise BadInput(
            f"{graph.path}: decide.precision is {WHOLE}, and the file is not quantised; bring one that is, in QDQ"
        )
    if rounded and decider.precision != WHOLE:
        raise BadInput(f"{graph.path}: is quantised, and decide.precision is {decider.precision}; say {WHOLE}")
    if not decider.rounds:
        return
    full = Provider.of(Decider(decider.provider))
    model = graph.model.SerializeToString()
    plain = opened(model, graph.path, graph.contract.dtype, full, example=example)
    one, other = (asked(each, example, graph.path, "noise")[0] for each in (session, plain))
    if np.array_equal(one, other):
        raise BadInput(
            f"{graph.path}: decide.precision is {decider.precision}, and {decider.provider} computes in {FULL}: this"
            " processor has no units for fewer bits"
        )


def freed(graph: Graph) -> Graph | None:
    """The same classifier for batches of any size; None where its batch size is built into it.

    Exporters write the example's batch size into the input, the output and the shapes of Reshape operators. That the
    rewritten file answers batches as the old one does is proven with ONNX Runtime.
    """
    if graph.batch is None:
        return graph
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    constants = constants_of(model.graph)
    reshapes = [node for node in model.graph.node if node.op_type == "Reshape" and node.input[1] in constants]
    sizes = _sizes(graph, [node.input[0] for node in reshapes if node.input[0] not in constants])
    for number, node in enumerate(reshapes):
        shape = constants[node.input[1]]
        literal = any(flag.name == "allowzero" and flag.i for flag in node.attribute)  # a 0 then means no pixels
        if len(shape) and shape[0] == graph.batch == sizes.get(node.input[0]) and not (literal and -1 in shape):
            name = f"{node.input[1]}.free{number}"
            # 0: as many as in the tensor that is reshaped; -1: what the others leave
            first = np.full(1, -1 if literal else 0, np.int64)
            model.graph.initializer.append(numpy_helper.from_array(np.concatenate([first, shape[1:]]), name))
            node.input[1] = name
    for value in (_inputs(model.graph)[0], model.graph.output[0]):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = FREE
    model.graph.ClearField("value_info")
    free = replace(graph, model=model, batch=None)
    return free if _same_answers(graph, free) else None


def noise(contract: InputContract, images: int, seed: int = 0) -> Tensor:
    """Images to compare two forms of a model on, (N, C, H, W) on the uint8 grid: half are noise, half are smooth."""
    height, width, channels = contract.shape
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(images, channels, 3, 3, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    rough = torch.rand(images, channels, height, width, generator=generator)
    mixed = torch.where(torch.arange(images).view(-1, 1, 1, 1) % 2 == 0, smooth, rough)
    return (mixed * 255).round() / 255


def _same_answers(graph: Graph, free: Graph) -> bool:
    before, after = (artefact(form) for form in (graph, free))
    images = noise(graph.contract, (graph.batch or 1) + 2)
    expected = before(images)
    try:
        return all(apart(expected[:size], after(images[:size])) <= SAME for size in (1, len(images)))
    except BadInput:
        return False


def _sizes(graph: Graph, names: list[str]) -> dict[str, int]:
    """The first size of inner tensors, by name: as they are, for what exporters declare is full of gaps."""
    inner = sorted(set(names) - {graph.output.name, graph.input.name})
    images = graph.contract.wire(noise(graph.contract, graph.batch or 1)).numpy()
    first = {
        name: value.shape[0] for name, value in observed(graph.model, inner, images, graph.path).items() if value.ndim
    }
    return {**first, graph.input.name: graph.batch or 1}


def _inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    held = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in held]


def _dtype(value: onnx.ValueInfoProto, declared: InputContract, path: Path) -> str:
    """What the file takes; BadInput where that is not as declared. One that rounds to float16 may be called float32."""
    held = value.type.tensor_type.elem_type
    dtype = TYPES.get(held)
    if dtype is None:
        name = TensorProto.DataType.Name(held).lower()
        raise BadInput(
            f"{path}: its input {value.name!r} is {name}; images come as {', '.join(TYPES.values())}, so export it with"
            " one of these"
        )
    if declared.dtype != dtype and (declared.dtype, dtype) != ("float32", "float16"):
        raise BadInput(
            f"{path}: its input {value.name!r} is {dtype}, not {declared.dtype}; declare it as it is: --input"
            f" '{' '.join(filter(None, (dtype, declared.layout, str(declared.scale))))}'"
        )
    return dtype


def _dims(value: onnx.ValueInfoProto) -> list[int | None]:
    """The sizes a file declares, None where one is open; empty where it declares no shape."""
    return [dim.dim_value if dim.dim_value > 0 else None for dim in value.type.tensor_type.shape.dim]


def _read(path: Path) -> bytes:
    try:
        return read_plain(path, MOST_BYTES, named=True)
    except (OSError, Unfit) as error:
        raise BadInput(f"{path}: cannot be read: {why_unread(error)}") from None
