"""Replay a merge block by block beside the merged model, and each adapter's delta with error bounds.

`Replay` returns the rows that `merge` would write, before and after rounding. `AdapterDeltas` keeps the updates
separate, so that `rounding_bounds` can round each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ...adapters.updates.dora import DoRA
from ...adapters.updates.update import RowsOfDelta, Update
from ...binding.modules.placement import Placement
from ...files.tensor_ref import TensorRef
from ...numerics.arrays import ON_CPU, Numbers, rounded_to
from ...numerics.forms import Form, Wide
from ...numerics.products import Term
from ...numerics.rounding_stats import RoundingStats, cast_rounded
from ...numerics.workspace import Workspace
from ...streaming.apply import segments
from ...streaming.segment import RowSegment, UpdateLoader

U32 = 2.0**-24  # half an ulp of float32, relative

ROWS = 128  # of a block, unless these are more than NUMBERS

NUMBERS = 1 << 21

WAYS = 3  # to compute a delta in float32


@dataclass(frozen=True)
class ReplayBlock:
    """Some rows of a tensor seen as a matrix, in the base and in the merged model."""

    first: int  # row
    inside: tuple[Placement, ...]  # those on these rows
    piece: RowSegment | None  # the rows with the same placements, which this block is in
    base: Numbers  # (rows, n), in the base's type
    merged: Numbers  # (rows, n), in the merged model's type
    work: Workspace

    @cached_property
    def expected(self) -> tuple[Numbers, RoundingStats]:
        """The rows as `merge` writes them, (rows, n) in the merged model's type, with rounding statistics."""
        out = Numbers.empty(self.merged.form, *self.merged.shape)
        if self.piece is not None:
            stats = self.piece.merge(self.base, self.first, out, self.work)
        else:
            stats = cast_rounded(self.base, out, self.work)
        return out, stats

    @cached_property
    def reals(self) -> tuple[Wide, Wide | None]:
        """X = a * W + D, the rows before rounding, (rows, n) in float64, and a; None for a = 1."""
        return (self.base.wide(), None) if self.piece is None else self.piece.reals(self.base, self.first)


