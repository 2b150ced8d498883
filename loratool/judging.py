"""The change that adapters ask for, computed as others may have: from rounded factors, or turned on its side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .apply import Loader
from .hypotheses import F32, Part
from .numerics.exact import ExactProduct, Factors
from .placing import Placement
from .updates import Add, Experts, LowRank


def same_codes(one: Tensor, two: Tensor) -> Tensor:
    """Bit for bit, (rows, n)."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.view(kind) == two.view(kind)


def beyond(expected: Tensor, actual: Tensor, where: Tensor) -> float:
    """By how many steps of its type the farthest of some weights is off. expected: float64."""
    wanted, found = expected[where], actual[where]
    step = (torch.nextafter(found.abs(), torch.full_like(found, torch.inf)) - found.abs()).double()
    steps = ((found.double() - wanted).abs() / step).nan_to_num(posinf=1e9)
    return float(steps.max()) if steps.numel() else 0.0


class Suspect:
    """The additive changes of a tensor, each adapter's apart.

    factors: a type that they are rounded to before; turned: the change transposed.
    """

    def __init__(
        self, placements: Sequence[Placement], load: Loader, factors: torch.dtype | None, turned: bool = False
    ) -> None:
        self._placements = placements
        self._made = [self._make(p, load, factors, turned) for p in placements]

    @staticmethod
    def _make(
        placement: Placement, load: Loader, factors: torch.dtype | None, turned: bool
    ) -> tuple[ExactProduct, ExactProduct, int, float]:
        update = load(placement)
        if isinstance(update, Experts):
            assert placement.expert is not None
            update = update.expert(placement.expert)
        if factors is not None and isinstance(update, LowRank):
            update = LowRank(update.A.to(factors), update.B.to(factors), update.scale)
        elif factors is not None and isinstance(update, Add):
            update = Add(update.value.to(factors), update.scale)
        assert isinstance(update, LowRank | Add)
        first = placement.skip
        rows = slice(first, first + placement.stop - placement.start)
        terms = [
            Factors(t.left[rows], t.multiplier, t.right)
            for t in update.terms(placement.weight, placement.transposed is not turned)
        ]
        sizes = [Factors(t.left.abs(), abs(t.multiplier), t.right.abs()) for t in terms]
        rank = sum(t.right.shape[0] for t in terms)
        return ExactProduct(terms), ExactProduct(sizes), rank, placement.weight * placement.update.scale

    def parts(self, first: int, rows: int) -> list[Part]:
        """Of each adapter, for `rows` rows of the tensor from `first` on."""
        found = []
        for placement, (product, sizes, rank, scale) in zip(self._placements, self._made, strict=True):
            if placement.start <= first and first + rows <= placement.stop:
                start = first - placement.start
                slack = _multiply(sizes, start, rows) * (F32 * 2 * (rank + 8))
                found.append(Part(_multiply(product, start, rows), slack, scale))
        return found

    def change(self, first: int, rows: int) -> Tensor:
        """The sum of all, in float64."""
        total: Tensor | None = None
        for placement, (product, _, _, _) in zip(self._placements, self._made, strict=True):
            if placement.start <= first and first + rows <= placement.stop:
                one = _multiply(product, first - placement.start, rows)
                total = one if total is None else total + one
        assert total is not None
        return total


def _multiply(product: ExactProduct, start: int, rows: int) -> Tensor:
    out = torch.empty(rows, product.shape[1], dtype=torch.float64)
    product.multiply(product.left(start, start + rows), slice(0, product.shape[1]), out, torch.empty_like(out))
    return out
