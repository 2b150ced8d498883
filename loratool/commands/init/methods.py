"""Initial B and A of an adapter from a weight's shape or values: a function for each method of INITS.

Formulas are PEFT's (`peft/tuners/lora/layer.py`, 0.21): a weight W is (out, in), its delta s B A with s = alpha / r, or
alpha / sqrt(r) under rsLoRA. Every kind of weight comes as a stack of E such matrices (`weight_kinds.WEIGHT_KINDS`).
Random numbers depend only on the seed and the weight's name, not on the order or the selection of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...numerics.arrays import Array, doubled, fetched
from ...numerics.forms import Single, Wide
from ...numerics.linalg import adjoint, qr, singled, sqrt
from ...numerics.seeded_random import Draw
from ...numerics.svd import least_triplets, truncated_svds


@dataclass(frozen=True)
class InitWeight:
    """A weight that needs factors, as a stack of E matrices."""

    sizes: tuple[int, int, int]  # (E, out, in)
    embedding: bool
    values: Array | None = None  # (E, out, in) in float32, if the method reads them

    @property
    def stack(self) -> Array:
        assert self.values is not None, "INITS says which methods read the weights"
        return self.values


@dataclass(frozen=True)
class InitialFactors:
    """The first A and B of a weight, in float32."""

    A: Single  # (r, E, in)
    B: Single  # (r, E, out)
    gap: float = 0.0  # how far the energy of B A may be below the best of this rank, relative


def _random_A(weight: InitWeight, rank: int, draw: Draw, a: Callable[[int, int, int], Wide]) -> InitialFactors:
    """Return B = 0 and A as `a` draws it. For an embedding return A = 0 and a normal B, as for nn.Embedding."""
    E, out, inp = weight.sizes
    if weight.embedding:
        return InitialFactors(_zeros(rank, E, inp), singled(draw.normal("B", rank, E, out)))
    return InitialFactors(singled(a(rank, E, inp)), _zeros(rank, E, out))


def _zeros(*shape: int) -> Single:
    return np.zeros(shape, np.float32)


def _lora(weight: InitWeight, rank: int, scale: float, draw: Draw) -> InitialFactors:
    """Draw A uniform within 1 / sqrt(in), which is Kaiming's with a = sqrt(5) (microsoft/LoRA, loralib/layers.py)."""
    bound = 1.0 / math.sqrt(weight.sizes[2])
    return _random_A(weight, rank, draw, lambda *shape: draw.uniform("A", *shape) * bound)


def _gaussian(weight: InitWeight, rank: int, scale: float, draw: Draw) -> InitialFactors:
    """Draw A normal with the deviation 1 / r (Hu et al., ICLR 2022, section 4.1; the deviation is PEFT's)."""
    return _random_A(weight, rank, draw, lambda *shape: draw.normal("A", *shape) / rank)


def _orthogonal(weight: InitWeight, rank: int, scale: float, draw: Draw) -> InitialFactors:
    """Draw A and B normal in complementary halves of an orthogonal basis of R^r, so that B A = 0.

    As `orthogonal_init` of PEFT does.
    """
    E, out, inp = weight.sizes
    factors = []
    for e in range(E):
        Q, _ = qr(draw.normal(f"Q{e}", rank, rank))
        A = Q[0::2].T @ draw.normal(f"A{e}", rank // 2, inp) / 10
        B = Q[1::2].T @ draw.normal(f"B{e}", rank // 2, out) / 10
        factors.append((singled(A), singled(B)))
    A, B = (np.stack(side, 1) for side in zip(*factors, strict=True))
    return InitialFactors(A, B)


def _pissa(weight: InitWeight, rank: int, scale: float, draw: Draw) -> InitialFactors:
    """Return the top r triplets, their values shared between B and A.

    Meng et al., NeurIPS 2024, equations 2 and 3.
    """
    stack = weight.stack
    svds = truncated_svds(stack, rank, [Draw(draw.seed, f"{draw.name} {e}") for e in range(len(stack))])
    triplets = [(each.U, each.S, each.V) for each in svds]
    return _split_triplets(weight, rank, scale, triplets, max(each.gap for each in svds))


def _milora(weight: InitWeight, rank: int, scale: float, draw: Draw) -> InitialFactors:
    """Return the last r triplets, shared as in PiSSA (Wang et al., NAACL 2025, MiLoRA)."""
    return _split_triplets(weight, rank, scale, [least_triplets(W, rank) for W in weight.stack], 0.0)


def _split_triplets(
    weight: InitWeight, rank: int, scale: float, triplets: list[tuple[Array, Array, Array]], gap: float
) -> InitialFactors:
    """Return B = U sqrt(S / s), A = sqrt(S / s) V^T of each matrix, padded with zeros to rank r."""
    E, out, inp = weight.sizes
    A, B = _zeros(rank, E, inp), _zeros(rank, E, out)
    for e, (U, S, V) in enumerate(triplets):
        root = sqrt(S / scale)
        A[: len(S), e], B[: len(S), e] = (fetched(doubled(side) * root).T for side in (V, U))
    return InitialFactors(A, B, gap)


def _mica(weight: InitWeight, rank: int, scale: float, draw: Draw) -> InitialFactors:
    """Return A = 0 and the last r left singular vectors as B, which training leaves unchanged.

    As `mica_init` of PEFT does (arXiv 2604.01694).
    """
    E, _, inp = weight.sizes
    B = np.stack([fetched(least_triplets(W, rank)[0]).T for W in weight.stack], 1)
    return InitialFactors(_zeros(rank, E, inp), B)


def _olora(weight: InitWeight, rank: int, scale: float, draw: Draw) -> InitialFactors:
    """Return the first r columns of Q as B and the first r rows of R as A, with W = Q R.

    Büyükakyüz, 2024; not divided by s, as in PEFT.
    """
    factors = []
    for W in weight.stack:
        Q, _ = qr(doubled(W[:, :rank]))
        Q = adjoint(singled(Q))
        factors.append((fetched(Q @ W), fetched(Q)))
    A, B = (np.stack(side, 1) for side in zip(*factors, strict=True))
    return InitialFactors(A, B)


@dataclass(frozen=True)
class InitMethod:
    """A method of initialization, with its requirements for training."""

    make: Callable[[InitWeight, int, float, Draw], InitialFactors]  # (weight, r, s, draw) -> factors
    reads: bool = False  # it needs the weights' values
    mutates_base: bool = False  # the adapter belongs on the residual W - s B A
    field: bool | str = True  # init_lora_weights with which PEFT trains it right and never initializes it again


INITS: dict[str, InitMethod] = {
    "lora": InitMethod(_lora),
    "gaussian": InitMethod(_gaussian),
    "orthogonal": InitMethod(_orthogonal),
    "pissa": InitMethod(_pissa, True, True),
    "milora": InitMethod(_milora, True, True),
    "mica": InitMethod(_mica, True, field="mica"),
    "olora": InitMethod(_olora, True, True),
}
