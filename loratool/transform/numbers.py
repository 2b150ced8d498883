"""Steps that change numbers: fold the scale, subtract a start, truncate to a rank, set one scale, and settle the type.

All but the last compute in float64 without rounding to a stored type. `settle` rounds once, and measures all losses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.stacked import factor_forms, round_factors, stack_factors
from ..adapters.updates.add import AddDelta
from ..adapters.updates.dora import DoRA
from ..adapters.updates.experts import Experts
from ..adapters.updates.low_rank import LowRank
from ..adapters.updates.update import Update, UpdateSpec
from ..errors import InputError
from ..files.dtypes import TensorSpec
from ..numerics.arrays import Numbers, recast, rounded_to
from ..numerics.factored_svd import factored_svd
from ..numerics.forms import F32, F64, Form, Wide, holding
from ..numerics.linalg import adjoint, padded, triangle_of
from ..numerics.spectrum import RANK_TOLERANCE
from .lazy import (
    LazyFile,
    Made,
    Tensors,
    Transformed,
    has_numbers,
    loss_of,
    row_squares,
    squares_of_rows,
    with_factors,
)
from .log import EPSILON, NO_LOSS, Loss

TOO_LARGE = "its change is too large for float64's squares"


def is_exact_product(form: Form, scale: float) -> bool:
    """Return whether float64 holds the product of `scale` and any number of `form`, by counting their bits."""
    return _holds_product(form.precision, scale)


def _holds_product(digits: int, scale: float) -> bool:
    significand = int(math.ldexp(abs(math.frexp(scale)[0]), 53))
    of_scale = 53 - ((significand & -significand).bit_length() - 1) if scale else 0
    return of_scale <= 1 or digits + of_scale <= 53


def _digits(side: Numbers) -> int:
    """Return the most bits in a significand; float64 numbers between steps may have those of a shorter type."""
    if side.form != F64:
        return side.form.precision
    significands = (np.abs(np.frexp(side.wide())[0]) * 2.0**53).astype(np.int64)
    lowest = (significands & -significands)[significands != 0]
    return 54 - int(lowest.min()).bit_length() if len(lowest) else 0


@np.errstate(over="ignore")
def single(number: float) -> float:
    """Return the nearest float32 number; inf if the number overflows."""
    return float(np.float32(number))


def alpha_for_scale(scale: float, rank: int) -> float:
    """Return an alpha with alpha / rank == scale, if there is one.

    A float32 number is preferred, because files store alpha in float32; then the float64 neighbours of scale * rank are
    tried. If none divides exactly, scale * rank is returned.
    """
    product = scale * rank
    candidates = (single(product), product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf))
    return next((alpha for alpha in candidates if alpha / rank == scale), product)


@np.errstate(all="ignore")
def loss_between(true: tuple[Wide, Wide], written: tuple[Wide, Wide]) -> Loss:
    """Return the loss of writing stacked factors (B, A) as others; at least float64's rounding error."""
    (B, A), (made_B, made_A) = true, written
    R = triangle_of(adjoint(A))
    total = row_squares(B @ adjoint(R))
    if B.shape != made_B.shape:
        squared = squares_of_rows(np.concatenate([made_B, -B], -1), np.concatenate([made_A, A], -2))
    elif np.array_equal(made_A, A):
        squared = row_squares((made_B - B) @ adjoint(R))
    else:
        squared = _squares_of_both(made_B - B, made_A, B, made_A - A)
    return Loss.of_rows(np.maximum(squared, EPSILON**2 * total), total)


def _squares_of_both(C: Wide, made_A: Wide, B: Wide, D: Wide) -> Wide:
    """Return the squared norms of the rows of C A' + B D, which is B' A' - B A for C = B' - B and D = A' - A.

    Each product has one difference in it, so that Gram matrices, which are faster than a QR, cancel nothing.
    """
    of_C = C @ (made_A @ adjoint(made_A)) + 2.0 * (B @ (D @ adjoint(made_A)))
    squares: Wide = np.maximum((C * of_C).sum(-1) + (B * (B @ (D @ adjoint(D)))).sum(-1), 0.0).reshape(-1)
    return squares


