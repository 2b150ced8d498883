"""Add two fixed random matrices, scaled by trained vectors, VeRA: D = diag(b) B diag(d) A (Kopiczko et al., ICLR 2024).

B and A are the leading rows and columns of matrices that all modules share (`peft/tuners/vera/layer.py`). Only the base
shows the number of a module's inputs, so an update of VeRA alone has no factors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .tucker import transposed_terms
from .update import PeftMethod, Update, UpdateSpec, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.products import Term


@dataclass(frozen=True)
class VeRA(Update):
    """An update of VeRA, with the shared projections."""

    b: Numbers  # (out,)
    d: Numbers  # (r,)
    B: Numbers  # (most outputs, r)
    A: Numbers  # (r, most inputs)

    kind = "vera"
    title: ClassVar = "VeRA"
    roles = ("vera_lambda_b", "vera_lambda_d", "vera_B", "vera_A")
    peft = PeftMethod("VERA", {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}, shared=roles[2:])

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return (spec.specs[cls.roles[0]].size, spec.specs[cls.roles[3]].shape[1])

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        out, width = spec.shape
        return len(shape) == 2 and shape[0] == out and shape[1] <= width

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        return spec.shape[0], None

    @classmethod
    def require(cls, module: str, roles: Mapping[str, str]) -> None:
        require_projections(cls.roles[2:], cls.title, roles)
        super().require(module, roles)

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        b, d, B, A = (specs[role].shape for role in cls.roles)
        if len(B) != 2 or len(A) != 2 or not len(b) == len(d) == 1 or not B[1] == d[0] == A[0] > 0 or B[0] < b[0]:
            raise InputError(
                f"lambda_b is {b}, lambda_d is {d}, B is {B}, A is {A}: they cannot be multiplied", culprit=module
            )

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        require_rank(spec, config, spec.specs[cls.roles[2]].shape[1])
        return spec

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> VeRA:
        return cls(*(tensors[role] for role in cls.roles))

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        from ...numerics.exact_factors import multiply_exactly
        from ...numerics.products import Term

        lefts = multiply_exactly(self.b[:, None], self.B[: len(self.b)])
        rights = multiply_exactly(self.d[:, None], self.A)
        terms = [Term(left, right, Fraction(weight)) for left in lefts for right in rights]
        return transposed_terms(terms) if transposed else terms


def require_projections(projections: Collection[str], title: str, roles: Mapping[str, str]) -> None:
    """Raise InputError if a file lacks the random matrices that its modules share."""
    if not roles.keys() >= set(projections):
        raise InputError(
            f"is {title}, but its random matrices are not in the file",
            culprit=next(iter(roles.values())),
            remedy="save it with peft with save_projection=True in its config",
        )
