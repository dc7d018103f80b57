"""Only what passed gets in, in whole, and one at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gating.attestation import BadEvidence, NotAttested
from serving.candidate import FILES, read_manifest, sha256_of
from serving.errors import BadInput, Broken, Refused
from serving.promotion import promote, verify_release
from serving.repository import VERSION_FILES, model_names, parse_config
from tests.serving.workshop import run_python, write_evidence

# Dies, as if the power failed, before the K-th change of the repository: a file opened for writing, or a rename.
CRASHING = """
import os, sys
from pathlib import Path
from serving.promotion import promote
candidate, evidence, repository = map(Path, sys.argv[1:4])
left = [int(sys.argv[4])]
def die(event, details):
    writes = event == "open" and isinstance(details[1], str) and details[1][0] in "wx"
    if (writes or event in ("os.rename", "os.mkdir")) and str(repository) in str(details[0]):
        left[0] -= 1
        if left[0] == 0:
            os._exit(9)
sys.addaudithook(die)
promote(candidate, evidence, repository, name="digits")
"""


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


def test_first_promotion_writes_version_1(tmp_path: Path, candidate: Path, evidence: Path) -> None:
    """The version holds the candidate and its evidence; the config serves it; aliases name it."""
    promoted = promote(candidate, evidence, tmp_path, name="digits")
    assert (promoted.model, promoted.version, promoted.path) == ("digits", 1, tmp_path / "digits" / "1")
    assert promoted.sha256 == sha256_of(promoted.path / "model.onnx")
    assert {path.name for path in promoted.path.iterdir()} == VERSION_FILES
    assert json.loads((tmp_path / "aliases.json").read_text()) == {"digits": {"champion": 1, "previous": None}}
    assert verify_release(tmp_path, "digits") == promoted
    assert (tmp_path / "digits").stat().st_mode & 0o777 == 0o755


def test_second_promotion_writes_version_2_and_keeps_version_1(
    repository: Path, candidate: Path, evidence: Path
) -> None:
    """Versions count up, old ones stay as they are, and the alias `previous` is the one served before."""
    before = listing(repository / "digits" / "1")
    assert promote(candidate, evidence, repository, name="digits").version == 2
    assert listing(repository / "digits" / "1") == before
    assert json.loads((repository / "aliases.json").read_text()) == {"digits": {"champion": 2, "previous": 1}}
    config = parse_config((repository / "digits" / "config.pbtxt").read_text(), "config.pbtxt")
    assert list(config.version_policy.specific.versions) == [2]


def test_version_number_is_not_used_again(repository: Path, candidate: Path, evidence: Path) -> None:
    """A number whose directory somebody removed stays taken: dashboards and evidence refer to it."""
    promote(candidate, evidence, repository, name="digits")
    promote(candidate, evidence, repository, name="other")
    shutil.rmtree(repository / "digits" / "1")
    assert promote(candidate, evidence, repository, name="digits").version == 3


@pytest.mark.parametrize("verdict", ["failed", "inconclusive", "suspect"])
def test_verdict_other_than_passed_is_refused(tmp_path: Path, candidate: Path, verdict: str) -> None:
    """Exit code 1, and no repository appears."""
    with pytest.raises(NotAttested) as caught:
        promote(
            candidate, write_evidence(tmp_path / "evidence", candidate, verdict), tmp_path / "models", name="digits"
        )
    assert caught.value.exit_code == 1
    assert not (tmp_path / "models").exists()


def test_evidence_for_other_bytes_is_refused(tmp_path: Path, candidate: Path, evidence: Path) -> None:
    """A verdict on one model opens no door for another, however consistent that one is with its own manifest."""
    other = shutil.copytree(candidate, tmp_path / "candidate")
    with (other / "model.onnx").open("ab") as file:
        file.write(b"\x1a\x00")
    with pytest.raises(NotAttested):
        promote(rewrite_manifest(other), evidence, tmp_path / "models", name="digits")
    assert not (tmp_path / "models").exists()


def test_tampered_model_is_bad_input(tmp_path: Path, candidate: Path, evidence: Path) -> None:
    """A model that is not the one of its manifest ends with exit code 2."""
    tampered = shutil.copytree(candidate, tmp_path / "candidate")
    with (tampered / "model.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff")
    with pytest.raises(BadInput, match=r"model\.onnx: sha256") as caught:
        promote(tampered, evidence, tmp_path / "models", name="digits")
    assert caught.value.exit_code == 2


def test_extra_file_is_bad_input(tmp_path: Path, candidate: Path, evidence: Path) -> None:
    """A library beside the model would become Triton's backend; nothing unknown gets in."""
    extra = shutil.copytree(candidate, tmp_path / "candidate")
    (extra / "libtriton_onnxruntime.so").write_bytes(b"")
    with pytest.raises(BadInput, match=r"libtriton_onnxruntime\.so: not part of a candidate"):
        promote(extra, evidence, tmp_path / "models", name="digits")


