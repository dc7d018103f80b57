"""One table of faults: each is produced for real, and is the same exit code in every command that can meet it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dfmcl.gating.order import Draw
from dfmcl.gating.signing.evidence import ATTESTATION, SIGNATURE, file_digest
from dfmcl.gating.signing.faults import FAULTS, BadEvidence, NotAttested
from dfmcl.gating.signing.keys import read_public, read_signer
from dfmcl.gating.signing.model_signature import model_signature
from tests.exports import Export
from tests.gating.test_attestation import changed, enveloped, lines, said, write_lines
from tests.gating.test_derivation import commands
from tests.serving.workshop import write_run
from tests.signing import code_of, ec_key, make_key, policy_of, report_on, sign_again, write_report, write_trust

ROOT = Path(__file__).parents[2]
READERS = ("sign", "verify", "verdict", "promote")
JUDGES = ("verify", "promote")


@pytest.fixture(scope="module")
def home(export_once: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A really exported candidate, signed evidence that it passed, and who is trusted."""
    home = tmp_path_factory.mktemp("faults")
    export_once(write_run(home / "run"), home / "candidate")
    (home / "evidence").mkdir()
    write_trust(make_key(home))
    write_report(home / "evidence", report_on(home / "candidate", home / "evidence"), home / "release.key")
    return home


def trust(home: Path, line: str) -> None:
    with (home / "release.toml").open("a") as file:
        file.write(f"{line}\n")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def as_fifo(home: Path) -> None:
    (home / "evidence" / "report.json").unlink()
    os.mkfifo(home / "evidence" / "report.json")


def attestation_as_fifo(home: Path) -> None:
    (home / "evidence" / ATTESTATION).unlink()
    os.mkfifo(home / "evidence" / ATTESTATION)


def as_huge(home: Path) -> None:
    with (home / "evidence" / "report.json").open("wb") as file:
        file.truncate(2**30)


def rewrite(home: Path, text: str) -> None:
    (home / "evidence" / "report.json").write_text(text)


def resign(home: Path, **changes: object) -> None:
    sign_again(home / "evidence", home / "release.key", **changes)


def without_labels(home: Path) -> None:
    report = json.loads((home / "evidence" / "report.json").read_text())
    del report["per_image"]["label"]
    rewrite(home, json.dumps(report))


def other_manifest(home: Path) -> None:
    """A manifest that lists another digest than its file has, judged and signed as it stands."""
    path = home / "candidate" / "manifest.json"
    report = report_on(home / "candidate", home / "evidence")
    manifest = json.loads(path.read_text())
    manifest["files"]["labels.txt"] = "0" * 64
    path.write_text(json.dumps(manifest))
    files = {**report.candidate.files, "manifest.json": file_digest(path)}
    report = replace(report, candidate=replace(report.candidate, files=files))
    write_report(home / "evidence", report, home / "release.key")


def other_probes(home: Path) -> None:
    (home / "evidence" / "probes.npz").write_bytes(b"no archive")
    resign(home)


def a_member_twice(home: Path) -> None:
    """One reader takes the first, and another the last."""
    with warnings.catch_warnings(), zipfile.ZipFile(home / "evidence" / "probes.npz", "a") as archive:
        warnings.simplefilter("ignore")  # zipfile's own, of the name
        archive.writestr("labels.npy", archive.read("labels.npy"))
    resign(home)


def forged(home: Path) -> None:
    one, two = lines(home / "evidence")
    statement = said(home / "evidence")[1]
    statement["predicate"]["verdict"] = "splendid"
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    write_lines(home / "evidence", [one, two | {"payload": payload}])


def by_a_stranger(home: Path) -> None:
    sign_again(home / "evidence", make_key(home, "stranger"))


def failed(home: Path) -> None:
    write_report(home / "evidence", report_on(home / "candidate", home / "evidence", "failed"), home / "release.key")


