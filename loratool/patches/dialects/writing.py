"""Write safetensors files whose tensors' sizes are known only once they are compressed, or their positions found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ...durable import disk
from ...durable.fileio import copy_range, open_new, open_scratch, read_into, write_at
from ...files.containers.safetensors_file import build_header, data_order
from ...files.dtypes import TensorSpec
from .checksums import Hasher
from .patch import TensorPair
from .streams import Block, Pieces, differing_numbers, paired

SPOOLED = 1 << 20  # bytes that are read back from a scratch file at a time


class Spool:
    """Bytes that wait in a file without a name, for they are written before what precedes them."""

    def __init__(self, folder: Path) -> None:
        self._file, self.nbytes = open_scratch(folder), 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, data: bytes | memoryview) -> None:
        write_at(self._file, memoryview(data), self.nbytes)
        self.nbytes += len(data)

    def parts(self) -> Iterator[memoryview]:
        """Yield the bytes in order; each part overwrites the one before."""
        buffer = memoryview(bytearray(min(SPOOLED, self.nbytes)))
        for done in range(0, self.nbytes, SPOOLED):
            part = buffer[: self.nbytes - done]
            read_into(self._file, part, done)
            yield part


class TensorBodies:
    """The tensors of a file that is being made; they wait in a scratch file until the header is known."""

    def __init__(self, folder: Path) -> None:
        self._file, self._end = open_scratch(folder), 0
        self.specs: dict[str, TensorSpec] = {}
        self._places: dict[str, int] = {}

    def close(self) -> None:
        self._file.close()

    def add(self, name: str, parts: Iterable[bytes | memoryview], dtype: str = "U8", count: int | None = None) -> int:
        """Add a flat tensor, and return its bytes.

        Args:
            count: its numbers; by default its bytes.
        """
        start = self._end
        for part in parts:
            write_at(self._file, memoryview(part), self._end)
            self._end += len(part)
        self.specs[name] = TensorSpec(dtype, (self._end - start if count is None else count,))
        self._places[name] = start
        return self._end - start

    def forget(self, name: str) -> None:
        """Remove the tensor that was added last."""
        self._end = self._places.pop(name)
        del self.specs[name]

    def save(self, target: BinaryIO, metadata: Mapping[str, str] | None) -> int:
        """Write the file, the widest types first, as the official reader's maps need them; return its bytes."""
        header, offsets = build_header(self.specs, data_order(self.specs), metadata)
        write_at(target, memoryview(header), 0)
        for name, offset in offsets.items():
            copy_range(self._file, self._places[name], target, offset, self.specs[name].nbytes)
        disk.sync(target)
        return len(header) + sum(spec.nbytes for spec in self.specs.values())

    def save_at(self, path: Path, metadata: Mapping[str, str] | None) -> int:
        with open_new(path) as target:
            return self.save(target, metadata)


def hashed(pieces: Pieces, hasher: Hasher) -> Iterator[bytes | memoryview]:
    """Yield a stream, and add it to a sum."""
    for piece in pieces:
        hasher.update(piece)
        yield piece


class XorStream:
    """The exclusive or of both sides of a tensor; after the last part, `changed` says whether they differ."""

    def __init__(self, pair: TensorPair, hasher: Hasher) -> None:
        self._pair, self._hasher, self.changed = pair, hasher, False

    def __iter__(self) -> Iterator[memoryview]:
        target = hashed(self._pair.read_target(), self._hasher)
        for one, two in paired(self._pair.read_base(), target, self._pair.name):
            part = np.bitwise_xor(one, two)
            self.changed = self.changed or bool(part.any())
            yield part.data


class SparseSpool:
    """The positions where both sides of a tensor differ, and the target's numbers there, in scratch files.

    Attributes:
        count: how many they are.
    """

    def __init__(self, folder: Path) -> None:
        self.positions, self.values, self.count = Spool(folder), Spool(folder), 0

    def __enter__(self) -> SparseSpool:
        return self

    def __exit__(self, *_: object) -> None:
        with self.positions:
            self.values.__exit__()

    def fill(
        self, pair: TensorPair, width: int, encode: Callable[[Block], bytes], hasher: Hasher | None = None
    ) -> None:
        """Find the numbers of `width` bytes that differ.

        Args:
            encode: returns the bytes of positions.
            hasher: sums the target's bytes.
        """
        target = pair.read_target() if hasher is None else hashed(pair.read_target(), hasher)
        for block in differing_numbers(pair.read_base(), target, width, pair.name):
            self.count += len(block[0])
            self.positions.add(encode(block))
            self.values.add(block[1].tobytes())
