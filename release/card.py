"""The model card of a release, in Hugging Face's form; every figure comes from the run, the manifest or the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dfmcl.common.errors import BadInput
from dfmcl.common.reader import RECORD_BYTES, Unfit, parse_object, why_unread
from dfmcl.common.text import as_markdown
from dfmcl.gating.signing.evaluation import ShareEntry, SuiteEntry
from dfmcl.gating.signing.evidence import read_report
from dfmcl.gating.signing.report import Report
from dfmcl.release import layout
from dfmcl.release.candidate import MANIFEST, Manifest
from dfmcl.release.stores.directory import Directory
from dfmcl.release.stores.store import Store
from dfmcl.release.verification import Promoted, require_repository, verify_release
from dfmcl.release.writer import only_writer

Record = Mapping[str, Any]

# The metadata is the model-index of huggingface.co/docs/hub/model-cards.
CARD = """\
---
license: apache-2.0
library_name: onnx
pipeline_tag: image-classification
tags: [adversarial-robustness]
datasets: [{data}]
model-index:
- name: {model}
  results:
  - task: {{type: image-classification}}
    dataset: {{name: {data}, type: {data}, split: test}}
    metrics:
    - {{type: accuracy, name: {clean_name}, value: {clean_value}}}
    - {{type: accuracy, name: {robust_name}, value: {robust_value}}}{more_metrics}
---

# {title}

{network}, for uint8 images {size} of these classes: {labels}.
Version {version}, `model.onnx` SHA-256 `{sha256}`; weights are stored as {weights}, everything is computed in float32.
Written by `dfmcl card`; do not edit.

| on {images} test images of {data_name} | % | {interval} |
|---|---|---|
| clean accuracy | {clean} |
| robust accuracy, {threat} | {robust} |

Robust accuracy is the share of images that are right and that none of {attacks} flips within {threat} as uint8; the
attacks had the model's gradients, the ONNX file decided. The gate {verdict} it on: {criteria}.
`{version}/` holds the report, every one of these images with its adversarial version, and an in-toto attestation that
signs for all of it; `dfmcl verify` tells whether keys that you trust made the signature.
{measured}
On {parity.images} images, half of them adversarial, logits of the ONNX file differ from the checkpoint's by at most
{parity.checkpoint_max_abs_difference:.1e}, with {agreement:.1f} % equal labels, and by at most
{parity.max_abs_difference:.1e} from those of the checkpoint with weights rounded to {weights}.

## Limits

- The robust accuracy is an upper bound: an attack outside this suite may flip more images.
- It is about {threat} only. {beyond}
- It is about {data_name} only. Images from elsewhere, and things of no class: not measured.

## Training

`dfmcl train`, seed {seed}, code {revision}, {date}, torch {torch}, on {hardware}.
On held-out training images, with the attack named under `heldout`: {heldout}.

```toml
{settings}
```
"""
ALONE = "Other norms, larger radii, patches, rotations and natural corruptions: not measured."
BESIDE = "Figures for the other threats that its criteria name stand in the report; all others: not measured."
# A gate that stops when its bounds decide stops at a lucky moment: an interval for a fixed number of images would be
# too narrow there, and the share itself is a little too good.
WHENEVER = "bounds that hold whenever it stops"
MEASURED = """
Its run, before weights were rounded, measured by `dfmcl evaluate` on floats (% [exact 95 % interval]):

| test images | threat | clean | right under all of | |
|---|---|---|---|---|
"""
TRANSFER = "crafted on a surrogate: an upper bound of robust accuracy"
SHIPPED_SURROGATES = """
## Surrogates

Trained apart from the model, for the transfer attacks of `dfmcl watch`; in `surrogates/`, weights stored as float16.

