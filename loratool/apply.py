"""What placements make of a tensor's rows: updates turned into the steps that a rewrite runs.

The rows of a tensor fall into pieces, each under the same placements: one piece for a plain weight, one an expert
for a stack. Additive updates of a piece are one exact product. At most one other update stands beside it: it knows
a and c of `W' = a * W + c`, as `numerics.exact.Fill` wants them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .errors import InputError
from .numerics.exact import (
    LANES,
    Change,
    ExactProduct,
    Factors,
    Fill,
    Workspace,
    add_squares,
    apply_rounded,
    row_norms,
    sum_tile,
    total_of_lanes,
)
from .placing import Placement
from .rewrite import Changed, RowRange
from .runtime import Step
from .source import Source
from .updates import ADDITIVE, Add, DoRA, Experts, LowRank, Rows, Update

KEPT_UPDATES = 4
NORM_ROWS = 256  # rows read at a time for the norms of columns; a multiple of LANES


class Loader:
    """Reads updates and keeps the last few: one holds the factors of all experts of a layer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[int, Update] = {}
        self._lock = threading.Lock()

    def __call__(self, placement: Placement) -> Update:
        key = id(placement.update)
        with self._lock:
            if key not in self._kept:
                if len(self._kept) >= KEPT_UPDATES:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = placement.adapter.load(placement.update).to(self.device)
            return self._kept[key]


def changed(source: Source, placements: Sequence[Placement], load: Loader) -> Changed:
    """A tensor under its placements, which agree on its rows."""

    def ranges() -> Iterator[RowRange]:
        edges = sorted({edge for p in placements for edge in (p.start, p.stop)})
        for start, stop in pairwise(edges):
            inside = [p for p in placements if p.start <= start and stop <= p.stop]
            if inside:
                yield RowRange(start, stop, _Piece(source, start, stop, inside, load).prepare)

    return Changed(placements[0].rows, ranges)


class _Piece:
    """Rows start:stop of a tensor; made ready by the first worker that needs it and dropped with its last item."""

    def __init__(self, source: Source, start: int, stop: int, placements: Sequence[Placement], load: Loader) -> None:
        self.start, self.stop = start, stop
        self._source, self._placements, self._load, self._device = source, placements, load, load.device
        self._lock = threading.Lock()
        self._ready: tuple[ExactProduct | None, _Special | None] | None = None

    def prepare(self, start: int, stop: int) -> Step:
        """The step for rows start:stop of the tensor."""
        product, special = self._get()
        left = None if product is None else product.left(start - self.start, stop - self.start)

        def step(base: Tensor, row: int, out: Tensor, work: Workspace) -> Change:
            fill = None
            if product is not None and left is not None:
                fill = product.fill(left[row : row + len(base)])
            if special is not None:
                fill = special.fill(base, start + row, fill, work)
            assert fill is not None
            return apply_rounded(base, fill, out, work)

        return step

    def _get(self) -> tuple[ExactProduct | None, _Special | None]:
        with self._lock:
            if self._ready is None:
                terms = [t for p in self._placements if p.update.kind in ADDITIVE for t in self._terms(p, p.weight)]
                others = [p for p in self._placements if p.update.kind not in ADDITIVE]
                special = self._special(others[0]) if others else None
                self._ready = ExactProduct(terms) if terms else None, special
                if self._device.type == "cuda":
                    torch.cuda.current_stream(self._device).synchronize()  # the other workers' streams read it
            return self._ready

    def _terms(self, placement: Placement, weight: float) -> list[Factors]:
        """The factors for the piece's rows alone."""
        update = self._load(placement)
        if isinstance(update, Experts):
            assert placement.expert is not None
            update = update.expert(placement.expert)
        assert isinstance(update, LowRank | Add)
        first = placement.skip + self.start - placement.start
        rows = slice(first, first + self.stop - self.start)
        terms = update.terms(weight, placement.transposed)
        return [Factors(term.left[rows], term.multiplier, term.right) for term in terms]

    def _special(self, placement: Placement) -> _Special:
        weight, file = placement.weight, placement.adapter.file
        if placement.update.kind == "replace":
            return _Replaced(Source(file, placement.update.tensors["value"]), weight)
        update = self._load(placement)
        if isinstance(update, Rows):
            return _ReplacedRows(update, weight)
        assert isinstance(update, DoRA)
        product = ExactProduct(self._terms(placement, 1.0))
        magnitude = update.magnitude.double().flatten()
        if placement.transposed:
            norms = column_norms(self._source, product, self._device)
            return _DoRAColumns(product, _ratio(magnitude, norms, self._source.name).unsqueeze(0), weight)
        first = placement.skip + self.start - placement.start
        return _DoRARows(
            product, magnitude[first : first + self.stop - self.start], weight, self.start, self._source.name
        )


