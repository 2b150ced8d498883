"""Map every name of an image model's module to rows of the base's tensors.

A module has a component (`unet` for any denoiser, `text_encoder`, `text_encoder_2`, ...) and a path in it. The path is
accepted in every naming: sgm's and diffusers' of a UNet, the maker's and diffusers' of Flux and SD 3, Hugging Face's
of an OpenCLIP. If one naming fuses what the other splits, a name means rows of one tensor or of several.
Sources: diffusers `loaders/lora_conversion_utils.py`, kohya-ss/sd-scripts `library/sdxl_model_util.py`, ComfyUI
`comfy/utils.py` (unet_to_diffusers).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


# Prefix of a tensor's name in a single file -> its component and the naming of the rest; longest first.
PREFIXES = {
    "conditioner.embedders.0.transformer.": ("text_encoder", "clip"),
    "conditioner.embedders.1.model.": ("text_encoder_2", "openclip"),
    "conditioner.embedders.0.model.": ("text_encoder", "openclip"),
    "cond_stage_model.transformer.": ("text_encoder", "clip"),
    "cond_stage_model.model.": ("text_encoder", "openclip"),
    "text_encoders.clip_l.transformer.": ("text_encoder", "clip"),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", "clip"),
    "text_encoders.t5xxl.transformer.": ("text_encoder_3", "t5"),
    "model.diffusion_model.": ("unet", ""),
}


# Folder of a diffusers pipeline, before the slash in a tensor's name -> component; no adapter targets the VAE.
FOLDERS = {
    "unet": "unet",
    "transformer": "unet",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
}


# A string that tensor names of a model contain -> the kind of that model, whatever prefix is before it.
MARKS = {
    "input_blocks.": "sgm",
    "double_blocks.": "flux",
    "joint_blocks.": "sd3",
    "down_blocks.": "unet",
    "single_transformer_blocks.": "flux-diffusers",
    "norm1_context.": "sd3-diffusers",
    "text_model.encoder.layers.": "clip",
    "embeddings.token_embedding.": "clip",  # transformers 5 has no `text_model.` before it
}


# A name in the single files of other transformers, in the maker's naming -> the model. Without a conversion no loader
# applies an adapter under these names.
MAKERS = {
    "blocks.0.cross_attn.q_linear.weight": "Sana",
    "blocks.0.cross_attn.kv_linear.weight": "PixArt",
    "blocks.0.mlp.layer1.weight": "Cosmos-Predict2",
    "blocks.block0.blocks.0.block.attn.to_q.0.weight": "Cosmos",
    "double_layers.0.attn.w1q.weight": "AuraFlow",
    "embed_image_indicator.weight": "Ideogram 4",
    "head.modulation": "Wan",
    "layers.0.attention.qkv.weight": "Z-Image or Lumina 2",
    "mixins.adaln.adaln_modules.0.1.weight": "CogView 4",
    "mixins.adaln_layer.adaLN_modulations.0.1.weight": "CogVideoX",
    "mlp_t5.0.weight": "Hunyuan-DiT",
    "patchify_proj.weight": "LTX",
    "t5_yproj.weight": "Mochi",
    "time_token.mlp.0.weight": "OmniGen",
    "txtfusion.projector.weight": "Krea 2",
    "video_patch_proj.weight": "MiniMax H3",
}


# Prefixes that single files of all kinds put before a denoiser's names.
SINGLE_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.")


# As MARKS, for a text encoder in a folder of a pipeline.
TEXT_MARKS = {"encoder.layers.": "clip", "encoder.block.": "t5"}


CLIP_STARTS = ("text_model.", "embeddings.token_embedding.")  # prefixes in a file that is a CLIP alone


# Prefix of an adapter's module -> its component. After kohya's prefixes the path is flattened.
ADAPTER_PREFIXES = {
    "lora_unet_": "unet",
    "lora_unet_unet_": "unet",  # in published files that were converted wrong: no module's path begins with unet
    "lora_transformer_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "unet.": "unet",
    "transformer.": "unet",
    "diffusion_model.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}


_LONGEST_FIRST = sorted(ADAPTER_PREFIXES, key=len, reverse=True)


# A name in `ADAPTER:0.8,te=0.4` -> the components that it weighs; the later, narrower name wins.
WEIGHED = {
    "unet": ("unet",),
    "te": ("text_encoder", "text_encoder_2", "text_encoder_3"),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
    "te3": ("text_encoder_3",),
}


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


# A name in an OpenCLIP layer -> Hugging Face's, one for each equal slice of its rows
OPENCLIP = {
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.out_proj",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
}


# The maker's names in a block of Flux -> diffusers', one for each slice of its rows
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}


SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}


FLUX_ATTENTION = "linear1_qkv"  # the name that XLabs and ComfyUI give the q, k and v rows of linear1, its first


FLUX_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}


# diffusers stores scale before shift and the maker shift before scale: the halves of the rows are swapped.
FLUX_SWAPPED = {"final_layer.adaLN_modulation.1": "norm_out.linear"}


# The maker's names in a block of SD 3 and 3.5 -> diffusers'
JOINT = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}


SD3_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "context_embedder": "context_embedder",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}


# In the last block this has only a shift and a scale, with the halves swapped.
SD3_LAST = "context_block.adaLN_modulation.1"


@dataclass(frozen=True)
class Dit:
    """The maker's names of a diffusion transformer beside diffusers'."""

    blocks: tuple[tuple[str, str, Mapping[str, tuple[str, ...]]], ...]  # maker's stem, diffusers' stem, names in it
    outside: Mapping[str, str]  # maker's name -> diffusers', outside the blocks
    swapped: Mapping[str, str]  # as outside, with the halves of the rows swapped


# Their files by kohya have diffusers' names, and their UNet has four levels, the innermost without attention.
FIRST = ("sd1", "sd2")


DITS = {
    "flux": Dit(
        (("double_blocks", "transformer_blocks", DOUBLE), ("single_blocks", "single_transformer_blocks", SINGLE)),
        FLUX_OUTSIDE,
        FLUX_SWAPPED,
    ),
    "sd3": Dit((("joint_blocks", "transformer_blocks", JOINT),), SD3_OUTSIDE, FLUX_SWAPPED),
}


@dataclass(frozen=True)
class ModuleRows:
    """Rows of a tensor that are rows of a module."""

    tensor: str
    start: int  # rows [start, stop) of the tensor
    stop: int
    skip: int  # the module's row that `start` is
    whole: int  # how many rows the module has


Modules = dict[tuple[str, str], tuple[ModuleRows, ...]]


def image_modules(shapes: Mapping[str, Shape]) -> Modules:
    """Return (component, path) -> rows for every module under every name; empty if the base is not an image model.

    A name that two namings use for different modules means the module that the base itself calls so.

    Args:
        shapes: tensor -> shape of the base.
    """
    found: Modules = {}
    folders = tuple(f"{folder}/" for folder in FOLDERS)
    if not any(name.startswith(folders) or any(mark in name for mark in MARKS) for name in shapes):
        return found
    aliases: list[tuple[tuple[str, str], tuple[ModuleRows, ...]]] = []
    weights = list(_split(shapes))
    for component, kind, path, name in weights:
        rows = shapes[name][0]
        found[component, path] = (ModuleRows(name, 0, rows, 0, rows),)
        aliases += [((component, alias), where) for alias, where in _aliases(kind, path, name, shapes[name])]
        if kind == "t5":  # kohya counts it third, a Flux pipeline second
            aliases += [((other, path), found[component, path]) for other in ("text_encoder_2", "text_encoder_3")]
    aliases += _fused(found, {kind for _, kind, _, _ in weights}, shapes)
    for key, where in aliases:
        found.setdefault(key, where)
    return found


def image_parts(shapes: Mapping[str, Shape]) -> dict[str, tuple[str, str]]:
    """Return tensor -> (component, path), in the base's naming, for every weight that an adapter can change.

    Empty if the base is not an image model.
    """
    if not any(mark in name for name in shapes for mark in MARKS):
        return {}
    return {name: (component, path) for component, _, path, name in _split(shapes)}


def component_of(module: str) -> tuple[str | None, str]:
    """Split an adapter's module into the component that its prefix names, None without one, and its path there."""
    for prefix in _LONGEST_FIRST:
        if module.startswith(prefix):
            return ADAPTER_PREFIXES[prefix], module.removeprefix(prefix)
    return None, module


