"""What a signature proves, and everything that breaks it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from dfmcl.common.errors import BadInput
from dfmcl.gating.policy import load_policy
from dfmcl.gating.schema import PREDICATE, predicate_text
from dfmcl.gating.signing.attestation import BadEvidence, NotAttested, read_attestation, sign_evidence, verify
from dfmcl.gating.signing.envelopes import PAYLOAD_TYPE
from dfmcl.gating.signing.evidence import ATTESTATION, candidate_files, file_digest, inspect
from dfmcl.gating.signing.keys import keygen, read_public, read_signer
from dfmcl.gating.signing.statement import ROBUSTNESS, TEST_RESULT
from dfmcl.gating.signing.trust import load_trust
from dfmcl.robustness.checks import CHECKS
from tests.exports import Export
from tests.serving.workshop import write_run
from tests.signing import (
    CREATED,
    IMAGES,
    POLICY,
    make_key,
    policy_of,
    report_on,
    sign_again,
    trusting,
    write_report,
)

NOW = datetime.fromisoformat(CREATED) + timedelta(days=10)
ROOT = Path(__file__).parents[2]

RAN = [name for name in CHECKS if name != "seen_images"]  # what did not run neither passed nor failed


@pytest.fixture(scope="module")
def home(export_once: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where keys, the really exported candidate and its evidence lie; tests that change something copy it."""
    home = tmp_path_factory.mktemp("attestation")
    export_once(write_run(home / "run"), home / "candidate")
    (home / "evidence").mkdir()
    for name in ("release", "second", "foreign"):
        make_key(home / "keys", name)
    write_report(home / "evidence", report_on(home / "candidate", home / "evidence"), home / "keys" / "release.key")
    return home


@pytest.fixture
def key(home: Path) -> Path:
    return home / "keys" / "release.key"


@pytest.fixture
def second(home: Path) -> Path:
    return home / "keys" / "second.key"


@pytest.fixture
def foreign(home: Path) -> Path:
    return home / "keys" / "foreign.key"


