"""Merge one change in every spelling: prefix, suffix and naming of the path are read independently of each other.

A prefix never tells the naming, and a suffix neither: into a single file and into a folder, all give the same tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import load_model
from lib.files.lycoris_files import Numbers, loha, lokr_both, lora
from lib.models.image_layouts import MODELS, Layer, base_of, folder_of, write_folder, write_single
from safetensors.torch import save_file
from torch import Tensor

import loratool

# prefix -> whether the path after it is flattened
PREFIXES = {
    "diffusion_model.": False,
    "transformer.": False,
    "model.diffusion_model.": False,
    "unet.": False,
    "base_model.model.": False,
    "base_model.model.transformer.": False,
    "": False,
    "lora_unet_": True,
    "lora_transformer_": True,
    "lycoris_": True,
}
# how the names of A and B end; after `processor` those of an attention's projections
ENDS = {
    "lora_A": (".lora_A.weight", ".lora_B.weight"),
    "default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "lora_down": (".lora_down.weight", ".lora_up.weight"),
    "lora.down": (".lora.down.weight", ".lora.up.weight"),
    "linear_layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "processor": ("_lora.down.weight", "_lora.up.weight"),
}
KINDS = {"hada": loha, "lokr": lokr_both}
PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def tensors_of(layer: Layer, naming: str, suffix: str, seed: int) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (module, end, tensor) of one change of a layer, the same in both namings."""
    numbers = Numbers(torch.float32, seed)
    modules = [(layer.maker, [*range(layer.shape[0])])] if naming == "maker" else [*layer.pieces()]
    if suffix in KINDS:
        if len(layer.diffusers) == 1 and not layer.swapped:  # else no part of it is one of that kind
            for role, tensor in KINDS[suffix](numbers, *layer.shape).items():
                yield modules[0][0], f".{role}", tensor
        return
    roles = lora(numbers, *layer.shape)
    for module, rows in modules:
        stem, _, last = module.rpartition(".")
        old = suffix == "processor" and last in PROJECTIONS
        ends = ENDS["lora.down" if suffix == "processor" and not old else suffix]
        for end, tensor in zip(ends, (roles["lora_down.weight"], roles["lora_up.weight"][rows]), strict=True):
            yield f"{stem}.processor.{last}" if old else module, end, tensor


def merged(folder: Path, family: str, prefix: str, suffix: str, naming: str) -> dict[str, Tensor]:
    """Return the tensors of a single file and a folder into which a spelling was merged."""
    layers = MODELS[family][0]
    bases = {layer.maker: base_of(layer, torch.float32, i) for i, layer in enumerate(layers)}
    tensors = {}
    for i, layer in enumerate(layers):
        if len(layer.shape) > 1 and layer.component == "unet":
            for module, end, tensor in tensors_of(layer, naming, suffix, i):
                path = module.replace(".", "_") if PREFIXES[prefix] else module
                tensors[f"{prefix}{path}{end}"] = tensor.clone()
    folder.mkdir()
    save_file(tensors, folder / "a.safetensors")
    # PEFT has the scale in a config, and these names are its
    alpha = (
        3.0
        if suffix in ("lora_A", "default") and prefix in ("", "base_model.model.", "base_model.model.transformer.")
        else None
    )
    loratool.merge(write_single(folder / "b.safetensors", family, bases), folder / "a.safetensors",
                   folder / "out.safetensors", alpha=alpha, undo=False)  # fmt: skip
    loratool.merge(write_folder(folder / "b", family, bases), folder / "a.safetensors", folder / "out",
                   alpha=alpha, undo=False)  # fmt: skip
    found = {**load_model(folder / "out.safetensors")}
    for part in {folder_of(family, layer.component) for layer in layers}:
        found |= {f"{part}/{name}": tensor for name, tensor in load_model(folder / "out" / part).items()}
    return found


def same(folder: Path, family: str, prefix: str, suffix: str, naming: str) -> bool:
    """Return whether a spelling gives what kohya's of diffusers' names does, of which other tests hold the bits."""
    usual = merged(folder / "usual", family, "lora_unet_", suffix if suffix in KINDS else "lora_down", "diffusers")
    found = merged(folder / "found", family, prefix, suffix, naming)
    return found.keys() == usual.keys() and all(torch.equal(found[name], tensor) for name, tensor in usual.items())


EVERY = [
    (family, prefix, suffix, naming)
    for family, prefix, suffix, naming in itertools.product(MODELS, PREFIXES, (*ENDS, *KINDS), ("maker", "diffusers"))
    # a processor is below a module's dotted path, in diffusers' naming
    if suffix != "processor" or (naming == "diffusers" and not PREFIXES[prefix])
]
SOME = [
    ("flux", "transformer.", "lora_down", "maker"),
    ("flux", "", "lokr", "maker"),
    ("flux", "lora_transformer_", "lora_A", "maker"),
    ("flux", "base_model.model.", "lora_down", "diffusers"),
    ("sd3", "diffusion_model.", "default", "diffusers"),
    ("sd3", "lycoris_", "lora.down", "maker"),
    ("sd3", "base_model.model.transformer.", "hada", "maker"),
    ("sdxl", "unet.", "lora_A", "maker"),
    ("sdxl", "diffusion_model.", "processor", "diffusers"),
    ("sdxl", "lora_transformer_", "linear_layer", "diffusers"),
    ("sd1", "model.diffusion_model.", "lora.down", "diffusers"),
    ("sd1", "base_model.model.", "lora_A", "maker"),
]


@pytest.mark.parametrize(("family", "prefix", "suffix", "naming"), SOME)
def test_spellings(family: str, prefix: str, suffix: str, naming: str, tmp_path: Path) -> None:
    assert same(tmp_path, family, prefix, suffix, naming)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "prefix", "suffix", "naming"), EVERY)
def test_every_spelling(family: str, prefix: str, suffix: str, naming: str, tmp_path: Path) -> None:
    assert same(tmp_path, family, prefix, suffix, naming)
