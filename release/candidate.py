"""A candidate on disk: model.onnx, labels.txt and the manifest that ties them together by SHA-256."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dfmcl.common.errors import BadInput
from dfmcl.common.files import sha256_of
from dfmcl.common.preprocessing import USUAL, Preprocessing
from dfmcl.common.reader import MANIFEST_BYTES, parse_object
from dfmcl.release.stores.directory import Directory
from dfmcl.release.stores.store import Store

FORMAT = "dfmcl.candidate/1"
MANIFEST = "manifest.json"
MODEL = "model.onnx"
LABELS = "labels.txt"
FILES = frozenset({MODEL, LABELS})
WEIGHTS = ("float32", "float16")
ORIGIN = "onnx"  # the only kind of file that is wrapped
AS_THEY_CAME = "original"  # the weights of a wrapped file
INPUT = "images"
OUTPUT = "logits"


@dataclass(frozen=True)
class Parity:
    """How closely the exported model follows its checkpoint.

    images: how many were compared; max_abs_difference and tolerance: in logits; label_agreement: share in [0, 1]. These
    are against the checkpoint with its weights rounded as they are stored, which is the tolerance's matter; the
    checkpoint_* figures against the checkpoint as it was trained, which differ where weights are float16. A wrapped
    file is compared with the file that it wraps, and both are the same.
    """

    images: int
    max_abs_difference: float
    label_agreement: float
    tolerance: float
    checkpoint_max_abs_difference: float
    checkpoint_label_agreement: float


@dataclass(frozen=True)
class Manifest:
    """What a candidate is.

    files: name -> hex SHA-256; labels: K names in the order of the logits; input_shape: (H, W, C) of uint8 images;
    checkpoint_sha256: of the run it was exported from; weights: how matrices and kernels are stored, one of WEIGHTS;
    all is computed in float32. A wrapped ONNX file has no run (None) but an origin, with its SHA-256 and
    input contract, and weights AS_THEY_CAME; model.onnx converts the wire's bytes to that contract. preprocessing: how
    pictures become such images; USUAL where the manifest does not say.
    """

    created: str
    files: Mapping[str, str]
    labels: tuple[str, ...]
    input_shape: tuple[int, int, int]
    checkpoint_sha256: str | None
    parity: Parity
    opset: int
    weights: str
    versions: Mapping[str, str]
    origin_sha256: str | None = None
    origin_input: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing = USUAL

    @property
    def model_sha256(self) -> str:
        """Hex SHA-256 of model.onnx."""
        return self.files[MODEL]

    @property
    def interface(self) -> tuple[tuple[int, int, int], tuple[str, ...]]:
        """What a client relies on: the input shape and the labels."""
        return self.input_shape, self.labels

    def to_json(self) -> dict[str, Any]:
        """The manifest as it lies on disk."""
        if self.origin_sha256 is None:
            source: dict[str, Any] = {"run": {"checkpoint_sha256": self.checkpoint_sha256}}
        else:
            source = {"origin": {"kind": ORIGIN, "sha256": self.origin_sha256, "input": dict(self.origin_input)}}
        return {
            "format": FORMAT,
            "created": self.created,
            "files": dict(self.files),
            "labels": list(self.labels),
            "input": {"name": INPUT, "dtype": "uint8", "layout": "NHWC", "shape": list(self.input_shape)},
            **({} if self.preprocessing == USUAL else {"preprocessing": str(self.preprocessing)}),
            "output": {"name": OUTPUT, "dtype": "float32", "classes": len(self.labels)},
            **source,
            "parity": asdict(self.parity),
            "opset": self.opset,
            "weights": self.weights,
            "versions": dict(self.versions),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """The inverse of `to_json`; KeyError, TypeError or ValueError where the value is no candidate's manifest."""
        if value["format"] != FORMAT:
            raise ValueError(f"format is {value['format']!r}, expected {FORMAT!r}")
        height, width, channels = (int(size) for size in value["input"]["shape"])
        wrapped = "origin" in value
        manifest = cls(
            created=str(value["created"]),
            files={str(name): str(digest) for name, digest in value["files"].items()},
            labels=tuple(str(label) for label in value["labels"]),
            input_shape=(height, width, channels),
            checkpoint_sha256=None if wrapped else str(value["run"]["checkpoint_sha256"]),
            parity=Parity(**value["parity"]),
            opset=int(value["opset"]),
            weights=str(value["weights"]),
            versions=dict(value["versions"]),
            origin_sha256=str(value["origin"]["sha256"]) if wrapped else None,
            origin_input=dict(value["origin"]["input"]) if wrapped else {},
            preprocessing=Preprocessing.parse(str(value.get("preprocessing", ""))),
        )
        known = (AS_THEY_CAME,) if wrapped else WEIGHTS
        if manifest.weights not in known:
            raise ValueError(f"weights is {manifest.weights!r}, expected one of {', '.join(known)}")
        if manifest.files.keys() != FILES:
            raise ValueError(f"files lists {sorted(manifest.files)}, expected {sorted(FILES)}")
        if manifest.to_json() != dict(value):
            raise ValueError("it has unknown or contradictory entries")
        return manifest


def labels_text(labels: tuple[str, ...]) -> str:
    """labels.txt as Triton reads it, one label a line; BadInput where a label would break into two or vanish."""
    for label in labels:
        if not label.strip() or label != label.strip() or len(label.splitlines()) != 1:
            raise BadInput(f"label {label!r} cannot stand on a line of its own: rename the class")
    return "".join(f"{label}\n" for label in labels)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json into a directory that is still being staged."""
    text = json.dumps(manifest.to_json(), indent=2, allow_nan=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a candidate, or of a copy of a version; BadInput where there is none or it is malformed."""
    return manifest_at(Directory(directory), MANIFEST)


def manifest_at(store: Store, name: str) -> Manifest:
    """The same of a file in a store."""
    try:
        return Manifest.from_json(parse_object(store.read(name, MANIFEST_BYTES)))
    except FileNotFoundError:
        raise BadInput(f"{store.where(name)}: no such file; `dfmcl export` writes candidates") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
        raise BadInput(f"{store.where(name)}: not a candidate's manifest: {reason}") from None


def verify_files(directory: Path) -> Manifest:
    """The manifest of a candidate whose files are all there and have the digests that it names; BadInput otherwise."""
    manifest = read_manifest(directory)
    for name, expected in sorted(manifest.files.items()):
        path = directory / name
        if path.is_symlink() or not path.is_file():
            raise BadInput(f"{path}: missing or no regular file; export the candidate again")
        if (found := sha256_of(path)) != expected:
            raise BadInput(f"{path}: sha256 {found[:12]} is not the manifest's {expected[:12]}; export it again")
    if (directory / LABELS).read_bytes() != labels_text(manifest.labels).encode():
        raise BadInput(
            f"{directory / LABELS}: names other labels than {MANIFEST}, or in another order; export it again"
        )
    return manifest
