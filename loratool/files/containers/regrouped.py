"""Lazy view of weights files with tensors renamed, split into rows, or concatenated.

Nothing is stored: a copy takes the bytes from their files (`extents`), and a cast reads the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..dtypes import TensorSpec
from ..weights_file import WeightsFile


@dataclass(frozen=True)
class StoredRows:
    """Rows [start, stop) of a stored tensor, along its first dimension."""

    file: WeightsFile
    tensor: str
    start: int
    stop: int

    @property
    def first(self) -> int:
        """Return the rows' first byte in the tensor."""
        return self.start * self._width

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self._width

    @property
    def _width(self) -> int:
        spec = self.file.specs[self.tensor]
        return TensorSpec(spec.dtype, spec.shape[1:]).nbytes


class RegroupedFile(WeightsFile):
    """A weights file whose tensors are rows of other files' tensors, concatenated, all of one dtype per tensor.

    Args:
        like: the file that lends its stamp; its owner closes it.
        path: a path for errors that fits the names of its tensors.
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
        self.scattered = any(each.file.scattered for parts in rows.values() for each in parts)

    def extents(self, name: str) -> Iterator[tuple[BinaryIO, int, int]]:
        for rows in self._rows[name]:
            yield rows.file.file, rows.file.begin[rows.tensor] + rows.first, rows.nbytes

    def read_bytes(self, name: str, first: int, out: memoryview) -> None:
        done = 0
        for rows in self._rows[name]:
            skipped = min(first, rows.nbytes)
            count = min(rows.nbytes - skipped, len(out) - done)
            if count:
                rows.file.read_bytes(rows.tensor, rows.first + skipped, out[done : done + count])
            first, done = first - skipped, done + count
