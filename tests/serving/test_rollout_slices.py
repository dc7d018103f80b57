"""Batches that pass in slices while one name stands for servers of two versions, as in a rollout."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from dfmcl.robustness.data import load_dataset
from dfmcl.serving.gateway.endpoints import Endpoint, Reply
from dfmcl.serving.triton import environment
from dfmcl.serving.triton import process as triton
from tests.processes import wait_until
from tests.serving.test_gateway_process import refused
from tests.serving.workshop import Served, onnx_logits

IMAGES = load_dataset("digits").x_test[:64]


def other_version(models: Path, out: Path) -> Path:
    """The same repository, with the model as version 2, whose logits are larger by 10."""
    shutil.copytree(models, out, ignore=shutil.ignore_patterns("*.lock"))
    (out / "digits" / "1").rename(out / "digits" / "2")
    config = out / "digits" / "config.pbtxt"
    config.write_text(re.sub(r"versions: \[ 1 \]", "versions: [ 2 ]", config.read_text()).replace('"1/', '"2/'))
    path = out / "digits" / "2" / "model.onnx"
    model = onnx.load(path)
    (bias,) = [entry for entry in model.graph.initializer if list(entry.dims) == [10]]
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 10, bias.name))
    onnx.save(model, path)
    return out


def test_all_of_a_batch_comes_from_one_version(served: Served, tmp_path: Path) -> None:
    """Two real Tritons behind one target that gRPC asks by turns: every answer is whole, and of its own version."""
    models = other_version(served.repository, tmp_path / "models")
    expected = {
        version: onnx_logits(root / "digits" / version / "model.onnx", IMAGES)
        for version, root in (("1", served.repository), ("2", models))
    }
    found, ports = environment.find_environment(None), triton.claim_ports(http=0, grpc=0, metrics=0)

    async def run(target: str) -> list[Reply]:
        endpoint = Endpoint(target, "digits", None)
        deadline = time.monotonic() + 30
        while len({(await endpoint.infer(IMAGES[:1], seconds=10)).version for _ in range(4)}) < 2:
            assert time.monotonic() < deadline  # both are connected
        endpoint.turns.forget()  # small slices, as in company
        for flow in ("a", "b"):
            await endpoint.infer(IMAGES[:1], seconds=10, flow=flow)
        replies = [await endpoint.infer(IMAGES, seconds=20, flow="ab"[turn % 2]) for turn in range(20)]
        await endpoint.close()
        return replies

    with triton.running(found, models, ports, ["digits"], tmp_path / "triton.log", fixed=False) as server:
        wait_until(lambda: not refused(ports["grpc"]), server.process, 60)
        replies = asyncio.run(run(f"ipv4:{served.ready['grpc']},127.0.0.1:{ports['grpc']}"))
    for reply in replies:
        np.testing.assert_allclose(reply.logits, expected[reply.version], atol=1e-3)
    assert {reply.version for reply in replies} == {"1", "2"}
