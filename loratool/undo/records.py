"""Write the undo record of some rows, and restore the rows from it.

A record belongs to a run of rows of one tensor. It is a sequence of cells of CELL_ROWS x CELL_COLUMNS, row by row of
cells, each of which can be read only after those before it: so a record streams on both sides. A cell is the packed
indices of its ambiguous weights (`undo.intervals`), a bit for each raw weight that says whether it is not zero, and the
bit patterns of those that are not. For float64, and for a tensor that was replaced, a cell is the difference between
W's bit patterns and a guess that the reader can make too, deflated.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..numerics.exact import Fill, RoundingStats, Workspace, round_once, tiles
from ..numerics.filtered import FilteredTile, Positions, Told
from .intervals import (
    FLOAT_FORMATS,
    Array,
    FloatFormat,
    ambiguous,
    ambiguous_scaled,
    candidates,
    decode,
    encode,
    finite,
    pack,
    perhaps_near_tie,
    unpack,
    widths,
)
from .intervals_float32 import Estimates

CELL_ROWS, CELL_COLUMNS = 128, 1024


RECORD = 1 << 22  # weights of a record, but at least the rows of two cells


SAMPLE = 1 << 14  # bytes that are deflated to see whether it pays


_FORMATS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def cell_rows(columns: int) -> int:
    """Return the rows of a cell: more if rows are shorter than a cell, so that a vector is not cut to pieces."""
    return max(CELL_ROWS, CELL_ROWS * CELL_COLUMNS // max(1, columns))


def record_rows(columns: int) -> int:
    """Return the rows of a record, a multiple of `cell_rows`."""
    rows = cell_rows(columns)
    return max(2 * CELL_ROWS, RECORD // max(1, columns)) // rows * rows or rows


def bit_patterns(x: Tensor) -> Array:
    """Return the bit patterns of a tensor as a flat array of integers."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(kind).flatten().cpu().numpy()


@dataclass(frozen=True)
class RecordedBlock:
    """The result of a recorded block: the merge's sums, the record's next bytes, and the hashes up to here."""

    change: RoundingStats
    payload: bytes
    sha256: tuple[str, str]  # of W and of W'


class Recorder:
    """Writes the record of some rows, block after block, as an `Observer` of each."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._form: FloatFormat | None = FLOAT_FORMATS[_FORMATS[dtype]] if dtype in _FORMATS else None
        self._parts: list[bytes] = []
        self._estimates: Estimates | None = None
        self._hashes = hashlib.sha256(), hashlib.sha256()

    def head(self, data: bytes) -> None:
        """Append bytes that the reader needs before the next cells."""
        self._parts.append(data)

    def witness(
        self, base: Tensor, out: Tensor, total: Tensor, c: Tensor, a: Tensor | None, ties: Tensor | None
    ) -> None:
        """Record a cell, as a `numerics.exact.Witness`."""
        weight, result = bit_patterns(base), bit_patterns(out)
        back = c.flatten().cpu().numpy()
        factor = None if a is None else a.expand(base.shape).flatten().cpu().numpy()
        if self._form is None:
            self._parts.append(_difference(weight, _codes_back(result, back, factor)))
            return
        at = _positions(result, weight, _perhaps(total, ties, self._form), back, factor, self._form)
        index, width, raw = encode(weight, candidates(result, factor, back, at, self._form), self._form)
        self._add(pack(index, width, [len(index)])[0], raw)

    def filtered(self, tile: FilteredTile) -> None:
        assert self._form
        rows = cell_rows(tile.before.shape[1])
        self._estimates = self._estimates or Estimates(self._form, rows, CELL_COLUMNS)
        self._estimates.add(tile)

    def wanted(self) -> tuple[Positions, Positions] | None:
        assert self._estimates
        return self._estimates.wanted()

    def settle(self, told: Told) -> None:
        assert self._estimates
        for packed, raw in self._estimates.encode(told):
            self._add(packed, raw)
        self._estimates = None

    def forget(self) -> None:
        self._estimates = None

    def _add(self, packed: bytes, raw: Array) -> None:
        self._parts.append(packed + np.packbits(raw != 0, bitorder="little").tobytes() + raw[raw != 0].tobytes())

    def difference(self, weight: Array, result: Array) -> None:
        """Record a block of a tensor whose values were replaced, as a difference."""
        self._parts.append(_difference(weight, result))

    def take(self, change: RoundingStats, base: Tensor, out: Tensor) -> RecordedBlock:
        """Hash a block, W in `base` and W' in `out`, and return it with the bytes recorded for it."""
        for digest, block in zip(self._hashes, (base, out), strict=True):
            digest.update(block.contiguous().view(torch.uint8).cpu().numpy().data)
        payload = b"".join(self._parts)
        self._parts.clear()
        first, second = self._hashes
        return RecordedBlock(change, payload, (first.hexdigest(), second.hexdigest()))


