"""The pod that follows a bucket: its containers' commands, run as they stand, by a real S3 API and a real Triton."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dfmcl.common.errors import Rejected
from dfmcl.gating.signing.attestation import Trust
from dfmcl.release.promotion import promote, rollback
from dfmcl.release.stores.registry import store_of
from dfmcl.serving.clients.triton import Client
from dfmcl.serving.triton.environment import find_environment
from tests.deploying import BUCKET, pods, rendered
from tests.processes import wait_until
from tests.signing import make_key, write_trust
from tests.test_deploy_commands import triton


def commands(places: dict[str, str]) -> dict[str, list[str]]:
    """Of the init containers, with their paths and the address where these are here."""
    (pod,) = [pod for pod in pods(rendered(BUCKET)) if pod.where == "Deployment triton"]
    dfmcl = str(Path(sys.executable).with_name("dfmcl"))
    return {
        container["name"]: [dfmcl, *(places.get(word, word) for word in container["command"][1:])]
        for container in pod.spec["initContainers"]
    }


def test_a_promotion_in_the_bucket_reaches_a_plain_triton(
    needs_triton: None,
    new_bucket: Callable[[str], str],
    candidate: Path,
    evidence: Path,
    trust: Trust,
    trust_file: Path,
    tmp_path: Path,
) -> None:
    """Copied before it starts; then a promotion and a rollback are served without a restart."""
    bucket = new_bucket("s3")
    promote(candidate, evidence, store_of(bucket), name="digits", trust=trust, threads=1)
    models = tmp_path / "models"
    places = {"s3://releases/models": bucket, "/models": str(models), "/etc/dfmcl/trust.toml": str(trust_file)}
    words = commands(places)
    subprocess.run(words["sync"], check=True, capture_output=True)
    follower = subprocess.Popen(words["follow"], stdout=subprocess.DEVNULL)
    try:
        with (
            triton(find_environment(None), models, tmp_path / "triton.log", BUCKET) as ports,
            Client(f"127.0.0.1:{ports['grpc']}", "digits", timeout_seconds=30) as client,
        ):
            assert client.describe().version == "1"
            promote(candidate, evidence, store_of(bucket), name="digits", trust=trust)
            wait_until(lambda: version_of(client) == "2", follower)
            rollback(store_of(bucket), "digits", trust=trust)
            wait_until(lambda: version_of(client) == "1", follower)
    finally:
        follower.terminate()
        assert follower.wait(30) == 0


def version_of(client: Client) -> str:
    """Which version answers; "" where the one that was found goes before it is asked."""
    with suppress(Rejected):
        return client.describe().version
    return ""


def test_no_server_starts_where_others_signed(
    new_bucket: Callable[[str], str], candidate: Path, evidence: Path, trust: Trust, tmp_path: Path
) -> None:
    """The init container ends with 1, and leaves nothing that a Triton would serve."""
    bucket = new_bucket("s3")
    promote(candidate, evidence, store_of(bucket), name="digits", trust=trust, threads=1)
    foreign = write_trust(make_key(tmp_path / "keys"))
    places = {
        "s3://releases/models": bucket,
        "/models": str(tmp_path / "models"),
        "/etc/dfmcl/trust.toml": str(foreign),
    }
    made = subprocess.run(commands(places)["sync"], capture_output=True, text=True, check=False)
    assert (made.returncode, list((tmp_path / "models").glob("[!.]*"))) == (1, []), made.stderr
    assert "sign" in made.stderr
