"""Add a Kronecker product, LoKr: D = scale * w1 (x) w2, each full or a product of factors (w2 with a Tucker core).

Defined by Edalati et al., KronA, 2022; files by LyCORIS (`lycoris/modules/lokr.py`) and PEFT
(`peft/tuners/lokr/layer.py`). A flattened convolution is a plain Kronecker product with w2 flattened likewise. PEFT
trains a convolution of one axis with a complete w2 in another order: each tap of D is that tap of w2 (x) w1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .tucker import sum_terms, tucker_factors
from .update import Detail, PeftMethod, RowsOfDelta, Update, UpdateSpec, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.decide import Delta
    from ...numerics.forms import Wide

ROLES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


@dataclass(frozen=True)
class ByTaps(Detail):
    """Each tap is w2 (x) w1, as torch.kron has it for a w2 of three axes."""


@dataclass(frozen=True)
class LoKr(Update):
    """LoKr of a linear layer or a convolution; each side is a matrix or its factors."""

    w1: Numbers | None  # (a, c)
    w1_a: Numbers | None  # (a, r)
    w1_b: Numbers | None  # (r, c)
    w2: Numbers | None  # (b, d, *kernel)
    w2_a: Numbers | None  # (b, r), with a core (r, b)
    w2_b: Numbers | None  # (r, d * kernel), with a core (r, d)
    t2: Numbers | None  # (r, r, *kernel)
    scale: float  # alpha / r; 1 in LyCORIS if both sides are full
    by_taps: bool = False

    kind = "lokr"
    roles = ()
    optional = ROLES
    suffixes: ClassVar = {f".{role}": role for role in ROLES}
    peft = PeftMethod("LOKR", {role: role for role in ROLES}, "alpha")

    flattened = True

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        (a, c), (b, d, *kernel) = (_side(spec.specs, side) for side in (1, 2))
        return (a * b, c * d, *kernel)

    @classmethod
    def rank(cls, spec: UpdateSpec) -> int:
        ranks = []
        for side in (1, 2):
            rows, *columns = _side(spec.specs, side)
            factor = spec.specs.get(f"lokr_w{side}_b")
            ranks.append(min(rows, math.prod(columns), factor.shape[0] if factor else rows))
        return ranks[0] * ranks[1]

    @classmethod
    def divisor(cls, spec: UpdateSpec) -> int:
        return next((spec.specs[f"lokr_w{side}_b"].shape[0] for side in (2, 1) if f"lokr_w{side}_b" in spec.specs), 0)

    @classmethod
    def sums(cls, spec: UpdateSpec) -> bool:
        return "lokr_t2" in spec.specs or any(_is_wide(spec.specs, side) for side in (1, 2))

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        first = next(iter(roles.values()))
        for side in (1, 2):
            full, parts = f"lokr_w{side}" in specs, [f"lokr_w{side}_{end}" in specs for end in "ab"]
            if full is any(parts) or parts[0] is not parts[1]:
                raise InputError(f"needs w{side}, or w{side}_a and w{side}_b, of {module}", culprit=first)
            shapes = [specs[role].shape for role in ROLES if role in specs and role.startswith(f"lokr_w{side}")]
            core = specs.get("lokr_t2") if side == 2 else None
            if full and core:
                raise InputError(f"has both a complete w2 and t2, a core of its factors, of {module}", culprit=first)
            if full:
                good = len(shapes[0]) == 2 or (side == 2 and len(shapes[0]) > 2)
            else:
                a, b = shapes
                good = len(a) == len(b) == 2 and (a[0] if core else a[1]) == b[0] > 0
                good = good and (core is None or core.shape[:2] == (b[0], b[0]))
            if not good or not all(map(math.prod, shapes)):
                raise InputError(f"w{side} is made of {' and '.join(map(str, shapes))}: not a matrix", culprit=module)
        ranks = {specs[f"lokr_w{side}_b"].shape[0] for side in (1, 2) if f"lokr_w{side}_b" in specs}
        if len(ranks) > 1:
            raise InputError(
                f"its sides have the ranks {sorted(ranks)}, and tools differ in which one divides alpha", culprit=module
            )

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        # without a rank in a config the file is LyCORIS's, which does not scale two full sides; PEFT does
        stated, stored, w2 = config.rank_of(spec.module), cls.divisor(spec), spec.specs.get("lokr_w2")
        if stored:
            require_rank(spec, config, stored)
        elif not config.rank_is_alpha and (stated is None or stated < 1):
            raise InputError("the config does not say the rank that divides alpha", culprit=spec.module)
        if stated and w2 and len(w2.shape) in (3, 5):
            if len(w2.shape) == 5 or "lokr_w1" not in spec.specs:
                reason = f"has lokr_w2 of {w2.shape}, for a convolution that peft does not make so"
                raise InputError(reason, culprit=spec.module)
            spec = replace(spec, transposed=False, detail=ByTaps())
        rank = stated or stored
        return replace(spec, scale=config.scale_of(spec.module, rank) if rank else 1.0)

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> LoKr:
        w1, w1_a, w1_b, w2, w2_a, w2_b, t2 = (tensors.get(role) for role in ROLES)
        return cls(w1, w1_a, w1_b, w2, w2_a, w2_b, t2, spec.scale, isinstance(spec.detail, ByTaps))

    def _first(self) -> tuple[Wide, Wide]:
        """Return factors of w1."""
        return _factors_of(self.w1, self.w1_a, self.w1_b, None)

    def _second(self) -> tuple[Wide, Wide]:
        return _factors_of(self.w2, self.w2_a, self.w2_b, self.t2)

    def delta(self, weight: float, transposed: bool) -> RowsOfDelta:
        from ...numerics.composed import Kron

        scale = Fraction(self.scale) * Fraction(weight)
        if self.by_taps:
            return lambda start, stop: self._rows_by_taps(start, stop, scale)
        left = _delta_of(self.w1, self.w1_a, self.w1_b, None, transposed)
        right = _delta_of(self.w2, self.w2_a, self.w2_b, self.t2, transposed)
        return lambda start, stop: Kron(left, right, scale, slice(start, stop))

    def _rows_by_taps(self, start: int, stop: int, scale: Fraction) -> Delta:
        """Return rows of D[(c, a), (d, b, tap)] = scale * w1[a, b] * w2[c, d, tap]."""
        import numpy as np

        from ...numerics.composed import Hadamard
        from ...numerics.stored import Stored

        assert self.w1 is not None and self.w2 is not None
        (outer, inner), (_, inputs, taps) = self.w1.shape, self.w2.shape
        i, (d, b, tap) = np.arange(start, stop), np.indices((inputs, inner, taps)).reshape(3, -1)
        w1, w2 = self.w1[i % outer][:, b], self.w2.matrix[i // outer][:, d * taps + tap]
        return Hadamard(Stored(w1, 1.0), Stored(w2, 1.0), scale)

    def factors(self) -> tuple[Wide, Wide]:
        import numpy as np

        (B1, A1), (B2, A2) = self._first(), self._second()
        if self.by_taps:
            assert self.w2 is not None
            A = A2.reshape(len(A2), 1, -1, 1, self.w2.shape[2]) * A1[:, None, :, None]
            B, A = np.kron(B2, B1).astype(np.float64, copy=False), A.reshape(len(A1) * len(A2), -1)
            return B[None] * self.scale, A[None]
        B, A = (np.kron(*sides).astype(np.float64, copy=False) for sides in ((B1, B2), (A1, A2)))
        return B[None] * self.scale, A[None]

    def singular_values(self, of_product: Callable[[Wide, Wide], Wide]) -> Wide:
        import numpy as np

        left, right = (of_product(*side) for side in (self._first(), self._second()))
        every = np.sort((left[:, None] * right).reshape(-1))[::-1]
        return every[None] * abs(self.scale)


def _side(specs: Mapping[str, TensorSpec], side: int) -> tuple[int, ...]:
    """Return the shape of w1 or w2."""
    if f"lokr_w{side}" in specs:
        return specs[f"lokr_w{side}"].shape
    a, b = (specs[f"lokr_w{side}_{end}"].shape for end in "ab")
    core = specs.get("lokr_t2") if side == 2 else None
    return (a[1], b[1], *core.shape[2:]) if core else (a[0], b[1])


def _is_wide(specs: Mapping[str, TensorSpec], side: int) -> bool:
    """Return whether w1 or w2 has factors of a higher rank than the matrix itself can have."""
    rows, *columns = _side(specs, side)
    factor = specs.get(f"lokr_w{side}_b")
    return factor is not None and factor.shape[0] > min(rows, math.prod(columns))


def _delta_of(
    full: Numbers | None, a: Numbers | None, b: Numbers | None, core: Numbers | None, transposed: bool
) -> Delta:
    from ...numerics.exact_factors import tucker_terms
    from ...numerics.products import Term
    from ...numerics.stored import Stored

    if full is not None:
        matrix = full.matrix
        return Stored(matrix.T if transposed else matrix, 1.0)
    assert a is not None and b is not None
    one = Fraction(1)
    products = sum_terms([Term(a, b, one)] if core is None else tucker_terms(a.T, core, b, one), transposed)
    return products.rows(0, products.shape[0])


def _factors_of(full: Numbers | None, a: Numbers | None, b: Numbers | None, core: Numbers | None) -> tuple[Wide, Wide]:
    """Return factors of a side, whose rank is at most the smaller dimension."""

    if full is not None:
        return with_identity(full.matrix.wide())
    assert a is not None and b is not None
    return narrowed(*((a.wide(), b.wide()) if core is None else tucker_factors(a.T, core, b)))


def narrowed(left: Wide, right: Wide) -> tuple[Wide, Wide]:
    """Return factors of left @ right with at most its full rank; factors of a higher rank are multiplied out."""
    wide = right.shape[0] > min(left.shape[0], right.shape[1])
    return with_identity(left @ right) if wide else (left, right)


def with_identity(matrix: Wide) -> tuple[Wide, Wide]:
    """Return a matrix as the product of the matrix and an identity of its smaller side."""
    import numpy as np

    identity = np.eye(min(matrix.shape))
    return (matrix, identity) if matrix.shape[1] <= matrix.shape[0] else (identity, matrix)
