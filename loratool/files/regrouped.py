"""Stand in for a weights file whose tensors consist of rows of the tensors of others: renamed, cut, put together.

Nothing of it is ever stored: a copy takes the bytes from where they are (`extents`), and a cast reads the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .dtypes import TensorSpec
from .fileio import read_into
from .weights_file import WeightsFile

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StoredRows:
    """Rows [start, stop) of a stored tensor, whose first dimension they are of."""

    file: WeightsFile
    tensor: str
    start: int
    stop: int

    @property
    def extent(self) -> tuple[BinaryIO, int, int]:
        """Return the file, the first byte and how many."""
        spec = self.file.specs[self.tensor]
        width = TensorSpec(spec.dtype, spec.shape[1:]).nbytes
        return self.file.file, self.file.begin[self.tensor] + self.start * width, (self.stop - self.start) * width


class RegroupedFile(WeightsFile):
    """A weights file whose tensors are rows of others, in order, all of the tensor's own dtype.

    Args:
        like: the file that lends its stamp; its owner closes it.
        path: where it would be, by the names of its tensors.
    """

    def __init__(
        self,
        like: WeightsFile,
        path: Path,
        specs: Mapping[str, TensorSpec],
        rows: Mapping[str, Sequence[StoredRows]],
        metadata: Mapping[str, str],
    ) -> None:
        self.path, self.file, self.stamp = path, like.file, like.stamp
        self.specs, self.begin, self.metadata = dict(specs), {}, dict(metadata)
        self.nbytes = sum(spec.nbytes for spec in specs.values())
        self._rows = rows

    def extents(self, name: str) -> Iterator[tuple[BinaryIO, int, int]]:
        yield from (each.extent for each in self._rows[name])

    def read(self, name: str) -> memoryview:
        buffer = memoryview(bytearray(self.specs[name].nbytes))
        _read(self.extents(name), 0, buffer)
        return buffer

    def read_numbers(self, name: str, first: int, out: torch.Tensor) -> None:
        import torch

        _read(self.extents(name), first * out.itemsize, out.view(torch.uint8).numpy().data.cast("B"))


def _read(extents: Iterator[tuple[BinaryIO, int, int]], first: int, out: memoryview) -> None:
    """Read bytes from `first` on into `out`."""
    done = 0
    for file, offset, length in extents:
        skipped = min(first, length)
        count = min(length - skipped, len(out) - done)
        if count:
            read_into(file, out[done : done + count], offset + skipped)
        first, done = first - skipped, done + count
