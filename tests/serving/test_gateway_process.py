"""The gateway as users run it: commands, configuration, certificates, and its end."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dfmcl.common.errors import BadInput
from dfmcl.robustness.data import load_dataset
from dfmcl.serving.gateway.api_keys import digest_of
from dfmcl.serving.gateway.config import GatewayConfig, load_config, new_key
from dfmcl.serving.ready import read_ready
from dfmcl.serving.triton import environment
from dfmcl.serving.triton import process as triton
from tests.processes import wait_until
from tests.serving.authority import Authority
from tests.serving.doors import KEY, Door, Relay, encoded, opened, settings
from tests.serving.workshop import ROOT, Served

PNG = encoded(load_dataset("digits").x_test[0])
COMMAND = Path(sys.executable).with_name("dfmcl")


def written(path: Path, endpoint: str, listen: str = "", rest: str = "") -> Path:
    """A configuration as a file."""
    path.write_text(
        f'[listen]\nport = 0\n{listen}\n[triton]\nendpoints = ["{endpoint}"]\nmodel = "digits"\ncheck_seconds = 0.3\n'
        f'[[keys]]\nname = "shop"\nsha256 = "{digest_of(KEY)}"\n{rest}\n'
    )
    return path


@contextmanager
def running(config: Path, directory: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """`dfmcl gateway` as a process, once it has said that it is ready."""
    ready = directory / "ready.json"
    process = subprocess.Popen(
        [COMMAND, "gateway", "--config", str(config), "--ready-file", str(ready)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(ready.exists, process, 30)
        yield process, ready
    finally:
        process.kill()
        process.communicate()


def door_of(ready: Path) -> Door:
    """A client of what a ready file names."""
    door = Door(settings(["127.0.0.1:1"]))
    door.port = urlsplit(json.loads(ready.read_text())["http"]).port
    return door


def test_sigterm_finishes_what_was_begun(served: Served, tmp_path: Path) -> None:
    """Not ready at once but answering; then the request under way is finished; then exit code 0 and no ready file."""
    with Relay(served.ready["grpc"]) as relay:
        config = written(tmp_path / "gateway.toml", relay.url, "notice_seconds = 1.5\ndrain_seconds = 10")
        with running(config, tmp_path) as (process, ready):
            door = door_of(ready)
            assert json.loads(ready.read_text())["models"] == {"digits": "1"}
            connection = door.connection()
            assert door.ask("POST", "/v1/classify", PNG, {"X-API-Key": KEY}, connection).status == 200
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: not ready.exists(), process, 5)
            time.sleep(0.4)  # well within the notice, and long enough to have stopped without one
            assert door.get("/readyz").status == 503
            noticed = door.classify(PNG, key=KEY)
            assert (noticed.status, noticed.headers["connection"]) == (200, "close")
            relay.freeze()
            late: list[int] = []
            headers = {"X-API-Key": KEY, "X-Request-Timeout-Ms": "8000"}
            asking = threading.Thread(
                target=lambda: late.append(door.ask("POST", "/v1/classify", PNG, headers, connection).status)
            )
            asking.start()
            wait_until(lambda: refused(door.port), process, 5)  # it takes no new ones, but has that one
            relay.thaw()
            asking.join(10)
            assert late == [200]
            output, errors = process.communicate(timeout=10)
            assert (process.returncode, errors) == (0, "")
            entries = [json.loads(line) for line in output.splitlines()]
            assert all(entry["time"].endswith("+00:00") for entry in entries)
            assert entries[0]["event"] == "listening"


def test_a_killed_gateway_is_not_taken_for_a_living_one(served: Served, tmp_path: Path) -> None:
    """A living one's ready file is not taken from it (2); a dead one's is not believed, and goes first."""
    config = written(tmp_path / "gateway.toml", served.ready["grpc"])
    with running(config, tmp_path) as (process, ready):
        command = [str(COMMAND), "gateway", "--config", str(config), "--ready-file", str(ready)]
        second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        assert (second.returncode, second.stdout) == (2, "")
        assert f"is that of a running server (process {process.pid})" in second.stderr
        said = read_ready(ready)
        assert said is not None
        assert said["pid"] == process.pid
    assert ready.exists()
    assert read_ready(ready) is None
    written(config, "127.0.0.1:1")  # nobody answers there
    third = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: not ready.exists(), third, 30)
    finally:
        third.terminate()
        assert third.wait(30) == 0


def refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_request_that_outlasts_the_drain_is_cut(served: Served, tmp_path: Path) -> None:
    """Nobody holds up an end for longer than drain_seconds; the exit code is 0 all the same."""
    with Relay(served.ready["grpc"]) as relay:
        config = written(tmp_path / "gateway.toml", relay.url, "notice_seconds = 0\ndrain_seconds = 0.3")
        with running(config, tmp_path) as (process, ready):
            door = door_of(ready)
            relay.freeze()
            asking = threading.Thread(target=lambda: door.classify(PNG, key=KEY, X_Request_Timeout_Ms="9000"))
            asking.start()
            wait_until(lambda: door.metric("gateway_in_flight") == 1, process, 5)
            begun = time.monotonic()
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=10)
            assert process.returncode == 0
            assert time.monotonic() - begun < 3
            asking.join(10)
            cut = [entry for entry in map(json.loads, output.splitlines()) if entry["event"] == "request"][-1]
            assert (cut["status"], cut["reason"]) == (503, "unavailable")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "triton: Field required"),
        ("[triton]\nendpoints = ['a:1']\nmodel = 'm'", "either list [[keys]] (`dfmcl apikey NAME` makes one)"),
        ("open = true\n[triton]\nendpoints = ['a']\nmodel = 'm'", "write host:port of Triton's gRPC endpoint"),
        ("open = true\n[triton]\nendpoints = ['a:1', 'a:1']\nmodel = 'm'", "names something twice"),
        ("open = true\n[triton]\nendpoint = ['a:1']\nmodel = 'm'", "triton.endpoints: Field required"),
        ("open = true\n[triton]\nendpoints = ['a:1']\nmodel = 'm'\ntls_ca = 'x'", "need tls = true"),
        ("open = true\n[listen]\ntls_key = 'k'\n[triton]\nendpoints = ['a:1']\nmodel = 'm'", "go together"),
        ("open = true\n[limits]\nlimit = 1\n[triton]\nendpoints = ['a:1']\nmodel = 'm'", "unknown key limits.limit"),
        (
            "open = true\n[limits]\ntimeout_ms = 99999\n[triton]\nendpoints = ['a:1']\nmodel = 'm'",
            "above max_timeout",
        ),
        ("[triton]\nendpoints = ['a:1']\nmodel = 'm'\n[[keys]]\nname = 'a'\nsha256 = 'dfmcl_secret'", "keys.0.sha256"),
        (
            "open = true\n[triton]\nendpoints = ['a:1']\nmodel = 'm'\ntls = true\ntls_ca = 's3://b/ca.pem'",
            "triton.tls_ca: s3: is no folder here",
        ),
        (
            "open = true\n[listen]\ntls_certificate = 'c'\ntls_key = 'gs:k'\n[triton]\nendpoints = ['a:1']\nmodel = ''",
            "listen.tls_key: gs: is no folder here",
        ),
        ("open = ", "not TOML"),
    ],
)
def test_wrong_configuration_is_one_line_and_2(tmp_path: Path, text: str, message: str) -> None:
    """File, key and what is wrong; a value is not repeated, as it may be a key that was pasted."""
    path = tmp_path / "gateway.toml"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert "dfmcl_secret" not in str(caught.value)


def test_port_in_use_is_5_and_wrong_certificates_are_2(tmp_path: Path) -> None:
    """From the command: one line, and the exit code that its docs promise."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config = written(tmp_path / "gateway.toml", "127.0.0.1:1")
        result = subprocess.run(
            [COMMAND, "gateway", "--config", config, "--port", str(port)], capture_output=True, text=True, check=False
        )
    assert (result.returncode, result.stdout) == (5, "")
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    for listen, towards in (
        ("tls_certificate = 'no.pem'\ntls_key = 'no.key'", ""),
        ("", "tls = true\ntls_ca = 'no.pem'"),
    ):
        config = written(tmp_path / "gateway.toml", "127.0.0.1:1", listen)
        config.write_text(config.read_text().replace("[triton]", f"[triton]\n{towards}"))
        result = subprocess.run([COMMAND, "gateway", "--config", config], capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout) == (2, "")
        assert f"{tmp_path / 'no.pem'}" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_apikey_makes_a_key_that_opens(served: Served, tmp_path: Path) -> None:
    """What the command prints: a key, and a table that lets it in and does not hold it."""
    made = subprocess.run([COMMAND, "apikey", "new-shop"], capture_output=True, text=True, check=True).stdout
    key, _, table = made.partition("\n\n")
    assert key not in table
    (entry,) = tomllib.loads(table)["keys"]
    assert (entry["name"], entry["logits"], entry["canary"]) == ("new-shop", False, False)
    config = load_config(written(tmp_path / "gateway.toml", served.ready["grpc"], "notice_seconds = 0", table))
    with opened(config) as door:
        assert door.classify(PNG, key=key).status == 200
        assert door.lines()[-1]["key"] == "new-shop"
    assert new_key("a")[0] != new_key("a")[0]
    refused_name = subprocess.run([COMMAND, "apikey", "a b"], capture_output=True, text=True, check=False)
    assert (refused_name.returncode, refused_name.stdout) == (2, "")


