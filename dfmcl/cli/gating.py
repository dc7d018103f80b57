"""From a model to a signed verdict: `dfmcl gate`, `verdict`, `keygen`, `sign`, `verify`."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfmcl.cli.arguments import (
    ARCH,
    KEY_COMMAND,
    OUTPUT,
    PREPROCESSING,
    PUBLIC,
    SUBJECT,
    VERIFY_DATA,
    path,
    read_labels,
    read_preprocessing,
    read_signers,
)
from dfmcl.cli.command import command
from dfmcl.cli.output import say, say_page, track

if TYPE_CHECKING:
    from dfmcl.gating.assumed import Assumed
    from dfmcl.gating.policy import Policy
    from dfmcl.gating.signing.attestation import Attestation
    from dfmcl.gating.signing.report import Report
    from dfmcl.robustness.contract import InputContract
    from dfmcl.robustness.provider import Provider


DATA = "A folder (classes, shards, parquet), a .csv, an .npz, digits or cifar10."
EPS = Annotated[str | None, typer.Option(help="How far pixels may be moved (Linf), such as 4/255.")]
INPUT = Annotated[
    str | None, typer.Option("--input", help="What a foreign model takes: 'float32 NCHW 224x224x3 imagenet'.")
]
THREAT = Annotated[
    str | None,
    typer.Option(help="In place of --eps, or beside it: patch:2%, rotation:15, corruptions, l2:0.5, A|B."),
]


@command
def gate(
    subject: SUBJECT,
    policy: Annotated[
        Path | None, typer.Option(help="The policy (TOML); else --data, --at-least, --eps or --threat.")
    ] = None,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    eps: EPS = None,
    threat: THREAT = None,
    at_least: Annotated[str | None, typer.Option(help="The robust accuracy to prove, such as 0.3.")] = None,
    preprocessing: PREPROCESSING = None,
    out: Annotated[Path, typer.Option(help="Where the evidence goes.")] = Path("evidence"),
    run: Annotated[Path | None, typer.Option(help="The run it came from; else gradients are the ONNX file's.")] = None,
    surrogate: Annotated[
        list[Path] | None, typer.Option(help="A run to craft transfer attacks on; what they break counts; repeatable.")
    ] = None,
    baseline: Annotated[Path | None, typer.Option(help="report.json that no_regression compares with.")] = None,
    key: Annotated[
        list[Path] | None, typer.Option(help="Sign the evidence with this key; repeatable; the first draws the order.")
    ] = None,
    key_command: KEY_COMMAND = None,
    public: PUBLIC = None,
    contract: INPUT = None,
    labels: Annotated[
        Path | None, typer.Option(help="A foreign model's classes in order, one a line. Default: the data's.")
    ] = None,
    output: OUTPUT = None,
    arch: ARCH = None,
    queries: Annotated[int | None, typer.Option(min=1, help="Most images that may be sent to an endpoint.")] = None,
    verify_data: VERIFY_DATA = False,
) -> int:
    """Judge a model by a policy: 0 passed, 1 failed, 3 inconclusive, 4 suspect. Repeat it to go on after a cut."""
    rules = rules_of(
        policy, data, eps, threat, at_least, preprocessing
    )  # before torch loads: a wrong key is answered at once
    signers = read_signers(key, key_command, public)  # one that cannot sign is found out before the attacks

    from dfmcl.gating.bar import bar
    from dfmcl.gating.formats.github import publish
    from dfmcl.gating.formats.markdown import markdown
    from dfmcl.gating.gate import gate as run_gate
    from dfmcl.gating.subjects.registry import open_subject
    from dfmcl.robustness.digests import Kept
    from dfmcl.robustness.ranks import Ranks
    from dfmcl.robustness.runs import load_run

    ranks = Ranks.join()
    try:
        with ExitStack() as open_clients, bar(shown=ranks.first) as (show, watch):
            judged = open_subject(
                subject,
                run=run,
                contract=contract,
                labels=read_labels(labels),
                output=output,
                arch=arch,
                connect=functools.partial(connect, open_clients),
                budget=queries,
                provider=provider_of(rules),
            )
            report = run_gate(
                judged,
                settled(rules, judged.contract, out, say if ranks.first else lambda line: None),
                out,
                surrogates={path.resolve().name: load_run(path, ranks.device) for path in surrogate or ()},
                baseline=baseline,
                signers=signers,
                ranks=ranks,
                kept=Kept.usual(verify=verify_data, test=False),
                track=show,
                watch=watch,
            )
        if ranks.first:
            say_page(markdown(report, details=False))
            publish(report, policy or out / "policy.toml", os.environ, say)
            say(f"evidence: {out}")
    finally:
        ranks.leave()
    # torchrun makes 1, "failed", of whatever a process ends with: `dfmcl verdict` tells what the evidence says.
    return 0 if ranks.world > 1 else report.exit_code


def rules_of(
    policy: Path | None,
    data: str | None,
    eps: str | None,
    threat: str | None,
    at_least: str | None,
    preprocessing: str | None,
) -> Policy | Assumed:
    """A policy's file, or the options in its place; BadInput for both, or for neither."""
    from dfmcl.common.errors import BadInput
    from dfmcl.gating.assumed import Assumed
    from dfmcl.gating.policy import load_policy

    asked = data, eps, threat, at_least
    if policy is None:
        return Assumed.of(*asked, read_preprocessing(preprocessing))
    names = "--data", "--eps", "--threat", "--at-least", "--preprocessing"
    if given := [name for name, value in zip(names, (*asked, preprocessing), strict=True) if value is not None]:
        raise BadInput(f"--policy {policy} says data, threat and threshold; leave {', '.join(given)} out, or --policy")
    return load_policy(policy)


