"""The shipped model as other providers and precisions answer: `make bench-providers DATA=cifar10.npz`.

The gate's own adversarial images are asked again of each (what falls there falls), and a short attack is made anew on
the first images, with gradients of the float32 network and decisions by the provider that would serve. The int8 file is
the shipped one with convolutions and the last layer in QDQ, calibrated on training images. Bounds of differences are
paired: exact for the images that each loses alone, at half of alpha each (Clopper & Pearson 1934, Bonferroni).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from rich.progress import track

from benchmarks.result import write_result
from dfmcl.common.providers import WHOLE, Decider
from dfmcl.gating.conversion import Converted, differentiable, folded
from dfmcl.gating.signing.probes_file import read_probes
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.models import to_float
from dfmcl.robustness.onnx_graph import artefact, read_graph
from dfmcl.robustness.provider import Provider, available, library_version, runtime_version
from dfmcl.robustness.statistics import Flags, PairedCounts, Share, clopper_pearson
from dfmcl.robustness.threats.registry import parse_ball

VERSION = Path("model_repository/resnet18-cifar10/1")
CONTRACT = "uint8 NHWC 32x32x3"
THREAT = "8/255"
BATCH = 50
ASKED = (
    Decider(), Decider("openvino"), Decider("openvino", "bf16"), Decider("cpu", WHOLE), Decider("openvino", WHOLE)
)  # fmt: skip


class Calibration(CalibrationDataReader):  # type: ignore[misc]  # of a library without types
    """Training images in batches."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self.parts: Iterator[NDArray[np.uint8]] = iter(np.array_split(images, 8))

    def get_next(self) -> dict[str, Any] | None:
        part = next(self.parts, None)
        return None if part is None else {"images": part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("cifar10.npz"), help="its training images calibrate")
    parser.add_argument("--images", type=int, default=500, help="the gate's first images, asked again")
    parser.add_argument("--attacked", type=int, default=64, help="the first of them, attacked anew")
    parser.add_argument("--attack", default="apgd-ce-10")
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    probes = {name: array[: arguments.images] for name, array in read_probes(VERSION / "probes.npz").items()}
    with tempfile.TemporaryDirectory() as folder:
        plain, whole = VERSION / "model.onnx", Path(folder) / "int8.onnx"
        quantise(plain, whole, arguments.data, arguments.calibration, arguments.seed)
        graph = read_graph(plain, CONTRACT, whole=True)
        network = differentiable(graph, artefact(graph))
        rows: list[dict[str, Any]] = []
        first: tuple[Flags, Flags] | None = None
        for decider in (one for one in ASKED if one.provider in available()):
            file = whole if decider.precision == WHOLE else plain
            row, held, both = asked(decider, file, network, probes, arguments)
            first = (held, both) if first is None else first
            anew = PairedCounts.of(first[1], both)
            again = {"attacked_lost": anew.only_first, "attacked_won": anew.only_second}
            rows.append({**row, **beside(first[0], held), **again})
            print(rows[-1])
    note = (
        "clean: % right; replayed: % right on the image and on what the gate's attacks on the CPU in fp32 made of it,"
        " with exact bounds, an upper bound for every other row; attacked: % of the first images that also hold under"
        f" {arguments.attack} made anew, decided by the row; agree: % of equal labels on adversarial images; apart:"
        " largest difference of logits from those that the gate recorded, of the largest; lost, won: images beside the"
        " first row; difference: points, with paired bounds, and p of equal shares (McNemar); attacked_lost,"
        " attacked_won: images beside the first row's that were attacked anew"
    )
    conditions = {
        "n": f"{arguments.images} images of the gate's, {arguments.attacked} of them attacked anew",
        "seed": arguments.seed,
        "note": note,
        "runtime": f"{runtime_version()}, OpenVINO {library_version(Decider('openvino'))}",
    }
    worst = min(row["replayed"] for row in rows) - rows[0]["replayed"]
    write_result("providers", "Who decides", rows, {"points_replayed_beside_cpu_fp32_worst": worst}, conditions)


def asked(
    decider: Decider, file: Path, network: Converted, probes: dict[str, Any], arguments: argparse.Namespace
) -> tuple[dict[str, Any], Flags, Flags]:
    """One row; which images hold under the gate's own adversarial ones, and which of the first under both attacks.

    network: gives gradients.
    """
    provider = Provider.of(decider, torch.get_num_threads())
    graph = read_graph(file, CONTRACT, whole=True)
    decide = artefact(graph, provider)
    labels = probes["labels"]
    found = {}
    for name in ("images", "adversarial"):
        parts = to_float(torch.from_numpy(probes[name])).split(BATCH)
        found[name] = torch.cat([decide(part) for part in track(parts, f"{decider}, {name}")]).numpy()
    recorded = {"images": probes["clean_logits"], "adversarial": probes["adversarial_logits"]}
    right = found["images"].argmax(axis=1) == labels
    held = right & (found["adversarial"].argmax(axis=1) == labels)
    share, few = Share(int(held.sum()), len(held)), arguments.attacked
    again = evaluate(
        network,
        probes["images"][:few],
        labels[:few],
        parse_ball(THREAT),
        [Attack.parse(arguments.attack)],
        decide=decide,
        grid=True,
        seed=arguments.seed,
        precision="float32",
        batch_size=BATCH,
    ).evaluation
    both = held[:few] & np.array(again.robust_images, bool)
    apart = max(float(np.abs(found[name] - recorded[name]).max() / np.abs(recorded[name]).max()) for name in found)
    lower, upper = share.bounds
    row = {
        "provider": decider.provider,
        "precision": decider.precision,
        "clean": 100 * float(right.mean()),
        "replayed": 100 * share.value,
        "lower": 100 * lower,
        "upper": 100 * upper,
        "attacked": 100 * float(both.mean()),
        "agree": 100 * float((found["adversarial"].argmax(1) == recorded["adversarial"].argmax(1)).mean()),
        "apart": apart,
    }
    return row, held, both


def beside(first: Flags, held: Flags) -> dict[str, Any]:
    """What a row loses and wins beside the first, and the difference in points with exact paired bounds of 95 %."""
    pair, n = PairedCounts.of(first, held), len(held)
    lost, won = (clopper_pearson(count, n, 0.975) for count in (pair.only_first, pair.only_second))
    return {
        "lost": pair.only_first,
        "won": pair.only_second,
        "difference": 100 * (pair.only_second - pair.only_first) / n,
        "difference_lower": 100 * (won[0] - lost[1]),
        "difference_upper": 100 * (won[1] - lost[0]),
        "p": pair.p,
    }


def quantise(source: Path, target: Path, data: Path, images: int, seed: int) -> None:
    """The same model with convolutions and the last layer in QDQ, weights by channel. data: an .npz with x_train."""
    with np.load(data) as archive:
        training = archive["x_train"]
    chosen = np.random.default_rng(seed).choice(len(training), images, replace=False)
    float32 = target.with_name("folded.onnx")
    onnx.save(folded(folded(onnx.load(source))), float32)  # twice: only after the first are float16 weights constants
    logging.disable(logging.WARNING)  # advice to preprocess the file
    quantize_static(
        float32,
        target,
        Calibration(training[np.sort(chosen)]),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=["Conv", "Gemm"],
    )
    logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