@pytest.fixture
def pair(home: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A candidate and its signed evidence, to be spoiled."""
    return (
        shutil.copytree(home / "candidate", tmp_path / "candidate"),
        shutil.copytree(home / "evidence", tmp_path / "evidence"),
    )


def lines(evidence: Path) -> list[dict[str, Any]]:
    """The two envelopes."""
    return [json.loads(line) for line in (evidence / ATTESTATION).read_text().splitlines()]


def write_lines(evidence: Path, envelopes: list[dict[str, Any]]) -> None:
    (evidence / ATTESTATION).write_text("".join(json.dumps(envelope) + "\n" for envelope in envelopes))


def said(evidence: Path) -> list[dict[str, Any]]:
    """The two statements."""
    return [json.loads(base64.b64decode(envelope["payload"])) for envelope in lines(evidence)]


def pae(kind: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding, written down from its specification."""
    return b" ".join([b"DSSEv1", b"%d" % len(kind), kind.encode(), b"%d" % len(payload), payload])


def enveloped(statement: Any, *keys: Path, kind: str = PAYLOAD_TYPE) -> dict[str, Any]:
    """Any payload, signed: what a careless holder of a trusted key could hand out."""
    payload = json.dumps(statement).encode()
    signatures = []
    for path in keys:
        private = load_pem_private_key(path.read_bytes(), None)
        assert isinstance(private, Ed25519PrivateKey)
        signature = private.sign(pae(kind, payload))
        keyid = read_public(path.with_suffix(".pub")).keyid
        signatures.append({"keyid": keyid, "sig": base64.b64encode(signature).decode()})
    return {"payload": base64.b64encode(payload).decode(), "payloadType": kind, "signatures": signatures}


def test_the_tests_report_is_one_of_the_gates(pair: tuple[Path, Path]) -> None:
    """What is signed below has the form that the gate's schema prescribes."""
    schema = json.loads((resources.files("dfmcl.gating") / "report.schema.json").read_text())
    jsonschema.validate(json.loads((pair[1] / "report.json").read_text()), schema)


def test_signed_evidence_for_these_bytes_is_believed(pair: tuple[Path, Path], key: Path) -> None:
    """The report comes back, from candidate and evidence as from a version that holds both."""
    candidate, evidence = pair
    report = verify(candidate, evidence, trusting(key), NOW)
    assert report.to_json() == json.loads((evidence / "report.json").read_text())
    assert report == inspect(candidate, evidence)
    version = shutil.copytree(candidate, candidate.parent / "1")
    shutil.copytree(evidence, version, dirs_exist_ok=True)
    assert verify(version, version, trusting(key), NOW) == report


def test_envelopes_are_dsse_and_statements_in_toto(pair: tuple[Path, Path], key: Path) -> None:
    """Signatures hold by cryptography alone over DSSE's encoding; in-toto's own bindings take the statements."""
    public = load_pem_public_key(key.with_suffix(".pub").read_bytes())
    assert isinstance(public, Ed25519PublicKey)
    for envelope in lines(pair[1]):
        assert envelope["payloadType"] == "application/vnd.in-toto+json"
        (signature,) = envelope["signatures"]
        public.verify(
            base64.b64decode(signature["sig"]), pae(envelope["payloadType"], base64.b64decode(envelope["payload"]))
        )
    json_format = pytest.importorskip("google.protobuf.json_format")
    statement = pytest.importorskip("in_toto_attestation.v1.statement")
    results = pytest.importorskip("in_toto_attestation.predicates.test_result.v0.test_result_pb2")
    for value in said(pair[1]):
        parsed = json_format.ParseDict(value, statement.spb.Statement())
        statement.Statement.copy_from_pb(parsed).validate()
    result = json_format.ParseDict(said(pair[1])[0]["predicate"], results.TestResult())
    assert (result.result, len(result.passed_tests), len(result.configuration)) == ("PASSED", 2 + len(RAN), 4)


def test_statements_say_what_the_report_says(pair: tuple[Path, Path]) -> None:
    """Every file is a subject; tests, configuration, numbers, digests and dates are those of the report."""
    candidate, evidence = pair
    report = json.loads((evidence / "report.json").read_text())
    test, robust = said(evidence)
    for statement in (test, robust):
        assert statement["_type"] == "https://in-toto.io/Statement/v1"
        subject = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
        assert subject == {
            name: file_digest(candidate / name) for name in ("model.onnx", "labels.txt", "manifest.json")
        }
    assert test["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert test["predicate"] == {
        "result": "PASSED",
        "configuration": [
            {"name": "policy", "digest": {"sha256": POLICY}},
            {"name": "data digits", "digest": {"sha256": "d" * 64}},
            {"name": "report.json", "digest": {"sha256": file_digest(evidence / "report.json")}},
            {"name": "probes.npz", "digest": {"sha256": file_digest(evidence / "probes.npz")}},
        ],
        "passedTests": ["robust_accuracy >= 0.45 at 95 %", "clean_accuracy >= 0.5 at 95 %", *RAN],
        "failedTests": [],
    }
    predicate = robust["predicate"]
    assert robust["predicateType"] == ROBUSTNESS
    for part in ("verdict", "criteria", "statistics", "created", "versions", "hardware", "code"):
        assert predicate[part] == report[part]
    evaluation = predicate["evaluation"]
    assert (evaluation["threat"], evaluation["grid"]) == (report["evaluation"]["threat"], "uint8")
    assert (evaluation["robust"]["k"], evaluation["robust"]["n"]) == (IMAGES - 1, IMAGES)
    assert [(attack["name"], attack["flipped"]) for attack in evaluation["attacks"]] == [("fgsm", 1)]
    assert predicate["policy"]["sha256"] == POLICY
    assert predicate["data"]["sha256"] == "d" * 64
    assert predicate["report"]["sha256"] == file_digest(evidence / "report.json")
    created, expires = (datetime.fromisoformat(predicate[key]) for key in ("created", "expires"))
    assert expires - created == timedelta(days=report["policy"]["valid_days"])


def test_the_predicate_has_a_published_schema(pair: tuple[Path, Path]) -> None:
    """`make report-schema` wrote the file from the records as they are; a new and the shipped attestation fit, one with
    an entry more, less or of another type does not."""
    assert PREDICATE.read_text(encoding="utf-8") == predicate_text()
    schema = json.loads(predicate_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == ROBUSTNESS
    for evidence in (pair[1], ROOT / "model_repository" / "resnet18-cifar10" / "1"):
        predicate = said(evidence)[1]["predicate"]
        jsonschema.validate(predicate, schema)
        assert predicate.keys() <= schema["properties"].keys()
        for name in schema["required"]:
            for wrong in ({key: predicate[key] for key in predicate if key != name}, {**predicate, name: True}):
                with pytest.raises(jsonschema.ValidationError):
                    jsonschema.validate(wrong, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**predicate, "more": 1}, schema)


@pytest.mark.parametrize("verdict", ["failed", "inconclusive", "suspect"])
def test_any_verdict_is_signed_and_only_passed_is_let_in(pair: tuple[Path, Path], key: Path, verdict: str) -> None:
    """A block can be proven too; to others it is FAILED, with what was not shown, and it opens no door."""
    candidate, evidence = pair
    write_report(evidence, report_on(candidate, evidence, verdict), key)
    assert read_attestation(evidence, trusting(key)).robustness["verdict"] == verdict
    predicate = said(evidence)[0]["predicate"]
    assert predicate["result"] == "FAILED"
    assert (
        predicate["failedTests"]
        == {
            "failed": ["robust_accuracy >= 0.9999 at 95 %"],
            "inconclusive": ["clean_accuracy >= 0.99999 at 95 %"],
            "suspect": ["outputs_differ"],
        }[verdict]
    )
    assert bool(predicate["passedTests"])
    with pytest.raises(NotAttested, match=f"the verdict is '{verdict}'; only what passed is promoted"):
        verify(candidate, evidence, trusting(key), NOW)
    with pytest.raises(NotAttested, match=f"the verdict is '{verdict}'; only what passed is promoted"):
        inspect(candidate, evidence)


def append(name: str) -> Callable[[Path, Path], None]:
    """One byte more in a file of the candidate or, if it lies there, of the evidence."""

    def spoil(candidate: Path, evidence: Path) -> None:
        path = candidate / name if (candidate / name).exists() else evidence / name
        with path.open("ab") as file:
            file.write(b"\n")

    return spoil


def as_link(candidate: Path, evidence: Path) -> None:
    (candidate / "labels.txt").rename(candidate.parent / "labels.txt")
    (candidate / "labels.txt").symlink_to(candidate.parent / "labels.txt")


BYTES: dict[str, tuple[Callable[[Path, Path], object], type[Exception], str]] = {
    "model": (append("model.onnx"), NotAttested, "model.onnx: is not what the gate judged"),
    "labels": (append("labels.txt"), NotAttested, "labels.txt: is not what the gate judged"),
    "manifest": (append("manifest.json"), NotAttested, "manifest.json: is not what the gate judged"),
    "probes": (append("probes.npz"), NotAttested, "probes.npz: is not what the gate wrote"),
    "report": (append("report.json"), NotAttested, "report.json: is not the report that was signed"),
    "extra": (lambda c, e: (c / "libtriton.so").write_bytes(b""), NotAttested, "libtriton.so: was not judged"),
    "folder": (lambda c, e: (c / "more").mkdir(), NotAttested, "more: was not judged"),
    "missing": (lambda c, e: (c / "labels.txt").unlink(), BadEvidence, "labels.txt: No such file"),
    "link": (as_link, BadEvidence, "labels.txt: is no plain file"),
    "no probes": (lambda c, e: (e / "probes.npz").unlink(), BadEvidence, "probes.npz: No such file"),
    "no report": (lambda c, e: (e / "report.json").unlink(), BadEvidence, "report.json: No such file"),
    "no candidate": (lambda c, e: shutil.rmtree(c), BadEvidence, "manifest.json: no such file"),
    "unsigned": (lambda c, e: (e / ATTESTATION).unlink(), NotAttested, "attestation.intoto.jsonl: no such file"),
}


@pytest.mark.parametrize("case", BYTES)
def test_other_bytes_are_refused(pair: tuple[Path, Path], key: Path, case: str) -> None:
    """One byte more, a file more or a file less in candidate or evidence, and the signature opens no door."""
    spoil, kind, message = BYTES[case]
    spoil(*pair)
    with pytest.raises(kind) as caught:
        verify(*pair, trusting(key), NOW)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def retyped(e: Path, k: Path) -> None:
    """Another payload type, signed as it stands."""
    write_lines(e, [enveloped(statement, k, kind="text/plain") for statement in said(e)])


def changed(place: int, **entries: Any) -> Callable[[Path, Path], None]:
    """Statement number `place` with other entries, validly signed."""

    def spoil(evidence: Path, key: Path) -> None:
        statements = said(evidence)
        statements[place] |= entries
        write_lines(evidence, [enveloped(statement, key) for statement in statements])

    return spoil


def predicated(place: int, **entries: Any) -> Callable[[Path, Path], None]:
    """Statement number `place` with other entries in its predicate, validly signed."""

    def spoil(evidence: Path, key: Path) -> None:
        changed(place, predicate={**said(evidence)[place]["predicate"], **entries})(evidence, key)

    return spoil


def without(place: int, entry: str) -> Callable[[Path, Path], None]:
    """Statement number `place` without an entry of its predicate, validly signed."""

    def spoil(evidence: Path, key: Path) -> None:
        predicate = said(evidence)[place]["predicate"]
        del predicate[entry]
        changed(place, predicate=predicate)(evidence, key)

    return spoil


def swapped(e: Path, k: Path) -> None:
    """Each payload under the other's signature."""
    one, two = lines(e)
    write_lines(e, [one | {"payload": two["payload"]}, two | {"payload": one["payload"]}])


def upgraded(e: Path, k: Path) -> None:
    """The number that matters, edited under the old signature."""
    one, two = lines(e)
    statement = said(e)[1]
    statement["predicate"]["criteria"][0]["lower"] = 0.99
    write_lines(e, [one, two | {"payload": base64.b64encode(json.dumps(statement).encode()).decode()}])


def mixed(e: Path, k: Path) -> None:
    """Two honest evaluations of the same files; one statement of each."""
    first = lines(e)[0]
    sign_again(e, k, seconds=0.2)
    write_lines(e, [first, lines(e)[1]])


def signed_by_one_only(e: Path, k: Path) -> None:
    one, two = lines(e)
    write_lines(e, [one, two | {"signatures": []}])


def cut(e: Path, k: Path) -> None:
    text = (e / ATTESTATION).read_text()
    (e / ATTESTATION).write_text(text[: len(text) * 3 // 4])


def deeper(e: Path, k: Path) -> None:
    (e / ATTESTATION).write_text("[" * 100_000)


FEW = "0 trusted keys signed both statements as they are here, 1 must"
ENVELOPES: dict[str, tuple[Callable[[Path, Path], object], type[Exception], str]] = {
    "truncated": (cut, BadEvidence, "line 2 is no DSSE envelope"),
    "nested": (deeper, BadEvidence, "line 1 is no DSSE envelope"),
    "no object": (lambda e, k: write_lines(e, [{}, {}]), BadEvidence, "line 1 is no DSSE envelope: lacks 'payload'"),
    "empty": (lambda e, k: write_lines(e, []), NotAttested, "holds 0 envelopes, expected 2"),
    "one missing": (lambda e, k: write_lines(e, lines(e)[1:]), NotAttested, "holds 1 envelopes, expected 2"),
    "one too many": (lambda e, k: write_lines(e, lines(e) * 2), NotAttested, "holds 4 envelopes, expected 2"),
    "one twice": (lambda e, k: write_lines(e, lines(e)[1:] * 2), NotAttested, f"predicate types are {ROBUSTNESS};"),
    "swapped payloads": (swapped, NotAttested, f"{FEW}; somebody changed it"),
    "edited payload": (upgraded, NotAttested, f"{FEW}; somebody changed it"),
    "one unsigned": (signed_by_one_only, NotAttested, f"{FEW}; sign with dfmcl sign, or trust the signer"),
    "payload type": (retyped, NotAttested, "payload type is 'text/plain', expected 'application/vnd.in-toto+json'"),
    "statement type": (changed(1, _type="v0"), NotAttested, "statement type is 'v0', expected"),
    "wrong predicate": (
        changed(1, predicateType="https://slsa.dev/provenance/v1"),
        NotAttested,
        f"predicate types are {TEST_RESULT}, https://slsa.dev/provenance/v1; expected",
    ),
    "no statement": (
        lambda e, k: write_lines(e, [enveloped([], k)] * 2),
        BadEvidence,
        "a payload that is no statement was signed",
    ),
    "no predicate": (changed(1, predicate=None), BadEvidence, "a malformed statement was signed"),
    "no verdict": (changed(1, predicate={}), BadEvidence, "a malformed statement was signed: lacks 'verdict'"),
    "no subject": (changed(0, subject=None), BadEvidence, "a malformed statement was signed"),
    "two subjects": (changed(0, subject=[]), NotAttested, "its two statements are about different files"),
    "two results": (
        predicated(0, result="FAILED"),
        NotAttested,
        "the test result is 'FAILED', and the verdict 'passed'",
    ),
    "two reports": (mixed, NotAttested, "its two statements are about different reports"),
    "two policies": (
        predicated(1, policy={"sha256": "0" * 64}),
        NotAttested,
        "says another policy than report.json",
    ),
    "one entry more": (predicated(1, note="splendid"), NotAttested, "says another note than report.json"),
    "one entry less": (without(1, "checks"), NotAttested, "says another checks than report.json"),
    "naive clock": (
        predicated(1, expires="2027-01-01T00:00:00"),
        BadEvidence,
        "a malformed statement was signed: can't compare offset-naive and offset-aware datetimes",
    ),
}


@pytest.mark.parametrize("case", ENVELOPES)
def test_broken_envelopes_are_refused(pair: tuple[Path, Path], key: Path, case: str) -> None:
    """Neither what nobody signed, nor what was signed for another purpose, is taken for an attestation."""
    spoil, kind, message = ENVELOPES[case]
    spoil(pair[1], key)
    with pytest.raises(kind) as caught:
        verify(*pair, trusting(key), NOW)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_other_than_the_signed_ones_are_refused(pair: tuple[Path, Path], key: Path) -> None:
    """Both statements about other files than the report: the signature is not about what the gate judged."""
    candidate, evidence = pair
    other = [{"name": "model.onnx", "digest": {"sha256": "0" * 64}}]
    write_lines(evidence, [enveloped(statement | {"subject": other}, key) for statement in said(evidence)])
    with pytest.raises(NotAttested, match=r"is about other files than report\.json"):
        verify(candidate, evidence, trusting(key), NOW)


def test_a_foreign_key_counts_for_nothing(pair: tuple[Path, Path], key: Path, foreign: Path) -> None:
    """A valid signature by another key is none, nor is one under a trusted key's id."""
    candidate, evidence = pair
    sign_again(evidence, foreign)
    with pytest.raises(NotAttested, match=FEW):
        verify(candidate, evidence, trusting(key), NOW)
    envelopes = lines(evidence)
    for envelope in envelopes:
        envelope["signatures"][0]["keyid"] = read_public(key.with_suffix(".pub")).keyid
    write_lines(evidence, envelopes)
    with pytest.raises(NotAttested, match=FEW):
        verify(candidate, evidence, trusting(key), NOW)


def test_nobody_trusted_means_nothing_believed(pair: tuple[Path, Path], key: Path) -> None:
    """No keys, or a threshold of none, let nothing in."""
    with pytest.raises(NotAttested, match="0 trusted keys"):
        verify(*pair, trusting(), NOW)
    with pytest.raises(NotAttested, match="0 trusted keys"):
        verify(*pair, replace(trusting(), threshold=0), NOW)


def test_two_must_sign_where_two_are_asked_for(pair: tuple[Path, Path], key: Path, second: Path) -> None:
    """One signer is one signer, however often; the second one's signature completes it."""
    both = trusting(key, second, threshold=2)
    candidate, evidence = pair
    message = "1 trusted keys signed both statements as they are here, 2 must"
    with pytest.raises(NotAttested, match=message):
        verify(candidate, evidence, both, NOW)
    sign_evidence(evidence, [read_signer(key)])
    with pytest.raises(NotAttested, match=message):
        verify(candidate, evidence, both, NOW)
    with pytest.raises(NotAttested, match=message):
        verify(candidate, evidence, trusting(key, key, threshold=2), NOW)
    sign_evidence(evidence, [read_signer(second)])
    assert verify(candidate, evidence, both, NOW).verdict == "passed"
    signers = {read_public(path.with_suffix(".pub")).keyid for path in (key, second)}
    assert set(read_attestation(evidence, both).signers) == signers


def test_one_signer_listed_twice_in_an_envelope_is_refused(pair: tuple[Path, Path], key: Path, second: Path) -> None:
    """A second entry under the same key id does not make a second signer."""
    envelopes = lines(pair[1])
    write_lines(pair[1], [envelope | {"signatures": envelope["signatures"] * 2} for envelope in envelopes])
    with pytest.raises(BadEvidence, match="line 1 is no DSSE envelope: Multiple signatures"):
        verify(*pair, trusting(key, second, threshold=2), NOW)


def test_each_signer_must_have_signed_both(pair: tuple[Path, Path], key: Path, second: Path) -> None:
    """Two people who signed one statement each have not agreed on anything."""
    statements = said(pair[1])
    write_lines(pair[1], [enveloped(statements[0], key), enveloped(statements[1], second)])
    with pytest.raises(NotAttested, match=FEW):
        verify(*pair, trusting(key, second), NOW)


def test_keys_rotate_by_a_list(pair: tuple[Path, Path], key: Path, second: Path) -> None:
    """While old and new are listed both hold; once the old one is dropped, what only it signed holds no more."""
    candidate, evidence = pair
    assert verify(candidate, evidence, trusting(key, second), NOW)
    old = shutil.copytree(evidence, evidence.parent / "old")
    sign_again(evidence, second)
    assert verify(candidate, evidence, trusting(key, second), NOW)
    assert verify(candidate, evidence, trusting(second), NOW)
    with pytest.raises(NotAttested, match=FEW):
        verify(candidate, old, trusting(second), NOW)


def test_only_allowed_policies_let_pass(pair: tuple[Path, Path], key: Path) -> None:
    """A signed pass by a softened policy is refused."""
    assert verify(*pair, trusting(key, policies=frozenset({POLICY, "b" * 64})), NOW)
    with pytest.raises(NotAttested, match=rf"policy {POLICY[:12]}\.\.\. is none that the trust file allows"):
        verify(*pair, trusting(key, policies=frozenset({"b" * 64})), NOW)


def test_only_listed_data_let_pass(pair: tuple[Path, Path], key: Path) -> None:
    """A policy names a place; what lay there is in the attestation."""
    assert verify(*pair, trusting(key, data=frozenset({"d" * 64})), NOW)
    with pytest.raises(NotAttested, match=r"was judged on data dddddddddddd\.\.\., which the trust file does not list"):
        verify(*pair, trusting(key, data=frozenset({"e" * 64})), NOW)


def test_time_runs_out(pair: tuple[Path, Path], key: Path) -> None:
    """Believed until the policy's days are over or the trust file's, and not before the gate ran."""
    candidate, evidence = pair
    write_report(evidence, report_on(candidate, evidence, policy=policy_of(valid_days=30)), key)
    created = datetime.fromisoformat(CREATED)
    moment = timedelta(seconds=1)
    assert verify(candidate, evidence, trusting(key), created + timedelta(days=30) - moment)
    with pytest.raises(NotAttested, match="expired on 2026-02-01; run dfmcl gate again"):
        verify(candidate, evidence, trusting(key), created + timedelta(days=30))
    young = trusting(key, max_age=timedelta(days=7))
    assert verify(candidate, evidence, young, created + timedelta(days=7))
    with pytest.raises(NotAttested, match="the gate ran on 2026-01-02, longer ago than the trust file's 7 days"):
        verify(candidate, evidence, young, created + timedelta(days=7) + moment)
    assert verify(candidate, evidence, trusting(key), created - timedelta(minutes=9))  # clocks differ
    with pytest.raises(NotAttested, match="was made on 2026-01-02 03:04, in the future; check the clocks"):
        verify(candidate, evidence, trusting(key), created - timedelta(minutes=11))
    with pytest.raises(NotAttested, match="expired" if datetime.now(UTC) > created + timedelta(days=30) else "future"):
        verify(candidate, evidence, trusting(key))  # by default the clock decides


def test_signing_late_prolongs_nothing(pair: tuple[Path, Path], second: Path) -> None:
    """The days count from the gate, whenever it is signed."""
    expires = datetime.fromisoformat(said(pair[1])[1]["predicate"]["expires"])
    (pair[1] / ATTESTATION).unlink()
    assert sign_evidence(pair[1], [read_signer(second)]) == expires


def test_nobody_signs_blindly(pair: tuple[Path, Path], key: Path, second: Path) -> None:
    """A second signature is not added to statements that say something else than the report, nor to broken evidence."""
    evidence = pair[1]
    before = (evidence / ATTESTATION).read_text()
    predicated(1, verdict="splendid")(evidence, key)
    with pytest.raises(NotAttested, match=r"does not say what report\.json says"):
        sign_evidence(evidence, [read_signer(second)])
    (evidence / ATTESTATION).write_text(before)
    (evidence / "probes.npz").write_bytes(b"other")
    with pytest.raises(NotAttested, match=r"probes\.npz: is not what the gate wrote"):
        sign_evidence(evidence, [read_signer(second)])
    assert (evidence / ATTESTATION).read_text() == before


def test_what_is_no_candidate_is_signed_and_not_let_in(pair: tuple[Path, Path], key: Path) -> None:
    """An ONNX file or endpoint has a verdict to show, but no files that promotion could compare."""
    candidate, evidence = pair
    entry = json.loads((evidence / "report.json").read_text())["candidate"]
    sign_again(evidence, key, candidate=entry | {"kind": "onnx", "name": "/home/me/net.onnx", "files": {}})
    assert read_attestation(evidence, trusting(key)).subject == {"net.onnx": entry["model_sha256"]}
    with pytest.raises(NotAttested, match=r"was not made for manifest\.json"):
        verify(candidate, evidence, trusting(key), NOW)


@pytest.mark.parametrize("part", ["candidate", "criteria", "created", "statistics", "data", "verdict"])
def test_what_is_no_report_is_not_signed(pair: tuple[Path, Path], key: Path, part: str) -> None:
    """A report without one of its parts gives one line, not half a statement."""
    path = pair[1] / "report.json"
    report = json.loads(path.read_text())
    del report[part]
    path.write_text(json.dumps(report))
    with pytest.raises(BadEvidence, match=rf"not a gate's report \(lacks '{part}'\); run dfmcl gate again"):
        sign_evidence(pair[1], [read_signer(key)])


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "dfmcl.report/1"}', "[" * 100_000, '{"a": 1, "a": 2}'])
def test_what_is_no_report_is_not_inspected(pair: tuple[Path, Path], text: str) -> None:
    """A file that is no report of this format is named, with its kind."""
    (pair[1] / "report.json").write_text(text)
    with pytest.raises(BadEvidence, match=r"report\.json: (not readable as JSON|format is|expected|is nested)"):
        inspect(*pair)


@pytest.mark.parametrize("change", [{"candidate": []}, {"files": None}, {"candidate": {"files": []}}, {"files": {}}])
def test_malformed_report_is_bad_input(pair: tuple[Path, Path], change: dict[str, Any]) -> None:
    """A report of the right format but the wrong shape gives a message, never a traceback or a pass."""
    path = pair[1] / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BadEvidence):
        inspect(*pair)


def test_candidate_files_are_all_of_them(pair: tuple[Path, Path]) -> None:
    """The manifest decides how the model is served, so that its bytes count too."""
    assert candidate_files(pair[0]) == {path.name: file_digest(path) for path in pair[0].iterdir()}


def test_keys_are_kept_secret_and_never_overwritten(tmp_path: Path) -> None:
    """The private key is its owner's alone, fits the public one, and a name that is taken is refused."""
    keyid = keygen(tmp_path / "release.v1")
    private, public = tmp_path / "release.v1.key", tmp_path / "release.v1.pub"
    assert private.stat().st_mode & 0o777 == 0o600
    assert read_signer(private).public_key.keyid == read_public(public).keyid == keyid
    key = read_public(public)
    canonical = json.dumps(
        {"keytype": "ed25519", "keyval": key.keyval, "scheme": "ed25519"}, sort_keys=True, separators=(",", ":")
    )
    assert keyid == hashlib.sha256(canonical.encode()).hexdigest()
    before = private.read_bytes(), public.read_bytes()
    with pytest.raises(BadInput, match=r"release\.v1\.key: exists, and a key is never overwritten"):
        keygen(tmp_path / "release.v1")
    private.unlink()
    with pytest.raises(BadInput, match=r"release\.v1\.pub: exists"):
        keygen(tmp_path / "release.v1")
    assert (public.read_bytes(), private.exists()) == (before[1], False)
    with pytest.raises(BadInput, match="is no directory; make it first"):
        keygen(tmp_path / "nowhere" / "release")


def test_what_is_no_key_is_refused(tmp_path: Path, key: Path) -> None:
    """A missing file, text, the wrong half, another kind of key or one behind a password: one line with the file."""
    other = rsa.generate_private_key(65537, 1024)
    pems = {
        "text": b"hello",
        "rsa": other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "rsa.pub": other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "locked": load_pem_private_key(key.read_bytes(), None).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
        ),
    }
    for name, data in pems.items():
        (tmp_path / name).write_bytes(data)
    for path, reason in {
        tmp_path / "none": "No such file",
        tmp_path / "text": "no private key in unencrypted PEM",
        tmp_path / "locked": "no private key in unencrypted PEM",
        key.with_suffix(".pub"): "no private key in unencrypted PEM",
        tmp_path / "rsa": "neither an ed25519 key nor one of ECDSA on P-256",
    }.items():
        with pytest.raises(BadInput) as caught:
            read_signer(path)
        assert str(caught.value).startswith(f"{path}: {reason}")
    for path, reason in {
        tmp_path / "none": "No such file",
        key: "no public key in PEM",
        tmp_path / "rsa.pub": "neither an ed25519 key nor one of ECDSA on P-256",
    }.items():
        with pytest.raises(BadInput) as caught:
            read_public(path)
        assert str(caught.value).startswith(f"{path}: {reason}")