| name | network | trained at | on held-out training images, there |
|---|---|---|---|
"""


def write_card(run: Path, store: Store, name: str, evaluation: Path | None = None) -> str:
    """Write <name>/README.md about the version that is served; returns its address.

    evaluation: the run's record by `dfmcl evaluate --out`. BadInput (2): another run than the version was exported
    from, or another's record. Refused, NotAttested, BadEvidence: a release that
    does not hold.
    """
    require_repository(store)
    release = verify_release(store, name)
    where = store.where(release.folder)
    manifest = layout.manifest_of(store, name, release.version)
    report, training = read_report(release.path / layout.REPORT)[0], _read(run / "manifest.json")
    try:
        if training["files"]["checkpoint.safetensors"] != manifest.checkpoint_sha256:
            raise BadInput(f"{run}: {where} was exported from another run; name that one")
        measured = _measurements(evaluation, manifest, run) if evaluation else []
        surrogates = dict(_surrogates(store, f"{name}/{layout.SURROGATES}"))
        text = card(release, manifest, report, training, surrogates, measured)
    except KeyError as error:
        raise BadInput(f"{run} or {where}: a record lacks {error}; train, gate and promote again") from None
    path = f"{name}/{layout.CARD}"
    with only_writer(store, settle=False) as change:
        change.replace(path, text)
    return store.where(path)


def _measurements(path: Path, manifest: Manifest, run: Path) -> list[SuiteEntry]:
    """What `dfmcl evaluate --out` wrote of the run; KeyError or BadInput where it did not."""
    record = _read(path)
    if record["run"]["checkpoint_sha256"] != manifest.checkpoint_sha256:
        raise BadInput(f"{path}: is about another run than {run}")
    try:
        return [SuiteEntry.from_json(entry) for entry in record["evaluations"]]
    except ValueError as error:
        raise BadInput(f"{path}: not a record of an evaluation ({error}); run dfmcl evaluate again") from None


def card(
    release: Promoted,
    manifest: Manifest,
    report: Report,
    training: Record,
    surrogates: Mapping[str, Record],
    evaluations: Sequence[SuiteEntry] = (),
) -> str:
    """The card as Markdown with YAML metadata.

    training: the run's manifest; surrogates: theirs, by name; evaluations: what else was measured of the run.
    """
    evaluation, parity, result = report.evaluation, manifest.parity, training["result"]
    clean, robust = evaluation.clean, evaluation.robust
    sequential = report.statistics.kind == "sequential"
    threat, attacks = _threat(evaluation), _attacks(evaluation)
    data, images = report.data.name, evaluation.images
    text = CARD.format(
        model=json.dumps(release.model),  # in the metadata texts are JSON strings, which are YAML too
        data=json.dumps(data),
        clean_name=json.dumps(f"clean accuracy, n = {images}"),
        clean_value=clean.value,
        robust_name=json.dumps(f"robust accuracy, {threat}, worst case of {attacks}, n = {images}"),
        robust_value=robust.value,
        more_metrics="".join(_metrics(evaluations)),
        measured=MEASURED + "".join(_measured(evaluations)) if evaluations else "",
        title=release.model,
        network=_network(training),
        size="x".join(str(size) for size in manifest.input_shape),
        labels=as_markdown(", ".join(manifest.labels)),
        version=release.version,
        sha256=release.sha256,
        weights=manifest.weights,
        images=images,
        data_name=data,
        threat=threat,
        beyond=BESIDE if report.radii else ALONE,
        interval=WHENEVER if sequential else "exact 95 % interval",
        clean=_percent(clean, _bounds(report, "clean_accuracy") if sequential else None),
        robust=_percent(robust, _bounds(report, "robust_accuracy") if sequential else None),
        attacks=attacks,
        verdict=report.verdict,
        criteria=as_markdown("; ".join(row.criterion for row in report.criteria)),
        parity=parity,
        agreement=100 * parity.checkpoint_label_agreement,
        seed=training["seed"],
        revision=(training.get("code") or {}).get("revision"),
        date=training["created"][:10],
        torch=training["versions"].get("torch"),
        hardware=training["hardware"].get("gpu") or training["hardware"].get("cpu"),
        heldout=_heldout(result),
        settings="\n".join(_settings(training["config"])),
    )
    rows = [
        f"| {name} | {_network(record)}, seed {record['seed']} | {_trained_at(record['config']['curriculum'])} |"
        f" {_heldout(record['result'])} |"
        for name, record in surrogates.items()
    ]
    return text + (SHIPPED_SURROGATES + "\n".join(rows) + "\n" if rows else "")


def _metrics(evaluations: Sequence[SuiteEntry]) -> Iterator[str]:
    for entry in evaluations:
        what = f"{_measure(entry)}, {_threat(entry)}, worst case of {_attacks(entry)}, n = {entry.images}"
        name = json.dumps(what)
        yield f"\n    - {{type: accuracy, name: {name}, value: {entry.robust.value}}}"


def _measured(evaluations: Sequence[SuiteEntry]) -> Iterator[str]:
    for entry in evaluations:
        clean, robust = (
            f"{100 * share.value:.1f} [{100 * share.lower_95:.1f}, {100 * share.upper_95:.1f}]"
            for share in (entry.clean, entry.robust)
        )
        blocks = [f"blocks: {entry.about['blocks']}"] if "blocks" in entry.about else []
        attacks = "; ".join([_attacks(entry), *[TRANSFER] * _transferred(entry), *blocks])
        yield f"| {entry.images:,} | {_threat(entry)} | {clean} | {attacks} | {robust} |\n"


def _measure(evaluation: SuiteEntry) -> str:
    return f"accuracy, {TRANSFER}" if _transferred(evaluation) else "robust accuracy"


def _transferred(evaluation: SuiteEntry) -> bool:
    return bool(evaluation.about.get("kind") == "transfer")


def _threat(evaluation: SuiteEntry) -> str:
    threat = evaluation.threat.parsed
    return f"{threat.kind} {threat.label}"


def _attacks(evaluation: SuiteEntry) -> str:
    return ", ".join(attack.name for attack in evaluation.attacks)


def _network(training: Record) -> str:
    return f"{training['model']['arch']}, width {training['model']['width']}"


def _trained_at(curriculum: Record) -> str:
    return str(curriculum["beta"]) if curriculum["attacks"] else "clean images"


def _heldout(result: Record) -> str:
    return f"clean {100 * result['heldout_clean']:.1f} %, PGD {100 * result['heldout_pgd']:.1f} %"


def _bounds(report: Report, metric: str) -> tuple[float, float] | None:
    """The gate's own bounds of a metric at the main radius; None where the policy has no criterion for it."""
    rows = [row for row in report.criteria if (row.metric, row.eps) == (metric, None)]
    bounds = (rows[0].lower, rows[0].upper) if rows else (None, None)
    return None if bounds[0] is None or bounds[1] is None else (bounds[0], bounds[1])


