"""Read and write bitsandbytes' formats: 4-bit codes of a table with scales of flat blocks, and int8 rows.

Source: bitsandbytes, functional.py (class QuantState), nn/modules.py (class Linear8bitLt).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..dtypes import TensorSpec
from .codec import Fault, Parts, Piece, Quantizer, StoredWeight, Unclaimed
from .scaled import ScaledCodes, Scales

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.code_levels import Levels
    from .codec import Codes, Wide
    from .packing import Packing

TYPES = ("nf4", "fp4")

STATES = tuple(f".quant_state.bitsandbytes__{kind}" for kind in TYPES)  # suffixes of the names of descriptions

LARGEST = 4096  # bitsandbytes' largest block

BEYOND = 2.0**128  # float32; a JSON's integer may be beyond any float

LONGEST = 24  # characters of a float in JSON

STEPS = 65536  # from -1 to 1; absmax are rounded to them before their codes are looked up


class Bitsandbytes4(ScaledCodes):
    """nf4 and fp4: `table[code] * absmax`, with one absmax for each block of the flat weight. Blocks may cross rows.

    Nested scales are codes too: `absmax = float32(nested_table[code] * nested_absmax) + offset`, in float32 as in
    bitsandbytes.
    """

    key = "bitsandbytes-4bit"
    ends = ("",)  # the codes have the weight's name
    code_dtypes = frozenset(("U8", "I8", "BF16", "F16", "F32"))  # floats: FSDP shards codes under these types

    def weight_name(self, path: str, end: str) -> str:
        return path

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        if not any(name + end in unclaimed.specs for end in unclaimed.present((*STATES, ".absmax", ".quant_map"))):
            return None
        state_name = unclaimed.one_of(*(name + end for end in STATES)) or name + STATES[0]
        state = unclaimed.json(state_name)
        shape, block = _shape(state, state_name), _count(state, "blocksize", state_name)
        size = math.prod(shape)
        if size % 2 or unclaimed.specs[name].nbytes * 2 != size:
            raise Fault(
                f"{state_name} says the shape {shape}, which is not that of {unclaimed.specs[name].nbytes} bytes"
            )
        unclaimed.shaped(f"{name}.quant_map", (16,), "F32")
        blocks = -(-size // block)
        names = {"absmax": f"{name}.absmax", "quant_map": f"{name}.quant_map", "quant_state": state_name}
        detail: dict[str, Any] = {"block": block}
        if "nested_offset" in state or f"{name}.nested_absmax" in unclaimed.specs:
            detail["nested"] = _count(state, "nested_blocksize", state_name)
            detail["offset"] = _offset(state, state_name)
            unclaimed.shaped(f"{name}.absmax", (blocks,), "U8")
            unclaimed.shaped(f"{name}.nested_absmax", (-(-blocks // detail["nested"]),), "F32")
            unclaimed.shaped(f"{name}.nested_quant_map", (256,), "F32")
            names |= {role: f"{name}.{role}" for role in ("nested_absmax", "nested_quant_map")}
        else:
            unclaimed.shaped(f"{name}.absmax", (blocks,), "F32")
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
        absmax = self.absmax(parts, low, high)
        if columns % block == 0:
            return Scales(absmax.reshape(stop - start, -1), block)
        return Scales(absmax.repeat(block)[first - low * block : last - low * block].reshape(-1, columns), 0)

    def absmax(self, parts: Parts, start: int, stop: int) -> Wide:
        """Return the scales of blocks start:stop."""
        import numpy as np

        if parts.get("nested_absmax") is None:
            return parts["absmax"].floats(start, stop - start)
        block, codes = parts.detail("nested"), parts["absmax"].integers(start, stop - start)
        low, high = start // block, -(-stop // block)
        table = parts["nested_quant_map"].floats().astype(np.float32)
        outer = parts["nested_absmax"].floats(low, high - low).astype(np.float32).repeat(block)
        product = table[codes] * outer[start - low * block : stop - low * block]
        absmax: Wide = (product + np.float32(parts.detail("offset"))).astype(np.float64)
        return absmax

    def quantizer(self, parts: Parts) -> Quantizer | None:
        if parts.get("nested_absmax") is None:
            return Bitsandbytes4Quantizer(parts)
        return CrossingQuantizer(parts) if parts.shape[2] % parts.detail("block") else NestedQuantizer(parts)

    def check(self, parts: Parts) -> None:
        for role in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
            tensor = parts.get(role)
            if tensor is not None and tensor.spec.dtype != "U8":
                self.require_finite(parts, role, tensor)


class BitsandbytesInt8(ScaledCodes):
    """LLM.int8() (Dettmers et al. 2022): `(code * SCB) / 127`, with one SCB per row."""

    key = "bitsandbytes-int8"
    ends = (".weight",)
    code_dtypes = frozenset(("I8",))
    code = "int8"
    bits = 8

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        layout, shape = f"{path}.weight_format", unclaimed.specs[name].shape
        if not unclaimed.one_of(f"{path}.SCB", layout) or len(shape) != 2:
            return None
        unclaimed.shaped(f"{path}.SCB", shape[:1], "F32")
        if layout not in unclaimed.specs:
            return StoredWeight(self, TensorSpec("F64", shape), (name, f"{path}.SCB"), ("codes", "scales"))
        if unclaimed.need(layout, "U8").size != 1 or any(unclaimed.read(layout)):
            raise Fault(f"{layout} says another order of the codes than row by row")
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

    def quantizer(self, parts: Parts) -> Quantizer | None:
        return Int8Quantizer(parts)


class Bitsandbytes4Quantizer(Quantizer):
    """Encodes like bitsandbytes, in float32 (backends/default/ops.py, quantize_4bit)."""

    def __init__(self, parts: Parts) -> None:
        columns, self.block = parts.shape[2], parts.detail("block")
        super().__init__(parts, self.block // math.gcd(columns, self.block))

    def rows(self, start: int, rows: Numbers) -> tuple[Codes, list[Piece]]:
        codes, absmax = self.encoded(rows)
        first = start * rows.shape[1] // self.block
        return codes, [("absmax", first * 4, absmax.tobytes()), *self.same("quant_map", "quant_state", start=start)]

    def encoded(self, rows: Numbers) -> tuple[Codes, Codes]:
        """Return the codes, (rows, columns), and the absmax of their blocks in float32."""
        import numpy as np

        from ...numerics.arrays import floats_of
        from ...numerics.forms import F32

        table = self.parts["quant_map"].floats().astype(np.float32)
        order = table.argsort(kind="stable")
        middles = (table[order[1:]] + table[order[:-1]]) / 2
        flat = floats_of(rows, F32).reshape(-1)
        full = len(flat) // self.block * self.block
        blocks, rest, least = flat[:full].reshape(-1, self.block), flat[full:], np.float32(1e-38)
        absmax = np.abs(blocks).max(axis=1)
        scaled = (blocks * (1 / np.maximum(absmax, least))[:, None]).reshape(-1)
        if len(rest):  # the last block is divided by its absmax, which is not 0
            last = np.maximum(np.abs(rest).max(), least)
            absmax, scaled = np.append(absmax, last), np.append(scaled, rest / last)
        place = np.zeros(len(scaled), np.uint8)
        for middle in middles:
            place += scaled > middle
        codes = order.astype(np.uint8)[place]
        return codes.reshape(rows.shape), absmax

    def same(self, *roles: str, start: int = 0) -> list[Piece]:
        """Return tensors that are copied from the other model, with the first rows."""
        return [] if start else [(role, 0, self.parts[role].integers().tobytes()) for role in roles]


class NestedQuantizer(Bitsandbytes4Quantizer):
    """Encodes absmax too, minus their mean, like bitsandbytes on the CPU (csrc/cpu_ops.cpp, quantize_cpu).

    The mean is computed from the exact sum. The state's JSON is padded with blanks, so that its length is known before
    the mean is; bitsandbytes accepts them.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.together = self.together if self.sees_all else 0
        self.absmax: list[Codes] = []

    def specs(self) -> dict[str, TensorSpec]:
        return {**super().specs(), "quant_state": TensorSpec("U8", (len(self.state(0.0)),))}

    def state(self, offset: float) -> bytes:
        import json

        state = json.loads(self.parts["quant_state"].integers().tobytes())
        blank = len(json.dumps({**state, "nested_offset": ""})) + LONGEST - 2
        return json.dumps({**state, "nested_offset": offset}).ljust(blank).encode()

    def rows(self, start: int, rows: Numbers) -> tuple[Codes, list[Piece]]:
        codes, absmax = self.encoded(rows)
        self.absmax.append(absmax)
        return codes, []

    def rest(self) -> list[Piece]:
        import numpy as np

        offset = np.float32(math.fsum(x for part in self.absmax for x in part.tolist()) / sum(map(len, self.absmax)))
        codes, outer = self.encoded_absmax(np.concatenate(self.absmax) - offset)
        return [
            ("absmax", 0, codes.tobytes()),
            ("nested_absmax", 0, outer.tobytes()),
            ("quant_state", 0, self.state(float(offset))),
            *self.same("quant_map", "nested_quant_map"),
        ]

    def encoded_absmax(self, absmax: Codes) -> tuple[Codes, Codes]:
        """Return the codes of absmax minus their mean, and the absmax of their blocks, all in float32."""
        import numpy as np

        block = self.parts.detail("nested")
        padded = np.pad(absmax, (0, -len(absmax) % block)).reshape(-1, block)
        outer = np.abs(padded).max(axis=1)
        scaled = (padded * (1 / np.where(outer == 0, 1, outer))[:, None]).clip(-1, 1)
        place = ((scaled + 1) * np.float32(0.5)).astype(np.float64) * (STEPS - 1) + 0.5
        codes = self.nested_codes()[place.astype(np.float32).astype(np.int32)]
        codes[outer == 0] = 0
        return codes.reshape(-1)[: len(absmax)], outer

    def nested_codes(self) -> Codes:
        """Return the codes of the steps from -1 to 1 to which bitsandbytes rounds first."""
        import numpy as np

        table = self.parts["nested_quant_map"].floats().astype(np.float32)
        steps = np.arange(STEPS, dtype=np.float32) / np.float32(STEPS - 1) * 2 - 1
        return np.searchsorted((table[1:] + table[:-1]) / 2, steps).astype(np.uint8)


