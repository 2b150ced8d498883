"""Read the plain lines of a YAML file of settings, as tools dump nested dicts.

All other lines are ignored, and so are values that are not plain (quoted, a list, an anchor).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...errors import InputError

LARGEST = 1 << 20  # bytes of a file


def read_plain_yaml(path: Path, section: str = "") -> dict[str, Any]:
    """Return the lines `key: value` without indentation, or indented by two spaces below the line of `section`.

    The values are integers, booleans and words.

    Raises:
        InputError: the file is missing, too long, or not text.
    """
    if not path.is_file():
        raise InputError(f"has no {path.name} beside it, which says how it was made", culprit=str(path.parent))
    if path.stat().st_size > LARGEST:
        raise InputError("is too long for a file of settings", culprit=str(path))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError("is not text", culprit=str(path)) from error
    values: dict[str, Any] = {}
    current = ""
    for line in lines:
        match = re.fullmatch(r"(  )?([A-Za-z_]\w*):(?: +([\w./+-]+))? *", line)
        if line[:1].strip() and not line.startswith("#"):
            current = match[2] if match and not match[3] else ""
        if match and match[3] and bool(match[1]) == bool(section) and (not section or current == section):
            values[match[2]] = _plain(match[3])
    return values


def _plain(word: str) -> Any:
    if word in ("true", "false"):
        return word == "true"
    return int(word) if re.fullmatch(r"-?[0-9]{1,18}", word) else word
