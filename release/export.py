"""From a checkpoint, or an ONNX file, to a candidate: ONNX that takes images as they come, proven equal to its source.

The graph takes uint8 (N, H, W, C) with any N and returns float32 logits (N, K); cast, transpose and normalisation are
inside, masks are off, no operator draws random numbers, and nothing in it tells where it was made. Weights may be
stored as float16, which halves the file; all is computed in float32, as ONNX Runtime folds the casts when it loads.
A foreign file computes as it came; missing parts are put around it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from dfmcl.common.errors import BadInput, Broken, Refused
from dfmcl.common.files import sha256_of, whole_directory
from dfmcl.common.preprocessing import USUAL, Preprocessing
from dfmcl.common.progress import Track, silent
from dfmcl.release.candidate import (
    AS_THEY_CAME,
    INPUT,
    LABELS,
    MANIFEST,
    MODEL,
    OUTPUT,
    WEIGHTS,
    Manifest,
    Parity,
    labels_text,
    write_manifest,
)
from dfmcl.release.graphs import require_no_paths, store_as_float16, strip
from dfmcl.robustness.attacks.registry import pgd
from dfmcl.robustness.contract import InputContract
from dfmcl.robustness.data import open_dataset
from dfmcl.robustness.models import Classifier, frozen, to_bytes, to_float
from dfmcl.robustness.onnx_float import DYNAMIC, by_batch
from dfmcl.robustness.onnx_graph import Graph, artefact, count_classes, freed, noise, read_graph
from dfmcl.robustness.onnx_labels import OwnLabels
from dfmcl.robustness.onnx_random import random_operators
from dfmcl.robustness.onnx_wire import with_wire_format
from dfmcl.robustness.provenance import now, versions
from dfmcl.robustness.provider import CPU
from dfmcl.robustness.runs import Run, load_run
from dfmcl.robustness.seeds import generator
from dfmcl.robustness.threats.registry import threat_of
from dfmcl.robustness.user_code import guarded

OPSET = 20  # the newest that ONNX Runtime 1.20, the oldest we allow, and Triton 24.10 both run
OLDEST_OPSET = 7  # that ONNX Runtime promises to run
IR_VERSION = 10  # of the file format, likewise
PARITY_IMAGES = 64  # clean ones, and as many adversarial ones
PARITY_BATCH = 32  # more than one batch, and none of the example's size, so that a wrong dynamic axis shows
PARITY_STEPS = 5  # enough to leave the data; this measures arithmetic, not robustness
# Of the largest logit: fused and unfused convolutions sum float32 in another order, measured at about 1e-6 of it.
RELATIVE_TOLERANCE = 1e-4
# Where a file takes float16, ONNX Runtime may skip the first rounding once the wrapper is there: measured 3e-4.
HALF_TOLERANCE = 2e-3
# What rounding to float16 may cost: 2 of 128 labels, half of them of adversarial images, which lie at the border.
MIN_LABEL_AGREEMENT = 0.98


class WireModel(nn.Module):
    """The classifier behind its wire format."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(to_float(images))
        return logits


def unsaid(line: str) -> None:
    """Says nothing."""


def export(
    run: Path,
    out: Path,
    *,
    weights: str = "float32",
    code: str = "",
    track: Track = silent,
    log: Callable[[str], None] = unsaid,
) -> dict[str, object]:
    """Write the candidate directory of a run and return its manifest; `out` is there in whole, or not at all.

    weights: float32 or float16, how they are stored.
    code: the `module:callable` of the run's network, where it is made by one.
    track, log: where progress and remarks go.

    BadInput (2): a run that does not hold, or is a packed surrogate,
    or an `out` that exists and is no candidate. Refused (1): a graph with random operators, or labels that change when
    weights are rounded. Broken (5): ONNX Runtime and the checkpoint disagree beyond the tolerance, or the disk fails.
    """
    if weights not in WEIGHTS:
        raise BadInput(f"weights are {weights!r}; choose one of {', '.join(WEIGHTS)}")
    source = load_run(run, code=code)
    if "origin" in source.manifest:  # a watch knows served weights by the digest of the run they were exported from
        raise BadInput(f"{run}: is a packed surrogate; export the run it was packed from")
    labels = labels_text(source.classes)
    stored = source.model if weights == "float32" else rounded(source.model)
    with whole_directory(out, names=(MODEL, LABELS, MANIFEST)) as staged:
        for _ in track((MODEL,), "converting to ONNX", 1):
            with guarded(f"{run}: {code} cannot be converted to ONNX") if code else nullcontext():
                model = to_onnx(stored, source.input_shape)
        if random := random_operators(model):
            raise Refused(f"{run}: its graph draws random numbers ({', '.join(random)}); a served model must not")
        strip(model)
        require_no_paths(model)
        if weights == "float16":
            store_as_float16(model)
            onnx.checker.check_model(model)
        (staged / MODEL).write_bytes(model.SerializeToString(deterministic=True))
        (staged / LABELS).write_text(labels, encoding="utf-8")
        parity = compare(source, stored, staged / MODEL, track, log)
        manifest = Manifest(
            created=now(),
            files={name: sha256_of(staged / name) for name in (MODEL, LABELS)},
            labels=source.classes,
            input_shape=source.input_shape,
            checkpoint_sha256=source.checkpoint_sha256,
            parity=parity,
            opset=OPSET,
            weights=weights,
            versions=versions(),
            preprocessing=Preprocessing.parse(source.data.get("preprocessing", "")),
        )
        write_manifest(staged, manifest)
    return manifest.to_json()


