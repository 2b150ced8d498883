"""Count the intruder dimensions that a change brings into a weight.

W' of an adapter is the unrounded result of a merge, with all its updates of these rows, also DoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ...adapters.adapter import Adapter
from ...binding.modules.placement import Placement
from ...binding.modules.selection import Selection
from ...binding.ties.placed_modules import Placed, bind_adapter, placed_modules
from ...errors import InputError
from ...files.checkpoint import Checkpoint
from ...files.tensor_ref import BLOCK, TensorRef
from ...numerics.arrays import Array, Device, Numbers, empty, like_of, sent, widen
from ...numerics.intruders import find_intruders
from ...numerics.linalg import padded
from ...numerics.seeded_random import Draw
from ...numerics.spectrum import spectrum_points
from ...streaming.segment import RowSegment, UpdateLoader
from ...views.intruders import IntruderCount, IntruderRule

MatrixPair = tuple[Callable[[], Array], Callable[[], Array]]  # read W' and W as (out, in), in float32


def count_intruders(name: str, pairs: Iterable[MatrixPair], rule: IntruderRule) -> IntruderCount:
    """Count the intruder dimensions of each W', a matrix at a time. `name` seeds the random starts."""
    examined = new = undecided = 0
    first: int | None = None
    squares, energy, matrices = np.zeros(0), 0.0, 0
    for e, (tuned, base) in enumerate(pairs):
        count = find_intruders(tuned, base, rule.top, rule.threshold, Draw(0, f"{name} {e}"))
        examined += len(count.new)
        new += int(count.new.sum())
        undecided += int(count.undecided.sum())
        if count.new.any():
            place = int(count.new.argmax()) + 1
            first = place if first is None else min(first, place)
        size = max(len(squares), len(count.S))
        squares = padded(squares, 0, size) + padded(np.square(count.S), 0, size)
        energy, matrices = energy + count.energy, e + 1
    return IntruderCount(examined, new, undecided, first, spectrum_points(squares, matrices, energy))


def place_matrices(base: Checkpoint, adapter: Adapter, selection: Selection) -> Mapping[str, Sequence[Placed]]:
    """Return the placement of each module, with the updates of the same rows in `together`.

    Raises:
        InputError: a module changes some rows of another, so that neither is a matrix by itself; or as `bind`.
    """
    placed = placed_modules(base, bind_adapter(base, adapter, selection))
    return {
        module: [each._replace(together=_of_same_rows(each)) for each in places] for module, places in placed.items()
    }


def _of_same_rows(placed: Placed) -> tuple[Placement, ...]:
    p = placed.placement
    others = tuple(other for other in placed.together if other.start < p.stop and p.start < other.stop)
    for other in others:
        if p.start < other.start or other.stop < p.stop:
            raise InputError(
                f"and {other.update.module} overlap in some rows only",
                culprit=p.update.module,
                remedy="merge the adapter, and compare the models with diff --spectra",
            )
    return others


def matrices_of(placed: Sequence[Placed], device: Device) -> Iterator[MatrixPair]:
    """Yield functions that read W' and W, for each matrix that a module changes."""
    load, like = UpdateLoader(), like_of(device)
    for weight, placement, together in placed:
        columns = weight.spec.size // placement.rows
        segment = RowSegment(weight, columns, placement.start, placement.stop, together, load)

        def merged(weight: TensorRef = weight, p: Placement = placement, segment: RowSegment = segment) -> Array:
            return _read(weight, p, lambda W, start: segment.reals(W, start)[0].astype(np.float32), like)

        def plain(weight: TensorRef = weight, p: Placement = placement) -> Array:
            return _read(weight, p, lambda W, start: widen(W, np.empty(W.shape, np.float32)), like)

        yield merged, plain


@np.errstate(over="ignore")  # told below
def _read(
    weight: TensorRef, placement: Placement, change: Callable[[Numbers, int], npt.NDArray[np.float32]], like: Array
) -> Array:
    """Return a placement's rows as (out, in) in float32, by blocks.

    Raises:
        InputError: they have nan, inf or numbers beyond float32.
    """
    columns, count = weight.spec.size // placement.rows, placement.stop - placement.start
    out = empty(np.float32, count, columns, like=like)
    step = max(1, BLOCK // columns)
    for start in range(placement.start, placement.stop, step):
        W = weight.read_matrix(placement.rows, start, min(start + step, placement.stop))
        block = change(W, start)
        if not np.isfinite(block).all():
            raise InputError(
                f"holds nan, inf or numbers too large for float32, in {weight.file.path} or with the delta of "
                f"{placement.update.module}",
                culprit=weight.name,
            )
        out[start - placement.start : start - placement.start + len(block)] = sent(block, like)
    return out.T if placement.transposed else out
