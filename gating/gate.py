"""From a model to signed-off evidence: attack it as its users will meet it, until the claims are decided.

The images come in an order that depends on model, data and policy alone; blocks of them are attacked until every claim
is met, one is missed, or no more may be attacked. Several processes (torchrun) share the blocks; nothing in the result
depends on how many there are, nor on how often the gate was interrupted.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gating.attestation import ATTESTATION, PROBES, sign
from gating.baseline import Baseline, compare
from gating.block import Block, Plan, Source, attack_block, joined_outcomes
from gating.derivation import Record, wild
from gating.formats import FILES, write_formats
from gating.keys import read_signer
from gating.order import Draw, Matter, order_of
from gating.pairs import Pairs
from gating.policy import NO_REGRESSION, Policy
from gating.probes import as_npz
from gating.report import REPORT, build_report
from gating.state import State, secret_of
from gating.subject import Subject
from gating.verdict import Claim, Judgement, Standing, claims, one_look
from robustness import checks
from robustness.attacks import Attack
from robustness.conventions import IMAGES as FIRST
from robustness.conventions import mismatch
from robustness.data import Bytes, Dataset, Labels, load_dataset
from robustness.diagnosis import Background
from robustness.errors import BadInput, Broken
from robustness.evaluate import Outcome, evaluate
from robustness.files import dump_json, require_place, sha256_of, whole_directory
from robustness.gradients import IMAGES as GRADIENT_IMAGES
from robustness.gradients import AttackPass, attack_pass
from robustness.memory import copies, repeated
from robustness.models import device_of, to_float
from robustness.progress import Track, silent
from robustness.provenance import now, provenance
from robustness.ranks import Ranks
from robustness.records import Evaluation, joined
from robustness.runs import Run
from robustness.statistics import Flags
from robustness.substitute import Learnt, learnt
from robustness.transfer import ensemble, ensemble_sha256

SUBSTITUTE = "substitute"
RECALLED = 128  # answers that are asked for again at the end, half of them about attacked images
TRAINING = 512  # training images that a model must know as well as these
OTHERS = 2  # networks whose fooling images segments lead to: the last, which are all surrogates and the substitute
LARGEST = 1025
EVIDENCE = (REPORT, PROBES, ATTESTATION, *FILES)


@dataclass(frozen=True)
class Progress:
    """Where a gate stands. expected: images after which it will probably be decided; seconds: spent on attacks."""

    images: int
    expected: int
    seconds: float
    judgements: tuple[Judgement, ...]


def unwatched(progress: Progress) -> None:
    """Shows nothing."""


def gate(
    subject: Subject,
    policy: Policy,
    out: Path,
    *,
    surrogates: Mapping[str, Run] | None = None,
    baseline: Path | None = None,
    keys: Sequence[Path] = (),
    ranks: Ranks | None = None,
    track: Track = silent,
    watch: Callable[[Progress], None] = unwatched,
) -> dict[str, Any]:
    """Judge `subject` by `policy`, write the evidence to `out`, and return the report.

    surrogates: by name, to record how much holds against images crafted on them. baseline: report.json of an earlier
    model, for `no_regression`. keys: sign the evidence with each; the first draws the order.
    An interrupted gate goes on where it was, if it is told the same again.
    """
    started = time.perf_counter()
    ranks = ranks or Ranks.alone()
    signers = [read_signer(key) for key in keys]  # a key that cannot sign is found out before the attacks, not after
    require_place(out, EVIDENCE)
    require_kind(subject, policy)
    suite, no_gradients = suite_of(subject, policy)
    carried = carried_of(subject, policy, surrogates or {})
    data = load_dataset(policy.data.name, policy.data.path, policy.data.image_size, track)
    require_fit(subject, data, policy)
    earlier = Baseline.read(baseline, policy, data.sha256, len(data.x_test)) if baseline else None
    if earlier is None and any(criterion.metric == NO_REGRESSION for criterion in policy.parsed_criteria):
        raise BadInput(f"criterion {NO_REGRESSION}: needs --baseline, the report.json of the model to compare with")
    found = claims(
        [criterion for criterion in policy.parsed_criteria if criterion.metric != NO_REGRESSION],
        data.classes,
        data.y_test,
    )
    matter = Matter(subject.digest, data.sha256, policy.digest, len(data.x_test))
    draw = Draw.by(signers[0], matter) if signers else None
    order = order_of(matter, draw)
    cap = policy.data.images or len(order)
    require_answers(subject, data.x_test[order[:FIRST]], data.y_test[order[:FIRST]])
    climbed = climbed_by(subject, data.x_test[order], ranks)
    grid = subject.contract.dtype == "uint8"
    plan = Plan(climbed, subject.decide, policy.threats(grid), suite, grid, policy.seed)
    identity = {
        "subject": subject.digest,
        "run": str(subject.run.get("checkpoint_sha256", "")),
        "data": data.sha256,
        "policy": policy.digest,
        "order": hashlib.sha256(order.tobytes()).hexdigest(),
        "attacks": hashlib.sha256(repr([(a.name, dict(a.parameters)) for a in suite]).encode()).hexdigest(),
        "baseline": earlier.report_sha256 if earlier else "",
        "surrogates": ensemble_sha256([surrogate.origin_sha256 for surrogate in (surrogates or {}).values()]),
        "revision": provenance()["code"]["revision"],
        **{f"version of {name}": version for name, version in provenance()["versions"].items()},
    }
    with State.at(out, identity, secret_of(keys), ranks) as state:
        sources, remarks = sources_of(subject, policy, carried, surrogates or {}, data, state, ranks, track)
        plan = replace(plan, sources=sources, remarks=remarks)
        work = Work(plan, data, state, ranks, track)
        standings, blocks = run(work, found, order[:cap], policy, watch)
        outcomes = joined_outcomes(blocks)
        index = order[: len(outcomes[0].adversarial)]
        judgements = [standing_judgement(standing, policy) for standing in standings]
        comparison = None
        if earlier is not None:
            missed = any(judgement.outcome == "missed" for judgement in judgements)
            comparison = compared(work, earlier, index, outcomes, policy, skip=missed)
        if ranks.first:
            main = outcomes[plan.place(policy.parsed_threat)]
            images, labels = data.x_test[index], data.y_test[index]
            transfer = transferred(subject, policy, carried, surrogates or {}, images, labels, track)
            more = order[len(index) : policy.attacks.transfer_images]
            recorded = transfer
            if surrogates and len(more):
                others = data.x_test[more], data.y_test[more]
                rest = transferred(subject, policy, carried, surrogates, *others, track)
                recorded = [joined(pair) for pair in zip(transfer, rest, strict=True)]
            looked = order[: policy.checks.images]
            results = checks.diagnose(
                subject.model,
                subject.decide,
                data.x_test[looked],
                data.y_test[looked],
                main.evaluation.threat,
                grid=plan.grid,
                seed=policy.seed,
                evaluation=main.evaluation,
                transfer=transfer,
                about={
                    "run": subject.run,
                    "data": {
                        **data.describe(),
                        "part": "test",
                        "in_training": repeated(images, data.x_train),
                        "copies": copies(images),
                    },
                },
                background=background_of(subject, sources, data, main, images, ranks),
                track=track,
            )
            with whole_directory(out, names=EVIDENCE) as staged:
                arrays = probes(images, labels, main)
                (staged / PROBES).write_bytes(as_npz(arrays))
                report = build_report(
                    Record(
                        policy=policy,
                        policy_sha256=policy.digest,
                        data_sha256=data.sha256,
                        model_sha256=subject.digest,
                        grid=grid,
                        population=len(order),
                        classes=data.classes,
                        class_images=np.bincount(data.y_test, minlength=len(data.classes)).tolist(),
                        labels=labels,
                        evaluations=[outcome.evaluation for outcome in outcomes],
                        transfer=recorded,
                        checks=[result.to_json() for result in results],
                        pairs=comparison,
                        no_gradients=no_gradients,
                        not_finite=wild(arrays),
                        draw=draw,
                    ),
                    subject=subject_entry(subject),
                    run={key: value for key, value in subject.run.items() if key == "checkpoint_sha256"},
                    data={**data.describe(), "part": "test", "images": len(data.x_test), "classes": list(data.classes)},
                    files={PROBES: sha256_of(staged / PROBES)},
                    provenance={
                        **provenance(),
                        "processes": ranks.world,
                        "seconds": time.perf_counter() - started,
                    },
                    created=now(),
                )
                write_formats(report, arrays, staged)
                (staged / REPORT).write_text(dump_json(report), encoding="utf-8")
                if keys:
                    signed = sign(report, sha256_of(staged / REPORT), keys, expires_days=policy.valid_days)
                    (staged / ATTESTATION).write_text(signed, encoding="utf-8")
        report = ranks.gather(report if ranks.first else {})[0]
        state.done()
    return report


@dataclass(frozen=True)
class Work:
    """What attacking a block takes, wherever its images come from."""

    plan: Plan
    data: Dataset
    state: State
    ranks: Ranks
    track: Track

    def rounds(self, order: NDArray[np.int64], purpose: str, size: int) -> Iterator[list[Block]]:
        """Blocks of `size` images of the order, as many at a time as there are processes; each block is saved."""
        parts = [order[begin : begin + size] for begin in range(0, len(order), size)]
        for begin in range(0, len(parts), self.ranks.world):
            mine = begin + self.ranks.rank
            block = self._block(parts[mine], purpose, mine) if mine < len(parts) else None
            yield [found for found in self.ranks.gather(block) if found is not None]

    def _block(self, index: NDArray[np.int64], purpose: str, number: int) -> Block:
        done = self.state.load(purpose, number)
        if done is not None:
            return Block.from_bytes(done)
        plan = Plan(**{**vars(self.plan), "purpose": purpose})
        block = attack_block(plan, self.data.x_test[index], self.data.y_test[index], number, self.track)
        self.state.save(purpose, number, block.to_bytes())
        return block


def run(
    work: Work, found: Sequence[Claim], order: NDArray[np.int64], policy: Policy, watch: Callable[[Progress], None]
) -> tuple[list[Standing], list[Block]]:
    """Attack block after block until the claims are decided: standings, and the blocks that count."""
    labels = work.data.y_test
    among = len(found) + sum(criterion.metric == NO_REGRESSION for criterion in policy.parsed_criteria)
    standings = [Standing.begin(claim, among) for claim in found]
    places = {claim.criterion: work.plan.place(policy.threat_of(claim.criterion)) for claim in found}
    blocks: list[Block] = []
    seen, begun = 0, time.perf_counter()
    watch(Progress(0, len(order), 0.0, tuple(standing.judgement for standing in standings)))
    for arrived in work.rounds(order, "block", policy.attacks.block):
        for block in arrived:
            size = len(block.outcomes[0].adversarial)
            own = labels[order[seen : seen + size]]
            standings = [
                standing.after(outcomes_of(standing.claim, block, own, places[standing.claim.criterion]))
                for standing in standings
            ]
            blocks.append(block)
            seen += size
            judgements = tuple(standing_judgement(standing, policy) for standing in standings)
            if settled(judgements, policy):
                break
        needed = len(order) if policy.statistics == "fixed" else expected(judgements, seen, len(order))
        watch(Progress(seen, needed, time.perf_counter() - begun, judgements))
        if settled(judgements, policy):
            break
    return standings, blocks


def settled(judgements: Sequence[Judgement], policy: Policy) -> bool:
    """Whether more images can change nothing. One look is one look: `fixed` statistics never stop early."""
    if policy.statistics == "fixed":
        return False
    outcomes = [judgement.outcome for judgement in judgements]
    return "missed" in outcomes or "open" not in outcomes


def standing_judgement(standing: Standing, policy: Policy) -> Judgement:
    """By the statistics that the policy asks for."""
    if policy.statistics == "sequential":
        return standing.judgement
    return one_look(standing.claim, standing.lower.outcomes, standing.among)


def outcomes_of(claim: Claim, block: Block, labels: Labels, place: int) -> Flags:
    """What a block's images, with their labels `(N,)`, say about a claim: `(M,)` of its own class, or all.

    place: of the outcome at the claim's radius.
    """
    evaluation = block.outcomes[place].evaluation
    flags = np.array(evaluation.robust_images if claim.criterion.robust else evaluation.correct)
    return flags if claim.class_index is None else flags[labels == claim.class_index]


def expected(judgements: Sequence[Judgement], seen: int, most: int) -> int:
    """Images after which all claims are probably decided, if the shares stay what they are; at most `most`.

    Wald's mean for a test that knows the share, log(1 / alpha) over the divergence from the threshold, and a third.
    """
    needed = float(seen)
    for judgement in judgements:
        if judgement.outcome == "open" and judgement.share.n:
            share = (judgement.share.k + 1) / (judgement.share.n + 2)
            threshold = min(max(judgement.criterion.threshold, 1e-3), 1 - 1e-3)
            divergence = share * np.log(share / threshold) + (1 - share) * np.log((1 - share) / (1 - threshold))
            own = 1.33 * np.log(1 / (1 - judgement.criterion.confidence)) / max(divergence, 1e-6)
            needed = max(needed, own * seen / judgement.share.n)
    return int(min(max(needed, seen), most))


def compared(
    work: Work,
    earlier: Baseline,
    index: NDArray[np.int64],
    outcomes: Sequence[Outcome],
    policy: Policy,
    *,
    skip: bool,
) -> Pairs:
    """The candidate on the baseline's images; those not attacked yet are attacked now, unless it failed already."""
    eps = work.plan.place(policy.parsed_threat)
    held = dict(zip(index.tolist(), outcomes[eps].evaluation.robust_images, strict=True))
    rest = np.array([i for i in earlier.index if i not in held], dtype=np.int64)
    if not skip and len(rest):
        found: list[bool] = []
        for arrived in work.rounds(rest, "baseline", policy.attacks.block):
            for block in arrived:
                found += block.outcomes[eps].evaluation.robust_images
        held |= dict(zip(rest.tolist(), found, strict=True))
    return compare(earlier, held)