def test_a_trust_file_is_read_where_it_lies(tmp_path: Path, key: Path, second: Path) -> None:
    """Keys and policies are found relative to the file, not to the working directory; digests are taken as given."""
    for path in (key, second):
        shutil.copy(path.with_suffix(".pub"), tmp_path)
    policy = ROOT / "deploy" / "quickstart" / "gate.toml"
    shutil.copy(policy, tmp_path / "gate.toml")
    (tmp_path / "trust.toml").write_text(
        f"""
        threshold = 2
        keys = ["release.pub", "second.pub"]
        policies = ["gate.toml", "{"b" * 64}"]
        max_age_days = 30
        """
    )
    trust = load_trust(tmp_path / "trust.toml")
    assert {found.keyid for found in trust.keys} == {
        read_public(tmp_path / f"{n}.pub").keyid for n in ("release", "second")
    }
    assert (trust.threshold, trust.max_age) == (2, timedelta(days=30))
    assert trust.policies == frozenset({load_policy(policy).digest, "b" * 64})
    (tmp_path / "trust.toml").write_text('keys = ["release.pub"]')
    trust = load_trust(tmp_path / "trust.toml")
    assert (trust.threshold, trust.max_age, trust.policies) == (1, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys = []", "keys: List should have at least 1 item"),
        ("threshold = 1", "trusts nobody; list keys"),
        ('keys = ["release.pub"]\nthreshold = 0', "threshold: Input should be greater than or equal to 1"),
        ('keys = ["release.pub"]\nthreshhold = 2', "unknown key threshhold; known are threshold, keys, model_keys"),
        ('keys = ["release.pub", "release.pub"]\nthreshold = 2', "threshold is 2, but 1 different keys are listed"),
        ('keys = ["release.pub"]\npolicies = []', "policies: List should have at least 1 item"),
        ('keys = ["release.pub"]\npolicies = ["none.toml"]', "none.toml: No such file"),
        ('keys = ["none.pub"]', "none.pub: No such file"),
        ('keys = ["release.pub"]\nmax_age_days = 0', "max_age_days: Input should be greater than or equal to 1"),
    ],
)
def test_a_trust_file_that_trusts_by_mistake_is_refused(tmp_path: Path, key: Path, text: str, message: str) -> None:
    """An empty list, a misspelt key or a threshold that cannot be reached is an error, not a default."""
    shutil.copy(key.with_suffix(".pub"), tmp_path)
    (tmp_path / "trust.toml").write_text(text)
    with pytest.raises(BadInput) as caught:
        load_trust(tmp_path / "trust.toml")
    assert message in str(caught.value)


