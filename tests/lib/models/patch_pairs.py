"""Write pairs of small models, one of which was made of the other, by the packages that wrote such files first."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from conftest import FIXTURES, weights, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.files.ggml_blocks import blocks_of
from lib.files.gguf_bytes import tensor, write
from lib.models.diffusers_folders import pipeline
from lib.models.gguf_models import llama_fields, llama_weights, write_llama
from loratool.files.dtypes import BLOCK_TYPES, GGML_TYPES

Pair = tuple[Path, Path]

BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2


def tree(path: Path) -> dict[str, bytes]:
    """Return the files of a model by their names, or of one file."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in path.rglob("*") if each.is_file()}


def moved(x: Tensor, share: float = 1e-3, seed: int = 0) -> Tensor:
    """Return numbers near others, as a fine-tune leaves them."""
    if not x.is_floating_point() or not x.numel():
        return x.clone()
    g = torch.Generator().manual_seed(seed + x.numel())
    return (x.double() * (1 + share * torch.randn(x.shape, generator=g, dtype=torch.float64))).to(x.dtype)


def tuned(tensors: Mapping[str, Tensor], share: float = 1e-3) -> dict[str, Tensor]:
    return {name: moved(x, share, i) for i, (name, x) in enumerate(tensors.items())}


def plain(rows: int = 64, dtype: torch.dtype = BF16) -> dict[str, Tensor]:
    """Return the tensors of a model of some layers."""
    named = {f"model.layers.{i}.mlp.{k}_proj.weight": (rows, 48) for i in range(3) for k in ("gate", "up", "down")}
    shapes: dict[str, tuple[int, ...]] = {**named, "model.embed_tokens.weight": (100, 48), "model.norm.weight": (48,)}
    return {name: weights(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(shapes.items())}


def folders(folder: Path, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Pair:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return write_model(folder / "base", before, config), write_model(folder / "tuned", after, config)


def llama(folder: Path) -> Pair:
    """Shards cut at another tensor."""
    for name in ("base", "tuned"):
        shutil.copytree(FIXTURES / "llama" / name, folder / name)
    return folder / "base", folder / "tuned"


def one_file(folder: Path) -> Pair:
    pair = folders(folder, plain(), tuned(plain()))
    return pair[0] / "model.safetensors", pair[1] / "model.safetensors"


def side_files(folder: Path) -> Pair:
    """Side files that are the same, another, new and missing, a card, and a header in another order."""
    before, after = folders(folder, plain(), dict(reversed(tuned(plain()).items())))
    for each in (before, after):
        (each / "tokenizer.json").write_text('{"version": "1.0"}')
        (each / "modeling_x.py").write_text("# code that both have")
    (before / "generation_config.json").write_text("{}")
    (before / "README.md").write_text("# base")
    (after / "README.md").write_text("# tuned")
    (after / "chat_template.jinja").write_text("{{ messages }}")
    (after / "config.json").write_text('{"model_type": "llama", "eos_token_id": 3}')
    return before, after


def shards(folder: Path) -> Pair:
    """More shards than the base has, and metadata in their headers."""
    config = {"model_type": "llama"}
    before = write_model(folder / "base", plain(), config, shards=2)
    return before, write_model(folder / "tuned", tuned(plain()), config, shards=3, metadata={"format": "pt", "x": "y"})


def torch_file(folder: Path) -> Pair:
    """A tied weight that shares its storage, a view of a part of a storage, and objects beside the tensors."""
    for name, share in (("base", 0.0), ("tuned", 1e-3)):
        state: dict[str, object] = {**tuned(plain(), share)}
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        if name == "tuned":
            state |= {"epoch": 3, "note": "x" * 100}
        (folder / name).mkdir(parents=True)
        torch.save(state, folder / name / "pytorch_model.bin")
        (folder / name / "config.json").write_text("{}")
    return folder / "base", folder / "tuned"


def old_torch_file(folder: Path) -> Pair:
    """The layout before torch 1.6."""
    paths = folder / "base.bin", folder / "tuned.bin"
    folder.mkdir(parents=True, exist_ok=True)
    for path, share in zip(paths, (0.0, 1e-3), strict=True):
        torch.save(tuned(plain(), share), path, _use_new_zipfile_serialization=False)
    return paths


def from_torch(folder: Path) -> Pair:
    """A torch file whose fine-tune is a safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(plain(), folder / "base.bin")
    save_file(tuned(plain()), folder / "tuned.safetensors")
    return folder / "base.bin", folder / "tuned.safetensors"


def gguf(folder: Path) -> Pair:
    folder.mkdir(parents=True, exist_ok=True)
    before = llama_weights()
    after = {name: x.bfloat16().float() for name, x in tuned(before).items()}
    paths = folder / "base.gguf", folder / "tuned.gguf"
    write_llama(paths[0], before, "BF16")
    write_llama(paths[1], after, "BF16", general__name="tuned")
    return paths


def gguf_blocks(folder: Path) -> Pair:
    """Blocks of codes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "base.gguf", folder / "tuned.gguf"
    for path, every in zip(paths, (0, 5), strict=True):
        tensors = {}
        for i, kind in enumerate(("Q4_0", "Q8_0", "Q6_K")):
            codes = blocks_of(kind, 16).copy()
            if every:
                codes[..., 6::every] ^= 16
            shape = (4, 4 * BLOCK_TYPES[kind][0])
            tensors[f"blk.{i}.ffn_up.weight"] = tensor(GGML_TYPES[kind][0], shape, codes.tobytes())
        write(path, llama_fields(), tensors)
    return paths


def diffusers(folder: Path) -> Pair:
    """A pipeline of which two components changed."""
    before, after = pipeline(folder / "base"), pipeline(folder / "tuned")
    for name in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        save_file(tuned(load_file(after / name)), after / name, {"format": "pt"})
    return before, after


def int4(folder: Path) -> Pair:
    """Codes of compressed-tensors, packed by its formula: eight codes of four bits in an int32."""
    how = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    config = {"model_type": "llama", "quantization_config": how}
    pair = []
    for name, share in (("base", 0.0), ("tuned", 0.05)):
        W = moved(weights(64, 128), share)
        scale = W.reshape(64, 4, 32).abs().amax(2, keepdim=True) / 7.5
        codes = (W.reshape(64, 4, 32) / scale).round().clamp(-8, 7).reshape(64, 16, 8).long() + 8
        packed = sum(codes[..., k] << (4 * k) for k in range(8))
        assert isinstance(packed, Tensor)
        packed = torch.from_numpy(packed.numpy().astype(np.uint32).view(np.int32))
        tensors = {"x.weight_packed": packed, "x.weight_scale": scale[..., 0].to(BF16)}
        pair.append(write_model(folder / name, {**tensors, "x.weight_shape": torch.tensor([64, 128])}, config))
    return pair[0], pair[1]


def mixed(folder: Path) -> Pair:
    """All types of numbers, strange ones among them."""
    strange = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-40, 1.0])
    before: dict[str, Tensor] = {}
    for i, dtype in enumerate((torch.float64, torch.float32, torch.float16, BF16, E4M3, E5M2)):
        before[f"{dtype}".removeprefix("torch.")] = torch.cat([weights(6, 20, seed=i).reshape(-1), strange]).to(dtype)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    before |= {f"{dtype}".removeprefix("torch."): torch.arange(20, dtype=dtype) for dtype in integers}
    before |= {"bool": torch.arange(20) % 3 == 0, "complex64": torch.randn(5, dtype=torch.complex64)}
    after = tuned(before, 0.1)
    after |= {name: before[name].flip(0).contiguous() for name in ("int64", "uint8", "bool", "complex64", "bfloat16")}
    return folders(folder, before, after)


