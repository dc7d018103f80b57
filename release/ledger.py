"""What a repository remembers beside its models: aliases.json, and history.jsonl, one change a line.

A model's config.pbtxt alone decides what is served, and is replaced first. The history follows, then the aliases, which
are a view of both; the next writer makes good what a crash left out (`settle`). Only a retirement is written down
before it is done.
"""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal, get_args

from dfmcl.common.errors import BadInput
from dfmcl.common.reader import RECORD_BYTES, Unfit, parse_object, why_unread
from dfmcl.release import layout
from dfmcl.release.change import Change
from dfmcl.release.stores.store import Store

Kind = Literal["promoted", "rolled_back", "returned", "retired", "pruned", "failed", "recovered", "repaired"]
Damage = tuple[int, str]  # a line's number, and why it is no event


@dataclass(frozen=True)
class Aliases:
    """Versions by role. champion: what is served; previous: what was before it; candidate: of the model's shadow."""

    champion: int | None = None
    previous: int | None = None
    candidate: int | None = None


@dataclass(frozen=True)
class Event:
    """One change of what a model serves, or of what lies there.

    time: UTC, ISO 8601; version: served after it (None: nothing is), or pruned, or what the config names and no server
    can serve (failed); before: served before it; sha256: of
    the version's model.onnx; actor: the user of the process; reason: in words, may be empty.
    """

    time: str
    model: str
    event: Kind
    version: int | None
    before: int | None
    sha256: str | None
    actor: str
    reason: str = ""


def aliases(store: Store) -> dict[str, Aliases]:
    """The aliases by model, from what is served and the history, as far as it can be read."""
    history, _ = read_lines(store)
    served = _served(store)
    return {
        name: Aliases(
            champion=None if failed(store, name) == version else version,
            previous=_previous(store, name, version, history),
            candidate=served.get(f"{name}{layout.SHADOW}"),
        )
        for name, version in served.items()
    }


def _served(store: Store) -> dict[str, int | None]:
    """What each model serves; without those whose config cannot be read: `status` tells of them."""
    found: dict[str, int | None] = {}
    for name in layout.model_names(store):
        with suppress(BadInput):
            found[name] = layout.served_version(store, name)
    return found


def _previous(store: Store, name: str, champion: int | None, history: list[Event]) -> int | None:
    """What was served last before the champion, lies there still, and was not returned from."""
    served = served_lately([change for change in history if change.model == name])
    there = layout.version_numbers(store, name)
    return next((version for version in served if version != champion and version in there), None)


def served_lately(changes: list[Event]) -> list[int]:
    """Versions of one model that its history says were served, the last one first, without those given up since."""
    changes = [change for change in changes if change.event != "pruned"]
    gone = given_up(changes)
    named = [version for change in reversed(changes) for version in (change.version, change.before)]
    return [version for version in dict.fromkeys(named) if version is not None and version not in gone]


def given_up(changes: list[Event]) -> dict[int, str]:
    """Versions of one model that could not be served and were not served since, and why."""
    found: dict[int, str] = {}
    for change in changes:
        if change.version is not None and change.event not in ("failed", "pruned"):
            found.pop(change.version, None)
        if change.event in ("returned", "failed") and change.before is not None:
            found[change.before] = change.reason
    return found


def last_served(changes: list[Event]) -> int | None:
    """The version that one model's history says is served now; None where nothing is."""
    return next((change.version for change in reversed(changes) if change.event != "pruned"), None)


def is_retired(store: Store, name: str) -> bool:
    """Whether the last that was written of a model is that it was taken out; BadInput where a line is damaged."""
    return (last := _last(read_history(store, name))) is not None and last.event == "retired"


def failed(store: Store, name: str) -> int | None:
    """The version that a server wrote down as one that it cannot serve, with nothing to return to; else None."""
    last = _last(events_of(store, name))
    return last.version if last is not None and last.event == "failed" else None


def _last(changes: list[Event]) -> Event | None:
    return next((change for change in reversed(changes) if change.event != "pruned"), None)


def write_aliases(change: Change) -> None:
    """Replace aliases.json."""
    if layout.entry_at(change.store, layout.ALIASES).folder:  # nobody reads it, and a file cannot replace it
        change.set_aside(layout.ALIASES)
    entries = {name: asdict(entry) for name, entry in aliases(change.store).items()}
    change.replace(layout.ALIASES, json.dumps(entries, indent=2) + "\n")


