"""A release for an auditor: each sentence is a field of a record, in the order of EU AI Act Annex IV.

Nothing is asserted that no record shows: a topic without a record is said to have none.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dfmcl.common.errors import BadInput
from dfmcl.common.reader import RECORD_BYTES, Unfit, parse_json, read_plain, why_unread
from dfmcl.common.text import as_markdown
from dfmcl.gating.signing.attestation import Trust, read_attestation
from dfmcl.gating.signing.statement import ROBUSTNESS
from dfmcl.release import layout
from dfmcl.release.stores.store import Store
from dfmcl.release.topics import ATTESTATION, CHAPTERS, HISTORY, MANIFEST, REPORT, RUN, Chapter, Line
from dfmcl.release.verification import require_repository, verify_release

SIGNED = {  # what vouches for each file
    REPORT: "its digest stands in the signed statement",
    MANIFEST: "its digest stands in the signed report",
    ATTESTATION: "the signed statements, decoded; pointers are into {robustness, test_result: {statement, signatures}}",
    HISTORY: "not signed: written by the machine that promotes; pointers begin with the line, from 0",
    RUN: "not signed: tied by the checkpoint's digest alone",
}
Documents = Mapping[str, Any]


SHOWS: dict[str, Callable[[Any], str]] = {
    "": lambda value: as_markdown(str(value)),
    "percent": lambda value: f"{100 * value:.1f} %",
    "count": lambda value: f"{value if isinstance(value, int) else len(value):,}",
    "list": lambda value: as_markdown(", ".join(map(str, value))),
    "pairs": lambda value: as_markdown(
        ", ".join(f"{key} {entry}" for key, entry in value.items() if entry is not None)
    ),
    "day": lambda value: as_markdown(str(value)[:10]),
}


def audit(store: Store, name: str, trust: Trust, run: Path | None = None) -> str:
    """The document about the version that is served, as Markdown. run: its training, where that is at hand.

    Refused, NotAttested, BadEvidence where the release does not hold now; BadInput for another run's directory.
    """
    require_repository(store)
    release = verify_release(store, name, trust)
    signers = read_attestation(release.path, trust).signers
    folder = f"{release.folder}/"
    documents: dict[str, Any] = {
        REPORT: _read(release.path / REPORT),
        MANIFEST: _read(release.path / MANIFEST),
        ATTESTATION: _statements(release.path / ATTESTATION, signers),
        HISTORY: _history(store, name),
    }
    places = {REPORT: folder + REPORT, MANIFEST: folder + MANIFEST, ATTESTATION: folder + ATTESTATION, HISTORY: HISTORY}
    if run is not None:
        documents[RUN], places[RUN] = _read(run / MANIFEST), "run/manifest.json"
        tied = documents[RUN].get("files", {}).get("checkpoint.safetensors")
        if tied is None or tied != documents[MANIFEST].get("run", {}).get("checkpoint_sha256"):
            raise BadInput(f"{run}: {store.where(release.folder)} was exported from another run; name that one")
    head = [
        f"# {as_markdown(name)}, version {release.version}: records for an audit",
        f"Written by `dfmcl card --audit`, which has verified the release with {len(signers)} trusted"
        f" {'key' if len(signers) == 1 else 'keys'}; `dfmcl verify` repeats it. Each sentence ends with the fields that"
        ' say so (file, JSON pointer); a topic that no record shows is "not recorded". Files are named from the'
        " repository on.",
        "\n".join(f"- `{places[document]}`: {SIGNED[document]}" for document in places),
    ]
    return "\n\n".join([*head, *(_chapter(chapter, documents, places) for chapter in CHAPTERS)]) + "\n"


def _chapter(chapter: Chapter, documents: Documents, places: Mapping[str, str]) -> str:
    iso = f"; ISO/IEC 42001: {chapter.iso}" if chapter.iso else ""
    said = "\n".join(text for line in chapter.lines for text in _said(line, documents, places))
    return f"## {chapter.title}\n\nAnnex IV, {chapter.annex}{iso}\n\n{said}"


def _said(line: Line, documents: Documents, places: Mapping[str, str]) -> Iterator[str]:
    """A line's sentences; one that says "not recorded" where there is none."""
    sentences = list(_sentences(line, documents, places))
    if not sentences and line.other is not None:
        sentences = list(_sentences(line.other, documents, places))
    yield from sentences or [f"- {line.topic}: not recorded."]


def _sentences(line: Line, documents: Documents, places: Mapping[str, str]) -> Iterator[str]:
    document = documents.get(line.document)
    listed = found(document, line.each) if line.each else None
    starts = [f"{line.each.rstrip('/')}/{place}" for place in range(len(listed or ()))] if line.each else [""]
    for start in starts:
        pointers = [start + slot.partition("|")[0] for slot in line.slots]
        values = [found(document, pointer) for pointer in pointers]
        if line.document and not any(value is None or value in ("", [], {}) for value in values):
            shown = [SHOWS[slot.partition("|")[2]](value) for value, slot in zip(values, line.slots, strict=True)]
            links = ", ".join(
                f"[`{pointer}`]({places[line.document]}#{pointer})" for pointer in dict.fromkeys(pointers)
            )
            yield f"- {line.topic}: {line.text.format(*shown)} ({places[line.document]} {links})"


def found(document: Any, pointer: str) -> Any:
    """The value at a JSON pointer (RFC 6901, without escapes); None where there is none. "/" is the whole."""
    for part in pointer.strip("/").split("/") if pointer.strip("/") else ():
        if isinstance(document, Mapping) and part in document:
            document = document[part]
        elif isinstance(document, Sequence) and not isinstance(document, str) and part.isdecimal():
            document = document[int(part)] if int(part) < len(document) else None
        else:
            return None
    return document


def _read(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_plain(path, RECORD_BYTES, named=True))
    except (OSError, Unfit) as error:
        raise BadInput(f"{path}: not readable: {why_unread(error)}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: is no JSON object")
    return value


def _statements(path: Path, signers: Sequence[str]) -> dict[str, Any]:
    """Both statements of an attestation that was verified, decoded, with the ids of the trusted keys beside.

    A key that is not trusted is None: nobody knows whether it signed.
    """
    decoded = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        envelope = json.loads(text)
        statement = json.loads(base64.b64decode(envelope["payload"]))
        kind = "robustness" if statement["predicateType"] == ROBUSTNESS else "test_result"
        keys = [signature["keyid"] for signature in envelope["signatures"]]
        decoded[kind] = {
            "statement": statement,
            "signatures": [{"keyid": key} if key in signers else None for key in keys],
        }
    return decoded


def _history(store: Store, name: str) -> list[Any]:
    """The lines about a model, each at its place in the file; None for others, and for what is damaged."""
    try:
        lines = store.read(layout.HISTORY, RECORD_BYTES).splitlines()
    except OSError:
        return []
    entries = []
    for line in lines:
        try:
            entry = parse_json(line)
        except Unfit:
            entry = None
        entries.append(entry if isinstance(entry, dict) and entry.get("model") == name else None)
    return entries
