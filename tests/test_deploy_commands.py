"""What the manifests run, run: every command of ours is parsed by dfmcl, verification really refuses, Triton starts."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml

import dfmcl.cli.command
from dfmcl.common.errors import Broken
from dfmcl.gating.signing.trust import load_trust
from dfmcl.monitoring.config import load_config as load_watch
from dfmcl.serving.clients.triton import Client
from dfmcl.serving.gateway.config import load_config as load_gateway
from dfmcl.serving.triton.environment import Environment, find_environment, footprint, install_backends
from dfmcl.training.config import load_config as load_training
from tests.deploying import DEPLOY, MODEL, OVERLAYS, ROOT, named, pods, rendered
from tests.processes import wait_until

COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
# What Triton 24.10, pip's, does not know yet; NVIDIA's image of 26.07 does.
NEWER = {"--allow-client-shm", "--http-max-input-size"}


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of ours in overlays and stack, with where it stands."""
    for overlay in OVERLAYS:
        for pod in pods(rendered(overlay)):
            for container in pod.containers:
                if container.get("command", [""])[0] == "dfmcl":
                    yield f"{overlay} {pod.where} {container['name']}", container["command"]
    for name, service in COMPOSE.items():
        if service.get("command", [""])[0] == "dfmcl":
            yield f"compose {name}", service["command"]


def test_dfmcl_accepts_every_command() -> None:
    """Subcommand, options and arguments parse as they stand there; a wrong option would not."""
    found = dict(commands())
    assert len(found) == 3 + 3 + 1 + 4 + 3
    assert {words[1] for words in found.values()} == {"verify", "gateway", "watch", "sync"}
    group: Any = typer.main.get_command(dfmcl.cli.command.app)
    for where, words in found.items():
        context = group.commands[words[1]].make_context(words[1], words[2:])
        assert context.params, where
    with pytest.raises(Exception, match="No such option"):
        group.commands["gateway"].make_context("gateway", ["--configuration", "x"])


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """What the containers see: /models with a copy of the model, /etc/dfmcl from the rendered ConfigMap."""
    shutil.copytree(ROOT / "model_repository" / MODEL, tmp_path / "models" / MODEL)
    (tmp_path / "etc" / "dfmcl").mkdir(parents=True)
    for name, text in named(rendered(OVERLAYS[0]), "ConfigMap", "trust")["data"].items():
        (tmp_path / "etc" / "dfmcl" / name).write_text(text)
    return tmp_path


