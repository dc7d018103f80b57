"""Proof that exactly these bytes passed: two in-toto statements in signed DSSE envelopes, and how they are judged.

DSSE is github.com/secure-systems-lab/dsse. A signature is checked before anything it covers is read, and every doubt is
a refusal.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import Error as SignatureError
from securesystemslib.signer import CryptoSigner, SSlibKey

from dfmcl.common.files import write_text
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
from dfmcl.gating.signing.faults import BadEvidence, NotAttested, refusal
from dfmcl.gating.signing.keys import read_signer
from dfmcl.gating.signing.statement import (
    ROBUSTNESS,
    STATEMENT,
    TEST_RESULT,
    VALID_DAYS,
    expiry,
    robustness,
    statements,
    subjects,
    test_result,
)

REPORT_FORMAT = "dfmcl.report/2"
CANDIDATE_FORMAT = "dfmcl.candidate/1"
MANIFEST = "manifest.json"
REPORT = "report.json"
PROBES = "probes.npz"
ATTESTATION = "attestation.intoto.jsonl"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
FILE_BYTES = 2**32  # an ONNX file holds 2 GiB at most, and probes unpack to 4
CLOCK_SKEW = timedelta(minutes=10)  # between the machine of the gate and this one

Statement = dict[str, Any]
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)

__all__ = ["BadEvidence", "NotAttested"]


@dataclass(frozen=True)
class Trust:
    """Whose word counts. `threshold` distinct keys must have signed both statements.

    policies: digests of the policies that may let a model pass; None: any. max_age: since the gate ran; None: any.
    data: digests of the data sets that may be judged on, as a policy names a place and not its content; None: any.
    drawn: whether one of the keys must have drawn the order of the images.
    """

    keys: tuple[SSlibKey, ...]
    threshold: int = 1
    policies: frozenset[str] | None = None
    max_age: timedelta | None = None
    data: frozenset[str] | None = None
    drawn: bool = False


@dataclass(frozen=True)
class Attestation:
    """Two statements as trusted keys signed them. subject: SHA-256 by file name; signers: key ids."""

    subject: dict[str, str]
    test_result: dict[str, Any]
    robustness: dict[str, Any]
    signers: tuple[str, ...]

    @property
    def created(self) -> datetime:
        """When the gate ran."""
        return datetime.fromisoformat(self.robustness["created"])

    @property
    def expires(self) -> datetime:
        """Until when it may be believed."""
        return datetime.fromisoformat(self.robustness["expires"])


def sign(report: dict[str, Any], report_sha256: str, keys: Sequence[Path], *, expires_days: int) -> str:
    """attestation.intoto.jsonl: both statements about a report of any verdict, each signed by every key.

    report_sha256: of the bytes of report.json; keys: private, as `dfmcl keygen` writes them. It expires so many days
    after the report was made.
    """
    return _signed(_unsigned(report, report_sha256, expires_days), [read_signer(key) for key in keys])


def sign_evidence(evidence: Path, keys: Sequence[Path]) -> datetime:
    """Sign the evidence, or add signatures to it; returns the time at which they expire.

    Nobody signs blindly: the report must follow from its own record, the files must be those that it names, and what
    is signed already must be what the gate would have written beside this report. How long it holds is the policy's.
    """
    path = evidence / ATTESTATION
    report, digest = read_evidence(evidence)
    envelopes = _envelopes(path) if os.path.lexists(path) else None
    fresh = _unsigned(report, digest, report["policy"].get("valid_days", VALID_DAYS))
    if envelopes is not None and [_said(envelope) for envelope in envelopes] != [_said(envelope) for envelope in fresh]:
        raise refusal("unlike", f"{path}: does not say what {REPORT} says")
    signers = [read_signer(key) for key in keys]
    _require_drawn(report, [signer.public_key for signer in signers], evidence / REPORT, by_one=False)
    write_text(path, _signed(envelopes or fresh, signers))
    return datetime.fromisoformat(json.loads(fresh[1].payload)["predicate"]["expires"])


def read_attestation(evidence: Path, trust: Trust) -> Attestation:
    """What trusted keys say in an evidence directory, whatever the verdict; NotAttested where too few of them do."""
    path = evidence / ATTESTATION
    envelopes = _envelopes(path)
    signers = _signers_of_all(envelopes, trust.keys)
    if len(envelopes) != 2:
        raise refusal("envelopes", f"{path}: holds {len(envelopes)} envelopes, expected 2")
    if len(signers) < max(trust.threshold, 1):
        said = f"{len(signers)} trusted keys signed both statements as they are here, {trust.threshold} must"
        raise refusal("forged" if _is_forged(envelopes, trust.keys) else "signers", f"{path}: {said}")
    by_kind: dict[str, Statement] = {}
    for envelope in envelopes:
        if envelope.payload_type != PAYLOAD_TYPE:
            raise refusal("statements", f"{path}: payload type is {envelope.payload_type!r}, expected {PAYLOAD_TYPE!r}")
        statement = _parsed(envelope.payload, path)
        if statement.get("_type") != STATEMENT:
            raise refusal("statements", f"{path}: statement type is {statement.get('_type')!r}, expected {STATEMENT!r}")
        by_kind[str(statement.get("predicateType"))] = statement
    if by_kind.keys() != {TEST_RESULT, ROBUSTNESS}:
        raise refusal(
            "statements",
            f"{path}: predicate types are {', '.join(by_kind)}; expected {TEST_RESULT}, {ROBUSTNESS}",
        )
    try:
        test_result, robust = by_kind[TEST_RESULT], by_kind[ROBUSTNESS]
        subject = _subject(robust)
        if _subject(test_result) != subject:
            raise refusal("statements", f"{path}: its two statements are about different files")
        return Attestation(subject, test_result["predicate"], robust["predicate"], tuple(sorted(signers)))
    except MALFORMED as error:
        raise refusal("statement", f"{path}: a malformed statement was signed: {_reason(error)}") from None


def verify(candidate: Path, evidence: Path, trust: Trust, now: datetime | None = None) -> dict[str, Any]:
    """The report, if enough trusted keys say that exactly the candidate's bytes passed, and still do at `now` (UTC).

    NotAttested (1): they do not say it, or not about these bytes, or the report contradicts itself, or what the trust
    file asks for does not hold. BadEvidence (2): missing or malformed files. A promoted version is its own evidence.
    """
    for named, file in ((candidate, MANIFEST), (evidence, REPORT)):
        if not named.exists():
            raise refusal("missing", f"{named / file}: no such file")
    path = evidence / ATTESTATION
    attestation = read_attestation(evidence, trust)
    try:
        signed = _require_current(attestation, trust, now or datetime.now(UTC), path)
        if read_report(evidence / REPORT)[1] != signed:
            raise refusal("unlike", f"{evidence / REPORT}: is not the report that was signed")
        report = inspect(candidate, evidence)
        _require_alike(attestation, report, signed, path)
        _require_drawn(report, trust.keys, evidence / REPORT, by_one=trust.drawn)
    except MALFORMED as error:
        raise refusal("statement", f"{path}: a malformed statement was signed: {_reason(error)}") from None
    return report


def inspect(candidate: Path, evidence: Path) -> dict[str, Any]:
    """The report, if it holds a passing verdict for exactly the candidate's bytes; who wrote it, nobody asks here."""
    if _same(candidate, evidence) and leaves(candidate):  # a version is what lies in the repository
        raise refusal("unreadable", f"{candidate}: is a link that leaves its directory")
    report, _ = read_evidence(evidence)
    _require_passed(report, candidate, evidence)
    return report


