"""The gate's report: one JSON document, `report.schema.json`, from which every other format is made."""

from __future__ import annotations

from collections.abc import Mapping

from dfmcl.gating.derivation import derived
from dfmcl.gating.record import GateRecord
from dfmcl.gating.signing.evidence import REPORT, REPORT_FORMAT
from dfmcl.gating.signing.report import CandidateEntry, CodeEntry, DataEntry, DecidedEntry, Report, RunEntry

__all__ = ["REPORT", "build_report"]


def build_report(
    record: GateRecord,
    *,
    candidate: CandidateEntry,
    run: RunEntry,
    data: DataEntry,
    files: Mapping[str, str],
    code: CodeEntry,
    versions: Mapping[str, str],
    hardware: Mapping[str, str | int | None],
    processes: int,
    seconds: float,
    created: str,
    decided: DecidedEntry | None = None,
) -> Report:
    """report.json: what follows from the record, the verdict in it, and what the record is about.

    candidate: what was judged; run: that it was exported from.
    data: the data set, with the names of its classes.
    files: SHA-256 of the other evidence, by name.
    code, versions, hardware: where the gate ran, in how many processes and seconds.
    created: UTC, ISO 8601.
    decided: by which execution provider, where by one.
    """
    return Report(
        **vars(derived(record)),
        format=REPORT_FORMAT,
        created=created,
        checks=tuple(record.checks),
        files=files,
        candidate=candidate,
        decided=decided,
        run=run,
        data=data,
        code=code,
        versions=versions,
        hardware=hardware,
        processes=processes,
        seconds=seconds,
    )
