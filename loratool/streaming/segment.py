"""Exact reals that define the merge of a tensor's rows with their placements."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np

from ..adapters.updates.dora import DoRA
from ..adapters.updates.low_rank import LowRank
from ..adapters.updates.update import Projected, RowsOfDelta, Update
from ..binding.modules.placement import Placement
from ..errors import InputError
from ..files.tensor_ref import TensorRef
from ..numerics.arrays import CPU, ON_CPU, Device, Numbers, like_of, sent
from ..numerics.composed import Scaled
from ..numerics.decide import Delta, Factor, Reals
from ..numerics.forms import Wide
from ..numerics.merge import RowMerge
from ..numerics.mixed import Mixing
from ..numerics.norms import column_norms, magnitude_ratio, row_norms
from ..numerics.products import Products, Term
from ..numerics.rounding_stats import RoundingStats
from ..numerics.short_products import column_products, row_products
from ..numerics.stored import RowsOf, Sum, Zero
from ..numerics.workspace import Workspace

KEPT_STACKS = 2  # updates of all experts of a layer that are kept in memory
ONE = Numbers.of(np.ones((1, 1), np.float32))
NORM_ROWS = 256  # rows read at a time for the norms of columns
READ_NUMBERS = 1 << 20  # of a weight at a time beside the rows of its bias
READ_ROWS = 1024  # for other numbers of columns


class UpdateLoader:
    """Reads updates, and caches a few updates of stacks, since each has the factors of all experts of a layer."""

    def __init__(self, device: Device = CPU) -> None:
        self.like = like_of(device)
        self._kept: dict[int, Update] = {}
        self._lock = threading.Lock()

    def __call__(self, placement: Placement) -> Update:
        if placement.expert is None:
            return placement.adapter.load(placement.update)
        key = id(placement.update)
        with self._lock:
            if key not in self._kept:
                if len(self._kept) >= KEPT_STACKS:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = placement.adapter.load(placement.update)
            return self._kept[key]


class RowSegment:
    """Rows start:stop of a tensor with the same placements; the first call that needs the factors loads them.

    Args:
        source: where W comes from; None when there is no W, as in `unmerge`.
        columns: of the tensor as a matrix.

    Attributes:
        stored_norms: takes a count and reads so many norms of DoRA's columns from the undo file; set where there is no
            W to compute them from.
        mixes: numbers of W mix, so that W is predicted from W' and not bounded by it.
    """

    def __init__(
        self,
        source: TensorRef | None,
        columns: int,
        start: int,
        stop: int,
        placements: Sequence[Placement],
        load: UpdateLoader,
    ) -> None:
        self.start, self.stop, self.columns = start, stop, columns
        self.stored_norms: Callable[[int], Wide] | None = None
        self._source, self._load = source, load
        self._additive = [p for p in placements if p.update.additive]
        others = [p for p in placements if not p.update.additive]
        assert len(others) <= 1, "resolve.refuse_second_nonadditive lets no second one through"
        self._other = others[0] if others else None
        self._norm_axis = self._other and self._other.update.cls.norm_axis(self._other.update, self._other.transposed)
        self._projects = self._other is not None and self._other.update.cls.projects
        self._reads_weight = self._other is not None and self._other.update.cls.reads_weight(self._other.update)
        self._reads_columns = self._other is not None and self._other.update.cls.reads_columns
        self.mixes = self._other is not None and self._other.update.cls.mixes
        self._lock = threading.Lock()
        self._loaded: _LoadedUpdates | None = None

    @property
    def norms_of_rows(self) -> bool:
        """Return whether each row needs its norm, or other numbers that W has to be read for."""
        return self._norm_axis == 0 or self._projects or bool(self._reads_weight)

    def count_row_norms(self) -> int:
        """Return how many numbers of each row there are."""
        projected = self._get().projected
        return projected.U.shape[1] if projected else 1

    @property
    def norms_of_columns(self) -> bool:
        """Return whether all rows need the norms of the columns, or other numbers of them."""
        return self._norm_axis == 1 or self._reads_columns

    @property
    def is_low_rank(self) -> bool:
        """Return whether only products of two factors are added."""
        return not self._other and all(p.update.cls is LowRank for p in self._additive)

    @property
    def rank(self) -> int:
        """Return the sum of the updates' ranks."""
        return sum(p.update.rank for p in self._additive)

    def count_column_norms(self) -> int:
        """Return how many norms of columns there are."""
        norms = self._get().norms
        return 0 if norms is None else len(norms)

    def merge(self, base: Numbers, row: int, out: Numbers, work: Workspace) -> RoundingStats:
        """Write the merge of rows of the tensor, from row `row` on, into `out`. base, out: (rows, n)."""
        x, _ = self.reals_of(row, row + len(base), base, work)
        return RowMerge(x, base.form, out.form, base.bits).apply(base, 0, out, work)

    def alike(self) -> Hashable:
        """Return a key that is equal for segments whose products nearly always have the same shapes and scales."""
        return tuple((p.update.rank, p.update.scale, p.weight, p.transposed) for p in self._additive)

    def additive_terms(self) -> list[Term]:
        """Return the terms of the sum that is added to all rows."""
        return self._get().deltas.terms

    def reals(self, base: Numbers, row: int) -> tuple[Wide, Wide | None]:
        """Return X of rows of the tensor in float64, to about 2**-48 of the sizes of its summands, and a."""
        x, _ = self.reals_of(row, row + len(base), base, Workspace())
        wide, change = base.wide(), np.empty(base.shape)
        x.delta.dense(np.float64, ON_CPU).fill(slice(0, len(base)), 0.0, change)
        if x.factor is None:
            return wide + change, None
        a, _ = x.factor.of_rows_in(slice(0, len(base)))
        with np.errstate(all="ignore"):
            return np.where(a == 0, 0.0, a * wide) + change, a

    def reals_of(
        self, start: int, stop: int, base: Numbers | None, work: Workspace, norms: Wide | None = None
    ) -> tuple[Reals, Wide | None]:
        """Return the reals of rows start:stop of the tensor, and the DoRA norms that they depend on.

        Args:
            base: their W; None when the norms are known or not needed.
            norms: of each row, if they are known.

        Raises:
            InputError: a row has inf or nan, and its norm is needed.
        """
        loaded, first, last = self._get(), start - self.start, stop - self.start
        other, update = self._other, loaded.update
        if other is None or update is None:
            return Reals(loaded.deltas.rows(first, last)), None
        if loaded.mixing:
            assert base is not None
            return Reals(loaded.deltas.rows(first, last, beside=self._mixed(loaded.mixing, start, base))), None
        if self.norms_of_columns:
            return Reals(loaded.deltas.rows(first, last), loaded.factor), loaded.norms
        if loaded.projected:
            if norms is None:
                assert base is not None
                self._require_finite(base, "a product with them is needed")
                norms = row_products(base, loaded.projected.U)
            left = Numbers.of(norms.reshape(last - first, -1))
            change = Products([Term(left, loaded.projected.K, loaded.projected.scale)])
            return Reals(loaded.deltas.rows(first, last, beside=change.rows(0, last - first))), norms
        rows, beside = _rows_of(other, start, stop), list[Delta]()
        if loaded.weighed is not None:
            if norms is None:
                assert other.beside, "a plan has the rows of the weight, and an undo file the products"
                blocks = other.beside.blocks(rows, READ_NUMBERS)
                norms = np.concatenate([row_products(W, loaded.weighed) for W in blocks])
            left = Numbers.of(norms.reshape(-1, 1))
            beside = [Products([Term(left, ONE, Fraction(other.weight))]).rows(0, last - first)]
        elif self.norms_of_rows:
            if norms is None:
                assert base is not None
                self._require_finite(base)
                norms = self._in_range(row_norms(loaded.plain.rows(first, last), base, work))
            ratio, factor = magnitude_ratio(self._magnitude(update, start, stop), norms, other.weight, 0)
            return Reals(loaded.deltas.rows(first, last, ratio), factor), norms
        value, moved = update.moved(other.weight, other.transposed, rows, self.columns)
        added = [*([value] if value else []), *beside]
        return Reals(loaded.deltas.rows(first, last, beside=Sum(added) if beside else value), moved), norms

    def _mixed(self, mixing: Mixing, start: int, base: Numbers) -> Delta:
        """Return the change of rows from row `start` on by an update that mixes, whose blocks may have more rows."""
        assert self._other
        together, stop = self._other.together, start + len(base)
        first = start - (start - self.start) % together
        last = min(self.stop, stop + (self.start - stop) % together)
        if (first, last) != (start, stop):
            assert self._source
            base = self._source.read_matrix(self._other.rows, first, last)
        self._require_finite(base, "numbers mix")
        change = mixing.change(base, _rows_of(self._other, first, last).start)
        return change if (first, last) == (start, stop) else RowsOf(change, start - first, stop - first)

    def undone(self, start: int, stop: int, merged: Numbers) -> Reals:
        """Return what to subtract from W' of rows start:stop, whole blocks, to be near W, of an update that mixes.

        Raises:
            ValueError: a row has inf or nan.
        """
        loaded, other = self._get(), self._other
        assert loaded.mixing and other
        if not merged.all_finite():
            raise ValueError("is for finite numbers")
        undone = loaded.mixing.undone(merged, _rows_of(other, start, stop).start)
        return Reals(loaded.deltas.rows(start - self.start, stop - self.start, beside=undone))

    def _magnitude(self, update: Update, start: int, stop: int) -> Numbers:
        assert self._other and isinstance(update, DoRA)
        return update.magnitude.reshape(-1)[_rows_of(self._other, start, stop)]

    def _require_finite(self, base: Numbers, why: str = "DoRA needs their norms") -> None:
        if not base.all_finite():
            name = self._source.name if self._source else ""
            raise InputError(f"has rows with inf or nan, but {why}", culprit=name)

    def _in_range(self, norms: Wide) -> Wide:
        if not np.isfinite(norms).all():
            name = self._source.name if self._source else ""
            message = "has a row or column whose norm is beyond float64, but DoRA needs it"
            raise InputError(message, culprit=name)
        return norms

    def _get(self) -> _LoadedUpdates:
        with self._lock:
            if self._loaded is None:
                self._loaded = self._make()
            return self._loaded

    def _make(self) -> _LoadedUpdates:
        loaded, other = _LoadedUpdates(self.columns), self._other
        for placement in self._additive:
            loaded.deltas.add(placement, self._load(placement), placement.weight, self.start, self.stop)
        if other is None:
            return loaded
        update = loaded.update = other.sized(self._load(other).matrix(other.expert), self.columns)
        if update.reads_columns:
            self._add_read(loaded, other, update)
            return loaded
        if update.projects:
            try:
                loaded.projected = update.projected(other.weight)
            except ValueError as error:
                raise InputError(str(error), culprit=other.update.module) from error
            loaded.deltas.add(other, update, other.weight, self.start, self.stop)
            return loaded
        if self._reads_weight:
            loaded.weighed = update.weighed()
            return loaded
        if update.mixes:
            try:
                loaded.mixing = update.mixing(other.weight, other.transposed)
            except ValueError as error:
                raise InputError(str(error), culprit=other.update.module) from error
            return loaded
        if isinstance(update, DoRA):
            loaded.plain.add(other, update.inner, 1.0, self.start, self.stop)
            if self.norms_of_columns:
                magnitude = update.magnitude.reshape(-1)
                together = self.columns // len(magnitude)  # columns of the kernel of one input
                stored = self.stored_norms
                loaded.norms = stored(len(magnitude)) if stored else self._column_norms(other, update.inner, together)
                both = magnitude_ratio(magnitude, loaded.norms, other.weight, 1)
                ratio, loaded.factor = (factor.repeated(together) for factor in both) if together > 1 else both
                loaded.deltas.scaled(loaded.plain, ratio)
            else:
                loaded.deltas.scaled(loaded.plain, None)
        return loaded

    def _add_read(self, loaded: _LoadedUpdates, placement: Placement, update: Update) -> None:
        """Add the terms of an update that depends on numbers of each column."""
        left, source = update.reading(), self._source

        def blocks() -> Iterator[tuple[int, Numbers]]:
            assert source
            for start in range(placement.start, placement.stop, READ_ROWS):
                rows = source.read_matrix(placement.rows, start, min(start + READ_ROWS, placement.stop))
                self._require_finite(rows, "a product with them is needed")
                yield start - placement.start, rows

        stored = self.stored_norms
        numbers = stored(len(left) * self.columns) if stored else column_products(left, blocks, self.columns)
        loaded.norms = numbers.reshape(-1)
        rows = _rows_of(placement, self.start, self.stop)
        terms = update.terms_of(numbers.reshape(len(left), self.columns), placement.weight)
        loaded.deltas.terms += [Term(t.left[rows], t.right, t.scale) for t in terms]

    def _column_norms(self, placement: Placement, update: Update, together: int) -> Wide:
        """Return ||W + D|| of each group of `together` columns, over all rows of the module."""
        source, deltas = self._source, _Deltas(self.columns)
        assert source
        runs = placement.runs or ((placement.start, placement.stop, placement.skip),)
        count = sum(stop - start for start, stop, _ in runs)
        deltas.add(replace(placement, start=0, stop=count, skip=0), update, 1.0, 0, count)

        def blocks() -> Iterator[tuple[int, Numbers]]:
            for start, stop, skip in runs:
                for first in range(start, stop, NORM_ROWS):
                    rows = source.read_matrix(placement.rows, first, min(first + NORM_ROWS, stop))
                    self._require_finite(rows)
                    yield skip + first - start, Numbers(sent(rows.bits, self._load.like), rows.form)

        return self._in_range(column_norms(deltas.rows, blocks, Workspace(self._load.like), together))


