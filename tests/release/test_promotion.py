"""Only what passed gets in, in whole, and one at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from dfmcl.common.errors import BadInput, Broken, Refused
from dfmcl.common.files import sha256_of
from dfmcl.gating.signing.attestation import BadEvidence, NotAttested, Trust
from dfmcl.gating.signing.evidence import ATTESTATION
from dfmcl.release.candidate import FILES, read_manifest
from dfmcl.release.layout import VERSION_FILES, configs, model_names, parse_config
from dfmcl.release.ledger import Aliases, aliases, is_retired, read_history
from dfmcl.release.promotion import give_back, note_failure, promote, prune, retire, rollback
from dfmcl.release.repair import repair
from dfmcl.release.status import standings
from dfmcl.release.stores import directory
from dfmcl.release.stores.directory import Directory
from dfmcl.release.stores.store import Store
from dfmcl.release.verification import verify_release
from tests.serving.workshop import run_python, write_evidence
from tests.signing import CREATED, make_key, report_on, sign_again, trusting, write_report

# In a process of its own for each repository: at the K-th step that changes it (a file opened for writing or removed,
# a rename, a directory made or removed) it dies, as if the power failed; or the disk is full from then on.
BREAKING = """
import json, os, sys
from pathlib import Path
from dfmcl.gating.signing.trust import load_trust
from dfmcl.release.promotion import promote, prune, retire, rollback
from dfmcl.release.repair import repair
from dfmcl.release.stores.directory import Directory
how, code, candidate, evidence, trust = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5]
trust = load_trust(Path(trust))
for step, path in enumerate(sys.argv[6:], start=1):
    repository, left = Directory(Path(path)), [step if how != "go on" else -1]
    def stop(event, details):
        writes = event == "open" and isinstance(details[1], str) and details[1][0] in "wx"
        removes = event in ("os.remove", "os.rmdir")  # of a tree: by a descriptor, without its path
        if not (writes or event in ("os.rename", "os.mkdir")) or path not in str(details[0]):
            if not removes or (path not in str(details[0]) and details[1] == -1):
                return
        left[0] -= 1
        if left[0] == 0 and how == "die":
            os._exit(9)
        if how == "fail" and (left[0] == 0 or (left[0] < 0 and not removes)):
            raise OSError(28, "No space left on device", path)
    if not os.fork():
        sys.addaudithook(stop)
        said = ""
        try:
            exec(code)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(1, json.dumps([int(left[0] <= 0), said]).encode() + b"\\n")
        os._exit(0)
    if os.waitstatus_to_exitcode(os.wait()[1]):
        print(json.dumps([9, ""]), flush=True)
"""
PROMOTE = "promote(candidate, evidence, repository, name='digits', trust=trust)"


def broken_off(
    how: str, code: str, candidate: Path, evidence: Path, trust: Path, repositories: list[Path]
) -> list[tuple[int, str]]:
    """What came of a change that was broken off at its first step in the first repository, its second in the next, ...

    9: it died; 1: a step failed; 0: it ended before that. And the error that it raised.
    """
    paths = [str(path) for path in (candidate, evidence, trust, *repositories)]
    output, _ = run_python(BREAKING, how, code, *paths).communicate(timeout=300)
    return [tuple(json.loads(line)) for line in output.splitlines()]


def crashed(code: str, candidate: Path, evidence: Path, trust: Path, repositories: list[Path]) -> list[int]:
    """Exit codes of a change that died before its first step in the first repository, its second in the second, ..."""
    return [outcome for outcome, _ in broken_off("die", code, candidate, evidence, trust, repositories)]


def listing(directory: Path) -> dict[str, bytes]:
    """All files below a directory, but for the lock."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".promotion.lock"
    }


def rewrite_manifest(candidate: Path, **entries: object) -> Path:
    """Change a copied candidate's manifest, and its digests with it."""
    manifest = json.loads((candidate / "manifest.json").read_text()) | entries
    manifest["files"] = {name: sha256_of(candidate / name) for name in FILES}
    (candidate / "manifest.json").write_text(json.dumps(manifest))
    return candidate


