"""Make weights, factors and scales that are hard to add right, and what must become of them by `fractions_oracle`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction as F

import numpy as np
import pytest
import torch
from torch import Tensor

from lib.oracles.fractions_oracle import FORMATS, Add, finite_reals, merge_codes, real_of
from loratool.numerics.decide import Delta, Factor, Reals
from loratool.numerics.forms import FORMS, Bits, Form
from loratool.numerics.merge import RowMerge
from loratool.numerics.products import Products, Term
from loratool.numerics.rounding_stats import RoundingStats
from loratool.numerics.tensors import numbers_of
from loratool.numerics.workspace import Workspace

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [BF16, FP16, FP32, FP64]
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
SHAPE = M, N = 6, 16
RANK = 5
EDGES = 1 << 4  # so many bit patterns are tested on both sides of an edge


def id_of(value: object) -> str | None:
    return NAMES.get(value) if isinstance(value, torch.dtype) else None


def form_of(dtype: torch.dtype) -> Form:
    """Return the form of a torch type."""
    return next(form for form in FORMS.values() if str(dtype) == f"torch.{form.torch_name}")


def some_bits(form: Form) -> Bits:
    """Return all bit patterns of a short form, and of a long one those around its edges and some others."""
    if form.precision < 24:
        return np.arange(-form.size - 1, form.size + 1).astype(form.bits_type)
    normal = 1 << (form.precision - 1)
    around = [0, normal, 2 * normal, 700 * normal if form.precision == 53 else 100 * normal, form.inf]
    sizes = [x + np.arange(-EDGES, EDGES) for x in around] + [np.random.default_rng(0).integers(0, form.inf, 99)]
    size = np.concatenate(sizes)
    size = size[(size >= 0) & (size <= form.size)]
    return np.concatenate([size, ~form.size | size]).astype(form.bits_type)


@contextmanager
def flushing(on: bool = True) -> Iterator[None]:
    """Flush subnormal numbers to zero in this thread."""
    torch.set_flush_denormal(on)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


both_ways = pytest.mark.parametrize("flush", [False, True], ids=["kept", "flushed"])


def normal(g: np.random.Generator, *shape: int, dtype: torch.dtype = FP64, size: float = 1.0) -> Tensor:
    return torch.from_numpy(g.standard_normal(shape) * size).to(dtype)


def any_bits(g: np.random.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Return numbers of random bits, inf and nan among them."""
    return torch.from_numpy(g.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)).view(dtype).reshape(shape)


def hard_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """Return weights, (M, N), by what is hard about them."""
    g, form = np.random.default_rng(1), FORMATS[dtype]
    W = normal(g, *SHAPE, dtype=dtype, size=0.02)
    zeros = torch.where(torch.from_numpy(g.random(SHAPE) < 0.5), W, W * 0)  # half of those are -0.0
    zeros[0, :3] = torch.tensor([np.inf, -np.inf, np.nan])
    step = np.ldexp(1.0, max(form.least, -1074))
    powers = torch.from_numpy(2.0 ** g.integers(-9, 2, SHAPE) * g.choice([-1.0, 1.0], SHAPE)).to(dtype)
    return {
        "normal": W,
        "zeros": zeros,
        "powers": powers,
        "subnormal": torch.from_numpy(g.integers(-300, 300, SHAPE) * step).to(dtype),
        "largest": torch.full(SHAPE, torch.finfo(dtype).max, dtype=dtype),
        "bits": any_bits(g, *SHAPE, dtype=dtype),
    }