class Replay:
    """A tensor under its placements, block by block."""

    def __init__(self, source: TensorRef, placements: Sequence[Placement], load: UpdateLoader) -> None:
        self.source, self.placements, self._load = source, tuple(placements), load
        self.rows = placements[0].rows if placements else source.spec.shape[0]
        if source.weight and not placements:  # each matrix of a stack by its rows
            self.rows = source.spec.size // source.spec.shape[-1]

    def blocks(self, merged: TensorRef, sample: bool = False) -> Iterator[ReplayBlock]:
        """Yield the blocks of a tensor beside `merged`. With `sample` yield only one small block from the middle."""
        merged = merged.as_stored(merged.spec.dtype)  # compared in the type that it has
        work, columns = Workspace(), self.source.spec.size // max(1, self.rows)
        height = max(1, min(ROWS, NUMBERS // max(1, columns)))
        for start, stop, inside in segments(self.placements, {0, self.rows}):
            if sample and not start <= self.rows // 2 < stop:
                continue
            piece = RowSegment(self.source, columns, start, stop, inside, self._load) if inside else None
            for first in [self.rows // 2] if sample else range(start, stop, height):
                last = min(first + (max(1, height // 4) if sample else height), stop)
                rows = merged.read_matrix(self.rows, first, last)
                base = self.source.as_stored(rows.form.name).read_matrix(self.rows, first, last)
                yield ReplayBlock(first, tuple(inside), piece, base, rows, work)


@dataclass(frozen=True)
class DeltaBounds:
    """One adapter's delta of a block, with bounds of other programs' errors. Arrays are (rows, n) in float64."""

    change: Wide  # the delta, of a DoRA what is added before the norm
    slack: Wide  # an upper bound of the error of float32 arithmetic
    scale: float


@dataclass(frozen=True)
class AdapterDelta(DeltaBounds):
    """The delta of a placement that adds something, with its errors in float32."""

    placement: Placement
    sizes: Wide  # the delta of the absolute values, which bounds rounding errors
    errors: Wide  # (ways, rows, n), the actual errors of a few ways to compute it in float32
    gain: Wide  # (rows or 1, n or 1), by what it is multiplied before it is added: m / n of a DoRA, at most
    magnitude: Wide | None  # m of a DoRA, (rows, 1), or (1, n) if the base stores (in, out)

    @property
    def is_additive(self) -> bool:
        return self.placement.update.additive


@dataclass(frozen=True)
class _Loaded:
    """An update of a placement, and the sum that it adds."""

    placement: Placement
    added: Update  # of a DoRA that without its norm
    magnitude: Wide | None  # m of a DoRA, one for each row of the update, or column if the base stores (in, out)
    cache: dict[tuple[Form | None, bool], _Added] = field(default_factory=dict)

    def of(self, kind: Form | None, absolute: bool = False) -> _Added:
        """Return the sum with tensors rounded to `kind` and then, if `absolute`, without signs."""
        if (kind, absolute) not in self.cache:
            update = self.added if kind is None else self.added.map(lambda each: rounded_to(each.wide(), kind))
            update = update.map(abs) if absolute else update
            how = self.placement.weight, self.placement.transposed
            self.cache[kind, absolute] = _Added(update, update.terms(*how), update.delta(*how))
        return self.cache[kind, absolute]


@dataclass(frozen=True)
class _Added:
    """The sum that an update adds: its terms, and its delta if it has one."""

    update: Update
    terms: list[Term]
    of_rows: RowsOfDelta | None  # what it adds beside them

    def dense(self, rows: slice, columns: int) -> Wide:
        """Return these of its rows in float64, (rows, columns)."""
        total = np.zeros((rows.stop - rows.start, columns))
        for term in self.terms:
            total += float(term.scale) * (term.left[rows].wide() @ term.right[:, :columns].wide())
        if self.of_rows:
            delta, part = self.of_rows(rows.start, rows.stop), np.empty_like(total)
            delta.dense(np.float64, ON_CPU).fill(slice(0, len(total)), 0.0, part)
            total += part
        return total

    def factors(self, placement: Placement, columns: int) -> tuple[Wide, Wide, float] | None:
        """Return left, right and scale of scale * left @ right, the sum. None if there are no factors."""
        if len(self.terms) == 1:
            (term,) = self.terms
            return term.left.wide(), term.right[:, :columns].wide(), float(term.scale)
        if self.terms:
            left = np.concatenate([float(term.scale) * term.left.wide() for term in self.terms], 1)
            return left, np.concatenate([term.right[:, :columns].wide() for term in self.terms]), 1.0
        factors = self.update.factors()
        if factors is None:
            return None
        B, A = (side[0] for side in factors)
        return (A.T, B.T, placement.weight) if placement.transposed else (B, A, placement.weight)


class AdapterDeltas:
    """The separate deltas of one tensor."""

    def __init__(self, load: UpdateLoader) -> None:
        self._load = load
        self._loaded: dict[int, _Loaded] = {}
        self._block: ReplayBlock | None = None
        self._made: dict[Form | None, list[AdapterDelta]] = {}  # of that block, by the type of factors

    def of(self, block: ReplayBlock, kind: Form | None = None) -> list[AdapterDelta]:
        """Return the deltas of additive updates, and the sums inside DoRAs, with tensors rounded to `kind`."""
        if self._block is not block:
            placements = [p for p in block.inside if adds(p)]
            self._loaded = {id(p): self._loaded.get(id(p)) or self._added(p) for p in placements}
            self._block, self._made = block, {}
        if kind not in self._made:
            self._made[kind] = [_bound(block, loaded, kind) for loaded in self._loaded.values()]
        return self._made[kind]

    def _added(self, placement: Placement) -> _Loaded:
        update = placement.adapter.load(placement.update).matrix(placement.expert)
        magnitude = update.magnitude.wide().reshape(-1) if isinstance(update, DoRA) else None
        return _Loaded(placement, update.inner if isinstance(update, DoRA) else update, magnitude)


def _bound(block: ReplayBlock, loaded: _Loaded, kind: Form | None) -> AdapterDelta:
    placement, added = loaded.placement, loaded.of(kind)
    start, columns = placement.skip + block.first - placement.start, block.base.shape[1]
    rows = slice(start, start + len(block.base))
    change = added.dense(rows, columns)
    sizes = np.abs(loaded.of(kind, absolute=True).dense(rows, columns))
    left, right, scale = added.factors(placement, columns) or (np.zeros(0), np.zeros(0), 1.0)
    ways = [change.astype(np.float32)] * WAYS
    if len(right):
        L, R, root = left[rows].astype(np.float32), right.astype(np.float32), abs(scale) ** 0.5
        ways[1:] = (L @ R) * scale, (L * root) @ (R * (root if scale > 0 else -root))
    slack = sizes * (U32 * (len(right) + 8))
    errors = np.abs(np.stack(ways).astype(np.float64) - change)
    m, gain, (_, a) = loaded.magnitude, np.ones((1, 1)), block.reals
    if m is not None:
        alike = columns_of_a_norm(placement, columns)
        m = np.repeat(m, alike)[None] if norm_axis(placement) == 1 else m[rows, None]
        if a is not None and placement.weight:
            gain = (np.abs(a) + abs(1 - placement.weight)) / abs(placement.weight)
    return AdapterDelta(change, slack, scale, placement, sizes, errors, gain, m)


def normalizes_rows(placement: Placement) -> bool:
    """Return whether a DoRA has weight 1, so that it divides rows by their norms, not just a part of the way."""
    return norm_axis(placement) is not None and placement.weight == 1


def adds(placement: Placement) -> bool:
    """Return whether an update adds something, directly or inside a DoRA."""
    return placement.update.additive or norm_axis(placement) is not None


def columns_of_a_norm(placement: Placement, columns: int) -> int:
    """Return how many columns share a norm in a DoRA along inputs: the kernel of one input."""
    return columns // placement.update.specs["magnitude"].size if norm_axis(placement) == 1 else 1


def norm_axis(placement: Placement) -> int | None:
    """Return the axis of the norms that an update needs, as `Update.norm_axis`."""
    return placement.update.cls.norm_axis(placement.update, placement.transposed)
