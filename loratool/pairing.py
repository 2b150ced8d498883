"""Two checkpoints of one model side by side: which tensors are the same one, and what lies between them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .architectures.renames import canonical
from .checkpoint import Checkpoint
from .errors import InputError
from .source import FLOATS, Source, norm
from .targets import unwrapped
from .tensorfile import TORCH_FLOATS

if TYPE_CHECKING:
    import torch

READ = 1 << 22  # numbers read at a time
SPARSE = 16  # one row in so many tells the noise
_MANTISSA = {"BF16": (7, -126), "F16": (10, -14), "F32": (23, -126), "F64": (52, -1022)}


@dataclass(frozen=True)
class Pairs:
    """both: a base's name -> the tensor on either side; the others have no partner."""

    both: dict[str, tuple[Source, Source]]
    only_base: tuple[str, ...]
    only_tuned: dict[str, Source]


def pair_tensors(base: Checkpoint, tuned: Checkpoint) -> Pairs:
    """The tensors of both sides by the base's name, whatever their shards, wrappers, containers and transformers'
    version.

    Raises InputError where nothing has a partner.
    """
    types = base.model_types or tuned.model_types
    mine, theirs = (_by_path(side.specs, types) for side in (base, tuned))
    prefix = missing_prefix(set(mine), set(theirs), {path.split(".")[0] + "." for path in {*mine, *theirs}})
    if prefix is not None:
        longer, shorter = prefix
        theirs = {longer + path.removeprefix(shorter): name for path, name in theirs.items()}
    both = {
        name: (Source(base.shard_of[name], name), Source(tuned.shard_of[theirs[path]], theirs[path]))
        for path, name in mine.items()
        if path in theirs
    }
    if not both:
        raise InputError("no tensor of one side has a name of the other", remedy="are these two of one family?")
    return Pairs(
        both,
        tuple(name for path, name in mine.items() if path not in theirs),
        {name: Source(tuned.shard_of[name], name) for path, name in theirs.items() if path not in mine},
    )


def _by_path(names: Iterable[str], types: Collection[str]) -> dict[str, str]:
    """Names by their paths in transformers 5; of two with one path one stands under its own name."""
    paths = {name: canonical(unwrapped(name), types) for name in names}
    owner = {path: path if path in paths else name for name, path in paths.items()}
    return {path if owner[path] == name else name: name for name, path in paths.items()}


def missing_prefix(mine: set[str], theirs: set[str], heads: Iterable[str]) -> tuple[str, str] | None:
    """(what to put before the names of `theirs`, what to take off), one of `heads` or nothing, where that makes them
    those of `mine`.
    """
    if len(mine & theirs) * 2 >= min(len(mine), len(theirs)):
        return None
    either = sorted({"", *heads})  # sorted: of equals always the same
    found = [(a, b) for a in either for b in either if a != b]
    best = max(found, key=lambda ab: len(mine & {ab[0] + p.removeprefix(ab[1]) for p in theirs}), default=None)
    if best is None or not mine & {best[0] + p.removeprefix(best[1]) for p in theirs}:
        return None
    return best


@dataclass(frozen=True)
class Difference:
    """D: tuned - base in float32, of the base's shape. base_squared: ||base||^2. noise: the variance of the rounding to
    the tuned model's type, values spread evenly between their neighbours: the mean of ulp^2 / 12, over some rows.
    """

    D: torch.Tensor
    base_squared: float
    noise: float


def difference(base: Source, tuned: Source, device: torch.device) -> Difference:
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
    steps: int | None = 0
    changed: int = 0
    odd: int = 0


def compare(one: Source, two: Source) -> Comparison:
    """By blocks of rows; of types that are no float whether they are equal, and how many values are not."""
    import torch

    same_type = one.spec.dtype == two.spec.dtype
    if not one.spec.size or not {one.spec.dtype, two.spec.dtype} <= set(FLOATS if one.spec.shape else TORCH_FLOATS):
        changed = _count_codes(one, two) if same_type else one.spec.size
        return Comparison(same_type and not changed, steps=None, changed=changed)
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
            steps = max(steps, int((_ordinals(b) - _ordinals(a))[D != 0].abs().max()))
    totals = tuple(math.hypot(*side) for side in zip(*norms, strict=True))
    # bits may differ where values do not: a zero's sign, a nan's payload
    return Comparison(same_type and not changed, totals, largest, steps if counted else None, changed, odd)  # type: ignore[arg-type]


def _count_codes(one: Source, two: Source) -> int:
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


def _ordinals(x: torch.Tensor) -> torch.Tensor:
    """Numbers that count the values of a float type of at most 32 bits in order."""
    import torch

    kind = {2: torch.int16, 4: torch.int32}[x.element_size()]
    bits = x.view(kind).to(torch.int64)
    sign = torch.iinfo(kind).min
    return torch.where(bits < 0, sign - bits, bits)
