"""The command that serves a repository with NVIDIA's image: what a cluster runs, for one machine that has Docker."""

from __future__ import annotations

import shlex
from pathlib import Path

IMAGE = "nvcr.io/nvidia/tritonserver:26.07-py3"  # the first releases after the authentication bypasses of May 2026
# Longer than Triton's own exit timeout, which lets requests in flight finish.
STOP_SECONDS = 45
EXIT_SECONDS = 30


def docker_command(repository: Path, ports: dict[str, int], *, gpu: bool = False) -> str:
    """`docker run ...`, ready for a shell. ports: http, grpc and metrics, published on 127.0.0.1 only.

    The container is not root, cannot write, and has no capability; the repository is mounted read-only; Triton serves
    what is there and takes nothing later (control mode none): a promotion is a new container.
    """
    inside = {"http": 8000, "grpc": 8001, "metrics": 8002}
    published = [f"--publish=127.0.0.1:{ports[name]}:{port}" for name, port in inside.items()]
    words = [
        *("--rm", "--user=1000:1000", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL"),
        *("--security-opt=no-new-privileges", f"--stop-timeout={STOP_SECONDS}"),
        *(["--gpus=1", "--tmpfs=/cache"] if gpu else []),
        *published,
        f"--volume={repository.absolute()}:/models:ro",
        IMAGE,
        *triton_arguments(gpu=gpu),
    ]
    return " \\\n  ".join(["docker run", *map(shlex.quote, words)])


def triton_arguments(*, gpu: bool = False) -> list[str]:
    """tritonserver and its flags in the image of NVIDIA."""
    return [
        "tritonserver",
        "--model-repository=/models",
        "--model-control-mode=none",
        "--exit-on-error=true",
        "--strict-readiness=true",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={EXIT_SECONDS}",
        *(["--model-config-name=gpu"] if gpu else []),
        "--allow-sagemaker=false",
        "--allow-vertex-ai=false",
        "--log-format=ISO8601",
    ]