def column_norms(source: Source, product: ExactProduct, device: torch.device) -> Tensor:
    """||W + D|| of each column of a whole tensor in float64, read once by blocks of rows."""
    rows, columns = product.shape
    work = Workspace(device)
    lanes = torch.zeros(LANES, columns, dtype=torch.float64, device=device)
    for start in range(0, rows, NORM_ROWS):
        stop = min(start + NORM_ROWS, rows)
        base = source.file.rows(source.name, start, stop).to(device)
        fill = product.fill(product.left(start, stop))
        width = max(1, work.tile // NORM_ROWS)
        for first in range(0, columns, width):
            part = slice(first, min(first + width, columns))
            add_squares(sum_tile(base[:, part], fill, part, work), lanes[:, part])
    return total_of_lanes(lanes).sqrt_()


def _ratio(magnitude: Tensor, norms: Tensor, name: str) -> Tensor:
    """m / n, and 0 where n is 0: whatever stands before a row of zeros, it is a row of zeros."""
    if not bool(norms.isfinite().all()):
        raise InputError("has rows with inf or nan, whose norm DoRA needs", culprit=name)
    return torch.where(norms == 0, 0.0, magnitude / norms)


class _Special:
    """An update that is not additive."""

    def fill(self, base: Tensor, first: int, inner: Fill | None, work: Workspace) -> Fill:
        """For the rows of `base`, whose first is the tensor's row `first`; `inner` is what is added besides."""
        raise NotImplementedError


def _sum(outer: Fill, inner: Fill | None, work: Workspace) -> Fill:
    if inner is None:
        return outer

    def fill(columns: slice, out: Tensor, scratch: Tensor) -> Tensor | None:
        factor = outer(columns, out, scratch)
        more = work.take("more", torch.float64, *out.shape)
        inner(columns, more, scratch)
        out.add_(more)
        return factor

    return fill


@dataclass(frozen=True)
class _DoRARows(_Special):
    """DoRA on a weight stored as (out, in): a row has its norm in itself. magnitude: (rows of the piece,)."""

    product: ExactProduct
    magnitude: Tensor
    weight: float
    start: int
    name: str

    def fill(self, base: Tensor, first: int, inner: Fill | None, work: Workspace) -> Fill:
        row = first - self.start
        own = self.product.fill(self.product.left(row, row + len(base)))
        magnitude = self.magnitude[row : row + len(base)]
        ratio = _ratio(magnitude, row_norms(base, own, work), self.name).mul_(self.weight).unsqueeze(1)
        factor = ratio + (1.0 - self.weight)

        def fill(columns: slice, out: Tensor, scratch: Tensor) -> Tensor:
            own(columns, out, scratch)
            out.mul_(ratio)
            return factor

        return _sum(fill, inner, work)


@dataclass(frozen=True)
class _DoRAColumns(_Special):
    """DoRA on a weight stored as (in, out), an embedding for one. ratio: m / n, (1, columns)."""

    product: ExactProduct
    ratio: Tensor
    weight: float

    def fill(self, base: Tensor, first: int, inner: Fill | None, work: Workspace) -> Fill:
        own = self.product.fill(self.product.left(first, first + len(base)))
        ratio = self.ratio * self.weight
        factor = ratio + (1.0 - self.weight)

        def fill(columns: slice, out: Tensor, scratch: Tensor) -> Tensor:
            own(columns, out, scratch)
            out.mul_(ratio[:, columns])
            return factor[:, columns]

        return _sum(fill, inner, work)


@dataclass(frozen=True)
class _Replaced(_Special):
    """A part of another value: (1 - w) * W + w * V. (All of it is no update but another source.)"""

    value: Source
    weight: float

    def fill(self, base: Tensor, first: int, inner: Fill | None, work: Workspace) -> Fill:
        value = self.value.file.rows(self.value.name, first, first + len(base)).to(base.device).double()
        factor = torch.full((1, 1), 1.0 - self.weight, dtype=torch.float64, device=base.device)

        def fill(columns: slice, out: Tensor, scratch: Tensor) -> Tensor:
            torch.mul(value[:, columns], self.weight, out=out)
            return factor

        return _sum(fill, inner, work)


@dataclass(frozen=True)
class _ReplacedRows(_Special):
    rows: Rows
    weight: float

    def fill(self, base: Tensor, first: int, inner: Fill | None, work: Workspace) -> Fill:
        mine = (self.rows.indices >= first) & (self.rows.indices < first + len(base))
        at = self.rows.indices[mine] - first
        value = self.rows.value[mine].double() * self.weight
        factor = torch.ones(len(base), 1, dtype=torch.float64, device=base.device)
        factor[at] = 1.0 - self.weight

        def fill(columns: slice, out: Tensor, scratch: Tensor) -> Tensor:
            out.zero_()
            out[at] = value[:, columns]
            return factor

        return _sum(fill, inner, work)
