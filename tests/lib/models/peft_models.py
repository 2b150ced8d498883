"""Build small models of transformers, write PEFT adapters of every kind for them, and compare their answers.

The models are in float64, so that an answer tells a wrong merge from rounding; the oracle is peft's own forward pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft", minversion="0.19")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOKENS = torch.arange(32).reshape(2, 16)
ADAPTER = re.compile(r"\.(lora_|token_adapter\.|modules_to_save\.)|bias$")


def llama(cls: str = "LlamaForCausalLM", **config: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": False}
    return getattr(transformers, cls)(transformers.LlamaConfig(**{**sizes, **heads, **config}))


def gpt2(**config: Any) -> Any:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 16, "tie_word_embeddings": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **config}))


def randomize(model: Any, seed: int = 0) -> Any:
    """Give a model random weights in float64, or an adapter random values of which none is zero."""
    g = torch.Generator().manual_seed(seed)
    adapter = isinstance(model, peft.PeftModel)
    for name, parameter in model.double().eval().named_parameters():
        noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.3
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(1 + noise.abs())
        elif not adapter or (parameter.requires_grad and ADAPTER.search(name)):
            parameter.data.copy_(noise)
    return model


def load(folder: Path, cls: Any, **options: Any) -> Any:
    return cls.from_pretrained(folder, dtype=torch.float64, **options).eval()


def answer(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def agree(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= 1e-6 * wanted.abs().max())


def write_base(folder: Path, model: Any, **options: Any) -> Path:
    model = randomize(model)
    model.tie_weights()
    model.save_pretrained(folder, **options)
    return folder


def wrap(base: Any, seed: int = 1, name: str = "default", **config: Any) -> Any:
    """Return a PeftModel with random non-zero factors around `base`."""
    config = {"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM", **config}
    return randomize(peft.get_peft_model(base, peft.LoraConfig(**config), adapter_name=name), seed)


@dataclass(frozen=True)
class Pair:
    """Folders of a base and an adapter, and the answer of peft's forward pass of both."""

    cls: Any
    base: Path
    adapter: Path
    wanted: Tensor

    def holds(self, out: Path, tokens: Tensor = TOKENS) -> bool:
        """Return whether the merged model answers as base and adapter did, and not as the base alone."""
        return agree(answer(load(out, self.cls), tokens), self.wanted)


def write_pair(folder: Path, model: Any, base: Mapping[str, Any] | None = None, **config: Any) -> Pair:
    folder.mkdir(exist_ok=True)
    cls, where = type(model), write_base(folder / "base", model, **(base or {}))
    wrapped = wrap(load(where, cls), **config)
    wrapped.save_pretrained(folder / "adapter")
    wanted = answer(wrapped)
    assert not agree(answer(load(where, cls)), wanted)
    return Pair(cls, where, folder / "adapter", wanted)


def by_peft(base: Path, adapter: Path, cls: Any) -> dict[str, Tensor]:
    """Return peft's own merge in float64, which is right where nothing is tied."""
    return peft.PeftModel.from_pretrained(load(base, cls), adapter).merge_and_unload().state_dict()


@dataclass(frozen=True)
class Names:
    """The names of a model's parts."""

    make: Callable[..., Any]
    linear: Sequence[str]
    biased: Sequence[str]
    embed: str
    norm: str


FAMILIES = {
    "llama": Names(llama, ("q_proj", "v_proj", "down_proj"), ("q_proj", "v_proj"), "embed_tokens", "norm"),
    "gpt2": Names(gpt2, ("c_attn", "c_proj", "c_fc"), ("c_attn", "c_proj", "c_fc"), "wte", "ln_f"),
}


