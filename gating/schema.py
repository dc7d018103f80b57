"""report.schema.json and robustness.schema.json, made of the records that read and write them: `make report-schema`.

The second is of the predicate that an attestation carries; docs/attestation.md explains it.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfmcl.gating.signing.report import Report
from dfmcl.gating.signing.statement import ABOUT_ATTACK, COPIED, MEASURED, ROBUSTNESS

Schema = dict[str, Any]
FILE = Path(__file__).with_name("report.schema.json")
PREDICATE = Path(__file__).with_name("robustness.schema.json")
WIDTH = 120


def text() -> str:
    """The report's."""
    return laid_out(Report.schema()) + "\n"


def predicate_text() -> str:
    """The predicate's."""
    return laid_out(predicate_schema()) + "\n"


def predicate_schema() -> Schema:
    """What `statement.robustness` writes, as JSON Schema, from the records whose parts it takes."""
    report = Report.schema()
    records, top = report["$defs"], report["properties"]
    attack, measured = _part(records["AttackEntry"], ABOUT_ATTACK), _part(records["SuiteEntry"], MEASURED)
    suite = _with(measured, attacks={"type": "array", "items": attack})
    transfer = _with(_part(records["TransferEntry"], (*MEASURED, "about")), attacks={"type": "array", "items": attack})
    sha256 = {"type": "object", "properties": {"sha256": records["PolicyEntry"]["properties"]["sha256"]}}
    digest = {**sha256, "required": ["sha256"], "additionalProperties": False}
    made = _with(
        _part(report, COPIED),
        expires=top["created"],
        checks={"type": "object", "additionalProperties": records["CheckEntry"]["properties"]["outcome"]},
        evaluation=suite,
        radii={"type": "array", "items": suite},
        transfer={"type": "array", "items": transfer},
        policy=digest,
        data=_part(records["DataEntry"], ("name", "sha256", "part", "images")),
        report=digest,
        files=top["files"],
        candidate=_part(records["CandidateEntry"], ("kind", "model_sha256", "input")),
    )
    about = "A verdict on adversarial robustness, in numbers: predicate of an in-toto statement."
    used = _named(made, records)
    return {
        "$schema": report["$schema"],
        "$id": ROBUSTNESS,
        "title": "Robustness",
        "description": about,
        "$defs": {name: record for name, record in records.items() if name in used},
        **made,
    }


def _part(record: Schema, names: Sequence[str]) -> Schema:
    """Of an object's schema, these entries."""
    return {
        "type": "object",
        "properties": {name: record["properties"][name] for name in names},
        "required": [name for name in names if name in record["required"]],
        "additionalProperties": False,
    }


def _with(record: Schema, **entries: Schema) -> Schema:
    """An object's schema with entries that are always there."""
    properties = {**record["properties"], **entries}
    return {**record, "properties": properties, "required": [*record["required"], *entries]}


def _named(value: Any, records: Schema) -> set[str]:
    """The records that a schema refers to, by way of others too."""
    found: set[str] = set()
    new = {"": value}
    while new:
        names = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(list(new.values())))) - found
        found |= names
        new = {name: records[name] for name in names}
    return found


def laid_out(value: Any, indent: str = "", taken: int = 0) -> str:
    """JSON with every object and list on one line that fits there. taken: columns before and after it."""
    line = json.dumps(value)
    if len(indent) + taken + len(line) <= WIDTH or not isinstance(value, dict | list):
        return line
    inner = f"\n{indent}  "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {laid_out(one, inner[1:], len(key) + 5)}" for key, one in value.items()]
        return "{" + inner + f",{inner}".join(parts) + f"\n{indent}}}"
    if any(isinstance(one, dict | list) for one in value):
        return "[" + inner + f",{inner}".join(laid_out(one, inner[1:], 1) for one in value) + f"\n{indent}]"
    return "[" + inner + inner.join(textwrap.wrap(line[1:-1], WIDTH - len(inner))) + f"\n{indent}]"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    PREDICATE.write_text(predicate_text(), encoding="utf-8")
