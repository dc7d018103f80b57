"""An OCI registry over HTTP: whatever is read from it has the digest and the size that were asked for.

Questions, credentials and tokens are oras's matter: `docker login`'s config.json, its helpers, ORAS_USER and ORAS_PASS.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from dfmcl.common.errors import BadInput, Broken, Refused, unwritable
from dfmcl.common.progress import Track
from dfmcl.common.reader import MEBIBYTE, Unfit
from dfmcl.release.oci.artifact import (
    DOCUMENT_BYTES,
    IMAGE_INDEX,
    IMAGE_MANIFEST,
    Descriptor,
    digest_of,
    index,
    read_index,
)
from dfmcl.release.oci.reference import Reference

CONNECT_SECONDS, ANSWER_SECONDS, ATTEMPTS = 5, 60, 3
PAGES = 100  # of a list of referrers
LOGIN = "credentials may not do this, or there are none: `docker login`, or ORAS_USER and ORAS_PASS"
PLAIN = "--plain-http allows it"


@dataclass(frozen=True)
class Blob:
    """The bytes of a blob, which may be asked for again: a file of this machine, or what is in memory."""

    content: Path | bytes
    size: int
    label: str
    track: Track

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[bytes]:
        if isinstance(self.content, bytes):
            yield self.content
            return
        with self.content.open("rb") as file:
            chunks = iter(partial(file.read, MEBIBYTE), b"")
            yield from self.track(chunks, f"{self.label} (MiB)", _mebibytes(self.size))


def open_registry(reference: Reference, *, plain_http: bool = False) -> Registry:
    """The registry of a reference. plain_http: without TLS; of this machine it always is.

    BadInput where oras is not installed, or where no credentials are there that the registry asks for; Broken where it
    does not answer.
    """
    try:
        from oras.logger import logger
        from oras.provider import Registry as Client
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry
    except ModuleNotFoundError as error:
        raise BadInput(f"{reference}: {error.name} is not installed; pip install 'dfmcl[oci]'") from None
    logger.set_level(logging.CRITICAL)  # errors are told once, here
    insecure = plain_http or reference.is_loopback
    again = Retry(
        ATTEMPTS - 1,
        backoff_factor=0.5,
        status_forcelist=(429, 502, 503, 504),
        allowed_methods=("GET", "HEAD"),
        raise_on_status=False,
        respect_retry_after_header=False,  # it may say a year
    )

    def client(backend: str) -> Any:
        made = Client(hostname=reference.host, insecure=insecure, auth_backend=backend)
        session = made.session
        session.request = partial(session.request, timeout=(CONNECT_SECONDS, ANSWER_SECONDS))
        session.headers["Accept-Encoding"] = "identity"  # a digest is over the bytes as they lie there
        session.adapters.clear()  # what is asked by HTTPS is not answered, or asked for a password, by HTTP
        session.mount("https://", HTTPAdapter(max_retries=again))
        if insecure:
            session.mount("http://" if plain_http else f"http://{reference.host}/", HTTPAdapter(max_retries=again))
        return made

    return Registry(reference, client, "http" if insecure else "https")


class Registry:
    """A repository in a registry. client: makes oras's, by the kind of credentials: "token" or "basic"."""

    def __init__(self, reference: Reference, client: Any, scheme: str) -> None:
        self._reference = reference
        self._root = f"{scheme}://{reference.host}/v2/"
        self._client = client("token")
        with self._asking(""), _as_questions(reference):
            asked = self._client.session.get(self._root)
            by_password = asked.headers.get("WWW-Authenticate", "").lower().startswith("basic")
            if by_password:
                self._client = client("basic")
            self._take_credentials()
            if by_password and not hasattr(self._client.auth, "_basic_auth"):
                raise BadInput(f"{reference}: {LOGIN}")

    def manifest(self, name: str) -> bytes:
        """A manifest's bytes. name: a tag, or the digest that they must have: Refused where they have another."""
        data = self._document(f"manifests/{name}", IMAGE_MANIFEST)
        if data is None:
            raise BadInput(f"{self._at(name)}: is not there")
        if name.startswith("sha256:") and (found := digest_of(data)) != name:
            raise Refused(f"{self._at(name)}: the registry serves other bytes, whose digest is {found}")
        return data

    def fetch(self, blob: Descriptor, path: Path, track: Track) -> None:
        """Write a blob to a new file; Refused where the registry serves other bytes, or more or less of them."""
        where, digest, size = self._at(blob.digest), hashlib.sha256(), 0
        with self._asking(blob.digest), self._ask("GET", f"blobs/{blob.digest}", stream=True) as answer:
            if answer.status_code == 404:
                raise BadInput(f"{where}: {path.name} is not there")
            self._require(answer, 200)
            with _written(path) as file:
                chunks = answer.iter_content(MEBIBYTE)
                for chunk in track(chunks, f"{path.name} (MiB)", _mebibytes(blob.size)):
                    size += len(chunk)
                    if size > blob.size:
                        raise Refused(f"{where}: {path.name} has more than its {blob.size:,} bytes")
                    digest.update(chunk)
                    with _writing(path):
                        file.write(chunk)
        if size != blob.size or f"sha256:{digest.hexdigest()}" != blob.digest:
            raise Refused(f"{where}: the registry serves other bytes for {path.name}")

    def upload(self, blob: Descriptor, source: Blob) -> None:
        """Bring a blob there, unless it is."""
        with self._asking(blob.digest):
            if self._ask("HEAD", f"blobs/{blob.digest}").status_code == 200:
                return
            begun = self._ask("POST", "blobs/uploads/")
            self._require(begun, 202)
            from oras.utils import append_url_params

            place = urljoin(begun.url, begun.headers.get("Location", ""))  # the registry's to say
            url = append_url_params(place, {"digest": blob.digest})
            headers = {"Content-Type": "application/octet-stream"}
            self._require(self._request("PUT", url, headers=headers, data=source), 201)

    def put(self, name: str, manifest: bytes) -> None:
        """Write a manifest under a tag or its digest."""
        self._put(name, manifest, IMAGE_MANIFEST)

    def referrers(self, digest: str, artifact_type: str) -> list[Descriptor]:
        """What of a type refers to a manifest: as the registry lists it, or where it has no lists, as its tag does."""
        found = []
        path: str | None = f"referrers/{digest}"
        for _ in range(PAGES):
            data, path = self._page(path or "")
            if data is None:
                data = self._document(f"manifests/{_tag_of(digest)}", IMAGE_INDEX)
            found += self._entries(digest, data)
            if path is None:
                break
        return [entry for entry in found if entry.artifact_type == artifact_type]

    def refer(self, subject: str, manifest: bytes, entry: Descriptor) -> None:
        """Write a manifest that refers to another one. entry: its own descriptor.

        Where the registry keeps no list of referrers, one is kept under a tag, as OCI 1.1 says; of two that are
        written at the same time there, one may be lost.
        """
        if self._put(entry.digest, manifest, IMAGE_MANIFEST):
            return
        listed = self._entries(subject, self._document(f"manifests/{_tag_of(subject)}", IMAGE_INDEX))
        if entry.digest not in [row.digest for row in listed]:
            self._put(_tag_of(subject), index([*listed, entry]), IMAGE_INDEX)

    def _put(self, name: str, document: bytes, media_type: str) -> bool:
        with self._asking(name):
            answer = self._ask("PUT", f"manifests/{name}", headers={"Content-Type": media_type}, data=document)
            self._require(answer, 201)
            return "OCI-Subject" in answer.headers

    def _entries(self, digest: str, data: bytes | None) -> list[Descriptor]:
        try:
            return [] if data is None else read_index(data)
        except Unfit as error:
            raise BadInput(f"{self._at(digest)}: its list of referrers {error}") from None

    def _page(self, path: str) -> tuple[bytes | None, str | None]:
        """A page of a list of referrers, None where there are no lists; and where the next one is."""
        with self._asking(path), self._ask("GET", path, stream=True, headers={"Accept": IMAGE_INDEX}) as answer:
            if answer.status_code != 200:  # registries from before OCI 1.1 say 404, others 400 or 405
                self._require(answer, 200, 400, 404, 405)
                return None, None
            following = answer.links.get("next", {}).get("url")
            return self._bounded(answer), following and f"referrers/{following.rpartition('/referrers/')[2]}"

    def _document(self, path: str, media_type: str) -> bytes | None:
        """The bytes of a manifest or an index; None where there is none."""
        with self._asking(path), self._ask("GET", path, stream=True, headers={"Accept": media_type}) as answer:
            if answer.status_code == 404:
                return None
            self._require(answer, 200)
            return self._bounded(answer)

    def _bounded(self, answer: Any) -> bytes:
        data = b""
        for chunk in answer.iter_content(MEBIBYTE):
            data += chunk
            if len(data) > DOCUMENT_BYTES:
                raise BadInput(f"{self._reference}: a manifest holds more than {DOCUMENT_BYTES:,} bytes")
        return data

    def _at(self, what: str) -> str:
        mark = "@" if what.startswith("sha256:") else ":"
        return f"oci://{self._reference.host}/{self._reference.name}{mark}{what}"

    def _take_credentials(self) -> None:
        from oras.container import Container

        user, password = os.environ.get("ORAS_USER"), os.environ.get("ORAS_PASS")
        if user and password:
            self._client.auth.set_basic_auth(user, password)
            return
        folder = os.environ.get("DOCKER_CONFIG")
        configs = [str(Path(folder) / "config.json")] if folder else None
        place = Container(self._reference.name, self._reference.host)
        place.registry = self._reference.host  # also one without a dot, such as localhost
        self._client.auth.load_configs(place, configs=configs)

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        return self._request(method, f"{self._root}{self._reference.name}/{path}", **options)

    def _request(self, method: str, url: str, **options: Any) -> Any:
        # Without its decorator, which waits two minutes for a registry that is not there.
        ask = partial(type(self._client).do_request.__wrapped__, self._client, url, method)
        with _as_questions(self._reference):
            answer = ask(**options)
            if answer.status_code == 401 and getattr(self._client.auth, "token", None):
                self._client.auth.token = None  # it was for reading; the registry asks for another one to write
                answer = ask(**options)
            return answer

    def _require(self, answer: Any, *statuses: int) -> None:
        """Raise what another status means."""
        if (status := answer.status_code) in statuses:
            return
        said = f"the registry says {status}: {_said(answer)}"
        if status in (401, 403):
            raise BadInput(f"{self._reference}: {said}; {LOGIN}")
        raise (Broken if status >= 500 else BadInput)(f"{self._reference}: {said}")

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """What requests may raise, as errors of ours."""
        from requests.exceptions import InvalidSchema, RequestException

        where = self._at(what) if what.startswith("sha256:") else str(self._reference)
        try:
            yield
        except InvalidSchema:
            raise BadInput(f"{where}: the registry leads to an address without TLS; {PLAIN}") from None
        except RequestException as error:
            raise Broken(f"{where}: {_why(error)}") from None


