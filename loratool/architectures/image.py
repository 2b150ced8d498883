"""Map every name of an image model's module to rows of the base's tensors.

A module has a component (`unet` for any denoiser, `text_encoder`, `text_encoder_2`, ...) and a path in it. The path is
accepted in every naming that the tables in `families` have. If one naming fuses what the other splits, a name means
rows of one tensor or of several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .families import (
    ENCODERS,
    FAMILIES,
    Located,
    count_blocks,
    family_of_names,
    locate,
    names_maker,
    names_of,
    parts_of,
)
from .families.table import ModelFamily
from .families.unet import diffusers_to_sgm, sgm_to_diffusers
from .prefixes import PEFT_PREFIX

Shape = tuple[int, ...]


# Prefix of a tensor's name in a single file -> its component and the key of its encoder's table, empty for the
# denoiser; longest first.
PREFIXES = {
    "conditioner.embedders.0.transformer.": ("text_encoder", "clip"),
    "conditioner.embedders.1.model.": ("text_encoder_2", "clip"),
    "conditioner.embedders.0.model.": ("text_encoder", "clip"),
    "cond_stage_model.transformer.": ("text_encoder", "clip"),
    "cond_stage_model.model.": ("text_encoder", "clip"),
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


RMS_SCALE = "_norm.scale"  # how Black Forest Labs' names of the weights of norms end


CLIP_STARTS = ("text_model.", "embeddings.token_embedding.")  # prefixes in a file that is a CLIP alone


# Prefix of an adapter's module -> its component. After those that end in `_` the path is flattened. In which naming the
# path is no prefix tells: it is looked up in all.
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
    "model.diffusion_model.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}


_LONGEST_FIRST = sorted(ADAPTER_PREFIXES, key=len, reverse=True)


# Prefixes that tell no component, before those that do
CONTAINERS = (PEFT_PREFIX, "lycoris_")


# A name in `ADAPTER:0.8,te=0.4` -> the components that it weighs; the later, narrower name wins.
WEIGHED = {
    "unet": ("unet",),
    "te": ("text_encoder", "text_encoder_2", "text_encoder_3"),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
    "te3": ("text_encoder_3",),
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

    A path with `.bias` behind it is the bias of that module, in the same rows as the weight. A name that two namings
    use for different modules means the module that the base itself calls so.

    Args:
        shapes: tensor -> shape of the base.
    """
    found: Modules = {}
    if not any(name.startswith(tuple(f"{folder}/" for folder in FOLDERS)) for name in shapes) and not _is_marked(
        shapes
    ):
        return found
    parts: dict[tuple[str, ModelFamily | None], dict[str, str]] = {}
    for component, table, path, name in _split(shapes):
        found[component, path] = (_all_rows(name, shapes),)
        parts.setdefault((component, table), {})[path] = name
    for (component, table), names in parts.items():
        for path, where in _other_names(table, names, shapes):
            found.setdefault((component, path), where)
        if table is ENCODERS["t5"]:  # kohya counts it third, a Flux pipeline second
            for path in names:
                found.setdefault(("text_encoder_2", path), found[component, path])
                found.setdefault(("text_encoder_3", path), found[component, path])
    biases = {(component, f"{path}.bias"): _biases(where, shapes) for (component, path), where in found.items()}
    return found | {module: where for module, where in biases.items() if where}


def image_parts(shapes: Mapping[str, Shape]) -> dict[str, tuple[str, str]]:
    """Return tensor -> (component, path), in the base's naming, for every weight that an adapter can change.

    Empty if the base is not an image model.
    """
    if not _is_marked(shapes):
        return {}
    weights = {name for name, shape in shapes.items() if len(shape) > 1 and name.endswith("weight")}
    return {name: (component, path) for component, _, path, name in _split(shapes) if name in weights}


def _is_marked(names: Iterable[str]) -> bool:
    marks = [mark for family in (*FAMILIES.values(), ENCODERS["clip"]) for mark in family.marks]
    return any(mark in name for name in names for mark in marks)


def component_of(module: str) -> tuple[str | None, str]:
    """Split an adapter's module into the component that its prefix names, None without one, and its path there."""
    path = next((module.removeprefix(p) for p in CONTAINERS if module.startswith(p)), module)
    for prefix in _LONGEST_FIRST:
        if path.startswith(prefix):
            return ADAPTER_PREFIXES[prefix], path.removeprefix(prefix)
    return None, path


def weighed_component(module: str) -> str | None:
    """Return the component whose weight applies to a module; None if neither prefix nor path tells it."""
    component, path = component_of(module)
    if component is None and any(locate(family, path) for family in FAMILIES.values()):
        return "unet"
    if component is None and any(mark in path for family in FAMILIES.values() for mark in family.marks):
        return "unet"
    return component or ("text_encoder" if any(mark in path for mark in ENCODERS["clip"].marks) else None)


def _path_of(weight: str) -> str:
    """Return the path of the module whose weight a tensor is."""
    own = ".scale" if weight.endswith(RMS_SCALE) else ".weight"
    return weight.removesuffix(own).removesuffix("_weight")


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _all_rows(tensor: str, shapes: Mapping[str, Shape]) -> ModuleRows:
    return ModuleRows(tensor, 0, shapes[tensor][0], 0, shapes[tensor][0])


