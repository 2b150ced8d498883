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
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from conftest import PROGRAMS, oracle_folder
from torch import Tensor, nn

PACKAGES = (
    "einops torchsde trampoline torchvision toml voluptuous imagesize opencv-python-headless pydantic-settings "
    "python-dotenv deprecated wrapt picklescan"
)


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
    """Return ComfyUI's class of a model. module: below `comfy`."""
    _comfy()
    return getattr(importlib.import_module(f"comfy.{module}"), name)


def comfy_operations() -> Any:
    """Return the layers that ComfyUI's models are made of."""
    _comfy()
    return importlib.import_module("comfy.ops").disable_weight_init


@cache
def _forge() -> SimpleNamespace:
    find_program("forge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["webui", "--always-cpu"])  # its modules read the command line
        patcher = importlib.import_module("backend.patcher.lora")
    return SimpleNamespace(lora=patcher)


def forge(
    lora: Mapping[str, Tensor],
    denoiser: Mapping[str, Tensor],
    encoders: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    repository: str = "",
    strength: float = 1.0,
) -> tuple[dict[str, Tensor], dict[str, Tensor], set[str]]:
    """Return the weights of denoiser and text encoders as Forge patches them, and the keys that it did not load.

    Args:
        denoiser: its tensors by Forge's names, without `diffusion_model.`.
        encoders: those of the text encoders, with `clip_l.transformer.` and the like.
        config: of the denoiser, as Forge has it of a single file.
        repository: of the model on the Hub, by which Forge knows Flux.
    """
    functions = _forge().lora
    state, text = {f"diffusion_model.{name}": tensor for name, tensor in denoiser.items()}, dict(encoders or {})
    model = SimpleNamespace(
        state_dict=lambda: state,
        config=SimpleNamespace(huggingface_repo=repository),
        diffusion_model=SimpleNamespace(config=dict(config or {})),
    )
    rest = dict(lora)
    every = {name: tensor.clone() for name, tensor in {**state, **text}.items()}
    for keys in (
        functions.model_lora_keys_unet(model, {}),
        functions.model_lora_keys_clip(SimpleNamespace(state_dict=lambda: text), {}),
    ):
        patches, rest = functions.load_lora(rest, keys)
        for key, patch in patches.items():
            name, offset = (key[0], key[1]) if isinstance(key, tuple) else (key, None)
            if name in every:
                every[name] = functions.merge_lora_to_weight([(strength, patch, 1.0, offset, None)], every[name], name)
    return (
        {name.removeprefix("diffusion_model."): every[name] for name in state},
        {name: every[name] for name in text},
        set(rest),
    )


def forge_unet_names(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Return diffusers' names of a UNet's tensors -> those of a single file, as Forge has them."""
    _forge()
    names: Mapping[str, str] = importlib.import_module(
        "packages_3rdparty.comfyui_lora_collection.utils"
    ).unet_to_diffusers(dict(config))
    return names


def forge_class(module: str, name: str) -> Any:
    """Return Forge's class of a denoiser. module: below `backend/nn`."""
    _forge()
    return getattr(importlib.import_module(f"backend.nn.{module}"), name)


@cache
def _invokeai() -> SimpleNamespace:
    """Import InvokeAI's loader and patcher, without the packages of its cache and of other kinds of models."""
    folder = find_program("invokeai", "") / "invokeai" / "backend" / "model_manager" / "load"
    for name in ("diffusers.loaders.peft", "diffusers.pipelines.pipeline_utils", "transformers.modeling_utils"):
        importlib.import_module(name)  # they look for some of the packages that are missing
    lock = SimpleNamespace(read_lock=nullcontext)
    registry = SimpleNamespace(register=lambda **_: lambda cls: cls)
    load = "invokeai.backend.model_manager.load"
    missing: dict[str, dict[str, Any]] = {
        load: {"__path__": [str(folder)]},
        f"{load}.model_cache": {"__path__": [str(folder / "model_cache")]},
        f"{load}.model_cache.model_cache": {"MODEL_LOAD_LOCK": lock, "ModelCache": object},
        f"{load}.load_default": {"ModelLoader": object},
        f"{load}.model_loader_registry": {"ModelLoaderRegistry": registry},
        "invokeai.backend.model_manager.configs.factory": {"AnyModelConfig": object},
        "onnxruntime": {"InferenceSession": object},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, members in missing.items():
            module = ModuleType(name)
            vars(module).update(members)
            patch.setitem(sys.modules, name, module)
        return SimpleNamespace(
            loader=importlib.import_module(f"{load}.model_loaders.lora").LoRALoader,
            patcher=importlib.import_module("invokeai.backend.patches.layer_patcher").LayerPatcher,
            taxonomy=importlib.import_module("invokeai.backend.model_manager.taxonomy"),
            flux=importlib.import_module("invokeai.backend.flux.model"),
            formats=importlib.import_module("invokeai.backend.patches.lora_conversions.formats"),
        )


def invokeai(path: Path, base: str, models: Mapping[str, nn.Module]) -> tuple[list[dict[str, Tensor]], set[str]]:
    """Return the weights of models as InvokeAI patches them, and the layers of the adapter that are of none.

    Args:
        base: a key of InvokeAI's BaseModelType.
        models: by the prefixes that InvokeAI's nodes give the patcher: `lora_unet_`, `lora_te1_`, ...
    """
    program = _invokeai()
    loader = program.loader.__new__(program.loader)
    loader._model_base, loader._torch_dtype = program.taxonomy.BaseModelType(base), torch.float32
    patch = loader._load_model(SimpleNamespace(path=str(path), format=program.taxonomy.ModelFormat.LyCORIS))
    found, rest = [], set(patch.layers)
    for prefix, model in models.items():
        modules = {name.replace(".", "_"): name for name, _ in model.named_modules()}
        flat = {prefix + name for name in modules} | {prefix + name for name in modules.values()}
        rest -= {key for key in patch.layers if key in flat}
        patches = [(patch, 1.0)]
        with program.patcher.apply_smart_model_patches(
            model, patches, prefix, torch.float32, force_direct_patching=True
        ):
            found.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return found, rest


def invokeai_flux(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return InvokeAI's denoiser of Flux with these weights, which it has all of."""
    flux = _invokeai().flux
    width, columns = tensors["img_in.weight"].shape
    blocks = {stem: 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith(stem))
              for stem in ("double_blocks", "single_blocks")}  # fmt: skip
    head = len(tensors["single_blocks.0.norm.query_norm.scale"])
    params = flux.FluxParams(
        in_channels=columns,
        vec_in_dim=tensors["vector_in.in_layer.weight"].shape[1],
        context_in_dim=tensors["txt_in.weight"].shape[1],
        hidden_size=width,
        mlp_ratio=len(tensors["double_blocks.0.img_mlp.0.weight"]) / width,
        num_heads=width // head,
        depth=blocks["double_blocks"],
        depth_single_blocks=blocks["single_blocks"],
        axes_dim=[head],
        theta=10000,
        qkv_bias=True,
        guidance_embed="guidance_in.in_layer.weight" in tensors,
        out_channels=len(tensors["final_layer.linear.weight"]),
    )
    model: nn.Module = flux.Flux(params)
    model.load_state_dict(tensors)
    return model


@cache
def _onetrainer() -> ModuleType:
    """Load its modules; those for training alone, which need more packages, are replaced by nothing."""
    find_program("onetrainer")
    for name in ("modules.module.FusedModule", "modules.util.config.TrainConfig", "modules.util.quantization_util"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = MagicMock()
    return importlib.import_module("modules.module.LoRAModule")


def onetrainer_oft(weight: Tensor, numbers: Tensor, size: int, shares: bool, scaled: bool) -> Tensor:
    """Return what OneTrainer's layer of OFT is equal to, in float64. numbers: `oft_R.weight`, of blocks of `size`."""
    shape = weight.shape
    is_linear = weight.dim() == 2
    layer = nn.Linear(shape[1], shape[0], False) if is_linear else nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
    layer.double().weight.data = weight.double().clone()
    module = _onetrainer().OFTModule("", layer, size, shares, scaled)
    assert (module.oft_block_size, module.oft_R.weight.shape) == (size, numbers.shape)
    module.hook_to_module()
    module.double().oft_R.weight.data = numbers.double()
    with torch.no_grad():
        if is_linear:
            return module(torch.eye(shape[1], dtype=torch.float64)).T
        module.op = lambda x, turned, *rest, **more: turned
        turned: Tensor = module(None)
        return turned


def sd_scripts_oft_flux(
    weight: Tensor, blocks: Mapping[str, Tensor], count: int, alpha: float, parts: list[int]
) -> Tensor:
    """Return what sd-scripts' layer of OFT of Flux is equal to, in float32. blocks: its state."""
    find_program("sd-scripts")
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data = weight.clone()
    module = importlib.import_module("networks.oft_flux").OFTModule("", layer, 1.0, count, alpha, parts)
    module.load_state_dict(blocks)
    module.apply_to()
    with torch.no_grad():
        return (module(torch.eye(weight.shape[1])) - layer.bias).T
