"""The demo's models and adapters: random weights with the shapes, names and configs of real ones.

Bytes are the same on every machine: the numbers are those of `numerics.seeded_random`, products are summed term by term
in a fixed order, and each weight is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate, repeat
from math import sqrt
from operator import mul
from typing import Any

import numpy as np

from ...files.containers.safetensors_file import build_header, data_order
from ...files.dtypes import TensorSpec
from ...files.folder.side_files import encode_json
from ...numerics.arrays import Numbers, bytes_of, narrow, widen
from ...numerics.forms import BF16, E4M3, F16, F32, Form, Wide
from ...numerics.seeded_random import Draw

Tensors = dict[str, Numbers]

# path in the folder -> what it is
PARTS = {
    "base": "a Llama of 3 layers, bf16 in two shards",
    "tuned": "the same model after a full fine-tune",
    "adapter": "a PEFT adapter for all its linear layers, rank 8",
    "style": "a PEFT adapter for its attention only, rank 4",
    "fp8": "the base in float8, with a scale for each block of 16 x 16",
    "gpt2/base": "a GPT-2 of 2 layers, fp32, layers stored as (in, out), tied head",
    "gpt2/tuned": "the same model after a full fine-tune",
    "gpt2/adapter": "a PEFT adapter for it: rsLoRA, with ranks and alphas by module",
    "sdxl/base.safetensors": "some layers of an SDXL checkpoint in one file, fp16",
    "sdxl/adapter.safetensors": "a kohya adapter for it: UNet and both text encoders, rank 4",
}

SHARD = 200_000  # bytes

BLOCK = 16  # rows and columns with one scale

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 256,
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "hidden_act": "silu",
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32", "vocab_size": 256, "n_embd": 48,
    "n_layer": 2, "n_head": 4, "n_positions": 128, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05,
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ATTENTION = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}  # module -> (out, in)

MLP = {"gate_proj": (176, 64), "up_proj": (176, 64), "down_proj": (64, 176)}

CONV1D = {"attn.c_attn": (144, 48), "attn.c_proj": (48, 48), "mlp.c_fc": (192, 48), "mlp.c_proj": (48, 192)}

SDXL = {
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": (32, 32),
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (32, 64),
    "model.diffusion_model.input_blocks.5.0.in_layers.2.weight": (32, 32, 3, 3),
    "model.diffusion_model.output_blocks.2.2.conv.weight": (32, 32, 3, 3),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (64, 24),
    "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (96, 32),
    "first_stage_model.decoder.conv_in.weight": (16, 4, 3, 3),
}

KOHYA = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (32, 32),
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (32, 64),
    "lora_unet_input_blocks_5_0_in_layers_2": (32, 32, 3, 3),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (64, 24),
    "lora_te2_text_model_encoder_layers_0_self_attn_v_proj": (32, 32),
}


def demo_files(folder: str) -> dict[str, bytes]:
    """Return the content of each file by its path in the folder.

    Args:
        folder: the folder's name, by which the adapters name their bases.
    """
    base, gpt2 = _llama(), _gpt2()
    linear = {**{f"self_attn.{name}": shape for name, shape in ATTENTION.items()}, **_within("mlp.", MLP)}
    layers = {f"model.layers.{n}.{name}": shape for n in range(3) for name, shape in linear.items()}
    blocks = {f"transformer.h.{n}.{name}": shape for n in range(2) for name, shape in CONV1D.items()}
    attention = {name: shape for name, shape in layers.items() if "self_attn" in name}
    patterns = {"rank_pattern": {"c_attn": 8}, "alpha_pattern": {"mlp.c_proj": 3}}
    rslora = {"use_rslora": True, "fan_in_fan_out": True, **patterns}
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    quantized = {"quantization_config": {**fp8, "modules_to_not_convert": ["lm_head"]}}
    image = {"ss_network_module": "networks.lora", "ss_network_dim": "4"}
    return {
        **_within("base/", _model(base, LLAMA, SHARD)),
        **_within("tuned/", _model(_tuned(base), LLAMA, SHARD)),
        **_within("adapter/", _adapter("adapter", layers, f"{folder}/base", r=8, lora_alpha=16)),
        **_within("style/", _adapter("style", attention, f"{folder}/base", r=4, lora_alpha=4)),
        **_within("fp8/", _model(_float8(base), {**LLAMA, **quantized})),
        **_within("gpt2/base/", _model(gpt2, GPT2)),
        **_within("gpt2/tuned/", _model(_tuned(gpt2), GPT2)),
        **_within("gpt2/adapter/", _adapter("gpt2", blocks, f"{folder}/gpt2/base", r=4, lora_alpha=6, **rslora)),
        "sdxl/base.safetensors": _file(
            {name: _rounded(_normal(name, *shape) * 0.05, F16) for name, shape in SDXL.items()},
            {"modelspec.architecture": "stable-diffusion-xl-v1-base"},
        ),
        "sdxl/adapter.safetensors": _file(dict(_kohya()), image),
    }


def _within(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _normal(name: str, *shape: int) -> Wide:
    return Draw(0, name).normal("demo", *shape)


def _rounded(x: Wide, form: Form) -> Numbers:
    out = Numbers.empty(form, *x.shape)
    narrow(x.astype(np.float32), out)
    return out


def _low_rank(name: str, shape: tuple[int, ...], rank: int, fall: float) -> Wide:
    """Return a random matrix of a rank, whose singular values fall by about `fall` each, with entries about 1."""
    left, right = _normal(f"{name} left", rank, shape[0]), _normal(f"{name} right", rank, shape[1])
    total = np.zeros(shape)
    for k, size in enumerate(_falling(rank, fall)):
        total = total + np.outer(left[k], right[k]) * size
    return total


def _falling(count: int, fall: float) -> list[float]:
    """Return 1, fall, fall * fall, ...; a C library's power has another last bit elsewhere."""
    return list(accumulate(repeat(fall, count - 1), mul, initial=1.0))


