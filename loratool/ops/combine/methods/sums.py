"""Sum changes exactly: their factors side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .delta import WeightedDelta


def cat(deltas: Sequence[WeightedDelta], density: float) -> tuple[Tensor, Tensor]:
    """Return factors of sum w_i D_i, exactly: B (out, sum r_i), with scales and weights, and A (sum r_i, in)."""
    return torch.cat([delta.B * delta.weight for delta in deltas], 1), torch.cat([delta.A for delta in deltas])
