"""The seam between releases and where they lie: a directory and buckets do the same, and a bucket's writer may die."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from dfmcl.common.errors import BadInput, Broken, Refused
from dfmcl.common.files import sha256_of
from dfmcl.common.reader import Unfit
from dfmcl.gating.signing.attestation import Trust
from dfmcl.release.layout import VERSION_FILES, model_names, parse_config, served_version, version_numbers
from dfmcl.release.ledger import Aliases, aliases, is_retired, read_history
from dfmcl.release.promotion import give_back, promote, prune, retire, rollback, switch
from dfmcl.release.repair import repair
from dfmcl.release.status import standings
from dfmcl.release.stores import directory
from dfmcl.release.stores.bucket import ABANDONED_SECONDS, INDEX, BucketStore
from dfmcl.release.stores.directory import Directory
from dfmcl.release.stores.index import Index
from dfmcl.release.stores.registry import STORES, store_of
from dfmcl.release.stores.store import Changed, Etag, Store, UnusableStore
from dfmcl.release.verification import verify_release
from dfmcl.release.writer import only_writer
from dfmcl.serving.triton.known_answers import known_answers
from dfmcl.serving.triton.sight import look
from tests.clouds import KINDS
from tests.present import present
from tests.release.bucket import Died, Objects, bucket_of
from tests.release.test_promotion import CHANGES, FOLLOWING, PROMOTE
from tests.signing import code_of

Again = Callable[[], Store]


@pytest.fixture(params=["directory", "memory", *KINDS])
def again(request: pytest.FixtureRequest, tmp_path: Path, new_bucket: Callable[[str], str]) -> Again:
    """Opens the same store as another process would: of each member."""
    if request.param == "directory":
        return lambda: Directory(tmp_path / "models")
    if request.param == "memory":
        objects = Objects()
        return lambda: BucketStore(Objects(objects.held))
    address = new_bucket(request.param)
    return lambda: store_of(address)


@pytest.fixture
def store(again: Again) -> Store:
    """Each member, empty."""
    return again()


@pytest.fixture
def promoted(store: Store, candidate: Path, evidence: Path, trust: Trust) -> Store:
    """Each member, with one promoted version."""
    promote(candidate, evidence, store, name="digits", trust=trust, threads=1)
    return store


def from_outside(store: Store, name: str, data: bytes) -> None:
    """Write a file as another program; into a bucket the only way is ours."""
    if isinstance(store, Directory):
        Path(store.where(name)).write_bytes(data)
        return
    another = BucketStore(store._objects)  # type: ignore[attr-defined]  # the same bucket, whatever keeps it
    with another.writing():
        another.replace(name, data, another.etag(name))


def add(store: Store, config: bytes, fault: Exception | None = None) -> None:
    """A folder m with two files, one of them in a folder of its own; or half of it, where there is a fault."""
    with store.added("m") as folder:
        (folder / "1").mkdir()
        (folder / "1" / "model").write_bytes(b"12345")
        if fault is not None:
            raise fault
        (folder / "config").write_bytes(config)
        assert "m" not in {entry.name for entry in store.entries()}


def test_a_folder_is_added_as_a_whole_or_not_at_all(store: Store) -> None:
    """What was begun and not finished has no name; a name is given once."""
    with store.writing():
        with pytest.raises(ZeroDivisionError):
            add(store, b"one", ZeroDivisionError())
        assert [entry.name for entry in store.entries() if not entry.name.startswith(".")] == []
        add(store, b"one")
        assert [(entry.name, entry.folder, entry.file) for entry in store.entries("m")] == [
            ("1", True, False),
            ("config", False, True),
        ]
        with pytest.raises(FileExistsError), store.added("m") as folder:
            (folder / "config").write_bytes(b"two")
        assert store.read("m/config", 5) == b"one"
        with store.removed("m/1"):
            assert [entry.name for entry in store.entries("m")] == ["config"]
        with store.added("m/1") as folder:
            (folder / "model").write_bytes(b"again")
    assert (store.local("m") / "1" / "model").read_bytes() == b"again"


def test_a_file_is_replaced_as_it_was_seen_or_not_at_all(store: Store) -> None:
    """A writer that saw another one changes nothing; one that saw none makes a new one only."""
    with store.writing():
        first = store.replace("m/config", b"one", None)
        assert store.etag("m/config") == first
        for seen in (None, "another"):
            with pytest.raises(Changed, match="another writer replaced it"):
                store.replace("m/config", b"two", seen)
        assert store.read("m/config", 3) == b"one"
        second = store.replace("m/config", b"two", first)
        assert (store.local("m") / "config").read_bytes() == b"two"
        assert store.replace("m/config", b"three", second) not in (first, second)
        assert (store.local("m") / "config").read_bytes() == b"three"
        assert [store.set_aside("m/config")] == ["config.damaged-1"]
        store.replace("m/config", b"four", None)
        assert store.set_aside("m/config") == "config.damaged-2"
    assert [entry.name for entry in store.entries("m")] == ["config.damaged-1", "config.damaged-2"]
    assert not (store.local("m") / "config").exists()


def test_what_is_not_there_is_told_as_files_are(store: Store) -> None:
    """And a file that is larger than it may be is not read."""
    with store.writing():
        store.replace("config", b"one", None)
    for ask in (
        lambda: store.read("m", 1),
        lambda: store.etag("m"),
        lambda: store.entries("m"),
        lambda: store.set_aside("m"),
    ):
        with pytest.raises(FileNotFoundError):
            ask()
    assert not store.local("m").exists()
    with pytest.raises(Unfit, match="at most 2 are read"):
        store.read("config", 2)


def test_one_writer_at_a_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is told, and comes in once the first has ended."""
    monkeypatch.setattr(directory, "LOCK_SECONDS", 0.1)
    with store.writing(), pytest.raises(Broken, match="is being changed"), store.writing():
        pass
    with store.writing():
        pass


