"""Hold what is said of an undo file before it is written, and placements that another file than the merge's names."""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, weights, write_model, write_peft
from lib.files import gguf_bytes
from lib.files.ggml_blocks import blocks_of
from lib.files.undo_bytes import forge
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import InputError

LLAMA, GPT2 = FIXTURES / "llama", FIXTURES / "gpt2"
BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Merge:
    """What is merged into what, and how."""

    base: Path
    adapter: Path
    options: dict[str, Any] = field(default_factory=dict)


def with_values(folder: Path, base: dict[str, Tensor], values: dict[str, Tensor], **options: Any) -> Merge:
    """A base, and an adapter that has some tensors whole."""
    tensors = {"model.x.weight": weights(6, 4, dtype=BF16), **base}
    write_model(folder / "base", tensors, {"model_type": "llama", "vocab_size": 24})
    modules = sorted({name.rpartition(".")[0].removeprefix("model.") for name in values})
    adapter = write_peft(folder / "adapter", {"model.x": factors(6, 4, 2)}, modules_to_save=modules)
    own = load_file(adapter / "adapter_model.safetensors")
    own |= {f"base_model.model.{name}": value for name, value in values.items()}
    save_file(own, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return Merge(folder / "base", adapter, options)


def lost(folder: Path, dtype: torch.dtype) -> Merge:
    """A delta beside which nothing is left of the base, and zeros of the base."""
    W = weights(40, 30, dtype=dtype)
    W[3] = 0.0
    A, B = factors(40, 30, 2)
    write_model(folder / "base", {"x.weight": W, "y.weight": W.clone()}, {"model_type": "x"})
    return Merge(folder / "base", write_peft(folder / "adapter", {"x": (A, 1e15 * B)}))


def dora(folder: Path) -> Merge:
    """Norms of rows, which are stored beside the numbers."""
    write_model(folder / "base", {"x.weight": weights(60, 8, dtype=BF16)}, {"model_type": "x"})
    A, B = factors(60, 8, 2)
    adapter = write_peft(folder / "adapter", {"x": (A, 30 * B)}, use_dora=True)
    own = load_file(adapter / "adapter_model.safetensors")
    own["base_model.model.x.lora_magnitude_vector"] = weights(60).abs() + 0.1
    save_file(own, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return Merge(folder / "base", adapter)


def turned_dora(folder: Path) -> Merge:
    """Norms of columns, as the base's layers are (in, out)."""
    base = {"h.0.attn.c_attn.weight": weights(8, 24, dtype=BF16)}
    write_model(folder / "base", base, {"model_type": "gpt2", "n_embd": 8})
    A, B = factors(24, 8, 2)
    adapter = write_peft(folder / "adapter", {"h.0.attn.c_attn": (A, B)}, use_dora=True, fan_in_fan_out=True)
    own = load_file(adapter / "adapter_model.safetensors")
    own["base_model.model.h.0.attn.c_attn.lora_magnitude_vector"] = weights(24).abs() + 0.1
    save_file(own, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return Merge(folder / "base", adapter)


def untied(folder: Path) -> Merge:
    """A tensor of the output that the base has not."""
    base = {"model.embed_tokens.weight": weights(20, 8, dtype=BF16), "model.norm.weight": weights(8, dtype=BF16)}
    write_model(folder / "base", base, {"model_type": "llama", "tie_word_embeddings": True})
    return Merge(folder / "base", write_peft(folder / "adapter", {"lm_head": factors(20, 8, 2)}))


def replaced_codes(folder: Path) -> Merge:
    state = {"score.weight": weights(6, 4).to(torch.float8_e4m3fn), "score.weight_scale": torch.ones(6, 1).bfloat16()}
    write_model(folder / "base", state, {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}})
    adapter = write_peft(folder / "adapter", {"x": factors(6, 4, 2)}, modules_to_save=["score"])
    save_file({"base_model.model.score.weight": weights(6, 4, seed=7)}, adapter / "adapter_model.safetensors")
    return Merge(folder / "base", adapter, {"quantized": "dequantize"})


def blocks(folder: Path, quantized: str) -> Merge:
    folder.mkdir()
    A, B = factors(30, 64, 2)
    name, own = "blk.0.attn_q.weight", {"general.architecture": "llama"}
    pair = {f"{name}.lora_a": gguf_bytes.floats(A.numpy()), f"{name}.lora_b": gguf_bytes.floats(8 * B.numpy())}
    coded = {name: gguf_bytes.tensor(8, (30, 64), blocks_of("Q8_0", 60).tobytes())}
    base = gguf_bytes.write(folder / "b.gguf", {**own, "llama.block_count": 1}, coded)
    lone = {**own, "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
    return Merge(base, gguf_bytes.write(folder / "a.gguf", lone, pair), {"quantized": quantized, "allow": ["lossy"]})


EMBED, NEW = "model.embed_tokens.weight", weights(20, 8, seed=7)
MERGES: dict[str, Callable[[Path], Merge]] = {
    "one file": lambda _: Merge(GPT2 / "base" / "model.safetensors", GPT2 / "adapter"),
    "bf16 lost": lambda folder: lost(folder, BF16),
    "fp32 lost": lambda folder: lost(folder, torch.float32),
    "fp64 lost": lambda folder: lost(folder, FP64),
    "dora": dora,
    "dora of columns": turned_dora,
    "values": lambda folder: with_values(folder, {EMBED: weights(20, 8, dtype=BF16)}, {EMBED: NEW}),
    "fewer rows": lambda folder: with_values(folder, {EMBED: weights(24, 8, dtype=BF16)}, {EMBED: NEW}),
    "more rows": lambda folder: with_values(folder, {EMBED: weights(18, 8, dtype=BF16)}, {EMBED: NEW}),
    "half of values": lambda folder: with_values(folder, {EMBED: weights(20, 8, dtype=BF16)}, {EMBED: NEW}, weight=0.5),
    "integers": lambda folder: with_values(
        folder, {"model.count.weight": torch.arange(70)}, {"model.count.weight": torch.arange(70) * 3}
    ),
    "codes to numbers": lambda _: Merge(LLAMA / "fp8", LLAMA / "adapter", {"quantized": "dequantize"}),
    "codes to codes": lambda _: Merge(LLAMA / "fp8", LLAMA / "adapter", {"quantized": "requantize"}),
    "codes to values": replaced_codes,
    "blocks to blocks": lambda folder: blocks(folder, "requantize"),
    "blocks to numbers": lambda folder: blocks(folder, "dequantize"),
    "a head of its own": untied,
}


def is_base(base: Path, back: Path) -> bool:
    if base.is_file():
        return filecmp.cmp(base, back, shallow=False)
    names = sorted(p.name for p in base.iterdir())
    same, _, _ = filecmp.cmpfiles(base, back, names, shallow=False)
    return sorted(p.name for p in back.iterdir()) == names == sorted(same)


@pytest.mark.parametrize("name", MERGES)
def test_a_dry_run_says_the_most_that_an_undo_file_has(tmp_path: Path, name: str) -> None:
    """It says it without a look at a weight, and of a base of which nothing is left it is wrong by little."""
    merge = MERGES[name](tmp_path / "made")
    out = tmp_path / ("out" + merge.base.suffix)
    weight, options = merge.options.pop("weight", 1.0), merge.options
    planned = loratool.merge(merge.base, (merge.adapter, weight), out, dry_run=True, **options).undo_bytes
    assert not out.exists()
    undo = Path(loratool.merge(merge.base, (merge.adapter, weight), out, **options).undo or "")
    assert planned is not None and undo.stat().st_size <= planned
    assert "lost" not in name or planned < 1.05 * undo.stat().st_size + 300
    back = tmp_path / ("back" + merge.base.suffix)
    loratool.unmerge(out, (merge.adapter, weight), back)
    assert is_base(merge.base, back)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merge values with a weight, so that they have placements; a vocabulary, norms of a vector, a product."""
    folder = tmp_path_factory.mktemp("halves")
    norm = {"model.norm.weight": weights(8, dtype=BF16)}
    merge = with_values(
        folder / "made", {EMBED: weights(20, 8, dtype=BF16), **norm}, {EMBED: NEW, "model.norm.weight": weights(8)}
    )
    loratool.merge(merge.base, (merge.adapter, 0.5), folder / "out")
    return folder


NUMBER, MODULE, VALUE, WEIGHT, TRANSPOSED, ROWS, START, STOP, SKIP, EXPERT = range(10)
OTHERS: dict[str, tuple[str, dict[int, Any], str]] = {
    "an unknown module": ("model.x.weight", {MODULE: "model.z"}, "has no model.z, which the undo file names"),
    "an unknown value": (EMBED, {VALUE: "base_model.model.z"}, "has no base_model.model.z, which the undo file names"),
    "another module's value": (EMBED, {VALUE: "base_model.model.model.norm.weight"}, "is not of the shape"),
    "factors as a value": (EMBED, {VALUE: "base_model.model.model.x.lora_A.weight"}, "is not of the shape"),
    "a value turned": (EMBED, {TRANSPOSED: True}, "is not of the shape"),
    "rows behind a value": (EMBED, {SKIP: 1}, "is not of the shape"),
    "an expert of a value": (EMBED, {EXPERT: 0}, "is not of the shape"),
    "an expert of factors": ("model.x.weight", {EXPERT: 0}, "is not of the shape"),
    "factors turned": ("model.x.weight", {TRANSPOSED: True}, "is not of the shape"),
    "rows behind factors": ("model.x.weight", {SKIP: 1}, "is not of the shape"),
    "factors as large": (EMBED, {MODULE: "model.x", VALUE: None}, "is not of the shape"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_placements_that_the_adapter_has_not(halves: Path, tmp_path: Path, case: str) -> None:
    name, changes, message = OTHERS[case]
    undo = tmp_path / "forged.undo"
    undo.write_bytes((halves / "out" / "loratool.undo").read_bytes())

    def change(index: dict[str, Any]) -> None:
        for place, value in changes.items():
            index["tensors"][name]["placements"][0][place] = value

    adapter = (halves / "made" / "adapter", 0.5)
    forge(undo, lambda index: None)
    loratool.unmerge(halves / "out", adapter, tmp_path / "back", undo=undo)
    assert is_base(halves / "made" / "base", tmp_path / "back")
    forge(undo, change)
    with pytest.raises(InputError, match=message):
        loratool.unmerge(halves / "out", adapter, tmp_path / "again", undo=undo)
    assert not (tmp_path / "again").exists()


def test_an_expert_that_the_adapter_has_not(tmp_path: Path) -> None:
    """The base has its experts one by one, and the adapter as a stack, of which a placement takes one."""
    name = "model.layers.0.mlp.experts.{}.down_proj.weight"
    base = {name.format(e): weights(10, 14, seed=e, dtype=BF16) for e in range(3)}
    write_model(tmp_path / "base", base, {"model_type": "qwen3_moe", "num_experts": 3})
    A, B = factors(10, 14, 6)
    tensors = {"lora_A.weight": A, "lora_B.weight": B}
    adapter = write_peft(
        tmp_path / "adapter", {"x": (A, B)}, r=2, target_parameters=["mlp.experts.down_proj"], target_modules=[]
    )
    prefix = "base_model.model.model.layers.0.mlp.experts"
    named = {f"{prefix}.{end}": tensor for end, tensor in tensors.items()}
    save_file(named, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    loratool.merge(tmp_path / "base", adapter, tmp_path / "out")
    undo = tmp_path / "out" / "loratool.undo"
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert is_base(tmp_path / "base", tmp_path / "back")

    def change(index: dict[str, Any]) -> None:
        (placement,) = index["tensors"][name.format(2)]["placements"]
        assert placement[EXPERT] == 2
        placement[EXPERT] = 3

    forge(undo, change)
    with pytest.raises(InputError, match="is not of the shape that the undo file says"):
        loratool.unmerge(tmp_path / "out", adapter, tmp_path / "again")
