"""model.sig: one signature over all files of a release, in the form of OpenSSF's model signing.

A Sigstore bundle with a DSSE envelope over an in-toto statement that lists the files:
github.com/ossf/model-signing-spec. `model_signing verify key` of PyPI's model-signing accepts it, and what that tool
signs by files and SHA-256 is accepted here.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import Error as SignatureError
from securesystemslib.signer import Signature

from dfmcl.common.reader import MANIFEST_BYTES, parse_object
from dfmcl.gating.signing.envelopes import PAYLOAD_TYPE, statement_in
from dfmcl.gating.signing.evidence import MALFORMED, SIGNATURE, read_file, reason_of
from dfmcl.gating.signing.faults import refusal
from dfmcl.gating.signing.signer import PublicKey, Signer, made_by
from dfmcl.gating.signing.statement import STATEMENT

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PREDICATE = "https://model_signing/signature/v1.0"
SCHEME = "ecdsa-sha2-nistp256"  # of the curves that the specification knows, the one that our keys have
# As the tool writes them: what a version control system leaves, and the signature itself.
IGNORED = (SIGNATURE, ".git", ".gitattributes", ".github", ".gitignore")


@dataclass(frozen=True)
class ModelSignature:
    """What a model.sig says, nothing of it believed yet. files: SHA-256 by name."""

    envelope: Envelope
    files: dict[str, str]

    def signer_of(self, keys: Iterable[PublicKey]) -> str | None:
        """The id of the one of these keys that signed it; None where none did."""
        (signature,) = self.envelope.signatures.values()
        return next((key.keyid for key in keys if self._is_by(key, signature)), None)

    def _is_by(self, key: PublicKey, signature: Signature) -> bool:
        return made_by(key, Signature(key.keyid, signature.signature), self.envelope.pae())


def can_sign_models(key: PublicKey) -> bool:
    """Whether the format knows keys of this kind."""
    return key.scheme == SCHEME


def model_signature(files: Mapping[str, str], name: str, signer: Signer) -> str:
    """The text of model.sig. files: SHA-256 by name; name: of the model, for people. signer: see `can_sign_models`."""
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": _root(digest for _, digest in sorted(files.items()))}}],
        "predicateType": PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": list(IGNORED),
            },
            "resources": [
                {"name": path, "algorithm": "sha256", "digest": digest} for path, digest in sorted(files.items())
            ],
        },
    }
    envelope = Envelope(json.dumps(statement).encode(), PAYLOAD_TYPE, {})
    signature = bytes.fromhex(signer.sign(envelope.pae()).signature)
    bundle = {
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": _hint(signer.public_key)}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(envelope.payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle)


def read_model_signature(path: Path) -> ModelSignature:
    """A model.sig, nothing of it believed yet; BadEvidence where it is no bundle of files and SHA-256."""
    try:
        bundle = parse_object(read_file(path, MANIFEST_BYTES))
        if bundle["mediaType"] != BUNDLE:
            raise ValueError(f"media type is {str(bundle['mediaType'])[:80]!r}, expected {BUNDLE!r}")
        entries = [{"keyid": "", **entry} for entry in bundle["dsseEnvelope"]["signatures"]]
        if len(entries) != 1:
            raise ValueError(f"holds {len(entries)} signatures, expected 1")
        envelope = Envelope.from_dict({**bundle["dsseEnvelope"], "signatures": entries})
        if envelope.payload_type != PAYLOAD_TYPE:
            raise ValueError(f"payload type is {str(envelope.payload_type)[:80]!r}, expected {PAYLOAD_TYPE!r}")
        return ModelSignature(envelope, _listed(statement_in(envelope.payload, path)))
    except (*MALFORMED, SignatureError) as error:
        raise refusal("envelope", f"{path}: is no model signature: {reason_of(error)}") from None


def require_model_signature(path: Path, keys: Sequence[PublicKey]) -> tuple[str, dict[str, str]]:
    """Which of the keys signed a model.sig, and the SHA-256 by name that it vouches for; NotAttested where none did."""
    if not path.exists():
        raise refusal("unsigned", f"{path}: no such file")
    found = read_model_signature(path)
    keyid = found.signer_of(keys)
    if keyid is None:
        raise refusal("signers", f"{path}: none of the {len(keys)} keys in model_keys signed it as it is here")
    return keyid, found.files


def require_listed(path: Path, signed: Mapping[str, str], files: Mapping[str, str]) -> None:
    """Refuse a model.sig that is not about exactly these files. signed: as it says; files: SHA-256 by name."""
    other = sorted(name for name in {**signed, **files} if signed.get(name) != files.get(name))
    if other:
        name = other[0]
        said = "does not list" if name not in signed else "lists, and that is not there:" if name not in files else ""
        raise refusal("listed", f"{path}: {said or 'was made over another'} {name}")


def _listed(statement: Mapping[str, Any]) -> dict[str, str]:
    if (statement["_type"], statement["predicateType"]) != (STATEMENT, PREDICATE):
        raise ValueError(f"predicate type is {str(statement['predicateType'])[:80]!r}, expected {PREDICATE!r}")
    how, resources = statement["predicate"]["serialization"], statement["predicate"]["resources"]
    kinds = {str(entry["algorithm"]) for entry in resources}
    if how["method"] != "files" or kinds - {"sha256"}:
        raise ValueError(f"is by {str(how['method'])[:20]} and {', '.join(sorted(kinds))[:60]}; sign files by sha256")
    files = {str(entry["name"]): str(entry["digest"]) for entry in resources}
    if len(files) < len(resources):
        raise ValueError("a file stands twice in it")
    (subject,) = statement["subject"]
    if subject["digest"]["sha256"] != _root(entry["digest"] for entry in resources):
        raise ValueError("the digest of the whole is not that of its files")
    return files


def _root(digests: Iterable[str]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()


def _hint(key: PublicKey) -> str:
    """By which the tool finds the key: SHA-256 of its PEM."""
    pem = f"{str(key.keyval['public']).strip()}\n"
    return hashlib.sha256(pem.encode()).hexdigest()
