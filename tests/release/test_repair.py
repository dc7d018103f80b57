"""From each damaged state of a repository back to service, by the commands that the messages name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from dfmcl.common.errors import BadInput, Refused
from dfmcl.gating.signing.attestation import Trust
from dfmcl.release.layout import VERSION_FILES, version_numbers
from dfmcl.release.ledger import read_history
from dfmcl.release.promotion import give_back, promote, prune, retire, rollback
from dfmcl.release.repair import repair
from dfmcl.release.status import standings
from dfmcl.release.stores.directory import Directory
from dfmcl.release.verification import verify_release
from dfmcl.serving.clients.triton import Client
from tests.release.test_promotion import listing
from tests.serving.workshop import Served
from tests.signing import CREATED, make_key, trusting


def empty(path: Path) -> None:
    """A file of 0 bytes, a directory without entries."""
    if path.is_dir():
        shutil.rmtree(path)
        path.mkdir()
    else:
        path.write_bytes(b"")


def cut(path: Path) -> None:
    """The first half of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def garble(path: Path) -> None:
    """Bytes that are no text."""
    path.write_bytes(b"\xff\x00garbage\n")


def foreign(path: Path) -> None:
    """Another program's file of the same name."""
    path.write_text('name: "mine"\nbackend: "python"\n' if path.name.endswith(".pbtxt") else '{"mine": 1}\n')


def directory(path: Path) -> None:
    """Another thing of the same name."""
    path.unlink()
    (path / "mine").mkdir(parents=True)


def replace_line(path: Path, number: int, line: str) -> None:
    lines = path.read_text().splitlines()
    lines[number] = line
    path.write_text("\n".join(lines) + "\n")


def serve_version(path: Path, version: int) -> None:
    """config.pbtxt as if it named another version."""
    path.write_text(path.read_text().replace("versions: [ 2 ]", f"versions: [ {version} ]"))


def lock(path: Path) -> None:
    """Leaves that a process which died held: its lock goes with it."""
    path.write_text("")
    subprocess.run(["flock", path, "true"], check=True)


HOW: dict[str, Callable[[Path], None]] = {
    "emptied": empty, "deleted": remove, "cut": cut, "garbled": garble, "foreign": foreign,
}  # fmt: skip
# What is damaged: how, and the version that is served once it is mended. Version 2 is served, version 1 was before it.
CONFIG = {
    f"{path} {how}": (lambda repository, path=path, damage=damage: damage(repository / path), 2)
    for path in ("digits/config.pbtxt", "digits/configs/gpu.pbtxt")
    for how, damage in HOW.items()
}
HISTORY = {
    f"{path} {how}": (lambda repository, path=path, damage=damage: damage(repository / path), 2)
    for path in ("history.jsonl", "aliases.json")
    for how, damage in (HOW | {"a directory": directory}).items()
}
VERSION = {
    f"{file} {how}": (lambda repository, file=file, damage=damage: damage(repository / "digits" / "2" / file), 1)
    for file in sorted(VERSION_FILES)
    for how, damage in HOW.items()
    if file != "labels.txt" or how != "foreign"
}
OTHER = {
    "version deleted": (lambda repository: remove(repository / "digits" / "2"), 1),
    "version emptied": (lambda repository: empty(repository / "digits" / "2"), 1),
    "config names a version that is gone": (lambda repository: serve_version(repository / "digits/config.pbtxt", 7), 2),
    "config names no number of promotion's": (
        lambda repository: serve_version(repository / "digits/config.pbtxt", -1), 2,
    ),
    "both configs deleted": (
        lambda repository: (remove(repository / "digits/config.pbtxt"), remove(repository / "digits/configs")), 2,
    ),
    "config and history deleted": (
        lambda repository: (remove(repository / "digits/config.pbtxt"), remove(repository / "history.jsonl")), 2,
    ),
    "history: garbage in the middle": (lambda repository: replace_line(repository / "history.jsonl", 0, "{{{"), 2),
    "history: an event of another program": (
        lambda repository: replace_line(repository / "history.jsonl", 1, '{"time": "::error::x", "model": "d"}'), 2,
    ),
    "history: versions that are no numbers": (
        lambda repository: replace_line(
            repository / "history.jsonl", 0, read_line(repository, 0).replace('"version": 1', '"version": "../1"')
        ),
        2,
    ),
    "staging of a promotion that was killed": (
        lambda repository: shutil.copytree(repository / "digits/2", repository / "digits/.staging-x/3"), 2,
    ),
    "staging of a first one": (lambda repository: (repository / ".staging-abc" / "1").mkdir(parents=True), 2),
    "a part of a file": (lambda repository: (repository / ".history.jsonl.123.part").write_text("{"), 2),
    "lock of a dead process": (lambda repository: lock(repository / ".promotion.lock"), 2),
    "foreign directory in the repository": (lambda repository: (repository / "notes" / "1").mkdir(parents=True), 2),
    "modes": (lambda repository: [path.chmod(0o600) for path in (repository / "digits" / "2").iterdir()], 2),
}  # fmt: skip
DAMAGES: dict[str, tuple[Callable[[Path], object], int]] = {**CONFIG, **HISTORY, **VERSION, **OTHER}