def test_shipped_configuration_writes_out_the_defaults() -> None:
    """deploy/gateway.toml names every key, with the value that it has anyway, but for what nobody can know."""
    table = tomllib.loads((ROOT / "deploy" / "gateway.toml").read_text())
    assert load_config(ROOT / "deploy" / "gateway.toml").open
    shown = {(section, key) for section, part in table.items() if isinstance(part, dict) for key in part}
    known = {
        (name, key)
        for name in ("listen", "triton", "limits", "release", "cors", "answers", "detection")
        for key in GatewayConfig.model_fields[name].annotation.model_fields  # type: ignore[union-attr]
    }
    assert shown == known
    least = {"open": True, "triton": {name: table["triton"][name] for name in ("endpoints", "model")}}
    assert GatewayConfig.model_validate(table) == GatewayConfig.model_validate(least)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Whom everyone in these tests believes."""
    return Authority(tmp_path_factory.mktemp("authority"))


def test_listening_with_tls(served: Served, authority: Authority) -> None:
    """HTTPS with a certificate that clients can check; plain HTTP is not spoken."""
    own = authority.issue("gateway")
    listen = {"tls_certificate": str(own.certificate), "tls_key": str(own.key)}
    believing = ssl.create_default_context(cafile=authority.ca)
    with opened(settings([served.ready["grpc"]], listen=listen), tls=believing) as door:
        assert door.url.startswith("https://")
        assert door.classify(PNG, key=KEY).status == 200
        door.tls = ssl.create_default_context()
        with pytest.raises(ssl.SSLCertVerificationError):
            door.get("/healthz")
        door.tls = None
        with pytest.raises(OSError):  # noqa: PT011 - reset or empty, as the race goes
            door.get("/healthz")
        door.tls = believing


def test_listening_with_mutual_tls(served: Served, authority: Authority, tmp_path: Path) -> None:
    """With tls_client_ca a client needs a certificate of that authority; another's will not do."""
    own, client, stranger = authority.issue("gateway"), authority.issue("client"), Authority(tmp_path).issue("client")
    listen = {"tls_certificate": str(own.certificate), "tls_key": str(own.key), "tls_client_ca": str(authority.ca)}
    believing = ssl.create_default_context(cafile=authority.ca)
    believing.load_cert_chain(client.certificate, client.key)
    with opened(settings([served.ready["grpc"]], listen=listen), tls=believing) as door:
        assert door.classify(PNG, key=KEY).status == 200
        for shown in (None, stranger):
            door.tls = ssl.create_default_context(cafile=authority.ca)
            if shown:
                door.tls.load_cert_chain(shown.certificate, shown.key)
            with pytest.raises(OSError):  # noqa: PT011 - an alert, or reset, as the race goes
                door.get("/healthz")
        door.tls = believing


