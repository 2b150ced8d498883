"""Linear algebra and reshaping that differ between numpy's arrays on the CPU and torch's tensors on a GPU.

Operators, slices, `reshape`, `swapaxes`, `clip` and sums along an axis are the same in both, so this and `arrays` are
all that a function needs to run on either. Axes and results are numpy's, and leading axes are of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .arrays import Array

ROWS = 1024  # of a block of a tall matrix

CONDITION = 100.0  # of columns, up to which their products tell the triangle to 12 digits


class SVD(NamedTuple):
    """X = U diag(S) Vh with k = min(m, n)."""

    U: Array  # (..., m, k)
    S: Array  # (..., k), largest first
    Vh: Array  # (..., k, n)


def _torch(x: Array) -> Any:
    """Return torch for its tensors; None for numpy's arrays and numbers."""
    if isinstance(x, np.ndarray | np.generic):
        return None
    import torch

    return torch


def adjoint(x: Array) -> Array:
    """Return the transpose of each matrix, without a copy."""
    return x.swapaxes(-1, -2)


def qr(x: Array) -> tuple[Array, Array]:
    """Return Q (..., m, k) with orthonormal columns, and the triangle R (..., k, n)."""
    torch = _torch(x)
    if torch or not _is_tall(x):
        Q, R = (torch or np).linalg.qr(x)
        return Q, R
    blocks, rest = _row_blocks(x)
    first, triangles = np.linalg.qr(blocks)
    second, R = np.linalg.qr(_below_one_another(triangles, rest))
    Q, whole, height = np.empty(x.shape, x.dtype), x.shape[-2] - rest.shape[-2], second.shape[-2] - rest.shape[-2]
    parts = second[..., :height, :].reshape(triangles.shape)
    np.matmul(first, parts, out=Q[..., :whole, :].reshape(blocks.shape))
    Q[..., whole:, :] = second[..., height:, :]
    return Q, R


def triangle_of(x: Array) -> Array:
    """Return the R of `qr`."""
    torch = _torch(x)
    if torch:
        return torch.linalg.qr(x, mode="r").R
    if _is_tall(x):
        R = _triangle_by_cholesky(x)
        if R is not None:
            return R
        blocks, rest = _row_blocks(x)
        x = _below_one_another(np.linalg.qr(blocks, mode="r"), rest)
    return np.linalg.qr(x, mode="r")


@np.errstate(all="ignore")  # squares that overflow
def _triangle_by_cholesky(x: Array) -> Array | None:
    """Return the triangle of well conditioned columns from their products, in a third of the time, else None.

    Its error is that of `qr` times the condition.
    """
    try:
        L = np.linalg.cholesky(adjoint(x) @ x)
        condition = norm(L, (-2, -1)) * norm(np.linalg.inv(L), (-2, -1))
    except np.linalg.LinAlgError:
        return None
    return adjoint(L) if (condition < CONDITION).all() else None


def _is_tall(x: Array) -> bool:
    """Return whether the QR of the triangles of blocks of rows, which fit into the cache, takes less time."""
    return bool(x.shape[-2] >= 2 * ROWS and 0 < 4 * x.shape[-1] <= ROWS)


def _row_blocks(x: Array) -> tuple[Array, Array]:
    """Return blocks (..., count, ROWS, n) and the rest of the rows, without a copy."""
    count = x.shape[-2] // ROWS
    return x[..., : count * ROWS, :].reshape(*x.shape[:-2], count, ROWS, x.shape[-1]), x[..., count * ROWS :, :]


def _below_one_another(triangles: Array, rest: Array) -> Array:
    return np.concatenate([triangles.reshape(*rest.shape[:-2], -1, rest.shape[-1]), rest], -2)


def svd(x: Array) -> SVD:
    torch = _torch(x)
    return SVD(*(torch or np).linalg.svd(x, full_matrices=False))


def svd_values(x: Array) -> Array:
    """Return the S of `svd`."""
    torch = _torch(x)
    return torch.linalg.svdvals(x) if torch else np.linalg.svd(x, compute_uv=False)


def eigh(x: Array) -> tuple[Array, Array]:
    """Return the eigenvalues of symmetric matrices, largest first, (..., n), and their eigenvectors as columns."""
    values, vectors = (_torch(x) or np).linalg.eigh(x)
    return flip(values, -1), flip(vectors, -1)


