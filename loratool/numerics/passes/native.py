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
    if module.SOURCE and _source() not in ("", module.SOURCE):
        return None, "built from other sources: build again"
    return module, ""


def _source() -> str:
    """Return setup.py's hash of the C sources, empty if they are not here, as in a wheel."""
    import hashlib

    try:
        sources = [Path(__file__).with_name(name).read_bytes() for name in ("kernel.c", "row.h")]
    except OSError:
        return ""
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]
