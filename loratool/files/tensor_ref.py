"""A tensor in a file of weights, wherever that is, and what can be asked of it by blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError
from .dtypes import FLOATS, TORCH_FLOATS, TensorSpec
from .fileio import read_into
from .weights_file import WeightsFile

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 20  # numbers read at a time


SHORT = 1 << 20  # numbers whose squares are summed in float64 for nothing


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor's rows come from: a file of weights and the name there."""

    file: WeightsFile
    name: str

    @property
    def spec(self) -> TensorSpec:
        return self.file.specs[self.name]

    def blocks(self, most: int) -> Iterator[torch.Tensor]:
        """All of it, (rows, columns), about `most` numbers at a time; of a float type, and not empty."""
        spec = self.spec
        if not spec.shape:
            yield self.file.tensor(self.name).view(1, 1)
            return
        rows = spec.shape[0]
        step = max(1, most // (spec.size // rows))
        for start in range(0, rows, step):
            yield self.file.rows(self.name, start, min(start + step, rows))

    def matrix_rows(self, rows: int, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop of the tensor seen as a matrix of `rows` rows, a stack of matrices for one."""
        import torch

        spec = self.spec
        if rows == (spec.shape or (1,))[0]:
            return self.file.rows(self.name, start, stop)
        inner = rows // spec.shape[0]
        first, last = start // inner, -(-stop // inner)
        block = self.file.rows(self.name, first, last).reshape((last - first) * inner, -1)
        return torch.clone(block[start - first * inner : stop - first * inner])


def _blocks(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    rows = spec.shape[0]
    step = max(1, BLOCK // (spec.size // rows))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def squared_norm(source: TensorRef) -> float:
    """||W||^2 in float64; of a tensor of no float type 0."""
    if source.spec.dtype not in FLOATS or not source.spec.size or not source.spec.shape:
        return 0.0
    rows = (source.file.rows(source.name, start, stop).double() for start, stop in _blocks(source.spec))
    return math.fsum(float(block.square().sum()) for block in rows)


def norm(x: torch.Tensor) -> float:
    """||x|| of what is finite in it: in float32 where that is long, scaled where squares leave their type's range."""
    wide = (x.double() if x.numel() < SHORT else x.float() if x.element_size() < 4 else x).flatten()
    squared = float(wide.dot(wide))
    if 1e-20 < squared < math.inf:
        return math.sqrt(squared)
    finite = wide.double().nan_to_num(0.0, 0.0, 0.0)
    largest = float(finite.abs().max())
    return largest * float((finite / largest).norm()) if largest else 0.0


def is_finite(x: torch.Tensor) -> bool:
    """Whether no number is a nan or an infinity, in a tenth of `isfinite`'s time: a nan is both extremes."""
    if not x.numel():
        return True
    low, high = map(float, (x.float() if x.element_size() == 1 else x).aminmax())
    return math.isfinite(low) and math.isfinite(high)


def require_finite(source: TensorRef) -> None:
    """Raises InputError naming a tensor that holds a nan or an infinity."""
    spec = source.spec
    if spec.dtype not in FLOATS or not spec.size or not spec.shape:
        return
    for start, stop in _blocks(spec):
        if not is_finite(source.file.rows(source.name, start, stop)):
            raise InputError(f"holds nan or inf; {source.file.path} is damaged", culprit=source.name)


def known_finite(file: WeightsFile, names: Iterable[str]) -> set[str]:
    """Those of the tensors that are seen to hold no nan and no infinity where small neighbours are read at once."""
    import torch

    found: set[str] = set()
    for dtype, begin, end, run in _runs(file, names):
        data = memoryview(bytearray(end - begin))
        read_into(file.file, data, begin)
        if is_finite(torch.frombuffer(data, dtype=getattr(torch, TORCH_FLOATS[dtype]))):
            found.update(run)
    return found


def _runs(file: WeightsFile, names: Iterable[str]) -> Iterator[tuple[str, int, int, list[str]]]:
    """Tensors of one type without a gap, with that type and their bytes in the file: about BLOCK of these at a time."""
    run: list[str] = []
    dtype, begin, end = "", 0, 0
    for start, name in sorted((file.begin[name], name) for name in names):
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


def read_float32(source: TensorRef, device: torch.device) -> torch.Tensor:
    """A whole tensor; InputError where it holds nan or inf."""
    import torch

    shape, size = source.spec.shape, source.spec.size
    out = torch.empty(shape, dtype=torch.float32, device=device)
    step = max(1, READ_NUMBERS // (size // shape[0]))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        block = out[start:stop]
        block.copy_(source.file.rows(source.name, start, stop).reshape(block.shape))
        if not all(math.isfinite(end) for end in block.aminmax()):  # a nan is either
            raise InputError(
                f"holds nan, inf or more than float32 can; {source.file.path} is damaged", culprit=source.name
            )
    return out
