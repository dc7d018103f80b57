"""Tells a URL of the operator's something as JSON."""

from __future__ import annotations

import http.client
import json
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

ATTEMPTS = 2


def post(url: str, entry: dict[str, Any], seconds: float) -> bool:
    """POST an entry, twice if need be; whether a 2xx came back. seconds: for each step of an attempt.

    url: http:// or https://, checked against the system's authorities. Redirections are not followed: they fail.
    """
    return any(_attempt(url, json.dumps(entry).encode(), seconds) for _ in range(ATTEMPTS))


def _attempt(url: str, body: bytes, seconds: float) -> bool:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        with closing(kind(parts.hostname or "", parts.port, timeout=seconds)) as connection:
            connection.request("POST", target, body, {"Content-Type": "application/json"})
            return 200 <= connection.getresponse().status < 300
    except (OSError, http.client.HTTPException):
        return False
