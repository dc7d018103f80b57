"""From images to a hardened checkpoint: `dfmcl train`, `campaign`, `presets`, `pack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfmcl.cli.arguments import VERIFY_DATA
from dfmcl.cli.command import command
from dfmcl.cli.output import say, track
from dfmcl.cli.signals import STOPPING, stop_on_signals


@command
def train(
    config: Annotated[str, typer.Argument(help="A preset's name or a TOML file.")],
    out: Annotated[Path, typer.Option(help="The run's directory.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue where the run in OUT was stopped.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value; repeatable.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long, saved, with exit code 130; --resume goes on.")
    ] = None,
    compact_state: Annotated[
        bool, typer.Option("--compact-state", help="Save a small state that can be carried; not bit for bit.")
    ] = False,
    verify_data: VERIFY_DATA = False,
) -> None:
    """Train a classifier; writes checkpoint, manifest, metrics. Several GPUs: torchrun -m dfmcl.training.train ..."""
    from dfmcl.training.config import load_config

    parsed = load_config(config, overrides)  # before torch loads: a wrong key is answered at once

    from dfmcl.robustness.digests import Kept
    from dfmcl.training.limits import Limits
    from dfmcl.training.train import train as run_training

    manifest = run_training(
        parsed,
        out,
        resume=resume,
        limits=Limits.of(stop_on_signals(STOPPING), max_minutes),
        compact=compact_state,
        kept=Kept.usual(verify=verify_data),
        track=track,
        log=say,
    )
    result = manifest.get("result")
    if result is None:  # under torchrun the first process speaks for all
        return
    say(
        f"{out}: held-out clean {100 * result['heldout_clean']:.1f} %,"
        f" PGD-{parsed.heldout.attack_steps} at {parsed.curriculum.beta} {100 * result['heldout_pgd']:.1f} %"
    )


@command
def campaign(
    plan: Annotated[str, typer.Argument(metavar="CAMPAIGN", help="A TOML file, or the name of one that comes along.")],
    out: Annotated[Path, typer.Option(help="Records, tables and runs; the same directory continues them.")],
    budget_minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long, everything kept; the same command goes on.")
    ] = None,
    data_path: Annotated[str, typer.Option(help="Where the data set lies on this machine.")] = "",
    device: Annotated[str, typer.Option(help="Where to measure, such as cpu or cuda. Default: as training.")] = "",
    table_only: Annotated[bool, typer.Option("--table-only", help="Only rewrite the tables from the records.")] = False,
) -> int:
    """Train and measure many runs under a time budget: 0 all done, 130 cut, 2 or 5 a run failed."""
    from dfmcl.common.errors import BadInput
    from dfmcl.training.campaign import only_writer, read_records, run_campaign, write_tables
    from dfmcl.training.limits import Limits
    from dfmcl.training.plan import load_campaign, runs

    parsed = load_campaign(plan)
    overrides = [f"data.path={data_path}"] if data_path else []
    if table_only:
        if not out.is_dir():
            raise BadInput(f"--out {out}: no such directory; name the one that holds the campaign's records")
        every = runs(parsed, plan, overrides)
        with only_writer(out):
            write_tables(parsed, every, read_records(parsed, every, out), out)
        say(f"{out / 'table.md'}")
        return 0
    with only_writer(out):
        progress = run_campaign(
            parsed,
            plan,
            out,
            overrides=overrides,
            limits=Limits.of(stop_on_signals(STOPPING), budget_minutes),
            device=device,
            command=f"dfmcl campaign {plan} --out {out}",
            track=track,
            log=say,
        )
    say(f"{out / 'table.md'}: {progress}")
    return progress.exit_code


@command
def presets() -> None:
    """List the training presets that come with dfmcl."""
    from dfmcl.common.toml import shipped
    from dfmcl.training.config import PRESETS

    for name, text in shipped(PRESETS).items():
        say(f"{name:22} {text.splitlines()[0].lstrip('# ')}")


@command
def pack(
    runs: Annotated[list[Path], typer.Argument(help="Directories of finished runs.")],
    out: Annotated[Path, typer.Option(help="The surrogates' directory; each run goes into OUT/NAME.")],
) -> None:
    """Pack runs as surrogates to ship: float16 weights, no local paths."""
    from dfmcl.common.errors import BadInput
    from dfmcl.training.pack import pack as run_pack

    names = [run.resolve().name for run in runs]
    if out.resolve() == Path(out.resolve().anchor):
        raise BadInput(f"--out {out}: is the root of all files; name a directory in it")
    if len(set(names)) < len(names):
        raise BadInput(f"runs {', '.join(names)}: two have the same name; rename a directory")
    for run, name in zip(runs, names, strict=True):
        manifest = run_pack(run, out / name)
        say(f"{out / name}: packed from {manifest['origin']['checkpoint_sha256'][:12]}")
