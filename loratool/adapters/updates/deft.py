"""Project outputs away and add others, DEFT (2025): X = W + P (s R - F) with F = relu(P).T W, s = alpha / r or 1.

With `para`, PaRa (Chen et al., 2024), R is 0. F has numbers of 36 bits (`numerics.short_products`), r for each column
of W; an undo file has them. The projection by a QR decomposition (`decomposition_method="qr"`), whose signs are
LAPACK's, is refused (`peft/tuners/deft/layer.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import InputError, brief
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .update import Detail, PeftMethod, Update, UpdateSpec, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Bits, Wide
    from ...numerics.products import Term


@dataclass(frozen=True)
class Injection(Detail):
    """What is added of R."""

    scale: float  # 0 for `para`

    @property
    def hashed(self) -> tuple[int, ...]:
        return Fraction(self.scale).as_integer_ratio()


@dataclass(frozen=True)
class DEFT(Update):
    """DEFT of a linear layer."""

    P: Numbers  # (out, r)
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
        if method not in (None, "relu"):
            raise InputError(
                f"projects by {brief(method)}, whose signs are those of a program's LAPACK",
                culprit=spec.module,
                remedy="merge it with peft (merge_and_unload), and `loratool extract BASE MODEL` the change",
            )
        if fields.get("fan_in_fan_out") or bool(para) is ("deft_R" in spec.specs):
            raise InputError(
                "is DEFT of a Conv1D, which is not supported"
                if fields.get("fan_in_fan_out")
                else "its R contradicts para",
                culprit=spec.module,
                remedy="merge it with peft (merge_and_unload), and `loratool extract BASE MODEL` the change",
            )
        scale = 0.0 if para else float(alpha) / rank if isinstance(alpha, (int, float)) and alpha else 1.0
        return replace(spec, transposed=False, detail=Injection(scale))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> DEFT:
        assert isinstance(spec.detail, Injection)
        return cls(tensors["deft_P"], tensors.get("deft_R"), spec.detail.scale)

    def reading(self) -> Numbers:
        from ...numerics.arrays import Numbers

        bits: Bits = self.P.bits.copy()
        bits[bits < 0] = 0
        return Numbers(bits, self.P.form).T

    def terms_of(self, F: Wide, weight: float) -> list[Term]:
        from ...numerics.arrays import Numbers
        from ...numerics.products import Term

        w = Fraction(weight)
        injected = [] if self.R is None else [Term(self.P, self.R, w * Fraction(self.injected))]
        return [*injected, Term(self.P, Numbers.of(F), -w)]
