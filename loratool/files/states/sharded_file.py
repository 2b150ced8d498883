"""Lazy view of a training run's sharded state, in which each rank's file has chunks of tensors, as one weights file.

A chunk is a box of the tensor, stored row by row at one place of a file. Reading assembles only the requested rows, so
the memory is that of the block that is read, whatever the tensor's size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path

from ...architectures.prefixes import WRAPPERS
from ...durable.fileio import read_into
from ...errors import InputError
from ..containers.zip_entries import damage_named
from ..dtypes import TensorSpec
from ..weights_file import WeightsFile

MAX_CUT = 4  # the most dimensions along which a tensor is cut; two meshes of ranks cut two

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes along each dimension of a tensor


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, stored row by row in a file.

    offsets, sizes: along each dimension of the tensor, or of the tensor viewed as a vector.
    """

    file: WeightsFile
    begin: int  # its first byte
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Boxes:
    """The bytes of a tensor that chunks tile.

    Args:
        shape: the dimensions to which the chunks' offsets and sizes refer.
        width: bytes of a number.
    """

    def __init__(self, shape: tuple[int, ...], width: int, chunks: Iterable[Chunk]) -> None:
        runs = [_Runs(chunk, shape, width) for chunk in chunks if math.prod(chunk.sizes)]
        self._runs = sorted(runs, key=lambda run: run.start)
        self._starts = [run.start for run in self._runs]
        self._stops = list(accumulate((run.stop for run in self._runs), max))

    @property
    def first(self) -> tuple[int, int] | None:
        """Return the file and offset of its first bytes; None if it has no bytes."""
        return self._runs[0].origin if self._runs else None

    def read(self, first: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from `first` on."""
        stop = first + len(out)
        for runs in self._runs[bisect_right(self._stops, first) : bisect_left(self._starts, stop)]:
            runs.read(first, stop, out)


class _Runs:
    """The runs of bytes of a chunk that are contiguous in the tensor too, in order, all of one length."""

    def __init__(self, chunk: Chunk, shape: tuple[int, ...], width: int) -> None:
        self._chunk = chunk
        strides = [width * math.prod(shape[d + 1 :]) for d in range(len(shape))]
        inner = len(shape)  # dimensions from here on are complete in the chunk, so they are one run
        while inner and chunk.sizes[inner - 1] == shape[inner - 1]:
            inner -= 1
        outer = max(0, inner - 1)
        self.length = width * math.prod(chunk.sizes[outer:])
        self._sizes, self._strides = chunk.sizes[:outer], strides[:outer]
        self._count = math.prod(self._sizes)
        self.start = sum(offset * stride for offset, stride in zip(chunk.offsets, strides, strict=True))
        self.stop = self._place(self._count - 1) + self.length

    @property
    def origin(self) -> tuple[int, int]:
        return id(self._chunk.file), self._chunk.begin

    def _place(self, run: int) -> int:
        """Return a run's first byte in the tensor."""
        place = self.start
        for size, stride in zip(reversed(self._sizes), reversed(self._strides), strict=True):
            run, index = divmod(run, size)
            place += index * stride
        return place

    def read(self, first: int, stop: int, out: memoryview) -> None:
        """Write the chunk's part of the tensor's bytes first:stop into `out`, reading the file once."""
        low = bisect_right(range(self._count), first - self.length, key=self._place)
        high = bisect_left(range(self._count), stop, key=self._place)
        if low >= high:
            return
        skipped = max(0, first - self._place(low))
        end = min(self.length, stop - self._place(high - 1))
        place, count = self._chunk.begin + low * self.length + skipped, (high - 1 - low) * self.length + end - skipped
        if low == high - 1:
            done = self._place(low) + skipped - first
            read_into(self._chunk.file.file, out[done : done + count], place)
            return
        data = memoryview(bytearray(count))
        read_into(self._chunk.file.file, data, place)
        taken = -skipped
        for run in range(low, high):
            begin, done = max(taken, 0), max(self._place(run) - first, 0)
            part = data[begin : taken + self.length]
            out[done : done + len(part)] = part
            taken += self.length


def require_tiling(name: str, shape: tuple[int, ...], boxes: Iterable[Box]) -> None:
    """Raise InputError if boxes overlap or leave holes: every number of the tensor must be in exactly one box.

    The corners of the boxes, with alternating signs, determine their sum: it is the box `shape` if all corners but
    those of `shape` cancel. The time is proportional to the number of chunks.
    """
    boxes = [box for box in boxes if math.prod(box[1])]
    cut = [d for d in range(len(shape)) if any(offsets[d] or sizes[d] != shape[d] for offsets, sizes in boxes)]
    if len(cut) > MAX_CUT:
        raise InputError(f"is cut along {len(cut)} dimensions, and at most {MAX_CUT} are read", culprit=name)
    corners: Counter[tuple[int, ...]] = Counter()
    full = [((0,) * len(shape), shape, -1)] if math.prod(shape) else []
    for offsets, sizes, sign in (*((*box, 1) for box in boxes), *full):
        for ends in product((0, 1), repeat=len(cut)):
            corner = tuple(offsets[d] + end * sizes[d] for d, end in zip(cut, ends, strict=True))
            corners[corner] += sign * (-1) ** sum(ends)
    if any(corners.values()):
        raise InputError(
            f"its {len(boxes)} chunks overlap, or leave holes in {shape}",
            culprit=name,
            remedy="is the checkpoint complete, and its files from one run?",
        )


class ShardedFile(WeightsFile, ABC):
    """A weights file whose tensors consist of chunks in other files, which a subclass finds.

    Two names have the same `storage` if their first chunk is the same.
    """

    scattered = True
    frozen: frozenset[str] = frozenset()  # tensors that were not trained; empty if the state does not tell

    def __init__(self, path: Path) -> None:
        self.path, self.metadata, self.begin = path, None, {}
        self._parts: dict[Path, WeightsFile] = {}
        try:
            with damage_named(path):
                self._join(self._find())
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _find(self) -> dict[str, tuple[TensorSpec, Boxes]]:
        """Return the tensors by their names in the state, and set `ignored` and `frozen`."""

    def _part(self, path: Path) -> WeightsFile:
        """Return a file of the state, opened once."""
        if path not in self._parts:
            self._parts[path] = _Part(path)
        return self._parts[path]

    def _join(self, tensors: Mapping[str, tuple[TensorSpec, Boxes]]) -> None:
        """Add the tensors under their names without the wrappers of a training run.

        Raises:
            InputError: two names become equal.
        """
        names = {name: plain_name(name) for name in tensors}
        if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
            raise InputError("is the name of two tensors, but for the wrappers in it", culprit=twice[0])
        self.frozen = frozenset(names.get(name, name) for name in self.frozen)
        self.specs = {names[name]: spec for name, (spec, _) in tensors.items()}
        self._boxes = {names[name]: boxes for name, (_, boxes) in tensors.items()}
        first = next(iter(self._parts.values()))
        self.file, self.stamp = first.file, first.stamp
        self.nbytes = sum(part.nbytes for part in self._parts.values())

    @property
    def members(self) -> Sequence[WeightsFile]:
        return tuple(self._parts.values())

    def put_under(self, prefix: str) -> None:
        super().put_under(prefix)
        self._boxes = {prefix + name: boxes for name, boxes in self._boxes.items()}

    def storage(self, name: str) -> Hashable:
        return self._boxes[name].first

    def close(self) -> None:
        for part in self._parts.values():
            part.close()

    def read_bytes(self, name: str, first: int, out: memoryview) -> None:
        self._boxes[name].read(first, out)


class _Part(WeightsFile):
    """A file of a sharded state; the state has the places of its chunks."""

    def __init__(self, path: Path) -> None:
        self._open(path)
        self.specs, self.begin, self.metadata = {}, {}, None


def plain_name(name: str) -> str:
    """Return a tensor's name without the parts that wrappers add; `module` is a wrapper only at the start."""
    path = name.removeprefix("module.").split(".")
    return ".".join(part for part in path if part not in WRAPPERS or part == "module")