def test_first_promotion_writes_version_1_to_each_store(
    store: Store, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """The version holds the candidate and its evidence; the config serves it; aliases name it; its answers are read."""
    promoted = promote(candidate, evidence, store, name="digits", trust=trust)
    assert (promoted.model, promoted.version, promoted.folder) == ("digits", 1, "digits/1")
    assert promoted.sha256 == sha256_of(promoted.path / "model.onnx")
    assert {entry.name for entry in store.entries("digits/1")} == VERSION_FILES
    roles = {"champion": 1, "previous": None, "candidate": None}
    assert json.loads(store.read("aliases.json", 1000)) == {"digits": roles}
    assert verify_release(store, "digits", trust) == promoted
    assert len(known_answers(promoted)[0]) == 64
    (row,) = standings(store, trust)
    assert (row.champion, row.previous, row.versions, row.trouble, row.doubt) == (1, None, [1], "", "")


def test_rollback_serves_what_was_served_before(promoted: Store, candidate: Path, evidence: Path, trust: Trust) -> None:
    """With its bytes and threads; doing it twice is where one began, and the history says who and why."""
    first = verify_release(promoted, "digits")
    promote(candidate, evidence, promoted, name="digits", trust=trust, threads=3)
    seen = look(promoted).marks["digits"]
    assert rollback(promoted, "digits", trust=trust, reason="p99 doubled") == first
    assert look(promoted).marks["digits"] != seen
    assert verify_release(promoted, "digits", trust) == first
    assert aliases(promoted)["digits"] == Aliases(champion=1, previous=2)
    config = parse_config(promoted.read("digits/config.pbtxt", 10_000).decode(), "")
    assert config.parameters["intra_op_thread_count"].string_value == "3"
    assert rollback(promoted, "digits", trust=trust).version == 2
    last = read_history(promoted)[-2]
    assert (last.event, last.version, last.before, last.reason) == ("rolled_back", 1, 2, "p99 doubled")
    assert last.actor


def test_rollback_to_where_nothing_is_is_told(promoted: Store, trust: Trust) -> None:
    """There may be no earlier version, or none of that number, or no such model."""
    with pytest.raises(Refused, match="nothing was served before version 1"):
        rollback(promoted, "digits", trust=trust)
    with pytest.raises(BadInput, match="has no version 7; on disk are 1"):
        rollback(promoted, "digits", trust=trust, version=7)
    with pytest.raises(BadInput, match="models there: digits"):
        rollback(promoted, "other", trust=trust)


def test_prune_keeps_what_serves_and_what_served_last(
    promoted: Store, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """However old they are; numbers that are gone stay taken."""
    for _ in range(4):
        promote(candidate, evidence, promoted, name="digits", trust=trust)
    rollback(promoted, "digits", trust=trust, version=1)
    assert prune(promoted, "digits", keep=2) == [2, 3]
    assert {entry.name for entry in promoted.entries("digits") if entry.name.isdecimal()} == {"1", "4", "5"}
    assert prune(promoted, "digits", keep=2) == []
    assert promote(candidate, evidence, promoted, name="digits", trust=trust).version == 6


def test_a_shadow_stands_beside_the_champion_until_its_bytes_are_served(
    promoted: Store, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """Under its own name, with its own versions; a retired name keeps its numbers."""
    with pytest.raises(BadInput, match="nothing can stand in its shadow"):
        promote(candidate, evidence, promoted, name="other", trust=trust, shadow=True)
    shadow = promote(candidate, evidence, promoted, name="digits", trust=trust, shadow=True)
    assert shadow.model == "digits-shadow"
    assert aliases(promoted)["digits"] == Aliases(champion=1, candidate=1)
    assert verify_release(promoted, "digits-shadow", trust).version == 1
    promote(candidate, evidence, promoted, name="digits", trust=trust)
    assert model_names(promoted) == ["digits"]
    assert aliases(promoted) == {"digits": Aliases(champion=2, previous=1)}
    assert promote(candidate, evidence, promoted, name="digits", trust=trust, shadow=True).version == 2
    retire(promoted, "digits-shadow", reason="slower")
    assert aliases(promoted)["digits"].candidate is None
    assert [change.event for change in read_history(promoted, "digits-shadow")] == ["promoted", "retired"] * 2


def test_what_was_returned_from_is_not_previous(promoted: Store, candidate: Path, evidence: Path, trust: Trust) -> None:
    """A rollback must not lead to a version that never worked."""
    for _ in range(2):
        promote(candidate, evidence, promoted, name="digits", trust=trust)
    give_back(promoted, "digits", 2, "it does not load")
    assert aliases(promoted)["digits"] == Aliases(champion=2, previous=1)
    assert promote(candidate, evidence, promoted, name="digits", trust=trust).version == 4
    assert aliases(promoted)["digits"] == Aliases(champion=4, previous=2)


def test_a_damaged_history_is_kept_aside_and_a_damaged_config_is_mended(promoted: Store, trust: Trust) -> None:
    """By `repair`, in each store; and messages name what lies there as it is called there."""
    from_outside(promoted, "history.jsonl", promoted.read("history.jsonl", 10_000) + b"{{{\n")
    from_outside(promoted, "digits/config.pbtxt", b"")
    lost, row = repair(promoted, trust)
    assert (row.whole, lost.about) == (True, "history.jsonl")
    assert promoted.read("history.jsonl.damaged-1", 10_000).endswith(b"{{{\n")
    assert verify_release(promoted, "digits", trust).version == 1
    from_outside(promoted, "digits/1/model.onnx", b"")
    (standing,) = standings(promoted, trust)
    assert standing.trouble.startswith(f"{promoted.where('digits/1/model.onnx')}: is not what the gate judged")
    assert standing.champion is None


def switch_late(store: Store, meanwhile: Callable[[], object]) -> None:
    """Serve version 1, once something else has happened since that change began."""
    with only_writer(store) as change:
        meanwhile()
        switch(change, "digits", 1, "rolled_back")


def test_a_change_replaces_nothing_that_another_writer_wrote_since_it_began(
    promoted: Store, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """A commit is on the condition that what it changes is as it was: of two, one is told to come again."""
    promote(candidate, evidence, promoted, name="digits", trust=trust)
    before = promoted.read("history.jsonl", 10_000)
    config = promoted.read("digits/config.pbtxt", 10_000).replace(b'string_value: "1"', b'string_value: "12"')
    told = r"json: another writer replaced it; nothing was changed"
    if not promoted.whole:
        told = r"config\.pbtxt: another writer replaced it; before that, digits/configs/gpu"
    with pytest.raises(Broken, match=told):
        switch_late(promoted, lambda: from_outside(promoted, "digits/config.pbtxt", config))
    assert promoted.read("digits/config.pbtxt", 10_000) == config
    assert (promoted.read("history.jsonl", 10_000), served_version(promoted, "digits")) == (before, 2)
    assert rollback(promoted, "digits", trust=trust).version == 1
    assert standings(promoted, trust)[0].doubt == ""


@pytest.fixture(scope="module")
def three(candidate: Path, evidence: Path, trust: Trust) -> dict[str, bytes]:
    """What a bucket holds after three promotions."""
    objects = Objects()
    for _ in range(3):
        promote(candidate, evidence, BucketStore(objects), name="digits", trust=trust)
    return objects.held


@pytest.mark.parametrize("change", ["first", *CHANGES])
def test_death_at_any_write_to_a_bucket_leaves_the_old_or_the_new_state(
    three: dict[str, bytes], candidate: Path, evidence: Path, trust: Trust, change: str
) -> None:
    """As in a directory, though nothing can be renamed there: no reader ever finds a half, nor does the next writer."""
    code, allowed = (PROMOTE, {None, 1}) if change == "first" else CHANGES[change]
    found: list[int | None] = []
    for left in count():
        objects = Objects({} if change == "first" else dict(three), left)
        before = BucketStore(Objects(objects.held)).now()
        names = {"candidate": candidate, "evidence": evidence, "trust": trust, "repository": BucketStore(objects)}
        ended = False
        try:
            exec(code, globals() | names)  # as the process of test_promotion.py does
            ended = True
        except Died:
            pass
        later = BucketStore(Objects(objects.held), now=lambda: 2 * ABANDONED_SECONDS)
        served = [verify_release(later, name).version for name in model_names(later)]
        found.append(served[0] if served else None)
        for version in version_numbers(later, "digits"):
            assert {entry.name for entry in later.entries(f"digits/{version}")} == VERSION_FILES
        assert [served_version(before, name) for name in model_names(before)] == ([] if change == "first" else [3])
        if served:
            assert all(not (row.trouble or row.doubt) for row in standings(later, trust)), "the history says the same"
        if ended or left % 4 == 1:
            goes_on(later, objects.held, candidate, evidence, trust, left)
        if ended:
            break
    assert set(found) == allowed
    assert found == sorted(found, key=found.index), "once new, never old again"


def goes_on(
    store: BucketStore, held: dict[str, bytes], candidate: Path, evidence: Path, trust: Trust, number: int
) -> None:
    """What comes after a death finds nothing in its way, and leaves nothing of it."""
    served = served_version(store, "digits") if model_names(store) else None
    assert served or is_retired(store, "digits") or not read_history(store)
    if served:
        FOLLOWING[number % len(FOLLOWING)](store, trust)
    promoted = promote(candidate, evidence, store, name="digits", trust=trust)
    assert verify_release(store, "digits", trust) == promoted
    (row,) = standings(store, trust)
    assert (row.trouble, row.doubt) == ("", "")
    named = {file.key for file in Index.from_bytes(held[INDEX], "").files.values()} - {None}
    assert held.keys() == {INDEX, *named}


@pytest.mark.parametrize("again", ["memory", *KINDS], indirect=True)
def test_of_two_that_change_a_bucket_at_once_the_later_is_told(
    again: Again, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """Nothing of its change is there, and nothing that it brought along: it comes again."""
    promote(candidate, evidence, again(), name="digits", trust=trust)

    def late() -> None:
        with only_writer(again()) as change:
            promote(candidate, evidence, again(), name="other", trust=trust)
            with change.added("digits/2", "") as folder:
                (folder / "model.onnx").write_bytes(b"1")
            change.replace("history.jsonl", "")

    with pytest.raises(Broken, match="another writer replaced it; nothing was changed"):
        late()
    store = bucket_of(again())
    assert model_names(store) == ["digits", "other"]
    assert version_numbers(store, "digits") == [1]
    assert [change.model for change in read_history(store)] == ["digits", "other"]
    named = {file.key for file in store._index().files.values()} - {None}
    assert {key for key, _ in store._objects.listing("")} == {INDEX, *named}


@pytest.mark.parametrize("again", ["memory", *KINDS], indirect=True)
def test_what_a_bucket_does_not_hold_is_told_and_nothing_else_is_believed(
    again: Again, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """An object that is gone, or was overwritten; an index that another program wrote, or that names a way out."""
    store = bucket_of(again())
    promote(candidate, evidence, store, name="digits", trust=trust)
    objects, index = store._objects, store._index()
    key = present(index.files["digits/1/labels.txt"].key or index.files["digits/1/model.onnx"].key)
    kept = present(objects.get(key, 10**9))
    objects.delete([key])
    for another in (b"another", None):
        (row,) = standings(again(), trust)
        assert "is gone or holds other bytes than were promoted" in row.trouble
        assert row.champion is None
        if another:
            objects.put(key, another, None)
    objects.delete([key])
    objects.put(key, kept[1], None)
    assert standings(again(), trust)[0].champion == 1
    good = present(objects.get(INDEX, 10**9))[1].decode()
    for bad, why in (
        ("{}", "format is None"),
        (good[:-9], "not readable as JSON"),
        (good.replace("aliases.json", "../aliases.json"), "'../aliases.json' is no file's name"),
        (good.replace("aliases.json", "digits"), "'digits' for a file and a folder"),
        (good.replace('"text"', '"key"', 1).replace('"key"', '"key": "a", "text"', 1), "neither its bytes nor where"),
        (good.replace('"sha256"', '"sha512"', 1), "is no list of a repository's files"),
    ):
        objects.delete([INDEX])
        objects.put(INDEX, bad.encode(), None)
        for ask in (
            lambda: standings(again(), trust),
            lambda: promote(candidate, evidence, again(), name="digits", trust=trust),
        ):
            with pytest.raises((UnusableStore, BadInput), match=why):
                ask()


def test_a_server_that_heeds_no_condition_is_refused(candidate: Path, evidence: Path, trust: Trust) -> None:
    """Two promotions at once would overwrite each other there; what answered with an error may have been done."""

    class Heedless(Objects):
        def put(self, key: str, body: bytes, seen: Etag | None) -> Etag:
            return super().put(key, body, self._etag(key) if key in self.held else None)

    class Deaf(Objects):
        def put(self, key: str, body: bytes, seen: Etag | None) -> Etag:
            super().put(key, body, seen)
            raise Changed(key)  # as a second attempt has it, when the answer to the first was lost

    with pytest.raises(BadInput, match="its server heeds no If-Match and If-None-Match"):
        promote(candidate, evidence, BucketStore(Heedless()), name="digits", trust=trust)
    objects = Objects()
    promote(candidate, evidence, BucketStore(objects), name="digits", trust=trust)
    assert promote(candidate, evidence, BucketStore(Deaf(objects.held)), name="digits", trust=trust).version == 2
    assert verify_release(BucketStore(objects), "digits", trust).version == 2


def test_another_member_is_one_line_of_the_registry(
    three: dict[str, bytes], trust_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command then takes its addresses; those of other schemes are refused, with the schemes that are known."""
    with pytest.raises(BadInput, match="memory: is no folder here, and no store that is known; known are paths"):
        store_of("memory://bucket")
    objects = Objects(dict(three))
    monkeypatch.setitem(STORES, "memory", lambda address: BucketStore(objects))
    with pytest.raises(BadInput, match="known are paths of this machine, s3://, gs://, az://, memory://"):
        store_of("hf://bucket/models")
    where, name, trusted = ["--repository", "memory://bucket"], ["--name", "digits"], ["--trust", str(trust_file)]
    assert code_of("status", *where, *trusted) == 0
    assert code_of("rollback", *where, *name, *trusted, "--reason", "slow") == 0
    assert code_of("verify", "memory://bucket/digits", *trusted) == 0
    assert code_of("prune", *where, *name, "--keep", "1") == 0
    assert code_of("history", *where, *name) == 0
    assert code_of("repair", *where, *trusted) == 0
    said = capsys.readouterr().out
    for line in (
        "champion 3, previous 2; on disk 1, 2, 3",
        "memory://bucket/digits/2: digits is back at version 2",
        "memory://bucket/digits/2: passed on",
        "removed version 1",
        "serves version 2, which is whole",
    ):
        assert line in said
    assert code_of("retire", *where, *name) == 0
    assert code_of("status", *where) == 1
