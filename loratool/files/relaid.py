"""Lazy view of a weights file with rows moved or matrices transposed.

A tensor consists of matrices, and a matrix of rows of the file's tensors, which may be stored as codes. Blocks of rows
are read on access. Each thread caches one transposed matrix.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .containers.safetensors_file import tensor_bytes
from .dtypes import TORCH_FLOATS, TensorSpec, safetensors_name
from .tensor_ref import TensorRef
from .weights_file import WeightsFile

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Rows = np.ndarray[tuple[int], np.dtype[np.int64]]

GAP = 8  # one read continues over at most so many unneeded rows


@dataclass(frozen=True)
class StoredStack:
    """A stored tensor as a stack of matrices; all rows of each matrix are used."""

    ref: TensorRef
    rows: int  # of each matrix
    columns: int
    transposed_rows: int = 0  # rows of each stored matrix, if all are used transposed; else 0

    def read(self, matrix: int, rows: Rows) -> torch.Tensor:
        """Return rows of a matrix, in any order: (rows, columns)."""
        import torch

        if self.transposed_rows:
            return self._read_transposed(matrix, rows)
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

    def _read_transposed(self, matrix: int, rows: Rows) -> torch.Tensor:
        """Return rows of matrices that are stored transposed, (columns, rows of each)."""
        import torch

        out = torch.empty(len(rows), self.columns, dtype=self.ref.dtype)
        numbers = rows // self.transposed_rows
        stored = torch.empty(self.columns, self.transposed_rows, dtype=self.ref.dtype)
        for number in sorted(set(numbers.tolist())):
            here = torch.from_numpy((numbers == number).nonzero()[0])
            self.ref.read_rows((matrix * (self.rows // self.transposed_rows) + number) * self.columns, stored)
            out[here] = stored.T[torch.from_numpy(rows % self.transposed_rows)[here]]
        return out


@dataclass(frozen=True)
class RelaidTensor:
    """A tensor made of pieces: each of its matrices has the rows of all pieces, concatenated and then reordered."""

    shape: tuple[int, ...]
    pieces: tuple[StoredStack, ...]
    order: Sequence[int] | None = None  # row of a matrix -> row of the concatenated pieces; None if it is the same
    transposed: bool = False  # the tensor has the matrices as (columns, rows)
    added: float = 0.0  # to every number, in the tensor's type
    first: int = 0  # the pieces' matrix that is this tensor's first

    @property
    def rows(self) -> int:
        """Rows of each matrix before it is transposed."""
        return sum(piece.rows for piece in self.pieces)

    @property
    def columns(self) -> int:
        return self.pieces[0].columns

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type that holds the numbers of all pieces."""
        import torch

        dtypes = [piece.ref.dtype for piece in self.pieces]
        common = dtypes[0]
        for dtype in dtypes[1:]:
            common = torch.promote_types(common, dtype)
        return common

    @property
    def is_plain(self) -> bool:
        """Return whether its bytes are a run of rows of one stored tensor."""
        piece = self.pieces[0]
        moved = len(self.pieces) > 1 or self.order is not None or self.transposed or self.added or piece.transposed_rows
        return not moved and not piece.ref.weight and piece.ref.spec.dtype in TORCH_FLOATS

    @cached_property
    def _rows(self) -> Rows:
        import numpy as np

        return np.arange(self.rows) if self.order is None else np.asarray(self.order, np.int64)

    def matrix_rows(self, matrix: int, start: int, stop: int) -> torch.Tensor:
        """Return rows start:stop of a matrix before it is transposed."""
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
        path: a path for errors that fits the names of its tensors.
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
        from ..numerics.tensors import numbers_of

        return tensor_bytes(numbers_of(self.tensor(name)), self.specs[name])

    def tensor(self, name: str) -> torch.Tensor:
        import torch

        out = torch.empty(self.specs[name].shape, dtype=self.tensors[name].dtype)
        self._read(name, 0, out.view(-1))
        return out

    def read_numbers(self, name: str, first: int, out: npt.NDArray[Any]) -> None:
        import torch

        flat = torch.from_numpy(out.reshape(-1).view(f"i{out.itemsize}"))
        self._read(name, first, flat.view(self.tensors[name].dtype))

    def _read(self, name: str, first: int, flat: torch.Tensor) -> None:
        tensor = self.tensors[name]
        size, done = tensor.rows * tensor.columns, 0
        while done < len(flat):
            matrix, start = divmod(first + done, size)
            stop = min(size, start + len(flat) - done)
            if tensor.transposed:
                flat[done : done + stop - start] = self._transposed(name, matrix)[start:stop]
            else:
                row, end = start // tensor.columns, -(-stop // tensor.columns)
                rows = tensor.matrix_rows(matrix, row, end).view(-1)
                skipped = start - row * tensor.columns
                flat[done : done + stop - start] = rows[skipped : skipped + stop - start]
            done += stop - start

    def _transposed(self, name: str, matrix: int) -> torch.Tensor:
        """Return a transposed matrix; each thread caches the last one, since its blocks are read in sequence."""
        if getattr(self._kept, "key", None) != (name, matrix):
            self._kept.key = self._kept.numbers = None  # before the next takes memory
            matrix_numbers = self.tensors[name].matrix_rows(matrix, 0, self.tensors[name].rows)
            self._kept.numbers, self._kept.key = matrix_numbers.T.contiguous().view(-1), (name, matrix)
        numbers: torch.Tensor = self._kept.numbers
        return numbers


def _name_of(tensor: RelaidTensor) -> str:
    """Return the safetensors name of a tensor's dtype."""
    plain = {piece.ref.spec.dtype for piece in tensor.pieces if not piece.ref.weight}
    if len(tensor.pieces) == 1 and plain:
        return plain.pop()
    return safetensors_name(tensor.dtype)
