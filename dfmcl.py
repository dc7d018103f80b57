"""The console command `dfmcl`. It wires the rooms; each subcommand imports its room when it is called."""

from __future__ import annotations

import functools
import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

T = TypeVar("T")
NICE = 10  # of the sidecar: beside a server of the same shell users come first; services and containers have weights
# What a subcommand needs, if not `train`.
SERVE = ("promote", "rollback", "repair", "status", "history", "prune", "retire", "verify", "card", "serve")
EXTRAS = {
    **dict.fromkeys(SERVE, "serve"),
    **dict.fromkeys(("gateway", "apikey"), "gateway"),
    **dict.fromkeys(("watch", "craft"), "monitor"),
}
CLEARING_SECONDS = 2.0  # in which a further Ctrl-C is not heard
OURS = ("robustness", "training", "gating", "serving", "monitoring")
BROKEN, INTERRUPTED = 5, 130
STOPPING = "stopping at the next step, and saving the state; a second signal ends at once, with the state saved before"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Harden an image classifier, gate it on robust accuracy, serve it with Triton, probe it in production.",
    epilog="Exit codes: 0 done, 1 refused (gate: failed), 2 bad input, 3 inconclusive, 4 suspect, 5 broken.",
)


def guarded(function: Callable[..., int | None]) -> Callable[..., None]:
    """The function, with whatever it raises turned into one line and an exit code, never 1 by accident."""

    def attempt(*args: Any, **kwargs: Any) -> None:
        try:
            for value in kwargs.values():
                for path in value if isinstance(value, list) else [value]:
                    require_local(path)
            code = function(*args, **kwargs) or 0
            sys.stdout.flush()
        except SystemExit as error:
            if error.code not in (130, 143):  # a signal's; any other is a model's own code that wants to end us
                warn(f"a model's code called sys.exit({error.code!r}), which decides nothing")
                raise SystemExit(BROKEN) from None
            raise
        except BrokenPipeError:  # the reader of our output has left; nobody is there to be told
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(BROKEN) from None
        except Exception as error:  # noqa: BLE001  # this is where every exception ends, with its meaning
            raise SystemExit(explain(error, function.__name__)) from None
        raise SystemExit(code)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            attempt(*args, **kwargs)
        except KeyboardInterrupt as error:
            raise SystemExit(cut_off(error, function.__name__)) from None

    return call


def cut_off(error: BaseException, subcommand: str) -> int:
    """The exit code of a Ctrl-C, told as the command told the one before that, which this one may have interrupted."""
    while error.__context__ is not None:
        error = error.__context__
        if getattr(error, "exit_code", 0) == INTERRUPTED:
            assert isinstance(error, Exception)
            return explain(error, subcommand)
    return INTERRUPTED


def command(function: Callable[..., int | None]) -> Callable[..., None]:
    """Register a guarded subcommand under the function's name."""
    return app.command(name=function.__name__)(guarded(function))


def require_local(path: object) -> None:
    """BadInput for a path of another machine: a bucket's name would become a folder of this one, and exit code 0."""
    from robustness.errors import BadInput
    from robustness.text import why_not_local

    if isinstance(path, Path):
        typed = (text for word in sys.argv[1:] for text in (word, word.partition("=")[2]))
        spelled = next((text for text in typed if text and Path(text) == path), str(path))  # a Path joins slashes
        if why := why_not_local(spelled):
            raise BadInput(f"{spelled}: {why}")


