"""Read and write MLX's quantized weights: affine ones of 1 to 8 bits, and its float modes mxfp4, nvfp4 and mxfp8.

The words of a row are one stream of bits. Shapes determine only the product of bits and group size, so the config
decides: `quantization` with `group_size`, `bits` and `mode`, and for single modules their own config, or false.

Source: mlx, mlx/ops.cpp (quantize); mlx-lm, utils.py (load_model).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ..dtypes import TensorSpec
from .codec import Fault, Parts, Piece, Quantizer, StoredTensor, StoredWeight, Unclaimed
from .scaled import ScaledCodes, Scales

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.code_levels import Levels
    from .codec import Codes, Wide
    from .packing import Packing

WIDTHS, GROUPS = (1, 2, 3, 4, 5, 6, 8), (32, 64, 128)  # bits and group sizes of affine weights

MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # of floats -> bits, group size

E4M3_SCALES = "e4m3 scales"  # the role of scale bytes that mean e4m3; others mean powers of two

PER_GLOBAL = 448.0 * 6.0  # the largest e4m3 times the largest e2m1; nvfp4's global scale is the largest number


class MlxAffine(ScaledCodes):
    """`code * scale + bias`, one pair for each group of columns; scales may be negative."""

    key = "mlx"
    ends = (".weight",)
    code_dtypes = frozenset(("U32",))

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        scale, bias = f"{path}.scales", f"{path}.biases"
        spec = unclaimed.specs[name]
        if not unclaimed.one_of(scale, bias) or len(spec.shape) < 2:
            return None
        if unclaimed.need(scale, "F32", "F16", "BF16", "U8").dtype == "U8":
            return None
        groups = _groups(spec, unclaimed, scale)
        unclaimed.shaped(bias, unclaimed.specs[scale].shape, "F32", "F16", "BF16")
        width, group, note = self.layout(path, groups, spec.shape[-1], unclaimed)
        shape = (*spec.shape[:-1], groups * group)
        roles, detail = ("codes", "scales", "biases"), {"bits": width, "group": group}
        return StoredWeight(self, TensorSpec("F64", shape), (name, scale, bias), roles, detail, note)

    def layout(self, path: str, groups: int, words: int, unclaimed: Unclaimed) -> tuple[int, int, str]:
        """Return the bits, the group size, and a note if the config contradicts them."""
        fits = [(width, size) for width in WIDTHS for size in GROUPS if width * size * groups == 32 * words]
        stated = _stated(path, unclaimed)
        says = (stated.get("bits", 4), stated.get("group_size", 64)) if stated else None  # MLX's own defaults
        if says in fits:
            is_off = unclaimed.declared.get(path.removeprefix(unclaimed.prefix)) is False
            return *says, f"{path} is stored as codes, though the config says that it is not" if is_off else ""
        if len(fits) != 1 or (says and _product(*says) == 32 * words // groups):
            which = " or ".join(f"{width} bits in groups of {size}" for width, size in fits) or "no bits that MLX has"
            raise Fault(f"{path}.scales, {groups} a row, and {words} words mean {which}; the config says {says}")
        width, size = fits[0]
        return width, size, f"{path} is stored with {width} bits in groups of {size}, but the config does not say so"

    def packing(self, parts: Parts) -> Packing:
        from .packing import Words

        return Words(parts.weight.spec.shape[-1], parts.detail("bits"))

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import Integers

        return Integers(0, (1 << parts.detail("bits")) - 1)

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        group = parts.detail("group")
        scale, bias = (self.grid(parts, role, (1, group), start, stop) for role in ("scales", "biases"))
        return Scales(scale, group, bias=bias)

    def quantizer(self, parts: Parts) -> Quantizer | None:
        return MlxQuantizer(parts) if parts["scales"].spec.dtype == parts["biases"].spec.dtype else None


class MlxQuantizer(Quantizer):
    """Encodes like mlx on the CPU: in float32, from weights in the type of the scales.

    The number of largest magnitude and zero are exact unless the scale would be 0; with one bit the extremes are exact.
    """

    def rows(self, start: int, rows: Numbers) -> tuple[Codes, list[Piece]]:
        import numpy as np

        from ...numerics.arrays import rounded_to
        from ...numerics.forms import FORMS

        group, top = self.parts.detail("group"), np.float32((1 << self.parts.detail("bits")) - 1)
        form = FORMS[self.parts["scales"].spec.dtype]
        numbers = self.rounded(rows, form).reshape(len(rows), -1, group)
        least, most = numbers.min(axis=2), numbers.max(axis=2)
        step = np.maximum((most - least) / top, np.float32(1e-7))
        is_low = np.abs(least) > np.abs(most)
        step, edge = np.where(is_low, step, -step), np.where(is_low, least, most)
        count = np.rint(edge / step)
        is_zero = count == 0
        scale = np.where(is_zero, step, edge / np.where(is_zero, 1, count))
        bias = np.where(is_zero, np.float32(0), edge)
        if top == 1:
            scale, bias = np.maximum(most - least, np.float32(1e-7)), least
        codes = np.rint((numbers - bias[:, :, None]) / scale[:, :, None]).clip(0, top).astype(np.uint8)
        return codes.reshape(rows.shape), [
            (role, start * scale.shape[1] * form.itemsize, rounded_to(x, form).bits.tobytes())
            for role, x in (("scales", scale), ("biases", bias))
        ]


class MlxFp4(ScaledCodes):
    """`code * scale`; nvfp4 may have a global scale for each matrix: `(code * scale * global) / 2688`."""

    key = "mlx-fp4"
    ends = (".weight",)
    code_dtypes = frozenset(("U32",))
    modes: ClassVar[tuple[str, ...]] = ("mxfp4", "nvfp4")

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        scale, global_scale, spec = f"{path}.scales", f"{path}.global_scale", unclaimed.specs[name]
        if len(spec.shape) < 2 or scale not in unclaimed.specs or unclaimed.specs[scale].dtype != "U8":
            return None
        groups = _groups(spec, unclaimed, scale)
        mode = next((m for m, (w, g) in MODES.items() if w * g * groups == 32 * spec.shape[-1]), None)
        if mode is None or f"{path}.biases" in unclaimed.specs:
            raise Fault(f"{scale} has the shape {unclaimed.specs[scale].shape}, for which MLX has no mode")
        if mode not in self.modes:
            return None
        shape = (*spec.shape[:-1], groups * MODES[mode][1])
        says = _stated(path, unclaimed).get("mode", mode)
        note = "" if says == mode else f"{path} is stored as {mode}, though the config says {says}"
        names = {"codes": name, E4M3_SCALES if mode == "nvfp4" else "scales": scale}
        if global_scale in unclaimed.specs:
            matrices = TensorSpec("F64", shape[:-2]).size
            if unclaimed.need(global_scale, "F32").size != matrices or mode != "nvfp4":
                shape = unclaimed.specs[global_scale].shape
                raise Fault(f"{global_scale} has the shape {shape}, for {matrices} matrices of {mode}")
            names["scale_of_scales"] = global_scale
        return StoredWeight(self, TensorSpec("F64", shape), tuple(names.values()), tuple(names), {"mode": mode}, note)

    def packing(self, parts: Parts) -> Packing:
        from .packing import Words

        return Words(parts.weight.spec.shape[-1], MODES[parts.detail("mode")][0])

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import E2M1

        return E2M1

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        import numpy as np

        group, global_scale = MODES[parts.detail("mode")][1], parts.get("scale_of_scales")
        role = E4M3_SCALES if parts.get(E4M3_SCALES) else "scales"
        scales = self.grid(parts, role, (1, group), start, stop)
        if global_scale is None:
            return Scales(scales, group)
        of_row = global_scale.floats()[np.arange(start, stop) // parts.shape[1]]
        return Scales(scales * of_row[:, None], group, divisor=PER_GLOBAL)

    def check(self, parts: Parts) -> None:
        super().check(parts)
        if parts.get(E4M3_SCALES):
            self.require_finite(parts, E4M3_SCALES, parts[E4M3_SCALES])

    def decoded(self, role: str, tensor: StoredTensor, first: int, count: int) -> Wide:
        from ...numerics.code_levels import E4M3

        if role == E4M3_SCALES:
            return E4M3.values(tensor.integers(first, count))
        return super().decoded(role, tensor, first, count)


class MlxFp8(MlxFp4):
    """`MlxFp4` with codes of e4m3."""

    key = "mlx-mxfp8"
    bits = 8
    modes = ("mxfp8",)

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import E4M3

        return E4M3


def _groups(spec: TensorSpec, unclaimed: Unclaimed, scale: str) -> int:
    """Return the number of scales in a row."""
    shape = unclaimed.specs[scale].shape
    if shape[:-1] != spec.shape[:-1]:
        raise Fault(f"{scale} has the shape {shape}, for words of {spec.shape}")
    return shape[-1]


def _product(width: Any, size: Any) -> int:
    return width * size if type(width) is type(size) is int else 0


def _stated(path: str, unclaimed: Unclaimed) -> Mapping[str, Any]:
    """Return the config of a module."""
    stated = unclaimed.declared.get(path.removeprefix(unclaimed.prefix))
    return stated if isinstance(stated, Mapping) else unclaimed.declared