def _inner(update: UpdateSpec) -> UpdateSpec:
    return update.cls.without_norm(update)


def _loaded(adapter: Adapter, module: str) -> LowRank | Experts:
    """Return a module's factors, without a magnitude."""
    loaded = adapter.load(_inner(adapter.updates[module]))
    assert isinstance(loaded, LowRank | Experts)
    return loaded


def _beside(adapter: Adapter, update: UpdateSpec) -> Tensors:
    """Return the tensors of a module beside its factors: DoRA's magnitude."""
    return {role: adapter.file.numbers(name) for role, name in update.tensors.items() if role not in "AB"}


def factored(adapter: Adapter) -> list[str]:
    """Return the modules with factors A and B."""
    return [m for m, u in adapter.updates.items() if u.rank and _inner(u).cls in (LowRank, Experts)]


def _laid(update: UpdateSpec, B: Wide, A: Wide) -> Tensors:
    """Return stacked factors B (E, out, r) and A (E, r, in) as the update's tensors."""
    E, rank = A.shape[0], A.shape[1]
    A_shape, B_shape = update.specs["A"].shape, update.specs["B"].shape
    return {
        "A": Numbers.of(A.reshape(E * rank, *A_shape[1:])),
        "B": Numbers.of(B.transpose(1, 2, 0).reshape(B_shape[0], rank * E, *B_shape[2:])),
    }


def _with(update: UpdateSpec, rank: int, form: Form, scale: float) -> UpdateSpec:
    """Return the update with another rank, form and scale of its factors."""
    E, A, B = update.experts, update.specs["A"].shape, update.specs["B"].shape
    sides = {"A": TensorSpec(form.name, (E * rank, *A[1:])), "B": TensorSpec(form.name, (B[0], rank * E, *B[2:]))}
    detail = update.detail if update.cls is DoRA or update.cls.stack else None  # loralib's slices are expanded
    return replace(update, specs={**update.specs, **sides}, scale=scale, detail=detail)


def natural(update: UpdateSpec) -> Form:
    """Return the stored form of the factors, which the output keeps if it holds the numbers."""
    return holding(*factor_forms(update))


def with_scales(
    state: Transformed, scale_of: Callable[[UpdateSpec], tuple[float, float]], modules: Collection[str] | None = None
) -> Transformed:
    """Change the scales of modules, and multiply B by the quotients.

    Args:
        scale_of: returns the new scale, and the factor of B.
        modules: by default all with factors.
    """
    source, planned = state.adapter, dict[str, Made]()
    for module in factored(source) if modules is None else modules:
        update = source.updates[module]
        new, ratio = scale_of(update)
        if (new, ratio) == (update.scale, 1.0):
            continue

        @np.errstate(over="ignore", invalid="ignore")
        def make(module: str = module, new: float = new, ratio: float = ratio) -> tuple[Tensors, Loss]:
            loaded = _loaded(source, module)
            A, B = (Numbers.of(side) for side in (loaded.A.wide(), loaded.B.wide() * ratio))
            if not B.all_finite():
                raise InputError("its factors overflow", culprit=module)
            tensors = {"A": A, "B": B, **_beside(source, source.updates[module])}
            is_same = Fraction(new) * Fraction(ratio) == Fraction(loaded.scale)
            if is_same and _holds_product(_digits(loaded.B), ratio):
                return tensors, NO_LOSS
            return tensors, loss_between(stack_factors(loaded), stack_factors(replace(loaded, A=A, B=B, scale=new)))

        spec = _with(update, update.rank, natural(update), new)
        planned[module] = Made(spec, make, (module,), "exact" if ratio == 1.0 else "folded")
    return with_factors(state, planned)


def fold(state: Transformed, modules: Collection[str] | None = None) -> Transformed:
    """Multiply B, and trained biases beside the factors, by the scale, so that alpha equals the rank."""
    folded = with_scales(state, lambda update: (1.0, update.scale), modules)
    return fold_biases(folded) if modules is None else folded


def fold_biases(state: Transformed) -> Transformed:
    """Multiply trained biases beside the factors by their scale."""
    return with_factors(state, _folded_biases(state.adapter))


