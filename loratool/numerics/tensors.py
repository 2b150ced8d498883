"""Convert between torch's tensors, which callers hand in or ask for, and `Numbers`, without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import Numbers
from .forms import FORMS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AnyNumbers = Any  # Numbers, or a tensor of their type

NAMES = {
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
}


def numbers_of(x: AnyNumbers) -> Numbers:
    """Return the numbers of a tensor in the CPU's memory or on a GPU, or of numbers themselves."""
    if isinstance(x, Numbers):
        return x
    import torch

    form = FORMS[NAMES[str(x.dtype)]]
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = x.detach().view(integers[form.itemsize])
    return Numbers(bits if x.is_cuda else bits.numpy(), form)


def tensor_of(x: Numbers) -> Tensor:
    """Return numbers as a tensor of their type."""
    import torch

    bits: Tensor = torch.from_numpy(x.bits) if isinstance(x.bits, np.ndarray) else x.bits
    return bits.view(dtype_of(x))


def dtype_of(x: Numbers) -> torch.dtype:
    import torch

    name = next(name for name, form in NAMES.items() if form == x.form.name)
    kind: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return kind
