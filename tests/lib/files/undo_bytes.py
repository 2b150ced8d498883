"""Take undo files apart and put them together again, with the hash of the index that a forger would write."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TRAILER, ROW = struct.Struct("<QQ32s8s"), struct.Struct("<QQ")
FIRST = 16  # bytes before the payload


class Stretch(NamedTuple):
    """A row of the table, and the first byte of what it is of."""

    at: int
    length: int
    sum: int


def split_undo(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return what precedes the index, and the index."""
    at, length, _, _ = TRAILER.unpack(data[-TRAILER.size :])
    return data[:at], json.loads(data[at : at + length])


def join_undo(body: bytes, index: object) -> bytes:
    """Return an undo file; an index that is bytes is taken as it is."""
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    return body + text + TRAILER.pack(len(body), len(text), hashlib.sha256(text).digest(), b"loraundo")


def table_of(body: bytes, index: dict[str, Any]) -> list[Stretch]:
    """Return the rows of the table, with the places that follow from them."""
    at, length, _ = index["table"]
    found, start = [], FIRST
    for nbytes, total in ROW.iter_unpack(body[at : at + length]):
        found.append(Stretch(start, nbytes, total))
        start += nbytes
    return found


def with_table(body: bytes, index: dict[str, Any], rows: list[tuple[int, int]]) -> tuple[bytes, dict[str, Any]]:
    """Return body and index with another table, and its hash; what stands behind it moves."""
    return with_blob(body, index, "table", b"".join(ROW.pack(*row) for row in rows))


def hashes_of(body: bytes, index: dict[str, Any]) -> bytes:
    at, length, _ = index["hashes"]
    return body[at : at + length]


def with_blob(body: bytes, index: dict[str, Any], key: str, data: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return body and index with other bytes of the table or the hashes; what stands behind them moves."""
    at, length, _ = index[key]

    def moved(place: list[Any] | None) -> list[Any] | None:
        return [place[0] + len(data) - length, *place[1:]] if place and place[0] > at else place

    index = {**index, **{each: moved(index[each]) for each in ("table", "hashes", "payload", "card") if each in index}}
    index[key] = [at, len(data), hashlib.sha256(data).hexdigest()]
    index["shards"] = [{**shard, "header": moved(shard["header"])} for shard in index["shards"]]
    index["side"] = {name: moved(place) for name, place in index["side"].items()}
    return body[:at] + data + body[at + length :], index


def add_blob(body: bytes, data: bytes) -> tuple[bytes, list[Any]]:
    """Return the body with a blob at its end, and the blob's place in the index."""
    return body + data, [len(body), len(data), hashlib.sha256(data).hexdigest()]


def forge(undo: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write another index into an undo file."""
    body, index = split_undo(undo.read_bytes())
    change(index)
    undo.write_bytes(join_undo(body, index))
