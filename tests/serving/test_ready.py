"""The ready file: a dead server's is not believed, a living one's is not taken."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dfmcl.common.errors import BadInput
from dfmcl.serving.ready import claim_ready, read_ready, write_ready
from tests.processes import wait_until
from tests.serving.workshop import run_python

OTHER = "import sys; from pathlib import Path; from dfmcl.serving.ready import write_ready\n" \
    "write_ready(Path(sys.argv[1]), http='x'); sys.stdin.read()"  # fmt: skip


def test_a_ready_file_is_believed_while_its_process_lives(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """And not taken from it until then; afterwards it is removed, with what was being written."""
    path = tmp_path / "ready.json"
    process = run_python(OTHER, str(path))
    request.addfinalizer(process.kill)
    wait_until(path.exists, process)
    said = read_ready(path)
    assert said is not None
    assert (said["http"], said["pid"]) == ("x", process.pid)
    with pytest.raises(BadInput, match=f"running server .process {process.pid}.; name another"):
        claim_ready(path)
    process.kill()
    process.wait()
    (tmp_path / f".ready.json.{process.pid}.part").write_text("half")
    assert path.exists()
    assert read_ready(path) is None
    claim_ready(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"pid": 1}', '{"pid": "x", "started": 1}', '{"pid": -1, "started": 1}'],
)
def test_what_is_no_ready_file_is_not_believed(tmp_path: Path, text: str) -> None:
    """Half a file, or one that names no process."""
    (tmp_path / "ready.json").write_text(text)
    assert read_ready(tmp_path / "ready.json") is None
    assert read_ready(tmp_path / "none.json") is None


def test_a_process_number_that_was_given_again_is_another(tmp_path: Path) -> None:
    """The same pid, started at another time."""
    path = tmp_path / "ready.json"
    write_ready(path)
    said = read_ready(path)
    assert said is not None
    assert said["pid"] == os.getpid()
    path.write_text(json.dumps(said | {"started": said["started"] - 1}))
    assert read_ready(path) is None


@pytest.mark.parametrize("wrong", ["", "file/ready.json"])
def test_a_ready_file_that_cannot_be_written_is_bad_input(tmp_path: Path, wrong: str) -> None:
    """A directory stands in its place, or it would lie below a file: said before the server starts."""
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="cannot be written"):
        claim_ready(tmp_path / wrong)


def test_of_two_that_claimed_a_ready_file_one_writes_it(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Both were started before either was ready: the second learns it then, and the file is the first one's."""
    path = tmp_path / "ready.json"
    claim_ready(path)
    process = run_python(OTHER, str(path))
    request.addfinalizer(process.kill)
    wait_until(path.exists, process)
    with pytest.raises(BadInput, match=f"running server .process {process.pid}.; name another"):
        write_ready(path, http="mine")
    said = read_ready(path)
    assert said is not None
    assert said["pid"] == process.pid
    assert [found.name for found in tmp_path.iterdir()] == ["ready.json"]


def test_what_is_no_file_stays(tmp_path: Path) -> None:
    """A ready file in place of /dev/null would break the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="pipe: is no regular file, and would be replaced by one"):
        claim_ready(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
