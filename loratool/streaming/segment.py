"""Give rows of a tensor under their placements the exact reals that define their merge."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from ..adapters.updates import ADDITIVE, AddDelta, DoRA, Experts, LowRank, ReplaceRows, Update
from ..binding.placement import Placement
from ..errors import InputError
from ..files.tensor_ref import TensorRef, is_finite
from ..numerics.decide import Factor, Reals
from ..numerics.forms import Wide
from ..numerics.merge import RowMerge
from ..numerics.norms import column_norms, magnitude_ratio, row_norms
from ..numerics.products import Products, Term
from ..numerics.rounding_stats import RoundingStats
from ..numerics.stored import Stored, Sum
from ..numerics.workspace import Workspace

KEPT_STACKS = 2  # updates of all experts of a layer that are kept in memory
NORM_ROWS = 256  # rows read at a time for the norms of columns


class UpdateLoader:
    """Reads updates, and keeps a few of stacks, since each has the factors of all experts of a layer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
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
    """Rows start:stop of a tensor under the same placements; the first that needs their factors loads them.

    Args:
        source: where W comes from; None when there is no W, as in `unmerge`.

    Attributes:
        stored_norms: reads DoRA's norms of columns from the undo file, when there is no W to compute them from.
    """

    def __init__(
        self, source: TensorRef | None, start: int, stop: int, placements: Sequence[Placement], load: UpdateLoader
    ) -> None:
        self.start, self.stop = start, stop
        self.stored_norms: Callable[[], Wide] | None = None
        self._source, self._load = source, load
        self._additive = [p for p in placements if p.update.kind in ADDITIVE]
        others = [p for p in placements if p.update.kind not in ADDITIVE]
        assert len(others) <= 1, "resolve.refuse_second_nonadditive lets no second one through"
        self._other = others[0] if others else None
        self._lock = threading.Lock()
        self._ready: _Ready | None = None

    @property
    def norms_of_rows(self) -> bool:
        """Return whether each row needs a norm of its own."""
        return self._other is not None and self._other.update.kind == "dora" and not self._other.transposed

    @property
    def norms_of_columns(self) -> bool:
        """Return whether all rows need the norms of the columns."""
        return self._other is not None and self._other.update.kind == "dora" and self._other.transposed

    def merge(self, base: Tensor, row: int, out: Tensor, work: Workspace) -> RoundingStats:
        """Write the merge of rows of the tensor, from row `row` on, into `out`. base, out: (rows, n)."""
        x, _ = self.reals_of(row, row + len(base), base, work)
        return RowMerge(x, base.dtype, out.dtype, base.device).apply(base, 0, out, work)

    def reals(self, base: Tensor, row: int) -> tuple[Tensor, Tensor | None]:
        """Return X of rows of the tensor in float64, to about 2**-48 of the sizes that it sums, and its a."""
        x, _ = self.reals_of(row, row + len(base), base, Workspace(torch.device("cpu")))
        wide, change = base.double(), torch.empty(base.shape, dtype=torch.float64)
        x.delta.dense(torch.float64, change.device).fill(slice(0, len(base)), 0.0, change)
        if x.factor is None:
            return wide + change, None
        a = torch.from_numpy(x.factor.value)
        a = a[:, None] if x.factor.axis == 0 else a[None]
        return torch.where(a == 0, 0.0, a * wide) + change, a

    def reals_of(
        self, start: int, stop: int, base: Tensor | None, work: Workspace, norms: Wide | None = None
    ) -> tuple[Reals, Wide | None]:
        """Return the reals of rows start:stop of the tensor, and DoRA's norms that they depend on.

        Args:
            base: their W; None when the norms are known or not needed.
            norms: of each row, if they are known.

        Raises:
            InputError: a row has inf or nan, and its norm is needed.
        """
        ready, rows = self._get(), slice(start - self.start, stop - self.start)
        first, last = rows.start, rows.stop
        other, update = self._other, ready.update
        if other is None:
            assert ready.products
            return Reals(ready.products.rows(first, last)), None
        if isinstance(update, DoRA):
            assert ready.products and ready.plain
            if self.norms_of_columns:
                return Reals(ready.products.rows(first, last), ready.factor), ready.norms
            if norms is None:
                assert base is not None
                self._require_finite(base)
                norms = self._in_range(row_norms(ready.plain.rows(first, last), base, work))
            at = other.skip + start - other.start
            magnitude = update.magnitude.flatten()[at : at + stop - start]
            ratio, factor = magnitude_ratio(magnitude, norms, other.weight, 0)
            return Reals(ready.products.rows(first, last, ratio), factor), norms
        value, factor = self._stored(other, update, start, stop)
        return Reals(Sum([value, ready.products.rows(first, last)]) if ready.products else value, factor), None

    @staticmethod
    def _stored(placement: Placement, update: Update | None, start: int, stop: int) -> tuple[Stored, Factor]:
        """Return w V and 1 - w of rows start:stop."""
        left = 1 - Fraction(placement.weight)
        if isinstance(update, ReplaceRows):
            indices = update.indices.numpy()
            inside = (indices >= start) & (indices < stop)
            index, numbers = np.full(stop - start, -1), [Fraction(1)] * (stop - start)
            index[indices[inside] - start] = np.flatnonzero(inside)
            for row in indices[inside] - start:
                numbers[row] = left
            return Stored(update.value, placement.weight, index), Factor.of_rows(numbers)
        value = TensorRef(placement.adapter.file, placement.update.tensors["value"]).rows(start, stop)
        return Stored(value.reshape(stop - start, -1), placement.weight), Factor.of_rows([left] * (stop - start))

    def _require_finite(self, base: Tensor) -> None:
        if not is_finite(base):
            name = self._source.name if self._source else ""
            raise InputError("has rows with inf or nan, whose norm DoRA needs", culprit=name)

    def _in_range(self, norms: Wide) -> Wide:
        if not np.isfinite(norms).all():
            name = self._source.name if self._source else ""
            raise InputError("has rows whose norm, which DoRA needs, is beyond float64", culprit=name)
        return norms

    def _get(self) -> _Ready:
        with self._lock:
            if self._ready is None:
                self._ready = self._make()
            return self._ready

    def _make(self) -> _Ready:
        terms = [t for p in self._additive for t in self._terms(p, self._load(p), p.weight)]
        ready = _Ready()
        other = self._other
        if other is not None and other.update.kind != "replace":
            ready.update = self._load(other)
        if other is not None and isinstance(ready.update, DoRA):
            own = self._terms(other, ready.update, 1.0)
            ready.plain = Products(own)
            if self.norms_of_columns:
                ready.norms = self.stored_norms() if self.stored_norms else self._column_norms(ready.plain)
                magnitude = ready.update.magnitude.flatten()
                ratio, ready.factor = magnitude_ratio(magnitude, ready.norms, other.weight, 1)
                own = [Term(t.left, t.right, t.scale, columns=ratio) for t in own]
            else:
                own = [Term(t.left, t.right, t.scale, by_rows=True) for t in own]
            terms = own + terms
        ready.products = Products(terms) if terms else None
        return ready

    def _column_norms(self, products: Products) -> Wide:
        """Return ||W + D|| of each column, reading the tensor by blocks of rows."""
        source = self._source
        assert source

        def blocks() -> Iterator[tuple[int, Tensor]]:
            for start in range(0, products.shape[0], NORM_ROWS):
                rows = source.rows(start, min(start + NORM_ROWS, products.shape[0]))
                self._require_finite(rows)
                yield start, rows.to(self._load.device)

        return self._in_range(column_norms(products, blocks, Workspace(self._load.device)))

    def _terms(self, placement: Placement, update: Update, weight: float) -> list[Term]:
        """Return the factors of an update, for the rows of the segment only."""
        if isinstance(update, Experts):
            assert placement.expert is not None
            update = update.expert(placement.expert)
        assert isinstance(update, LowRank | AddDelta)
        first = placement.skip + self.start - placement.start
        rows = slice(first, first + self.stop - self.start)
        terms = update.terms(weight, placement.transposed)
        return [Term(term.left[rows], term.right, term.scale) for term in terms]


class _Ready:
    """The parts that all rows of a segment share, once it is loaded."""

    def __init__(self) -> None:
        self.products: Products | None = None  # of all terms, DoRA's times its ratios
        self.plain: Products | None = None  # of DoRA's alone, without them
        self.update: Update | None = None  # the one that is not additive
        self.factor: Factor | None = None  # of DoRA's columns
        self.norms: Wide | None = None  # of DoRA's columns
