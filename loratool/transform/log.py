"""Log of each module's steps: its source modules, its exact change, and the loss of its delta.

`Change.how` is the one rule for the word in reports, and `Loss` the one rule for adding losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ..numerics.forms import Wide

EPSILON = 2.0**-53  # the rounding of float64, in which errors are measured

# Exact changes; if there are several, the last one in this list is reported. `exact`: the stored factors; `folded`: the
# scale is in the factors; `expanded`: factors of another kind, multiplied out; `swapped`, `split`, `fused`: other rows
EXACT = ("exact", "expanded", "folded", "swapped", "split", "fused")


@dataclass(frozen=True)
class Loss:
    """The part of a module's change D that is lost."""

    squared: float = 0.0  # ||D' - D||^2
    total: float = 0.0  # ||D||^2
    cut: bool = False  # directions were cut off; else numbers were rounded
    rows: Wide | None = field(default=None, compare=False, repr=False)  # (2, rows): squared and total of each row

    @classmethod
    def of_rows(cls, squared: Wide, total: Wide, cut: bool = False) -> Loss:
        """Return the loss of a module from each row's ||D' - D||^2 and ||D||^2, (rows,)."""
        return cls(float(squared.sum()), float(total.sum()), cut, np.stack([squared, total]))

    def between(self, start: int, stop: int) -> Loss:
        """Return the loss of some rows; if only the sums are known, the loss of all rows."""
        if self.rows is None:
            return self
        squared, total = self.rows[:, start:stop]
        return Loss.of_rows(squared, total, self.cut)

    @property
    def summed(self) -> Loss:
        """The sums without the rows, which take memory."""
        return replace(self, rows=None)

    def __add__(self, other: Loss) -> Loss:
        """Return the loss of two parts of one module, side by side."""
        rows = None if self.rows is None or other.rows is None else np.concatenate([self.rows, other.rows], 1)
        return Loss(self.squared + other.squared, self.total + other.total, self.cut or other.cut, rows)

    def then(self, later: Loss) -> Loss:
        """Return the loss of two steps, one after the other."""
        if not (self.squared and later.squared):
            return later if later.squared else self
        rows = None
        if self.rows is not None and later.rows is not None:
            rows = np.stack([self.rows[0] + later.rows[0], self.rows[1]])
        # the total is of the first change
        return Loss(self.squared + later.squared, self.total, self.cut or later.cut, rows)

    def after(self, former: Loss) -> Loss:
        """Return this loss plus the loss of a former change of another size, which counts by its lost share."""
        share = former.relative**2
        rows = None if self.rows is None else np.stack([self.rows[0] + share * self.rows[1], self.rows[1]])
        return Loss(self.squared + share * self.total, self.total, self.cut or former.cut, rows)

    @property
    def relative(self) -> float:
        return math.sqrt(self.squared / self.total) if self.total else 0.0


NO_LOSS = Loss()


@dataclass(frozen=True)
class Change:
    """The log entry of one module."""

    sources: tuple[str, ...]  # the modules of the opened adapter that it is computed from
    exact: str = "exact"  # one of EXACT
    loss: Loss = NO_LOSS

    @property
    def how(self) -> str:
        """The word in reports: `truncated` or `rounded` if there is a loss, else the exact change."""
        return ("truncated" if self.loss.cut else "rounded") if self.loss.relative else self.exact

    def then(self, exact: str = "exact", loss: Loss = NO_LOSS) -> Change:
        """Return the entry after another step."""
        return replace(self, exact=max(self.exact, exact, key=EXACT.index), loss=self.loss.then(loss))


Log = Mapping[str, Change]  # module of the present adapter -> its entry


def of_parts(changes: Iterable[Change]) -> Change:
    """Return the entry of a module that is computed from several."""
    every = list(changes)
    sources = tuple(dict.fromkeys(name for change in every for name in change.sources))
    exact = max((change.exact for change in every), key=EXACT.index, default="exact")
    return Change(sources, exact, sum((change.loss for change in every), NO_LOSS))
