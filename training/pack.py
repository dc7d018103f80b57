"""A finished run made small enough to ship as a surrogate: its weights as float16, its record without local paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save

from dfmcl.common.errors import BadInput
from dfmcl.common.files import dump_json, sha256_of, whole_directory
from dfmcl.robustness.runs import CHECKPOINT, MANIFEST, load_run


def pack(run: Path, out: Path) -> dict[str, Any]:
    """Write `run` with float16 weights to `out` as a run that `load_run` accepts; returns its manifest.

    The manifest's `origin` names the weights it was rounded from, so that a watch can refuse a copy of the served ones.
    BadInput (2): a run that does not hold, that is packed already, or an `out` that holds something else.
    """
    source = load_run(run)
    if "origin" in source.manifest:
        raise BadInput(f"{run}: is packed already; copy it, or pack the run it came from")
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in source.model.state_dict().items()
    }
    with whole_directory(out, names=(CHECKPOINT, MANIFEST)) as staged:
        (staged / CHECKPOINT).write_bytes(save(weights))
        config = source.manifest.get("config", {})
        manifest = {
            **source.manifest,
            "data": {**source.data, "path": ""},
            "config": {**config, "data": {**config.get("data", {}), "path": ""}},
            "files": {CHECKPOINT: sha256_of(staged / CHECKPOINT)},
            "origin": {"checkpoint_sha256": source.checkpoint_sha256},
        }
        (staged / MANIFEST).write_text(dump_json(manifest), encoding="utf-8")
    return manifest
