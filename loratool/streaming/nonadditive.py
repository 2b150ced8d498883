"""Turn updates that are not additive into a and c of `W' = a * W + c`, rows at a time (`numerics.exact.Fill`).

Numbers that depend on W (DoRA's norms) are computed by methods of their own, so that `unmerge`, which does not have W,
can take them from the undo file.
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

NORM_ROWS = 256  # rows read at a time for the norms of columns: a multiple of LANES


class NonAdditive(ABC):
    """An update of some rows of a tensor that is not additive."""

    head = b""  # bytes that a reader without W needs for all these rows
    has_state = False  # whether a reader without W needs the `state` of a block

    def state(self, base: Tensor, first: int, work: Workspace) -> Tensor | None:
        """Return numbers that depend on the weights `base`, which are the tensor's rows from `first` on."""
        return None

    @abstractmethod
    def fill(self, state: Tensor | None, first: int, rows: int, inner: Fill | None, work: Workspace) -> Fill:
        """Return the Fill of `rows` rows of the tensor from `first` on.

        Args:
            inner: the Fill of additive updates of the same rows, which is added
        """


def _add_fills(outer: Fill, inner: Fill | None, work: Workspace) -> Fill:
    """Return a Fill with the a of `outer` and the sum of both c."""
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
    """DoRA on rows of a weight stored as (out, in), where each row has its own norm."""

    product: ExactProduct
    magnitude: Tensor  # (rows,)
    weight: float
    start: int  # the first row in the tensor
    name: str  # of the tensor, for errors
    has_state = True

    def state(self, base: Tensor, first: int, work: Workspace) -> Tensor:
        """Return magnitude / norm of each row."""
        rows = slice(first - self.start, first - self.start + len(base))
        add_delta = self.product.fill(self.product.left(rows.start, rows.stop))
        return magnitude_ratio(self.magnitude[rows], row_norms(base, add_delta, work), self.name)

    def fill(self, state: Tensor | None, first: int, rows: int, inner: Fill | None, work: Workspace) -> Fill:
        assert state is not None
        add_delta = self.product.fill(self.product.left(first - self.start, first - self.start + rows))
        scale = (state * self.weight).unsqueeze(1)
        factor = scale + (1.0 - self.weight)

        def fill(columns: slice, out: Tensor, scratch: Tensor) -> Tensor:
            add_delta(columns, out, scratch)
            out.mul_(scale)
            return factor

        return _add_fills(fill, inner, work)


@dataclass(frozen=True)
class DoRAColumns(NonAdditive):
    """DoRA on rows of a weight stored as (in, out), such as an embedding."""

    product: ExactProduct
    ratio: Tensor  # (columns,), magnitude / norm
    weight: float
    start: int  # the first row in the tensor

    @property
    def head(self) -> bytes:  # type: ignore[override]
        data: bytes = self.ratio.cpu().numpy().tobytes()
        return data

    def fill(self, state: Tensor | None, first: int, rows: int, inner: Fill | None, work: Workspace) -> Fill:
        add_delta = self.product.fill(self.product.left(first - self.start, first - self.start + rows))
        scale = (self.ratio * self.weight).unsqueeze(0)
        factor = scale + (1.0 - self.weight)

        def fill(columns: slice, out: Tensor, scratch: Tensor) -> Tensor:
            add_delta(columns, out, scratch)
            out.mul_(scale[:, columns])
            return factor[:, columns]

        return _add_fills(fill, inner, work)


@dataclass(frozen=True)
class ReplacedTensor(NonAdditive):
    """A tensor mixed with another value V: (1 - w) * W + w * V, where w = 1 would only be another source."""

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
    """Rows that are mixed with other values, while all others stay."""

    rows: ReplaceRows
    weight: float

    def fill(self, state: Tensor | None, first: int, rows: int, inner: Fill | None, work: Workspace) -> Fill:
        inside = (self.rows.indices >= first) & (self.rows.indices < first + rows)
        at = self.rows.indices[inside] - first
        value = self.rows.value[inside].double() * self.weight
        factor = torch.ones(rows, 1, dtype=torch.float64, device=value.device)
        factor[at] = 1.0 - self.weight

        def fill(columns: slice, out: Tensor, scratch: Tensor) -> Tensor:
            out.zero_()
            out[at] = value[:, columns]
            return factor

        return _add_fills(fill, inner, work)


def column_norms(source: TensorRef, product: ExactProduct, device: torch.device) -> Tensor:
    """Return ||W + D|| of each column of a tensor in float64, (columns,), reading it once by blocks of rows."""
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
    """Return magnitude / norm, and 0 if a norm is 0: any multiple of a row of zeros is the same.

    Raises:
        InputError: a norm is inf or nan.
    """
    if not is_finite(norms):
        raise InputError("has rows with inf or nan, whose norm DoRA needs", culprit=name)
    return torch.where(norms == 0, 0.0, magnitude / norms)
