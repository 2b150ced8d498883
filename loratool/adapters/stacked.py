"""Factors of any low-rank update as one stack (E, out, r), (E, r, in) in float64, and rounded to the output's dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError, NeedsFlag
from ..files.dtypes import FACTOR_DTYPES
from ..files.tensor_ref import is_finite
from .adapter import Adapter, UpdateSpec
from .updates import Experts, LowRank, Update

FACTOR_TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, full) for name, full in FACTOR_DTYPES.items()}


LARGEST = 1e150  # of a change's norm


def stack_factors(update: Update) -> tuple[Tensor, Tensor]:
    """(B (E, out, r), A (E, r, in)) in float64, the scale in B; E is 1 but for a stack of experts."""
    if isinstance(update, Experts):
        each = [update.expert(number) for number in range(update.experts)]
        B, A = torch.stack([one.B for one in each]), torch.stack([one.A for one in each])
    else:
        assert isinstance(update, LowRank)
        B, A = update.B.flatten(1).unsqueeze(0), update.A.flatten(1).unsqueeze(0)
    return B.double() * update.scale, A.double()


def load_stacked_factors(adapter: Adapter, spec: UpdateSpec) -> tuple[Tensor, Tensor]:
    """The factors of one update as `stacked` lays them. Raises InputError for nan and inf, for a change of nothing, and
    for one whose squares float64 does not hold.
    """
    B, A = stack_factors(adapter.load(spec))
    if not B.numel() or not A.numel():
        raise InputError(f"its factors are empty in {adapter.name}", culprit=spec.module)
    largest = float(B.abs().max()) * float(A.abs().max())
    if not largest * math.sqrt(B[0, :, 0].numel() * A.numel()) * A.shape[1] < LARGEST:
        raise InputError(f"its change in {adapter.name} is too large for float64's squares", culprit=spec.module)
    return B, A


def round_factors(module: str, factors: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """In the output's type. Raises an error naming a module whose factors that type cannot hold."""
    B, A = (side.to(dtype) for side in factors)
    if not (is_finite(B) and is_finite(A)):
        if dtype == torch.float16:
            raise NeedsFlag("its factors overflow fp16", culprit=module, remedy="add --dtype fp32")
        raise InputError("its factors overflow", culprit=module)
    return B, A


def parameters_per_rank(update: UpdateSpec) -> int:
    """The parameters that one more of rank takes."""
    return update.experts * (math.prod(update.specs["A"].shape[1:]) + update.specs["B"].shape[0])
