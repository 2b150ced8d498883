"""Load the factors of any low-rank update as one float64 stack, (E, out, r) and (E, r, in), and round them back."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, NeedsFlag
from ..files.dtypes import FACTOR_DTYPES, TORCH_FLOATS
from ..files.tensor_ref import is_finite
from ..numerics.arrays import fetched
from ..numerics.factored_svd import singular_values
from ..numerics.forms import Wide
from .adapter import Adapter
from .updates.update import Update, UpdateSpec

FACTOR_TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, full) for name, full in FACTOR_DTYPES.items()}

LARGEST = 1e150  # bound on a delta's norm, so that float64 holds its square


@np.errstate(all="ignore")  # `_check` tells
def stack_factors(update: Update) -> tuple[Tensor, Tensor]:
    """Return the factors of an update that has a rank, (B (E, out, r), A (E, r, in)), in float64, the scale in B."""
    factors = update.factors()
    assert factors is not None, "an update with a rank has factors"
    B, A = map(torch.from_numpy, factors)
    return B, A


def factor_dtypes(spec: UpdateSpec) -> tuple[torch.dtype, torch.dtype]:
    """Return the stored types of A and B; float64 for a type that is not a float of 16 bits or more."""
    A, B = (getattr(torch, TORCH_FLOATS.get(spec.specs[role].dtype, "float64")) for role in "AB")
    return A, B


def load_stacked_factors(adapter: Adapter, spec: UpdateSpec) -> tuple[Tensor, Tensor]:
    """Load the factors of one update as `stack_factors` returns them.

    Raises:
        InputError: a factor is empty or holds nan or inf, or the squares of the delta could overflow float64.
    """
    B, A = stack_factors(adapter.load(spec))
    _check(adapter, spec, B, A)
    return B, A


@np.errstate(all="ignore")
def load_singular_values(adapter: Adapter, spec: UpdateSpec, device: torch.device) -> Tensor:
    """Load an update that has a rank and return its singular values, (E, k), largest first.

    Raises:
        InputError: as `load_stacked_factors`.
    """
    update = adapter.load(spec)
    _check(adapter, spec, *stack_factors(update))

    def of_product(B: Wide, A: Wide) -> Wide:
        return fetched(singular_values(torch.from_numpy(B).to(device), torch.from_numpy(A).to(device)))

    values = update.singular_values(of_product)
    assert values is not None, "an update with a rank has factors"
    return torch.from_numpy(values)


def _check(adapter: Adapter, spec: UpdateSpec, B: Tensor, A: Tensor) -> None:
    if not B.numel() or not A.numel():
        raise InputError(f"its factors are empty in {adapter.name}", culprit=spec.module)
    largest = float(B.abs().max()) * float(A.abs().max())
    if not largest * math.sqrt(B[0, :, 0].numel() * A.numel()) * A.shape[1] < LARGEST:
        raise InputError(f"its change in {adapter.name} is too large for float64's squares", culprit=spec.module)


def round_factors(module: str, factors: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round both factors to the output's dtype.

    Raises:
        NeedsFlag: a factor overflows fp16.
        InputError: a factor overflows another dtype.
    """
    B, A = (side.to(dtype) for side in factors)
    if not (is_finite(B) and is_finite(A)):
        if dtype == torch.float16:
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