def read_evidence(evidence: Path) -> tuple[dict[str, Any], str]:
    """The report of a gate and the SHA-256 of its bytes, whatever its verdict and its writer.

    All that follows from its own record is derived again, and its files must be those that it names: NotAttested (1)
    where they differ. BadEvidence (2) where a file is missing or cannot be read as what it should be.
    """
    from dfmcl.gating.signing.probes import read_answers
    from dfmcl.gating.soundness import require_derived  # here, as it loads numpy and scipy

    path = evidence / REPORT
    report, digest = read_report(path)
    _require_evidence(report, evidence)
    require_derived(report, path, read_answers(evidence / PROBES, _shape(report, path)))
    return report, digest


def read_report(path: Path) -> tuple[dict[str, Any], str]:
    """A report.json, nothing of it believed yet, and the SHA-256 of the very bytes it was read from."""
    data = _read(path, RECORD_BYTES)
    return _object_of(path, data, REPORT_FORMAT), hashlib.sha256(data).hexdigest()


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
    manifest = _object_of(path, _read(path, MANIFEST_BYTES), CANDIDATE_FORMAT)
    if "model.onnx" not in _object(manifest, "files", path):
        raise refusal("candidate", f"{path}: lists no model.onnx")
    return manifest


def _require_current(attestation: Attestation, trust: Trust, now: datetime, path: Path) -> str:
    """The SHA-256 of the report that the statements are about, once their verdict, policy and dates hold."""
    test_result, robust = attestation.test_result, attestation.robustness
    _require_verdict(robust["verdict"], path)
    if test_result["result"] != "PASSED":
        raise refusal("statements", f"{path}: the test result is {test_result['result']!r}, and the verdict 'passed'")
    policy, data = robust["policy"]["sha256"], robust["data"]["sha256"]
    if trust.policies is not None and policy not in trust.policies:
        raise refusal("policy", f"{path}: policy {policy[:12]}... is none that the trust file allows")
    if trust.data is not None and data not in trust.data:
        raise refusal("data", f"{path}: was judged on data {data[:12]}..., which the trust file does not list")
    created, expires = attestation.created, attestation.expires
    if created > now + CLOCK_SKEW:
        raise refusal("early", f"{path}: was made on {created:%Y-%m-%d %H:%M}, in the future")
    if now >= expires:
        raise refusal("expired", f"{path}: expired on {expires:%Y-%m-%d}")
    if trust.max_age is not None and now - created > trust.max_age:
        raise refusal(
            "old",
            f"{path}: the gate ran on {created:%Y-%m-%d}, longer ago than the trust file's {trust.max_age.days} days",
        )
    report_sha256 = str(robust["report"]["sha256"])
    configured = {entry["name"]: entry["digest"]["sha256"] for entry in test_result["configuration"]}
    if configured[REPORT] != report_sha256:
        raise refusal("statements", f"{path}: its two statements are about different reports")
    return report_sha256


