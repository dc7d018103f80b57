"""What Triton and the gateway cost beside bare ONNX Runtime: `make bench-serving`.

One ONNX file (a full-width ResNet-18 of random weights on 32 x 32 images; its answers do not matter here), one
run, all ways of asking in turn. Triton runs as `dfmcl serve` runs it, on the config.pbtxt that promotion writes. Bare
is ONNX Runtime in this process with its default threads.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import io
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import tritonclient.grpc.aio as triton_aio
from PIL import Image
from rich.progress import track
from safetensors.torch import save_file
from tritonclient import grpc
from tritonclient.utils import shared_memory

from benchmarks.result import write_result
from dfmcl.common.files import sha256_of
from dfmcl.release.candidate import INPUT, OUTPUT
from dfmcl.release.export import export
from dfmcl.release.promotion import promote
from dfmcl.release.stores.directory import Directory
from dfmcl.robustness.data import Dataset, load_dataset
from dfmcl.robustness.models import Classifier, ModelSpec
from dfmcl.robustness.provider import CPU
from dfmcl.serving.clients.triton import Client
from dfmcl.serving.gateway import service as gateway
from dfmcl.serving.gateway.api_keys import digest_of
from dfmcl.serving.gateway.config import GatewayConfig
from dfmcl.serving.gateway.v2 import HEADER_LENGTH
from dfmcl.serving.triton.environment import find_environment
from dfmcl.serving.triton.process import HOST, KEY, Server, claim_ports, running
from tests.signing import make_key, report_on, trusting, write_report

NAME = "resnet18"
DOOR_KEY = "dfmcl_of-the-benchmark"
CLIENTS = 16
Images = npt.NDArray[np.uint8]
Seconds = list[float]
Question = tuple[str, bytes, dict[str, str]]  # path, body, headers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of all cases in turn")
    parser.add_argument("--seconds", type=float, default=4, help="that a case is asked in a round")
    parser.add_argument("--width", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = candidate(Path(folder), arguments.width)
        server = stack.enter_context(served(Path(folder)))
        door = stack.enter_context(before(server.ports["grpc"]))
        session = CPU.session(model)
        rng = np.random.default_rng(0)
        pictures = rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
        cases = stack.enter_context(all_cases(session, server, door, pictures))
        found: dict[str, list[tuple[int, Seconds, float]]] = {case: [] for case in cases}
        for number in track(range(1 + arguments.rounds), "rounds, the first to warm up"):
            for case, ask in cases.items():
                measured = ask(arguments.seconds if number else 1)
                if number:
                    found[case].append(measured)
    rows = [described(case, rounds) for case, rounds in found.items()]
    conditions = {
        "n": f"{arguments.rounds} rounds of {arguments.seconds:g} s a case, all cases in turn; medians over rounds,"
        " percentiles over all requests",
        "seed": 0,
        "note": f"ResNet-18 of width {arguments.width}, uint8 32 x 32 images; Triton {triton_version()} with the python"
        " backend of serving/triton/backend, one instance, no queue delay, ONNX Runtime's default threads; clients on"
        " the same cores as the servers; gateway: one PNG a request over a kept HTTP connection; gateway, v2: the same"
        " pixels as KServe's binary tensor, logits as bytes; shared memory: system,"
        " registered with the token that production keeps from clients",
    }
    write_result("serving", "Serving beside bare ONNX Runtime", rows, ratios_of(rows), conditions)


def candidate(folder: Path, width: int) -> Path:
    """A model repository with one promoted version below the folder; the ONNX file."""
    torch.manual_seed(0)
    spec = ModelSpec("resnet18", width, 10, (32, 32, 3), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    run, out, evidence = folder / "run", folder / "candidate", folder / "evidence"
    run.mkdir()
    evidence.mkdir()
    pictures, labels = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8), np.arange(64) % 10
    split: dict[str, Any] = {
        f"{kind}_{part}": array for part in ("train", "test") for kind, array in {"x": pictures, "y": labels}.items()
    }
    np.savez(folder / "random.npz", **split)
    data = load_dataset("npz", str(folder / "random.npz"))
    write_run(run, spec, data)
    export(run, out)
    logits = CPU.session(out / "model.onnx").run(None, {INPUT: pictures})
    probes: dict[str, Any] = {"images": pictures, "change": np.zeros_like(pictures), "labels": labels}
    np.savez(evidence / "probes.npz", **probes, clean_logits=logits[0], adversarial_logits=logits[0])
    key = make_key(folder / "keys")
    write_report(evidence, report_on(out, evidence), key)
    promote(out, evidence, Directory(folder / "models"), name=NAME, trust=trusting(key))
    return out / "model.onnx"


def write_run(run: Path, spec: ModelSpec, data: Dataset) -> None:
    """A run of random weights in the training room's format; torch's generator is the caller's."""
    save_file(Classifier(spec).state_dict(), run / "checkpoint.safetensors")
    manifest = {
        "format": "dfmcl.run/1",
        "model": spec.to_json(),
        "labels": list(data.classes),
        "data": data.describe(),
        "files": {"checkpoint.safetensors": sha256_of(run / "checkpoint.safetensors")},
        "config": {"curriculum": {"beta": "8/255"}},
    }
    (run / "manifest.json").write_text(json.dumps(manifest))


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """Triton, as `dfmcl serve` starts it."""
    ports = claim_ports(http=0, grpc=0, metrics=0)
    with running(find_environment(None), folder / "models", ports, [NAME], None, False) as server:
        with server.client(NAME) as client:
            while True:
                server.require_running()
                try:
                    client.describe()
                    break
                except Exception:  # noqa: BLE001  # it is starting
                    time.sleep(0.2)  # Triton calls itself ready before it answers
        yield server


