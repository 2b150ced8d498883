"""The values of --to and --from: formats of adapters, containers of models, and spellings of a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from ..adapters.formats import usual_format, written_formats
from ..adapters.formats.format import Format
from .arguments import Opt, one_of

# --to of a denoiser: whose names its tensors get, implemented by `convert.denoiser`; diffusers' first, then the maker's
MODEL_NAMINGS = {
    usual_format("pipeline").key: "a folder with diffusers' names",
    "single-file": "a file with the maker's names, which ComfyUI loads",
}

# for type checkers and editors; a test holds them against the tables
ScaledFormat = Literal["peft", "kohya", "diffusers", "comfy", "gguf", "mlx"]  # keys of `extract_formats`
WrittenFormat = Literal[ScaledFormat, "loralib"]
ReadFormat = Literal[WrittenFormat, "cloneofsimo", "adapterhub", "torchtune", "litgpt", "megatron", "sam"]
ModelForm = Literal["safetensors", "torch", "gguf", "diffusers", "single-file"]
RuntimeName = Literal[
    "transformers",
    "vllm",
    "sglang",
    "trtllm",
    "tgi",
    "lmdeploy",
    "exllamav3",
    "llama.cpp",
    "ollama",
    "mlx",
    "comfyui",
    "forge",
    "invokeai",
    "sd-scripts",
    "musubi",
    "diffusers",
]


def extract_formats() -> dict[str, Format]:
    """Return the formats for --to of extract by key: those whose files have the scale."""
    return {key: each for key, each in written_formats().items() if each.can.alpha != "none"}


def titles_of(formats: Mapping[str, Format]) -> dict[str, str]:
    """Return what the help says of formats, by key."""
    return {key: each.title.partition(": ")[2] for key, each in formats.items()}


To = Annotated[
    Annotated[WrittenFormat, one_of(written_formats())] | None,
    Opt("Output", default="by the input", text="Format to write. {meanings}.", meanings=titles_of(written_formats())),
]
