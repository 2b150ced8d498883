"""Reusable buffers of one worker."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from .arrays import ON_CPU, Array, Numbers, empty, pinned
from .forms import Form


class Workspace:
    """Buffers of one worker, flat and reused for every shape. Views are cached, because making one costs a call.

    Args:
        like: an array where the buffers are to be.
        pinned: in pages that a GPU can read by itself.
    """

    def __init__(self, like: Array = ON_CPU, pinned: bool = False) -> None:
        self._like, self._pinned = like, pinned
        self._flat: dict[tuple[str, Any], Array] = {}
        self._views: dict[tuple[str, Any, int, int], Array] = {}

    def take(self, name: str, kind: npt.DTypeLike, rows: int, columns: int) -> Array:
        """Return the buffer of this name and kind as (rows, columns); it overwrites the one taken before."""
        view = self._views.get((name, kind, rows, columns))
        if view is None:
            size = rows * columns
            flat = self._flat.get((name, kind))
            if flat is None or len(flat) < size:
                flat = self._flat[name, kind] = self._made(kind, size)
                self._views = {key: old for key, old in self._views.items() if key[:2] != (name, kind)}
            view = self._views[name, kind, rows, columns] = flat[:size].reshape(rows, columns)
        return view

    def _made(self, kind: npt.DTypeLike, size: int) -> Array:
        return pinned(kind, size) if self._pinned else empty(kind, size, like=self._like)

    def numbers(self, name: str, form: Form, rows: int, columns: int) -> Numbers:
        """Return the buffer of this name for numbers."""
        return Numbers(self.take(name, form.bits_type, rows, columns), form)
