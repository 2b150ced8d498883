"""Make the largest checkpoints as sparse files, in seconds: python trillion.py OUT [deepseek-v3|kimi-k2|tiny] [bf16].

Headers, index and config.json are those of the released models (their config.json and modeling_deepseek.py); data are
zeros that take no place on the disk. `OUT/base` is the model, `OUT/adapter` a PEFT LoRA on all of its linear layers,
each expert's own, but those of the MTP layer, which no class has. FP8 weights have a scale for each block of 128 x 128.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.files.containers.safetensors_file import build_header, data_order
from loratool.files.dtypes import TensorSpec

RANK = 16
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """The numbers of a config.json of this family that shapes follow from, under their names there."""

    model_type: str
    num_hidden_layers: int
    first_k_dense_replace: int  # layers before the first mixture
    n_routed_experts: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    vocab_size: int
    num_nextn_predict_layers: int  # MTP layers, after the others
    shards: int
    shard_name: str
    block: int = 128


NUMBERED, COUNTED = "model-{:05d}-of-{:06d}.safetensors", "model-{}-of-{}.safetensors"
MODELS = {
    "deepseek-v3": Sizes(
        "deepseek_v3", 61, 3, 256, 7168, 18432, 2048, 128, 1536, 512, 128, 64, 128, 129280, 1, 163, NUMBERED
    ),
    "kimi-k2": Sizes("kimi_k2", 61, 1, 384, 7168, 18432, 2048, 64, 1536, 512, 128, 64, 128, 163840, 0, 61, COUNTED),
    "tiny": Sizes("deepseek_v3", 3, 1, 4, 16, 24, 8, 2, 8, 4, 4, 4, 4, 32, 1, 3, NUMBERED, block=8),
}


def attention(sizes: Sizes) -> dict[str, Shape]:
    heads, width = sizes.num_attention_heads, sizes.hidden_size
    asked, nope = sizes.q_lora_rank, sizes.qk_nope_head_dim
    return {
        "self_attn.q_a_proj": (asked, width),
        "self_attn.q_b_proj": (heads * (nope + sizes.qk_rope_head_dim), asked),
        "self_attn.kv_a_proj_with_mqa": (sizes.kv_lora_rank + sizes.qk_rope_head_dim, width),
        "self_attn.kv_b_proj": (heads * (nope + sizes.v_head_dim), sizes.kv_lora_rank),
        "self_attn.o_proj": (width, heads * sizes.v_head_dim),
    }


def mlp(path: str, width: int, inner: int) -> dict[str, Shape]:
    return {
        f"{path}.gate_proj": (inner, width),
        f"{path}.up_proj": (inner, width),
        f"{path}.down_proj": (width, inner),
    }


def linears(sizes: Sizes, layer: int) -> dict[str, Shape]:
    """Return the linear layers of a decoder layer, by their paths in it."""
    width, inner = sizes.hidden_size, sizes.moe_intermediate_size
    found = attention(sizes)
    if layer < sizes.first_k_dense_replace:
        return found | mlp("mlp", width, sizes.intermediate_size)
    for expert in range(sizes.n_routed_experts):
        found |= mlp(f"mlp.experts.{expert}", width, inner)
    return found | mlp("mlp.shared_experts", width, inner)


def modules(sizes: Sizes) -> dict[str, Shape]:
    """Return the linear layers of the class, which the adapter is on: module path -> (out, in)."""
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(sizes.num_hidden_layers)
        for name, shape in linears(sizes, layer).items()
    }


def tensors(sizes: Sizes, dtype: str = "F8_E4M3") -> Iterator[tuple[str, TensorSpec]]:
    """Yield the tensors of the model layer by layer, with block scales unless `dtype` is BF16."""
    width, words = sizes.hidden_size, (sizes.vocab_size, sizes.hidden_size)
    plain: dict[str, Shape] = {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    plain |= {"self_attn.q_a_layernorm": (sizes.q_lora_rank,), "self_attn.kv_a_layernorm": (sizes.kv_lora_rank,)}
    predictor: dict[str, Shape] = {"embed_tokens": words, "enorm": (width,), "hnorm": (width,)}
    predictor |= {"eh_proj": (width, 2 * width), "shared_head.norm": (width,), "shared_head.head": words}
    yield "model.embed_tokens.weight", TensorSpec("BF16", words)
    for layer in range(sizes.num_hidden_layers + sizes.num_nextn_predict_layers):
        path = f"model.layers.{layer}"
        for name, (out, inp) in linears(sizes, layer).items():
            yield f"{path}.{name}.weight", TensorSpec(dtype, (out, inp))
            if dtype != "BF16":
                blocks = (-(-out // sizes.block), -(-inp // sizes.block))
                yield f"{path}.{name}.weight_scale_inv", TensorSpec("F32", blocks)
        if layer >= sizes.first_k_dense_replace:
            yield f"{path}.mlp.gate.weight", TensorSpec("BF16", (sizes.n_routed_experts, width))
            yield f"{path}.mlp.gate.e_score_correction_bias", TensorSpec("F32", (sizes.n_routed_experts,))
        own = plain | (predictor if layer >= sizes.num_hidden_layers else {})
        for name, shape in own.items():
            yield f"{path}.{name}.weight", TensorSpec("BF16", shape)
    yield "model.norm.weight", TensorSpec("BF16", (width,))
    yield "lm_head.weight", TensorSpec("BF16", words)


def config(sizes: Sizes, dtype: str = "F8_E4M3") -> dict[str, Any]:
    fields = {name: value for name, value in vars(sizes).items() if name not in ("shards", "shard_name", "block")}
    codes = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    block = [sizes.block, sizes.block]
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        **fields,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_key_value_heads": sizes.num_attention_heads,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **({"quantization_config": {**codes, "weight_block_size": block}} if dtype != "BF16" else {}),
    }


def write_sparse(path: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Write a file of zeros, in the order of the official writer, that takes the disk no more than its header."""
    header, _ = build_header(specs, data_order(specs), {"format": "pt"})
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in specs.values()))


