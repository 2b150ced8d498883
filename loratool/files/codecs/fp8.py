"""Read and write float8 with scales of blocks (DeepSeek-V3), groups, rows, a complete tensor, or stacked experts.

Files of one format differ in the names of the tensors beside the codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..dtypes import TensorSpec
from .blocks import BlockCodes, block_of, contradiction, refuse_column_scales
from .codec import Fault, Parts, Quantizer, StoredWeight, Unclaimed
from .comfy import layer_config

if TYPE_CHECKING:
    pass

# Suffixes of the scales' name after the weight's path: DeepSeek-V3 and transformers; compressed-tensors, modelopt,
# fbgemm and ComfyUI; Mistral; DeepSeek-V4; ComfyUI's old files
SCALES = (".weight_scale_inv", ".weight_scale", ".qscale_weight", ".scale", ".scale_weight")

# After the name of a parameter that is not a module, such as gate_up_proj of experts
STACKED = ("_scale_inv", "_scale", "_weight_scale")

# Suffixes of other companions, which are copied: scales of inputs, ComfyUI's description
KEPT = ("input_scale", "input_scale_inv", "activation_scale", "qscale_act", "scale_input", "comfy_quant")

E8M0 = ("F8_E8M0", "U8")

SCALE_TYPES = ("F32", "F16", "BF16", *E8M0)

COMFY_TYPES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}  # ComfyUI's name of a format -> of the codes


class Fp8(BlockCodes):
    """Codes of e4m3 or e5m2; a number is (value of the code - zero point) * scale; few have a zero point.

    Sources: transformers, integrations/finegrained_fp8.py and fbgemm_fp8.py; compressed-tensors,
    compressors/naive_quantized; ComfyUI, comfy/ops.py and `convert_old_quants` of comfy/utils.py.
    """

    key = "fp8"
    ends = (".weight", "")
    code_dtypes = frozenset(("F8_E4M3", "F8_E5M2"))
    bits = 8

    def weight_name(self, path: str, end: str) -> str:
        return path + end

    def claim(self, path: str, name: str, unclaimed: Unclaimed) -> StoredWeight | None:
        spec, dot = unclaimed.specs[name], "_" if path == name else "."
        ends = STACKED if path == name else SCALES
        config = layer_config(path, unclaimed)
        if config is not None and COMFY_TYPES.get(str(config.get("format"))) != spec.dtype:
            return None
        scales = [scale_name for end in unclaimed.present(ends) if (scale_name := path + end) in unclaimed.specs]
        if config is not None and not scales:
            raise Fault(f"{path}.weight_scale is missing beside it")
        if not scales or len(spec.shape) < 2:
            return None
        if len(scales) > 1:
            raise Fault(f"{scales[0]} and {scales[1]} are both beside it")
        refuse_column_scales(path, unclaimed)
        scale = unclaimed.need(scales[0], *SCALE_TYPES)
        is_transposed = unclaimed.declared.get("quant_method") == "fbgemm_fp8"
        block = block_of(spec.shape, scale, scales[0], unclaimed.blocks, is_transposed)
        tensors = {"codes": name, "scales": scales[0]}
        if path + ".weight_zero_point" in unclaimed.specs:
            unclaimed.shaped(path + ".weight_zero_point", scale.shape)
            tensors["zeros"] = path + ".weight_zero_point"
        tensors |= {
            end: scale_name for end in unclaimed.present(KEPT) if (scale_name := path + dot + end) in unclaimed.specs
        }
        return StoredWeight(
            self,
            TensorSpec("F64", spec.shape),
            tuple(tensors.values()),
            tuple(tensors),
            {"block": block, "power_of_two": scale.dtype in E8M0 or unclaimed.declared.get("scale_fmt") == "ue8m0"},
            contradiction(block, unclaimed.blocks),
        )

    def quantizer(self, parts: Parts) -> Quantizer | None:
        """Return a quantizer if there are no zero points; power-of-two scales only in the rule of transformers."""
        from .fp8_fresh import INVERSE, Fp8Quantizer, Fp8Whole

        is_rounded = parts.detail("power_of_two") and not parts["scales"].name.endswith(INVERSE)
        if is_rounded or parts.get("zeros") or parts.codes_spec.dtype != "F8_E4M3":
            return None
        return Fp8Quantizer(parts) if parts.detail("block")[0] else Fp8Whole(parts)
