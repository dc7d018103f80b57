"""report.json as a frozen tree: what a gate found about one model, whatever its verdict.

`report.schema.json` is made of these records by `make report-schema`, and says more than reading asks for: a share of
1.2 has the right type, and is refused because another one follows from the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, Strict

from dfmcl.common.entry import Amount, Bits, Count, Digest, Entry, Maybe, Number, Ratio, Whole, one_of, text, told
from dfmcl.common.providers import PRECISIONS, PROVIDERS, Decider
from dfmcl.gating.criterion import METRICS, NO_REGRESSION
from dfmcl.gating.kinds import KINDS
from dfmcl.gating.order import Draw
from dfmcl.gating.policy import Policy, digest_of
from dfmcl.gating.signing.evaluation import SuiteEntry, TransferEntry
from dfmcl.gating.signing.evidence import REPORT_FORMAT
from dfmcl.gating.verdict import EXIT_CODES

Reason = Annotated[str, one_of("no_gradients", "cap_reached", "images_spent", "small_baseline", "not_finite")]


@dataclass(frozen=True, kw_only=True)
class WholeSuite(Entry):
    """Where only a drawn part meets the whole suite: images drawn, tried as the others left them, and lost."""

    chance: Annotated[Number, told(type="number", exclusiveMinimum=0, maximum=1)]
    drawn: Count
    tried: Count
    lost: Count


@dataclass(frozen=True, kw_only=True)
class StatisticsEntry(Entry):
    """kind: sequential, about exactly the images of the data set; fixed, about the population that they came from.

    order_sha256: of the whole order, which follows from the digests of model, data and policy, and from `draw`.
    class_images: images of each class in the data set; criteria about classes cannot be derived without.
    """

    kind: Annotated[str, one_of("sequential", "fixed")]
    population: Count
    attacked: Count
    cap: Count
    order_sha256: Digest
    class_images: Maybe[tuple[Count, ...]] = None
    draw: Maybe[Draw] = None
    whole: Maybe[WholeSuite] = None


@dataclass(frozen=True, kw_only=True)
class CriterionEntry(Entry):
    """A criterion, or a criterion for one class. eps: null for the policy's own radius, or none.

    decided_after: how many of the claim's own images. corruption: the kind that it is about. answers: how many of each
    image, where k and n are of answers and not of images.
    """

    criterion: str
    metric: Annotated[str, one_of(*METRICS, NO_REGRESSION)]
    eps: str | None
    class_name: Annotated[str | None, Field(alias="class")]
    threshold: Ratio | None
    confidence: Ratio
    outcome: Annotated[str, one_of("met", "missed", "open")]
    decided_after: Count | None
    k: Count
    n: Count
    value: Ratio | None
    lower: Ratio | None
    upper: Ratio | None
    corruption: Maybe[str] = None
    answers: Maybe[Count] = None


@dataclass(frozen=True, kw_only=True)
class BoundsEntry(Entry):
    """The bounds after a block. criterion: position in criteria."""

    images: Count
    criterion: Count
    lower: Ratio
    upper: Ratio


@dataclass(frozen=True, kw_only=True)
class CheckEntry(Entry):
    """A reason to disbelieve that was looked for."""

    check: str
    outcome: Annotated[str, one_of("clear", "raised", "not_run")]
    when: str
    why: str
    do: str
    figures: Mapping[str, Number | str]


@dataclass(frozen=True, kw_only=True)
class FindingEntry(Entry):
    """A check that was raised."""

    check: str
    why: str
    do: str


@dataclass(frozen=True, kw_only=True)
class ImagesEntry(Entry):
    """The images in the order in which they were attacked. index: position in the data set."""

    index: tuple[Count, ...]
    label: tuple[Count, ...]


@dataclass(frozen=True, kw_only=True)
class PairFlags(Entry):
    """index: position in the data set. before, after: held by the baseline, and by this model."""

    index: tuple[Count, ...]
    before: Bits
    after: Bits


@dataclass(frozen=True, kw_only=True)
class OtherFlags(Entry):
    """The same images in another threat than the policy's own."""

    threat: str
    before: Bits
    after: Bits


@dataclass(frozen=True, kw_only=True)
class RegressionEntry(Entry):
    """What a `no_regression` about another threat was decided by; its figures are those of BaselineEntry."""

    threat: str
    held: Count
    only_baseline: Count
    only_candidate: Count
    p: Ratio
    newly_broken: tuple[Count, ...]


@dataclass(frozen=True, kw_only=True)
class ErrorEntry(Entry):
    """Shares of wrong answers under a kind of corruption, of the baseline model and of this one."""

    corruption: str
    before: Ratio
    after: Ratio


@dataclass(frozen=True, kw_only=True)
class BaselineEntry(Entry):
    """Two models on the same images. of: images of the baseline; fewer are compared where the model failed before.

    held: of the images compared, by the baseline model. p: exact, one-sided. others: in the further threats that
    criteria compare. errors: by the kind of corruption; mce: the mean of after / before, absent where one is 0.
    """

    report_sha256: Digest
    model_sha256: Digest
    images: Count
    of: Count
    held: Count
    only_baseline: Count
    only_candidate: Count
    p: Ratio
    newly_broken: tuple[Count, ...]
    per_image: PairFlags
    others: Maybe[tuple[OtherFlags, ...]] = None
    regressions: Maybe[tuple[RegressionEntry, ...]] = None
    errors: Maybe[tuple[ErrorEntry, ...]] = None
    mce: Maybe[Amount] = None


