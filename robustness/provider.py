"""Which of ONNX Runtime's execution providers computes a file: one value, handed in wherever a session is opened."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from dfmcl.common.errors import BadInput
from dfmcl.common.providers import PROVIDERS, TF32_VARIABLE, Decider
from dfmcl.robustness.deadline import answered

# What a node on the CPU may give: shapes and places, which every provider leaves there. Not pixels, nor what follows.
SHAPES = frozenset({"int64", "int32", "bool"})
TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(double)": np.float64,
         "tensor(float16)": np.float16}  # fmt: skip


@dataclass(frozen=True)
class Provider:
    """An execution provider. name: as ONNX Runtime lists it. options: its own, by name.

    behind: others with their options, which may take what it leaves. decider: what a policy calls it.
    """

    name: str = "CPUExecutionProvider"
    options: Mapping[str, str] = field(default_factory=dict)
    behind: tuple[tuple[str, Mapping[str, str]], ...] = ()
    decider: Decider | None = None

    @staticmethod
    def of(decider: Decider, threads: int = 0) -> Provider:
        """The provider of a policy's [decide]. threads: of one inference; 0: its own choice."""
        (name, options), *behind = decider.asked(threads)
        return Provider(name, options, tuple(behind), decider)

    @property
    def rounds(self) -> str:
        """In words, where it computes in floats of fewer bits than the network that attacks climb; empty elsewhere."""
        found = self.decider
        return f"float32, where {found} decides" if found is not None and found.rounds else ""

    def session(
        self, model: bytes | Path, options: ort.SessionOptions | None = None, example: NDArray[Any] | None = None
    ) -> ort.InferenceSession:
        """An ONNX file, or its bytes, ready to be asked; what ONNX Runtime raises where it cannot load it.

        BadInput where ONNX Runtime would compute it, or a part of it, elsewhere: the answers would be another
        provider's. example: images to see that with; None: of the shape that the file declares.
        """
        self._require_here()
        if self.name == PROVIDERS["cpu"].onnxruntime:
            return self._opened(model, options)
        options = options or ort.SessionOptions()
        with tempfile.TemporaryDirectory() as folder:
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "nodes")
            session = self._opened(model, options)
            (entry,) = session.get_inputs()
            answered(session, _zeros(entry) if example is None else example, self)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        allowed = {self.name, *(name for name, _ in self.behind)}
        if left := left_elsewhere(events, allowed):
            raise BadInput(f"{self}: ONNX Runtime {ort.__version__} leaves {', '.join(left)} to another provider")
        return session

    def _opened(self, model: bytes | Path, options: ort.SessionOptions | None) -> ort.InferenceSession:
        asked = [(self.name, dict(self.options)), *((name, dict(told)) for name, told in self.behind)]
        session = ort.InferenceSession(model, options, providers=asked)
        if session.get_providers()[0] != self.name:
            raise self._absent()
        return session

    def _require_here(self) -> None:
        """BadInput where this ONNX Runtime lacks it, or would round where it was told not to."""
        if self.name not in ort.get_available_providers():
            raise self._absent()
        found = self.decider
        tf32 = found is None or found.tf32 or os.environ.get(TF32_VARIABLE) == "0"
        if found is not None and found.provider == "tensorrt" and not tf32:
            raise BadInput(
                f"{self}: TensorRT rounds to TF32 unless {TF32_VARIABLE}=0 is set; set it here and where it serves, or"
                " say tf32 = true in [decide]"
            )

    def _absent(self) -> BadInput:
        here = ", ".join(ort.get_available_providers())
        advice = f"; install {self.decider.kind.package} in its place, or name another" if self.decider else ""
        return BadInput(f"{self}: ONNX Runtime {ort.__version__} fell back to another provider; it has {here}{advice}")

    def __str__(self) -> str:
        return self.name if self.decider is None else f"decide.provider {self.decider.provider} ({self.name})"


CPU = Provider.of(Decider())


def left_elsewhere(events: Iterable[Mapping[str, Any]], allowed: set[str]) -> list[str]:
    """Operators, sorted, whose values were computed by no allowed provider, from the events of a profile."""
    found = set()
    for event in events:
        told = event.get("args", {})
        if event.get("cat") != "Node" or told.get("provider", "") in ("", *allowed):
            continue
        given = {kind for value in told.get("output_type_shape", ()) for kind in value}
        if given - SHAPES:
            found.add(str(told.get("op_name", event.get("name"))))
    return sorted(found)


def runtime_version() -> str:
    """The package of ONNX Runtime that was loaded, and its version: several packages bring the same module."""
    from onnxruntime.capi import build_and_package_info as built

    return f"{getattr(built, 'package_name', 'onnxruntime')} {ort.__version__}"


def library_version(decider: Decider) -> str:
    """The version of the provider's own runtime, as its loaded file is named; empty where it has none of its own."""
    begin = decider.kind.library
    if not begin:
        return ""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    loaded = {Path(line.split()[-1]) for line in maps.splitlines() if f"/{begin}" in line}
    names = {file.name for path in loaded for file in path.parent.glob(f"{begin}.*")}
    versions = [name.removeprefix(f"{begin}.") for name in names if re.fullmatch(r"[\d.]+", name[len(begin) + 1 :])]
    return max(versions, key=lambda text: (text.count("."), text), default="unknown")


def available() -> tuple[str, ...]:
    """The providers that this ONNX Runtime has, as policies name them."""
    here = ort.get_available_providers()
    return tuple(name for name, kind in PROVIDERS.items() if kind.onnxruntime in here)


def _zeros(entry: Any) -> NDArray[Any]:
    """One image of the shape that an input declares."""
    return np.zeros([size if isinstance(size, int) else 1 for size in entry.shape], TYPES.get(entry.type, np.float32))
