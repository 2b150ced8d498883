"""Replay a merge block by block beside the merged model, and each adapter's delta with error bounds.

`Replay` returns the rows that `merge` would write, before and after rounding. `AdapterDeltas` keeps the updates
separate, so that `rounding_bounds` can round each by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ...adapters.updates.dora import DoRA
from ...adapters.updates.low_rank import LowRank
from ...adapters.updates.update import RowsOfDelta, Update
from ...binding.modules.placement import Placement
from ...files.tensor_ref import TensorRef
from ...numerics.arrays import ON_CPU, Numbers, rounded_to, take
from ...numerics.forms import Form, Positions, Wide
from ...numerics.products import Term
from ...numerics.rounding_stats import RoundingStats, cast_rounded
from ...numerics.workspace import Workspace
from ...streaming.apply import segments
from ...streaming.segment import RowSegment, UpdateLoader

Flags = npt.NDArray[np.bool_]

Floats = npt.NDArray[np.float32] | Wide

Spans = Sequence[tuple[int, int]]  # first row, row after the last

U32 = 2.0**-24  # half an ulp of float32, relative

ROWS = 128  # of a block, unless these are more than NUMBERS

NUMBERS = 1 << 21

WAYS = 3  # to compute a delta in float32

SPANS = 2  # that are drawn of a tensor's rows

SPAN = 8  # rows of each


@dataclass(frozen=True)
class ReplayBlock:
    """Some rows of a tensor seen as a matrix, in the base and in the merged model."""

    first: int  # row
    inside: tuple[Placement, ...]  # those on these rows
    piece: RowSegment | None  # the rows with the same placements, which this block is in
    base: Numbers  # (rows, n), in the base's type
    merged: Numbers  # (rows, n), in the merged model's type
    work: Workspace

    @property
    def width(self) -> int:
        """How many columns the tensor has."""
        return self.base.shape[1]

    def product(self, left: Numbers | Floats, right: Numbers | Floats, start: int) -> Floats:
        """Return left @ right for its weights, (rows, n). Its first row is row `start` of `left`."""
        product: Floats = floats(left[start : start + len(self.base)]) @ floats(right[:, : self.width])
        return product

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


@dataclass(frozen=True)
class PickedWeights(ReplayBlock):
    """A few weights of a block, each with its row and column there, as the only row of a block of their own."""

    rows: Positions
    columns: Positions
    row_length: int  # of the block
    replayed: Numbers  # (1, n), as `merge` writes them
    deltas: AdapterDeltas

    @classmethod
    def of(cls, block: ReplayBlock, where: Flags, deltas: AdapterDeltas) -> PickedWeights:
        """Pick the weights of a block where a mask is set."""
        places = np.flatnonzero(where)
        base, merged, replayed = (
            Numbers(take(x, places)[None], x.form) for x in (block.base, block.merged, block.expected[0])
        )
        rows, columns = np.divmod(places, where.shape[1])
        picked = block.first, block.inside, block.piece, base, merged, block.work
        return cls(*picked, rows, columns, where.shape[1], replayed, deltas)

    @property
    def width(self) -> int:
        return self.row_length

    def product(self, left: Numbers | Floats, right: Numbers | Floats, start: int) -> Floats:
        dots: Floats = np.einsum("kr,rk->k", floats(left[start + self.rows]), floats(right[:, self.columns]))
        return dots[None]

    @cached_property
    def expected(self) -> tuple[Numbers, RoundingStats]:
        return self.replayed, RoundingStats()

    @cached_property
    def reals(self) -> tuple[Wide, Wide | None]:
        """X and a of additive updates alone."""
        return self.base.wide() + sum(delta.change for delta in self.deltas.of(self)), None


class KeptUpdates(UpdateLoader):
    """Reads the updates of one tensor once."""

    def __init__(self, read: UpdateLoader) -> None:
        self.like, self._read = read.like, read
        self._updates: dict[int, Update] = {}

    def __call__(self, placement: Placement) -> Update:
        key = id(placement.update)
        if key not in self._updates:
            self._updates[key] = self._read(placement)
        return self._updates[key]


class Replay:
    """A tensor under its placements, block by block."""

    def __init__(self, source: TensorRef, placements: Sequence[Placement], load: UpdateLoader) -> None:
        self.source, self.placements, self._load = source, tuple(placements), load
        self.rows = placements[0].rows if placements else source.spec.shape[0]
        if source.weight and not placements:  # each matrix of a stack by its rows
            self.rows = source.spec.size // source.spec.shape[-1]

    def drawn(self, name: str) -> Spans:
        """Return a few spans of rows, drawn by the adapters' hashes and the tensor's name and shape."""
        key = [name, str(self.source.spec.shape), *dict.fromkeys(p.adapter.sha256 for p in self.placements)]
        digest, apart = hashlib.sha256("\n".join(key).encode()).digest(), max(SPAN, self.rows // SPANS)
        drawn = (int.from_bytes(digest[8 * k : 8 * k + 8], "little") % (apart - SPAN + 1) for k in range(SPANS))
        starts = [k * apart + offset for k, offset in enumerate(drawn) if k * apart + offset < self.rows]
        return [(first, min(first + SPAN, self.rows)) for first in starts]

    def middle(self) -> Spans:
        """Return a span of rows from the middle."""
        first = self.rows // 2
        return [(first, first + max(1, self._height // 4))]

    @property
    def _columns(self) -> int:
        return self.source.spec.size // max(1, self.rows)

    @property
    def _height(self) -> int:
        return max(1, min(ROWS, NUMBERS // max(1, self._columns)))

    def blocks(self, merged: TensorRef, spans: Spans = ()) -> Iterator[ReplayBlock]:
        """Yield the blocks of a tensor beside `merged`, or what is in these spans of its rows alone."""
        merged = merged.as_stored(merged.spec.dtype)  # compared in the type that it has
        work, columns, height = Workspace(), self._columns, self._height
        for start, stop, inside in segments(self.placements, {0, self.rows}):
            piece = RowSegment(self.source, columns, start, stop, inside, self._load) if inside else None
            whole = [(first, first + height) for first in range(start, stop, height)]
            parts = [(max(start, first), last) for first, last in spans if first < stop and start < last]
            for first, end in parts if spans else whole:
                last = min(end, stop)
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
            update = update.absolute() if absolute else update
            how = self.placement.weight, self.placement.transposed
            self.cache[kind, absolute] = _Added(update, update.terms(*how), update.delta(*how))
        return self.cache[kind, absolute]


@dataclass(frozen=True)
class _Added:
    """The sum that an update adds: its terms, and its delta if it has one."""

    update: Update
    terms: list[Term]
    of_rows: RowsOfDelta | None  # what it adds beside them

    def of(self, block: ReplayBlock, start: int) -> Wide:
        """Return what it adds to a block, whose first row is its row `start`, (rows, n)."""
        total = np.zeros(block.base.shape)
        for term in self.terms:
            total += float(term.scale) * block.product(term.left, term.right, start)
        if self.of_rows:
            delta, part = self.of_rows(start, start + len(total)), np.empty_like(total)
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
            self._loaded = {id(p): self._loaded.get(id(p)) or self._added(p, block.width) for p in placements}
            self._block, self._made = block, {}
        if kind not in self._made:
            self._made[kind] = [_bound(block, loaded, kind) for loaded in self._loaded.values()]
        return self._made[kind]

    def factors(self, delta: AdapterDelta, columns: int) -> tuple[Wide, Wide, float] | None:
        """Return left, right and scale of a delta of the last block, as `_Added.factors`."""
        return self._loaded[id(delta.placement)].of(None).factors(delta.placement, columns)

    def _added(self, placement: Placement, columns: int) -> _Loaded:
        update = self._load(placement).matrix(placement.expert)
        magnitude = update.magnitude.wide().reshape(-1) if isinstance(update, DoRA) else None
        inner = update.inner if isinstance(update, DoRA) else update
        return _Loaded(placement, placement.sized(inner, columns), magnitude)


def _bound(block: ReplayBlock, loaded: _Loaded, kind: Form | None) -> AdapterDelta:
    placement, added = loaded.placement, loaded.of(kind)
    start, columns = placement.skip + block.first - placement.start, block.width
    change = added.of(block, start)
    sizes = np.abs(loaded.of(kind, absolute=True).of(block, start))
    left, right, scale = added.factors(placement, columns) or (np.zeros(0), np.zeros(0), 1.0)
    ways: list[Floats] = [change.astype(np.float32)] * WAYS
    if len(right):
        L, R, root = left.astype(np.float32), right.astype(np.float32), abs(scale) ** 0.5
        ways[1:] = (
            block.product(L, R, start) * scale,
            block.product(L * root, R * (root if scale > 0 else -root), start),
        )
    slack = sizes * (U32 * (len(right) + 8))
    errors = np.abs(np.stack(ways).astype(np.float64) - change)
    m, gain = loaded.magnitude, np.ones((1, 1))
    if m is not None:
        alike, (_, a) = columns_of_a_norm(placement, columns), block.reals
        m = np.repeat(m, alike)[None] if norm_axis(placement) == 1 else m[start : start + len(block.base), None]
        if a is not None and placement.weight:
            gain = (np.abs(a) + abs(1 - placement.weight)) / abs(placement.weight)
    return AdapterDelta(change, slack, scale, placement, sizes, errors, gain, m)


def floats(x: Numbers | Floats) -> Floats:
    """Return numbers in float64; floats as they are."""
    return x.wide() if isinstance(x, Numbers) else x


def has_terms_alone(placement: Placement) -> bool:
    """Return whether an update adds products of factors, and nothing else."""
    return placement.update.additive and placement.update.cls is LowRank


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
