"""Read a model's bytes: of files, or of what patches make of them, one span at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from ..durable.fileio import read_into
from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..files.digest import PIECE
from ..files.dtypes import DTYPES, TensorSpec
from ..numerics.arrays import Numbers
from ..numerics.forms import FORMS
from ..numerics.passes.hashes import sha256_each
from ..numerics.rounding_stats import cast_rounded
from ..numerics.steps import Patterns
from ..numerics.workspace import Workspace
from .bodies.table import BODIES
from .patch_file import SAME, PatchFile, coded_type, span_hash
from .spans import TensorSpan, places_of

KEPT = 2  # spans that a thread keeps, as pieces of one are read one after the other


class TensorSource(Protocol):
    """A model whose bytes can be read by several threads.

    Attributes:
        specs: of the tensors that count in its digest, and perhaps of others.
    """

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, tensor: str, first: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a tensor from `first` on."""


class ModelSource:
    """A model on disk."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.specs = checkpoint, checkpoint.stored

    def read(self, tensor: str, first: int, out: memoryview) -> None:
        self.checkpoint.shard_of[tensor].read_bytes(tensor, first, out)


class PatchedSource:
    """A model that a patch makes of another, or, with `back`, the base that it makes of its target.

    A span that is already what the patch would make of it stays as it is.

    Args:
        is_made: the model is already what the patch makes, as `is_made` found: its types are not the base's.

    Raises:
        InputError: the patch is of another model, or has no way back.
    """

    def __init__(
        self, before: TensorSource, name: str, patch: PatchFile, back: bool = False, is_made: bool = False
    ) -> None:
        if back and not patch.reversible:
            what = "has no way back: that needs too much here, or the patch was made with --one-way"
            raise InputError(what, culprit=str(patch.path), remedy="apply it to the base again, and keep the base")
        self.before, self.name, self.patch, self.back = before, name, patch, back
        self.files = patch.base if back and patch.base else patch.target
        self.specs: Mapping[str, TensorSpec] = self.files.specs
        self.spans, given = (patch.base_spans, patch.spans) if back else (patch.spans, patch.base_spans)
        self.given_spans = self.spans if is_made else given  # of what is read
        self.given_specs = self.specs if is_made else (patch.target.specs if back else patch.base_specs)
        self._places = places_of(self.spans)
        self._numbers = {span.pieces: number for number, span in enumerate(self.spans)}
        self._local = threading.local()
        self.kept: set[int] = set()  # spans that were already what the patch makes of them
        self.read_hashes: dict[int, list[str]] = {}  # of the pieces of spans that were read in the type that they have
        self._is_made = is_made
        if not is_made:
            self._require_tensors()

    def _require_tensors(self) -> None:
        """Refuse a model that lacks tensors of the base, or has them with other types or shapes."""
        wanted = self.given_specs
        wrong = [name for name, spec in wanted.items() if self.before.specs.get(name) != spec]
        if wrong:
            has, spec = self.before.specs.get(wrong[0]), wanted[wrong[0]]
            more = f", and {len(wrong) - 1:,} more differ" if len(wrong) > 1 else ""
            what = (
                f"{self.patch.path}: is of a model whose {wrong[0]} is {spec}, and this one has {has or 'none'}{more}"
            )
            raise InputError(what, culprit=self.name, remedy="give the base that the patch was made of")

    @property
    def reads_all(self) -> bool:
        """Return whether the spans are made of the bytes of a model on disk, and of all of them."""
        whole = self._is_made or not (self.patch.adapters or self.patch.index["removed"])
        return whole and isinstance(self.before, ModelSource)

    def require_base(self, hashes: Mapping[TensorSpan, bytes]) -> None:
        """Raise InputError if spans of the model are those of another one, going by hashes that `is_made` has read."""
        for number, (span, row) in enumerate(zip(self.given_spans, self.patch.rows, strict=True)):
            before = row.hash if self.back else row.source_hash
            if span.source == span.dtype and hashes.get(span, before) != before:
                raise self._other(number)

    def read(self, tensor: str, first: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            start = (first + done) // PIECE * PIECE
            number, offset = self._places[tensor, start]
            within = first + done - start
            length = min(PIECE - within, len(out) - done)
            out[done : done + length] = self.span(number)[offset + within : offset + within + length]
            done += length

    def span(self, number: int) -> memoryview:
        """Return the bytes of a span."""
        kept: dict[int, tuple[memoryview, list[str]]] = self._local.__dict__.setdefault("kept", {})
        if number not in kept:
            kept[number] = self.made(number)
            if len(kept) > KEPT:
                del kept[next(iter(kept))]
        return kept[number][0]

    def made(self, number: int) -> tuple[memoryview, list[str]]:
        """Make a span, and return its bytes and the hashes of its pieces.

        Raises:
            InputError: what is read is neither what the patch was made of nor what it makes.
        """
        span, row = self.spans[number], self.patch.rows[number]
        before, after = (row.hash, row.source_hash) if self.back else (row.source_hash, row.hash)
        stored = self._stored(number)
        if stored is not None:
            hashes = piece_hashes(span, stored)
            found = span_hash(hashes)
            if self._is_made or span.source == span.dtype:
                self.read_hashes[number] = hashes
            if found == after != before and (self._is_made or span.source == span.dtype):
                self.kept.add(number)
                return stored, hashes
            if found != before or (self._is_made and span.source != span.dtype):
                raise self._other(number)
        data = bytearray(span.nbytes)
        try:
            self._decode(number, stored, memoryview(data))
        except ValueError as error:
            raise InputError(f"is damaged: {error}", culprit=str(self.patch.path)) from error
        hashes = piece_hashes(span, memoryview(data))
        if span_hash(hashes) != after:
            raise InputError("is damaged: it makes other numbers than it says", culprit=str(self.patch.path))
        return memoryview(data), hashes

    def _stored(self, number: int) -> memoryview | None:
        """Read what a span is made of. One of the patch before is taken whole, so that a chain keeps none of them."""
        before, span = self.before, self.given_spans[number]
        if isinstance(before, PatchedSource) and span.source == span.dtype and span.pieces in before._numbers:
            return before.made(before._numbers[span.pieces])[0]
        return read_span(before, span) if self._is_made else read_source(before, span)

    def _decode(self, number: int, stored: memoryview | None, data: memoryview) -> None:
        span, row, file = self.spans[number], self.patch.rows[number], self.patch.file
        out = as_patterns(data, span.dtype)
        if row.body == SAME:
            assert stored is not None
            out[:] = predicted(span, stored)
            return
        body, coded = BODIES[row.body], memoryview(bytearray(row.length))
        read_into(file, coded, row.offset)
        dtype = coded_type(span.dtype)
        if not self.back:
            base = np.zeros(0, out.dtype) if stored is None else predicted(span, stored)
            body.decode(base, coded, dtype, out)
            return
        assert stored is not None and row.back is not None
        beside = memoryview(bytearray(row.back))
        read_into(file, beside, row.offset + row.length)
        body.undo(as_patterns(stored, span.dtype), coded, beside, dtype, out)

    def _other(self, number: int) -> InputError:
        """Return the error for a span that is of another model; it names the tensors of other spans too."""
        wrong = [number]
        for other in range(number + 1, len(self.spans)):
            span, row = self.spans[other], self.patch.rows[other]
            if len(wrong) > 3:
                break
            stored = self._stored(other)
            if stored is not None and span_hash(piece_hashes(span, stored)) not in (row.source_hash, row.hash):
                wrong.append(other)
        names = dict.fromkeys(piece.tensor for each in wrong for piece in self.given_spans[each].pieces)
        shown = ", ".join([*names][:3]) + (" and others" if len(names) > 3 else "")
        of = "made" if self.back else "was made of"
        what = f"is not the model that {self.patch.path} {of}: of {shown}, some differ"
        return InputError(what, culprit=self.name, remedy=f"give the model of digest {self._wanted()[:16]}...")

    def _wanted(self) -> str:
        digest: str = self.patch.digest if self.back else self.patch.base_digest
        return digest


def is_made(model: TensorSource, patch: PatchFile, back: bool, hashes: dict[TensorSpan, bytes]) -> bool:
    """Return whether a model is what a patch makes, going by its tensors' types and the first span that differs.

    Args:
        hashes: of the model's spans that were read; those that are read here are added.
    """
    files = patch.base if back and patch.base else patch.target
    if any(model.specs.get(name) != spec for name, spec in files.specs.items()):
        return False
    for span, row in zip(patch.base_spans if back else patch.spans, patch.rows, strict=True):
        if row.source_hash != row.hash:
            if span not in hashes:
                hashes[span] = span_hash(piece_hashes(span, read_span(model, span)))
            return hashes[span] == (row.source_hash if back else row.hash)
    return bool(patch.renamed)  # whose names one of the two models has


def read_source(source: TensorSource, span: TensorSpan) -> memoryview | None:
    """Read what predicts a span, in the type in which the source has it; None if nothing does."""
    if not span.source:
        return None
    scale = DTYPES.get(span.source, 8), DTYPES.get(span.dtype, 8)
    pieces = [
        (piece.tensor, piece.first * scale[0] // scale[1], piece.length * scale[0] // scale[1])
        if span.source != span.dtype
        else piece
        for piece in span.pieces
    ]
    return _read_pieces(source, pieces)


def read_span(source: TensorSource, span: TensorSpan) -> memoryview:
    """Read the bytes of a span of a model."""
    return _read_pieces(source, span.pieces)


def _read_pieces(source: TensorSource, pieces: Sequence[tuple[str, int, int]]) -> memoryview:
    data, done = memoryview(bytearray(sum(length for *_, length in pieces))), 0
    for tensor, first, length in pieces:
        source.read(tensor, first, data[done : done + length])
        done += length
    return data


def split_span(span: TensorSpan, data: memoryview) -> list[memoryview]:
    """Return the bytes of each piece of a span; they may be of the source's type."""
    whole, parts, done = span.nbytes, [], 0
    for piece in span.pieces:
        length = piece.length * len(data) // whole
        parts.append(data[done : done + length])
        done += length
    return parts


def piece_hashes(span: TensorSpan, data: memoryview) -> list[str]:
    """Return the hashes of a span's pieces."""
    return sha256_each([[part] for part in split_span(span, data)])


def as_patterns(data: memoryview, dtype: str) -> Patterns:
    """Return bytes as unsigned integers of the width of a type's numbers."""
    return np.frombuffer(data, f"<u{DTYPES[coded_type(dtype)] // 8}")


def predicted(span: TensorSpan, stored: memoryview) -> Patterns:
    """Return the prediction of a span: the base's numbers, rounded once if they are of another type."""
    if span.source == span.dtype:
        return as_patterns(stored, span.dtype)
    source, form = FORMS[span.source], FORMS[span.dtype]
    numbers = Numbers(np.frombuffer(stored, source.bits_type).reshape(1, -1), source)
    out = Numbers.empty(form, *numbers.shape)
    cast_rounded(numbers, out, Workspace())
    patterns: Patterns = out.bits.reshape(-1).view(f"<u{form.itemsize}")
    return patterns
