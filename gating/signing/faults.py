"""What may be wrong with evidence, one table: the exit code of each fault, and what to do about it.

1: it can be read, and does not prove what it must. 2: a file cannot be read as what it should be. `sign`, `verify`,
`verdict` and `promote` end with the same code for the same fault; docs/faults.md shows the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from dfmcl.common.errors import DfmclError


class EvidenceError(DfmclError):
    """Evidence that is not believed. fault: its row of FAULTS."""

    def __init__(self, message: str, fault: str) -> None:
        super().__init__(message)
        self.fault = fault


class NotAttested(EvidenceError):
    """The evidence does not vouch for these bytes."""

    exit_code = 1


class BadEvidence(EvidenceError):
    """Evidence or candidate is missing or malformed."""

    exit_code = 2


@dataclass(frozen=True)
class Fault:
    """kind: NotAttested (1) or BadEvidence (2). about: in a few words, for the table; advice: ends the message."""

    kind: type[EvidenceError]
    about: str
    advice: str


AGAIN = "run dfmcl gate again"
SIGN_AGAIN = "sign the evidence again"
FAULTS: dict[str, Fault] = {
    "missing": Fault(BadEvidence, "a file of candidate or evidence is not there", "export the candidate, or gate it"),
    "unreadable": Fault(BadEvidence, "a FIFO, device, link out, too large, too deep, no JSON", "make it again"),
    "format": Fault(BadEvidence, "JSON, but not of the format that is expected", "make it again"),
    "malformed": Fault(BadEvidence, "a part of the report is missing or of another type", AGAIN),
    "envelope": Fault(BadEvidence, "a line of the attestation is no DSSE envelope", SIGN_AGAIN),
    "statement": Fault(BadEvidence, "a trusted key signed a text that is no statement of ours", SIGN_AGAIN),
    "candidate": Fault(BadEvidence, "the candidate's files are not those of its own manifest", "export it again"),
    "probes": Fault(BadEvidence, "probes.npz is no archive of the gate's, or holds more than it may", AGAIN),
    "unsigned": Fault(NotAttested, "there is no attestation", "gate with --key, or sign it with dfmcl sign"),
    "signers": Fault(NotAttested, "too few trusted keys have signed", "sign with dfmcl sign, or trust the signer"),
    "forged": Fault(NotAttested, "a payload is not what a trusted key signed", "somebody changed it: gate again"),
    "envelopes": Fault(NotAttested, "not one envelope for each of the two statements", SIGN_AGAIN),
    "statements": Fault(NotAttested, "the statements are of another kind, or contradict each other", SIGN_AGAIN),
    "listed": Fault(NotAttested, "model.sig is about other files than lie there", SIGN_AGAIN),
    "contradiction": Fault(NotAttested, "the report contradicts its own record, policy or checks", AGAIN),
    "unlike": Fault(NotAttested, "the attestation does not say what the report says", "gate and sign again"),
    "bytes": Fault(NotAttested, "a file of the candidate is not the one that was judged", "repair it or gate this one"),
    "evidence": Fault(NotAttested, "a file of the evidence is not the one that the gate wrote", AGAIN),
    "stranger": Fault(NotAttested, "a file that nobody judged lies beside", "remove it, or gate what is there"),
    "verdict": Fault(NotAttested, "the verdict is not `passed`", "only what passed is promoted"),
    "policy": Fault(NotAttested, "the trust file does not list the policy", "gate by one that it lists"),
    "data": Fault(NotAttested, "the trust file does not list the data", "gate on data that it lists"),
    "provider": Fault(NotAttested, "the trust file does not list the provider", "gate with [decide] as it lists"),
    "order": Fault(NotAttested, "no trusted key drew the order of the images", "gate with --key, and trust that key"),
    "early": Fault(NotAttested, "made in the future", "check the clocks"),
    "expired": Fault(NotAttested, "the attestation has expired", AGAIN),
    "old": Fault(NotAttested, "older than the trust file's max_age_days", AGAIN),
}  # fmt: skip


def refusal(fault: str, said: str) -> EvidenceError:
    """The error of a fault: its words, then the advice of its row."""
    row = FAULTS[fault]
    return row.kind(f"{said}; {row.advice}", fault)
