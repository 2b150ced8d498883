"""Merge tiny tensors by the definition alone, element by element, in Python's fractions.

A stored number is the real number that its bits mean, an update is a formula of real numbers, and W' is the nearest
number of the output's format, ties to even. Tensors are read as bytes and results are codes, so that neither torch nor
loratool computes anything here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

NORM_BITS = 36  # significant bits of DoRA's norms
NAN = -1  # stands for any nan: formats do not agree on what becomes of a nan's bits


@dataclass(frozen=True)
class Format:
    """A binary format; a number's code is its bits as an unsigned integer."""

    digits: int  # significant bits, the hidden one counted
    least: int  # exponent of the least positive number
    bits: int
    end: int  # the code after the largest number's
    has_inf: bool = True

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)


FORMATS = {
    torch.float8_e5m2: Format(3, -16, 8, 0x7C),
    torch.float8_e4m3fn: Format(4, -9, 8, 0x7F, has_inf=False),
    torch.bfloat16: Format(8, -133, 16, 0x7F80),
    torch.float16: Format(11, -24, 16, 0x7C00),
    torch.float32: Format(24, -149, 32, 0x7F800000),
    torch.float64: Format(53, -1074, 64, 0x7FF0000000000000),
}


class Refused(Exception):
    """The merge has no result in the output's format."""


def codes(x: Tensor) -> list[int]:
    """Return the code of each element, row by row."""
    data, size = bytes(x.contiguous().flatten().view(torch.uint8).numpy()), x.element_size()
    return [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]


def real_of(code: int, form: Format) -> Fraction | None:
    """Return the real number of a code, None for inf and nan."""
    size = code % form.sign
    if size >= form.end:
        return None
    exponent, mantissa = divmod(size, 1 << (form.digits - 1))
    if exponent:  # a normal number: its first bit is not stored
        exponent, mantissa = exponent - 1, mantissa + (1 << (form.digits - 1))
    return Fraction(-mantissa if code >= form.sign else mantissa) * Fraction(2) ** (exponent + form.least)


def reals(x: Tensor) -> list[Fraction | None]:
    return [real_of(code, FORMATS[x.dtype]) for code in codes(x)]


def finite_reals(x: Tensor) -> list[Fraction]:
    """Return the elements of a tensor of an adapter, which may not be inf or nan."""
    found = [each for each in reals(x) if each is not None]
    if len(found) < x.numel():
        raise Refused
    return found


def log2_floor(x: Fraction) -> int:
    """Return the e with 2**e <= x < 2**(e + 1), for x > 0."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def round_to_code(x: Fraction, form: Format) -> int:
    """Return the code of the number nearest to x, of the two nearest the even one; 0 is +0.0.

    Raises:
        Refused: it would be inf, or there is no such number.
    """
    if x == 0:
        return 0
    exponent = max(log2_floor(abs(x)) - form.digits + 1, form.least)  # of one step of the format's grid around x
    steps = round(abs(x) / Fraction(2) ** exponent)  # Python's, half to even
    size = ((exponent - form.least) << (form.digits - 1)) + steps  # a carry into the next power of two is right too
    if size >= form.end:
        raise Refused
    return size + (form.sign if x < 0 else 0)


def cast_code(code: int, form: Format, to: Format) -> int:
    """Return the code in another format with the same meaning, -0.0, inf and nan included; in its own, the same code.

    Raises:
        Refused: it is inf and the other format has none, or it would become inf.
    """
    if form == to:
        return code
    sign, size = divmod(code, form.sign)
    number = real_of(size, form)
    if number is not None:
        return sign * to.sign + round_to_code(number, to)
    if not form.has_inf or size > form.end:
        return NAN
    if not to.has_inf:
        raise Refused
    return sign * to.sign + to.end


def low_rank(A: Tensor, B: Tensor, scale: float, transposed: bool = False) -> list[Fraction]:
    """Return scale * B @ A row by row, or its transpose; A: (r, in, ...), B: (out, r, ...)."""
    rank = len(A)
    left, right = finite_reals(B), finite_reals(A)
    rows = [left[at : at + rank] for at in range(0, len(left), rank)]
    columns = [right[at :: len(right) // rank] for at in range(len(right) // rank)]
    D = [[Fraction(scale) * sum(b * a for b, a in zip(row, column, strict=True)) for column in columns] for row in rows]
    return [each for row in (zip(*D, strict=True) if transposed else D) for each in row]


def stacked(A: Tensor, B: Tensor, scale: float, experts: int, transposed: bool = False) -> list[Fraction]:
    """Return the changes of a stack, expert by expert; A: (experts * r, in), B: (out, r * experts), experts fastest."""
    rank = len(A) // experts
    parts = [(A[e * rank : (e + 1) * rank], B[:, e::experts]) for e in range(experts)]
    return [each for A_e, B_e in parts for each in low_rank(A_e, B_e, scale, transposed)]


def root(square: Fraction) -> Fraction:
    """Return the square root, rounded to NORM_BITS significant bits, half up."""
    if square == 0:
        return Fraction(0)
    exponent = log2_floor(square) // 2 - NORM_BITS + 1  # of the last bit
    quadrupled = 4 * square / Fraction(4) ** exponent
    steps = (math.isqrt(quadrupled.numerator // quadrupled.denominator) + 1) // 2  # floor(root + 1/2)
    return steps * Fraction(2) ** exponent


class Update(Protocol):
    """One update of a tensor with W' = RN(sum of all D + a W), where a is the product of all a."""

    def parts(self, W: list[Fraction | None], columns: int) -> tuple[list[Fraction], list[Fraction]]:
        """Return (a, D) of each element, row by row; `columns`: the length of a row."""