def hard_terms(factor: torch.dtype, step: float = 2.0**-9) -> dict[str, list[Term]]:
    """Return sums of products of (M, N) with factors of one type, by what is hard about them.

    Args:
        step: of the weights' type near the weights, for ties.
    """
    g = np.random.default_rng(2)

    def pair(size: float = 0.1, rank: int = RANK) -> tuple[Tensor, Tensor]:
        return normal(g, M, rank, dtype=factor, size=size), normal(g, rank, N, dtype=factor, size=size)

    B, A = pair()
    C, E = pair(rank=2)
    rows, columns = B.clone(), A.clone()
    rows[::2], columns[:, ::3] = 0, 0
    least, wide = 2.0 ** max(FORMATS[factor].least, -1000), 2.0 ** (100 if factor in (BF16, FP32) else 10)
    whole = torch.from_numpy(g.integers(-4, 5, (M, 1)).astype(float)).to(factor)
    near = torch.from_numpy(g.integers(-1, 2, (1, N)).astype(float)).to(factor)
    ones = torch.ones(1, N, dtype=factor)
    tie = Term(whole, ones, F(step) / 2)
    return {
        "third": [Term(B, A, F(1 / 3))],
        "seventh": [Term(B, A, F(1 / 7) * F(0.3))],
        "two": [Term(B, A, F(2)), Term(C, E, F(-0.7))],
        "cancel": [Term(B, A, F(1)), Term(B, A, F(-1))],
        "nearly cancel": [Term(B, A, F(1)), Term(B, A, F(-1) + F(2) ** -50)],
        "zero rows": [Term(rows, columns, F(1 / 3))],
        "tiny scale": [Term(B, A, F(2) ** -1070)],
        "huge scale": [Term(B * 2.0**-7, A * 2.0**-7, F(1e34) * F(2) ** -100)],
        "uneven": [Term(B * torch.tensor([1, 2.0**-10, 2.0**10, 1, 1]).to(factor), A * wide, F(1) / F(wide))],
        "subnormal": [Term(whole * least, A[:1], F(2) ** 20 * 3), Term(B[:, :1], near * least, 1 / F(least) / 3)],
        "ties": [tie],
        "near ties": [tie, Term(torch.ones_like(whole), near, F(step) * F(2) ** -60)],
        "nearer ties": [tie, Term(torch.ones_like(whole), near, F(step) * F(2) ** -200)],
        "no rank": [Term(B[:, :0], A[:0], F(1))],
        "no scale": [Term(B, A, F(0)), Term(C, E, F(0))],
    }


def changes(terms: Sequence[Term]) -> list[F]:
    """Return D row by row, from the definition."""
    rows, columns = len(terms[0].left), terms[0].right.shape[1]
    total = [F(0)] * (rows * columns)
    for term in terms:
        rank = term.left.shape[1]
        left, right = finite_reals(term.left), finite_reals(term.right)
        for k in range(len(total)):
            i, j = divmod(k, columns)
            dot = sum((left[i * rank + q] * right[q * columns + j] for q in range(rank)), F(0))
            total[k] += term.scale * dot
    return total


def wanted(W: Tensor, terms: Sequence[Term], out: torch.dtype) -> list[int] | None:
    """Return the codes of W', None if one overflows."""
    return merge_codes(W, out, [Add(changes(terms))])


def keeping(W: Tensor, terms: Sequence[Term], out: torch.dtype) -> Tensor:
    """Return W with 1 where the sum would overflow, so that all others can be looked at."""
    top, fits = F(torch.finfo(out).max), []
    for code, D in zip(W.flatten(), changes(terms), strict=True):
        fits.append(not torch.isfinite(code) or abs(F(float(code)) + D) <= top)
    return torch.where(torch.tensor(fits, dtype=torch.bool).reshape(W.shape), W, torch.ones_like(W))


def merge_rows(delta: Delta, W: Tensor, out: torch.dtype, factor: Factor | None = None) -> tuple[Tensor, RoundingStats]:
    """Return W' and the statistics."""
    base, result = numbers_of(W.contiguous()), torch.empty(W.shape, dtype=out)
    merge = RowMerge(Reals(delta, factor), base.form, form_of(out))
    stats = merge.apply(base, 0, numbers_of(result), Workspace())
    return result, stats


def several(terms: Sequence[Term]) -> list[list[Term]]:
    """Return terms, others of the same shapes, and some that add nothing: those of three matrices."""
    turned = [replace(t, left=-t.left.flip(0), right=t.right.flip(1)) for t in terms]
    return [list(terms), turned, [replace(t, left=t.left * 0) for t in terms]]


def together(each: Sequence[Sequence[Term]]) -> Products:
    """Return the sum of matrices, one below the other, from the terms of each."""
    terms = [
        replace(own[0], left=torch.cat([t.left for t in own]), right=torch.cat([t.right for t in own], 1))
        for own in zip(*each, strict=True)
    ]
    return Products(terms, len(each))


def every_place(shape: tuple[int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of all elements, in order."""
    i, j = np.indices(shape)
    return i.ravel(), j.ravel()


def reals(x: Tensor) -> list[F]:
    """Return the numbers of a tensor; 0 for inf and nan."""
    from lib.oracles.fractions_oracle import codes

    return [real_of(code, FORMATS[x.dtype]) or F(0) for code in codes(x)]
