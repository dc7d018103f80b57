"""A CSV file that lists image files: columns `path` and `label`, and `split` where there are two parts."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dfmcl.common.errors import BadInput
from dfmcl.common.reader import opened, why_unread
from dfmcl.robustness.classes import twice
from dfmcl.robustness.folder import Part

COLUMNS, SPLIT, PARTS = ("path", "label"), "split", ("train", "test")


@dataclass(frozen=True)
class _Row:
    """One image. path: beside the CSV file, unless it is absolute; part: of PARTS."""

    path: str
    label: str
    part: str


def list_manifest(file: Path) -> tuple[Part, Part]:
    """The training and the test part, in the order of the lines, no image of them opened.

    Without a column `split` all images are test images. The classes are all labels, by name in alphabetical order.
    BadInput names the line that is wrong.
    """
    try:
        with opened(file, named=True) as raw:
            text = raw.read().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: not readable: {why_unread(error)}") from None
    rows = list(_rows(file, text))
    if not rows:
        raise BadInput(f"{file}: lists no image; write a line for each below {','.join(COLUMNS)}")
    if all(row.part != "test" for row in rows):
        raise BadInput(f"{file}: lists no test image; write test into the split of some")
    classes = tuple(sorted({row.label for row in rows}))
    train, test = (_part(classes, [row for row in rows if row.part == part]) for part in PARTS)
    return train, test


def _part(classes: tuple[str, ...], rows: list[_Row]) -> Part:
    place = {name: number for number, name in enumerate(classes)}
    labels = np.array([place[row.label] for row in rows], np.int64)
    return Part(tuple(row.path for row in rows), labels, classes, Counter())


def _rows(file: Path, text: str) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    seen: dict[tuple[str, str], int] = {}
    try:
        named = reader.fieldnames or ()
        if missing := [name for name in COLUMNS if name not in named]:
            found = ", ".join(named) or "nothing"
            wanted = " and ".join(COLUMNS)
            raise BadInput(f"{file}: its first line must name {wanted}; it names {found}, not {', '.join(missing)}")
        if name := twice([name for name in named if name in (*COLUMNS, SPLIT)]):
            raise BadInput(f"{file}: its first line names {name} twice; keep one")
        for cells in reader:
            row = _row(f"{file}: line {reader.line_num}", file, cells)
            found = os.path.abspath(row.path)  # noqa: PTH100  # without .., and without asking the disk a million times
            before = seen.setdefault((row.part, found), reader.line_num)
            if before != reader.line_num:
                told = f"{row.path} stands on line {before} already, and would count twice; remove one"
                raise BadInput(f"{file}: line {reader.line_num}: {told}")
            yield row
    except csv.Error as error:
        raise BadInput(f"{file}: line {reader.line_num}: {error}") from None


def _row(where: str, file: Path, cells: dict[str, str | None]) -> _Row:
    if more := [cell for cell in cells.get(None) or () if cell.strip()]:  # type: ignore[call-overload]  # csv's own key
        raise BadInput(f"{where}: has more cells than the first line names, {more[0]!r}; quote a comma that is no end")
    path, label = ((cells[name] or "").strip() for name in COLUMNS)
    if not path or not label:
        raise BadInput(f"{where}: {'path' if not path else 'label'} is empty")
    if "\0" in path:
        raise BadInput(f"{where}: path {path!r} is no file name: it holds a null character")
    part = (cells[SPLIT] or "").strip() if SPLIT in cells else "test"
    if part not in PARTS:
        raise BadInput(f"{where}: split is {part!r}; choose {' or '.join(PARTS)}")
    return _Row(str(file.parent / path), label, part)
