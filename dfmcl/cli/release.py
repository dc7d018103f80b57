"""From a run to a version that is served, and back: `dfmcl export`, `promote`, `rollback`, `status`, ..."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dfmcl.cli.arguments import (
    CODE,
    LIVE,
    NAME,
    OUTPUT,
    PREPROCESSING,
    REPOSITORY,
    TRUST,
    WAIT,
    path,
    read_labels,
    read_preprocessing,
    read_signers,
)
from dfmcl.cli.command import command
from dfmcl.cli.output import say, say_page, track, warn


@command
def export(
    source: Annotated[Path, typer.Argument(help="A run's directory, or an ONNX classifier of any origin.")],
    out: Annotated[Path, typer.Option(help="The candidate's directory.")],
    weights: Annotated[str | None, typer.Option(help="How a run's weights are stored: float32 or float16.")] = None,
    contract: Annotated[
        str | None, typer.Option("--input", help="What the ONNX file takes, such as 'float32 NCHW imagenet'.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="The ONNX file's classes in order, one a line.")] = None,
    output: OUTPUT = None,
    preprocessing: PREPROCESSING = None,
    arch: CODE = "",
) -> None:
    """Freeze a run to ONNX, or wrap an ONNX file, and prove it equal to its source."""
    from dfmcl.common.errors import BadInput

    foreign, names = source.is_file(), read_labels(labels)
    if foreign and (contract is None or names is None):
        raise BadInput(f"{source}: name its input and its classes: --input 'float32 NCHW' --labels FILE")
    if foreign and (weights is not None or arch):
        raise BadInput(f"{source}: an ONNX file keeps its network and weights; leave --weights and --arch out")
    if not foreign and any(value is not None for value in (contract, names, output, preprocessing)):
        raise BadInput(
            f"{source}: is no ONNX file; a run knows --input, --labels, --output and --preprocessing; leave them out"
        )

    from dfmcl.release.export import export as run_export  # after the questions that need no torch
    from dfmcl.release.export import wrap

    if contract is not None and names is not None:
        fitted = read_preprocessing(preprocessing)
        manifest = wrap(source, out, contract=contract, labels=names, output=output, preprocessing=fitted, track=track)
    else:
        manifest = run_export(source, out, weights=weights or "float32", code=arch, track=track, log=say)
    parity: Any = manifest["parity"]
    images = "images of smooth colours and noise" if foreign else "images"
    rounding = (
        f"; {weights} changes {100 * (1 - parity['checkpoint_label_agreement']):.1f} % of the labels and logits by up"
        f" to {parity['checkpoint_max_abs_difference']:.1e}"
    )
    say(
        f"{out}: model.onnx; against {source} on {parity['images']} {images}: largest difference"
        f" {parity['max_abs_difference']:.1e} (tolerance {parity['tolerance']:.1e}),"
        f" {100 * parity['label_agreement']:.1f} % equal labels{rounding if weights == 'float16' else ''}"
    )
    if foreign:
        from dfmcl.robustness.contract import InputContract

        origin: Any = manifest["origin"]
        takes = InputContract.from_json(origin["input"])
        say(f"{out}: takes bytes, turns them into {takes} for {source}; `dfmcl gate` finds out whether that is right")


@command
def promote(
    candidate: Annotated[Path, typer.Argument(help="A candidate's directory.")],
    evidence: Annotated[Path, typer.Option(help="What the gate wrote about it.")],
    repository: REPOSITORY,
    name: NAME,
    trust: TRUST,
    threads: Annotated[
        int | None, typer.Option(min=0, help="ONNX Runtime's per inference on a CPU; 0: one a core.")
    ] = None,
    shadow: Annotated[bool, typer.Option("--shadow", help="Beside the served version, as NAME-shadow.")] = False,
    key: Annotated[Path | None, typer.Option(help="Sign all files with it, as model.sig (ECDSA on P-256).")] = None,
    key_command: Annotated[str | None, typer.Option(help="In its place, a command; see `dfmcl sign`.")] = None,
    public: Annotated[Path | None, typer.Option(help="The public key of --key-command.")] = None,
    print_kserve: Annotated[
        str | None,
        typer.Option(
            help="Print the InferenceService that serves just this model, of that OCI image.", metavar="IMAGE"
        ),
    ] = None,
    live: LIVE = None,
    wait: WAIT = 120,
) -> None:
    """Bring a candidate that passed, and whose evidence is signed, into the model repository as a new version."""
    from dfmcl.common.errors import BadInput
    from dfmcl.common.tracing import operation
    from dfmcl.gating.signing.trust import load_trust
    from dfmcl.release.kserve import checked_reference, inference_service
    from dfmcl.release.promotion import promote as run_promote
    from dfmcl.release.stores.registry import store_of

    if print_kserve is not None:
        checked_reference(print_kserve)
    store = store_of(repository)
    signers = read_signers([key] if key else [], [key_command] if key_command else [], [public] if public else [])
    if len(signers) > 1:
        raise BadInput("model.sig carries one signature: name --key or --key-command, not both")
    with operation("dfmcl-promote", "promote", dfmcl__model=name) as told:
        promoted = run_promote(
            candidate,
            evidence,
            store,
            name=name,
            trust=load_trust(trust),
            threads=threads,
            shadow=shadow,
            signer=signers[0] if signers else None,
        )
        if told is not None:
            told.note(dfmcl__version=promoted.version, dfmcl__sha256=promoted.sha256)
    where = store.where(promoted.folder)
    # On stdout is what `kubectl apply -f -` reads.
    tell = say if print_kserve is None else warn
    tell(f"{where}: {promoted.model} version {promoted.version}, model.onnx {promoted.sha256[:12]}")
    if print_kserve is not None:
        say_page(inference_service(promoted, print_kserve))
    await_live(promoted, live, wait)


@command
def rollback(
    repository: REPOSITORY,
    name: NAME,
    trust: TRUST,
    version: Annotated[int | None, typer.Option(min=1, help="Default: the one that was served before.")] = None,
    reason: Annotated[str, typer.Option(help="For the history.")] = "",
    live: LIVE = None,
    wait: WAIT = 120,
) -> None:
    """Serve an earlier version of a model again."""
    from dfmcl.common.tracing import operation
    from dfmcl.gating.signing.trust import load_trust
    from dfmcl.release.promotion import rollback as run_rollback
    from dfmcl.release.stores.registry import store_of

    store = store_of(repository)
    with operation("dfmcl-promote", "rollback", dfmcl__model=name) as told:
        promoted = run_rollback(store, name, trust=load_trust(trust), version=version, reason=reason)
        if told is not None:
            told.note(dfmcl__version=promoted.version, dfmcl__sha256=promoted.sha256)
    where = store.where(promoted.folder)
    say(f"{where}: {promoted.model} is back at version {promoted.version}, model.onnx {promoted.sha256[:12]}")
    await_live(promoted, live, wait)


def await_live(promoted: Any, url: str | None, seconds: float) -> None:
    """Wait until an endpoint answers with a version; at once where none is named."""
    from dfmcl.serving.clients.triton import Client
    from dfmcl.serving.triton.supervisor import wait_until_live

    if url is not None:
        with Client(url, promoted.model) as client:
            wait_until_live(client, promoted, seconds)
        say(f"{url}: answers with version {promoted.version} as the gate saw it answer")


@command
def status(
    repository: REPOSITORY,
    trust: Annotated[Path | None, typer.Option(help="Whose signature counts (TOML). Default: digests only.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> int:
    """What a repository serves, by which verdict, for how long: 0, or 1 where nothing or not all would be served."""
    import json

    from dfmcl.gating.signing.trust import load_trust
    from dfmcl.release.status import standings
    from dfmcl.release.stores.registry import store_of

    store = store_of(repository).now()
    found = standings(store, None if trust is None else load_trust(trust))
    if as_json:
        say_page(json.dumps([row.to_json() for row in found], indent=2))
    for row in [] if as_json else found:
        roles = {"champion": row.champion, "previous": row.previous, "candidate": row.candidate}
        held = [f"{role} {version}" for role, version in roles.items() if version is not None]
        named = "nothing is" if row.configured is None else f"version {row.configured} is not"
        served = [] if row.champion is not None else [f"{named} served"]
        on_disk = ", ".join(map(str, row.versions)) or "nothing"
        say(f"{row.model}: {', '.join(served + held)}; on disk {on_disk}; model.onnx {row.sha256[:12] or '?'}")
        until = f"; holds until {row.expires[:10]}" if row.expires else ""
        say(f"  {row.trouble or '; '.join(row.criteria)}{until}")
        if row.doubt:
            say(f"  {row.doubt}")
    damage = history_damage(store)
    if not found:
        (warn if as_json else say)(f"{store.where()}: holds no promoted model; `dfmcl promote` adds one")
    return int(damage or not found or any(row.trouble or row.doubt for row in found))


def history_damage(store: Any) -> bool:
    """Warn of each line of the history that cannot be read; whether there is one."""
    from dfmcl.release.layout import HISTORY, MEND
    from dfmcl.release.ledger import read_lines

    _, damaged = read_lines(store)
    for number, why in damaged:
        warn(f"{store.where(HISTORY)}: line {number}: {why}; {MEND}")
    return bool(damaged)


@command
def history(repository: REPOSITORY, name: Annotated[str | None, typer.Option(help="One model only.")] = None) -> int:
    """Every change of what a repository serves, oldest first: 0, or 1 where there is none or a line is damaged."""
    from dfmcl.release.ledger import read_lines
    from dfmcl.release.stores.registry import store_of
    from dfmcl.release.verification import require_repository

    store = store_of(repository).now()
    require_repository(store)
    changes = [change for change in read_lines(store)[0] if name in (None, change.model)]
    for change in changes:
        served = None if change.event == "failed" else change.version
        version = "nothing" if served is None else f"version {served}"
        before = "" if change.before is None else f", before {change.before}"
        why = f"; {change.reason}" if change.reason else ""
        say(f"{change.time}  {change.model}  {change.event}  {version}{before}, by {change.actor}{why}")
    damage = history_damage(store)
    if not changes:
        which = f" of {name}" if name else ""
        say(f"{store.where()}: no change{which} was ever written down; `dfmcl promote` makes one")
    return int(damage or not changes)


@command
def repair(
    repository: REPOSITORY,
    trust: TRUST,
    name: Annotated[str | None, typer.Option(help="One model only. Default: all.")] = None,
) -> int:
    """Serve what verifies, whichever file was damaged, emptied or removed: 0, or 1 where a model stays unserved."""
    from dfmcl.gating.signing.trust import load_trust
    from dfmcl.release.repair import repair as run_repair
    from dfmcl.release.stores.registry import store_of

    store = store_of(repository)
    found = run_repair(store, load_trust(trust), name=name)
    for row in found:
        say(f"{row.about}: {row.said}")
    if not found:
        say(f"{store.where()}: holds no promoted model; `dfmcl promote` adds one")
    return int(not found or not all(row.whole for row in found))


@command
def prune(
    repository: REPOSITORY,
    name: NAME,
    keep: Annotated[int, typer.Option(min=1, help="So many of the newest stay, and what serves or served last.")] = 3,
) -> None:
    """Remove old versions of a model; their numbers stay taken."""
    from dfmcl.release.promotion import prune as run_prune
    from dfmcl.release.stores.registry import store_of

    removed = run_prune(store_of(repository), name, keep=keep)
    say(f"{name}: removed {', '.join(f'version {number}' for number in removed) or 'nothing'}")


@command
def retire(
    repository: REPOSITORY, name: NAME, reason: Annotated[str, typer.Option(help="For the history.")] = ""
) -> None:
    """Take a model out of service, all its versions with it."""
    from dfmcl.release.promotion import retire as run_retire
    from dfmcl.release.stores.registry import store_of

    run_retire(store_of(repository), name, reason=reason)
    say(f"{name}: retired")


@command
def parity(
    version: Annotated[str, typer.Argument(parser=path, help="A promoted version, such as models/digits/1.")],
) -> int:
    """Compare every execution provider and precision present with what the gate recorded: 0, or 1 where one differs.

    Of a version that another provider than the CPU decided only that one counts: nothing else serves it.
    """
    from dfmcl.release.parity import compare, counted
    from dfmcl.release.stores.registry import local_of

    rows = []
    with local_of(version) as folder:
        for row in compare(folder):
            rows.append(row)
            found = row.trouble or (
                f"logits off by {row.difference:.1e}, labels equal on {100 * row.clean_agreement:.1f} % of clean and"
                f" {100 * row.adversarial_agreement:.1f} % of adversarial images, {100 * row.held:.1f} % of those right"
            )
            named = f"{row.provider}, {row.setting}{' (decided)' if row.judged else ''}"
            say(f"{'equal' if row.equal else 'DIFFERS'}  {named}: {found}")
    return int(not all(row.equal for row in counted(rows)))


@command
def card(
    repository: REPOSITORY,
    name: NAME,
    run: Annotated[
        Path | None, typer.Argument(help="The run that the served version was exported from; with --audit optional.")
    ] = None,
    evaluation: Annotated[Path | None, typer.Option(help="A record of the run by `dfmcl evaluate --out`.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Print in its place the records for an audit (EU AI Act, ISO/IEC 42001).")
    ] = False,
    trust: Annotated[Path | None, typer.Option(help="With --audit: whose signature counts (TOML).")] = None,
) -> None:
    """Write the model card of what is served: README.md, all figures from run and evidence."""
    from dfmcl.common.errors import BadInput
    from dfmcl.release.stores.registry import store_of

    store = store_of(repository)
    if audit:
        from dfmcl.gating.signing.trust import load_trust
        from dfmcl.release.audit import audit as written

        if trust is None or evaluation is not None:
            raise BadInput("--audit: needs --trust, as a record that nobody signed is none, and takes no --evaluation")
        say_page(written(store, name, load_trust(trust), run))
        return
    if run is None or trust is not None:
        raise BadInput("card: needs the run that the version was exported from, and takes --trust with --audit only")
    from dfmcl.release.card import write_card

    say(f"{write_card(run, store, name, evaluation)}: written")
