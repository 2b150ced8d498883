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

Threads = dict[str, int]  # library -> its threads

Library = tuple[Callable[[], int], Callable[[int], None]]  # get and set

PREFIXES = ("scipy_openblas_", "openblas_")  # of the functions of OpenBLAS, as numpy has it

ENDS = ("64_", "_64", "")


def set_threads(count: int) -> Threads:
    """Set how many threads a product is divided among in each library that is loaded, and return what they were."""
    libraries = _libraries()
    before = {name: get() for name, (get, _) in libraries.items()}
    restore_threads(dict.fromkeys(libraries, count))
    return before


def restore_threads(counts: Threads) -> None:
    """Set the threads of these libraries; one that was loaded since keeps its own."""
    libraries = _libraries()
    for name, count in counts.items():
        libraries[name][1](count)


@contextmanager
def one_thread() -> Iterator[None]:
    """Have each product done by one thread, in the libraries that are loaded before."""
    before = set_threads(1)
    try:
        yield
    finally:
        restore_threads(before)


def _libraries() -> dict[str, Library]:
    torch, openblas = sys.modules.get("torch"), _openblas()
    libraries = {"numpy": openblas} if openblas else {}
    return {**libraries, "torch": (torch.get_num_threads, torch.set_num_threads)} if torch else libraries


@cache
def _openblas() -> Library | None:
    """Return the OpenBLAS in numpy's wheels, if it is there; other libraries have no such functions."""
    import numpy as np

    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for path in folder.glob("*openblas*"):
            with suppress(OSError):
                library = ctypes.CDLL(str(path))
                for name in (f"{prefix}{{}}_num_threads{end}" for prefix in PREFIXES for end in ENDS):
                    if hasattr(library, name.format("get")) and hasattr(library, name.format("set")):
                        return library[name.format("get")], library[name.format("set")]
    return None
