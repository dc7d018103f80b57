"""The objects of a bucket at Amazon, Google or Azure, and at servers that speak as one of these do, through obstore.

Credentials come from the platform: the environment, a pod's identity, the machine's metadata.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from dfmcl.common.errors import BadInput
from dfmcl.common.reader import MEBIBYTE, Unfit
from dfmcl.common.text import scheme_of
from dfmcl.release.stores.bucket import BucketStore
from dfmcl.release.stores.store import Changed, Etag, UnusableStore

CONNECT_SECONDS, ANSWER_SECONDS, RETRIES = 5, 20, 2  # a server that accepts and says nothing: about a minute
PART_BYTES, PARTS_AT_ONCE = 8 * MEBIBYTE, 4  # of an object that is larger than one part; S3 takes 10,000 of them
# A credential of boto3's is asked for again after so long; boto3 renews one ten minutes before its end.
CREDENTIAL_TIME = timedelta(minutes=5)
# One of these leads obstore to credentials of Amazon's.
OF_PLATFORM = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
)


@dataclass(frozen=True)
class Cloud:
    """A kind of bucket. store: obstore's class; form: of an address; needs: the rights of readers and writers."""

    store: str
    form: str
    needs: str


CLOUDS = {
    "s3": Cloud(
        "S3Store",
        "s3://BUCKET/PREFIX",
        "to read needs s3:ListBucket and GetObject, to change PutObject, DeleteObject too",
    ),
    "gs": Cloud(
        "GCSStore",
        "gs://BUCKET/PREFIX",
        "to read needs roles/storage.objectViewer, to change roles/storage.objectUser",
    ),
    "az": Cloud(
        "AzureStore",
        "az://CONTAINER/PREFIX",
        "to read needs the role Storage Blob Data Reader, to change Storage Blob Data Contributor",
    ),
}
"""By the scheme of addresses."""

ABSENT = {"NoSuchKey", "BlobNotFound"}
CHANGED = {
    "PreconditionFailed",
    "ConditionNotMet",
    "BlobAlreadyExists",
    "ConditionalRequestConflict",
    "OperationAborted",
    *ABSENT,  # no object is not the one that was seen
}
NO_CREDENTIALS = "no credentials in the environment, and none from this machine's metadata"
FORBIDDEN = {"AccessDenied", "AuthorizationPermissionMismatch", "Forbidden"}
FAILED = {"InternalError", "OperationTimedOut", "RequestTimeout", "ServerBusy", "ServiceUnavailable", "SlowDown"}
# What servers say, by error code, and what obstore says; the rest is told as it came.
REASONS = {
    "NoSuchBucket": "there is no such bucket",
    "ContainerNotFound": "there is no such container",
    "ExpiredToken": "the credentials have expired",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION",
    "NotImplemented": "its server knows no If-Match and If-None-Match; take one that does",
}
SAID = {
    "Account must be specified": "name the storage account in AZURE_STORAGE_ACCOUNT_NAME",
    "token request": NO_CREDENTIALS,
    "/api/token": NO_CREDENTIALS,  # Amazon's
    "without LOCATION": "the bucket is in another region; set AWS_REGION",
}

# Of a line of obstore's: durations, as a caller that asks again says what is new. It keeps signatures out by itself.
LEFT_OUT = re.compile(
    r"^Generic \w+ error: | in [\d.]+\S?s(?=\b)|, after \d+ retries, max_retries: \d+, retry_timeout: \d+s"
)


def open_bucket(address: str) -> BucketStore:
    """The store at an address of `CLOUDS`; BadInput for another form, or where obstore is not installed."""
    scheme = scheme_of(address)
    cloud = CLOUDS[scheme]
    found = re.fullmatch(rf"{scheme}://([^/]+)/?(.*?)/*", address)
    if found is None or any(part in ("", ".", "..") for part in found[2].split("/") if found[2]):
        raise BadInput(f"{address}: write {cloud.form}")
    try:
        from obstore import store as stores
        from obstore.exceptions import BaseError
    except ModuleNotFoundError:
        raise BadInput(f"{address}: obstore is not installed; pip install 'dfmcl[cloud]'") from None
    options: dict[str, Any] = _of_profile(address) if scheme == "s3" else {}
    try:
        store = getattr(stores, cloud.store)(
            found[1],
            client_options={
                "allow_http": True,  # where an endpoint is named so; the clouds' own are https
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "read_timeout": timedelta(seconds=ANSWER_SECONDS),
                "timeout": timedelta(days=1),  # of a whole object, however large
            },
            # Google takes one write a second of an object; two waits are longer than that together.
            retry_config={"max_retries": RETRIES, "backoff": {"init_backoff": timedelta(seconds=0.5)}},
            **options,
        )
    except (BaseError, ValueError) as error:
        raise BadInput(f"{address}: {_said(error)[1]}") from None
    return BucketStore(CloudObjects(store, cloud, address.rstrip("/"), found[2]))


