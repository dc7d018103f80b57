"""report.schema.json, made of the records that read and write a report: `python -m dfmcl.gating.schema`."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from dfmcl.gating.signing.report import Report

FILE = Path(__file__).with_name("report.schema.json")
WIDTH = 120


def text() -> str:
    """The file's text."""
    return laid_out(Report.schema()) + "\n"


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
