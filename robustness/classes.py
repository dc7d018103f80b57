"""What classes are called: numbers become names, and each name is one that a reader can tell from the others."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dfmcl.common.errors import BadInput
from dfmcl.common.reader import TEXT_BYTES, read_plain, why_unread
from dfmcl.common.text import is_line

NAMES = "classes.txt"  # the names of classes that are numbers, one a line, beside the data
MOST, DIGITS, LETTERS = 100_000, 20, 1000  # classes; digits of a number; letters of a name
SHOWN = 60  # letters of a name that is too long


def numbered(labels: set[str], folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Each label's class, and the names of all: numbers are in their order, names in the alphabet's."""
    if not all(label.isascii() and label.isdecimal() for label in labels):
        return {label: number for number, label in enumerate(sorted(labels))}, tuple(sorted(labels))
    numbers = {label: number_of(label, folder) for label in labels}
    most = max(numbers.values())
    try:
        names = tuple(read_plain(folder / NAMES, TEXT_BYTES, named=True).decode("utf-8").splitlines())
    except FileNotFoundError:
        names = tuple(map(str, range(most + 1)))
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / NAMES}: not readable: {why_unread(error)}") from None
    if most >= len(names):
        raise BadInput(f"{folder}: has a label {most}, and {NAMES} names {len(names)} classes, 0 to {len(names) - 1}")
    return numbers, names


def number_of(label: str, where: object) -> int:
    """The class that decimal digits name; BadInput from MOST on, because a network would need a score for each."""
    number = int(label) if len(label) <= DIGITS else MOST
    if number >= MOST:
        raise BadInput(f"{where}: has a label {_short(label)}; at most {MOST:,} classes are read, 0 to {MOST - 1}")
    return number


def require_names(names: Sequence[str], where: object) -> None:
    """BadInput where a name is none in a file of labels, shows nothing, or looks like another one."""
    if len(names) > MOST:
        raise BadInput(f"{where}: has {len(names):,} classes; at most {MOST:,} are read")
    for name in names:
        if len(name) > LETTERS:
            raise BadInput(f"{where}: class {_short(name)!r} has {len(name):,} letters, at most {LETTERS}; rename it")
        if not is_line(name):
            raise BadInput(
                f"{where}: class {name!r} is no name in UTF-8 on one line, as files of labels need; rename it"
            )
        if not any(sign.isprintable() and not sign.isspace() for sign in name):
            raise BadInput(f"{where}: class {name!r} is blank; rename it")
    first: dict[str, str] = {}
    for name in names:
        shown = looks(name)
        if shown in first:
            how = "stands twice" if first[shown] == name else f"looks like class {first[shown]!r}"
            raise BadInput(f"{where}: class {name!r} {how}; give each class a name of its own")
        first[shown] = name


def looks(name: str) -> str:
    """A name as it is read: composed (Unicode's NFC), without signs that do not show, any blanks as one space."""
    shown = "".join(sign for sign in name if sign.isprintable() or sign.isspace())
    return unicodedata.normalize("NFC", " ".join(shown.split()))


def twice(names: Sequence[str]) -> str:
    """The first name that stands more than once; empty where none does."""
    return next((name for name, count in Counter(names).items() if count > 1), "")


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
