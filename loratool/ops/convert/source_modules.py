"""Read an image adapter's modules by component and path, and detect the model family they belong to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...adapters.adapter import Adapter
from ...adapters.updates.update import UpdateSpec
from ...architectures.image import DITS, FIRST, component_of, sgm_to_diffusers
from ...architectures.image_names import DOUBLE_BLOCKS, dit_paths, flattened, unet_paths
from ...errors import InputError

IMAGE_FAMILIES = {"sd1": "SD 1", "sd2": "SD 2", "sdxl": "SDXL", "flux": "Flux", "sd3": "SD 3"}


UNETS = (*FIRST, "sdxl")


FIRST_ALONE = re.compile(r"(down_blocks\.(0\.att|2\.down|3)|up_blocks\.(2\.(att|up)|3))")


SDXL_ALONE = re.compile(r"transformer_blocks\.[1-9]|^up_blocks\.0\.att|^add_embedding")


SD2_WIDTH = 1024  # of SD 2's text encoder; SD 1's has 768


MLP_RATIO = 4  # Flux's MLP to its hidden width


# suffix of Flux's modules -> rows / columns
FLUX_ROWS = {
    ".linear1": 3 + MLP_RATIO,
    "_mlp.0": MLP_RATIO,
    ".ff.net.0.proj": MLP_RATIO,
    ".ff_context.net.0.proj": MLP_RATIO,
    ".proj_mlp": MLP_RATIO,
}


BIGG_WIDTH = 1280  # of SDXL's second text encoder


SD3_WIDTHS = (1536, 2432)  # of SD 3 and 3.5, medium and large; Flux has 3072


T5 = re.compile(r"encoder\.block\.\d+\.")


DIT_BLOCK = re.compile(r"(double|single|joint|transformer)_blocks[._]\d+[._]")


CLIP = re.compile(r"(text_model\.)?encoder\.layers\.\d+\.|transformer\.resblocks\.")


@dataclass(frozen=True)
class SourceModule:
    """A module of the adapter to convert."""

    module: str  # its name in the adapter
    update: UpdateSpec
    component: str  # `unet`, `text_encoder`, `text_encoder_2`, ...; empty for a language model
    path: str  # dotted, in the adapter's naming


def read_source_modules(adapter: Adapter) -> tuple[list[SourceModule], list[str]]:
    """Return the modules with low-rank factors, and the names of those that no format of image adapters can hold."""
    sources, impossible = [], []
    for module, update in adapter.updates.items():
        component, path = component_of(module)
        dotted = flattened().get(path) if adapter.flattened else path
        if not update.rank or update.cls.stack or dotted is None:
            impossible.append(module)
            continue
        default = _which_clip(update, dotted) if dotted.startswith("text_model.") else "unet"
        sources.append(make_source_module(module, update, component or default, dotted))
    return sources, impossible


def _which_clip(update: UpdateSpec, path: str) -> str:
    """Return the component of a CLIP module whose name has none: SDXL's second CLIP is wider than all others."""
    width = update.shape[0 if path.endswith("fc2") else 1]
    return "text_encoder_2" if width == BIGG_WIDTH else "text_encoder"


def make_source_module(module: str, update: UpdateSpec, component: str, path: str) -> SourceModule:
    """Make a SourceModule; a T5 is the third text encoder, whatever number it has in the adapter."""
    return SourceModule(module, update, "text_encoder_3" if component != "unet" and T5.match(path) else component, path)


def detect_family(sources: list[SourceModule]) -> str | None:
    """Return the image family, a key of IMAGE_FAMILIES, or None if the modules are of no such model."""
    paths = [sgm_to_diffusers(s.path) for s in sources if s.component == "unet"]
    texts = [s.path for s in sources if s.component != "unet"]
    if not paths:
        return _family_of_encoders(sources) if any(T5.match(path) or CLIP.match(path) for path in texts) else None
    if any(path.startswith(("down_blocks.", "mid_block.", "up_blocks.", "conv_")) for path in paths):
        return _family_of_unet(sources)
    fitting = [family for family in DITS if dit_paths(family).issuperset(paths) and _has_shapes(family, sources)]
    if len(fitting) == 2:
        return "sd3" if _is_sd3(sources) else "flux"
    return fitting[0] if fitting else None