def _percent(share: ShareEntry, bounds: tuple[float, float] | None) -> str:
    low, high = bounds or (share.lower_95, share.upper_95)
    return f"{100 * share.value:.1f} | {100 * low:.1f} to {100 * high:.1f}"


def _settings(config: Record) -> Iterator[str]:
    """A training config as TOML, without where its data lay."""
    for key, value in config.items():
        if not isinstance(value, Mapping):
            yield f"{key} = {json.dumps(value)}"
    for section, values in config.items():
        if isinstance(values, Mapping):
            yield f"[{section}]"
            yield from (f"{key} = {json.dumps(value)}" for key, value in values.items() if key != "path")


def _surrogates(store: Store, folder: str) -> Iterator[tuple[str, Record]]:
    """The manifests of the runs that were shipped beside a model, by name."""
    for run in layout.entries(store, folder):
        if layout.lies_there(store, manifest := f"{folder}/{run.name}/{MANIFEST}"):
            yield run.name, _read_in(store, manifest)


def _read(path: Path) -> dict[str, Any]:
    return _read_in(Directory(path.parent), path.name)


def _read_in(store: Store, name: str) -> dict[str, Any]:
    try:
        return parse_object(store.read(name, RECORD_BYTES))
    except (OSError, Unfit) as error:
        raise BadInput(f"{store.where(name)}: not readable: {why_unread(error)}") from None