def wrap(
    file: Path,
    out: Path,
    *,
    contract: str,
    labels: tuple[str, ...],
    output: str | None = None,
    preprocessing: Preprocessing = USUAL,
    track: Track = silent,
) -> dict[str, object]:
    """Write the candidate directory of a foreign ONNX classifier and return its manifest; as `export` in all else.

    contract: what images the file takes, see InputContract.parse.
    labels: K names in the order of its logits.
    output: the name of its scores, where it has several outputs.
    preprocessing: how pictures become images of its size.
    A file that takes images as they come and gives logits, under our names, is kept byte for byte. BadInput (2): no
    such classifier, one that draws random numbers, one whose softmax or sigmoid hides its labels, or labels that are
    not as many as the logits. Refused (1): a batch size that is built in, scales that the batch chooses, operators too
    new or too old to be served.
    """
    graph = read_graph(file, contract, output, len(labels))
    preprocessing.require_side(max(graph.contract.height, graph.contract.width))
    if by_batch(graph.model):
        raise Refused(
            f"{file}: chooses its scales by the whole batch ({DYNAMIC}), so that an answer depends on the images of"
            " others in the same request; quantise it statically"
        )
    if not OLDEST_OPSET <= graph.opset <= OPSET:
        raise Refused(f"{file}: opset {graph.opset} is not served everywhere; export it with opset {OPSET}")
    original = artefact(graph)
    classes = count_classes(original, graph.contract, file)
    if len(labels) != classes:
        raise BadInput(f"{file}: answers with {classes} logits, there are {len(labels)} labels; one belongs to each")
    if (own := OwnLabels.of(graph, original)) is not None:
        own.require(noise(graph.contract, PARITY_IMAGES), "of smooth colours and noise")
    free = freed(graph)
    if free is None:
        raise Refused(
            f"{file}: takes batches of {graph.batch} only, and cannot be freed; export it with a dynamic batch"
        )
    text = labels_text(labels)
    with whole_directory(out, names=(MODEL, LABELS, MANIFEST)) as staged:
        data = file.read_bytes()
        if not (_served_as_is(graph) and hashlib.sha256(data).hexdigest() == graph.digest):
            model = with_wire_format(free, classes, INPUT, OUTPUT)
            model.ir_version = IR_VERSION
            strip(model)
            onnx.checker.check_model(model)
            data = model.SerializeToString(deterministic=True)
        (staged / MODEL).write_bytes(data)
        (staged / LABELS).write_text(text, encoding="utf-8")
        manifest = Manifest(
            created=now(),
            files={name: sha256_of(staged / name) for name in (MODEL, LABELS)},
            labels=labels,
            input_shape=graph.contract.shape,
            checkpoint_sha256=None,
            parity=compare_with_original(graph, original, staged / MODEL, track),
            opset=graph.opset,
            weights=AS_THEY_CAME,
            versions=versions(),
            origin_sha256=graph.digest,
            origin_input=graph.contract.to_json(),
            preprocessing=preprocessing,
        )
        write_manifest(staged, manifest)
    return manifest.to_json()


def compare_with_original(graph: Graph, original: Callable[[Tensor], Tensor], model: Path, track: Track) -> Parity:
    """How far the wrapped file's logits are from the original's, on smooth images and noise; Broken over tolerance."""
    session = CPU.session(model)
    expected, found = [], []
    parts = noise(graph.contract, PARITY_IMAGES).split((1, PARITY_BATCH - 1, PARITY_IMAGES - PARITY_BATCH))
    for part in track(parts, "comparing with the original", len(parts)):
        expected.append(original(part).numpy())
        found.append(session.run([OUTPUT], {INPUT: to_bytes(part).numpy()})[0])
    before = np.concatenate(expected)
    _require_finite(before, f"{graph.path}: its", "of smooth colours and noise")
    difference, agreement = _apart(before, np.concatenate(found))
    half = graph.contract.dtype == "float16"
    tolerance = (HALF_TOLERANCE if half else RELATIVE_TOLERANCE) * float(np.abs(before).max())
    if not difference <= tolerance:  # so that NaN is refused too
        raise Broken(
            f"{graph.path}: wrapped, its logits differ by {difference:.3g}, over the tolerance {tolerance:.3g}; nothing"
            " was written: check the versions of onnx and onnxruntime"
        )
    return Parity(PARITY_IMAGES, difference, agreement, tolerance, difference, agreement)


def _served_as_is(graph: Graph) -> bool:
    contract, answer = graph.contract, graph.output.type.tensor_type.elem_type
    return (
        contract == InputContract(*contract.shape)
        and (graph.input.name, graph.output.name) == (INPUT, OUTPUT)
        and answer == TensorProto.FLOAT
        and graph.batch is None
        and graph.as_it_came
        and graph.model.ir_version <= IR_VERSION
    )


