"""Work items of a rewrite: their sources, their places in the output, and their outcomes.

An item is a range of bytes to copy, a range of a tensor's rows to compute, or a batch. A batch holds all rows of
several small tensors that are alike, since a block costs three hundred calls whatever its size; or ranges of bytes to
hash, two of them in one loop. Any worker can run any item, and no result depends on their order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..durable.fileio import read_into
from ..files.tensor_ref import TensorRef
from ..files.weights_file import WeightsFile
from ..numerics.arrays import Numbers
from ..numerics.forms import Form
from ..numerics.workspace import Workspace
from .scattered import Scattered, Strided


@dataclass(frozen=True)
class CopyBytes:
    """An item that copies bytes of one file to a place in another."""

    source: BinaryIO
    source_offset: int
    target: BinaryIO
    target_offset: int
    nbytes: int
    checked: bool = False  # the result is the CRC-32 of the bytes

    @property
    def end(self) -> tuple[int, int]:
        return self.source_offset + self.nbytes, self.target_offset + self.nbytes

    def read(self, first: int, out: memoryview) -> None:
        """Fill `out` with copied bytes, from a given byte on."""
        read_into(self.source, out, self.source_offset + first)


@dataclass(frozen=True)
class GatherBytes:
    """An item that collects scattered bytes of a tensor and writes them in order to a place in a file."""

    source: WeightsFile
    name: str
    first: int  # byte of the tensor
    target: BinaryIO
    target_offset: int
    nbytes: int
    checked: bool = False  # the result is the CRC-32 of the bytes

    def read(self, first: int, out: memoryview) -> None:
        """Fill `out` with copied bytes, from a given byte on."""
        self.source.read_bytes(self.name, self.first + first, out)


@dataclass(frozen=True)
class HashBytes:
    """Bytes of a tensor to hash with sha256."""

    tensor: str
    part: int  # the number of the tensor's piece
    source: WeightsFile
    first: int  # byte of the tensor
    length: int


@dataclass(frozen=True)
class HashBatch:
    """An item that hashes bytes of tensors, and writes nothing."""

    parts: tuple[HashBytes, ...]

    nbytes = 0  # of its output


# Compute a block: (base, index of its first row within the item, out, work) -> the block's result. It writes `out`,
# which is Numbers, or an array of codes.
Step = Callable[[Numbers, int, Any, Workspace], Any]

# (start, stop) of an item's rows -> the step for its blocks; it holds what all of these rows share.
Prepare = Callable[[int, int], Step]


@dataclass(frozen=True)
class Batching:
    """A small tensor's share in a batch: all rows of several tensors, one below the other, pass through one step.

    Attributes:
        alike: equal for tensors that can be in one batch.
        size: count of numbers in memory, of the tensor or of its factors, whichever is more.
        part: the step's input for this tensor.
        prepare: takes all parts; returns a step that returns a list with one result for each.
    """

    alike: Hashable
    size: int
    part: Any
    prepare: Callable[[Sequence[Any]], Step]


# A tensor's name in the output -> its file, and its first byte there.
Locate = Callable[[str], tuple[BinaryIO, int]]


@dataclass(frozen=True)
class MapRows:
    """An item that passes rows `start:stop` of a weight, seen as a matrix, through a step, to a place in a file."""

    tensor: str
    source: TensorRef
    columns: int
    target: BinaryIO
    target_offset: int  # of row `start`
    written: Form | npt.DTypeLike  # the form of what is written, or the type of codes
    target_columns: int
    start: int
    stop: int
    prepare: Prepare
    block_rows: int  # rows of a block, read, computed and written at a time
    checked: bool = False  # the results begin with the CRC-32 of the output
    scattered: tuple[Scattered, Locate, int] | None = None  # with the number of all rows, if the step writes codes
    batching: Batching | None = None  # of all rows of a small tensor

    @property
    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the first row of each block and the row after its last, counted within the item."""
        count = self.stop - self.start
        return ((row, min(row + self.block_rows, count)) for row in range(0, count, self.block_rows))

    @property
    def itemsize(self) -> int:
        """Bytes of a number that is written."""
        return self.written.itemsize if isinstance(self.written, Form) else np.dtype(self.written).itemsize

    @property
    def nbytes(self) -> int:
        if self.scattered:
            return (self.stop - self.start) * self.scattered[0].nbytes // self.scattered[2]
        return (self.stop - self.start) * self.target_columns * self.itemsize

    def places(self, written: Iterable[Strided]) -> Iterator[tuple[BinaryIO, int, int]]:
        """Yield the places of the blocks: the file, the first byte, and the number of bytes.

        Args:
            written: the places of codes; unused for other tensors.
        """
        if self.scattered is None:
            width = self.target_columns * self.itemsize
            yield from (
                (self.target, self.target_offset + row * width, (end - row) * width) for row, end in self.blocks
            )
            return
        for strided in written:
            target, offset = self.scattered[1](strided.tensor)
            yield from ((target, offset + first, nbytes) for first, nbytes in strided)


@dataclass(frozen=True)
class MapBatch:
    """An item that passes several small tensors, alike and of one shape, through one step."""

    parts: tuple[MapRows, ...]

    def prepare(self) -> Step:
        """Return the step for all of them."""
        batchings = [part.batching for part in self.parts if part.batching]
        return batchings[0].prepare([batching.part for batching in batchings])

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


Item = CopyBytes | GatherBytes | MapRows | MapBatch | HashBatch


def each_part(item: Item) -> tuple[Any, ...]:
    """Return the parts of a batch, or the item alone."""
    return item.parts if isinstance(item, MapBatch | HashBatch) else (item,)


@dataclass(frozen=True)
class FinishedItem:
    """An item that an earlier run has finished. It is run again only if its output is no longer there.

    Attributes:
        digest: of its output; empty for copies, which are compared with their source.
        written: the places of codes, in the order in which they were written.
    """

    item: Item
    digest: str
    written: Sequence[Strided] = ()

    @property
    def nbytes(self) -> int:
        return self.item.nbytes


@dataclass(frozen=True)
class Outcome:
    """The outcome of an item.

    Attributes:
        digest: of its output, as in `FinishedItem`.
        results: one of each block, in the order of rows, after a CRC-32 or the places of codes. Of a batch, a list of
            these, or of one hash, for each part. None if an earlier run has written it.
    """

    digest: str
    results: list[Any] | None
