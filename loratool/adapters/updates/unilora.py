"""Add a low-rank product whose factors repeat the numbers of one vector, Uni-LoRA: A = theta[places] * scales, as B.

Defined by `peft/tuners/unilora/layer.py`. All modules share theta. Without `save_indices` the file has neither places
nor scales, and the draw that would give them depends on the order of the model's modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ...files.weights_file import WeightsFile
from ..config import AdapterConfig
from .indices import read_indices
from .tucker import transposed_terms
from .update import PeftMethod, Update, UpdateSpec, finite_numbers, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Wide
    from ...numerics.products import Term

THETA, SIDES = "unilora_theta_d", ("A", "B")


@dataclass(frozen=True)
class UniLoRA(Update):
    """An update of Uni-LoRA, with the shared vector's numbers in their places."""

    theta_A: Numbers  # (r, in)
    scales_A: Numbers  # (r, in)
    theta_B: Numbers  # (out, r)
    scales_B: Numbers  # (out, r)

    kind = "unilora"
    roles = (*(f"unilora_{part}_{side}" for part in ("indices", "scales") for side in SIDES), THETA)
    peft = PeftMethod(
        "UNILORA",
        {role: role for role in roles[:-1]},
        shared=(THETA,),
        alone="save it with peft with save_indices=True in its config",
    )

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return (spec.specs["unilora_indices_B"].shape[0], spec.specs["unilora_indices_A"].shape[1])

    @classmethod
    def rank(cls, spec: UpdateSpec) -> int:
        return spec.specs["unilora_indices_A"].shape[0]

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        A, B, scales_A, scales_B, theta = (specs[role].shape for role in cls.roles)
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or not A[0] or (scales_A, scales_B) != (A, B) or len(theta) != 1:
            raise InputError(
                f"A is {A} with scales {scales_A}, B is {B} with scales {scales_B}, the vector is {theta}: they cannot "
                "be multiplied",
                culprit=module,
            )

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        require_rank(spec, config, cls.rank(spec))
        return spec

    @classmethod
    def load(cls, spec: UpdateSpec, file: WeightsFile, adapter: str) -> Update:
        names = {role: name for role, name in spec.tensors.items() if "indices" not in role}
        numbers = finite_numbers(names, file, adapter)
        theta = numbers[THETA]
        placed = {
            f"theta_{side}": theta[read_indices(file, spec.tensors[f"unilora_indices_{side}"], len(theta))]
            for side in SIDES
        }
        return cls.make(spec, {**numbers, **placed})

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> UniLoRA:
        return cls(*(tensors[role] for side in SIDES for role in (f"theta_{side}", f"unilora_scales_{side}")))

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        from ...numerics.exact_factors import multiply_exactly
        from ...numerics.products import Term

        lefts, rights = multiply_exactly(self.theta_B, self.scales_B), multiply_exactly(self.theta_A, self.scales_A)
        terms = [Term(left, right, Fraction(weight)) for left in lefts for right in rights]
        return transposed_terms(terms) if transposed else terms

    def factors(self) -> tuple[Wide, Wide]:
        B, A = (self.theta_B.wide() * self.scales_B.wide(), self.theta_A.wide() * self.scales_A.wide())
        return B[None], A[None]
