"""A gate's case: one model, one policy and the images, checked against each other before any attack."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dfmcl.common.errors import BadInput
from dfmcl.common.progress import Track
from dfmcl.gating.baseline import Baseline
from dfmcl.gating.criterion import NO_REGRESSION
from dfmcl.gating.decide import require_decider
from dfmcl.gating.order import Draw, Matter, drawn_of, order_of, seed_of
from dfmcl.gating.policy import Policy
from dfmcl.gating.signing.signer import Signer
from dfmcl.gating.subject import Subject
from dfmcl.gating.verdict import Claim, claims
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.transfer import ensemble_sha256
from dfmcl.robustness.conventions import IMAGES as FIRST
from dfmcl.robustness.conventions import Mismatch, mismatch
from dfmcl.robustness.data import Bytes, Dataset, Labels, labelled_as, open_dataset
from dfmcl.robustness.digests import Kept
from dfmcl.robustness.models import device_of, to_float
from dfmcl.robustness.portions import answered
from dfmcl.robustness.provenance import provenance
from dfmcl.robustness.runs import Run
from dfmcl.robustness.scale import Scale
from dfmcl.robustness.statistics import Flags

FEW = 16  # images that are asked about first: one of them that is answered in numbers is enough


@dataclass(frozen=True)
class Case:
    """What a gate judges, by which rules, on which images.

    surrogates: networks of others by name.
    earlier: the baseline's images and answers, for `no_regression`.
    suite: the attacks that can run on all images; whole: those that only drawn ones meet; suites: by kind of threat,
    where the suite cannot search.
    no_gradients: why only black-box ones, None where all can.
    carried: the attacks that are crafted on other networks.
    claims: all that the criteria say about the data set, but for `no_regression`.
    matter, draw: of the order in which images are attacked.
    """

    subject: Subject
    policy: Policy
    data: Dataset
    surrogates: Mapping[str, Run]
    earlier: Baseline | None
    suite: tuple[Attack, ...]
    whole: tuple[Attack, ...]
    no_gradients: str | None
    carried: tuple[Attack, ...]
    claims: Sequence[Claim]
    matter: Matter
    draw: Draw | None
    suites: Mapping[str, tuple[Attack, ...]]

    @property
    def grid(self) -> bool:
        """Whether adversarial images count as uint8."""
        return self.subject.contract.dtype == "uint8"

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """All test images `(population,)` as they are attacked."""
        return order_of(self.matter, self.draw)

    @cached_property
    def drawn(self) -> Flags:
        """Which of the test images `(population,)`, as the data set has them, meet the whole suite."""
        return drawn_of(self.matter, self.draw, self.policy.attacks.chance)

    @property
    def seed(self) -> int:
        """Of attacks and checks: the policy's, which an author knows, and the draw, which he does not."""
        return seed_of(self.policy.seed, self.draw)

    @property
    def cap(self) -> int:
        """How many of them may be attacked."""
        return self.policy.data.images or len(self.order)

    def test(self, index: NDArray[np.int64]) -> tuple[Bytes, Labels]:
        """Images and labels of the test part at `index`."""
        return self.data.x_test[index], self.data.y_test[index]

    @property
    def identity(self) -> dict[str, str]:
        """Everything that the blocks of an interrupted gate depend on."""
        found = provenance()
        others = (attack for attacks in self.suites.values() for attack in attacks)
        suite = [(attack.name, dict(attack.parameters)) for attack in (*self.suite, *self.whole, *others)]
        return {
            "subject": self.subject.digest,
            "input": f"{self.subject.contract} {self.subject.output}".rstrip(),
            "provider": str(self.subject.provider or ""),
            "run": str(self.subject.run.get("checkpoint_sha256", "")),
            "data": self.data.sha256,
            "policy": self.policy.digest,
            "order": hashlib.sha256(self.order.tobytes()).hexdigest(),
            "attacks": hashlib.sha256(repr(suite).encode()).hexdigest(),
            "baseline": self.earlier.report_sha256 if self.earlier else "",
            "surrogates": ensemble_sha256([surrogate.origin_sha256 for surrogate in self.surrogates.values()]),
            "revision": found["code"]["revision"],
            **{f"version of {name}": version for name, version in found["versions"].items()},
        }