@contextmanager
def before(grpc_port: int) -> Iterator[int]:
    """A gateway before that Triton, in a thread; its port. Its key may see logits, as v2 answers with them."""
    plenty = {"images_per_second": 1e6, "burst_images": 1_000_000}
    config = GatewayConfig.model_validate(
        {
            "keys": [{"name": "benchmark", "sha256": digest_of(DOOR_KEY), "logits": True, **plenty}],
            "listen": {"notice_seconds": 0.01},
            "triton": {"endpoints": [f"{HOST}:{grpc_port}"], "model": NAME},
        }
    )
    stop, ready = threading.Event(), Path(tempfile.mkdtemp()) / "ready.json"
    quiet: Callable[[dict[str, Any]], None] = lambda entry: None  # noqa: E731
    thread = threading.Thread(target=lambda: gateway.serve(config, stop=stop, port=0, ready_file=ready, log=quiet))
    thread.start()
    while not ready.exists():
        time.sleep(0.05)  # it announces itself by a file
    try:
        yield int(json.loads(ready.read_text())["http"].rpartition(":")[2])
    finally:
        stop.set()
        thread.join()


@contextmanager
def all_cases(
    session: Any, server: Server, door: int, pictures: Images
) -> Iterator[dict[str, Callable[[float], tuple[int, Seconds, float]]]]:
    """By name: for so many seconds ask, and return images a request, seconds of each request, and seconds in all."""
    url = f"{HOST}:{server.ports['grpc']}"
    with Client(url, NAME) as client, shared(server, pictures) as through_memory:
        client.describe()
        connection = http.client.HTTPConnection(HOST, door)
        picture, tensor = classification(pictures[0]), inference(pictures[0])

        def bare(count: int) -> Callable[[float], tuple[int, Seconds, float]]:
            return lambda seconds: repeated(count, lambda: session.run(None, {INPUT: pictures[:count]}), seconds)

        def asked(count: int) -> Callable[[float], tuple[int, Seconds, float]]:
            return lambda seconds: repeated(count, lambda: client.predict(pictures[:count]), seconds)

        def posted(question: Question) -> None:
            connection.request("POST", *question)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status

        yield {
            "batch 64, bare": bare(64),
            "batch 64, Triton": asked(64),
            "batch 64, Triton, shared memory": lambda seconds: repeated(64, through_memory, seconds),
            "one image, bare": bare(1),
            "one image, Triton": asked(1),
            "one image, gateway": lambda seconds: repeated(1, partial(posted, picture), seconds),
            "one image, gateway, v2": lambda seconds: repeated(1, partial(posted, tensor), seconds),
            "batch 16, bare": bare(16),
            f"concurrent {CLIENTS}, Triton": lambda seconds: asyncio.run(concurrent_triton(url, pictures, seconds)),
            f"concurrent {CLIENTS}, gateway": lambda seconds: asyncio.run(concurrent_gateway(door, picture, seconds)),
            f"concurrent {CLIENTS}, gateway, v2": lambda seconds: asyncio.run(
                concurrent_gateway(door, tensor, seconds)
            ),
        }
        connection.close()


def repeated(count: int, ask: Callable[[], object], seconds: float) -> tuple[int, Seconds, float]:
    """One request after the other."""
    taken: Seconds = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        before_it = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - before_it)
    return count, taken, time.perf_counter() - begun


async def concurrent_triton(url: str, pictures: Images, seconds: float) -> tuple[int, Seconds, float]:
    """Single images from clients that each wait for their answer."""
    async with triton_aio.InferenceServerClient(url) as client:

        async def ask(picture: Images) -> None:
            tensor = grpc.InferInput(INPUT, [1, 32, 32, 3], "UINT8")
            tensor.set_data_from_numpy(picture[None])
            answer = await client.infer(NAME, [tensor], outputs=[grpc.InferRequestedOutput(OUTPUT)])
            assert answer.as_numpy(OUTPUT).shape == (1, 10)

        return await together([partial(ask, pictures[number]) for number in range(CLIENTS)], seconds)


