"""List the module paths of known image models, so that kohya's flattened names can be read without a base.

A name whose dots became `_` cannot be split again by rule, because module names have `_` of their own. It is looked up
among the flattened paths of SD 1, 2, 3, SDXL, Flux and their text encoders, of which no two are alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from .image import DITS, FLUX_ATTENTION, RESNET, SGM_OUTSIDE, diffusers_to_sgm, sgm_to_diffusers

ATTENTION = [f"{a}.{x}" for a in ("attn1", "attn2") for x in ("to_q", "to_k", "to_v", "to_out.0")]


CLIP = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]


T5 = [f"layer.0.SelfAttention.{x}" for x in "qkvo"] + [f"layer.1.DenseReluDense.{x}" for x in ("wi_0", "wi_1", "wo")]


DEPTH, CLIP_LAYERS, T5_BLOCKS, DOUBLE_BLOCKS = 10, 32, 24, 19


# stem -> how many such blocks the largest model has
BLOCKS = {"double_blocks": DOUBLE_BLOCKS, "single_blocks": 38, "joint_blocks": 38}


def _unet() -> Iterator[str]:
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
    """Return the module paths of the UNets of SD 1, SD 2 and SDXL, in diffusers' names."""
    return frozenset(_unet())


@cache
def dit_paths(family: str) -> frozenset[str]:
    """Return the module paths of a transformer, a key of DITS, in its maker's names and in diffusers'."""
    dit = DITS[family]
    paths = [*dit.outside, *dit.outside.values(), *dit.swapped, *dit.swapped.values()]
    for maker_stem, stem, table in dit.blocks:
        for i in range(BLOCKS[maker_stem]):
            paths += [f"{maker_stem}.{i}.{name}" for name in table]
            paths += [f"{maker_stem}.{i}.{FLUX_ATTENTION}"] if "linear1" in table else []
            paths += [f"{stem}.{i}.{name}" for names in table.values() for name in names]
    return frozenset(paths)


@cache
def flattened() -> dict[str, str]:
    """Return flattened path -> path for the modules of denoisers and text encoders."""
    paths = [*unet_paths(), *(path for family in DITS for path in dit_paths(family))]
    paths += [path for each in unet_paths() for path in (diffusers_to_sgm(each), diffusers_to_sgm(each, False))]
    layers = [f"encoder.layers.{i}.{name}" for i in range(CLIP_LAYERS) for name in CLIP]
    paths += [*layers, *(f"text_model.{layer}" for layer in layers), "text_projection"]
    paths += [f"encoder.block.{i}.{name}" for i in range(T5_BLOCKS) for name in T5]
    return {path.replace(".", "_"): path for path in paths}


# last name of a UNet's convolution, in diffusers' names -> the size of its kernel
KERNELS = {"conv": 3, "conv1": 3, "conv2": 3, "conv_in": 3, "conv_out": 3, "conv_shortcut": 1}
PATCH_EMBEDDINGS = ("x_embedder.proj", "pos_embed.proj")  # SD 3's convolution


def kernel_of(family: str, path: str) -> tuple[int, ...]:
    """Return the kernel of a denoiser's module, which is empty for a linear layer.

    Defined by diffusers: `models/resnet.py`, `models/transformers/transformer_2d.py` (`use_linear_projection`, which SD
    1 does not set), `models/embeddings.py` (`PatchEmbed`).

    Args:
        path: in diffusers' names or the makers'.
    """
    if family in DITS:
        return (2, 2) if family == "sd3" and path in PATCH_EMBEDDINGS else ()
    last = sgm_to_diffusers(path).rpartition(".")[2]
    size = 1 if family == "sd1" and last in ("proj_in", "proj_out") else KERNELS.get(last, 0)
    return (size, size) if size else ()
