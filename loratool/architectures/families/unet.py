"""Convert module paths of a UNet between sgm's and diffusers' numbering, by arithmetic instead of a table.

The UNet has two layers per block, as in SD 1, SD 2 and SDXL. Sources: diffusers `loaders/lora_conversion_utils.py`,
kohya-ss/sd-scripts `library/sdxl_model_util.py`, ComfyUI `comfy/utils.py` (unet_to_diffusers).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache

# sgm's names within a residual block -> diffusers'
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}

SGM_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}

# names of its convolutions in diffusers (`models/resnet.py`, `downsampling.py`, `upsampling.py`) -> size of the kernel
KERNELS = {
    **dict.fromkeys(("conv", "conv1", "conv2", "conv_in", "conv_out"), (3, 3)),
    "conv_shortcut": (1, 1),
}

# diffusers' names of a block's attentions and of a layer in them, and of the block's norms
ATTENTION = tuple(f"{a}.{x}" for a in ("attn1", "attn2") for x in ("to_q", "to_k", "to_v", "to_out.0"))
NORMS = ("norm1", "norm2", "norm3")

LEVELS, DEPTH = 4, 10  # the largest numbers in a UNet

# Prefixes of diffusers' paths of a UNet's modules
STEMS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_")


def sgm_to_diffusers(path: str) -> str:
    """Return diffusers' path of a UNet's module from sgm's; an unknown path is returned unchanged.

    The UNet has two layers per block, as in SD 1, SD 2 and SDXL.
    """
    for sgm, diffusers in SGM_OUTSIDE.items():
        if path == sgm:
            return diffusers
    block = re.fullmatch(r"(input|output)_blocks\.(\d{1,9})\.(\d{1,9})\.(.+)", path)
    middle = re.fullmatch(r"middle_block\.([012])\.(.+)", path)
    if middle:
        stem = ("resnets.0", "attentions.0", "resnets.1")[int(middle[1])]
        return f"mid_block.{stem}.{RESNET.get(middle[2], middle[2]) if stem[0] == 'r' else middle[2]}"
    shortcut = re.fullmatch(r"(input|output)_blocks\.(\d{1,9})\.(\d{1,9})", path)
    if not block and not shortcut:
        return path
    side, number, inner, rest = block.groups() if block else (*shortcut.groups(), "")  # type: ignore[union-attr]
    i, j = divmod(int(number) - (side == "input"), 3)
    stem = "down_blocks" if side == "input" else "up_blocks"
    if rest == "op":
        return f"{stem}.{i}.downsamplers.0.conv"
    if rest == "conv" and inner in "12":
        return f"{stem}.{i}.upsamplers.0.conv"
    if inner == "0":
        return f"{stem}.{i}.resnets.{j}.{RESNET.get(rest, rest)}"
    return f"{stem}.{i}.attentions.{j}.{rest}"


def diffusers_to_sgm(path: str, attends: bool = True) -> str:
    """Return sgm's path of a UNet's module from diffusers'; an unknown path is returned unchanged.

    attends: the blocks of an upsampler have attention; sgm's number of the upsampler depends on it.
    """
    for sgm, diffusers in SGM_OUTSIDE.items():
        if path == diffusers:
            return sgm
    resnet = {diffusers: sgm for sgm, diffusers in RESNET.items()}
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.([01])\.(.+)", path)
    if middle:
        number = 1 if middle[1] == "attentions" else 2 * int(middle[2])
        return f"middle_block.{number}.{resnet.get(middle[3], middle[3]) if middle[1] == 'resnets' else middle[3]}"
    block = re.fullmatch(
        r"(down|up)_blocks\.(\d{1,9})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,9})\.(.+)", path
    )
    if not block:
        return path
    side, kind, rest = block[1], block[3], block[5]
    level, layer = int(block[2]), int(block[4])
    if kind == "downsamplers":
        return f"input_blocks.{3 * (level + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.{2 if attends else 1}.conv"
    stem = f"input_blocks.{3 * level + layer + 1}" if side == "down" else f"output_blocks.{3 * level + layer}"
    return f"{stem}.0.{resnet.get(rest, rest)}" if kind == "resnets" else f"{stem}.1.{rest}"


def attention_stems(up_attention: Sequence[bool]) -> list[str]:
    """Return diffusers' paths of a UNet's attentions, on the way down, on the way up, and in the middle."""
    down = [f"down_blocks.{i}.attentions.{j}" for i, has in enumerate(reversed(up_attention)) if has for j in range(2)]
    up = [f"up_blocks.{i}.attentions.{j}" for i, has in enumerate(up_attention) if has for j in range(3)]
    return [*down, *up, "mid_block.attentions.0"]


@cache
def unet_paths() -> frozenset[str]:
    """Return the module paths of the UNets of SD 1, SD 2 and SDXL, in diffusers' names."""
    return frozenset(_paths())


def _paths() -> Iterator[str]:
    sides = (("down_blocks", 2, "downsamplers"), ("up_blocks", 3, "upsamplers"))
    stems = [(f"{side}.{i}", layers, layers) for side, layers, _ in sides for i in range(LEVELS)]
    for stem, resnets, attentions in (*stems, ("mid_block", 2, 1)):
        for j in range(resnets):
            yield from (f"{stem}.resnets.{j}.{name}" for name in RESNET.values())
        for j in range(attentions):
            attention = f"{stem}.attentions.{j}"
            yield from (f"{attention}.{name}" for name in ("norm", "proj_in", "proj_out"))
            for t in range(DEPTH):
                block = f"{attention}.transformer_blocks.{t}"
                yield from (f"{block}.{name}" for name in (*ATTENTION, *NORMS, "ff.net.0.proj", "ff.net.2"))
    yield from (f"{side}.{i}.{name}.0.conv" for side, _, name in sides for i in range(LEVELS))
    yield from SGM_OUTSIDE.values()
