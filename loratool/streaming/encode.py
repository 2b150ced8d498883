"""Merge a weight and write it in a format of codes, with scales of its own (`files.codecs.codec.Quantizer`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from ..binding.modules.placement import Placement
from ..errors import InputError, NeedsFlag
from ..files.codecs.codec import Parts, Piece, Quantizer
from ..files.dtypes import DTYPE_NAMES
from ..files.tensor_ref import TensorRef
from ..numerics.arrays import Numbers, empty
from ..numerics.code_levels import Codes
from ..numerics.forms import F32, Form
from ..numerics.rounding_stats import RoundingStats, cast_rounded
from ..numerics.workspace import Workspace
from ..undo.checks import record_rows
from .apply import scattered_codes, segments
from .items import Step
from .rewrite import LARGEST_FLOAT32, ChangedTensor, RowRange
from .scattered import Scattered, Written
from .segment import RowSegment, UpdateLoader

# A block's statistics, and the pieces of its rows in the tensors beside the codes
Encoded = tuple[RoundingStats, list[Piece]]


class MergedRows:
    """The rows of a weight with its placements merged in, rounded to a type for encoding, in blocks of any size.

    Args:
        source: the tensor of W.
        form: of W'.
    """

    def __init__(self, source: TensorRef, placements: Sequence[Placement], form: Form, load: UpdateLoader) -> None:
        self.source, self.form = source, form
        self.rows = placements[0].rows if placements else source.spec.size // max(1, source.spec.shape[-1])
        self.columns = source.spec.size // max(1, self.rows)
        self._parts = [
            (start, stop, RowSegment(source, self.columns, start, stop, inside, load) if inside else None)
            for start, stop, inside in segments(placements, {0, self.rows})
        ]

    def merge(self, base: Numbers, start: int, work: Workspace) -> tuple[Numbers, RoundingStats]:
        """Return W' of rows from `start` on, and the statistics of their rounding.

        Args:
            base: W of these rows.

        Raises:
            NeedsFlag, InputError: a number is not finite.
        """
        out, stats = Numbers(empty(self.form.bits_type, *base.shape, like=base.bits), self.form), []
        for first, last, segment in self._parts:
            low, high = max(start, first), min(start + len(base), last)
            if low < high:
                here = slice(low - start, high - start)
                stats.append(
                    segment.merge(base[here], low, out[here], work)
                    if segment
                    else cast_rounded(base[here], out[here], work)
                )
        total = RoundingStats.of(stats)
        self._require_codes(out, total)
        return out, total

    def _require_codes(self, out: Numbers, stats: RoundingStats) -> None:
        """Raise for numbers that no code stands for: one of them would spoil the scale of its group."""
        kind = DTYPE_NAMES[self.form.name]
        if stats.overflowed:
            message = f"{stats.overflowed} weights become infinite in {kind}, before they are encoded"
            remedy = "is this the adapter's base, and its alpha right?"
            if self.form != F32 and stats.largest < LARGEST_FLOAT32:
                raise NeedsFlag(message, culprit=self.source.name, flags="--dtype fp32", why=", which holds them")
            raise InputError(message, culprit=self.source.name, remedy=remedy)
        if not out.all_finite():
            message = "holds inf or nan, for which the format has no codes"
            raise InputError(message, culprit=self.source.name, remedy="download the original again")


def encode_tensor(
    source: TensorRef,
    placements: Sequence[Placement],
    form: Form,
    quantizer: Callable[[], Quantizer],
    load: UpdateLoader,
) -> ChangedTensor:
    """Return a merged weight as codes; the steps also write the tensors beside the codes, and return RoundingStats.

    Args:
        form: what W' is rounded to before it is encoded.
        quantizer: returns a new quantizer for each item.
    """
    merged, like = MergedRows(source, placements, form, load), quantizer()
    fold = merged.columns // source.spec.shape[-1]  # the codec's rows in a row
    is_whole = like.sees_all or not like.together
    together = max(1, like.together // math.gcd(like.together, fold))
    height = record_rows(merged.columns, coded=True)
    height = max(together, height // together * together)

    def ranges() -> Iterator[RowRange]:
        prepare = partial(_encode, merged, quantizer)
        yield RowRange(0, merged.rows, prepare, height, merged.rows if is_whole else height)

    return ChangedTensor(merged.rows, ranges, merged.columns, _scattered(like.parts, merged.columns))


def _encode(merged: MergedRows, make: Callable[[], Quantizer], start: int, stop: int) -> Step:
    """Return the step that merges and encodes rows start:stop; a quantizer that `sees_all` sees them first."""
    quantizer, width = make(), merged.source.spec.shape[-1]
    if quantizer.sees_all:
        step, work = record_rows(merged.columns), Workspace()
        for first in range(start, stop, step):
            base = merged.source.read_matrix(merged.rows, first, min(first + step, stop))
            quantizer.see(merged.merge(base, first, work)[0].reshape(-1, width))

    def step_of(base: Numbers, row: int, out: Codes, work: Workspace) -> Encoded:
        rounded, stats = merged.merge(base, start + row, work)
        numbers = Numbers(rounded.host(), rounded.form).reshape(-1, width)
        codes, pieces = quantizer.rows((start + row) * (merged.columns // width), numbers)
        out[...] = codes.reshape(out.shape)
        return stats, [*pieces, *(quantizer.rest() if start + row + len(base) == merged.rows else ())]

    return step_of


def _scattered(parts: Parts, columns: int) -> Scattered:
    """Return how the codes are written, and the pieces of the tensors beside them that a step returns."""
    codes, names = scattered_codes(parts, columns), parts.weight.names

    def write(start: int, out: Codes, result: Encoded) -> tuple[Any, Iterator[Written]]:
        (stats, pieces), (_, written) = result, codes.write(start, out, None)
        return stats, chain(((names[role], offset, data) for role, offset, data in pieces), written)

    return replace(codes, tensors=[*codes.tensors, *names.values()], write=write)
