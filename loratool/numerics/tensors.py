"""Convert between torch's tensors, which callers hand in or ask for, and `Numbers`, without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import Numbers
from .forms import FORMS, TORCH_NAMES

if TYPE_CHECKING:
    from torch import Tensor

AnyNumbers = Any  # Numbers, or a tensor of their type

_NAMES = {f"torch.{torch_name}": name for name, torch_name in TORCH_NAMES.items()}


def numbers_of(x: AnyNumbers) -> Numbers:
    """Return the numbers of a tensor in the CPU's memory or on a GPU, or of numbers themselves."""
    if isinstance(x, Numbers):
        return x
    import torch

    form = FORMS[_NAMES[str(x.dtype)]]
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = x.detach().view(integers[form.itemsize])
    return Numbers(bits if x.is_cuda else bits.numpy(), form)


def tensor_of(x: Numbers) -> Tensor:
    """Return numbers as a tensor of their type."""
    import torch

    bits: Tensor = torch.from_numpy(x.bits) if isinstance(x.bits, np.ndarray) else x.bits
    return bits.view(getattr(torch, x.form.torch_name))
