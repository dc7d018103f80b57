"""Which of ONNX Runtime's execution providers computes a file: one value, handed in wherever a session is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime as ort

from dfmcl.common.errors import BadInput


@dataclass(frozen=True)
class Provider:
    """An execution provider. name: as ONNX Runtime lists it. options: its own, by name."""

    name: str = "CPUExecutionProvider"
    options: Mapping[str, str] = field(default_factory=dict)

    def session(self, model: bytes | Path, options: ort.SessionOptions | None = None) -> ort.InferenceSession:
        """An ONNX file, or its bytes, ready to be asked; what ONNX Runtime raises where it cannot load it.

        BadInput where ONNX Runtime would compute it elsewhere: the answers would be another provider's.
        """
        here = ort.get_available_providers()
        if self.name in here:
            session = ort.InferenceSession(model, options, providers=[(self.name, dict(self.options))])
            if self.name in session.get_providers():
                return session
        raise BadInput(
            f"{self.name}: ONNX Runtime {ort.__version__} fell back to another provider; it has {', '.join(here)}"
        )


CPU = Provider()