def _require_alike(attestation: Attestation, report: dict[str, Any], report_sha256: str, path: Path) -> None:
    """The statements say of their report what it says itself, no more and no less."""
    if attestation.subject != subjects(report):
        raise refusal("unlike", f"{path}: is about other files than {REPORT}")
    expires = expiry(report, report["policy"].get("valid_days", VALID_DAYS))
    for said, made in (
        (attestation.test_result, test_result(report, report_sha256)),
        (attestation.robustness, robustness(report, report_sha256, expires)),
    ):
        again = json.loads(json.dumps(made))
        other = [key for key in {**again, **said} if (key in said, said.get(key)) != (key in again, again.get(key))]
        if other:
            raise refusal("unlike", f"{path}: says another {other[0]} than {REPORT}")


def _require_drawn(report: dict[str, Any], keys: Iterable[SSlibKey], path: Path, *, by_one: bool) -> None:
    """Refuse an order that names one of the keys, which did not draw it; by_one: also one that none of them drew."""
    from dfmcl.gating.order import Draw, Matter  # here, as it loads numpy

    said = report["statistics"].get("draw")
    if said is None:
        if by_one:
            raise refusal("order", f"{path}: the order follows from digests alone")
        return
    draw, own = Draw.from_json(said), {key.keyid: key for key in keys}
    digests = report["candidate"]["model_sha256"], report["data"]["sha256"], report["policy"]["sha256"]
    if draw.keyid not in own and by_one:
        raise refusal("order", f"{path}: key {draw.keyid[:12]} drew the order, and is not trusted")
    if draw.keyid in own and not draw.is_by(own[draw.keyid], Matter(*digests, report["data"]["images"])):
        raise refusal("order", f"{path}: key {draw.keyid[:12]} did not draw the order that names it")


def _require_verdict(verdict: object, path: Path) -> None:
    if verdict != "passed":
        raise refusal("verdict", f"{path}: the verdict is {verdict!r}")


def _require_passed(report: dict[str, Any], candidate: Path, evidence: Path) -> None:
    """Refuse a report that did not pass, or whose candidate or evidence is not, file for file, what lies there."""
    files = _object(_object(report, "candidate", evidence), "files", evidence)
    beside = {REPORT, ATTESTATION, *_object(report, "files", evidence)}
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
    _require_verdict(report.get("verdict"), evidence)


def _require_interface(report: dict[str, Any], manifest: dict[str, Any], evidence: Path) -> None:
    """The report is about the images, classes and run that the candidate's own manifest names."""
    try:
        asked, run = report["candidate"]["input"], (manifest.get("run") or {}).get("checkpoint_sha256")
        pairs = {
            "candidate.input": (asked, {key: manifest["input"][key] for key in asked}),
            "data.classes": (report["data"]["classes"], manifest["labels"]),
            "run.checkpoint_sha256": (report["run"].get("checkpoint_sha256"), run),
        }
    except MALFORMED as error:
        raise refusal("malformed", f"{evidence / REPORT}: not about such a candidate ({_reason(error)})") from None
    if other := [name for name, (said, named) in pairs.items() if said != named]:
        raise refusal("bytes", f"{evidence / REPORT}: {other[0]} is another one than {MANIFEST} names")


def _require_evidence(report: dict[str, Any], evidence: Path) -> None:
    files = _object(report, "files", evidence / REPORT)
    if PROBES not in files:
        raise refusal("malformed", f"{evidence / REPORT}: lists no {PROBES}")
    for name, digest in files.items():
        _require_file(evidence, name, digest, "evidence", "is not what the gate wrote")