def test_evidence_without_probes_is_bad_input_and_changes_nothing(
    tmp_path: Path, repository: Path, candidate: Path, evidence: Path
) -> None:
    """A promotion that fails while it stages leaves the repository as it was."""
    before = listing(repository)
    incomplete = shutil.copytree(evidence, tmp_path / "evidence")
    (incomplete / "probes.npz").unlink()
    with pytest.raises(BadEvidence, match=r"probes\.npz: No such file"):
        promote(candidate, incomplete, repository, name="digits")
    assert listing(repository) == before


def test_other_interface_under_the_same_name_is_refused(tmp_path: Path, repository: Path, candidate: Path) -> None:
    """Clients of a name keep their input shape and labels."""
    renamed = shutil.copytree(candidate, tmp_path / "candidate")
    labels = [f"digit {label}" for label in read_manifest(candidate).labels]
    (renamed / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    rewrite_manifest(renamed, labels=labels)
    evidence = write_evidence(tmp_path / "evidence", renamed)
    with pytest.raises(Refused, match="promote it under another name"):
        promote(renamed, evidence, repository, name="digits")
    assert promote(renamed, evidence, repository, name="worded_digits").version == 1


def test_repository_that_cannot_be_written_is_broken(tmp_path: Path, candidate: Path, evidence: Path) -> None:
    """Exit code 5 and the reason in one line."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Broken, match="cannot be written") as caught:
        promote(candidate, evidence, tmp_path / "file" / "models", name="digits")
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("promoted_before", [0, 1])
def test_crash_at_any_point_leaves_the_old_or_the_new_version(
    tmp_path: Path, candidate: Path, evidence: Path, promoted_before: int
) -> None:
    """Whatever change is the last one, what Triton would serve is whole, and the next promotion cleans up and works."""
    crashes, processes = range(1, 19), []
    for crash in crashes:
        repository = tmp_path / str(crash)
        for _ in range(promoted_before):
            promote(candidate, evidence, repository, name="digits")
        processes.append(run_python(CRASHING, str(candidate), str(evidence), str(repository), str(crash)))
        processes[max(0, crash - 3)].wait()  # a few at a time
    codes = [process.wait() for process in processes]
    assert set(codes[:10]) == {9}
    assert codes[-1] == 0  # so every change was the last one once
    for crash in crashes:
        repository = tmp_path / str(crash)
        seen = [verify_release(repository, name).version for name in model_names(repository)]
        assert seen in ([promoted_before] * promoted_before, [promoted_before + 1])
        promoted = promote(candidate, evidence, repository, name="digits")
        assert promoted.version > max([0, *seen])
        assert verify_release(repository, "digits") == promoted
        assert not list(repository.rglob(".staging-*"))


def test_promotions_at_the_same_time_get_versions_of_their_own(tmp_path: Path, candidate: Path, evidence: Path) -> None:
    """The lock puts them in a row."""
    code = CRASHING.replace("sys.argv[4]", "'0'")
    processes = [run_python(code, str(candidate), str(evidence), str(tmp_path / "models")) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert verify_release(tmp_path / "models", "digits").version == 3


@pytest.mark.parametrize("place", ["digits", "digits/1"])
def test_library_in_the_repository_is_refused(repository: Path, place: str) -> None:
    """A file that promotion did not write keeps the model from being served."""
    (repository / place / "libtriton_onnxruntime.so").write_bytes(b"")
    with pytest.raises(Refused, match="promotion did not write this"):
        verify_release(repository, "digits")


def test_changed_model_in_the_repository_is_refused(repository: Path) -> None:
    """What was swapped after the promotion is not what passed."""
    with (repository / "digits" / "1" / "model.onnx").open("ab") as file:
        file.write(b"\x1a\x00")
    with pytest.raises(BadEvidence):
        verify_release(repository, "digits")


def test_card_and_surrogates_stay_through_a_promotion(repository: Path, candidate: Path, evidence: Path) -> None:
    """What lies beside the versions of a shipped model is neither removed nor a reason to refuse it."""
    shipped = repository / "digits" / "surrogates" / "one"
    shipped.mkdir(parents=True)
    (shipped / "manifest.json").write_text("{}")
    (repository / "digits" / "README.md").write_text("card")
    assert verify_release(repository, "digits").version == 1
    before = listing(repository / "digits")
    assert promote(candidate, evidence, repository, name="digits").version == 2
    assert verify_release(repository, "digits").version == 2
    after = listing(repository / "digits")
    assert {name for name in before if before[name] != after.get(name)} == {"config.pbtxt"}


@pytest.mark.parametrize(("name", "directory"), [("surrogates", False), ("README.md", True), ("3", False)])
def test_card_and_surrogates_are_what_they_are_called(repository: Path, name: str, directory: bool) -> None:
    """A file called surrogates may be anything, such as a library; so may a directory called README.md."""
    path = repository / "digits" / name
    path.mkdir() if directory else path.write_bytes(b"")
    with pytest.raises(Refused, match="promotion did not write this"):
        verify_release(repository, "digits")
