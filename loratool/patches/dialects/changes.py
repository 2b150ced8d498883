"""The three kinds of changes: exclusive or, bytes written over, and numbers at positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ...files.weights_file import WeightsFile
from .compression import HEAD, ZSTD, decompressed, frame_size
from .patch import Checksum, ForeignChange, head_of, stored_parts
from .streams import Block, ByteStream, Pieces, scattered, xored

COUNT = 1 << 18  # positions that are read at a time


@dataclass(frozen=True)
class XorChange(ForeignChange):
    """The compressed exclusive or of all bytes of a tensor.

    Attributes:
        key: the tensor's name in the file.
        stated: dtype and shape, if the patch says them.
        allows_zlib: the bytes may be of zlib too, which declares no size.
    """

    name: str
    place: str
    check: Checksum | None
    file: WeightsFile
    key: str
    stated: TensorSpec | None = None
    allows_zlib: bool = False

    @property
    def nbytes(self) -> int:
        return self.file.specs[self.key].nbytes

    def require(self, spec: TensorSpec) -> None:
        if self.stated not in (None, spec):
            raise InputError(f"is of {self.stated}, and the base's tensor is {spec}", culprit=self.place)
        head = head_of(self.file, self.key, HEAD)
        size = None if self.allows_zlib and head[:4] != ZSTD else frame_size(head, self.place)
        if size not in (None, spec.nbytes):
            raise InputError(f"is of {size} bytes, and the base's tensor has {spec.nbytes}", culprit=self.place)

    def applied(self, pieces: Pieces, spec: TensorSpec) -> Iterator[memoryview]:
        return xored(pieces, decompressed(stored_parts(self.file, self.key), spec.nbytes, self.place), self.place)


@dataclass(frozen=True)
class OverwriteChange(ForeignChange):
    """A compressed count, so many byte positions (all u32), and the new bytes.

    Two decompressors go over the frame, one at the positions and one at the bytes.
    """

    name: str
    place: str
    check: Checksum | None
    file: WeightsFile
    key: str

    @property
    def nbytes(self) -> int:
        return self.file.specs[self.key].nbytes

    def require(self, spec: TensorSpec) -> None:
        size = frame_size(head_of(self.file, self.key, HEAD), self.place)
        if size is not None and (size < 4 or (size - 4) % 5 or size > 4 + 5 * spec.nbytes):
            raise InputError(f"is of {size} bytes, and the base's tensor has {spec.nbytes}", culprit=self.place)

    def applied(self, pieces: Pieces, spec: TensorSpec) -> Iterator[memoryview]:
        count = self._count(spec.nbytes)
        return scattered(pieces, self._blocks(count), spec.nbytes, 1, self.place)

    def _count(self, most: int) -> int:
        size = frame_size(head_of(self.file, self.key, HEAD), self.place)
        if size is None:  # the first bytes say it
            size = 4 + 5 * most
        first = next(decompressed(stored_parts(self.file, self.key), size, self.place), b"")
        count = int.from_bytes(first[:4], "little")
        if len(first) < 4 or count > most:
            raise InputError(f"says {count} bytes of a tensor of {most}", culprit=self.place)
        return count

    def _blocks(self, count: int) -> Iterator[Block]:
        positions, values = self._stream(count, 4), self._stream(count, 4 + 4 * count)
        for done in range(0, count, COUNT):
            size = min(COUNT, count - done)
            places = np.frombuffer(positions.take(4 * size), "<u4").astype(np.int64)
            yield places, np.frombuffer(values.take(size), np.uint8)[:, None]
        values.finish()

    def _stream(self, count: int, skipped: int) -> ByteStream:
        pieces = decompressed(stored_parts(self.file, self.key), 4 + 5 * count, self.place)
        stream = ByteStream(pieces, self.place)
        stream.skip(skipped)
        return stream


@dataclass(frozen=True)
class SparseChange(ForeignChange):
    """Numbers at positions, both uncompressed, flat and row by row.

    Attributes:
        stated: what the patch says of the tensor: dtype, and shape if it has one.
        positions, values: the names in the file; they are of one length.
        gaps: the positions are differences to the one before, less 1.
        sum_patch: begins a sum of positions and numbers, which is compared with `check`; None if there is none.
    """

    name: str
    place: str
    check: Checksum | None
    file: WeightsFile
    stated: TensorSpec
    positions: str
    values: str
    gaps: bool = False
    has_shape: bool = True
    sum_patch: Callable[[str], PatchSum] | None = None

    @property
    def nbytes(self) -> int:
        return self.file.specs[self.positions].nbytes + self.file.specs[self.values].nbytes

    def require(self, spec: TensorSpec) -> None:
        if self.stated.dtype != spec.dtype or (self.has_shape and self.stated.shape != spec.shape):
            stated = str(self.stated) if self.has_shape else self.stated.dtype
            raise InputError(f"is of {stated}, and the base's tensor is {spec}", culprit=self.place)
        if self.file.specs[self.values].size > spec.size:
            count = self.file.specs[self.values].size
            raise InputError(f"has {count} numbers of a tensor of {spec.size}", culprit=self.place)

    def applied(self, pieces: Pieces, spec: TensorSpec) -> Iterator[memoryview]:
        return scattered(pieces, self._blocks(), spec.nbytes, spec.nbytes // max(1, spec.size), self.place)

    def _blocks(self) -> Iterator[Block]:
        places, values = self.file.specs[self.positions], self.file.specs[self.values]
        width = values.nbytes // max(1, values.size)
        dtype = np.dtype({"I32": "<i4", "I64": "<i8", "U16": "<u2", "U32": "<u4"}[places.dtype])
        total, last = self.sum_patch(values.dtype) if self.sum_patch else None, -1
        for done in range(0, values.size, COUNT):
            size = min(COUNT, values.size - done)
            stored, numbers = np.empty(size, dtype), np.empty((size, width), np.uint8)
            self.file.read_bytes(self.positions, done * dtype.itemsize, stored.view("u1").data)
            self.file.read_bytes(self.values, done * width, numbers.reshape(-1).data)
            found = stored.astype(np.int64)
            if self.gaps:
                found = np.cumsum(found + 1) + last
                last = int(found[-1])
            if total:
                total.add(found, numbers)
            yield found, numbers
        if total and self.check and str(total) != self.check.digest:
            raise InputError("is damaged: its positions and numbers have another checksum", culprit=self.place)


class PatchSum:
    """prime-rl's sum: the exclusive or of all positions and numbers, each as 64 bits, as `torch.hash_tensor` has it.

    Integers are widened to 64 bits, floats to float64.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype, self._sum = dtype, 0

    def add(
        self,
        positions: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
        numbers: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    ) -> None:
        from ...numerics.forms import FORMS, wide

        flat = numbers.reshape(-1)
        if self._dtype in FORMS:
            form = FORMS[self._dtype]
            with np.errstate(invalid="ignore"):  # of a signalling NaN
                words = wide(flat.view(form.bits_type), form).view(np.uint64).copy()
            if form.itemsize < 8:  # processors make it quiet when they widen it
                words[(words & (2**63 - 1)) > 0x7FF << 52] |= 1 << 51
        else:
            words = flat.view(INTEGERS[self._dtype]).astype(np.int64).view(np.uint64)
        for each in (positions.view(np.uint64), words):
            self._sum ^= int(np.bitwise_xor.reduce(each))

    def __str__(self) -> str:
        return str(self._sum)


INTEGERS = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "I64": "<i8",
    "U64": "<u8",
}
