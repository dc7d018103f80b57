"""Files from others are read at once, or refused at once, in words that say why."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dfmcl.common.errors import BadInput
from dfmcl.common.files import read_json
from dfmcl.common.reader import DEPTH, MANIFEST_BYTES, Unfit, opened, parse_json, parse_object, read_plain
from dfmcl.common.toml import read_toml

MOST = 1000


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def link_out(path: Path) -> None:
    (path.parent.parent / "elsewhere.json").write_text("{}")
    path.symlink_to(path.parent.parent / "elsewhere.json")


def grown(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(200 * 2**20)  # sparse: no disk is written


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a FIFO": (lambda path: os.mkfifo(path), "is no plain file"),
    "a socket": (as_socket, "is no plain file"),
    "a directory": (lambda path: path.mkdir(), "Is a directory"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is no plain file, but a link that leaves its directory"),
    "a link out": (link_out, "is no plain file, but a link that leaves its directory"),
    "200 MB": (grown, "holds 209,715,200 bytes or more, and at most 1,000 are read"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_plain_small_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    """Nothing hangs and nothing is read: a second is a hundred times the need."""
    make, message = FILES[kind]
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "report.json"
    make(path)
    begun = time.process_time()
    with pytest.raises(Unfit) as caught:
        read_plain(path, MOST)
    with pytest.raises(BadInput, match=str(path)):
        read_json(path, MOST)
    assert time.process_time() - begun < 1
    assert str(caught.value) == message


def test_a_device_is_refused_though_it_was_named() -> None:
    """/dev/zero has no end, by whatever name; and /proc says 0 of its sizes."""
    with pytest.raises(Unfit, match="is no plain file"):
        read_plain(Path("/dev/zero"), MOST, named=True)
    with pytest.raises(Unfit, match="at most 10 are read"):
        read_plain(Path("/proc/self/status"), 10)


def test_links_may_stay_or_be_named(tmp_path: Path) -> None:
    """A mounted secret is a link inside its directory; a user's own path may lead anywhere."""
    (tmp_path / "in" / "..data").mkdir(parents=True)
    (tmp_path / "in" / "..data" / "key").write_text("here")
    (tmp_path / "in" / "key").symlink_to("..data/key")
    (tmp_path / "named").symlink_to(tmp_path / "in" / "key")
    assert read_plain(tmp_path / "in" / "key", MOST) == read_plain(tmp_path / "named", MOST, named=True) == b"here"
    with pytest.raises(FileNotFoundError), opened(tmp_path / "none"):
        pass


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    """A manifest may name anything; the system call raises ValueError for a null character."""
    for name in ("a\0b", "\0"):
        with pytest.raises(Unfit, match="is no file name: it holds a null character"):
            opened(tmp_path / name)


TEXTS: dict[str, tuple[bytes, str]] = {
    "cut": (b'{"a": 1', "not readable as JSON"),
    "a key twice": (b'{"verdict": "failed", "verdict": "passed"}', "'verdict' stands twice in one object"),
    "a key twice, deep": (b'{"a": [{"b": 1, "b": 1}]}', "'b' stands twice in one object"),
    "NaN": (b'{"a": NaN}', "NaN is no number in JSON"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is no number in JSON"),
    "beyond float64": (b'{"a": 1e999}', "1e999 is beyond float64"),
    "digits without end": (b'{"a": ' + b"9" * 5000 + b"}", "not readable as JSON"),
    "half a character": (b'{"a": "\\ud800"}', "not readable as JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not readable as JSON"),
    "a mark before it": (b'\xef\xbb\xbf{"a": 1}', "not readable as JSON"),
    "no text": (b"\xff", "not readable as JSON"),
    "deep": (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), f"is nested deeper than {DEPTH}"),
    "very deep": (b"[" * 10**6, f"is nested deeper than {DEPTH}"),
    "very deep objects": (b'{"a":' * 10**6, f"is nested deeper than {DEPTH}"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_what_can_be_read_in_two_ways_is_refused(kind: str) -> None:
    """Each in one short line, never another error."""
    data, message = TEXTS[kind]
    with pytest.raises(Unfit) as caught:
        parse_json(data)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_ordinary_json_is_what_it_was() -> None:
    """Values come back as json has them, to the depth that is allowed."""
    value = {"a": [1, 2.5, None, True, "é\U0001f600"], "b": {"a": {}}, "c": []}
    assert parse_object(json.dumps(value).encode()) == parse_object(json.dumps(value, ensure_ascii=False).encode())
    assert parse_object(json.dumps(value).encode()) == value
    assert parse_json(b"[" * DEPTH + b"]" * DEPTH)
    with pytest.raises(Unfit, match="expected a JSON object, found list"):
        parse_object(b"[]")


def test_a_manifest_of_many_classes_fits() -> None:
    """A limit refuses what nobody needs, not ImageNet's 21,841 classes."""
    assert len(json.dumps([f"a name of some length that a class may have, number {n}" for n in range(100_000)])) < (
        MANIFEST_BYTES
    )


def test_configurations_are_read_as_carefully(tmp_path: Path) -> None:
    """TOML: a FIFO, a deep table and bytes that are no text are bad input in one line."""
    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 10_000)
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    for name, message in (("fifo", "is no plain file; advice"), ("deep", "not TOML"), ("bytes", "not text; advice")):
        with pytest.raises(BadInput) as caught:
            read_toml(tmp_path / f"{name}.toml", "advice")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
