"""Write the undo record of some rows, and restore the rows from it.

A record is one string of bits for a fixed span of complete rows, the lowest bit of each byte first. Zeros pad the last
byte. The weights follow each other row by row. The run of a weight (`undo.candidates`) decides what is stored of it:

- a run of one number: nothing;
- a run that counts as every number: a bit that is set if W is +0.0, and else W's bit pattern;
- any other run: W's place in the run, in ceil(log2(count)) bits.

All bits about +0.0 come first. Then the places follow as bit planes: the lowest bit of each, the next bit of those in
runs of more than two numbers, and so on. This is as short as one place after the other, and four times as fast to
write.

For float64, and for tensors that were replaced, a record is the difference between W's place and one that the reader
computes too (`undo.differences`). Weights that are stored as codes have differences too (`CodedRows`). Where an update
mixes the numbers of W, as a rotation does, W' does not bound a single W. Then W is predicted, as RN(W' - E) with E by
the inverse matrices, and a record has the steps from there, by one of the bodies of a patch. DoRA's norms (in
float64) and scales among the codes come before the data that depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..durable.fileio import word_sum
from ..durable.journal import StoredBytes
from ..errors import InputError
from ..files.codecs.codec import CodeFormat, Parts
from ..numerics.arrays import Array, Numbers, bytes_of, empty, fetched, narrow, positions, put, sent, take, widen
from ..numerics.code_grid import guess_codes
from ..numerics.code_levels import Codes
from ..numerics.decide import LEAST, Reals, decide
from ..numerics.dense import Bounds, DenseRows, each_number, mask_apart, midpoints
from ..numerics.forms import (
    F64,
    Bits,
    Form,
    IntArray,
    Positions,
    Wide,
    number,
    place,
    wide,
)
from ..numerics.merge import TOGETHER, RowMerge, Tile
from ..numerics.passes.blocks import EVERY, RunEntries, restore_block
from ..numerics.rounding_stats import RoundingStats
from ..numerics.stored import Negated
from ..numerics.workspace import Workspace
from ..patches.bodies.steps import pack_steps, unpack_steps
from .candidates import Runs, every, find_runs
from .differences import Reader, pack_code_differences, pack_differences

EDITED = "is not what the merge wrote: the merged file was edited since"
NOT_RESTORED = "is not restored exactly: the merged file, the undo file or an adapter is not that of the merge"

ASKED = 1 << 19  # runs that are computed at a time, which bounds the memory

_NO_BITS = np.zeros(0, np.bool_)


@dataclass(frozen=True)
class RecordedBlock:
    """The record of a block.

    Attributes:
        change: the merge's sums.
        payload: the record; `StoredBytes` once it is in the journal.
        sum: `durable.fileio.word_sum` of the bytes of W', or of the codes that W became. A sum is enough, since hashes
            protect W, and W' is a function of W.
    """

    change: RoundingStats
    payload: bytes | StoredBytes
    sum: int


@dataclass(frozen=True)
class _Asked:
    """Weights of a block whose runs may have several numbers, and approximations of their D."""

    flat: Positions | None  # flat positions, rising; None for all
    change: npt.NDArray[Any]  # D in the GEMM's type, nan where nothing is known
    reach: float | Wide  # of each matrix, or of all

    def parts(self) -> Iterator[tuple[Positions, npt.NDArray[Any]]]:
        """Yield positions and D of at most ASKED weights at a time, which bounds the memory."""
        for start in range(0, len(self.change), ASKED):
            some = self.change[start : start + ASKED]
            yield np.arange(start, start + len(some)) if self.flat is None else self.flat[start : start + ASKED], some


@dataclass(frozen=True)
class CodedRows:
    """Rows of a weight that is stored as codes, from row `start` on, as a `numerics.code_grid.CodeGrid`.

    Neighboring codes mean numbers far apart, so the code nearest to W' - D is nearly always W's.

    Attributes:
        parts: the weight; only `read` uses its codes.
        start: a row of `columns` numbers, which is one or more rows of the codec.
    """

    parts: Parts
    start: int
    columns: int

    @property
    def format(self) -> CodeFormat:
        return self.parts.weight.format

    @property
    def fold(self) -> int:
        """The number of the codec's rows in a row."""
        return self.columns // self.parts.weight.spec.shape[-1]

    def nearest(self, row: int, numbers: Wide) -> Codes:
        apart = numbers.reshape(len(numbers) * self.fold, -1)
        return self.format.nearest(self.parts, (self.start + row) * self.fold, apart).reshape(numbers.shape)

    def values(self, row: int, codes: Codes) -> Wide:
        apart = codes.reshape(len(codes) * self.fold, -1)
        return self.format.values(self.parts, (self.start + row) * self.fold, apart).reshape(codes.shape)

    def ordinals(self, codes: Codes) -> IntArray:
        return self.format.ordinals(self.parts, codes)

    def from_ordinals(self, ordinals: IntArray) -> Codes:
        return self.format.from_ordinals(self.parts, ordinals)

    def read(self, count: int) -> Codes:
        """Return the codes of `count` rows in the codec's shape, (count * fold, width)."""
        return self.format.codes(self.parts, self.start * self.fold, (self.start + count) * self.fold)

    def without_padding(self, codes: Codes) -> Codes:
        """Return codes in the shape of `read` as (rows, columns), without padding."""
        columns = self.parts.weight.spec.shape[-1]
        return np.ascontiguousarray(codes[:, :columns]).reshape(-1, self.columns)

    def with_padding(self, padding: Codes) -> CodedRows:
        """Return the rows with their scales taken from this padding, if the format has scales there."""
        return replace(self, parts=self.format.with_padding(self.parts, self.start * self.fold, padding))

    def padding(self, codes: Codes) -> Codes:
        return codes[:, self.columns // self.fold :]

    def pack(self, codes: Codes, guess: Codes) -> bytes:
        """Return the differences between codes, in the shape of `read`, and a guess, (rows, columns), as bytes.

        Codes whose guess is the code of 0 are in a separate list: they are +0 or -0, while other codes nearly always
        equal the guess. Padding with scales is not included, since the guess depends on it.
        """
        stored, near = self.without_padding(codes).reshape(-1), guess.reshape(-1)
        apart, differing = np.zeros(len(stored), np.int16), np.flatnonzero(stored != near)
        apart[differing] = self.ordinals(stored.take(differing)) - self.ordinals(near.take(differing))
        zero = near == self.format.zero(self.parts)
        lists = [apart[~zero], apart[zero]]
        if not self.format.padding_has_scales:
            lists.append(self.padding(codes).astype(np.int16).reshape(-1))
        return b"".join(map(pack_code_differences, lists))

    def unpack(self, reader: Reader, guess: Codes, padding: Codes | None = None) -> Codes:
        """Return the codes that `pack` packed, (rows * fold, width).

        Args:
            padding: the original one, if it has scales.

        Raises:
            ValueError, IndexError: the record is damaged, or was packed with another guess.
        """
        zero = guess.reshape(-1) == self.format.zero(self.parts)
        apart = np.empty(guess.size, np.int16)
        apart[~zero] = reader.code_differences(int((~zero).sum()))
        apart[zero] = reader.code_differences(int(zero.sum()))
        flat, differing = guess.reshape(-1).copy(), np.flatnonzero(apart)
        flat[differing] = self.from_ordinals(self.ordinals(flat.take(differing)) + apart.take(differing))
        codes = flat.reshape(len(guess) * self.fold, -1)
        if padding is None:
            padding = reader.code_differences(len(codes) * (self.format.width(self.parts) - codes.shape[1]))
        return np.concatenate((codes, padding.astype(codes.dtype).reshape(len(codes), -1)), axis=1)

    def read_scales(self, reader: Reader, count: int) -> Codes | None:
        """Read the padding of `count` rows, which precedes the bytes of `pack`; return None if it has no scales."""
        if not self.format.padding_has_scales:
            return None
        size = self.format.width(self.parts) - self.columns // self.fold
        return np.frombuffer(reader.take(count * self.fold * size), np.uint8).reshape(-1, size)


class Recorder:
    """Writes the records of one block, as a `numerics.merge.Watcher` of its merge.

    Args:
        form: of W.
        rows: W's rows if it is stored as codes, else None.
        work: a workspace, needed with `rows`.
        matrices: how many matrices the block has, one below the other, each with its own record. A block of several
            has neither codes nor norms.
    """

    def __init__(
        self, form: Form, rows: CodedRows | None = None, work: Workspace | None = None, matrices: int = 1
    ) -> None:
        self._form, self._rows, self._work = form, rows, work
        self._codes: Codes | None = None
        self._found: list[tuple[Positions | None, npt.NDArray[Any]]] = []
        self._payloads = [b""] * matrices

    def head(self, norms: Wide) -> None:
        """Write norms at the start of the record."""
        self._payloads[0] += norms.astype("<f8").tobytes()

    @property
    def needs_tiles(self) -> bool:
        return bool(self._rows) or self._form.precision == 53

    def tile(self, tile: Tile, dense: DenseRows) -> None:
        if self._form.precision == 53 or self._rows:
            return
        change, shift = tile.change.reshape(-1), tile.shift
        if not isinstance(shift, (int, float)):  # a number for each row
            change = (tile.change - shift).reshape(-1)
            shift = 0.0
        if tile.ties is not None:
            change[tile.undecided] = np.nan  # all others are exact
        hit = None
        if dense.factor is None:
            hit = may_have_several(tile.out, tile.base, tile.hit)
            if tile.ties is not None:
                hit |= tile.ties
        self._found.append(_taken(hit, change, shift, tile.start))

    def block(self, base: Numbers, out: Numbers, x: Reals, first: int, dense: DenseRows, bounds: Bounds) -> None:
        if self._rows:
            self._record_codes(out, x, first)
        elif self._form.precision == 53:
            apart = place(take_all(base), self._form) - place(guess_double(out, x, first), self._form)
            for k, difference in enumerate(apart.reshape(len(self._payloads), -1)):
                self._payloads[k] += pack_differences(difference)
        else:
            asked = _Asked(*_joined(self._found), reach_of(dense, bounds, first, len(base)))
            self._record_runs(base, out, x, first, asked)

    def passed(self, base: Numbers, out: Numbers, x: Reals, first: int, entries: RunEntries) -> None:
        for some, flat, runs in _find_unknown(entries, out, x, first, self._form):
            code = take(base, flat)
            places = place(code, self._form) - runs.start
            entries.index[some] = np.where(runs.count == every(self._form), code, places)
        self._payloads = [head + packed for head, packed in zip(self._payloads, entries.pack(), strict=True)]

    def _record_runs(self, base: Numbers, out: Numbers, x: Reals, first: int, asked: _Asked) -> None:
        """Record W's places in their runs, of all matrices at once, split at the end of each matrix."""
        size = base.size // len(self._payloads)
        edges = np.arange(len(self._payloads) + 1) * size  # flat positions in the block
        flags, index, count = [], [], []  # flags: bits, and how many of them are before each edge
        ends = np.zeros_like(edges)  # places in longer runs before each edge
        for part in asked.parts():
            flat, _, runs = _runs_of(out, x, first, *part, asked.reach, self._form, size)
            bits = take(base, flat)
            uncounted = np.flatnonzero(runs.count == every(self._form))
            is_zero, inside = bits.take(uncounted) == 0, np.searchsorted(flat, edges)
            flags.append((is_zero, np.searchsorted(uncounted, inside)))
            runs.count[uncounted[is_zero]] = 1  # which needs no more bits
            many = np.flatnonzero(runs.count > 1)
            bits, numbers = bits.take(many), runs.count.take(many)
            places = place(bits, self._form) - runs.start.take(many)
            raw = np.flatnonzero(numbers == every(self._form)) if len(uncounted) else uncounted
            places[raw] = bits.take(raw).view(f"u{bits.itemsize}")
            index.append(places)
            count.append(numbers)
            ends += np.searchsorted(many, inside)
        flags += _planes(_together(index), _together(count), ends)
        for k in range(len(self._payloads)):
            planes = [part[cuts[k] : cuts[k + 1]] for part, cuts in flags]
            self._payloads[k] += np.packbits(np.concatenate([*planes, _NO_BITS]), bitorder="little").tobytes()

    def difference(self, base: Numbers, out: Numbers) -> None:
        """Record a block whose values were replaced, or of codes that were dequantized without an update."""
        if self._rows:
            self._record_codes(out, None, 0)
        else:
            self._payloads[0] += pack_differences(place(take_all(base), self._form) - place(take_all(out), self._form))

    def predicted(self, base: Numbers, out: Numbers, undone: Reals, work: Workspace) -> None:
        """Record a block whose numbers mix. undone: what to subtract from W' to be near W."""
        if self._rows:
            self._record_codes(out, undone, 0)
        elif self._form.precision == 53:
            apart = place(take_all(base), self._form) - place(guess_double(out, undone, 0), self._form)
            self._payloads[0] += pack_differences(apart)
        else:
            self._payloads[0] += pack_steps(_predicted(out, undone, self._form, work), take_all(base), self._form)

    def _record_codes(self, out: Numbers, x: Reals | None, first: int) -> None:
        assert self._rows and self._work
        rows, self._codes = self._rows, self._rows.read(len(out))
        if rows.format.padding_has_scales:
            self._payloads[0] += rows.padding(self._codes).tobytes()
            rows = rows.with_padding(rows.padding(self._codes))
        if rows.format.mixes:
            x = None
        self._payloads[0] += rows.pack(self._codes, guess_codes(out, x, first, rows, self._work))

    def result(self, change: RoundingStats, out: Numbers) -> RecordedBlock:
        """Return the `RecordedBlock` of a block of one matrix, W' in `out`."""
        return self.results([change], out)[0]

    def results(self, changes: Sequence[RoundingStats], out: Numbers) -> list[RecordedBlock]:
        """Return the `RecordedBlock` of each matrix of a block, W' in `out`."""
        written = bytes_of(out.host())
        length = len(written) // len(changes)
        sums = (word_sum(written[k * length : (k + 1) * length]) for k in range(len(changes)))
        return [RecordedBlock(*each) for each in zip(changes, self._payloads, sums, strict=True)]


def record_recoded(rows: CodedRows, former: Codes, written: Codes, change: RoundingStats) -> RecordedBlock:
    """Return the `RecordedBlock` of rows that were rounded to codes: the former codes' differences to the new ones.

    Args:
        former, written: in the shape of `CodedRows.read`.
    """
    return RecordedBlock(change, rows.pack(former, rows.without_padding(written)), word_sum(bytes_of(written)))


def take_all(x: Numbers) -> Bits:
    """Return all bit patterns, flat."""
    return x.host().reshape(-1)


def _together(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _joined(parts: list[tuple[Positions | None, npt.NDArray[Any]]]) -> tuple[Positions | None, npt.NDArray[Any]]:
    positions = [flat for flat, _ in parts if flat is not None]
    change = np.concatenate([change for _, change in parts])
    parts.clear()
    return np.concatenate(positions) if positions else None, change


@np.errstate(all="ignore")
def _taken(hit: Array | None, change: Array, shift: float, start: int) -> tuple[Positions | None, npt.NDArray[Any]]:
    """Return the block positions where a tile's mask is set, None for all, and D there. start: of the tile."""
    flat = None if hit is None else positions(hit)
    if flat is None:
        D: npt.NDArray[Any] = fetched(change).copy()
    else:
        D = fetched(change.take(sent(flat, change)))
        flat += start
    if math.isfinite(shift):
        D -= D.dtype.type(shift)
    else:
        D.fill(np.nan)
    return flat, D


def may_have_several(result: Numbers, like: Numbers, near: Array) -> Array:
    """Return a mask of weights whose runs may have several numbers: `near`, or |W| <= the power of two of |W'|.

    Where |W| is above that power of two, the steps of both grids are equal. A second number then needs both ends of
    the cell to be on the grid. That is a tie, and no step with an error bound above 0 decides a tie.
    """
    form = result.form
    exponent = form.size & -(1 << (form.precision - 1))
    near |= (result.bits & form.bits_type(exponent)) >= (like.bits & form.bits_type(form.size))
    return near


def reach_of(dense: DenseRows, bounds: Bounds, first: int, rows: int) -> float | Wide:
    """Return a bound on the error of a block's D after the shift is subtracted, one for each matrix."""
    if bounds.apart:
        return 0.0
    here, matrices = slice(first, first + rows), dense.matrices
    size, error = (x[here].reshape(matrices, -1).max(1, initial=0.0) for x in (dense.delta.sizes, dense.delta.errors))
    shift = each_number(bounds.shift, matrices)
    reach: Wide = 1.02 * error + 8 * dense.unit * (size + shift) + (2.0**-100 if dense.single else LEAST)
    return float(reach[0]) if matrices == 1 else reach


def _runs_of(
    out: Numbers,
    x: Reals,
    first: int,
    flat: Positions,
    change: npt.NDArray[Any],
    reach: float | Wide,
    form: Form,
    size: int = 0,
) -> tuple[Positions, Positions, Runs]:
    """Return the positions of weights with a finite W', the positions of the others, and the runs of the finite ones.

    Args:
        size: weights of a matrix, if each matrix has its own reach.
    """
    result, not_finite = take(out, flat), flat[:0]
    infinite = (result & form.size) >= form.inf
    if infinite.any():
        not_finite = flat[infinite]
        flat, result, change = (y[~infinite] for y in (flat, result, change))
    if isinstance(reach, np.ndarray):
        reach = reach.astype(change.dtype).take(flat // size)
    return flat, not_finite, find_runs(x, result, flat, first, out.shape[1], change, reach, form)


def _find_unknown(
    entries: RunEntries, result: Numbers, x: Reals, first: int, form: Form
) -> Iterator[tuple[Positions, Positions, Runs]]:
    """Find the runs that a compiled pass did not, and set their counts; an infinite W' has nothing to store.

    Yields:
        entries whose runs are now known, the positions of their weights, and their runs.
    """
    for some, flat in entries.unknown():
        nothing = np.full(len(flat), np.nan)
        known, _, runs = _runs_of(result, x, first, flat, nothing, np.inf, form)
        entries.count[some] = 1
        some = some[np.searchsorted(flat, known)]
        entries.count[some] = np.where(runs.count == every(form), EVERY, runs.count)
        yield some, known, runs


def _planes(index: IntArray, count: IntArray, ends: Positions) -> Iterator[tuple[npt.NDArray[np.bool_], Positions]]:
    """Yield bit planes: the lowest bits of all places, the next bits of those in runs of more than two numbers, ...

    Args:
        ends: indices into the places, in rising order. With each plane comes how many bits precede each end in it.
    """
    bit = 0
    while len(some := np.flatnonzero(count > 1 << bit)):
        if len(some) < len(count):
            index, count, ends = index.take(some), count.take(some), np.searchsorted(some, ends)
        yield (index >> bit) & 1 == 1, ends
        bit += 1


def _predicted(merged: Numbers, undone: Reals, form: Form, work: Workspace) -> Bits:
    """Return RN(W' - E) as bit patterns, flat. undone: E."""
    guess = Numbers(empty(form.bits_type, *merged.shape, like=merged.bits), form)
    RowMerge(Reals(Negated(undone.delta)), merged.form, form, merged.bits).apply(merged, 0, guess, work)
    return take_all(guess)


def guess_double(merged: Numbers, x: Reals, first: int) -> Bits:
    """Return a guess of a float64 W that writer and reader both compute: RN(W' - D), or W' if a is not 1."""
    form, bits = merged.form, take_all(merged)
    guess: Bits = wide(bits, form).view(np.int64).copy()
    if not x.factor:
        finite = np.flatnonzero((bits & form.size) < form.inf)
        for start in range(0, len(finite), TOGETHER):
            some = finite[start : start + TOGETHER]
            guess[some] = _without_delta(merged, some, x, first, F64)
    return guess


def _without_delta(merged: Numbers, flat: Positions, x: Reals, first: int, to: Form) -> Bits:
    """Return RN(W' - D) of finite weights at flat positions of a block."""
    form, i = merged.form, flat // merged.shape[1]
    return decide(replace(x, sign=-1), take(merged, flat), form, i + first, flat - i * merged.shape[1], to)


@dataclass(frozen=True)
class Doubted:
    """The result of subtracting an update from a block without a record.

    Attributes:
        change: with the weights that overflowed.
        doubtful: how many weights can be wrong.
        farthest: by how many ulps at most.
    """

    change: RoundingStats
    doubtful: int
    farthest: int


def subtract(merged: Numbers, x: Reals, out: Numbers, work: Workspace) -> Doubted:
    """Write RN(W' - D) into `out`, both (rows, n), the rows of `x`, which is additive."""
    form = merged.form
    if form.precision == 53:
        guess = guess_double(merged, x, 0)
        _put_all(guess, out)
        doubtful = int(np.count_nonzero(guess != take_all(merged)))
        farthest = 1 + bool(doubtful)
    else:
        asked, doubtful, farthest = go_back(merged, x, out, work), 0, 1
        for part in asked.parts():
            flat, not_finite, runs = _runs_of(merged, x, 0, *part, asked.reach, form)
            put(out, not_finite, take(merged, not_finite))
            put(out, flat, _without_delta(merged, flat, x, 0, form))
            doubtful += int((runs.count > 1).sum())
            farthest = max(farthest, int(runs.count[runs.count < every(form)].max(initial=1)))
    overflowed = positions(~out.is_finite() & merged.is_finite())
    largest = float(np.abs(wide(take(merged, overflowed), form)).max(initial=0.0))
    return Doubted(RoundingStats(overflowed=len(overflowed), largest=2 * largest), doubtful, farthest - 1)


def _put_all(bits: Bits, out: Numbers) -> None:
    out.bits[...] = sent(bits.reshape(out.shape), out.bits)


class Restorer:
    """Restores some rows from their record, and checks the merged ones against its sum.

    Args:
        form: of W.
        rows: W's rows if codes are to be restored, else None.
    """

    def __init__(self, name: str, form: Form, data: bytes, sum: int, rows: CodedRows | None = None) -> None:
        self._name, self._form, self._rows, self._sum = name, form, rows, sum
        self._reader = Reader(data)

    @contextmanager
    def damage(self) -> Iterator[None]:
        """Convert errors of the block into an InputError: the record is damaged, or belongs to other files."""
        try:
            yield
        except (ValueError, IndexError) as error:
            raise InputError(
                f"cannot be restored: its record {error}; the merged file, an adapter or the undo file is not that of "
                "the merge",
                culprit=self._name,
            ) from error

    def norms(self, count: int) -> Wide:
        """Read the norms at the start of the record."""
        norms = np.frombuffer(self._reader.take(8 * count), "<f8").astype(np.float64)
        if not np.isfinite(norms).all():
            raise ValueError("has invalid norms")
        return norms

    def replaced(self, merged: Numbers, out: Any, work: Workspace) -> None:
        """Write W into `out`, for a block that `Recorder.difference` recorded."""
        if self._rows:
            self._to_codes(self._rows, merged, None, out, work)
        else:
            self._from_guess(take_all(merged), out)

    def _to_codes(self, rows: CodedRows, merged: Numbers, x: Reals | None, out: Codes, work: Workspace) -> None:
        padding = rows.read_scales(self._reader, len(merged))
        if padding is not None:
            rows = rows.with_padding(padding)
        if rows.format.mixes:
            x = None
        _put_codes(rows.unpack(self._reader, guess_codes(merged, x, 0, rows, work), padding), out)

    def _from_guess(self, guess: Bits, out: Numbers) -> None:
        differences = self._reader.differences(len(guess), self._form.bits_type)
        restored = number(place(guess, self._form) + differences, self._form)
        _put_all(restored, out)

    def block(self, merged: Numbers, x: Reals, out: Any, work: Workspace) -> None:
        """Write W, or its codes, into `out` from W', `merged`, both (rows, n), with the rows of `x`."""
        if self._rows:
            return self._to_codes(self._rows, merged, x, out, work)
        if self._form.precision == 53:
            return self._from_guess(guess_double(merged, x, 0), out)
        if entries := restore_block(x, merged, out, work):
            return self._from_entries(entries, merged, x, out)
        asked = go_back(merged, x, out, work)
        data, read, all_numbers = self._reader.bits(), 0, every(self._form)
        longer: list[tuple[Positions, IntArray, IntArray]] = []
        for part in asked.parts():
            flat, not_finite, runs = _runs_of(merged, x, 0, *part, asked.reach, self._form)
            put(out, not_finite, take(merged, not_finite))
            put(out, flat, number(runs.start, self._form))
            uncounted = np.flatnonzero(runs.count == all_numbers)
            is_zero = data[read : read + len(uncounted)]
            if len(is_zero) < len(uncounted):
                raise ValueError("ends too early")
            read += len(uncounted)
            runs.count[uncounted[is_zero]] = 1
            put(out, flat[uncounted[is_zero]], np.zeros(int(is_zero.sum()), self._form.bits_type))
            many = np.flatnonzero(runs.count > 1)
            longer.append((flat.take(many), runs.start.take(many), runs.count.take(many)))
        columns = zip(*longer, strict=True) if longer else [()] * 3
        flat, start, count = (_together(column) for column in columns)
        index = _from_planes(data[read:], count)
        raw: Bits = index.astype(f"u{np.dtype(self._form.bits_type).itemsize}").view(self._form.bits_type)
        put(out, flat, np.where(count == all_numbers, raw, number(start + index, self._form)))

    def predicted(self, merged: Numbers, undone: Reals, out: Any, work: Workspace) -> None:
        """Write W, or its codes, into `out`, for a block that `Recorder.predicted` recorded."""
        if self._rows:
            self._to_codes(self._rows, merged, undone, out, work)
        elif self._form.precision == 53:
            self._from_guess(guess_double(merged, undone, 0), out)
        else:
            guess = _predicted(merged, undone, self._form, work)
            _put_all(unpack_steps(guess, self._reader.take(self._reader.rest), self._form), out)

    def _from_entries(self, entries: RunEntries, merged: Numbers, x: Reals, out: Numbers) -> None:
        for some, _, runs in _find_unknown(entries, merged, x, 0, self._form):
            entries.index[some] = runs.start
        data = self._reader.take(self._reader.rest)
        read = entries.put(data, out)
        if 8 * len(data) - read >= 8 or (read % 8 and data[-1] >> read % 8):
            raise ValueError("is longer than it should be")

    def recoded(self, written: Codes, out: Codes) -> None:
        """Write the former codes into `out` from those that a merge wrote, both in the shape of `CodedRows.read`."""
        assert self._rows
        padding = self._rows.padding(written) if self._rows.format.padding_has_scales else None
        _put_codes(self._rows.unpack(self._reader, self._rows.without_padding(written), padding), out)

    def check(self, merged: Numbers | Codes) -> None:
        """Raise InputError unless the merge wrote these rows, and their record is used up."""
        if word_sum(bytes_of(merged.host() if isinstance(merged, Numbers) else merged)) != self._sum:
            raise InputError(EDITED, culprit=self._name)
        if self._reader.rest:
            raise InputError(NOT_RESTORED, culprit=self._name)


def _put_codes(restored: Codes, out: Codes) -> None:
    out[...] = restored.view(out.dtype).reshape(out.shape)


def _from_planes(data: npt.NDArray[np.bool_], count: IntArray) -> IntArray:
    """Return the places that `_planes` yielded.

    Raises:
        ValueError: the bits are too few, or a byte or more is left over.
    """
    places, read, bit = np.zeros(len(count), np.int64), 0, 0
    while len(some := np.flatnonzero(count > 1 << bit)):
        if read + len(some) > len(data):
            raise ValueError("ends too early")
        places[some] |= data[read : read + len(some)].astype(np.int64) << bit
        read, bit = read + len(some), bit + 1
    if len(data) - read >= 8 or data[read:].any():
        raise ValueError("is longer than it should be")
    return places


@np.errstate(all="ignore")
def go_back(merged: Numbers, x: Reals, out: Numbers, work: Workspace) -> _Asked:
    """Write RN(W' - D) into `out` where it is certainly W, and return all other weights."""
    dense = DenseRows(x, merged.form, merged.form, merged.bits)
    bounds = dense.bounds(merged, 0, backward=True)
    both = bounds.shift + bounds.span
    parts: list[tuple[Positions | None, npt.NDArray[Any]]] = []
    height = dense.height(merged)
    for row in range(0, len(merged), height):
        here = slice(row, row + height)
        result, weight = merged[here], out[here]
        upper, change, squared = dense.fill(result, row, bounds.shift, work)
        hit = None
        if dense.factor is None and math.isfinite(both):
            widen(result, upper)
            upper -= change
            if bounds.apart:
                narrow(upper, weight)
                hit = mask_apart(result, row, bounds.apart, work)
                change[hit] = np.nan
                hit |= midpoints(upper, work)
            else:
                upper += both
                hit = dense.settle(upper, replace(bounds, span=2 * both), weight, work)
            hit = may_have_several(result, weight, hit)
            if not (math.isfinite(squared[0]) and math.isfinite(float(upper.sum()))):
                hit |= ~(result.is_finite() & weight.is_finite() & (upper - upper == 0))
        parts.append(_taken(hit, change.reshape(-1), bounds.shift, row * merged.shape[1]))
    return _Asked(*_joined(parts), reach_of(dense, bounds, 0, len(merged)))
