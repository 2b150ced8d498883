"""Write Llama-style models of any size for the benchmarks, in seconds: python models.py OUT [small|large|wide|narrow].

The values repeat (one random block, tiled), since neither side's time or memory depends on them.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from loratool.files.containers.safetensors_file import build_header
from loratool.files.dtypes import TensorSpec

# name -> (layers, hidden, intermediate, vocabulary, key and value width, shards)
SIZES = {
    "small": (4, 2048, 5632, 32000, 256, 2),  # 0.6 GB
    "large": (14, 4096, 11008, 32000, 4096, 3),  # 6.2 GB
    "wide": (0, 4096, 0, 128_000, 0, 1),  # one matrix of 1 GB
    "narrow": (32, 512, 1376, 4000, 512, 1),  # a 7B's modules, an eighth as wide: 0.2 GB
}
RANK = 16
HEAD = "lm_head.weight"


def shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    layers, hidden, inner, vocabulary, narrow, _ = SIZES[size]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        for name, out, inp in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", narrow, hidden),
            ("self_attn.v_proj", narrow, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            yield f"model.layers.{i}.{name}.weight", (out, inp)
        yield f"model.layers.{i}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{i}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield HEAD, (vocabulary, hidden)


def adapted(size: str) -> dict[str, tuple[int, ...]]:
    """List all linear layers; the head too where there is nothing else."""
    return {n: s for n, s in shapes(size) if len(s) == 2 and ("layers" in n or (size == "wide" and n == HEAD))}


def make(folder: Path, size: str) -> int:
    """Write `folder/base` and `folder/adapter`; return the base's bytes."""
    layers, hidden, inner, vocabulary, narrow, shards = SIZES[size]
    specs = {name: TensorSpec("BF16", shape) for name, shape in shapes(size)}
    (folder / "base").mkdir(parents=True)
    names = list(specs)
    weight_map = {}
    for i in range(shards):
        members = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        write_repeated(folder / "base" / file, {name: specs[name] for name in members}, {"format": "pt"})
        weight_map.update(dict.fromkeys(members, file))
    total = sum(spec.nbytes for spec in specs.values())
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    heads = hidden // 64
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads * narrow // hidden),
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "base" / "config.json").write_text(json.dumps(config))
    make_adapter(folder / "adapter", size)
    return total


def make_tuned(folder: Path, size: str) -> None:
    """Write `folder/tuned`: `folder/base` with a delta on all linear layers, its spectrum k^-0.7 and noise."""
    (folder / "tuned").mkdir()
    for file in sorted((folder / "base").iterdir()):
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / "tuned")
            continue
        tensors = load_file(file)
        for name in tensors.keys() & adapted(size).keys():
            tensors[name] = (tensors[name].float() + _change(*tensors[name].shape, seed=sum(map(ord, name)))).bfloat16()
        save_file(tensors, folder / "tuned" / file.name, metadata={"format": "pt"})


