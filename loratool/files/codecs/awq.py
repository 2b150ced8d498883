"""Read and write AWQ in the layout of AutoAWQ's GEMM kernels: (in, out) matrices of nibbles, eight columns per word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..dtypes import TensorSpec
from .codec import Parts, StoredWeight, Unclaimed
from .gptq import FLOATS, group_size, is_auto_round, matrix
from .scaled import ScaledCodes, Scales

if TYPE_CHECKING:
    from ...numerics.code_levels import Levels
    from .packing import Packing


AUTO_ROUND_PACKINGS = ("auto_round:auto_awq", "auto_round:awq")  # auto-round's `packing_format` for this layout


class Awq(ScaledCodes):
    """A number is (code - zero point) * scale, with the zero point and scale of its group.

    Other versions (gemv, gemv_fast, llm-awq, marlin) have other layouts and are not read.
    Source: AutoAWQ 0.2.9, utils/packing_utils.py (dequantize_gemm).
    """

    key = "awq"
    ends = (".qweight",)
    code_dtypes = frozenset(("I32",))

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        scale, zero = f"{path}.scales", f"{path}.qzeros"
        shape, of_scales = unclaimed.specs[name].shape, unclaimed.specs.get(scale)
        version = unclaimed.declared.get("version") or unclaimed.declared.get("format") or "gemm"
        method = unclaimed.declared.get("quant_method", "awq")
        packing = str(unclaimed.declared.get("packing_format")) if is_auto_round(unclaimed.declared) else ""
        is_awq = unclaimed.declared.get("quant_method") == "awq" or packing in AUTO_ROUND_PACKINGS
        if is_awq and str(version).lower() != "gemm":
            return None
        if not is_awq and (of_scales is None or not shape or of_scales.shape[-1:] != (8 * shape[-1],)):
            return None  # GPTQ's
        columns, words = matrix(name, unclaimed.specs[name])
        groups, _ = matrix(scale, unclaimed.need(scale, *FLOATS))
        unclaimed.shaped(scale, (groups, 8 * words))
        unclaimed.shaped(zero, (groups, words), "I32")
        detail = {"bits": 4, "group": group_size(scale, columns, groups, unclaimed.declared)}
        note = "" if is_awq or method == "awq" else f"the config says {packing or method}, the tensors are AWQ's"
        spec = TensorSpec("F64", (8 * words, columns))
        return StoredWeight(self, spec, (name, scale, zero), ("codes", "scales", "zeros"), detail, note)

    def packing(self, parts: Parts) -> Packing:
        from .packing import Octets

        _, rows, columns = parts.shape
        return Octets(rows, columns)

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import Integers

        return Integers(0, 15)

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        from .packing import Octets

        groups, out = parts["scales"].spec.shape
        scale = parts["scales"].float_box(groups, out, start, stop).T
        zero = Octets(out, groups).read(parts["zeros"], start, stop).astype("float64")
        return Scales(scale, parts.detail("group"), zero)

    def check(self, parts: Parts) -> None:
        self.require_finite(parts, "scales", parts["scales"])
