"""Read and write float8 with scales: of blocks (DeepSeek-V3), of rows, of a whole tensor, of stacked experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..dtypes import TensorSpec
from .codec import Fault, Found, Parts, StoredWeight
from .scaled import Scaled, Scales

if TYPE_CHECKING:
    from ...numerics.code_levels import Levels
    from .packing import Packing

# The ends of the scale's name behind the weight's path: DeepSeek-V3 and transformers, compressed-tensors and modelopt,
# Mistral, DeepSeek-V4
SCALES = (".weight_scale_inv", ".weight_scale", ".qscale_weight", ".scale")

USUAL = 128  # the block of DeepSeek-V3, for a config that names none

KEPT = (".input_scale", ".qscale_act", ".input_scale_inv")  # of activations, which go with the codes


class Fp8(Scaled):
    """Codes of e4m3 or e5m2; a number is its code's times the scale of its block.

    Sources: transformers, integrations/finegrained_fp8.py; compressed-tensors, compressors/naive_quantized.
    """

    key = "fp8"
    ends = (".weight",)
    code_dtypes = frozenset(("F8_E4M3", "F8_E5M2"))
    bits = 8

    def claim(self, path: str, name: str, found: Found) -> StoredWeight | None:
        scale = found.one_of(*(path + end for end in SCALES))
        spec = found.specs[name]
        if scale is None or len(spec.shape) < 2:
            return None
        block = block_of(spec.shape, found.need(scale, "F32", "F16", "BF16", "F8_E8M0", "U8"), scale, found.declared)
        others = [path + end for end in KEPT if path + end in found.specs]
        roles = ("codes", "scales", *(f"input {at}" for at, _ in enumerate(others)))
        return StoredWeight(self, TensorSpec("F64", spec.shape), (name, scale, *others), roles, {"block": block})

    def packing(self, parts: Parts) -> Packing:
        from .packing import Plain

        return Plain(parts.weight.spec.shape[-1])

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import E4M3, E5M2

        return E4M3 if parts.codes_spec.dtype == "F8_E4M3" else E5M2

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        block = parts.detail("block")
        if parts["scales"].spec.size == 1:
            return Scales(self.decoded("scales", parts["scales"], 0, 1).reshape(1, 1), 0)
        return Scales(self.grid(parts, "scales", block, start, stop), block[1])


def block_of(shape: tuple[int, ...], scale: TensorSpec, name: str, declared: Any) -> tuple[int, int]:
    """Return the rows and columns that have one scale, 0 for all of them.

    The tensors decide; the config's block size, `weight_block_size`, tells how a last block is cut off.

    Raises:
        Fault: the scales are of no blocks of the weight.
    """
    *stack, rows, columns = shape
    grid = scale.shape
    if scale.size == 1:
        return 0, 0
    if grid[: len(stack)] == tuple(stack) and len(grid) == len(shape):
        grid = grid[len(stack) :]
    elif stack or len(grid) not in (1, 2):
        raise Fault(f"{name} has the shape {scale.shape}, for a weight of {shape}")
    high, wide = (*grid, 1)[:2]
    stated = declared.get("weight_block_size")
    is_stated = isinstance(stated, list) and len(stated) == 2 and all(type(x) is int and x > 0 for x in stated)
    if is_stated and (high, wide) == (-(-rows // stated[0]), -(-columns // stated[1])):
        return stated[0], stated[1]
    if (high, wide) == (rows, 1):
        return 1, 0
    if (high, wide) == (1, columns):
        return 0, 1
    if (high, wide) == (-(-rows // USUAL), -(-columns // USUAL)):
        return USUAL, USUAL
    raise Fault(f"{name} has the shape {scale.shape}, which is no grid of blocks of a weight of {shape}")
