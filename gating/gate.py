"""From a model to signed-off evidence: attack it as its users will meet it, doubt what was found, write it down.

prepare -> Case; attacked -> Findings; examined -> GateRecord; write -> the evidence.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dfmcl.common.files import dump_json, require_place, sha256_of, whole_directory
from dfmcl.common.progress import Track, silent
from dfmcl.gating.block import BlockPlan, Source, joined_outcomes
from dfmcl.gating.case import Case, prepare, require_labels
from dfmcl.gating.derivation import derived
from dfmcl.gating.formats.registry import FILES, write_formats
from dfmcl.gating.kinds import KINDS
from dfmcl.gating.other_networks import sources_of, transferred
from dfmcl.gating.pairs import Pairs
from dfmcl.gating.policy import POLICY, Policy
from dfmcl.gating.record import GateRecord, other_than, wild
from dfmcl.gating.resumption import State, secret_of
from dfmcl.gating.sequence import Progress, Work, compared, run, standing_judgement, unwatched
from dfmcl.gating.signing.attestation import model_signer, sign, sign_model
from dfmcl.gating.signing.evidence import ATTESTATION, PROBES, REPORT, REPORT_FORMAT, SIGNATURE
from dfmcl.gating.signing.probes_file import as_npz, kept, kept_in
from dfmcl.gating.signing.report import CandidateEntry, CheckEntry, CodeEntry, DataEntry, InputEntry, Report, RunEntry
from dfmcl.gating.signing.signer import Signer
from dfmcl.gating.subject import Subject, decided_by
from dfmcl.robustness import checks
from dfmcl.robustness.background import Background
from dfmcl.robustness.data import Bytes, Dataset, Labels
from dfmcl.robustness.digests import Kept
from dfmcl.robustness.evaluate import Outcome
from dfmcl.robustness.gradients import IMAGES as GRADIENT_IMAGES
from dfmcl.robustness.gradients import AttackPass, attack_pass
from dfmcl.robustness.image_set import Pictures
from dfmcl.robustness.memorisation import copies, repeated
from dfmcl.robustness.models import to_float
from dfmcl.robustness.portions import answered
from dfmcl.robustness.provenance import hardware, now, revision, versions
from dfmcl.robustness.ranks import Ranks
from dfmcl.robustness.records import Evaluation, joined
from dfmcl.robustness.runs import Run

RECALLED = 128  # answers that are asked for again at the end, half of them about attacked images
TRAINING = 512  # training images that a model must know as well as these
OTHERS = 2  # networks whose fooling images segments lead to: the last, which are all surrogates and the substitute
LARGEST = 1025
EVIDENCE = (REPORT, PROBES, ATTESTATION, SIGNATURE, POLICY, *FILES)


def gate(
    subject: Subject,
    policy: Policy,
    out: Path,
    *,
    surrogates: Mapping[str, Run] | None = None,
    baseline: Path | None = None,
    signers: Sequence[Signer] = (),
    ranks: Ranks | None = None,
    kept: Kept | None = None,
    track: Track = silent,
    watch: Callable[[Progress], None] = unwatched,
) -> Report:
    """Judge `subject` by `policy`, write the evidence to `out`, and return the report.

    surrogates: by name, to record how much holds against images crafted on them.
    baseline: report.json of an earlier model, for `no_regression`.
    signers: each signs the evidence; the first draws the order, too.
    ranks: the processes that share the blocks; alone by default.
    kept: digests of the training images' files from earlier runs.
    track, watch: where progress goes.
    An interrupted gate goes on where it was, if it is told the same again.
    """
    started = time.perf_counter()
    ranks = ranks or Ranks.alone()
    require_place(out, EVIDENCE)
    case = prepare(subject, policy, surrogates or {}, baseline, signers, track, kept)
    report = None
    with State.at(out, case.identity, secret_of(signers), ranks) as state:
        found = attacked(case, state, ranks, track, watch)
        if ranks.first:
            record = examined(case, found, ranks, track)
            seconds = time.perf_counter() - started
            report = write(case, record, found.probes, out, signers, processes=ranks.world, seconds=seconds)
        report = ranks.gather(report)[0]
        state.done()
    assert report is not None  # the first process has it
    return report


@dataclass(frozen=True)
class Findings:
    """What attacks found.

    index: of the images attacked, in the order; labels: theirs.
    images: the first of them, whose pixels are kept.
    sources: other networks that were attacked.
    outcomes: one for each threat of the policy; main: the one at its own radius; others: the rest of them.
    pairs: beside the baseline, where there is one.
    """

    index: NDArray[np.int64]
    images: Bytes
    labels: Labels
    sources: tuple[Source, ...]
    outcomes: tuple[Outcome, ...]
    main: Outcome
    others: tuple[Outcome, ...]
    pairs: Pairs | None

    @cached_property
    def probes(self) -> dict[str, NDArray[Any]]:
        """Labels `(N,)`, the logits `(N, K)` that decided, of the first images the pixels `(P, H, W, C)` uint8, and
        what the attacks added to them.

        The adversarial images are `images + change` in uint8, so modulo 256. The same of the other threats, numbered,
        of as many of these images as were kept.
        """
        counts = kept_in(len(self.images), self.images.shape[1:], [one.evaluation.threat.kind for one in self.others])
        further: dict[str, NDArray[Any]] = {}
        for number, (count, one) in enumerate(zip(counts, self.others, strict=True), start=1):
            further[f"change{number}"] = one.adversarial[:count] - self.images[:count]
            further[f"adversarial_logits{number}"] = one.adversarial_logits[:count]
        return {
            "images": self.images,
            "change": self.main.adversarial[: len(self.images)] - self.images,
            "labels": self.labels,
            "clean_logits": self.main.clean_logits,
            "adversarial_logits": self.main.adversarial_logits,
            **further,
        }


def attacked(case: Case, state: State, ranks: Ranks, track: Track, watch: Callable[[Progress], None]) -> Findings:
    """Attack images in the order until every claim is decided, and then those of the baseline."""
    policy, data, decide = case.policy, case.data, case.subject.decide
    climbed = climbed_by(case.subject, data.x_test[case.order[:GRADIENT_IMAGES]], ranks)
    sources, remarks = sources_of(case, state, ranks, track)
    threats = policy.threats(case.grid)
    plan = BlockPlan(
        climbed,
        decide,
        threats,
        case.suite,
        case.grid,
        case.seed,
        sources,
        case.whole,
        remarks=remarks,
        suites=case.suites,
    )
    work = Work(plan, data, case.drawn, state, ranks, track)
    standings, blocks = run(work, case.claims, case.order[: case.cap], policy, watch)
    outcomes = joined_outcomes(blocks)
    index = case.order[: sum(block.images for block in blocks)]
    require_labels(case, index, [outcome.adversarial for outcome in outcomes])
    pairs = None
    if case.earlier is not None:
        missed = any(standing_judgement(standing, policy).outcome == "missed" for standing in standings)
        pairs = compared(work, case.earlier, index, outcomes, policy, skip=missed)
    place = policy.place(case.grid)
    main, others = outcomes[place], tuple(other_than(place, outcomes))
    images = data.x_test[index[: kept(len(index), data.input_shape)]]
    return Findings(index, images, data.y_test[index], sources, outcomes, main, others, pairs)


def examined(case: Case, found: Findings, ranks: Ranks, track: Track) -> GateRecord:
    """Ask whether the findings can be believed, and put down all that the verdict follows from."""
    transfer = recorded = transferred(case, found.index, track)
    more = case.order[len(found.index) : case.policy.attacks.transfer_images]
    if case.surrogates and len(more):
        recorded = [joined(pair) for pair in zip(transfer, transferred(case, more, track), strict=True)]
    return GateRecord(
        policy=case.policy,
        data_sha256=case.data.sha256,
        model_sha256=case.subject.digest,
        grid=case.grid,
        population=len(case.order),
        classes=case.data.classes,
        class_images=np.bincount(case.data.y_test, minlength=len(case.data.classes)).tolist(),
        labels=found.labels,
        evaluations=[outcome.evaluation for outcome in found.outcomes],
        transfer=recorded,
        checks=[CheckEntry.from_json(result.to_json()) for result in checked(case, found, transfer, ranks, track)],
        pairs=found.pairs,
        no_gradients=case.no_gradients,
        not_finite=wild(found.probes),
        draw=case.draw,
    )


def checked(
    case: Case, found: Findings, transfer: Sequence[Evaluation], ranks: Ranks, track: Track
) -> list[checks.Result]:
    """The results of all checks."""
    about = {
        "run": case.subject.run,
        "data": {
            **case.data.describe(),
            "part": "test",
            "in_training": in_training(case.data, found.index),
            "copies": copies(case.data.x_test, found.index),
        },
    }
    return checks.diagnose(
        case.subject.model,
        case.subject.decide,
        *case.test(case.order[: case.policy.checks.images]),
        found.main.evaluation.threat,
        grid=case.grid,
        seed=case.seed,
        evaluation=found.main.evaluation,
        transfer=transfer,
        about=about,
        background=background_of(case, found, ranks),
        track=track,
    )


def write(
    case: Case,
    record: GateRecord,
    arrays: Mapping[str, NDArray[Any]],
    out: Path,
    signers: Sequence[Signer],
    *,
    processes: int,
    seconds: float,
) -> Report:
    """Write the evidence, whole or not at all, and return the report.

    record: all that the verdict follows from.
    arrays: the probes.
    signers: each signs.
    processes: that shared its blocks; seconds: that they took.
    """
    subject, data = case.subject, case.data
    with whole_directory(out, names=EVIDENCE) as staged:
        (staged / PROBES).write_bytes(as_npz(arrays))
        report = Report(
            **vars(derived(record)),
            format=REPORT_FORMAT,
            checks=tuple(record.checks),
            candidate=candidate_entry(subject),
            decided=decided_by(subject.provider),
            run=RunEntry(checkpoint_sha256=subject.run.get("checkpoint_sha256")),
            data=data_entry(data),
            files={PROBES: sha256_of(staged / PROBES)},
            code=CodeEntry(revision=revision()),
            versions=versions(),
            hardware=hardware(),
            processes=processes,
            seconds=seconds,
            created=now(),
        )
        write_formats(report, arrays, staged)
        (staged / POLICY).write_text(case.policy.to_toml(), encoding="utf-8")
        (staged / REPORT).write_text(dump_json(report.to_json()), encoding="utf-8")
        if signers:
            signed = sign(report, sha256_of(staged / REPORT), signers, expires_days=case.policy.valid_days)
            (staged / ATTESTATION).write_text(signed, encoding="utf-8")
            if (signer := model_signer(report, signers)) is not None:
                sign_model(staged, signer)
    return report


def background_of(case: Case, found: Findings, ranks: Ranks) -> Background:
    """Whom else the checks may ask."""
    subject, data, main = case.subject, case.data, found.main
    remote = subject.kind == "endpoint"
    few = min(RECALLED // 2, len(found.images))
    clean = main.evaluation.correct  # an image that is wrong already was not attacked: asked once
    asked = np.concatenate([found.images[:few], main.adversarial[:few][np.array(clean[:few])]])
    attacked = main.adversarial_logits[:few][np.array(clean[:few])]
    if not main.evaluation.grid and len(attacked):  # those are of points in floats, which nobody kept: asked as bytes
        again = to_float(torch.from_numpy(asked[-len(attacked) :]))
        attacked = answered(subject.decide, again).numpy()
    logits = np.concatenate([main.clean_logits[:few], attacked])
    return Background(
        training=None if remote or not len(data.x_train) else training_of(data),
        others={source.name: source.model for source in found.sources[-OTHERS:]},
        recalled=(asked, logits),
        afresh=subject.afresh if ranks.world == 1 else None,
        state=subject.state,
        largest=1 if remote else LARGEST,
        rounds=bool(subject.twin),
    )


def in_training(data: Dataset, index: NDArray[np.int64]) -> int:
    """How many test images at `index` are training images: by their pixels, or of a folder by their files' bytes."""
    train, test = data.x_train, data.x_test
    if isinstance(train, Pictures) and isinstance(test, Pictures):
        known = set(train.digests)
        return sum(test.digests[number] in known for number in index)
    return repeated(test[index], train)


