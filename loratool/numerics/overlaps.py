"""Measure how much several changes of one matrix share: inner products, distances, and their interference.

All measures follow from the singular vectors side by side, U = [U_1 .. U_T] and V. They need only the triangles of the
QR of both, which are as small as the sum of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .factored_svd import FactoredSVD, are_equal
from .spectrum import RANK_TOLERANCE


@dataclass(frozen=True)
class Overlaps:
    """Overlaps of changes D_i, i = 1 .. T, of one matrix; leading dimensions are of a batch of matrices.

    The interference of changes is |(U^T U - I) S (V^T V - I)|_1, in entries, with the singular vectors of all side by
    side (Gargiulo et al., CVPR 2025, arXiv 2412.00081, section 3.3). It is 0 if no two share a direction on both sides,
    and the sum of S for two equal changes; with more than two, each entry is that of all others together.
    """

    norms: Tensor  # (..., T): |D_i|
    inner: Tensor  # (..., T, T): <D_i, D_j>
    distances: Tensor  # (..., T, T): |D_i - D_j|, exactly 0 for equal SVDs
    sizes: Tensor  # (..., T): the sum of S_i
    pairs: Tensor  # (..., T, T): the interference of D_i and D_j, 0 for one change and itself
    together: Tensor  # (...): the interference of all
    outputs: Tensor  # (..., T, T): |D_i|^2 within the columns of D_j, 0 for one change and itself
    inputs: Tensor  # (..., T, T): and within its rows
    random_pairs: Tensor  # (..., T, T): about the mean of `pairs` with these S and random directions
    random_together: Tensor  # (...)

    def total(self, dim: int = 0) -> Overlaps:
        """Return the overlaps of all matrices along a dimension together, as if they were blocks of one."""
        summed = {field.name: getattr(self, field.name).sum(dim) for field in fields(self)}
        for name in ("norms", "distances"):
            summed[name] = torch.linalg.vector_norm(getattr(self, name), dim=dim)
        return Overlaps(**summed)

    def member(self, i: int) -> Overlaps:
        """Return the overlaps of one matrix of a batch."""
        return Overlaps(**{field.name: getattr(self, field.name)[i] for field in fields(self)})

    @property
    def cosines(self) -> Tensor:
        """<D_i, D_j> / (|D_i| |D_j|), (..., T, T), and 0 if one of them is 0."""
        both = self.norms.unsqueeze(-1) * self.norms.unsqueeze(-2)
        return _ratio(self.inner, both).clamp(-1.0, 1.0)

    @property
    def relatives(self) -> Tensor:
        """|D_i - D_j| / max(|D_i|, |D_j|), (..., T, T), and 0 if both are 0."""
        return _ratio(self.distances, torch.maximum(self.norms.unsqueeze(-1), self.norms.unsqueeze(-2)))

    @property
    def of_pairs(self) -> tuple[Tensor, Tensor]:
        """The interference of each pair over the sum of its S, and with random directions, (..., T, T)."""
        both = self.sizes.unsqueeze(-1) + self.sizes.unsqueeze(-2)
        return _ratio(self.pairs, both), _ratio(self.random_pairs, both)

    @property
    def of_sides(self) -> tuple[Tensor, Tensor]:
        """The share of the energy of each pair that is within the columns, and the rows, of the other, (..., T, T)."""
        energy = self.norms.square()
        both = energy.unsqueeze(-1) + energy.unsqueeze(-2)
        return _ratio(self.outputs + self.outputs.mT, both), _ratio(self.inputs + self.inputs.mT, both)

    @property
    def of_all(self) -> tuple[Tensor, Tensor]:
        """The interference of all over the sum of their S, and with random directions, (...): (T - 1)^2 if equal."""
        size = self.sizes.sum(-1)
        return _ratio(self.together, size), _ratio(self.random_together, size)


def _ratio(part: Tensor, total: Tensor) -> Tensor:
    """Return part / total, and 0 where the total is 0."""
    return torch.where(total == 0, 0.0, part / torch.where(total == 0, 1.0, total))


def stacked(members: Iterable[Overlaps]) -> Overlaps:
    """Return the overlaps of several matrices as a batch."""
    names = [field.name for field in fields(Overlaps)]
    batch = list(members)
    return Overlaps(**{name: torch.stack([getattr(member, name) for member in batch]) for name in names})


def overlaps(changes: Sequence[FactoredSVD]) -> Overlaps:
    """Return the overlaps of changes, each given by its SVD with U (..., out, k_i); k_i = 0 stands for no change.

    Distances are those of the changes' cores in the bases of all, since |D_i|^2 - 2 <D_i, D_j> + |D_j|^2 would cancel.
    """
    S = [torch.where(_is_direction(change), change.S, 0.0) for change in changes]
    is_direction = torch.cat([side > 0 for side in S], -1).unsqueeze(-2)
    R_U, R_V = (_triangle([getattr(change, side) for change in changes], is_direction) for side in ("U", "V"))
    norms = torch.stack([torch.linalg.vector_norm(side, dim=-1) for side in S], -1)
    ranks = torch.stack([(side > 0).sum(-1) for side in S], -1).to(norms.dtype)
    flat = _cores(R_U, S, R_V).flatten(-2)
    pairs, together = _interference(R_U, S, R_V)
    outputs, inputs = (_energy_within(side, S) for side in (R_U, R_V))
    random_pairs, random_together = _random(ranks, norms, changes[0].U.shape[-2], changes[0].V.shape[-2])
    return Overlaps(
        norms=norms,
        inner=flat @ flat.mT,
        distances=_distances(changes, norms, flat),
        sizes=torch.stack([side.sum(-1) for side in S], -1),
        pairs=pairs,
        together=together,
        outputs=outputs,
        inputs=inputs,
        random_pairs=random_pairs,
        random_together=random_together,
    )


def _cores(U: Tensor, S: Sequence[Tensor], V: Tensor) -> Tensor:
    """Return U_i S_i V_i^T (..., T, p, q)."""
    widths = [side.shape[-1] for side in S]
    sides = zip(torch.split(U, widths, -1), S, torch.split(V, widths, -1), strict=True)
    return torch.stack([(left * values.unsqueeze(-2)) @ right.mT for left, values, right in sides], -3)


def _is_direction(change: FactoredSVD) -> Tensor:
    """Return which singular values (..., k) are more than rounding noise."""
    return RANK_TOLERANCE * change.S[..., :1] < change.S


def _triangle(vectors: Sequence[Tensor], is_direction: Tensor) -> Tensor:
    """Return R of the QR of vectors side by side, 0 for those that are not directions. R has the vectors' products."""
    R: Tensor = torch.linalg.qr(torch.cat(list(vectors), -1), mode="r").R
    return torch.where(is_direction, R, 0.0)


