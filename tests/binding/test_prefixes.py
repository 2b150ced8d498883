"""Bind a module by its path in any naming, whatever prefix and suffix stand around it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import any_widths, covering, only_families
from safetensors.torch import load_file, save_file

import loratool

pytestmark = pytest.mark.usefixtures("few_families")

# One matrix under the names of the maker and of diffusers, and a further one that tells the base's family
MODULES = {
    "flux": ("double_blocks.0.img_mlp.0", "transformer_blocks.0.ff.net.0.proj", "single_blocks.0.linear2"),
    "sd3": (
        "joint_blocks.0.x_block.attn2.proj",
        "transformer_blocks.0.attn2.to_out.0",
        "joint_blocks.0.x_block.attn.proj",
    ),
    "sdxl": (
        "input_blocks.4.1.transformer_blocks.1.attn1.to_q",
        "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
        "input_blocks.0.0",
    ),
}
DOTTED = ("diffusion_model.", "model.diffusion_model.", "transformer.", "unet.")
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
PEFT = ("base_model.model.", "base_model.model.diffusion_model.", "base_model.model.transformer.")
A, B = torch.eye(2, 4), torch.arange(32.0).reshape(16, 2)


def adapter(folder: Path, prefix: str, path: str, suffix: str = "dotted") -> Path:
    """Write an adapter of one module, with the suffixes of its prefix's commonest files or dotted old ones."""
    name, ends = f"{prefix}{path}", (".lora_A.weight", ".lora_B.weight")
    if prefix in FLAT:
        name, ends = f"{prefix}{path.replace('.', '_')}", (".lora_down.weight", ".lora_up.weight")
    elif suffix == "old":
        ends = (".lora.down.weight", ".lora.up.weight")
    folder.mkdir()
    save_file({name + ends[0]: A, name + ends[1]: B}, folder / "adapter_model.safetensors")
    if prefix in PEFT:
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [path]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder if prefix in PEFT else folder / "adapter_model.safetensors"


@pytest.mark.parametrize(("prefix", "naming", "family"), covering([*DOTTED, *FLAT, *PEFT], [0, 1], MODULES))
def test_prefix_and_naming_are_independent(family: str, naming: int, prefix: str, tmp_path: Path) -> None:
    maker, _, mark = MODULES[family]
    base = {f"model.diffusion_model.{maker}.weight": torch.zeros(16, 4), f"model.diffusion_model.{mark}.weight": A}
    save_file(base, tmp_path / "base.safetensors")
    one = adapter(tmp_path / "a", prefix, MODULES[family][naming])
    loratool.merge(tmp_path / "base.safetensors", one, tmp_path / "out.safetensors", undo=False)
    assert torch.equal(load_file(tmp_path / "out.safetensors")[f"model.diffusion_model.{maker}.weight"], B @ A)
    with only_families(family), any_widths(family):  # of one module, and of no known model's width
        loratool.convert(one, tmp_path / "c.safetensors", to="comfy")
    written = load_file(tmp_path / "c.safetensors")
    assert f"diffusion_model.{maker}.lora_up.weight" in written


@pytest.mark.parametrize("prefix", DOTTED)
def test_nor_does_a_suffix_tell(prefix: str, tmp_path: Path) -> None:
    for naming in (0, 1):
        one = adapter(tmp_path / f"a{naming}", prefix, MODULES["flux"][naming], "old")
        loratool.convert(one, tmp_path / f"c{naming}.safetensors", to="kohya")
        assert "lora_unet_double_blocks_0_img_mlp_0.lora_up.weight" in load_file(tmp_path / f"c{naming}.safetensors")
