"""The small HTTP server that tells Prometheus and humans about the rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from dfmcl.common.errors import Broken

Page = Callable[[], tuple[str, str, str]]
"""Status line, content type and text of a path, at the moment it is asked for."""


def application(registry: CollectorRegistry, pages: Mapping[str, Page]) -> Callable[..., Any]:
    """The WSGI application: /metrics, and a page for each path. Only GET and HEAD."""
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start_response)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status, kind, text = "405 Method Not Allowed", "text/plain", "use GET\n"
        elif path in pages:
            status, kind, text = pages[path]()
        else:
            status, kind, text = "404 Not Found", "text/plain", f"try {', '.join(['/metrics', *pages])}\n"
        body = text.encode()
        headers = [("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body)))]
        start_response(status, [*headers, ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return answer


@contextmanager
def served(app: Callable[..., Any], host: str, port: int) -> Iterator[str]:
    """Serve HTTP in threads for as long as the block runs; yields the URL. Broken where the port cannot be had."""
    try:
        server = make_server(host, port, app, server_class=_QuietServer, handler_class=_QuietHandler)
    except OSError as error:
        raise Broken(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another listen.port, or 0 for any"
        ) from None
    thread = Thread(target=server.serve_forever, name="http", daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _QuietServer(ThreadingWSGIServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle, or never asks, is no news."""


class _QuietHandler(WSGIRequestHandler):
    timeout = 10  # seconds that a client may take to send its request; each holds a thread

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""