def to_bf16(folder: Path) -> Pair:
    before = plain(dtype=torch.float32)
    return folders(folder, before, {name: x.to(BF16) for name, x in tuned(before, 1e-4).items()})


def to_fp32(folder: Path) -> Pair:
    return folders(folder, plain(), {name: x.float() for name, x in tuned(plain(), 1e-2).items()})


def other_tensors(folder: Path) -> Pair:
    """New, removed, resized and reshaped tensors, and another type of codes."""
    before = {**plain(), "removed.weight": weights(5), "codes": torch.arange(8, dtype=torch.int8)}
    after = {**tuned(plain()), "new.weight": weights(7, 3), "codes": torch.arange(8, dtype=torch.uint8)}
    after["model.embed_tokens.weight"] = weights(103, 48).to(BF16)
    after["model.layers.0.mlp.up_proj.weight"] = before["model.layers.0.mlp.up_proj.weight"].reshape(48, 64)
    return folders(folder, before, after)


def renamed(folder: Path) -> Pair:
    """Frozen layers under the names of another program, two norms of the same bytes among them; the others trained."""
    before = {
        **plain(),
        "model.norm.weight": torch.ones(48).to(BF16),
        "model.other_norm.weight": torch.ones(48).to(BF16),
    }
    after = tuned(before)
    for i in (0, 2):
        for k in ("gate", "up", "down"):
            del after[f"model.layers.{i}.mlp.{k}_proj.weight"]
            after[f"a.{2 - i}.{k}.weight"] = before[f"model.layers.{i}.mlp.{k}_proj.weight"]
    for name in ("model.norm.weight", "model.other_norm.weight"):
        del after[name]
        after[name.removeprefix("model.")] = before[name]
    return folders(folder, before, after)