def provider_of(rules: Policy | Assumed) -> Provider:
    """The execution provider that decides; the CPU's, where no policy names one."""
    import torch

    from dfmcl.common.providers import Decider
    from dfmcl.gating.policy import Policy
    from dfmcl.robustness.provider import CPU, Provider

    decider = rules.decide.decider if isinstance(rules, Policy) else Decider()
    return CPU if decider == CPU.decider else Provider.of(decider, torch.get_num_threads())


def settled(rules: Policy | Assumed, contract: InputContract, out: Path, tell: Callable[[str], None]) -> Policy:
    """The policy by which a model with this contract is judged; what was assumed is told."""
    from dfmcl.gating.policy import POLICY, Policy

    if isinstance(rules, Policy):
        return rules
    policy = rules.policy(contract)
    for line in rules.said(policy, contract, out / POLICY):
        tell(line)
    return policy


@command
def init(
    subject: Annotated[str, typer.Argument(help="A model's file or module:callable, as the pipeline will find it.")],
    data: Annotated[str, typer.Option(help=DATA)],
    at_least: Annotated[str, typer.Option(help="The robust accuracy to prove, such as 0.3.")],
    eps: EPS = None,
    threat: THREAT = None,
    preprocessing: PREPROCESSING = None,
    contract: INPUT = None,
    labels: Annotated[
        Path | None, typer.Option(help="Its classes in order, one a line. Default: the data's, written down.")
    ] = None,
    output: OUTPUT = None,
    arch: ARCH = None,
    ci: Annotated[str, typer.Option(help="Whose pipeline: github or gitlab.")] = "github",
    out: Annotated[Path, typer.Option(help="The repository's directory.")] = Path(),
) -> None:
    """Write a policy, a trust file and a pipeline for a model that answers as its labels say; nothing is attacked."""
    from dfmcl.common.errors import BadInput
    from dfmcl.gating.assumed import Assumed
    from dfmcl.gating.beginning import KEY, PIPELINES, TRUST, Shown, require_free, write, written

    asked = Assumed.of(data, eps, threat, at_least, read_preprocessing(preprocessing))
    require_free(out, ci, Shown(subject, "", output, labels))

    from dfmcl.gating.case import prepare
    from dfmcl.gating.subjects.registry import open_subject

    judged = open_subject(subject, contract=contract, labels=read_labels(labels), output=output, arch=arch)
    if judged.kind == "candidate":
        raise BadInput(f"{subject}: is a candidate; init is for the model that it was exported from")
    policy = asked.policy(judged.contract, checked=None)
    case = prepare(judged, policy, {}, None, (), track)
    shown = Shown(subject, str(judged.contract), output, labels, asked.preprocessing, judged.kind, arch)
    write(out, texts := written(shown, policy, case.data.classes, ci))
    for name in texts:
        say(f"{out / name}: written")
    say(f"next: dfmcl keygen {KEY}; commit {KEY}.pub; put the text of {KEY}.key into {ci}'s secret DFMCL_KEY")
    say(f"then {PIPELINES[ci]} blocks what misses gate.toml, and promote takes what {TRUST} trusts")


@command
def verdict(evidence: Annotated[Path, typer.Argument(help="What a gate wrote.")]) -> int:
    """Say again what a gate found, and end with its exit code."""
    from dfmcl.gating.formats.markdown import markdown
    from dfmcl.gating.signing.evidence import read_evidence

    report, _ = read_evidence(evidence)
    say_page(markdown(report, details=False))
    return report.exit_code


def connect(clients: ExitStack, url: str, model: str) -> tuple[Any, Callable[[Any], Any]]:
    """A live endpoint as the gate asks it; its client closes with `clients`."""
    from dfmcl.serving.clients.triton import Client

    client = clients.enter_context(Client(url, model))
    return client.describe(), lambda images: client.predict(images).logits


