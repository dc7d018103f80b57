"""Proof that exactly these bytes passed: two in-toto statements in signed DSSE envelopes, and how they are judged.

DSSE is github.com/secure-systems-lab/dsse. A signature is checked before anything it covers is read, and every doubt is
a refusal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import Error as SignatureError
from securesystemslib.signer import CryptoSigner, SSlibKey

from gating.keys import read_signer
from gating.statement import ROBUSTNESS, STATEMENT, TEST_RESULT, expiry, statements, subjects
from robustness.files import write_text

REPORT_FORMAT = "dfmcl.report/2"
CANDIDATE_FORMAT = "dfmcl.candidate/1"
MANIFEST = "manifest.json"
REPORT = "report.json"
PROBES = "probes.npz"
ATTESTATION = "attestation.intoto.jsonl"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
CLOCK_SKEW = timedelta(minutes=10)  # between the machine of the gate and this one

Statement = dict[str, Any]


class NotAttested(Exception):
    """The evidence does not vouch for these bytes."""

    exit_code = 1


class BadEvidence(Exception):
    """Evidence or candidate is missing or malformed."""

    exit_code = 2


@dataclass(frozen=True)
class Trust:
    """Whose word counts. `threshold` distinct keys must have signed both statements.

    policies: digests of the policies that may let a model pass; None: any. max_age: since the gate ran; None: any.
    data: digests of the data sets that may be judged on, as a policy names a place and not its content; None: any.
    """

    keys: tuple[SSlibKey, ...]
    threshold: int = 1
    policies: frozenset[str] | None = None
    max_age: timedelta | None = None
    data: frozenset[str] | None = None


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
    """Sign what the gate wrote, or add signatures to those that are there; returns until when they hold.

    Nobody signs blindly: what is there must be what the gate would have written beside this report. How long it holds
    is the policy's.
    """
    path = evidence / ATTESTATION
    report, digest = _read_report(evidence)
    _require_evidence(report, evidence)
    envelopes = _envelopes(path) if path.exists() else None
    fresh = _unsigned(report, digest, _object(report, "policy", evidence).get("valid_days"))
    if envelopes is not None and [_said(envelope) for envelope in envelopes] != [_said(envelope) for envelope in fresh]:
        raise NotAttested(f"{path}: does not say what {REPORT} says; remove it and sign again")
    write_text(path, _signed(envelopes or fresh, [read_signer(key) for key in keys]))
    return datetime.fromisoformat(json.loads(fresh[1].payload)["predicate"]["expires"])


def read_attestation(evidence: Path, trust: Trust) -> Attestation:
    """What trusted keys say in an evidence directory, whatever the verdict; NotAttested where too few of them do."""
    path = evidence / ATTESTATION
    envelopes = _envelopes(path)
    signers = _signers_of_all(envelopes, trust.keys)
    if len(envelopes) != 2:
        raise NotAttested(f"{path}: holds {len(envelopes)} envelopes, expected 2; sign the evidence again")
    if len(signers) < max(trust.threshold, 1):
        raise NotAttested(
            f"{path}: {len(signers)} trusted keys signed both statements as they are here, {trust.threshold} must;"
            " sign with dfmcl sign, or trust the signer"
        )
    by_kind: dict[str, Statement] = {}
    for envelope in envelopes:
        if envelope.payload_type != PAYLOAD_TYPE:
            raise NotAttested(f"{path}: payload type is {envelope.payload_type!r}, expected {PAYLOAD_TYPE!r}")
        statement = _parsed(envelope.payload, path)
        if statement.get("_type") != STATEMENT:
            raise NotAttested(f"{path}: statement type is {statement.get('_type')!r}, expected {STATEMENT!r}")
        by_kind[str(statement.get("predicateType"))] = statement
    if by_kind.keys() != {TEST_RESULT, ROBUSTNESS}:
        raise NotAttested(f"{path}: predicate types are {', '.join(by_kind)}; expected {TEST_RESULT}, {ROBUSTNESS}")
    try:
        test_result, robustness = by_kind[TEST_RESULT], by_kind[ROBUSTNESS]
        subject = _subject(robustness)
        if _subject(test_result) != subject:
            raise NotAttested(f"{path}: its two statements are about different files; sign the evidence again")
        return Attestation(subject, test_result["predicate"], robustness["predicate"], tuple(sorted(signers)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadEvidence(f"{path}: a malformed statement was signed: {_reason(error)}; sign again") from None


def verify(candidate: Path, evidence: Path, trust: Trust, now: datetime | None = None) -> dict[str, Any]:
    """The report, if enough trusted keys say that exactly the candidate's bytes passed, and still do at `now` (UTC).

    NotAttested (1): they do not say it, or not about these bytes, or what the trust file asks for does not hold.
    BadEvidence (2): missing or malformed files. A promoted version is its own evidence.
    """
    path = evidence / ATTESTATION
    attestation = read_attestation(evidence, trust)
    try:
        signed = _require_current(attestation, trust, now or datetime.now(UTC), path)
        report, found = _read_report(evidence)
        if found != signed:
            raise NotAttested(f"{evidence / REPORT}: is not the report that was signed; gate and sign again")
        if attestation.subject != subjects(report):
            raise NotAttested(f"{path}: is about other files than {REPORT}; sign the evidence again")
        if attestation.robustness["policy"]["sha256"] != report["policy"]["sha256"]:
            raise NotAttested(f"{path}: is about another policy than {REPORT}; sign the evidence again")
        _require_passed(report, candidate, evidence)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadEvidence(f"{path}: a malformed statement was signed: {_reason(error)}; sign again") from None
    return report


def inspect(candidate: Path, evidence: Path) -> dict[str, Any]:
    """The report, if it holds a passing verdict for exactly the candidate's bytes; who wrote it, nobody asks here."""
    report, _ = _read_report(evidence)
    _require_passed(report, candidate, evidence)
    return report


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadEvidence(f"{path}: {error.strerror}; make it again with dfmcl export or dfmcl gate") from None


