"""Stand-ins for files that are elsewhere: a file's safetensors header, and beside it a record of the file's size.

Whatever reads a number from a stand-in finds the end of the file, so it cannot be taken for the weights.
"""

from __future__ import annotations

from pathlib import Path

from ...durable import disk


def write_stand_in(place: Path, header: bytes, nbytes: int) -> None:
    """Write a stand-in for a file of `nbytes` bytes. header: its first bytes, through its safetensors header."""
    disk.make_folder(place.parent)
    for path, content in ((place, header), (_record(place), str(nbytes).encode())):
        with disk.open_file(path, "w+b") as file:
            disk.write_some(file, memoryview(content), 0)


def size_of_whole(place: Path) -> int | None:
    """Return the size of the file that a stand-in is for; None for any other file."""
    record = _record(place)
    return int(record.read_bytes()) if record.is_file() else None


def _record(place: Path) -> Path:
    return place.with_name(f".{place.name}.nbytes")
