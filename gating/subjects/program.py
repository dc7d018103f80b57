"""A `torch.export` program as a subject: a graph of torch's operators. torch's loader may run code of the file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dfmcl.common.errors import BadInput
from dfmcl.common.files import sha256_of
from dfmcl.gating.conversion import in_parts
from dfmcl.gating.subject import Subject
from dfmcl.gating.subjects.network import declared, network_subject
from dfmcl.robustness.user_code import guarded


class Program(nn.Module):
    """Images to logits by a program, in batches that it takes; it knows no training mode to leave."""

    def __init__(self, net: nn.Module, fewest: int, most: int | None) -> None:
        super().__init__()
        self.net, self.fewest, self.most = net, fewest, most

    def train(self, mode: bool = True) -> Program:
        return self

    def forward(self, images: Tensor) -> Tensor:
        return in_parts(self.net, images, self.fewest, self.most)


def program_subject(path: Path, contract: str | None, labels: tuple[str, ...] | None = None) -> Subject:
    """What `torch.export.save` wrote; see `network_subject` for the rest."""
    taken = declared(contract, path)
    opened = partial(loaded, path)
    return network_subject(
        opened(), taken, labels, kind="program", name=str(path), opened=opened, digest=sha256_of(path)
    )


def loaded(path: Path) -> Program:
    """The program; BadInput where the file is none, or takes something else than one batch of images."""
    with guarded(f"{path}: not readable as a program of torch.export"):
        program = torch.export.load(path)
        names = program.graph_signature.user_inputs
        entries = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
        if len(entries) != 1:
            raise BadInput(f"{path}: takes {len(names)} inputs ({', '.join(map(str, names))}); export it with one")
        size = entries[0].meta["val"].shape[0]
        if isinstance(size, int):
            return Program(program.module(), size, size)
        bounds = program.range_constraints[size.node.expr]
        most = int(bounds.upper) if bounds.upper.is_Integer else None
        return Program(program.module(), max(1, int(bounds.lower)), most)