def read_candidate(candidate: Path) -> dict[str, Any]:
    """The manifest of a candidate whose files are the ones it lists, byte for byte; BadEvidence otherwise."""
    manifest = _json(candidate / MANIFEST, CANDIDATE_FORMAT)
    files = _object(manifest, "files", candidate)
    if "model.onnx" not in files:
        raise BadEvidence(f"{candidate / MANIFEST}: lists no model.onnx; export the candidate again")
    for name, digest in files.items():
        if Path(name).name != name:
            raise BadEvidence(f"{candidate / MANIFEST}: {name!r} is no plain file name; export the candidate again")
        found = file_digest(candidate / name)
        if found != digest:
            raise BadEvidence(
                f"{candidate / name}: SHA-256 is {found[:12]}..., its manifest says {str(digest)[:12]}...;"
                " the file was changed after export, export the candidate again"
            )
    return manifest


def candidate_files(candidate: Path) -> dict[str, str]:
    """SHA-256 of every file of a whole candidate, the manifest too: what a report names and an attestation is about."""
    files: dict[str, str] = read_candidate(candidate)["files"]
    return {**files, MANIFEST: file_digest(candidate / MANIFEST)}


def _require_current(attestation: Attestation, trust: Trust, now: datetime, path: Path) -> str:
    """The SHA-256 of the report that the statements are about, once their verdict, policy and dates hold."""
    test_result, robustness = attestation.test_result, attestation.robustness
    if robustness["verdict"] != "passed":
        raise NotAttested(f"{path}: the verdict is {robustness['verdict']!r}; only what passed is promoted")
    if test_result["result"] != "PASSED":
        raise NotAttested(f"{path}: the test result is {test_result['result']!r}; only what passed is promoted")
    policy = robustness["policy"]["sha256"]
    if trust.policies is not None and policy not in trust.policies:
        raise NotAttested(f"{path}: policy {policy[:12]}... is none that the trust file allows; gate by one of those")
    if trust.data is not None and robustness["data"]["sha256"] not in trust.data:
        raise NotAttested(
            f"{path}: was judged on data {robustness['data']['sha256'][:12]}..., which the trust file does not list"
        )
    if attestation.created > now + CLOCK_SKEW:
        raise NotAttested(f"{path}: was made on {attestation.created:%Y-%m-%d %H:%M}, in the future; check the clocks")
    if now >= attestation.expires:
        raise NotAttested(f"{path}: expired on {attestation.expires:%Y-%m-%d}; run dfmcl gate again")
    if trust.max_age is not None and now - attestation.created > trust.max_age:
        raise NotAttested(
            f"{path}: the gate ran on {attestation.created:%Y-%m-%d}, longer ago than the trust file's"
            f" {trust.max_age.days} days; run dfmcl gate again"
        )
    report_sha256 = str(robustness["report"]["sha256"])
    configured = {entry["name"]: entry["digest"]["sha256"] for entry in test_result["configuration"]}
    if configured[REPORT] != report_sha256:
        raise NotAttested(f"{path}: its two statements are about different reports; sign the evidence again")
    return report_sha256


