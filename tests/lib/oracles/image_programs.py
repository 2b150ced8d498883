"""Load adapters with the code of the programs that image adapters are made for, and return the weights that they make.

The checkouts are in the folder that LORATOOL_PROGRAMS names, each under the name that `find_program` is given; what
they import beside torch is in an oracle's folder. Their README has the commits. Nothing of theirs is in this repository.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import oracle_folder
from torch import Tensor

PACKAGES = "einops torchsde trampoline torchvision toml voluptuous imagesize opencv-python-headless"


def find_program(name: str, inside: str = "") -> Path:
    """Put a program's checkout, or a folder inside, first in the path and return it; else skip."""
    named = os.environ.get("LORATOOL_PROGRAMS")
    if not named or not (Path(named) / name).is_dir():
        pytest.skip(f"needs a checkout of {name} in the folder that LORATOOL_PROGRAMS names")
    folder = Path(named) / name / inside
    for path in (oracle_folder("image_programs", PACKAGES), str(folder)):
        if path not in sys.path:
            sys.path.append(path)
    return folder


@cache
def _comfy() -> SimpleNamespace:
    find_program("comfyui")
    importlib.import_module("comfy.cli_args").args.cpu = True
    names = ("lora", "lora_convert", "model_base")
    return SimpleNamespace(**{name: importlib.import_module(f"comfy.{name}") for name in names})


def comfyui(
    lora: Mapping[str, Tensor],
    denoiser: Mapping[str, Tensor],
    encoders: Mapping[str, Tensor] | None = None,
    model_class: str = "BaseModel",
    strength: float = 1.0,
) -> tuple[dict[str, Tensor], dict[str, Tensor], set[str]]:
    """Return the weights of denoiser and text encoders as ComfyUI patches them, and the keys that it did not load.

    Args:
        denoiser: its tensors by ComfyUI's names, without `diffusion_model.`.
        encoders: those of the text encoders, with `clip_l.transformer.` and the like.
        model_class: of `comfy/model_base.py`.
    """
    comfy = _comfy()
    base = getattr(comfy.model_base, model_class)
    state = {f"diffusion_model.{name}": tensor for name, tensor in denoiser.items()}
    model: Any = type("Model", (base,), {"__init__": lambda self: None, "state_dict": lambda self: state})()
    object.__setattr__(model, "model_config", SimpleNamespace(unet_config={}))
    text = dict(encoders or {})
    keys = comfy.lora.model_lora_keys_unet(model, {})
    keys = comfy.lora.model_lora_keys_clip(SimpleNamespace(state_dict=lambda: text), keys)
    loaded = dict(comfy.lora_convert.convert_lora(dict(lora)))
    patches = comfy.lora.load_lora(loaded, keys, log_missing=False)
    every = {name: tensor.clone() for name, tensor in {**state, **text}.items()}
    used: set[str] = set()
    for key, patch in patches.items():
        name, offset = (key[0], key[1]) if isinstance(key, tuple) else (key, None)
        every[name] = comfy.lora.calculate_weight(
            [(strength, patch, 1.0, offset, None)], every[name], name, every[name].dtype
        )
        used |= getattr(patch, "loaded_keys", set())
    unused = {name for name in loaded if name not in used and not name.endswith((".alpha", ".dora_scale"))}
    return (
        {name.removeprefix("diffusion_model."): every[name] for name in state},
        {name: every[name] for name in text},
        unused,
    )
