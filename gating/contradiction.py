"""Where a report is not what was derived: the first place that differs, and the error that names it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfmcl.gating.signing.faults import refusal

# Special functions of another scipy differ in the last digits; another outcome takes far larger changes.
RELATIVE, ABSOLUTE = 1e-9, 1e-12


def contradiction(path: Path, field: str, there: object, again: object) -> Exception:
    """The error that names a field, what is there, and what follows from the record."""
    said = [" ".join(repr(value).split())[:100] for value in (there, again)]
    return refusal("contradiction", f"{path}: {field} is {said[0]}, and {said[1]} follows from its own record")


def require(path: Path, field: str, there: Any, again: Any) -> None:
    """Refuse what is not what was derived, and name the first place that differs."""
    if there != again:
        found = difference(there, again, field)
        raise contradiction(path, *(found or (field, there, again)))


def difference(there: Any, again: Any, field: str) -> tuple[str, Any, Any] | None:
    """The first place where a value is not what was derived: its name, what is there, what was derived."""
    if isinstance(there, Mapping) and isinstance(again, Mapping):
        keys = [*again, *(key for key in there if key not in again)]
        pairs = [(f"{field}.{key}", there.get(key, ABSENT), again.get(key, ABSENT)) for key in keys]
    elif isinstance(there, list | tuple) and isinstance(again, list | tuple):
        if list(there) == list(again) and all(type(item) is int for item in there):
            return None
        if len(there) != len(again):
            return f"{field}: entries", len(there), len(again)
        pairs = [(f"{field}[{place}]", *pair) for place, pair in enumerate(zip(there, again, strict=True))]
    else:
        return None if _same(there, again) else (field, there, again)
    return next((found for name, one, two in pairs if (found := difference(one, two, name)) is not None), None)


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def _same(there: Any, again: Any) -> bool:
    if isinstance(there, bool) or isinstance(again, bool) or not isinstance(there, int | float):
        return type(there) is type(again) and bool(there == again)
    if not isinstance(again, int | float):
        return False
    if isinstance(again, int) != isinstance(there, int):  # a count is no 48.0, which another reader refuses
        return False
    return there == again if isinstance(again, int) else math.isclose(there, again, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