def test_first_promotion_writes_version_1(tmp_path: Path, candidate: Path, evidence: Path, trust: Trust) -> None:
    """The version holds the candidate and its evidence; the config serves it; aliases name it."""
    promoted = promote(candidate, evidence, Directory(tmp_path), name="digits", trust=trust)
    assert (promoted.model, promoted.version, promoted.path) == ("digits", 1, tmp_path / "digits" / "1")
    assert promoted.sha256 == sha256_of(promoted.path / "model.onnx")
    assert {path.name for path in promoted.path.iterdir()} == VERSION_FILES
    aliases = {"champion": 1, "previous": None, "candidate": None}
    assert json.loads((tmp_path / "aliases.json").read_text()) == {"digits": aliases}
    assert verify_release(Directory(tmp_path), "digits") == promoted
    assert (tmp_path / "digits").stat().st_mode & 0o777 == 0o755


def test_second_promotion_writes_version_2_and_keeps_version_1(
    repository: Path, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """Versions count up, old ones stay as they are, and the alias `previous` is the one served before."""
    before = listing(repository / "digits" / "1")
    assert promote(candidate, evidence, Directory(repository), name="digits", trust=trust).version == 2
    assert listing(repository / "digits" / "1") == before
    aliases = {"champion": 2, "previous": 1, "candidate": None}
    assert json.loads((repository / "aliases.json").read_text()) == {"digits": aliases}
    config = parse_config((repository / "digits" / "config.pbtxt").read_text(), "config.pbtxt")
    assert list(config.version_policy.specific.versions) == [2]


def test_version_number_is_not_used_again(repository: Path, candidate: Path, evidence: Path, trust: Trust) -> None:
    """A number whose directory was removed stays taken: dashboards and evidence refer to it."""
    promote(candidate, evidence, Directory(repository), name="digits", trust=trust)
    promote(candidate, evidence, Directory(repository), name="other", trust=trust)
    shutil.rmtree(repository / "digits" / "1")
    assert promote(candidate, evidence, Directory(repository), name="digits", trust=trust).version == 3


@pytest.mark.parametrize("verdict", ["failed", "inconclusive", "suspect"])
def test_verdict_other_than_passed_is_refused(
    tmp_path: Path, candidate: Path, key: Path, trust: Trust, verdict: str
) -> None:
    """Exit code 1, and no repository appears."""
    evidence = write_evidence(tmp_path / "evidence", candidate, key, verdict)
    with pytest.raises(NotAttested) as caught:
        promote(candidate, evidence, Directory(tmp_path / "models"), name="digits", trust=trust)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "models").exists()


def test_evidence_for_other_bytes_is_refused(tmp_path: Path, candidate: Path, evidence: Path, trust: Trust) -> None:
    """A verdict on one model opens no door for another, however consistent that one is with its own manifest."""
    other = shutil.copytree(candidate, tmp_path / "candidate")
    with (other / "model.onnx").open("ab") as file:
        file.write(b"\x1a\x00")
    with pytest.raises(NotAttested):
        promote(rewrite_manifest(other), evidence, Directory(tmp_path / "models"), name="digits", trust=trust)
    assert not (tmp_path / "models").exists()


def test_tampered_model_is_refused(tmp_path: Path, candidate: Path, evidence: Path, trust: Trust) -> None:
    """A model that is not the one that was judged ends with exit code 1, as `verify` has it."""
    tampered = shutil.copytree(candidate, tmp_path / "candidate")
    with (tampered / "model.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff")
    with pytest.raises(NotAttested, match=r"model\.onnx: is not what the gate judged") as caught:
        promote(tampered, evidence, Directory(tmp_path / "models"), name="digits", trust=trust)
    assert caught.value.exit_code == 1


def test_extra_file_is_refused(tmp_path: Path, candidate: Path, evidence: Path, trust: Trust) -> None:
    """A library beside the model would become Triton's backend; nothing unknown gets in."""
    extra = shutil.copytree(candidate, tmp_path / "candidate")
    (extra / "libtriton_onnxruntime.so").write_bytes(b"")
    with pytest.raises(NotAttested, match=r"libtriton_onnxruntime\.so: was not judged"):
        promote(extra, evidence, Directory(tmp_path / "models"), name="digits", trust=trust)