def make_base(folder: Path, name: str, dtype: str = "F8_E4M3") -> int:
    """Write a model of MODELS; return its bytes."""
    sizes, specs = MODELS[name], dict(tensors(MODELS[name], dtype))
    folder.mkdir(parents=True)
    total, done = sum(spec.nbytes for spec in specs.values()), 0
    shards: list[dict[str, TensorSpec]] = [{} for _ in range(sizes.shards)]
    for tensor, spec in specs.items():
        shards[done * sizes.shards // total][tensor] = spec
        done += spec.nbytes
    holder: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        file = sizes.shard_name.format(number, sizes.shards)
        write_sparse(folder / file, members)
        holder |= dict.fromkeys(members, file)
    index = {"metadata": {"total_size": total}, "weight_map": holder}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(sizes, dtype)))
    return total


def make_adapter(folder: Path, name: str) -> int:
    """Write a PEFT adapter of BF16 factors for a model of MODELS; return how many modules it has."""
    specs, found = {}, modules(MODELS[name])
    for module, (out, inp) in found.items():
        specs[f"base_model.model.{module}.lora_A.weight"] = TensorSpec("BF16", (RANK, inp))
        specs[f"base_model.model.{module}.lora_B.weight"] = TensorSpec("BF16", (out, RANK))
    folder.mkdir(parents=True)
    write_sparse(folder / "adapter_model.safetensors", specs)
    targets = sorted({module.rpartition(".")[2] for module in found})
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return len(found)


if __name__ == "__main__":
    where, model = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "deepseek-v3"
    stored = "BF16" if "bf16" in sys.argv[3:] else "F8_E4M3"
    print(f"{make_base(where / 'base', model, stored) / 1e9:.3f} GB, {make_adapter(where / 'adapter', model)} modules")
