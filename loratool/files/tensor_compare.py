"""Compare two stored tensors by blocks: whether they are equal, their distance, their difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError
from .dtypes import FLOATS, TORCH_FLOATS
from .tensor_ref import BLOCK, TensorRef, finite_norm

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..numerics.arrays import Array, Numbers
    from ..numerics.rounding_noise import RoundingNoise


def same_values(first: TensorRef, second: TensorRef) -> bool:
    """Return whether two tensors have equal values after the first is rounded to the dtype of the second."""
    if first.spec.shape != second.spec.shape:
        return False
    if not first.spec.shape or not first.spec.size or first.spec.dtype not in FLOATS:
        return first.spec == second.spec and first.file.read(first.name) == second.file.read(second.name)
    pairs = zip(first.blocks(BLOCK), second.blocks(BLOCK), strict=True)
    return all(_rounds_to(a, b) for a, b in pairs)


def _rounds_to(x: Numbers, y: Numbers) -> bool:
    """Return whether RN(x) equals y, where a nan equals nothing."""
    import numpy as np

    from ..numerics.arrays import Numbers
    from ..numerics.rounding_stats import cast_rounded
    from ..numerics.workspace import Workspace

    out = Numbers.empty(y.form, *y.shape)
    cast_rounded(x, out, Workspace())
    same_bits = np.array_equal(out.bits, y.bits) and y.all_finite()
    return same_bits or np.array_equal(out.wide(), y.wide())


def same_bytes(first: TensorRef, second: TensorRef) -> bool:
    """Return whether two tensors have the same dtype and bytes, whatever their shapes."""
    if (first.spec.dtype, first.spec.nbytes) != (second.spec.dtype, second.spec.nbytes):
        return False
    size = first.spec.nbytes
    buffers = [memoryview(bytearray(min(BLOCK, size))) for _ in range(2)]
    for done in range(0, size, BLOCK):
        parts = [buffer[: size - done] for buffer in buffers]
        for part, tensor in zip(parts, (first, second), strict=True):
            tensor.file.read_bytes(tensor.name, done, part)
        if parts[0] != parts[1]:
            return False
    return True


@dataclass(frozen=True)
class Difference:
    """The delta of a weight between a base and a tuned model."""

    D: Array  # tuned - base in float32, with the base's shape
    base_squared: float  # ||base||^2
    noise: RoundingNoise  # of rounding either to its type or codes, as far as D can hold it; of D as (rows, others)


def difference(base: TensorRef, tuned: TensorRef, like: Array) -> Difference:
    """Compute the delta of a weight where `like` is, reading both tensors by blocks of rows.

    The energy of either side's rounding noise is at most that of D. So the codes of a base count for little if the
    tuned model was trained from the dequantized numbers.

    Raises:
        InputError: a tensor has nan or inf, or the shapes differ.
    """
    import numpy as np

    from ..numerics.arrays import Numbers, empty, fetched, sent, widen
    from ..numerics.forms import F64, FORMS
    from ..numerics.rounding_noise import below_one_another, float_steps, noise_of_steps

    if base.spec.shape != tuned.spec.shape:
        raise InputError(
            f"is {base.spec.shape} in the base and {tuned.spec.shape} in the tuned model", culprit=base.name
        )
    rows, size = base.spec.shape[0], base.spec.size
    kind = np.float64 if F64 in (base.form, tuned.form) else np.float32
    out = empty(np.float32, rows, size // rows, like=like)
    squared, energy = [], []
    noises: tuple[list[RoundingNoise], list[RoundingNoise]] = [], []
    step = max(1, BLOCK // (size // rows))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        stored = [side.read_matrix(rows, start, stop) for side in (base, tuned)]
        before, after = (
            widen(Numbers(sent(each.bits, like), each.form), empty(kind, *each.shape, like=like)) for each in stored
        )
        D = out[start:stop]
        with np.errstate(all="ignore"):
            D[...] = after - before
            squared.append(_sum_of_squares(before))
            energy.append(_sum_of_squares(D))
        for side, x, noise in zip((base, tuned), (before, after), noises, strict=True):
            steps = _code_steps(side, start, stop) if side.parts else float_steps(fetched(x), FORMS[side.spec.dtype])
            noise.append(noise_of_steps(steps))
    total = math.fsum(energy)
    if not math.isfinite(total):
        raise InputError("holds nan or inf in one of the models", culprit=base.name)
    base_noise, tuned_noise = (below_one_another(noise).at_most(total) for noise in noises)
    return Difference(out.reshape(base.spec.shape), math.fsum(squared), base_noise + tuned_noise)


def matrix_difference(base: Sequence[TensorRef], tuned: Sequence[TensorRef], like: Array) -> Difference:
    """Compute the delta of a matrix whose rows are those of several weights, concatenated.

    Raises:
        InputError: as in `difference`.
    """
    from ..numerics.linalg import concatenate
    from ..numerics.rounding_noise import below_one_another

    differences = [difference(one, two, like) for one, two in zip(base, tuned, strict=True)]
    if len(differences) == 1:
        return differences[0]
    noise = below_one_another([each.noise for each in differences])
    return Difference(
        concatenate([each.D for each in differences]), math.fsum(each.base_squared for each in differences), noise
    )


def _sum_of_squares(x: Array) -> float:
    """Return ||x||^2, computed in the type of x, or in float64 if that overflows."""
    from ..numerics.arrays import dot, doubled

    total = dot(x, x)
    return total if math.isfinite(total) else dot(wide := doubled(x), wide)


def _code_steps(weight: TensorRef, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Return the distances of the numbers of rows start:stop to those of a neighboring code.

    The neighbor is the one towards the middle of the codes.
    """
    import numpy as np

    assert weight.parts is not None
    parts, shape = weight.parts, weight.spec.shape
    codec, columns, inside = parts.weight.format, shape[-1], math.prod(shape[1:-1])  # rows of codes in one of these
    first = weight.start + start * inside
    codes = codec.codes(parts, first, first + (stop - start) * inside)
    ordinals = codec.ordinals(parts, codes[:, :columns])
    low, high = int(ordinals.min()), int(ordinals.max())
    step = ordinals.dtype.type(low < high)
    near = codes.copy()  # keeps the padding, which may have a row's scales
    near[:, :columns] = codec.from_ordinals(parts, ordinals + np.where(ordinals < (low + high) / 2, step, -step))
    steps = np.abs(codec.unmixed(parts, first, codes) - codec.unmixed(parts, first, near))
    return steps.astype(np.float32).reshape(stop - start, -1)


