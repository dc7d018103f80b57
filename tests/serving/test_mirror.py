"""A directory for a Triton of one's own, which follows a repository elsewhere: whole, judged, and never emptied."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dfmcl.common.errors import BadInput
from dfmcl.gating.signing.attestation import NotAttested, Trust
from dfmcl.release.layout import VERSION_FILES, served_version, version_numbers
from dfmcl.release.promotion import promote, retire, rollback
from dfmcl.release.stores.bucket import INDEX, BucketStore
from dfmcl.release.stores.directory import Directory
from dfmcl.release.verification import verify_release
from dfmcl.serving.triton.mirror import Mirror, mirror
from tests.processes import wait_until
from tests.release.bucket import Objects
from tests.signing import make_key, trusting


@pytest.fixture
def objects(candidate: Path, evidence: Path, trust: Trust) -> Objects:
    found = Objects()
    promote(candidate, evidence, BucketStore(found), name="digits", trust=trust, threads=1)
    return found


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def whole(*versions: int) -> set[str]:
    """The files of a copy that holds these versions of one model."""
    of_versions = {f"digits/{version}/{file}" for version in versions for file in VERSION_FILES}
    return of_versions | {"digits/config.pbtxt", "digits/configs/gpu.pbtxt"}


def test_a_copy_is_what_is_served_and_what_was_before(
    objects: Objects, candidate: Path, evidence: Path, trust: Trust, tmp_path: Path
) -> None:
    """A Triton that looks at any moment finds the version that the config names; a retired model goes."""
    said: list[str] = []
    copy, target = mirror(BucketStore(objects), tmp_path / "new" / "models", said.append), tmp_path / "new" / "models"
    for version, held in ((1, (1,)), (2, (1, 2)), (3, (2, 3))):
        if version > 1:
            promote(candidate, evidence, BucketStore(objects), name="digits", trust=trust)
        assert copy.once(trust) == {}
        assert files(target) == whole(*held)
        assert verify_release(Directory(target), "digits", trust).version == version
    rollback(BucketStore(objects), "digits", trust=trust, version=1)
    assert copy.once(trust) == {}
    assert (files(target), served_version(Directory(target), "digits")) == (whole(1, 3), 1)
    asked = objects.requests
    assert copy.once(trust) == {}
    assert objects.requests == asked + 1, "one request while nothing changes"
    again = Mirror(BucketStore(objects), Directory(target), said.append)
    assert again.once(trust) == {}
    assert [line.partition(": ")[2].partition(" (")[0] for line in said] == [f"version {n}" for n in (1, 2, 3, 1)]
    retire(BucketStore(objects), "digits")
    assert copy.once(trust) == {}
    assert list(target.glob("[!.]*")) == []


def test_what_is_not_trusted_is_not_copied(
    objects: Objects, candidate: Path, evidence: Path, trust: Trust, tmp_path: Path
) -> None:
    """The copy stays as it was, and is asked for no more until something changes; nor is a file that others put there
    taken for ours."""
    copy, stranger = mirror(BucketStore(objects), tmp_path, lambda line: None), trusting(make_key(tmp_path / "keys"))
    shutil.rmtree(tmp_path / "keys")
    assert isinstance(copy.once(stranger)["digits"], NotAttested)
    assert files(tmp_path) == set()
    asked = objects.requests
    assert isinstance(copy.once(stranger)["digits"], NotAttested)
    assert objects.requests == asked + 1
    assert copy.once(trust) == {}
    (tmp_path / "digits" / "libtriton.so").write_bytes(b"")
    promote(candidate, evidence, BucketStore(objects), name="digits", trust=trust)
    assert "promotion did not write this" in str(copy.once(trust)["digits"])
    assert version_numbers(Directory(tmp_path), "digits") == [1]
    shutil.rmtree(tmp_path / "digits")
    (tmp_path / "digits").mkdir()
    assert "this command did not write it" in str(copy.once(trust)["digits"])
    (tmp_path / "digits").rmdir()
    assert copy.once(trust) == {}
    (tmp_path / "digits" / "2" / "model.onnx").write_bytes(b"damaged")
    assert Mirror(BucketStore(objects), Directory(tmp_path), lambda line: None).once(trust) == {}
    assert verify_release(Directory(tmp_path), "digits", trust).version == 2


@contextmanager
def following(copy: Mirror, trust: Trust) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=copy.follow, args=(lambda: trust, 0.02, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def test_a_bucket_that_is_away_empties_nothing(
    objects: Objects, candidate: Path, evidence: Path, trust: Trust, tmp_path: Path
) -> None:
    """It is said once, and once that it is back; a model that vanished without a word stays."""
    said: list[str] = []
    copy, served = mirror(BucketStore(objects), tmp_path, said.append), Directory(tmp_path)
    with following(copy, trust):
        wait_until(lambda: said)
        objects.away, asked = True, objects.requests
        wait_until(lambda: objects.requests > asked + 3)
        objects.away = False
        wait_until(lambda: len(said) == 3)
        assert said[1:] == [
            f"memory://bucket: cannot be read: the network is down; what lies in {tmp_path} stays",
            "memory://bucket: can be read again",
        ]
        kept = objects.held[INDEX]
        objects.held[INDEX] = b'{"format": "dfmcl.repository/1", "files": {}}'
        wait_until(lambda: len(said) == 4)
        assert "is gone, and the history does not say that it was retired" in said[3]
        objects.held[INDEX] = kept
        wait_until(lambda: len(said) == 5)
        promote(candidate, evidence, BucketStore(objects), name="digits", trust=trust)
        wait_until(lambda: served_version(served, "digits") == 2)
    objects.away, fresh = True, mirror(BucketStore(objects), tmp_path / "fresh", said.append)
    for ask in (copy.once, lambda trust: fresh.follow(lambda: trust, 1, threading.Event())):
        with pytest.raises(BadInput, match="the network is down"):
            ask(trust)
    anew = mirror(BucketStore(objects), tmp_path, said.append)
    with following(anew, trust):  # a sidecar that begins while the bucket is away, beside a Triton that serves
        wait_until(lambda: said[-1].startswith("memory://bucket: cannot be read: the network is down"))
    assert served_version(served, "digits") == 2


@pytest.mark.parametrize("make", [lambda path: path.write_text(""), lambda path: (path / "digits").mkdir(parents=True)])
def test_a_place_that_cannot_be_written_is_told(
    make: Callable[[Path], object], objects: Objects, tmp_path: Path
) -> None:
    """As is a repository without a model."""
    make(tmp_path / "copy")
    if (tmp_path / "copy").is_file():
        with pytest.raises(BadInput, match="copy: cannot be written"):
            mirror(BucketStore(objects), tmp_path / "copy", print)
        return
    with pytest.raises(BadInput, match="holds no promoted model"):
        mirror(Directory(tmp_path / "copy"), tmp_path / "new", print).once(None)
