"""Read and restore ComfyUI's rotated layers ("convrot"): the codes are of W times a Hadamard matrix, group by group.

The matrix is symmetric and its own inverse. Its entries are 1 and -1 times a power of two, so that float64 holds the
rotated numbers exactly. A number of W depends on the codes of all columns of its group.

Source: comfy-kitchen 0.2.40, tensor/int8_utils.py (_build_hadamard, _rotate_weight); backends/eager/convrot_w4a4.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .codec import Fault, Parts, StoredWeight, Unclaimed
from .comfy import ComfyInt8, ComfyLayer
from .scaled import Scales

if TYPE_CHECKING:
    from ...numerics.code_levels import Levels
    from .codec import Codes, Wide
    from .packing import Packing


class ComfyRotated(ComfyLayer):
    """A layer whose description says how many columns are rotated together."""

    rotates = True
    mixes = True

    def values(self, parts: Parts, start: int, codes: Codes) -> Wide:
        return rotated(self.unmixed(parts, start, codes), parts.detail("rotation"))

    def unmixed(self, parts: Parts, start: int, codes: Codes) -> Wide:
        return super().values(parts, start, codes)

    def nearest(self, parts: Parts, start: int, numbers: Wide) -> Codes:
        import numpy as np

        with np.errstate(all="ignore"):
            return super().nearest(parts, start, rotated(numbers, parts.detail("rotation")))

    def rounds_alone(self, weight: StoredWeight) -> bool:
        return False


class ComfyRotatedInt8(ComfyRotated, ComfyInt8):
    """Integers times one scale, or one scale for each row."""

    key = "comfy-rotated-int8"

    def layout(
        self, path: str, shape: tuple[int, ...], unclaimed: Unclaimed
    ) -> tuple[tuple[int, ...], dict[str, str], dict[str, Any]]:
        shape, companions, detail = super().layout(path, shape, unclaimed)
        if detail["block"][1] or len(shape) != 2:
            raise Fault(f"{companions['scales']} is not of rows of a matrix")
        return shape, companions, detail


class ComfyRotatedInt4(ComfyRotated):
    """Signed integers of 4 bits times the scale of their row, the first code in the low nibble."""

    key = "comfy-rotated-int4"
    format = "convrot_w4a4"
    code_dtypes = frozenset(("I8", "U8"))
    bits = 4

    def layout(
        self, path: str, shape: tuple[int, ...], unclaimed: Unclaimed
    ) -> tuple[tuple[int, ...], dict[str, str], dict[str, Any]]:
        scale = path + ".weight_scale"
        if len(shape) != 2 or unclaimed.need(scale, "F32", "F16", "BF16").size != shape[0]:
            raise Fault(f"{scale} has {unclaimed.need(scale).size} numbers, for codes of {shape}")
        return (shape[0], 2 * shape[1]), {"scales": scale}, {}

    def packing(self, parts: Parts) -> Packing:
        from .packing import Words

        return Words(parts.weight.spec.shape[-1], 4, 8)

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import Table

        return Table((*map(float, range(8)), *map(float, range(-8, 0))))

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        return Scales(parts["scales"].floats(start, stop - start)[:, None], 0)


def rotated(numbers: Wide, size: int) -> Wide:
    """Return rows times the regular Hadamard matrix of `size`, a power of 4, for each `size` of their columns.

    The matrix of 4 has -1 on its antidiagonal, and 1 elsewhere; larger ones are its Kronecker products. Sums are in one
    order on every machine.
    """
    turned, stride = numbers, 1
    while stride < size:
        fours = turned.reshape(len(numbers), -1, 4, stride)
        total = (fours[:, :, 0] + fours[:, :, 1]) + (fours[:, :, 2] + fours[:, :, 3])
        turned, stride = total[:, :, None] - 2 * fours[:, :, ::-1], 4 * stride
    whole: Wide = turned.reshape(numbers.shape) / math.isqrt(size)
    return whole
