"""File names in a model's folder: its weights, a pipeline's components, and torch files without weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...durable.fileio import file_length, is_beside, open_for_reading, size
from ...errors import InputError
from ..containers.safetensors_file import parse_json

# The file names that loaders look for in a folder. The first match wins; an index wins over a single file.
INDEX_NAMES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")

SINGLE_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")

TORCH_NAMES = (
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)

MAX_JSON = 100_000_000  # bytes of a JSON file, the limit of a safetensors header; 100,000 tensors need a tenth of it

PIPELINE = "model_index.json"  # names the components of a diffusers pipeline, each in its own folder

PICKLES = (".bin", ".pt", ".pth", ".ckpt")

# Torch files with a training run's state or arguments and no weights; the number is that of a process.
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|sampler)(_\d+)?\.\w+")


def read_json_file(path: Path) -> dict[str, Any]:
    with open_for_reading(path) as file:
        if file_length(file) > MAX_JSON:
            raise InputError(
                f"is larger than {size(MAX_JSON)}, which is too large for a config or index", culprit=str(path)
            )
        return parse_json(file.read(), path)


def is_torch_weights(path: Path) -> bool:
    """Return whether a file has a name of torch weights."""
    return path.suffix in PICKLES and not NO_WEIGHTS.fullmatch(path.name)


def is_pipeline(path: Path) -> bool:
    return (path / PIPELINE).is_file()


def component_names(folder: Path) -> list[str]:
    """Return the components that a pipeline's model_index.json names as `[library, class]`, without those of nulls."""
    index = read_json_file(folder / PIPELINE)
    names = [k for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1] is not None and k[:1] != "_"]
    for name in names:
        if not is_beside(name):
            raise InputError(f"names {name!r}, which is not a folder beside it", culprit=str(folder / PIPELINE))
    return names
