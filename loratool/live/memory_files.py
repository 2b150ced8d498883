"""Tensors in memory as weights files, so that they are planned and read as those of files are."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..files.checkpoint import Checkpoint
from ..files.dtypes import TORCH_FLOATS, TensorSpec
from ..files.weights_file import WeightsFile
from ..numerics.arrays import Array, Numbers, bytes_of, fetched
from .strided import StridedMemory, type_name
from .tensors import LiveTensors, has_memory, memory_key

NOWHERE = Path(os.devnull)  # no file is below it


class MemoryFile(WeightsFile):
    """The tensors of a model in memory.

    Attributes:
        is_read: whether numbers were read since it was made, or since it was set to False.
    """

    def __init__(self, tensors: LiveTensors) -> None:
        self.path, self.stamp, self.begin, self.metadata = Path(tensors.title), (), {}, None
        self.memory = {name: StridedMemory(x) for name, x in tensors.named.items() if has_memory(x)}
        self._tensors = tensors
        self.specs = {name: TensorSpec(type_name(x) or "", tuple(x.shape)) for name, x in tensors.named.items()}
        self.nbytes = sum(spec.nbytes for spec in self.specs.values())
        self.is_read = False
        self._shown = threading.local()

    @property
    def members(self) -> Sequence[WeightsFile]:
        return ()

    def close(self) -> None:
        """Do nothing: the tensors are the caller's."""

    def storage(self, name: str) -> Hashable:
        return memory_key(self._tensors.named[name])

    @contextmanager
    def showing(self, name: str, first: int, bits: Array) -> Iterator[None]:
        """Have this thread read other numbers of a tensor from `first` on, while the block runs.

        Args:
            bits: flat.
        """
        self._shown.value = name, first, bits
        try:
            yield
        finally:
            self._shown.value = None

    def read_bytes(self, name: str, first: int, out: memoryview) -> None:
        memory, self.is_read = self.memory[name], True
        width = memory.spec.nbytes // max(1, memory.spec.size)
        numbers = np.empty(-(-(first % width + len(out)) // width), f"i{width}")
        self._read(name, first // width, numbers)
        out[:] = bytes_of(numbers)[first % width : first % width + len(out)]

    def _read(self, name: str, first: int, out: npt.NDArray[Any]) -> None:
        shown = getattr(self._shown, "value", None)
        if shown is None or shown[0] != name:
            self.memory[name].read(first, out)
            return
        _, begin, bits = shown
        assert begin <= first and first + len(out) <= begin + len(bits), "an item has all rows that its steps read"
        out[...] = fetched(bits[first - begin : first - begin + len(out)])


class KeptFile(WeightsFile):
    """An adapter's file, of which `keep` keeps some tensors in memory: it may be written again meanwhile."""

    def __init__(self, inner: WeightsFile) -> None:
        self.path, self.stamp, self.nbytes, self.metadata = inner.path, inner.stamp, inner.nbytes, inner.metadata
        self.specs, self.begin, self.ignored = inner.specs, {}, inner.ignored
        self._inner = inner
        self._kept: dict[str, Numbers | bytes] = {}

    @property
    def members(self) -> Sequence[WeightsFile]:
        return self._inner.members

    @property
    def folders(self) -> tuple[Path, ...]:
        return self._inner.folders

    def keep(self, names: Collection[str]) -> None:
        """Read these tensors; no other can be read once the file is closed."""
        for name in names:
            computed = self._inner.is_computed(name) and self.specs[name].dtype in TORCH_FLOATS
            self._kept[name] = self._inner.numbers(name) if computed else bytes(self._inner.read(name))

    @property
    def kept_nbytes(self) -> int:
        """Return how many bytes of tensors are in memory."""
        return sum(x.bits.nbytes if isinstance(x, Numbers) else len(x) for x in self._kept.values())

    def close(self) -> None:
        self._inner.close()

    def storage(self, name: str) -> Hashable:
        return self._inner.storage(name)

    def stored_type(self, name: str) -> str:
        return self._inner.stored_type(name)

    def is_computed(self, name: str) -> bool:
        return True

    def read(self, name: str) -> memoryview:
        kept = self._kept.get(name)
        if kept is None or isinstance(kept, Numbers):
            return self._inner.read(name) if kept is None else super().read(name)
        return memoryview(bytearray(kept))

    def read_bytes(self, name: str, first: int, out: memoryview) -> None:
        kept = self._kept.get(name)
        if isinstance(kept, bytes):
            out[:] = kept[first : first + len(out)]
        elif kept is not None:
            out[:] = bytes_of(kept.bits)[first : first + len(out)]
        else:
            self._inner.read_bytes(name, first, out)

    def numbers(self, name: str) -> Numbers:
        kept = self._kept.get(name)
        if kept is None:
            return self._inner.numbers(name)
        return kept if isinstance(kept, Numbers) else super().numbers(name)


def checkpoint_of(tensors: LiveTensors) -> Checkpoint:
    """Return the tensors of a model in memory as a checkpoint without files beside it."""
    path = Path(tensors.title)
    return Checkpoint(path, NOWHERE / path, True, (MemoryFile(tensors),), None, dict(tensors.config))