def dated(home: Path, created: str, days: int = 30) -> None:
    report = report_on(home / "candidate", home / "evidence", policy=policy_of(valid_days=days))
    write_report(home / "evidence", replace(report, created=created), home / "release.key")


def retyped(home: Path) -> None:
    statements = said(home / "evidence")
    write_lines(home / "evidence", [enveloped(one, home / "release.key", kind="text/plain") for one in statements])


def unsigned(home: Path) -> None:
    write_lines(home / "evidence", [one | {"signatures": []} for one in lines(home / "evidence")])


def another_subject(home: Path) -> None:
    changed(1, subject=[{"name": "x", "digest": {"sha256": "0"}}])(home / "evidence", home / "release.key")


def a_subject_twice(home: Path) -> None:
    """Of two digests, one verifier believes the first, and another the last."""
    statements = said(home / "evidence")
    for one in statements:
        one["subject"].insert(0, {"name": "model.onnx", "digest": {"sha256": "0" * 64}})
    write_lines(home / "evidence", [enveloped(one, home / "release.key") for one in statements])


def signed_nonsense(home: Path) -> None:
    write_lines(home / "evidence", [enveloped([], home / "release.key")] * 2)


def claimed(home: Path) -> None:
    """An order whose signature was tried until it pleased, in the name of the key that is trusted."""
    draw = Draw(read_public(home / "release.pub").keyid, "0123456789abcdef" * 8)
    report = report_on(home / "candidate", home / "evidence", draw=draw)
    write_report(home / "evidence", report, home / "release.key")


def listing_less(home: Path) -> None:
    """A model.sig by a key that is trusted, over the model alone."""
    signed = model_signature({"model.onnx": "0" * 64}, "candidate", read_signer(ec_key(home, "model")))
    (home / "evidence" / SIGNATURE).write_text(signed)
    trust(home, 'model_keys = ["model.pub"]')


NOW = datetime.now(UTC).isoformat(timespec="seconds")
PRODUCED: dict[str, list[tuple[Callable[[Path], object], tuple[str, ...]]]] = {
    "missing": [
        (lambda home: (home / "evidence" / "report.json").unlink(), READERS),
        (lambda home: (home / "evidence" / "probes.npz").unlink(), READERS),
        (lambda home: (home / "candidate" / "labels.txt").unlink(), JUDGES),
        (lambda home: shutil.rmtree(home / "candidate"), JUDGES),
    ],
    "unreadable": [
        (as_fifo, READERS),
        (as_huge, READERS),
        (lambda home: os.truncate(home / "candidate" / "model.onnx", 2**40), JUDGES),
        (lambda home: os.truncate(home / "evidence" / "probes.npz", 2**40), READERS),
        (lambda home: rewrite(home, "[" * 10**6), READERS),
        (attestation_as_fifo, ("sign", *JUDGES)),
        (lambda home: rewrite(home, '{"format": 1, "format": 2}'), READERS),
        (lambda home: (shutil.rmtree(home / "evidence"), (home / "evidence").write_text("")), ("verdict", "sign")),
        (
            lambda home: (
                (home / "candidate" / "labels.txt").rename(home / "labels.txt"),
                (home / "candidate" / "labels.txt").symlink_to(home / "labels.txt"),
            ),
            JUDGES,
        ),
    ],
    "format": [(lambda home: rewrite(home, '{"format": "dfmcl.report/1"}'), READERS)],
    "malformed": [(without_labels, READERS)],
    "envelope": [(lambda home: (home / "evidence" / ATTESTATION).write_text("{}\n"), ("sign", *JUDGES))],
    "statement": [(signed_nonsense, JUDGES), (a_subject_twice, JUDGES)],
    "candidate": [(other_manifest, JUDGES)],
    "probes": [(other_probes, READERS), (a_member_twice, READERS)],
    "unsigned": [(lambda home: (home / "evidence" / ATTESTATION).unlink(), JUDGES)],
    "signers": [
        (by_a_stranger, JUDGES),
        (unsigned, JUDGES),
    ],
    "forged": [(forged, JUDGES)],
    "envelopes": [(lambda home: write_lines(home / "evidence", lines(home / "evidence")[:1]), JUDGES)],
    "statements": [(retyped, JUDGES)],
    "listed": [(listing_less, JUDGES)],
    "contradiction": [(lambda home: resign(home, findings=[{"check": "x", "why": "y", "do": "z"}]), READERS)],
    "unlike": [
        (another_subject, ("sign",)),
        (lambda home: append(home / "evidence" / "report.json"), ("sign", *JUDGES)),
    ],
    "bytes": [
        (lambda home: append(home / "candidate" / "model.onnx"), JUDGES),
        (lambda home: append(home / "candidate" / "manifest.json"), JUDGES),
    ],
    "evidence": [(lambda home: append(home / "evidence" / "probes.npz"), READERS)],
    "stranger": [(lambda home: (home / "candidate" / "libtriton.so").write_bytes(b""), JUDGES)],
    "verdict": [(failed, JUDGES)],
    "policy": [(lambda home: trust(home, f'policies = ["{"b" * 64}"]'), JUDGES)],
    "data": [(lambda home: trust(home, f'data = ["{"e" * 64}"]'), JUDGES)],
    "provider": [(lambda home: trust(home, 'providers = ["cuda", "openvino"]'), JUDGES)],
    "order": [
        (lambda home: trust(home, "drawn = true"), JUDGES),
        (claimed, ("sign", *JUDGES)),
    ],
    "early": [(lambda home: dated(home, "2999-01-01T00:00:00+00:00"), JUDGES)],
    "expired": [(lambda home: dated(home, "2001-01-01T00:00:00+00:00"), JUDGES)],
    "old": [(lambda home: (dated(home, "2001-01-01T00:00:00+00:00", 36500), trust(home, "max_age_days = 1")), JUDGES)],
}  # fmt: skip


