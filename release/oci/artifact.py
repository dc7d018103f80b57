"""A release as OCI manifests: its model as a ModelPack artifact, and its evidence as an artifact that refers to it.

github.com/modelpack/model-spec (0.0.7) and github.com/opencontainers/image-spec (1.1). A layer is one file as it is, so
that the same bytes always have the same digest. Nothing here asks a registry.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dfmcl.common.reader import MANIFEST_BYTES, RECORD_BYTES, Unfit, parse_object
from dfmcl.gating.signing.evidence import ATTESTATION, FILE_BYTES, PROBES, REPORT, SIGNATURE
from dfmcl.gating.signing.model_signature import BUNDLE
from dfmcl.release.candidate import LABELS, MANIFEST, MODEL
from dfmcl.release.oci.reference import DIGEST

IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
IMAGE_INDEX = "application/vnd.oci.image.index.v1+json"
MODEL_TYPE = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"
EVIDENCE_TYPE = "application/vnd.dfmcl.evidence.v1"
SIGNATURE_TYPE = BUNDLE  # as tools that look for signatures know it
TITLE = "org.opencontainers.image.title"
FILEPATH = "org.cncf.model.filepath"
CREATED = "org.opencontainers.image.created"
DOCUMENT_BYTES = 4 * 2**20  # a manifest or an index; registries take no more
EMPTY = b"{}"


@dataclass(frozen=True)
class LayerKind:
    """A file of a release as a layer. most: bytes that are read."""

    media_type: str
    most: int
    optional: bool = False


RELEASE: dict[str, LayerKind] = {
    MODEL: LayerKind("application/vnd.cncf.model.weight.v1.raw", FILE_BYTES),
    LABELS: LayerKind("application/vnd.cncf.model.weight.config.v1.raw", MANIFEST_BYTES),
    MANIFEST: LayerKind("application/vnd.cncf.model.weight.config.v1.raw", MANIFEST_BYTES),
}
EVIDENCE: dict[str, LayerKind] = {
    REPORT: LayerKind("application/json", RECORD_BYTES),
    PROBES: LayerKind("application/octet-stream", FILE_BYTES),
    ATTESTATION: LayerKind("application/vnd.in-toto.bundle", MANIFEST_BYTES),
    SIGNATURE: LayerKind(BUNDLE, MANIFEST_BYTES, optional=True),
}


@dataclass(frozen=True)
class Descriptor:
    """Bytes in a registry. digest: sha256: and hex; size: in bytes."""

    media_type: str
    digest: str
    size: int
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As it stands in manifests and indexes."""
        return {
            "mediaType": self.media_type,
            **({"artifactType": self.artifact_type} if self.artifact_type else {}),
            "digest": self.digest,
            "size": self.size,
            **({"annotations": dict(self.annotations)} if self.annotations else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Descriptor:
        """The inverse; Unfit for a malformed one, or one by another algorithm than SHA-256."""
        try:
            notes = value.get("annotations") or {}
            found = cls(value["mediaType"], value["digest"], value["size"], value.get("artifactType") or "", notes)
        except (KeyError, TypeError, AttributeError):
            raise Unfit("holds a descriptor that lacks mediaType, digest or size") from None
        if not (isinstance(found.digest, str) and re.fullmatch(DIGEST, found.digest)):
            raise Unfit(f"holds a digest that is no SHA-256: {str(found.digest)[:80]!r}")
        if type(found.size) is not int or found.size < 0:
            raise Unfit(f"holds a size that is none: {str(found.size)[:80]!r}")
        if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
            raise Unfit("holds annotations that are no texts")
        return found


def digest_of(data: bytes) -> str:
    """sha256: and the hex SHA-256 of bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def described(data: bytes, media_type: str) -> Descriptor:
    """The descriptor of bytes."""
    return Descriptor(media_type, digest_of(data), len(data))


def layer(name: str, sha256: str, size: int) -> Descriptor:
    """A file of a release. sha256: in hex."""
    kind = RELEASE.get(name) or EVIDENCE[name]
    path = {FILEPATH: name} if name in RELEASE else {}
    return Descriptor(kind.media_type, f"sha256:{sha256}", size, annotations={TITLE: name, **path})


def model_config(created: str, layers: list[Descriptor]) -> bytes:
    """The config of a ModelPack artifact. created: when the candidate was exported; its files are no archives, so that
    the digest of a layer is that of its contents."""
    return _document(
        {
            "descriptor": {"createdAt": created},
            "config": {"format": "onnx", "capabilities": {"inputTypes": ["image"], "outputTypes": ["other"]}},
            "modelfs": {"type": "layers", "diffIds": [row.digest for row in layers]},
        }
    )


def model_manifest(created: str, layers: list[Descriptor], config: bytes) -> bytes:
    """The manifest whose digest is the release's identity: it follows from the candidate's bytes alone."""
    return _manifest(MODEL_TYPE, described(config, MODEL_CONFIG), layers, created)


def referrer(artifact_type: str, created: str, layers: list[Descriptor], subject: Descriptor) -> bytes:
    """The manifest of what is said about another one, its subject."""
    config = described(EMPTY, "application/vnd.oci.empty.v1+json")
    return _manifest(artifact_type, config, layers, created, subject=subject.to_json())


def index(entries: list[Descriptor]) -> bytes:
    """An index of manifests, as a registry without a list of referrers keeps one for us under a tag."""
    rows = [entry.to_json() for entry in entries]
    return _document({"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": rows})


def read_index(data: bytes) -> list[Descriptor]:
    """The inverse; Unfit where it is none."""
    value = parse_object(data)
    if value.get("schemaVersion") != 2 or not isinstance(rows := value.get("manifests"), list):
        raise Unfit("is no OCI index")
    return [Descriptor.from_json(row) for row in rows]


def read_layers(
    data: bytes, artifact_type: str, kinds: Mapping[str, LayerKind], subject: str = ""
) -> dict[str, Descriptor]:
    """A manifest's layers by the names of their files, in the order of `kinds`; Unfit where these are others.

    So no name leads out of a directory or stands twice, and no file is larger than it may be. subject: the digest that
    it must refer to.
    """
    value = parse_object(data)
    if value.get("mediaType", IMAGE_MANIFEST) != IMAGE_MANIFEST or value.get("artifactType") != artifact_type:
        said = value.get("artifactType") or value.get("mediaType")
        raise Unfit(f"is {str(said)[:80]!r}, expected {artifact_type!r}; `dfmcl push` writes it")
    if not isinstance(rows := value.get("layers"), list):
        raise Unfit("has no list of layers")
    if subject and Descriptor.from_json(value.get("subject") or {}).digest != subject:
        raise Unfit("refers to another manifest")
    found: dict[str, Descriptor] = {}
    for row in map(Descriptor.from_json, rows):
        name = row.annotations.get(TITLE, "")
        if (kind := kinds.get(name)) is None:
            raise Unfit(f"names a file {name[:80]!r}, and only {', '.join(kinds)} belong there")
        if name in found:
            raise Unfit(f"names {name} twice")
        if row.media_type != kind.media_type:
            raise Unfit(f"has {name} as {row.media_type[:80]!r}, expected {kind.media_type!r}")
        if row.size > kind.most:
            raise Unfit(f"has {name} of {row.size:,} bytes, and at most {kind.most:,} are read")
        found[name] = row
    if absent := [name for name, kind in kinds.items() if name not in found and not kind.optional]:
        raise Unfit(f"lacks {absent[0]}")
    return {name: found[name] for name in kinds if name in found}


def _manifest(artifact_type: str, config: Descriptor, layers: list[Descriptor], created: str, **more: Any) -> bytes:
    return _document(
        {
            "schemaVersion": 2,
            "mediaType": IMAGE_MANIFEST,
            "artifactType": artifact_type,
            "config": config.to_json(),
            "layers": [row.to_json() for row in layers],
            **more,
            "annotations": {CREATED: created},
        }
    )


def _document(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