@contextmanager
def mutual_triton(served: Served, authority: Authority, log: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Another Triton on the same repository, at this HOST:PORT, that talks to holders of a certificate only."""
    found, ports = environment.find_environment(None), triton.claim_ports(http=0, grpc=0, metrics=0)
    own = authority.issue("triton")
    secured = [
        "--grpc-use-ssl-mutual=true",
        f"--grpc-server-cert={own.certificate}",
        f"--grpc-server-key={own.key}",
        f"--grpc-root-cert={authority.ca}",
    ]
    plain = triton.server_command
    monkeypatch.setattr(triton, "server_command", lambda *args, **options: [*plain(*args, **options), *secured])
    with triton.running(found, served.repository, ports, ["digits"], log, fixed=False) as server:
        wait_until(lambda: not refused(ports["grpc"]), server.process, 60)
        yield f"127.0.0.1:{ports['grpc']}"


def test_triton_over_mutual_tls(
    served: Served, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real Triton that asks for certificates: with ours it answers, without it does not."""
    client = authority.issue("gateway-as-client")
    with mutual_triton(served, authority, tmp_path / "triton.log", monkeypatch) as url:
        tls = {"tls": True, "tls_ca": str(authority.ca)}
        shown = {"tls_certificate": str(client.certificate), "tls_key": str(client.key)}
        with opened(settings([url], triton=tls | shown)) as door:
            assert door.classify(PNG, key=KEY).status == 200
        for less in ({}, tls):
            with opened(settings([url], triton=less), ready=False) as door:
                wait_until(partial(door.lines, "endpoint"), seconds=10)
                assert not door.lines("endpoint")[0]["up"]
                assert door.get("/readyz").status == 503
