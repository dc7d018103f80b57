"""Records as they lie in JSON: frozen dataclasses, read by the very types that they name, written in their order."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

T = TypeVar("T")


class Entry:
    """Base of a frozen dataclass that is an object in JSON: its fields are the keys, or their aliases.

    No other key is read, and no value of another type: `true` is no number, 1.0 no whole one, null no absent value.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @classmethod
    def from_json(cls, value: object) -> Self:
        """ValueError, in one line, where a part is missing, unknown or of another type."""
        try:
            made: Self = _adapter(cls).validate_python(value)
        except ValidationError as error:
            raise ValueError(_first(error)) from None
        return made

    def to_json(self, *names: str) -> dict[str, Any]:
        """What `from_json` reads; of some fields only, where names are given."""
        written: dict[str, Any] = _adapter(type(self)).dump_python(
            self, mode="json", include=set(names) or None, by_alias=True, exclude_defaults=True, warnings="error"
        )
        return written

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """What `from_json` reads, as JSON Schema (draft 2020-12)."""
        made = _adapter(cls).json_schema(schema_generator=_Plain)
        return {"$schema": _Plain.schema_dialect, **made}


_ADAPTERS: dict[type[Entry], TypeAdapter[Any]] = {}


def _adapter(kind: type[Entry]) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:  # made when it is first asked for: that takes milliseconds
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"lacks {place!r}"
    said = "is not known" if first["type"] == "unexpected_keyword_argument" else f"({first['msg']})"
    return " ".join(f"{place} {said}".split())


class _AsWritten:
    """A number that stays the whole one or the other one that it was written as."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.union_schema(
            [core_schema.int_schema(strict=True), core_schema.float_schema(strict=True)],
            custom_error_type="number",
            custom_error_message="Input should be a number",
        )

    def __get_pydantic_json_schema__(self, _: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "number"}


class _NotNull:
    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        nullable = handler(source)
        assert nullable["type"] == "nullable"
        inner: core_schema.CoreSchema = nullable["schema"]
        return inner


def told(**words: Any) -> WithJsonSchema:
    """That the schema says more of an entry than its type; reading asks for the type alone."""
    return WithJsonSchema(words)


def one_of(*values: object) -> WithJsonSchema:
    return told(enum=list(values))


def text(pattern: str) -> WithJsonSchema:
    return told(type="string", pattern=pattern)


Maybe = Annotated[T | None, _NotNull()]
"""The type of an entry that may be absent; its default is None, which is not written."""
Number = Annotated[float, _AsWritten()]
Amount = Annotated[Number, told(type="number", minimum=0)]
Ratio = Annotated[Number, told(type="number", minimum=0, maximum=1)]
Whole = Annotated[int, Strict()]
Count = Annotated[Whole, told(type="integer", minimum=0)]
Digest = Annotated[str, text("^[0-9a-f]{64}$")]
Bits = Annotated[str, text("^[01]*$")]


class _Plain(GenerateJsonSchema):
    """Without titles and defaults that say nothing."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        made = super().default_schema(schema)
        return {key: value for key, value in made.items() if (key, value) != ("default", None)}
