"""Count the intruder dimensions that a change brings into a weight, and say what they mean.

W' of an adapter is the number that a merge would round: that of all its updates of these rows, of DoRA too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...adapters.adapter import Adapter
from ...binding.modules.placement import Placement
from ...binding.modules.selection import Selection
from ...binding.ties.placed_modules import Placed, bind_adapter, placed_modules
from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint
from ...files.tensor_ref import BLOCK, TensorRef
from ...numerics.intruders import THRESHOLD, TOP, find_intruders
from ...numerics.seeded_random import Draw
from ...numerics.spectrum import SpectrumPoints, spectrum_points
from ...reports.document import Line, Toned, line
from ...reports.numbers import plural
from ...streaming.segment import RowSegment, UpdateLoader


@dataclass(frozen=True)
class IntruderRule:
    """Which singular vectors of W' are looked at, and which |cosine| with one of W is a match (numerics.intruders)."""

    top: int
    threshold: float

    @classmethod
    def parse(cls, top: int | None, threshold: float | None) -> IntruderRule:
        """Return the rule of a call's arguments, the paper's where they are None.

        Raises:
            UsageError: the threshold is no cosine above 0.
        """
        if threshold is not None and not 0 < threshold <= 1:
            raise UsageError(f"--threshold {threshold} is a cosine: above 0, at most 1")
        return cls(TOP if top is None else top, THRESHOLD if threshold is None else threshold)


@dataclass(frozen=True)
class IntruderCount:
    """The intruder dimensions of a weight, of a stack those of all its matrices.

    Attributes:
        examined: leading left singular vectors of W', less than the rule's for a W' of less rank.
        new: of these have no match in W.
        undecided: of these are in float32's doubt.
        first: the place of the first new one by its singular value, from 1; None without any.
        spectrum: the curve of the singular values that were examined, with the energies of all of W'.
    """

    examined: int
    new: int
    undecided: int
    first: int | None
    spectrum: SpectrumPoints | None = None


MatrixPair = tuple[Callable[[], Tensor], Callable[[], Tensor]]  # read W' and W as (out, in), in float32


def count_intruders(name: str, pairs: Iterable[MatrixPair], rule: IntruderRule, device: torch.device) -> IntruderCount:
    """Count what is new in each W', a matrix at a time; `name` seeds the random starts."""
    examined = new = undecided = 0
    first: int | None = None
    squares, energy, matrices = torch.zeros(0, dtype=torch.float64), 0.0, 0
    for e, (tuned, base) in enumerate(pairs):
        found = find_intruders(tuned, base, rule.top, rule.threshold, Draw(0, f"{name} {e}").generator(device))
        examined += len(found.new)
        new += int(found.new.sum())
        undecided += int(found.undecided.sum())
        if found.new.any():
            place = int(found.new.nonzero()[0]) + 1
            first = place if first is None else min(first, place)
        squares = pad_sequence([squares, found.S.square()]).sum(1)
        energy, matrices = energy + found.energy, e + 1
    return IntruderCount(examined, new, undecided, first, spectrum_points(squares, matrices, energy))


def place_matrices(base: Checkpoint, adapter: Adapter, selection: Selection) -> Mapping[str, Sequence[Placed]]:
    """Return what each module changes, `together` with what changes the same rows.

    Raises:
        InputError: a module changes some rows of another, so that neither's rows are one matrix; or as `bind`.
    """
    placed = placed_modules(base, bind_adapter(base, adapter, selection))
    return {module: [each._replace(together=_of_same_rows(each)) for each in found] for module, found in placed.items()}


def _of_same_rows(placed: Placed) -> tuple[Placement, ...]:
    p = placed.placement
    found = tuple(other for other in placed.together if other.start < p.stop and p.start < other.stop)
    for other in found:
        if p.start < other.start or other.stop < p.stop:
            raise InputError(
                f"and {other.update.module} change some rows both, and others not",
                culprit=p.update.module,
                remedy="merge the adapter, and compare the models with diff --spectra",
            )
    return found


def matrices_of(placed: Sequence[Placed], device: torch.device) -> Iterator[MatrixPair]:
    """Yield for each matrix that a module changes how W' and W are read."""
    load = UpdateLoader(torch.device("cpu"))
    for weight, placement, together in placed:
        columns = weight.spec.size // placement.rows
        segment = RowSegment(weight, columns, placement.start, placement.stop, together, load)

        def merged(weight: TensorRef = weight, p: Placement = placement, segment: RowSegment = segment) -> Tensor:
            return _read(weight, p, lambda W, start: segment.reals(W, start)[0], device)

        def plain(weight: TensorRef = weight, p: Placement = placement) -> Tensor:
            return _read(weight, p, lambda W, start: W, device)

        yield merged, plain


def _read(
    weight: TensorRef, placement: Placement, change: Callable[[Tensor, int], Tensor], device: torch.device
) -> Tensor:
    """Return a placement's rows as (out, in) in float32, by blocks.

    Raises:
        InputError: they have nan, inf or more than float32 can.
    """
    columns, count = weight.spec.size // placement.rows, placement.stop - placement.start
    out = torch.empty(count, columns, dtype=torch.float32, device=device)
    step = max(1, BLOCK // columns)
    for start in range(placement.start, placement.stop, step):
        W = weight.matrix_rows(placement.rows, start, min(start + step, placement.stop))
        block = change(W, start).float()
        if not block.isfinite().all():
            raise InputError(
                f"holds nan, inf or more than float32 can, in {weight.file.path} or with the change of "
                f"{placement.update.module}",
                culprit=weight.name,
            )
        out[start - placement.start : start - placement.start + len(block)] = block
    return out.T if placement.transposed else out


def what_is_new(top: int, threshold: float) -> str:
    """Return the sentence that defines an intruder dimension."""
    return (
        f"new is one of the {top} leading left singular vectors of a changed weight whose |cosine| with all of the "
        f"base's is below {threshold:g} (arXiv:2410.21228)"
    )


def intruder_verdict(counts: Sequence[IntruderCount], rule: IntruderRule) -> Iterator[Line]:
    """Yield what the counts mean."""
    new, examined = sum(each.new for each in counts), sum(each.examined for each in counts)
    what = f"of {examined:,} leading left singular vectors, {rule.top} of each matrix at most, are intruder dimensions"
    where = f", in {sum(each.new > 0 for each in counts):,} of {plural(len(counts), 'weight')}" if new else ""
    cosine = f"|cosine| below {rule.threshold:g} with all of the base's"
    yield line(Toned(f"{new:,}", "attention" if new else "good"), f" {what}{where}: {cosine}")
    if undecided := sum(each.undecided for each in counts):
        yield line(f"{undecided:,} more cannot be told, as singular values are too close to one another")
    if new:
        yield line("the more they are and the larger, the more a model forgets of what it knew (arXiv:2410.21228)")
    else:
        yield line("the largest directions are the base's own, as after a full fine-tune (arXiv:2410.21228)")