def only_renamed(folder: Path) -> Pair:
    return folders(folder, plain(), {f"base_model.{name}": x for name, x in plain().items()})


def renamed_among_others(folder: Path) -> Pair:
    """Beside tensors that are removed and new, some of the type and shape of one that was renamed."""
    before = {**plain(), "old.weight": weights(5, 7), "removed.weight": weights(5, 7, seed=1), "empty": torch.empty(0)}
    after = {
        **tuned(plain()),
        "new.weight": weights(5, 7),
        "other.weight": weights(5, 7, seed=2),
        "none": torch.empty(0),
    }
    return folders(folder, before, after)


def empty_and_scalar(folder: Path) -> Pair:
    before = {"empty": torch.empty(0, 3), "scalar": torch.tensor(3.0), "one": torch.ones(1), "x": torch.tensor(7)}
    return folders(folder, before, {**before, "scalar": torch.tensor(3.5), "x": torch.tensor(8)})


def only_empty(folder: Path) -> Pair:
    before = {"empty": torch.empty(0, 3), "none": torch.empty(0, dtype=BF16)}
    return folders(folder, before, before)


def same(folder: Path) -> Pair:
    return folders(folder, plain(), plain())


def names(folder: Path) -> Pair:
    """Names in other alphabets, with spaces and quotes, and files with names of their own."""
    keys = ["Ω.weight", "a b.weight"]
    keys += ['q"uote', "\\back", "x" * 200, "模型", "\x7f", "a:b", "../x", "/abs", "\N{SNOWMAN}"]
    before = {key: weights(4, 4, seed=i) for i, key in enumerate(keys)}
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "base é.safetensors", folder / "tuned 1.safetensors"
    save_file(before, paths[0])
    save_file(tuned(before), paths[1])
    return paths


def hole(folder: Path) -> Pair:
    """Safetensors whose headers are padded differently, as other writers pad them."""
    before, after = one_file(folder)
    data = after.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    after.write_bytes(struct.pack("<Q", size + 40) + data[8 : 8 + size] + b" " * 40 + data[8 + size :])
    return before, after


# a pair -> whether its patch leads back
PAIRS: dict[str, tuple[Callable[[Path], Pair], bool]] = {
    "llama": (llama, True),
    "one file": (one_file, True),
    "side files": (side_files, True),
    "shards": (shards, True),
    "torch": (torch_file, True),
    "old torch": (old_torch_file, True),
    "from torch": (from_torch, True),
    "gguf": (gguf, True),
    "gguf blocks": (gguf_blocks, True),
    "diffusers": (diffusers, True),
    "int4": (int4, True),
    "mixed": (mixed, False),
    "to bf16": (to_bf16, False),
    "to fp32": (to_fp32, False),
    "other tensors": (other_tensors, False),
    "renamed": (renamed, True),
    "only renamed": (only_renamed, True),
    "renamed among others": (renamed_among_others, False),
    "empty and scalar": (empty_and_scalar, True),
    "only empty": (only_empty, True),
    "same": (same, True),
    "names": (names, True),
    "hole": (hole, True),
}
