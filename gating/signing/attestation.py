"""Proof that exactly these bytes passed: two in-toto statements in signed DSSE envelopes, and how they are judged.

DSSE is github.com/secure-systems-lab/dsse. A signature is checked before anything it covers is read, and every doubt is
a refusal.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from securesystemslib.dsse import Envelope

from dfmcl.common.errors import BadInput
from dfmcl.common.files import write_text
from dfmcl.common.providers import Decider
from dfmcl.gating.signing.envelopes import (
    PAYLOAD_TYPE,
    Statement,
    is_forged,
    read_envelopes,
    said_by,
    signed_lines,
    signers_of_all,
    statement_in,
    subject_of,
)
from dfmcl.gating.signing.evidence import (
    ATTESTATION,
    MALFORMED,
    MANIFEST,
    REPORT,
    SIGNATURE,
    file_digest,
    inspect,
    read_evidence,
    read_report,
    reason_of,
    require_verdict,
)
from dfmcl.gating.signing.faults import BadEvidence, NotAttested, refusal
from dfmcl.gating.signing.model_signature import (
    can_sign_models,
    model_signature,
    read_model_signature,
    require_listed,
    require_model_signature,
)
from dfmcl.gating.signing.signer import PublicKey, Signer
from dfmcl.gating.signing.statement import (
    ROBUSTNESS,
    STATEMENT,
    TEST_RESULT,
    expiry,
    robustness,
    statements,
    subjects,
    test_result,
)

if TYPE_CHECKING:
    from dfmcl.gating.signing.report import Report

DEFAULT = Decider().provider  # of statements from before they named it
NEEDS = "needs an ECDSA key on P-256"
CLOCK_SKEW = timedelta(minutes=10)  # between the machine of the gate and this one

__all__ = ["BadEvidence", "NotAttested"]


@dataclass(frozen=True)
class Trust:
    """Whose word counts. `threshold` distinct keys must have signed both statements, and one of `model_keys` model.sig;
    an empty one of the two lists asks for nothing, two of them let nothing pass.

    policies: digests of the policies that may let a model pass; None: any. max_age: since the gate ran; None: any.
    data: digests of the data sets that may be judged on, as a policy names a place and not its content; None: any.
    drawn: whether one of the keys must have drawn the order of the images.
    providers: execution providers that may decide; None: any.
    """

    keys: tuple[PublicKey, ...]
    threshold: int = 1
    policies: frozenset[str] | None = None
    max_age: timedelta | None = None
    data: frozenset[str] | None = None
    drawn: bool = False
    providers: frozenset[str] | None = None
    model_keys: tuple[PublicKey, ...] = ()


@dataclass(frozen=True)
class Attestation:
    """Two statements as trusted keys signed them, or as they follow from a report that a trusted model.sig covers.

    subject: SHA-256 by file name; signers: key ids.
    """

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


def sign(report: Report, report_sha256: str, signers: Sequence[Signer], *, expires_days: int) -> str:
    """attestation.intoto.jsonl: both statements about a report of any verdict, each signed by every signer.

    report_sha256: of the bytes of report.json. It expires so many days after the report was made.
    """
    return signed_lines(_unsigned(report, report_sha256, expires_days), signers)


def sign_evidence(evidence: Path, signers: Sequence[Signer]) -> datetime:
    """Sign the evidence, or add signatures to it; returns the time at which they expire.

    Nobody signs blindly: the report must follow from its own record, the files must be those that it names, and what
    is signed already must be what the gate would have written beside this report. How long it holds is the policy's.
    """
    path = evidence / ATTESTATION
    report, digest = read_evidence(evidence)
    envelopes = read_envelopes(path) if os.path.lexists(path) else None
    fresh = _unsigned(report, digest, report.policy.valid_days)
    modeller = model_signer(report, signers)
    if modeller is None and os.path.lexists(evidence / SIGNATURE):
        raise BadInput(
            f"{evidence / SIGNATURE}: would no longer be about the attestation; sign with its key, too, or remove it"
        )
    if envelopes is not None and [said_by(envelope) for envelope in envelopes] != [
        said_by(envelope) for envelope in fresh
    ]:
        raise refusal("unlike", f"{path}: does not say what {REPORT} says")
    _require_drawn(report, [signer.public_key for signer in signers], evidence / REPORT, by_one=False)
    text = signed_lines(envelopes or fresh, signers)
    if modeller is not None:  # first, because a server that saw the new attestation asks once
        files = {**_files(report, digest), ATTESTATION: hashlib.sha256(text.encode()).hexdigest()}
        write_text(evidence / SIGNATURE, model_signature(files, report.candidate.name, modeller))
    write_text(path, text)
    return datetime.fromisoformat(json.loads(fresh[1].payload)["predicate"]["expires"])


def model_signer(report: Report, signers: Sequence[Signer]) -> Signer | None:
    """The first that can sign model.sig, where the report is about a candidate; else there are no files to list."""
    able = [signer for signer in signers if can_sign_models(signer.public_key) and report.candidate.files]
    return able[0] if able else None


def sign_model(directory: Path, signer: Signer) -> None:
    """Write model.sig over all files of a release, whose attestation stays as it is. BadInput: no such kind of key."""
    if not can_sign_models(signer.public_key):
        raise BadInput(f"key {signer.public_key.keyid[:12]}: is {signer.public_key.scheme}; {SIGNATURE} {NEEDS}")
    report, _, files = _release(directory)
    write_text(directory / SIGNATURE, model_signature(files, report.candidate.name, signer))


def require_covered(directory: Path) -> None:
    """Refuse a model.sig that is about other files than these, whoever signed it."""
    _, _, files = _release(directory)
    require_listed(directory / SIGNATURE, read_model_signature(directory / SIGNATURE).files, files)


def _release(directory: Path) -> tuple[Report, str, dict[str, str]]:
    """The report that lies there, its SHA-256, and the SHA-256 by name of all that must lie beside it."""
    report, digest = read_report(directory / REPORT)
    return report, digest, {**_files(report, digest), ATTESTATION: file_digest(directory / ATTESTATION)}


def _files(report: Report, report_sha256: str) -> dict[str, str]:
    """SHA-256 by name of a release's files, less the attestation."""
    return {**report.candidate.files, **report.files, REPORT: report_sha256}


