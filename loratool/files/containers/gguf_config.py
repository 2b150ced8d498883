"""Rebuild a GGUF model's config.json from the fields of its file, using the tables of `architectures.gguf`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from ...architectures.gguf.config import GgufFields, rebuild_config
from ...errors import InputError
from .gguf_file import GgufFile

SHORT = 1 << 16  # the most numbers in a tensor of rotary factors


def gguf_config(parts: Sequence[GgufFile]) -> dict[str, Any]:
    """Return the config.json of a GGUF model; empty if no table has its architecture.

    Args:
        parts: its files, the one with the fields first.

    Raises:
        InputError: a field that config.json needs is missing.
    """
    holder = {name: part for part in parts for name in part.specs}

    def numbers(name: str) -> tuple[float, ...]:
        spec = holder[name].specs[name]
        if spec.dtype != "F32" or spec.size > SHORT:
            raise InputError(f"is {spec}, where a short one of F32 belongs", culprit=name)
        return struct.unpack(f"<{spec.size}f", holder[name].read(name))

    shapes = {name: part.specs[name].shape for name, part in holder.items()}
    return rebuild_config(GgufFields(parts[0].path.name, parts[0].architecture or "", parts[0].fields, shapes, numbers))
