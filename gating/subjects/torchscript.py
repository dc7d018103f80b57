"""A TorchScript file as a subject: a program of torch's own operators, none of it in Python."""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from functools import partial
from pathlib import Path

import torch

from dfmcl.common.errors import BadInput
from dfmcl.common.files import sha256_of
from dfmcl.gating.subject import Subject
from dfmcl.gating.subjects.network import declared, network_subject
from dfmcl.robustness.user_code import guarded

# Of some thousand operators the two that open files: of whatever name, when the model is loaded or asked.
FILES = re.compile(rb"\b(?:save|from_file)\b")


def torchscript_subject(path: Path, contract: str | None, labels: tuple[str, ...] | None = None) -> Subject:
    """What `torch.jit.save` wrote; see `network_subject` for the rest."""
    taken = declared(contract, path)
    network = loaded(path)
    return network_subject(
        network,
        taken,
        labels,
        kind="torchscript",
        name=str(path),
        opened=partial(loaded, path),
        digest=sha256_of(path),
        state=lambda: {"the script": hashlib.sha256(network.save_to_buffer()).hexdigest()},
    )


def loaded(path: Path) -> torch.jit.ScriptModule:
    """The module on the CPU; BadInput where the file is none, or reads or writes files."""
    with guarded(f"{path}: not readable as TorchScript"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, which its owner knows
        with zipfile.ZipFile(path) as archive:
            code = [archive.read(entry) for entry in archive.infolist() if entry.filename.endswith(".py")]
        if found := next((match for text in code if (match := FILES.search(text))), None):
            raise BadInput(f"{path}: its code says {found[0].decode()!r}, which can open files; export it without")
        network: torch.jit.ScriptModule = torch.jit.load(path, map_location="cpu")
    return network
