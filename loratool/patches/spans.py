"""Divide a model's tensors into spans: the parts that are coded, hashed and written one at a time.

A span has at most 2^24 bytes of tensors of one type. A larger tensor is cut into the pieces of its digest; each whole
piece is a span of its own. All other pieces are put together in the order of the tensors' names, apart by type and by
prediction, until the next would not fit; what is left at the end comes in the order of its first pieces. So the spans
follow from the names, types and shapes alone, whatever the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..files.digest import PIECE, digest_of, pieces_of
from ..files.dtypes import TensorSpec


class TensorPiece(NamedTuple):
    """Bytes first:first + length of a tensor."""

    tensor: str
    first: int
    length: int


@dataclass(frozen=True)
class TensorSpan:
    """Pieces of tensors that are coded together.

    Attributes:
        dtype: of the tensors.
        source: the type of the base's tensors from which the span is predicted; empty if the base has none that can
            predict it.
    """

    dtype: str
    source: str
    pieces: tuple[TensorPiece, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.length for piece in self.pieces)

    @property
    def place(self) -> tuple[str, int, int]:
        """Return what tells the span from others in a journal."""
        return self.pieces[0].tensor, self.pieces[0].first, self.nbytes

    def named(self, names: Mapping[str, str]) -> TensorSpan:
        """Return the same pieces of tensors some of which have other names."""
        if not any(piece.tensor in names for piece in self.pieces):
            return self
        pieces = (piece._replace(tensor=names.get(piece.tensor, piece.tensor)) for piece in self.pieces)
        return replace(self, pieces=tuple(pieces))


def spans_of(specs: Mapping[str, TensorSpec], sources: Mapping[str, str]) -> list[TensorSpan]:
    """Return the spans of a model's tensors.

    Args:
        specs: sorted by name.
        sources: a tensor -> `TensorSpan.source`, for those that are not predicted from a tensor of their own type.
    """
    spans: list[TensorSpan] = []
    waiting: dict[tuple[str, str], list[TensorPiece]] = {}
    held: dict[tuple[str, str], int] = {}  # bytes of these
    for name, spec in specs.items():
        kind = spec.dtype, sources.get(name, spec.dtype)
        for first, length in pieces_of(spec):
            if length == PIECE:
                spans.append(TensorSpan(*kind, (TensorPiece(name, first, length),)))
                continue
            if held.get(kind, 0) + length > PIECE:
                spans.append(TensorSpan(*kind, tuple(waiting.pop(kind))))
                held[kind] = 0
            waiting.setdefault(kind, []).append(TensorPiece(name, first, length))
            held[kind] = held.get(kind, 0) + length
    return spans + [TensorSpan(*kind, tuple(pieces)) for kind, pieces in waiting.items()]


def places_of(spans: Sequence[TensorSpan]) -> dict[tuple[str, int], tuple[int, int]]:
    """Return where each piece is: (tensor, first byte) -> (the number of its span, its first byte there)."""
    places = {}
    for number, span in enumerate(spans):
        done = 0
        for piece in span.pieces:
            places[piece.tensor, piece.first] = number, done
            done += piece.length
    return places


def digest_of_spans(
    specs: Mapping[str, TensorSpec], spans: Sequence[TensorSpan], hashes: Sequence[Sequence[str]]
) -> str:
    """Return the digest of a model from the hashes of all pieces of its spans."""
    found = {
        (piece.tensor, piece.first): sha256
        for span, some in zip(spans, hashes, strict=True)
        for piece, sha256 in zip(span.pieces, some, strict=True)
    }
    return digest_of((name, spec, [found[name, first] for first, _ in pieces_of(spec)]) for name, spec in specs.items())
