"""Proof that exactly these bytes passed: evidence and candidate belong together. Standard library only."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

REPORT_FORMAT = "dfmcl.report/1"
CANDIDATE_FORMAT = "dfmcl.candidate/1"


class NotAttested(Exception):
    """The evidence does not vouch for these bytes."""

    exit_code = 1


class BadEvidence(Exception):
    """Evidence or candidate is missing or malformed."""

    exit_code = 2


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadEvidence(f"{path}: {error.strerror}; make it again with dfmcl export or dfmcl gate") from None


def read_candidate(candidate: Path) -> dict[str, Any]:
    """The manifest of a candidate whose files are the ones it lists, byte for byte; BadEvidence otherwise."""
    manifest = _read(candidate / "manifest.json", CANDIDATE_FORMAT)
    files = _object(manifest, "files", candidate)
    if "model.onnx" not in files:
        raise BadEvidence(f"{candidate / 'manifest.json'}: lists no model.onnx; export the candidate again")
    for name, digest in files.items():
        if Path(name).name != name:
            raise BadEvidence(
                f"{candidate / 'manifest.json'}: {name!r} is no plain file name; export the candidate again"
            )
        found = file_digest(candidate / name)
        if found != digest:
            raise BadEvidence(
                f"{candidate / name}: SHA-256 is {found[:12]}..., its manifest says {str(digest)[:12]}...;"
                " the file was changed after export, export the candidate again"
            )
    return manifest


def verify(candidate: Path, evidence: Path) -> dict[str, Any]:
    """The report, if it holds a passing verdict for exactly the candidate's bytes; NotAttested otherwise."""
    manifest = read_candidate(candidate)
    report = _read(evidence / "report.json", REPORT_FORMAT)
    if _object(report, "candidate", evidence).get("files") != manifest["files"]:
        raise NotAttested(f"{evidence}: was made for other bytes than {candidate}; run dfmcl gate on this candidate")
    for name, digest in _object(report, "files", evidence).items():
        if Path(name).name != name or file_digest(evidence / name) != digest:
            raise NotAttested(f"{evidence / name}: is not what the gate wrote; run dfmcl gate on this candidate again")
    if report.get("verdict") != "passed":
        raise NotAttested(f"{evidence}: the verdict is {report.get('verdict')!r}; only what passed is promoted")
    return report


def _object(value: dict[str, Any], key: str, where: Path) -> dict[str, Any]:
    found = value.get(key)
    if not isinstance(found, dict):
        raise BadEvidence(f"{where}: {key} is {type(found).__name__}, expected an object; make it again")
    return found


def _read(path: Path, expected: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadEvidence(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadEvidence(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict) or value.get("format") != expected:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise BadEvidence(f"{path}: format is {found!r}; expected {expected!r}")
    return value