@command
def keygen(
    out: Annotated[Path, typer.Argument(help="Writes OUT.key, to keep secret, and OUT.pub, to hand out.")],
) -> None:
    """Make a key pair (ed25519) to sign evidence with."""
    from dfmcl.gating.signing.keys import keygen as run_keygen

    say(f"{out}.key: keep it secret; {out}.pub: name it in a trust file; key id {run_keygen(out)[:12]}")


@command
def sign(
    evidence: Annotated[Path, typer.Argument(help="What a gate wrote.")],
    key: Annotated[list[Path] | None, typer.Option(help="A private key; repeatable.")] = None,
    key_command: KEY_COMMAND = None,
    public: PUBLIC = None,
) -> None:
    """Sign evidence, or add a signature to the ones it has."""
    from dfmcl.common.errors import BadInput
    from dfmcl.common.files import clear_parts
    from dfmcl.common.locks import beside, held
    from dfmcl.gating.signing.attestation import sign_evidence
    from dfmcl.gating.signing.evidence import ATTESTATION, REPORT, SIGNATURE, read_report

    if not (signers := read_signers(key, key_command, public)):
        raise BadInput("name who signs: --key FILE, or --key-command CMD with --public FILE")
    place = evidence.resolve()
    if not os.access(place.parent, os.W_OK):  # a volume of its own
        place /= ATTESTATION
    with held(beside(place), evidence):  # of two that sign at once, one signature would be lost
        clear_parts(evidence, {ATTESTATION, SIGNATURE})
        until = sign_evidence(evidence, signers)
    say(f"{evidence / ATTESTATION}: signed; holds until {until:%Y-%m-%d}")
    if read_report(evidence / REPORT)[0].statistics.draw is None:
        say("no key drew the order of its images, so `drawn = true` in a trust file refuses it; gate with --key")


@command
def verify(
    path: Annotated[
        str,
        typer.Argument(parser=path, help="A candidate, or a model in Triton's repository, or a version of one."),
    ],
    trust: Annotated[Path, typer.Option(help="Whose signature counts (TOML).")],
    evidence: Annotated[Path | None, typer.Option(help="A candidate's evidence; a version holds its own.")] = None,
    at: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Judge as of that day (UTC). Default: now.")
    ] = None,
    sha256: Annotated[str | None, typer.Option(help="Of the one model.onnx that may be there, in hex.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with all that was signed; also a refusal.")] = False,
) -> None:
    """Prove that exactly these bytes passed, by signatures that are trusted and still hold: 0, or 1 and why not."""
    import json

    from dfmcl.common.errors import DfmclError

    try:
        where, report, signed = verified(path, trust, evidence, at.replace(tzinfo=UTC) if at else None)
        require_pinned(report, sha256, where)
    except DfmclError as error:
        if as_json:
            refused = {"verified": False, "fault": getattr(error, "fault", None), "reason": str(error)}
            say_page(json.dumps(refused, indent=2))
        raise
    if as_json:
        found = {
            "verified": True,
            "path": where,
            "signers": list(signed.signers),
            "expires": signed.robustness["expires"],
            "subject": signed.subject,
            "predicate": signed.robustness,
        }
        say_page(json.dumps(found, indent=2))
        return
    say(f"{where}: passed on {report.created[:10]}, {'; '.join(row.criterion for row in report.criteria)}")
    say(f"signed by {', '.join(keyid[:12] for keyid in signed.signers)}; holds until {signed.expires:%Y-%m-%d}")


def require_pinned(report: Report, sha256: str | None, where: str) -> None:
    """Refused for another model than the one that was pinned, though it passed; BadInput for what is no digest."""
    from dfmcl.common.errors import BadInput, Refused

    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise BadInput(f"--sha256 {sha256}: is no SHA-256 in lower-case hex")
    if sha256 not in (None, found := report.candidate.model_sha256):
        raise Refused(f"{where}: model.onnx is {found[:12]}..., pinned is {str(sha256)[:12]}...; change one of the two")


def verified(path: str, trust: Path, evidence: Path | None, now: datetime | None) -> tuple[str, Report, Attestation]:
    """The address of what was verified, the report that vouches for it, and what was signed."""
    from dfmcl.gating.signing.attestation import read_attestation
    from dfmcl.gating.signing.attestation import verify as run_verify
    from dfmcl.gating.signing.trust import load_trust
    from dfmcl.release.stores.registry import local_of, store_at
    from dfmcl.release.stores.store import local_folder

    store, name = store_at(path)  # an address that no store takes is told before a trust file that is not there
    trusted, here = load_trust(trust), local_of(path)
    if evidence is None:
        from dfmcl.release.verification import verify_at

        name = verify_at(store, name, trusted, now)
        path, here = store.where(name), local_folder(store, name)
    with here as folder:
        report = run_verify(folder, evidence or folder, trusted, now)
        return path, report, read_attestation(evidence or folder, trusted)
