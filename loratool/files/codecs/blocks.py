"""Determine which numbers of a weight share a scale from the shape of the scales.

If a config's block size fits, it determines how the last block is truncated. Without one, blocks are squares or groups
of columns whose side is a power of two, like those of all writers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING

from ..dtypes import TensorSpec
from .codec import Fault, Parts, Unclaimed
from .quantized import Blocks
from .scaled import ScaledCodes, Scales

if TYPE_CHECKING:
    from ...numerics.code_levels import Levels
    from .codec import Wide
    from .packing import Packing

# A weight's columns have their own scales, by which its inputs must be multiplied, their own order, or are rotated.
COLUMN_SCALES = (".pre_quant_scale", ".weight_g_idx", ".input_rotation", ".input_prescale")

LONGEST = 1 << 16  # the longest side of a block that a config may name

POWERS = (16, 32, 64, 128, 256, 512)  # sides of blocks if no config names them


class BlockCodes(ScaledCodes):
    """A format with one byte per code, float8 or integer, and one scale for each block; the detail has their size."""

    def packing(self, parts: Parts) -> Packing:
        from .packing import Plain

        return Plain(parts.weight.spec.shape[-1], self.code)

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import E4M3, E5M2, INT8

        levels: dict[str, Levels] = {"I8": INT8, "F8_E4M3": E4M3, "F8_E5M2": E5M2}
        return levels[parts.codes_spec.dtype]

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        high, wide = parts.detail("block")
        grids: dict[str, Wide] = {}
        for role in ("scales", "zeros"):
            if parts.get(role):
                grids[role] = self.grid(parts, role, (high, wide), start, stop)
        return Scales(grids["scales"], 0 if wide == 1 else wide, grids.get("zeros"))


def refuse_column_scales(path: str, unclaimed: Unclaimed) -> None:
    """Raise Fault if a weight's columns have their own scales or order."""
    for end in unclaimed.present(COLUMN_SCALES):
        if path + end in unclaimed.specs:
            raise Fault(f"{path + end} is beside it, and weights with one are not read")


def block_of(
    shape: tuple[int, ...], scale: TensorSpec, name: str, stated: Blocks = (), is_transposed: bool = False
) -> tuple[int, int]:
    """Return the rows and columns of a block that has one scale, 0 for all of them.

    Args:
        name: of the scales.
        stated: the blocks that a config names; the tensors' shapes take precedence.
        is_transposed: whether square experts, stored (in, out), have a scale for each column (fbgemm, Llama-4).

    Raises:
        Fault: the scales fit no blocks of the weight.
    """
    try:
        return _block_of(shape, scale, stated, is_transposed)
    except Fault as fault:
        raise Fault(f"{name} {fault}") from None


@lru_cache(maxsize=1024)
def _block_of(shape: tuple[int, ...], scale: TensorSpec, stated: Blocks, is_transposed: bool) -> tuple[int, int]:
    """Return the block of `block_of`, cached for all weights of these shapes; errors do not name the scales."""
    *stack, rows, columns = shape
    grid = scale.shape
    squares = [(-(-rows // high), -(-columns // wide)) for high, wide in stated if min(high, wide) > 1]
    if scale.size == 1 and len(grid) == 2 and squares and (1, 1) not in squares:  # one that was cut off
        raise Fault(f"has the shape {grid}, but the config's blocks make a grid of {squares[0]}")
    if scale.size == 1 and stack:
        return 0, 0
    if scale.size == 1:
        grid = (1, 1)
    elif len(grid) == len(shape) + 2 and grid[1::2] == (1, 1):  # modelopt: (rows / block, 1, columns / block, 1)
        grid = grid[::2]
    elif grid in (tuple(stack), (*stack, 1)) or (not stack and len(grid) == 1):
        grid = (*grid, 1, 1)[: len(shape)]
    if len(grid) != len(stack) + 2 or grid[:-2] != tuple(stack):
        raise Fault(f"has the shape {scale.shape}, for a weight of {shape}")
    if stack and grid[-2:] == (columns, 1) and (is_transposed or rows != columns):
        return 0, 1
    named = [block for block in stated if max(block) <= LONGEST]
    for high, wide in chain(named, _usual_blocks(rows, columns, bool(stack))):
        if grid[-2:] == (-(-rows // high) if high else 1, -(-columns // wide) if wide else 1):
            return high, wide
    raise Fault(f"has the shape {scale.shape}, which is not a grid of blocks of a weight of {shape}")


def _usual_blocks(rows: int, columns: int, is_stack: bool) -> Iterator[tuple[int, int]]:
    """Yield the blocks that writers use. Two have the same grid only in a stack with fewer columns than a block."""
    yield from ((0, 0), (1, 0))
    if is_stack:
        yield 0, 1  # fbgemm
    if is_stack and rows % 2 == 0:
        yield rows // 2, 0  # transformers: gate and up of an expert, each with one scale
    yield from ((1, side) for side in POWERS)
    yield from ((side, side) for side in POWERS)


def contradiction(block: tuple[int, int], stated: Blocks) -> str:
    """Return a note if a config names blocks other than the tensors'; empty if it names the same or none."""
    if not stated or block in stated:
        return ""
    actual, stated_block = (f"{high or 'all'} x {wide or 'all'}" for high, wide in (block, stated[0]))
    return f"the scales are of blocks of {actual} and count; the quantization config says {stated_block}"
