"""How an adapter starts: INITS. A function a method, from a weight's shape or its values to the first B and A.

Formulas as PEFT has them (`peft/tuners/lora/layer.py`, 0.21): a weight W is (out, in), its change s B A with
s = alpha / r, or alpha / sqrt(r) under rsLoRA. Every kind of weight comes as a stack of such matrices
(`factoring.KINDS`). What is random follows from the seed and the weight's name alone, so that neither the order nor the
selection shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...numerics.seeded_random import Draw
from ...numerics.svd import least_triplets, truncated_svds


@dataclass(frozen=True)
class InitWeight:
    """What an adapter is started for: a stack of E matrices, sizes (E, out, in); values only where the method reads
    them, in float32.
    """

    sizes: tuple[int, int, int]
    embedding: bool
    values: Tensor | None = None

    @property
    def stack(self) -> Tensor:
        assert self.values is not None, "INITS says which methods read the weights"
        return self.values


@dataclass(frozen=True)
class InitialFactors:
    """A: (r, E, in), B: (r, E, out), float32. gap: how far the energy of B A may be below the best of its rank,
    relative, where the method is after the best.
    """

    A: Tensor
    B: Tensor
    gap: float = 0.0


def _random_A(weight: InitWeight, rank: int, draw: Draw, a: Callable[[int, int, int], Tensor]) -> InitialFactors:
    """B = 0 and A as `a` draws it; of an embedding A = 0 and B normal, as for nn.Embedding itself."""
    E, out, inp = weight.sizes
    if weight.embedding:
        return InitialFactors(torch.zeros(rank, E, inp, dtype=torch.float32), draw.normal("B", rank, E, out).float())
    return InitialFactors(a(rank, E, inp).float(), torch.zeros(rank, E, out, dtype=torch.float32))


def _lora(weight: InitWeight, rank: int, scale: float, draw: Draw) -> InitialFactors:
    """A uniform within 1 / sqrt(in), which is Kaiming's with a = sqrt(5) (microsoft/LoRA, loralib/layers.py)."""
    bound = 1.0 / math.sqrt(weight.sizes[2])
    return _random_A(weight, rank, draw, lambda *shape: draw.uniform("A", *shape) * bound)


def _gaussian(weight: InitWeight, rank: int, scale: float, draw: Draw) -> InitialFactors:
    """A normal with the deviation 1 / r (Hu et al., ICLR 2022, section 4.1; the deviation is PEFT's)."""
    return _random_A(weight, rank, draw, lambda *shape: draw.normal("A", *shape) / rank)


def _orthogonal(weight: InitWeight, rank: int, scale: float, draw: Draw) -> InitialFactors:
    """A and B normal in complementary halves of an orthogonal basis of R^r, so that B A = 0 (`orthogonal_init`)."""
    E, out, inp = weight.sizes
    starts = []
    for e in range(E):
        Q = torch.linalg.qr(draw.normal(f"Q{e}", rank, rank)).Q
        A = Q[0::2].T @ draw.normal(f"A{e}", rank // 2, inp) / 10
        B = Q[1::2].T @ draw.normal(f"B{e}", rank // 2, out) / 10
        starts.append((A.float(), B.float()))
    A, B = (torch.stack(side, 1) for side in zip(*starts, strict=True))
    return InitialFactors(A, B)


def _pissa(weight: InitWeight, rank: int, scale: float, draw: Draw) -> InitialFactors:
    """The top r triplets, their values shared between B and A (Meng et al., NeurIPS 2024, equations 2 and 3)."""
    stack = weight.stack
    generators = [Draw(draw.seed, f"{draw.name} {e}").generator(stack.device) for e in range(len(stack))]
    found = truncated_svds(stack, rank, generators)
    triplets = [(each.U, each.S, each.V) for each in found]
    return _split_triplets(weight, rank, scale, triplets, max(each.gap for each in found))


def _milora(weight: InitWeight, rank: int, scale: float, draw: Draw) -> InitialFactors:
    """As PiSSA, but of the last r triplets (Wang et al., NAACL 2025, MiLoRA)."""
    return _split_triplets(weight, rank, scale, [least_triplets(W, rank) for W in weight.stack], 0.0)


def _split_triplets(
    weight: InitWeight, rank: int, scale: float, triplets: list[tuple[Tensor, Tensor, Tensor]], gap: float
) -> InitialFactors:
    """B = U sqrt(S / s), A = sqrt(S / s) V^T of each matrix; zeros where it has fewer than r."""
    E, out, inp = weight.sizes
    A, B = torch.zeros(rank, E, inp, dtype=torch.float32), torch.zeros(rank, E, out, dtype=torch.float32)
    for e, (U, S, V) in enumerate(triplets):
        root = (S / scale).sqrt()
        A[: len(S), e], B[: len(S), e] = (V.double() * root).T.float().cpu(), (U.double() * root).T.float().cpu()
    return InitialFactors(A, B, gap)


def _mica(weight: InitWeight, rank: int, scale: float, draw: Draw) -> InitialFactors:
    """B the last r left singular vectors, which training leaves as they are; A = 0 (`mica_init`, arXiv 2604.01694)."""
    E, _, inp = weight.sizes
    B = torch.stack([least_triplets(W, rank)[0].T.cpu() for W in weight.stack], 1)
    return InitialFactors(torch.zeros(rank, E, inp, dtype=torch.float32), B)


def _olora(weight: InitWeight, rank: int, scale: float, draw: Draw) -> InitialFactors:
    """W = Q R: B the first r columns of Q, A the first r rows of R (Büyükakyüz, 2024; not divided by s, as in PEFT)."""
    starts = []
    for W in weight.stack:
        Q = torch.linalg.qr(W[:, :rank].double()).Q
        starts.append(((Q.T.float() @ W).cpu(), Q.T.float().cpu()))
    A, B = (torch.stack(side, 1) for side in zip(*starts, strict=True))
    return InitialFactors(A, B)


@dataclass(frozen=True)
class InitMethod:
    """reads: the weights' values; changes_base: the adapter belongs on W - s B A, the residual; field: what the
    config's init_lora_weights must say for PEFT to train it right and never start it anew.
    """

    make: Callable[[InitWeight, int, float, Draw], InitialFactors]
    reads: bool = False
    mutates_base: bool = False
    field: bool | str = True


INITS: dict[str, InitMethod] = {
    "lora": InitMethod(_lora),
    "gaussian": InitMethod(_gaussian),
    "orthogonal": InitMethod(_orthogonal),
    "pissa": InitMethod(_pissa, True, True),
    "milora": InitMethod(_milora, True, True),
    "mica": InitMethod(_mica, True, field="mica"),
    "olora": InitMethod(_olora, True, True),
}


# What is asked for and cannot be had from the files of a base -> the reason.
REFUSED = {
    "eva": "it needs activations: run a model on data (peft.initialize_lora_eva_weights)",
    "corda": "it needs activations: run a model on data (peft.tuners.lora.corda.preprocess_corda)",
    "lora_ga": "it needs gradients: run a model on data (peft.tuners.lora.loraga)",
    "loftq": "it needs the quantizer that the base will have (peft.LoftQConfig)",
}
