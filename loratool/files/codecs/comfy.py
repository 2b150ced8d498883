"""Read and write the quantized layers of ComfyUI's files, which a tensor or the metadata describe.

ComfyUI's float8 with one scale is `Fp8`. Layers with codes in the layout of one kernel are not read.

Sources: ComfyUI, comfy/ops.py and comfy/quant_ops.py; comfy-kitchen, backends/eager/quantization.py.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from ..dtypes import TensorSpec
from .blocks import BlockCodes, block_of, refuse_column_scales
from .codec import Fault, Parts, StoredTensor, StoredWeight, Unclaimed
from .scaled import ScaledCodes, Scales

if TYPE_CHECKING:
    from ...numerics.code_levels import Levels
    from .codec import Codes, Wide
    from .packing import Packing

LISTING = "_quantization_metadata"  # the key of a file's metadata with the list of its layers

MARKER = ".comfy_quant"  # the suffix of a tensor whose bytes are a layer's description

ROTATED = ("convrot_w4a4",)  # formats whose columns are always rotated

HIGH, WIDE = 128, 4  # rows and columns of a tile of scales


def layer_config(path: str, unclaimed: Unclaimed) -> Mapping[str, Any] | None:
    """Return ComfyUI's description of a layer from the metadata, else from the tensor beside it; None without one.

    Raises:
        Fault: the tensor is not JSON.
    """
    listed = _listed(unclaimed.metadata.get(LISTING, "{}")).get(path.removeprefix(unclaimed.prefix))
    if listed is not None:
        return listed if isinstance(listed, Mapping) else {}
    return unclaimed.json(path + MARKER) if path + MARKER in unclaimed.specs else None


@lru_cache(maxsize=8)
def _listed(text: str) -> Mapping[str, Any]:
    try:
        layers = json.loads(text)["layers"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
    return layers if isinstance(layers, Mapping) else {}


class ComfyLayer(ScaledCodes):
    """A layer whose description names its format."""

    format: ClassVar[str]  # ComfyUI's name
    rotates: ClassVar[bool] = False  # columns are rotated
    ends = (".weight",)

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        config = layer_config(path, unclaimed)
        if config is None or config.get("format") != self.format:
            return None
        is_rotated, rotation = _rotation(config)
        if is_rotated is not self.rotates or len(unclaimed.specs[name].shape) < 2:
            return None
        refuse_column_scales(path, unclaimed)
        shape, companions, detail = self.layout(path, unclaimed.specs[name].shape, unclaimed)
        if self.rotates:
            detail["rotation"] = _checked_rotation(rotation, shape[-1])
        ends = {"input": ".input_scale", "marker": MARKER}
        others = {role: path + end for role, end in ends.items() if path + end in unclaimed.specs}
        tensors = {"codes": name, **companions, **others}
        return StoredWeight(self, TensorSpec("F64", shape), tuple(tensors.values()), tuple(tensors), detail)

    @abstractmethod
    def layout(
        self, path: str, shape: tuple[int, ...], unclaimed: Unclaimed
    ) -> tuple[tuple[int, ...], dict[str, str], dict[str, Any]]:
        """Return the weight's shape, its companions by role, and the detail of the weight.

        Args:
            shape: of the codes.

        Raises:
            Fault: a companion is missing or of another shape.
        """


def _rotation(config: Mapping[str, Any]) -> tuple[bool, Any]:
    """Return whether a description says that columns are rotated, and how many together."""
    params = config.get("params")
    every = {**params, **config} if isinstance(params, Mapping) else config
    return bool(every.get("convrot") or every.get("format") in ROTATED), every.get("convrot_groupsize", 256)


def _checked_rotation(size: Any, columns: int) -> int:
    """Return a rotation's number of columns; raise Fault if it is not a power of 4 that divides all columns."""
    if type(size) is not int or size < 4 or size & (size - 1) or size.bit_length() % 2 == 0 or columns % size:
        raise Fault(f"its description says that {size!r} of its {columns} columns are rotated together")
    return size


class ComfyInt8(ComfyLayer, BlockCodes):
    """Integers times one scale, or one scale for each row."""

    key = "comfy-int8"
    format = "int8_tensorwise"
    code_dtypes = frozenset(("I8",))
    code = "int8"
    bits = 8

    def layout(
        self, path: str, shape: tuple[int, ...], unclaimed: Unclaimed
    ) -> tuple[tuple[int, ...], dict[str, str], dict[str, Any]]:
        scale = path + ".weight_scale"
        block = block_of(shape, unclaimed.need(scale, "F32", "F16", "BF16"), scale)
        return shape, {"scales": scale}, {"block": block}


