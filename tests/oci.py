"""A real OCI registry on 127.0.0.1: Debian's docker-registry, its files, and a door before it that knows OCI 1.1."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from dfmcl.release.oci.artifact import IMAGE_INDEX, IMAGE_MANIFEST
from tests.processes import wait_until

USER, PASSWORD = "robin", "secret"
HTPASSWD = f"{USER}:$2b$04$G3.UA5miGfkbLUa9NZoybuINI8KZt/GssAEvnJ5Ir7OX/VW.6FEQa\n"  # bcrypt of that password
LISTENING = re.compile(r"listening on 127\.0\.0\.1:(\d+)")


@dataclass
class RegistryServer:
    """A running registry. folder: where it keeps its files."""

    process: subprocess.Popen[bytes]
    host: str
    folder: Path

    def blob(self, digest: str) -> Path:
        """The file of a blob or a manifest."""
        name = digest.removeprefix("sha256:")
        return self.folder / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"

    def tag(self, name: str, tag: str) -> Path:
        """The file that says which manifest a tag is."""
        return self.folder / "docker/registry/v2/repositories" / name / "_manifests/tags" / tag / "current/link"

    def send(self, name: str, blob: bytes) -> str:
        """Bring bytes there, as any client may; their digest."""
        digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
        _, headers, _ = asked(self.host, "POST", f"/v2/{name}/blobs/uploads/")
        place = urlsplit(headers["Location"])
        status, _, said = asked(self.host, "PUT", f"{place.path}?{place.query}&digest={digest}", blob)
        assert status == 201, said
        return digest

    def put(self, name: str, tag: str, document: object, media_type: str = IMAGE_MANIFEST) -> str:
        """Write a manifest of anybody's making; its digest."""
        data = json.dumps(document).encode()
        status, _, said = asked(self.host, "PUT", f"/v2/{name}/manifests/{tag}", data, {"Content-Type": media_type})
        assert status == 201, said
        return f"sha256:{hashlib.sha256(data).hexdigest()}"

    def get(self, name: str, tag: str, media_type: str = IMAGE_MANIFEST) -> Any:
        """A manifest."""
        status, _, data = asked(self.host, "GET", f"/v2/{name}/manifests/{tag}", headers={"Accept": media_type})
        assert status == 200, data
        return json.loads(data)


PASSWORDS = "auth: {{ htpasswd: {{ realm: ours, path: {folder}/htpasswd }} }}"
TOKENS = (
    "auth: {{ token: {{ realm: 'http://{issuer}/token', service: ours, issuer: ours,"
    " rootcertbundle: {folder}/issuer.pem }} }}"
)


@contextmanager
def registry_server(folder: Path, auth: str = "", issuer: str = "") -> Iterator[RegistryServer]:
    """Skips where there is none. auth: PASSWORDS or TOKENS, to let in nobody but USER; issuer: of tokens, its host."""
    if (program := shutil.which("docker-registry")) is None:
        pytest.skip("needs an OCI registry; apt-get install docker-registry")
    (folder / "htpasswd").write_text(HTPASSWD)
    settings = ["version: 0.1", "http: { addr: '127.0.0.1:0' }", auth.format(folder=folder, issuer=issuer)]
    settings.append(f"storage: {{ filesystem: {{ rootdirectory: {folder} }} }}")
    (folder / "config.yml").write_text("\n".join(settings))
    log = folder / "registry.log"
    with log.open("wb") as sink:
        process = subprocess.Popen([program, "serve", folder / "config.yml"], stdout=sink, stderr=sink)
    try:
        wait_until(lambda: LISTENING.search(log.read_text()), process)
        found = LISTENING.search(log.read_text())
        assert found is not None
        yield RegistryServer(process, f"127.0.0.1:{found[1]}", folder)
    finally:
        process.kill()
        process.wait()


def asked(
    host: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


@dataclass
class Door:
    """What stands before a registry. referrers: the lists that OCI 1.1 has and the registry has not, by subject.

    moved: where blobs are to be had instead; fails: whether all but the first question are answered by 500; asked: each
    request.
    """

    host: str = ""
    referrers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    moved: str = ""
    fails: bool = False
    asked: list[str] = field(default_factory=list)


@contextmanager
def door_before(server: RegistryServer) -> Iterator[Door]:
    """Passes all on to a registry, and keeps lists of referrers, one entry a page."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            door.asked.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            place = urlsplit(self.path)
            if door.fails and self.path != "/v2/":
                return self._answer(500, {}, b'{"errors": [{"message": "out of luck"}]}')
            if door.moved and self.command == "GET" and "/blobs/" in self.path:
                return self._answer(307, {"Location": f"{door.moved}{self.path}"}, b"")
            if "/referrers/" in place.path:
                listed = door.referrers.get(place.path.rpartition("/")[2], [])
                page = int(parse_qs(place.query).get("page", ["0"])[0])
                following = {"Link": f'<{place.path}?page={page + 1}>; rel="next"'} if page + 1 < len(listed) else {}
                index = {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": listed[page : page + 1]}
                return self._answer(200, following, json.dumps(index).encode())
            status, headers, data = asked(server.host, self.command, self.path, body, dict(self.headers))
            if self.command == "PUT" and "/manifests/" in self.path and (about := json.loads(body).get("subject")):
                headers["OCI-Subject"] = about["digest"]
                self._note(about["digest"], body)
            return self._answer(status, headers, data)

        do_GET = do_HEAD = do_POST = do_PUT = _pass_on

        def _note(self, subject: str, body: bytes) -> None:
            value, listed = json.loads(body), door.referrers.setdefault(subject, [])
            entry = {
                "mediaType": IMAGE_MANIFEST,
                "artifactType": value["artifactType"],
                "digest": f"sha256:{hashlib.sha256(body).hexdigest()}",
                "size": len(body),
                "annotations": value["annotations"],
            }
            if entry not in listed:
                listed.append(entry)

        def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", headers.get("Content-Length") or str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *_: object) -> None:
            """Says nothing."""

    door = Door()
    with listening_with(Handler) as door.host:
        yield door


@contextmanager
def issuer_of_tokens(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Its host, and each scope that it gave a token for; only USER gets one, and no more than was asked for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ours")]), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "issuer.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    scopes: list[str] = []

    def token(scope: str) -> str:
        _, repository, actions = scope.split(":")
        begin = int(now.timestamp()) - 60
        head = {
            "typ": "JWT",
            "alg": "ES256",
            "x5c": [base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()],
        }
        access = [{"type": "repository", "name": repository, "actions": actions.split(",")}]
        body = {
            "iss": "ours",
            "sub": USER,
            "aud": "ours",
            "nbf": begin,
            "iat": begin,
            "exp": begin + 3600,
            "jti": scope,
        }
        text = b".".join(_url64(json.dumps(part).encode()) for part in (head, body | {"access": access}))
        r, s = decode_dss_signature(key.sign(text, ec.ECDSA(hashes.SHA256())))
        return b".".join([text, _url64(r.to_bytes(32, "big") + s.to_bytes(32, "big"))]).decode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            if self.headers.get("Authorization") != f"Basic {known}":
                return self.send_error(401)
            [scope] = parse_qs(urlsplit(self.path).query)["scope"]
            scopes.append(scope)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"token": token(scope)}).encode())
            return None

        def log_message(self, format: str, *_: object) -> None:
            """Says nothing."""

    with listening_with(Handler) as host:
        yield host, scopes


def _url64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


@contextmanager
def listening_with(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The host of a server that answers so."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
