"""Encode float8 with new scales from the largest number of each block, like the formats' own software.

All operations are torch's elementwise operations and maxima, so the bytes are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from ...errors import InputError
from ..dtypes import DTYPE_NAMES
from .codec import Parts, Piece, Quantizer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from .codec import Codes

    Spread = Callable[[torch.Tensor], torch.Tensor]  # numbers of blocks -> one for each row and column

LARGEST = 448.0  # of e4m3

E8M0 = ("F8_E8M0", "U8")

INVERSE = ("_scale_inv", ".scale")  # suffixes of scales of DeepSeek's models, which transformers writes


class Fp8Quantizer(Quantizer):
    """e4m3 with one scale for each block of rows and columns."""

    def __init__(self, parts: Parts) -> None:
        matrices, rows, columns = parts.shape
        high, wide = parts.detail("block")
        if parts["scales"].spec.size == 1:
            matrices, rows = 1, matrices * rows
        self.height, self.high, self.wide = rows, high or rows, wide or columns  # of a matrix, and of a block
        self.down, self.across = -(-rows // self.high), -(-columns // self.wide)  # blocks of a matrix
        self.blocks = matrices * self.down
        super().__init__(parts, self.high if matrices == 1 or rows % self.high == 0 else rows)

    def rows(self, start: int, rows: torch.Tensor) -> tuple[Codes, list[Piece]]:
        import torch

        blocks = self.blocks_of(start, len(rows))
        first = int(blocks[0])

        def spread(numbers: torch.Tensor) -> torch.Tensor:
            return numbers[torch.from_numpy(blocks - first)].repeat_interleave(self.wide, 1)[:, : rows.shape[1]]

        scales, largest = self.parts["scales"], self.largest(blocks, rows)
        if scales.name.endswith(INVERSE):
            scale, scaled = _by_inverse(rows, largest, spread, scales.spec.dtype, self.parts.detail("power_of_two"))
        else:
            scale, scaled = _by_quotient(rows, largest, spread, scales.spec.dtype)
        if not (largest.isfinite().all() and (scale.dtype == torch.uint8 or scale.isfinite().all())):
            culprit = self.parts["codes"].name
            raise InputError("has numbers that its type of scales does not have", culprit=culprit)
        codes = scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        place = first * self.across * scale.itemsize
        return codes, [*self.kept(start), ("scales", place, scale.view(torch.uint8).numpy().tobytes())]

    def kept(self, start: int) -> list[Piece]:
        """Return the companions to copy, with the first row: scales of inputs, ComfyUI's description."""
        others = [role for role in self.parts.tensors if role not in ("codes", "scales")] if start == 0 else []
        return [(role, 0, self.parts[role].integers().tobytes()) for role in others]

    def blocks_of(self, start: int, count: int) -> npt.NDArray[np.intp]:
        """Return the block of each of some rows, counted over all matrices."""
        import numpy as np

        rows = np.arange(start, start + count)
        return rows // self.height * self.down + rows % self.height // self.high

    def largest(self, blocks: npt.NDArray[np.intp], rows: torch.Tensor) -> torch.Tensor:
        """Return the largest absolute value of each block that these rows are in, (blocks, across)."""
        import numpy as np
        import torch

        sizes = rows.abs()
        if sizes.shape[1] % self.wide:
            sizes = torch.nn.functional.pad(sizes, (0, -sizes.shape[1] % self.wide))
        sizes = sizes.view(len(rows), self.across, self.wide).amax(2)
        edges = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(rows)]
        return torch.stack([sizes[first:last].amax(0) for first, last in pairwise(edges)])


class Fp8Whole(Fp8Quantizer):
    """e4m3 with scales that all rows of a matrix share; `see` gets the rows first."""

    sees_all = True

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.together, self.seen = 1, 0
        self.known: dict[int, torch.Tensor] = {}  # the largest values of a block of rows, (across)

    def see(self, rows: torch.Tensor) -> None:
        import torch

        blocks = self.blocks_of(self.seen, len(rows))
        for block, largest in zip(range(blocks[0], blocks[-1] + 1), super().largest(blocks, rows), strict=True):
            self.known[block] = torch.maximum(largest, self.known.get(block, largest))
        self.seen += len(rows)

    def largest(self, blocks: npt.NDArray[np.intp], rows: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.stack([self.known[block] for block in range(blocks[0], blocks[-1] + 1)])


def _by_quotient(
    rows: torch.Tensor, largest: torch.Tensor, spread: Spread, dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales, amax / 448, and x / scale, in the type of rows and scales; the scale of zeros is its epsilon.

    Source: compressed-tensors, `calculate_qparams` in quantization/utils/helpers.py and `_quantize` in
    quantization/lifecycle/forward_helpers.py.
    """
    import torch

    stored = getattr(torch, DTYPE_NAMES[dtype])
    kind = torch.promote_types(rows.dtype, stored)
    scale = (largest.to(kind) / LARGEST).to(stored)
    scale[scale == 0] = torch.finfo(stored).eps
    return scale, rows.to(kind) / spread(scale.to(kind)) + 0  # adding the zero point turns -0 into +0


def _by_inverse(
    rows: torch.Tensor, largest: torch.Tensor, spread: Spread, dtype: str, power_of_two: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales, 1 / (448 / amax), and x * (448 / amax), in float32; the scale of zeros is 1.

    If scales are stored as powers of two (rounded up) or in another type, x is divided by the stored scale.
    Source: transformers, `Fp8Quantize` in integrations/finegrained_fp8.py.
    """
    import torch

    factor = LARGEST / largest.float()
    factor[factor.isinf()] = 1  # of zeros, and of numbers too small for a scale
    scale = stored = 1 / factor
    if power_of_two:
        fraction, exponent = torch.frexp(scale)
        exponent = (exponent - (fraction == 0.5).int()).clamp(-126, 127)
        scale = stored = torch.ldexp(torch.ones_like(scale), exponent)
    if dtype in E8M0:
        stored = (exponent + 127).to(torch.uint8)
    elif dtype != "F32":
        stored = scale.to(getattr(torch, DTYPE_NAMES[dtype]))
        scale = stored.float()
    if power_of_two or dtype != "F32":
        factor = 1 / scale
    return stored, rows.float() * spread(factor)
