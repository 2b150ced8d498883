"""Make blocks of weights under LoRA that a filter may get wrong, and compare what two ways of a merge make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lib.hostile.hostile_reals import form_of
from loratool.durable.fileio import word_sum
from loratool.errors import InputError
from loratool.numerics.arrays import Numbers, bytes_of
from loratool.numerics.decide import Factor, Reals
from loratool.numerics.forms import Bits, IntArray, fraction, number, rounded, wide
from loratool.numerics.merge import RowMerge
from loratool.numerics.norms import magnitude_ratio
from loratool.numerics.products import ProductRows, Products, Term
from loratool.numerics.rounding_stats import RoundingStats
from loratool.numerics.tensors import numbers_of, tensor_of
from loratool.numerics.workspace import Workspace
from loratool.undo.records import NOT_RESTORED, RecordedBlock, Recorder, Restorer

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
HEIGHTS = (1, 2, 5, 6, 7, 12, 13, 31)
WIDTHS = (1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 257)
RANKS = (1, 2, 3, 4, 8, 15, 16, 17, 31, 32, 33, 64, 128, 300)
SCALES = (1.0, 1.0, 2.0, 0.5, -1.0, 1 / 3, 0.7, 16 / 7, 1e-3, 0.0)


@dataclass(frozen=True)
class DoraRows:
    """DoRA's numbers of rows, from the first row of the terms on, as `numerics.norms.magnitude_ratio` takes them."""

    magnitude: Tensor
    norms: npt.NDArray[np.float64]
    weight: float

    def ratio_and_factor(self, rows: slice = slice(None)) -> tuple[Factor, Factor]:
        return magnitude_ratio(self.magnitude[rows], self.norms[rows], self.weight, 0)


@dataclass(frozen=True)
class HostileBlock:
    """A block and what is added to it, whose first row is row `first` of the terms.

    Several matrices are one below the other; their left sides are too, and their right sides are side by side.
    """

    name: str
    weight: Tensor  # (rows, n)
    terms: list[Term]
    first: int = 0
    matrices: int = 1
    dora: DoraRows | None = None
    to: torch.dtype | None = None  # the type of W', if it is another one

    def reals(self, start: int = 0) -> Reals:
        """Return the reals of the terms' rows from `start` on."""
        rows, products = slice(start, self.first + len(self.weight)), Products(self.terms, self.matrices)
        ratio, factor = self.dora.ratio_and_factor(rows) if self.dora else (None, None)
        return Reals(products.rows(rows.start, rows.stop, ratio), factor)

    def each(self) -> list[HostileBlock]:
        """Return a block of each matrix."""
        if self.matrices == 1:
            return [self]
        weights = self.weight.chunk(self.matrices)
        sides = zip(
            *(zip(t.left.chunk(self.matrices), t.right.chunk(self.matrices, 1), strict=True) for t in self.terms),
            strict=True,
        )
        return [
            HostileBlock(self.name, W, [replace(t, left=x, right=y) for t, (x, y) in zip(self.terms, of, strict=True)])
            for W, of in zip(weights, sides, strict=True)
        ]


def make_block(seed: int | Sequence[int]) -> HostileBlock:
    g = np.random.default_rng(seed)
    dtype = g.choice([BF16, FP16, FP32])
    how = g.random()
    if how < 0.1:
        return _aimed_at_dora(g, dtype)
    if how < 0.45:
        block = _aimed(g, dtype, dtype)
        return _beside_a_smaller(block) if g.random() < 0.35 else block
    return _random(g, dtype)


def make_cast(seed: int | Sequence[int]) -> HostileBlock:
    """Return a block whose W' is of another type than W."""
    g = np.random.default_rng(seed)
    source, to = (list(NAMES)[int(k)] for k in g.permutation(len(NAMES))[:2])
    block = _aimed(g, source, to) if g.random() < 0.5 else _random(g, source)
    return replace(block, name=f"{block.name} to {NAMES[to]}", to=to)


