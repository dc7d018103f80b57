"""Before the door: reverse proxies and other origins are heard only where the configuration names them."""

from __future__ import annotations

import http.client
import ipaddress
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dfmcl.robustness.data import load_dataset
from dfmcl.serving.gateway.doorstep import client_of, doorstep
from tests.serving.doors import Door, encoded, opened, settings
from tests.serving.workshop import Served

PNG = encoded(load_dataset("digits").x_test[0])
SHOP = "https://shop.example"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key, content-type"}


@pytest.fixture(scope="module")
def closed(served: Served) -> Iterator[Door]:
    with opened(settings([served.ready["grpc"]])) as door:
        yield door


@pytest.fixture(scope="module")
def wide(served: Served) -> Iterator[Door]:
    """Below a path, behind a proxy on this machine, asked by pages of one shop."""
    listen = {"root_path": "/vision/v7", "proxies": ["127.0.0.0/8", "10.0.0.0/8"]}
    with opened(settings([served.ready["grpc"]], listen=listen, cors={"origins": [SHOP]})) as door:
        yield door


def test_nothing_is_there_unless_it_is_asked_for(closed: Door) -> None:
    """The very application answers; no header opens it to pages, and no header changes an address."""
    application: Any = object()
    assert doorstep(closed.config, application) is application
    answer = closed.classify(PNG, Origin=SHOP, X_Forwarded_For="203.0.113.7")
    assert answer.status == 200
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    assert closed.lines()[-1]["client"] == "127.0.0.1"
    assert closed.ask("OPTIONS", "/v1/classify", headers={"Origin": SHOP, **PREFLIGHT}).status == 405
    assert closed.get("/vision/v7/healthz").status == 404


def test_pages_of_the_named_origin_may_ask(wide: Door) -> None:
    """Preflight and answer say so to that origin, with the headers that a client needs; to no other."""
    allowed = wide.ask("OPTIONS", "/v1/classify", headers={"Origin": SHOP, **PREFLIGHT})
    assert allowed.status == 200
    assert allowed.headers["access-control-allow-origin"] == SHOP
    assert "x-api-key" in allowed.headers["access-control-allow-headers"].lower()
    assert wide.classify(PNG, Origin=SHOP).headers["access-control-allow-origin"] == SHOP
    assert "Retry-After" in wide.classify(PNG, key=None, Origin=SHOP).headers["access-control-expose-headers"]
    other = wide.ask("OPTIONS", "/v1/classify", headers={"Origin": "https://evil.example", **PREFLIGHT})
    assert other.status == 400
    assert "access-control-allow-origin" not in wide.classify(PNG, Origin="https://evil.example").headers
    assert "access-control-allow-credentials" not in allowed.headers


def test_paths_hold_with_and_without_the_proxys_part(wide: Door) -> None:
    """A proxy may take its part off or not; pages and the document name it in both cases."""
    for root in ("", "/vision/v7"):
        assert wide.get(f"{root}/healthz").status == 200
        assert b'const ROOT = "/vision/v7"' in wide.get(f"{root}/").body
        assert wide.get(f"{root}/openapi.json").json["servers"] == [{"url": "/vision/v7"}]
        assert b"href=\"/vision/v7/openapi.json\"" in wide.get(f"{root}/docs").body  # fmt: skip
    assert wide.get("/vision/v70/healthz").status == 404
    assert wide.get("/vision/v7").status == 200


def test_a_named_proxy_is_believed_about_the_client(wide: Door) -> None:
    """Its own entry counts, not what the client wrote before it."""
    wide.classify(PNG, X_Forwarded_For="198.51.100.1, 203.0.113.7, 10.1.2.3")
    assert wide.lines()[-1]["client"] == "203.0.113.7"
    connection = http.client.HTTPConnection("127.0.0.1", wide.port)
    connection.putrequest("GET", "/v1/model")
    for line in ("198.51.100.1", "203.0.113.9"):
        connection.putheader("X-Forwarded-For", line)
    connection.endheaders()
    assert json.loads(connection.getresponse().read())["error"]["reason"] == "unauthorized"
    assert wide.lines()[-1]["client"] == "203.0.113.9"


PROXIES = [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")]
ADDRESSES = st.one_of(st.ip_addresses().map(str), st.sampled_from(["10.0.0.1", "10.9.9.9", "fd00::1"]))


@pytest.mark.parametrize(
    ("peer", "said", "client"),
    [
        ("203.0.113.1", ["198.51.100.1"], "203.0.113.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["1.1.1.1, 198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        ("10.0.0.1", ["1.1.1.1", "198.51.100.1", "10.0.0.2"], "198.51.100.1"),
        ("::ffff:10.0.0.1", ["[2001:db8::1]"], "2001:db8::1"),
        ("fd00::1", ["2001:db8::2"], "2001:db8::2"),
        ("10.0.0.1", ['"><script>'], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("unix", ["1.1.1.1"], "unix"),
    ],
)
def test_client_is_the_last_that_no_proxy_is(peer: str, said: list[str], client: str) -> None:
    """Read from its end; garbage ends it."""
    assert client_of(peer, said, PROXIES) == client


@given(st.lists(st.one_of(ADDRESSES, st.text(max_size=8)), max_size=4), ADDRESSES)
def test_no_stranger_chooses_his_address(invented: list[str], own: str) -> None:
    """Whatever a client writes, its proxy adds the true address, which is found unless it is a proxy's itself."""
    true = str(ipaddress.ip_address(own))
    found = client_of("10.0.0.1", [", ".join([*invented, own])], PROXIES)
    if not any(ipaddress.ip_address(true) in network for network in PROXIES):
        assert found == true
    assert ipaddress.ip_address(found)


@pytest.mark.parametrize(
    "sections",
    [
        {"listen": {"root_path": "vision"}},
        {"listen": {"root_path": "/vision/"}},
        {"listen": {"root_path": '/"><script>'}},
        {"listen": {"proxies": ["10.0.0.1/8"]}},
        {"listen": {"proxies": ["proxy.example"]}},
        {"cors": {"origins": ["https://shop.example/"]}},
        {"cors": {"origins": ["shop.example"]}},
    ],
)
def test_what_is_no_path_network_or_origin_is_refused(sections: dict[str, Any]) -> None:
    """At the start."""
    with pytest.raises(ValidationError):
        settings(["127.0.0.1:1"], **sections)
