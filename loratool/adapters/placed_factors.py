"""Place the factors of shares of a matrix, or of a stack of matrices, in the factors of all of it.

A share is some rows, or one expert, or both. Shares have separate ranks, or one common A. Numbers are only moved, and
places that no share fills are zero. A is (E, r, in) and B is (E, out, r); without E for a single matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import EllipsisType
from typing import TYPE_CHECKING

from ..files.weights_file import WeightsFile

if TYPE_CHECKING:
    from torch import Tensor

    Pair = tuple[Tensor, Tensor]  # A (E, r, in) and B (E, out, r)


@dataclass(frozen=True)
class Place:
    """The place of a share in the full factors."""

    start: int = 0  # its first rank
    rows: slice | list[int] = field(default_factory=lambda: slice(None))
    expert: int | EllipsisType = ...  # one expert, or all

    def put_A(self, A: Tensor, full: Tensor) -> None:
        full[self.expert, self.start : self.start + A.shape[-2], :] = A

    def put_B(self, B: Tensor, full: Tensor) -> None:
        full[self.expert, self.rows, self.start : self.start + B.shape[-1]] = B


def starts(ranks: Sequence[int], shared: bool = False) -> list[int]:
    """Return the first rank of each share: ranks are concatenated, or all start at 0 with a shared A."""
    return [0] * len(ranks) if shared else [0, *accumulate(ranks)][:-1]


def have_one_A(file: WeightsFile, names: Sequence[str]) -> bool:
    """Return whether these tensors of a file are equal, bit by bit."""
    first, *others = names
    return all(file.specs[each] == file.specs[first] and file.read(each) == file.read(first) for each in others)


def place_A(sides: Iterable[tuple[Tensor, Place]], shape: Sequence[int]) -> Tensor:
    """Return the full A of this shape, from those of one or more shares in one type."""
    full = None
    for A, place in sides:
        full = A.new_zeros(shape) if full is None else full
        place.put_A(A, full)
    assert full is not None
    return full


def place_B(sides: Iterable[tuple[Tensor, Place]], shape: Sequence[int]) -> Tensor:
    """Return the full B of this shape, from those of one or more shares in one type."""
    full = None
    for B, place in sides:
        full = B.new_zeros(shape) if full is None else full
        place.put_B(B, full)
    assert full is not None
    return full


def place_pairs(pairs: Iterable[tuple[Pair, Place]], shape: tuple[int, int, int, int]) -> Pair:
    """Return the full A and B of this shape (E, out, r, in), in one pass over those of one or more shares."""
    E, out, rank, width = shape
    full = None
    for (A, B), place in pairs:
        full = (A.new_zeros(E, rank, width), B.new_zeros(E, out, rank)) if full is None else full
        place.put_A(A, full[0])
        place.put_B(B, full[1])
    assert full is not None
    return full


def lay_A(A: Tensor) -> Tensor:
    """Return A (E, r, in) in PEFT's layout, (E * r, in), expert by expert."""
    return A.flatten(0, 1).contiguous()


def lay_B(B: Tensor) -> Tensor:
    """Return B (E, out, r) in PEFT's layout, (out, r * E), for each rank the experts."""
    return B.permute(1, 2, 0).flatten(1).contiguous()