def read_history(store: Store, name: str | None = None) -> list[Event]:
    """All changes, oldest first, of one model or of all; BadInput where a line is damaged."""
    events, damaged = read_lines(store)
    for number, why in damaged:
        raise BadInput(f"{store.where(layout.HISTORY)}: line {number}: {why}; {layout.MEND}")
    return [event for event in events if name in (None, event.model)]


def events_of(store: Store, name: str) -> list[Event]:
    """The changes of one model that can be read, oldest first."""
    return [event for event in read_lines(store)[0] if event.model == name]


def read_lines(store: Store) -> tuple[list[Event], list[Damage]]:
    """The changes that can be read, oldest first, and what cannot be."""
    try:
        lines = store.read(layout.HISTORY, RECORD_BYTES).split(b"\n")
    except FileNotFoundError:
        return [], []
    except (OSError, Unfit) as error:
        where = store.where(layout.HISTORY)
        raise BadInput(f"{where}: not readable: {why_unread(error)}; {layout.MEND}") from None
    events: list[Event] = []
    damaged: list[Damage] = []
    for number, line in enumerate(lines, 1):
        if not line and number == len(lines):
            continue
        try:
            events.append(_parsed(line))
        except (ValueError, TypeError) as error:
            damaged.append((number, f"not a change of this repository ({error})"))
    return events, damaged


def _parsed(line: bytes) -> Event:
    """An event from its line; ValueError or TypeError where it is none: other programs write here too."""
    change = Event(**parse_object(line))
    datetime.fromisoformat(change.time)
    if change.event not in get_args(Kind) or not layout.MODEL_NAME.fullmatch(change.model):
        raise ValueError(f"{change.event!r} of {change.model!r}")
    for number in (change.version, change.before):
        if number is not None and (type(number) is not int or not layout.VERSION.fullmatch(str(number))):
            raise ValueError(f"{number!r} is no version")
    if not all(isinstance(text, str) for text in (change.sha256 or "", change.actor, change.reason)):
        raise TypeError("sha256, actor and reason are texts")
    return change


def salvage(change: Change) -> str:
    """Keep what can be read of a damaged history, and the damaged file beside it; says so, or "" for a whole one."""
    try:
        events, damaged = read_lines(change.store)
        if not damaged:
            return ""
        lost = f"{len(damaged)} of its lines"
    except BadInput:
        events, lost = [], "all of it"
    aside = change.set_aside(layout.HISTORY)
    _write(change, events)
    where = change.store.where(layout.HISTORY)
    return f"{where}: {lost} could not be read; {len(events)} changes stay, and the damaged file is {aside} now"


def record(change: Change, events: Iterable[Event]) -> None:
    """Append to the history, and write the aliases anew."""
    append(change, events)
    write_aliases(change)


def append(change: Change, events: Iterable[Event]) -> None:
    """Add to the history. The whole file is replaced, so that no line is ever torn."""
    _write(change, [*read_history(change.store), *events])


def _write(change: Change, events: Iterable[Event]) -> None:
    change.replace(layout.HISTORY, "".join(f"{json.dumps(asdict(line))}\n" for line in events))


def event(
    model: str, kind: Kind, version: int | None, before: int | None, sha256: str | None, reason: str = ""
) -> Event:
    """A change that happens now, by the user of this process."""
    return Event(
        datetime.now(UTC).isoformat(timespec="seconds"),
        model,
        kind,
        version,
        before,
        sha256,
        _user(),
        " ".join(reason.split()),
    )


def settle(change: Change) -> None:
    """Make good what a writer that died after its commit did not get to write."""
    store = change.store
    history = read_history(store)
    names = dict.fromkeys([*layout.model_names(store), *(line.model for line in history)])
    last = {name: last_served([line for line in history if line.model == name]) for name in names}
    served = _served(store)
    served |= {name: None for name in last if not layout.taken(store, name)}
    last = {name: version for name, version in last.items() if name in served}
    reason = "found when the next change began: something else was written down"
    missing = [
        event(name, "recovered", served[name], last[name], None, reason) for name in last if served[name] != last[name]
    ]
    if missing:
        record(change, missing)


def versions_remembered(store: Store, name: str) -> set[int]:
    """Every version number that was ever given: none is given twice, as dashboards and evidence refer to it."""
    history = read_history(store, name)
    return {version for line in history for version in (line.version, line.before) if version is not None}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        return str(os.getuid())