@dataclass(frozen=True)
class Add:
    """X = W + weight * change."""

    change: list[Fraction]
    weight: float = 1.0

    def parts(self, W: list[Fraction | None], columns: int) -> tuple[list[Fraction], list[Fraction]]:
        return [Fraction(1)] * len(W), [Fraction(self.weight) * d for d in self.change]


@dataclass(frozen=True)
class Replace:
    """X = (1 - weight) W + weight * V, of all rows or of those named; with weight 1, V is what is cast instead of W."""

    value: Tensor
    weight: float = 1.0
    rows: Sequence[int] | None = None

    def places(self, columns: int) -> list[int]:
        """Return the element of W for each element of V."""
        rows = range(self.value.numel() // columns) if self.rows is None else self.rows
        return [row * columns + column for row in rows for column in range(columns)]

    def parts(self, W: list[Fraction | None], columns: int) -> tuple[list[Fraction], list[Fraction]]:
        a, D, w = [Fraction(1)] * len(W), [Fraction(0)] * len(W), Fraction(self.weight)
        if w != 1:
            for place, value in zip(self.places(columns), finite_reals(self.value), strict=True):
                a[place], D[place] = 1 - w, w * value
        return a, D


@dataclass(frozen=True)
class DoRA:
    """X = (1 - weight) W + weight * (m / n) * (W + change), m and n of each row, or of each group of columns."""

    change: list[Fraction]
    magnitude: Tensor  # m
    weight: float = 1.0
    by_columns: bool = False
    group: int = 1  # columns that share a norm: the positions of a kernel

    def parts(self, W: list[Fraction | None], columns: int) -> tuple[list[Fraction], list[Fraction]]:
        if None in W:
            raise Refused  # a norm would be no number
        V = [w + d for w, d in zip(W, self.change, strict=True) if w is not None]
        line = [at % columns // self.group if self.by_columns else at // columns for at in range(len(V))]
        squares = [Fraction(0)] * (max(line) + 1)
        for at, v in zip(line, V, strict=True):
            squares[at] += v * v
        norms = [root(square) for square in squares]
        weight = Fraction(self.weight)
        ratios = [
            weight * m / n if n else Fraction(0) for m, n in zip(finite_reals(self.magnitude), norms, strict=True)
        ]
        return [1 - weight + ratios[at] for at in line], [ratios[at] * self.change[i] for i, at in enumerate(line)]


def merge_codes(W: Tensor, out: torch.dtype, updates: Sequence[Update] = ()) -> list[int] | None:
    """Return the codes of W' row by row, NAN for a nan that another format had; None if the merge must be refused."""
    to, columns = FORMATS[out], W[0].numel()
    source = [(code, FORMATS[W.dtype]) for code in codes(W)]
    try:
        for update in updates:
            if isinstance(update, Replace) and update.weight == 1:
                finite_reals(update.value)
                values = [(code, FORMATS[update.value.dtype]) for code in codes(update.value)]
                for place, value in zip(update.places(columns), values, strict=True):
                    source[place] = value
        numbers = [real_of(*each) for each in source]
        a, D = [Fraction(1)] * len(source), [Fraction(0)] * len(source)
        for update in updates:
            factors, changes = update.parts(numbers, columns)
            a = [x * y for x, y in zip(a, factors, strict=True)]
            D = [x + y for x, y in zip(D, changes, strict=True)]
        found = []
        for (code, form), number, factor, change in zip(source, numbers, a, D, strict=True):
            if (factor == 1 and change == 0) or (factor != 0 and number is None):
                found.append(cast_code(code, form, to))
            else:
                X = change + (factor * number if number is not None else 0)
                found.append(round_to_code(X, to))
        return found
    except Refused:
        return None


def count_wrong(found: Tensor, wanted: Sequence[int]) -> int:
    """Return how many elements have another code than is wanted."""
    form = FORMATS[found.dtype]
    last_number = form.end if form.has_inf else form.end - 1
    return sum(
        code % form.sign <= last_number if want == NAN else code != want
        for code, want in zip(codes(found), wanted, strict=True)
    )