def weighed_component(module: str) -> str | None:
    """Return the component whose weight applies to a module; None if neither prefix nor path tells it."""
    component, path = component_of(module)
    kind = next((kind for mark, kind in MARKS.items() if mark in path), None)
    return component or ("text_encoder" if kind == "clip" else "unet" if kind else None)


def spell_weight(weight: float, components: Mapping[str, float]) -> str:
    """Format a weight as the command line takes it: `0.8`, `0.8,te1=0.4`."""
    names = {listed[0]: name for name, listed in WEIGHED.items() if len(listed) == 1}
    return ",".join([f"{weight:g}", *(f"{names[each]}={value:g}" for each, value in sorted(components.items()))])


def _split(shapes: Mapping[str, Shape]) -> Iterable[tuple[str, str, str, str]]:
    """Yield (component, kind, path, tensor) for every weight whose module can have an adapter."""
    modules = {
        name: name.removesuffix(".weight").removesuffix("_weight")
        for name, shape in shapes.items()
        if name.endswith("weight") and len(shape) > 1 and not name.startswith("first_stage_model.")
    }
    if any("/" in name for name in modules):
        for folder, component in FOLDERS.items():
            in_folder = [name for name in modules if name.startswith(f"{folder}/")]
            marks = MARKS if component == "unet" else TEXT_MARKS
            kind = next((kind for mark, kind in marks.items() if any(mark in name for name in in_folder)), "")
            for name in in_folder:
                yield component, kind, modules[name].removeprefix(f"{folder}/"), name
        return
    has_prefixes = any(name.startswith(tuple(PREFIXES)) for name in shapes)
    kinds = {kind for mark, kind in MARKS.items() if any(mark in name for name in shapes)}
    if not kinds or (not has_prefixes and kinds == {"clip"} and not any(n.startswith(CLIP_STARTS) for n in shapes)):
        return
    denoiser = next((kind for kind in MARKS.values() if kind in kinds and kind != "clip"), "clip")
    for name, path in modules.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix:
            component, kind = PREFIXES[prefix]
            yield component, kind or denoiser, path.removeprefix(prefix), name
        elif not has_prefixes:
            yield ("text_encoder" if denoiser == "clip" else "unet"), denoiser, path, name