def _require_passed(report: dict[str, Any], candidate: Path, evidence: Path) -> None:
    """Refuse a report that did not pass, or whose candidate or evidence is not, file for file, what lies there."""
    files = _object(_object(report, "candidate", evidence), "files", evidence)
    beside = {REPORT, ATTESTATION, *_object(report, "files", evidence)}
    allowed = {*files, *(beside if _same(candidate, evidence) else ())}
    try:
        found = sorted(path.name for path in candidate.iterdir())
    except OSError as error:
        raise BadEvidence(f"{candidate}: {error.strerror}; name a candidate or a promoted version") from None
    if missing := sorted({"model.onnx", MANIFEST} - files.keys()):
        raise NotAttested(f"{evidence}: was not made for {missing[0]}; run dfmcl gate on this candidate")
    if extra := [name for name in found if name not in allowed]:
        raise NotAttested(f"{candidate / extra[0]}: was not judged; remove it, or run dfmcl gate on what is there")
    for name, digest in files.items():
        _require_file(candidate, name, digest, "is not what the gate judged; run dfmcl gate on this candidate")
    _require_evidence(report, evidence)
    if report.get("verdict") != "passed":
        raise NotAttested(f"{evidence}: the verdict is {report.get('verdict')!r}; only what passed is promoted")


def _require_evidence(report: dict[str, Any], evidence: Path) -> None:
    files = _object(report, "files", evidence)
    if PROBES not in files:
        raise BadEvidence(f"{evidence / REPORT}: lists no {PROBES}; run dfmcl gate again")
    for name, digest in files.items():
        _require_file(evidence, name, digest, "is not what the gate wrote; run dfmcl gate on this candidate again")


def _require_file(directory: Path, name: str, digest: str, otherwise: str) -> None:
    path = directory / name
    if Path(name).name != name or path.is_symlink() or (path.exists() and not path.is_file()):
        raise NotAttested(f"{path}: is no plain file; {otherwise.partition('; ')[2]}")
    if file_digest(path) != digest:
        raise NotAttested(f"{path}: {otherwise}")


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _unsigned(report: dict[str, Any], report_sha256: str, expires_days: Any) -> list[Envelope]:
    """Both statements, in envelopes; one report gives the same bytes always. BadEvidence where it is no gate's."""
    try:
        made = statements(report, report_sha256, expiry(report, expires_days))
        texts = [json.dumps(statement, sort_keys=True, separators=(",", ":"), allow_nan=False) for statement in made]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadEvidence(f"the report cannot be signed: {_reason(error)}; run dfmcl gate again") from None
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
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise NotAttested(f"{path}: no such file; gate with --key, or dfmcl sign the evidence") from None
    except OSError as error:
        raise BadEvidence(f"{path}: {error.strerror}") from None
    envelopes = []
    for number, line in enumerate(lines, 1):
        try:
            envelopes.append(Envelope.from_dict(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SignatureError) as error:
            raise BadEvidence(f"{path}: line {number} is no DSSE envelope: {_reason(error)}; sign again") from None
    return envelopes


def _signers_of_all(envelopes: Sequence[Envelope], keys: Sequence[SSlibKey]) -> set[str]:
    """Ids of the keys whose valid signature every envelope carries."""
    return {key.keyid for key in keys if envelopes and all(_is_signed_by(envelope, key) for envelope in envelopes)}


def _is_signed_by(envelope: Envelope, key: SSlibKey) -> bool:
    try:
        return key.keyid in envelope.verify([key], 1)
    except (SignatureError, AttributeError, ValueError):  # a payload type that is no text fails inside
        return False


def _parsed(payload: bytes, path: Path) -> Statement:
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BadEvidence(f"{path}: a payload that is no JSON was signed: {error}; sign again") from None
    if not isinstance(value, dict):
        raise BadEvidence(f"{path}: a payload that is no statement was signed; sign again")
    return value


def _subject(statement: Statement) -> dict[str, str]:
    return {str(entry["name"]): str(entry["digest"]["sha256"]) for entry in statement["subject"]}


def _read_report(evidence: Path) -> tuple[dict[str, Any], str]:
    """The report, and the SHA-256 of the very bytes it was read from."""
    path = evidence / REPORT
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadEvidence(f"{path}: {error.strerror}") from None
    return _json(path, REPORT_FORMAT, data), hashlib.sha256(data).hexdigest()


def _object(value: dict[str, Any], key: str, where: Path) -> dict[str, Any]:
    found = value.get(key)
    if not isinstance(found, dict):
        raise BadEvidence(f"{where}: {key} is {type(found).__name__}, expected an object; make it again")
    return found


def _json(path: Path, expected: str, data: bytes | None = None) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes() if data is None else data)
    except OSError as error:
        raise BadEvidence(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadEvidence(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict) or value.get("format") != expected:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise BadEvidence(f"{path}: format is {found!r}; expected {expected!r}")
    return value


def _reason(error: Exception) -> str:
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)
