"""Stand in for a weights file whose tensors have the numbers of another's in other places: rows moved, matrices turned.

A tensor is made of matrices, and each of these of rows of the other file's tensors, which may be stored as codes.
Blocks of rows are read when they are asked for; of matrices that are turned each thread keeps one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .containers.safetensors_file import tensor_bytes
from .dtypes import TORCH_FLOATS, TensorSpec, safetensors_name
from .tensor_ref import TensorRef
from .weights_file import WeightsFile

if TYPE_CHECKING:
    import numpy as np
    import torch

    Rows = np.ndarray[tuple[int], np.dtype[np.int64]]

GAP = 8  # rows that are read and dropped rather than begin to read anew


@dataclass(frozen=True)
class StoredStack:
    """A stored tensor as a stack of matrices, of each of which all rows are used."""

    ref: TensorRef
    rows: int  # of each matrix
    columns: int
    crossed: int = 0  # its matrices are these many rows each, and every one is used turned

    def read(self, matrix: int, rows: Rows) -> torch.Tensor:
        """Return rows of a matrix, in any order: (rows, columns)."""
        import torch

        if self.crossed:
            return self._read_crossed(matrix, rows)
        out = torch.empty(len(rows), self.columns, dtype=self.ref.dtype)
        order = rows.argsort(kind="stable")
        ordered = rows[order]
        breaks = [0, *((ordered[1:] - ordered[:-1] > GAP).nonzero()[0] + 1).tolist(), len(rows)]
        for start, stop in pairwise(breaks):
            first, last = int(ordered[start]), int(ordered[stop - 1])
            run = torch.empty(last + 1 - first, self.columns, dtype=out.dtype)
            self.ref.read_rows(matrix * self.rows + first, run)
            out[torch.from_numpy(order[start:stop])] = run[torch.from_numpy(ordered[start:stop] - first)]
        return out

    def _read_crossed(self, matrix: int, rows: Rows) -> torch.Tensor:
        """Return rows of matrices that are stored as (columns, rows of each)."""
        import torch

        out = torch.empty(len(rows), self.columns, dtype=self.ref.dtype)
        each, whole = rows // self.crossed, torch.empty(self.columns, self.crossed, dtype=self.ref.dtype)
        for number in sorted(set(each.tolist())):
            here = torch.from_numpy((each == number).nonzero()[0])
            self.ref.read_rows((matrix * (self.rows // self.crossed) + number) * self.columns, whole)
            out[here] = whole.T[torch.from_numpy(rows % self.crossed)[here]]
        return out


@dataclass(frozen=True)
class RelaidTensor:
    """A tensor that is made of pieces: of each of its matrices the rows of all, one below the other, put in order."""

    shape: tuple[int, ...]
    pieces: tuple[StoredStack, ...]
    order: Sequence[int] | None = None  # of each row of a matrix, its number among the pieces'; None if it is the same
    turned: bool = False  # the matrices are stored as (columns, rows)
    added: float = 0.0  # to every number, in the tensor's type
    first: int = 0  # the first matrix of the pieces that it has

    @property
    def rows(self) -> int:
        """Rows of each matrix, before it is turned."""
        return sum(piece.rows for piece in self.pieces)

    @property
    def columns(self) -> int:
        return self.pieces[0].columns

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type that holds the numbers of all pieces."""
        import torch

        dtypes = [piece.ref.dtype for piece in self.pieces]
        found = dtypes[0]
        for dtype in dtypes[1:]:
            found = torch.promote_types(found, dtype)
        return found

    @property
    def is_plain(self) -> bool:
        """Return whether its bytes are those of some rows of one tensor."""
        piece = self.pieces[0]
        moved = len(self.pieces) > 1 or self.order is not None or self.turned or self.added or piece.crossed
        return not moved and not piece.ref.weight and piece.ref.spec.dtype in TORCH_FLOATS

    @cached_property
    def _rows(self) -> Rows:
        import numpy as np

        return np.arange(self.rows) if self.order is None else np.asarray(self.order, np.int64)

    def matrix_rows(self, matrix: int, start: int, stop: int) -> torch.Tensor:
        """Return rows start:stop of a matrix, before it is turned."""
        import torch

        rows, out, base = self._rows[start:stop], torch.empty(stop - start, self.columns, dtype=self.dtype), 0
        for piece in self.pieces:
            here = ((rows >= base) & (rows < base + piece.rows)).nonzero()[0]
            if len(here):
                out[torch.from_numpy(here)] = piece.read(self.first + matrix, rows[here] - base).to(out.dtype)
            base += piece.rows
        return out.add_(self.added) if self.added else out


