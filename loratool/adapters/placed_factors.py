"""Place the factors of shares of a matrix, or of a stack of matrices, in the factors of all of it.

A share is some rows, or one expert, or both. Shares have separate ranks, or one common A. Numbers are only moved, and
places that no share fills are zero. A is (E, r, in) and B is (E, out, r); without E for a single matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from ..files.weights_file import WeightsFile

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]  # bits, or numbers
    Pair = tuple[Array, Array]  # A (E, r, in) and B (E, out, r)


@dataclass(frozen=True)
class Place:
    """The place of a share in the full factors."""

    start: int = 0  # its first rank
    rows: slice | list[int] = field(default_factory=lambda: slice(None))
    expert: int | EllipsisType = ...  # one expert, or all

    def put_A(self, A: Array, full: Array) -> None:
        full[self.expert, self.start : self.start + A.shape[-2], :] = A

    def put_B(self, B: Array, full: Array) -> None:
        full[self.expert, self.rows, self.start : self.start + B.shape[-1]] = B


def starts(ranks: Sequence[int], shared: bool = False) -> list[int]:
    """Return the first rank of each share: ranks are concatenated, or all start at 0 with a shared A."""
    return [0] * len(ranks) if shared else [0, *accumulate(ranks)][:-1]


def have_one_A(file: WeightsFile, names: Sequence[str]) -> bool:
    """Return whether these tensors of a file are equal, bit by bit."""
    first, *others = names
    return all(file.specs[each] == file.specs[first] and file.read(each) == file.read(first) for each in others)


def place_A(sides: Iterable[tuple[Array, Place]], shape: Sequence[int]) -> Array:
    """Return the full A of this shape, from those of one or more shares in one type."""
    import numpy as np

    full = None
    for A, place in sides:
        full = np.zeros(shape, A.dtype) if full is None else full
        place.put_A(A, full)
    assert full is not None
    return full


def place_B(sides: Iterable[tuple[Array, Place]], shape: Sequence[int]) -> Array:
    """Return the full B of this shape, from those of one or more shares in one type."""
    import numpy as np

    full = None
    for B, place in sides:
        full = np.zeros(shape, B.dtype) if full is None else full
        place.put_B(B, full)
    assert full is not None
    return full


def place_pairs(pairs: Iterable[tuple[Pair, Place]], shape: tuple[int, int, int, int]) -> Pair:
    """Return the full A and B of this shape (E, out, r, in), in one pass over those of one or more shares."""
    import numpy as np

    E, out, rank, width = shape
    full = None
    for (A, B), place in pairs:
        full = (np.zeros((E, rank, width), A.dtype), np.zeros((E, out, rank), B.dtype)) if full is None else full
        place.put_A(A, full[0])
        place.put_B(B, full[1])
    assert full is not None
    return full


def lay_A(A: Array) -> Array:
    """Return A (E, r, in) in PEFT's layout, (E * r, in), expert by expert."""
    return A.reshape(-1, A.shape[2])


def lay_B(B: Array) -> Array:
    """Return B (E, out, r) in PEFT's layout, (out, r * E), for each rank the experts."""
    return B.transpose(1, 2, 0).reshape(B.shape[1], -1)
