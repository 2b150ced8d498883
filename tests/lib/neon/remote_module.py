"""Run the functions of `kernel.c` in an emulated process, under the names that the module `_native` has."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import loratool.numerics.passes
from loratool.numerics.passes.blocks import _SUMS, _Block

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR) if not shutil.which(name)]

_HERE, _PASSES = Path(__file__).parent, Path(loratool.numerics.passes.__file__).parent
_FLAGS = "-static -O3 -w -fno-fast-math -fno-trapping-math".split()
_POINTERS = [name for name, kind in _Block._fields_ if kind is ctypes.c_void_p]

Buffers = dict[int, int]  # address -> bytes


class RemoteModule:
    """What `_native` is on ARM: takes addresses, whose bytes it copies there and back."""

    HAS_SHA = 0

    def __init__(self, folder: Path) -> None:
        driver = folder / "driver"
        paths = [f"-I{_HERE}", f"-I{_PASSES}", str(_HERE / "driver.c")]
        subprocess.run([COMPILER, *_FLAGS, *paths, "-o", driver, "-lm"], check=True)
        self._process = subprocess.Popen([EMULATOR, driver], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin and self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        self.VECTORS, self.SIZE_OF_BLOCK = self._line(), int(self._line())
        assert ctypes.sizeof(_Block) == self.SIZE_OF_BLOCK
        self._functions = list(iter(self._line, ""))

    def close(self) -> None:
        self._to.close()
        assert self._process.wait() == 0

    def _line(self) -> str:
        return self._from.readline().decode().rstrip("\n")

    def run_pass(self, block: int, /) -> None:
        b = _Block.from_address(block)
        rows, columns = b.matrices * b.rows, b.matrices * b.columns
        numbers, wide = rows * b.columns, (2, 2, 4)
        names = "errors sizes rooms row_norms factors factor_errors squares".split()
        sizes = {
            "source": numbers * wide[b.source_kind],
            "result": numbers * wide[b.kind],
            "left": 8 * rows * b.rank,
            "right": 8 * columns * b.rank,
            "panels": b.matrices * self.size_of_panels(b.kind, b.columns, b.rank),
            "column_norms": 8 * columns,
            "sums": b.matrices * _SUMS.itemsize,
            "scratch": self.size_of_scratch(b.kind, b.strip, b.columns, b.rank),
            **dict.fromkeys(names, 8 * rows),
            **dict.fromkeys(("index", "count", "at"), 4 * numbers),
        }
        pointers = [(getattr(_Block, name).offset, getattr(b, name)) for name in _POINTERS]
        buffers = {getattr(b, name): size for name, size in sizes.items()}
        self._call("run_pass", {block: ctypes.sizeof(_Block), **buffers}, [block], pointers)

    def size_of_scratch(self, *given: int) -> int:
        return self._call("size_of_scratch", {}, given)

    def size_of_panels(self, *given: int) -> int:
        return self._call("size_of_panels", {}, given)

    def fill_panels(self, *given: int) -> None:
        kind, right, matrices, columns, rank, to = given
        size = self.size_of_panels(kind, columns, rank)
        self._call("fill_panels", {right: 8 * matrices * columns * rank, to: matrices * size}, given)

    def pack_entries(self, index: int, count: int, entries: int, width: int, to: int, /) -> int:
        sizes = {index: 4 * entries, count: 4 * entries, to: entries * (1 + width) // 8 + 16}
        return self._call("pack_entries", sizes, [index, count, entries, width, to])

    def unpack_entries(self, *given: int) -> int:
        data, length, index, count, entries, _width, unread = given
        rooms = {index: 4 * entries + 4, count: 4 * entries, unread: 4 * entries + 4}
        return self._call("unpack_entries", {data: max(1, length // 8), **rooms}, given)

    def put_entries(self, *given: int) -> None:
        out, width, *lists, entries = given
        positions = ctypes.string_at(lists[3], 4 * entries)
        last = max((at for (at,) in struct.iter_unpack("<i", positions)), default=-1)
        self._call("put_entries", {out: (last + 1) * width // 8, **dict.fromkeys(lists, 4 * entries)}, given)

    def _call(self, name: str, buffers: Buffers, given: Sequence[int], pointers: Sequence[tuple[int, int]] = ()) -> int:
        """Call a function; `pointers` are places in the first buffer, and the addresses that are there."""
        order = list(buffers)
        before = [ctypes.string_at(address, size) for address, size in buffers.items()]
        self._send(self._functions.index(name), len(order))
        for data in before:
            self._send(len(data))
            self._to.write(data)
        self._send(len(pointers), *(x for place, address in pointers for x in (0, place, order.index(address))))
        self._send(len(given), *(x for value in given for x in self._argument(value, order)))
        self._to.flush()
        (result,) = struct.unpack("<q", self._from.read(8))
        after = [self._from.read(len(data)) for data in before]
        kept = [ctypes.string_at(order[0] + place, 8) for place, _ in pointers]  # not those of the other process
        for address, old, new in zip(order, before, after, strict=True):
            if new != old:
                ctypes.memmove(address, new, len(new))
        for (place, _), data in zip(pointers, kept, strict=True):
            ctypes.memmove(order[0] + place, data, 8)
        return int(result)

    @staticmethod
    def _argument(value: int, order: Sequence[int]) -> tuple[int, int]:
        return (order.index(value), 0) if value in order else (-1, value)

    def _send(self, *numbers: int) -> None:
        self._to.write(struct.pack(f"<{len(numbers)}q", *numbers))
