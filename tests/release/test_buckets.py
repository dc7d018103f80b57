"""A repository in a bucket of each kind, on 127.0.0.1: the commands, their cost, and whatever gets in the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from dfmcl.common.errors import BadInput
from dfmcl.gating.signing.attestation import Trust
from dfmcl.release.layout import VERSION_FILES, served_version, version_numbers
from dfmcl.release.ledger import read_history
from dfmcl.release.promotion import promote, prune, rollback
from dfmcl.release.status import standings
from dfmcl.release.stores.bucket import ABANDONED_SECONDS, INDEX, BucketStore
from dfmcl.release.stores.cloud import CLOUDS, OF_PLATFORM, PART_BYTES
from dfmcl.release.stores.registry import store_of
from dfmcl.release.verification import verify_release
from dfmcl.serving.triton.sight import look
from tests.clouds import KINDS, Server, of_azure, server
from tests.present import present
from tests.processes import wait_until
from tests.release.bucket import bucket_of
from tests.serving.workshop import run_python
from tests.signing import code_of

# A promotion in a process of its own, which a signal meets right before its K-th write to the bucket.
PROMOTING = """
import os, sys
from pathlib import Path
from dfmcl.gating.signing.trust import load_trust
from dfmcl.release.promotion import promote
from dfmcl.release.stores.registry import store_of
from dfmcl.release.stores.cloud import CloudObjects
number, first, last, address, candidate, evidence, trust = sys.argv[1:]
trust = load_trust(Path(trust))
for step in range(int(first), int(last) + 1):
    left = [step]
    def counted(write):
        def call(*arguments, **options):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), int(number))
            return write(*arguments, **options)
        return call
    if not os.fork():
        CloudObjects.put, CloudObjects.create = counted(CloudObjects.put), counted(CloudObjects.create)
        try:
            promote(Path(candidate), Path(evidence), store_of(address), name="digits", trust=trust)
            print("ended", flush=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
        os._exit(0)
    print(step, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
WRITES = len(VERSION_FILES) + 1  # of a promotion that is not a model's first: its files, and the index


@pytest.fixture
def promoted(bucket: str, candidate: Path, evidence: Path, trust: Trust) -> str:
    promote(candidate, evidence, store_of(bucket), name="digits", trust=trust, threads=1)
    return bucket


def test_every_command_takes_an_address(
    bucket: str, candidate: Path, evidence: Path, trust_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From an empty bucket to a rollback and the end of a model; messages name things as they are called there."""
    where, name, trusted = ["--repository", bucket], ["--name", "digits"], ["--trust", str(trust_file)]
    new = ["promote", str(candidate), "--evidence", str(evidence), *where, *name, *trusted]
    assert code_of("status", *where) == 2
    assert f"{bucket}: no such repository; name a model repository" in capsys.readouterr().err
    for arguments, code, said in (
        (new, 0, f"{bucket}/digits/1: digits version 1"),
        (new, 0, f"{bucket}/digits/2: digits version 2"),
        ([*new, "--shadow"], 0, f"{bucket}/digits-shadow/1: digits-shadow version 1"),
        (["status", *where, *trusted], 0, "digits: champion 2, previous 1, candidate 1; on disk 1, 2;"),
        (["rollback", *where, *name, *trusted, "--reason", "slow"], 0, "digits is back at version 1"),
        (["history", *where, *name], 0, "rolled_back  version 1, before 2, by "),
        (["verify", f"{bucket}/digits", *trusted], 0, f"{bucket}/digits/1: passed on"),
        (["verify", f"{bucket}/digits/2", *trusted], 0, f"{bucket}/digits/2: passed on"),
        (["parity", f"{bucket}/digits/2"], 0, "equal  CPUExecutionProvider, float32 (decided): logits off by"),
        (["sync", *where, "--into", str(tmp_path / "models"), *trusted, "--once"], 0, "digits: version 1 (sha256"),
        (["prune", *where, *name, "--keep", "1"], 0, "digits: removed nothing"),
        (["repair", *where, *trusted], 0, "digits: serves version 1, which is whole"),
        (["retire", *where, *name], 0, "digits: retired"),
        (["status", *where], 1, f"{bucket}: holds no promoted model"),
        (["sync", *where, "--into", str(tmp_path / "models"), "--once"], 0, "digits: was retired, and is removed"),
    ):
        assert code_of(*arguments) == code, arguments
        assert said in capsys.readouterr().out
    for arguments, said in (
        (["parity", f"{bucket}/digits/9"], f"{bucket}/digits/9: is not there"),
        (["verify", f"{bucket}/digits", *trusted], f"{bucket}/digits/manifest.json: no such file"),
        (["verify", f"{bucket.removesuffix('models')}other/1", *trusted], "no repository is there or above"),
        (["serve", *where, "--print-docker"], "--print-docker mounts a directory"),
        (["status", "--repository", f"{bucket[:2]}://"], f"{bucket[:2]}://: write {CLOUDS[bucket[:2]].form}"),
        (["status", "--repository", f"{bucket}/../c"], f"write {CLOUDS[bucket[:2]].form}"),
        (["status", "--repository", "hf://b/models"], "hf: is no folder here, and no store that is known; known are"),
        (["status", "--repository", "abfss://b"], "known are paths of this machine, s3://, gs://, az://"),
    ):
        assert code_of(*arguments) == 2, arguments
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1, "one line"


def test_a_look_at_an_unchanged_repository_is_one_request(
    promoted: str, cloud: Server, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """Without a body: the server answers 304. And a thousand versions cost `status` no request more than two."""
    store = bucket_of(store_of(promoted))
    before = look(store)
    asked = len(cloud.answers())
    for _ in range(3):
        assert look(store) == before
    new = cloud.answers()[asked:]
    assert [(line.split()[0], line.split()[2]) for line in new] == [("GET", "304")] * 3
    assert all(line.split()[1].endswith(f"{promoted.partition('://')[2]}/{INDEX}") for line in new)
    asked = len(cloud.answers())
    promote(candidate, evidence, store, name="digits", trust=trust)
    new = cloud.answers()[asked:]
    assert len([line for line in new if line.startswith("PUT")]) <= WRITES, (
        "each file that has an object, then the index"
    )
    assert len(new) <= WRITES + 5, new
    asked, rows = len(cloud.answers()), standings(store_of(promoted).now(), trust)
    with_two = cloud.answers()[asked:]
    assert len(with_two) <= 2 + len(VERSION_FILES), "the index, the files of the version, its report for its config"
    fill(store)
    asked, later = len(cloud.answers()), standings(store_of(promoted).now(), trust)
    assert cloud.answers()[asked:] == with_two
    assert later == [replace(rows[0], versions=list(range(1, 1001)), previous=1000)]
    assert (rows[0].champion, rows[0].trouble, rows[0].doubt) == (2, "", "")
    assert len(present(store._objects.get(INDEX, 10**9))[1]) < 2_000_000


def fill(store: BucketStore) -> None:
    """A thousand versions; the second is served again: all of its objects, as only their names count."""
    with store.writing():
        second, history = store._index().below("digits/2"), read_history(store)
        more = {name.replace("/2/", f"/{number}/"): second[name] for number in range(3, 1001) for name in second}
        store._set(store._index().with_files(more))
        new = [replace(history[0], version=number, before=number - 1) for number in range(3, 1001)]
        last = [replace(history[0], event="rolled_back", version=version, before=1000) for version in (1, 2)]
        lines = "".join(json.dumps(vars(change)) + "\n" for change in [*history, *new, *last])
        store.replace("history.jsonl", lines.encode(), store.etag("history.jsonl"))


def test_kill_9_at_any_write_leaves_the_old_version_served(
    promoted: str, candidate: Path, evidence: Path, trust: Trust, trust_file: Path
) -> None:
    """Up to the last one, which brings the new version; what the dead left is removed once it is old."""
    paths = map(str, (promoted, candidate, evidence, trust_file))
    output, _ = run_python(PROMOTING, str(signal.SIGKILL.value), "1", str(WRITES), *paths).communicate(timeout=300)
    assert [line.split() for line in output.splitlines()] == [[str(step), "-9"] for step in range(1, WRITES + 1)]
    store = bucket_of(store_of(promoted))
    assert verify_release(store, "digits", trust).version == 1
    assert (version_numbers(store, "digits"), len(read_history(store))) == ([1], 1)
    left = {key for key, _ in store._objects.listing("content/")}
    assert len(left) > len(VERSION_FILES), "what they brought along lies there"
    assert promote(candidate, evidence, store, name="digits", trust=trust).version == 2
    later = BucketStore(store._objects, now=lambda: time.time() + 2 * ABANDONED_SECONDS)
    assert rollback(later, "digits", trust=trust).version == 1
    assert {key for key, _ in store._objects.listing("content/")} == {
        held.key for held in store._index().files.values() if held.key is not None
    }
    assert prune(store, "digits", keep=1) == []
    assert (standings(store, trust)[0].champion, standings(store, trust)[0].doubt) == (1, "")


def test_of_two_promotions_at_once_one_is_told(
    promoted: str, candidate: Path, evidence: Path, trust: Trust, trust_file: Path
) -> None:
    """Two processes; the one that was about to commit finds that the other has, and changes nothing."""
    paths = map(str, (promoted, candidate, evidence, trust_file))
    slow = run_python(PROMOTING, str(signal.SIGSTOP.value), str(WRITES), str(WRITES), *paths)
    children = Path("/proc", str(slow.pid), "task", str(slow.pid), "children")
    wait_until(lambda: children.read_text().split() and state_of(children.read_text().split()[0]) == "T", slow)
    assert promote(candidate, evidence, store_of(promoted), name="digits", trust=trust).version == 2
    os.kill(int(children.read_text()), signal.SIGCONT)
    output, _ = slow.communicate(timeout=120)
    assert output.splitlines()[0] == (f"Broken {promoted}/{INDEX}: another writer replaced it; nothing was changed")
    store = bucket_of(store_of(promoted))
    assert (served_version(store, "digits"), version_numbers(store, "digits")) == (2, [1, 2])
    assert [change.version for change in read_history(store)] == [1, 2]


def state_of(process: str) -> str:
    return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0]


# Of each kind: with what the servers find the credentials wrong, what then is said, and how nobody has any.
WRONG = {
    "s3": ("AWS_ACCESS_KEY_ID", "(InvalidAccessKeyId)", "no credentials in the environment"),
    "gs": ("GOOGLE_BEARER_TOKEN", "to change roles/storage.objectUser (AccessDenied)", "service account file"),
    "az": ("AZURE_STORAGE_ACCOUNT_KEY", "(AuthorizationFailure)", "no credentials in the environment"),
}
NOBODY = "http://127.0.0.1:9"


def test_a_store_that_cannot_be_asked_is_not_an_empty_one(
    cloud: Server,
    candidate: Path,
    evidence: Path,
    trust_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No such bucket, wrong credentials or none: one line and 2; nobody at the address: 5."""

    def refused(address: str, *said: str, first: int = 3, code: int = 2) -> None:
        where, copy = ["--repository", address], tmp_path / "copy"
        for arguments in [
            ["status", *where],
            ["sync", *where, "--into", str(copy), "--once"],
            ["promote", str(candidate), "--evidence", str(evidence), *where, "--name", "d", "--trust", str(trust_file)],
            ["history", *where],
            ["rollback", *where, "--name", "digits", "--trust", str(trust_file)],
            ["prune", *where, "--name", "digits"],
            ["retire", *where, "--name", "digits"],
            ["repair", *where, "--trust", str(trust_file)],
            ["verify", f"{address}/digits", "--trust", str(trust_file)],
            ["parity", f"{address}/digits/1"],
            ["serve", *where],
            ["sync", *where, "--into", str(copy)],
        ][:first]:
            assert code_of(*arguments) == code, arguments
            out, err = capsys.readouterr()
            assert (out, len(err.splitlines())) == ("", 1), (arguments, err)
            assert all(words in err for words in (address, *said)), (arguments, err)
            assert re.search(r"\dm?s\b|retries", err) is None, "the same line each time, which is said once"
            shutil.rmtree(copy, ignore_errors=True)

    def set_all(variables: Mapping[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    key, wrong, none = WRONG[cloud.scheme]
    set_all(cloud.variables)
    refused(f"{cloud.scheme}://no-such-bucket/models", "there is no such ", first=12)
    with ExitStack() as running:
        if cloud.scheme == "s3":  # after one request moto looks at keys, too
            cloud = running.enter_context(server("s3", tmp_path, INITIAL_NO_AUTH_ACTION_COUNT="1"))
        address = cloud.create("refusing")
        set_all({**cloud.variables, key: "d3Jvbmc="})
        refused(address, wrong)
    set_all(KINDS[cloud.scheme].variables(NOBODY))
    refused(address, "error sending request", first=12, code=5)
    monkeypatch.delenv(key)
    set_all({"GOOGLE_APPLICATION_CREDENTIALS": "none", "AZURE_MSI_ENDPOINT": NOBODY})
    refused(address, none)


@pytest.mark.parametrize("scheme", KINDS)
def test_a_server_of_something_else_holds_no_empty_repository(
    scheme: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It has no such page; a bucket does not answer so for a missing object."""
    pytest.importorskip("obstore")
    pages = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    Thread(target=pages.serve_forever, daemon=True).start()
    for name, value in KINDS[scheme].variables(f"http://127.0.0.1:{pages.server_port}").items():
        monkeypatch.setenv(name, value)
    arguments = ["sync", "--repository", f"{scheme}://releases/models", "--into", str(tmp_path / "copy"), "--once"]
    assert code_of(*arguments) == 2
    pages.shutdown()
    assert "Server returned non-2xx status code: 404 Not Found\n" in capsys.readouterr().err


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The extra is not needed for directories, nor boto3 without a profile."""
    for name in OF_PLATFORM:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_PROFILE", "mine")
    for missing, said in (
        ("boto3", "AWS_PROFILE is read by boto3, which is not installed"),
        ("obstore", "obstore is not installed; pip install 'dfmcl[cloud]'"),
    ):
        monkeypatch.setitem(sys.modules, missing, None)
        assert code_of("status", "--repository", "s3://b/models") == 2
        assert f"s3://b/models: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("cloud", ["s3"], indirect=True)
def test_a_profile_gives_credentials(promoted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Amazon's configuration, which boto3 reads."""
    (tmp_path / "config").write_text("[profile mine]\naws_access_key_id = testing\naws_secret_access_key = testing\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert bucket_of(store_of(promoted))._objects.get(INDEX, 10**9) is not None


def test_an_object_in_parts_is_the_same(bucket: str, tmp_path: Path) -> None:
    """Larger than two parts; and objects that are gone are removed as others are, whatever a cloud says of it."""
    objects, model = bucket_of(store_of(bucket))._objects, tmp_path / "model"
    model.write_bytes(os.urandom(2 * PART_BYTES + 1))
    objects.create("content/a/model", model)
    objects.fetch("content/a/model", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == model.read_bytes()
    objects.delete(["content/none", "content/a/model", "content/a/none"])
    assert list(objects.listing("content/")) == []


def test_no_key_of_a_url_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A shared access signature stands in each request's URL."""
    pytest.importorskip("obstore")
    for name, value in {**of_azure(NOBODY), "AZURE_STORAGE_SAS_TOKEN": "sv=2023&sig=c2VjcmV0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    assert code_of("status", "--repository", "az://releases/models") == 5
    err = capsys.readouterr().err
    assert "error sending request" in err
    assert "c2VjcmV0" not in err


@pytest.mark.parametrize("wrong", ["none", "{}"])
def test_what_is_no_repository_is_not_written_over(
    bucket: str, wrong: str, candidate: Path, evidence: Path, trust: Trust
) -> None:
    """Another program's object of that name stays."""
    store = bucket_of(store_of(bucket))
    store._objects.put(INDEX, wrong.encode(), None)
    with pytest.raises(BadInput, match=r"repository\.json: .*no `dfmcl` wrote this"):
        promote(candidate, evidence, store, name="digits", trust=trust)
    assert present(store._objects.get(INDEX, 100))[1] == wrong.encode()
