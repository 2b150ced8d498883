"""Add what a small network makes of the weight, PEANuT (Zhong et al., 2024): X = W + scaling B H.T.

H = relu(W.T A.T), (in, r). Each encoder E makes relu(H E.T) of it, and each decoder D relu(H D.T) plus what went into
the encoder, the last first (`peft/tuners/peanut/layer.py`). A W, and what goes into relu, have numbers of 36 bits
(`numerics.short_products`), a sum is one of float64. An undo file has A W, r numbers for each column of W. Other
functions than relu are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import InputError, brief
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .update import PeftMethod, Update, UpdateSpec, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Wide
    from ...numerics.products import Term

MOST = 16  # encoders
SIDES = ("peanut_encoders", "peanut_decoders")
LAYERS = tuple(f"{side}.{i}" for side in SIDES for i in range(MOST))


@dataclass(frozen=True)
class PEANuT(Update):
    """PEANuT of a linear layer."""

    A: Numbers  # (r, out)
    B: Numbers  # (out, r)
    encoders: tuple[Numbers, ...]  # (r, r) each
    decoders: tuple[Numbers, ...]
    scale: float

    kind = "peanut"
    roles = ("peanut_A", "peanut_B")
    optional = LAYERS
    peft = PeftMethod("PEANUT", {f"{role}.weight": role for role in (*roles, *LAYERS)})
    additive = False
    in_turn = False
    reads_columns = True

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs["peanut_B"].shape

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and shape[0] == spec.specs["peanut_B"].shape[0]

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        return spec.specs["peanut_B"].shape[0], None

    @classmethod
    def change_rank(cls, spec: UpdateSpec) -> int:
        return spec.specs["peanut_B"].shape[1]

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        A, B = (specs[role].shape for role in cls.roles)
        inner = {role: spec.shape for role, spec in specs.items() if role in LAYERS}
        counts = [sum(role.startswith(side) for role in inner) for side in SIDES]
        good = len(A) == len(B) == 2 and B[::-1] == A and all(A) and {*inner.values()} <= {(A[0], A[0])}
        wanted = {f"{side}.{i}" for side in SIDES for i in range(counts[0])}
        if not good or counts[0] != counts[1] or inner.keys() != wanted:
            raise InputError(f"A is {A}, B is {B}, between them {inner}: they make no network", culprit=module)

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        require_rank(spec, config, spec.specs["peanut_B"].shape[1])
        function, scaling = config.peft.get("act_fn"), config.peft.get("scaling", 1.0)
        if config.peft.get("peft_type") != cls.peft.type:
            raise InputError("only the config tells the function of PEANuT", culprit=spec.module)
        if function not in (None, "relu"):
            raise InputError(
                f"computes {brief(function)} of the weight, and only relu is supported",
                culprit=spec.module,
                remedy="merge it with peft (merge_and_unload), and `loratool extract BASE MODEL` the change",
            )
        if not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
            raise InputError(f"the config says scaling {brief(scaling)}", culprit=spec.module)
        return replace(spec, transposed=False, scale=float(scaling))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> PEANuT:
        count = sum(role.startswith(SIDES[0]) for role in tensors)
        encoders, decoders = (tuple(tensors[f"{side}.{i}"] for i in range(count)) for side in SIDES)
        return cls(tensors["peanut_A"], tensors["peanut_B"], encoders, decoders, spec.scale)

    def reading(self) -> Numbers:
        return self.A

    def terms_of(self, F: Wide, weight: float) -> list[Term]:
        import numpy as np

        from ...numerics.arrays import Numbers
        from ...numerics.products import Term
        from ...numerics.short_products import row_products

        def layer(H: Wide, matrix: Numbers) -> Wide:
            return np.maximum(row_products(Numbers.of(H), matrix.T), 0.0)

        kept: list[Wide] = []
        H = np.maximum(F.T, 0.0)
        for encoder in self.encoders:
            kept.append(H)
            H = layer(H, encoder)
        for decoder in self.decoders:
            H = layer(H, decoder) + kept.pop()
        return [Term(self.B, Numbers.of(np.ascontiguousarray(H.T)), Fraction(self.scale) * Fraction(weight))]
