"""What a benchmark leaves: results/NAME.json and NAME.md, and a table on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dfmcl.common.files import dump_json, write_text
from dfmcl.robustness.provenance import now, provenance

RESULTS = Path(__file__).parent / "results"


def write_result(
    name: str, title: str, rows: Sequence[dict[str, Any]], ratios: dict[str, float], conditions: dict[str, Any]
) -> None:
    """Print the rows and ratios and write both files; what a row lacks stays empty."""
    found = provenance()
    conditions = {
        "hardware": found["hardware"],
        "versions": found["versions"],
        "revision": found["code"]["revision"],
        "threads": found["hardware"]["threads"],
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": now(),
        **conditions,
    }
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / f"{name}.json", dump_json({"conditions": conditions, "rows": list(rows), "ratios": ratios}))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[shown(row.get(column)) for column in columns] for row in rows]
    hardware = conditions["hardware"]
    where = f"{hardware['gpu'] or hardware['cpu']}, {hardware['threads']} threads, torch {found['versions']['torch']}"
    lines = [f"# {title}", "", f"{where}; `{conditions['command']}`, {conditions['date']}.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    lines += ["", *(f"* {ratio}: {value:.2f}" for ratio, value in ratios.items())]
    lines += ["", *(f"{key}: {conditions[key]}" for key in ("n", "seed", "note") if key in conditions), ""]
    write_text(RESULTS / f"{name}.md", "\n".join(lines))
    console = Console()
    table = Table(*columns, title=title, title_justify="left")
    for cell in cells:
        table.add_row(*cell)
    console.print(table)
    for ratio, value in ratios.items():
        console.print(f"{ratio}: {value:.2f}")
    console.print(f"written: {RESULTS / name}.json, .md")


def shown(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )
