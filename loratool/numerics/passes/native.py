"""Load the compiled passes, if they were built and the processor has what they need.

`LORATOOL_NATIVE=0` turns them off. `LORATOOL_NATIVE=1` makes their absence an error (`commands.machine`).
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

NATIVE = "LORATOOL_NATIVE"


def native() -> ModuleType | None:
    """Return the module of the compiled passes, or None if all is to be computed without them."""
    return None if os.environ.get(NATIVE) == "0" else _load()[0]


def describe_native() -> str:
    """Return the vector instructions of the passes in use, or `none` and the reason."""
    module, reason = (None, f"{NATIVE}=0") if os.environ.get(NATIVE) == "0" else _load()
    return f"none ({reason})" if module is None else str(module.VECTORS)


@cache
def _load() -> tuple[ModuleType | None, str]:
    """Return the module, or None and why it is not there."""
    try:
        module = import_module("._native", __package__)
    except ModuleNotFoundError:
        return None, "not built"
    except ImportError as error:
        return None, str(error)
    if _is_stale(Path(str(module.__file__))):
        return None, "its sources are newer: build again"
    return module, ""


def _is_stale(built: Path) -> bool:
    """Return whether a clone's C sources were changed after the build. A wheel has none."""
    sources = [source for pattern in ("*.c", "*.h") for source in built.parent.glob(pattern)]
    return any(source.stat().st_mtime > built.stat().st_mtime for source in sources)
