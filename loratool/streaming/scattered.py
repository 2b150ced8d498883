"""Places of codes in the output, which need not be in the order of rows, nor in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt

# What a step writes: a tensor of the output, the first byte there, and the bytes from there on
Written = tuple[str, int, bytes]


@dataclass(frozen=True)
class Scattered:
    """How the rows of a step become bytes of tensors.

    Attributes:
        dtype, width: `out` of a step is an array of codes, (rows, width) of this type.
        nbytes: of all rows, roughly.
        tensors: that are written.
        write: takes the first row of `out`, `out` and the step's result; returns the result to keep, and the bytes to
            write.
    """

    dtype: npt.DTypeLike
    width: int
    nbytes: int
    tensors: Collection[str]
    write: Callable[[int, npt.NDArray[Any], Any], tuple[Any, Iterable[Written]]]


@dataclass(frozen=True)
class Strided:
    """Places of one size at equal distances in a tensor of the output."""

    tensor: str
    first: int  # byte
    nbytes: int  # of each
    step: int = 0
    count: int = 1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the first byte of each place, and its number of bytes."""
        return ((self.first + i * self.step, self.nbytes) for i in range(self.count))

    def with_next(self, tensor: str, first: int, nbytes: int) -> Strided | None:
        """Return these places and one more; None if it has another tensor, size or distance."""
        step = self.step if self.count > 1 else first - self.first
        if (tensor, nbytes, first) != (self.tensor, self.nbytes, self.first + self.count * step):
            return None
        return replace(self, step=step, count=self.count + 1)


def add_place(places: list[Strided], tensor: str, first: int, nbytes: int) -> None:
    """Append a place to a list, as a part of the last entry where it fits."""
    longer = places[-1].with_next(tensor, first, nbytes) if places else None
    if longer:
        places[-1] = longer
    else:
        places.append(Strided(tensor, first, nbytes))