def _aliases(kind: str, path: str, name: str, shape: Shape) -> Iterable[tuple[str, tuple[ModuleRows, ...]]]:
    """Yield the other names of a module, each with the rows of tensor `name` that it means."""
    rows = shape[0]
    all_rows = (ModuleRows(name, 0, rows, 0, rows),)
    if kind == "sgm":
        yield sgm_to_diffusers(path), all_rows
    elif kind == "clip":
        plain = path.removeprefix("text_model.")
        yield plain, all_rows
        yield f"text_model.{plain}", all_rows
    elif kind == "openclip":
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", path)
        names = OPENCLIP.get(layer[2], ()) if layer else ()
        for i, alias in enumerate(names):
            size = rows // len(names)
            where = (ModuleRows(name, i * size, (i + 1) * size, 0, size),)
            yield f"text_model.encoder.layers.{layer[1] if layer else ''}.{alias}", where
            yield f"encoder.layers.{layer[1] if layer else ''}.{alias}", where
    elif kind in DITS:
        yield from _dit_aliases(DITS[kind], path, name, shape)
    elif kind == "unet":
        yield diffusers_to_sgm(path), all_rows
        yield diffusers_to_sgm(path, False), all_rows


def _dit_aliases(dit: Dit, path: str, name: str, shape: Shape) -> Iterable[tuple[str, tuple[ModuleRows, ...]]]:
    rows, width = shape[0], shape[1]
    if path in dit.outside:
        yield dit.outside[path], (ModuleRows(name, 0, rows, 0, rows),)
    if path in dit.swapped:
        yield dit.swapped[path], _swapped(name, rows)
    for maker_stem, stem, table in dit.blocks:
        block = re.fullmatch(rf"{maker_stem}\.(\d+)\.(.+)", path)
        names = table.get(block[2], ()) if block else ()
        if not block or not names:
            continue
        if block[2] == SD3_LAST and rows == 2 * width:
            yield f"{stem}.{block[1]}.{names[0]}", _swapped(name, rows)
            continue
        sizes = [width] * 3 + [rows - 3 * width] if len(names) == 4 else [rows // len(names)] * len(names)
        start = 0
        for alias, size in zip(names, sizes, strict=True):
            yield f"{stem}.{block[1]}.{alias}", (ModuleRows(name, start, start + size, 0, size),)
            start += size
        if block[2] == "linear1":
            yield path.replace("linear1", FLUX_ATTENTION), (ModuleRows(name, 0, 3 * width, 0, 3 * width),)


def _swapped(name: str, rows: int) -> tuple[ModuleRows, ...]:
    """Return all rows of a tensor with its halves swapped."""
    half = rows // 2
    return ModuleRows(name, 0, half, half, rows), ModuleRows(name, half, rows, 0, rows)


def _fused(
    found: Modules, kinds: set[str], shapes: Mapping[str, Shape]
) -> Iterable[tuple[tuple[str, str], tuple[ModuleRows, ...]]]:
    """Yield the maker's names with their rows, for a base that has diffusers' split modules."""
    paths = [path for component, path in found if component == "unet"]
    for dit in (dit for kind, dit in DITS.items() if f"{kind}-diffusers" in kinds):
        for maker_stem, stem, table in dit.blocks:
            for number in sorted({int(m[1]) for path in paths if (m := re.match(rf"{stem}\.(\d+)\.", path))}):
                for maker_name, names in table.items():
                    split = [found.get(("unet", f"{stem}.{number}.{name}")) for name in names]
                    rows = _joined(split) if all(split) else ()
                    if rows and maker_name == SD3_LAST and rows[0].whole == 2 * shapes[rows[0].tensor][1]:
                        rows = _swapped(rows[0].tensor, rows[0].whole)
                    if rows:
                        yield ("unet", f"{maker_stem}.{number}.{maker_name}"), rows
        for maker_name, name in dit.outside.items():
            if ("unet", name) in found:
                yield ("unet", maker_name), found["unet", name]
        for maker_name, name in dit.swapped.items():
            for each in found.get(("unet", name), ()):
                yield ("unet", maker_name), _swapped(each.tensor, each.stop)


def _joined(modules: Iterable[tuple[ModuleRows, ...] | None]) -> tuple[ModuleRows, ...]:
    """Return the rows of the module that `modules` are split from, in their order."""
    every = [rows for module in modules for rows in module or ()]
    total = sum(rows.stop - rows.start for rows in every)
    fused, skip = [], 0
    for rows in every:
        fused.append(ModuleRows(rows.tensor, rows.start, rows.stop, skip, total))
        skip += rows.stop - rows.start
    return tuple(fused)


def sgm_to_diffusers(path: str) -> str:
    """Return diffusers' path of a UNet's module from sgm's; an unknown path is returned unchanged.

    The UNet has two layers per block, as in SD 1, SD 2 and SDXL.
    """
    for sgm, diffusers in SGM_OUTSIDE.items():
        if path == sgm:
            return diffusers
    block = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", path)
    middle = re.fullmatch(r"middle_block\.([012])\.(.+)", path)
    if middle:
        stem = ("resnets.0", "attentions.0", "resnets.1")[int(middle[1])]
        return f"mid_block.{stem}.{RESNET.get(middle[2], middle[2]) if stem[0] == 'r' else middle[2]}"
    shortcut = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)", path)
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

    attends: whether the blocks of an upsampler have attention, on which sgm's number of the upsampler depends.
    """
    for sgm, diffusers in SGM_OUTSIDE.items():
        if path == diffusers:
            return sgm
    resnet = {diffusers: sgm for sgm, diffusers in RESNET.items()}
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.([01])\.(.+)", path)
    if middle:
        number = 1 if middle[1] == "attentions" else 2 * int(middle[2])
        return f"middle_block.{number}.{resnet.get(middle[3], middle[3]) if middle[1] == 'resnets' else middle[3]}"
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", path)
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