def rounded(classifier: Classifier) -> nn.Module:
    """A twin with batch normalisation folded into the convolutions and every matrix and kernel rounded to float16.

    Folded first, as the exporter folds too, and what it folded after rounding would no longer be float16. All stays
    float32; biases and normalisation keep their digits, as they are a hundredth of the bytes. BadInput where the
    network cannot be traced.
    """
    try:
        twin = fuse(classifier.eval())
    except torch.fx.proxy.TraceError as error:
        raise BadInput(f"model {classifier.spec.arch}: {error}; export with --weights float32") from None
    with torch.no_grad():
        for weight in (parameter for parameter in twin.parameters() if parameter.ndim > 1):
            weight.copy_(weight.half())
    return twin


def to_onnx(classifier: nn.Module, input_shape: tuple[int, int, int]) -> onnx.ModelProto:
    """A classifier of images (H, W, C) as one ONNX model with a free batch size."""
    example = torch.zeros(2, *input_shape, dtype=torch.uint8)  # 2: the exporter takes a 1 for a constant
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter, which we cannot act on
        program = torch.onnx.export(
            WireModel(classifier).eval(),
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:
        raise Broken("torch.onnx.export returned no program; check the versions of torch and onnxscript")
    model: onnx.ModelProto = program.model_proto
    onnx.checker.check_model(model)
    return model


def compare(run: Run, stored: nn.Module, model: Path, track: Track, log: Callable[[str], None] = unsaid) -> Parity:
    """How far ONNX Runtime's logits are from those of `stored`, whose weights are the model's, and of the checkpoint.

    On clean and adversarial images of the run's test set. Raises Broken where they differ from `stored` by more than
    the tolerance, Refused where rounding changes labels, BadInput where the data do not fit the model.
    """
    data = run.data
    fitted = data.get("preprocessing", "")
    dataset = open_dataset(data["name"], data.get("path", ""), data.get("image_size", 0), track, preprocessing=fitted)
    if dataset.remark:
        log(dataset.remark)
    if dataset.input_shape != run.input_shape:
        raise BadInput(
            f"{run.path}: takes images of {run.input_shape}, its data set {dataset.name} has {dataset.input_shape}"
        )
    threat = threat_of("linf", run.manifest.get("config", {}).get("curriculum", {}).get("beta", "8/255"))
    session = CPU.session(model)
    images = torch.from_numpy(dataset.x_test[:PARITY_IMAGES])
    labels = torch.from_numpy(dataset.y_test[:PARITY_IMAGES])
    trained, expected, found = [], [], []
    starts = range(0, len(images), PARITY_BATCH)
    with frozen(run.model), frozen(stored):
        for start in track(starts, "comparing with ONNX Runtime", len(starts)):
            clean, y = images[start : start + PARITY_BATCH], labels[start : start + PARITY_BATCH]
            x = to_float(clean)
            x_adv = pgd(run.model, x, y, threat, generator=generator(0, "parity", start), steps=PARITY_STEPS)
            for batch in (clean, to_bytes(threat.to_uint8(x_adv, x))):
                with torch.no_grad():
                    trained.append(run.model(to_float(batch)).numpy())
                    expected.append(stored(to_float(batch)).numpy())
                found.append(session.run([OUTPUT], {INPUT: batch.numpy()})[0])
    _require_finite(np.concatenate(trained), f"{run.path}: its", "of the test set, half of them adversarial")
    exported = np.concatenate(found)
    difference, agreement = _apart(np.concatenate(expected), exported)
    rounding, kept = _apart(np.concatenate(trained), exported)
    tolerance = RELATIVE_TOLERANCE * float(np.abs(np.concatenate(expected)).max())
    if not difference <= tolerance:  # so that NaN is refused too
        raise Broken(
            f"{run.path}: ONNX Runtime's logits differ from the checkpoint's by {difference:.3g}, over the tolerance "
            f"{tolerance:.3g}; nothing was written: check the versions of torch, onnxscript and onnxruntime"
        )
    if kept < MIN_LABEL_AGREEMENT:
        raise Refused(
            f"{run.path}: rounded to float16, its weights give the same label on only {100 * kept:.1f} % of "
            f"{len(exported)} images; export with --weights float32"
        )
    return Parity(len(exported), difference, agreement, tolerance, rounding, kept)


def _require_finite(logits: npt.NDArray[np.float32], whose: str, images: str) -> None:
    """Refused where a model does not answer each image with numbers (N, K): nobody could serve that."""
    if wild := int((~np.isfinite(logits)).any(axis=1).sum()):
        raise Refused(
            f"{whose} logits are not finite for {wild} of {len(logits)} images {images}; nothing was written: look for"
            " weights that are not, for a division by zero or an overflow in it"
        )


def _apart(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Largest difference of two arrays of logits (N, K), and the share of equal labels."""
    equal = one.argmax(axis=1) == other.argmax(axis=1)
    return float(np.abs(one - other).max()), float(equal.mean())