def reals_of_batch(segments: Sequence[RowSegment]) -> Reals | None:
    """Return the reals of all rows of several plain LoRA segments, one below the other, as one sum.

    Returns:
        None if the terms differ in shape, type or scale, or if some are so large or small that others lose precision.
    """
    terms = [segment.additive_terms() for segment in segments]
    kinds = {tuple((t.left.shape, t.left.form, t.right.shape, t.right.form, t.scale) for t in row) for row in terms}
    if len(kinds) > 1:
        return None
    stacked = [
        Term(_joined([t.left for t in alike], 0), _joined([t.right for t in alike], 1), alike[0].scale)
        for alike in zip(*terms, strict=True)
    ]
    products = Products(stacked, len(segments))
    return Reals(products.rows(0, products.shape[0])) if products.in_range else None


def _joined(parts: Sequence[Numbers], axis: int) -> Numbers:
    return Numbers(np.concatenate([part.bits for part in parts], axis), parts[0].form)


def _rows_of(placement: Placement, start: int, stop: int) -> slice:
    """Return the update's own rows for rows start:stop of the tensor."""
    first = placement.skip + start - placement.start
    return slice(first, first + stop - start)


@dataclass(frozen=True)
class _Part:
    """A delta that an update adds to a segment's rows beside its terms.

    Attributes:
        of_rows: (start, stop) of the update's rows -> their delta.
        first: the update's row that is the segment's first.
        ratio: a factor for each column.
        by_rows: multiply by a factor for each row instead.
    """

    of_rows: RowsOfDelta
    first: int
    ratio: Factor | None = None
    by_rows: bool = False


