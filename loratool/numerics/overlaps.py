"""Measure how much several changes of one matrix share: inner products, distances, and their interference.

All measures follow from the singular vectors side by side, U = [U_1 .. U_T] and V. They need only the triangles of the
QR of both, which are as small as the sum of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from .arrays import Array, fetched
from .factored_svd import FactoredSVD, are_equal
from .forms import Wide
from .linalg import adjoint, concatenate, norm, split, triangle_of
from .spectrum import RANK_TOLERANCE


@dataclass(frozen=True)
class Overlaps:
    """Overlaps of changes D_i, i = 1 .. T, of one matrix; leading dimensions are of a batch of matrices.

    The interference of changes is |(U^T U - I) S (V^T V - I)|_1, in entries, with the singular vectors of all side by
    side (Gargiulo et al., CVPR 2025, arXiv 2412.00081, section 3.3). It is 0 if no two share a direction on both sides,
    and the sum of S for two equal changes; with more than two, each entry is that of all others together.
    """

    norms: Wide  # (..., T): |D_i|
    inner: Wide  # (..., T, T): <D_i, D_j>
    distances: Wide  # (..., T, T): |D_i - D_j|, exactly 0 for equal SVDs
    sizes: Wide  # (..., T): the sum of S_i
    pairs: Wide  # (..., T, T): the interference of D_i and D_j, 0 for one change and itself
    together: Wide  # (...): the interference of all
    outputs: Wide  # (..., T, T): |D_i|^2 within the columns of D_j, 0 for one change and itself
    inputs: Wide  # (..., T, T): and within its rows
    random_pairs: Wide  # (..., T, T): about the mean of `pairs` with these S and random directions
    random_together: Wide  # (...)

    def total(self, axis: int = 0) -> Overlaps:
        """Return the overlaps of all matrices along an axis together, as if they were blocks of one."""
        summed = {field.name: getattr(self, field.name).sum(axis) for field in fields(self)}
        for name in ("norms", "distances"):
            summed[name] = norm(getattr(self, name), axis)
        return Overlaps(**summed)

    def member(self, i: int) -> Overlaps:
        """Return the overlaps of one matrix of a batch."""
        return Overlaps(**{field.name: getattr(self, field.name)[i] for field in fields(self)})

    @property
    def cosines(self) -> Wide:
        """<D_i, D_j> / (|D_i| |D_j|), (..., T, T), and 0 if one of them is 0."""
        both = self.norms[..., None] * self.norms[..., None, :]
        return np.clip(_ratio(self.inner, both), -1.0, 1.0)

    @property
    def relatives(self) -> Wide:
        """|D_i - D_j| / max(|D_i|, |D_j|), (..., T, T), and 0 if both are 0."""
        return _ratio(self.distances, np.maximum(self.norms[..., None], self.norms[..., None, :]))

    @property
    def of_pairs(self) -> tuple[Wide, Wide]:
        """The interference of each pair over the sum of its S, and with random directions, (..., T, T)."""
        both = self.sizes[..., None] + self.sizes[..., None, :]
        return _ratio(self.pairs, both), _ratio(self.random_pairs, both)

    @property
    def of_sides(self) -> tuple[Wide, Wide]:
        """The share of the energy of each pair that is within the columns, and the rows, of the other, (..., T, T)."""
        energy = np.square(self.norms)
        both = energy[..., None] + energy[..., None, :]
        outputs, inputs = (_ratio(side + adjoint(side), both) for side in (self.outputs, self.inputs))
        return outputs, inputs

    @property
    def of_all(self) -> tuple[Wide, Wide]:
        """The interference of all over the sum of their S, and with random directions, (...): (T - 1)^2 if equal."""
        size = self.sizes.sum(-1)
        return _ratio(self.together, size), _ratio(self.random_together, size)


def _ratio(part: Wide, total: Wide) -> Wide:
    """Return part / total, and 0 where the total is 0."""
    return np.where(total == 0, 0.0, part / np.where(total == 0, 1.0, total))


def stacked(members: Iterable[Overlaps]) -> Overlaps:
    """Return the overlaps of several matrices as a batch."""
    names = [field.name for field in fields(Overlaps)]
    batch = list(members)
    return Overlaps(**{name: np.stack([getattr(member, name) for member in batch]) for name in names})


def overlaps(changes: Sequence[FactoredSVD], sides: tuple[int, int] | None = None) -> Overlaps:
    """Return the overlaps of changes, each given by its SVD with U (..., out, k_i); k_i = 0 stands for no change.

    Distances are those of the changes' cores in the bases of all, since |D_i|^2 - 2 <D_i, D_j> + |D_j|^2 would cancel.

    Args:
        sides: (out, in) of the matrices if the SVDs are of smaller ones, `in_common_bases`.
    """
    S = [_directions(fetched(change.S)) for change in changes]
    is_direction = np.concatenate([side > 0 for side in S], -1)[..., None, :]
    R_U, R_V = (_triangle([getattr(change, side) for change in changes], is_direction) for side in ("U", "V"))
    norms = np.stack([norm(side, -1) for side in S], -1)
    ranks = np.stack([(side > 0).sum(-1) for side in S], -1).astype(np.float64)
    cores = _cores(R_U, S, R_V)
    flat = cores.reshape(*cores.shape[:-2], -1)
    pairs, together = _interference(R_U, S, R_V)
    outputs, inputs = (_energy_within(side, S) for side in (R_U, R_V))
    height, width = sides or (changes[0].U.shape[-2], changes[0].V.shape[-2])
    random_pairs, random_together = _random(ranks, norms, height, width)
    return Overlaps(
        norms=norms,
        inner=flat @ adjoint(flat),
        distances=_distances(changes, norms, flat),
        sizes=np.stack([side.sum(-1) for side in S], -1),
        pairs=pairs,
        together=together,
        outputs=outputs,
        inputs=inputs,
        random_pairs=random_pairs,
        random_together=random_together,
    )


def _cores(U: Wide, S: Sequence[Wide], V: Wide) -> Wide:
    """Return U_i S_i V_i^T (..., T, p, q)."""
    widths = [side.shape[-1] for side in S]
    sides = zip(split(U, widths, -1), S, split(V, widths, -1), strict=True)
    return np.stack([(left * values[..., None, :]) @ adjoint(right) for left, values, right in sides], -3)


def _directions(S: Wide) -> Wide:
    """Return singular values (..., k), 0 for those that may be rounding noise."""
    return np.where(RANK_TOLERANCE * S[..., :1] < S, S, 0.0)


def _triangle(vectors: Sequence[Array], is_direction: npt.NDArray[np.bool_]) -> Wide:
    """Return R of the QR of vectors side by side, 0 for those that are not directions. R has the vectors' products."""
    return np.where(is_direction, fetched(triangle_of(concatenate(vectors, -1))), 0.0)


