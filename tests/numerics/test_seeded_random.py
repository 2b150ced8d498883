"""Hold the seeded random numbers: their distribution, and their bits, which no release of numpy may change."""

from __future__ import annotations

import hashlib
import statistics

import numpy as np

from loratool.numerics.seeded_random import normal, normal_quantile, uniform


def test_the_normals_are_the_quantiles_of_the_standard_library() -> None:
    p = np.array([2**-53, 1e-13, 1e-12, 1e-6, 0.01, 0.07499, 0.075, 0.3, 0.5, 0.8, 0.925, 0.9251, 0.999, 1 - 2**-53])
    expected = [statistics.NormalDist().inv_cdf(x) for x in p]
    assert np.allclose(normal_quantile(p), expected, rtol=1e-14, atol=1e-15)


def test_their_moments_are_right() -> None:
    x = normal("key", 200_000)
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01 and abs((x**4).mean() - 3) < 0.1
    u = uniform("key", 200_000)
    assert 0 < u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1 and abs(u.mean() - 0.5) < 0.003


def test_their_bits_are_pinned() -> None:
    """They are promised to be the same on every machine and with every release of numpy."""
    assert hashlib.sha256(normal("key", 100_000).tobytes()).hexdigest()[:16] == "b3f359def36956c6"
    assert hashlib.sha256(uniform("key", 100_000).tobytes()).hexdigest()[:16] == "74500336b41b5ed7"
