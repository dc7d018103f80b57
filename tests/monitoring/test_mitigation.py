"""What is done about a proven loss: over real HTTP, by a real program, once, and never in a round's way."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dfmcl.monitoring.mitigation import Mitigation, command, webhook
from tests.monitoring.clocks import wait_for

NONE: frozenset[str] = frozenset()


class Hook:
    """A server on loopback that keeps what is posted."""

    def __init__(self) -> None:
        self.status, self.posts = 204, list[tuple[str, str, bytes]]()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.posts.append((self.path, self.headers["Content-Type"], body))
                self.send_response(hook.status)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook/?room=1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hook() -> Iterator[Hook]:
    server = Hook()
    yield server
    server.close()


def done(mitigation: Mitigation, count: int) -> dict[tuple[str, str], int]:
    """Counts once so many actions are through."""
    wait_for(lambda: mitigation.counts.total() >= count)
    assert mitigation.counts.total() == count
    return dict(mitigation.counts)


def test_a_webhook_is_told_what_was_lost(hook: Hook) -> None:
    """One POST of JSON to exactly that URL: model, version and reasons."""
    lines: list[str] = []
    mitigation = Mitigation({"webhook": webhook(hook.url, 5)}, lines.append)
    mitigation.consider("digits", "3", frozenset({"threshold", "clean"}))
    assert done(mitigation, 1) == {("webhook", "ok"): 1}
    [(path, kind, body)] = hook.posts
    assert (path, kind) == ("/hook/?room=1", "application/json")
    assert json.loads(body) == {
        "event": "robustness_lost",
        "model": "digits",
        "version": "3",
        "reasons": ["clean", "threshold"],
    }
    assert lines == ["mitigation by webhook ok"]


def test_a_command_is_told_on_its_standard_input(tmp_path: Path) -> None:
    """A program with arguments as they are, no shell; it gets the same JSON."""
    out = tmp_path / "said; touch shell"
    copy = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"
    mitigation = Mitigation({"command": command([sys.executable, "-c", copy, str(out)], 30)}, lambda line: None)
    mitigation.consider("digits", "3", frozenset({"integrity"}))
    assert done(mitigation, 1) == {("command", "ok"): 1}
    assert json.loads(out.read_text())["reasons"] == ["integrity"]


def test_a_version_is_told_of_once(hook: Hook) -> None:
    """Not again while anything is lost, as a second rollback would undo the first; another version is new, and a loss
    after a recovery."""
    mitigation, expected = Mitigation({"webhook": webhook(hook.url, 5)}, lambda line: None), 0
    steps: list[tuple[str, frozenset[str], list[str] | None]] = [
        ("1", NONE, None),
        ("1", frozenset({"clean"}), ["clean"]),
        ("1", frozenset({"clean"}), None),
        ("1", frozenset({"clean", "integrity"}), None),
        ("2", frozenset({"clean"}), ["clean"]),
        ("1", frozenset({"integrity"}), None),
        ("1", NONE, None),
        ("1", frozenset({"clean", "integrity"}), ["clean", "integrity"]),
    ]
    for version, lost, told in steps:
        mitigation.consider("digits", version, lost)
        expected += told is not None
        done(mitigation, expected)
        if told is not None:
            said = json.loads(hook.posts[-1][2])
            assert (said["version"], said["reasons"]) == (version, told)
    assert len(hook.posts) == expected


def test_what_fails_is_counted_and_said(hook: Hook) -> None:
    """An answer that is no success, nobody there, a program that is missing, ends badly or takes too long: one line
    each, and the other action is done all the same."""
    hook.status = 500
    gone = Hook()
    gone.close()
    wait = [sys.executable, "-c", "import threading; threading.Event().wait(60)"]
    for act, said in {
        webhook(hook.url, 5): "HTTP Error 500",
        webhook(gone.url, 5): "Connection refused",
        command(["/no/such/program"], 5): "No such file",
        command([sys.executable, "-c", "raise SystemExit(3)"], 30): "ended with exit code 3",
        command(wait, 0.2): "took longer than 0.2 s",
    }.items():
        lines: list[str] = []
        told: list[str] = []
        mitigation = Mitigation({"webhook": act, "command": told.append}, lines.append)
        mitigation.consider("digits", "1", frozenset({"clean"}))
        assert done(mitigation, 2) == {("webhook", "failed"): 1, ("command", "ok"): 1}
        assert lines[0].startswith("mitigation by webhook failed: ")
        assert said in lines[0]
        assert "\n" not in lines[0]
        assert len(told) == 1


def test_rounds_do_not_wait_for_it() -> None:
    """An action that hangs holds up nobody."""
    release, begun = threading.Event(), threading.Event()

    def hang(text: str) -> None:
        begun.set()
        release.wait(30)

    mitigation = Mitigation({"webhook": hang}, lambda line: None)
    mitigation.consider("digits", "1", frozenset({"clean"}))
    assert begun.wait(30)
    assert mitigation.counts == {}
    release.set()
    done(mitigation, 1)


def test_without_actions_nothing_is_done() -> None:
    """The default: no thread, no count."""
    mitigation, before = Mitigation({}, lambda line: None), threading.active_count()
    mitigation.consider("digits", "1", frozenset({"clean"}))
    assert threading.active_count() == before
    assert mitigation.counts == {}