def read_line(repository: Path, number: int) -> str:
    return (repository / "history.jsonl").read_text().splitlines()[number]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, candidate: Path, evidence: Path, trust: Trust) -> Path:
    """A repository of two versions, for copies."""
    repository = tmp_path_factory.mktemp("whole") / "models"
    for _ in range(2):
        promote(candidate, evidence, Directory(repository), name="digits", trust=trust)
    return repository


@pytest.fixture
def two(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "models")


@pytest.mark.parametrize("damage", DAMAGES)
def test_repair_leads_back_to_service(two: Path, trust: Trust, damage: str) -> None:
    """What is served then passes the proof that `serve` asks for, the history agrees, and every command goes on."""
    break_it, version = DAMAGES[damage]
    break_it(two)
    assert all(row.whole for row in repair(Directory(two), trust)), damage
    assert verify_release(Directory(two), "digits", trust).version == version
    (row,) = standings(Directory(two), trust)
    assert (row.champion, row.trouble, row.doubt) == (version, "", "")
    assert read_history(Directory(two), "digits")
    assert json.loads((two / "aliases.json").read_text())["digits"]["champion"] == version
    assert not [path for path in two.rglob("*") if path.name.startswith(".staging")]
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (two / "digits" / str(version)).iterdir())
    said = [each.said for each in repair(Directory(two), trust)]
    assert said == [f"serves version {version}, which is whole"], "twice is once"
    assert prune(Directory(two), "digits", keep=1) in ([], [1], [2])


@pytest.mark.parametrize("emptied", [[2], [1, 2]])
def test_status_advises_what_helps(two: Path, trust: Trust, emptied: list[int]) -> None:
    """`repair` where a version is left that it can serve, else a promotion; and `repair` says the same."""
    for version in emptied:
        empty(two / "digits" / str(version))
    (row,) = standings(Directory(two), trust)
    helps = emptied != [1, 2]
    assert row.trouble.endswith("`dfmcl repair` mends it" if helps else "; promote a candidate")
    assert [each.whole for each in repair(Directory(two), trust)] == [helps]


@pytest.mark.parametrize("how", ["fifo", "directory", "link"])
def test_status_and_repair_say_the_same_of_what_is_no_file(two: Path, trust: Trust, how: str) -> None:
    """`repair` touches nothing that promotion did not write: neither says that it helps before that is removed."""
    path = two / "digits" / "config.pbtxt"
    path.unlink()
    {"fifo": lambda: os.mkfifo(path), "directory": path.mkdir, "link": lambda: path.symlink_to("/dev/zero")}[how]()
    (row,), (told,) = standings(Directory(two), trust), repair(Directory(two), trust)
    assert row.trouble == f"{path}: promotion did not write this; remove that and repair again"
    assert told.said == f"promotion did not write {path}; remove that and repair again"
    path.rmdir() if how == "directory" else path.unlink()
    assert [each.whole for each in repair(Directory(two), trust)] == [True]


# What only `repair` takes on: who appends to a history that cannot be read would lose it.
UNREADABLE = {f"history.jsonl {how}" for how in ("cut", "garbled", "foreign", "a directory")}
UNREADABLE |= {damage for damage in DAMAGES if damage.startswith("history:")}


@pytest.mark.parametrize("damage", sorted(DAMAGES.keys() - UNREADABLE))
def test_promotion_leads_back_to_service_too(
    two: Path, candidate: Path, evidence: Path, trust: Trust, damage: str
) -> None:
    """The new version serves, under a number that was not given before."""
    DAMAGES[damage][0](two)
    promoted = promote(candidate, evidence, Directory(two), name="digits", trust=trust)
    assert promoted.version >= 3
    assert verify_release(Directory(two), "digits", trust) == promoted


