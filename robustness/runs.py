"""A finished training run as others read it: `checkpoint.safetensors` and `manifest.json`, tied by SHA-256."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dfmcl.common.errors import BadInput, lacks_memory
from dfmcl.common.files import read_json, sha256_of
from dfmcl.robustness.logits import apart
from dfmcl.robustness.models import Classifier, ModelSpec
from dfmcl.robustness.user_code import answers

FORMAT = "dfmcl.run/1"
CHECKPOINT = "checkpoint.safetensors"
MANIFEST = "manifest.json"
SAME_CODE = 1e-3  # of the largest logit: other processors sum in another order


@dataclass(frozen=True)
class Run:
    """A classifier in eval mode and float32, and the manifest of its training."""

    path: Path
    model: Classifier
    manifest: dict[str, Any]
    checkpoint_sha256: str
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]

    @property
    def data(self) -> dict[str, Any]:
        """How the run's data set was named: name, path, image_size, sha256."""
        return dict(self.manifest["data"])

    @property
    def origin_sha256(self) -> str:
        """Of the checkpoint that was trained: a packed run names the one it was rounded from."""
        return str(self.manifest.get("origin", {}).get("checkpoint_sha256", self.checkpoint_sha256))


def parse_device(text: str = "") -> torch.device:
    """`cpu`, `cuda`, `cuda:1`; nothing is the GPU, where there is one. BadInput for what this machine lacks."""
    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise BadInput(f"device: {text!r} is unknown; choose cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"device: {text!r} is not supported; choose cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"device: no {text} here: torch finds {torch.cuda.device_count()} GPUs; choose cpu")
    return device


def load_run(directory: Path | str, device: torch.device | str = "cpu", *, code: str = "") -> Run:
    """Read a run and prove that its weights are the ones its manifest names.

    code: the `module:callable` that may be run, see `Classifier`.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).exists():
        unfinished = (directory / "state").is_dir()
        advice = "is not finished; continue it with --resume" if unfinished else "is no run; dfmcl train makes one"
        raise BadInput(f"{directory}: {advice}")
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise BadInput(f"{directory / MANIFEST}: format is {manifest.get('format')!r}; expected {FORMAT!r}")
    checkpoint = directory / CHECKPOINT
    if not checkpoint.is_file():
        raise BadInput(f"{checkpoint}: no such file; train it again, or copy it beside its manifest")
    digest = sha256_of(checkpoint)
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("data"), dict):
        raise BadInput(f"{directory / MANIFEST}: lacks files or data; train it again")
    if digest != files.get(CHECKPOINT):
        raise BadInput(f"{checkpoint}: SHA-256 is {digest[:12]}..., its manifest says otherwise; train it again")
    try:
        spec = ModelSpec.from_json(manifest["model"])
        labels = tuple(str(label) for label in manifest["labels"])
        model = Classifier(spec, code=code)
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(checkpoint).items()})
    except BadInput as error:
        raise BadInput(f"{directory}: {error}") from None
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if lacks_memory(error):
            raise
        first_line = str(error).splitlines()[0]
        raise BadInput(f"{directory}: checkpoint and manifest do not fit: {first_line}") from None
    model.eval()
    if code:
        then, now = torch.tensor([manifest.get("answers", [])]), answers(model, spec.input_shape)
        if not apart(then, now) <= SAME_CODE:
            raise BadInput(f"{directory}: {code} answers otherwise than when the run was trained; train it again")
    return Run(directory, model.to(device), manifest, digest, labels, spec.input_shape)