def prepare(
    subject: Subject,
    policy: Policy,
    surrogates: Mapping[str, Run],
    baseline: Path | None,
    signers: Sequence[Signer],
    track: Track,
    kept: Kept | None = None,
) -> Case:
    """Read what a gate needs, and refuse what does not go together: BadInput, before any attack.

    baseline: report.json of an earlier model. signers: the first draws the order.
    kept: digests of the training images' files from earlier runs.
    """
    require_kind(subject, policy)
    require_decider(subject, policy.decide)
    suite, whole, no_gradients = suite_of(subject, policy)
    suites = suites_of(policy, no_gradients is not None)
    carried = carried_of(subject, policy, surrogates)
    mode = "L" if subject.contract.channels == 1 else "RGB"
    data = open_dataset(*policy.data.named, track, mode, policy.data.preprocessing, kept)
    if isinstance(subject.classes, tuple) and {*data.classes} < {*subject.classes}:
        data = labelled_as(data, subject.classes)
    require_fit(subject, data, policy)
    criteria = policy.parsed_criteria
    grid = subject.contract.dtype == "uint8"
    earlier = Baseline.read(baseline, policy, data.sha256, len(data.x_test), grid) if baseline else None
    if earlier is None and any(criterion.metric == NO_REGRESSION for criterion in criteria):
        raise BadInput(f"criterion {NO_REGRESSION}: needs --baseline, the report.json of the model to compare with")
    shares = [one for one in criteria if one.metric != NO_REGRESSION]
    found = claims(shares, data.classes, data.y_test, drawn=bool(whole))
    matter = Matter(subject.digest, data.sha256, policy.digest, len(data.x_test))
    draw = Draw.by(signers[0], matter) if signers else None
    case = Case(
        subject, policy, data, surrogates, earlier, suite, whole, no_gradients, carried, found, matter, draw, suites
    )
    require_answers(subject, *case.test(case.order[:FIRST]))
    return case


def require_kind(subject: Subject, policy: Policy) -> None:
    """BadInput where the policy does not judge models of this kind."""
    if subject.kind not in policy.subjects:
        raise BadInput(
            f"{subject.name}: is of kind {subject.kind}, the policy judges {', '.join(policy.subjects)} (subjects)"
        )


def suite_of(subject: Subject, policy: Policy) -> tuple[tuple[Attack, ...], tuple[Attack, ...], str | None]:
    """The attacks that can run on all images, those on drawn ones, and where gradients are missing, why.

    What is found without gradients will not do to pass; there all images meet the same attacks.
    """
    if subject.model is not None:
        suite, whole = policy.attacks.phases
        return Attack.parse_suite(suite), tuple(Attack.parse(name) for name in whole), None
    attacks = Attack.parse_suite(policy.attacks.suite)
    named = {attack.name for attack in attacks}
    blind = [attack for attack in attacks if not attack.kind.gradients]
    blind += [attack for attack in Attack.parse_suite(policy.attacks.black_box) if attack.name not in named]
    if not blind or any(attack.kind.gradients for attack in blind):
        raise BadInput("policy attacks.black_box: needs attacks without gradients, such as square-1000")
    return tuple(blind), (), subject.no_gradients


def suites_of(policy: Policy, blind: bool) -> dict[str, tuple[Attack, ...]]:
    """The attacks of each kind of threat that the suite cannot search in. blind: without gradients.

    BadInput where one that is named cannot search there, or none can run.
    """
    found: dict[str, tuple[Attack, ...]] = {}
    for threat in policy.threats(grid=True):
        names = policy.attacks.by_kind(threat.kind)
        if names is None or threat.kind in found:
            continue
        attacks = Attack.parse_suite(names)
        for attack in attacks:
            try:
                attack.check(threat)
            except BadInput as error:
                raise BadInput(f"policy attacks.{threat.kind}: {error}") from None
        found[threat.kind] = tuple(attack for attack in attacks if not (blind and attack.kind.gradients))
        if not found[threat.kind]:
            raise BadInput(
                f"policy attacks.{threat.kind}: the model gives no gradients, which all of {', '.join(names)} need;"
                f" leave {threat} out of the criteria"
            )
    return found


