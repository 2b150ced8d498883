"""Load adapters with the code of the programs that image adapters are made for, and return the weights that they make.

The checkouts are in PROGRAMS, each under the name that `find_program` is given; what they import beside torch is in an
oracle's folder. Nothing of theirs is here.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PROGRAMS, oracle_folder
from torch import Tensor, nn

PACKAGES = "einops torchsde trampoline torchvision toml voluptuous imagesize opencv-python-headless"


def find_program(name: str, inside: str = "") -> Path:
    """Put a program's checkout, or a folder inside, first in the path and return it; else skip."""
    folder = PROGRAMS / name / inside
    if not folder.is_dir():
        pytest.skip(f"needs a checkout of {name} in {PROGRAMS}, or in the folder that LORATOOL_PROGRAMS names")
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


# family -> diffusers' loader
LOADERS = {
    "anima": "Anima",
    "auraflow": "AuraFlow",
    "bria_fibo": "Flux",
    "chroma": "Flux",
    "cogvideox": "CogVideoX",
    "cogview4": "CogView4",
    "cosmos_predict2": "Cosmos",
    "ernie_image": "ErnieImage",
    "flux": "Flux",
    "flux2": "Flux2",
    "flux3": "Flux3",
    "hidream": "HiDreamImage",
    "hunyuan_video": "HunyuanVideo",
    "ideogram4": "Ideogram4",
    "kandinsky5": "Kandinsky",
    "krea2": "Krea2",
    "ltx": "LTXVideo",
    "ltx2": "LTX2",
    "lumina2": "Lumina2",
    "minimax_h3": "MiniMaxH3",
    "mochi": "Mochi1",
    "qwen_image": "QwenImage",
    "qwen_image21": "QwenImage",
    "sana": "Sana",
    "sd3": "SD3",
    "wan": "Wan",
    "z_image": "ZImage",
}


def diffusers_loads(path: Path, family: str, model: Any) -> None:
    """Load an adapter into a transformer as diffusers' pipelines do."""
    module = importlib.import_module("diffusers.loaders.lora_pipeline")
    loader = getattr(module, f"{LOADERS[family]}LoraLoaderMixin")
    found = loader.lora_state_dict(str(path), return_lora_metadata=True)
    state, *_, metadata = found
    options = {"metadata": metadata}
    if "network_alphas" in inspect.signature(loader.load_lora_into_transformer).parameters:
        options["network_alphas"] = None
    loader.load_lora_into_transformer(state, transformer=model, **options)


def musubi(base: Path, lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a denoiser's file with an adapter, as musubi-tuner loads both to generate."""
    find_program("musubi", "src")
    utils = importlib.import_module("musubi_tuner.utils.lora_utils")
    merged: dict[str, Tensor] = utils.load_safetensors_with_lora_and_fp8(
        str(base), [dict(lora)], [1.0], False, torch.device("cpu")
    )
    return merged


# family -> stems of modules -> the classes that the networks look for
CLASSES: Mapping[str, Mapping[str, str]] = {
    "flux": {r"double_blocks\.\d+": "DoubleStreamBlock", r"single_blocks\.\d+": "SingleStreamBlock"},
    "chroma": {r"double_blocks\.\d+": "DoubleStreamBlock", r"single_blocks\.\d+": "SingleStreamBlock"},
    "hunyuan_image": {r"double_blocks\.\d+": "MMDoubleStreamBlock", r"single_blocks\.\d+": "MMSingleStreamBlock"},
    "lumina2": {
        r"(?:layers|noise_refiner|context_refiner)\.\d+": "JointTransformerBlock",
        r"final_layer": "FinalLayer",
    },
    "sd3": {r"joint_blocks\.\d+\.(?:x|context)_block": "SingleDiTBlock"},
}
NETWORKS = {"chroma": "lora_flux", **{key: f"lora_{key.removesuffix('2')}" for key in CLASSES if key != "chroma"}}


def model_of(tensors: Mapping[str, Tensor], classes: Mapping[str, str]) -> nn.Module:
    """Return a model whose linear layers have these weights, in modules of classes by the stems of their paths."""
    root, made = nn.Module(), dict[str, nn.Module]()
    made[""] = root
    for name, weight in tensors.items():
        path = name.removesuffix(".weight")
        if path == name or weight.dim() != 2:
            continue
        *stems, last = path.split(".")
        for count, stem in enumerate(stems):
            owner, here = ".".join(stems[:count]), ".".join(stems[: count + 1])
            if here not in made:
                kind = next((each for key, each in classes.items() if re.fullmatch(key, here)), "Part")
                made[here] = type(kind, (nn.Module,), {})()
                made[owner].add_module(stem, made[here])
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.clone()
        made[".".join(stems)].add_module(last, layer)
    return root


def sd_scripts(family: str, tensors: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a denoiser's linear layers as sd-scripts merges an adapter into them."""
    find_program("sd-scripts")
    network = importlib.import_module(f"networks.{NETWORKS[family]}")
    model = model_of(tensors, CLASSES[family])
    encoders = [nn.Module()] if family == "lumina2" else []
    made, state = network.create_network_from_weights(
        1.0, None, None, encoders, model, weights_sd=dict(lora), for_inference=True
    )
    made.merge_to(encoders or None, model, state, torch.float32, "cpu")
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".weight")}


def comfy_class(module: str, name: str) -> Any:
    """Return ComfyUI's class of a denoiser. module: below `comfy/ldm`."""
    _comfy()
    return getattr(importlib.import_module(f"comfy.ldm.{module}"), name)


def comfy_operations() -> Any:
    """Return the layers that ComfyUI's models are made of."""
    _comfy()
    return importlib.import_module("comfy.ops").disable_weight_init
