"""A folder of parquet files as Hugging Face's hub has them: train-*.parquet, test-*.parquet, validation-*.parquet."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dfmcl.common.errors import BadInput
from dfmcl.robustness.classes import number_of, numbered, twice
from dfmcl.robustness.folder import Part
from dfmcl.robustness.rows import COLUMN, Row, arrow, table, unread

LABEL, EXPECTED = "label", "train-*.parquet and test-*.parquet"
SPLIT = re.compile(r"(train|test|validation)(-.*)?\.parquet")
OTHER, BESIDE = "parquet files of no split", "validation-*.parquet beside test-*.parquet"


def list_parquet(folder: Path) -> tuple[Part, Part]:
    """The training and the test part, from the folder or its `data/`, in the order of names and rows, no image read.

    The test part is `test-*`, or `validation-*` where there is none. Classes are those that the files name; else as of
    shards. BadInput names the file that is damaged, or lacks a column, and says where pyarrow is missing.
    """
    arrow()
    files, skipped = _files(folder)
    tested = "test" if files["test"] else "validation"
    if tested == "test" and files["validation"]:
        skipped[BESIDE] = len(files["validation"])
    found = {part: [_rows(file) for file in files[part]] for part in ("train", tested)}
    names = {named for listed in found.values() for _, _, named in listed}
    if len(names) > 1:
        raise BadInput(f"{folder}: its files name different classes; write them again, of one data set")
    labels = {label for listed in found.values() for _, told, _ in listed for label in told}
    if not labels:
        raise BadInput(f"{folder}: its files hold no row")
    known = names.pop()
    place, classes = (_placed(labels, known, folder), known) if known else numbered(labels, folder)

    def part(name: str, left: Counter[str]) -> Part:
        rows = tuple(row for rows, _, _ in found[name] for row in rows)
        told = [place[label] for _, labels, _ in found[name] for label in labels]
        return Part(rows, np.array(told, np.int64), classes, left)

    return part("train", Counter()), part(tested, skipped)


def _placed(labels: set[str], known: tuple[str, ...], folder: Path) -> dict[str, int]:
    """The class of each label; BadInput for one that has no name."""
    numbers = {label: number_of(label, folder) if label.isdecimal() else len(known) for label in labels}
    if odd := [label for label, number in numbers.items() if number >= len(known)]:
        raise BadInput(f"{folder}: has a label {sorted(odd)[0]}, and names {len(known)} classes, 0 to {len(known) - 1}")
    return numbers


def _files(folder: Path) -> tuple[dict[str, list[str]], Counter[str]]:
    """By split the files' paths, and how many others there are."""
    place = folder if any(folder.glob("*.parquet")) else folder / "data"
    files: dict[str, list[str]] = {"train": [], "test": [], "validation": []}
    skipped = Counter[str]()
    for path in sorted(place.glob("*.parquet")):
        if split := SPLIT.fullmatch(path.name):
            files[split[1]].append(str(path))
        else:
            skipped[OTHER] += 1
    if not files["test"] and not files["validation"]:
        raise BadInput(f"{folder}: has no test-*.parquet and no validation-*.parquet; expected {EXPECTED}")
    return files, skipped


def _rows(file: str) -> tuple[list[Row], list[str], tuple[str, ...]]:
    """A file's images, their labels as text, and the classes that it names."""
    opened = table(file)
    schema = opened.schema_arrow
    if missing := [name for name in (COLUMN, LABEL) if name not in schema.names]:
        raise BadInput(f"{file}: has no column {missing[0]}; it has {', '.join(schema.names)}")
    if (name := twice(schema.names)) in (COLUMN, LABEL):
        raise BadInput(f"{file}: has two columns {name}; keep one")
    kind = schema.field(COLUMN).type
    if not str(kind).startswith("struct<") or kind.get_field_index("bytes") < 0:
        raise BadInput(f"{file}: {COLUMN} is {kind}; expected a struct of bytes and path, as `datasets` writes images")
    try:
        labels = opened.read(columns=[LABEL], use_threads=False).column(0).to_pylist()
    except Exception as error:  # noqa: BLE001  # pyarrow has a class for each of its libraries
        raise unread(file, error) from None
    for number, label in enumerate(labels):
        whole = isinstance(label, int) and not isinstance(label, bool) and label >= 0
        if not whole and not (isinstance(label, str) and label):
            raise BadInput(f"{file}: row {number}: label is {label!r}; expected a number from 0 on, or a name")
    groups = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
    places = [(group, place) for group, count in enumerate(groups) for place in range(count)]
    rows = [Row(file, group, place, number) for number, (group, place) in enumerate(places)]
    return rows, [str(label) for label in labels], _named(schema.metadata or {})


def _named(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """The classes' names, as `datasets` keeps them; none where another program wrote the file."""
    try:
        found: Any = json.loads(metadata[b"huggingface"])["info"]["features"][LABEL]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(map(str, found)) if isinstance(found, list) else ()
