"""Lock an output for one process, so that two commands with one output cannot mix their bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UsageError


def lock(file: Any, path: Path) -> None:
    """Lock what becomes `path` until `file`, or this descriptor, is closed.

    Raises:
        UsageError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError("another loratool is writing this output now", culprit=str(path)) from error