async def concurrent_gateway(port: int, question: Question, seconds: float) -> tuple[int, Seconds, float]:
    """The same over HTTP, each client on a connection that it keeps."""
    path, body, headers = question
    told = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\n{told}Content-Length: {len(body)}\r\n\r\n"
    streams = [await asyncio.open_connection(HOST, port) for _ in range(CLIENTS)]

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head.encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert answer.startswith("http/1.1 200"), answer
        await reader.readexactly(int(answer.partition("\r\ncontent-length:")[2].split()[0]))

    try:
        return await together([partial(ask, *stream) for stream in streams], seconds)
    finally:
        for _, writer in streams:
            writer.close()


async def together(asks: list[Callable[[], Any]], seconds: float) -> tuple[int, Seconds, float]:
    """All at once, each again as soon as it is answered."""
    taken: Seconds = []
    begun = time.perf_counter()

    async def client(ask: Callable[[], Any]) -> None:
        while time.perf_counter() - begun < seconds:
            before_it = time.perf_counter()
            await ask()
            taken.append(time.perf_counter() - before_it)

    await asyncio.gather(*(client(ask) for ask in asks))
    return 1, taken, time.perf_counter() - begun


@contextmanager
def shared(server: Server, pictures: Images) -> Iterator[Callable[[], object]]:
    """A request of 64 images whose bytes, and those of the logits, pass through system shared memory."""
    headers = {f"triton-grpc-protocol-{KEY}": server.token}
    sizes = {"in": pictures.nbytes, "out": 64 * 10 * 4}
    client = grpc.InferenceServerClient(f"{HOST}:{server.ports['grpc']}")
    regions = {}
    try:
        for name, size in sizes.items():
            key = f"/dfmcl-bench-{name}-{server.process.pid}"
            regions[name] = shared_memory.create_shared_memory_region(name, key, size)
            client.register_system_shared_memory(name, key, size, headers=headers)
        tensor, wanted = grpc.InferInput(INPUT, list(pictures.shape), "UINT8"), grpc.InferRequestedOutput(OUTPUT)
        tensor.set_shared_memory("in", sizes["in"])
        wanted.set_shared_memory("out", sizes["out"])

        def ask() -> object:
            shared_memory.set_shared_memory_region(regions["in"], [pictures])
            client.infer(NAME, [tensor], outputs=[wanted])
            return shared_memory.get_contents_as_numpy(regions["out"], np.float32, [64, 10]).copy()

        yield ask
        client.unregister_system_shared_memory(headers=headers)
    finally:
        for region in regions.values():
            shared_memory.destroy_shared_memory_region(region)
        client.close()


def classification(picture: Images) -> Question:
    """A PNG for the gateway's own route."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return "/v1/classify", file.getvalue(), {"Content-Type": "image/png", "X-API-Key": DOOR_KEY}


def inference(picture: Images) -> Question:
    """The same pixels for KServe's route, in binary both ways, as tritonclient.http sends them."""
    size = {"binary_data_size": picture.nbytes}
    tensor = {"name": INPUT, "shape": [1, *picture.shape], "datatype": "UINT8", "parameters": size}
    wanted = {"name": OUTPUT, "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [tensor], "outputs": [wanted]}).encode()
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head)), "X-API-Key": DOOR_KEY}
    return f"/v2/models/{NAME}/infer", head + picture.tobytes(), headers


def triton_version() -> str:
    server = find_environment(None).server
    return (server / "TRITON_VERSION").read_text().strip() if (server / "TRITON_VERSION").is_file() else "of pip"


def described(case: str, rounds: list[tuple[int, Seconds, float]]) -> dict[str, Any]:
    """A row: the median round's images a second, and percentiles of all requests' milliseconds."""
    taken = 1000 * np.concatenate([seconds for _, seconds, _ in rounds])
    p50, p95, p99 = np.percentile(taken, [50, 95, 99])
    rate = float(np.median([count * len(seconds) / total for count, seconds, total in rounds]))
    return {"case": case, "images_per_s": rate, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "requests": len(taken)}


def ratios_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    rate = {row["case"]: row["images_per_s"] for row in rows}
    median = {row["case"]: row["p50_ms"] for row in rows}
    concurrent, door = f"concurrent {CLIENTS}, Triton", f"concurrent {CLIENTS}, gateway"
    return {
        "batch64_throughput_vs_onnxruntime": rate["batch 64, Triton"] / rate["batch 64, bare"],
        "batch64_shared_memory_vs_tensors": rate["batch 64, Triton, shared memory"] / rate["batch 64, Triton"],
        "single_image_added_ms": median["one image, Triton"] - median["one image, bare"],
        "single_image_added_by_gateway_ms": median["one image, gateway"] - median["one image, Triton"],
        "single_image_added_by_v2_over_classify_ms": median["one image, gateway, v2"] - median["one image, gateway"],
        "concurrent16_throughput_vs_onnxruntime": rate[concurrent] / rate["batch 16, bare"],
        "concurrent16_gateway_throughput_vs_triton": rate[door] / rate[concurrent],
        "concurrent16_v2_throughput_vs_classify": rate[f"{door}, v2"] / rate[door],
    }


if __name__ == "__main__":
    main()
