"""A real S3 API on 127.0.0.1: moto's server in a process of its own, and its requests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CODE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]))
server.start()
print("on", server.get_host_and_port()[1], flush=True)
server._thread.join()
"""
VARIABLES = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "releases"


@dataclass
class S3Server:
    """A running server. log: a line for each request."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def variables(self) -> dict[str, str]:
        return VARIABLES | {"AWS_ENDPOINT_URL": self.url}

    def requests(self) -> list[str]:
        """What it was asked so far, such as GET /releases/models/repository.json."""
        lines = re.sub(r"\x1b\[[\d;]*m", "", self.log.read_text()).splitlines()
        return [f"{found[1]} {found[2]}" for line in lines if (found := re.search(r'"([A-Z]+) (\S+) HTTP/', line))]

    def client(self) -> Any:
        import boto3

        return boto3.client("s3")


@contextmanager
def s3_server(folder: Path, port: int = 0, actions: int | None = None) -> Iterator[S3Server]:
    """Skips where moto is not installed. actions: so many requests are answered before keys are looked at."""
    pytest.importorskip("moto.server", reason="needs moto[server], of the extra dev")
    log = folder / "s3.log"
    with log.open("a") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(port)],
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
            env=os.environ | ({} if actions is None else {"INITIAL_NO_AUTH_ACTION_COUNT": str(actions)}),
        )
    try:
        assert process.stdout is not None
        number = next((line[3:] for line in process.stdout if line.startswith("on ")), "")
        assert number, log.read_text()
        yield S3Server(process, int(number), log)
    finally:
        process.kill()
        process.wait()
