"""Make changes of weights as training makes them: (name, type, base, target), as bit patterns in one dimension."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Change = tuple[str, str, npt.NDArray[Any], npt.NDArray[Any]]

WIDTHS = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}


def changes(rows: int, columns: int, seed: int = 0) -> Iterator[Change]:
    """Yield the changes of a matrix whose rows and columns differ in size, as those of real ones do."""
    g = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(rows, columns, generator=g)

    def adam(rate: float) -> Tensor:
        """A step of Adam: most numbers move by nearly the rate."""
        return rate * torch.tanh(1.5 * noise())

    weights = 0.02 * noise()
    weights *= torch.exp(0.3 * torch.randn(rows, 1, generator=g)) * torch.exp(
        0.3 * torch.randn(1, columns, generator=g)
    )
    stored = weights.bfloat16()
    yield change("RL step 1e-6", stored, (weights + adam(1e-6)).bfloat16())
    many = sum((adam(1e-6) for _ in range(20)), torch.zeros(()))
    yield change("20 steps 1e-6", stored, (weights + many).bfloat16())
    base = stored.float()
    dense = noise() * base.std()
    yield change("fine-tune 1e-3", stored, (base + 1e-3 * dense).bfloat16())
    yield change("fine-tune 1e-2", stored, (base + 1e-2 * dense).bfloat16())
    yield change("fp16 1e-3", weights.half(), (weights.half().float() + 1e-3 * dense).half())
    step = base.abs().max() / 448
    yield change("fp8 1e-2", *((x / step).to(torch.float8_e4m3fn) for x in (base, base + 1e-2 * dense)))
    scales = (base.reshape(rows, -1, 32).abs().amax(-1, keepdim=True) / 7).expand(-1, -1, 32).reshape(rows, columns)
    yield "int4 1e-2", "U8", packed(base / scales), packed((base + 1e-2 * dense) / scales)
    yield change("fp32 1e-3", base, base + 1e-3 * dense)


def change(name: str, base: Tensor, target: Tensor) -> Change:
    return name, NAMES[base.dtype], patterns(base), patterns(target)


def patterns(x: Tensor) -> npt.NDArray[Any]:
    return x.contiguous().view(WIDTHS.get(x.dtype, torch.uint8)).numpy().reshape(-1)


def packed(x: Tensor) -> npt.NDArray[Any]:
    codes = (x.round().clamp(-8, 7) + 8).to(torch.uint8).reshape(-1)
    return np.ascontiguousarray((codes[::2] | codes[1::2] << 4).numpy())
