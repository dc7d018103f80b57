"""Before the gateway's questions: a reverse proxy's path, its word about the client, and browsers of other origins.

Each is a layer that is there only where the configuration asks for it, so that others pay nothing for it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from dfmcl.serving.gateway.config import GatewayConfig

ASKED = (
    *("Authorization", "Content-Type", "Inference-Header-Content-Length", "X-API-Key", "X-Request-Id"),
    *("X-Request-Timeout-Ms", "traceparent", "tracestate"),
)
TOLD = ("X-Request-Id", "Retry-After", "Inference-Header-Content-Length")

Networks = Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]


def doorstep(config: GatewayConfig, application: ASGIApp) -> ASGIApp:
    """The application behind the layers that are configured; itself where none is."""
    listen, cors = config.listen, config.cors
    if listen.root_path:
        application = _below(listen.root_path, application)
    if cors.origins:
        application = CORSMiddleware(
            application,
            allow_origins=cors.origins,
            allow_methods=("GET", "POST"),
            allow_headers=ASKED,
            expose_headers=TOLD,
            max_age=cors.max_age_seconds,
        )
    if listen.proxies:
        application = _behind([ipaddress.ip_network(text) for text in listen.proxies], application)
    return application


def client_of(peer: str, forwarded: Sequence[str], proxies: Networks) -> str:
    """The address that a request comes from. peer: of the connection; forwarded: X-Forwarded-For, line by line.

    Read from its end, each proxy that is named has put the address before it there; the first other one is the client,
    and whatever stands before that is anybody's invention. What is no address ends it, too.
    """
    client = peer
    for text in reversed([part.strip() for line in forwarded for part in line.split(",")]):
        if not _named(client, proxies):
            break
        try:
            client = str(ipaddress.ip_address(text.strip("[]")))
        except ValueError:
            break
    return client


def _named(address: str, proxies: Networks) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # a Unix socket's peer has no address
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return any((mapped or found) in network for network in proxies)


def _behind(proxies: Networks, application: ASGIApp) -> ASGIApp:
    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("client") and (said := Headers(scope=scope).getlist("x-forwarded-for")):
            peer, port = scope["client"]
            client = client_of(peer, said, proxies)
            scope["client"] = (client, port if client == peer else 0)
        await application(scope, receive, send)

    return call


def _below(root: str, application: ASGIApp) -> ASGIApp:
    """Paths below `root` are what follows it; others are as they are, as a proxy may have taken it off."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        path: Any = scope["path"]
        if path == root or path.startswith(f"{root}/"):
            scope["path"] = path[len(root) :] or "/"
        await application(scope, receive, send)

    return call
