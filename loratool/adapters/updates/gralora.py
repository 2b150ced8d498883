"""Add a low-rank product in each of k x k blocks, GraLoRA (Jung et al., 2025).

Block (p, n) of D is scale * (A[n][:, P] @ B[p][N]).T, with P = p q : (p + 1) q, N likewise of n, and q = r / k. So D is
a product of rank k r of factors that are 0 outside a block. With `hybrid_r` a plain product is added with the same
scale, alpha / (r + hybrid_r). Defined by `peft/tuners/gralora/layer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .tucker import transposed_terms
from .update import PeftMethod, Update, UpdateSpec, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Bits, Wide
    from ...numerics.products import Term

GENERAL = ("gralora_A_general", "gralora_B_general")


@dataclass(frozen=True)
class GraLoRA(Update):
    """GraLoRA of a linear layer."""

    A: Numbers  # (k, in / k, r)
    B: Numbers  # (k, r, out / k)
    A_general: Numbers | None  # (hybrid_r, in)
    B_general: Numbers | None  # (out, hybrid_r)
    scale: float  # alpha / (r + hybrid_r)

    kind = "gralora"
    roles = ("gralora_A", "gralora_B")
    optional = GENERAL
    peft = PeftMethod(
        "GRALORA", {**{role: role for role in roles}, **{f"{role}.weight": role for role in GENERAL}}, "alpha"
    )

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        A, B = (spec.specs[role].shape for role in cls.roles)
        return (B[0] * B[2], A[0] * A[1])

    @classmethod
    def rank(cls, spec: UpdateSpec) -> int:
        k, _, r = spec.specs["gralora_A"].shape
        return k * r + _general_rank(spec)

    @classmethod
    def divisor(cls, spec: UpdateSpec) -> int:
        return spec.specs["gralora_A"].shape[2] + _general_rank(spec)

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        A, B = (specs[role].shape for role in cls.roles)
        good = len(A) == len(B) == 3 and A[0] == B[0] and A[2] == B[1] and all((*A, *B)) and A[2] % A[0] == 0
        if not good:
            raise InputError(f"A is {A}, B is {B}: not the blocks of a product", culprit=module)
        if len(specs.keys() & GENERAL) == 1:
            raise InputError(f"one of the general factors of {module} is missing", culprit=next(iter(roles.values())))
        if GENERAL[0] in specs:
            general_A, general_B = (specs[role].shape for role in GENERAL)
            rank = (*general_A, 0)[0]
            if not rank or general_A != (rank, A[0] * A[1]) or general_B != (B[0] * B[2], rank):
                raise InputError(
                    f"its general A is {general_A}, its general B is {general_B}: they are of another size",
                    culprit=module,
                )

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        require_rank(spec, config, spec.specs["gralora_A"].shape[2])
        if config.peft.get("hybrid_r", _general_rank(spec)) != _general_rank(spec):
            raise InputError(
                f"the config says hybrid_r {config.peft['hybrid_r']}, but its tensors have {_general_rank(spec)}",
                culprit=spec.module,
                remedy="the config is of another adapter",
            )
        return replace(spec, scale=config.scale_of(spec.module, cls.divisor(spec)))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> GraLoRA:
        general_A, general_B = (tensors.get(role) for role in GENERAL)
        return cls(tensors["gralora_A"], tensors["gralora_B"], general_A, general_B, spec.scale)

    def _sides(self) -> list[tuple[Numbers, Numbers]]:
        """Return pairs (out, rank) and (rank, in) with the sum of products D, without the scale."""
        import numpy as np

        from ...numerics.arrays import Numbers

        k, inputs, r = self.A.shape
        outputs, q = self.B.shape[2], r // k
        left: Bits = np.zeros((k, outputs, k, k, q), self.B.form.bits_type)  # of block (p, n), its rank t
        right: Bits = np.zeros((k, k, q, k, inputs), self.A.form.bits_type)
        for p in range(k):
            for n in range(k):
                left[p, :, p, n] = self.B.bits[p, n * q : (n + 1) * q].T
                right[p, n, :, n] = self.A.bits[n, :, p * q : (p + 1) * q].T
        pairs = [
            (
                Numbers(left.reshape(k * outputs, k * r), self.B.form),
                Numbers(right.reshape(k * r, k * inputs), self.A.form),
            )
        ]
        if self.A_general is not None and self.B_general is not None:
            pairs.append((self.B_general, self.A_general))
        return pairs

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        from ...numerics.products import Term

        scale = Fraction(self.scale) * Fraction(weight)
        terms = [Term(left, right, scale) for left, right in self._sides()]
        return transposed_terms(terms) if transposed else terms

    def factors(self) -> tuple[Wide, Wide]:
        import numpy as np

        sides = self._sides()
        B = np.concatenate([left.wide() for left, _ in sides], 1)
        A = np.concatenate([right.wide() for _, right in sides])
        return B[None] * self.scale, A[None]


def _general_rank(spec: UpdateSpec) -> int:
    """Return hybrid_r."""
    general = spec.specs.get(GENERAL[0])
    return general.shape[0] if general else 0
