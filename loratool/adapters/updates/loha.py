"""Add a product of two low-rank products, LoHa: D = scale * (w1_a @ w1_b) * (w2_a @ w2_b), element by element.

Defined by Hyeon-Woo et al., FedPara, ICLR 2022, proposition 1; files by LyCORIS (`lycoris/modules/loha.py`) and PEFT
(`peft/tuners/loha/layer.py`). With Tucker cores (proposition 3) each side is t contracted with its two factors; the
outputs are then the columns of w_a.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .tucker import sum_terms, tucker_factors
from .update import PeftMethod, RowsOfDelta, Update, UpdateSpec, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Wide
    from ...numerics.products import Term


ROLES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


@dataclass(frozen=True)
class LoHa(Update):
    """LoHa of a linear layer, or of a convolution with the kernel in w_b or in the Tucker cores."""

    w1_a: Numbers  # (out, r), with a core (r, out)
    w1_b: Numbers  # (r, in * kernel), with a core (r, in)
    w2_a: Numbers
    w2_b: Numbers
    t1: Numbers | None  # (r, r, *kernel)
    t2: Numbers | None
    scale: float  # alpha / r

    kind = "loha"
    roles = ROLES[:4]
    optional = ROLES[4:]
    suffixes: ClassVar = {f".{role}": role for role in ROLES}
    peft = PeftMethod("LOHA", {role: role for role in ROLES}, "alpha")

    flattened = True

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        a, b = spec.specs["hada_w1_a"].shape, spec.specs["hada_w1_b"].shape
        core = spec.specs.get("hada_t1")
        return (a[1], b[1], *core.shape[2:]) if core else (a[0], b[1])

    @classmethod
    def rank(cls, spec: UpdateSpec) -> int:
        return spec.specs["hada_w1_b"].shape[0] * spec.specs["hada_w2_b"].shape[0]

    @classmethod
    def divisor(cls, spec: UpdateSpec) -> int:
        return spec.specs["hada_w1_b"].shape[0]

    @classmethod
    def sums(cls, spec: UpdateSpec) -> bool:
        return "hada_t1" in spec.specs

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        if ("hada_t1" in specs) is not ("hada_t2" in specs):
            raise InputError(f"one of the Tucker cores of {module} is missing", culprit=next(iter(roles.values())))
        sides = []
        for side in (1, 2):
            a, b = (specs[f"hada_w{side}_{end}"].shape for end in "ab")
            core = specs.get(f"hada_t{side}")
            inner = a[:1] if core else a[1:2]
            if len(a) != 2 or len(b) != 2 or inner != b[:1] or b[0] == 0 or (core and core.shape[:2] != (b[0], b[0])):
                core_text = f", t{side} is {core.shape}" if core else ""
                raise InputError(
                    f"w{side}_a is {a}, w{side}_b is {b}{core_text}: they cannot be multiplied", culprit=module
                )
            sides.append((a[1] if core else a[0], b[1], core.shape[2:] if core else ()))
        if sides[0] != sides[1]:
            raise InputError(f"its two products are {sides[0]} and {sides[1]}", culprit=module)

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        require_rank(spec, config, cls.divisor(spec))
        return replace(spec, scale=config.scale_of(spec.module, cls.divisor(spec)))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> LoHa:
        w1_a, w1_b, w2_a, w2_b = (tensors[role] for role in cls.roles)
        return cls(w1_a, w1_b, w2_a, w2_b, tensors.get("hada_t1"), tensors.get("hada_t2"), spec.scale)

    def _sides(self) -> list[tuple[Numbers, Numbers, Numbers | None]]:
        """Return a, b and the core of both products."""

        return [(self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2)]

    def _terms(self) -> list[list[Term]]:
        """Return both products as terms."""
        from ...numerics.exact_factors import tucker_terms
        from ...numerics.products import Term

        unit = Fraction(1)
        return [[Term(a, b, unit)] if t is None else tucker_terms(a.T, t, b, unit) for a, b, t in self._sides()]

    def delta(self, weight: float, transposed: bool) -> RowsOfDelta:
        from ...numerics.composed import Hadamard

        scale = Fraction(self.scale) * Fraction(weight)
        left, right = (sum_terms(terms, transposed) for terms in self._terms())
        return lambda start, stop: Hadamard(left.rows(start, stop), right.rows(start, stop), scale)

    def factors(self) -> tuple[Wide, Wide]:
        (B1, A1), (B2, A2) = (
            (a.wide(), b.wide()) if t is None else tucker_factors(a.T, t, b) for a, b, t in self._sides()
        )
        B = (B1[:, :, None] * B2[:, None]).reshape(len(B1), -1)  # Khatri-Rao products
        A = (A1[:, None] * A2[None]).reshape(-1, A1.shape[1])
        return B[None] * self.scale, A[None]
