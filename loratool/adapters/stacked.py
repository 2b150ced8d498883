"""Load the factors of any low-rank update as one float64 stack, (E, out, r) and (E, r, in), and round them back."""

from __future__ import annotations

import math

import numpy as np

from ..errors import InputError, NeedsFlag
from ..numerics.arrays import Array, Device, Numbers, fetched, like_of, rounded_to, sent
from ..numerics.factored_svd import singular_values
from ..numerics.forms import F16, F64, FORMS, Form, Wide
from .adapter import Adapter
from .updates.update import Update, UpdateSpec

LARGEST = 1e150  # bound on a delta's norm, so that float64 holds its square


@np.errstate(all="ignore")  # `_check` tells
def stack_factors(update: Update) -> tuple[Wide, Wide]:
    """Return the factors of an update that has a rank, (B (E, out, r), A (E, r, in)), the scale in B."""
    factors = update.factors()
    assert factors is not None, "an update with a rank has factors"
    return factors


def factor_forms(spec: UpdateSpec) -> tuple[Form, Form]:
    """Return the stored types of A and B; float64 for a type that is not a float of 16 bits or more."""
    A, B = (form if (form := FORMS.get(spec.specs[role].dtype, F64)).itemsize > 1 else F64 for role in "AB")
    return A, B


@np.errstate(all="ignore")
def load_stacked_factors(adapter: Adapter, spec: UpdateSpec) -> tuple[Wide, Wide]:
    """Load the factors of one update as `stack_factors` returns them.

    Raises:
        InputError: a factor is empty or holds nan or inf, or the squares of the delta could overflow float64.
    """
    B, A = stack_factors(adapter.load(spec))
    _check(adapter, spec, B, A)
    return B, A


@np.errstate(all="ignore")
def load_singular_values(adapter: Adapter, spec: UpdateSpec, device: Device) -> Wide:
    """Load an update that has a rank and return its singular values, (E, k), largest first.

    Raises:
        InputError: as `load_stacked_factors`.
    """
    update, like = adapter.load(spec), like_of(device)
    _check(adapter, spec, *stack_factors(update))

    def of_product(B: Wide, A: Wide) -> Wide:
        return fetched(singular_values(sent(B, like), sent(A, like)))

    values = update.singular_values(of_product)
    assert values is not None, "an update with a rank has factors"
    return values


def _check(adapter: Adapter, spec: UpdateSpec, B: Wide, A: Wide) -> None:
    if not B.size or not A.size:
        raise InputError(f"its factors are empty in {adapter.name}", culprit=spec.module)
    largest = float(np.abs(B).max()) * float(np.abs(A).max())
    if not largest * math.sqrt(B.shape[1] * A.size) * A.shape[1] < LARGEST:
        raise InputError(f"its change in {adapter.name} is too large for float64's squares", culprit=spec.module)


def round_factors(module: str, factors: tuple[Array, Array], form: Form) -> tuple[Numbers, Numbers]:
    """Round both factors to the output's type.

    Raises:
        NeedsFlag: a factor overflows fp16.
        InputError: a factor overflows another type.
    """
    B, A = (rounded_to(fetched(side), form) for side in factors)
    if not (B.all_finite() and A.all_finite()):
        if form == F16:
            raise NeedsFlag("its factors overflow fp16", culprit=module, flags="--dtype fp32")
        raise InputError("its factors overflow", culprit=module)
    return B, A


def stack_sizes(update: UpdateSpec) -> tuple[int, int, int]:
    """Return (E, out, in) of the factors' product as a stack; E is 1 except for experts."""
    return update.experts, update.specs["B"].shape[0], math.prod(update.specs["A"].shape[1:])


def parameters_per_rank(update: UpdateSpec) -> int:
    """Return the number of parameters that one more rank adds to the factors."""
    E, out, inputs = stack_sizes(update)
    return E * (out + inputs)
