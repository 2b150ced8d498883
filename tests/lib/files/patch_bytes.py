"""Take patches apart and put them together again, with the hashes that a forger would write."""

from __future__ import annotations

import bz2
import copy
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TRAILER, ROW = struct.Struct("<QQ32s8s"), struct.Struct("<QQQ32s32s")
FIRST = b"loratool patch 1\n"
ONE_WAY = (1 << 64) - 1

Row = tuple[int, int, int, bytes, bytes]  # body, its length, what the way back needs, two hashes


@dataclass
class Parts:
    """A patch in parts: what the index says of them, its blobs in its place, follows from them.

    Attributes:
        payload: all bodies.
        rows: of the table.
        index: with the bytes of the blobs where their places are.
    """

    payload: bytes
    rows: list[Row]
    index: dict[str, Any]
    head: bytes = field(default=FIRST)

    def copy(self) -> Parts:
        return copy.deepcopy(self)

    def joined(self) -> bytes:
        """Return the patch, its hashes made again."""
        index = copy.deepcopy(self.index)
        index["table"] = b"".join(ROW.pack(*row) for row in self.rows)
        data = self.head + self.payload
        for owner, key in blobs(index):
            blob = owner[key]
            owner[key] = [len(data), len(blob), hashlib.sha256(blob).hexdigest()]
            data += blob
        return join_patch(data, index)


def blobs(index: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Return the owner and key of each blob's place, in the order of the blobs."""
    found: list[tuple[Any, Any]] = [(index, "table")]
    for model in ("target", "base"):
        found += [(entry, "frame") for entry in index[model]["files"] or ()]
    for side in ("side", "base_side"):
        found += [(entry, 1) for _, entry in sorted(index[side].items()) if entry[1] is not None]
    return found


def join_patch(data: bytes, index: object) -> bytes:
    """Return a patch of what is before the index, and the index; one that is bytes is taken as it is."""
    text = index if isinstance(index, bytes) else json.dumps(index, sort_keys=True, separators=(",", ":")).encode()
    return data + text + TRAILER.pack(len(data), len(text), hashlib.sha256(text).digest(), b"lorapatc")


def index_of(data: bytes) -> dict[str, Any]:
    first, length, digest, end = TRAILER.unpack(data[-TRAILER.size :])
    text = data[first : first + length]
    assert end == b"lorapatc" and hashlib.sha256(text).digest() == digest
    found: dict[str, Any] = json.loads(text)
    return found


def split_patch(data: bytes) -> Parts:
    index = index_of(data)
    first = index["table"][0]
    for owner, key in blobs(index):
        at, length, digest = owner[key]
        owner[key] = data[at : at + length]
        assert hashlib.sha256(owner[key]).hexdigest() == digest
    rows = [(*row,) for row in ROW.iter_unpack(index["table"])]
    return Parts(data[len(FIRST) : first], rows, index)


def with_side(parts: Parts, name: str, content: bytes, key: str = "side") -> Parts:
    """Return a patch that brings another side file."""
    forged = parts.copy()
    entry = [hashlib.sha256(content).hexdigest(), bz2.compress(content), len(content)]
    forged.index[key][name] = entry
    return forged


def forge(path: Path, change: Callable[[Parts], object]) -> None:
    """Change a patch in its place."""
    parts = split_patch(path.read_bytes())
    change(parts)
    path.write_bytes(parts.joined())