class CrossingQuantizer(NestedQuantizer):
    """Encodes blocks that cross rows. All rows are shown first, so that calls come in order and begin with a block."""

    sees_all = True

    def see(self, rows: Numbers) -> None:
        pass


class Int8Quantizer(Quantizer):
    """Encodes like bitsandbytes: the weights in float16, then in float32 (int8_vectorwise_quant)."""

    def rows(self, start: int, rows: Numbers) -> tuple[Codes, list[Piece]]:
        import numpy as np

        from ...numerics.forms import F16

        half = self.rounded(rows, F16)
        absmax = np.abs(half).max(axis=1)
        factor = 1 / np.where(absmax == 0, 1, absmax) * np.float32(127)  # as torch has 127 / absmax
        codes = np.rint(half * factor[:, None]).astype(np.int8)
        marks = [("weight_format", 0, b"\0")] if start == 0 and self.parts.get("weight_format") else []
        return codes, [("scales", start * 4, absmax.tobytes()), *marks]


@lru_cache(8)
def _table(numbers: tuple[float, ...]) -> Levels:
    from ...numerics.code_levels import Table

    return Table(numbers, even=False)


def _shape(state: Mapping[str, Any], name: str) -> tuple[int, ...]:
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) < 2 or not all(type(size) is int and size > 0 for size in shape):
        raise Fault(f"{name} says the shape {shape}, which is not a matrix")
    return tuple(shape)


def _count(state: Mapping[str, Any], key: str, name: str) -> int:
    value = state.get(key)
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise Fault(f"{name} says the {key} {value}")
    return value


def _offset(state: Mapping[str, Any], name: str) -> float:
    value = state.get("nested_offset")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < BEYOND:
        raise Fault(f"{name} gives no number of float32 as the nested_offset")
    return float(value)
