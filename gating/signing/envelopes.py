"""DSSE envelopes on disk: read, signed, and whose signatures they carry. github.com/secure-systems-lab/dsse."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import Error as SignatureError

from dfmcl.common.reader import (
    MANIFEST_BYTES,
    Unfit,
    parse_object,
)
from dfmcl.gating.signing.evidence import MALFORMED, read_file, reason_of
from dfmcl.gating.signing.faults import refusal
from dfmcl.gating.signing.signer import PublicKey, Signer, made_by

PAYLOAD_TYPE = "application/vnd.in-toto+json"

Statement = dict[str, Any]


def said_by(envelope: Envelope) -> tuple[str, bytes]:
    return envelope.payload_type, envelope.payload


def signed_lines(envelopes: Sequence[Envelope], signers: Iterable[Signer]) -> str:
    """The envelopes with these signatures added, one a line."""
    for signer in signers:
        for envelope in envelopes:
            signature = signer.sign(envelope.pae())
            envelope.signatures[signature.keyid] = signature
    return "".join(json.dumps(envelope.to_dict(), sort_keys=True) + "\n" for envelope in envelopes)


def read_envelopes(path: Path) -> list[Envelope]:
    """One DSSE envelope a line, nothing of them believed yet."""
    if not os.path.lexists(path):
        raise refusal("unsigned", f"{path}: no such file")
    envelopes = []
    for number, line in enumerate(read_file(path, MANIFEST_BYTES).splitlines(), 1):
        try:
            envelopes.append(Envelope.from_dict(parse_object(line)))
        except (*MALFORMED, SignatureError) as error:
            raise refusal("envelope", f"{path}: line {number} is no DSSE envelope: {reason_of(error)}") from None
    return envelopes


def signers_of_all(envelopes: Sequence[Envelope], keys: Sequence[PublicKey]) -> set[str]:
    """Ids of the keys whose valid signature every envelope carries."""
    return {key.keyid for key in keys if envelopes and all(is_signed_by(envelope, key) for envelope in envelopes)}


def is_signed_by(envelope: Envelope, key: PublicKey) -> bool:
    try:
        return made_by(key, envelope.signatures.get(key.keyid), envelope.pae())
    except (AttributeError, ValueError):  # a payload type that is no text fails inside
        return False


def is_forged(envelopes: Sequence[Envelope], keys: Sequence[PublicKey]) -> bool:
    """Whether a payload carries a trusted key's signature that is not of this payload."""
    named = [(envelope, key) for envelope in envelopes for key in keys if key.keyid in envelope.signatures]
    return not all(is_signed_by(envelope, key) for envelope, key in named)


def statement_in(payload: bytes, path: Path) -> Statement:
    try:
        return parse_object(payload)
    except Unfit as error:
        raise refusal("statement", f"{path}: a payload that is no statement was signed: {error}") from None


def subject_of(statement: Statement) -> dict[str, str]:
    found = {str(entry["name"]): str(entry["digest"]["sha256"]) for entry in statement["subject"]}
    if len(found) < len(statement["subject"]):  # other verifiers may believe the other one
        raise ValueError("a file stands twice among its subjects")
    return found
