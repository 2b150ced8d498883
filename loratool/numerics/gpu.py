"""The operations of `arrays` on torch's tensors, for GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .arrays import Numbers
from .forms import Form

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def dtype_of(form: Form) -> torch.dtype:
    return DTYPES[form.name]


def empty(kind: npt.DTypeLike, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, kind)).dtype, device=like.device)


def sent(x: npt.NDArray[Any], like: Tensor) -> Tensor:
    return torch.from_numpy(x).to(like.device)


def widen(x: Numbers, out: Tensor) -> Tensor:
    return out.copy_(x.bits.view(dtype_of(x.form)))


def narrow(x: Tensor, out: Numbers) -> None:
    out.bits.view(dtype_of(out.form)).copy_(x)


def matmul(left: Tensor, right: Tensor, out: Tensor) -> None:
    torch.matmul(left, right, out=out)


def not_equal(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    return torch.ne(x, y, out=out)


def where(mask: Tensor, x: Any, y: Any) -> Tensor:
    return torch.where(mask, x, y)


def at(device: str) -> Tensor:
    return torch.empty(0, device=device)


def pinned(kind: npt.DTypeLike, size: int) -> npt.NDArray[Any]:
    """Return an array of pages that a GPU can read by itself."""
    return torch.empty(size * np.dtype(kind).itemsize, dtype=torch.uint8, pin_memory=True).numpy().view(kind)


def stream_of(device: str) -> tuple[Any, Any]:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream, torch.cuda.stream(stream)


def send(x: Any, out: Any) -> None:
    source, target = (each if isinstance(each, Tensor) else torch.from_numpy(each) for each in (x, out))
    target.copy_(source, non_blocking=True)
