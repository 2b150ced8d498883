"""Convert updates whose change depends on the weight or its size to plain LoRA, with the base: the best of a rank.

Of DoRA, W' - W = (g - 1) W + g s B A, row by row, with g = m / ||W + s B A||, has no low rank, so this is an
approximation, as it is of rotations. One matrix is in memory at a time; the factors are stored in a journal, as in
`extract`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.stacked import stack_factors
from ..adapters.updates.dora import DoRA
from ..adapters.updates.low_rank import LowRank
from ..adapters.updates.update import Update, UpdateSpec
from ..binding.modules.placement import Placement, place_update
from ..binding.modules.resolve import resolve_modules
from ..durable.journal import Journal
from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..files.dtypes import TensorSpec
from ..files.tensor_ref import TensorRef
from ..numerics.arrays import ON_CPU, Numbers, doubled, widen
from ..numerics.forms import F32, Single, Wide
from ..numerics.linalg import norm
from ..numerics.products import Term
from ..numerics.short_products import column_products, row_products
from ..numerics.svd import row_blocks
from ..numerics.tensors import numbers_of
from .delta_factors import DeltaFactors, SvdChoices, factor_delta
from .expand import config_of_lora, is_embedding, namer
from .lazy import Made, Tensors, Transformed, only, with_factors
from .log import Loss

ROWS = 512  # of a weight, in memory at a time in float64

ROUNDING = 2.0**-21  # a loss from float32's rounding is smaller, and a loss from truncation larger


def needs_weight(update: UpdateSpec) -> bool:
    """Return whether the change of an update depends on the weight, or on a size that only the weight tells."""
    return not update.cls.in_stored_layout and (not update.additive or None in update.cls.flat(update))


def low_rank(update: UpdateSpec) -> int:
    """Return the rank that an update has as LoRA by default; 0 if its change has no low rank."""
    return update.rank or update.cls.change_rank(update)


def change_to_lora(state: Transformed, base: Checkpoint, rank: int | None, journal: Journal) -> Transformed:
    """Return the adapter with LoRA in place of all updates that need the weight.

    Args:
        base: the adapter's model.
        rank: of the factors; None for each module's `low_rank`.
        journal: open; it stores the factors until they are written.

    Raises:
        InputError: a module is not in the base, or is a bias.
    """
    source = state.adapter
    alone = source.only([module for module, update in source.updates.items() if needs_weight(update)])
    matches, absent = resolve_modules(base.specs, alone, base.configs)
    if absent:
        raise InputError(f"of {source.name} is not in {base.path}", culprit=absent[0])
    planned, without = {}, [module for module in alone.updates if module not in matches]
    for number, (module, update) in enumerate(alone.updates.items()):
        if module in without:
            continue
        if len(base.specs[matches[module][0].name].shape) < 2:
            message, remedy = "is a bias, whose change no LoRA holds", "merge the adapter, and extract from the model"
            raise InputError(message, culprit=module, remedy=remedy)
        wanted = rank or low_rank(update)
        assert wanted, "the caller asks for a rank"
        places = [
            (match.name, placement)
            for match in matches[module]
            for placement in place_update(alone, module, 1.0, match, base.specs, base.model_types, matches)
        ]
        shape, W = base.specs[places[0][0]].shape, read_weight(source, update, base, places)
        loaded, kernel = source.load(update.cls.of_tensor(update, shape)), shape[2:]
        if isinstance(loaded, DoRA):
            D = _dora_delta(loaded, W, update.along_inputs, module)
        else:
            D = _change(loaded.sized(*W.shape), W, module)
        factors = factor_delta(module, "linear", tuple(D.shape), (D,), wanted, 0, SvdChoices())
        stored = journal.add(number, (module, 0, 0), "", factors)
        swapped = is_embedding(source, module) and not places[0][1].transposed
        planned[module] = _plan_module(source, update, stored, _loss(D, stored), kernel, swapped)
    config = source.config
    if config.peft.get("use_dora"):
        source = replace(source, config=replace(config, peft={**config.peft, "use_dora": False}))
    changed = with_factors(
        only(replace(state, adapter=source), [m for m in source.updates if m not in without]), planned
    )
    if any(update.cls is not DoRA for update in alone.updates.values()):
        adapter = changed.adapter
        changed = replace(changed, adapter=replace(adapter, config=config_of_lora(source, adapter.updates)))
    return changed


def _plan_module(
    source: Adapter, update: UpdateSpec, factors: DeltaFactors, loss: Loss, kernel: tuple[int, ...], swapped: bool
) -> Made:
    """Return the module as LoRA, with its loss.

    Args:
        kernel: of a convolution.
        swapped: the adapter has the factors of the transpose.
    """
    rank, name_of = max(1, factors.known), namer(source, update)
    _, out, inputs = factors.sizes
    sides = {
        "A": TensorSpec("F32", (rank, out) if swapped else (rank, inputs // math.prod(kernel), *kernel)),
        "B": TensorSpec("F32", (inputs, rank) if swapped else (out, rank, *(1 for _ in kernel))),
    }

    def make() -> tuple[Tensors, Loss]:
        if not factors.known:
            return {role: Numbers.of(np.zeros(spec.shape, np.float32)) for role, spec in sides.items()}, loss
        A, B = factors.tensors(factors.known, F32)
        pair = {"A": B.T, "B": A.T} if swapped else {"A": A, "B": B}
        return {role: side.reshape(*sides[role].shape) for role, side in pair.items()}, loss

    tensors = {role: update.tensors.get(role, name_of(role)) for role in "AB"}
    plain = replace(update, cls=LowRank, tensors=tensors, specs=sides, scale=1.0, detail=None)
    if is_embedding(source, update.module):
        plain = replace(plain, transposed=True)
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


def read_weight(source: Adapter, update: UpdateSpec, base: Checkpoint, places: list[tuple[str, Placement]]) -> Single:
    """Read the module's weight W, (out, in), from all tensors that hold rows of it."""
    rows, columns = max(p.skip + p.stop - p.start for _, p in places), _columns(source, update, base, places)
    out, width = (columns, rows) if places[0][1].transposed else (rows, columns)
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


