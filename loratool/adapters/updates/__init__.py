"""List the kinds of updates that an adapter can apply to one tensor, each a class in a file and a row of `UPDATES`."""

from __future__ import annotations

from .add import AddDelta
from .dora import DoRA
from .experts import Experts
from .low_rank import LowRank
from .replace import ReplaceTensor
from .rows import ReplaceRows
from .update import Update

# the word for it in reports -> its class
UPDATES: dict[str, type[Update]] = {
    each.kind: each for each in (LowRank, Experts, DoRA, AddDelta, ReplaceTensor, ReplaceRows)
}