def _random(g: np.random.Generator, dtype: torch.dtype) -> HostileBlock:
    rows, n = int(g.choice(HEIGHTS)), int(g.choice(WIDTHS)) if g.random() < 0.97 else int(g.integers(4090, 4200))
    kind = g.choice(list(WEIGHTS))
    matrices = int(g.integers(2, 6)) if n < 1000 and g.random() < 0.2 else 1
    W = torch.cat([_sprinkled(g, WEIGHTS[kind](g, (rows, n), dtype)) for _ in range(matrices)])
    first = int(g.integers(1, 9)) if matrices == 1 and g.random() < 0.2 else 0
    shape = first + len(W), matrices * n
    terms = [_term(g, *shape, kind == "coarse") for _ in range(g.choice([1, 1, 1, 2, 3]))]
    if matrices > 1:  # whose sizes differ
        terms = [replace(t, left=_of_sizes(g, t.left, rows), right=_of_sizes(g, t.right.T, n).T) for t in terms]
    if g.random() < 0.05:  # all or nearly all cancels
        terms.append(Term(-terms[0].left, terms[0].right, terms[0].scale))
    if matrices == 1 and g.random() < 0.2:
        terms = [replace(t, by_rows=bool(g.random() < 0.8)) for t in terms]
        return HostileBlock(f"{NAMES[dtype]} {kind} under DoRA", W, terms, first, dora=_dora(g, first + rows, True))
    return HostileBlock(f"{NAMES[dtype]} {kind}, {matrices} matrices", W, terms, first, matrices)


def _dora(g: np.random.Generator, rows: int, has_odd: bool) -> DoraRows:
    """Return numbers by which the weights' factors are near 1, of any size, or what is left where two cancel."""
    weight, norms = float(g.choice([1.0, 1.0, 0.5, 2.0, 1.3, -1.0])), g.uniform(0.1, 10, rows)
    factors = g.uniform(0.9, 1.1, rows) * g.choice([1.0, 1.0, 1.0, -1.0, 0.1, 0.01])
    if g.random() < 0.2:
        factors *= 2.0 ** g.integers(-12, 12, rows)
    magnitude = (factors - 1 + weight) / weight * norms
    if has_odd and g.random() < 0.2:
        odd = g.integers(rows)
        norms[odd] = g.choice([0.0, norms[odd], norms[odd], 2.0**-500])
        magnitude[odd] = g.choice([0.0, -0.0, magnitude[odd], 2.0**-1060, 2.0**-130, 2.0**120])
    return DoraRows(torch.from_numpy(magnitude).to(g.choice([BF16, FP32, FP32, FP64])), norms, weight)


