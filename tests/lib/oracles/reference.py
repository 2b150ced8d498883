"""Write the merge a second time, for the tests: slow, in extended precision, sharing no code with loratool.

The delta is summed in numpy's longdouble (64 bits of mantissa on x86) and rounded once to the target by
comparing distances to its two neighbours there. PEFT's rules for names and scales are peft's own code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

PREFIX = "base_model.model."


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def to_longdouble(x: Tensor) -> np.ndarray:
    return x.double().numpy().astype(np.longdouble)


def change_reference(A: Tensor, B: Tensor, scale: float) -> np.ndarray:
    """Return scale * B @ A, (out, in)."""
    return (to_longdouble(B) * np.longdouble(scale)) @ to_longdouble(A)


def round_reference(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Round each longdouble to the nearest value of `dtype`, ties to even, by the neighbours of a first guess."""
    guess = torch.from_numpy(x.astype(np.float64)).to(dtype)
    up = torch.nextafter(guess, torch.full_like(guess, math.inf))
    down = torch.nextafter(guess, torch.full_like(guess, -math.inf))
    best, best_distance = guess, np.abs(to_longdouble(guess) - x)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[guess.element_size()]
    for other in (up, down):
        distance = np.abs(to_longdouble(other) - x)
        even = (
            torch.from_numpy(distance == best_distance) & ((other.view(bits) & 1) == 0) & ((best.view(bits) & 1) == 1)
        )
        nearer = torch.from_numpy(distance < best_distance) | even
        best = torch.where(nearer, other, best)
        best_distance = np.where(nearer.numpy(), distance, best_distance)
    return best


def merge_reference(
    base: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return all tensors of `base` with the PEFT adapter added where it has factors; `dtype` of the adapted ones."""
    merged = dict(base)
    for key in adapter:
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        A, B = adapter[key], adapter[key.replace(".lora_A.", ".lora_B.")]
        names = [n for n in base if n == f"{module}.weight" or n == f"{module.removeprefix('transformer.')}.weight"]
        (name,) = names
        change = change_reference(A, B, scale_of(config, module, len(A)))
        W = base[name]
        if config.get("fan_in_fan_out"):
            change = change.T
        merged[name] = round_reference(to_longdouble(W) + change, dtype or W.dtype)
    return merged
