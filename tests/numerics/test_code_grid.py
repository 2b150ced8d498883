"""Hold the codes nearest to exact reals to fractions: no code is nearer, and what changes nothing stays."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction as F

import numpy as np
import pytest
import torch
from conftest import spread
from lib.hostile.hostile_reals import changes, normal

from loratool.numerics.code_grid import guess_codes, round_to_codes
from loratool.numerics.code_levels import E4M3, INT8, Codes, Integers, Levels
from loratool.numerics.decide import Reals
from loratool.numerics.forms import Wide
from loratool.numerics.products import Products, Term
from loratool.numerics.tensors import numbers_of
from loratool.numerics.workspace import Workspace


@dataclass(frozen=True)
class Grid:
    """Levels times one scale for each row."""

    levels: Levels
    scales: Wide

    def nearest(self, row: int, numbers: Wide) -> Codes:
        with np.errstate(all="ignore"):
            return self.levels.nearest(numbers / self.scales[row : row + len(numbers), None])

    def values(self, row: int, codes: Codes) -> Wide:
        return self.levels.values(codes) * self.scales[row : row + len(codes), None]

    def ordinals(self, codes: Codes) -> Codes:
        return self.levels.ordinals(codes)

    def from_ordinals(self, ordinals: Codes) -> Codes:
        return self.levels.from_ordinals(ordinals)


LEVELS: dict[str, Levels] = {
    "e4m3": E4M3,
    "int8": INT8,
    "uint8": Integers(0, 255),
    "int4 in a byte": Integers(-8, 7, "int8", readable=(-128, 127)),
    "three of four": Integers(0, 2, offset=1, readable=(0, 3)),
}
# Codes that a file may have -> those that writers use; of other levels all 256
USED = {"int4 in a byte": range(-8, 8), "three of four": range(3)}
SCALES = np.array([0.25, 1e-3, 0.0, -0.5, 1e-40, 3e30])
M, N = len(SCALES), 20


def hard_case(levels: str, size: F) -> tuple[Grid, Codes, torch.Tensor, list[Term]]:
    """Return a grid, codes, their numbers, and products of which some cancel, are 0 or end at ties."""
    g = np.random.default_rng(1)
    grid, bits = Grid(LEVELS[levels], SCALES), g.integers(0, 256, (M, N), np.uint8)
    former = bits.view(np.int8) if "int" in levels and levels != "uint8" else bits
    if levels == "three of four":
        former = former & 3
    B, A = normal(g, M, 2, dtype=torch.float32), normal(g, 2, N, dtype=torch.float32)
    A[:, :4], B[1], A[1, 4:8], B[:, 1] = 0, 0, -A[0, 4:8], B[:, 0]
    A[0, 8:16] = 0.25
    return grid, former, torch.from_numpy(grid.values(0, former)), [Term(B.round(), A, size)]


def squared(W: torch.Tensor, D: list[F]) -> float:
    return float(sum(d * d for d, w in zip(D, W.flatten(), strict=True) if w.isfinite()))


SIZES = {
    "tiny": F(1, 10**160),
    "small": F(1, 2**12),
    "ties": F(1, 2),
    "large": F(10) ** 9,
    "beyond": F(10) ** 300,
    "far beyond": F(10) ** 400,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("levels", spread(LEVELS, 3))
def test_no_code_is_nearer(levels: str, size: str) -> None:
    grid, former, W, terms = hard_case(levels, SIZES[size])
    made, stats = round_to_codes(Reals(Products(terms).rows(0, M)), numbers_of(W), former, grid, Workspace())
    every = np.array(USED.get(levels, range(256))).astype(former.dtype)
    for at, D in enumerate(changes(terms)):
        i, j = divmod(at, N)
        if not W[i, j].isfinite():
            assert made[i, j] == former[i, j]
            continue
        X, codes = F(float(W[i, j])) + D, np.append(every, former[i, j])
        numbers = grid.values(i, codes[None])[0]
        assert made[i, j] in codes
        mine = F(float(grid.values(i, made[i : i + 1, j : j + 1])[0, 0]))
        assert abs(mine - X) == min(abs(F(float(x)) - X) for x in numbers if np.isfinite(x)), (i, j)
        assert made[i, j] == former[i, j] or mine != F(float(W[i, j]))
    if size in ("tiny", "large"):  # others are lost beside the largest weight
        assert stats.change_squared == pytest.approx(squared(W, changes(terms)), rel=1e-6)


@pytest.mark.parametrize("size", ["tiny", "small", "ties", "large"])
@pytest.mark.parametrize("levels", LEVELS)
def test_the_guess_is_nearest_to_what_is_left(levels: str, size: str) -> None:
    """Where W is finite, and its sum within bfloat16."""
    grid, _, W, terms = hard_case(levels, SIZES[size])
    D = changes(terms)
    merged = torch.tensor([float(F(float(w)) + d) for w, d in zip(W.flatten().nan_to_num(), D, strict=True)])
    merged = merged.bfloat16().view(M, N)
    found = guess_codes(numbers_of(merged), Reals(Products(terms).rows(0, M)), 0, grid, Workspace())
    left = [float(F(float(x)) - d) for x, d in zip(merged.flatten(), D, strict=True)]
    assert np.array_equal(found, grid.nearest(0, np.array(left).reshape(M, N)))
