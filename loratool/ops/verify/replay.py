"""A tensor's rows beside a merged model's, and each adapter's change to them as exact numbers and as others get them.

`Replay` gives what `merge` would write; `Changes` takes the updates apart, so that `judging` can round each its way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ...adapters.updates import ADDITIVE, AddDelta, DoRA, Experts, LowRank, Update
from ...binding.placement import Placement
from ...files.dtypes import FLOAT8
from ...files.tensor_ref import TensorRef
from ...numerics.exact import ExactProduct, Factors, Workspace
from ...streaming.apply import RowSegment, UpdateLoader

F32 = 2.0**-24  # half a float32 step, relative


ROWS = 128  # compared at a time


@dataclass(frozen=True)
class ReplayBlock:
    """Some rows of a tensor seen as a matrix, from row `first` on. inside: the placements on them; piece: all of them.

    base, merged: (rows, n), each in its own type.
    """

    first: int
    inside: tuple[Placement, ...]
    piece: RowSegment | None
    base: Tensor
    merged: Tensor

    @property
    def most(self) -> Tensor:
        """At most how large m / n is of a DoRA."""
        a = self.replay[1]
        weights = [p.weight for p in self.inside if p.update.kind == "dora" and p.weight]
        if a is None or not weights:
            return torch.ones(1, 1, dtype=torch.float64)
        return (a.abs() + abs(1 - weights[0])) / abs(weights[0])

    @cached_property
    def replay(self) -> tuple[Tensor, Tensor | None]:
        """What the rows become before they are rounded, (rows, n) in float64, and a of `W' = a * W + c`."""
        wide = self.base.double()
        if self.piece is None:
            return wide, None
        c, scratch = torch.empty_like(wide), torch.empty_like(wide)
        fill = self.piece.fill_for(self.base, self.first, Workspace(torch.device("cpu")))
        a = fill(slice(0, wide.shape[1]), c, scratch)
        if a is None:
            return wide + c, None
        return torch.where(a == 0, 0.0, a * wide) + c, a


class Replay:
    """A tensor under its placements, block by block."""

    def __init__(self, source: TensorRef, placements: Sequence[Placement], rows: int, load: UpdateLoader) -> None:
        self.source, self.placements, self.rows = source, tuple(placements), rows
        self._load = load

    def blocks(self, found: TensorRef, sample: bool = False) -> Iterator[ReplayBlock]:
        """sample: a few rows from the middle alone."""
        edges = sorted({0, self.rows, *(edge for p in self.placements for edge in (p.start, p.stop))})
        for start, stop in pairwise(edges):
            inside = tuple(p for p in self.placements if p.start <= start and stop <= p.stop)
            if sample and not start <= self.rows // 2 < stop:
                continue
            piece = RowSegment(self.source, start, stop, inside, self._load, False) if inside else None
            for first in [self.rows // 2] if sample else range(start, stop, ROWS):
                last = min(first + (ROWS // 4 if sample else ROWS), stop)
                base = self.source.matrix_rows(self.rows, first, last)
                merged = found.matrix_rows(self.rows, first, last)
                if found.spec.dtype in FLOAT8:  # which is read as float32, and was rounded to it
                    merged = merged.to(getattr(torch, FLOAT8[found.spec.dtype]))
                yield ReplayBlock(first, inside, piece, base, merged)


@dataclass(frozen=True)
class DeltaBounds:
    """One adapter's change to a block. change: in float64; sizes: the same of absolute values, which bounds rounding;
    slack: how far float32 arithmetic can be off; errors: by how much some float32 arithmetic is off. All (rows, n).
    """

    adapter: int
    change: Tensor
    slack: Tensor
    scale: float
    sizes: Tensor
    errors: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Product:
    product: ExactProduct
    sizes: ExactProduct
    factors: tuple[Tensor, Tensor]  # left: (rows of the placement, r), right: (r, n), without the scale
    scale: float


class AdapterDeltas:
    """The updates of one tensor, each apart. factors: a type that they are rounded to before."""

    def __init__(self, load: UpdateLoader, factors: torch.dtype | None) -> None:
        self._load, self._factors = load, factors
        self._made: dict[int, _Product] = {}
        self._magnitudes: dict[int, Tensor] = {}

    def of(self, block: ReplayBlock, additive: bool = True) -> list[DeltaBounds]:
        """The additive ones; without `additive` the product of a DoRA."""
        self._made = {key: made for key, made in self._made.items() if key in {id(p) for p in block.inside}}
        kinds = ADDITIVE if additive else ("dora",)
        return [self._part(p, block) for p in block.inside if p.update.kind in kinds]

    def magnitude(self, placement: Placement, block: ReplayBlock) -> Tensor:
        """m of the rows, (rows, 1), or (1, n) where the base stores (in, out)."""
        if id(placement) not in self._magnitudes:
            update = self._load(placement)
            assert isinstance(update, DoRA)
            self._magnitudes[id(placement)] = update.magnitude.double().flatten()
        found = self._magnitudes[id(placement)]
        if placement.transposed:
            return found.unsqueeze(0)
        start = placement.skip + block.first - placement.start
        return found[start : start + len(block.base)].unsqueeze(1)

    def _part(self, placement: Placement, block: ReplayBlock) -> DeltaBounds:
        made = self._made.get(id(placement)) or self._make(placement)
        self._made[id(placement)] = made
        start, rows = block.first - placement.start, len(block.base)
        change, sizes = _multiply(made.product, start, rows), _multiply(made.sizes, start, rows)
        left, right = made.factors[0][start : start + rows], made.factors[1]
        root = abs(made.scale) ** 0.5
        sign = -1.0 if made.scale < 0 else 1.0
        others = (change.float(), (left @ right) * made.scale, (left * root) @ (right * (sign * root)))
        errors = tuple((other.double() - change).abs() for other in others)
        slack = sizes * (F32 * (right.shape[0] + 8))
        return DeltaBounds(id(placement.adapter), change, slack, made.scale, sizes, errors)

    def _make(self, placement: Placement) -> _Product:
        update = self._rounded(self._load(placement), placement)
        weight = placement.weight
        first = placement.skip
        rows = slice(first, first + placement.stop - placement.start)
        terms = [Factors(t.left[rows], t.multiplier, t.right) for t in update.terms(weight, placement.transposed)]
        sizes = [Factors(t.left.abs(), abs(t.multiplier), t.right.abs()) for t in terms]
        if isinstance(update, AddDelta):
            left, right = update.value.reshape(-1, 1)[rows], torch.ones(1, 1, dtype=torch.float32)
        else:
            A, B = update.A.flatten(1), update.B.flatten(1)
            left, right = (A.T[rows], B.T) if placement.transposed else (B[rows], A)
        scale = update.scale * weight
        return _Product(ExactProduct(terms), ExactProduct(sizes), (left.float(), right.float()), scale)

    def _rounded(self, update: Update, placement: Placement) -> LowRank | AddDelta:
        if isinstance(update, Experts):
            assert placement.expert is not None
            update = update.expert(placement.expert)
        if self._factors is not None and isinstance(update, LowRank):
            return LowRank(update.A.to(self._factors), update.B.to(self._factors), update.scale)
        if self._factors is not None and isinstance(update, AddDelta):
            return AddDelta(update.value.to(self._factors), update.scale)
        assert isinstance(update, LowRank | AddDelta)
        return update


def normalizes_rows(placement: Placement) -> bool:
    """Whether the whole row is divided by its norm, rather than moved a part of the way there."""
    return placement.update.kind == "dora" and placement.weight == 1


def _multiply(product: ExactProduct, start: int, rows: int) -> Tensor:
    out = torch.empty(rows, product.shape[1], dtype=torch.float64)
    product.multiply(product.left(start, start + rows), slice(0, product.shape[1]), out, torch.empty_like(out))
    return out
