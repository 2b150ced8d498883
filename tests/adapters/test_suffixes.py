"""Hold the table of suffixes: each is read after every prefix and path, and a format is told by the prefix alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import factors
from safetensors.torch import save_file

from loratool.adapters.formats import open_adapter
from loratool.adapters.formats.suffixes import SUFFIXES, split_suffix

MODULES = {
    "lora_unet_x_to_q": "kohya",
    "lora_transformer_x_to_q": "kohya",
    "unet.x.to_q": "diffusers",
    "transformer.x.to_q": "diffusers",
    "text_encoder.x.q_proj": "diffusers",
    "diffusion_model.x.to_q": "comfy",
    "text_encoders.clip_l.transformer.x.q_proj": "comfy",
}
DOWNS = [suffix for suffix, role in SUFFIXES.items() if role == "A"]


def up_of(down: str) -> str:
    return down.replace("down", "up").replace("lora_A", "lora_B")


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("down", DOWNS)
def test_a_suffix_stands_after_every_path(module: str, down: str, tmp_path: Path) -> None:
    A, B = factors(6, 8, 4)
    path = tmp_path / "x.safetensors"
    save_file({module + down: A, module + up_of(down): B, f"{module}.alpha": torch.tensor(2.0)}, path)
    adapter = open_adapter(path)
    (update,) = adapter.updates.values()
    assert (adapter.format, update.module, update.scale) == (MODULES[module], module, 0.5)
    assert update.tensors == {"A": module + down, "B": module + up_of(down)}
    adapter.file.close()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_longest_suffix_counts(suffix: str) -> None:
    assert split_suffix(f"lora_x.lora_y{suffix}") == ("lora_x.lora_y", SUFFIXES[suffix])


def test_what_no_suffix_ends_has_no_role() -> None:
    assert split_suffix("unet.x.scale") == ("unet.x.scale", None)
    assert split_suffix("unet.x.down.bias") == ("unet.x.down.bias", None)
    assert split_suffix("double_blocks.0.processor.qkv_lora1.down.weight")[1] == "A"
