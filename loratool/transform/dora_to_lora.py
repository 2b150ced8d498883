"""Convert DoRA to plain LoRA with its base: the best factors of a rank for each module's delta.

W' - W = (g - 1) W + g s B A, row by row, with g = m / ||W + s B A||, has no low rank, so this is an approximation. One
matrix is in memory at a time; the factors are stored in a journal, as in `extract`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.stacked import stack_factors
from ..adapters.updates.dora import DoRA
from ..adapters.updates.low_rank import LowRank
from ..adapters.updates.update import UpdateSpec
from ..binding.modules.placement import Placement, place_update
from ..binding.modules.resolve import resolve_modules
from ..durable.journal import Journal
from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..files.dtypes import TensorSpec
from ..files.tensor_ref import TensorRef
from ..numerics.arrays import Numbers, doubled, widen
from ..numerics.forms import F32, Single, Wide
from ..numerics.linalg import norm
from ..numerics.svd import row_blocks
from .delta_factors import DeltaFactors, SvdChoices, factor_delta
from .lazy import Made, Tensors, Transformed, with_factors
from .log import Loss

ROWS = 512  # of a weight, in memory at a time in float64

ROUNDING = 2.0**-21  # a loss from float32's rounding is smaller, and a loss from truncation larger


def dora_to_lora(state: Transformed, base: Checkpoint, rank: int | None, journal: Journal) -> Transformed:
    """Return the adapter with LoRA in place of DoRA.

    Args:
        base: the adapter's model.
        rank: of the factors; None for each module's rank.
        journal: open; it stores the factors until they are written.

    Raises:
        InputError: a module is not in the base.
    """
    source = state.adapter
    alone = source.only([module for module, update in source.updates.items() if update.cls is DoRA])
    matches, absent = resolve_modules(base.specs, alone, base.configs)
    if absent:
        raise InputError(f"of {source.name} is not in {base.path}", culprit=absent[0])
    planned = {}
    for number, (module, update) in enumerate(alone.updates.items()):
        places = [
            (match.name, placement)
            for match in matches[module]
            for placement in place_update(alone, module, 1.0, match, base.specs, base.model_types, matches)
        ]
        loaded = source.load(update)
        assert isinstance(loaded, DoRA)
        D = _dora_delta(loaded, _read(source, update, base, places), update.along_inputs, module)
        factors = factor_delta(module, "linear", tuple(D.shape), (D,), rank or update.rank, 0, SvdChoices())
        stored = journal.add(number, (module, 0, 0), "", factors)
        planned[module] = _plan_module(update, stored, _loss(D, stored))
    config = source.config
    plain = replace(source, config=replace(config, peft={**config.peft, "use_dora": False} if config.peft else {}))
    return with_factors(replace(state, adapter=plain), planned)


def _plan_module(update: UpdateSpec, factors: DeltaFactors, loss: Loss) -> Made:
    """Return the module as LoRA, with its loss."""
    rank, A, B = max(1, factors.known), update.specs["A"].shape, update.specs["B"].shape
    sides = {"A": TensorSpec("F32", (rank, *A[1:])), "B": TensorSpec("F32", (B[0], rank, *B[2:]))}

    def make() -> tuple[Tensors, Loss]:
        if not factors.known:
            return {role: Numbers.of(np.zeros(spec.shape, np.float32)) for role, spec in sides.items()}, loss
        pair = zip("AB", factors.tensors(factors.known, F32), strict=True)
        return {role: side.reshape(*sides[role].shape) for role, side in pair}, loss

    tensors = {role: update.tensors[role] for role in "AB"}
    plain = replace(update, cls=LowRank, tensors=tensors, specs=sides, scale=1.0, detail=None)
    return Made(plain, make, (update.module,), resized=True)


def _loss(D: Single, factors: DeltaFactors) -> Loss:
    """Return the loss of each row of a change D, (out, in), by its factors."""
    A, B = (side.wide() for side in factors.tensors(factors.known, F32))
    squared, total, first = list[Wide](), list[Wide](), 0
    for block in row_blocks(D):
        squared.append(np.square(block - B[first : first + len(block)] @ A).sum(1))
        total.append(np.square(doubled(block)).sum(1))
        first += len(block)
    loss = Loss.of_rows(np.concatenate(squared), np.concatenate(total))
    is_cut = factors.known < min(D.shape) and loss.relative > ROUNDING
    return replace(loss, cut=is_cut)


def _read(source: Adapter, update: UpdateSpec, base: Checkpoint, places: list[tuple[str, Placement]]) -> Single:
    """Read the module's weight W, (out, in), from all tensors that hold rows of it."""
    out, width = update.shape[0], update.specs["A"].size // update.rank
    W = np.empty((out, width), np.float32)
    for name, placement in places:
        ref = TensorRef(source.file, update.base) if update.base else base.ref(name)
        if placement.transposed:
            row = 0
            for block in ref.blocks(ROWS * out):
                W[:, row : row + len(block)] = _single(block).T
                row += len(block)
            continue
        for start in range(placement.start, placement.stop, ROWS):
            stop, row = min(start + ROWS, placement.stop), placement.skip + start - placement.start
            W[row : row + stop - start] = _single(ref.read_matrix(placement.rows, start, stop))
    return W


def _single(x: Numbers) -> Single:
    singles: Single = widen(x, np.empty(x.shape, np.float32))
    return singles


@np.errstate(all="ignore")
def _dora_delta(update: DoRA, W: Single, along_inputs: bool, module: str) -> Single:
    """Overwrite W with W' - W and return it. It is computed from small terms, since subtracting W from W' cancels."""
    B, A = (side[0] for side in stack_factors(update))
    magnitude = update.magnitude.wide().reshape(-1)
    if along_inputs:
        B, A, W = A.T, B.T, np.ascontiguousarray(W.T)
    right, together = A.astype(np.float32), len(W) // len(magnitude)  # columns of an input's kernel share a norm
    count = max(1, ROWS // together)
    for first in range(0, len(magnitude), count):
        rows = slice(first * together, (first + count) * together)
        added = doubled(B[rows].astype(np.float32) @ right)
        norms = norm((W[rows] + added).reshape(-1, together * W.shape[1]), 1)
        if not np.isfinite(norms).all():
            raise InputError("has rows with inf or nan, but DoRA needs their norms", culprit=module)
        g = np.where(norms == 0, 0.0, magnitude[first : first + count] / norms)  # for a row of zeros any g is right
        g = np.repeat(g, together)[:, None]
        W[rows] = (g - 1.0) * W[rows] + g * added
    return np.ascontiguousarray(W.T) if along_inputs else W
