"""Make rows under updates, and weights that no shortcut may be wrong about."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loratool.adapters.updates.low_rank import LowRank
from loratool.numerics.decide import Reals
from loratool.numerics.products import Products
from loratool.numerics.tensors import numbers_of

STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "negative zero": lambda W: W * -0.0,
    "half pruned": lambda W: torch.where(W > 0, W, torch.zeros_like(W)),
    "subnormal": lambda W: (W.double() * torch.finfo(W.dtype).tiny).to(W.dtype),
    "small": lambda W: (W.double() * torch.finfo(W.dtype).tiny * 100).to(W.dtype),
    "huge": lambda W: (W.double() / 0.1 * (torch.finfo(W.dtype).max / 2)).to(W.dtype),
    "infinite": lambda W: W.masked_fill(W > 0.02, float("inf")).masked_fill(W < -0.03, float("-inf")),
    "nan": lambda W: _with_nans(W),
    "largest": lambda W: torch.full_like(W, torch.finfo(W.dtype).max),
    "powers of two": lambda W: torch.exp2((W.double() * 300).round().clamp(-14, 14)).copysign(W).to(W.dtype),
}


def _with_nans(W: Tensor) -> Tensor:
    """Return weights with nans of many payloads, signalling ones among them."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[W.itemsize]
    inf = torch.tensor(torch.inf, dtype=W.dtype).view(kind)
    payloads = inf + 1 + torch.arange(W.numel()).reshape(W.shape).to(kind) % 99
    return torch.where(W > 0.01, payloads, torch.where(W < -0.02, payloads | torch.iinfo(kind).min, W.view(kind))).view(
        W.dtype
    )


def product_of(A: Tensor, B: Tensor, scale: float = 1.0) -> Reals:
    """Return the reals of X = W + scale * B @ A. A: (r, n), B: (m, r)."""
    return Reals(Products(LowRank(numbers_of(A), numbers_of(B), scale).terms(1.0, False)).rows(0, len(B)))