def read_attestation(evidence: Path, trust: Trust) -> Attestation:
    """What trusted keys say in an evidence directory, whatever the verdict; NotAttested where too few of them do."""
    by_model: tuple[str, ...] = ()
    if trust.model_keys:
        keyid, signed = require_model_signature(evidence / SIGNATURE, trust.model_keys)
        report, digest, files = _release(evidence)
        require_listed(evidence / SIGNATURE, signed, files)
        if not trust.keys:
            return _following_from(report, digest, keyid)
        by_model = (keyid,)
    found = _signed_statements(evidence, trust)
    return replace(found, signers=tuple(sorted({*found.signers, *by_model})))


def _following_from(report: Report, digest: str, keyid: str) -> Attestation:
    """What an attestation of this report would say."""
    test_result, robust = (
        json.loads(envelope.payload) for envelope in _unsigned(report, digest, report.policy.valid_days)
    )
    return Attestation(subject_of(robust), test_result["predicate"], robust["predicate"], (keyid,))


def _signed_statements(evidence: Path, trust: Trust) -> Attestation:
    path = evidence / ATTESTATION
    envelopes = read_envelopes(path)
    signers = signers_of_all(envelopes, trust.keys)
    if len(envelopes) != 2:
        raise refusal("envelopes", f"{path}: holds {len(envelopes)} envelopes, expected 2")
    if len(signers) < max(trust.threshold, 1):
        said = f"{len(signers)} trusted keys signed both statements as they are here, {trust.threshold} must"
        raise refusal("forged" if is_forged(envelopes, trust.keys) else "signers", f"{path}: {said}")
    by_kind: dict[str, Statement] = {}
    for envelope in envelopes:
        if envelope.payload_type != PAYLOAD_TYPE:
            raise refusal("statements", f"{path}: payload type is {envelope.payload_type!r}, expected {PAYLOAD_TYPE!r}")
        statement = statement_in(envelope.payload, path)
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
        subject = subject_of(robust)
        if subject_of(test_result) != subject:
            raise refusal("statements", f"{path}: its two statements are about different files")
        return Attestation(subject, test_result["predicate"], robust["predicate"], tuple(sorted(signers)))
    except MALFORMED as error:
        raise refusal("statement", f"{path}: a malformed statement was signed: {reason_of(error)}") from None


