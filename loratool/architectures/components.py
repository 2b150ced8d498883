"""Identify the components of an image model by the prefixes of tensors and of adapters' modules.

A component is `unet` for any denoiser, `text_encoder`, `text_encoder_2`, ...
"""

from __future__ import annotations

from collections.abc import Iterator

from .families import ENCODERS, FAMILIES
from .families.lookup import locate
from .families.table import Component
from .prefixes import PEFT_PREFIX

# Prefix of a tensor's name in a single file -> its component and the key of its encoder's table; longest first. The
# families' tables have the prefixes of ComfyUI's repacks.
PREFIXES = {
    "conditioner.embedders.0.transformer.": ("text_encoder", "clip"),
    "conditioner.embedders.1.model.": ("text_encoder_2", "clip"),
    "conditioner.embedders.0.model.": ("text_encoder", "clip"),
    "cond_stage_model.transformer.": ("text_encoder", "clip"),
    "cond_stage_model.model.": ("text_encoder", "clip"),
    "text_encoders.clip_l.transformer.": ("text_encoder", "clip"),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", "clip"),
    "text_encoders.t5xxl.transformer.": ("text_encoder_3", "t5"),
}

# Prefixes of a denoiser's names in single files
DENOISER_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "model.model.",
    "net.",
    "transformer.",
    "conditional_transformer.",
    "",
)


def _components() -> Iterator[Component]:
    return (component for family in FAMILIES.values() for component in family.components)


# Folder of a diffusers pipeline, before the slash in a tensor's name -> component; no adapter targets the VAE.
FOLDERS = {
    "unet": "unet",
    "transformer": "unet",
    **{folder: folder for each in _components() if (folder := each.diffusers[:-1]) not in ("", "unet", "transformer")},
}


def _adapter_prefixes() -> dict[str, tuple[str, ...]]:
    by_prefix: dict[str, tuple[str, ...]] = {
        "lora_unet_": ("unet",),
        "lora_unet__": ("unet",),  # VideoX-Fun's
        "lora_unet_unet_": ("unet",),  # in published files that were converted wrongly: no path begins with unet
        "lora_transformer_": ("unet",),
        "oft_unet_": ("unet",),
        "lora_te_": ("text_encoder",),
        "lora_te1_": ("text_encoder",),
        "lora_te2_": ("text_encoder_2",),
        "lora_te3_": ("text_encoder_3",),
        "lora_te4_": ("text_encoder_4",),
        "lora_te.": ("text_encoder",),  # ai-toolkit's
        "lora_te1.": ("text_encoder",),
        "lora_te2.": ("text_encoder_2",),
        "unet.": ("unet",),
        "transformer.": ("unet",),
        "conditional_transformer.": ("unet",),
        "diffusion_model.": ("unet",),
        "diffusion_model.transformer_1.": ("unet",),  # ai-toolkit's file of both of Wan 2.2's denoisers
        "diffusion_model.transformer_2.": ("transformer_2",),
        "model.diffusion_model.": ("unet",),
        "net.": ("unet",),
        "text_encoders.clip_h.transformer.": ("text_encoder",),
    }
    for component in _components():
        for prefix in filter(None, (component.kohya, component.diffusers)):
            by_prefix.setdefault(prefix, (component.name,))
        if component.comfy and component.name not in by_prefix.get(component.comfy, ()):
            by_prefix[component.comfy] = (*by_prefix.get(component.comfy, ()), component.name)
    return by_prefix


# Prefix of an adapter's module -> the possible components, the likeliest first. The path after a prefix in `_` is
# flattened. Prefixes do not show the path's naming, so it is looked up in all.
ADAPTER_PREFIXES = _adapter_prefixes()
_LONGEST_FIRST = sorted(ADAPTER_PREFIXES, key=len, reverse=True)

# Prefixes without a component, before those with one
CONTAINERS = (f"unet.{PEFT_PREFIX}", PEFT_PREFIX, "lycoris_")

# A name in `ADAPTER:0.8,te=0.4` -> the components that it weights; later, narrower names have precedence.
WEIGHED = {
    "unet": ("unet",),
    "unet2": ("transformer_2",),
    "te": ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
    "te3": ("text_encoder_3",),
    "te4": ("text_encoder_4",),
}


def components_of(module: str) -> tuple[tuple[str, ...], str]:
    """Split an adapter's module into the possible components of its prefix (empty without one) and its path."""
    path = next((module.removeprefix(p) for p in CONTAINERS if module.startswith(p)), module)
    for prefix in _LONGEST_FIRST:
        if path.startswith(prefix):
            return ADAPTER_PREFIXES[prefix], path.removeprefix(prefix)
    return (), path


def component_of(module: str) -> tuple[str | None, str]:
    """Split an adapter's module into the likeliest component of its prefix (None without one) and its path."""
    components, path = components_of(module)
    return next(iter(components), None), path


def weighed_component(module: str) -> str | None:
    """Return the component whose weight applies to a module; None if neither prefix nor path shows it."""
    component, path = component_of(module)
    if component is None and any(locate(family, path) for family in FAMILIES.values()):
        return "unet"
    if component is None and any(mark in path for family in FAMILIES.values() for mark in family.marks):
        return "unet"
    return component or ("text_encoder" if any(mark in path for mark in ENCODERS["clip"].marks) else None)
