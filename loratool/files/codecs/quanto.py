"""Read and write optimum-quanto's weights: 8 bits with a scale for each output, and 4 or 2 bits in groups.

A layer's scales of inputs and outputs, which are 1 unless its activations are quantized, belong to its codes.

Source: optimum-quanto 0.2.7, tensor/qbytes.py, tensor/qbits.py, tensor/packed.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..dtypes import TensorSpec
from .codec import Fault, Parts, StoredWeight, Unclaimed
from .gptq import FLOATS
from .scaled import ScaledCodes, Scales

if TYPE_CHECKING:
    from ...numerics.code_levels import Levels
    from .codec import Wide
    from .packing import Packing

KEPT = ("input_scale", "output_scale")

GROUPS = (128, 96, 64, 32)  # the columns that a group may have; a row of which none is a part is one group


class QuantoInt8(ScaledCodes):
    """An integer times the scale of its output, or of the weight."""

    key = "quanto-int8"
    ends = (".weight._data",)
    code_dtypes = frozenset(("I8",))
    code = "int8"
    bits = 8

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        shape, scale = unclaimed.specs[name].shape, f"{path}.weight._scale"
        if scale not in unclaimed.specs or len(shape) < 2:
            return None
        if unclaimed.need(scale, *FLOATS).size not in (1, shape[0]):
            raise Fault(f"{scale} has {unclaimed.specs[scale].size} numbers, for {shape[0]} outputs")
        tensors = {"codes": name, "scales": scale, **_kept(path, unclaimed)}
        return StoredWeight(self, TensorSpec("F64", shape), tuple(tensors.values()), tuple(tensors))

    def packing(self, parts: Parts) -> Packing:
        from .packing import Plain

        return Plain(parts.weight.spec.shape[-1], self.code)

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import E4M3, E5M2, INT8

        levels: dict[str, Levels] = {"I8": INT8, "F8_E4M3": E4M3, "F8_E5M2": E5M2}
        return levels[parts.codes_spec.dtype]

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        import numpy as np

        spec, scale = parts.weight.spec, parts["scales"].floats()
        output = np.arange(start, stop) // (math.prod(spec.shape[1:]) // spec.shape[-1])
        return Scales(scale.reshape(1, 1) if len(scale) == 1 else scale[output][:, None], 0)


class QuantoFloat8(QuantoInt8):
    """A number of e4m3 or e5m2 times the scale of its output, or of the weight."""

    key = "quanto-float8"
    code_dtypes = frozenset(("F8_E4M3", "F8_E5M2"))
    code = "uint8"


class QuantoBits(ScaledCodes):
    """`code * scale - shift` with a float shift, or `(code - shift) * scale` with an integer, for each group of a row.

    Groups are the rows of a matrix, and the first bits of a byte are of its first rows. No tensor has the weight's
    shape: it follows from a bias, from groups that are rows, or from a convolution's kernel.
    """

    key = "quanto-bits"
    ends = (".weight._data._data",)
    code_dtypes = frozenset(("U8",))

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        scale, shift = f"{path}.weight._scale", f"{path}.weight._shift"
        stored, groups = unclaimed.specs[name].shape, unclaimed.need(scale, *FLOATS).size
        bits = next((bits for bits in (4, 2) if stored and -(-groups * bits // 8) == stored[0]), None)
        if bits is None or len(stored) < 2 or 0 in stored:
            raise Fault(f"{scale} has {groups} numbers, for {name} of {stored}")
        if unclaimed.need(shift, *FLOATS, "I8", "U8").size != groups:
            raise Fault(f"{shift} has {unclaimed.specs[shift].size} numbers, for {groups} groups")
        outputs, is_grouped = groups, len(stored) == 2 and stored[1] in GROUPS
        if is_grouped:
            outputs = unclaimed.specs[f"{path}.bias"].size if f"{path}.bias" in unclaimed.specs else 0
        if not outputs or groups % outputs:
            raise Fault(f"no tensor says its shape: {groups} groups of {stored[1]} are of a matrix of any such size")
        shape = (outputs, groups // outputs * stored[1]) if is_grouped else (groups, *stored[1:])
        shifts = "biases" if unclaimed.specs[shift].dtype in FLOATS else "zeros"
        tensors = {"codes": name, "scales": scale, shifts: shift, **_kept(path, unclaimed)}
        detail = {"bits": bits, "group": math.prod(stored[1:]), "stored": math.prod(stored)}
        return StoredWeight(self, TensorSpec("F64", shape), tuple(tensors.values()), tuple(tensors), detail)

    def packing(self, parts: Parts) -> Packing:
        from .packing import Interleaved

        (matrices, rows, columns), bits = parts.shape, parts.detail("bits")
        return Interleaved(matrices * rows, columns, bits, parts.detail("stored"), tuple(range(0, 8, bits)))

    def levels(self, parts: Parts) -> Levels:
        from ...numerics.code_levels import Integers

        return Integers(0, (1 << parts.detail("bits")) - 1)

    def scales(self, parts: Parts, start: int, stop: int) -> Scales:
        import numpy as np

        columns, group = parts.shape[2], parts.detail("group")
        of_group = np.arange(start * columns, stop * columns, min(group, columns)) // group
        numbers: dict[str, Wide] = {
            role: parts[role].floats()[of_group].reshape(stop - start, -1)
            for role in ("scales", "zeros", "biases")
            if parts.get(role)
        }
        bias = -numbers["biases"] if "biases" in numbers else None
        return Scales(numbers["scales"], min(group, columns), numbers.get("zeros"), bias)

    def check(self, parts: Parts) -> None:
        """Raise InputError for a nan or infinite scale or shift, or for bits that hold no code and are not 0."""
        super().check(parts)
        packing, rows = self.packing(parts), parts.shape[0] * parts.shape[1]
        if parts["codes"].spec.nbytes * 8 != parts.weight.spec.size * parts.detail("bits"):
            ((_, again),) = packing.places(0, packing.read(parts["codes"], 0, rows))
            if again != parts["codes"].integers().tobytes():
                raise parts.damaged("codes", "has bits beyond its codes")


def _kept(path: str, unclaimed: Unclaimed) -> dict[str, str]:
    return {end: f"{path}.{end}" for end in KEPT if f"{path}.{end}" in unclaimed.specs}