def _biases(weights: Sequence[ModuleRows], shapes: Mapping[str, Shape]) -> tuple[ModuleRows, ...]:
    """Return the rows of the biases beside the weights that a module consists of; none if one has no bias."""
    found = tuple(replace(each, tensor=_bias_of(each.tensor)) for each in weights)
    there = all(shapes.get(bias.tensor) == shapes[w.tensor][:1] for bias, w in zip(found, weights, strict=True))
    return found if there else ()


def _encoder_of(paths: Iterable[str]) -> ModelFamily | None:
    """Return the table of a text encoder that has one of these modules."""
    every = list(paths)
    return next((encoder for encoder in ENCODERS.values() if any(locate(encoder, path) for path in every)), None)


def _split(shapes: Mapping[str, Shape]) -> Iterable[tuple[str, ModelFamily | None, str, str]]:
    """Yield (component, its table, path, tensor) for every tensor that an adapter can change."""
    modules = {
        name: _path_of(name)
        for name, shape in shapes.items()
        if shape and name.endswith(("weight", RMS_SCALE)) and not name.startswith("first_stage_model.")
    }
    if any("/" in name for name in modules):
        for folder, component in FOLDERS.items():
            inside = {n: path.removeprefix(f"{folder}/") for n, path in modules.items() if n.startswith(f"{folder}/")}
            table = (family_of_names if component == "unet" else _encoder_of)(inside.values())
            yield from ((component, table, path, name) for name, path in inside.items())
        return
    prefix_of = {name: next((prefix for prefix in PREFIXES if name.startswith(prefix)), "") for name in shapes}
    has_prefixes = any(prefix_of.values())
    denoiser = family_of_names(path.removeprefix(prefix_of[name]) for name, path in modules.items())
    is_clip = denoiser is None and any(mark in name for name in shapes for mark in ENCODERS["clip"].marks)
    if not denoiser and not (is_clip and (has_prefixes or any(name.startswith(CLIP_STARTS) for name in shapes))):
        return
    alone = ("text_encoder", ENCODERS["clip"]) if is_clip else ("unet", denoiser)
    for name, path in modules.items():
        prefix = prefix_of[name]
        component, encoder = PREFIXES.get(prefix, (alone[0], ""))
        if prefix or not has_prefixes:
            yield component, ENCODERS[encoder] if encoder else alone[1], path.removeprefix(prefix), name


def _other_names(
    table: ModelFamily | None, names: Mapping[str, str], shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, tuple[ModuleRows, ...]]]:
    """Yield the names of a component's modules in all namings, each with the rows of the base's tensors that it means.

    Args:
        names: path in the base's naming -> tensor.
    """
    for path, name in names.items():
        every = (_all_rows(name, shapes),)
        if table is ENCODERS["clip"] and not names_maker(table, path):
            yield path.removeprefix("text_model."), every
            yield f"text_model.{path.removeprefix('text_model.')}", every
        elif table and table.up_attention:
            plain = sgm_to_diffusers(path)
            spellings = (plain,) if plain != path else (diffusers_to_sgm(path), diffusers_to_sgm(path, False))
            yield from ((spelling, every) for spelling in spellings)
    if table is None or table.up_attention:
        return
    blocks = count_blocks(names)
    pieces: dict[str, list[ModuleRows]] = {}  # by diffusers' module
    columns: dict[str, int] = {}
    for path, name in names.items():
        located = locate(table, path, blocks)
        rows, width, *_ = (*shapes[name], 1)
        for span in (parts_of(located, width, rows) if located else None) or ():
            pieces.setdefault(span.module, []).append(ModuleRows(name, span.start, span.stop, span.skip, span.whole))
            columns[span.module] = width
    whole = {m: rows[0].whole for m, rows in pieces.items() if sum(r.stop - r.start for r in rows) == rows[0].whole}
    for other in names_of(table, blocks).values():
        there = [module for module in other.diffusers if module in whole]
        found = _rows_in_base(other, columns[there[0]], whole, pieces) if there else ()
        yield from [(other.path, found)] if found else []


def _rows_in_base(
    located: Located, columns: int, whole: Mapping[str, int], pieces: Mapping[str, Sequence[ModuleRows]]
) -> tuple[ModuleRows, ...]:
    """Return the rows of the base's tensors that a module under any name consists of; none if some are not there."""
    found: list[ModuleRows] = []
    spans = parts_of(located, columns, known=whole) or ()
    if any(span.module not in whole for span in spans):
        return ()
    for span in spans:
        for each in sorted(pieces[span.module], key=lambda piece: piece.skip):
            low = max(span.skip, each.skip)
            high = min(span.skip + span.stop - span.start, each.skip + each.stop - each.start)
            if low < high:
                start, skip = each.start + low - each.skip, span.start + low - span.skip
                last = found[-1] if found else None
                if last and last.tensor == each.tensor and last.stop == start:  # its rows go on
                    start, skip = last.start, last.skip
                    found.pop()
                found.append(ModuleRows(each.tensor, start, each.start + high - each.skip, skip, spans[-1].stop))
    return tuple(sorted(found, key=lambda rows: rows.start))
