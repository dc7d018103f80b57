"""Google's XML API of buckets on 127.0.0.1, as far as we know it: `python -m tests.gcs` says its port and then serves.

The emulators that registries have speak Google's JSON API, which obstore does not ask, or heed no generation. Of the
API here is as much as obstore asks: objects that are got, listed, removed, put on a condition, and put in parts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import ClassVar
from urllib.parse import parse_qsl, unquote

TOKEN = "testing"


@dataclass
class Bucket:
    """Objects by key, bytes and generation. parts: of uploads that have not ended; last: the generation given last."""

    held: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    last: int = 0

    def put(self, key: str, data: bytes) -> Answer:
        self.last += 1
        self.held[key] = data, self.last
        return Answer(200, f"<R><Location/><Bucket/><Key/><ETag>{etag(data)}</ETag></R>", self.described(key))

    def get(self, key: str, known: str | None) -> Answer:
        if key not in self.held:
            return refusal(404, "NoSuchKey")
        if known == etag(self.held[key][0]):
            return Answer(304)
        return Answer(200, self.held[key][0], self.described(key))

    def described(self, key: str) -> dict[str, str]:
        data, generation = self.held[key]
        return {"ETag": etag(data), "x-goog-generation": str(generation), "Last-Modified": formatdate(usegmt=True)}

    def delete(self, key: str) -> Answer:
        return Answer(204) if self.held.pop(key, None) else refusal(404, "NoSuchKey")

    def listing(self, prefix: str) -> Answer:
        """All on one page, as if written now."""
        items = (
            f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{etag(data)}</ETag><Size>{len(data)}</Size></Contents>"
            for key, (data, _) in sorted(self.held.items())
            if key.startswith(prefix)
        )
        return Answer(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(items)}</ListBucketResult>")


@dataclass
class Answer:
    status: int
    body: str | bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    """One caller. buckets: of all of them."""

    buckets: ClassVar[dict[str, Bucket]] = {}
    lock: ClassVar[Lock] = Lock()
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        path, _, query = self.path.partition("?")
        name, _, key = unquote(path).removeprefix("/").partition("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.lock:
            answer = self.done(name, key, dict(parse_qsl(query, keep_blank_values=True)), body)
        self.send_response(answer.status)
        data = answer.body if isinstance(answer.body, bytes) else answer.body.encode()
        headers = (
            answer.headers if answer.status in (204, 304) else {**answer.headers, "Content-Length": str(len(data))}
        )
        for word, value in headers.items():
            self.send_header(word, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = answer

    def done(self, name: str, key: str, asked: dict[str, str], body: bytes) -> Answer:
        """As one request has it: with the lock."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return refusal(403, "AccessDenied")
        if self.command == "PUT" and not key:
            self.buckets[name] = Bucket()
            return Answer(200)
        if (bucket := self.buckets.get(name)) is None:
            return refusal(404, "NoSuchBucket")
        if not key:
            return bucket.listing(asked.get("prefix", ""))
        if self.command == "GET":
            return bucket.get(key, self.headers.get("If-None-Match"))
        if self.command == "DELETE":
            return bucket.delete(key)
        if "uploads" in asked:
            bucket.parts[upload := str(len(bucket.parts))] = {}
            return Answer(200, f"<R><Bucket/><Key/><UploadId>{upload}</UploadId></R>")
        if self.command == "PUT" and "uploadId" in asked:
            bucket.parts[asked["uploadId"]][int(asked["partNumber"])] = body
            return Answer(200, headers={"ETag": etag(body)})
        if self.command == "POST":
            return bucket.put(key, b"".join(part for _, part in sorted(bucket.parts[asked["uploadId"]].items())))
        wanted = self.headers.get("x-goog-if-generation-match")
        if wanted is not None and int(wanted) != bucket.held.get(key, (b"", 0))[1]:
            return refusal(412, "PreconditionFailed")
        return bucket.put(key, body)


def refusal(status: int, code: str) -> Answer:
    return Answer(status, f"<Error><Code>{code}</Code><Message>{code} was answered.</Message></Error>")


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print("on", server.server_port, flush=True)
    server.serve_forever()