def test_every_fault_is_produced() -> None:
    """The table has no row that nobody can meet, and nobody meets a fault that is not in it."""
    assert PRODUCED.keys() == FAULTS.keys()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_one_code_in_every_command(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    """As its row says, with its advice, in one line; nothing is promoted."""

    for number, (spoil, where) in enumerate(PRODUCED[fault]):
        place = shutil.copytree(home, tmp_path / str(number))
        spoil(place)
        for name in where:
            assert code_of(*commands(place)[name]) == FAULTS[fault].kind.exit_code, (number, name)
            error = capfd.readouterr().err
            assert error.rstrip().endswith(f"; {FAULTS[fault].advice}"), (number, name, error)
            assert error.count("\n") == 1
        assert not (place / "models").exists()


@pytest.mark.parametrize(
    "line",
    ["max_age_days = 100000000000", f"threshold = {'9' * 5000}", "max_age_days = 1979-02-31"],
    ids=["days", "digits", "date"],
)
def test_a_trust_file_that_nobody_means_is_bad_input(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], line: str
) -> None:
    """No calendar goes so far, and Python reads no such number: 2, in a line that names the file, and not our error."""
    place = shutil.copytree(home, tmp_path / "home")
    trust(place, line)
    assert code_of(*commands(place)["verify"]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"dfmcl: {place / 'release.toml'}: ")
    assert error.count("\n") == 1


def test_who_may_sign_is_advised_where_nobody_forged_anything() -> None:
    """Signing changed evidence, or trusting who changed it, would be the forger's wish."""
    assert {name for name, row in FAULTS.items() if "dfmcl sign" in row.advice} == {"unsigned", "signers"}


def test_the_table_is_in_the_docs() -> None:
    """Row for row, with code and advice."""
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    for name, row in FAULTS.items():
        assert f"| {row.kind.exit_code} | {name} | {row.about} | {row.advice} |" in text
    assert {row.kind for row in FAULTS.values()} == {NotAttested, BadEvidence}