def _of_sizes(g: np.random.Generator, x: Tensor, rows: int) -> Tensor:
    """Multiply the rows of each matrix by a power of two."""
    powers = torch.from_numpy(2.0 ** np.repeat(g.integers(-8, 2, len(x) // rows), rows))
    return (x.double() * powers[:, None]).to(x.dtype)


def _of_bits(bits: Any, dtype: torch.dtype) -> Tensor:
    form = form_of(dtype)
    return tensor_of(Numbers(np.ascontiguousarray(bits).astype(form.bits_type), form))


def _bits_of(x: Tensor) -> Bits:
    return numbers_of(x).host()


def _signed(g: np.random.Generator, size: IntArray, dtype: torch.dtype) -> Tensor:
    return _of_bits(size | np.where(g.random(size.shape) < 0.5, ~form_of(dtype).size, 0), dtype)


def _normal(g: np.random.Generator, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(g.standard_normal(shape) * 10.0 ** g.uniform(-4, 1)).to(dtype)


def _any_bits(g: np.random.Generator, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(g.integers(0, 256, (*shape, dtype.itemsize), np.uint8)).view(dtype).reshape(shape)


def _least(g: np.random.Generator, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return _signed(g, g.integers(0, 3 << (form_of(dtype).precision - 1), shape), dtype)


def _largest(g: np.random.Generator, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    form = form_of(dtype)
    return _signed(g, form.inf - 1 - g.integers(0, 2 << (form.precision - 1), shape), dtype)


def _coarse(g: np.random.Generator, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(g.integers(-8, 9, shape) * 2.0 ** int(g.integers(-8, 4))).to(dtype)


def _around_powers(g: np.random.Generator, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    power = _bits_of(torch.from_numpy(2.0 ** g.integers(-12, 4, shape)).to(dtype)).astype(np.int64)
    return _signed(g, power + g.integers(-2, 3, shape), dtype)


WEIGHTS = {
    "normal": _normal,
    "normal again": _normal,
    "any bits": _any_bits,
    "least": _least,
    "largest": _largest,
    "coarse": _coarse,
    "powers": _around_powers,
}


def _sprinkled(g: np.random.Generator, W: Tensor) -> Tensor:
    """Put zeros of both signs, inf, and nans of any payload into weights."""
    form, bits = form_of(W.dtype), _bits_of(W).copy()
    for share, sizes in ((0.2, (0, 1)), (0.01, (form.inf, form.inf + 1)), (0.01, (form.inf + 1, form.size + 1))):
        if g.random() < 0.2:
            some = g.random(bits.shape) < share
            bits[some] = _bits_of(_signed(g, g.integers(*sizes, bits.shape), W.dtype))[some]
    return _of_bits(bits, W.dtype)


def _factor(g: np.random.Generator, shape: tuple[int, int], exponent: int) -> Tensor:
    x = g.standard_normal(shape)
    how = g.integers(7)
    if how == 0:
        x = g.integers(-2, 3, shape).astype(np.float64)
    elif how == 1:
        x = np.ldexp(x, g.integers(-20, 10, shape))
    elif how == 2:
        x[g.random(shape) < 0.7] = 0
    elif how == 3:
        x[g.integers(shape[0])] = 0
    elif how == 4:
        x[:, g.integers(shape[1])] = 0
    elif how == 5 and g.random() < 0.3:
        x[:] = 0
    found = torch.from_numpy(x * 2.0**exponent).to(g.choice([BF16, FP16, FP32, FP32, FP64]))
    return torch.where(found.isfinite(), found, 1.0)


def _term(g: np.random.Generator, rows: int, n: int, is_coarse: bool) -> Term:
    rank = int(g.choice(RANKS, p=np.geomspace(6, 1, len(RANKS)) / np.geomspace(6, 1, len(RANKS)).sum()))
    exponent = int(g.integers(-6, 2)) if g.random() < 0.8 else int(g.integers(-70, 14))
    left, right = _factor(g, (rows, rank), int(g.integers(-4, 2))), _factor(g, (rank, n), exponent)
    scale = Fraction(float(g.choice(SCALES))) * Fraction(float(g.choice([1.0, 1.0, 0.3])))
    if is_coarse and g.random() < 0.6:  # halves of steps: ties
        left = torch.from_numpy(g.integers(-1, 2, (rows, rank)) * 2.0 ** int(g.integers(-16, 0)))
        right, scale = torch.from_numpy(g.integers(-1, 2, (rank, n)).astype(np.float64)), Fraction(1)
    if g.random() < 0.2:
        left, right = (x.T.contiguous().T for x in (left, right))  # as of transposed updates
    return Term(left, right, scale)


def _aimed(g: np.random.Generator, dtype: torch.dtype, to: torch.dtype) -> HostileBlock:
    """Return weights whose sums are a midpoint of two numbers of the type `to`, or beside one by a hair of any size.

    The hair is one of the products, and so are two large ones that cancel. So float32 or float64 may lose the hair.
    """
    if to == FP32 and g.random() < 0.25:
        return _narrow(g, dtype)
    form, n = form_of(to), int(g.choice([16, 17, 33]))
    W = WEIGHTS[g.choice(["normal", "powers", "powers", "least", "coarse"])](g, (1, n), to)
    W = W.to(dtype)
    W = torch.where(W.isfinite(), W, 1.0)
    weight = wide(_bits_of(W)[0], form_of(dtype))
    place = np.abs(_bits_of(W.to(to))[0].astype(np.int64) & form.size) + g.integers(-3, 4, n) * (g.random(n) < 0.8)
    if g.random() < 0.3:  # far from W
        place += g.integers(0, 6 << (form.precision - 1), n)
    place = np.clip(place, 0, form.inf - 2)
    signs = np.where(g.random(n) < 0.8, np.sign(weight), -np.sign(weight))
    low, high = (wide(number(place + k, form), form) for k in (0, 1))
    step = np.where(signs < 0, -1.0, 1.0) * (low / 2 + high / 2) - weight
    if g.random() < 0.2:
        return HostileBlock(f"{NAMES[dtype]} aimed in pairs", W, [_cancelling(g, step)])
    hair = g.choice([-1.0, 0.0, 1.0], n) * np.ldexp(np.maximum(np.abs(weight), 2.0**-150), -g.integers(8, 70, n))
    large = np.abs(step) * 2.0 ** g.integers(-4, g.choice([8, 14, 40])) * (g.random() < 0.6)
    parts = [large, step, hair, -large] + [np.zeros(n)] * int(g.choice([0, 1, 4, 13, 14, 30]))
    order = np.arange(len(parts)) if g.random() < 0.5 else g.permutation(len(parts))
    third = g.random() < 0.2
    right = torch.from_numpy(np.stack(parts)[order] * (3.0 if third else 1.0))
    right = right.to(FP32) if g.random() < 0.3 else right
    rows = int(g.choice([1, 1, 1, 2, 7]))
    halvings = np.arange(rows)[:, None]
    if bool((np.abs(weight) < 2.0 ** (max(form.least, form_of(dtype).least) + rows + 1)).any()):
        halvings[:] = 0
    left = torch.from_numpy(np.repeat(2.0**-halvings, len(parts), 1))
    W = (W.double() * torch.from_numpy(2.0**-halvings)).to(dtype)
    return HostileBlock(f"{NAMES[dtype]} aimed", W, [Term(left, right, Fraction(1, 3) if third else Fraction(1))])


def _narrow(g: np.random.Generator, dtype: torch.dtype) -> HostileBlock:
    """Return weights whose sums are beside a midpoint of float32, with factors in bf16.

    The hair is a product, or the lowest bit of a small W in float32.
    """
    n, of_weight = int(g.choice([7, 16, 33])), g.random() < 0.5
    middle = (1 + g.integers(0, 1 << 23, n) * 2.0**-23 + 2.0**-24) * g.choice([-1.0, 1.0], n)
    hair = g.choice([-1.0, 1.0], n) * 2.0 ** -int(g.integers(24, 40) if of_weight else g.integers(44, 68))
    W = torch.from_numpy(hair * (1 + 2.0**-23) if of_weight else 2.0 ** -g.integers(1, 9, n)).to(dtype)
    rest, parts = middle - (hair if of_weight else W.double().numpy()), []
    for _ in range(7):
        parts.append(torch.from_numpy(rest).bfloat16())
        rest = rest - parts[-1].double().numpy()
    if not of_weight:
        parts.append(torch.from_numpy(hair).bfloat16())
    right = torch.stack(parts)[torch.from_numpy(g.permutation(len(parts)))]
    left = torch.ones(1, len(parts)).bfloat16()
    return HostileBlock(f"{NAMES[dtype]} narrow", W[None], [Term(left, right, Fraction(1))])


def _beside_a_smaller(block: HostileBlock) -> HostileBlock:
    """Add a second matrix with a smaller D."""
    terms = [replace(t, left=torch.cat([t.left] * 2), right=_beside(t.right)) for t in block.terms]
    return HostileBlock(f"{block.name}, two matrices", torch.cat([block.weight] * 2), terms, matrices=2)


def _beside(right: Tensor) -> Tensor:
    return torch.cat([right, right * 2.0**-30], 1)


def _aimed_at_dora(g: np.random.Generator, dtype: torch.dtype) -> HostileBlock:
    """Return a few weights under DoRA whose X are a midpoint of two numbers, or beside one by a hair of any size."""
    form, rows, n = form_of(dtype), int(g.choice([1, 2])), 16
    W = WEIGHTS[g.choice(["normal", "powers", "coarse"])](g, (rows, n), dtype)
    W = torch.where(W.isfinite() & (W.abs() < 100), W, 1.0)
    dora, is_far = _dora(g, rows, False), g.random() < 0.3
    ratio, factor = dora.ratio_and_factor()
    right = np.zeros((rows, 3, n))
    for i, j in np.ndindex(rows, n):
        scaled = factor.exact(i) * Fraction(float(W[i, j]))
        place = min(rounded(abs(scaled), form) + int(g.integers(-2, 3)), form.inf - 3)
        place = max(place + is_far * int(g.integers(-2, 3)) * (1 << (form.precision - 1)), 0)
        goal = (fraction(number(np.array(place), form), form) + fraction(number(np.array(place + 1), form), form)) / 2
        goal *= -1 if scaled < 0 else 1
        goal += goal * int(g.integers(-1, 2)) / 2 ** int(g.integers(18, 60))
        missing = (goal - scaled) / (ratio.exact(i) or 1)
        for k in range(3):
            right[i, k, j] = float(missing)
            missing -= Fraction(float(right[i, k, j]))
    left = np.kron(np.eye(rows), np.ones(3))
    terms = [Term(torch.from_numpy(left), torch.from_numpy(right.reshape(3 * rows, n)), Fraction(1), by_rows=True)]
    return HostileBlock(f"{NAMES[dtype]} aimed at DoRA", W, terms, dora=dora)


def _cancelling(g: np.random.Generator, step: npt.NDArray[np.float64]) -> Term:
    """Return products of one row that sum to `step` and a hair: 2**-90 to 2**-115 times as much as each of them."""
    n, rank = len(step), int(g.integers(2, 7))
    left = g.standard_normal(rank)
    right = g.standard_normal((rank, n)) * np.maximum(np.abs(step), 2.0**-130) * 2.0 ** int(g.integers(0, 6))
    rest = np.zeros((3, n))
    for j in range(n):
        products = [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(left, right[:, j], strict=True)]
        hair = int(g.integers(-1, 2)) * max(map(abs, products)) / 2 ** int(g.integers(90, 115))
        missing = Fraction(float(step[j])) + hair - sum(products)
        for k in range(3):
            rest[k, j] = float(missing)
            missing -= Fraction(float(rest[k, j]))
    order = g.permutation(rank + 3)
    both = np.concatenate([left, np.ones(3)])[order], np.concatenate([right, rest])[order]
    return Term(torch.from_numpy(both[0][None]), torch.from_numpy(both[1]), Fraction(1))


@dataclass(frozen=True)
class MergedBlock:
    """What a merge makes of a block."""

    merged: bytes
    payloads: list[bytes]  # of the undo record of each matrix
    counts: list[tuple[int, ...]]  # changed, not finite, overflowed
    largest: list[float]  # of those that overflowed
    stats: list[RoundingStats] = field(compare=False)


def merge_hostile(block: HostileBlock, record: bool = True) -> tuple[MergedBlock, Numbers]:
    """Return what a merge makes of a block, with an undo record or without, and W'. A cast has no record."""
    W, work, to = numbers_of(block.weight), Workspace(), form_of(block.to or block.weight.dtype)
    out, recorder = Numbers.empty(to, *W.shape), Recorder(W.form, matrices=block.matrices)
    merge = RowMerge(block.reals(), W.form, to)
    stats = merge.apply_each(W, block.first, out, work, recorder if record and not block.to else None)
    records = [] if block.to else recorder.results(stats, out)
    payloads = [b"" if one.change.overflowed else bytes_in(one) for one in records]  # such a merge is refused
    counts = [(each.changed, each.not_finite, each.overflowed) for each in stats]
    return MergedBlock(bytes(bytes_of(out.bits)), payloads, counts, [each.largest for each in stats], stats), out


def bytes_in(record: RecordedBlock) -> bytes:
    assert isinstance(record.payload, bytes)
    return record.payload


def restore_hostile(block: HostileBlock, merged: Numbers, payload: bytes) -> tuple[bytes, str]:
    """Return W as a record restores it, and what is wrong if it is not W."""
    form, back = merged.form, numbers_of(torch.full_like(block.weight, 7))
    restorer = Restorer("x", form, payload, word_sum(bytes_of(merged.bits)))
    try:
        with restorer.damage():
            restorer.block(merged, block.reals(block.first), back, Workspace())
        restorer.check(merged)
    except InputError as error:
        return b"", str(error)
    restored = bytes(bytes_of(back.bits))
    return (restored, "") if restored == bytes(bytes_of(_bits_of(block.weight))) else (b"", NOT_RESTORED)


def damaged(g: np.random.Generator, payload: bytes) -> bytes:
    """Return a record that was cut, lengthened, or changed in one bit."""
    how, data = g.integers(3), bytearray(payload)
    if how == 0:
        return payload[: int(g.integers(len(payload)))]
    if how == 1:
        return payload + bytes(int(g.integers(1, 3)))
    data[g.integers(len(data))] ^= 1 << g.integers(8)
    return bytes(data)


@np.errstate(invalid="ignore")
def sums_in_longdouble(block: HostileBlock, merged: Numbers) -> dict[str, float]:
    """Return <W, W>, <D, D> and <W' - W, D> of weights that are finite and stay so. D: X - W."""
    x = block.reals(block.first)
    assert isinstance(x.delta, ProductRows)
    D = np.longdouble(x.delta.left) @ np.longdouble(x.delta.products.right).T
    W, W1 = (np.longdouble(x.wide()) for x in (numbers_of(block.weight), merged))
    if x.factor:
        D += (np.longdouble(x.factor.value[:, None]) - 1) * W
    fine = np.isfinite(W) & np.isfinite(W1)
    W, D, moved = np.where(fine, W, 0), np.where(fine, D, 0), np.where(fine, W1 - W, 0)
    return {name: float((x * y).sum()) for name, x, y in zip(_SUMS, (W, D, moved), (W, D, D), strict=True)}


_SUMS = ("base_squared", "change_squared", "kept")