def explain(error: Exception, subcommand: str) -> int:
    """Print an error as one line (the traceback with --verbose) and return its exit code."""
    from robustness.errors import lacks_memory, without_memory

    code = getattr(error, "exit_code", BROKEN)
    message = str(error)
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the next Ctrl-C would cut off the line that this one asked for
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in OURS:
        message, code = f"{error.name} is not installed; pip install 'dfmcl[{EXTRAS.get(subcommand, 'train')}]'", 2
    elif lacks_memory(error):
        message, code = f"{subcommand}: {without_memory(message)}", 2
    elif isinstance(error, OSError) and not hasattr(error, "exit_code"):
        message = f"{error.filename or subcommand}: {error.strerror or error}"
    elif not hasattr(error, "exit_code"):
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"internal error: {type(error).__name__}: {message} ({Path(where.filename).name}:{where.lineno})"
        message += "; run again with --verbose and report it"
    if "--verbose" in sys.argv:
        traceback.print_exception(error)
    warn(" ".join(message.split()))
    return int(code)


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """A progress bar on a terminal; elsewhere a line every ten seconds."""
    if not sys.stderr.isatty():
        shown = time.monotonic()
        for number, item in enumerate(items):
            if time.monotonic() - shown > 10:
                print(f"{label}: {number} of {total or '?'}", file=sys.stderr, flush=True)
                shown = time.monotonic()
            yield item
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(items, total=total, description=label)


def raising(error: BaseException) -> Callable[[int, object], None]:
    """A signal handler that raises this error, but not again at once: many presses of Ctrl-C would cut off the clearing
    up, and the line that says what is kept."""
    last = float("-inf")

    def handle(_number: int, _frame: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > CLEARING_SECONDS:
            last = now
            raise error

    return handle


def stop_on_signals(first: str = "") -> threading.Event:
    """An event that SIGINT and SIGTERM set, so that work ends at its next boundary; a second signal kills.

    first: a line for the first signal, of work that saves its state; its second one is a KeyboardInterrupt.
    """
    stop, interrupt = threading.Event(), raising(KeyboardInterrupt())

    def handle(number: int, frame: object) -> None:
        if first and stop.is_set():
            interrupt(number, frame)
            return
        stop.set()
        if not first:
            signal.signal(number, signal.SIG_DFL)
        elif os.environ.get("RANK", "0") == "0":
            begin = "\n" if sys.stderr.isatty() else ""  # below the progress bar
            with suppress(OSError):
                os.write(2, f"{begin}dfmcl: {first}\n".encode())  # print() may be what the signal interrupted

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop


def say(line: str) -> None:
    """Print one line at once, also into a pipe; a name or a reason in it, even a stranger's, starts no other."""
    from robustness.text import printable

    print(printable(line), flush=True)


def say_page(text: str) -> None:
    """Print lines of ours, with what others wrote in them."""
    from robustness.text import printable

    print(printable(text, keep="\n"), flush=True)


def warn(line: str) -> None:
    """Say one line on stderr."""
    from robustness.text import printable

    print(f"dfmcl: {printable(line)}", file=sys.stderr, flush=True)


def say_json(line: str) -> None:
    """The same for machines: an object with the time (UTC) and the line."""
    import json

    say(json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "message": line.strip()}))


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")] = False,
) -> None:
    """`--verbose` is taken from anywhere on the command line, see main()."""


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
) -> None:
    """Train a classifier; writes checkpoint, manifest and metrics. Several GPUs: torchrun -m training.train ..."""
    from training.config import load_config

    parsed = load_config(config, overrides)  # before torch loads: a wrong key is answered at once

    from training.limits import Limits
    from training.train import train as run_training

    manifest = run_training(
        parsed,
        out,
        resume=resume,
        limits=Limits.of(stop_on_signals(STOPPING), max_minutes),
        compact=compact_state,
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
    from robustness.errors import BadInput
    from training.campaign import only_writer, read_records, run_campaign, write_tables
    from training.limits import Limits
    from training.plan import load_campaign, runs

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
    from robustness.config import shipped
    from training.config import PRESETS

    for name, text in shipped(PRESETS).items():
        say(f"{name:22} {text.splitlines()[0].lstrip('# ')}")


@command
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    threat: Annotated[
        list[str] | None, typer.Option(help="8/255 (Linf) or l2:0.5; repeatable. Default: the run's beta.")
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="fgsm, pgd-20, pgd-50x5, margin-pgd-20, cw-l2, ...; repeatable.")
    ] = None,
    suite: Annotated[
        str, typer.Option(help="fast or standard instead of --attack: each attack on what those before it left.")
    ] = "",
    surrogate: Annotated[Path | None, typer.Option(help="A run to craft transfer attacks on.")] = None,
    images: Annotated[int, typer.Option(min=0, help="How many test images; 0 means all.")] = 0,
    data_path: Annotated[str, typer.Option(help="Where the run's data set lies now.")] = "",
    device: Annotated[str, typer.Option(help="Such as cpu or cuda. Default: the GPU, where there is one.")] = "",
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Write the record here (JSON).")] = None,
) -> None:
    """Measure a run's accuracy under attack on test images."""
    from robustness.attacks import Attack
    from robustness.data import load_dataset
    from robustness.errors import BadInput
    from robustness.files import dump_json, only_writer, write_text
    from robustness.runs import load_run, parse_device
    from robustness.suite import FORMAT, measure, parse_threat, record

    if suite and attack:
        raise BadInput(f"--suite {suite}: brings its own attacks; leave --attack out")
    attacks = [planned.name for planned in Attack.parse_suite(suite)] if suite else attack or ()
    where = parse_device(device)
    with nullcontext() if out is None else only_writer(out, FORMAT):  # asked before the attacks, not after
        trained = load_run(run, where)
        source = load_run(surrogate, where) if surrogate else None
        threats = [parse_threat(text) for text in threat or [trained.manifest["config"]["curriculum"]["beta"]]]
        entry = trained.data
        data = load_dataset(entry["name"], data_path or entry["path"], entry["image_size"], track)
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
        for evaluation in evaluations:
            transfer = "transfer " if evaluation.about["kind"] == "transfer" else ""
            for result in evaluation.attacks:
                say(f"  {f'{transfer}{result.name}, {evaluation.threat}':34} {result.accuracy}")
            if len(evaluation.attacks) > 1:
                say(f"  {f'worst case, {evaluation.threat}':34} {evaluation.robust}")
        if out is not None:
            write_text(out, dump_json(record(trained, data, evaluations)))
            say(f"record: {out}")


