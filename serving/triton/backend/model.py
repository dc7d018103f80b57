"""The `onnxruntime` backend where Triton's own C++ one is missing; it runs inside Triton's python stub.

Triton finds it as `<backend-directory>/onnxruntime/model.py`. In NVIDIA's image the C++ backend of the same name
wins, so one config.pbtxt serves both. Only what `release/layout.py` writes into that config is understood here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

CPU = "CPUExecutionProvider"


class TritonPythonModel:
    """One instance of one version of a model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the version's ONNX file; raises (and the model stays unready) where tensors would be corrupted."""
        require_faithful_tensors()
        config = json.loads(args["model_config"])
        parameters = config.get("parameters", {})
        options = ort.SessionOptions()
        options.intra_op_num_threads = integer(parameters, "intra_op_thread_count")
        options.inter_op_num_threads = integer(parameters, "inter_op_thread_count")
        path = Path(args["model_repository"], args["model_version"], config["default_model_filename"])
        # Nothing of dfmcl is installed here: the config says which provider the gate judged, and with which options.
        asked = json.loads(parameters.get("execution_providers", {}).get("string_value", "null")) or [[CPU, {}]]
        if args.get("model_instance_kind") == "GPU":
            asked = [[name, told | {"device_id": args["model_instance_device_id"]}] for name, told in asked]
        self.session = ort.InferenceSession(str(path), options, providers=[(name, told) for name, told in asked])
        require_provider(asked[0][0], self.session.get_providers())
        self.input: str = config["input"][0]["name"]
        self.output: str = config["output"][0]["name"]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer all requests with one run. Errors are raised: in a response, Triton counts them as successes."""
        batches = [pb_utils.get_input_tensor_by_name(request, self.input).as_numpy() for request in requests]
        images = batches[0] if len(batches) == 1 else np.concatenate(batches)
        (logits,) = self.session.run([self.output], {self.input: images})
        bounds = np.cumsum([len(batch) for batch in batches])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(self.output, np.ascontiguousarray(part))])
            for part in np.split(logits, bounds)
        ]


def integer(parameters: dict[str, Any], key: str) -> int:
    """A config parameter as a number; 0, ONNX Runtime's own choice, where it is not set."""
    return int(parameters.get(key, {}).get("string_value", "0"))


def require_provider(provider: str, found: Sequence[str]) -> None:
    """Raise where ONNX Runtime fell back to another provider than the one that was judged, which it does silently."""
    if found[0] != provider:
        raise pb_utils.TritonModelException(
            f"{provider} was judged, and ONNX Runtime {ort.__version__} in {sys.prefix} fell back to {found[0]};"
            " DFMCL_TRITON_PYTHON names an interpreter that has it"
        )


def require_faithful_tensors() -> None:
    """Raise where the stub would lie: under numpy 2, that of Triton 2.51 returns wrong tensors with status OK."""
    known = np.arange(12, dtype=np.float32).reshape(3, 4)
    if int(np.__version__.split(".")[0]) >= 2 or not np.array_equal(pb_utils.Tensor("known", known).as_numpy(), known):
        raise pb_utils.TritonModelException(
            f"numpy {np.__version__} corrupts tensors in Triton's python stub: install 'numpy<2' in its environment"
        )
