"""Make the filter's rows of a product, and weights with numbers that no filter may be wrong about."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loratool.numerics.exact import ExactProduct
from loratool.numerics.filtered import FilteredProduct, FilteredRows


def rows_of(product: ExactProduct, count: int, even: bool = False) -> FilteredRows:
    return FilteredRows(FilteredProduct(product, even), product.balanced(0, count))


STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "negative zero": lambda W: W * -0.0,
    "half pruned": lambda W: torch.where(W > 0, W, torch.zeros_like(W)),
    "subnormal": lambda W: (W.float() * torch.finfo(W.dtype).tiny).to(W.dtype),
    "small": lambda W: (W.float() * torch.finfo(W.dtype).tiny * 100).to(W.dtype),
    "huge": lambda W: (W.float() / 0.1 * torch.finfo(W.dtype).max / 2).to(W.dtype),
    "infinite": lambda W: W.masked_fill(W > 0.05, float("inf")),
    "nan": lambda W: W.masked_fill(W > 0.05, float("nan")),
    "largest": lambda W: torch.full_like(W, torch.finfo(W.dtype).max),
}
