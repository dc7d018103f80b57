"""Who may decide what a model answers: ONNX Runtime's execution providers, by the names that policies give them.

One table for the gate, the promotion and the server: what decides is asked with the very options that serve. They are
documented at onnxruntime.ai/docs/execution-providers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

FULL = "fp32"
WHOLE = "int8"  # of a file that is quantised itself: no option makes integers of a float file
PRECISIONS = (FULL, "bf16", "fp16", WHOLE)
TF32_VARIABLE = "NVIDIA_TF32_OVERRIDE"


@dataclass(frozen=True)
class Decider:
    """The provider that decides, its precision, and whether it may round factors to TF32."""

    provider: str = "cpu"
    precision: str = FULL
    tf32: bool = False

    @property
    def kind(self) -> ProviderKind:
        return PROVIDERS[self.provider]

    @property
    def rounds(self) -> bool:
        """Whether it computes in floats of less than 24 bits."""
        return self.tf32 or self.precision not in (FULL, WHOLE)

    @property
    def trouble(self) -> str:
        """Why there is no such decider; empty where there is."""
        if self.provider not in PROVIDERS:
            return f"provider: {self.provider!r} is none of {', '.join(PROVIDERS)}"
        if self.precision not in self.kind.precisions:
            return f"precision: {self.provider} has {', '.join(self.kind.precisions)}, and no {self.precision!r}"
        if self.tf32 and not self.kind.gpu:
            return f"tf32: {self.provider} has none; leave it out"
        return ""

    def asked(self, threads: int = 0) -> list[tuple[str, dict[str, str]]]:
        """The providers of a session with their options, the one that decides first, then those behind it.

        threads: of one inference; 0: ONNX Runtime's own choice.
        """
        behind = [Decider(name, tf32=self.tf32) for name in self.kind.behind]
        return [(one.kind.onnxruntime, one.kind.options(one, threads)) for one in (self, *behind)]

    def __str__(self) -> str:
        return f"{self.provider}, {self.precision}{' with TF32' if self.tf32 else ''}"


Options = Callable[[Decider, int], dict[str, str]]


def _none(decider: Decider, threads: int) -> dict[str, str]:
    return {}


def _openvino(decider: Decider, threads: int) -> dict[str, str]:
    # Said also in fp32: a processor with bfloat16 units may use them where nobody says otherwise.
    hint = {"INFERENCE_PRECISION_HINT": "bf16" if decider.precision == "bf16" else "f32"}
    if threads:
        hint["INFERENCE_NUM_THREADS"] = str(threads)
    return {"device_type": "CPU", "load_config": json.dumps({"CPU": hint})}


def _cuda(decider: Decider, threads: int) -> dict[str, str]:
    return {"use_tf32": str(int(decider.tf32))}


def _tensorrt(decider: Decider, threads: int) -> dict[str, str]:
    """TF32 has no option there, only TF32_VARIABLE: github.com/microsoft/onnxruntime/issues/26029."""
    name = {"fp16": "trt_fp16_enable", "bf16": "trt_bf16_enable", WHOLE: "trt_int8_enable"}.get(decider.precision)
    return {} if name is None else {name: "1"}


@dataclass(frozen=True)
class ProviderKind:
    """One provider.

    onnxruntime: its name there; package: what installs it.
    precisions: what it can compute in. OpenVINO on a CPU takes f16 for bf16, silently, so that it has no fp16 here.
    library: how the file of its own runtime begins, whose version is kept.
    behind: other providers that may take what it leaves.
    gpu: whether it needs one.
    """

    onnxruntime: str
    package: str
    precisions: tuple[str, ...]
    options: Options = field(default=_none, repr=False)
    library: str = ""
    behind: tuple[str, ...] = ()
    gpu: bool = False


PROVIDERS: Mapping[str, ProviderKind] = {
    "cpu": ProviderKind("CPUExecutionProvider", "onnxruntime", (FULL, WHOLE)),
    "cuda": ProviderKind("CUDAExecutionProvider", "onnxruntime-gpu", (FULL,), _cuda, library="libcudnn.so", gpu=True),
    "tensorrt": ProviderKind(
        "TensorrtExecutionProvider",
        "onnxruntime-gpu",
        PRECISIONS,
        _tensorrt,
        library="libnvinfer.so",
        behind=("cuda",),
        gpu=True,
    ),
    "openvino": ProviderKind(
        "OpenVINOExecutionProvider", "onnxruntime-openvino", (FULL, "bf16", WHOLE), _openvino, library="libopenvino.so"
    ),
}


def deciders(provider: str) -> tuple[Decider, ...]:
    """All that a provider can be asked for."""
    kind = PROVIDERS[provider]
    plain = [Decider(provider, precision) for precision in kind.precisions]
    return (*plain, Decider(provider, FULL, tf32=True)) if kind.gpu else tuple(plain)
