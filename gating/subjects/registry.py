"""From what a user names to the subject: which kind it is, and how each kind of `gating/kinds.py` is opened."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dfmcl.common.errors import BadInput
from dfmcl.gating.endpoint import Connect
from dfmcl.gating.kinds import KINDS, ONE_OF
from dfmcl.gating.subject import Subject
from dfmcl.gating.subjects.candidate import candidate_subject
from dfmcl.gating.subjects.endpoint import endpoint_subject
from dfmcl.gating.subjects.module import module_subject
from dfmcl.gating.subjects.onnx_file import onnx_subject
from dfmcl.gating.subjects.program import program_subject
from dfmcl.gating.subjects.torchscript import torchscript_subject
from dfmcl.gating.subjects.weights import weights_subject
from dfmcl.robustness.provider import CPU, Provider
from dfmcl.robustness.weights import is_safetensors

MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
ENDPOINT = re.compile(r"grpc://(?P<url>[^/]+:\d+)/(?P<model>[^/]+)")
OF_TORCH = (".pt", ".pth", ".pt2", ".ts", ".safetensors")
OF_DATA = (".csv", ".npz", ".npy", ".parquet", ".tar", ".jpg", ".jpeg", ".png")
DATA = f"holds images or a list of them, no model; name it with --data, and as the model {ONE_OF}"
PROTOBUF = b"\x08"  # how an ONNX file begins: with the version of its format
PICKLE = b"\x80"  # how one begins; a protobuf never does

COMPUTED = ("candidate", "onnx")  # by ONNX Runtime
OPENED: Mapping[str, Callable[..., Subject]] = {
    "candidate": candidate_subject,
    "onnx": onnx_subject,
    "torchscript": torchscript_subject,
    "program": program_subject,
    "weights": weights_subject,
    "module": module_subject,
    "endpoint": endpoint_subject,
}


def open_subject(
    text: str,
    *,
    run: Path | None = None,
    contract: str | None = None,
    labels: tuple[str, ...] | None = None,
    output: str | None = None,
    arch: str | None = None,
    connect: Connect | None = None,
    budget: int | None = None,
    provider: Provider = CPU,
) -> Subject:
    """The subject that a text names.

    run: a candidate's, where its gradients come from.
    contract, labels: of a foreign model; the others know theirs.
    output: of an ONNX file with several: the name of its scores.
    arch: of a file of weights: its network, torchvision:NAME, timm:NAME or module:callable.
    connect, budget: of an endpoint: how it is reached, and the most images that it is asked about.
    provider: what computes a candidate or an ONNX file.
    """
    kind = kind_of(text)
    options: dict[str, Any] = {
        "run": run, "contract": contract, "labels": labels, "output": output, "arch": arch, "budget": budget
    }  # fmt: skip
    if strange := sorted(key for key in options if options[key] is not None and key not in KINDS[kind].takes):
        raise BadInput(f"{text}: is of kind {kind}, which takes no {' or '.join(strange)}; leave it out")
    if kind not in COMPUTED and provider != CPU:
        raise BadInput(
            f"{text}: is of kind {kind}, which {provider} does not compute; export it to ONNX, as [decide] is for"
            f" {' and '.join(COMPUTED)}, or leave [decide] out"
        )
    known = {key: options[key] for key in KINDS[kind].takes}
    if kind == "endpoint":
        if connect is None or budget is None:
            raise BadInput(f"{text}: an endpoint is asked within a budget of queries; name one")
        place = ENDPOINT.fullmatch(text)
        assert place is not None
        described, predict = connect(place["url"], place["model"])
        return endpoint_subject(described, predict, name=text, budget=budget)
    provided = {"provider": provider} if kind in COMPUTED else {}
    return OPENED[kind](Path(text) if KINDS[kind].file else text, **known, **provided)


def kind_of(text: str) -> str:
    """The name of its kind: of a file by its content, whatever its suffix; BadInput where it names nothing."""
    path = Path(text)
    if ENDPOINT.fullmatch(text):
        return "endpoint"
    if path.is_dir():
        return "candidate"
    if path.exists():
        return file_kind(path)
    if MODULE.fullmatch(text):
        return "module"
    raise BadInput(f"{text}: names no model; expected one of: {ONE_OF}")


def file_kind(path: Path) -> str:
    """onnx for all that is none of the others: its reader says why it is no ONNX either. BadInput where its suffix says
    that it should be one of PyTorch's."""
    start = b""
    try:
        if not path.is_file():
            return "onnx"
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inside = {name.partition("/")[2] or name for name in archive.namelist()}
            if all(name.endswith(".npy") for name in inside):
                raise BadInput(f"{path}: {DATA}")
            if "constants.pkl" in inside:
                return "torchscript"
            return "program" if inside & {"archive_format", "serialized_exported_program.json"} else "weights"
        with path.open("rb") as file:
            start = file.read(1)
        if start == PICKLE or is_safetensors(path):
            return "weights"
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):  # what zipfile makes of broken archives
        pass
    if path.suffix.lower() in OF_DATA and start != PROTOBUF:
        raise BadInput(f"{path}: {DATA}")
    if path.suffix in OF_TORCH:
        raise BadInput(f"{path}: is neither TorchScript, torch.export's nor weights; it was cut, or is something else")
    return "onnx"
