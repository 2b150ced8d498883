"""Compute the singular values of D = B @ A and their effective rank in numpy, for what needs no torch.

The method is that of `factored_svd`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .forms import Wide


@np.errstate(all="ignore")
def spectrum_of_product(B: Wide, A: Wide) -> Wide:
    """Return the singular values of B @ A that can differ from 0, (..., min(out, in, r)), largest first.

    All are inf if an intermediate number overflows float64.

    Args:
        B: (..., out, r).
        A: (..., r, in).
    """
    triangles: list[Any] = [np.linalg.qr(side, mode="r") for side in (B, A.swapaxes(-1, -2))]
    core: Wide = triangles[0] @ triangles[1].swapaxes(-1, -2)
    if not np.isfinite(core).all():
        return np.full((*core.shape[:-2], min(core.shape[-2:])), np.inf)
    S: Any = np.linalg.svd(core, compute_uv=False)
    return np.asarray(S)


def effective_rank(S: Wide) -> Wide:
    """Return exp of the entropy of S / sum S (Roy & Vetterli, EUSIPCO 2007), (...), and 0 if D is 0. S: (..., k)."""
    total = S.sum(-1, keepdims=True)
    p = S / np.where(total == 0, 1.0, total)
    entropy = -(p * np.log(np.where(p == 0, 1.0, p))).sum(-1)
    return np.where(total[..., 0] == 0, 0.0, np.exp(entropy))
