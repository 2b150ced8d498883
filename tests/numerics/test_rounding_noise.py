"""Hold the bounds on noise to what real rounding makes, and to the laws that they stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from loratool.numerics.rounding_noise import (
    RoundingNoise,
    float_steps,
    noise_of_steps,
    product_noise_edge,
    unknown_noise_edge,
)

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
SIZES = [(120, 90), (300, 40), (64, 64)]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_of(x: Tensor, dtype: str) -> RoundingNoise:
    return noise_of_steps(float_steps(x.float(), dtype))


def ratios(sizes: tuple[int, int], dtype: str, uneven: str, draws: int) -> list[float]:
    """Return the edge over the largest singular value of what rounding W and W + a change of rank 2 made."""
    found = []
    for seed in range(draws):
        W = randn(*sizes, seed=seed) * 0.02
        if uneven == "rows":
            W *= randn(sizes[0], 1, seed=seed + 1000).exp()
        if uneven == "columns":
            W *= randn(1, sizes[1], seed=seed + 1000).exp()
        D = randn(sizes[0], 2, seed=seed + 2000) @ randn(2, sizes[1], seed=seed + 3000)
        D *= 0.1 * W.norm() / D.norm()
        base, tuned = W.to(TYPES[dtype]), (W + D).to(TYPES[dtype])
        rounding = tuned.double() - base.double() - D
        edge = (noise_of(base, dtype) + noise_of(tuned, dtype)).edge()
        found.append(edge / float(torch.linalg.svdvals(rounding)[0]))
    return found


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_rounding_stays_below_the_edge_and_near(dtype: str, sizes: tuple[int, int]) -> None:
    found = ratios(sizes, dtype, "", 50)
    assert min(found) > 1 and sum(found) / len(found) < 1.35


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("uneven", ["rows", "columns"])
def test_so_it_does_where_scales_are_uneven(dtype: str, uneven: str) -> None:
    assert min(ratios((120, 90), dtype, uneven, 50)) > 1


def test_an_even_bound_would_be_wrong_there() -> None:
    """A row of large numbers: the mean of the variances, of which the bound for even ones is made, hides it."""
    W = randn(100, 100, seed=1)
    W[0] *= 300
    tuned = (W + randn(100, 100, seed=2)).bfloat16()
    rounding = tuned.double() - (W + randn(100, 100, seed=2))
    noise = noise_of(tuned, "BF16")
    even = math.sqrt(noise.energy / 100**2) * 2 * math.sqrt(100)
    largest = float(torch.linalg.svdvals(rounding)[0])
    assert even < 0.5 * largest < 0.5 * noise.edge()


@pytest.mark.parametrize("dtype", TYPES)
def test_rounded_factors_make_no_component_above_their_bound(dtype: str) -> None:
    found = []
    for seed in range(50):
        B, A = randn(80, 6, seed=seed), randn(6, 120, seed=seed + 100) * 0.01
        rounded = B.to(TYPES[dtype]).double(), A.to(TYPES[dtype]).double()
        error = float(torch.linalg.svdvals(rounded[0] @ rounded[1] - B @ A)[0])
        found.append(product_noise_edge(*rounded, (dtype, dtype)) / error)
    assert min(found) > 1 and max(found) < 4


@pytest.mark.parametrize("beta", [0.05, 0.25, 0.5, 1.0])
def test_unknown_noise_is_gavish_and_donohos(beta: float) -> None:
    """Their threshold for known noise (equation 11) over the root of the Marchenko-Pastur law's median."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    t = low + (high - low) * np.sin(np.linspace(0, math.pi / 2, 200_001)) ** 2  # fine where the density is steep
    middle = (t[1:] + t[:-1]) / 2
    mass = np.cumsum(np.sqrt((high - middle) * (middle - low)) / (2 * math.pi * beta * middle) * np.diff(t))
    assert mass[-1] == pytest.approx(1, rel=1e-3)
    median = middle[np.searchsorted(mass, 0.5)]
    known = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    S, shape = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64), (round(beta * 1000), 1000)
    assert unknown_noise_edge(S, shape) == pytest.approx(known / math.sqrt(median), rel=0.01)
    assert unknown_noise_edge(S, shape) == unknown_noise_edge(S, shape[::-1])