def require_kind(subject: Subject, policy: Policy) -> None:
    """BadInput where the policy does not judge models of this kind."""
    if subject.kind not in policy.subjects:
        raise BadInput(
            f"{subject.name}: is of kind {subject.kind}, the policy judges {', '.join(policy.subjects)} (subjects)"
        )


def sources_of(
    subject: Subject,
    policy: Policy,
    carried: tuple[Attack, ...],
    surrogates: Mapping[str, Run],
    data: Dataset,
    state: State,
    ranks: Ranks,
    track: Track,
) -> tuple[tuple[Source, ...], dict[str, str]]:
    """The other networks that attacks are crafted on, and what the record says of the gate's own substitute."""
    found = [Source(name, surrogate.model, carried) for name, surrogate in surrogates.items()]
    if len(surrogates) > 1:
        together = ensemble([surrogate.model for surrogate in surrogates.values()])
        found.append(Source("+".join(surrogates), together, carried))
    if not policy.attacks.substitute:
        return tuple(found), {"substitute": "none: the policy asks for none"}
    if subject.kind == "endpoint":
        return tuple(found), {"substitute": "none: an endpoint's queries are the attacks'"}
    made = substitute_of(subject, policy, data, state, ranks, track)
    said = f"learnt from {made.answers} answers, agrees with {100 * made.agreement:.1f} % of them"
    return (*found, Source(SUBSTITUTE, made.model, carried)), {"substitute": said}


