"""One claim of a policy, as its author writes it: a metric, a threshold and a confidence in one sentence."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dfmcl.common.errors import BadInput
from dfmcl.robustness.threats.corruption import ALL, Corruption
from dfmcl.robustness.threats.registry import parse_threat

CORRUPTION = "corruption_accuracy"
METRICS = ("clean_accuracy", "robust_accuracy", "class_clean_accuracy", "class_robust_accuracy", CORRUPTION)
NO_REGRESSION = "no_regression"
EACH = re.compile(r"each(?:\s+of\s+(?P<threat>.+))?")  # in the brackets of a corruption accuracy
_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_CONFIDENCE = rf"at\s+(?P<confidence>{_NUMBER})\s*%"
_SHARE = re.compile(
    rf"(?P<metric>{'|'.join(METRICS)})(?:\((?P<eps>[^)]+)\))?\s*>=\s*(?P<threshold>{_NUMBER})\s*(?P<percent>%?)\s+{_CONFIDENCE}"
)
_REGRESSION = re.compile(rf"(?P<metric>{NO_REGRESSION})(?:\((?P<eps>[^)]+)\))?\s+{_CONFIDENCE}")


@dataclass(frozen=True)
class Criterion:
    """`metric >= threshold`, to be shown at `confidence`; both are shares in [0, 1].

    eps: the radius or the threat of a robust accuracy, where it is not the policy's own (""). `class_` metrics must
    hold for each class by itself. `corruption_accuracy` is the mean over kinds and severities, of all corruptions
    where eps names none (""); each: it must hold for each kind by itself. `no_regression` has no threshold: no more
    images may be newly broken, in comparison with a baseline on the same images, than chance explains.
    """

    metric: str
    threshold: float
    confidence: float
    eps: str = ""
    each: bool = False

    @staticmethod
    def parse(text: str) -> Criterion:
        """From a sentence: `robust_accuracy >= 0.45 at 95 %`, `robust_accuracy(2/255) >= 60 % at 99 %`, ...

        `clean_accuracy`, `class_robust_accuracy` and `class_clean_accuracy` likewise; `corruption_accuracy`, alone or
        about (fog), (each), (each of fog|snow@3); `no_regression at 95 %`, or `no_regression(patch:5x5) at 95 %`.
        """
        if other := [sign for sign in text if sign.isdigit() and not sign.isascii()]:
            raise BadInput(f"{text!r}: {other[0]!r} is another script's digit; write 0 to 9")
        match = _SHARE.fullmatch(text.strip()) or _REGRESSION.fullmatch(text.strip())
        if match is None:
            raise BadInput(
                f"{text!r} is no criterion; write METRIC >= SHARE at CONFIDENCE %, METRIC one of {', '.join(METRICS)}"
                f" (a robust one also as METRIC(EPS)), or {NO_REGRESSION} at CONFIDENCE %"
            )
        found = match.groupdict()
        confidence = float(found["confidence"]) / 100
        if not 0.5 <= confidence < 1:
            raise BadInput(f"{text!r}: the confidence is {100 * confidence:g} %; it must be at least 50 and below 100")
        threshold = float(found.get("threshold") or 0) / (100 if found.get("percent") else 1)
        if not 0 <= threshold <= 1:
            raise BadInput(f"{text!r}: the threshold is {threshold:g}; a share lies between 0 and 1")
        eps = (found.get("eps") or "").strip()
        if eps and "clean" in found["metric"]:
            raise BadInput(f"{text!r}: {found['metric']} has no radius; leave ({eps}) out")
        each = EACH.fullmatch(eps) if found["metric"] == CORRUPTION else None
        named = eps if each is None else each["threat"] or ""
        return Criterion(found["metric"], threshold, confidence, named, each is not None)

    def __str__(self) -> str:
        about = f"each of {self.eps}" if self.each and self.eps else "each" if self.each else self.eps
        asked = "" if self.metric == NO_REGRESSION else f" >= {self.threshold:g}"
        return f"{self.metric}{f'({about})' if about else ''}{asked} at {100 * self.confidence:g} %"

    @property
    def robust(self) -> bool:
        """Whether it is about accuracy under attack."""
        return "robust" in self.metric

    @property
    def by_class(self) -> bool:
        """Whether it must hold for each class by itself."""
        return self.metric.startswith("class_")

    @property
    def several(self) -> bool:
        """Whether it is one claim for each class, or for each kind of corruption."""
        return self.by_class or self.each

    @property
    def corruptions(self) -> tuple[Corruption, ...]:
        """The corruptions whose mean it is about; none where it is about something else. BadInput for other threats."""
        if self.metric != CORRUPTION:
            return ()
        parts = parse_threat(self.eps or ALL).parts
        if other := [part for part in parts if not isinstance(part, Corruption)]:
            raise BadInput(f"{other[0]} is no corruption; write (fog), (fog@3|snow), (each) or (each of fog|snow)")
        return tuple(part for part in parts if isinstance(part, Corruption))
