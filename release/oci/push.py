"""From a candidate and its evidence to an OCI registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dfmcl.common.errors import BadInput
from dfmcl.common.progress import Track, silent
from dfmcl.gating.signing.attestation import require_covered
from dfmcl.gating.signing.envelopes import read_envelopes
from dfmcl.gating.signing.evidence import ATTESTATION, SIGNATURE, file_digest, inspect
from dfmcl.release.candidate import verify_files
from dfmcl.release.oci.artifact import (
    CREATED,
    EMPTY,
    EVIDENCE,
    EVIDENCE_TYPE,
    IMAGE_MANIFEST,
    MODEL_CONFIG,
    RELEASE,
    SIGNATURE_TYPE,
    Descriptor,
    LayerKind,
    described,
    layer,
    model_config,
    model_manifest,
    referrer,
)
from dfmcl.release.oci.reference import Reference
from dfmcl.release.oci.registry import Blob, Registry, open_registry


@dataclass(frozen=True)
class Pushed:
    """A release in a registry. reference: by the digest of its manifest; evidence: the digest of the evidence's."""

    reference: Reference
    evidence: str
    sha256: str


def push(
    candidate: Path, evidence: Path, reference: Reference, *, plain_http: bool = False, track: Track = silent
) -> Pushed:
    """Bring a candidate that passed to a registry, and its evidence, which refers to it; a tag comes last.

    The same candidate has the same digest always. A registry that dies in between has no tag that says otherwise than
    before. BadInput or BadEvidence (2): a file that is missing or malformed, a registry that refuses. Refused or
    NotAttested (1): evidence that has not passed, is not signed, or is about other bytes. Broken (5): no answer.
    """
    if reference.digest:
        raise BadInput(f"{reference}: the digest follows from the candidate; leave @{reference.digest[:12]}... out")
    report = inspect(candidate, evidence)
    read_envelopes(evidence / ATTESTATION)
    if (evidence / SIGNATURE).is_file():
        require_covered(evidence)
    manifest = verify_files(candidate)
    registry = open_registry(reference, plain_http=plain_http)
    files = _sent(registry, candidate, RELEASE, track)
    layers = list(files.values())
    config = model_config(manifest.created, layers)
    _send(registry, config, MODEL_CONFIG)
    model = model_manifest(manifest.created, layers, config)
    subject = described(model, IMAGE_MANIFEST)
    registry.put(subject.digest, model)
    beside = _sent(registry, evidence, EVIDENCE, track)
    _send(registry, EMPTY, IMAGE_MANIFEST)
    whole = _refer(registry, EVIDENCE_TYPE, report.created, list(beside.values()), subject)
    if SIGNATURE in beside:  # once more by itself, for tools that look for signatures
        _refer(registry, SIGNATURE_TYPE, report.created, [beside[SIGNATURE]], subject)
    if reference.tag:
        registry.put(reference.tag, model)
    return Pushed(reference.pinned(subject.digest), whole, manifest.model_sha256)


def _sent(registry: Registry, folder: Path, kinds: Mapping[str, LayerKind], track: Track) -> dict[str, Descriptor]:
    """The files of a folder, once they are there."""
    found = {}
    for name, kind in kinds.items():
        path = folder / name
        if kind.optional and not path.is_file():
            continue
        found[name] = layer(name, file_digest(path), path.stat().st_size)
        registry.upload(found[name], Blob(path, found[name].size, name, track))
    return found


def _send(registry: Registry, data: bytes, media_type: str) -> None:
    registry.upload(described(data, media_type), Blob(data, len(data), "", silent))


def _refer(registry: Registry, artifact_type: str, created: str, layers: list[Descriptor], subject: Descriptor) -> str:
    """The digest of a manifest that refers to the subject, once it is there."""
    manifest = referrer(artifact_type, created, layers, subject)
    entry = replace(described(manifest, IMAGE_MANIFEST), artifact_type=artifact_type, annotations={CREATED: created})
    registry.refer(subject.digest, manifest, entry)
    return entry.digest
