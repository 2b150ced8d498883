"""Every transformer class of diffusers on the meta device: at the sizes of its defaults, and tiny.

An adapter and a base need names and shapes alone, so a base of any size is a header before a hole in the file.
"""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lib.models import dit_models

diffusers = dit_models.diffusers
Shapes = Mapping[str, tuple[int, int]]

HEADS = dit_models.HEADS
WAN = dit_models.WAN
# Small models of the classes that `dit_models` has none of
TINY: dict[str, dict[str, Any]] = {
    "AnyFlowTransformer3DModel": WAN,
    "AnyFlowFARTransformer3DModel": WAN,
    "ChronoEditTransformer3DModel": WAN,
    "ConsisIDTransformer3DModel": {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2,
                                   "text_embed_dim": 20, "time_embed_dim": 12},
    "DreamLiteTransformer2DModel": {**HEADS, "in_channels": 32, "num_layers": 2, "cross_attention_dim": 12},
    "HeliosTransformer3DModel": {key: WAN[key] for key in WAN if key != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)},
    "HunyuanVideoFramepackTransformer3DModel": dit_models.HUNYUAN1,
    "JoyImageEditPlusTransformer3DModel": dit_models.JOYIMAGE,
    "MiniMaxMusic3RVQDepthDecoder": {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2,
                                     "intermediate_size": 24, "audio_vocab_size": 30},
    "PriorTransformer": {**HEADS, "num_layers": 2, "embedding_dim": 12, "num_embeddings": 3},
    "RFD4ProteinaTransformer": {"nlayers": 2, "token_dim": 24, "nheads": 2, "dim_cond": 8, "pair_repr_dim": 16,
                                "tri_mult_c": 8},
    "SanaWMLTX2RefinerTransformer3DModel": dit_models.LTX2,
    "SkyReelsV2Transformer3DModel": WAN,
    "T5FilmDecoder": {"input_dims": 8, "targets_length": 4, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8,
                      "d_ff": 32},
    "Transformer2DModel": {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "patch_size": 2,
                           "sample_size": 4, "cross_attention_dim": 16, "caption_channels": 20,
                           "norm_type": "ada_norm_single", "num_embeds_ada_norm": 10},
    "TransformerTemporalModel": {**HEADS, "in_channels": 32, "num_layers": 2},
    "WanAnimateTransformer3DModel": {**WAN, "image_dim": 12, "in_channels": 12, "latent_channels": 4},
    "WanVACETransformer3DModel": {**WAN, "vace_layers": [0, 1]},
}  # fmt: skip

# What a class needs that has no defaults, or another model's, of a published model
REAL: dict[str, dict[str, Any]] = {
    "CogView4Transformer2DModel": {"num_attention_heads": 32, "num_layers": 28},
    "DreamLiteTransformer2DModel": {"in_channels": 320, "cross_attention_dim": 2048},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {"patch_size": 2, "num_layers": 16, "num_single_layers": 32,
                                       "num_attention_heads": 20, "caption_channels": [4096, 4096],
                                       "text_emb_dim": 2048, "axes_dims_rope": (64, 32, 32)},
    "HunyuanDiT2DModel": {"num_layers": 40, "in_channels": 4, "patch_size": 2, "hidden_size": 1408,
                          "attention_head_dim": 88, "cross_attention_dim": 1024, "cross_attention_dim_t5": 2048,
                          "pooled_projection_dim": 1024, "mlp_ratio": 4.3637, "sample_size": 128},
    "LatteTransformer3DModel": {"attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
                                "patch_size": 2, "caption_channels": 4096, "cross_attention_dim": 1152,
                                "norm_type": "ada_norm_single"},
    "LuminaNextDiT2DModel": {"num_layers": 24, "num_kv_heads": 8},
    "OmniGenTransformer2DModel": {"rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48,
                                                   "type": "su"}},
    "Transformer2DModel": {"attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
                           "patch_size": 2, "sample_size": 128, "cross_attention_dim": 1152, "caption_channels": 4096,
                           "norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000},
    "TransformerTemporalModel": {"in_channels": 320},
}  # fmt: skip


@functools.cache
def classes() -> dict[str, type[nn.Module]]:
    """Return every class of a model in diffusers' folder of transformers."""
    package = importlib.import_module("diffusers.models.transformers")
    found: dict[str, type[nn.Module]] = {}
    for each in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{each.name}")
        found |= {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, diffusers.ModelMixin)
            and value.__module__ == module.__name__
            and hasattr(diffusers, name)
        }
    return found


def sizes_of(name: str) -> dict[str, dict[str, Any]]:
    """Return size -> config of a class: `real`, and one or more that are tiny."""
    tiny = {case: config for case, (class_name, config) in dit_models.MODELS.items() if class_name == name}
    return {"real": REAL.get(name, {}), **(tiny or {"tiny": TINY[name]})}


@functools.lru_cache(maxsize=4)
def build(name: str, size: str) -> nn.Module:
    diffusers.logging.set_verbosity_error()
    with torch.device("meta"):
        return classes()[name](**sizes_of(name)[size])


def linears(model: nn.Module) -> Shapes:
    """Return linear layer -> (rows, columns)."""
    layers = model.named_modules()
    return {name: tuple(layer.weight.shape) for name, layer in layers if isinstance(layer, nn.Linear)}  # type: ignore[misc]


def write_base(folder: Path, model: nn.Module) -> Path:
    """Write a model's config and a file of its tensors, all zeros, that takes no space."""
    folder.mkdir()
    config: Any = model.config  # type: ignore[attr-defined]
    named = {**config, "_class_name": type(model).__name__}
    (folder / "config.json").write_text(json.dumps(named, default=str))
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def write_adapter(path: Path, shapes: Shapes, prefix: str) -> Path:
    """Write a LoRA of rank 1 of these layers, with kohya's flattened names if the prefix ends in `_`."""
    tensors = {}
    for name, (rows, columns) in shapes.items():
        flat = prefix.endswith("_")
        stem = prefix + (name.replace(".", "_") if flat else name)
        down, up = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
        tensors |= {f"{stem}.{down}.weight": torch.ones(1, columns), f"{stem}.{up}.weight": torch.ones(rows, 1)}
        tensors |= {f"{stem}.alpha": torch.tensor(1.0)} if flat else {}
    save_file(tensors, path)
    return path
