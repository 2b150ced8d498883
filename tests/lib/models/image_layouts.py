"""Write one small image model as its maker's single file and as diffusers' folder: the same numbers in other rows.

The names are literals, so that no table of the package decides what is expected. Sources: as `families/*.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lib.files.lycoris_files import Base, Numbers

# component -> what stands before its names in a single file
SINGLE = {"unet": "model.diffusion_model.", "text_encoder_2": "conditioner.embedders.1.model."}


@dataclass(frozen=True)
class Layer:
    """A module of the maker's, and diffusers' modules that its rows are of, in their order."""

    maker: str
    shape: tuple[int, ...]
    diffusers: tuple[str, ...]
    sizes: tuple[int, ...] = ()  # rows of each; () if all are equal
    swapped: bool = False  # the halves are in the other order
    bias: bool = True
    component: str = "unet"
    ends: tuple[str, str] = (".weight", ".bias")  # of the maker's names

    def pieces(self) -> Iterator[tuple[str, list[int]]]:
        """Yield each of diffusers' modules with the maker's rows that it consists of."""
        rows = list(range(self.shape[0]))
        if self.swapped:
            rows = rows[len(rows) // 2 :] + rows[: len(rows) // 2]
        start = 0
        for module, size in zip(
            self.diffusers, self.sizes or [len(rows) // len(self.diffusers)] * len(self.diffusers), strict=True
        ):
            yield module, rows[start : start + size]
            start += size


DOUBLE, SINGLES = "transformer_blocks.0", "single_transformer_blocks.0"
FLUX = (
    Layer("double_blocks.0.img_attn.qkv", (24, 8), tuple(f"{DOUBLE}.attn.to_{x}" for x in "qkv")),
    Layer("double_blocks.0.txt_attn.qkv", (24, 8), tuple(f"{DOUBLE}.attn.add_{x}_proj" for x in "qkv")),
    Layer("double_blocks.0.img_attn.proj", (8, 8), (f"{DOUBLE}.attn.to_out.0",)),
    Layer("double_blocks.0.txt_mlp.0", (32, 8), (f"{DOUBLE}.ff_context.net.0.proj",)),
    Layer("single_blocks.0.linear1", (56, 8),
          (*(f"{SINGLES}.attn.to_{x}" for x in "qkv"), f"{SINGLES}.proj_mlp"), (8, 8, 8, 32)),
    Layer("single_blocks.0.linear2", (8, 40), (f"{SINGLES}.proj_out",)),
    Layer("img_in", (8, 4), ("x_embedder",)),
    Layer("final_layer.adaLN_modulation.1", (16, 8), ("norm_out.linear",), swapped=True),
    Layer("double_blocks.0.img_attn.norm.query_norm", (4,), (f"{DOUBLE}.attn.norm_q",), bias=False,
          ends=(".scale", "")),
    Layer("single_blocks.0.norm.key_norm", (4,), (f"{SINGLES}.attn.norm_k",), bias=False, ends=(".scale", "")),
)  # fmt: skip
X, CONTEXT = "joint_blocks.0.x_block", "joint_blocks.0.context_block"
SD3 = (
    Layer(f"{X}.attn.qkv", (24, 8), tuple(f"{DOUBLE}.attn.to_{x}" for x in "qkv")),
    Layer(f"{CONTEXT}.attn.qkv", (24, 8), tuple(f"{DOUBLE}.attn.add_{x}_proj" for x in "qkv")),
    Layer(f"{X}.attn2.qkv", (24, 8), tuple(f"{DOUBLE}.attn2.to_{x}" for x in "qkv")),
    Layer(f"{X}.mlp.fc1", (32, 8), (f"{DOUBLE}.ff.net.0.proj",)),
    Layer(f"{CONTEXT}.adaLN_modulation.1", (16, 8), (f"{DOUBLE}.norm1_context.linear",), swapped=True),
    Layer("final_layer.adaLN_modulation.1", (16, 8), ("norm_out.linear",), swapped=True),
    Layer("x_embedder.proj", (8, 4, 2, 2), ("pos_embed.proj",)),
    Layer("context_embedder", (8, 12), ("context_embedder",)),
    Layer(f"{X}.attn.ln_q", (4,), (f"{DOUBLE}.attn.norm_q",), bias=False),
    Layer(f"{CONTEXT}.attn.ln_k", (4,), (f"{DOUBLE}.attn.norm_added_k",), bias=False),
)
IN, OUT, TE = "input_blocks", "output_blocks", "text_model.encoder.layers.0"
ATTENTION = "transformer_blocks.0.attn1"
SDXL = (
    Layer(f"{IN}.0.0", (8, 4, 3, 3), ("conv_in",)),
    Layer(f"{IN}.1.0.in_layers.0", (8,), ("down_blocks.0.resnets.0.norm1",)),
    Layer(f"{IN}.1.0.in_layers.2", (8, 8, 3, 3), ("down_blocks.0.resnets.0.conv1",)),
    Layer(f"{IN}.1.0.emb_layers.1", (8, 16), ("down_blocks.0.resnets.0.time_emb_proj",)),
    Layer(f"{IN}.3.0.op", (8, 8, 3, 3), ("down_blocks.0.downsamplers.0.conv",)),
    Layer(f"{IN}.4.1.norm", (8,), ("down_blocks.1.attentions.0.norm",)),
    Layer(f"{IN}.4.1.proj_in", (8, 8), ("down_blocks.1.attentions.0.proj_in",)),
    Layer(f"{IN}.4.1.{ATTENTION}.to_q", (8, 8), (f"down_blocks.1.attentions.0.{ATTENTION}.to_q",), bias=False),
    Layer("middle_block.1.transformer_blocks.9.norm3", (8,), ("mid_block.attentions.0.transformer_blocks.9.norm3",)),
    Layer(f"{OUT}.2.2.conv", (8, 8, 3, 3), ("up_blocks.0.upsamplers.0.conv",)),
    Layer(f"{OUT}.5.0.skip_connection", (8, 16, 1, 1), ("up_blocks.1.resnets.2.conv_shortcut",)),
    Layer("label_emb.0.0", (8, 12), ("add_embedding.linear_1",)),
    Layer("out.0", (8,), ("conv_norm_out",)),
    Layer("transformer.resblocks.0.attn.in_proj", (24, 8), tuple(f"{TE}.self_attn.{x}_proj" for x in "qkv"),
          component="text_encoder_2", ends=("_weight", "_bias")),
    Layer("transformer.resblocks.0.ln_1", (8,), (f"{TE}.layer_norm1",), component="text_encoder_2"),
    Layer("ln_final", (8,), ("text_model.final_layer_norm",), component="text_encoder_2"),
)  # fmt: skip
SD1 = (
    Layer(f"{IN}.1.1.norm", (8,), ("down_blocks.0.attentions.0.norm",)),
    Layer(f"{IN}.1.1.proj_in", (8, 8, 1, 1), ("down_blocks.0.attentions.0.proj_in",)),
    Layer(f"{IN}.1.1.{ATTENTION}.to_k", (8, 8), (f"down_blocks.0.attentions.0.{ATTENTION}.to_k",), bias=False),
    Layer(f"{IN}.1.1.{ATTENTION}.to_out.0", (8, 8), (f"down_blocks.0.attentions.0.{ATTENTION}.to_out.0",)),
    Layer(f"{IN}.10.0.out_layers.3", (8, 8, 3, 3), ("down_blocks.3.resnets.0.conv2",)),
    Layer("middle_block.0.out_layers.0", (8,), ("mid_block.resnets.0.norm2",)),
    Layer("middle_block.2.in_layers.2", (8, 8, 3, 3), ("mid_block.resnets.1.conv1",)),
    Layer(f"{OUT}.2.1.conv", (8, 8, 3, 3), ("up_blocks.0.upsamplers.0.conv",)),
    Layer("time_embed.2", (8, 8), ("time_embedding.linear_2",)),
)
# family -> its layers and the folder of its denoiser
MODELS: Mapping[str, tuple[tuple[Layer, ...], str]] = {
    "flux": (FLUX, "transformer"),
    "sd3": (SD3, "transformer"),
    "sdxl": (SDXL, "unet"),
    "sd1": (SD1, "unet"),
}


def base_of(layer: Layer, dtype: torch.dtype, seed: int) -> Base:
    n = Numbers(dtype, seed)
    return Base(layer.maker, dtype, n(*layer.shape, size=0.3), n(layer.shape[0], size=0.3))


def piece_of(base: Base, rows: list[int]) -> Base:
    return Base("", base.dtype, base.weight[rows].clone(), base.bias[rows].clone())


def folder_of(family: str, component: str) -> str:
    return MODELS[family][1] if component == "unet" else component


def maker_names(layer: Layer) -> dict[str, str]:
    """Return `weight` and `bias` -> tensor in a single file."""
    weight, bias = (f"{SINGLE[layer.component]}{layer.maker}{end}" for end in layer.ends)
    return {"weight": weight, **({"bias": bias} if layer.bias else {})}


def diffusers_names(family: str, layer: Layer, module: str) -> dict[str, str]:
    """Return `weight` and `bias` -> tensor in a folder, its component's before a slash."""
    stem = f"{folder_of(family, layer.component)}/{module}"
    return {end: f"{stem}.{end}" for end in ("weight", "bias") if end == "weight" or layer.bias}


def write_single(path: Path, family: str, bases: Mapping[str, Base]) -> Path:
    tensors = {
        name: getattr(bases[layer.maker], end)
        for layer in MODELS[family][0]
        for end, name in maker_names(layer).items()
    }
    save_file(tensors, path)
    return path


def write_folder(path: Path, family: str, bases: Mapping[str, Base]) -> Path:
    """Write a pipeline whose components have one file each."""
    parts: dict[str, dict[str, Tensor]] = {}
    for layer in MODELS[family][0]:
        for module, rows in layer.pieces():
            piece = piece_of(bases[layer.maker], rows)
            for end, name in diffusers_names(family, layer, module).items():
                folder, _, own = name.partition("/")
                parts.setdefault(folder, {})[own] = getattr(piece, end)
    path.mkdir()
    (path / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **{p: ["", ""] for p in parts}}))
    for folder, tensors in parts.items():
        (path / folder).mkdir()
        (path / folder / "config.json").write_text("{}")
        stem = "model" if folder.startswith("text") else "diffusion_pytorch_model"
        save_file(tensors, path / folder / f"{stem}.safetensors", {"format": "pt"})
    return path