def substitute_of(subject: Subject, policy: Policy, data: Dataset, state: State, ranks: Ranks, track: Track) -> Learnt:
    """Learnt by the first process, and by none after an interruption: all attack with the same one."""
    if ranks.first and state.load(SUBSTITUTE, 0) is None:
        # Not the judged images, where there are others: the order of those must not decide what they are attacked with.
        images = data.x_train if len(data.x_train) else data.x_test
        made = learnt(
            subject.decide,
            images,
            policy.parsed_threat,
            answers=policy.attacks.substitute,
            seed=policy.seed,
            device=ranks.device,
            track=track,
        )
        state.save(SUBSTITUTE, 0, made.to_bytes())
    ranks.gather(None)
    saved = state.load(SUBSTITUTE, 0)
    if saved is None:
        raise Broken(f"{state.directory}: the substitute that was saved there is gone")
    return Learnt.from_bytes(saved, ranks.device)


def background_of(
    subject: Subject, sources: Sequence[Source], data: Dataset, main: Outcome, images: Bytes, ranks: Ranks
) -> Background:
    """Whom else the checks may ask."""
    remote = subject.kind == "endpoint"
    few = RECALLED // 2
    clean = main.evaluation.correct  # an image that is wrong already was not attacked: asked once
    asked = np.concatenate([images[:few], main.adversarial[:few][np.array(clean[:few])]])
    attacked = main.adversarial_logits[:few][np.array(clean[:few])]
    if not main.evaluation.grid and len(attacked):  # those are of points in floats, which nobody kept: asked as bytes
        again = to_float(torch.from_numpy(asked[-len(attacked) :]))
        attacked = torch.cat([subject.decide(part) for part in again.split(few)]).numpy()
    logits = np.concatenate([main.clean_logits[:few], attacked])
    return Background(
        training=None if remote or not len(data.x_train) else training_of(data),
        others={source.name: source.model for source in sources[-OTHERS:]},
        recalled=(asked, logits),
        afresh=subject.afresh if ranks.world == 1 else None,
        state=subject.state,
        largest=1 if remote else LARGEST,
    )


