"""Whether it is still true in production: `dfmcl watch`, `craft`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dfmcl.cli.command import command
from dfmcl.cli.output import say, track
from dfmcl.cli.signals import stop_on_signals

NICE = 10  # of the sidecar: beside a server of the same shell users come first; services and containers have weights


@command
def watch(
    config: Annotated[Path, typer.Option(help="The sidecar's configuration (TOML).")],
    rounds: Annotated[int | None, typer.Option(min=1, help="Stop after so many rounds.")] = None,
) -> int:
    """Attack the live endpoint round after round and export what is found to Prometheus."""
    from dfmcl.monitoring.config import load_config
    from dfmcl.monitoring.sidecar import watch as run_watch

    settings = load_config(config)
    os.nice(NICE)
    return run_watch(settings, rounds=rounds, stop=stop_on_signals(), log=say, track=track)


@command
def craft(
    config: Annotated[Path, typer.Option(help="The sidecar's configuration (TOML); probe.crafted says where to.")],
    device: Annotated[str, typer.Option(help="Such as cpu or cuda. Default: the GPU, where there is one.")] = "",
) -> None:
    """Craft the adversarial images of a watch's whole pool beforehand, so that its rounds only ask."""
    from dfmcl.common.errors import BadInput
    from dfmcl.monitoring.config import load_config
    from dfmcl.monitoring.crafted import Recipe, craft_pool
    from dfmcl.robustness.runs import parse_device

    settings, on = load_config(config), parse_device(device)
    if not settings.probe.crafted:
        raise BadInput(f"{config}: probe.crafted is not set; name the directory to write to")
    os.nice(NICE)
    recipe = Recipe.of(settings, track)
    if recipe.remark:
        say(recipe.remark)
    craft_pool(recipe, Path(settings.probe.crafted), device=on, track=track)
    attacks = ", ".join(attack.name for attack in recipe.attacks)
    say(f"{settings.probe.crafted}: {len(recipe.pool.images)} images under {attacks}; crafted on {on}")