def _distances(changes: Sequence[FactoredSVD], norms: Wide, flat: Wide) -> Wide:
    """Return the distances of cores (..., T, n), 0 where the SVDs are equal, and the norm beside a change of 0."""
    distances = np.zeros((*flat.shape[:-1], flat.shape[-2]))
    for i, first in enumerate(changes):
        for j, second in enumerate(changes[:i]):
            apart = norm(flat[..., i, :] - flat[..., j, :], -1)
            distances[..., i, j] = distances[..., j, i] = np.where(fetched(are_equal(first, second)), 0.0, apart)
    one, other = norms[..., None], norms[..., None, :]
    return np.where((one == 0) | (other == 0), one + other, distances)


def _interference(U: Wide, S: Sequence[Wide], V: Wide) -> tuple[Wide, Wide]:
    """Return the interference of pairs (..., T, T) and of all (...), from U (..., p, k) and V (..., q, k) side by side.

    Each change's vectors are orthonormal, so U^T U - I is 0 but in the blocks between two changes.
    """
    widths = [side.shape[-1] for side in S]
    left, right = (_products_of_two(side, widths) for side in (U, V))
    left = left * np.concatenate(S, -1)[..., None, :]
    rows, columns = ([split(part, widths, -1) for part in split(side, widths, -2)] for side in (left, right))
    pairs = np.zeros((*left.shape[:-2], len(S), len(S)))
    for i in range(len(S)):
        for j in range(len(S)):
            pairs[..., i, j] = np.abs(rows[i][j] @ columns[j][i]).sum((-2, -1))
    return pairs + adjoint(pairs), np.abs(left @ right).sum((-2, -1))


def _products_of_two(vectors: Wide, widths: Sequence[int]) -> Wide:
    """Return the products of vectors (..., p, k) of different changes, (..., k, k); 0 within one change."""
    owner = np.repeat(np.arange(len(widths)), widths)
    return np.where(owner == owner[:, None], 0.0, adjoint(vectors) @ vectors)


def _energy_within(vectors: Wide, S: Sequence[Wide]) -> Wide:
    """Return the energy of each change i in the span of j's vectors on one side (..., T, T)."""
    widths = [side.shape[-1] for side in S]
    energy = np.square(_products_of_two(vectors, widths) * np.concatenate(S, -1)[..., None])
    rows = [part.sum(-2) for part in split(energy, widths, -2)]
    return np.stack([np.stack([e.sum(-1) for e in split(row, widths, -1)], -1) for row in rows], -2)


def _random(ranks: Wide, norms: Wide, height: int, width: int) -> tuple[Wide, Wide]:
    """Return about the mean of `_interference` for random directions of ranks and norms (..., T) in (height, width).

    An entry of its product between D_i and D_k is a sum over the directions of all others, each with two cosines of
    variances 1 / height and 1 / width: nearly normal, of variance sum_j |D_j|^2 / (height width).
    """
    other = 1.0 - np.eye(ranks.shape[-1])
    spread = np.sqrt(np.einsum("...j,ij,kj->...ik", np.square(norms), other, other))
    entries = ranks[..., None] * ranks[..., None, :] * spread
    disturbed = np.square(ranks)[..., None] * norms[..., None, :] * other
    size = math.sqrt(2 / (math.pi * max(1, height * width)))
    return size * (disturbed + adjoint(disturbed)), size * entries.sum((-2, -1))
