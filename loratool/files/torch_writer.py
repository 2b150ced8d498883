"""A torch file to be: the zip that `torch.save` writes, planned to its last byte before the first is there.

The small entries come first, whole; then each storage, its place known; then the list of entries. What is missing
until the storages are written is their CRC-32 alone, which `Archive.rest` is told at the end: torch.load does not look
at it, every other reader of zip files does. Format: torch/serialization.py (`_save`) and PKWARE's APPNOTE.TXT; all
lengths stand in zip64 fields, so that there is one layout and not two. The bytes depend on no version of torch.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..errors import InputError
from .dtypes import DTYPE_NAMES, TensorSpec
from .torch_pickle import MAX_PICKLE, STORAGES

ALIGNMENT = 64  # of a storage in its file, as torch.save has it, so that torch.load(mmap=True) can use it in place


_STORAGE_OF = {dtype: storage for storage, (dtype, _) in STORAGES.items() if storage != "torch.storage.UntypedStorage"}


_ZIP64 = 0xFFFFFFFF  # "see the extra field"


_VERSION, _DATE = 45, 0x21  # of the format, which has zip64; the first day that it can name


_POLYNOMIAL = 0xEDB88320


@dataclass(frozen=True)
class Entry:
    """A stored file of the archive, its local header at byte `at`."""

    name: bytes
    at: int
    nbytes: int

    @property
    def begin(self) -> int:
        """Of its content."""
        return -(-(self.at + 30 + len(self.name) + 20 + 4) // ALIGNMENT) * ALIGNMENT

    @property
    def end(self) -> int:
        return self.begin + self.nbytes

    def local(self, crc: int) -> bytes:
        """What stands before the content, padded up to it by an extra field of torch's own name."""
        pad = self.begin - self.at - 30 - len(self.name) - 24
        extra = struct.pack("<2H2Q2sH", 1, 16, self.nbytes, self.nbytes, b"FB", pad) + b"Z" * pad
        sizes = _ZIP64, _ZIP64, len(self.name), len(extra)
        return struct.pack("<4s5H3I2H", b"PK\3\4", _VERSION, 0, 0, 0, _DATE, crc, *sizes) + self.name + extra

    def listed(self, crc: int) -> bytes:
        """Its line in the list of entries."""
        extra = struct.pack("<2H3Q", 1, 24, self.nbytes, self.nbytes, self.at)
        sizes = _ZIP64, _ZIP64, len(self.name), len(extra)
        fixed = struct.pack("<4s6H3I2H", b"PK\1\2", _VERSION, _VERSION, 0, 0, 0, _DATE, crc, *sizes)
        return fixed + struct.pack("<3H2I", 0, 0, 0, 0, _ZIP64) + self.name + extra


@dataclass(frozen=True)
class Archive:
    """`header` is all before the first storage, whose entries are `storages`; begin: each one's first byte."""

    header: bytes
    small: tuple[tuple[Entry, int], ...]  # with their CRC-32
    storages: Mapping[str, Entry]

    @property
    def begin(self) -> dict[str, int]:
        return {name: entry.begin for name, entry in self.storages.items()}

    @property
    def nbytes(self) -> int:
        return self._list_at + sum(len(entry.listed(0)) for entry in self._entries) + 98

    @property
    def _entries(self) -> list[Entry]:
        return [entry for entry, _ in self.small] + list(self.storages.values())

    @property
    def _list_at(self) -> int:
        return self._entries[-1].end

    def rest(self, parts: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, bytes]]:
        """What is still to be written, by offset, once the storages are.

        parts: (offset, length, CRC-32) of the ranges that were written, in any order.
        """
        waiting = deque(sorted(parts))
        checked = list(self.small)
        for entry in self.storages.values():
            own = []
            while waiting and waiting[0][0] < entry.end:
                own.append(waiting.popleft()[1:])
            checked.append((entry, joined_crc(own)))
            yield entry.at, entry.local(checked[-1][1])
        lines = b"".join(entry.listed(crc) for entry, crc in checked)
        yield self._list_at, lines + _end(len(checked), len(lines), self._list_at)