class _Deltas:
    """The sum of the updates' deltas in the rows of a segment."""

    def __init__(self, columns: int) -> None:
        self.terms: list[Term] = []
        self._columns = columns
        self._parts: list[_Part] = []

    def add(self, placement: Placement, update: Update, weight: float, start: int, stop: int) -> None:
        """Add `weight` times an update's delta in rows start:stop of the tensor.

        Raises:
            InputError: products of its factors are beyond float64.
        """
        matrix, rows, transposed = (
            placement.sized(update.matrix(placement.expert), self._columns),
            _rows_of(placement, start, stop),
            placement.transposed,
        )
        try:
            terms, of_rows = matrix.terms(weight, transposed), matrix.delta(weight, transposed)
        except ValueError as error:
            raise InputError(str(error), culprit=placement.update.module) from error
        self.terms += [Term(t.left[rows], t.right[:, : self._columns], t.scale) for t in terms]
        if of_rows:
            self._parts.append(_Part(of_rows, rows.start))

    def scaled(self, other: _Deltas, ratio: Factor | None) -> None:
        """Add another sum, scaled by columns. ratio: None to scale by rows, with the ratio given to `rows`."""
        by_rows = ratio is None
        self.terms = [Term(t.left, t.right, t.scale, ratio, by_rows) for t in other.terms] + self.terms
        self._parts += [replace(part, ratio=ratio, by_rows=by_rows) for part in other._parts]

    @cached_property
    def products(self) -> Products:
        return Products(self.terms)

    def rows(self, first: int, last: int, ratio: Factor | None = None, beside: Delta | None = None) -> Delta:
        """Return the sum in rows first:last of the segment.

        Args:
            ratio: a factor for each row, from row `first` on.
            beside: another delta of these rows, added to the sum.
        """
        deltas = [beside] if beside else []
        deltas += [self.products.rows(first, last, ratio)] if self.terms else []
        for part in self._parts:
            delta, number = part.of_rows(part.first + first, part.first + last), ratio if part.by_rows else part.ratio
            deltas.append(Scaled(delta, number) if number else delta)
        if not deltas:
            return Zero((last - first, self._columns))
        return deltas[0] if len(deltas) == 1 else Sum(deltas)


class _LoadedUpdates:
    """The loaded updates of a segment, and what all of its rows share."""

    def __init__(self, columns: int) -> None:
        self.deltas = _Deltas(columns)  # of all updates, DoRA's times its ratios
        self.plain = _Deltas(columns)  # of DoRA's alone, without the ratios
        self.update: Update | None = None  # the one that is not additive
        self.factor: Factor | None = None  # of DoRA's columns
        self.norms: Wide | None = None  # of DoRA's columns
        self.mixing: Mixing | None = None  # of an update that mixes
        self.projected: Projected | None = None  # of one that projects
        self.weighed: Numbers | None = None  # of one of a bias that reads the weight
