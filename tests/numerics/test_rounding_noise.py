"""Hold the bounds on noise to what real rounding makes, and to the laws that they stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loratool.numerics.arrays import rounded_to
from loratool.numerics.forms import BF16, F16, F64, Form, Wide
from loratool.numerics.rounding_noise import (
    RoundingNoise,
    float_steps,
    noise_of_steps,
    product_noise_edge,
    unknown_noise_edge,
)

FORMS_OF_16_BITS = [pytest.param(form, id=form.name) for form in (BF16, F16)]
SIZES = [(120, 90), (300, 40), (64, 64)]


def randn(*shape: int, seed: int) -> Wide:
    return np.random.default_rng(seed).standard_normal(shape)


def rounded(x: Wide, form: Form) -> Wide:
    return rounded_to(x, form).wide()


def noise_of(x: Wide, form: Form) -> RoundingNoise:
    return noise_of_steps(float_steps(x.astype(np.float32), form))


def largest(x: Wide) -> float:
    return float(np.linalg.svd(x, compute_uv=False)[0])


def ratios(sizes: tuple[int, int], form: Form, uneven: str, draws: int) -> list[float]:
    """Return the edge over the largest singular value of what rounding W and W + a change of rank 2 made."""
    found = []
    for seed in range(draws):
        W = randn(*sizes, seed=seed) * 0.02
        if uneven == "rows":
            W *= np.exp(randn(sizes[0], 1, seed=seed + 1000))
        if uneven == "columns":
            W *= np.exp(randn(1, sizes[1], seed=seed + 1000))
        D = randn(sizes[0], 2, seed=seed + 2000) @ randn(2, sizes[1], seed=seed + 3000)
        D *= 0.1 * np.linalg.norm(W) / np.linalg.norm(D)
        base, tuned = rounded(W, form), rounded(W + D, form)
        edge = (noise_of(base, form) + noise_of(tuned, form)).edge()
        found.append(edge / largest(tuned - base - D))
    return found


@pytest.mark.parametrize("form", FORMS_OF_16_BITS)
@pytest.mark.parametrize("sizes", SIZES)
def test_rounding_stays_below_the_edge_and_near(form: Form, sizes: tuple[int, int]) -> None:
    found = ratios(sizes, form, "", 50)
    assert min(found) > 1 and sum(found) / len(found) < 1.35


@pytest.mark.parametrize("form", FORMS_OF_16_BITS)
@pytest.mark.parametrize("uneven", ["rows", "columns"])
def test_so_it_does_where_scales_are_uneven(form: Form, uneven: str) -> None:
    assert min(ratios((120, 90), form, uneven, 50)) > 1


def test_an_even_bound_would_be_wrong_there() -> None:
    """A row of large numbers: the mean of the variances, of which the bound for even ones is made, hides it."""
    W = randn(100, 100, seed=1)
    W[0] *= 300
    exact = W + randn(100, 100, seed=2)
    tuned = rounded(exact, BF16)
    noise = noise_of(tuned, BF16)
    even = math.sqrt(noise.energy / 100**2) * 2 * math.sqrt(100)
    assert even < 0.5 * largest(tuned - exact) < 0.5 * noise.edge()


@pytest.mark.parametrize("form", FORMS_OF_16_BITS)
def test_rounded_factors_make_no_component_above_their_bound(form: Form) -> None:
    found = []
    for seed in range(50):
        B, A = randn(80, 6, seed=seed), randn(6, 120, seed=seed + 100) * 0.01
        stored = rounded(B, form), rounded(A, form)
        error = largest(stored[0] @ stored[1] - B @ A)
        found.append(product_noise_edge(*stored, (form, form)) / error)
    assert min(found) > 1 and max(found) < 4


def test_the_bound_of_a_product_needs_no_squares_of_its_factors() -> None:
    B, A = (randn(*shape, seed=1).astype(np.float32).astype(np.float64) for shape in ((80, 6), (6, 120)))
    wanted = product_noise_edge(B, A, (F64, F64))
    for size in (2.0**-700, 2.0**700):
        assert product_noise_edge(B * size, A / size, (F64, F64)) == pytest.approx(wanted, rel=1e-12)
    assert product_noise_edge(0 * B, A, (BF16, BF16)) < 1e-30


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
    S, shape = np.array([3.0, 1.0, 0.5]), (round(beta * 1000), 1000)
    assert unknown_noise_edge(S, shape) == pytest.approx(known / math.sqrt(median), rel=0.01)
    assert unknown_noise_edge(S, shape) == unknown_noise_edge(S, shape[::-1])
