"""Lists of the weights that were skipped, although a pattern named them or as none did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from ...binding.weights.candidates import NEVER_TARGETED
from .document import Line, line


def untargeted(sorts: Mapping[str, str]) -> Iterator[Line]:
    """Yield a line for each sort of skipped weights. `sorts` maps weights to sorts (`find_candidates`)."""
    counts = Counter(sorts.values()).most_common()
    nameable = ", ".join(f"{sort} ({count:,})" for sort, count in counts if sort not in NEVER_TARGETED)
    never = ", ".join(f"{sort} ({count:,})" for sort, count in counts if sort in NEVER_TARGETED)
    if nameable:
        yield line(f"skipped: {nameable}; to include them, name them in --target")
    if never:
        yield line(f"always skipped: {never}")
