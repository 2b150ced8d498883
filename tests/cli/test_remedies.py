"""Follow the remedies that name --base or --architecture: with exit 4 the option makes the command succeed.

A command that has no such option, or refuses it, says what to run first instead, with exit 3.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, weights, write_model, write_peft
from safetensors.torch import save_file

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "head_dim": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 11,
    "intermediate_size": 24, "tie_word_embeddings": False,
}  # fmt: skip
Q, EMBED = "model.layers.0.self_attn.q_proj", "model.embed_tokens"


def base(path: Path) -> Path:
    names = {Q: (16, 16), EMBED: (11, 16), "lm_head": (11, 16)}
    return write_model(
        path / "base", {f"{n}.weight": weights(*s, seed=i) for i, (n, s) in enumerate(names.items())}, LLAMA
    )


def lora(path: Path) -> Path:
    return write_peft(path / "lora", {Q: factors(16, 16, 2)})


def pissa(path: Path) -> Path:
    return write_peft(path / "pissa", {Q: factors(16, 16, 2)}, init_lora_weights="pissa")


def dora(path: Path) -> Path:
    folder = write_peft(path / "dora", {Q: factors(16, 16, 2)}, use_dora=True)
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"base_model.model.{Q}.lora_magnitude_vector"] = torch.ones(16)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def torchtune(path: Path) -> Path:
    """Without the model's config.json, which tells the order of its rows."""
    folder = path / "torchtune"
    folder.mkdir()
    A, B = factors(16, 16, 2)
    torch.save(
        {f"layers.0.attn.q_proj.lora_{s}.weight": t for s, t in (("a", A), ("b", B))}, folder / "adapter_model.pt"
    )
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def mlx(path: Path) -> Path:
    """With an embedding, of which only the model tells whether the head is tied to it."""
    folder = path / "mlx"
    folder.mkdir()
    tensors = {f"{EMBED}.lora_a": torch.ones(11, 2), f"{EMBED}.lora_b": torch.ones(2, 16)}
    save_file(tensors, folder / "adapters.safetensors")
    said = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def image(path: Path) -> Path:
    name = "transformer.transformer_blocks.0.attn.to_q"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}, path / "i.safetensors"
    )
    return path / "i.safetensors"


Make = Callable[[Path], Path]
# what it is -> (the command line, in which a function is what it makes; the exit code)
CALLS: dict[str, tuple[list[str | Make], int]] = {
    "DoRA for a format of LoRA": (["convert", dora, "--to", "gguf", "-o", "o.gguf"], 4),
    "DoRA and a layout": (
        ["convert", dora, "--to", "loralib", "--layout", "split", "--base", base, "-o", "o.safetensors"], 3,
    ),
    "a class without a model": (["convert", lora, "--to", "peft", "--architecture", "LlamaForCausalLM", "-o", "o"], 4),
    "a class for another format": (["convert", lora, "--to", "mlx", "--architecture", "LlamaModel", "-o", "o"], 2),
    "a class of an image model": (
        ["convert", image, "--to", "kohya", "--architecture", "LlamaModel", "-o", "o.safetensors"], 4,
    ),
    "a family of a language model": (["convert", lora, "--to", "peft", "--architecture", "flux", "-o", "o"], 2),
    "an image family": (["convert", image, "--to", "kohya", "-o", "o.safetensors"], 4),
    "names of GGUF": (["convert", lora, "--to", "gguf", "-o", "o.gguf"], 4),
    "torchtune's rows": (["convert", torchtune, "--to", "peft", "-o", "o"], 4),
    "torchtune's rows, resized": (["resize", torchtune, "--rank", "1", "-o", "o"], 3),
    "torchtune's rows, before training": (["merge", base, pissa, "--initial", torchtune, "-o", "o"], 3),
    "torchtune's rows, before training, converted": (
        ["convert", pissa, "--to", "peft", "--plain", "--initial", torchtune, "-o", "o"], 3,
    ),
    "MLX's embedding": (["convert", mlx, "--to", "peft", "-o", "o"], 4),
    "MLX's embedding, compared": (["diff", mlx, lora], 4),
    "MLX's embedding, compared with several": (["diff", mlx, lora, pissa], 3),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_remedy_that_names_an_option_works(
    name: str, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, code = CALLS[name]
    line = [str(word if isinstance(word, str) else word(tmp_path)) for word in words]
    result = run(*line)
    assert result.exit_code == code, result.stderr
    if code == 4:
        match = re.search(r"hint: add (--[^,\n(]+?)(?: with | or |,| \(|$)", result.stderr, re.MULTILINE)
        assert match, result.stderr
        added = [str(base(tmp_path)) if word == "BASE" else word for word in shlex.split(match[1])]
        again = run(*line, *added)
        assert again.exit_code == 0, f"{added}: {again.stderr}"
    else:
        assert not re.search(r"hint: add --(base|architecture)", result.stderr), result.stderr
