"""Project outputs away and add others, DEFT (2025): X = W + P (s R - F) with F = relu(P).T W, s = alpha / r or 1.

With `decomposition_method="qr"` both P and relu(P) are Q of P's QR decomposition (`numerics.orthonormal`). With `para`,
PaRa (Chen et al., 2024), R is 0. F has numbers of 36 bits (`numerics.short_products`), r for each column of W; an undo
file has them (`peft/tuners/deft/layer.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import InputError, brief
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .tucker import transposed_terms
from .update import Detail, PeftMethod, Projected, Update, UpdateSpec, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Bits, Wide
    from ...numerics.products import Term


@dataclass(frozen=True)
class Injection(Detail):
    """What is added of R."""

    scale: float  # 0 for `para`
    is_orthogonal: bool  # the projection is that of a QR decomposition

    @property
    def hashed(self) -> tuple[int, ...]:
        return (*Fraction(self.scale).as_integer_ratio(), *([1] if self.is_orthogonal else []))


@dataclass(frozen=True)
class DEFT(Update):
    """DEFT of a linear layer.

    Attributes:
        P: (out, r), or Q.
        kept: relu(P), or Q.
    """

    P: Numbers
    kept: Numbers
    R: Numbers | None  # (r, in)
    injected: float  # s

    kind = "deft"
    roles = ("deft_P",)
    optional = ("deft_R",)
    peft = PeftMethod("DEFT", {"deft_P": "deft_P", "deft_R": "deft_R"})
    additive = False
    in_turn = False
    reads_columns = True

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs["deft_P"].shape

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        outputs, inputs = cls.flat(spec)
        return len(shape) == 2 and shape[0] == outputs and inputs in (None, shape[1])

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        return spec.specs["deft_P"].shape[0], spec.specs["deft_R"].shape[1] if "deft_R" in spec.specs else None

    @classmethod
    def change_rank(cls, spec: UpdateSpec) -> int:
        return spec.specs["deft_P"].shape[1]

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        P, R = specs["deft_P"].shape, specs["deft_R"].shape if "deft_R" in specs else None
        if len(P) != 2 or not all(P) or (R is not None and (len(R) != 2 or R[0] != P[1])):
            raise InputError(f"P is {P}, R is {R}: they cannot be multiplied", culprit=module)

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        fields, rank = config.peft, spec.specs["deft_P"].shape[1]
        if config.rank_of(spec.module) != rank != cls.flat(spec)[0]:  # PEFT's rank is at most that of the outputs
            require_rank(spec, config, rank)
        method, para, alpha = fields.get("decomposition_method"), fields.get("para", False), fields.get("alpha")
        if fields.get("peft_type") != cls.peft.type:
            raise InputError("only the config tells the projection of DEFT", culprit=spec.module)
        if method not in (None, "relu", "qr"):
            raise InputError(f"projects by {brief(method)}, which peft does not have", culprit=spec.module)
        if bool(para) is ("deft_R" in spec.specs):
            raise InputError("its R contradicts para", culprit=spec.module, remedy="the config is of another adapter")
        scale = 0.0 if para else float(alpha) / rank if isinstance(alpha, (int, float)) and alpha else 1.0
        return replace(spec, detail=Injection(scale, method == "qr"))

    @classmethod
    def of_transposed(cls, spec: UpdateSpec) -> UpdateSpec:
        return replace(spec, cls=DEFTOfRows)

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> DEFT:
        from ...numerics.arrays import Numbers
        from ...numerics.orthonormal import householder_q

        assert isinstance(spec.detail, Injection)
        P = tensors["deft_P"]
        if spec.detail.is_orthogonal:
            try:
                P = kept = Numbers.of(householder_q(P.wide()))
            except ValueError as error:
                raise InputError(str(error), culprit=spec.tensors["deft_P"]) from error
        else:
            bits: Bits = P.bits.copy()
            bits[bits < 0] = 0
            kept = Numbers(bits, P.form)
        return cls(P, kept, tensors.get("deft_R"), spec.detail.scale)

    def reading(self) -> Numbers:
        return self.kept.T

    def terms_of(self, F: Wide, weight: float) -> list[Term]:
        from ...numerics.arrays import Numbers
        from ...numerics.products import Term

        return [*self._injected(weight), Term(self.P, Numbers.of(F), -Fraction(weight))]

    def _injected(self, weight: float) -> list[Term]:
        from ...numerics.products import Term

        scale = Fraction(weight) * Fraction(self.injected)
        return [] if self.R is None else [Term(self.P, self.R, scale)]


@dataclass(frozen=True)
class DEFTOfRows(DEFT):
    """DEFT of a weight that is stored as (in, out): F.T is a product with its rows."""

    reads_columns = False
    projects = True

    @classmethod
    def projections(cls, spec: UpdateSpec, columns: int) -> int:
        return cls.change_rank(spec)

    def projected(self, weight: float) -> Projected:
        return Projected(self.kept, self.P.T, -Fraction(weight))

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        return transposed_terms(self._injected(weight))
