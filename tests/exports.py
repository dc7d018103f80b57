"""Candidates of runs that many tests share: each run is exported once, for all processes of a test session."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from dfmcl.release.export import export
from dfmcl.robustness.runs import CHECKPOINT, MANIFEST
from tests.processes import made_once

Export = Callable[[Path, Path], Path]  # a run and a new directory; returns that, which holds the candidate


def exported(run: Path, out: Path, shelf: Path) -> Path:
    """Copy to `out` what a run of these very bytes is exported to, in float32, and return `out`.

    shelf: where all processes of a session keep what they exported. An export takes seconds, and to load its libraries
    as long again.
    """
    digest = hashlib.sha256((run / CHECKPOINT).read_bytes() + (run / MANIFEST).read_bytes()).hexdigest()
    return Path(shutil.copytree(made_once(shelf / digest, lambda kept: export(run, kept)), out))