def _gain(name: str) -> float:
    """Return by what a change is larger or smaller than others: between 0.6 and 1.4."""
    return 1 + 0.4 * Draw(0, name).uniform("gain", 1).item()


def _weight(name: str, shape: tuple[int, ...]) -> Wide:
    """Return a weight with some directions that are stronger than the rest, as training leaves them."""
    return (_normal(name, *shape) + _low_rank(f"{name} strong", shape, 4, 0.7) * 0.5) * 0.08


def _llama() -> Tensors:
    weights = {"model.embed_tokens.weight": _normal("embed_tokens", 256, 64) * 0.1}
    for n in range(3):
        for group, modules in (("self_attn", ATTENTION), ("mlp", MLP)):
            names = {f"model.layers.{n}.{group}.{name}.weight": shape for name, shape in modules.items()}
            weights |= {name: _weight(name, shape) for name, shape in names.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{n}.{norm}.weight"] = 1 + _normal(f"{n} {norm}", 64) * 0.1
    weights |= {"model.norm.weight": 1 + _normal("norm", 64) * 0.1, "lm_head.weight": _weight("lm_head", (256, 64))}
    return {name: _rounded(W, BF16) for name, W in weights.items()}


def _gpt2() -> Tensors:
    weights = {"wte.weight": _normal("wte", 256, 48) * 0.1, "wpe.weight": _normal("wpe", 128, 48) * 0.02}
    for n in range(2):
        for module, (out, inp) in CONV1D.items():
            name = f"h.{n}.{module}"
            weights |= {
                f"{name}.weight": _weight(name, (inp, out)),
                f"{name}.bias": _normal(f"{name} bias", out) * 0.02,
            }
        for norm in ("ln_1", "ln_2"):
            weights |= _layer_norm(f"h.{n}.{norm}")
    weights |= _layer_norm("ln_f")
    return {f"transformer.{name}": _rounded(W, F32) for name, W in weights.items()}


def _layer_norm(name: str) -> dict[str, Wide]:
    return {f"{name}.weight": 1 + _normal(name, 48) * 0.1, f"{name}.bias": _normal(f"{name} bias", 48) * 0.02}


def _tuned(base: Mapping[str, Numbers]) -> Tensors:
    """Return a model after a fine-tune: matrices moved in few directions and by a little noise, vectors by noise."""
    tuned = {}
    for name, W in base.items():
        change = _normal(f"{name} tuned", *W.shape) * 0.002
        if len(W.shape) == 2:
            change = change + _low_rank(f"{name} tuned", W.shape, 16, 0.88) * (0.006 * _gain(f"{name} tuned"))
        tuned[name] = _rounded(W.wide() + change, W.form)
    return tuned


def _float8(base: Mapping[str, Numbers]) -> Tensors:
    """Return a model with its linear layers in float8 with scales of blocks, as DeepSeek-V3 and transformers do."""
    stored = {}
    for name, W in base.items():
        if "_proj" not in name:
            stored[name] = W
            continue
        out, inp = W.shape
        blocks = widen(W, np.empty(W.shape, np.float32)).reshape(out // BLOCK, BLOCK, inp // BLOCK, BLOCK)
        inverse = 1 / np.abs(blocks).max((1, 3)) * 448
        codes = (blocks * inverse[:, None, :, None]).reshape(out, inp)
        stored |= {name: _rounded(codes, E4M3), f"{name}_scale_inv": Numbers.of(1 / inverse)}
    return stored


def _adapter(name: str, modules: Mapping[str, tuple[int, int]], base: str, **fields: Any) -> dict[str, bytes]:
    """Return the files of a PEFT adapter; later directions of B are shorter, as training leaves them."""
    tensors = Tensors()
    for module, (out, inp) in modules.items():
        r = next((r for end, r in fields.get("rank_pattern", {}).items() if module.endswith(end)), fields["r"])
        key, path = f"{name} {module}", f"base_model.model.{module}"
        A, B = _normal(f"{key} A", r, inp) / sqrt(inp), _normal(f"{key} B", out, r) * (0.02 * _gain(key))
        B = B * np.array(_falling(r, 0.8))
        tensors |= {f"{path}.lora_A.weight": _rounded(A, F32), f"{path}.lora_B.weight": _rounded(B, F32)}
    ends = sorted({module.rpartition(".")[2] for module in modules})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": ends,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        **fields,
    }
    return {"adapter_config.json": encode_json(config), "adapter_model.safetensors": _file(tensors)}


def _kohya() -> Iterator[tuple[str, Numbers]]:
    for name, (out, *rest) in KOHYA.items():
        yield f"{name}.lora_down.weight", _rounded(_normal(f"{name} down", 4, *rest) * 0.1, F16)
        yield f"{name}.lora_up.weight", _rounded(_normal(f"{name} up", out, 4, *[1] * (len(rest) - 1)) * 0.02, F16)
        yield f"{name}.alpha", _rounded(np.array(2.0), F16)


def _model(tensors: Mapping[str, Numbers], config: Mapping[str, Any], shard: int | None = None) -> dict[str, bytes]:
    """Return the files of a model's folder, in shards with an index if `shard` bytes are not enough for all."""
    parts, room = [Tensors()], shard or 0
    for name, W in tensors.items():
        if shard and W.bits.nbytes > room:
            parts, room = [*parts, {}], shard
        parts[-1][name], room = W, room - W.bits.nbytes
    files = {f"model-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, 1)}
    if len(parts) == 1:
        return {"config.json": encode_json(config), "model.safetensors": _file(parts[0])}
    held = {name: file for file, part in files.items() for name in part}
    numbers, nbytes = (sum(sizes) for sizes in zip(*((W.size, W.bits.nbytes) for W in tensors.values()), strict=True))
    index = {
        "metadata": {"total_parameters": numbers, "total_size": nbytes},
        "weight_map": {name: held[name] for name in sorted(held)},
    }
    side = {"config.json": encode_json(config), "model.safetensors.index.json": encode_json(index)}
    return {**side, **{file: _file(part) for file, part in files.items()}}


def _file(tensors: Mapping[str, Numbers], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a safetensors file."""
    specs = {name: TensorSpec(W.form.name, W.shape) for name, W in tensors.items()}
    header, _ = build_header(specs, names := data_order(specs), metadata or {"format": "pt"})
    return b"".join([header, *(bytes_of(tensors[name].bits) for name in names)])
