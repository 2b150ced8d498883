"""Stand in for packages and operators that a server imports and that play no part in reading weights and adapters."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any, ClassVar


class _AnyClass(type):
    """A class whose attributes are such classes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _any_class(name)

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__


def _schema(cls: Any, source: Any, handler: Any) -> Any:
    from pydantic_core import core_schema

    return core_schema.any_schema()


def _any_class(name: str) -> Any:
    """Return a class that can be a base, a decorator, a field of pydantic's and a generic type."""
    methods = {
        "__init__": lambda self, *args, **options: None,
        "__call__": lambda self, *args, **options: args[0] if args and callable(args[0]) else None,
        "__class_getitem__": classmethod(lambda cls, item: cls),
        "__get_pydantic_core_schema__": classmethod(_schema),
    }
    return _AnyClass(name, (), methods)


class AnyModule(types.ModuleType):
    """A module of any classes."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _any_class(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: list[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return AnyModule(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def stand_in(packages: str) -> None:
    """Let the named packages be imported, as classes without content."""
    import transformers.processing_utils  # noqa: F401  (asks which packages there are, so before any stands in)

    sys.meta_path.append(_Finder(packages.split()))


def operators(space: str, ending: str = "") -> None:
    """Let operators of a namespace of torch be found, all or those whose names end so."""
    import torch

    kind = type(getattr(torch.ops, space))
    found = kind.__getattr__

    def get(self: Any, name: str) -> Any:
        try:
            return found(self, name)
        except AttributeError:
            if self.name != space or name.startswith("__") or not name.endswith(ending):
                raise
            return lambda *args, **options: None

    kind.__getattr__ = get
