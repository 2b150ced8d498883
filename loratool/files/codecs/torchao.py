"""Read and write the int8 and float8 weights of torchao's safetensors files, which the metadata describe.

The codes of X.weight are X._weight_qdata; its other tensors have the same prefix. The metadata have its class and block
size by its name. Other classes of torchao are not read: they have the layout of one kernel, or fewer bits.

Source: torchao, prototype/safetensors/safetensors_support.py; quantization/quantize_/workflows/int8 and float8.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

from ..dtypes import TensorSpec
from .blocks import BlockCodes, block_of
from .codec import Fault, StoredWeight, Unclaimed
from .quantized import Blocks

OTHERS = ("_act_quant_scale", "_act_quant_zero_point")  # of inputs; copied with the codes

COLUMN_SCALE = "_act_pre_scale"  # a factor of the inputs, so it belongs to the weight's meaning


class TorchaoInt8(BlockCodes):
    """A number is (integer - zero point) * scale, with the scale of its block."""

    key = "torchao-int8"
    kind: ClassVar[str] = "Int8Tensor"  # torchao's class
    ends = ("_qdata",)
    code_dtypes = frozenset(("I8",))
    code = "int8"
    bits = 8

    def weight_name(self, path: str, end: str) -> str:
        module, _, parameter = path.rpartition("._")
        return f"{module}.{parameter}"

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        shape = unclaimed.specs[name].shape
        if "._" not in path or len(shape) < 2:
            return None
        described = _described(self.weight_name(path, self.ends[0]), unclaimed)
        if described.get("_type") != self.kind:
            return None
        if path + COLUMN_SCALE in unclaimed.specs:
            raise Fault(f"{path + COLUMN_SCALE} is beside it, and weights with one are not read")
        scale = unclaimed.need(f"{path}_scale", "F32", "F16", "BF16")
        tensors = {"codes": name, "scales": f"{path}_scale"}
        if f"{path}_zero_point" in unclaimed.specs:
            unclaimed.shaped(f"{path}_zero_point", scale.shape)
            tensors["zeros"] = f"{path}_zero_point"
        tensors.update((end[1:], path + end) for end in OTHERS if path + end in unclaimed.specs)
        block = block_of(shape, scale, f"{path}_scale", _stated(described, shape))
        spec = TensorSpec("F64", shape)
        return StoredWeight(self, spec, tuple(tensors.values()), tuple(tensors), {"block": block})


class TorchaoFloat8(TorchaoInt8):
    """Codes of e4m3 or e5m2 times the scale of their block."""

    key = "torchao-float8"
    kind = "Float8Tensor"
    code_dtypes = frozenset(("F8_E4M3", "F8_E5M2"))
    code = "uint8"


def _described(weight: str, unclaimed: Unclaimed) -> dict[str, Any]:
    """Return the class and fields of a weight from the metadata, by its name.

    Raises:
        Fault: the metadata do not have them; torchao could not read the file either.
    """
    try:
        described = json.loads(unclaimed.metadata[weight.removeprefix(unclaimed.prefix)])
    except (KeyError, ValueError, RecursionError) as error:
        raise Fault(f"the file's metadata do not say what {weight} is") from error
    return described if isinstance(described, dict) else {}


def _stated(described: dict[str, Any], shape: tuple[int, ...]) -> Blocks:
    """Return the block in the metadata; none if they have no block of a matrix."""
    data = described.get("_data")
    block = data.get("block_size") if isinstance(data, dict) else None
    if not isinstance(block, list) or len(block) != len(shape) or not all(type(x) is int and x > 0 for x in block):
        return ()
    return ((block[-2], block[-1]),)
