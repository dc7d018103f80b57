"""A library that another one imports and seldom needs, loaded only when something of it is used.

onnx2pytorch imports torchvision for detectors' operators; a classifier has none of them, and torchvision takes 160 MB
and seconds of every gate.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class Later:
    """What a name of a module stands for: it is looked up when it is called, or asked for a name of its own."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _real(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)


class _Empty(ModuleType):
    """A module that stands where the real one will be."""

    __path__: list[str] = []  # noqa: RUF012  # a package, for whoever imports what lies in it

    def __getattr__(self, name: str) -> Later:
        if name.startswith("__"):
            raise AttributeError(name)
        return Later(self.__name__, name)


@contextmanager
def deferred(*modules: str) -> Iterator[None]:
    """Inside, an import of these gives names that load them when they are used, unless they are loaded already."""
    absent = [name for name in modules if name not in sys.modules]
    if len(absent) < len(modules):
        yield
        return
    sys.modules.update({name: _Empty(name) for name in modules})
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
