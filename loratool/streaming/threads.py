"""Limit the threads that numpy's and torch's libraries use within one product.

The workers are the parallelism. A product that is divided among threads of its own waits for them, which on a busy
machine takes ten times the CPU time; and its rounding depends on their number.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

Threads = tuple[int, ...]  # of each library

PREFIXES = ("scipy_openblas_", "openblas_")  # of the functions of OpenBLAS, as numpy has it

ENDS = ("64_", "_64", "")


def set_threads(*counts: int) -> Threads:
    """Set how many threads a product is divided among, by library, and return what they were.

    Args:
        counts: of each library; the last one is that of all others.
    """
    libraries = [*_openblas(), *_torch()]
    before = tuple(get() for get, _ in libraries)
    for number, (_, set_count) in enumerate(libraries):
        set_count(counts[min(number, len(counts) - 1)])
    return before


@contextmanager
def one_thread() -> Iterator[None]:
    """Have each product done by one thread."""
    before = set_threads(1)
    try:
        yield
    finally:
        set_threads(*before)


Library = tuple[Callable[[], int], Callable[[int], None]]  # get and set


def _torch() -> list[Library]:
    torch = sys.modules.get("torch")
    return [(torch.get_num_threads, torch.set_num_threads)] if torch else []


@cache
def _openblas() -> list[Library]:
    """Return the OpenBLAS in numpy's wheels, if it is there; other libraries have no such functions."""
    import numpy as np

    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for path in folder.glob("*openblas*"):
            with suppress(OSError):
                library = ctypes.CDLL(str(path))
                for name in (f"{prefix}{{}}_num_threads{end}" for prefix in PREFIXES for end in ENDS):
                    if hasattr(library, name.format("get")) and hasattr(library, name.format("set")):
                        return [(library[name.format("get")], library[name.format("set")])]
    return []