def _perhaps(total: Tensor, ties: Tensor | None, form: FloatFormat) -> Array:
    """Return the flat positions of sums that can be near a midpoint."""
    return perhaps_near_tie(total.flatten().cpu().numpy(), form) if ties is None else ties.cpu().numpy()


def _positions(result: Array, like: Array, perhaps: Array, c: Array, a: Array | None, form: FloatFormat) -> Array:
    if a is None:
        return ambiguous(result, like, perhaps, c, form)
    return ambiguous_scaled(result, a, c, form)


def _codes_back(result: Array, c: Array, a: Array | None) -> Array:
    """Return the W of float64 that there would be without rounding, as bit patterns."""
    value = result.view(np.float64)
    with np.errstate(all="ignore"):
        back = value - c if a is None else (value - c) / a
    return np.where(np.isfinite(value) & (c != 0 if a is None else True), back, value).view(np.int64)


def _difference(weight: Array, guess: Array) -> bytes:
    """Encode weight - guess: kind and length, then its bytes deflated plane by plane, or the weights if shorter."""
    with np.errstate(over="ignore"):
        delta = weight - guess
    planes = delta.view(np.uint8).reshape(-1, delta.itemsize).T.tobytes()
    tried = zlib.compress(planes[-SAMPLE:], 1)
    worth = (
        len(planes) <= SAMPLE or len(tried) < 0.9 * SAMPLE
    )  # the sample is of the highest bytes; deflating noise is slow
    packed = zlib.compress(planes, 1) if worth else planes
    kind, data = (1, packed) if len(packed) < weight.nbytes else (0, weight.tobytes())
    return bytes([kind]) + len(data).to_bytes(4, "little") + data


@dataclass(frozen=True)
class Doubted:
    """The result of a block from which an update was subtracted without a record."""

    change: RoundingStats
    doubtful: int  # weights that can be wrong
    farthest: int  # by at most so many ulps


class Doubter:
    """Counts the weights that can be wrong when an update is subtracted without a record."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._form: FloatFormat | None = FLOAT_FORMATS[_FORMATS[dtype]] if dtype in _FORMATS else None
        self.doubtful, self.farthest = 0, 0

    def witness(
        self, base: Tensor, out: Tensor, total: Tensor, c: Tensor, a: Tensor | None, ties: Tensor | None
    ) -> None:
        """Count a tile from which -c was subtracted: base is W', out the resulting W."""
        change = -c.flatten().cpu().numpy()
        if self._form is None:
            self.doubtful += int((change != 0).sum())
            self.farthest = max(self.farthest, int(bool(self.doubtful)))
            return
        result = bit_patterns(base)
        at = ambiguous(result, bit_patterns(out), _perhaps(total, ties, self._form), change, self._form)
        found = candidates(result, None, change, at, self._form)
        self.doubtful += int((found.most > 0).sum() + found.raw.sum())
        self.farthest = max(self.farthest, int(found.most.max(initial=0)))


