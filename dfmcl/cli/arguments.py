"""Arguments that several subcommands take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def require_local(path: object) -> None:
    """BadInput for a path of another machine: a bucket's name would become a folder of this one, and exit code 0."""
    from dfmcl.common.errors import BadInput
    from dfmcl.common.text import why_not_local

    if isinstance(path, Path):
        typed = (text for word in sys.argv[1:] for text in (word, word.partition("=")[2]))
        spelled = next((text for text in typed if text and Path(text) == path), str(path))  # a Path joins slashes
        if why := why_not_local(spelled):
            raise BadInput(f"{spelled}: {why}")


def read_labels(path: Path | None) -> tuple[str, ...] | None:
    """A file's lines, None where none is named."""
    from dfmcl.common.errors import BadInput
    from dfmcl.common.reader import TEXT_BYTES, read_plain

    if path is None:
        return None
    try:
        return tuple(read_plain(path, TEXT_BYTES, named=True).decode("utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise BadInput(f"--labels {path}: not readable: {error}") from None


NAME = Annotated[str, typer.Option(help="The model's name in Triton.")]
REPOSITORY = Annotated[Path, typer.Option(help="Triton's model repository.")]
TRUST = Annotated[Path, typer.Option(help="Whose signature counts (TOML).")]
LIVE = Annotated[str | None, typer.Option(help="HOST:PORT of the gRPC endpoint: wait until it answers as gated.")]
WAIT = Annotated[float, typer.Option(help="Seconds to wait for that.", min=0.1)]
OUTPUT = Annotated[str | None, typer.Option(help="An ONNX file's output of scores, where it has several.")]
SUBJECT = Annotated[
    str,
    typer.Argument(
        help="A candidate's directory; a file: ONNX, TorchScript, torch.export or weights; module:callable; or"
        " grpc://HOST:PORT/MODEL."
    ),
]
ARCH = Annotated[str | None, typer.Option(help="Of a file of weights: torchvision:NAME, timm:NAME or module:callable.")]