@dataclass(frozen=True)
class Comparison:
    """The distance between two tensors of one shape."""

    equal: bool  # same dtype or format of codes, and same values
    norms: tuple[float, float, float] = (0.0, 0.0, 0.0)  # ||ONE||, ||TWO||, ||TWO - ONE||, over finite numbers
    largest: float | None = 0.0  # max|TWO - ONE| over finite numbers; None if a dtype is not a float
    max_ulps: int | None = 0  # None for float64, for a dtype that is not a float, and if the dtypes differ
    changed: int = 0  # number of values that differ
    not_finite: int = 0  # number of values that are nan or inf on one side and not so on the other


def compare(first: TensorRef, second: TensorRef) -> Comparison:
    """Compare two tensors of one shape by blocks of rows.

    If a dtype is not a float, only `equal` and `changed` are computed, from the bits; if dtypes differ, all changed.
    """
    import numpy as np

    from ..numerics.arrays import Numbers

    same_type = first.spec.dtype == second.spec.dtype and first.codec is second.codec
    if not first.spec.size:
        return Comparison(same_type, max_ulps=None)
    if not {first.spec.dtype, second.spec.dtype} <= set(FLOATS if first.spec.shape else TORCH_FLOATS):
        changed = _count_different_bits(first, second) if same_type else first.spec.size
        return Comparison(same_type and not changed, largest=None, max_ulps=None, changed=changed)
    counted = same_type and first.spec.dtype in ("BF16", "F16", "F32")
    norms, largest, ulps, changed, not_finite = [], 0.0, 0, 0, 0
    for a, b in zip(first.blocks(BLOCK), second.blocks(BLOCK), strict=True):
        if same_type and np.array_equal(a.bits, b.bits):
            norms.append((finite_norm(a),) * 2 + (0.0,))
            continue
        x, y = a.wide(), b.wide()
        with np.errstate(all="ignore"):
            D = y - x
        different = ~((x == y) | (np.isnan(x) & np.isnan(y)))
        not_finite += int((~np.isfinite(D) & different).sum())
        D[~np.isfinite(D)] = 0.0
        norms.append((finite_norm(a), finite_norm(b), finite_norm(Numbers.of(D))))
        largest = max(largest, float(np.abs(D).max()))
        changed += int(different.sum())
        moved = D != 0
        if counted and moved.any():
            ulps = max(ulps, int(np.abs(_ordinals(b) - _ordinals(a))[moved].max()))
    totals = tuple(math.hypot(*side) for side in zip(*norms, strict=True))
    # bits may differ where values do not: a zero's sign, a nan's payload
    return Comparison(same_type and not changed, totals, largest, ulps if counted else None, changed, not_finite)  # type: ignore[arg-type]


def _count_different_bits(first: TensorRef, second: TensorRef) -> int:
    """Count the values of one dtype that differ in their bits; for a dtype below a byte, all if any."""
    import numpy as np

    a, b = (side.file.read(side.name) for side in (first, second))
    if a == b:
        return 0
    size, width = first.spec.size, first.spec.nbytes // first.spec.size
    if not width:
        return size
    x, y = (np.frombuffer(side, np.uint8).reshape(size, width) for side in (a, b))
    return int((x != y).any(1).sum())


def _ordinals(x: Numbers) -> npt.NDArray[np.int64]:
    """Return an integer for each float such that adjacent floats have adjacent integers; of zeros 0."""
    sizes: npt.NDArray[np.int64] = (x.bits & x.form.size).astype("i8")
    sizes[x.bits < 0] *= -1
    return sizes