def kinds(n: Names) -> dict[str, dict[str, Any]]:
    """Return the fields of the LoraConfig of each kind."""
    linear, biased, both = [*n.linear], [*n.biased], [n.embed, "lm_head"]
    patterns = {
        "rank_pattern": {linear[0]: 1, rf"1\..*{linear[1]}": 3},
        "alpha_pattern": {linear[-1]: 5, rf"0\..*\.{linear[0]}": 0.5},
    }
    dora = {"use_dora": True, "target_modules": linear}
    lora = {"target_modules": linear}
    return {
        "lora": lora,
        "rslora": {"use_rslora": True, **lora},
        "patterns": {**patterns, **lora},
        "rslora, patterns": {**patterns, "use_rslora": True, **lora},
        "dora": dora,
        "dora, rslora": {"use_rslora": True, **dora},
        "dora, patterns": {**patterns, **dora},
        "embedding": {"target_modules": [*linear, n.embed]},
        "embedding alone": {"target_modules": [n.embed]},
        "head": {"target_modules": [*linear, "lm_head"]},
        "embedding and head": {"target_modules": [*linear, *both]},
        "embedding and head, dora": {"target_modules": [*linear, *both], "use_dora": True},
        "lora_bias": {"target_modules": biased, "lora_bias": True},
        "lora_bias, rslora": {"target_modules": biased, "lora_bias": True, "use_rslora": True},
        "bias=all": {"bias": "all", **lora},
        "bias=lora_only": {"bias": "lora_only", **lora},
        "lora_bias, bias=all": {"target_modules": biased, "lora_bias": True, "bias": "all"},
        "lora_bias, bias=lora_only": {"target_modules": biased, "lora_bias": True, "bias": "lora_only"},
        "dora, bias=all": {"bias": "all", **dora},
        "saved norm": {"modules_to_save": [n.norm], **lora},
        "saved embedding": {"modules_to_save": [n.embed], **lora},
        "saved head": {"modules_to_save": ["lm_head"], **lora},
        "saved embedding and head": {"modules_to_save": both, **lora},
        "tokens": {"trainable_token_indices": [3, 30], **lora},
        "tokens, unsorted": {"trainable_token_indices": [17, 3, 30, 0], **lora},
        "tokens by name": {"trainable_token_indices": {n.embed: [5, 3], "lm_head": [1]}, **lora},
        "all at once": {
            **dora,
            **patterns,
            "use_rslora": True,
            "bias": "all",
            "modules_to_save": [n.norm, "lm_head"],
            "trainable_token_indices": [9, 4],
        },
        "all at once, otherwise": {
            "target_modules": [*biased, n.embed],
            "lora_bias": False,
            "bias": "lora_only",
            "use_dora": True,
            "modules_to_save": [n.norm],
            "trainable_token_indices": {"lm_head": [31, 2]},
        },
    }


# Those of the default run: each rule for a kind of tensor is in one of them. GPT-2 differs by its transposed weights
FEW = {
    "llama": (
        "lora", "rslora, patterns", "dora", "embedding alone", "embedding and head, dora", "lora_bias, rslora",
        "lora_bias, bias=all", "saved embedding and head", "tokens by name", "all at once", "all at once, otherwise",
    ),
    "gpt2": ("lora", "all at once"),
}  # fmt: skip


def kinds_of_families() -> Iterator[Any]:
    """Yield each family with each kind, all but FEW of them slow."""
    for family, names in FAMILIES.items():
        for kind in kinds(names):
            few = kind in FEW[family]
            yield pytest.param(family, kind, id=f"{family}-{kind}", marks=() if few else pytest.mark.slow)


# Small models with experts. All are loaded with experts_implementation="eager": the fast ones have no float64.
EXPERT_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def mixtral(width: int = 24) -> Any:
    config = {"vocab_size": 32, "num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": width}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**EXPERT_SIZES, **config))


def qwen3_moe(width: int = 12) -> Any:
    config = {"vocab_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "intermediate_size": 24}
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**EXPERT_SIZES, **config, moe_intermediate_size=width)
    )


def gpt_oss(width: int = 24) -> Any:
    config = {"vocab_size": 32, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**EXPERT_SIZES, **config, intermediate_size=width))


EAGER = {"experts_implementation": "eager"}
GATE_UP, DOWN, ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def llava(**config: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "llama", "num_key_value_heads": 1, "vocab_size": 40, **sizes}
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 16, **sizes}
    full = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=39, **config)
    return transformers.LlavaForConditionalGeneration(full)


def gemma3() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    text = {**sizes, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 40}
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": 40, "rope_parameters": rope}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)