class PolicyEntry(Policy):
    """The policy as its gate wrote it. What an earlier gate did not know is absent, and has its default."""

    sha256: Digest

    @staticmethod
    def of(policy: Policy) -> PolicyEntry:
        return PolicyEntry.model_validate({**policy.as_written(), "sha256": policy.digest})

    def as_written(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)

    @property
    def digest(self) -> str:
        """What `sha256` should be."""
        return digest_of(self.model_dump(exclude_unset=True, exclude={"sha256"}))


@dataclass(frozen=True, kw_only=True)
class InputEntry(Entry):
    """shape: height, width, channels. range, mean, std, order: of floats that are not pixels in [0, 1], RGB.

    mean, std: one number for all channels, or one for each.
    """

    dtype: Annotated[str, one_of("uint8", "float32", "float64", "float16")]
    layout: Annotated[str, one_of("NHWC", "NCHW", "flat-HWC", "flat-CHW")]
    shape: tuple[Count, Count, Count]
    range: Maybe[tuple[Number, ...]] = None
    mean: Maybe[tuple[Number, ...]] = None
    std: Maybe[tuple[Number, ...]] = None
    order: Maybe[Annotated[str, one_of("RGB", "BGR")]] = None


@dataclass(frozen=True, kw_only=True)
class CandidateEntry(Entry):
    """What was judged. output: of an ONNX file with several; gradients: their origin, of one that rounds."""

    kind: Annotated[str, one_of(*KINDS)]
    name: str
    model_sha256: Digest
    files: Mapping[str, Digest]
    input: InputEntry
    output: Maybe[str] = None
    gradients: Maybe[str] = None


@dataclass(frozen=True, kw_only=True)
class DecidedEntry(Entry):
    """Who decided: an execution provider. runtime: the package of ONNX Runtime; library: the provider's own version."""

    provider: Annotated[str, one_of(*PROVIDERS)]
    precision: Annotated[str, one_of(*PRECISIONS)]
    tf32: Annotated[bool, Strict()]
    runtime: str
    library: Maybe[str] = None

    @property
    def decider(self) -> Decider:
        return Decider(self.provider, self.precision, self.tf32)

    def __str__(self) -> str:
        return f"{self.decider} ({self.runtime}{f', {self.library}' if self.library else ''})"


@dataclass(frozen=True, kw_only=True)
class RunEntry(Entry):
    """The run that it was exported from."""

    checkpoint_sha256: Maybe[Digest] = None


@dataclass(frozen=True, kw_only=True)
class DataEntry(Entry):
    """preprocessing: how files became images. skipped: files that were not read, by the reason."""

    name: str
    path: Maybe[str] = None
    image_size: Maybe[Count] = None
    preprocessing: Maybe[str] = None
    sha256: Digest
    skipped: Maybe[Mapping[str, Count]] = None
    part: str
    images: Count
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CodeEntry(Entry):
    """revision: the commit, with + where files differed from it."""

    revision: str


@dataclass(frozen=True, kw_only=True)
class Conclusions(Entry):
    """All of a report that follows from the gate's record."""

    verdict: Annotated[str, one_of(*EXIT_CODES)]
    exit_code: Annotated[Whole, one_of(*EXIT_CODES.values())]
    reasons: tuple[Reason, ...]
    why: Maybe[Mapping[Reason, str]] = None
    statistics: StatisticsEntry
    criteria: tuple[CriterionEntry, ...]
    progress: tuple[BoundsEntry, ...]
    findings: tuple[FindingEntry, ...]
    policy: Annotated[PolicyEntry, PlainSerializer(PolicyEntry.as_written)]
    evaluation: SuiteEntry
    radii: tuple[SuiteEntry, ...]
    transfer: tuple[TransferEntry, ...]
    per_image: ImagesEntry
    baseline: BaselineEntry | None


@dataclass(frozen=True, kw_only=True)
class Report(Conclusions):
    """What a gate found about one model. All but digests, dates and the record itself follows from the record.

    Every list of per-image values has the order of per_image. reasons: why no evidence of this kind will do to pass;
    why: what is known of each. transfer: upper bounds of robust accuracy. files: of the evidence beside the report.
    decided: by whom, where ONNX Runtime did; absent where torch or a server did, or an earlier gate, on the CPU.
    """

    format: Annotated[str, told(const=REPORT_FORMAT)]
    created: Annotated[str, text(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")]
    checks: tuple[CheckEntry, ...]
    files: Annotated[Mapping[str, Digest], Field(json_schema_extra={"required": ["probes.npz"]})]
    candidate: CandidateEntry
    decided: Maybe[DecidedEntry] = None
    run: RunEntry
    data: DataEntry
    code: CodeEntry
    versions: Mapping[str, str]
    hardware: Mapping[str, str | Whole | None]
    processes: Annotated[Whole, told(type="integer", minimum=1)]
    seconds: Amount

    def to_json(self, *names: str) -> dict[str, Any]:
        """Its format and date come first, as a reader meets them."""
        written = super().to_json(*names)
        return {key: written[key] for key in ("format", "created") if key in written} | written