def run(words: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    """A container's command with its volumes below `root`."""
    inside = [f"{root}{word}" if word.startswith(("/models", "/etc/")) else word for word in words]
    command = [str(Path(sys.executable).with_name("dfmcl")), *inside[1:]]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_only_what_was_signed_gets_past_the_init_container(volumes: Path) -> None:
    """The command as it stands there: 0 on the shipped model; 1 after any change that a supply chain could make."""
    (words,) = map(list, {tuple(words) for _, words in commands() if words[1] == "verify"})
    made = run(words, volumes)
    assert made.returncode == 0, made.stderr
    assert "passed on" in made.stdout
    model, trust = volumes / "models" / MODEL, volumes / "etc" / "dfmcl"
    onnx = model / "1" / "model.onnx"
    original = onnx.read_bytes()
    onnx.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    assert run(words, volumes).returncode == 1
    onnx.write_bytes(original)
    library = model / "libtriton_onnxruntime.so"  # Triton would take it for the backend
    library.write_bytes(b"")
    assert run(words, volumes).returncode == 1
    library.unlink()
    config = model / "config.pbtxt"
    text = config.read_text()
    config.write_text(text.replace('backend: "onnxruntime"', 'backend: "python"'))
    assert run(words, volumes).returncode == 1
    config.write_text(text)
    attestation = model / "1" / "attestation.intoto.jsonl"
    signed = attestation.read_text()
    attestation.unlink()
    assert run(words, volumes).returncode == 1
    attestation.write_text(signed)
    foreign = [str(Path(sys.executable).with_name("dfmcl")), "keygen", str(volumes / "other")]
    subprocess.run(foreign, check=True, capture_output=True)
    shutil.copy(volumes / "other.pub", trust / "release.pub")
    made = run(words, volumes)
    assert made.returncode == 1, made.stdout
    assert "sign" in made.stderr


def test_configurations_that_are_mounted_load(volumes: Path) -> None:
    """Trust, watch and gateway as the ConfigMaps and the stack hold them; the paths below /models are there."""
    objects = rendered(OVERLAYS[0])
    for name, load in (("watch", load_watch), ("gateway", load_gateway)):
        text = named(objects, "ConfigMap", name)["data"][f"{name}.toml"]
        assert text == (DEPLOY / MODEL / f"{name}.toml").read_text()
        (volumes / f"{name}.toml").write_text(text)
        load(volumes / f"{name}.toml")
    assert load_trust(volumes / "etc" / "dfmcl" / "trust.toml").policies
    watch = load_watch(volumes / "watch.toml")
    for path in (*watch.surrogates.runs, watch.release.repository):
        assert Path(f"{volumes}{path}").is_dir(), path
    assert (Path(f"{volumes}{watch.release.repository}") / watch.target.model / "1" / "report.json").is_file()
    beside = named(objects, "ConfigMap", "watch")["data"]
    assert {name: text for name, text in beside.items() if name != "watch.toml"} == {
        path.name: path.read_text() for path in (volumes / "etc" / "dfmcl").iterdir()
    }
    assert Path(watch.release.trust).name in beside


def test_rounds_are_written_where_the_sidecar_may_write(volumes: Path) -> None:
    """The record's folder is a writable mount, in the stack and on a cluster, with room for it and the one before."""
    shutil.copy(DEPLOY / MODEL / "watch.toml", volumes)
    record = load_watch(volumes / "watch.toml").record
    folder = str(Path(record.path).parent)
    stack = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert f"rounds:{folder}" in stack["services"]["watch"]["volumes"]
    assert "rounds" in stack["volumes"]
    assert f"--owner=1000 --group=1000 {folder}\n" in (DEPLOY / "images" / "Dockerfile").read_text()
    (pod,) = [pod for pod in pods(rendered(OVERLAYS[0])) if pod.where == "Deployment watch"]
    (mount,) = [mount for mount in pod.spec["containers"][0]["volumeMounts"] if mount["mountPath"] == folder]
    (volume,) = [volume for volume in pod.spec["volumes"] if volume["name"] == mount["name"]]
    assert not mount.get("readOnly")
    mebibytes = int(volume["emptyDir"]["sizeLimit"].removesuffix("Mi"))
    assert mebibytes * 2**20 > 2 * record.max_bytes


def test_the_training_jobs_overrides_are_keys_of_the_preset() -> None:
    """What pytorchjob.yaml sets is known to the configuration; the job's program is the trainer."""
    (job,) = rendered("training/pytorchjob.yaml")
    words = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["command"]
    assert words[:3] == ["torchrun", "-m", "dfmcl.training.train"]
    overrides = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    config = load_training(words[3], overrides)
    assert config.optimization.batch_size == 512


@pytest.fixture(scope="module")
def environment() -> Environment:
    try:
        return find_environment(None)
    except Broken as error:
        pytest.skip(str(error))


def tritons_words(overlay: str = OVERLAYS[0]) -> list[str]:
    (pod,) = [pod for pod in pods(rendered(overlay)) if pod.where == "Deployment triton"]
    (container,) = pod.spec["containers"]
    return [*container["command"], *container["args"]]


def test_triton_knows_every_flag(environment: Environment) -> None:
    """By the real binary's --help, but for those that came after it."""
    binary = str(environment.server / "bin" / "tritonserver")
    shown = subprocess.run([binary, "--help"], env=environment.variables(), capture_output=True, text=True, check=False)
    known = set(re.findall(r"--[a-z-]+", shown.stdout + shown.stderr))
    flags = {word.partition("=")[0] for word in [*tritons_words()[1:], "--model-config-name=gpu"]}
    assert flags - known == NEWER


@contextmanager
def triton(environment: Environment, models: Path, log: Path, overlay: str = OVERLAYS[0]) -> Iterator[dict[str, int]]:
    """A real Triton with the manifest's arguments; ports on loopback, as there is no pod around it."""
    with ExitStack() as stack:
        runtime = stack.enter_context(footprint())
        install_backends(environment, runtime)
        taken = {name: stack.enter_context(socket.socket()) for name in ("http", "grpc", "metrics")}
        for listener in taken.values():
            listener.bind(("127.0.0.1", 0))
        ports = {name: listener.getsockname()[1] for name, listener in taken.items()}
        for listener in taken.values():
            listener.close()
        words = [word for word in tritons_words(overlay)[1:] if word.partition("=")[0] not in NEWER]
        words = [word.replace("$(ADMIN_TOKEN)", "secret").replace("=/models", f"={models}") for word in words]
        words += [f"--backend-directory={runtime}"]
        words += [f"--backend-config=python,shm-region-prefix-name={runtime.name}-"]
        words += [f"--{name}-port={port}" for name, port in ports.items()]
        words += [f"--{name}-address=127.0.0.1" for name in ports]
        sink = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            [str(environment.server / "bin" / "tritonserver"), *words],
            env=environment.variables(),
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
        stack.callback(process.wait, 60)
        stack.callback(process.terminate)
        wait_until(lambda: status(f"http://127.0.0.1:{ports['http']}/v2/health/ready") == 200, process)
        yield ports


@contextmanager
def gateway(config: Path, triton_port: int) -> Iterator[tuple[str, str]]:
    """The gateway's command with its mounted configuration, towards that Triton; its URLs, for all and for probes."""
    ready, text = config.with_name("ready.json"), (DEPLOY / MODEL / "gateway.toml").read_text()
    text = text.replace("triton:8001", f"127.0.0.1:{triton_port}").replace('"0.0.0.0"', '"127.0.0.1"')
    text = text.replace('"0.0.0.0:9465"', '"127.0.0.1:0"')
    config.write_text(text.replace("notice_seconds = 10.0", "notice_seconds = 0.0"))  # no load balancer here
    words = next(words for where, words in commands() if where.startswith(OVERLAYS[0]) and words[1] == "gateway")
    words = [str(config) if word == "/etc/dfmcl/gateway.toml" else word for word in words[1:]]
    command = [str(Path(sys.executable).with_name("dfmcl")), *words, "--port", "0", "--ready-file", str(ready)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(ready.exists, process)
        urls = json.loads(ready.read_text())
        yield urls["http"], urls["admin"]
    finally:
        process.terminate()
        process.wait(60)


def status(url: str, headers: dict[str, str] | None = None, data: bytes | None = None) -> int:
    """The HTTP status of a GET, or a POST where there is data; 0 where nobody answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}, data=data), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def probed(name: str) -> set[str]:
    """The paths that the kubelet asks of a Deployment."""
    (pod,) = [pod for pod in pods(rendered(OVERLAYS[0])) if pod.where == f"Deployment {name}"]
    (container,) = pod.spec["containers"]
    return {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}


def test_triton_with_the_manifests_arguments(environment: Environment, volumes: Path, tmp_path: Path) -> None:
    """It gets ready by its probes, answers as the gate recorded, and tells and takes nothing without the token.

    The gateway with its own command and configuration gets ready before it, and lets nobody in.
    """
    probes = np.load(ROOT / "model_repository" / MODEL / "1" / "probes.npz")
    with triton(environment, volumes / "models", tmp_path / "triton.log") as ports:
        url = f"http://127.0.0.1:{ports['http']}"
        asked = {*probed("triton"), f"/v2/models/{MODEL}/ready"}
        assert {path: status(url + path) for path in asked} == dict.fromkeys(asked, 200)
        with Client(f"127.0.0.1:{ports['grpc']}", MODEL, timeout_seconds=60) as client:
            logits = client.predict(probes["images"][:16]).logits
        assert np.abs(logits - probes["clean_logits"][:16]).max() < 1e-2
        evil = json.dumps({"parameters": {"config": "{}", "file:1/model.onnx": "AAAA"}}).encode()
        closed = {
            "/v2/repository/models/evil/load": evil,
            "/v2/repository/index": b"{}",
            f"/v2/models/{MODEL}/stats": None,
            "/v2/systemsharedmemory/status": None,
            "/v2/trace/setting": None,
            "/v2/logging": None,
        }
        assert {path: status(url + path, data=data) for path, data in closed.items()} == dict.fromkeys(closed, 403)
        token = {"x-admin-token": "secret"}
        assert status(f"{url}/v2/models/{MODEL}/stats", token) == 200
        # With the token too, nothing can be loaded: that is what control mode none is for.
        assert status(f"{url}/v2/repository/models/evil/load", token, evil) == 503
        assert status(f"{url}/v2/models/evil/ready") != 200
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{ports['metrics']}/metrics", timeout=5).read().decode()
        with gateway(tmp_path / "gateway.toml", ports["grpc"]) as (entrance, admin):
            asked = {*probed("gateway"), "/metrics"}
            assert {path: status(admin + path) for path in asked} == dict.fromkeys(asked, 200)
            assert status(f"{entrance}/metrics") == 404
            assert status(f"{entrance}/v1/classify", data=b"x") == 401
    rules = (DEPLOY / "prometheus" / "rules" / "serving.yaml").read_text()
    for name in ("nv_inference_queue_duration_us", "nv_inference_request_success"):
        assert name in metrics
        assert name in rules
    assert "nv_inference_pending_request_count" in metrics
