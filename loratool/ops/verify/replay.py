"""Replay a merge block by block beside the merged model, with each adapter's delta as exact numbers and error bounds.

`Replay` computes what `merge` would write. `AdapterDeltas` keeps the updates separate, so that `rounding_bounds` can
round each in its way.
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

F32 = 2.0**-24  # half an ulp of float32, relative


ROWS = 128  # of a block


@dataclass(frozen=True)
class ReplayBlock:
    """Some rows of a tensor seen as a matrix, in the base and in the merged model."""

    first: int  # row
    inside: tuple[Placement, ...]  # those on these rows
    piece: RowSegment | None  # the rows with the same placements, which this block is in
    base: Tensor  # (rows, n), in the base's type
    merged: Tensor  # (rows, n), in the merged model's type

    @property
    def most(self) -> Tensor:
        """An upper bound of m / n of a DoRA, (rows or 1, n or 1)."""
        a = self.replay[1]
        weights = [p.weight for p in self.inside if p.update.kind == "dora" and p.weight]
        if a is None or not weights:
            return torch.ones(1, 1, dtype=torch.float64)
        return (a.abs() + abs(1 - weights[0])) / abs(weights[0])

    @cached_property
    def replay(self) -> tuple[Tensor, Tensor | None]:
        """The merged rows before rounding, (rows, n) in float64, and the a of W' = a * W + c; None for a = 1."""
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
        """Yield the blocks of a tensor beside `found`; with `sample` one small block from the middle only."""
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
                if found.spec.dtype in FLOAT8:  # read as float32, but compared in the type that it is stored in
                    merged = merged.to(getattr(torch, FLOAT8[found.spec.dtype]))
                yield ReplayBlock(first, inside, piece, base, merged)


@dataclass(frozen=True)
class DeltaBounds:
    """One adapter's delta of a block, with bounds of the errors of others. All tensors are (rows, n) in float64."""

    adapter: int  # its id()
    change: Tensor  # the delta
    slack: Tensor  # an upper bound of the error of float32 arithmetic
    scale: float
    sizes: Tensor  # the delta of the absolute values, which bounds rounding errors
    errors: tuple[Tensor, ...]  # the actual errors of ERROR_TERMS ways to compute it in float32


@dataclass(frozen=True)
class _Product:
    """An update as products that give its rows."""

    product: ExactProduct
    sizes: ExactProduct
    factors: tuple[Tensor, Tensor]  # left: (rows of the placement, r), right: (r, n), without the scale
    scale: float


class AdapterDeltas:
    """The deltas of one tensor, each by itself; `factors` is a type that A and B are rounded to first."""

    def __init__(self, load: UpdateLoader, factors: torch.dtype | None) -> None:
        self._load, self._factors = load, factors
        self._made: dict[int, _Product] = {}
        self._magnitudes: dict[int, Tensor] = {}

    def of(self, block: ReplayBlock, additive: bool = True) -> list[DeltaBounds]:
        """Return the deltas of additive updates, or without `additive` the s * B @ A of a DoRA."""
        self._made = {key: made for key, made in self._made.items() if key in {id(p) for p in block.inside}}
        kinds = ADDITIVE if additive else ("dora",)
        return [self._bounds_of(p, block) for p in block.inside if p.update.kind in kinds]

    def magnitude(self, placement: Placement, block: ReplayBlock) -> Tensor:
        """Return m of the rows, (rows, 1), or (1, n) if the base stores (in, out)."""
        if id(placement) not in self._magnitudes:
            update = self._load(placement)
            assert isinstance(update, DoRA)
            self._magnitudes[id(placement)] = update.magnitude.double().flatten()
        found = self._magnitudes[id(placement)]
        if placement.transposed:
            return found.unsqueeze(0)
        start = placement.skip + block.first - placement.start
        return found[start : start + len(block.base)].unsqueeze(1)

    def _bounds_of(self, placement: Placement, block: ReplayBlock) -> DeltaBounds:
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
    """Return whether a DoRA with weight 1 divides the whole row by its norm, rather than going part of the way."""
    return placement.update.kind == "dora" and placement.weight == 1


def _multiply(product: ExactProduct, start: int, rows: int) -> Tensor:
    out = torch.empty(rows, product.shape[1], dtype=torch.float64)
    product.multiply(product.left(start, start + rows), slice(0, product.shape[1]), out, torch.empty_like(out))
    return out
