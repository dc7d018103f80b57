"""Files that a running gateway reads again: keys, and certificates of both sides."""

from __future__ import annotations

import os
import shutil
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dfmcl.robustness.data import load_dataset
from dfmcl.serving.gateway.api_keys import digest_of
from dfmcl.serving.gateway.config import load_config
from dfmcl.serving.gateway.renewal import WatchedFiles
from tests.processes import wait_until
from tests.serving.authority import Authority
from tests.serving.doors import Door, encoded, settings
from tests.serving.test_gateway_process import mutual_triton, written
from tests.serving.workshop import Served

PNG = encoded(load_dataset("digits").x_test[0])
OLD, NEW = "dfmcl_old", "dfmcl_new"


def key(name: str, secret: str, rest: str = "") -> str:
    return f'[[keys]]\nname = "{name}"\nsha256 = "{digest_of(secret)}"\n{rest}\n'


@contextmanager
def opened(config: Path) -> Iterator[Door]:
    """A gateway that knows where its configuration came from."""
    door = Door(load_config(config), source=config).start()
    try:
        yield door.until_ready()
    finally:
        outcome = door.close()
    assert outcome == 0


def config_of(path: Path, served: Served, keys: str) -> Path:
    """Without the key that `written` adds."""
    text = written(path, served.ready["grpc"], "notice_seconds = 0").read_text()
    path.write_text(text.partition("[[keys]]")[0] + keys)
    return path


def status(door: Door, secret: str) -> int:
    return door.classify(PNG, key=secret).status


def test_revoked_key_stops_and_new_one_begins(served: Served, tmp_path: Path) -> None:
    """Within two seconds, without a restart; the key that stays does not get its bucket filled by that."""
    few = "images_per_second = 0.001\nburst_images = 2"
    config = config_of(tmp_path / "gateway.toml", served, key("old", OLD) + key("few", "dfmcl_few", few))
    with opened(config) as door:
        assert (status(door, OLD), status(door, NEW)) == (200, 401)
        assert [status(door, "dfmcl_few") for _ in range(3)] == [200, 200, 429]
        config_of(config, served, key("new", NEW) + key("few", "dfmcl_few", few))
        begun = time.monotonic()
        wait_until(lambda: (status(door, OLD), status(door, NEW)) == (401, 200), seconds=10)
        assert time.monotonic() - begun < 2
        assert status(door, "dfmcl_few") == 429
        assert door.lines("renewed") == [{"event": "renewed", "what": "keys"}]
        assert door.lines()[-2]["key"] == "new"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "triton: Field required"),
        ("[listen", "not TOML"),
        ("\x00\xff", "not TOML"),
        (None, "No such file"),
    ],
    ids=["empty", "half", "bytes", "gone"],
)
def test_broken_file_changes_nothing_and_says_so(served: Served, tmp_path: Path, text: str | None, why: str) -> None:
    """One line, with the file and what is wrong; the keys that were read still hold, and a whole file is read again."""
    config = config_of(tmp_path / "gateway.toml", served, key("old", OLD))
    with opened(config) as door:
        if text is None:
            config.unlink()
        else:
            config.write_text(text)
        wait_until(lambda: door.lines("not renewed"), seconds=10)
        (line,) = door.lines("not renewed")
        assert (line["what"], why in line["why"], str(config) in line["why"]) == ("keys", True, True)
        assert "what was read before still holds" in line["why"]
        assert status(door, OLD) == 200
        config_of(config, served, key("new", NEW))
        wait_until(lambda: status(door, NEW) == 200, seconds=10)
        assert status(door, OLD) == 401
        assert len(door.lines("not renewed")) == 1


def test_other_settings_need_a_restart_and_the_log_says_which(served: Served, tmp_path: Path) -> None:
    """Keys are taken all the same."""
    config = config_of(tmp_path / "gateway.toml", served, key("old", OLD))
    with opened(config) as door:
        config_of(config, served, "[limits]\nconcurrency = 3\n" + key("new", NEW))
        wait_until(lambda: door.lines("not renewed"), seconds=10)
        why = door.lines("not renewed")[0]["why"]
        assert "limits: read at the start only, so restart the gateway" in why
        assert (status(door, OLD), status(door, NEW)) == (401, 200)


