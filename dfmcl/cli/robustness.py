"""How much a run resists: `dfmcl evaluate`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from dfmcl.cli.arguments import CODE
from dfmcl.cli.command import command
from dfmcl.cli.output import say, track


@command
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    threat: Annotated[
        list[str] | None,
        typer.Option(
            help="8/255 (Linf), l2:0.5, l1:12, patch:5x5, patch:2%, rotation:30, shift:10%, rotation:30+shift:10%, "
            "corruptions, fog, fog@3; A|B for the worst of several; repeatable. Default: the run's beta."
        ),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="fgsm, pgd-20, pgd-50x5, cw-l2, patch-80x12, grid-100, ...; repeatable; each where it can search."
        ),
    ] = None,
    suite: Annotated[
        str, typer.Option(help="fast or standard instead of --attack: each attack on what those before it left.")
    ] = "",
    surrogate: Annotated[Path | None, typer.Option(help="A run to craft transfer attacks on.")] = None,
    images: Annotated[int, typer.Option(min=0, help="How many test images; 0 means all.")] = 0,
    data_path: Annotated[str, typer.Option(help="Where the run's data set lies now.")] = "",
    device: Annotated[str, typer.Option(help="Such as cpu or cuda. Default: the GPU, where there is one.")] = "",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the attacks.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the record here (JSON).")] = None,
    arch: CODE = "",
) -> None:
    """Measure a run's accuracy under attack on test images."""
    from dfmcl.common.errors import BadInput
    from dfmcl.common.files import dump_json, only_writer, write_text
    from dfmcl.robustness.attacks.registry import Attack
    from dfmcl.robustness.data import open_dataset
    from dfmcl.robustness.digests import Kept
    from dfmcl.robustness.measurements import FORMAT, measure, record, rows
    from dfmcl.robustness.runs import load_run, parse_device
    from dfmcl.robustness.threats.registry import parse_threat

    if suite and attack:
        raise BadInput(f"--suite {suite}: brings its own attacks; leave --attack out")
    attacks = [planned.name for planned in Attack.parse_suite(suite)] if suite else attack or ()
    where = parse_device(device)
    with nullcontext() if out is None else only_writer(out, FORMAT):  # asked before the attacks, not after
        trained = load_run(run, where, code=arch)
        source = load_run(surrogate, where) if surrogate else None
        threats = [parse_threat(text) for text in threat or [trained.manifest["config"]["curriculum"]["beta"]]]
        entry = trained.data
        told = entry.get("preprocessing", "")
        data = open_dataset(
            entry["name"], data_path or entry["path"], entry["image_size"], track, preprocessing=told,
            kept=Kept.usual(test=False),
        )  # fmt: skip
        if data.remark:
            say(data.remark)
        evaluations = measure(
            trained, data, threats, attacks=attacks, cascade=bool(suite), surrogate=source, images=images, seed=seed,
            track=track,
        )  # fmt: skip
        say(f"{run} on {len(evaluations[0].correct)} test images of {data.name}; 95 % intervals")
        say(f"  {'clean':34} {evaluations[0].clean}")
        if wild := evaluations[0].not_finite:
            say(f"  logits are not finite for {wild} of {len(evaluations[0].correct)} images, which count as wrong")
        for title, figure in [row for evaluation in evaluations for row in rows(evaluation)]:
            say(f"  {title:34} {figure}")
        if out is not None:
            write_text(out, dump_json(record(trained, data, evaluations)))
            say(f"record: {out}")
