"""The gate's report: one JSON document, `report.schema.json`, from which every other format is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfmcl.gating.derivation import derived
from dfmcl.gating.record import GateRecord
from dfmcl.gating.signing.evidence import REPORT, REPORT_FORMAT

__all__ = ["REPORT", "build_report"]


def build_report(
    record: GateRecord,
    *,
    subject: Mapping[str, Any],
    run: Mapping[str, Any],
    data: Mapping[str, Any],
    files: Mapping[str, str],
    provenance: Mapping[str, Any],
    created: str,
) -> dict[str, Any]:
    """report.json: what follows from the record, the verdict in it, and what the record is about.

    subject: what was judged; run: that it was exported from, {} for none.
    data: the data set, with the names of its classes.
    files: SHA-256 of the other evidence, by name.
    provenance: code, versions, hardware, time; created: UTC, ISO 8601.
    """
    found = derived(record)
    return {
        "format": REPORT_FORMAT,
        "created": created,
        **found,
        "checks": [dict(check) for check in record.checks],
        "files": dict(files),
        "policy": {**record.policy.model_dump(), **found["policy"]},
        "candidate": dict(subject),
        "run": dict(run),
        "data": dict(data),
        **provenance,
    }