@pytest.mark.parametrize("damage", sorted(UNREADABLE - {"history.jsonl a directory"}))  # which has no lines
def test_a_history_that_cannot_be_read_stops_every_change(
    two: Path, candidate: Path, evidence: Path, trust: Trust, damage: str
) -> None:
    """Each names the line and the command that mends it, which keeps what can be read, and the damaged file."""
    DAMAGES[damage][0](two)
    before = (two / "history.jsonl").read_bytes()
    for change in (
        lambda: promote(candidate, evidence, Directory(two), name="digits", trust=trust),
        lambda: rollback(Directory(two), "digits", trust=trust),
        lambda: retire(Directory(two), "digits"),
        lambda: prune(Directory(two), "digits"),
    ):
        with pytest.raises(BadInput, match=r"history\.jsonl: line \d: .*; `dfmcl repair` mends it"):
            change()
    assert (two / "history.jsonl").read_bytes() == before
    (told, _) = repair(Directory(two), trust)
    assert "history.jsonl.damaged-1" in told.said
    assert (two / "history.jsonl.damaged-1").read_bytes() == before
    assert verify_release(Directory(two), "digits", trust).version == 2


@pytest.mark.parametrize("damage", [name for name in CONFIG if "gpu" not in name and "cut" not in name])
def test_a_config_that_cannot_be_read_stops_no_rollback_and_no_retirement(two: Path, trust: Trust, damage: str) -> None:
    """Neither needs to know what is served; to prune one must, and the refusal names the command that helps."""
    DAMAGES[damage][0](two)
    for change in (
        lambda: prune(Directory(two), "digits", keep=1),
        lambda: rollback(Directory(two), "digits", trust=trust),
    ):
        with pytest.raises(BadInput, match="`dfmcl repair` mends it"):
            change()
    assert "`dfmcl repair` mends it" in standings(Directory(two), trust)[0].trouble
    assert rollback(Directory(two), "digits", trust=trust, version=1).version == 1
    assert verify_release(Directory(two), "digits", trust).version == 1
    DAMAGES[damage][0](two)
    retire(Directory(two), "digits", reason="damaged")
    assert not (two / "digits").exists()
    assert [(row.event, row.version, row.before) for row in read_history(Directory(two), "digits")][-1] == (
        "retired",
        None,
        1,
    )


STRANGERS: dict[str, Callable[[Path], object]] = {
    **{f"digits/{name}": Path.mkdir for name in ("004", "4 ", "+4", "-4", "4.0", "\u0664", "0", "4" * 30, "backup")},
    "digits/3": Path.touch,
    "digits/5": lambda path: path.symlink_to("2"),
    "digits/libtriton_onnxruntime.so": Path.touch,
    "digits/2/.nfs0001": Path.touch,
    "digits/configs/other.pbtxt": Path.touch,
    "digits/notes\x1b[2J\n::error::x": Path.touch,
}


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_are_named_and_neither_counted_nor_removed(
    two: Path, candidate: Path, evidence: Path, trust: Trust, name: str
) -> None:
    """Every change is refused before anything happens, and `repair` says what a person must remove."""
    stranger = two / name
    STRANGERS[name](stranger)
    before = listing(two)
    for change in (
        lambda: promote(candidate, evidence, Directory(two), name="digits", trust=trust),
        lambda: rollback(Directory(two), "digits", trust=trust, version=2),
        lambda: prune(Directory(two), "digits", keep=1),
    ):
        with pytest.raises(Refused, match="promotion did not write this") as caught:
            change()
        assert stranger.name in str(caught.value)
    assert version_numbers(Directory(two), "digits") == [1, 2]
    (row,) = repair(Directory(two), trust)
    assert not row.whole
    assert stranger.name in row.said
    assert listing(two) == before
    assert stranger.name in standings(Directory(two), trust)[0].trouble
    stranger.rmdir() if stranger.is_dir() and not stranger.is_symlink() else stranger.unlink()
    assert [row.said for row in repair(Directory(two), trust)] == ["serves version 2, which is whole"]


def test_nothing_is_served_that_does_not_verify(two: Path, trust: Trust, tmp_path: Path) -> None:
    """Where every version is damaged, or signed by another, or expired, `repair` serves none and says of each why."""
    empty(two / "digits" / "config.pbtxt")
    before = listing(two)
    (row,) = repair(Directory(two), trusting(make_key(tmp_path, "another")))
    assert (row.whole, row.said.count("0 trusted keys signed")) == (False, 2)
    (row,) = repair(Directory(two), trust, now=datetime.fromisoformat(CREATED) + timedelta(days=200 * 365))
    assert (row.whole, row.said.count("expired")) == (False, 2)
    garble(two / "digits" / "2" / "model.onnx")
    empty(two / "digits" / "1")
    (row,) = repair(Directory(two), trust)
    assert not row.whole
    assert "promote a candidate" in row.said
    assert listing(two)["digits/config.pbtxt"] == before["digits/config.pbtxt"] == b""


