"""Rotate the inputs of a layer by products of butterfly factors, BOFT (Liu et al., ICLR 2024).

X = diag(s) W M.T with M = F_(N-1) ... F_0 and F_i = P_i blockdiag(C_i) P_i.T. S = (O - O.T) / 2 of each block of b
numbers, C = (I - S)(I + S)^-1. P_0 is the unit matrix. P_i puts the halves of blocks of even number in each run of
2**i b inputs before those of odd number (`peft/tuners/boft/layer.py`). So inputs mix in runs of 2**(N-1) b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .rotations import butterfly, cayley, skew_parts
from .update import PeftMethod, Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.mixed import Mixing


@dataclass(frozen=True)
class BOFT(Update):
    """BOFT of a linear layer or a convolution."""

    value: Numbers  # (N, n, b, b)
    scales: Numbers  # (out,)

    kind = "boft"
    roles = ("boft_R", "boft_s")
    peft = PeftMethod("BOFT", {role: role for role in roles})
    additive = False
    flattened = True
    mixes = True

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        _, n, b, _ = spec.specs["boft_R"].shape
        return spec.specs["boft_s"].size, n * b

    @classmethod
    def together(cls, spec: UpdateSpec, transposed: bool) -> int:
        factors, _, b, _ = spec.specs["boft_R"].shape
        return b << (factors - 1) if transposed else 1

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        shape, scales = (specs[role].shape for role in cls.roles)
        if len(shape) != 4 or shape[2] != shape[3] or not all(shape):
            raise InputError(f"is {shape}, not factors of square blocks", culprit=roles["boft_R"])
        if shape[0] > 1 and (shape[2] % 2 or shape[1] % (1 << (shape[0] - 1))):
            raise InputError(f"is {shape}: its blocks do not make butterflies", culprit=roles["boft_R"])
        if len(scales) != 2 or 1 not in scales:
            raise InputError(f"is {scales}, not a scale for each output", culprit=roles["boft_s"])

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        return replace(spec, transposed=bool(config.fan_in_fan_out))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> BOFT:
        return cls(tensors["boft_R"], tensors["boft_s"].reshape(tensors["boft_s"].size))

    def mixing(self, weight: float, transposed: bool) -> Mixing:
        from ...numerics.derived import derived_numbers
        from ...numerics.mixed import Mixing

        factors, _, b, _ = self.value.shape
        length = b << (factors - 1)
        orders = [_order(stage, length, b) for stage in range(factors)]
        # S of the blocks of a run, one below the other
        S = [[part.reshape(-1, length, b) for part in skew_parts(self.value[stage])] for stage in range(factors)]

        def M(*stages: Any) -> Any:
            blocks = (stage.moved(lambda x: x.reshape(-1, b, b)) for stage in stages)
            return butterfly([cayley(S * Fraction(-1, 2)) for S in blocks], orders)

        matrices = derived_numbers(M, *S).swapaxes(1, 2)[None]
        mixing = Mixing(matrices, 1, weight, self.scales.wide(), is_rotation=True)
        return mixing.T if transposed else mixing


def _order(stage: int, length: int, b: int) -> list[int]:
    """Return the places in a run of inputs from which P.T takes them: P puts halves of blocks apart, even ones first.

    Args:
        length: of the run; it has parts of 2**stage blocks.
    """
    half, part = b // 2, b << stage
    if not stage:
        return [*range(length)]
    halves = [*range(0, part, b), *range(half, part, b)]
    order = [first + start + k for first in range(0, length, part) for start in halves for k in range(half)]
    return sorted(range(length), key=order.__getitem__)
