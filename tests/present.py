"""A value that may be missing by its type, and that a test knows is there."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """The value; an AssertionError where it is None."""
    assert value is not None
    return value