def test_the_commands_sign_and_verify(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """keygen, sign, verify, promote, verify again on the model and on its version; 1 where it does not hold."""

    def dfmcl(*arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "dfmcl", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    (pair[1] / ATTESTATION).unlink()
    (tmp_path / "trust.toml").write_text('keys = ["mine.pub"]')
    assert "mine.key: keep it secret" in dfmcl("keygen", "mine")
    assert "never overwritten" in dfmcl("keygen", "mine", code=2)
    trusted = ["--trust", "trust.toml"]
    assert "no such file" in dfmcl("verify", "candidate", "--evidence", "evidence", *trusted, code=1)
    said = dfmcl("sign", "evidence", "--key", "mine.key")
    assert "holds until 2125-12-09" in said
    assert "no key drew the order of its images" in said
    told = dfmcl("verify", "candidate", "--evidence", "evidence", *trusted)
    assert f"signed by {read_public(tmp_path / 'mine.pub').keyid[:12]}; holds until 2125-12-09" in told
    assert "expired" in dfmcl("verify", "candidate", "--evidence", "evidence", *trusted, "--at", "2126-01-01", code=1)
    options = ["candidate", "--evidence", "evidence", "--repository", "models", "--name", "digits"]
    dfmcl("promote", *options, code=2)  # --trust is not optional
    dfmcl("promote", *options, *trusted)
    for path in ("models/digits", "models/digits/1"):
        assert f"{path.partition('/1')[0]}" in dfmcl("verify", path, *trusted)
    with (tmp_path / "models" / "digits" / "1" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    assert "model.onnx: is not what the gate judged" in dfmcl("verify", "models/digits", *trusted, code=1)
