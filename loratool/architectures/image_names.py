"""All module paths that adapters of known image models can have, so that flattened names can be read without a base.

A flattened name cannot be split by rule; it is looked up among those of SD 1, 2, 3, SDXL, Flux and their text encoders,
of which no two flatten to the same (formats.md 2.2 of our references).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from .image import DITS, FLUX_ATTENTION, RESNET, SGM_OUTSIDE, diffusers_to_sgm

ATTENTION = [f"{a}.{x}" for a in ("attn1", "attn2") for x in ("to_q", "to_k", "to_v", "to_out.0")]


CLIP = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]


T5 = [f"layer.0.SelfAttention.{x}" for x in "qkvo"] + [f"layer.1.DenseReluDense.{x}" for x in ("wi_0", "wi_1", "wo")]


DEPTH, CLIP_LAYERS, T5_BLOCKS, DOUBLE_BLOCKS = 10, 32, 24, 19


# How many blocks of each stem the largest has.
BLOCKS = {"double_blocks": DOUBLE_BLOCKS, "single_blocks": 38, "joint_blocks": 38}


def _unet() -> Iterator[str]:
    """In diffusers' names."""
    stems = [f"down_blocks.{i}" for i in range(4)] + [f"up_blocks.{i}" for i in range(4)] + ["mid_block"]
    for stem in stems:
        for j in range(3):
            yield from (f"{stem}.resnets.{j}.{name}" for name in RESNET.values() if "norm" not in name)
            attention = f"{stem}.attentions.{j}"
            yield from (f"{attention}.{name}" for name in ("proj_in", "proj_out"))
            for t in range(DEPTH):
                block = f"{attention}.transformer_blocks.{t}"
                yield from (f"{block}.{name}" for name in (*ATTENTION, "ff.net.0.proj", "ff.net.2"))
        yield from (f"{stem}.{name}.0.conv" for name in ("downsamplers", "upsamplers"))
    yield from (name for name in SGM_OUTSIDE.values() if "norm" not in name)


@cache
def unet_paths() -> frozenset[str]:
    """Of SD 1, SD 2 and SDXL, in diffusers' names."""
    return frozenset(_unet())


@cache
def dit_paths(family: str) -> frozenset[str]:
    """Of a key of DITS, both in its own and in diffusers' names."""
    dit = DITS[family]
    paths = [*dit.outside, *dit.outside.values(), *dit.swapped, *dit.swapped.values()]
    for own, other, table in dit.blocks:
        for i in range(BLOCKS[own]):
            paths += [f"{own}.{i}.{name}" for name in table]
            paths += [f"{own}.{i}.{FLUX_ATTENTION}"] if "linear1" in table else []
            paths += [f"{other}.{i}.{name}" for names in table.values() for name in names]
    return frozenset(paths)


@cache
def flattened() -> dict[str, str]:
    """Flattened path -> path, of denoisers and text encoders."""
    paths = [*unet_paths(), *(path for family in DITS for path in dit_paths(family))]
    paths += [path for each in unet_paths() for path in (diffusers_to_sgm(each), diffusers_to_sgm(each, False))]
    layers = [f"encoder.layers.{i}.{name}" for i in range(CLIP_LAYERS) for name in CLIP]
    paths += [*layers, *(f"text_model.{layer}" for layer in layers), "text_projection"]
    paths += [f"encoder.block.{i}.{name}" for i in range(T5_BLOCKS) for name in T5]
    return {path.replace(".", "_"): path for path in paths}