def _family_of_encoders(sources: list[SourceModule]) -> str:
    """Detect the image family of an adapter that has modules of text encoders only.

    A third encoder means SD 3, a second one SDXL. kohya numbers its prefix (`lora_te1_`) only in families with several
    encoders. Otherwise the width tells SD 1 from SD 2.
    """
    components = {s.component for s in sources}
    if "text_encoder_3" in components:
        return "sd3"
    if "text_encoder_2" in components:
        return "sdxl"
    return "sdxl" if any(s.module.startswith("lora_te1_") for s in sources) else _sd1_or_sd2(sources)


def _has_shapes(family: str, sources: list[SourceModule]) -> bool:
    """Return whether the shapes are the family's; Flux 2 has names of Flux, with another ratio of rows to columns."""
    if family != "flux":
        return True
    rows = [(ratio, s.update.shape) for s in sources for end, ratio in FLUX_ROWS.items() if s.path.endswith(end)]
    return all(shape[0] == ratio * shape[1] for ratio, shape in rows)


def refuse_unknown_blocks(adapter: Adapter, sources: Sequence[SourceModule], family: str) -> None:
    """Raise InputError for a block that is in no known transformer, even if dropped: the model is another one."""
    if family not in DITS:
        return
    known = {source.module for source in sources if sgm_to_diffusers(source.path) in dit_paths(family)}
    for module, update in adapter.updates.items():
        if update.rank and not update.cls.stack and DIT_BLOCK.search(module) and module not in known:
            message = f"is in no image model that is known ({', '.join(IMAGE_FAMILIES.values())})"
            raise InputError(message, culprit=module, remedy=f"{adapter.name} is for another model")


def tells_unet(sources: Sequence[SourceModule]) -> str | None:
    """Return the family of a UNet from modules or widths that only it has, or None if there are none."""
    denoiser = [s for s in sources if s.component == "unet"]
    paths = [sgm_to_diffusers(s.path) for s in denoiser]
    widths = {s.update.shape[1] for s in denoiser if s.path.endswith("attn2.to_k")}
    if any(s.component == "text_encoder_2" for s in sources) or 2048 in widths or any(map(SDXL_ALONE.search, paths)):
        return "sdxl"
    return _sd1_or_sd2(sources) if widths or any(map(FIRST_ALONE.match, paths)) else None


def _family_of_unet(sources: Sequence[SourceModule]) -> str:
    """Return the family of a UNet; if no module tells, sgm's names mean SDXL, since kohya uses them only there."""
    sgm_names = any("put_blocks." in s.path for s in sources if s.component == "unet")
    return tells_unet(sources) or ("sdxl" if sgm_names else _sd1_or_sd2(sources))


def _sd1_or_sd2(sources: Sequence[SourceModule]) -> str:
    texts = [s for s in sources if s.component == "text_encoder" or s.path.endswith(("attn2.to_k", "attn2.to_v"))]
    return "sd2" if any(s.update.shape[1] == SD2_WIDTH for s in texts) else "sd1"


def _is_sd3(sources: list[SourceModule]) -> bool:
    """Return whether modules whose names fit both SD 3 and Flux are SD 3's.

    They are if there is a second CLIP, a block number beyond Flux's, or a width of SD 3's.
    """
    blocks = [found for s in sources if s.component == "unet" if (found := re.match(r"\D+\.(\d+)\.", s.path))]
    return (
        any(s.component == "text_encoder_2" for s in sources)
        or any(int(found[1]) >= DOUBLE_BLOCKS for found in blocks)
        or any(s.update.shape[1] in SD3_WIDTHS for s in sources if s.component == "unet")
    )


def find_unknown_modules(sources: list[SourceModule], family: str) -> list[str]:
    """Return the modules of a UNet that are in no known UNet."""
    if family in DITS:
        return []
    return [s.module for s in sources if s.component == "unet" and sgm_to_diffusers(s.path) not in unet_paths()]
