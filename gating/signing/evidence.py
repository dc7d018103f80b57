"""What a gate wrote, and the candidate that it judged, as a stranger's files are read: digests, formats, agreement."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfmcl.common.errors import BadInput
from dfmcl.common.reader import (
    MANIFEST_BYTES,
    RECORD_BYTES,
    Unfit,
    leaves,
    opened,
    parse_object,
    read_plain,
    why_unread,
)
from dfmcl.gating.signing.faults import refusal

if TYPE_CHECKING:
    from dfmcl.gating.signing.report import Report

REPORT_FORMAT = "dfmcl.report/2"
CANDIDATE_FORMAT = "dfmcl.candidate/1"
MANIFEST = "manifest.json"
REPORT = "report.json"
PROBES = "probes.npz"
ATTESTATION = "attestation.intoto.jsonl"
SIGNATURE = "model.sig"
FILE_BYTES = 2**32  # an ONNX file holds 2 GiB at most, and probes unpack to 4
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def inspect(candidate: Path, evidence: Path) -> Report:
    """The report, if it holds a passing verdict for exactly the candidate's bytes; who wrote it, nobody asks here."""
    if _same(candidate, evidence) and leaves(candidate):  # a version is what lies in the repository
        raise refusal("unreadable", f"{candidate}: is a link that leaves its directory")
    report, _ = read_evidence(evidence)
    _require_passed(report, candidate, evidence)
    return report


def read_evidence(evidence: Path) -> tuple[Report, str]:
    """The report of a gate and the SHA-256 of its bytes, whatever its verdict and its writer.

    All that follows from its own record is derived again, and its files must be those that it names: NotAttested (1)
    where they differ. BadEvidence (2) where a file is missing or cannot be read as what it should be.
    """
    from dfmcl.gating.signing.probes_file import read_answers
    from dfmcl.gating.soundness import require_derived  # here, as it loads numpy and scipy

    path = evidence / REPORT
    report, digest = read_report(path)
    _require_evidence(report, evidence)
    shape = (len(report.per_image.label), *report.candidate.input.shape, len(report.data.classes))
    require_derived(report, path, read_answers(evidence / PROBES, shape))
    return report, digest


def read_report(path: Path) -> tuple[Report, str]:
    """A report.json, nothing of it believed yet, and the SHA-256 of the very bytes it was read from.

    BadEvidence where it cannot be read, or where a part of it is missing, unknown or of another type.
    """
    from dfmcl.gating.signing.report import Report  # here, as it loads pydantic and numpy

    data = read_file(path, RECORD_BYTES)
    value = parsed_as(path, data, REPORT_FORMAT)
    try:
        return Report.from_json(value), hashlib.sha256(data).hexdigest()
    except (ValueError, BadInput) as error:
        raise refusal("malformed", f"{path}: not a gate's report ({error})") from None


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a plain file's bytes, of FILE_BYTES at most: a file of holes would be read for hours."""
    try:
        with opened(path, FILE_BYTES) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise refusal("missing", f"{path}: {error.strerror}") from None
    except (OSError, Unfit) as error:
        raise refusal("unreadable", f"{path}: {why_unread(error)}") from None


def read_candidate(candidate: Path) -> dict[str, Any]:
    """The manifest of a candidate whose files are the ones it lists, byte for byte; BadEvidence otherwise."""
    manifest = _manifest(candidate)
    for name, digest in manifest["files"].items():
        if Path(name).name != name:
            raise refusal("candidate", f"{candidate / MANIFEST}: {name!r} is no plain file name")
        found = file_digest(candidate / name)
        if found != digest:
            raise refusal(
                "candidate",
                f"{candidate / name}: SHA-256 is {found[:12]}..., its manifest says {str(digest)[:12]}...;"
                " the file was changed after export",
            )
    return manifest


def candidate_files(candidate: Path) -> dict[str, str]:
    """SHA-256 of every file of a whole candidate, the manifest too: what a report names and an attestation is about."""
    files: dict[str, str] = read_candidate(candidate)["files"]
    return {**files, MANIFEST: file_digest(candidate / MANIFEST)}


