"""What a repository remembers beside its models: aliases.json, and history.jsonl, one change a line.

A model's config.pbtxt alone decides what is served, and is replaced first. The history follows, then the aliases, which
are a view of both; whoever writes next makes good what a crash left out (`settle`).
"""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from serving import repository as layout
from serving.errors import BadInput

Kind = Literal["promoted", "rolled_back", "returned", "retired", "pruned", "failed", "recovered"]


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


def aliases(repository: Path) -> dict[str, Aliases]:
    """The aliases by model, from what is served and the history."""
    history = read_history(repository)
    served = _served(repository)
    return {
        name: Aliases(
            champion=None if failed(repository, name) == version else version,
            previous=_previous(repository, name, version, history),
            candidate=served.get(f"{name}{layout.SHADOW}"),
        )
        for name, version in served.items()
    }


def _served(repository: Path) -> dict[str, int | None]:
    """What each model serves; without those whose config cannot be read: `status` tells of them."""
    found: dict[str, int | None] = {}
    for name in layout.model_names(repository):
        with suppress(BadInput):
            found[name] = layout.served_version(repository / name)
    return found


def _previous(repository: Path, name: str, champion: int | None, history: list[Event]) -> int | None:
    """What was served last before the champion, lies there still, and was not returned from."""
    changes = [change for change in history if change.model == name and change.event != "pruned"]
    returned: set[int | None] = set()  # and not served since
    for change in changes:
        returned.discard(change.version)
        if change.event == "returned":
            returned.add(change.before)
    passed_over = {champion, None, *returned}
    for change in reversed(changes):
        for version in (change.version, change.before):
            if version not in passed_over and (repository / name / str(version)).is_dir():
                return version
    return None


def is_retired(repository: Path, name: str) -> bool:
    """Whether the last that was written of a model is that it was taken out of service."""
    return (last := _last(repository, name)) is not None and last.event == "retired"


def failed(repository: Path, name: str) -> int | None:
    """The version that a server wrote down as one that it cannot serve, with nothing to return to; else None."""
    return last.version if (last := _last(repository, name)) is not None and last.event == "failed" else None


def failure(repository: Path, name: str) -> str:
    """The last reason that the history gives for a model."""
    return last.reason if (last := _last(repository, name)) is not None else ""


def _last(repository: Path, name: str) -> Event | None:
    changes = [change for change in read_history(repository, name) if change.event != "pruned"]
    return changes[-1] if changes else None


def write_aliases(repository: Path) -> None:
    """Replace aliases.json."""
    entries = {name: asdict(entry) for name, entry in aliases(repository).items()}
    replace(repository / layout.ALIASES, json.dumps(entries, indent=2) + "\n")


def read_history(repository: Path, name: str | None = None) -> list[Event]:
    """All changes, oldest first, of one model or of all."""
    path = repository / layout.HISTORY
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        events = [Event(**json.loads(line)) for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: not readable: {error}; move it away, promotion begins a new one") from None
    return [event for event in events if name in (None, event.model)]


def record(repository: Path, events: Iterable[Event]) -> None:
    """Append to the history, and write the aliases anew. Whole files are replaced, so that no line is ever torn."""
    lines = [json.dumps(asdict(event)) for event in [*read_history(repository), *events]]
    replace(repository / layout.HISTORY, "".join(f"{line}\n" for line in lines))
    write_aliases(repository)


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


def settle(repository: Path) -> None:
    """Make good what a writer that died after its commit did not get to write."""
    last: dict[str, int | None] = dict.fromkeys(layout.model_names(repository))
    for change in read_history(repository):
        if change.event != "pruned":
            last[change.model] = change.version
    served = _served(repository)
    served |= {name: None for name in last if not (repository / name).exists()}
    last = {name: version for name, version in last.items() if name in served}
    reason = "found when the next change began: whoever made it did not write it down"
    missing = [
        event(name, "recovered", served[name], last[name], None, reason) for name in last if served[name] != last[name]
    ]
    if missing:
        record(repository, missing)


def versions_remembered(repository: Path, name: str) -> set[int]:
    """Every version number that was ever given: none is given twice, as dashboards and evidence refer to it."""
    history = read_history(repository, name)
    return {version for line in history for version in (line.version, line.before) if version is not None}


def replace(path: Path, text: str) -> None:
    """Write a file as a whole or not at all, and make it survive a power cut."""
    staged = path.with_name(f"{layout.STAGING}{path.name}")
    write(staged, text)
    staged.replace(path)
    sync(path.parent)


def write(path: Path, text: str) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o644)  # Triton may run as another user than the one who promotes
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """Make renames in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        return str(os.getuid())