def _of_profile(address: str) -> dict[str, Any]:
    """Credentials that only boto3 finds, a profile's, where it is installed and the platform gives none."""
    if any(name in os.environ for name in OF_PLATFORM):
        return {}
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ModuleNotFoundError:
        if "AWS_PROFILE" in os.environ:
            raise BadInput(f"{address}: AWS_PROFILE is read by boto3, which is not installed") from None
        return {}
    try:
        session = boto3.Session()
        provider = Boto3CredentialProvider(session, ttl=CREDENTIAL_TIME) if session.get_credentials() else None
    except (BotoCoreError, ValueError) as error:
        raise BadInput(f"{address}: {_one_line(str(error))}") from None
    if provider is None:
        raise BadInput(f"{address}: {NO_CREDENTIALS}")
    return {"credential_provider": provider}


class CloudObjects:
    """The objects of a bucket below a prefix. store: obstore's. An etag is the object's, and its generation."""

    def __init__(self, store: Any, cloud: Cloud, address: str, prefix: str) -> None:
        from obstore import exceptions

        self._store, self._cloud, self.address, self._errors = store, cloud, address, exceptions
        self._prefix = f"{prefix}/" if prefix else ""

    def get(self, key: str, most: int, known: Etag | None = None) -> tuple[Etag, bytes] | None:
        with self._asking(key):
            try:
                condition = {"if_none_match": known[0]} if isinstance(known, tuple) else None
                found = self._store.get(self._prefix + key, options=condition)
            except self._errors.NotModifiedError:
                return None
            if found.meta["size"] > most:
                raise Unfit(f"holds {found.meta['size']:,} bytes, and at most {most:,} are read")
            return _etag(found.meta), bytes(found.bytes())

    def fetch(self, key: str, path: Path) -> None:
        with self._asking(key):
            parts = self._store.get(self._prefix + key).stream(PART_BYTES)
            with path.open("xb") as file:
                for part in parts:
                    file.write(part)

    def put(self, key: str, body: bytes, seen: Etag | None) -> Etag:
        as_seen: Any = "create"
        if seen is not None:
            assert isinstance(seen, tuple), seen
            as_seen = {name: value for name, value in zip(("e_tag", "version"), seen, strict=True) if value}
        with self._asking(key, writing=True):
            return _etag(self._store.put(self._prefix + key, body, mode=as_seen))

    def create(self, key: str, body: bytes | Path) -> None:
        with self._asking(key):
            self._store.put(self._prefix + key, body, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)

    def delete(self, keys: Iterable[str]) -> None:
        if not (left := [self._prefix + key for key in keys]):
            return
        with self._asking():
            try:
                self._store.delete(left)
            except FileNotFoundError:  # Google and Azure tell of one that is gone, and Google leaves others then
                for key in left:
                    with suppress(FileNotFoundError):
                        self._store.delete(key)

    def listing(self, prefix: str) -> Iterator[tuple[str, float]]:
        with self._asking():
            for page in self._store.list(self._prefix + prefix or None):
                for item in page:
                    yield item["path"].removeprefix(self._prefix), item["last_modified"].timestamp()

    @contextmanager
    def _asking(self, key: str = "", *, writing: bool = False) -> Iterator[None]:
        """What a request may raise, as the seam has it."""
        where = f"{self.address}/{key}" if key else self.address
        try:
            yield
        except (self._errors.BaseError, FileNotFoundError) as error:
            code, said = _said(error)
            if writing and code in CHANGED:
                raise Changed(where) from None
            if code in ABSENT:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where) from None
            if code in FORBIDDEN:
                said = f"credentials may not do this: {self._cloud.needs} ({code})"
            raise UnusableStore(self.address, said, silent=self._is_silent(error, code)) from None

    def _is_silent(self, error: Exception, code: str) -> bool:
        """Whether this is about the network or the server's own state, not about the address or who asks."""
        told = code or any(part in str(error) for part in SAID)
        return code in FAILED if told else isinstance(error, self._errors.GenericError)


def _etag(found: Any) -> Etag:
    """Of what obstore says of an object; Google's condition is the generation alone."""
    return found["e_tag"], found["version"]


def _said(error: Exception) -> tuple[str, str]:
    """The code that a server gave, empty where it gave none, and a line for the user.

    obstore quotes the server's whole answer, and after it the error once more in Rust's words.
    """
    text = str(error).partition("\n\nDebug source")[0]
    code, message = (re.search(rf"<{tag}>([^<\n]+)", text) for tag in ("Code", "Message"))
    if code is not None:
        return code[1], f"{REASONS.get(code[1], message[1] if message else 'its server said no more')} ({code[1]})"
    known = next((f"{reason}: " for part, reason in SAID.items() if part in text), "")
    return "", known + LEFT_OUT.sub("", _one_line(text).partition(": <")[0])


def _one_line(text: str) -> str:
    return " ".join(text.split())