class RelaidFile(WeightsFile):
    """A weights file of relaid tensors.

    Args:
        like: the file that lends its stamp; its owner closes it.
        path: where it would be, by the names of its tensors.
    """

    def __init__(
        self, like: WeightsFile, path: Path, tensors: Mapping[str, RelaidTensor], metadata: Mapping[str, str]
    ) -> None:
        self.path, self.file, self.stamp = path, like.file, like.stamp
        self.tensors, self.begin, self.metadata = tensors, {}, dict(metadata)
        self.specs = {name: TensorSpec(_name_of(tensor), tensor.shape) for name, tensor in tensors.items()}
        self.nbytes = sum(spec.nbytes for spec in self.specs.values())
        self._kept = threading.local()

    def stored_type(self, name: str) -> str:
        piece = self.tensors[name].pieces[0]
        return piece.ref.file.stored_type(piece.ref.name)

    def is_computed(self, name: str) -> bool:
        return not self.tensors[name].is_plain

    def extents(self, name: str) -> Iterator[tuple[BinaryIO, int, int]]:
        tensor, spec = self.tensors[name], self.specs[name]
        (piece,) = tensor.pieces
        width = TensorSpec(spec.dtype, (tensor.rows * tensor.columns,)).nbytes
        yield piece.ref.file.file, piece.ref.file.begin[piece.ref.name] + tensor.first * width, spec.nbytes

    def read(self, name: str) -> memoryview:
        return tensor_bytes(self.tensor(name), self.specs[name])

    def tensor(self, name: str) -> torch.Tensor:
        import torch

        out = torch.empty(self.specs[name].shape, dtype=self.tensors[name].dtype)
        self.read_numbers(name, 0, out)
        return out

    def read_numbers(self, name: str, first: int, out: torch.Tensor) -> None:
        tensor, flat = self.tensors[name], out.view(-1)
        size, done = tensor.rows * tensor.columns, 0
        while done < len(flat):
            matrix, start = divmod(first + done, size)
            stop = min(size, start + len(flat) - done)
            if tensor.turned:
                flat[done : done + stop - start] = self._turned(name, matrix)[start:stop]
            else:
                row, end = start // tensor.columns, -(-stop // tensor.columns)
                found = tensor.matrix_rows(matrix, row, end).view(-1)
                skipped = start - row * tensor.columns
                flat[done : done + stop - start] = found[skipped : skipped + stop - start]
            done += stop - start

    def _turned(self, name: str, matrix: int) -> torch.Tensor:
        """Return the numbers of a turned matrix, of which each thread keeps the last: its blocks are read in a row."""
        if getattr(self._kept, "key", None) != (name, matrix):
            self._kept.key = self._kept.numbers = None  # before the next takes memory
            whole = self.tensors[name].matrix_rows(matrix, 0, self.tensors[name].rows)
            self._kept.numbers, self._kept.key = whole.T.contiguous().view(-1), (name, matrix)
        found: torch.Tensor = self._kept.numbers
        return found


def _name_of(tensor: RelaidTensor) -> str:
    """Return the safetensors name of a tensor's type."""
    plain = {piece.ref.spec.dtype for piece in tensor.pieces if not piece.ref.weight}
    if len(tensor.pieces) == 1 and plain:
        return plain.pop()
    return safetensors_name(tensor.dtype)
