"""Make the folder of the help texts' examples and of the commonest mistakes: the fixtures under plain names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from conftest import FIXTURES, load_model, write_model
from safetensors.torch import load_file, save_file


def set_stage(folder: Path) -> None:
    """Make base/, adapter/, tuned/ and what else the help texts name."""
    llama, sdxl, gpt2 = (FIXTURES / name for name in ("llama", "sdxl", "gpt2"))
    for source, name in [
        (llama / "base", "base"),
        (llama / "base", "model"),
        (llama / "adapter", "adapter"),
        (llama / "tuned", "tuned"),
        (llama / "adapter", "style"),
        (llama / "adapter", "task"),
        (gpt2 / "base", "gpt2"),
    ]:
        shutil.copytree(source, folder / name)
    shutil.copytree(llama / "base", folder / "phi-base")
    torch.save(
        {"h.0.attn.c_attn.lora_A": torch.randn(4, 6), "h.0.attn.c_attn.lora_B": torch.randn(8, 2)}, folder / "old.bin"
    )
    shutil.copy(sdxl / "base.safetensors", folder / "sdxl.safetensors")
    shutil.copy(sdxl / "adapter.safetensors", folder / "kohya.safetensors")
    trained = {"ss_network_module": "networks.lora", "ss_session_id": "1"}
    save_file(load_file(sdxl / "adapter.safetensors"), folder / "style.safetensors", metadata=trained)
    shutil.copy(gpt2 / "base" / "config.json", folder / "config.json")
    make_wrong(folder)


def make_wrong(folder: Path) -> None:
    """Make inputs as they should not be."""
    shutil.copytree(folder / "adapter", folder / "lost")
    (folder / "lost" / "adapter_config.json").unlink()
    wide = {name: W.repeat(1, 2) if W.dim() > 1 else W for name, W in load_model(folder / "base").items()}
    write_model(folder / "wide", wide, {"model_type": "llama"})
    config = json.loads((folder / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    codes = {}
    for name, W in load_model(folder / "base").items():
        is_coded = name.endswith("_proj.weight")
        codes[name] = torch.zeros(W.numel() // 2, 1, dtype=torch.uint8) if is_coded else W
        codes |= {f"{name}.absmax": torch.ones(W.numel() // 64)} if is_coded else {}
    write_model(folder / "four-bit", codes, config)
    shutil.copytree(folder / "base", folder / "taken")
    (folder / "notes").mkdir()
    (folder / "notes" / "todo.txt").write_text("x")
