"""Read and write mxfp4, e2m1 with a power of two for each 32 columns.

gpt-oss, compressed-tensors, DeepSeek-V4 and Quark have it, in layouts of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..dtypes import TensorSpec
from .blocks import refuse_column_scales
from .codec import Fault, Parts, Piece, Quantizer, StoredWeight, Unclaimed
from .scaled import ScaledCodes, Scales

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.code_levels import Levels
    from .codec import Codes, Wide
    from .packing import Packing

GROUP = 32  # columns that have one scale

SHARED_ROTATION = "shared_input_rotation_"  # of Quark's layers with so many inputs

QUARK_KEPT = (".input_scale", ".input_zero_point", ".output_scale")

KEPT = (".input_global_scale", ".input_scale")  # of activations; copied with the codes


class Fp4(ScaledCodes):
    """Codes of e2m1, two a byte, the first in the low nibble, row after row."""

    def packing(self, parts: Parts) -> Packing:
        from .packing import Words

        return Words(parts.weight.spec.shape[-1], 4, 8)

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import E2M1

        return E2M1

    def coded(self, name: str, companions: dict[str, str], unclaimed: Unclaimed, group: int) -> StoredWeight:
        """Return the weight of these codes and companions, role -> name; "scales" must have one for each group.

        Raises:
            Fault: the scales are of another shape.
        """
        for other in (name.replace(".weight_packed", end) for end in (".weight_zero_point", ".weight_g_idx")):
            if other in unclaimed.specs and other != name:
                raise Fault(f"{other} is beside it, which no writer of the format writes")
        *rows, half = unclaimed.specs[name].shape
        if half * 2 % group:
            raise Fault(f"{companions['scales']} is for groups of {group}, but rows have {half * 2}")
        unclaimed.shaped(companions["scales"], (*rows, half * 2 // group))
        tensors, roles = (name, *companions.values()), ("codes", *companions)
        return StoredWeight(self, TensorSpec("F64", (*rows, half * 2)), tensors, roles)


class RowMxfp4(Fp4):
    """Scales in the order of a row's groups."""

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        return Scales(self.grid(parts, "scales", (1, GROUP), start, stop), GROUP)


class PackedMxfp4(RowMxfp4):
    """Codes and scales of compressed-tensors' mxfp4-pack-quantized (compressors/mxfp4)."""

    key = "mxfp4-pack-quantized"
    ends = (".weight_packed",)
    code_dtypes = frozenset(("U8",))

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        scale = f"{path}.weight_scale"
        if f"{path}.weight_global_scale" in unclaimed.specs or len(unclaimed.specs[name].shape) < 2:
            return None
        if unclaimed.need(scale).dtype not in ("U8", "F8_E8M0"):
            return None
        return self.coded(name, {"scales": scale, **kept(path, unclaimed)}, unclaimed, GROUP)

    def quantizer(self, parts: Parts) -> Quantizer | None:
        return None if any(role.startswith("input") for role in parts.tensors) else PackedMxfp4Quantizer(parts)


class DeepSeekFp4(RowMxfp4):
    """The experts of DeepSeek-V4: bytes with the dtype I8 (transformers, integrations/finegrained_fp8.py)."""

    key = "deepseek-fp4"
    ends = (".weight",)
    code_dtypes = frozenset(("I8",))

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        scale = unclaimed.specs.get(f"{path}.scale")
        if scale is None or scale.dtype not in ("U8", "F8_E8M0") or len(unclaimed.specs[name].shape) < 2:
            return None
        return self.coded(name, {"scales": f"{path}.scale"}, unclaimed, GROUP)


class QuarkMxfp4(RowMxfp4):
    """AMD Quark's fp4 with scales of E8M0 (quark/torch: export/nn/modules/realquantizer.py, utils/pack.py)."""

    key = "quark-mxfp4"
    ends = (".weight",)
    code_dtypes = frozenset(("U8",))

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        scale = f"{path}.weight_scale"
        if unclaimed.declared.get("quant_method") != "quark" or scale not in unclaimed.specs:
            return None
        if len(unclaimed.specs[name].shape) < 2:
            return None
        refuse_column_scales(path, unclaimed)
        if any(part.startswith(SHARED_ROTATION) for part in unclaimed.last_parts):
            raise Fault(f"a tensor {SHARED_ROTATION}... says that weights are rotated, which is not supported")
        others = sorted({str(each) for each in _quark_formats(unclaimed.declared)} - {"e8m0"})
        if others:
            raise Fault(f"the config has fp4 weights whose scale_format is {others[0]}, not e8m0")
        unclaimed.need(scale, "U8", "F8_E8M0")
        kept = {end: path + end for end in QUARK_KEPT if path + end in unclaimed.specs}
        return self.coded(name, {"scales": scale, **kept}, unclaimed, GROUP)


