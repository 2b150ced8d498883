"""Plan every byte of the zip archive that `torch.save` writes, before the first is written.

The small entries come first, complete; then each storage at a known byte; then the list of entries. Only the CRC-32s of
the storages are unknown until they are written; they are passed to `Archive.rest`. torch.load does not check them, but
all other readers of zip files do. The format is in torch/serialization.py (`_save`) and PKWARE's APPNOTE.TXT. All
lengths are in zip64 fields, so that there is only one layout. The bytes do not depend on torch's version.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...errors import InputError
from ..dtypes import DTYPE_NAMES, TensorSpec
from .torch_pickle import MAX_PICKLE, STORAGES

ALIGNMENT = 64  # bytes; torch.save's alignment of storages, with which torch.load(mmap=True) uses them in place

_STORAGE_OF = {dtype: storage for storage, (dtype, _) in STORAGES.items() if storage != "torch.storage.UntypedStorage"}

_ZIP64 = 0xFFFFFFFF  # "see the extra field"

_VERSION, _DATE = 45, 0x21  # the zip version that has zip64; 1980-01-01, zip's first day

_POLYNOMIAL = 0xEDB88320  # of CRC-32, lowest power at the highest bit


@dataclass(frozen=True)
class Entry:
    """An uncompressed entry of the archive."""

    name: bytes
    offset: int  # first byte of its local header
    nbytes: int  # of its content

    @property
    def begin(self) -> int:
        """Return the first byte of its content."""
        return -(-(self.offset + 30 + len(self.name) + 20 + 4) // ALIGNMENT) * ALIGNMENT

    @property
    def end(self) -> int:
        return self.begin + self.nbytes

    def local(self, crc: int) -> bytes:
        """Encode the local header, padded up to the content by an extra field with torch's id, FB."""
        pad = self.begin - self.offset - 30 - len(self.name) - 24
        extra = struct.pack("<2H2Q2sH", 1, 16, self.nbytes, self.nbytes, b"FB", pad) + b"Z" * pad
        sizes = _ZIP64, _ZIP64, len(self.name), len(extra)
        return struct.pack("<4s5H3I2H", b"PK\3\4", _VERSION, 0, 0, 0, _DATE, crc, *sizes) + self.name + extra

    def listed(self, crc: int) -> bytes:
        """Encode the entry's record in the central directory."""
        extra = struct.pack("<2H3Q", 1, 24, self.nbytes, self.nbytes, self.offset)
        sizes = _ZIP64, _ZIP64, len(self.name), len(extra)
        fixed = struct.pack("<4s6H3I2H", b"PK\1\2", _VERSION, _VERSION, 0, 0, 0, _DATE, crc, *sizes)
        return fixed + struct.pack("<3H2I", 0, 0, 0, 0, _ZIP64) + self.name + extra


@dataclass(frozen=True)
class Archive:
    """The plan of a torch file."""

    header: bytes  # all bytes before the first storage
    small: tuple[tuple[Entry, int], ...]  # the entries in `header`, with their CRC-32
    storages: Mapping[str, Entry]  # the tensor that owns a storage -> its entry

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
        """Yield (offset, bytes) of everything that follows once the storages are written.

        Args:
            parts: (offset, length, CRC-32) of the ranges that were written, in any order.
        """
        waiting = deque(sorted(parts))
        checked = list(self.small)
        for entry in self.storages.values():
            checksums = []
            while waiting and waiting[0][0] < entry.end:
                checksums.append(waiting.popleft()[1:])
            checked.append((entry, joined_crc(checksums)))
            yield entry.offset, entry.local(checked[-1][1])
        lines = b"".join(entry.listed(crc) for entry, crc in checked)
        yield self._list_at, lines + _end(len(checked), len(lines), self._list_at)


def plan_archive(tensors: Mapping[str, tuple[str, TensorSpec]]) -> Archive:
    """Plan the archive of the tensors, in their order.

    Args:
        tensors: name -> (the tensor whose storage it has: itself or an earlier one, its spec).

    Raises:
        InputError: torch has no such dtype, or there are too many tensors for one file.
    """
    keys = {owner: str(i) for i, owner in enumerate(dict.fromkeys(owner for owner, _ in tensors.values()))}
    header, small = bytearray(), []
    for name, data in (("data.pkl", _pickle(tensors, keys)), ("byteorder", b"little"), ("version", b"3\n")):
        entry, crc = Entry(f"archive/{name}".encode(), len(header), len(data)), zlib.crc32(data)
        header += entry.local(crc) + data
        small.append((entry, crc))
    place, storages = len(header), {}
    for owner, key in keys.items():
        storages[owner] = Entry(f"archive/data/{key}".encode(), place, tensors[owner][1].nbytes)
        place = storages[owner].end
    return Archive(bytes(header), tuple(small), storages)


def _end(count: int, length: int, begin: int) -> bytes:
    """Encode the end of the archive: the central directory's first byte and length, in zip64 fields."""
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, _VERSION, _VERSION, 0, 0, count, count, length, begin)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, begin + length, 1)
    return wide + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, _ZIP64, _ZIP64, 0)


def _pickle(tensors: Mapping[str, tuple[str, TensorSpec]], keys: Mapping[str, str]) -> bytes:
    """Encode the dict of tensors in pickle protocol 2, with the calls that torch.save writes for tensors."""
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
    """Return the strides of a contiguous tensor, in elements; torch counts an empty dimension as one."""
    strides = [1]
    for size in reversed(spec.shape[1:]):
        strides.insert(0, strides[0] * max(1, size))
    return strides[: len(spec.shape)]


def joined_crc(parts: Sequence[tuple[int, int]]) -> int:
    """Combine the (length, CRC-32) of consecutive parts into the CRC-32 of all, like zlib's crc32_combine."""
    crc = 0
    for length, following in parts:
        crc = _times(_shift(length), crc) ^ following
    return crc


@lru_cache
def _shift(length: int) -> int:
    """Return x^(8 length) modulo the CRC's polynomial, by squaring; the lowest power is the highest bit."""
    power, square = 1 << 31, 1 << 23  # 1 and x^8
    while length:
        if length & 1:
            power = _times(power, square)
        square, length = _times(square, square), length >> 1
    return power


def _times(a: int, b: int) -> int:
    """Multiply two polynomials over GF(2) modulo the CRC's."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
