"""Read and write compressed-tensors' integers, packed in words or one byte each; modelopt's int8 is the same.

Scales and zero points are of groups of columns, rows, blocks or the complete tensor. Sources: compressed-tensors 0.20,
compressors/pack_quantized, compressors/naive_quantized, quantization/lifecycle/forward_helpers.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..dtypes import TensorSpec
from .blocks import block_of, contradiction
from .codec import Fault, Parts, Quantizer, StoredWeight, Unclaimed
from .gptq import column_groups
from .scaled import ScaledCodes, Scales

if TYPE_CHECKING:
    from ...numerics.code_levels import Levels
    from .codec import Codes, Wide
    from .packing import Packing

FLOATS = ("F16", "BF16", "F32", "F64")  # of scales

# Of other layouts beside the same codes: 2:4 sparse ones, marlin's, ComfyUI's, bitsandbytes'
OTHERS = (".bitmask", ".compressed", ".scale_packed", ".meta", ".comfy_quant", ".SCB")

# Of activations, which go with the codes
KEPT = (".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point")


class CompressedInts(ScaledCodes):
    """A number is (code - zero point) * scale, in both layouts."""

    def packing(self, parts: Parts) -> Packing:
        from .packing import Plain, Words

        columns = parts.weight.spec.shape[-1]
        packed = parts.codes_spec.dtype == "I32"
        return Words(columns, parts.detail("bits")) if packed else Plain(columns, "int8")

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        block = parts.detail("block")
        scale = self.grid(parts, "scales", block, start, stop)
        zero = self.zeros(parts, block, start, stop)
        if not parts.get("groups"):
            return Scales(scale, block[1], zero)
        index, group = column_groups(parts, scale.shape[1])
        if group:
            return Scales(scale, group, zero)
        return Scales(scale.take(index, axis=1), 0, None if zero is None else zero.take(index, axis=1))

    def zeros(self, parts: Parts, block: tuple[int, int], start: int, stop: int) -> Wide | None:
        """Return the zero points of rows start:stop, (rows, groups) or (1, groups); None if all are 0.

        They are packed in words down the rows of each matrix.
        """
        import numpy as np

        from .packing import cut, matrices, span

        zeros = parts.get("zeros")
        if zeros is None or zeros.spec.dtype == "I8":
            return None if zeros is None else self.grid(parts, "zeros", block, start, stop)
        bits, (_, rows, columns) = parts.detail("bits"), parts.shape
        words, groups = -(-rows * bits // 32), -(-columns // (block[1] or columns))
        pieces: list[Codes] = []
        for which, first, last in matrices(start, stop, rows):
            low, high = span(first, last, bits)
            data = zeros.integers((which * words + low) * groups, (high - low) * groups).reshape(-1, groups)
            pieces.append(cut(data.T, first, last, bits).T)
        return np.concatenate(pieces).astype(np.float64) - float(1 << (bits - 1))

    def quantizer(self, parts: Parts) -> Quantizer | None:
        from .compressed_quantizer import IntQuantizer, OneScaleQuantizer

        block, matrices = tuple(parts.detail("block")), parts.shape[0]
        if parts.get("groups") or (matrices > 1 and parts["scales"].spec.size == 1):
            return None
        if block[0]:
            return IntQuantizer(self, parts)
        return OneScaleQuantizer(self, parts) if matrices == 1 and block == (0, 0) else None

    def check(self, parts: Parts) -> None:
        self.require_finite(parts, "scales", parts["scales"])
        if parts.get("groups"):
            column_groups(parts, parts["scales"].spec.shape[-1])


class PackedInts(CompressedInts):
    """`pack-quantized`: codes of 1 to 8 bits are bit streams in words; a code is its number plus 2**(bits - 1)."""

    key = "pack-quantized"
    ends = (".weight_packed",)
    code_dtypes = frozenset(("I32",))

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        if unclaimed.one_of(*(path + end for end in OTHERS)):
            return None
        shape = unclaimed.integers(f"{path}.weight_shape")
        packed = unclaimed.specs[name].shape
        if len(shape) != len(packed) or len(shape) < 2 or shape[:-1] != packed[:-1] or min(shape) <= 0:
            raise Fault(f"{path}.weight_shape says {shape}, for {name} of {packed}")
        fitting = [bits for bits in range(1, 9) if -(-shape[-1] * bits // 32) == packed[-1]]
        stated = [bits for bits, _ in weights_of(unclaimed.declared)]
        bits = fitting[0] if len(fitting) == 1 else next((bits for bits in fitting if bits in stated), None)
        if bits is None:
            raise Fault(
                f"{path}.weight_shape says {shape}, but codes of no known width for it fit into {name} of {packed}"
            )
        note = f"the config says {stated[0]} bits, the tensors have {bits}" if stated and bits not in stated else ""
        return stored(self, path, name, unclaimed, shape, bits, note)

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import Integers

        bits = parts.detail("bits")
        return Integers(0, (1 << bits) - 1, offset=1 << (bits - 1))


class PlainInts(CompressedInts):
    """`int-quantized` and `naive-quantized`: signed integers of 8 bits or fewer, one byte each."""

    key = "int-quantized"
    ends = (".weight",)
    code_dtypes = frozenset(("I8",))
    code = "int8"
    bits = 8

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        shape = unclaimed.specs[name].shape
        others = unclaimed.one_of(*(path + end for end in OTHERS)) or "_quantization_metadata" in unclaimed.metadata
        if others or f"{path}.weight_scale" not in unclaimed.specs or len(shape) < 2 or 0 in shape:
            return None
        if f"{path}.pre_quant_scale" in unclaimed.specs:
            raise Fault(f"{path}.pre_quant_scale is a part of it that is not supported")
        bits = max((bits for bits, form in weights_of(unclaimed.declared) if form != PackedInts.key), default=8)
        return stored(self, path, name, unclaimed, shape, bits)

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import Integers

        half = 1 << (parts.detail("bits") - 1)
        return Integers(-half, half - 1, "int8", readable=(-128, 127))  # also codes too large for the config's bits


def stored(
    codec: CompressedInts, path: str, name: str, unclaimed: Unclaimed, shape: tuple[int, ...], bits: int, note: str = ""
) -> StoredWeight:
    """Return the weight with the companions that both layouts may have.

    Raises:
        Fault: a companion is missing or of another shape.
    """
    if unclaimed.declared.get("transform_config"):
        raise Fault("the config's transform_config says that it is rotated, which is not supported")
    scale, zero, index, logical = (f"{path}.weight_{end}" for end in ("scale", "zero_point", "g_idx", "shape"))
    specs = unclaimed.specs
    block = block_of(shape, unclaimed.need(scale, *FLOATS), scale, unclaimed.blocks)
    *stack, rows, columns = shape
    roles = {"codes": name, "scales": scale}
    if zero in specs:
        words = (*stack, -(-rows * bits // 32), -(-columns // (block[1] or columns)))
        is_packed = codec.key == PackedInts.key and specs[zero].dtype == "I32" and block[0] == 1
        unclaimed.shaped(zero, words if is_packed else specs[scale].shape, "I32" if is_packed else "I8")
        roles["zeros"] = zero
    if index in specs:
        unclaimed.shaped(index, shape[-1:], "I32", "I64")
        if block[0] != 1 or len(shape) != 2:
            raise Fault(f"{index} is beside {scale} of {specs[scale].shape}, which has no groups")
        roles["groups"] = index
    roles |= {"shape": logical} if logical in specs else {}
    roles |= {f"input {number}": path + end for number, end in enumerate(KEPT) if path + end in specs}
    detail = {"bits": bits, "block": block}
    return StoredWeight(
        codec,
        TensorSpec("F64", shape),
        tuple(roles.values()),
        tuple(roles),
        detail,
        note or contradiction(block, unclaimed.blocks),
    )


def weights_of(declared: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    """Yield the bits of the config's integer weights, and their format, group by group."""
    groups = declared.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        bits = weights.get("num_bits") if isinstance(weights, Mapping) and weights.get("type", "int") == "int" else None
        if type(bits) is int and 1 <= bits <= 8:
            yield bits, group.get("format") or declared.get("format")
