"""How a quantized checkpoint is recognized: by its config, or by the tensors that stand beside the codes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# the end of a tensor's name -> the method that writes it
MARKERS = {
    ".SCB": "bitsandbytes int8",
    ".absmax": "bitsandbytes 4-bit",
    ".quant_map": "bitsandbytes 4-bit",
    ".weight_scale_inv": "fp8 blocks",
    ".weight_scale": "compressed-tensors or fp8",
    ".weight_packed": "compressed-tensors",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    "_proj_blocks": "mxfp4",
    ".scales": "GPTQ, AWQ or MLX",
}


def quantization(names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """The method's name, or None for a plain checkpoint."""
    for part in (config, config.get("text_config")):
        declared = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(declared, Mapping):
            return str(declared.get("quant_method", "unnamed"))
    ends = tuple(MARKERS)
    for name in names:
        if name.endswith(ends):
            return next(method for end, method in MARKERS.items() if name.endswith(end))
    return None
