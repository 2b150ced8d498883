"""Code the spans of a model against a base, shared among threads and ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...durable.journal import Journal
from ...files.checkpoint import Checkpoint
from ...files.digest import digest_of, pieces_of, tensors_of
from ...files.dtypes import FLOATS, TensorSpec
from ...numerics.passes.hashes import sha256_each
from ...numerics.steps import Patterns
from ...patches.bodies.table import BODIES, choose
from ...patches.model_files import ModelFiles
from ...patches.patch_file import SAME, UNPREDICTED, CodedSpan, coded_type
from ...patches.sources import TensorSource, as_patterns, predicted, read_source, read_span, split_span
from ...patches.spans import TensorSpan, spans_of
from ...streaming.digests import hash_pieces
from ...streaming.journaled import Task, run_tasks
from ...streaming.parallel import Progress, counting, map_in_order
from ...streaming.ranks import Job

SAMPLES, SAMPLE = 8, 1 << 14  # runs of numbers by which a body is chosen, and the numbers of each


Sources = tuple[TensorSource, TensorSource]


@dataclass(frozen=True)
class SpecComparison:
    """What two models have in common, by the names, types and shapes of their tensors.

    Attributes:
        specs: of the target, as they count in its digest.
        cast: a tensor -> the base's type, if that is another one.
        renamed: a tensor -> the base's name of one with the same bytes.
        new: tensors that nothing of the base predicts.
        removed: tensors that the target does not have.
    """

    specs: Mapping[str, TensorSpec]
    cast: Mapping[str, str]
    renamed: Mapping[str, str]
    new: tuple[str, ...]
    removed: tuple[str, ...]

    def spans(self) -> list[TensorSpan]:
        return spans_of(self.specs, {**self.cast, **dict.fromkeys(self.new, "")})

    @property
    def has_same_tensors(self) -> bool:
        return not (self.cast or self.new or self.removed)


def compare_specs(
    base: Mapping[str, TensorSpec], counted: Sequence[str], target: ModelFiles, sources: Sources, workers: int
) -> SpecComparison:
    """Compare the headers of two models, and find the tensors whose names alone differ.

    Args:
        base: its stored tensors.
        counted: those that count in its digest.
        sources: of the base and of the target; read only where both have tensors of the same type and shape that the
            other does not have.
    """
    cast, new = {}, []
    for name, spec in target.specs.items():
        was = base.get(name)
        if was is not None and was != spec and was.shape == spec.shape and {was.dtype, spec.dtype} <= {*FLOATS}:
            cast[name] = was.dtype
        elif was != spec:
            new.append(name)
    removed = {name: base[name] for name in counted if name not in target.specs}
    lone = {name: target.specs[name] for name in new if name not in base}
    renamed = _find_renamed(removed, lone, sources, workers)
    for former in renamed.values():
        del removed[former]
    new = [name for name in new if name not in renamed]
    return SpecComparison(target.specs, cast, renamed, tuple(new), tuple(removed))


def _find_renamed(
    base: Mapping[str, TensorSpec], target: Mapping[str, TensorSpec], sources: Sources, workers: int
) -> dict[str, str]:
    """Return the target's tensors that have the bytes of one of the base: a name -> the base's. Each counts once."""
    shared = {spec for spec in {*base.values()} & {*target.values()} if spec.nbytes}
    found: list[dict[tuple[TensorSpec, str], list[str]]] = []
    for source, specs in zip(sources, (base, target), strict=True):
        names = [name for name, spec in specs.items() if spec in shared]
        by_hash = dict[tuple[TensorSpec, str], list[str]]()
        with closing(map_in_order(partial(_hash_of, source, specs), names, workers)) as hashes:
            for name, sha256 in zip(names, hashes, strict=True):
                by_hash.setdefault((specs[name], sha256), []).append(name)
        found.append(by_hash)
    return {
        name: was for key, names in found[1].items() for name, was in zip(names, found[0].get(key, ()), strict=False)
    }


def _hash_of(source: TensorSource, specs: Mapping[str, TensorSpec], name: str) -> str:
    whole = hashlib.sha256()
    for first, length in pieces_of(specs[name]):
        data = memoryview(bytearray(length))
        source.read(name, first, data)
        whole.update(data)
    return whole.hexdigest()


@dataclass(frozen=True)
class Sides:
    """Two models whose spans are compared.

    Attributes:
        renamed: as in `SpecComparison`.
        fast: code with fewer tables.
        keep_back: keep what the way back needs.
    """

    base: TensorSource
    target: TensorSource
    renamed: Mapping[str, str]
    fast: bool
    keep_back: bool

    def read(self, span: TensorSpan) -> tuple[memoryview, memoryview | None]:
        """Return the bytes of a span, and what predicts them."""
        return read_span(self.target, span), read_source(self.base, span.named(self.renamed))


def code_spans(
    spans: Sequence[TensorSpan],
    sides: Sides,
    job: Job,
    journal: Journal,
    workers: int,
    progress: Progress | None = None,
) -> list[CodedSpan]:
    """Code all spans; rank 0 goes on alone, and has those of all ranks.

    Raises:
        RankDone: on ranks other than 0.
    """
    finished = counting((span.nbytes for span in spans), progress)
    tasks = [Task(number, span.place, partial(_coded, span, sides)) for number, span in enumerate(spans)]
    return run_tasks("coded", tasks, job, journal, workers, finished, is_last=True)


def _coded(span: TensorSpan, sides: Sides) -> CodedSpan:
    own, stored = sides.read(span)
    parts = [*split_span(span, own), *(split_span(span, stored) if stored is not None else ())]
    hashes = tuple(sha256_each([[part] for part in parts]))
    count = len(span.pieces)
    hashes, source_hashes = hashes[:count], hashes[count:]
    numbers, dtype = as_patterns(own, span.dtype), coded_type(span.dtype)
    if stored is None:
        data = BODIES[UNPREDICTED].encode(numbers[:0], numbers, dtype)
        return CodedSpan(UNPREDICTED, data, None, (), hashes, _sizes(span))
    before = predicted(span, stored)
    differ = before != numbers
    changed = _changed(span, differ)
    if not any(changed):
        return CodedSpan(SAME, b"", b"", source_hashes, hashes, changed)
    samples = sample(before), sample(numbers)
    key = choose(*samples, dtype, sides.fast)
    data = BODIES[key].encode(before, numbers, dtype)
    back = BODIES[key].back(before, numbers, dtype) if sides.keep_back and span.source == span.dtype else None
    return CodedSpan(key, data, back, source_hashes, hashes, changed)


def estimated(span: TensorSpan, sides: Sides) -> tuple[str, int, tuple[int, ...]]:
    """Return the body of a span, about how many bytes it takes by a sample, and how many numbers of a piece change."""
    own, stored = sides.read(span)
    numbers, dtype = as_patterns(own, span.dtype), coded_type(span.dtype)
    before = numbers if stored is None else predicted(span, stored)
    changed = _sizes(span) if stored is None else _changed(span, before != numbers)
    if not any(changed):
        return SAME, 0, changed
    samples = sample(before), sample(numbers)
    key = UNPREDICTED if stored is None else choose(*samples, dtype, sides.fast)
    bits = BODIES[key].measure(*samples, dtype)
    return key, bits * numbers.size // (8 * samples[1].size), changed


def sample(numbers: Patterns) -> Patterns:
    """Return runs of neighbours that lie evenly among numbers, or all of them if they are few."""
    if numbers.size <= SAMPLES * SAMPLE:
        return numbers
    starts = [k * (numbers.size - SAMPLE) // (SAMPLES - 1) for k in range(SAMPLES)]
    return np.concatenate([numbers[start : start + SAMPLE] for start in starts])


def _sizes(span: TensorSpan) -> tuple[int, ...]:
    """Return how many numbers each piece has."""
    width = as_patterns(memoryview(b""), span.dtype).itemsize
    return tuple(piece.length // width for piece in span.pieces)


def _changed(span: TensorSpan, differ: Patterns) -> tuple[int, ...]:
    """Return how many numbers of each piece differ."""
    counts, done = [], 0
    for size in _sizes(span):
        counts.append(int(np.count_nonzero(differ[done : done + size])))
        done += size
    return tuple(counts)


def base_digest(base: Checkpoint, spans: Sequence[TensorSpan], coded: Sequence[CodedSpan], workers: int) -> str:
    """Return the digest of the base, of which the tensors that predict nothing of their type are read again.

    Args:
        spans: with the base's names.
        coded: of these spans, or empty if they were predicted from something else.
    """
    found = {
        (piece.tensor, piece.first): sha256
        for span, each in zip(spans, coded, strict=bool(coded))
        if span.source == span.dtype
        for piece, sha256 in zip(span.pieces, each.source_hashes, strict=True)
    }
    tensors = tensors_of(base.shards)
    places = [(name, *place) for name, file in tensors.items() for place in pieces_of(file.specs[name])]
    rest = [(name, first, length) for name, first, length in places if (name, first) not in found]
    read = hash_pieces([(tensors[name], name, first, length) for name, first, length in rest], workers)
    found.update({(name, first): sha256 for (name, first, _), sha256 in zip(rest, read, strict=True)})
    return digest_of(
        (name, file.specs[name], [found[name, first] for first, _ in pieces_of(file.specs[name])])
        for name, file in tensors.items()
    )
