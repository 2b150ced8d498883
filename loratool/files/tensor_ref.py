"""Read one weight, `TensorRef(file, name)`, by blocks of rows through its codec; its norm, finiteness, float32 copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..durable.fileio import read_into
from ..errors import InputError
from .codecs import RAW, codec_of
from .codecs.codec import Codec, Parts, StoredTensor, StoredWeight
from .dtypes import FLOATS, TORCH_FLOATS, TensorSpec
from .weights_file import WeightsFile

if TYPE_CHECKING:
    import torch

    from ..numerics.arrays import Array, Numbers
    from ..numerics.forms import Form

BLOCK = 1 << 20  # numbers read at a time

SHORT = 1 << 20  # for at most so many numbers, float64 costs nothing


@dataclass(frozen=True)
class TensorRef:
    """A reference to a weight in a weights file; numbers are read on access."""

    file: WeightsFile  # that has it, or its codes
    name: str  # of the tensor there
    parts: Parts | None = None  # of a weight of several tensors; None if the tensor's type determines the codec
    undecoded: bool = False  # rows have the stored type, of 8 bits too
    span: tuple[int, int] | None = None  # only these rows, start:stop, as `part` sees them

    @property
    def weight(self) -> StoredWeight | None:
        return self.parts.weight if self.parts else None

    @property
    def full_spec(self) -> TensorSpec:
        """Return the spec of the complete weight, without `span`."""
        return self.weight.spec if self.weight else self.file.specs[self.name]

    @property
    def spec(self) -> TensorSpec:
        spec = self.full_spec
        return TensorSpec(spec.dtype, (self.span[1] - self.span[0], *spec.shape[1:][-1:])) if self.span else spec

    @property
    def start(self) -> int:
        """Return the number of the first row, as `part` counts rows."""
        return self.span[0] if self.span else 0

    def part(self, start: int, stop: int) -> TensorRef:
        """Return a reference to rows start:stop of the weight, viewed as a matrix with its last dimension as columns.

        A row of a vector is one number.
        """
        return replace(self, span=(self.start + start, self.start + stop))

    @property
    def codec(self) -> Codec:
        if self.undecoded:
            return RAW
        return self.weight.codec if self.weight else codec_of(self.full_spec)

    @property
    def form(self) -> Form:
        """Return the form in which rows are read.

        Raises:
            InputError: the type is not a float.
        """
        from ..numerics.forms import FORMS

        codec = self.codec
        form = FORMS.get(self.spec.dtype if codec is RAW else codec.numbers)
        if form is None:
            raise InputError(f"has dtype {self.spec.dtype}, not a floating-point type", culprit=self.name)
        return form

    def as_stored(self, dtype: str) -> TensorRef:
        """Return a reference whose rows are read in the stored type if that is `dtype`, else `self`."""
        return replace(self, undecoded=True) if not self.weight and dtype == self.spec.dtype else self

    def read(self, start: int, out: Numbers) -> None:
        """Read rows from `start` on into `out`, viewing the weight as a matrix with the columns of `out`.

        Args:
            out: (rows, columns), contiguous, on the CPU, of the form `form`.
        """
        if not out.size:
            return
        from ..numerics.arrays import Numbers

        if self.parts:
            self.parts.require_sound()
        codec, parts = self.codec, self.parts or _alone(self.file, self.name)
        columns, first = codec.columns(self.full_spec), start * out.shape[1]
        first += self.start * math.prod(self.full_spec.shape[1:][-1:])
        above, count = first % columns, out.size
        if not above and not count % columns:
            codec.read_rows(parts, first // columns, out.reshape(-1, columns))
            return
        rows = Numbers.empty(out.form, -(-(above + count) // columns), columns)
        codec.read_rows(parts, first // columns, rows)
        out.bits[...] = rows.bits.reshape(-1)[above : above + count].reshape(out.shape)

    def numbers(self) -> Numbers:
        """Return the complete weight; raise InputError unless its type is a float of 16 bits or more."""
        spec = self.spec
        if self.weight is None and self.span is None:
            return self.file.numbers(self.name)
        return self.read_matrix(spec.shape[0], 0, spec.shape[0]).reshape(*spec.shape)

    def tensor(self) -> torch.Tensor:
        """Return `numbers` as a tensor."""
        from ..numerics.tensors import tensor_of

        return tensor_of(self.numbers())

    def blocks(self, most: int) -> Iterator[Numbers]:
        """Yield a nonempty float tensor in blocks (rows, columns) of about `most` numbers.

        A row is an item of the first dimension. If an item is a matrix of more than `most` numbers, its rows are.
        """
        spec = self.spec
        if not spec.shape:
            yield self.file.numbers(self.name).reshape(1, 1)
            return
        columns = spec.size // spec.shape[0]
        columns = columns if columns <= most else spec.shape[-1]
        rows, step = spec.size // columns, max(1, most // columns)
        for start in range(0, rows, step):
            yield self.read_matrix(rows, start, start + step)

    def read_matrix(self, rows: int, start: int, stop: int) -> Numbers:
        """Return rows start:stop of the tensor viewed as (rows, columns), even if it is a stack of matrices."""
        from ..numerics.arrays import Numbers

        out = Numbers.empty(self.form, min(stop, rows) - start, self.spec.size // rows if rows else 0)
        self.read(start, out)
        return out


def _alone(file: WeightsFile, name: str) -> Parts:
    """Return the parts of a weight that is one tensor."""
    spec = file.specs[name]
    return Parts(StoredWeight(codec_of(spec), spec, (name,)), {"codes": StoredTensor(file, name)}, spec)


def squared_norm(source: TensorRef) -> float:
    """Return ||W||^2 in float64; 0 if the dtype is not a float."""
    import numpy as np

    if source.spec.dtype not in FLOATS or not source.spec.size or not source.spec.shape:
        return 0.0
    with np.errstate(over="ignore"):
        return math.fsum(float(np.square(block.wide()).sum()) for block in source.blocks(BLOCK))


def finite_norm(x: Numbers) -> float:
    """Return ||x|| over the finite numbers of x.

    A short x is summed in float64, a long one in float32, or in float64 if it has that type. If the squares overflow
    or underflow, x / max|x| is summed instead.
    """
    import numpy as np

    from ..numerics.arrays import widen

    is_wide = x.size < SHORT or x.form.itemsize == 8
    numbers = widen(x, np.empty(x.shape, np.float64 if is_wide else np.float32)).reshape(-1)
    with np.errstate(all="ignore"):
        squared = float(numbers @ numbers)
        if 1e-20 < squared < math.inf:
            return math.sqrt(squared)
        finite = np.nan_to_num(numbers.astype(np.float64), posinf=0.0, neginf=0.0)
        largest = float(np.abs(finite).max(initial=0.0))
        return largest * math.sqrt(float(np.square(finite / largest).sum())) if largest else 0.0


def require_finite(source: TensorRef) -> None:
    """Raise InputError if the tensor has a nan or an infinity."""
    spec = source.spec
    if spec.dtype not in FLOATS or not spec.size or not spec.shape:
        return
    for block in source.blocks(BLOCK):
        if not block.all_finite():
            raise InputError(f"holds nan or inf; {source.file.path} is damaged", culprit=source.name)


Run = tuple[str, int, int, list[str]]  # dtype, first byte, byte after the last, names


def known_finite(
    file: WeightsFile,
    names: Iterable[str],
    mapped: Callable[[Callable[[Run], bool], Iterable[Run]], Iterable[bool]] = map,
) -> set[str]:
    """Return the names of small tensors that have no nan and no infinity, reading adjoining tensors together.

    Check a name that is not in the result with `require_finite`.

    Args:
        mapped: a function like `map` that reads the runs in order; `streaming` has one with several threads.
    """
    import numpy as np

    from ..numerics.arrays import Numbers
    from ..numerics.forms import FORMS

    def is_sound(run: Run) -> bool:
        dtype, begin, end, _ = run
        data = np.empty(end - begin, np.uint8)  # not zeroed first
        read_into(file.file, data.data, begin)
        form = FORMS[dtype]
        return Numbers(data.view(form.bits_type), form).all_finite()

    runs = list(_runs(file, names))
    return {name for run, sound in zip(runs, mapped(is_sound, runs), strict=True) if sound for name in run[3]}


def _runs(file: WeightsFile, names: Iterable[str]) -> Iterator[Run]:
    """Yield runs of adjoining small tensors, each of about BLOCK bytes."""
    run: list[str] = []
    dtype, begin, end = "", 0, 0
    # a `VirtualFile` has no bytes
    for start, name in sorted((file.begin[name], name) for name in names if name in file.begin):
        spec = file.specs[name]
        nbytes = spec.nbytes
        if spec.dtype not in TORCH_FLOATS or not 0 < nbytes < BLOCK:
            continue
        if run and (start != end or spec.dtype != dtype or end - begin >= BLOCK):
            yield dtype, begin, end, run
            run = []
        if not run:
            dtype, begin = spec.dtype, start
        run.append(name)
        end = start + nbytes
    if run:
        yield dtype, begin, end, run


READ_NUMBERS = 1 << 22  # numbers read at a time


def read_float32(source: TensorRef, like: Array) -> Array:
    """Read a tensor as float32 where `like` is; raise InputError if it has nan, inf, or a number beyond float32."""
    import numpy as np

    from ..numerics.arrays import Numbers, empty, sent, widen
    from ..numerics.linalg import isfinite

    shape, size = source.spec.shape, source.spec.size
    out = empty(np.float32, shape[0], size // shape[0], like=like)
    step = max(1, READ_NUMBERS // (size // shape[0]))
    for start in range(0, shape[0], step):
        rows, block = source.read_matrix(shape[0], start, start + step), out[start : start + step]
        with np.errstate(over="ignore"):
            widen(Numbers(sent(rows.bits, like), rows.form), block)
        if not isfinite(block).all():
            raise InputError(
                f"holds nan, inf or more than float32 can; {source.file.path} is damaged", culprit=source.name
            )
    return out.reshape(shape)