class Reader:
    """Reads a record's bytes from front to back."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) < count:
            raise ValueError("ends too early")
        self._at += count
        return part

    @property
    def rest(self) -> int:
        return len(self._data) - self._at


class Restorer:
    """Restores some rows from their record, block after block, and checks them against its hashes."""

    def __init__(self, name: str, dtype: torch.dtype, data: bytes, sha256: tuple[str, str]) -> None:
        self._name, self._dtype, self._expected = name, dtype, sha256
        self._form: FloatFormat | None = FLOAT_FORMATS[_FORMATS[dtype]] if dtype in _FORMATS else None
        self._reader = Reader(data)
        self._hashes = hashlib.sha256(), hashlib.sha256()

    @contextmanager
    def damage(self) -> Iterator[None]:
        """Raise an InputError for any error of reading: the record is damaged, or belongs to other files."""
        try:
            yield
        except (ValueError, zlib.error, IndexError) as error:
            raise InputError(
                f"cannot be restored: its record {error}; the merged file, an adapter or the undo file is another",
                culprit=self._name,
            ) from error

    def skip(self, head: bytes) -> None:
        """Skip bytes before the first block that are known already."""
        self._reader.take(len(head))

    def numbers(self, count: int) -> Array:
        """Read float64 numbers that precede a block's cells."""
        return np.frombuffer(self._reader.take(8 * count), np.float64)

    def replaced(self, merged: Tensor, out: Tensor) -> None:
        """Write W into `out`, for a block whose values were replaced."""
        restored = torch.from_numpy(self.difference(bit_patterns(merged)))
        out.copy_(restored.view(self._dtype).view(out.shape))

    def block(self, merged: Tensor, fill: Fill, out: Tensor, work: Workspace) -> None:
        """Write W into `out` from W', `merged`, for the rows that `fill` belongs to. Both: (rows, n), of one dtype."""
        for columns in tiles(merged, work, CELL_COLUMNS):
            tile = merged[:, columns]
            change, total = (work.take(name, torch.float64, *tile.shape) for name in ("change", "total"))
            factor = fill(columns, change, total)
            result, c = bit_patterns(tile), change.flatten().cpu().numpy()
            a = None if factor is None else factor.expand(tile.shape).flatten().cpu().numpy()
            out[:, columns] = (
                torch.from_numpy(self._cell(tile, total, result, c, a, factor, change, work))
                .view(self._dtype)
                .view(tile.shape)
            )

    def _cell(
        self,
        tile: Tensor,
        total: Tensor,
        result: Array,
        c: Array,
        a: Array | None,
        factor: Tensor | None,
        change: Tensor,
        work: Workspace,
    ) -> Array:
        if self._form is None:
            return self.difference(_codes_back(result, c, a))
        total.copy_(tile).sub_(change)
        if factor is not None:
            total.div_(factor)
        rounded = work.take("rounded", tile.dtype, *tile.shape)
        ties = round_once(total, rounded, work)
        guess = bit_patterns(rounded).copy()
        guess[~finite(guess, self._form)] &= ~(1 << self._form.mantissa)  # a sum just above the largest number
        same = ~finite(result, self._form)
        if a is None:
            same |= c == 0
        guess[same] = result[same]
        at = _positions(result, guess, _perhaps(total, ties, self._form), c, a, self._form)
        found = candidates(result, a, c, at, self._form)
        width = widths(found.most[found.most > 0])
        index = unpack(self._reader.take((int(width.sum()) + 7) // 8), width)
        count = int(found.raw.sum())
        raw = np.zeros(count, self._form.code)
        flags = np.frombuffer(self._reader.take((count + 7) // 8), np.uint8)
        nonzero = np.unpackbits(flags, count=count, bitorder="little").astype(bool)
        size = int(nonzero.sum()) * raw.itemsize
        raw[nonzero] = np.frombuffer(self._reader.take(size), self._form.code)
        return decode(guess, found, index, raw, self._form)

    def difference(self, guess: Array) -> Array:
        """Read bit patterns from their difference to `guess`."""
        kind, length = self._reader.take(1)[0], int.from_bytes(self._reader.take(4), "little")
        data = self._reader.take(length)
        if kind != 0:
            data = zlib.decompressobj().decompress(
                data, guess.nbytes
            )  # bounded, so a deflate bomb is cut short, and fails its hash
        if len(data) != guess.nbytes:
            raise ValueError(f"has {len(data)} bytes for {guess.nbytes}")
        if kind == 0:
            return np.frombuffer(data, guess.dtype).copy()
        planes = np.frombuffer(data, np.uint8).reshape(guess.itemsize, -1)
        delta = np.ascontiguousarray(planes.T).view(guess.dtype).reshape(-1)
        with np.errstate(over="ignore"):
            return guess + delta

    def check(self, restored: Tensor, merged: Tensor, last: bool) -> None:
        """Hash the blocks as they pass; after the last, raise InputError if a hash is not that of the merge."""
        for digest, block in zip(self._hashes, (restored, merged), strict=True):
            digest.update(block.contiguous().view(torch.uint8).cpu().numpy().data)
        if not last:
            return
        if self._hashes[1].hexdigest() != self._expected[1]:
            raise InputError("is not what the merge wrote: the merged file was edited since", culprit=self._name)
        if self._hashes[0].hexdigest() != self._expected[0] or self._reader.rest:
            raise InputError("does not come back as it was: the undo file or an adapter is another", culprit=self._name)