@command
def pack(
    runs: Annotated[list[Path], typer.Argument(help="Directories of finished runs.")],
    out: Annotated[Path, typer.Option(help="The surrogates' directory; each run goes into OUT/NAME.")],
) -> None:
    """Pack runs as surrogates to ship: float16 weights, no local paths."""
    from robustness.errors import BadInput
    from training.pack import pack as run_pack

    names = [run.resolve().name for run in runs]
    if out.resolve() == Path(out.resolve().anchor):
        raise BadInput(f"--out {out}: is the root of all files; name a directory in it")
    if len(set(names)) < len(names):
        raise BadInput(f"runs {', '.join(names)}: two have the same name; rename a directory")
    for run, name in zip(runs, names, strict=True):
        manifest = run_pack(run, out / name)
        say(f"{out / name}: packed from {manifest['origin']['checkpoint_sha256'][:12]}")


@command
def export(
    source: Annotated[Path, typer.Argument(help="A run's directory, or an ONNX classifier of any origin.")],
    out: Annotated[Path, typer.Option(help="The candidate's directory.")],
    weights: Annotated[str | None, typer.Option(help="How a run's weights are stored: float32 or float16.")] = None,
    contract: Annotated[
        str | None, typer.Option("--input", help="What the ONNX file takes, such as 'float32 NCHW'.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="The ONNX file's classes in order, one a line.")] = None,
) -> None:
    """Freeze a run to ONNX, or wrap an ONNX file, and prove it equal to its source."""
    from serving.errors import BadInput

    foreign, names = source.is_file(), read_labels(labels)
    if foreign and (contract is None or names is None):
        raise BadInput(f"{source}: say what it takes and what it tells apart: --input 'float32 NCHW' --labels FILE")
    if foreign and weights is not None:
        raise BadInput(f"{source}: an ONNX file keeps its weights as they are; leave --weights out")
    if not foreign and (contract is not None or names is not None):
        raise BadInput(f"{source}: is no ONNX file; a run knows its --input and --labels, leave them out")

    from serving.export import export as run_export  # after the questions that need no torch
    from serving.export import wrap

    if contract is not None and names is not None:
        manifest = wrap(source, out, contract=contract, labels=names, track=track)
    else:
        manifest = run_export(source, out, weights=weights or "float32", track=track, log=say)
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
    if contract is not None and not contract.split()[0].startswith("uint8"):
        say(f"{out}: {source} is sent pixels / 255, no mean taken off; `dfmcl gate` finds out whether that is right")


@command
def gate(
    subject: Annotated[
        str, typer.Argument(help="A candidate's directory, an .onnx file, module:callable, or grpc://HOST:PORT/MODEL.")
    ],
    policy: Annotated[Path, typer.Option(help="The policy (TOML).")],
    out: Annotated[Path, typer.Option(help="Where the evidence goes.")],
    run: Annotated[
        Path | None, typer.Option(help="The run it was exported from; else gradients come from the ONNX file.")
    ] = None,
    surrogate: Annotated[
        list[Path] | None, typer.Option(help="A run to craft transfer attacks on; what they break counts; repeatable.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="report.json of the model that no_regression compares with.")
    ] = None,
    key: Annotated[list[Path] | None, typer.Option(help="Sign the evidence with this key; repeatable.")] = None,
    contract: Annotated[
        str | None, typer.Option("--input", help="What a foreign model takes, such as 'float32 NCHW 32x32x3'.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="A foreign model's classes in order, one a line. Default: the data's.")
    ] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="Most images that may be sent to an endpoint.")] = None,
) -> int:
    """Judge a model by a policy: 0 passed, 1 failed, 3 inconclusive, 4 suspect. Repeat it to go on after a cut."""
    from gating.policy import load_policy

    parsed = load_policy(policy)  # before torch loads: a wrong key is answered at once

    from gating.bar import bar
    from gating.gate import gate as run_gate
    from gating.github import publish
    from gating.markdown import markdown
    from gating.subject import open_subject
    from robustness.ranks import Ranks
    from robustness.runs import load_run

    ranks = Ranks.join()
    try:
        with ExitStack() as open_clients, bar(shown=ranks.first) as (show, watch):
            judged = open_subject(
                subject,
                run=run,
                contract=contract,
                labels=read_labels(labels),
                connect=functools.partial(connect, open_clients),
                budget=queries,
            )
            report = run_gate(
                judged,
                parsed,
                out,
                surrogates={path.resolve().name: load_run(path, ranks.device) for path in surrogate or ()},
                baseline=baseline,
                keys=key or (),
                ranks=ranks,
                track=show,
                watch=watch,
            )
        if ranks.first:
            say_page(markdown(report, details=False))
            publish(report, policy, os.environ, say)
            say(f"evidence: {out}")
    finally:
        ranks.leave()
    # torchrun makes 1, "failed", of whatever a process ends with: `dfmcl verdict` tells what the evidence says.
    return 0 if ranks.world > 1 else int(report["exit_code"])


@command
def verdict(evidence: Annotated[Path, typer.Argument(help="What a gate wrote.")]) -> int:
    """Say again what a gate found, and end with its exit code."""
    from gating.attestation import read_evidence
    from gating.markdown import markdown

    report, _ = read_evidence(evidence)
    say_page(markdown(report, details=False))
    return int(report["exit_code"])


def connect(clients: ExitStack, url: str, model: str) -> tuple[Any, Callable[[Any], Any]]:
    """A live endpoint as the gate asks it; its client closes with `clients`."""
    from serving.client import Client

    client = clients.enter_context(Client(url, model))
    return client.describe(), lambda images: client.predict(images).logits


def read_labels(path: Path | None) -> tuple[str, ...] | None:
    """A file's lines, None where none is named."""
    from robustness.errors import BadInput
    from robustness.reader import TEXT_BYTES, read_plain

    if path is None:
        return None
    try:
        return tuple(read_plain(path, TEXT_BYTES, named=True).decode("utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise BadInput(f"--labels {path}: not readable: {error}") from None


@command
def keygen(
    out: Annotated[Path, typer.Argument(help="Writes OUT.key, to keep secret, and OUT.pub, to hand out.")],
) -> None:
    """Make a key pair (ed25519) to sign evidence with."""
    from gating.keys import keygen as run_keygen

    say(f"{out}.key: keep it secret; {out}.pub: name it in a trust file; key id {run_keygen(out)[:12]}")


@command
def sign(
    evidence: Annotated[Path, typer.Argument(help="What a gate wrote.")],
    key: Annotated[list[Path], typer.Option(help="A private key; repeatable.")],
) -> None:
    """Sign evidence, or add a signature to the ones it has."""
    from gating.attestation import ATTESTATION, sign_evidence
    from robustness.files import clear_parts
    from robustness.locks import beside, held

    place = evidence.resolve()
    if not os.access(place.parent, os.W_OK):  # a volume of its own
        place /= ATTESTATION
    with held(beside(place), evidence):  # of two that sign at once, one signature would be lost
        clear_parts(evidence, {ATTESTATION})
        until = sign_evidence(evidence, key)
    say(f"{evidence / ATTESTATION}: signed; holds until {until:%Y-%m-%d}")


@command
def verify(
    path: Annotated[Path, typer.Argument(help="A candidate, or a model in Triton's repository, or a version of one.")],
    trust: Annotated[Path, typer.Option(help="Whose signature counts (TOML).")],
    evidence: Annotated[Path | None, typer.Option(help="A candidate's evidence; a version holds its own.")] = None,
    at: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Judge as of that day (UTC). Default: now.")
    ] = None,
) -> None:
    """Prove that exactly these bytes passed, by signatures that are trusted and still hold: 0, or 1 and why not."""
    from gating.attestation import read_attestation
    from gating.attestation import verify as run_verify
    from gating.trust import load_trust

    trusted, now = load_trust(trust), at.replace(tzinfo=UTC) if at else None
    if evidence is None:
        from serving.promotion import verify_path

        path = verify_path(path, trusted, now)
    report = run_verify(path, evidence or path, trusted, now)
    signed = read_attestation(evidence or path, trusted)
    say(f"{path}: passed on {report['created'][:10]}, {'; '.join(row['criterion'] for row in report['criteria'])}")
    say(f"signed by {', '.join(keyid[:12] for keyid in signed.signers)}; holds until {signed.expires:%Y-%m-%d}")


NAME = Annotated[str, typer.Option(help="The model's name in Triton.")]
REPOSITORY = Annotated[Path, typer.Option(help="Triton's model repository.")]
TRUST = Annotated[Path, typer.Option(help="Whose signature counts (TOML).")]
LIVE = Annotated[str | None, typer.Option(help="HOST:PORT of the gRPC endpoint: wait until it answers as gated.")]
WAIT = Annotated[float, typer.Option(help="Seconds to wait for that.", min=0.1)]


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
    live: LIVE = None,
    wait: WAIT = 120,
) -> None:
    """Bring a candidate that passed, and whose evidence is signed, into the model repository as a new version."""
    from gating.trust import load_trust
    from serving.promotion import promote as run_promote

    promoted = run_promote(
        candidate, evidence, repository, name=name, trust=load_trust(trust), threads=threads, shadow=shadow
    )
    say(f"{promoted.path}: {promoted.model} version {promoted.version}, model.onnx {promoted.sha256[:12]}")
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
    from gating.trust import load_trust
    from serving.promotion import rollback as run_rollback

    promoted = run_rollback(repository, name, trust=load_trust(trust), version=version, reason=reason)
    say(f"{promoted.path}: {promoted.model} is back at version {promoted.version}, model.onnx {promoted.sha256[:12]}")
    await_live(promoted, live, wait)


def await_live(promoted: Any, url: str | None, seconds: float) -> None:
    """Wait until an endpoint answers with a version; at once where none is named."""
    from serving.client import Client
    from serving.supervisor import wait_until_live

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

    from gating.trust import load_trust
    from serving.status import standings

    found = standings(repository, None if trust is None else load_trust(trust))
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
    damage = history_damage(repository)
    if not found:
        (warn if as_json else say)(f"{repository}: holds no promoted model; `dfmcl promote` adds one")
    return int(damage or not found or any(row.trouble or row.doubt for row in found))


def history_damage(repository: Path) -> bool:
    """Warn of each line of the history that cannot be read; whether there is one."""
    from serving.ledger import read_lines
    from serving.repository import HISTORY, MEND

    _, damaged = read_lines(repository)
    for number, why in damaged:
        warn(f"{repository / HISTORY}: line {number}: {why}; {MEND}")
    return bool(damaged)


@command
def history(repository: REPOSITORY, name: Annotated[str | None, typer.Option(help="One model only.")] = None) -> int:
    """Every change of what a repository serves, oldest first: 0, or 1 where there is none or a line is damaged."""
    from serving.ledger import read_lines
    from serving.promotion import require_repository

    require_repository(repository)
    changes = [change for change in read_lines(repository)[0] if name in (None, change.model)]
    for change in changes:
        served = None if change.event == "failed" else change.version
        version = "nothing" if served is None else f"version {served}"
        before = "" if change.before is None else f", before {change.before}"
        why = f"; {change.reason}" if change.reason else ""
        say(f"{change.time}  {change.model}  {change.event}  {version}{before}, by {change.actor}{why}")
    damage = history_damage(repository)
    if not changes:
        say(f"{repository}: no change{f' of {name}' if name else ''} was ever written down; `dfmcl promote` makes one")
    return int(damage or not changes)


@command
def repair(
    repository: REPOSITORY,
    trust: TRUST,
    name: Annotated[str | None, typer.Option(help="One model only. Default: all.")] = None,
) -> int:
    """Serve what verifies, whichever file was damaged, emptied or removed: 0, or 1 where a model stays unserved."""
    from gating.trust import load_trust
    from serving.repair import repair as run_repair

    found = run_repair(repository, load_trust(trust), name=name)
    for row in found:
        say(f"{row.about}: {row.said}")
    if not found:
        say(f"{repository}: holds no promoted model; `dfmcl promote` adds one")
    return int(not found or not all(row.whole for row in found))


@command
def prune(
    repository: REPOSITORY,
    name: NAME,
    keep: Annotated[int, typer.Option(min=1, help="So many of the newest stay, and what serves or served last.")] = 3,
) -> None:
    """Remove old versions of a model; their numbers stay taken."""
    from serving.promotion import prune as run_prune

    removed = run_prune(repository, name, keep=keep)
    say(f"{name}: removed {', '.join(f'version {number}' for number in removed) or 'nothing'}")


@command
def retire(
    repository: REPOSITORY, name: NAME, reason: Annotated[str, typer.Option(help="For the history.")] = ""
) -> None:
    """Take a model out of service, all its versions with it."""
    from serving.promotion import retire as run_retire

    run_retire(repository, name, reason=reason)
    say(f"{name}: retired")


@command
def parity(
    version: Annotated[Path, typer.Argument(help="A promoted version, such as models/digits/1.")],
) -> int:
    """Compare every execution provider and precision present with what the gate recorded: 0, or 1 where one differs."""
    from serving.parity import compare

    equal = True
    for row in compare(version):
        equal = equal and row.equal
        found = row.trouble or (
            f"logits off by {row.difference:.1e}, labels equal on {100 * row.clean_agreement:.1f} % of clean and"
            f" {100 * row.adversarial_agreement:.1f} % of adversarial images, {100 * row.held:.1f} % of those right"
        )
        say(f"{'equal' if row.equal else 'DIFFERS'}  {row.provider}, {row.setting}: {found}")
    return int(not equal)


@command
def card(
    run: Annotated[Path, typer.Argument(help="The run that the served version was exported from.")],
    repository: Annotated[Path, typer.Option(help="Triton's model repository.")],
    name: Annotated[str, typer.Option(help="The model's name in Triton.")],
    evaluation: Annotated[Path | None, typer.Option(help="A record of the run by `dfmcl evaluate --out`.")] = None,
) -> None:
    """Write the model card of what is served: README.md, all figures from run and evidence."""
    from serving.card import write_card

    say(f"{write_card(run, repository, name, evaluation)}: written")


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
    from gating.trust import follow_trust
    from serving.docker import docker_command
    from serving.supervisor import serve as run_server

    if print_docker:
        say_page(docker_command(repository, {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}, gpu=gpu))
        return 0
    tell = say_json if json_lines else say
    return run_server(
        repository,
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
def gateway(
    config: Annotated[Path, typer.Option(help="The gateway's configuration (TOML).")],
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of listen.port; 0 picks one.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="JSON with the URL, there while a Triton answers.")] = None,
) -> int:
    """Answer HTTP with what Triton computes: images in, labels out, keys, limits, metrics; until SIGTERM or Ctrl-C."""
    from serving.gateway import serve as run_gateway
    from serving.gateway_config import load_config

    return run_gateway(load_config(config), stop=stop_on_signals(), port=port, ready_file=ready_file, source=config)


@command
def apikey(name: Annotated[str, typer.Argument(help="Whose key it is; it stands in logs.")]) -> None:
    """Make an API key for the gateway: the key, shown only now, and the table that lets it in."""
    from serving.gateway_config import new_key

    key, table = new_key(name)
    say_page(f"{key}\n\n{table}")


@command
def watch(
    config: Annotated[Path, typer.Option(help="The sidecar's configuration (TOML).")],
    rounds: Annotated[int | None, typer.Option(min=1, help="Stop after so many rounds.")] = None,
) -> int:
    """Attack the live endpoint round after round and export what is found to Prometheus."""
    from monitoring.config import load_config
    from monitoring.sidecar import watch as run_watch

    settings = load_config(config)
    os.nice(NICE)
    return run_watch(settings, rounds=rounds, stop=stop_on_signals(), log=say, track=track)


@command
def craft(
    config: Annotated[Path, typer.Option(help="The sidecar's configuration (TOML); probe.crafted says where to.")],
    device: Annotated[str, typer.Option(help="Such as cpu or cuda. Default: the GPU, where there is one.")] = "",
) -> None:
    """Craft the adversarial images of a watch's whole pool beforehand, so that its rounds only ask."""
    from monitoring.config import load_config
    from monitoring.crafted import Recipe, craft_pool
    from robustness.errors import BadInput
    from robustness.runs import parse_device

    settings, on = load_config(config), parse_device(device)
    if not settings.probe.crafted:
        raise BadInput(f"{config}: probe.crafted is not set; name the directory to write to")
    os.nice(NICE)
    recipe = Recipe.of(settings, track)
    if recipe.remark:
        say(recipe.remark)
    craft_pool(recipe, Path(settings.probe.crafted), device=on, track=track)
    attacks = ", ".join(settings.probe.attacks)
    say(f"{settings.probe.crafted}: {len(recipe.pool.images)} images under {attacks}; crafted on {on}")


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
    from serving.capacity import MEASURED, Load, Replica, measured_images_per_second, table
    from serving.capacity import capacity as plan

    speed = images_per_second_per_replica or measured_images_per_second(MEASURED)
    replica = Replica(speed, utilisation, ready_seconds, hourly)
    loads = [Load(requests, images_per_request, probe_images_per_second) for requests in requests_per_second]
    say_page(table(plan(load, replica) for load in loads))
    say_page(f"\nA replica answers {speed:,.0f} images a second; {1e6 / speed:,.0f} s of one for a million images.")


def main() -> None:
    """Entry point of the console command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks ends nothing
    arguments = sorted(sys.argv[1:], key=lambda argument: argument != "--verbose")  # stable: only --verbose moves
    signal.signal(signal.SIGTERM, raising(SystemExit(128 + signal.SIGTERM)))  # unwinds, so that staging is cleared
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # else a shell wants it ignored
        signal.signal(signal.SIGINT, raising(KeyboardInterrupt()))
    try:
        raise SystemExit(app(arguments or ["--help"], prog_name="dfmcl", standalone_mode=False))
    except Exception as error:  # typer's usage errors have no public class in common
        if not hasattr(error, "format_message"):
            raise
        warn(f"{' '.join(error.format_message().split()).rstrip('.')}; see dfmcl --help")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
