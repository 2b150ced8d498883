"""Distinguish an image model's modules from a language model's by their paths, for names without a prefix.

Bare names without an alpha mean scale 1 in image adapters only (diffusers' `save_lora_adapter`, Black Forest Labs, fal,
DiffSynth, Genmo): PEFT's files have a config, and loralib's need an alpha.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...architectures.components import component_of
from ...architectures.families import FAMILIES
from ...architectures.families.detect import SHARED
from ...architectures.families.lookup import locate
from ...architectures.families.table import DENOISERS

IN_BLOCK = re.compile(r"\.\d+\.")


def are_of_image_model(modules: Iterable[str]) -> bool:
    """Return whether one image family's denoiser has all modules, and no other model has all that are in blocks."""
    split = [component_of(module) for module in modules]
    paths = [path for component, path in split if component in (None, *DENOISERS)]
    if len(paths) < len(split) or not any(IN_BLOCK.search(path) and not SHARED.fullmatch(path) for path in paths):
        return False
    return any(all(locate(family, path) for path in paths) for family in FAMILIES.values())