class ComfyTiled(ComfyLayer):
    """A layer with one scale for each `group` columns of a row, stored in cuBLAS tiles.

    ComfyUI pads weights to complete groups and tiles. The shape is the padded one, since the file has no other.
    """

    group: ClassVar[int]
    scale_types: ClassVar[tuple[str, ...]]  # "U8" where an old file has their bytes

    def tiles(self, path: str, rows: int, columns: int, unclaimed: Unclaimed) -> dict[str, str]:
        """Return the scales by role."""
        if columns % self.group:
            raise Fault(f"its {columns} columns do not divide into groups of {self.group}")
        padded = (-(-rows // HIGH) * HIGH, -(-columns // self.group // WIDE) * WIDE)
        unclaimed.shaped(path + ".weight_scale", padded, *self.scale_types)
        return {"scales": path + ".weight_scale"}

    def scale_codes(self, parts: Parts, start: int, stop: int) -> Codes:
        """Return the codes of the scales of rows start:stop, (rows, groups).

        A tile is 32 times 16 bytes: row r of it has its four bytes in line r % 32, at r // 32.
        """
        groups = parts.shape[2] // self.group
        across, low, high = -(-groups // WIDE), start // HIGH, -(-stop // HIGH)
        band = HIGH * WIDE * across
        stored = parts["scales"].integers(low * band, (high - low) * band)
        tiles = stored.reshape(high - low, across, 32, HIGH // 32, WIDE).transpose(0, 3, 2, 1, 4)
        return tiles.reshape((high - low) * HIGH, across * WIDE)[start - low * HIGH : stop - low * HIGH, :groups]


class ComfyMxfp8(ComfyTiled):
    """e4m3 times a power of two."""

    key = "comfy-mxfp8"
    format = "mxfp8"
    code_dtypes = frozenset(("F8_E4M3",))
    bits = 8
    group = 32
    scale_types = ("F8_E8M0", "U8")

    def layout(
        self, path: str, shape: tuple[int, ...], unclaimed: Unclaimed
    ) -> tuple[tuple[int, ...], dict[str, str], dict[str, Any]]:
        if len(shape) != 2:
            raise Fault(f"it has the shape {shape}, not that of a matrix")
        return shape, self.tiles(path, *shape, unclaimed), {}

    def packing(self, parts: Parts) -> Packing:
        from .packing import Plain

        return Plain(parts.weight.spec.shape[-1])

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import E4M3

        return E4M3

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        from ...numerics.code_levels import e8m0

        return Scales(e8m0(self.scale_codes(parts, start, stop)), self.group)


class ComfyNvfp4(ComfyTiled):
    """e2m1, the first code in the high nibble, times e4m3, times one scale of the weight."""

    key = "comfy-nvfp4"
    format = "nvfp4"
    code_dtypes = frozenset(("U8",))
    bits = 4
    group = 16
    scale_types = ("F8_E4M3", "U8")

    def layout(
        self, path: str, shape: tuple[int, ...], unclaimed: Unclaimed
    ) -> tuple[tuple[int, ...], dict[str, str], dict[str, Any]]:
        if len(shape) != 2:
            raise Fault(f"it has the shape {shape}, not that of a matrix")
        rows, columns = shape[0], 2 * shape[1]
        scales = self.tiles(path, rows, columns, unclaimed)
        unclaimed.shaped(path + ".weight_scale_2", (1,), "F32")
        return (rows, columns), {**scales, "scale_of_scales": path + ".weight_scale_2"}, {}

    def packing(self, parts: Parts) -> Packing:
        from .packing import HighNibbles

        return HighNibbles(parts.weight.spec.shape[-1])

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import E2M1

        return E2M1

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        from ...numerics.code_levels import E4M3

        scale = E4M3.values(self.scale_codes(parts, start, stop)) * parts["scale_of_scales"].floats()
        return Scales(scale, self.group)

    def decoded(self, role: str, tensor: StoredTensor, first: int, count: int) -> Wide:
        from ...numerics.code_levels import E4M3

        is_coded = role == "scales"
        return E4M3.values(tensor.integers(first, count)) if is_coded else super().decoded(role, tensor, first, count)


class ComfyAwq(ComfyLayer):
    """`(code - 8) * scale + zero` for each group of columns, the first code in the low nibble."""

    key = "comfy-awq"
    format = "awq_w4a16"
    code_dtypes = frozenset(("I8", "U8"))
    bits = 4

    def layout(
        self, path: str, shape: tuple[int, ...], unclaimed: Unclaimed
    ) -> tuple[tuple[int, ...], dict[str, str], dict[str, Any]]:
        scale, zero = path + ".weight_scale", path + ".weight_zeros"
        stored = unclaimed.need(scale, "F32", "F16", "BF16").shape
        if len(shape) != 2 or len(stored) != 2 or stored[1] != shape[0] or 2 * shape[1] % max(1, stored[0]):
            raise Fault(f"{scale} has the shape {stored}, for codes of {shape}")
        unclaimed.shaped(zero, stored, "F32", "F16", "BF16")
        return (shape[0], 2 * shape[1]), {"scales": scale, "biases": zero}, {"group": 2 * shape[1] // stored[0]}

    def packing(self, parts: Parts) -> Packing:
        from .packing import Words

        return Words(parts.weight.spec.shape[-1], 4, 8)

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import Integers

        return Integers(0, 15, offset=8)

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        groups, out = parts["scales"].spec.shape
        scale, zero = (parts[role].float_box(groups, out, start, stop).T for role in ("scales", "biases"))
        return Scales(scale, parts.detail("group"), bias=zero)