def _columns(source: Adapter, update: UpdateSpec, base: Checkpoint, places: list[tuple[str, Placement]]) -> int:
    name, placement = places[0]
    spec = source.file.specs[update.base] if update.base else base.specs[name]
    return spec.size // max(1, placement.rows)


def _change(update: Update, W: Single, module: str) -> Single:
    """Return W' - W of a weight (out, in). update: of this size."""
    weight, (rows, columns) = Numbers.of(W), W.shape
    if not update.additive and not weight.all_finite():
        raise InputError("has rows with inf or nan, which would spoil others", culprit=module)
    D, terms = np.zeros(W.shape), list[Term]()
    if update.additive:
        terms = update.terms(1.0, False)
        if of_rows := update.delta(1.0, False):
            of_rows(0, rows).dense(np.float64, ON_CPU).fill(slice(0, rows), 0.0, D)
    elif update.mixes:
        update.mixing(1.0, False).change(weight, 0).dense(np.float64, ON_CPU).fill(slice(0, rows), 0.0, D)
    elif update.reads_columns:
        terms = update.terms_of(column_products(update.reading(), lambda: [(0, weight)], columns), 1.0)
    elif update.projects:
        projected, terms = update.projected(1.0), update.terms(1.0, False)
        D += float(projected.scale) * (row_products(weight, projected.U) @ projected.K.wide())
    else:
        value, factor = update.moved(1.0, False, slice(0, rows), columns)
        if value is not None:
            value.dense(np.float64, ON_CPU).fill(slice(0, rows), 0.0, D)
        D += (factor.of_rows_in(slice(0, rows))[0] - 1) * doubled(W)
    for term in terms:
        D += float(term.scale) * (numbers_of(term.left).wide() @ numbers_of(term.right).wide()[:, :columns])
    return D.astype(np.float32)


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
