"""Record what became of each module: of what it is made, by which exact change, and how much of its change was lost.

There is one rule for the word in reports (`Change.how`), and one for how losses add up (`Loss`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

EPSILON = 2.0**-53  # the rounding of float64, in which errors are measured

# Exact changes; of several the last in this list names them all. `exact`: the very factors; `folded`: the scale is in
# the factors; `expanded`: factors of another kind multiplied out; `swapped`, `split`, `fused`: other rows
EXACT = ("exact", "expanded", "folded", "swapped", "split", "fused")


@dataclass(frozen=True)
class Loss:
    """Measure the part of a module's change D that is lost."""

    squared: float = 0.0  # ||D' - D||^2
    total: float = 0.0  # ||D||^2
    cut: bool = False  # directions were cut off; else numbers were rounded
    rows: Tensor | None = field(default=None, compare=False, repr=False)  # (2, rows): squared and total of each row

    @classmethod
    def of_rows(cls, squared: Tensor, total: Tensor, cut: bool = False) -> Loss:
        """Return the loss of a module by what is lost of each row, (rows,), and what each was."""
        return cls(float(squared.sum()), float(total.sum()), cut, torch.stack([squared, total]))

    def between(self, start: int, stop: int) -> Loss:
        """Return the loss of some rows; where only the sums are known, that of the whole stands for them."""
        if self.rows is None:
            return self
        squared, total = self.rows[:, start:stop]
        return Loss.of_rows(squared, total, self.cut)

    @property
    def summed(self) -> Loss:
        """Its sums alone, to be kept for long."""
        return replace(self, rows=None)

    def __add__(self, other: Loss) -> Loss:
        """Return the loss of two parts of one module, side by side."""
        rows = None if self.rows is None or other.rows is None else torch.cat([self.rows, other.rows], 1)
        return Loss(self.squared + other.squared, self.total + other.total, self.cut or other.cut, rows)

    def then(self, later: Loss) -> Loss:
        """Return the loss of two steps, one after the other."""
        if not (self.squared and later.squared):
            return later if later.squared else self
        rows = None
        if self.rows is not None and later.rows is not None:
            rows = torch.stack([self.rows[0] + later.rows[0], self.rows[1]])
        # the total is of the change that was first
        return Loss(self.squared + later.squared, self.total, self.cut or later.cut, rows)

    def after(self, former: Loss) -> Loss:
        """Return this loss with that of a former change of another size, of which the share that was lost counts."""
        share = former.relative**2
        rows = None if self.rows is None else torch.stack([self.rows[0] + share * self.rows[1], self.rows[1]])
        return Loss(self.squared + share * self.total, self.total, self.cut or former.cut, rows)

    @property
    def relative(self) -> float:
        return math.sqrt(self.squared / self.total) if self.total else 0.0


NO_LOSS = Loss()


@dataclass(frozen=True)
class Change:
    """Record what became of one module so far."""

    sources: tuple[str, ...]  # the modules, of the adapter as it was opened, that it is made of
    exact: str = "exact"  # one of EXACT
    loss: Loss = NO_LOSS

    @property
    def how(self) -> str:
        """The word for it: the exact change, or how it lost something."""
        return ("truncated" if self.loss.cut else "rounded") if self.loss.relative else self.exact

    def then(self, exact: str = "exact", loss: Loss = NO_LOSS) -> Change:
        """Return what became of it after another step."""
        return replace(self, exact=max(self.exact, exact, key=EXACT.index), loss=self.loss.then(loss))


Log = Mapping[str, Change]  # module of the adapter as it is now -> what became of it


def of_parts(changes: Iterable[Change]) -> Change:
    """Return what became of a module that is made of several ones."""
    every = list(changes)
    sources = tuple(dict.fromkeys(name for change in every for name in change.sources))
    exact = max((change.exact for change in every), key=EXACT.index, default="exact")
    return Change(sources, exact, sum((change.loss for change in every), NO_LOSS))
