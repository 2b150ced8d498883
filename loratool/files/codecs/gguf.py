"""Read and write the block-quantized tensors of GGUF files; their scales are among the codes (`gguf_blocks`).

A row of codes is followed by its scales as padding, so that a row can be written back from the codes alone. The
numbers are those of the format's formula in float64. llama.cpp computes it in float32; rounded, they are its numbers. A
tensor `*.scale` beside `*.weight` is one more factor: one number, or one for each expert.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..dtypes import TensorSpec
from .codec import STRIP, Fault, Parts, Quantizer, StoredWeight, Unclaimed
from .scaled import ScaledCodes, Scales

if TYPE_CHECKING:
    from ...numerics.code_levels import Levels
    from .codec import Codes, Wide
    from .gguf_blocks import BlockLayout, Blocks

# Supported types -> the bits of a code. Q8_1 and Q8_K are for intermediate results and never stored.
BITS = {
    "Q8_0": 8, "Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6,
    "IQ4_NL": 4, "IQ4_XS": 4, "MXFP4": 4, "NVFP4": 4, "TQ1_0": 2, "TQ2_0": 2, "Q1_0": 1, "Q2_0": 2,
    "IQ1_S": 1, "IQ1_M": 1, "IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 2, "IQ3_XXS": 3, "IQ3_S": 3,
}  # fmt: skip

# Types whose codes stand for runs of numbers: no number can change alone
IN_RUNS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


class GgmlBlocks(ScaledCodes):
    """A tensor in one of ggml's block types."""

    key = "ggml"
    ends = ("",)
    code_dtypes = frozenset(BITS)
    padding_has_scales = True

    def weight_name(self, path: str, end: str) -> str:
        return path

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        spec, scale = unclaimed.specs[name], f"{name.removesuffix('.weight')}.scale"
        if len(spec.shape) < 2:
            raise Fault("has codes, but is a vector")
        names = {"codes": name}
        if scale in unclaimed.specs and name.endswith(".weight"):
            matrices = TensorSpec("F64", spec.shape[:-2]).size
            if unclaimed.need(scale, "F32", "F16", "BF16").size not in (1, matrices):
                raise Fault(f"{scale} has {unclaimed.specs[scale].size} numbers, for {matrices} matrices")
            names["scale"] = scale
        detail = {"type": spec.dtype, "bits": BITS[spec.dtype]}
        return StoredWeight(self, TensorSpec("F64", spec.shape), tuple(names.values()), tuple(names), detail)

    def packing(self, parts: Parts) -> Blocks:
        from .gguf_blocks import Blocks

        return Blocks(parts.weight.spec.shape[-1], self.layout(parts))

    def layout(self, parts: Parts) -> BlockLayout:
        from . import gguf_blocks, gguf_codebooks

        kind = parts.codes_spec.dtype
        return gguf_codebooks.LAYOUTS[kind] if kind in IN_RUNS else gguf_blocks.LAYOUTS[kind]

    def levels(self, parts: Parts) -> Levels:
        return self.layout(parts).levels

    def with_padding(self, parts: Parts, start: int, padding: Codes) -> Parts:
        detail = {**parts.weight.detail, "heads": (start, padding)}
        return replace(parts, weight=replace(parts.weight, detail=detail))

    def values(self, parts: Parts, start: int, codes: Codes) -> Wide:
        columns = parts.weight.spec.shape[-1]
        if codes.shape[1] > columns:
            parts = self.with_padding(parts, start, codes[:, columns:])
        return super().values(parts, start, codes)

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        import numpy as np

        layout, columns = self.layout(parts), parts.weight.spec.shape[-1]
        if "heads" in parts.weight.detail:
            first, heads = parts.detail("heads")
            heads = heads[start - first : stop - first]
        else:
            heads = self.codes(parts, start, stop)[:, columns:]
        with np.errstate(all="ignore"):  # of damaged scales
            scale, offset = layout.scales(heads.reshape(-1, len(layout.head)))
            scale = scale.reshape(stop - start, -1)
            bias = None if offset is None else offset.reshape(stop - start, -1)
            if "scale" in parts.weight.roles:
                factors = parts["scale"].floats()
                factor = factors if len(factors) == 1 else factors[np.arange(start, stop) // parts.shape[1]]
                scale = scale * factor[:, None]
                bias = None if bias is None else bias * factor[:, None]
        return Scales(scale, columns // scale.shape[1], bias=bias)

    def rounds_alone(self, weight: StoredWeight) -> bool:
        return weight.kind not in IN_RUNS

    def quantizer(self, parts: Parts) -> Quantizer | None:
        from .gguf_quantizer import ENCODERS, BlockQuantizer

        known = parts.codes_spec.dtype in ENCODERS and parts.weight.roles == ("codes",)
        return BlockQuantizer(parts) if known else None

    def check(self, parts: Parts) -> None:
        """Raise InputError for a nan or infinite scale, or for bytes that their codes do not reproduce."""
        import numpy as np

        columns, packing = parts.weight.spec.shape[-1], self.packing(parts)
        rows, step = parts.weight.spec.size // columns, max(1, STRIP // columns)
        if "scale" in parts.weight.roles:
            self.require_finite(parts, "scale", parts["scale"])
        for start in range(0, rows, step):
            codes = packing.read(parts["codes"], start, min(start + step, rows))
            scales = self.scales(self.with_padding(parts, start, codes[:, columns:]), start, start + len(codes))
            if not all(np.isfinite(each).all() for each in (scales.scale, scales.bias) if each is not None):
                raise parts.damaged("codes", "holds scales that are nan or infinite, so that it has no numbers")
            if parts.codes_spec.dtype == "TQ1_0":
                (_, again), *_ = packing.places(start, codes)
                if packing.raw(parts["codes"], start, start + len(codes)).tobytes() != again:
                    raise parts.damaged("codes", "holds bytes that are not five digits of base 3")