def test_what_was_given_up_is_not_what_repair_falls_back_to(
    two: Path, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """It verifies, and was seen not to work."""
    promote(candidate, evidence, Directory(two), name="digits", trust=trust)
    give_back(Directory(two), "digits", 2, "its warm-up failed")
    for path in ("2/model.onnx", "config.pbtxt"):
        garble(two / "digits" / path)
    assert repair(Directory(two), trust)[0].whole
    assert verify_release(Directory(two), "digits", trust).version == 1
    garble(two / "digits" / "1" / "model.onnx")
    assert not repair(Directory(two), trust)[0].whole


def test_another_program_s_model_is_left_alone(two: Path, candidate: Path, evidence: Path, trust: Trust) -> None:
    """A Triton model of the user's own has a config.pbtxt too: it is never overwritten, and named."""
    mine = two / "mine"
    (mine / "1").mkdir(parents=True)
    (mine / "1" / "model.plan").write_bytes(b"engine")
    (mine / "config.pbtxt").write_text('name: "mine"\nbackend: "tensorrt"\n')
    before = listing(mine)
    for change in (
        lambda: promote(candidate, evidence, Directory(two), name="mine", trust=trust),
        lambda: retire(Directory(two), "mine"),
        lambda: prune(Directory(two), "mine"),
        lambda: rollback(Directory(two), "mine", trust=trust, version=1),
    ):
        with pytest.raises(BadInput, match=r"mine: (promotion did not write this|is not served)"):
            change()
    told = {row.about: row for row in repair(Directory(two), trust)}
    assert told["digits"].whole
    assert "promotion did not write this; move it away" in told["mine"].said
    assert listing(mine) == before


def test_a_model_whose_directory_is_gone_is_not_forgotten(
    two: Path, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """Nobody retired it: `status` says so, `repair` cannot help, and its numbers stay taken."""
    remove(two / "digits")
    (row,) = standings(Directory(two), trust)
    assert (row.champion, row.versions) == (None, [])
    assert "nobody retired it; promote a candidate" in row.trouble
    (found,) = repair(Directory(two), trust)
    assert not found.whole
    assert promote(candidate, evidence, Directory(two), name="digits", trust=trust).version == 3


def test_what_was_retired_is_not_brought_back(two: Path, tmp_path: Path, trust: Trust) -> None:
    """A backup that a user copies in is served when a person asks for it by its number."""
    backup = shutil.copytree(two / "digits", tmp_path / "backup")
    retire(Directory(two), "digits")
    shutil.copytree(backup, two / "digits")
    remove(two / "digits" / "config.pbtxt")
    (row,) = repair(Directory(two), trust)
    assert (row.whole, "was retired" in row.said) == (False, True)
    assert rollback(Directory(two), "digits", trust=trust, version=2).version == 2
    assert repair(Directory(two), trust)[0].whole


def test_one_model_is_repaired_where_one_is_named(two: Path, candidate: Path, evidence: Path, trust: Trust) -> None:
    """A misspelt name is bad input."""
    promote(candidate, evidence, Directory(two), name="other", trust=trust)
    for name in ("digits", "other"):
        empty(two / name / "config.pbtxt")
    assert [row.about for row in repair(Directory(two), trust, name="other")] == ["other"]
    assert [bool(row.trouble) for row in standings(Directory(two), trust)] == [True, False]
    with pytest.raises(BadInput, match="models there: digits, other"):
        repair(Directory(two), trust, name="digit")


@pytest.mark.parametrize("damage", ["digits/config.pbtxt emptied", "model.onnx cut"])
def test_triton_serves_what_was_repaired(
    two: Path, trust: Trust, trust_file: Path, damage: str, tmp_path: Path, needs_triton: None
) -> None:
    """By the user's own commands: `status` says what is wrong, `repair` mends it, and a real Triton answers."""
    break_it, version = DAMAGES[damage]
    break_it(two)
    before = dfmcl("status", "--repository", str(two))
    assert before.returncode == 1
    assert "dfmcl repair" in before.stdout + before.stderr or "is not what the gate judged" in before.stdout
    mended = dfmcl("repair", "--repository", str(two), "--trust", str(trust_file))
    assert (mended.returncode, mended.stderr) == (0, "")
    assert dfmcl("status", "--repository", str(two), "--trust", str(trust_file)).returncode == 0
    server = Served(two, tmp_path / "ready.json", trust=trust).start()
    try:
        with Client(server.ready["grpc"], "digits") as client:
            assert client.describe().version == str(version)
    finally:
        assert server.close() == 0


def dfmcl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("dfmcl")
    return subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