def _folded_biases(source: Adapter) -> dict[str, Made]:
    planned = {}
    for module, update in source.updates.items():
        if update.cls is AddDelta and update.scale != 1.0:

            @np.errstate(over="ignore")
            def make(update: UpdateSpec = update) -> tuple[Tensors, Loss]:
                loaded = source.load(update)
                assert isinstance(loaded, AddDelta)
                value = loaded.value.wide() * update.scale
                if not (rounded := rounded_to(value, F32)).all_finite():
                    raise InputError("its bias overflows", culprit=update.module)
                return {"value": rounded}, Loss(_squares(rounded.wide() - value), _squares(value))

            spec = TensorSpec("F32", update.specs["value"].shape)
            planned[module] = Made(replace(update, specs={"value": spec}, scale=1.0), make, (module,), "folded")
    return planned


def _squares(values: Wide) -> float:
    return float(np.square(values).sum())


def subtract_start(state: Transformed, initial: Adapter) -> Transformed:
    """Subtract the adapter as it was before training: [A; A0] and [B | -B0], at the scale of both."""
    source, planned = state.adapter, dict[str, Made]()
    for module, former in initial.updates.items():
        if module not in source.updates:
            continue
        update = source.updates[module]
        scale = update.scale if update.scale == former.scale else 1.0

        def make(module: str = module, scale: float = scale) -> tuple[Tensors, Loss]:
            trained, start = _loaded(source, module), _loaded(initial, module)
            exact = all(is_exact_product(loaded.B.form, loaded.scale / scale) for loaded in (trained, start))
            scaled = (replace(loaded, scale=loaded.scale / scale) for loaded in (trained, start))
            (B, A), (B0, A0) = map(stack_factors, scaled)
            both = np.concatenate([B, -B0], -1), np.concatenate([A, A0], -2)
            tensors = {**_laid(source.updates[module], *both), **_beside(source, source.updates[module])}
            if exact:
                return tensors, NO_LOSS
            rounded = squares_of_rows(B, A) + squares_of_rows(B0, A0)  # each by float64, and little may be left of both
            return tensors, Loss.of_rows(EPSILON**2 * rounded, squares_of_rows(*both))

        rank, form = update.rank + former.rank, holding(natural(update), natural(former))
        planned[module] = Made(_with(update, rank, form, scale), make, (module,))
    changed = with_factors(state, planned)
    config = changed.adapter.config
    config = replace(config, peft={**config.peft, "init_lora_weights": True}, base_mutating_inits={})
    return replace(changed, adapter=replace(changed.adapter, config=config))


def cut_ranks(state: Transformed, rank: int) -> Transformed:
    """Truncate modules of a higher rank to the best factors of this one; the scale goes into the factors."""
    source, planned = state.adapter, dict[str, Made]()
    for module in factored(source):
        update = source.updates[module]
        if update.rank <= rank:  # never raise a rank
            continue

        @np.errstate(all="ignore")
        def make(module: str = module, update: UpdateSpec = update) -> tuple[Tensors, Loss]:
            try:
                D = factored_svd(*stack_factors(_loaded(source, module)))
            except np.linalg.LinAlgError as error:
                raise InputError(TOO_LARGE, culprit=module) from error  # finite factors fail only by overflow
            squares = np.square(D.U * D.S[..., None, :])  # (E, out, k)
            total, left = (part.sum(-1).reshape(-1) for part in (squares, squares[..., rank:]))
            cut = bool((D.S[..., rank:] > RANK_TOLERANCE * D.S[..., :1]).any())  # else float64 rounded alone
            loss = Loss.of_rows(np.maximum(left, EPSILON**2 * total), total, cut)
            return {**_laid(update, *D.truncated(rank)), **_beside(source, update)}, loss

        planned[module] = Made(_with(update, rank, F32, 1.0), make, (module,), "folded")
    return with_factors(state, planned)


