"""Two stored tensors compared by blocks: equal, how far apart, their difference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError
from .dtypes import FLOATS, TORCH_FLOATS
from .fileio import read_into
from .tensor_ref import BLOCK, TensorRef, _blocks, norm

if TYPE_CHECKING:
    import torch


def same_values(one: TensorRef, two: TensorRef) -> bool:
    """Whether two tensors have the same values, the first rounded to the type of the second."""
    import torch

    if one.spec.shape != two.spec.shape:
        return False
    if not one.spec.shape or not one.spec.size or one.spec.dtype not in FLOATS:
        return one.spec == two.spec and one.file.read(one.name) == two.file.read(two.name)
    for start, stop in _blocks(one.spec):
        a, b = one.file.rows(one.name, start, stop), two.file.rows(two.name, start, stop)
        if not torch.equal(a.to(b.dtype), b):
            return False
    return True


def same_bytes(one: TensorRef, two: TensorRef) -> bool:
    """Whether two tensors are stored alike, whatever their shapes."""
    if (one.spec.dtype, one.spec.nbytes) != (two.spec.dtype, two.spec.nbytes):
        return False
    size = one.spec.nbytes
    starts = [(each.file, each.file.begin[each.name]) for each in (one, two)]
    buffers = [memoryview(bytearray(min(BLOCK, size))) for _ in starts]
    for done in range(0, size, BLOCK):
        parts = [buffer[: size - done] for buffer in buffers]
        for part, (file, begin) in zip(parts, starts, strict=True):
            read_into(file.file, part, begin + done)
        if parts[0] != parts[1]:
            return False
    return True


READ = 1 << 22  # numbers read at a time


SPARSE = 16  # one row in so many tells the noise


_MANTISSA = {"BF16": (7, -126), "F16": (10, -14), "F32": (23, -126), "F64": (52, -1022)}


@dataclass(frozen=True)
class Difference:
    """D: tuned - base in float32, of the base's shape. base_squared: ||base||^2. noise: the variance of the rounding to
    the tuned model's type, values spread evenly between their neighbours: the mean of ulp^2 / 12, over some rows.
    """

    D: torch.Tensor
    base_squared: float
    noise: float


def difference(base: TensorRef, tuned: TensorRef, device: torch.device) -> Difference:
    """Both are read by blocks. Raises InputError for nan and inf, and for shapes that differ."""
    import torch

    if base.spec.shape != tuned.spec.shape:
        raise InputError(
            f"is {base.spec.shape} in the base and {tuned.spec.shape} in the tuned model", culprit=base.name
        )
    rows, size = base.spec.shape[0], base.spec.size
    out = torch.empty(rows, size // rows, dtype=torch.float32, device=device)
    squared, ulps = [], []
    step = max(1, READ // (size // rows))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        one, two = (side.file.rows(side.name, start, stop).to(device) for side in (base, tuned))
        steps = _ulp(two[::SPARSE], tuned.spec.dtype)
        wide = torch.float64 if torch.float64 in (one.dtype, two.dtype) else torch.float32
        one, two = one.to(wide), two.to(wide)
        out[start:stop] = two.sub_(one)
        squared.append(_sum_of_squares(one))
        ulps.append(_sum_of_squares(steps) / steps.numel() * two.numel())
    # a sum is finite where all is, but for what overflows on the way
    if not math.isfinite(float(out.sum())) and not bool(out.isfinite().all()):
        raise InputError("holds nan or inf in one of the models", culprit=base.name)
    return Difference(out.view(base.spec.shape), math.fsum(squared), math.fsum(ulps) / size / 12)


def _sum_of_squares(x: torch.Tensor) -> float:
    """As exact as its type, and where that overflows as float64."""
    import torch

    found = float(torch.dot(x.flatten(), x.flatten()))
    return found if math.isfinite(found) else float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _ulp(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """The step of the type at each value."""
    import torch

    mantissa, least = _MANTISSA.get(dtype, (3, -6))
    wide = x.float()
    exponent = torch.frexp(wide)[1].masked_fill_(wide == 0, least + 1).clamp_(min=least + 1)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 1 - mantissa)


@dataclass(frozen=True)
class Comparison:
    """What lies between two tensors of one shape. norms: ||ONE||, ||TWO|| and ||TWO - ONE||, of what is finite;
    largest: the largest absolute difference; steps: the most numbers of the type between two values, None for float64
    and where the types differ; changed: how many values differ; odd: how many are nan or inf on one side and not so on
    the other.
    """

    equal: bool
    norms: tuple[float, float, float] = (0.0, 0.0, 0.0)
    largest: float = 0.0
    max_ulps: int | None = 0
    changed: int = 0
    not_finite: int = 0


def compare(one: TensorRef, two: TensorRef) -> Comparison:
    """By blocks of rows; of types that are no float whether they are equal, and how many values are not."""
    import torch

    same_type = one.spec.dtype == two.spec.dtype
    if not one.spec.size or not {one.spec.dtype, two.spec.dtype} <= set(FLOATS if one.spec.shape else TORCH_FLOATS):
        changed = _count_codes(one, two) if same_type else one.spec.size
        return Comparison(same_type and not changed, max_ulps=None, changed=changed)
    counted = same_type and one.spec.dtype in ("BF16", "F16", "F32")
    norms, largest, steps, changed, odd = [], 0.0, 0, 0, 0
    for a, b in zip(one.blocks(READ), two.blocks(READ), strict=True):
        if same_type and torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            norms.append((norm(a),) * 2 + (0.0,))
            continue
        x, y = a.double(), b.double()
        D = y - x
        different = ~((x == y) | (x.isnan() & y.isnan()))
        odd += int((~D.isfinite() & different).sum())
        D = torch.where(D.isfinite(), D, 0.0)
        norms.append((norm(a), norm(b), norm(D)))
        largest = max(largest, float(D.abs().max()))
        changed += int(different.sum())
        if counted and bool((D != 0).any()):
            steps = max(steps, int((_float_ordinals(b) - _float_ordinals(a))[D != 0].abs().max()))
    totals = tuple(math.hypot(*side) for side in zip(*norms, strict=True))
    # bits may differ where values do not: a zero's sign, a nan's payload
    return Comparison(same_type and not changed, totals, largest, steps if counted else None, changed, odd)  # type: ignore[arg-type]


def _count_codes(one: TensorRef, two: TensorRef) -> int:
    """How many values of one type differ in their bits; of types below a byte all, if any."""
    import torch

    a, b = (side.file.read(side.name) for side in (one, two))
    if a == b:
        return 0
    size, width = one.spec.size, one.spec.nbytes // one.spec.size
    if not width:
        return size
    x, y = (torch.frombuffer(side, dtype=torch.uint8).view(size, width) for side in (a, b))
    return int((x != y).any(1).sum())


def _float_ordinals(x: torch.Tensor) -> torch.Tensor:
    """Numbers that count the values of a float type of at most 32 bits in order."""
    import torch

    kind = {2: torch.int16, 4: torch.int32}[x.element_size()]
    bits = x.view(kind).to(torch.int64)
    sign = torch.iinfo(kind).min
    return torch.where(bits < 0, sign - bits, bits)
