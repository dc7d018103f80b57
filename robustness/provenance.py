"""Where a number comes from: code, versions, hardware, time. Kept in every record."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("dfmcl", "torch", "torchvision", "numpy", "onnx", "onnxruntime")


def now() -> str:
    """UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def provenance() -> dict[str, Any]:
    """Code revision, library versions, hardware and thread count of this process."""
    return {"code": {"revision": revision()}, "versions": versions(), "hardware": hardware()}


def versions() -> dict[str, str]:
    """Python's and the libraries' versions, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if (loaded := sys.modules.get("onnxruntime")) is not None:  # which other packages bring too, such as -openvino
        found["onnxruntime"] = str(loaded.__version__)
    return found


def hardware() -> dict[str, Any]:
    """Processor, accelerator and threads; no host name."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"machine": platform.machine(), "cpu": _cpu(), "gpu": gpu, "threads": torch.get_num_threads()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    flags = {key.strip(): value for key, value in fields.items()}
    extras = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags.get("flags", "").split()]
    return " ".join([flags.get("model name", platform.processor()).strip(), *extras])


def revision() -> str:
    """The git commit of the code, with `+` where files differ from it; empty outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
