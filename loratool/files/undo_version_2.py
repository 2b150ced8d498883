"""Read what an undo file of version 2 has in its index, and version 3 in a table: where each record is, and its hash.

Its payload stands in the order of the merged model, not of the names, and the unchanged bytes behind the records.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .dtypes import TensorSpec
from .undo_checks import are_hashes, bytes_before, is_count, kept_names, require
from .undo_table import HASH_PART, ROW, UndoTable, hashed_parts


def table_of_version_2(tensors: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> UndoTable:
    """Return the table, and give each entry the number of its first row.

    Args:
        tensors: the entries of changed tensors by name, as the index has them.
        specs: of the base's stored tensors.

    Raises:
        ValueError, LookupError, TypeError: the index is damaged or forged.
    """
    rows, places = bytearray(), list[int]()

    def add(at: int, length: int, sha256: str, total: int) -> None:
        fits = is_count(at) and is_count(length) and are_hashes([sha256], 1)
        require(fits and type(total) is int and 0 <= total < 1 << 64, "no place, hash and sum of a record")
        rows.extend(ROW.pack(length, bytes.fromhex(sha256), total))
        places.append(at)

    def add_unchanged(at: int, nbytes: int, hashes: list[str]) -> None:
        for part, sha256 in zip(hashed_parts(nbytes), hashes, strict=True):
            add(at + part, min(HASH_PART, nbytes - part), sha256, 0)

    for name, entry in sorted(tensors.items()):
        entry["row"] = len(places)
        if "coded" in entry:
            for tensor, (at, hashes) in zip(kept_names(entry), entry["coded"]["kept"], strict=True):
                add_unchanged(at, specs[tensor].nbytes, hashes)
        if "copied" in entry:
            row, at, hashes = entry["copied"]
            require(is_count(row), f"{name}: its copied rows")
            add_unchanged(at, specs[name].nbytes - bytes_before(specs[name], row), hashes)
        for _, _, *found in sorted(entry["records"]):
            add(*found)
    return UndoTable(bytes(rows), places)
