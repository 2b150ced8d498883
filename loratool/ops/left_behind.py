"""Say which files beside a model's weights are not in the output, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..files.side_files import LeftBehind
from ..reports.document import Line, line
from ..reports.numbers import nbytes
from ..reports.writing import told

NAMED = 3  # files of one reason


def left_behind_lines(rows: Sequence[LeftBehind], verbose: bool) -> Iterator[Line]:
    """Yield a line a reason with the names and the bytes of its files, or with `verbose` a line a file."""
    if verbose:
        yield from (line(f"left behind: {row.name}{_size([row])}: {row.reason}") for row in rows)
        return
    texts = []
    for reason in dict.fromkeys(row.reason for row in rows):
        own = [row for row in rows if row.reason == reason]
        names = [row.name for row in own[:NAMED]] + ([f"{len(own) - NAMED} more"] if len(own) > NAMED else [])
        texts.append(f"{', '.join(names)}{_size(own)}: {reason}")
    yield from told("left behind", texts)


def _size(rows: Sequence[LeftBehind]) -> str:
    """Return the bytes of all; empty if those of one are not known."""
    sizes = [row.nbytes for row in rows if row.nbytes is not None]
    return f" ({nbytes(sum(sizes))})" if len(sizes) == len(rows) else ""
