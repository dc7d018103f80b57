"""Buckets on 127.0.0.1, each kind by a server in a process of its own, and its requests.

moto speaks as S3, Azurite as Azure Blob Storage (`npm install azurite`, its node_modules/.bin in PATH); of Google's API
no emulator is to be had, so that tests/gcs.py speaks it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.gcs import TOKEN
from tests.processes import wait_until

MOTO = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
print("on", server.get_host_and_port()[1], flush=True)
server._thread.join()
"""
# What Azurite's documentation says its one account is called, and its key.
ACCOUNT = "devstoreaccount1"
MARK = re.compile(r"/[0-9a-f]{32}")
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass
class Server:
    """A running server of one kind. log: a line for each request, and the port."""

    scheme: str
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def variables(self) -> dict[str, str]:
        """With which a process finds it, and has credentials."""
        return KINDS[self.scheme].variables(f"http://127.0.0.1:{self.port}")

    def create(self, name: str) -> str:
        """The address of a repository to be, in a new bucket."""
        KINDS[self.scheme].create(f"http://127.0.0.1:{self.port}", name)
        return f"{self.scheme}://{name}/models"

    def answers(self) -> list[str]:
        """What it was asked so far and how it answered, such as GET /releases/models/repository.json 200."""
        mark = uuid.uuid4().hex  # servers write their logs when they come to it: so far is up to this question
        with (
            suppress(urllib.error.HTTPError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{mark}", timeout=60),
        ):
            pass
        wait_until(lambda: mark in self.log.read_text(), self.process)
        lines = re.sub(r"\x1b\[[\d;]*m", "", self.log.read_text()).splitlines()
        found = [re.search(r'"([A-Z]+) (\S+) HTTP/1.1" (\d+)', line) for line in lines]
        return [f"{line[1]} {unquote(line[2])} {line[3]}" for line in found if line and not MARK.fullmatch(line[2])]


@dataclass(frozen=True)
class Kind:
    """command: starts the server, once its program is installed; listens: finds its port; the rest takes its URL."""

    command: Callable[[], list[str]]
    listens: str
    variables: Callable[[str], dict[str, str]]
    create: Callable[[str, str], None]


def moto() -> list[str]:
    pytest.importorskip("moto.server", reason="needs moto[server], of the extra dev")
    return [sys.executable, "-c", MOTO]


def azurite() -> list[str]:
    if (program := shutil.which("azurite-blob")) is None:
        pytest.skip("needs azurite-blob in PATH, of npm's azurite")
    options = ("--blobPort", "0", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry")
    return [program, *options]


def of_amazon(url: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def of_google(url: str) -> dict[str, str]:
    return {"GOOGLE_BASE_URL": url, "GOOGLE_BEARER_TOKEN": TOKEN}


def of_azure(url: str) -> dict[str, str]:
    return {
        "AZURE_STORAGE_ENDPOINT": f"{url}/{ACCOUNT}",
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
    }


def ask(url: str, **headers: str) -> None:
    """Put nothing there."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=named), timeout=60):
        pass


def create_container(url: str, name: str) -> None:
    """Signed by Azure's shared key."""
    headers = f"x-ms-date:{(now := formatdate(usegmt=True))}\nx-ms-version:2023-11-03"
    said = "PUT" + 12 * "\n" + f"{headers}\n/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    signed = base64.b64encode(hmac.digest(base64.b64decode(KEY), said.encode(), hashlib.sha256)).decode()
    where = f"{url}/{ACCOUNT}/{name}?restype=container"
    ask(where, x_ms_date=now, x_ms_version="2023-11-03", Authorization=f"SharedKey {ACCOUNT}:{signed}")


KINDS = {
    "s3": Kind(moto, r"^on (\d+)$", of_amazon, lambda url, name: ask(f"{url}/{name}")),
    "gs": Kind(
        lambda: [sys.executable, "-m", "tests.gcs"],
        r"^on (\d+)$",
        of_google,
        lambda url, name: ask(f"{url}/{name}", Authorization=f"Bearer {TOKEN}"),
    ),
    "az": Kind(azurite, r"successfully listens on http://127.0.0.1:(\d+)", of_azure, create_container),
}
"""By the scheme of addresses."""


@contextmanager
def server(scheme: str, folder: Path, **environment: str) -> Iterator[Server]:
    """Skips where its program is not installed. environment: more variables of the server's."""
    pytest.importorskip("obstore", reason="needs obstore, of the extra cloud")
    kind, log = KINDS[scheme], folder / f"{scheme}.log"
    command = kind.command()

    def port() -> re.Match[str] | None:
        return re.search(kind.listens, log.read_text(), re.MULTILINE)

    with log.open("ab") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=sink, cwd=Path(__file__).parents[1], env={**os.environ, **environment}
        )
    try:
        wait_until(port, process)
        found = port()
        assert found is not None
        yield Server(scheme, process, int(found[1]), log)
    finally:
        process.kill()
        process.wait()