def training_of(data: Dataset) -> tuple[Bytes, Labels]:
    """Images and labels `(n,)`, at most TRAINING, from all over the training part, which may lie class by class."""
    count = len(data.x_train)
    chosen = np.linspace(0, count - 1, min(count, TRAINING)).round().astype(np.int64)
    return data.x_train[chosen], data.y_train[chosen]


def require_answers(subject: Subject, images: Bytes, labels: Labels) -> None:
    """BadInput where the model answers none of the first images with numbers, or was trained behind another convention.

    An endpoint is not asked: its queries are the attacks', and it says itself what it takes.
    """
    if subject.kind == "endpoint":
        return
    x = to_float(torch.from_numpy(images))
    if not subject.decide(x).isfinite().all(dim=1).any():
        raise BadInput(
            f"{subject.name}: logits are not finite for {len(x)} of {len(x)} images; look for weights that are not, for"
            " a division by zero or an overflow in it"
        )
    # In floats the artefact itself can be asked; a uint8 one by what stands in for it, where there is anything.
    stands_in = subject.contract.dtype == "uint8" and subject.model is not None
    answer = subject.model if stands_in and subject.model is not None else subject.decide
    device, bytes_only = device_of(subject.model), subject.contract.dtype == "uint8" and not stands_in
    if (found := mismatch(answer, images, labels, device=device, bytes_only=bytes_only)) is not None:
        raise BadInput(f"{subject.name}: {found}")