def training_of(data: Dataset) -> tuple[Bytes, Labels]:
    """Images and labels `(n,)`, at most TRAINING, from all over the training part, which may lie class by class."""
    count = len(data.x_train)
    chosen = np.linspace(0, count - 1, min(count, TRAINING)).round().astype(np.int64)
    return data.x_train[chosen], data.y_train[chosen]


def climbed_by(subject: Subject, images: Bytes, ranks: Ranks) -> AttackPass | None:
    """The subject's network as attacks climb it, on this process's device, proven on the first of the images."""
    if subject.model is None:
        return None
    model = subject.model.to(ranks.device)
    return attack_pass(model, to_float(torch.from_numpy(images)).to(ranks.device))


def candidate_entry(subject: Subject) -> CandidateEntry:
    """What was judged, without the paths of this machine."""
    name = Path(subject.name).name if KINDS[subject.kind].file else subject.name
    return CandidateEntry(
        kind=subject.kind,
        name=name,
        model_sha256=subject.digest,
        files=dict(subject.files),
        input=InputEntry.from_json(subject.contract.to_json()),
        output=subject.output or None,
        gradients=subject.twin or None,
    )


def data_entry(data: Dataset) -> DataEntry:
    """The data set whose test part was attacked."""
    about = {"part": "test", "images": len(data.x_test), "classes": list(data.classes)}
    return DataEntry.from_json({**data.describe(), **about})


if __name__ == "__main__":  # `torchrun -m -- dfmcl.gating.gate SUBJECT ...`, also where nothing is installed
    import runpy

    sys.argv.insert(1, "gate")
    runpy.run_module("dfmcl", run_name="__main__")
