"""Updates that are not additive, by rows: each knows a and c of `W' = a * W + c` (`numerics.exact.Fill`).

What one needs to know of W itself (DoRA its norms) is asked for apart, so that a reader who lacks W can be told.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.updates import ReplaceRows
from ..errors import InputError
from ..files.tensor_ref import TensorRef, is_finite
from ..numerics.exact import LANES, ExactProduct, Fill, Workspace, add_squares, row_norms, sum_tile, total_of_lanes

NORM_ROWS = 256  # rows read at a time for the norms of columns; a multiple of LANES


class NonAdditive(ABC):
    """An update that is not additive.

    head: bytes that a reader without W needs for all rows of the piece. state: numbers that it needs for some rows.
    """

    head = b""
    has_state = False

    def state(self, base: Tensor, first: int, work: Workspace) -> Tensor | None:
        """From the rows of `base`, whose first is the tensor's row `first`."""
        return None

    @abstractmethod
    def fill(self, state: Tensor | None, first: int, rows: int, inner: Fill | None, work: Workspace) -> Fill:
        """For `rows` rows of the tensor from `first` on; `inner` is what is added besides."""


def _add_fills(outer: Fill, inner: Fill | None, work: Workspace) -> Fill:
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
class DoRARows(NonAdditive):
    """DoRA on a weight stored as (out, in): a row has its norm in itself. magnitude: (rows of the piece,)."""

    product: ExactProduct
    magnitude: Tensor
    weight: float
    start: int
    name: str
    has_state = True

    def state(self, base: Tensor, first: int, work: Workspace) -> Tensor:
        """m / n of each row."""
        rows = slice(first - self.start, first - self.start + len(base))
        own = self.product.fill(self.product.left(rows.start, rows.stop))
        return magnitude_ratio(self.magnitude[rows], row_norms(base, own, work), self.name)

    def fill(self, state: Tensor | None, first: int, rows: int, inner: Fill | None, work: Workspace) -> Fill:
        assert state is not None
        own = self.product.fill(self.product.left(first - self.start, first - self.start + rows))
        scale = (state * self.weight).unsqueeze(1)
        factor = scale + (1.0 - self.weight)

        def fill(columns: slice, out: Tensor, scratch: Tensor) -> Tensor:
            own(columns, out, scratch)
            out.mul_(scale)
            return factor

        return _add_fills(fill, inner, work)


@dataclass(frozen=True)
class DoRAColumns(NonAdditive):
    """DoRA on a weight stored as (in, out), an embedding for one. ratio: m / n, (columns,)."""

    product: ExactProduct
    ratio: Tensor
    weight: float
    start: int

    @property
    def head(self) -> bytes:  # type: ignore[override]
        data: bytes = self.ratio.cpu().numpy().tobytes()
        return data

    def fill(self, state: Tensor | None, first: int, rows: int, inner: Fill | None, work: Workspace) -> Fill:
        own = self.product.fill(self.product.left(first - self.start, first - self.start + rows))
        scale = (self.ratio * self.weight).unsqueeze(0)
        factor = scale + (1.0 - self.weight)

        def fill(columns: slice, out: Tensor, scratch: Tensor) -> Tensor:
            own(columns, out, scratch)
            out.mul_(scale[:, columns])
            return factor[:, columns]

        return _add_fills(fill, inner, work)


@dataclass(frozen=True)
class ReplacedTensor(NonAdditive):
    """A part of another value: (1 - w) * W + w * V. (All of it is no update but another source.)"""

    value: TensorRef
    weight: float
    device: torch.device

    def fill(self, state: Tensor | None, first: int, rows: int, inner: Fill | None, work: Workspace) -> Fill:
        value = self.value.file.rows(self.value.name, first, first + rows).to(self.device).double()
        factor = torch.full((1, 1), 1.0 - self.weight, dtype=torch.float64, device=self.device)

        def fill(columns: slice, out: Tensor, scratch: Tensor) -> Tensor:
            torch.mul(value[:, columns], self.weight, out=out)
            return factor

        return _add_fills(fill, inner, work)


@dataclass(frozen=True)
class ReplacedRows(NonAdditive):
    rows: ReplaceRows
    weight: float

    def fill(self, state: Tensor | None, first: int, rows: int, inner: Fill | None, work: Workspace) -> Fill:
        mine = (self.rows.indices >= first) & (self.rows.indices < first + rows)
        at = self.rows.indices[mine] - first
        value = self.rows.value[mine].double() * self.weight
        factor = torch.ones(rows, 1, dtype=torch.float64, device=value.device)
        factor[at] = 1.0 - self.weight

        def fill(columns: slice, out: Tensor, scratch: Tensor) -> Tensor:
            out.zero_()
            out[at] = value[:, columns]
            return factor

        return _add_fills(fill, inner, work)


def column_norms(source: TensorRef, product: ExactProduct, device: torch.device) -> Tensor:
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


def magnitude_ratio(magnitude: Tensor, norms: Tensor, name: str) -> Tensor:
    """m / n, and 0 where n is 0: whatever stands before a row of zeros, it is a row of zeros."""
    if not is_finite(norms):
        raise InputError("has rows with inf or nan, whose norm DoRA needs", culprit=name)
    return torch.where(norms == 0, 0.0, magnitude / norms)