def suite_of(subject: Subject, policy: Policy) -> tuple[tuple[Attack, ...], str | None]:
    """The attacks that can run, and where gradients are missing, why: what these attacks find will not do to pass."""
    attacks = Attack.parse_suite(policy.attacks.suite)
    if subject.model is not None:
        return attacks, None
    named = {attack.name for attack in attacks}
    blind = [attack for attack in attacks if not attack.needs_gradients]
    blind += [attack for attack in Attack.parse_suite(policy.attacks.black_box) if attack.name not in named]
    if not blind or any(attack.needs_gradients for attack in blind):
        raise BadInput("policy attacks.black_box: needs attacks without gradients, such as square-1000")
    return tuple(blind), subject.no_gradients


def carried_of(subject: Subject, policy: Policy, surrogates: Mapping[str, Run]) -> tuple[Attack, ...]:
    """The attacks that are crafted on surrogates; BadInput where one makes no sense, or a surrogate is the subject."""
    names = policy.attacks.transfer
    if not names or len(set(names)) < len(names):
        raise BadInput(f"policy attacks.transfer: {', '.join(names) or 'none'}: name at least one, and each once")
    for surrogate in surrogates.values():
        if surrogate.origin_sha256 == subject.run.get("checkpoint_sha256"):
            raise BadInput(f"{surrogate.path}: is the judged model itself; a surrogate must be another one")
    return tuple(Attack.parse_transfer(name) for name in names)


