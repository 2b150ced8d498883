"""Read what a merge would write, as a source of a patch: the base's bytes, and merged numbers where updates are."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np

from ..binding.merge.merge_plan import MergePlan
from ..files.dtypes import FLOATS, TensorSpec
from ..numerics.arrays import Numbers
from ..numerics.forms import FORMS
from ..numerics.workspace import Workspace
from .apply import segments
from .segment import RowSegment, UpdateLoader

BLOCK = 1 << 20  # numbers that are merged at a time

KEPT = 4  # tensors whose factors stay in memory


class MergedSource:
    """A base with adapters merged in memory, as `merge` rounds them; what it stores as codes stays as it is.

    Attributes:
        specs: of the base's stored tensors.
        adapter_files: the open files of the adapters.
    """

    def __init__(self, plan: MergePlan) -> None:
        self._base, self._load, self._lock = plan.base, UpdateLoader(), threading.Lock()
        self.adapter_files = tuple(file for adapter, _ in plan.adapters for file in adapter.file.members)
        self.specs: Mapping[str, TensorSpec] = plan.base.stored
        self._placements = {
            name: placements
            for name, placements in plan.placements.items()
            if name in self.specs
            and self.specs[name].dtype in FLOATS
            and self.specs[name].size
            and name not in plan.base.weights
            and (plan.sources[name].name, plan.sources[name].file) == (name, plan.base.shard_of[name])
        }
        self._kept: dict[str, list[tuple[int, int, RowSegment]]] = {}

    def read(self, tensor: str, first: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a tensor from `first` on."""
        if tensor not in self._placements:
            self._base.shard_of[tensor].read_bytes(tensor, first, out)
            return
        spec, rows = self.specs[tensor], self._placements[tensor][0].rows
        columns, form, work = spec.size // rows, FORMS[spec.dtype], Workspace()
        width, height = columns * form.itemsize, max(1, BLOCK // columns)
        last = -(-(first + len(out)) // width)
        for row in range(first // width, last, height):
            stop = min(row + height, last)
            merged = self._rows(tensor, row, stop, columns, work).bits.reshape(-1).view(np.uint8).data
            start = max(first, row * width)
            end = min(first + len(out), stop * width)
            out[start - first : end - first] = merged[start - row * width : end - row * width]

    def _rows(self, tensor: str, start: int, stop: int, columns: int, work: Workspace) -> Numbers:
        form = FORMS[self.specs[tensor].dtype]
        base = Numbers.empty(form, stop - start, columns)
        self._base.shard_of[tensor].read_numbers(tensor, start * columns, base.bits)
        out = Numbers(base.bits.copy(), form)
        for first, last, segment in self._segments(tensor, columns):
            one, two = max(first, start), min(last, stop)
            if one < two:
                part = slice(one - start, two - start)
                segment.merge(Numbers(base.bits[part], form), one, Numbers(out.bits[part], form), work)
        return out

    def _segments(self, tensor: str, columns: int) -> list[tuple[int, int, RowSegment]]:
        with self._lock:
            if tensor not in self._kept:
                source = self._base.ref(tensor)
                if len(self._kept) >= KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[tensor] = [
                    (start, stop, RowSegment(source, columns, start, stop, inside, self._load))
                    for start, stop, inside in segments(self._placements[tensor], set())
                    if inside
                ]
            return self._kept[tensor]