def test_file_is_left_alone_while_it_is_written(tmp_path: Path) -> None:
    """A change counts once it has stood still for a tick; so does a replaced file of the same size and time."""
    file = tmp_path / "file"
    file.write_text("a")
    source = WatchedFiles("file", [file], lambda: True)
    assert not source.changed()
    for text in ("ab", "abc", "abcd"):
        file.write_text(text)
        assert not source.changed()
    assert [source.changed() for _ in range(3)] == [True, False, False]
    other = tmp_path / "other"
    other.write_text("dcba")
    stamp = file.stat().st_mtime_ns
    os.utime(other, ns=(stamp, stamp))
    other.replace(file)
    assert [source.changed() for _ in range(3)] == [False, True, False]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


def served_certificate(door: Door) -> str:
    """Of a new connection, by any signer."""
    return ssl.get_server_certificate(("127.0.0.1", door.port))


def test_renewed_certificate_is_shown_to_new_connections(served: Served, authority: Authority, tmp_path: Path) -> None:
    """A key that does not fit yet changes nothing; the pair does; and connections that are open go on."""
    own, other = authority.issue("gateway"), authority.issue("renewed")
    files = [shutil.copy(path, tmp_path) for path in (own.certificate, own.key)]
    listen = {"tls_certificate": files[0], "tls_key": files[1]}
    believing = ssl.create_default_context(cafile=authority.ca)
    door = Door(settings([served.ready["grpc"]], listen={k: str(v) for k, v in listen.items()}), believing).start()
    try:
        door.until_ready()
        kept = door.connection()
        assert door.ask("GET", "/healthz", connection=kept).status == 200
        assert served_certificate(door) == own.certificate.read_text()
        shutil.copy(other.certificate, files[0])
        wait_until(lambda: door.lines("not renewed"), seconds=10)
        assert "does not work" in door.lines("not renewed")[0]["why"]
        assert served_certificate(door) == own.certificate.read_text()
        shutil.copy(other.key, files[1])
        wait_until(lambda: served_certificate(door) == other.certificate.read_text(), seconds=10)
        assert door.get("/healthz").status == 200
        assert door.ask("GET", "/healthz", connection=kept).status == 200
        kept.close()
    finally:
        assert door.close() == 0


def test_renewed_authority_decides_about_clients(served: Served, authority: Authority, tmp_path: Path) -> None:
    """Whom the old one vouched for is no longer let in, with a session of before neither; who is turned away counts."""
    other = Authority(tmp_path / "other")
    own, client, stranger = authority.issue("gateway"), authority.issue("client"), other.issue("stranger")
    believed = shutil.copy(authority.ca, tmp_path / "believed.pem")
    listen = {"tls_certificate": str(own.certificate), "tls_key": str(own.key), "tls_client_ca": str(believed)}

    def context(shown: object) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=authority.ca)
        made.load_cert_chain(shown.certificate, shown.key)  # type: ignore[attr-defined]
        return made

    def let_in() -> bool:
        with suppress(OSError):
            return door.get("/healthz").status == 200
        return False

    allowed, turned_away = context(client), context(stranger)
    door = Door(settings([served.ready["grpc"]], listen=listen), allowed).start()
    try:
        door.until_ready()
        door.tls = turned_away
        assert not let_in()
        door.tls = allowed
        assert door.metric('gateway_errors_total{reason="handshake"}') == 1
        assert [line["status"] for line in door.lines() if line["reason"] == "handshake"] == [495]
        shutil.copy(other.ca, believed)
        door.tls = turned_away
        wait_until(let_in, seconds=10)
        door.tls = allowed
        assert not let_in()
        door.tls = turned_away
    finally:
        assert door.close() == 0


def test_renewed_certificate_is_shown_to_triton(
    served: Served, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that Triton does not believe is replaced by one that it does: the gateway gets ready."""
    right, wrong = authority.issue("right"), Authority(tmp_path / "no").issue("wrong")
    files = [str(shutil.copy(path, tmp_path)) for path in (wrong.certificate, wrong.key)]
    tls = {"tls": True, "tls_ca": str(authority.ca), "tls_certificate": files[0], "tls_key": files[1]}
    with mutual_triton(served, authority, tmp_path / "triton.log", monkeypatch) as url:
        door = Door(settings([url], triton=tls)).start()
        try:
            wait_until(lambda: door.lines("endpoint"), seconds=10)
            assert door.get("/readyz").status == 503
            for path, file in zip((right.certificate, right.key), files, strict=True):
                shutil.copy(path, file)
            door.until_ready()
        finally:
            assert door.close() == 0
