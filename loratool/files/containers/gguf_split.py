"""Open the parts of a GGUF model that is split into files, named and numbered by llama.cpp's gguf-split.

The first part has all fields of the model. The others have only the fields of the split, and their own tensors.
"""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import InputError
from .gguf_file import GgufFile

NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

NUMBER, COUNT = "split.no", "split.count"  # fields of each part; the number counts from 0, file names from 1


def split_number(path: Path) -> int | None:
    """Return the number of a split's part by its file name, from 1 on; None if the file is not a part."""
    match = NAME.fullmatch(path.name)
    return int(match["number"]) if match else None


def open_parts(first: GgufFile) -> tuple[GgufFile, ...]:
    """Return a GGUF file, with the other parts if it is the first of a split. On an error all are closed.

    Raises:
        InputError: it is not the first part, or a part is missing or of another model.
    """
    parts = [first]
    try:
        parts += [GgufFile(path) for path in _others(first)]
        _check(parts)
    except BaseException:
        for part in parts:
            part.close()
        raise
    return tuple(parts)


def _others(first: GgufFile) -> list[Path]:
    path, count, number = first.path, _whole(first, COUNT, 1), _whole(first, NUMBER, 0)
    if count == 1:
        return []
    match = NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        message = f"is a part of {count} files by its field {COUNT}, but its name does not say so"
        raise InputError(message, culprit=str(path), remedy="name the parts as llama-gguf-split does, or merge them")
    if number or int(match["number"]) != 1:
        raise InputError(f"is part {number + 1} of {count}", culprit=str(path), remedy="name the first part")
    others = [path.with_name(f"{match['stem']}-{n:05d}-of-{count:05d}.gguf") for n in range(2, count + 1)]
    missing = next((other for other in others if not other.is_file()), None)
    if missing:
        raise InputError(f"is missing, a part of {path.name}", culprit=str(missing), remedy="download it")
    return others


def _whole(file: GgufFile, key: str, default: int) -> int:
    """Return a field that is a count; raise InputError if it is not an integer."""
    value = file.fields.get(key, default)
    if type(value) is not int:
        raise InputError(f"has {value!r} as {key}", culprit=str(file.path), remedy="download the file again")
    return value


def _check(parts: list[GgufFile]) -> None:
    """Raise InputError if parts' numbers contradict their names, or if two parts have a tensor in common."""
    holders: dict[str, str] = {}
    for number, part in enumerate(parts):
        stated, count = _whole(part, NUMBER, 0), _whole(part, COUNT, 1)
        if (stated, count) != (number, len(parts)):
            message = f"is part {stated} of {count} by its fields, counted from 0, and not {number} of {len(parts)}"
            raise InputError(message, culprit=str(part.path), remedy="download the parts again")
        for name in part.specs:
            if name in holders:
                raise InputError(f"is in both {holders[name]} and {part.path.name}", culprit=name)
            holders[name] = part.path.name
