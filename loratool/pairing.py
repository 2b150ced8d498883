"""Two checkpoints of one model side by side: which tensors are the same one, and what lies between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .architectures.renames import canonical
from .checkpoint import Checkpoint
from .errors import InputError
from .source import Source
from .targets import unwrapped

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
    mine, theirs = ({canonical(unwrapped(name), types): name for name in side.specs} for side in (base, tuned))
    prefix = _prefix(set(mine), set(theirs))
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


def _prefix(mine: set[str], theirs: set[str]) -> tuple[str, str] | None:
    """(what to put before the tuned side's names, what to take off), where that makes them the base's."""
    if len(mine & theirs) * 2 >= min(len(mine), len(theirs)):
        return None
    heads = {"", *(path.split(".")[0] + "." for path in mine | theirs)}
    found = [(a, b) for a in heads for b in heads if (a or b) and a != b]
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
    out = torch.empty(rows, size // rows, device=device)
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
