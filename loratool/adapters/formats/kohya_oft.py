"""Name the parts of kohya's OFT of Flux, which rotates the outputs of q, k, v and the MLP each for itself.

Tensors are `oft_unet_<module>.oft_blocks.<part>` (k, b, b), with one alpha for all parts of a module, which bounds each
part by its own outputs. A fused module has three or four parts, any other one. Defined by kohya-ss/sd-scripts:
`networks/oft_flux.py`. A part gets the name that the same rows have in diffusers.
"""

from __future__ import annotations

import re

from ...errors import InputError

PART = re.compile(r"(oft_unet_\w+)\.oft_blocks\.([0-9])")
# fused module -> its parts, {} being the block's number
FUSED = {
    "oft_unet_double_blocks_{}_img_attn_qkv": [f"oft_unet_transformer_blocks_{{}}_attn_to_{x}" for x in "qkv"],
    "oft_unet_double_blocks_{}_txt_attn_qkv": [f"oft_unet_transformer_blocks_{{}}_attn_add_{x}_proj" for x in "qkv"],
    "oft_unet_single_blocks_{}_linear1": [
        f"oft_unet_single_transformer_blocks_{{}}_{x}" for x in ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp")
    ],
}


def named_parts(modules: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Return modules with their tensors by role, a fused one as its parts.

    Args:
        modules: path -> role -> tensor, and the role of a part is its number.

    Raises:
        InputError: a part is missing.
    """
    named = {}
    for module, roles in modules.items():
        numbers = {role for role in roles if role.isdigit()}
        if not numbers:
            named[module] = roles
            continue
        block = re.search("_([0-9]+)_", module)
        parts = FUSED.get(module.replace(block[0], "_{}_", 1), [module]) if block else [module]
        if numbers != {str(k) for k in range(len(parts))}:
            have = ", ".join(sorted(numbers))
            raise InputError(f"has the parts {have} of oft_blocks, and not {len(parts)} from 0 on", culprit=module)
        rest = {role: tensor for role, tensor in roles.items() if role not in numbers}
        for k, part in enumerate(parts):
            named[part.format(block[1] if block else "")] = {"oft_blocks": roles[str(k)], **rest}
    return named