def _require_file(directory: Path, name: str, digest: str, fault: str, otherwise: str) -> None:
    path = directory / name
    if Path(name).name != name:
        raise refusal("malformed", f"{directory}: {name[:80]!r} is no plain file name")
    if file_digest(path) != digest:
        raise refusal(fault, f"{path}: {otherwise}")


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _unsigned(report: dict[str, Any], report_sha256: str, expires_days: Any) -> list[Envelope]:
    """Both statements, in envelopes; one report gives the same bytes always. BadEvidence where it is no gate's."""
    try:
        made = statements(report, report_sha256, expiry(report, expires_days))
        texts = [json.dumps(statement, sort_keys=True, separators=(",", ":"), allow_nan=False) for statement in made]
    except MALFORMED as error:
        raise refusal("malformed", f"the report cannot be signed: {_reason(error)}") from None
    return [Envelope(text.encode(), PAYLOAD_TYPE, {}) for text in texts]


def _said(envelope: Envelope) -> tuple[str, bytes]:
    return envelope.payload_type, envelope.payload


def _signed(envelopes: Sequence[Envelope], signers: Iterable[CryptoSigner]) -> str:
    """The envelopes with these signatures added, one a line."""
    for signer in signers:
        for envelope in envelopes:
            envelope.sign(signer)
    return "".join(json.dumps(envelope.to_dict(), sort_keys=True) + "\n" for envelope in envelopes)


def _envelopes(path: Path) -> list[Envelope]:
    """One DSSE envelope a line, nothing of them believed yet."""
    if not os.path.lexists(path):
        raise refusal("unsigned", f"{path}: no such file")
    envelopes = []
    for number, line in enumerate(_read(path, MANIFEST_BYTES).splitlines(), 1):
        try:
            envelopes.append(Envelope.from_dict(parse_object(line)))
        except (*MALFORMED, SignatureError) as error:
            raise refusal("envelope", f"{path}: line {number} is no DSSE envelope: {_reason(error)}") from None
    return envelopes


def _signers_of_all(envelopes: Sequence[Envelope], keys: Sequence[SSlibKey]) -> set[str]:
    """Ids of the keys whose valid signature every envelope carries."""
    return {key.keyid for key in keys if envelopes and all(_is_signed_by(envelope, key) for envelope in envelopes)}


def _is_signed_by(envelope: Envelope, key: SSlibKey) -> bool:
    try:
        return key.keyid in envelope.verify([key], 1)
    except (SignatureError, AttributeError, ValueError):  # a payload type that is no text fails inside
        return False


def _is_forged(envelopes: Sequence[Envelope], keys: Sequence[SSlibKey]) -> bool:
    """Whether a payload carries a trusted key's signature that is not of this payload."""
    named = [(envelope, key) for envelope in envelopes for key in keys if key.keyid in envelope.signatures]
    return not all(_is_signed_by(envelope, key) for envelope, key in named)


def _parsed(payload: bytes, path: Path) -> Statement:
    try:
        return parse_object(payload)
    except Unfit as error:
        raise refusal("statement", f"{path}: a payload that is no statement was signed: {error}") from None


def _subject(statement: Statement) -> dict[str, str]:
    found = {str(entry["name"]): str(entry["digest"]["sha256"]) for entry in statement["subject"]}
    if len(found) < len(statement["subject"]):  # other verifiers may believe the other one
        raise ValueError("a file stands twice among its subjects")
    return found


def _read(path: Path, most: int) -> bytes:
    try:
        return read_plain(path, most)
    except FileNotFoundError as error:
        raise refusal("missing", f"{path}: {error.strerror}") from None
    except (OSError, Unfit) as error:
        raise refusal("unreadable", f"{path}: {why_unread(error)}") from None


def _object_of(path: Path, data: bytes, expected: str) -> dict[str, Any]:
    """The JSON object of a format that a file holds."""
    try:
        value = parse_object(data)
    except Unfit as error:
        raise refusal("unreadable", f"{path}: {error}") from None
    if value.get("format") != expected:
        raise refusal("format", f"{path}: format is {str(value.get('format'))[:80]!r}; expected {expected!r}")
    return value


def _object(value: dict[str, Any], key: str, where: Path) -> dict[str, Any]:
    found = value.get(key)
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found if key == "files"):
        raise refusal("malformed", f"{where}: {key} is {type(found).__name__}, expected an object")
    return found


def _shape(report: dict[str, Any], path: Path) -> tuple[int, int, int, int, int]:
    """Of the probes that a report is about: images, height, width, channels, classes."""
    try:
        height, width, channels = (int(size) for size in report["candidate"]["input"]["shape"])
        return len(report["per_image"]["label"]), height, width, channels, len(report["data"]["classes"])
    except MALFORMED as error:
        raise refusal("malformed", f"{path}: not a gate's report ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)
