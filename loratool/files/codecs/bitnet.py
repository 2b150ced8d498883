"""Read and write BitNet's ternary weights: -1, 0 and 1 in two bits, with one scale of the matrix.

A layer of BitNet also rounds its inputs to 8 bits, which a plain layer with the same numbers does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..dtypes import TensorSpec
from .codec import Fault, Parts, StoredWeight, Unclaimed
from .gptq import FLOATS, matrix
from .scaled import ScaledCodes, Scales

if TYPE_CHECKING:
    from ...numerics.code_levels import Levels
    from .packing import Packing

NORM = ".rms_norm.weight"  # of the layer's inputs, if the config says `use_rms_norm`


class BitNet(ScaledCodes):
    """Codes are the number plus 1, in four planes of rows; a layer divides by the scale, an `autobitlinear` multiplies.

    Source: transformers, integrations/bitnet.py (pack_weights, BitLinear, AutoBitLinear).
    """

    key = "bitnet"
    ends = (".weight",)
    code_dtypes = frozenset(("U8",))
    bits = 2

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        scale, declared = f"{path}.weight_scale", unclaimed.declared
        if declared.get("quant_method") != "bitnet" or scale not in unclaimed.specs:
            return None
        if declared.get("use_rms_norm") or path + NORM in unclaimed.specs:
            raise Fault("its layer has a norm of its own, which plain layers do not have")
        quarter, columns = matrix(name, unclaimed.specs[name])
        unclaimed.shaped(scale, (1,), *FLOATS)
        detail = {"bits": 2, "divides": declared.get("linear_class", "bitlinear") != "autobitlinear"}
        spec = TensorSpec("F64", (4 * quarter, columns))
        return StoredWeight(self, spec, (name, scale), ("codes", "scales"), detail)

    def packing(self, parts: Parts) -> Packing:
        from .packing import Interleaved

        _, rows, columns = parts.shape
        return Interleaved(rows, columns, 2, rows * columns // 4, (0, 2, 4, 6))

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import Integers

        return Integers(0, 2, offset=1, readable=(0, 3))

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        import numpy as np

        scale = parts["scales"].floats().reshape(1, 1)
        return Scales(np.ones((1, 1)), 0, divisor=float(scale[0, 0])) if parts.detail("divides") else Scales(scale, 0)

    def check(self, parts: Parts) -> None:
        self.require_finite(parts, "scales", parts["scales"])
        if parts.detail("divides") and not parts["scales"].floats().all():
            raise parts.damaged("scales", "is 0, but the weight is divided by it")
