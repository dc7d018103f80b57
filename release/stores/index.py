"""What a repository in a bucket holds at one moment: each file's name, and where its bytes lie. One object says it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from dfmcl.common.reader import Unfit, parse_object
from dfmcl.release.stores.store import Etag

FORMAT = "dfmcl.repository/1"


@dataclass(frozen=True)
class Held:
    """A file's bytes. sha256: hex; size: in bytes; key: of the object that holds them, None where `text` is they."""

    sha256: str
    size: int
    key: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Index:
    """Files by name, such as digits/1/model.onnx. etag: of the object that says so; None where there is none."""

    files: Mapping[str, Held] = field(default_factory=dict)
    etag: Etag | None = None

    @cached_property
    def folders(self) -> Mapping[str, Mapping[str, bool]]:
        """What lies in each folder, "" for the outermost: names, and whether they are folders."""
        found: dict[str, dict[str, bool]] = {}
        for name in self.files:
            parts = name.split("/")
            for depth, part in enumerate(parts):
                found.setdefault("/".join(parts[:depth]), {})[part] = depth + 1 < len(parts)
        return found

    def below(self, folder: str) -> dict[str, Held]:
        """The files of a folder and of all in it, by their whole names."""
        prefix = f"{folder}/" if folder else ""
        return {name: held for name, held in self.files.items() if name.startswith(prefix)}

    def with_files(self, files: Mapping[str, Held]) -> Index:
        return replace(self, files={**self.files, **files})

    def without(self, names: Iterable[str]) -> Index:
        gone = set(names)
        return replace(self, files={name: held for name, held in self.files.items() if name not in gone})

    def to_bytes(self, change: str) -> bytes:
        """The object's bytes. change: a word of the one who writes, so that no two write the same."""
        files = {name: _entry(held) for name, held in sorted(self.files.items())}
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in files.items())
        return f'{{"format": "{FORMAT}", "change": "{change}", "files": {{\n{lines}\n}}}}\n'.encode()

    @classmethod
    def from_bytes(cls, data: bytes, etag: Etag) -> Index:
        """The inverse; Unfit where the bytes are no such object, or hold a name that could lead out of a folder."""
        value = parse_object(data)
        if value.get("format") != FORMAT:
            raise Unfit(f"format is {value.get('format')!r}, expected {FORMAT!r}")
        try:
            files = {_name(name): Held(**entry) for name, entry in value["files"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise Unfit(f"is no list of a repository's files ({error})") from None
        if bad := next((name for name, held in files.items() if not _is_whole(held)), None):
            raise Unfit(f"says of {bad!r} neither its bytes nor where they lie")
        index = cls(files, etag)
        if both := next((name for name in files if name in index.folders), None):
            raise Unfit(f"has {both!r} for a file and a folder")
        return index


def _entry(held: Held) -> dict[str, Any]:
    place = {"text": held.text} if held.key is None else {"key": held.key}
    return {"sha256": held.sha256, "size": held.size, **place}


def _name(name: str) -> str:
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise Unfit(f"{name!r} is no file's name")
    return name


def _is_whole(held: Held) -> bool:
    texts = (held.sha256, held.key or "", held.text or "")
    fit = all(isinstance(text, str) for text in texts) and type(held.size) is int and held.size >= 0
    return fit and (held.key is None) != (held.text is None)