def verify(candidate: Path, evidence: Path, trust: Trust, now: datetime | None = None) -> Report:
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
        signed_by = [key for key in trust.keys if key.keyid in attestation.signers]
        _require_drawn(report, signed_by if trust.drawn else trust.keys, evidence / REPORT, by_one=trust.drawn)
    except MALFORMED as error:
        raise refusal("statement", f"{path}: a malformed statement was signed: {reason_of(error)}") from None
    return report


def _require_current(attestation: Attestation, trust: Trust, now: datetime, path: Path) -> str:
    """The SHA-256 of the report that the statements are about, once their verdict, policy and dates hold."""
    test_result, robust = attestation.test_result, attestation.robustness
    require_verdict(robust["verdict"], path)
    if test_result["result"] != "PASSED":
        raise refusal("statements", f"{path}: the test result is {test_result['result']!r}, and the verdict 'passed'")
    policy, data = robust["policy"]["sha256"], robust["data"]["sha256"]
    if trust.policies is not None and policy not in trust.policies:
        raise refusal("policy", f"{path}: policy {policy[:12]}... is none that the trust file allows")
    if trust.data is not None and data not in trust.data:
        raise refusal("data", f"{path}: was judged on data {data[:12]}..., which the trust file does not list")
    provider = robust.get("decided", {"provider": DEFAULT})["provider"]
    if trust.providers is not None and provider not in trust.providers:
        raise refusal("provider", f"{path}: {str(provider)[:80]!r} decided, which the trust file does not list")
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


def _require_alike(attestation: Attestation, report: Report, report_sha256: str, path: Path) -> None:
    """The statements repeat their report, no more and no less."""
    if attestation.subject != subjects(report):
        raise refusal("unlike", f"{path}: is about other files than {REPORT}")
    expires = expiry(report, report.policy.valid_days)
    for said, made in (
        (attestation.test_result, test_result(report, report_sha256)),
        (attestation.robustness, robustness(report, report_sha256, expires)),
    ):
        again = json.loads(json.dumps(made))
        other = [key for key in {**again, **said} if (key in said, said.get(key)) != (key in again, again.get(key))]
        if other:
            raise refusal("unlike", f"{path}: says another {other[0]} than {REPORT}")


def _require_drawn(report: Report, keys: Iterable[PublicKey], path: Path, *, by_one: bool) -> None:
    """Refuse an order that names one of the keys, which did not draw it; by_one: also one that none of them drew."""
    from dfmcl.gating.order import Matter  # here, as it loads numpy

    draw = report.statistics.draw
    if draw is None:
        if by_one:
            raise refusal("order", f"{path}: the order follows from digests alone")
        return
    own = {key.keyid: key for key in keys}
    matter = Matter(report.candidate.model_sha256, report.data.sha256, report.policy.sha256, report.data.images)
    if draw.keyid not in own and by_one:
        raise refusal("order", f"{path}: key {draw.keyid[:12]} drew the order, and is none that is trusted and signed")
    if draw.keyid in own and not draw.is_by(own[draw.keyid], matter):
        raise refusal("order", f"{path}: key {draw.keyid[:12]} did not draw the order that names it")


def _unsigned(report: Report, report_sha256: str, expires_days: int) -> list[Envelope]:
    """Both statements, in envelopes; one report gives the same bytes always. BadEvidence where it is no gate's."""
    try:
        made = statements(report, report_sha256, expiry(report, expires_days))
        texts = [json.dumps(statement, sort_keys=True, separators=(",", ":"), allow_nan=False) for statement in made]
    except MALFORMED as error:
        raise refusal("malformed", f"the report cannot be signed: {reason_of(error)}") from None
    return [Envelope(text.encode(), PAYLOAD_TYPE, {}) for text in texts]
