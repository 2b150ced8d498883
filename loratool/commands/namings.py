"""List the values of --to that name no container: formats that a command writes, and namings of a denoiser."""

from __future__ import annotations

from ..adapters.formats import usual_format, written_formats
from ..adapters.formats.format import Format

# --to of a denoiser: whose names its tensors get, implemented by `convert.denoiser`; diffusers' first, then the maker's
MODEL_NAMINGS = {
    usual_format("pipeline").key: "diffusers' names, in a folder",
    "single-file": "its maker's names, in a file as ComfyUI loads it",
}


def extract_formats() -> dict[str, Format]:
    """Return the formats for --to of extract by key: those in which the output says its scale."""
    return {key: each for key, each in written_formats().items() if each.can.alpha != "none"}
