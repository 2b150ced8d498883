"""Hold extract on image models: names by the base, all deltas back by our own merge, and the VAE left out by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, load_model, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, UsageError

UNET = "model.diffusion_model."
BASE = FIXTURES / "sdxl" / "base.safetensors"
VAE = "first_stage_model.decoder.conv_in.weight"


def tuned(path: Path, base: Path, rank: int = 2) -> Path:
    """Change every matrix at this rank, the VAE and a norm too."""
    tensors = {}
    for i, (name, W) in enumerate(load_model(base).items()):
        A, B = factors(W.shape[0], W[0].numel(), rank, seed=i)
        change = (B @ A).reshape(W.shape) if W.dim() > 1 else torch.full_like(W, 0.01)
        tensors[name] = (W.float() + change).to(W.dtype)
    save_file(tensors, path)
    return path


@pytest.fixture
def float_base(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    extra = {
        f"{UNET}input_blocks.4.1.norm.weight": weights(32),
        "conditioner.embedders.1.model.positional_embedding": weights(7, 32),
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": weights(9, 24),
    }
    save_file({**{k: v.float() for k, v in load_file(BASE).items()}, **extra}, path)
    return path


@pytest.mark.parametrize("to", [None, "diffusers", "comfy"])
def test_the_change_comes_back_by_merge(to: str | None, float_base: Path, tmp_path: Path) -> None:
    after = tuned(tmp_path / "tuned.safetensors", float_base)
    report = loratool.extract(float_base, after, tmp_path / "a.safetensors", rank=2, to=to)
    assert len(report.modules) == 6 and not report.exact
    rest = {VAE, f"{UNET}input_blocks.4.1.norm.weight", "conditioner.embedders.1.model.positional_embedding",
            "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"}  # fmt: skip
    assert set(report.left_out) == rest and all(norm > 0 for norm in report.left_out.values())
    loratool.merge(float_base, tmp_path / "a.safetensors", tmp_path / "m.safetensors", undo=False)
    start, end, found = (load_model(p) for p in (float_base, after, tmp_path / "m.safetensors"))
    for name, W in start.items():
        if name in rest:
            assert torch.equal(found[name], W)
        else:
            assert torch.allclose(found[name], end[name], atol=1e-6) and not torch.equal(found[name], W)


def test_literal_names(tmp_path: Path) -> None:
    after = tuned(tmp_path / "tuned.safetensors", BASE)
    loratool.extract(BASE, after, tmp_path / "a.safetensors", rank=3, dtype="fp16")
    found = load_file(tmp_path / "a.safetensors")
    modules = {name.partition(".")[0] for name in found}
    layer = "lora_te2_text_model_encoder_layers_0_self_attn"
    assert modules == {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k",
        "lora_unet_input_blocks_5_0_in_layers_2",
        "lora_unet_output_blocks_2_2_conv",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        f"{layer}_q_proj",
        f"{layer}_k_proj",
        f"{layer}_v_proj",
    }
    assert found["lora_unet_input_blocks_5_0_in_layers_2.lora_down.weight"].shape == (3, 32, 3, 3)
    assert found[f"{layer}_v_proj.lora_up.weight"].shape == (32, 3) and found[f"{layer}_v_proj.alpha"] == 3
    assert found[f"{layer}_v_proj.lora_up.weight"].dtype == torch.float16
    loratool.extract(BASE, after, tmp_path / "d.safetensors", rank=3, to="diffusers", target=["to_q", "fc1"])
    assert set(load_file(tmp_path / "d.safetensors")) == {
        f"{module}.lora_{x}.weight"
        for module in ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
                       "text_encoder.text_model.encoder.layers.0.mlp.fc1") for x in "AB"
    }  # fmt: skip


def test_sd1_has_diffusers_names_in_kohyas_files(tmp_path: Path) -> None:
    shapes = {
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 768),
        f"{UNET}output_blocks.2.1.conv.weight": (8, 8, 3, 3),
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
    }
    save_file({n: weights(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}, tmp_path / "base.safetensors")
    after = tuned(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors")
    loratool.extract(tmp_path / "base.safetensors", after, tmp_path / "a.safetensors", rank=2)
    assert {name.partition(".")[0] for name in load_file(tmp_path / "a.safetensors")} == {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_unet_up_blocks_0_upsamplers_0_conv",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    }


def test_budgets(tmp_path: Path) -> None:
    after = tuned(tmp_path / "tuned.safetensors", BASE, rank=8)
    only = ["to_q", "to_k", "conv"]
    report = loratool.extract(BASE, after, tmp_path / "a.safetensors", params=800, target=only)
    found: dict[str, Tensor] = load_file(tmp_path / "a.safetensors")
    assert sum(t.numel() for t in found.values()) == report.parameters <= 800
    loratool.extract(BASE, after, tmp_path / "b.safetensors", size=4000, target=only)
    assert sum(t.nbytes for t in load_file(tmp_path / "b.safetensors").values()) <= 4000
    with pytest.raises(UsageError, match="rank or energy"):
        loratool.extract(BASE, after, tmp_path / "c.safetensors", params=5000)
    with pytest.raises(InputError, match="no matrix gets a rank"):
        loratool.extract(BASE, after, tmp_path / "c.safetensors", params=10)
    assert not (tmp_path / "c.safetensors").exists()


def test_what_is_refused(tmp_path: Path, run: Callable[..., Any]) -> None:
    llama = FIXTURES / "llama"
    with pytest.raises(InputError, match="nothing can load it"):
        loratool.extract(llama / "base", llama / "tuned", tmp_path / "a.safetensors", to="kohya")
    after = tuned(tmp_path / "tuned.safetensors", BASE)
    with pytest.raises(UsageError, match="single files"):
        loratool.extract(BASE, after, tmp_path / "a")
    with pytest.raises(UsageError, match="none of"):
        loratool.extract(BASE, after, tmp_path / "a.safetensors", to="what")
    result = run("extract", BASE, after, "--rank", 2, "-o", tmp_path / "a.safetensors")
    assert result.exit_code == 0 and re.search(r"first_stage_model", result.stdout + result.stderr)