def climbed_by(subject: Subject, images: Bytes, ranks: Ranks) -> AttackPass | None:
    """The subject's network as attacks climb it, on this process's device, proven on the first of the images."""
    if subject.model is None:
        return None
    model = subject.model.to(ranks.device)
    return attack_pass(model, to_float(torch.from_numpy(images[:GRADIENT_IMAGES])).to(ranks.device))


def require_fit(subject: Subject, data: Dataset, policy: Policy) -> None:
    """BadInput where images and model do not go together, or more images are asked for than there are."""
    contract = subject.contract
    shape = (contract.height, contract.width, contract.channels)
    names = subject.classes if isinstance(subject.classes, tuple) else data.classes
    count = len(names) if isinstance(subject.classes, tuple) else subject.classes
    where = f"policy data {policy.data.name}"
    if data.input_shape != shape:
        raise BadInput(
            f"{where}: images are {size_of(data.input_shape)}, the model takes {size_of(shape)} (height x width x"
            " channels); check data in the policy, and --input"
        )
    if count != len(data.classes):
        raise BadInput(f"{where}: has {len(data.classes)} classes, the model {count}; check data in the policy")
    for place, (ours, theirs) in enumerate(zip(data.classes, names, strict=True)):
        if ours != theirs:
            raise BadInput(
                f"{where}: class {place} is {ours!r}, the model's label {place} is {theirs!r}; bring the labels into"
                " the order of the logits, or name the data set that the model tells apart"
            )
    if policy.data.images > len(data.x_test):
        raise BadInput(
            f"policy data.images is {policy.data.images}; {policy.data.name} has {len(data.x_test)} test images"
        )


def size_of(shape: Sequence[int]) -> str:
    """`32x32x3`."""
    return "x".join(str(side) for side in shape)


def transferred(
    subject: Subject,
    policy: Policy,
    attacks: Sequence[Attack],
    surrogates: Mapping[str, Run],
    images: Bytes,
    labels: Labels,
    track: Track,
) -> list[Evaluation]:
    """What holds against images crafted on each surrogate, and on all of them as one: upper bounds, which production
    compares itself with."""
    groups = [{name: surrogate} for name, surrogate in surrogates.items()]
    found = []
    for group in [*groups, *([surrogates] if len(surrogates) > 1 else [])]:
        digest = ensemble_sha256([surrogate.origin_sha256 for surrogate in group.values()])
        outcome = evaluate(
            subject.model,
            images,
            labels,
            policy.parsed_threat,
            attacks,
            decide=subject.decide,
            source=ensemble([surrogate.model for surrogate in group.values()]),
            grid=subject.contract.dtype == "uint8",
            seed=policy.seed,
            about={"kind": "transfer", "surrogate": "+".join(group), "surrogate_sha256": digest},
            track=track,
        )
        found.append(outcome.evaluation)
    return found


def subject_entry(subject: Subject) -> dict[str, Any]:
    """What was judged, without the paths of this machine."""
    name = subject.name if subject.kind in ("module", "endpoint") else Path(subject.name).name
    return {
        "kind": subject.kind,
        "name": name,
        "model_sha256": subject.digest,
        "files": dict(subject.files),
        "input": subject.contract.to_json(),
    }


def probes(images: Bytes, labels: Labels, outcome: Outcome) -> dict[str, NDArray[Any]]:
    """Images `(N, H, W, C)` uint8, what the attacks added, labels `(N,)`, and the logits `(N, K)` that decided.

    The adversarial images are `images + change` in uint8, so modulo 256.
    """
    return {
        "images": images,
        "change": outcome.adversarial - images,
        "labels": labels,
        "clean_logits": outcome.clean_logits,
        "adversarial_logits": outcome.adversarial_logits,
    }


if __name__ == "__main__":  # `torchrun -m -- gating.gate SUBJECT ...`, also where nothing is installed
    import runpy

    sys.argv.insert(1, "gate")
    runpy.run_module("dfmcl", run_name="__main__")