@contextmanager
def _as_questions(where: Reference) -> Iterator[None]:
    """BadInput where oras fails over credentials: its own files are malformed, or the registry's question is."""
    from requests.exceptions import RequestException

    try:
        yield
    except RequestException:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{where}: {LOGIN} ({' '.join(str(error).split())[:200]})") from None


def _tag_of(digest: str) -> str:
    """Under which OCI 1.1 has an index of referrers where the registry keeps none."""
    return digest.replace(":", "-")


def _mebibytes(size: int) -> int:
    return -(-size // MEBIBYTE)


@contextmanager
def _written(path: Path) -> Iterator[Any]:
    with _writing(path):
        file = path.open("xb")
    with file:
        yield file


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from None


def _said(answer: Any) -> str:
    """The registry's own words, where it has some."""
    try:
        body = next(answer.iter_content(4096), b"")
        return " ".join(str(json.loads(body)["errors"][0]["message"]).split())[:200]
    except (ValueError, KeyError, TypeError, IndexError, OSError):
        return str(answer.reason)


def _why(error: Exception) -> str:
    """The innermost reason: requests and urllib3 wrap it three times over."""
    reason = error
    while (inner := getattr(reason, "reason", None) or next(iter(reason.args), None)) and isinstance(inner, Exception):
        reason = inner
    return f"the registry does not answer: {' '.join(str(reason).split())[:200]}"
