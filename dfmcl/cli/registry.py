"""To an OCI registry and from it: `dfmcl push`, `pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfmcl.cli.command import command
from dfmcl.cli.output import say, track, warn

PLAIN_HTTP = Annotated[
    bool, typer.Option("--plain-http", help="Without TLS, which a registry of this machine never needs.")
]


@command
def push(
    candidate: Annotated[Path, typer.Argument(help="A candidate's directory, or a promoted or pulled version's.")],
    reference: Annotated[str, typer.Argument(help="oci://HOST/NAME or oci://HOST/NAME:TAG.")],
    evidence: Annotated[Path | None, typer.Option(help="A candidate's evidence; a version holds its own.")] = None,
    plain_http: PLAIN_HTTP = False,
) -> None:
    """Bring a signed release to an OCI registry: the model, and its evidence, which refers to it."""
    from dfmcl.release.oci.push import push as run_push
    from dfmcl.release.oci.reference import parse_reference

    place = parse_reference(reference)
    pushed = run_push(candidate, evidence or candidate, place, plain_http=plain_http, track=track)
    warn(f"{reference}: model.onnx {pushed.sha256[:12]}, evidence {pushed.evidence}")
    say(str(pushed.reference))  # alone on stdout, for $(dfmcl push ...)


@command
def pull(
    reference: Annotated[str, typer.Argument(help="oci://HOST/NAME@sha256:DIGEST, or a tag in its place.")],
    out: Annotated[Path, typer.Argument(help="A directory that is not there yet.")],
    evidence: Annotated[
        str | None, typer.Option(help="The digest of its evidence, as push printed it. Default: the newest.")
    ] = None,
    plain_http: PLAIN_HTTP = False,
) -> None:
    """Fetch a release and its evidence from an OCI registry, for `dfmcl verify` and `dfmcl promote`."""
    import re

    from dfmcl.common.errors import BadInput
    from dfmcl.release.oci.pull import pull as run_pull
    from dfmcl.release.oci.reference import DIGEST, parse_reference

    place = parse_reference(reference)
    if evidence is not None and not re.fullmatch(DIGEST, evidence):
        raise BadInput(f"--evidence {evidence}: is no digest, such as sha256:...")
    pulled = run_pull(place, out, evidence=evidence, plain_http=plain_http, track=track)
    say(f"{out}: {pulled.reference}, model.onnx {pulled.sha256[:12]}")
    say(f"{out}: its evidence is {pulled.evidence}; `dfmcl verify {out}` says whether to believe it")