def _quark_formats(declared: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the `scale_format` of each description of fp4 in a config, at any depth."""
    pending: list[Any] = [declared]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            if value.get("dtype") == "fp4":
                yield value.get("scale_format")
            pending += value.values()
        elif isinstance(value, list):
            pending += value


class Mxfp4(Fp4):
    """The experts of gpt-oss (transformers, integrations/mxfp4.py).

    Codes are (experts, out, in / 32, 16) bytes and scales (experts, out, in / 32), but the model's weight is (experts,
    in, out): 32 of its rows share the scales.
    """

    key = "mxfp4"
    ends = ("_blocks",)
    code_dtypes = frozenset(("U8",))

    def weight_name(self, path: str, end: str) -> str:
        return path

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        shape = unclaimed.specs[name].shape
        if len(shape) != 4 or shape[3] != GROUP // 2:
            return None
        experts, out, groups, _ = shape
        unclaimed.shaped(f"{path}_scales", shape[:3], "U8", "F8_E8M0")
        spec = TensorSpec("F64", (experts, groups * GROUP, out))
        return StoredWeight(self, spec, (name, f"{path}_scales"), ("codes", "scales"))

    def packing(self, parts: Parts) -> Packing:
        from .packing import TransposedNibbles

        return TransposedNibbles(*parts.weight.spec.shape[1:])

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        import numpy as np

        from ...numerics.code_levels import e8m0
        from .packing import matrices

        _, rows, columns = parts.shape
        scales, groups = [], rows // GROUP
        for which, first, last in matrices(start, stop, rows):
            low, high = first // GROUP, -(-last // GROUP)
            codes = np.ascontiguousarray(parts["scales"].box(columns, groups, low, high, which * columns * groups).T)
            scales.append(e8m0(codes).repeat(GROUP, axis=0)[first - low * GROUP : last - low * GROUP])
        return Scales(scales[0] if len(scales) == 1 else np.concatenate(scales), 0)

    def quantizer(self, parts: Parts) -> Quantizer | None:
        return Mxfp4Quantizer(parts, GROUP)


class PackedMxfp4Quantizer(Quantizer):
    """Encodes like compressed-tensors."""

    def rows(self, start: int, rows: Numbers) -> tuple[Codes, list[Piece]]:
        codes, scales = encoded(rows.wide().reshape(len(rows), -1, GROUP), 2)
        return codes.reshape(rows.shape), [("scales", start * scales.shape[1], scales.tobytes())]


class Mxfp4Quantizer(Quantizer):
    """Encodes like compressed-tensors, along the model's input, which is down the rows."""

    def rows(self, start: int, rows: Numbers) -> tuple[Codes, list[Piece]]:
        from .packing import matrices

        _, high, columns = self.parts.shape
        codes, scales = encoded(rows.wide().reshape(-1, GROUP, columns), 1)
        groups, done, pieces = high // GROUP, 0, list[Piece]()
        for which, first, last in matrices(start, start + len(rows), high):
            part = scales[done : done + (last - first) // GROUP]
            done += len(part)
            for column, of_column in enumerate(part.T):
                place = (which * columns + column) * groups + first // GROUP
                pieces.append(("scales", place, of_column.tobytes()))
        return codes.reshape(rows.shape), pieces


def encoded(numbers: Wide, axis: int) -> tuple[Codes, Codes]:
    """Return the codes of numbers in their shape, and the E8M0 scales of the groups along an axis, without that axis.

    A scale brings the largest number to between 3.5 and 7; the last code is 6 (compressed-tensors,
    quantization/utils/mxfp_utils.py). Negative numbers that round to zero are -0.
    """
    import numpy as np

    from ...numerics.code_levels import E2M1, e8m0

    fraction, exponent = np.frexp(np.abs(numbers).max(axis=axis))
    exponent += (fraction >= 1.75 / 2) - 3
    scales = np.where(fraction == 0, 0, np.clip(exponent + 127, 0, 254)).astype(np.uint8)
    codes = E2M1.nearest(numbers / np.expand_dims(e8m0(scales), axis))
    codes[(codes == 0) & (numbers < 0)] = 8
    return codes, scales


def kept(path: str, unclaimed: Unclaimed) -> dict[str, str]:
    """Return the companions of activations that exist, role -> name."""
    names = [path + end for end in KEPT if path + end in unclaimed.specs]
    return {f"input {number}": name for number, name in enumerate(names)}
