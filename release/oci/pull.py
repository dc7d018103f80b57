"""From an OCI registry to a directory that `dfmcl verify` and `dfmcl promote` take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dfmcl.common.errors import BadInput
from dfmcl.common.files import whole_directory
from dfmcl.common.progress import Track, silent
from dfmcl.common.reader import Unfit
from dfmcl.release.candidate import MODEL
from dfmcl.release.oci.artifact import (
    CREATED,
    EVIDENCE,
    EVIDENCE_TYPE,
    MODEL_TYPE,
    RELEASE,
    Descriptor,
    LayerKind,
    digest_of,
    read_layers,
)
from dfmcl.release.oci.reference import Reference
from dfmcl.release.oci.registry import Registry, open_registry

NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Pulled:
    """What was fetched. reference: by digest, also where a tag was asked for; evidence: the digest of its manifest."""

    reference: Reference
    evidence: str
    sha256: str


def pull(
    reference: Reference,
    out: Path,
    *,
    evidence: str | None = None,
    plain_http: bool = False,
    track: Track = silent,
) -> Pulled:
    """Fetch a release and its evidence into a new directory; nothing of it is believed yet.

    reference: by digest, or by a tag, which somebody may have moved.
    out: what is not there yet.
    evidence: the digest of its manifest; None: the newest, by its own word.
    plain_http: without TLS.
    track: shows the bytes.

    BadInput (2): no such release, no evidence, another form, names or sizes. Refused (1): bytes that are not those of
    their digest. Broken (5): no answer. After each of them there is no directory.
    """
    if not (reference.digest or reference.tag):
        raise BadInput(f"{reference}: name a tag or a digest: {reference}@sha256:...")
    if os.path.lexists(out):
        raise BadInput(f"{out}: is there already; name a new directory")
    registry = open_registry(reference, plain_http=plain_http)
    manifest = registry.manifest(reference.digest or reference.tag)
    pinned = reference.pinned(digest_of(manifest))
    model = _layers(manifest, MODEL_TYPE, RELEASE, pinned)
    chosen = evidence or _newest(registry, pinned)
    about = _layers(registry.manifest(chosen), EVIDENCE_TYPE, EVIDENCE, pinned.pinned(chosen), pinned.digest)
    with whole_directory(out, ()) as staged:
        for name, blob in {**model, **about}.items():
            registry.fetch(blob, staged / name, track)
    return Pulled(pinned, chosen, model[MODEL].digest.removeprefix("sha256:"))


def _layers(
    manifest: bytes, artifact_type: str, kinds: Mapping[str, LayerKind], where: Reference, subject: str = ""
) -> dict[str, Descriptor]:
    try:
        return read_layers(manifest, artifact_type, kinds, subject)
    except Unfit as error:
        raise BadInput(f"{where}: {error}") from None


def _newest(registry: Registry, reference: Reference) -> str:
    """The digest of the latest evidence about a release; BadInput where there is none, or no latest one."""
    found = {entry.digest: _created(entry) for entry in registry.referrers(reference.digest, EVIDENCE_TYPE)}
    if not found:
        raise BadInput(f"{reference}: no evidence refers to it; `dfmcl push` brings it along")
    latest = [digest for digest, created in found.items() if created == max(found.values())]
    if len(latest) > 1:
        raise BadInput(f"{reference}: holds evidence as new as the other; name one by --evidence: {', '.join(latest)}")
    return latest[0]


def _created(entry: Descriptor) -> datetime:
    try:
        return datetime.fromisoformat(entry.annotations.get(CREATED, "")).astimezone(UTC)
    except (ValueError, OverflowError):
        return NEVER
