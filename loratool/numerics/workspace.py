"""Reusable buffers of one worker."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Buffers of one worker, flat and reused for every shape. Views are cached, because making one costs a call."""

    def __init__(self, device: torch.device, pinned: bool = False) -> None:
        self.device = device
        self._pinned = pinned
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, int, int], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        """Return the buffer of this name and dtype as (rows, columns); it overwrites the one taken before."""
        view = self._views.get((name, dtype, rows, columns))
        if view is None:
            size = rows * columns
            flat = self._flat.get((name, dtype))
            if flat is None or len(flat) < size:
                flat = torch.empty(size, dtype=dtype, device=self.device, pin_memory=self._pinned)
                self._flat[name, dtype] = flat
                self._views = {key: old for key, old in self._views.items() if key[:2] != (name, dtype)}
            view = self._views[name, dtype, rows, columns] = flat[:size].view(rows, columns)
        return view