def eigenvalues(x: Array) -> Array:
    """Return the eigenvalues of symmetric matrices, largest first, (..., n)."""
    return flip((_torch(x) or np).linalg.eigvalsh(x), -1)


def solve(x: Array, y: Array) -> Array:
    """Return x^-1 y."""
    return (_torch(x) or np).linalg.solve(x, y)


@np.errstate(over="ignore")
def norm(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Return the root of the sum of squares along axes, or of all numbers."""
    torch = _torch(x)
    return torch.linalg.vector_norm(x, dim=axis) if torch else np.sqrt(np.square(x).sum(axis))


def flip(x: Array, axis: int) -> Array:
    """Return a copy in the opposite order, as numpy 1.24 takes tens of times as long for a product with a view."""
    torch = _torch(x)
    return torch.flip(x, (axis,)) if torch else np.ascontiguousarray(np.flip(x, axis))


def concatenate(arrays: Sequence[Array], axis: int = 0) -> Array:
    torch = _torch(arrays[0])
    return torch.cat(list(arrays), axis) if torch else np.concatenate(arrays, axis)


def stack(arrays: Sequence[Array], axis: int = 0) -> Array:
    return (_torch(arrays[0]) or np).stack(list(arrays), axis)


def split(x: Array, sizes: Sequence[int], axis: int) -> list[Array]:
    """Return parts of these sizes along an axis, without a copy."""
    torch = _torch(x)
    return list(torch.split(x, list(sizes), axis) if torch else np.split(x, np.cumsum(sizes)[:-1].tolist(), axis))


def einsum(subscripts: str, *arrays: Array) -> Array:
    return (_torch(arrays[0]) or np).einsum(subscripts, *arrays)


def square(x: Array) -> Array:
    return x * x


def sqrt(x: Array) -> Array:
    return (_torch(x) or np).sqrt(x)


def minimum(x: Array, y: Array) -> Array:
    return (_torch(x) or np).minimum(x, y)


def maximum(x: Array, y: Array) -> Array:
    return (_torch(x) or np).maximum(x, y)


def isfinite(x: Array) -> Array:
    return (_torch(x) or np).isfinite(x)


def zeros(shape: Sequence[int], like: Array, kind: npt.DTypeLike = np.float64) -> Array:
    """Return zeros where `like` is."""
    torch = _torch(like)
    if torch is None:
        return np.zeros(shape, kind)
    return torch.zeros(tuple(shape), dtype=torch_type(kind), device=like.device)


def eye(size: int, like: Array) -> Array:
    """Return the identity in float64, where `like` is."""
    torch = _torch(like)
    return torch.eye(size, dtype=torch.float64, device=like.device) if torch else np.eye(size)


def cast(x: Array, like: Array) -> Array:
    """Return x in the type of `like`; x itself if it has it."""
    return x.to(like.dtype) if _torch(x) else x.astype(like.dtype, copy=False)


def singled(x: Array) -> Array:
    """Return an array in float32; itself if it is."""
    return x.float() if _torch(x) else x.astype(np.float32, copy=False)


def contiguous(x: Array) -> Array:
    return x.contiguous() if _torch(x) else np.ascontiguousarray(x)


def order_of(x: Array) -> Array:
    """Return the places of numbers (n,), the largest first; equal ones stay in order."""
    torch = _torch(x)
    return torch.argsort(x, descending=True, stable=True) if torch else np.argsort(-x, kind="stable")


def taken(x: Array, rows: Array) -> Array:
    """Return x[rows[j], j] of each column j, (n,)."""
    torch = _torch(x)
    return torch.gather(x, 0, rows[None])[0] if torch else np.take_along_axis(x, rows[None], 0)[0]


def padded(x: Array, axis: int, size: int) -> Array:
    """Return x with zeros appended along an axis, up to a size."""
    shape = list(x.shape)
    shape[axis] = size - x.shape[axis]
    if not shape[axis]:
        return x
    return concatenate([x, cast(zeros(shape, x), x)], axis)


def torch_type(kind: npt.DTypeLike) -> Any:
    """Return torch's type of a numpy type."""
    import torch

    return torch.from_numpy(np.empty(0, kind)).dtype


def is_positive(x: Array) -> bool:
    """Return whether a symmetric matrix is positive definite."""
    linalg: Any = (_torch(x) or np).linalg
    try:
        linalg.cholesky(x)
    except linalg.LinAlgError:
        return False
    return True
