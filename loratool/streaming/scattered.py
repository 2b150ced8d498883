"""Say how a step's codes are stored, which need not lie in the order of rows, nor in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# What a step writes: a tensor of the output, the first byte there, and the bytes from there on
Written = tuple[str, int, bytes]


@dataclass(frozen=True)
class Scattered:
    """How the rows of a step become bytes of tensors.

    Attributes:
        dtype, width: `out` of a step is (rows, width) of this type, on the CPU, where codes are made.
        nbytes: of all rows, roughly.
        write: takes the first row of `out`, `out` and the step's result; returns what is left of the result, and what
            to write.
    """

    dtype: torch.dtype
    width: int
    nbytes: int
    write: Callable[[int, Tensor, Any], tuple[Any, Iterable[Written]]]


@dataclass(frozen=True)
class Strided:
    """Places of one size at equal distances in a tensor of the output."""

    tensor: str
    first: int  # byte
    nbytes: int  # of each
    step: int = 0
    count: int = 1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the first byte of each, and how many there are."""
        return ((self.first + i * self.step, self.nbytes) for i in range(self.count))

    def with_next(self, tensor: str, at: int, nbytes: int) -> Strided | None:
        """Return these and another place behind them, None if that is none of the kind."""
        step = self.step if self.count > 1 else at - self.first
        if (tensor, nbytes, at) != (self.tensor, self.nbytes, self.first + self.count * step):
            return None
        return replace(self, step=step, count=self.count + 1)


def add_place(found: list[Strided], tensor: str, at: int, nbytes: int) -> None:
    """Add a place to those that were written before, in their order."""
    longer = found[-1].with_next(tensor, at, nbytes) if found else None
    if longer:
        found[-1] = longer
    else:
        found.append(Strided(tensor, at, nbytes))
