"""Judge a weight that the merged model stores as codes: by the codes of a merge, else by the share of the delta.

A merge has two deterministic ways to round to codes: with the scales of a coded base, and with new scales from plain
numbers. Both run here again, and the codes are compared. Scales that other programs chose allow only measures: whether
each code is about the nearest to the merge for its scale, and the share of the delta that the codes keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ...binding.merge.merge_plan import MergePlan
from ...binding.modules.placement import Placement
from ...files.codecs.codec import Parts, Quantizer, StoredTensor
from ...files.dtypes import DTYPE_NAMES
from ...files.tensor_ref import TensorRef
from ...numerics.code_levels import Codes
from ...numerics.forms import BF16, F16, F32, Wide
from ...numerics.rounding_stats import RoundingStats
from ...numerics.workspace import Workspace
from ...streaming.encode import encode_tensor
from ...streaming.recode import recode_tensor
from ...streaming.rewrite import ChangedTensor, RowRange
from ...streaming.segment import UpdateLoader
from ...undo.checks import record_rows
from ...undo.records import CodedRows
from .diagnosis import NEARER, find_fault, finite
from .replay import Replay, ReplayBlock

Flags = npt.NDArray[np.bool_]

BYTES = 1 << 22  # compared at a time

FEW = 64  # so many wrong codes, or one in a thousand, were altered; more have another cause

EXPLAINED = 4.0  # |W' - X|^2 in units of what the nearest codes are off: calibrated codes are not the nearest

# Others' arithmetic may move a number by so much of its row's largest before they round it to a code, and scales that
# they round after that may move the nearest code by a step: by two ordinals across zero, which has two
NEAR = 2.0**-7

STEPS = 2

# With the base's scales a sum in float32 makes codes that are farther than the nearest by so much of |W| + |D|, and one
# in 16 bits, which does it to many; a few in this reach were altered
TIED, HALVED = 2.0**-20, 2.0**-7

ENOUGH = 8  # codes that must tell a merge from its base before one can say that it is the base

MOST = 8  # where one code in so many is not the nearest, none was altered: they are of another base, or calibrated

# The types that a merge rounds to before it encodes
FORMS_BEFORE = (BF16, F16, F32)


@dataclass(frozen=True)
class CodesVerdict:
    """The verdict on a weight of codes.

    Attributes:
        verdict: as `TensorVerdict.verdict`; empty for a weight that equals the base's and should.
        asked: <D, D>.
        kept: <W' - W, D>, if the codes have the base's scales, else None.
        moves: whether the merge changes codes or numbers.
    """

    verdict: str
    detail: str = ""
    asked: float = 0.0
    kept: float | None = None
    moves: bool = True


@dataclass
class CodeCount:
    """The differences between the codes of a merge and those that are stored."""

    shape: tuple[int, ...]  # of the weight
    columns: int  # of its last dimension
    differ: int = 0  # codes that differ
    wrong: int = 0  # of those, codes of other numbers
    first: int = -1  # the place of the first of those
    stats: list[RoundingStats] = field(default_factory=list)

    def add(self, row: int, differ: Flags, wrong: Flags) -> None:
        """Count codes of rows of the last dimension, from `row` on; `differ` has padding too."""
        self.differ += int(np.count_nonzero(differ))
        self.wrong += int(np.count_nonzero(wrong))
        if self.first < 0 and wrong.any():
            self.first = row * self.columns + int(np.flatnonzero(wrong)[0])

    def describe(self, verb: str = "are") -> str:
        """Return in words how many codes are wrong, and where the first is."""
        *above, row, column = (int(i) for i in np.unravel_index(self.first, self.shape))
        matrix = f" of matrix {', '.join(map(str, above))}" if above else ""
        if self.wrong == 1:
            return f"1 code, in row {row}, column {column}{matrix}, {'is' if verb == 'are' else 'was'}"
        return f"{self.wrong} codes, the first in row {row}, column {column}{matrix}, {verb}"


def describe_share(share: float) -> str:
    """Return a share as a percentage, with a decimal below ten."""
    digits = 0 if abs(share) > 0.0995 else 1
    return f"{round(100 * share, digits) + 0.0:.{digits}f} %"


def judge_codes(plan: MergePlan, name: str, merged: TensorRef, load: UpdateLoader, sure: bool) -> CodesVerdict:
    """Return the verdict on a weight that the merged model stores as codes.

    Args:
        sure: another weight has shown that the merge changes the model, so that this one need not.
    """
    source, placements = plan.sources[name], plan.placements.get(name, ())
    base_parts, merged_parts = source.parts, merged.parts
    assert merged_parts
    if base_parts is None:
        known = _judge_encoded(source, placements, merged_parts, load, sure)
        return known or _measure(plan, name, merged, f"quantized as {merged_parts.weight.kind}", load)
    if _layout(base_parts) != _layout(merged_parts):
        again = (
            "with fresh scales"
            if base_parts.weight.codec is merged_parts.weight.codec
            else f"as {merged_parts.weight.kind}"
        )
        return _measure(plan, name, merged, f"requantized {again}", load)
    altered = [merged_parts[r].name for r in base_parts.weight.roles[1:] if not _same(base_parts[r], merged_parts[r])]
    if base_parts.weight.format.padding_has_scales and not _same_padding(base_parts, merged_parts):
        altered.append("scales among the codes")
    if not placements and not altered and _same(base_parts["codes"], merged_parts["codes"]):
        return CodesVerdict("")
    count = _count_codes(source, placements, merged_parts, load, not altered)
    if altered and count.wrong:
        known = _measure(plan, name, merged, "requantized with fresh scales", load)
        if count.differ or known.verdict != "wrong":
            return known
    stats = RoundingStats.of(count.stats)
    judged = partial(CodesVerdict, asked=stats.change_squared, kept=stats.kept, moves=bool(stats.changed))
    if altered:
        return judged("wrong", f"not the base's: {', '.join(altered)}")
    if count.wrong:
        way = _rounded_before(Replay(source, placements, load), merged, count.wrong) if placements else None
        if way:
            return judged("rounding", way)
        fault = find_fault(plan, name, merged, {}) if placements else None
        goal = "the nearest to the merge" if placements else "the base's"
        return judged("wrong", fault or f"{count.describe()} not {goal}")
    if count.differ:
        return judged("rounding", "other codes of the same numbers")
    kept_text = (
        f": keeps {describe_share(stats.kept / stats.change_squared)} of the delta" if stats.change_squared else ""
    )
    return judged("exact", f"the nearest codes with the base's scales{kept_text}")


def _layout(parts: Parts) -> tuple[Any, ...]:
    """Return the layout of a weight. If layouts and the other tensors are equal, equal codes mean equal numbers."""
    weight = parts.weight
    specs = [parts[role].spec for role in weight.roles]
    return weight.codec.key, weight.spec, weight.roles, dict(weight.detail), specs


def _same(tensor: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two stored tensors have the same type, shape and bytes."""
    if tensor.spec != other.spec:
        return False
    size = tensor.count
    step = max(1, BYTES * size // max(1, tensor.spec.nbytes))
    ranges = ((first, min(step, size - first)) for first in range(0, size, step))
    return all(np.array_equal(tensor.integers(*each), other.integers(*each)) for each in ranges)


def _same_padding(first: Parts, second: Parts) -> bool:
    """Return whether the padding of two weights of one format and shape is the same."""
    columns, codec = first.weight.spec.shape[-1], first.weight.format
    rows, height = first.weight.spec.size // columns, record_rows(columns, coded=True)
    ranges = ((row, min(row + height, rows)) for row in range(0, rows, height))
    return all(
        np.array_equal(codec.codes(first, *each)[:, columns:], codec.codes(second, *each)[:, columns:])
        for each in ranges
    )


def _run(tensor: ChangedTensor, source: TensorRef) -> Iterator[tuple[int, Codes, Any]]:
    """Run a merge's steps on all rows. Yield the first row of each block, its codes, and the step's result."""
    work, form = Workspace(), tensor.scattered
    assert form
    for part in tensor.ranges():
        assert isinstance(part, RowRange)
        for start in range(part.start, part.stop, part.item_rows):
            stop = min(start + part.item_rows, part.stop)
            step = part.prepare(start, stop)
            for first in range(start, stop, part.block_rows):
                rows = source.read_matrix(tensor.rows, first, min(first + part.block_rows, stop))
                out = np.empty((len(rows), form.width), form.dtype)
                result = step(rows, first - start, out, work)
                yield first, out, result


def _count_codes(
    source: TensorRef, placements: Sequence[Placement], theirs: Parts, load: UpdateLoader, alike: bool
) -> CodeCount:
    """Compare the codes of a merge with the stored ones. alike: whether all other tensors are equal."""
    base_parts, codec, shape = source.parts, theirs.weight.format, source.spec.shape
    assert base_parts
    count = CodeCount(shape, shape[-1])
    for row, expected in _merged_codes(source, placements, load, count.stats):
        actual = codec.codes(theirs, row, row + len(expected))
        if not (alike and np.array_equal(expected, actual)):
            expected_values, actual_values = codec.values(base_parts, row, expected), codec.values(theirs, row, actual)
            count.add(
                row,
                expected != actual,
                (expected_values != actual_values) & ~(np.isnan(expected_values) & np.isnan(actual_values)),
            )
    return count


@np.errstate(all="ignore")
def _rounded_before(replay: Replay, merged: TensorRef, wrong: int) -> str | None:
    """Return in words how a sum was rounded before it was encoded with the base's scales. None if nothing fits.

    Args:
        wrong: codes that are not the nearest to the exact sum.
    """
    farthest = 0.0
    assert merged.parts
    for block in replay.blocks(merged):
        W, X, stored = block.base.wide(), block.reals[0], block.merged.wide()
        grid = CodedRows(merged.parts, block.first, W.shape[1])
        beyond = np.abs(stored - X) - np.abs(grid.values(0, grid.nearest(0, X)) - X)
        off = beyond > 0
        off |= np.isnan(stored) != np.isnan(W)
        far = beyond[off] / (np.abs(W) + np.abs(X - W))[off]
        farthest = max(farthest, float(np.nan_to_num(far, nan=np.inf).max(initial=0.0)))
    if farthest <= TIED:
        return "the nearest codes to a float32 sum"
    if farthest <= HALVED and not _is_few(wrong, merged):
        return "the nearest codes to a sum of 16 bits"
    return None


def _is_few(count: int, merged: TensorRef) -> bool:
    """Return whether so many wrong codes were altered one by one."""
    return count <= max(FEW, merged.spec.size // 1000)


def _merged_codes(
    source: TensorRef, placements: Sequence[Placement], load: UpdateLoader, stats: list[RoundingStats]
) -> Iterator[tuple[int, Codes]]:
    """Yield the codes of a merge, (rows of the last dimension, width), and their first row."""
    base_parts, columns = source.parts, source.spec.shape[-1]
    assert base_parts
    codec = base_parts.weight.format
    if not placements:
        rows, height = source.spec.size // columns, record_rows(columns, coded=True)
        for row in range(0, rows, height):
            yield row, codec.codes(base_parts, row, min(row + height, rows))
        return
    tensor = recode_tensor(source, placements, load, record=False)
    for first, out, result in _run(tensor, source):
        stats.append(result)
        yield first * (tensor.columns // columns), out.reshape(-1, codec.width(base_parts))


def _judge_encoded(
    source: TensorRef, placements: Sequence[Placement], theirs: Parts, load: UpdateLoader, sure: bool
) -> CodesVerdict | None:
    """Return the verdict on plain numbers that became codes. None if they differ from those of a merge."""
    codec = theirs.weight.format
    quantizer = codec.quantizer(theirs)
    if quantizer is None or quantizer.specs() != {role: tensor.spec for role, tensor in theirs.tensors.items()}:
        return None
    make = cast("Callable[[], Quantizer]", partial(codec.quantizer, theirs))
    for form in dict.fromkeys((source.form, *FORMS_BEFORE)):
        stats = _encoded(encode_tensor(source, placements, form, make, load), source, theirs)
        if stats is not None:
            break
    else:
        return None
    moves = bool(placements)
    if moves and not sure:
        moves = _encoded(encode_tensor(source, (), form, make, load), source, theirs) is None
    via = "" if form == source.form else f", rounded to {DTYPE_NAMES[form.name]} first"
    detail = f"quantized again as {theirs.weight.kind}{via}"
    return CodesVerdict("exact", detail, RoundingStats.of(stats).change_squared, moves=moves)


def _encoded(tensor: ChangedTensor, source: TensorRef, theirs: Parts) -> list[RoundingStats] | None:
    """Return the rounding statistics of a merge with the same encoding. None if the stored codes differ from it."""
    codec, roundings = theirs.weight.format, []
    fold = tensor.columns // source.spec.shape[-1]
    for first, out, (stats, pieces) in _run(tensor, source):
        stored = codec.codes(theirs, first * fold, (first + len(out)) * fold)
        if not np.array_equal(out.reshape(stored.shape), stored):
            return None
        if not all(_holds(theirs[role], start, data) for role, start, data in pieces):
            return None
        roundings.append(stats)
    return roundings


def _holds(tensor: StoredTensor, start: int, data: bytes) -> bool:
    """Return whether a stored tensor has these bytes from the byte `start` on."""
    size = tensor.spec.nbytes // max(1, tensor.spec.size)
    if start + len(data) > tensor.spec.nbytes or (start + len(data)) % size:
        return False
    return tensor.integers(start // size, len(data) // size).tobytes() == data


@dataclass
class _Measure:
    """The distance of dequantized numbers, W', from a merge, X = W + D: sums over a weight."""

    strays: CodeCount  # codes far from the nearest to X
    apart: int = 0  # codes that are not the nearest
    base: float = 0.0  # <W, W>
    asked: float = 0.0  # <D, D>
    kept: float = 0.0  # <W' - W, D>
    moved: float = 0.0  # |W' - W|^2
    off: float = 0.0  # |W' - X|^2
    least: float = 0.0  # the same of the codes nearest to X
    misses: float = 0.0  # |W' - those|^2
    idle: float = 0.0  # |W' - the codes nearest to W|^2
    tell: int = 0  # codes that are not nearest to both, X and W

    def add(self, block: ReplayBlock, parts: Parts) -> None:
        """Add some rows. parts: of the codes."""
        W, X, merged = block.base.wide(), block.reals[0], block.merged.wide()
        grid = CodedRows(parts, block.first, W.shape[1])
        codes = grid.nearest(0, X)
        steps = grid.ordinals(grid.without_padding(grid.read(len(X)))).astype(np.int32) - grid.ordinals(codes)
        nearest = grid.values(0, codes)
        D, E, off, least = finite(X - W), finite(merged - W), finite(merged - X), finite(nearest - X)
        reach = NEAR * finite(np.abs(X)).max(1, keepdims=True)
        stray = (np.abs(off) > np.abs(least) + reach) & (np.abs(steps) > STEPS)
        stray |= np.isnan(merged) != np.isnan(W)
        self.strays.add(block.first * grid.fold, stray, stray)
        self.apart += int(np.count_nonzero(steps))
        self.base += _squared(finite(W))
        self.asked += _squared(D)
        self.kept += float(np.vdot(E, D))
        self.moved += _squared(E)
        self.off += _squared(off)
        self.least += _squared(least)
        if block.inside:
            self.misses += _squared(finite(merged - nearest))
            before = grid.nearest(0, W)
            self.idle += _squared(finite(merged - grid.values(0, before)))
            self.tell += int(np.count_nonzero(before != codes))


def _squared(x: Wide) -> float:
    return float(np.vdot(x, x))


@np.errstate(all="ignore")
def _measure(plan: MergePlan, name: str, merged: TensorRef, how: str, load: UpdateLoader) -> CodesVerdict:
    """Return the verdict on codes that no merge of ours writes, by their numbers. how: their origin, in words."""
    placements, shape = plan.placements.get(name, ()), merged.spec.shape
    sums = _Measure(CodeCount(shape, shape[-1]))
    assert merged.parts
    for block in Replay(plan.sources[name], placements, load).blocks(merged):
        sums.add(block, merged.parts)
    judged = partial(CodesVerdict, asked=sums.asked, moves=sums.moved > 0)
    if sums.tell >= ENOUGH and sums.idle < NEARER * sums.misses:
        return judged("wrong", f"{how}: the delta is not applied")
    few = _is_few(sums.strays.wrong, merged) and sums.apart * MOST < merged.spec.size
    if sums.strays.wrong and (few or sums.off > EXPLAINED * sums.least):
        fault = find_fault(plan, name, merged, {}) if placements else None
        times = math.sqrt(sums.off / sums.least) if sums.least else math.inf
        altered = f"{sums.strays.describe('were')} altered"
        far = f"its numbers are {times:.1f} times as far from the merge as the nearest codes"
        return judged("wrong", f"{how}: {fault or (altered if few else far)}")
    if sums.asked:
        return judged("requantized", f"{how}: keeps {describe_share(sums.kept / sums.asked)} of the delta")
    distance = math.sqrt(sums.moved / sums.base) if sums.base else 0.0
    return judged("requantized", f"{how}: {describe_share(distance)} away from the base's numbers")
