"""Read and write what bitsandbytes stores: 4-bit codes of a table with scales of flat blocks, and int8 rows.

Source: bitsandbytes, functional.py (`QuantState.as_dict`), nn/modules.py (`Linear8bitLt`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from ..dtypes import TensorSpec
from .codec import Fault, Found, Parts, StoredWeight
from .scaled import Scaled, Scales

if TYPE_CHECKING:
    from ...numerics.code_levels import Levels
    from .codec import Wide
    from .packing import Packing

TYPES = ("nf4", "fp4")


class Bitsandbytes4(Scaled):
    """nf4 and fp4: `table[code] * absmax`, one absmax for each block of the flat weight, whose rows a block may cross.

    Nested scales are codes too: `absmax = float32(nested_table[code] * nested_absmax) + offset` in float32, which is
    how bitsandbytes itself has them.
    """

    key = "bitsandbytes-4bit"
    ends = ("",)  # the codes have the weight's own name
    code_dtypes = frozenset(("U8", "I8", "BF16", "F16", "F32"))  # FSDP shards codes that are called floats

    def weight_name(self, path: str, end: str) -> str:
        return path

    def claim(self, path: str, name: str, found: Found) -> StoredWeight | None:
        state_names = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in TYPES]
        if not found.one_of(*state_names, f"{name}.absmax", f"{name}.quant_map"):
            return None
        state_name = found.one_of(*state_names) or state_names[0]
        state = found.json(state_name)
        shape, block = _shape(state, state_name), _count(state, "blocksize", state_name)
        size = math.prod(shape)
        if size % 2 or found.specs[name].nbytes * 2 != size:
            raise Fault(f"{state_name} says the shape {shape}, which is not that of {found.specs[name].nbytes} bytes")
        found.shaped(f"{name}.quant_map", (16,), "F32")
        blocks = -(-size // block)
        names = {"absmax": f"{name}.absmax", "quant_map": f"{name}.quant_map", "quant_state": state_name}
        detail: dict[str, Any] = {"block": block}
        if "nested_offset" in state or f"{name}.nested_absmax" in found.specs:
            detail["nested"] = _count(state, "nested_blocksize", state_name)
            detail["offset"] = _offset(state, state_name)
            found.shaped(f"{name}.absmax", (blocks,), "U8")
            found.shaped(f"{name}.nested_absmax", (-(-blocks // detail["nested"]),), "F32")
            found.shaped(f"{name}.nested_quant_map", (256,), "F32")
            names |= {role: f"{name}.{role}" for role in ("nested_absmax", "nested_quant_map")}
        else:
            found.shaped(f"{name}.absmax", (blocks,), "F32")
        return StoredWeight(self, TensorSpec("F64", shape), (name, *names.values()), ("codes", *names), detail)

    def packing(self, parts: Parts) -> Packing:
        from .packing import HighNibbles

        return HighNibbles(parts.weight.spec.shape[-1])

    def levels(self, parts: Parts) -> Levels:
        return _table(tuple(parts["quant_map"].floats().tolist()))

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        columns, block = parts.shape[2], parts.detail("block")
        first, last = start * columns, stop * columns
        low, high = first // block, -(-last // block)
        found = self.absmax(parts, low, high)
        if columns % block == 0:
            return Scales(found.reshape(stop - start, -1), block)
        return Scales(found.repeat(block)[first - low * block : last - low * block].reshape(-1, columns), 0)

    def absmax(self, parts: Parts, start: int, stop: int) -> Wide:
        """Return the scales of blocks start:stop."""
        import numpy as np

        if parts.get("nested_absmax") is None:
            return parts["absmax"].floats(start, stop - start)
        each, codes = parts.detail("nested"), parts["absmax"].integers(start, stop - start)
        low, high = start // each, -(-stop // each)
        table = parts["nested_quant_map"].floats().astype(np.float32)
        outer = parts["nested_absmax"].floats(low, high - low).astype(np.float32).repeat(each)
        product = table[codes] * outer[start - low * each : stop - low * each]
        found: Wide = (product + np.float32(parts.detail("offset"))).astype(np.float64)
        return found

    def check(self, parts: Parts) -> None:
        for role in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
            tensor = parts.get(role)
            if tensor is not None and tensor.spec.dtype != "U8":
                self.require_finite(parts, role, tensor)


class BitsandbytesInt8(Scaled):
    """LLM.int8() (Dettmers et al. 2022): `(code * SCB) / 127`, one SCB a row."""

    key = "bitsandbytes-int8"
    ends = (".weight",)
    code_dtypes = frozenset(("I8",))
    code = "int8"
    bits = 8

    def claim(self, path: str, name: str, found: Found) -> StoredWeight | None:
        layout, shape = f"{path}.weight_format", found.specs[name].shape
        if not found.one_of(f"{path}.SCB", layout) or len(shape) != 2:
            return None
        found.shaped(f"{path}.SCB", shape[:1], "F32", "F16", "BF16")
        if layout not in found.specs:
            return StoredWeight(self, TensorSpec("F64", shape), (name, f"{path}.SCB"), ("codes", "scales"))
        if found.need(layout, "U8").size != 1 or any(found.read(layout)):
            raise Fault(f"{layout} says an order of the codes that is not row by row")
        names = (name, f"{path}.SCB", layout)
        return StoredWeight(self, TensorSpec("F64", shape), names, ("codes", "scales", "weight_format"))

    def packing(self, parts: Parts) -> Packing:
        from .packing import Plain

        return Plain(parts.weight.spec.shape[-1], "int8")

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import INT8

        return INT8

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        return Scales(self.grid(parts, "scales", (1, 0), start, stop), 0, divisor=127.0)


@cache
def _table(numbers: tuple[float, ...]) -> Levels:
    from ...numerics.code_levels import Table

    return Table(numbers, even=False)


def _shape(state: Mapping[str, Any], name: str) -> tuple[int, ...]:
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) < 2 or not all(type(size) is int and size > 0 for size in shape):
        raise Fault(f"{name} says the shape {shape}, which is no matrix")
    return tuple(shape)


def _count(state: Mapping[str, Any], key: str, name: str) -> int:
    value = state.get(key)
    if type(value) is not int or value < 1:
        raise Fault(f"{name} says the {key} {value}")
    return value


def _offset(state: Mapping[str, Any], name: str) -> float:
    value = state.get("nested_offset")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise Fault(f"{name} says the nested_offset {value}")
    return float(value)
