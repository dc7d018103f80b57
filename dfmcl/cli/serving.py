"""From a repository to an answer: `dfmcl serve`, `sync`, `gateway`, `apikey`, `capacity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfmcl.cli.arguments import REPOSITORY
from dfmcl.cli.command import command
from dfmcl.cli.output import say, say_json, say_page
from dfmcl.cli.signals import stop_on_signals


@command
def serve(
    repository: REPOSITORY,
    http_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8002,
    trust: Annotated[Path | None, typer.Option(help="Serve only what these keys signed (TOML).")] = None,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="Serve what is there now, and nothing that comes later.")
    ] = False,
    triton_python: Annotated[Path | None, typer.Option(help="Python of the environment that holds Triton.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="JSON with the URLs, there while it answers.")] = None,
    log: Annotated[Path | None, typer.Option(help="Triton's own log.")] = None,
    json_lines: Annotated[
        bool, typer.Option("--json-lines", help="Say what happens as JSON, one object a line.")
    ] = False,
    print_docker: Annotated[bool, typer.Option("--print-docker", help="Print the command for NVIDIA's image.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="With --print-docker: on a GPU.")] = False,
) -> int:
    """Serve the repository with Triton on 127.0.0.1 until SIGTERM or Ctrl-C, and follow its promotions."""
    from dfmcl.common.errors import BadInput
    from dfmcl.gating.signing.trust import follow_trust
    from dfmcl.release.stores.registry import store_of
    from dfmcl.serving.triton.docker import docker_command
    from dfmcl.serving.triton.supervisor import serve as run_server

    store = store_of(repository)
    if print_docker and store.whole:
        raise BadInput(f"{repository}: --print-docker mounts a directory; `dfmcl sync` fills one from here")
    if print_docker:
        ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        say_page(docker_command(store.local(""), ports, gpu=gpu))
        return 0
    tell = say_json if json_lines else say
    return run_server(
        store,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        trust=None if trust is None else follow_trust(trust, tell),
        fixed=fixed,
        triton_python=triton_python,
        ready_file=ready_file,
        log=log,
        say=tell,
    )


@command
def sync(
    repository: REPOSITORY,
    into: Annotated[Path, typer.Option(help="The directory that a Triton polls; nobody else writes there.")],
    trust: Annotated[Path | None, typer.Option(help="Copy only what these keys signed (TOML).")] = None,
    once: Annotated[bool, typer.Option("--once", help="Copy what is served now, and end.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Copy what a repository serves into a directory for your own Triton, and follow it until SIGTERM or Ctrl-C."""
    from dfmcl.gating.signing.trust import follow_trust, load_trust
    from dfmcl.release.stores.registry import store_of
    from dfmcl.serving.triton.mirror import mirror

    copy = mirror(store_of(repository), into, say)
    if not once:
        copy.follow(None if trust is None else follow_trust(trust, say), every, stop_on_signals())
        return
    for error in copy.once(None if trust is None else load_trust(trust)).values():
        raise error


@command
def gateway(
    config: Annotated[Path, typer.Option(help="The gateway's configuration (TOML).")],
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of listen.port; 0 picks one.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="JSON with the URL, there while a Triton answers.")] = None,
) -> int:
    """Answer HTTP with what Triton computes: images in, labels out, keys, limits, metrics; until SIGTERM or Ctrl-C."""
    from dfmcl.serving.gateway.config import load_config
    from dfmcl.serving.gateway.service import serve as run_gateway

    return run_gateway(load_config(config), stop=stop_on_signals(), port=port, ready_file=ready_file, source=config)


@command
def apikey(name: Annotated[str, typer.Argument(help="Whose key it is; it stands in logs.")]) -> None:
    """Make an API key for the gateway: the key, shown only now, and the table that lets it in."""
    from dfmcl.serving.gateway.config import new_key

    key, table = new_key(name)
    say_page(f"{key}\n\n{table}")


@command
def capacity(
    requests_per_second: Annotated[list[float], typer.Option(min=0.001, help="Of users; repeatable, a line each.")],
    images_per_second_per_replica: Annotated[
        float | None, typer.Option(min=0.001, help="When it is saturated. Default: as the serving benchmark measured.")
    ] = None,
    images_per_request: Annotated[int, typer.Option(min=1)] = 1,
    utilisation: Annotated[float, typer.Option(min=0.01, max=0.99, help="How busy a replica may be planned.")] = 0.6,
    probe_images_per_second: Annotated[float, typer.Option(min=0, help="What the sidecar adds.")] = 1.9,
    ready_seconds: Annotated[float, typer.Option(min=1, help="From a new pod to a ready one.")] = 30,
    hourly: Annotated[float | None, typer.Option(min=0, help="A replica's price an hour, in any currency.")] = None,
) -> None:
    """Say how many replicas a load needs, what probes take of them, and how long a promotion lasts."""
    from dfmcl.serving.capacity import MEASURED, Load, Replica, measured_images_per_second, table
    from dfmcl.serving.capacity import capacity as plan

    speed = images_per_second_per_replica or measured_images_per_second(MEASURED)
    replica = Replica(speed, utilisation, ready_seconds, hourly)
    loads = [Load(requests, images_per_request, probe_images_per_second) for requests in requests_per_second]
    say_page(table(plan(load, replica) for load in loads))
    say_page(f"\nA replica answers {speed:,.0f} images a second; {1e6 / speed:,.0f} s of one for a million images.")
