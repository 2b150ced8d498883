"""All module paths that adapters of known image models can have, so that flattened names can be read without a base.

A flattened name cannot be split by rule; it is looked up among those of SD 1, SD 2, SDXL, Flux and their text encoders,
of which no two flatten to the same (formats.md 2.2 of our references).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from .image import DOUBLE, FLUX_OUTSIDE, FLUX_SWAPPED, RESNET, SGM_OUTSIDE, SINGLE, diffusers_to_sgm

ATTENTION = [f"{a}.{x}" for a in ("attn1", "attn2") for x in ("to_q", "to_k", "to_v", "to_out.0")]
CLIP = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
T5 = [f"layer.0.SelfAttention.{x}" for x in "qkvo"] + [f"layer.1.DenseReluDense.{x}" for x in ("wi_0", "wi_1", "wo")]
DEPTH, CLIP_LAYERS, T5_BLOCKS, DOUBLE_BLOCKS, SINGLE_BLOCKS = 10, 32, 24, 19, 38


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


def _flux() -> Iterator[str]:
    """Both in Black Forest Labs' and in diffusers' names."""
    for own, other, table, count in (
        ("double_blocks", "transformer_blocks", DOUBLE, DOUBLE_BLOCKS),
        ("single_blocks", "single_transformer_blocks", SINGLE, SINGLE_BLOCKS),
    ):
        for i in range(count):
            yield from (f"{own}.{i}.{name}" for name in table)
            yield from (f"{other}.{i}.{name}" for names in table.values() for name in names)
    for outside in (FLUX_OUTSIDE, FLUX_SWAPPED):
        yield from outside
        yield from outside.values()


@cache
def flattened() -> dict[str, str]:
    """Flattened path -> path, of denoisers and text encoders."""
    paths = [*_unet(), *_flux()]
    paths += [path for each in _unet() for path in (diffusers_to_sgm(each), diffusers_to_sgm(each, False))]
    layers = [f"encoder.layers.{i}.{name}" for i in range(CLIP_LAYERS) for name in CLIP]
    paths += [*layers, *(f"text_model.{layer}" for layer in layers), "text_projection"]
    paths += [f"encoder.block.{i}.{name}" for i in range(T5_BLOCKS) for name in T5]
    return {path.replace(".", "_"): path for path in paths}
