"""Arguments that several subcommands take."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dfmcl.common.preprocessing import Preprocessing
    from dfmcl.gating.signing.signer import Signer


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


def read_preprocessing(text: str | None) -> Preprocessing:
    """The words of an option; BadInput for others."""
    from dfmcl.common.errors import BadInput
    from dfmcl.common.preprocessing import Preprocessing

    try:
        return Preprocessing.parse(text or "")
    except ValueError as error:
        raise BadInput(f"--preprocessing {error}") from None


def read_signers(
    keys: Sequence[Path] | None, commands: Sequence[str] | None, publics: Sequence[Path] | None
) -> list[Signer]:
    """Those of --key, then those of --key-command, each with its --public; BadInput where these are not as many."""
    from dfmcl.common.errors import BadInput
    from dfmcl.gating.signing.command import command_signer
    from dfmcl.gating.signing.keys import read_public, read_signer

    commands, publics = commands or (), publics or ()
    if len(commands) != len(publics):
        raise BadInput(
            f"--key-command is given {len(commands)} times, --public {len(publics)} times; each command needs the"
            " public half of its key, in the same order"
        )
    signing = [command_signer(line, read_public(path)) for line, path in zip(commands, publics, strict=True)]
    return [*(read_signer(path) for path in keys or ()), *signing]


def path(typed: str) -> str:
    """What `store_of` opens, as it was typed: a Path would join the slashes of an address. Else as typer has it."""
    if Path(typed).exists() and not os.access(typed, os.R_OK):
        raise typer.BadParameter(f"path {typed!r} is not readable")
    return typed


NAME = Annotated[str, typer.Option(help="The model's name in Triton.")]
REPOSITORY = Annotated[str, typer.Option(parser=path, metavar="<path>", help="Triton's model repository.")]
TRUST = Annotated[Path, typer.Option(help="Whose signature counts (TOML).")]
KEY_COMMAND = Annotated[
    list[str] | None, typer.Option(help="In place of a private key: a command that signs its stdin on stdout.")
]
PUBLIC = Annotated[list[Path] | None, typer.Option(help="The public key of a --key-command; one for each, in order.")]
LIVE = Annotated[str | None, typer.Option(help="HOST:PORT of the gRPC endpoint: wait until it answers as gated.")]
WAIT = Annotated[float, typer.Option(help="Seconds to wait for that.", min=0.1)]
PREPROCESSING = Annotated[
    str | None, typer.Option(help="How pictures become its size: 'fit bilinear', 'resize=256 bicubic', 'squash'.")
]
OUTPUT = Annotated[str | None, typer.Option(help="An ONNX file's output of scores, where it has several.")]
SUBJECT = Annotated[
    str,
    typer.Argument(
        help="A candidate's directory; a file: ONNX, TorchScript, torch.export or weights; module:callable; or"
        " grpc://HOST:PORT/MODEL."
    ),
]
ARCH = Annotated[str | None, typer.Option(help="Of a file of weights: torchvision:NAME, timm:NAME or module:callable.")]
CODE = Annotated[str, typer.Option("--arch", help="A run's module:callable, where code makes its network: runs it.")]
VERIFY_DATA = Annotated[
    bool, typer.Option("--verify-data", help="Read all images' files again: trust no digest that an earlier run kept.")
]
