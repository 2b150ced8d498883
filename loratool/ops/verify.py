"""`verify`: whether a model is this base merged with these adapters, tensor by tensor, and if not, what is wrong.

All three are streamed. A tensor is exact if it has the bits of our own replay; it is right with another rounding if
one way of `hypotheses.ROUNDINGS` explains each of its weights; else it is wrong, and `FAULTS` says how.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..apply import Loader, Piece
from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import UsageError
from ..hypotheses import LOOSE, LOOSE_STEPS, ROUNDINGS, Evidence, diagnose, interval
from ..inputs import adapter_pairs, open_inputs, subtract_initial
from ..judging import Suspect, beyond, same_codes
from ..numerics.exact import Workspace, apply_rounded, cast_rounded
from ..plan import MergePlan, plan_merge
from ..runtime import Progress, worker_count
from ..source import Source, equal_rows
from ..targets import Selection
from ..tensorfile import TORCH_FLOATS
from ..tied import TIED
from ..updates import ADDITIVE

ROWS = 128  # compared at a time
ALLOWED = ("inconclusive",)


@dataclass(frozen=True)
class TensorVerdict:
    """`verdict`: exact, rounding or wrong; `detail`: which rounding, or what is wrong."""

    name: str
    verdict: str
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """`status`: proven, wrong or inconclusive. `tensors` are those that the adapters change, and all that are wrong.

    untouched counts the tensors that are the base's and shall be. rounding: the ways that were found.
    """

    base: str
    merged: str
    status: str
    tensors: tuple[TensorVerdict, ...]
    exact: int
    rounded: int
    wrong: int
    untouched: int
    rounding: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def verify(
    base: str | os.PathLike[str],
    adapters: Any,
    merged: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    tied: str = "untie",
    initial: str | os.PathLike[str] | None = None,
    residual_base: bool = False,
    allow: Sequence[str] = (),
    progress: Progress | None = None,
    workers: int | None = None,
) -> VerifyReport:
    """Prove that `merged` is `base` with `adapters` added; the arguments are those of `merge`.

    allow: "inconclusive" counts a change that is below half a step everywhere as proven. Raises InputError for what
    does not belong together at all.
    """
    for each in allow:
        if each not in ALLOWED:
            raise UsageError(f"allow {each!r} is none of {', '.join(ALLOWED)}")
    if tied not in TIED:
        raise UsageError(f"tied {tied!r} is none of {', '.join(TIED)}")
    with ExitStack() as opened:
        checkpoint, loaded = open_inputs(base, adapter_pairs(adapters), alpha, opened)
        loaded = subtract_initial(loaded, initial, residual_base, opened)
        found = open_checkpoint(merged)
        opened.callback(found.close)
        plan = plan_merge(checkpoint, loaded, Selection(), tied)
        judge = _Judge(plan, found)
        names = [name for name in plan.sources if name in found.specs]
        verdicts = dict(zip(names, _each(judge, names, workers or worker_count(), progress), strict=True))
        return _report(plan, found, verdicts, judge, os.fspath(base), os.fspath(merged), tuple(allow))


def _each(
    judge: Callable[[str], TensorVerdict | None], names: Sequence[str], workers: int, progress: Progress | None
) -> Iterator[TensorVerdict | None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the parallelism
    try:
        with ThreadPoolExecutor(workers) as pool:
            for done, verdict in enumerate(pool.map(judge, names), 1):
                if progress:
                    progress(done, len(names))
                yield verdict
    finally:
        torch.set_num_threads(before)


def _report(
    plan: MergePlan,
    found: Checkpoint,
    verdicts: dict[str, TensorVerdict | None],
    judge: _Judge,
    base: str,
    merged: str,
    allow: tuple[str, ...],
) -> VerifyReport:
    missing = tuple(name for name in plan.sources if name not in found.specs)
    extra = tuple(name for name in found.specs if name not in plan.sources and not _is_copy(plan, found, name))
    tensors = tuple(verdict for verdict in verdicts.values() if verdict)
    count = {kind: sum(t.verdict == kind for t in tensors) for kind in ("exact", "rounding", "wrong")}
    status = "proven"
    if count["wrong"] or missing or extra:
        status = "wrong"
    elif not judge.moved and "inconclusive" not in allow:
        status = "inconclusive"
    return VerifyReport(
        base,
        merged,
        status,
        tensors,
        count["exact"],
        count["rounding"],
        count["wrong"],
        len(verdicts) - len(tensors),
        tuple(dict.fromkeys(t.detail for t in tensors if t.verdict == "rounding")),
        missing,
        extra,
        plan.warnings,
    )


def _is_copy(plan: MergePlan, found: Checkpoint, name: str) -> bool:
    """A tied head that a saver wrote out again is no other tensor."""
    same = [n for n, spec in found.specs.items() if n in plan.sources and spec == found.specs[name]]
    return any(equal_rows(Source(found.shard_of[name], name), Source(found.shard_of[n], n)) for n in same)


class _Judge:
    """One tensor after the other; None for one that the adapters leave alone and that is the base's."""

    def __init__(self, plan: MergePlan, found: Checkpoint) -> None:
        self._plan, self._found = plan, found
        self._load = Loader(torch.device("cpu"))
        self.moved = False  # whether some replayed weight is not the base's, so that there is something to see

    def __call__(self, name: str) -> TensorVerdict | None:
        source, found = self._plan.sources[name], Source(self._found.shard_of[name], name)
        changed = name in self._plan.changed
        if source.spec.shape != found.spec.shape:
            return TensorVerdict(name, "wrong", f"its shape is {found.spec.shape} and should be {source.spec.shape}")
        floats = source.spec.dtype in TORCH_FLOATS and found.spec.dtype in TORCH_FLOATS
        if not floats or not source.spec.shape or not source.spec.size:
            same = source.spec == found.spec and source.file.read(source.name) == found.file.read(name)
            if same:
                return TensorVerdict(name, "exact", "") if changed else None
            return TensorVerdict(name, "wrong", "its values are not those of the base or the adapter")
        wrong, apart = self._compare(name, source, found)
        if not wrong:
            return TensorVerdict(name, "exact", "") if changed else None
        if name not in self._plan.placements:
            what = "the adapter's value" if changed else "an untouched tensor"
            return TensorVerdict(name, "wrong", f"{wrong} weights of {what} were altered, by up to {apart:.0f} steps")
        return self._explain(name, source, found)

    def _pieces(self, name: str) -> list[tuple[int, int, Piece | None]]:
        """The rows of a tensor with what happens to them."""
        placements = self._plan.placements.get(name, ())
        source = self._plan.sources[name]
        rows = placements[0].rows if placements else source.spec.shape[0]
        edges = sorted({0, rows, *(edge for p in placements for edge in (p.start, p.stop))})
        found: list[tuple[int, int, Piece | None]] = []
        for start, stop in pairwise(edges):
            inside = [p for p in placements if p.start <= start and stop <= p.stop]
            found.append((start, stop, Piece(source, start, stop, inside, self._load, False) if inside else None))
        return found

    def _blocks(self, name: str, source: Source, found: Source) -> Iterator[tuple[int, Piece | None, Tensor, Tensor]]:
        """(first row, what happens, the source's rows, the merged rows), the tensor seen as its matrix."""
        pieces = self._pieces(name)
        rows = pieces[-1][1]
        for start, stop, piece in pieces:
            for first in range(start, stop, ROWS):
                last = min(first + ROWS, stop)
                yield first, piece, source.matrix_rows(rows, first, last), found.matrix_rows(rows, first, last)

    def _compare(self, name: str, source: Source, found: Source) -> tuple[int, float]:
        """How many weights are not those of the replay, and by how many steps the farthest is off."""
        work = Workspace(torch.device("cpu"))
        wrong, apart = 0, 0.0
        for first, piece, base, merged in self._blocks(name, source, found):
            out = torch.empty_like(merged)
            if piece is None:
                cast_rounded(base, out, work)
            elif apply_rounded(base, piece.seen(base, first, work), out, work).changed:
                self.moved = True
            same = same_codes(out, merged)
            if not bool(same.all()):
                wrong += int((~same).sum())
                apart = max(apart, beyond(out.double(), merged, ~same))
        if name not in self._plan.placements and name in self._plan.changed:
            self.moved = True
        return wrong, apart

    def _explain(self, name: str, source: Source, found: Source) -> TensorVerdict:
        """Which rounding the tensor has, or what is wrong with it."""
        placements = self._plan.placements[name]
        if any(p.update.kind not in ADDITIVE for p in placements):
            return self._explain_loosely(name, source, found)
        outside = dict.fromkeys(ROUNDINGS, 0)
        apart = dict.fromkeys(ROUNDINGS, 0.0)
        suspects = {way.factors: Suspect(placements, self._load, way.factors) for way in ROUNDINGS.values()}
        for first, piece, base, merged in self._blocks(name, source, found):
            if piece is None:
                continue
            parts = {factors: suspect.parts(first, len(base)) for factors, suspect in suspects.items()}
            wide, actual = base.double(), merged.double()
            known = wide.isfinite() & actual.isfinite()
            for title, way in ROUNDINGS.items():
                if outside[title] and title != next(iter(ROUNDINGS)):
                    continue
                low, high = interval(wide, parts[way.factors], way, merged.dtype)
                off = ((actual < low) | (actual > high)) & known
                outside[title] += int(off.sum())
                if bool(off.any()):
                    apart[title] = max(
                        apart[title], beyond(torch.minimum(high, torch.maximum(low, actual)), merged, off)
                    )
        differ, farthest = self._compare(name, source, found)
        first_way = next(iter(ROUNDINGS))
        for title, count in outside.items():
            if count == 0 and not _too_few(differ, found):
                return TensorVerdict(name, "rounding", title)
        if not _too_few(differ, found):
            differ, farthest = outside[first_way], apart[first_way]
        evidence = self._evidence(name, source, found, differ, farthest)
        return TensorVerdict(name, "wrong", diagnose(evidence))

    def _explain_loosely(self, name: str, source: Source, found: Source) -> TensorVerdict:
        """For updates with norms or parts in them: what 16 bits on the way leave."""
        work = Workspace(torch.device("cpu"))
        off, farthest, sums = 0, 0.0, [0.0, 0.0, 0.0]
        for first, piece, base, merged in self._blocks(name, source, found):
            if piece is None:
                continue
            exact = torch.empty(base.shape, dtype=torch.float64)
            apply_rounded(base, piece.seen(base, first, work), exact, work)
            wide, actual = base.double(), merged.double()
            slack = LOOSE_STEPS[merged.dtype] * (exact.abs() + wide.abs())
            bad = ((actual - exact).abs() > slack) & wide.isfinite()
            off += int(bad.sum())
            if bool(bad.any()):
                farthest = max(farthest, beyond(exact, merged, bad))
            E, D = (actual - wide).nan_to_num(), (exact - wide).nan_to_num()
            sums = [sums[0] + float((E * E).sum()), sums[1] + float((D * D).sum()), sums[2] + float((E * D).sum())]
        differ, apart = self._compare(name, source, found)
        if not off and not _too_few(differ, found):
            return TensorVerdict(name, "rounding", LOOSE)
        rank = sum(p.update.rank for p in self._plan.placements[name])
        E2, D2, ED = sums
        evidence = Evidence(E2, D2, ED, rank, found.spec.size, off or differ, farthest or apart)
        return TensorVerdict(name, "wrong", diagnose(evidence))

    def _evidence(self, name: str, source: Source, found: Source, outside: int, apart: float) -> Evidence:
        placements = self._plan.placements[name]
        own = Suspect(placements, self._load, None)
        others = {
            other: Suspect(p, self._load, None)
            for other, p in self._plan.placements.items()
            if other != name and self._plan.sources[other].spec.shape == source.spec.shape
            and all(each.update.kind in ADDITIVE for each in p)
        }  # fmt: skip
        turned = None
        if len(source.spec.shape) == 2 and source.spec.shape[0] == source.spec.shape[1]:
            turned = Suspect(placements, self._load, None, turned=True)
        E2 = D2 = ED = T2 = ET = 0.0
        swapped = {other: [0.0, 0.0] for other in others}
        for first, piece, base, merged in self._blocks(name, source, found):
            if piece is None:
                continue
            E = (merged.double() - base.double()).nan_to_num()
            D = own.change(first, len(base))
            E2, D2, ED = E2 + float((E * E).sum()), D2 + float((D * D).sum()), ED + float((E * D).sum())
            if turned:
                T = turned.change(first, len(base))
                T2, ET = T2 + float((T * T).sum()), ET + float((E * T).sum())
            for other, suspect in others.items():
                P = suspect.change(first, len(base))
                swapped[other][0] += float((P * P).sum())
                swapped[other][1] += float((E * P).sum())

        def cosine(squared: float, both: float) -> float:
            return both / math.sqrt(squared * E2) if squared and E2 else 0.0

        best = max(swapped, key=lambda other: cosine(*swapped[other]), default="")
        return Evidence(
            E2,
            D2,
            ED,
            sum(p.update.rank for p in placements if p.expert in (None, 0)),
            found.spec.size,
            outside,
            apart,
            cosine(T2, ET),
            cosine(*swapped[best]) if best else 0.0,
            best,
        )


def _too_few(differ: int, found: Source) -> bool:
    """Other arithmetic in 32 bits or more shows in many weights; a few that differ were altered by hand."""
    return found.spec.dtype in ("F32", "F64") and differ < found.spec.size // 1000