def _manifest(candidate: Path) -> dict[str, Any]:
    path = candidate / MANIFEST
    manifest = parsed_as(path, read_file(path, MANIFEST_BYTES), CANDIDATE_FORMAT)
    if "model.onnx" not in object_at(manifest, "files", path):
        raise refusal("candidate", f"{path}: lists no model.onnx")
    return manifest


def require_verdict(verdict: object, path: Path) -> None:
    if verdict != "passed":
        raise refusal("verdict", f"{path}: the verdict is {verdict!r}")


def _require_passed(report: Report, candidate: Path, evidence: Path) -> None:
    """Refuse a report that did not pass, or whose candidate or evidence is not, file for file, what lies there."""
    files = report.candidate.files
    beside = {REPORT, ATTESTATION, SIGNATURE, *report.files}
    allowed = {*files, *(beside if _same(candidate, evidence) else ())}
    try:
        found = sorted(path.name for path in candidate.iterdir())
    except FileNotFoundError as error:
        raise refusal("missing", f"{candidate}: {error.strerror}; name a candidate or a promoted version") from None
    except OSError as error:
        raise refusal("unreadable", f"{candidate}: {error.strerror}; name a candidate or a promoted version") from None
    if missing := sorted({"model.onnx", MANIFEST} - files.keys()):
        raise refusal("bytes", f"{evidence}: was not made for {missing[0]}")
    if extra := [name for name in found if name not in allowed]:
        raise refusal("stranger", f"{candidate / extra[0]}: was not judged")
    for name, digest in files.items():
        _require_file(candidate, name, digest, "bytes", "is not what the gate judged")
    manifest = _manifest(candidate)
    if (listed := manifest["files"]) != {name: files[name] for name in files if name != MANIFEST}:
        raise refusal("candidate", f"{candidate / MANIFEST}: lists {', '.join(listed)}, with other digests than judged")
    _require_interface(report, manifest, evidence)
    require_verdict(report.verdict, evidence)


def _require_interface(report: Report, manifest: dict[str, Any], evidence: Path) -> None:
    """The report is about the images, classes and run that the candidate's own manifest names."""
    try:
        asked, run = report.candidate.input.to_json(), (manifest.get("run") or {}).get("checkpoint_sha256")
        pairs = {
            "candidate.input": (asked, {key: manifest["input"][key] for key in asked}),
            "data.classes": (list(report.data.classes), manifest["labels"]),
            "run.checkpoint_sha256": (report.run.checkpoint_sha256, run),
        }
    except MALFORMED as error:
        raise refusal("malformed", f"{evidence / REPORT}: not about such a candidate ({reason_of(error)})") from None
    if other := [name for name, (said, named) in pairs.items() if said != named]:
        raise refusal("bytes", f"{evidence / REPORT}: {other[0]} is another one than {MANIFEST} names")


def _require_evidence(report: Report, evidence: Path) -> None:
    if PROBES not in report.files:
        raise refusal("malformed", f"{evidence / REPORT}: lists no {PROBES}")
    for name, digest in report.files.items():
        _require_file(evidence, name, digest, "evidence", "is not what the gate wrote")


def _require_file(directory: Path, name: str, digest: str, fault: str, otherwise: str) -> None:
    path = directory / name
    if Path(name).name != name:
        raise refusal("malformed", f"{directory}: {name[:80]!r} is no plain file name")
    if file_digest(path) != digest:
        raise refusal(fault, f"{path}: {otherwise}")


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def read_file(path: Path, most: int) -> bytes:
    try:
        return read_plain(path, most)
    except FileNotFoundError as error:
        raise refusal("missing", f"{path}: {error.strerror}") from None
    except (OSError, Unfit) as error:
        raise refusal("unreadable", f"{path}: {why_unread(error)}") from None


def parsed_as(path: Path, data: bytes, expected: str) -> dict[str, Any]:
    """The JSON object of a format that a file holds."""
    try:
        value = parse_object(data)
    except Unfit as error:
        raise refusal("unreadable", f"{path}: {error}") from None
    if value.get("format") != expected:
        raise refusal("format", f"{path}: format is {str(value.get('format'))[:80]!r}; expected {expected!r}")
    return value


def object_at(value: dict[str, Any], key: str, where: Path) -> dict[str, Any]:
    found = value.get(key)
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found if key == "files"):
        raise refusal("malformed", f"{where}: {key} is {type(found).__name__}, expected an object")
    return found


def reason_of(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)