def carried_of(subject: Subject, policy: Policy, surrogates: Mapping[str, Run]) -> tuple[Attack, ...]:
    """The attacks that are crafted on surrogates; BadInput where one makes no sense, or a surrogate is the subject."""
    names = policy.attacks.transfer
    if not names or len(set(names)) < len(names):
        raise BadInput(f"policy attacks.transfer: {', '.join(names) or 'none'}: name at least one, and each once")
    for surrogate in surrogates.values():
        if surrogate.origin_sha256 == subject.run.get("checkpoint_sha256"):
            raise BadInput(f"{surrogate.path}: is the judged model itself; a surrogate must be another one")
    return tuple(Attack.parse_transfer(name) for name in names)


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
        named = (
            "check data in the policy" if count < len(data.classes) else "name the model's with --labels, a line each"
        )
        raise BadInput(f"{where}: has {len(data.classes)} classes, the model {count}; {named}")
    for place, (ours, theirs) in enumerate(zip(data.classes, names, strict=True)):
        if ours != theirs:
            raise BadInput(
                f"{where}: class {place} is {ours!r}, the model's label {place} is {theirs!r}; bring the labels into"
                " the order of the logits, or name the data set that the model tells apart"
            )
    if data.preprocessing and subject.preprocessing and data.preprocessing != str(subject.preprocessing):
        raise BadInput(
            f"{where}: its files are preprocessed by {data.preprocessing}, {subject.name} is served with"
            f" {subject.preprocessing}; judge it on what it will be shown: set data.preprocessing, or export it again"
        )
    for threat in policy.threats(grid=True):
        threat.fits((contract.channels, contract.height, contract.width))
    if policy.data.images > len(data.x_test):
        raise BadInput(
            f"policy data.images is {policy.data.images}; {policy.data.name} has {len(data.x_test)} test images"
        )


def size_of(shape: Sequence[int]) -> str:
    """`32x32x3`."""
    return "x".join(str(side) for side in shape)


def require_answers(subject: Subject, images: Bytes, labels: Labels) -> None:
    """BadInput where the model answers none of the first images with numbers, or was trained behind another convention.

    An endpoint is not asked: its queries are the attacks', and it says itself what it takes.
    """
    if subject.kind == "endpoint":
        return
    parts = torch.from_numpy(images).split(FEW)
    if not any(answered(subject.decide, to_float(part)).isfinite().all(dim=1).any() for part in parts):
        count = len(images)
        raise BadInput(
            f"{subject.name}: logits are not finite for {count} of {count} images; look for weights that are not, for a"
            " division by zero or an overflow in it"
        )
    # In floats the artefact itself can be asked; a uint8 one by what stands in for it, where there is anything.
    stands_in = subject.contract.dtype == "uint8" and subject.model is not None
    answer = subject.model if stands_in and subject.model is not None else subject.decide
    device, bytes_only = device_of(subject.model), subject.contract.dtype == "uint8" and not stands_in
    if subject.own_labels is not None:
        subject.own_labels.require(to_float(torch.from_numpy(images)), "of the data set")
    found = mismatch(answer, images, labels, subject.contract, device=device, bytes_only=bytes_only)
    if found is not None:
        raise BadInput(f"{subject.name}: {found}, so its preprocessing is another; {_repair(subject, found)}")


def require_labels(case: Case, index: NDArray[np.int64], attacked: Sequence[Bytes]) -> None:
    """BadInput where a file as it came labels attacked images, before or after the attack, otherwise than its logits.

    index: of the images `(N,)`. attacked: under each threat uint8 `(N, H, W, C)`.
    """
    own = case.subject.own_labels
    if own is None:
        return
    for start in range(0, len(index), FIRST):
        part = slice(start, start + FIRST)
        own.require(to_float(torch.from_numpy(case.data.x_test[index[part]])), "of the data set")
        for images in attacked:
            own.require(to_float(torch.from_numpy(images[part])), "that were attacked")


def _repair(subject: Subject, found: Mismatch) -> str:
    """What makes the convention that was found the declared one."""
    contract, kept = subject.contract, "make it a first layer of the model, which takes pixels in [0, 1] as RGB"
    if not isinstance(found.convention, Scale):
        return kept
    if subject.kind == "candidate":
        return f"export its file again with `{found.words}` in --input, or {kept}"
    try:
        return f"declare it: --input '{replace(contract, scale=found.convention)}'"
    except BadInput:  # bytes have no scale
        return kept
