"""Read and write HQQ: codes, float zero points and scales of groups, and a description in small tensors beside them.

Groups are runs of the flat weight (axis 1), or numbers at equal distances in it (axis 0). Codes of fewer than 5 bits
are interleaved: the first bits of each word are the first part of the matrix of groups.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

from ..dtypes import TensorSpec
from .codec import Fault, Parts, StoredWeight, Unclaimed
from .gptq import FLOATS
from .scaled import ScaledCodes, Scales

if TYPE_CHECKING:
    from ...numerics.code_levels import Levels
    from .packing import Packing

# `packing` -> the bits of a code, the lowest bit of each plane in a word, numpy's name of a word
PACKINGS: dict[str, tuple[int, tuple[int, ...], str]] = {
    "8bit_u8": (8, (0,), "uint8"),
    "4bit_u8": (4, (4, 0), "uint8"),
    "3bit_32": (3, (27, 24, 21, 18, 15, 12, 9, 6, 3, 0), "uint32"),
    "2bit_u8": (2, (6, 4, 2, 0), "uint8"),
    "1bit_u8": (1, (7, 6, 5, 4, 3, 2, 1, 0), "uint8"),
}

# The tensors of a layer beside codes, scales, zero points and bias (HQQLinear.state_dict_keys)
DESCRIPTION = (
    "nbits group_size shape axis packing unpack_view_dtype view_as_float quant_scale quant_zero compute_dtype "
    "offload_meta encoded_state_dict stores_quant_config channel_wise optimize round_zero"
).split()


class Hqq(ScaledCodes):
    """A number is (code - zero point) * scale, with those of its group.

    Source: hqq 0.2.8, core/quantize.py (Quantizer.dequantize), core/bitpack.py, core/utils.py (encode_safetensor_type).
    """

    key = "hqq"
    ends = (".W_q",)
    code_dtypes = frozenset(("U8", "I32", *FLOATS))
    bits = 8

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        is_other = unclaimed.declared.get("quant_method", self.key) != self.key or f"{path}.scale2" in unclaimed.specs
        if is_other or unclaimed.one_of(f"{path}.scale", f"{path}.zero") is None:
            return None  # SINQ's, which has scales of columns, too
        shape, packing = unclaimed.integers(f"{path}.shape"), _text(f"{path}.packing", unclaimed)
        if len(shape) != 2 or min(shape) <= 0 or packing not in PACKINGS:
            raise Fault(f"{path}.shape says {shape} and {path}.packing {packing!r}, which are no matrix of HQQ")
        axis, group = _integer(f"{path}.axis", unclaimed), _integer(f"{path}.group_size", unclaimed)
        if axis not in (0, 1) or group <= 0 or math.prod(shape) % group:
            raise Fault(f"{path}.axis says {axis} and {path}.group_size {group}, for a weight of {shape}")
        if axis == 1 and shape[1] % group:
            raise Fault(f"its groups of {group} cross rows of {shape[1]} numbers, which is not supported")
        width, shifts, kind = PACKINGS[packing]
        groups = math.prod(shape) // group
        rows, columns = (groups, group) if axis else (group, groups)
        words, itemsize = -(-rows // len(shifts)) * columns, 4 if kind == "uint32" else 1
        if (rows % len(shifts) and itemsize == 1) or unclaimed.specs[name].nbytes != words * itemsize:
            raise Fault(f"it has {unclaimed.specs[name].nbytes} bytes, for {math.prod(shape)} codes of {packing}")
        tensors = {"codes": name}
        for role, end in (("scales", "scale"), ("zeros", "zero")):
            tensors[role] = f"{path}.{end}"
            if unclaimed.need(tensors[role], *FLOATS).size != groups:
                raise Fault(f"{tensors[role]} has {unclaimed.specs[tensors[role]].size} numbers, for {groups} groups")
        tensors |= {end: f"{path}.{end}" for end in DESCRIPTION if f"{path}.{end}" in unclaimed.specs}
        last = _last_code(f"{path}.nbits", unclaimed)
        if last >= 1 << width:
            raise Fault(f"{path}.nbits says codes to {last}, but {path}.packing {packing}")
        detail = {"bits": last.bit_length(), "last": last, "packing": packing, "group": group, "axis": axis}
        return StoredWeight(self, TensorSpec("F64", shape), tuple(tensors.values()), tuple(tensors), detail)

    def packing(self, parts: Parts) -> Packing:
        from .packing import Interleaved, Plain

        (_, rows, columns), group = parts.shape, parts.detail("group")
        width, shifts, kind = PACKINGS[parts.detail("packing")]
        if len(shifts) == 1:
            return Plain(columns)
        of_groups = rows * columns // group if parts.detail("axis") else group
        size = -(-of_groups // len(shifts)) * (rows * columns // of_groups)
        return Interleaved(rows, columns, width, size, shifts, kind)

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import Integers

        width, _, _ = PACKINGS[parts.detail("packing")]
        return Integers(0, parts.detail("last"), readable=(0, (1 << width) - 1))

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        import numpy as np

        group, columns = parts.detail("group"), parts.shape[2]
        if parts.detail("axis"):
            scale, zero = (self.grid(parts, role, (1, group), start, stop) for role in ("scales", "zeros"))
            return Scales(scale, group, zero)
        of_group = np.arange(start * columns, stop * columns) % parts["scales"].spec.size
        scale, zero = (parts[role].floats()[of_group].reshape(-1, columns) for role in ("scales", "zeros"))
        return Scales(scale, 0, zero)

    def check(self, parts: Parts) -> None:
        """Raise InputError for a nan or infinite scale or zero point, or for bits that hold no code and are not 0."""
        super().check(parts)
        if parts.detail("packing") == "3bit_32":
            packing, rows = self.packing(parts), parts.shape[1]
            ((_, again),) = packing.places(0, packing.read(parts["codes"], 0, rows))
            if again != parts["codes"].integers().tobytes():
                raise parts.damaged("codes", "has bits beyond its codes")


def _integer(name: str, unclaimed: Unclaimed) -> int:
    """Read a tensor of one integer."""
    numbers = unclaimed.integers(name)
    if len(numbers) != 1:
        raise Fault(f"{name} has {len(numbers)} numbers, not one")
    return numbers[0]


def _text(name: str, unclaimed: Unclaimed) -> str:
    """Read a tensor whose bytes are the characters of a text."""
    unclaimed.need_small(name, "U8")
    return unclaimed.read(name).decode("latin-1")


def _last_code(name: str, unclaimed: Unclaimed) -> int:
    """Return the last code of so many bits as a tensor has, which may be 1.58."""
    if unclaimed.need_small(name, "I32", "I64", "F32").dtype != "F32":
        bits: float = _integer(name, unclaimed)
    else:
        unclaimed.shaped(name, ())
        (bits,) = struct.unpack("<f", unclaimed.read(name))
    if not 1 <= bits <= 8:
        raise Fault(f"{name} says {bits} bits")
    return round(2**bits - 1)
