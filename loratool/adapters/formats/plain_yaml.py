"""Read the plain lines of a YAML file of settings, as tools dump nested dicts.

All other lines are ignored, and so are values that are not plain (quoted, a list, an anchor).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...durable.fileio import file_length, open_for_reading
from ...errors import InputError

LARGEST = 1 << 20  # bytes of a file


def read_plain_yaml(path: Path, section: str = "") -> dict[str, Any]:
    """Return the lines `key: value` of a section, each level of which is indented by two spaces.

    The values are integers, booleans and words.

    Args:
        section: the keys above the lines, joined by dots; "" for the lines without indentation.

    Raises:
        InputError: the file is missing, too long, or not text.
    """
    if not path.is_file():
        raise InputError(f"has no {path.name} beside it, which says how it was made", culprit=str(path.parent))
    with open_for_reading(path) as file:
        if file_length(file) > LARGEST:
            raise InputError("is too long for a file of settings", culprit=str(path))
        data = file.read()
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError("is not text", culprit=str(path)) from error
    values: dict[str, Any] = {}
    above: list[str] = []  # the keys of the levels up to the current line's
    for line in lines:
        text = line.lstrip(" ")
        if not text.strip() or text.startswith("#"):
            continue
        depth, odd = divmod(len(line) - len(text), 2)
        match = None if odd else re.fullmatch(r"([A-Za-z_]\w*):(?: +([\w./+-]+))? *", text)
        above[depth:] = [match[1] if match and not match[2] else ""]
        if match and match[2] and ".".join(above[:-1]) == section and len(above) == depth + 1:
            values[match[1]] = _plain(match[2])
    return values


def _plain(word: str) -> Any:
    if word in ("true", "false"):
        return word == "true"
    return int(word) if re.fullmatch(r"-?[0-9]{1,18}", word) else word