def pad(state: Transformed, rank_of: Callable[[str], int]) -> Transformed:
    """Pad the factors of modules with zeros to a rank."""
    source, planned = state.adapter, dict[str, Made]()
    for module in factored(source):
        update, rank = source.updates[module], rank_of(module)
        if rank == update.rank:
            continue

        def make(update: UpdateSpec = update, missing: int = rank - update.rank) -> tuple[Tensors, Loss]:
            B, A = stack_factors(replace(_loaded(source, update.module), scale=1.0))
            B, A = padded(B, -1, B.shape[-1] + missing), padded(A, -2, A.shape[-2] + missing)
            form = F64 if has_numbers(source.file, update.module) else natural(update)
            sides = {role: recast(side, form) for role, side in _laid(update, B, A).items()}
            return {**sides, **_beside(source, update)}, NO_LOSS

        spec = _with(update, rank, natural(update), update.scale)
        planned[module] = Made(spec, make, (module,), numbers=False)
    return with_factors(state, planned)


def one_scale(state: Transformed) -> Transformed:
    """Change all modules' scales to the most common one."""
    updates = [state.adapter.updates[module] for module in factored(state.adapter)]
    scales = Counter(update.scale for update in updates if update.scale)
    common = scales.most_common(1)[0][0] if scales else 1.0
    return with_scales(state, lambda update: (common, update.scale / common))


@dataclass(frozen=True)
class Settled(Transformed):
    """An adapter with settled types and measured losses, ready to be written and reported.

    Attributes:
        config: the fields beside the tensors, PEFT's or another format's; None for those that follow from its updates.
        metadata: of the file.
        family: a key of FAMILIES, whose table names an image model's modules; None for a language model.
        is_certain: no other family fits.
    """

    config: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    family: str | None = None
    is_certain: bool = True


def settle(state: Transformed, dtype: Form | None) -> Settled:
    """Round the factors to their type, once, and measure the loss of all steps, one module after the other.

    Args:
        dtype: of the factors; None keeps the stored one if it holds the numbers, and else takes float32.

    Raises:
        NeedsFlag, InputError: a number overflows the type.
    """
    source, planned, modules = state.adapter, dict[str, Made](), factored(state.adapter)
    biases = [module for module in source.updates.keys() - {*modules} if state.measured(module)]
    losses = {module: loss_of(source.file, module) for module in biases}
    for module in modules:
        update = source.updates[module]
        holds = dtype is None or holding(dtype, *factor_forms(update)) == dtype
        if holds and not state.measured(module):
            if dtype is None or all(update.specs[role].dtype == dtype.name for role in "AB"):
                continue
            wanted, loss = dtype, NO_LOSS
        else:
            wanted, loss = _measured(source, module, dtype)
            if not math.isfinite(loss.squared + loss.total):
                raise InputError(TOO_LARGE, culprit=module)
            losses[module] = loss.summed

        def make(module: str = module, wanted: Form = wanted) -> tuple[Tensors, Loss]:
            loaded = _loaded(source, module)
            B, A = round_factors(module, (loaded.B.wide(), loaded.A.wide()), wanted)
            return {"A": A, "B": B, **_beside(source, source.updates[module])}, NO_LOSS

        spec = _with(update, update.rank, wanted, update.scale)
        planned[module] = Made(spec, make, (module,), numbers=False)
    config, changed = source.config, with_factors(state, planned)
    if isinstance(changed.adapter.file, LazyFile):
        changed.adapter.file.settled = True
    log = {m: change.then(loss=losses[m]) if m in losses else change for m, change in changed.log.items()}
    return Settled(replace(changed.adapter, config=config), log, state.notes)  # the type alone restates nothing


def _measured(source: Adapter, module: str, dtype: Form | None) -> tuple[Form, Loss]:
    """Compute a module's factors; return the form that they get, and the loss of all steps and this form."""
    update, loaded = source.updates[module], _loaded(source, module)
    former, true = loss_of(source.file, module), (loaded.B.wide(), loaded.A.wide())
    for wanted in (dtype,) if dtype else (natural(update), F32):
        B, A = (rounded_to(side, wanted) for side in true)
        if all(np.array_equal(side.wide(), exact) for side, exact in zip((B, A), true, strict=True)):
            return wanted, former
    B, A = round_factors(module, true, wanted)  # raises if a number overflows
    rounded: Update = replace(loaded, A=A, B=B)
    return wanted, former.then(loss_between(stack_factors(loaded), stack_factors(rounded)))
