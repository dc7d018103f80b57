"""Configuration as TOML over visible defaults: an unknown key is an error that names file and key."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dfmcl.common.errors import BadInput
from dfmcl.common.reader import TEXT_BYTES, Unfit, read_plain, why_unread
from dfmcl.common.text import scheme_of, why_not_local

M = TypeVar("M", bound=BaseModel)


class Section(BaseModel):
    """A table of the file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _is_local(text: str) -> str:
    if why := why_not_local(text):
        raise ValueError(why)
    return text


def _is_endpoint(url: str) -> str:
    host, _, port = url.rpartition(":")
    if not host or "/" in url or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("write host:port of Triton's gRPC endpoint, such as 127.0.0.1:8001")
    return url


def _is_set(names: list[str]) -> list[str]:
    if len(set(names)) != len(names):
        raise ValueError("names something twice")
    return names


LocalPath = Annotated[str, AfterValidator(_is_local)]
TritonUrl = Annotated[str, AfterValidator(_is_endpoint)]
EachOnce = AfterValidator(_is_set)
MOST_SEED = 2**63 - 1
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
"""As far as every library and every reader of a record takes a whole number."""
MOST_DAYS = 36_500  # a century; a date that far from one of today is one still
Days = Annotated[int, Field(ge=1, le=MOST_DAYS)]
S = TypeVar("S", bound=Section)


def anchored(section: S, folder: Path, *names: str) -> S:
    """The same section with every path that is set joined to `folder`; absolute ones and addresses stay as they are."""
    values = {name: getattr(section, name) for name in names}
    paths = {name: value for name, value in values.items() if value and not scheme_of(value)}
    return section.model_copy(update={name: str(folder / value) for name, value in paths.items()})


def read_toml(path: Path, advice: str) -> dict[str, Any]:
    """The table of a TOML file; BadInput names the file and the place, or ends with the advice where it is missing."""
    try:
        text = read_plain(path, TEXT_BYTES, named=True).decode("utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not text; {advice}") from None
    except (OSError, Unfit) as error:
        raise BadInput(f"{path}: {why_unread(error)}; {advice}") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path}: not TOML: {error}") from None
    except RecursionError:
        raise BadInput(f"{path}: not TOML that anybody writes: it is nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python reads, a date that no calendar has
        raise BadInput(f"{path}: not TOML that anybody writes: {str(error).partition(';')[0]}") from None


def shipped(package: str) -> dict[str, str]:
    """The TOML files that a package carries: text by name."""
    files = {item.name: item for item in resources.files(package).iterdir() if item.name.endswith(".toml")}
    return {name.removesuffix(".toml"): files[name].read_text(encoding="utf-8") for name in sorted(files)}


def read_shipped(source: str, package: str, noun: str) -> dict[str, Any]:
    """The table of a TOML file that the package carries, by its name, or of any other, by its path."""
    known = shipped(package)
    if source in known:
        return tomllib.loads(known[source])
    return read_toml(Path(source), f"name a TOML file or a {noun} ({', '.join(known)})")


def _fields(model: Any, path: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at `path` below a model."""
    for name in path:
        model = model.model_fields[name].annotation
    return list(model.model_fields)


def validated(model: type[M], table: dict[str, Any], source: str) -> M:
    """A pydantic model from a table; the error names the file, the key and what is wrong with it."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(top level)"
        if first["type"] == "extra_forbidden":
            known = ", ".join(_fields(model, first["loc"][:-1]))
            raise BadInput(f"{source}: unknown key {key}; known are {known}") from None
        message = first["msg"].removeprefix("Value error, ")
        found = f" (found {first['input']!r})" if first["loc"] else ""  # what spans several keys names them itself
        raise BadInput(f"{source}: {key}: {message}{found}" if found else f"{source}: {message}") from None