def _change(out: int, inp: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    k = min(256, out, inp)
    A, B = torch.randn(k, inp, generator=g) / inp**0.5, torch.randn(out, k, generator=g) / out**0.5
    return (B * torch.arange(1, k + 1).float() ** -0.7) @ A * 0.6 + torch.randn(out, inp, generator=g) * 1e-4


def make_adapter(folder: Path, size: str, dora: bool = False, vocabulary: bool = False) -> None:
    """Write LoRA or DoRA on all linear layers; `vocabulary`: on the embedding and the head too."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in shapes(size) if vocabulary else adapted(size).items():
        if len(shape) != 2:
            continue
        out, inp = shape
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if "embed" in name:
            tensors[f"{module}.lora_embedding_A"] = torch.randn(RANK, out, generator=generator) / out**0.5
            tensors[f"{module}.lora_embedding_B"] = torch.randn(inp, RANK, generator=generator) * 0.005
        else:
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, inp, generator=generator) / inp**0.5
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.005
        if dora:
            rows = inp if "embed" in name else out
            tensors[f"{module}.lora_magnitude_vector"] = torch.rand(rows, generator=generator) + 0.5
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({key.split(".lora_")[0].split(".")[-1] for key in tensors})
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "use_dora": dora}))


def _resnet(name: str, inp: int, out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.in_layers.0.weight", (inp,)
    yield f"{name}.in_layers.2.weight", (out, inp, 3, 3)
    yield f"{name}.emb_layers.1.weight", (out, 1280)
    yield f"{name}.out_layers.0.weight", (out,)
    yield f"{name}.out_layers.3.weight", (out, out, 3, 3)
    if inp != out:
        yield f"{name}.skip_connection.weight", (out, inp, 1, 1)


def _attention(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    block = f"{name}.transformer_blocks.0"
    yield f"{name}.norm.weight", (width,)
    yield f"{name}.proj_in.weight", (width, width, 1, 1)
    for i, context in ((1, width), (2, 768)):
        for x, inp in (("q", width), ("k", context), ("v", context), ("out.0", width)):
            yield f"{block}.attn{i}.to_{x}.weight", (width, inp)
    yield f"{block}.ff.net.0.proj.weight", (8 * width, width)
    yield f"{block}.ff.net.2.weight", (width, 4 * width)
    yield from ((f"{block}.norm{i}.weight", (width,)) for i in (1, 2, 3))
    yield f"{name}.proj_out.weight", (width, width, 1, 1)


def sd15_unet() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return the weights of SD 1.5's UNet under its own names (CompVis, openaimodel.py), biases left out."""
    yield "time_embed.0.weight", (1280, 320)
    yield "time_embed.2.weight", (1280, 1280)
    yield "input_blocks.0.0.weight", (320, 4, 3, 3)
    widths, skips, number, inp = (320, 640, 1280, 1280), [320], 1, 320
    for level, width in enumerate(widths):
        for _ in range(2):
            yield from _resnet(f"input_blocks.{number}.0", inp, width)
            if level < 3:
                yield from _attention(f"input_blocks.{number}.1", width)
            inp, number = width, number + 1
            skips.append(width)
        if level < 3:
            yield f"input_blocks.{number}.0.op.weight", (width, width, 3, 3)
            number += 1
            skips.append(width)
    yield from _resnet("middle_block.0", 1280, 1280)
    yield from _attention("middle_block.1", 1280)
    yield from _resnet("middle_block.2", 1280, 1280)
    number = 0
    for level in (3, 2, 1, 0):
        for layer in range(3):
            yield from _resnet(f"output_blocks.{number}.0", inp + skips.pop(), widths[level])
            inp, last = widths[level], 1
            if level < 3:
                yield from _attention(f"output_blocks.{number}.1", inp)
                last = 2
            if layer == 2 and level:
                yield f"output_blocks.{number}.{last}.conv.weight", (inp, inp, 3, 3)
            number += 1
    yield "out.0.weight", (320,)
    yield "out.2.weight", (4, 320, 3, 3)


def sd15() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Write SD 1.5 in a single file: the UNet, the text encoder, and a VAE of its size."""
    yield from ((f"model.diffusion_model.{name}", shape) for name, shape in sd15_unet())
    text = "cond_stage_model.transformer.text_model"
    yield f"{text}.embeddings.token_embedding.weight", (49408, 768)
    for i in range(12):
        for x in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{text}.encoder.layers.{i}.self_attn.{x}.weight", (768, 768)
        yield f"{text}.encoder.layers.{i}.mlp.fc1.weight", (3072, 768)
        yield f"{text}.encoder.layers.{i}.mlp.fc2.weight", (768, 3072)
    yield from ((f"first_stage_model.decoder.conv_{i}.weight", (512, 512, 3, 3)) for i in range(35))


def sd15_adapted() -> dict[str, tuple[int, ...]]:
    """List each linear layer and convolution of the UNet and of the text encoder, by their names."""
    adapted = ("model.diffusion_model.", "cond_stage_model.transformer.text_model.encoder.")
    return {n: shape for n, shape in sd15() if len(shape) > 1 and n.startswith(adapted)}


def write_repeated(path: Path, specs: dict[str, TensorSpec], metadata: dict[str, str], scale: float = 0.02) -> int:
    """Write a file of these tensors, one random block over and over; return its bytes."""
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[next(iter(specs.values())).dtype]
    block = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    data = memoryview(block.view(torch.uint8).numpy())
    header, _ = build_header(specs, list(specs), metadata)
    with open(path, "wb") as out:
        out.write(header)
        for spec in specs.values():
            for start in range(0, spec.nbytes, len(data)):
                out.write(data[: spec.nbytes - start])
    return path.stat().st_size


if __name__ == "__main__":
    print(f"{make(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else 'small') / 1e9:.2f} GB")