def test_nothing_but_a_trusted_signature_opens_the_door(
    tmp_path: Path, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """Unsigned evidence, another's signature, a policy that is not allowed, an expired attestation: exit code 1."""
    unsigned, foreign = (shutil.copytree(evidence, tmp_path / name) for name in ("unsigned", "foreign"))
    (unsigned / ATTESTATION).unlink()
    sign_again(foreign, make_key(tmp_path, "foreign"))
    late = datetime.fromisoformat(CREATED) + timedelta(days=200 * 365)
    for refused, trusted, now in (
        (unsigned, trust, None),
        (foreign, trust, None),
        (evidence, replace(trust, policies=frozenset()), None),
        (evidence, trust, late),
    ):
        with pytest.raises(NotAttested) as caught:
            promote(candidate, refused, Directory(tmp_path / "models"), name="digits", trust=trusted, now=now)
        assert caught.value.exit_code == 1
    assert not (tmp_path / "models").exists()


def test_evidence_without_probes_is_bad_input_and_changes_nothing(
    tmp_path: Path, repository: Path, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """A promotion that fails while it stages leaves the repository as it was."""
    before = listing(repository)
    incomplete = shutil.copytree(evidence, tmp_path / "evidence")
    (incomplete / "probes.npz").unlink()
    with pytest.raises(BadEvidence, match=r"probes\.npz: No such file"):
        promote(candidate, incomplete, Directory(repository), name="digits", trust=trust)
    assert listing(repository) == before


def test_other_interface_under_the_same_name_is_refused(
    tmp_path: Path, repository: Path, candidate: Path, key: Path, trust: Trust
) -> None:
    """Clients of a name keep their input shape and labels."""
    renamed = shutil.copytree(candidate, tmp_path / "candidate")
    labels = [f"digit {label}" for label in read_manifest(candidate).labels]
    (renamed / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    rewrite_manifest(renamed, labels=labels)
    evidence = write_evidence(tmp_path / "evidence", renamed, key)
    with pytest.raises(Refused, match="promote it under another name"):
        promote(renamed, evidence, Directory(repository), name="digits", trust=trust)
    assert promote(renamed, evidence, Directory(repository), name="worded_digits", trust=trust).version == 1


@pytest.mark.parametrize("place", ["file", "file/models"])
def test_what_is_no_directory_is_no_repository(
    tmp_path: Path, candidate: Path, evidence: Path, trust: Trust, place: str
) -> None:
    """A wrong path: exit code 2 and the reason in one line."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="is no directory, and none can be made there; name another") as caught:
        promote(candidate, evidence, Directory(tmp_path / place), name="digits", trust=trust)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("promoted_before", [0, 1])
def test_crash_at_any_point_leaves_the_old_or_the_new_version(
    tmp_path: Path, candidate: Path, evidence: Path, promoted_before: int, trust: Trust, trust_file: Path
) -> None:
    """Whatever change is the last one, what Triton would serve is whole, and the next promotion cleans up and works."""
    repositories = [tmp_path / str(number) for number in range(30)]
    for repository in repositories[:1] * promoted_before:
        promote(candidate, evidence, Directory(repository), name="digits", trust=trust)
    for copy in repositories[1:] * promoted_before:
        shutil.copytree(repositories[0], copy)
    codes = crashed(PROMOTE, candidate, evidence, trust_file, repositories)
    assert set(codes[:15]) == {9}
    assert codes[-1] == 0  # so every change was the last one once
    for repository in repositories:
        seen = [verify_release(Directory(repository), name).version for name in model_names(Directory(repository))]
        assert seen in ([promoted_before] * promoted_before, [promoted_before + 1])
        promoted = promote(candidate, evidence, Directory(repository), name="digits", trust=trust)
        assert promoted.version > max([0, *seen])
        changes = read_history(Directory(repository), "digits")
        assert [change.version for change in changes][-len(seen) - 1 :] == [*seen, promoted.version]
        assert aliases(Directory(repository))["digits"] == Aliases(promoted.version, seen[0] if seen else None, None)
        assert verify_release(Directory(repository), "digits") == promoted
        assert not list(repository.rglob(".staging-*"))


def test_promotions_at_the_same_time_get_versions_of_their_own(
    tmp_path: Path, candidate: Path, evidence: Path, trust_file: Path
) -> None:
    """The lock puts them in a row."""
    paths = [str(path) for path in (candidate, evidence, trust_file, tmp_path / "models")]
    processes = [run_python(BREAKING, "go on", PROMOTE, *paths) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ['[1, ""]\n'] * 3
    assert verify_release(Directory(tmp_path / "models"), "digits").version == 3


@pytest.mark.parametrize("place", ["digits", "digits/1"])
def test_library_in_the_repository_is_refused(repository: Path, place: str) -> None:
    """A file that promotion did not write keeps the model from being served."""
    (repository / place / "libtriton_onnxruntime.so").write_bytes(b"")
    with pytest.raises(Refused, match="promotion did not write this"):
        verify_release(Directory(repository), "digits")


def test_changed_model_in_the_repository_is_refused(repository: Path) -> None:
    """What was swapped after the promotion is not what passed."""
    with (repository / "digits" / "1" / "model.onnx").open("ab") as file:
        file.write(b"\x1a\x00")
    with pytest.raises(NotAttested, match=r"model\.onnx: is not what the gate judged"):
        verify_release(Directory(repository), "digits")


def test_a_version_carries_its_own_proof(repository: Path, evidence: Path, trust: Trust, tmp_path: Path) -> None:
    """The attestation lies in the version as it was signed; one who trusts another key does not believe it."""
    version = repository / "digits" / "1"
    assert (version / ATTESTATION).read_bytes() == (evidence / ATTESTATION).read_bytes()
    assert verify_release(Directory(repository), "digits", trust).version == 1
    with pytest.raises(NotAttested, match="0 trusted keys signed"):
        verify_release(Directory(repository), "digits", trusting(make_key(tmp_path, "another")))


def test_a_swapped_release_is_refused_by_its_signature_only(
    repository: Path, candidate: Path, trust: Trust, tmp_path: Path
) -> None:
    """A writer of the repository can make model and report fit each other, but cannot sign."""
    version = repository / "digits" / "1"
    with (version / "model.onnx").open("ab") as file:
        file.write(b"\x1a\x00")
    rewrite_manifest(version)
    write_report(version, report_on(version, version))
    for path, text in configs(read_manifest(version), "digits", 1).items():
        (repository / "digits" / path).write_text(text)
    assert verify_release(Directory(repository), "digits").version == 1
    with pytest.raises(NotAttested, match=r"report\.json: is not the report that was signed"):
        verify_release(Directory(repository), "digits", trust)


@pytest.mark.parametrize("name", [ATTESTATION, "probes.npz", "labels.txt"])
def test_a_version_that_lacks_a_file_is_refused(repository: Path, name: str) -> None:
    """Promotion writes all of them, so that a version without one is not its work."""
    (repository / "digits" / "1" / name).unlink()
    with pytest.raises(Refused, match="promotion writes this, and it is missing"):
        verify_release(Directory(repository), "digits")


def test_card_and_surrogates_stay_through_a_promotion(
    repository: Path, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """What lies beside the versions of a shipped model is neither removed nor a reason to refuse it."""
    shipped = repository / "digits" / "surrogates" / "one"
    shipped.mkdir(parents=True)
    (shipped / "manifest.json").write_text("{}")
    (repository / "digits" / "README.md").write_text("card")
    assert verify_release(Directory(repository), "digits").version == 1
    before = listing(repository / "digits")
    assert promote(candidate, evidence, Directory(repository), name="digits", trust=trust).version == 2
    assert verify_release(Directory(repository), "digits").version == 2
    after = listing(repository / "digits")
    assert {name for name in before if before[name] != after.get(name)} == {"config.pbtxt", "configs/gpu.pbtxt"}


@pytest.mark.parametrize(("name", "directory"), [("surrogates", False), ("README.md", True), ("3", False)])
def test_card_and_surrogates_are_what_they_are_called(repository: Path, name: str, directory: bool) -> None:
    """A file called surrogates may be anything, such as a library; so may a directory called README.md."""
    path = repository / "digits" / name
    path.mkdir() if directory else path.write_bytes(b"")
    with pytest.raises(Refused, match="promotion did not write this"):
        verify_release(Directory(repository), "digits")


CHANGES: dict[str, tuple[str, set[int | None]]] = {
    "rollback": ("rollback(repository, 'digits', trust=trust)", {3, 2}),
    "prune": ("prune(repository, 'digits', keep=1)", {3}),
    "retire": ("retire(repository, 'digits')", {3, None}),
    "promote": (PROMOTE, {3, 4}),
}
# What may come next, whatever was broken off before it.
FOLLOWING: list[Callable[[Store, Trust], object]] = [
    lambda store, trust: prune(store, "digits", keep=1),
    lambda store, trust: rollback(store, "digits", trust=trust),
    lambda store, trust: repair(store, trust),
    lambda store, trust: standings(store, trust),
    lambda store, trust: retire(store, "digits"),
]


@pytest.fixture
def copies(tmp_path: Path, repository: Path, candidate: Path, evidence: Path, trust: Trust) -> list[Path]:
    """Repositories of three versions, one for each step of a change."""
    for _ in range(2):
        promote(candidate, evidence, Directory(repository), name="digits", trust=trust)
    return [shutil.copytree(repository, tmp_path / str(number)) for number in range(40)]


@pytest.mark.parametrize("change", CHANGES)
def test_crash_in_a_change_leaves_the_old_or_the_new_state(
    copies: list[Path], candidate: Path, evidence: Path, change: str, trust: Trust, trust_file: Path
) -> None:
    """As for a promotion: what is served is whole after each crash, and what comes next finds nothing in its way."""
    code, allowed = CHANGES[change]
    codes = crashed(code, candidate, evidence, trust_file, copies)
    assert set(codes[:3]) == {9}
    assert codes[-1] == 0  # so every step was the last one once
    found = set()
    for number, copy in enumerate(copies[: codes.index(0) + 1]):
        served = [verify_release(Directory(copy), name).version for name in model_names(Directory(copy))]
        found.add(served[0] if served else None)
        assert served or is_retired(Directory(copy), "digits")  # or a server would keep it for ever
        if served:
            FOLLOWING[number % len(FOLLOWING)](Directory(copy), trust)
        promoted = promote(candidate, evidence, Directory(copy), name="digits", trust=trust)
        assert promoted.version in (4, 5)
        assert verify_release(Directory(copy), "digits") == promoted
        assert not list(copy.rglob(".staging-*"))
        (row,) = standings(Directory(copy), trust)
        assert (row.trouble, row.doubt) == ("", "")
    assert found == allowed


@pytest.mark.parametrize("change", CHANGES)
def test_a_full_disk_in_a_change_is_told_as_it_is(
    copies: list[Path], candidate: Path, evidence: Path, change: str, trust: Trust, trust_file: Path
) -> None:
    """Whichever step fails: "nothing was changed" is said only where nothing was, and the next change works."""
    code, allowed = CHANGES[change]
    before = listing(copies[0])
    told = broken_off("fail", code, candidate, evidence, trust_file, copies)
    assert (told[0][0], told[-1]) == (1, (0, ""))
    for number, (copy, (_, said)) in enumerate(zip(copies[: told.index((0, "")) + 1], told, strict=False)):
        served = [verify_release(Directory(copy), name).version for name in model_names(Directory(copy))]
        assert (served[0] if served else None) in allowed
        now = {path: data for path, data in listing(copy).items() if ".staging-" not in path}
        if "nothing was changed" in said:
            assert now == before, said
        elif said:
            assert "No space left on device; before that, digits" in said
            assert "repeat the command" in said
            assert now != before
        if served:
            FOLLOWING[number % len(FOLLOWING)](Directory(copy), trust)
        promoted = promote(candidate, evidence, Directory(copy), name="digits", trust=trust)
        assert verify_release(Directory(copy), "digits") == promoted
        (row,) = standings(Directory(copy), trust)
        assert (row.trouble, row.doubt) == ("", "")


def test_rollback_needs_a_signature_that_holds(
    repository: Path, candidate: Path, evidence: Path, trust: Trust, tmp_path: Path
) -> None:
    """An old version is judged as a new one is: it may have expired, or been changed where it lies."""
    promote(candidate, evidence, Directory(repository), name="digits", trust=trust)
    late = datetime.fromisoformat(CREATED) + timedelta(days=200 * 365)
    with pytest.raises(NotAttested, match="expired"):
        rollback(Directory(repository), "digits", trust=trust, now=late)
    with (repository / "digits" / "1" / "model.onnx").open("ab") as file:
        file.write(b"\x1a\x00")
    with pytest.raises(NotAttested):
        rollback(Directory(repository), "digits", trust=trust)
    assert verify_release(Directory(repository), "digits").version == 2


def test_a_config_for_gpus_that_promotion_did_not_write_is_refused(repository: Path) -> None:
    """It is another way to make Triton run something else."""
    path = repository / "digits" / "configs" / "gpu.pbtxt"
    path.write_text(path.read_text().replace('backend: "onnxruntime"', 'backend: "python"'))
    with pytest.raises(Refused, match="is not what promotion writes"):
        verify_release(Directory(repository), "digits")
    (path.parent / "other.pbtxt").write_text("")
    with pytest.raises(Refused):
        verify_release(Directory(repository), "digits")


def test_an_edited_config_is_mended_by_a_rollback_to_its_version(repository: Path, trust: Trust) -> None:
    """Promotion's texts may change with the program; the served files stay as they were."""
    path = repository / "digits" / "config.pbtxt"
    text = path.read_text()
    path.write_text(text.replace("enable: false", "enable: true"))
    with pytest.raises(Refused, match="is not what promotion writes for version 1; `dfmcl repair` mends it"):
        verify_release(Directory(repository), "digits")
    rollback(Directory(repository), "digits", trust=trust, version=1)
    assert path.read_text() == text
    assert verify_release(Directory(repository), "digits", trust).version == 1


def test_labels_in_another_order_are_refused(tmp_path: Path, candidate: Path, key: Path, trust: Trust) -> None:
    """Triton would answer with the wrong names, though every digest fits."""
    other = shutil.copytree(candidate, tmp_path / "candidate")
    labels = (other / "labels.txt").read_text().splitlines()
    (other / "labels.txt").write_text("".join(f"{label}\n" for label in reversed(labels)))
    rewrite_manifest(other)
    evidence = write_evidence(tmp_path / "evidence", other, key)
    with pytest.raises(BadInput, match="names other labels than"):
        promote(other, evidence, Directory(tmp_path / "models"), name="digits", trust=trust)


def test_a_damaged_model_does_not_hold_up_the_others(
    repository: Path, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """Its own trouble stands in `status`; others are promoted, and it can be retired."""
    promote(candidate, evidence, Directory(repository), name="other", trust=trust)
    for damage in (b"\xff", b"name: 1"):
        (repository / "other" / "config.pbtxt").write_bytes(damage)
        promote(candidate, evidence, Directory(repository), name="digits", trust=trust)
        first, second = standings(Directory(repository), trust)
        assert (first.model, first.trouble) == ("digits", "")
        assert "config.pbtxt" in second.trouble
    shutil.rmtree(repository / "other" / "1")


def test_status_says_what_is_served_and_for_how_long(
    repository: Path, candidate: Path, evidence: Path, trust: Trust, tmp_path: Path
) -> None:
    """Roles, versions, verdict; the expiry only where signatures are judged; trouble where it would not be served."""
    promote(candidate, evidence, Directory(repository), name="digits", trust=trust)
    (row,) = standings(Directory(repository), trust)
    assert (row.champion, row.previous, row.versions, row.trouble) == (2, 1, [1, 2], "")
    assert row.expires is not None
    assert row.criteria[0].startswith("robust_accuracy >= 0.45")
    assert standings(Directory(repository))[0].expires is None
    assert "0 trusted keys" in standings(Directory(repository), trusting(make_key(tmp_path, "another")))[0].trouble
    with pytest.raises(BadInput, match="no such directory"):
        standings(Directory(tmp_path / "typo"))


def test_status_never_calls_champion_what_is_not_served(
    repository: Path, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """What `serve` gave up, and what does not verify; a history that says otherwise is told, and can be mended."""
    promoted = promote(candidate, evidence, Directory(repository), name="digits", trust=trust)
    note_failure(Directory(repository), promoted, "no memory")
    (row,) = standings(Directory(repository), trust)
    assert (row.champion, row.configured) == (None, 2)
    assert "version 2 was given up: no memory" in row.trouble
    rollback(Directory(repository), "digits", trust=trust, version=2, reason="more memory")
    assert standings(Directory(repository), trust)[0].champion == 2
    for path, text in configs(read_manifest(repository / "digits" / "1"), "digits", 1).items():
        (repository / "digits" / path).write_text(text)
    (row,) = standings(Directory(repository), trust)
    assert (row.champion, row.trouble) == (1, "")
    assert row.doubt == "history.jsonl says that version 2 is served; `dfmcl repair` mends it"
    repair(Directory(repository), trust)
    assert [(change.event, change.version) for change in read_history(Directory(repository))][-1] == ("recovered", 1)
    assert standings(Directory(repository), trust)[0].doubt == ""
    (repository / "digits" / "1" / "model.onnx").write_bytes(b"")
    assert standings(Directory(repository), trust)[0].champion is None


def test_whatever_the_umask_triton_can_read(tmp_path: Path, candidate: Path, evidence: Path, trust: Trust) -> None:
    """It runs as another user."""
    before = os.umask(0o077)
    try:
        for _ in range(2):
            promote(candidate, evidence, Directory(tmp_path / "models"), name="digits", trust=trust)
    finally:
        os.umask(before)
    for path in (tmp_path / "models" / "digits").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_a_lock_that_is_held_is_not_waited_for_forever(
    repository: Path, trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 5: its holder may hang."""
    monkeypatch.setattr(directory, "LOCK_SECONDS", 0.2)
    with (repository / ".promotion.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(Broken, match="is being changed"):
            retire(Directory(repository), "digits")


def test_a_lock_file_that_was_removed_lets_no_two_write(repository: Path) -> None:
    """A user tidied up while a second one waited: that one then waits for the holder of the new file."""
    path = repository / ".promotion.lock"
    waiting = threading.Thread(target=retire, args=(Directory(repository), "digits"))
    with path.open("w") as old:
        fcntl.flock(old, fcntl.LOCK_EX)
        waiting.start()
        while times_open(path) < 2:
            time.sleep(0.01)
        path.unlink()
        with path.open("w") as new:
            fcntl.flock(new, fcntl.LOCK_EX)
            fcntl.flock(old, fcntl.LOCK_UN)
            waiting.join(0.5)  # ten looks at the lock
            assert waiting.is_alive()
            assert (repository / "digits").exists()
    waiting.join()
    assert not (repository / "digits").exists()


def times_open(path: Path) -> int:
    """How often this process has a file open."""
    found = [os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()]
    return found.count(str(path.resolve()))


@pytest.mark.parametrize("below", ["", "models"])
def test_a_repository_that_is_a_file_is_bad_input(
    candidate: Path, evidence: Path, trust: Trust, tmp_path: Path, below: str
) -> None:
    """A repository cannot be made where a file lies, or below one: the name is the user's mistake."""
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is no directory, and none can be made there"):
        promote(candidate, evidence, Directory(tmp_path / "file" / below), name="digits", trust=trust)


def test_a_name_that_ends_as_a_shadow_is_refused(
    repository: Path, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """It would be taken away when the other model takes its bytes; and a shadow goes with its model."""
    with pytest.raises(BadInput, match="the shadow of another model"):
        promote(candidate, evidence, Directory(repository), name="digits-shadow", trust=trust)
    promote(candidate, evidence, Directory(repository), name="digits", trust=trust, shadow=True)
    retire(Directory(repository), "digits", reason="gone\nfor good")
    assert model_names(Directory(repository)) == []
    assert "gone for good" in {change.reason for change in read_history(Directory(repository))}


def test_what_was_returned_from_may_serve_later(
    repository: Path, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """A user found out why, and served it: then it is what was before the next."""
    promote(candidate, evidence, Directory(repository), name="digits", trust=trust)
    give_back(Directory(repository), "digits", 1, "no memory")
    rollback(Directory(repository), "digits", trust=trust, version=2)
    promote(candidate, evidence, Directory(repository), name="digits", trust=trust)
    assert aliases(Directory(repository))["digits"] == Aliases(champion=3, previous=2)
