"""S3, and what speaks as it does (AWS_ENDPOINT_URL), as the objects of a bucket; credentials are boto3's matter."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dfmcl.common.errors import BadInput
from dfmcl.common.reader import Unfit
from dfmcl.release.stores.bucket import BucketStore
from dfmcl.release.stores.store import Changed, Etag, UnusableStore

CONNECT_SECONDS, ANSWER_SECONDS, ATTEMPTS = 5, 60, 3
TOGETHER = 1000  # objects that one request removes
FORBIDDEN = (
    "credentials may not do this: to read needs s3:ListBucket and GetObject, to change PutObject, DeleteObject too"
)
# By error code, or status where a proxy answers; others are told as they came.
REASONS = {
    "NoSuchBucket": "there is no such bucket",
    "AccessDenied": FORBIDDEN,
    "403": FORBIDDEN,
    "ExpiredToken": "the credentials have expired",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION",
    "NotImplemented": "its server knows no If-Match and If-None-Match; take one that does",
}
CHANGED = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
ABSENT = {"NoSuchKey", "404"}


def open_bucket(address: str) -> BucketStore:
    """The store at s3://BUCKET/PREFIX; BadInput for another form, or where boto3 is not installed."""
    found = re.fullmatch(r"s3://([^/]+)/?(.*?)/*", address)
    if found is None or any(part in ("", ".", "..") for part in found[2].split("/") if found[2]):
        raise BadInput(f"{address}: write s3://BUCKET/PREFIX")
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ModuleNotFoundError as error:
        raise BadInput(f"{address}: {error.name} is not installed; pip install 'dfmcl[s3]'") from None
    settings = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=ANSWER_SECONDS,
        retries={"mode": "standard", "max_attempts": ATTEMPTS},
        request_checksum_calculation="when_required",  # other servers than Amazon's refuse the newer ones
        response_checksum_validation="when_required",
    )
    try:
        client = boto3.Session().client("s3", config=settings)
    except (BotoCoreError, ValueError) as error:
        raise BadInput(f"{address}: {_one_line(error)}") from None
    return BucketStore(S3(client, found[1], found[2]))


class S3:
    """The objects of a bucket below a prefix. client: boto3's."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self._client, self._bucket, self._prefix = client, bucket, f"{prefix}/" if prefix else ""
        self.address = f"s3://{bucket}/{prefix}".rstrip("/")

    def get(self, key: str, most: int, known: Etag | None = None) -> tuple[Etag, bytes] | None:
        condition = {} if known is None else {"IfNoneMatch": known}
        with self._asking(key):
            try:
                answer = self._client.get_object(**self._place(key), **condition)
            except self._client.exceptions.ClientError as error:
                if _code(error) == "304":
                    return None
                raise
            with answer["Body"] as body:
                data = body.read(most + 1)
        if len(data) > most:
            raise Unfit(f"holds {answer['ContentLength']:,} bytes or more, and at most {most:,} are read")
        return answer["ETag"], data

    def fetch(self, key: str, path: Path) -> None:
        with self._asking(key):
            answer = self._client.get_object(**self._place(key))
            with answer["Body"] as body, path.open("xb") as file:
                shutil.copyfileobj(body, file)

    def put(self, key: str, body: bytes, seen: Etag | None) -> Etag:
        condition = {"IfNoneMatch": "*"} if seen is None else {"IfMatch": seen}
        with self._asking(key, writing=True):
            return str(self._client.put_object(**self._place(key), **condition, Body=body)["ETag"])

    def create(self, key: str, body: bytes | Path) -> None:
        with ExitStack() as opened, self._asking(key):
            content = body if isinstance(body, bytes) else opened.enter_context(body.open("rb"))
            self._client.put_object(**self._place(key), Body=content)

    def delete(self, keys: Iterable[str]) -> None:
        left = [{"Key": self._prefix + key} for key in keys]
        with self._asking():
            for start in range(0, len(left), TOGETHER):
                some = {"Objects": left[start : start + TOGETHER], "Quiet": True}
                self._client.delete_objects(Bucket=self._bucket, Delete=some)

    def listing(self, prefix: str) -> Iterator[tuple[str, float]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        with self._asking():
            for page in pages:
                for item in page.get("Contents", ()):
                    yield item["Key"].removeprefix(self._prefix), item["LastModified"].timestamp()

    def _place(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    @contextmanager
    def _asking(self, key: str = "", *, writing: bool = False) -> Iterator[None]:
        """What a request may raise, as the seam has it."""
        from botocore.exceptions import BotoCoreError, ClientError

        where = f"{self.address}/{key}" if key else self.address
        try:
            yield
        except ClientError as error:
            code = _code(error)
            if writing and code in CHANGED | ABSENT:  # no object is not the one that was seen
                raise Changed(where) from None
            if code in ABSENT:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where) from None
            said = error.response.get("Error", {}).get("Message", "its server said no more")
            raise UnusableStore(self.address, f"{REASONS.get(code, said)} ({code})") from None
        except BotoCoreError as error:  # without an answer: no network, no credentials
            raise UnusableStore(self.address, _one_line(error)) from None


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "no code"))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