def plan_archive(tensors: Mapping[str, tuple[str, TensorSpec]]) -> Archive:
    """tensors: in their order, each with the tensor whose storage it has, itself or an earlier one.

    Raises InputError for a type that torch does not have.
    """
    keys = {owner: str(i) for i, owner in enumerate(dict.fromkeys(owner for owner, _ in tensors.values()))}
    header, small = bytearray(), []
    for name, data in (("data.pkl", _pickle(tensors, keys)), ("byteorder", b"little"), ("version", b"3\n")):
        entry, crc = Entry(f"archive/{name}".encode(), len(header), len(data)), zlib.crc32(data)
        header += entry.local(crc) + data
        small.append((entry, crc))
    at, storages = len(header), {}
    for owner, key in keys.items():
        storages[owner] = Entry(f"archive/data/{key}".encode(), at, tensors[owner][1].nbytes)
        at = storages[owner].end
    return Archive(bytes(header), tuple(small), storages)


def _end(count: int, length: int, at: int) -> bytes:
    """The end of the list of entries: where it begins, in the fields of zip64."""
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, _VERSION, _VERSION, 0, 0, count, count, length, at)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, at + length, 1)
    return wide + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, _ZIP64, _ZIP64, 0)


def _pickle(tensors: Mapping[str, tuple[str, TensorSpec]], keys: Mapping[str, str]) -> bytes:
    """The dict of tensors in pickle's protocol 2, with the calls that torch.save makes of a tensor."""
    memo: dict[str, bytes] = {}

    def known(name: str) -> bytes:
        if name in memo:
            return b"h" + memo[name]
        memo[name] = bytes([len(memo)])
        module, _, last = name.rpartition(".")
        return f"c{module}\n{last}\n".encode() + b"q" + memo[name]

    def tensor(key: str, spec: TensorSpec) -> bytes:
        dtype = DTYPE_NAMES[spec.dtype]
        storage = _STORAGE_OF.get(dtype)
        kind, numel, rebuild = (storage, spec.size, "v2") if storage else (_UNTYPED, spec.nbytes, "v3")
        place = [_text("storage"), known(kind), _text(key), _text("cpu"), _whole(numel)]
        view = [_tuple(place) + b"Q", _whole(0), _tuple(map(_whole, spec.shape)), _tuple(map(_whole, _stride(spec)))]
        rest = [b"\x89", known("collections.OrderedDict") + b")R", *([] if storage else [known(f"torch.{dtype}")])]
        return known(f"torch._utils._rebuild_tensor_{rebuild}") + _tuple([*view, *rest]) + b"R"

    parts = [b"\x80\x02}("]
    for name, (owner, spec) in tensors.items():
        if spec.dtype not in DTYPE_NAMES:
            raise InputError(f"is {spec.dtype}, which torch has no type for", culprit=name)
        parts += [_text(name), tensor(keys[owner], spec)]
    data = b"".join([*parts, b"u."])
    if len(data) > MAX_PICKLE:
        raise InputError(
            f"{len(tensors)} tensors are too many for one torch file", remedy="add --max-shard-size to have several"
        )
    return data


_UNTYPED = "torch.storage.UntypedStorage"


def _whole(n: int) -> bytes:
    if n < 256:
        return b"K" + bytes([n])
    return b"J" + struct.pack("<i", n) if n < 1 << 31 else b"\x8a\x08" + struct.pack("<q", n)


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _tuple(items: Iterable[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _stride(spec: TensorSpec) -> list[int]:
    """Of a tensor row by row, in elements; torch counts an empty dimension as one."""
    strides = [1]
    for size in reversed(spec.shape[1:]):
        strides.insert(0, strides[0] * max(1, size))
    return strides[: len(spec.shape)]


def joined_crc(parts: Sequence[tuple[int, int]]) -> int:
    """The CRC-32 of what (length, CRC-32) of its parts in order say: zlib's crc32_combine."""
    crc = 0
    for length, following in parts:
        crc = _times(_shift(length), crc) ^ following
    return crc


@lru_cache
def _shift(length: int) -> int:
    """x^(8 length), by squares. The lowest power of a polynomial is its highest bit."""
    power, square = 1 << 31, 1 << 23  # 1 and x^8
    while length:
        if length & 1:
            power = _times(power, square)
        square, length = _times(square, square), length >> 1
    return power


def _times(a: int, b: int) -> int:
    """The product of two polynomials over GF(2) modulo the CRC's."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
