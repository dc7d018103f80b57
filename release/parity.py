"""Whether a promoted version answers the same on every execution provider and precision that is present here.

Robustness was judged on one of them. TensorRT, TF32 or half precision change logits, and an adversarial image lies
where that matters most; so clean and adversarial images are both compared, with what the gate recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dfmcl.common.errors import BadInput
from dfmcl.common.providers import FULL, PROVIDERS, WHOLE, Decider, deciders
from dfmcl.gating.signing.attestation import BadEvidence
from dfmcl.gating.signing.probes_file import further, read_probes
from dfmcl.release import layout
from dfmcl.release.candidate import INPUT, MODEL
from dfmcl.release.stores.directory import Directory
from dfmcl.robustness.provider import CPU, Provider, available

AGREEMENT = 0.999  # of labels, on clean and on adversarial images
TOLERANCE = 1e-3  # of the largest logit, as the known answers have it
BATCH = 64
ON, OFF = ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL
AS_IT_IS = "graph as it is"
ELSEWHERE = {"AzureExecutionProvider"}  # asks a service for operators of its own, and leaves all others to the CPU


@dataclass(frozen=True)
class Comparison:
    """One way of computing beside the gate's. difference: of logits, relative to the largest; agreement: share of equal
    labels, on clean and adversarial images; held: share of the adversarial images that are still right; trouble: why it
    could not run, empty where it did; judged: whether it is the way that the gate judged, and that serves."""

    provider: str
    setting: str
    difference: float = 0.0
    clean_agreement: float = 0.0
    adversarial_agreement: float = 0.0
    held: float = 0.0
    trouble: str = ""
    judged: bool = False

    @property
    def equal(self) -> bool:
        """Whether robustness may be believed to be the same."""
        return (
            not self.trouble
            and self.difference <= TOLERANCE
            and min(self.clean_agreement, self.adversarial_agreement) >= AGREEMENT
        )


def compare(version: Path) -> Iterator[Comparison]:
    """The way that the gate judged, and each other provider and precision that ONNX Runtime has here.

    version: a promoted version's directory.
    """
    for path in (version, version / MODEL):
        if not path.exists():
            raise BadInput(f"{path}: is not there; name a promoted version, such as models/digits/1")
    path = version / layout.PROBES
    try:
        probes = read_probes(path)
    except BadEvidence as error:
        raise BadInput(str(error)) from None
    others = further(probes)
    recorded = np.concatenate([probes["clean_logits"], probes["adversarial_logits"], *(found for _, found in others)])
    images = np.concatenate([probes["images"], probes["adversarial"], *(changed for changed, _ in others)])
    labels = probes["labels"]
    attacked = np.concatenate([labels, *(labels[: len(found)] for _, found in others)])
    decider = layout.decider_at(Directory(version.parent), version.name)
    for provider, setting, level in ways(decider):
        judged = provider.decider == decider and level == ON
        try:
            logits = _answers(version / MODEL, provider, level, images)
        except Exception as error:  # noqa: BLE001  # a provider is listed that finds no device, driver or library
            yield Comparison(provider.name, setting, trouble=" ".join(str(error).split())[:200], judged=judged)
            continue
        yield replace(_compared(provider.name, setting, logits, recorded, attacked), judged=judged)


def counted(rows: Sequence[Comparison]) -> list[Comparison]:
    """The rows that a version may be served by: its own; all of one that the CPU decided, whose configs name more."""
    own = [row for row in rows if row.judged]
    return own if own and own[0].provider != CPU.name else list(rows)


def ways(decider: Decider) -> list[tuple[Provider, str, ort.GraphOptimizationLevel]]:
    """Each provider, how it is asked in words, and whether its graph is changed; the one that decided comes first.

    Whole numbers are in a file or not: int8 is asked of a version that was judged so, and nothing else of it.
    """
    whole = decider.precision == WHOLE
    asked = [one for name in available() for one in deciders(name) if (one.precision == WHOLE) == whole]
    found = [(Provider.of(one), spoken(one), ON) for one in dict.fromkeys((decider, *asked))]
    if CPU.name in ort.get_available_providers():
        found.append((CPU, f"{spoken(Decider(precision=WHOLE if whole else FULL))}, {AS_IT_IS}", OFF))
    known = {kind.onnxruntime for kind in PROVIDERS.values()} | ELSEWHERE
    return found + [(Provider(name), "default", ON) for name in sorted(set(ort.get_available_providers()) - known)]


def spoken(decider: Decider) -> str:
    """The precision as rows name it."""
    if decider.tf32 and decider.precision == FULL:
        return "TF32"
    return {FULL: "float32", "fp16": "float16", "bf16": "bfloat16"}.get(decider.precision, decider.precision)


def _answers(
    model: Path, provider: Provider, level: ort.GraphOptimizationLevel, images: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float32]:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = provider.session(model, options)
    starts = range(0, len(images), BATCH)
    return np.concatenate([session.run(None, {INPUT: images[start : start + BATCH]})[0] for start in starts])


def _compared(
    provider: str,
    setting: str,
    logits: npt.NDArray[np.float32],
    recorded: npt.NDArray[np.float32],
    attacked: npt.NDArray[np.int64],
) -> Comparison:
    """attacked: the labels of the adversarial images, which come after the clean ones."""
    wild = {name: int((~np.isfinite(rows)).any(axis=1).sum()) for name, rows in (("", logits), ("recorded ", recorded))}
    if any(wild.values()):
        counts = " and ".join(f"{name}logits are not finite for {count}" for name, count in wild.items() if count)
        return Comparison(provider, setting, trouble=f"{counts} of {len(logits)} images")
    clean = len(logits) - len(attacked)
    largest = max(float(np.abs(recorded).max()), float(np.finfo(np.float32).tiny))
    same = logits.argmax(axis=1) == recorded.argmax(axis=1)
    return Comparison(
        provider,
        setting,
        difference=float(np.abs(logits - recorded).max()) / largest,
        clean_agreement=float(same[:clean].mean()),
        adversarial_agreement=float(same[clean:].mean()),
        held=float((logits[clean:].argmax(axis=1) == attacked).mean()),
    )
