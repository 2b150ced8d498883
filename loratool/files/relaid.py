"""Lazy view of a weights file with rows moved or matrices transposed.

A tensor consists of matrices, and a matrix of rows of the file's tensors, which may be stored as codes. Blocks of rows
are read on access. Each thread caches one transposed matrix.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import InputError
from .dtypes import TORCH_FLOATS, TensorSpec
from .tensor_ref import TensorRef
from .weights_file import WeightsFile

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..numerics.arrays import Numbers
    from ..numerics.forms import Bits, Form

    Rows = np.ndarray[tuple[int], np.dtype[np.int64]]
    Floats = npt.NDArray[Any]
    Change = Callable[[Floats], Floats]

EXP_ERROR = 1.5e-7  # of the logarithm of a float32 that an exp rounded to one of both neighbours

GAP = 8  # one read continues over at most so many unneeded rows


@dataclass(frozen=True)
class StoredStack:
    """A stored tensor as a stack of matrices; all rows of each matrix are used."""

    ref: TensorRef
    rows: int  # of each matrix
    columns: int
    transposed_rows: int = 0  # rows of each stored matrix, if all are used transposed; else 0

    def read(self, matrix: int, rows: Rows) -> Numbers:
        """Return rows of a matrix, in any order: (rows, columns)."""
        from ..numerics.arrays import Numbers

        if self.transposed_rows:
            return self._read_transposed(matrix, rows)
        out = Numbers.empty(self.ref.form, len(rows), self.columns)
        order = rows.argsort(kind="stable")
        ordered = rows[order]
        breaks = [0, *((ordered[1:] - ordered[:-1] > GAP).nonzero()[0] + 1).tolist(), len(rows)]
        for start, stop in pairwise(breaks):
            first, last = int(ordered[start]), int(ordered[stop - 1])
            run = Numbers.empty(out.form, last + 1 - first, self.columns)
            self.ref.read(matrix * self.rows + first, run)
            out.bits[order[start:stop]] = run.bits[ordered[start:stop] - first]
        return out

    def _read_transposed(self, matrix: int, rows: Rows) -> Numbers:
        """Return rows of matrices that are stored transposed, (columns, rows of each)."""
        from ..numerics.arrays import Numbers

        out = Numbers.empty(self.ref.form, len(rows), self.columns)
        numbers = rows // self.transposed_rows
        stored = Numbers.empty(out.form, self.columns, self.transposed_rows)
        for number in sorted(set(numbers.tolist())):
            here = numbers == number
            self.ref.read((matrix * (self.rows // self.transposed_rows) + number) * self.columns, stored)
            out.bits[here] = stored.bits.T[rows[here] % self.transposed_rows]
        return out


@dataclass(frozen=True)
class RelaidTensor:
    """A tensor made of pieces: each of its matrices has the rows of all pieces, concatenated and then reordered."""

    shape: tuple[int, ...]
    pieces: tuple[StoredStack, ...]
    order: Sequence[int] | None = None  # row of a matrix -> row of the concatenated pieces; None if it is the same
    columns_order: Sequence[int] | None = None  # the same for columns
    transposed: bool = False  # the tensor has the matrices as (columns, rows)
    change: Change | None = None  # of every number; what it returns is rounded to the tensor's form
    first: int = 0  # the pieces' matrix that is this tensor's first

    @property
    def rows(self) -> int:
        """Rows of each matrix before it is transposed."""
        return sum(piece.rows for piece in self.pieces)

    @property
    def columns(self) -> int:
        return self.pieces[0].columns

    @cached_property
    def form(self) -> Form:
        """The form that holds the numbers of all pieces."""
        from ..numerics.forms import holding

        return holding(*(piece.ref.form for piece in self.pieces))

    @property
    def is_plain(self) -> bool:
        """Return whether its bytes are a run of rows of one stored tensor."""
        piece = self.pieces[0]
        ordered = self.order is None and self.columns_order is None
        same = len(self.pieces) == 1 and ordered and not self.transposed and self.change is None
        computed = piece.transposed_rows or piece.ref.weight or piece.ref.file.is_computed(piece.ref.name)
        return same and not computed and piece.ref.spec.dtype in TORCH_FLOATS

    @cached_property
    def _rows(self) -> Rows:
        import numpy as np

        return np.arange(self.rows) if self.order is None else np.asarray(self.order, np.int64)

    def matrix_rows(self, matrix: int, start: int, stop: int) -> Numbers:
        """Return rows start:stop of a matrix before it is transposed."""
        import numpy as np

        from ..numerics.arrays import Numbers, rounded_to

        rows, out, base = self._rows[start:stop], Numbers.empty(self.form, stop - start, self.columns), 0
        for piece in self.pieces:
            here = ((rows >= base) & (rows < base + piece.rows)).nonzero()[0]
            if len(here):
                some = piece.read(self.first + matrix, rows[here] - base)
                some = some if some.form == out.form else rounded_to(some.floats(), out.form)
                out.bits[here] = some.bits
            base += piece.rows
        if self.columns_order is not None:
            out.bits[:] = out.bits[:, np.asarray(self.columns_order)]
        if self.change is None:
            return out
        try:
            return rounded_to(self.change(out.floats()), out.form)
        except ValueError as error:
            raise InputError(str(error), culprit=self.pieces[0].ref.name) from None


def minus_one(numbers: Floats) -> Floats:
    return numbers - 1.0


def logarithm(numbers: Floats) -> Floats:
    """Return log(-numbers): of -exp(x) in float32, x if it is a number of bfloat16, else one whose -exp is the same.

    The same is up to the last bit of exp, which libraries round differently; a number of bfloat16 is recognized for
    |x| > 1e-4.

    Raises:
        ValueError: a number is not below 0.
    """
    import numpy as np

    if not (numbers < 0).all():
        raise ValueError("has numbers that are not below 0, which are -exp of none")
    exact = np.log(-numbers.astype(np.float64))
    bits = exact.astype(np.float32).view(np.uint32)
    short = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    found: Floats = np.where(np.abs(short - exact) < EXP_ERROR, short, exact.astype(np.float32))
    return found


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
        from ..numerics.arrays import bytes_of

        return bytes_of(self.numbers(name).bits)

    def read_numbers(self, name: str, first: int, out: npt.NDArray[Any]) -> None:
        tensor = self.tensors[name]
        flat: Bits = out.reshape(-1).view(tensor.form.bits_type)
        size, done = tensor.rows * tensor.columns, 0
        while done < len(flat):
            matrix, start = divmod(first + done, size)
            stop = min(size, start + len(flat) - done)
            if tensor.transposed:
                flat[done : done + stop - start] = self._transposed(name, matrix)[start:stop]
            else:
                row, end = start // tensor.columns, -(-stop // tensor.columns)
                rows = tensor.matrix_rows(matrix, row, end).bits.reshape(-1)
                skipped = start - row * tensor.columns
                flat[done : done + stop - start] = rows[skipped : skipped + stop - start]
            done += stop - start

    def _transposed(self, name: str, matrix: int) -> Bits:
        """Return a transposed matrix; each thread caches the last one, since its blocks are read in sequence."""
        if getattr(self._kept, "key", None) != (name, matrix):
            self._kept.key = self._kept.bits = None  # before the next takes memory
            numbers = self.tensors[name].matrix_rows(matrix, 0, self.tensors[name].rows)
            self._kept.bits, self._kept.key = numbers.bits.T.reshape(-1), (name, matrix)
        bits: Bits = self._kept.bits
        return bits


def _name_of(tensor: RelaidTensor) -> str:
    """Return the safetensors name of a tensor's type."""
    plain = {piece.ref.spec.dtype for piece in tensor.pieces if not piece.ref.weight}
    if len(tensor.pieces) == 1 and plain:
        return plain.pop()
    return tensor.form.name