def _distances(changes: Sequence[FactoredSVD], norms: Tensor, flat: Tensor) -> Tensor:
    """Return the distances of cores (..., T, n), 0 where the SVDs are equal, and the norm beside a change of 0."""
    distances = flat.new_zeros((*flat.shape[:-1], flat.shape[-2]))
    for i, first in enumerate(changes):
        for j, second in enumerate(changes[:i]):
            apart = torch.linalg.vector_norm(flat[..., i, :] - flat[..., j, :], dim=-1)
            distances[..., i, j] = distances[..., j, i] = apart.masked_fill(are_equal(first, second), 0.0)
    lone = (norms == 0).unsqueeze(-1) | (norms == 0).unsqueeze(-2)
    return torch.where(lone, norms.unsqueeze(-1) + norms.unsqueeze(-2), distances)


def _interference(U: Tensor, S: Sequence[Tensor], V: Tensor) -> tuple[Tensor, Tensor]:
    """Return the interference of pairs (..., T, T) and of all (...), from U (..., p, k) and V (..., q, k) side by side.

    Each change's vectors are orthonormal, so U^T U - I is 0 but in the blocks between two changes.
    """
    widths = [side.shape[-1] for side in S]
    left, right = (_products_of_two(side, widths) for side in (U, V))
    left = left * torch.cat(list(S), -1).unsqueeze(-2)
    rows, columns = (
        [torch.split(part, widths, -1) for part in torch.split(side, widths, -2)] for side in (left, right)
    )
    pairs = left.new_zeros((*left.shape[:-2], len(S), len(S)))
    for i in range(len(S)):
        for j in range(len(S)):
            pairs[..., i, j] = (rows[i][j] @ columns[j][i]).abs().sum((-2, -1))
    return pairs + pairs.mT, (left @ right).abs().sum((-2, -1))


def _products_of_two(vectors: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the products of vectors (..., p, k) of different changes, (..., k, k); 0 within one change."""
    owners = [i for i, width in enumerate(widths) for _ in range(width)]
    owner = torch.tensor(owners, device=vectors.device, dtype=torch.int64)
    return (vectors.mT @ vectors).masked_fill(owner.unsqueeze(0) == owner.unsqueeze(1), 0.0)


def _energy_within(vectors: Tensor, S: Sequence[Tensor]) -> Tensor:
    """Return the energy of each change i in the span of j's vectors on one side (..., T, T)."""
    widths = [side.shape[-1] for side in S]
    energy = _products_of_two(vectors, widths).square() * torch.cat(list(S), -1).square().unsqueeze(-1)
    rows = [part.sum(-2) for part in torch.split(energy, widths, -2)]
    return torch.stack([torch.stack([e.sum(-1) for e in torch.split(row, widths, -1)], -1) for row in rows], -2)


def _random(ranks: Tensor, norms: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return about the mean of `_interference` for random directions of ranks and norms (..., T) in (height, width).

    An entry of its product between D_i and D_k is a sum over the directions of all others, each with two cosines of
    variances 1 / height and 1 / width: nearly normal, of variance sum_j |D_j|^2 / (height width).
    """
    other = 1.0 - torch.eye(ranks.shape[-1], dtype=norms.dtype, device=norms.device)
    spread = torch.einsum("...j,ij,kj->...ik", norms.square(), other, other).sqrt()
    entries = ranks.unsqueeze(-1) * ranks.unsqueeze(-2) * spread
    disturbed = ranks.square().unsqueeze(-1) * norms.unsqueeze(-2) * other
    size = math.sqrt(2 / (math.pi * max(1, height * width)))
    return size * (disturbed + disturbed.mT), size * entries.sum((-2, -1))
