"""Hold the way from a GGUF file to a folder of transformers, and what it refuses, on models written by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_model, write_model, write_peft
from lib.files.gguf_bytes import floats, tensor, write
from lib.models.gguf_models import (
    HEADS,
    KV_HEADS,
    LAYERS,
    WIDTH,
    WORDS,
    llama_fields,
    llama_tensors,
    llama_weights,
    write_llama,
)
from torch import Tensor

import loratool
from loratool.adapters.gguf_parts import GgufModel
from loratool.architectures.gguf import ARCHITECTURES
from loratool.architectures.gguf.table import Facts, Weight
from loratool.commands.convert.command import convert
from loratool.commands.diff.call import diff
from loratool.errors import InputError, NeedsFlag, UsageError
from loratool.files.checkpoint import open_checkpoint
from loratool.files.gguf_model import as_transformers

Run = Callable[..., Any]


def read(path: Path) -> dict[str, Tensor]:
    """Return a GGUF file's tensors as transformers has them."""
    view = as_transformers(open_checkpoint(path)).checkpoint
    return {name: view[name] for name in view}


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_llama(tmp_path: Path, dtype: str) -> None:
    weights = llama_weights()
    report = convert(write_llama(tmp_path / "m.gguf", weights, dtype), tmp_path / "out", dtype="fp32")
    found = load_model(tmp_path / "out")
    assert found.keys() == weights.keys()
    assert all(torch.equal(W, found[name]) for name, W in weights.items())
    assert report.source_format == "gguf" and {row.source_dtype for row in report.cast} == {dtype} - {"F32"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    assert config["rms_norm_eps"] == 1e-5 and config["vocab_size"] == WORDS and not config["tie_word_embeddings"]
    assert config["eos_token_id"] == 2 and config["bos_token_id"] is None


def test_types_are_kept_without_dtype(tmp_path: Path) -> None:
    convert(write_llama(tmp_path / "m.gguf", llama_weights(), "BF16"), tmp_path / "out")
    for name, W in load_model(tmp_path / "out").items():
        assert W.dtype is (torch.float32 if W.dim() == 1 else torch.bfloat16), name
        assert torch.equal(W.float(), llama_weights()[name])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_have_the_same_bytes_on_any_number_of_threads(tmp_path: Path, workers: int) -> None:
    weights = llama_weights()
    source = write_llama(tmp_path / "m.gguf", weights)
    convert(source, tmp_path / "out", dtype="bf16", max_shard_size=5000, workers=workers)
    assert len([*(tmp_path / "out").glob("*.safetensors")]) > 2
    assert all(torch.equal(W.float(), weights[name]) for name, W in load_model(tmp_path / "out").items())


def test_a_tied_head_is_not_written(tmp_path: Path) -> None:
    weights = {name: W for name, W in llama_weights().items() if name != "lm_head.weight"}
    convert(write_llama(tmp_path / "m.gguf", weights), tmp_path / "out")
    assert load_model(tmp_path / "out").keys() == weights.keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def q8_0(rows: int, columns: int, seed: int) -> tuple[Any, np.ndarray[Any, Any]]:
    """Return blocks of 32 codes with a scale in half precision, and the products."""
    rng = np.random.default_rng(seed)
    d = rng.standard_normal((rows, columns // 32, 1)).astype(np.float16)
    q = rng.integers(-128, 128, (rows, columns // 32, 32), dtype=np.int8)
    data = np.concatenate([d.view(np.uint8), q.view(np.uint8)], axis=2).tobytes()
    return tensor(8, (rows, columns), data), (d.astype(np.float64) * q).reshape(rows, columns)


def test_codes_become_numbers(tmp_path: Path) -> None:
    fields, tensors = llama_fields(), llama_tensors(llama_weights())
    tensors["blk.1.attn_k.weight"], k = q8_0(WIDTH // 2, WIDTH, 1)
    tensors["blk.0.attn_v.weight"], v = q8_0(WIDTH // 2, WIDTH, 2)
    source = write(tmp_path / "m.gguf", fields, tensors)
    with pytest.raises(NeedsFlag, match=r"blk.0.attn_v.weight: is stored as Q8_0, .*") as caught:
        convert(source, tmp_path / "out")
    assert "--dtype bf16" in str(caught.value.remedy)
    convert(source, tmp_path / "out", dtype="bf16")
    found = load_model(tmp_path / "out")
    # 8 bits times 11 are exact in float32, so that this rounds once
    assert torch.equal(found["model.layers.0.self_attn.v_proj.weight"], torch.tensor(v).float().bfloat16())
    ours = found["model.layers.1.self_attn.k_proj.weight"].view(2, 2, 4, WIDTH)  # heads, halves, rows of each
    theirs = torch.tensor(k).float().bfloat16().view(2, 4, 2, WIDTH)
    assert torch.equal(ours, theirs.transpose(1, 2))


def test_what_stands_beside_a_gguf_model_is_told(tmp_path: Path) -> None:
    """It may be of another model, so that none of it travels unasked."""
    folder = tmp_path / "base"
    folder.mkdir()
    write_llama(folder / "m.gguf", llama_weights())
    for name in ("tokenizer.json", "notes.md", "figure.png"):
        (folder / name).write_text("1")
    report = convert(folder, tmp_path / "out")
    assert {row.name: row.reason[:20] for row in report.left_behind} == {
        "tokenizer.json": "beside a GGUF model:",
        "notes.md": "beside a GGUF model:",
        "figure.png": "of a kind that is no",
    }
    report = convert(folder, tmp_path / "whole", tokenizer=folder)
    assert {row.name for row in report.left_behind} == {"notes.md", "figure.png"}


def test_the_tokenizer_travels_from_where_it_is(tmp_path: Path, run: Run) -> None:
    source = write_llama(tmp_path / "m.gguf", llama_weights())
    original = tmp_path / "original"
    original.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "README.md"):
        (original / name).write_text("{}")
    (original / "model.safetensors").write_bytes(b"")
    found = run("convert", source, "-o", tmp_path / "a", "--tokenizer", original)
    assert found.exit_code == 0 and "tokenizer" not in found.stderr
    beside = {path.name for path in (tmp_path / "a").iterdir()}
    assert beside == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert "no tokenizer was written" in run("convert", source, "-o", tmp_path / "b").stderr
    assert "no config.json" in run("convert", source, "-o", tmp_path / "c.safetensors").stderr
    assert load_model(tmp_path / "c.safetensors").keys() == llama_weights().keys()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="no tokenizer files"):
        convert(source, tmp_path / "d", tokenizer=empty)
    with pytest.raises(UsageError, match="tokenizer is only for GGUF models"):
        convert(write_model(tmp_path / "hf", llama_weights(), {}), tmp_path / "d", tokenizer=original)
    with pytest.raises(UsageError, match=r"safetensors or torch, not 'gguf'"):
        convert(source, tmp_path / "d.gguf")


def test_diff_compares_by_the_names_of_transformers(tmp_path: Path) -> None:
    weights = llama_weights()
    original = write_model(tmp_path / "hf", weights, {"model_type": "llama"})
    source = write_llama(tmp_path / "m.gguf", weights)
    assert diff(original, source).same and diff(source, original).same
    changed = {
        **weights,
        "model.layers.1.self_attn.q_proj.weight": weights["model.layers.1.self_attn.q_proj.weight"] + 1,
    }
    for one, two in [(original, write_llama(tmp_path / "n.gguf", changed)), (source, tmp_path / "n.gguf")]:
        found = diff(one, two)
        assert [row.name for row in found.tensors] == ["model.layers.1.self_attn.q_proj.weight"]
        assert found.tensors[0].largest == pytest.approx(1, abs=1e-6)


def test_diff_of_an_unknown_architecture_is_by_its_own_names(tmp_path: Path) -> None:
    tensors = llama_tensors(llama_weights())
    for name in ("a", "b"):
        write(tmp_path / f"{name}.gguf", {"general.architecture": "newest"}, tensors)
    found = diff(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert found.same and found.equal == len(tensors)
    with pytest.raises(InputError, match="is of the architecture 'newest', whose names"):
        diff(write_model(tmp_path / "hf", llama_weights(), {}), tmp_path / "a.gguf")


# What is wrong with a small Llama -> the error
REFUSED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Any], str]] = {
    "architecture": ({"general__architecture": "newest"}, lambda t: None, "architecture 'newest'"),
    "no architecture": ({"general__architecture": None}, lambda t: None, "architecture 'without a name'"),
    "no rule for the config": ({"general__architecture": "mistral4"}, lambda t: None, "has no rule for config.json"),
    "a tensor without a row": ({}, lambda t: t.update({"blk.0.odd.weight": t["output.weight"]}), "blk.0.odd.weight"),
    "no ending": ({}, lambda t: t.update({"blk.0.attn_q": t["token_embd.weight"]}), "is not in the table"),
    "a layer too many": ({}, lambda t: t.update({"blk.2.attn_norm.weight": t["output_norm.weight"]}), "model of 2"),
    "a layer too few": ({"llama__block_count": 3}, lambda t: None, "has no layer 2"),
    "a tensor of one layer": ({}, lambda t: t.pop("blk.1.ffn_up.weight"), "layers.1.mlp.up_proj.weight: is missing"),
    "a tensor of all layers": (
        {}, lambda t: [t.pop(f"blk.{i}.ffn_up.weight") for i in range(LAYERS)], "up_proj.weight: is missing"
    ),
    "no embedding": ({}, lambda t: t.pop("token_embd.weight"), "no tensor token_embd.weight"),
    "no last norm": ({}, lambda t: t.pop("output_norm.weight"), "output_norm"),
    "no field": ({"llama__context_length": None}, lambda t: None, "has no field llama.context_length"),
    "no heads": ({"llama__attention__head_count": 0}, lambda t: None, "has 0 as llama.attention.head_count"),
    "other heads": ({"llama__attention__head_count_kv": 3}, lambda t: None, "not those of 3 heads"),
    "wide states": (
        {}, lambda t: t.update({"output.weight": floats(np.zeros((40, 16)))}), "in a model of the width 32"
    ),
    "another width": ({"llama__feed_forward_length": 64}, lambda t: None, "its fields say"),
    "a text for a number": ({"llama__embedding_length": "64"}, lambda t: None, "has '64' as llama.embedding_length"),
    "many layers": ({"llama__block_count": 1 << 30}, lambda t: None, "fewer tensors than layers"),
    "widths of layers": ({"llama__feed_forward_length": [48, 64]}, lambda t: None, "for each layer"),
    "unknown scaling": ({"llama__rope__scaling__type": "longest"}, lambda t: None, "of the kind 'longest'"),
    "factors": (
        {}, lambda t: t.update({"rope_freqs.weight": floats(np.array([1, 2, 3, 4.0]))}), "that are not Llama 3's"
    ),
    "a window": ({"llama__attention__sliding_window": 16}, lambda t: None, "for which config.json has no known field"),
    "both ways": ({"llama__attention__causal": False}, lambda t: None, "LlamaForCausalLM always has True"),
    "a field of no rule": ({"llama__logit_scale": 0.5}, lambda t: None, "has 0.5 as llama.logit_scale"),
    "half of a head": ({"llama__rope__dimension_count": 4}, lambda t: None, "rotates 4 numbers of a head's 8"),
    "no theta": ({"llama__rope__freq_base": 0.0}, lambda t: None, "has 0.0 as llama.rope.freq_base"),
    "three dimensions": (
        {}, lambda t: t.update({"blk.0.ffn_up.weight": floats(np.zeros((2, 24, 32)))}), "which such a weight cannot be"
    ),
    "integers": (
        {}, lambda t: t.update({"output_norm.weight": tensor(26, (32,), bytes(128))}), "I32, which is not read"
    ),
    "codes that are not read": (
        {}, lambda t: t.update({"output.weight": tensor(15, (2, 256), bytes(584))}), "Q8_K, which is not read"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    changes, damage, message = REFUSED[case]
    tensors = llama_tensors(llama_weights())
    damage(tensors)
    source = write(tmp_path / "m.gguf", llama_fields(**changes), tensors)
    with pytest.raises(InputError) as caught:
        convert(source, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
    open_checkpoint(source).close()  # a look is not refused


def test_heads_that_are_said_for_each_layer(tmp_path: Path) -> None:
    """llama.cpp reads one number or one for each layer; only where all are the same are the rows of the keys known."""
    weights, key = llama_weights(), "llama__attention__head_count_kv"
    alike = write_llama(tmp_path / "alike.gguf", weights, **{key: [KV_HEADS] * LAYERS})
    found = read(alike)
    assert all(torch.equal(W, found[name]) for name, W in weights.items())
    unlike = write_llama(tmp_path / "unlike.gguf", weights, **{key: [KV_HEADS, HEADS]})
    rows = {"model.layers.0.self_attn.k_proj": (torch.ones(1, 32), torch.ones(16, 1))}
    adapter = write_peft(tmp_path / "adapter", rows)
    loratool.merge(alike, adapter, tmp_path / "merged.gguf", undo=False)
    assert Facts.of_metadata("llama", {"llama.attention.head_count": [[1], [1]]}).heads == 0  # of JSON
    with pytest.raises(InputError, match="are not determined by its fields"):
        loratool.merge(unlike, adapter, tmp_path / "no.gguf", undo=False)


def test_every_value_of_every_field_is_right_or_refused(tmp_path: Path) -> None:
    tensors = llama_tensors(llama_weights())
    for key in llama_fields():
        for value in (0, -1, 1 << 31, float("nan"), float("inf"), "", True, [], [1, 2], ["a"], 3e38):
            source = write(tmp_path / "m.gguf", {**llama_fields(), key: value}, tensors)
            try:
                view = as_transformers(open_checkpoint(source))
            except InputError:
                continue
            json.dumps(view.checkpoint.config)


def gguf_fields(key: str, **values: Any) -> dict[str, Any]:
    common = {"block_count": 1, "context_length": 16, "embedding_length": 8, "attention.head_count": 2}
    return {"general.architecture": key} | {f"{key}.{name}": value for name, value in {**common, **values}.items()}


def vectors(*names: str, size: int = 8) -> dict[str, Any]:
    return {name: floats(np.full(size, i + 0.5, np.float32)) for i, name in enumerate(names)}


def matrix(rows: int, columns: int) -> Tensor:
    return torch.arange(rows * columns, dtype=torch.float32).view(rows, columns) / 8


def test_a_gpt2_is_turned(tmp_path: Path) -> None:
    qkv, up = matrix(24, 8), matrix(32, 8)
    norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    tensors = vectors(*(f"{name}.{end}" for name in norms for end in ("weight", "bias")))
    tensors |= vectors("blk.0.attn_output.bias", "blk.0.ffn_down.bias")
    tensors |= {"blk.0.attn_qkv.bias": floats(np.arange(24.0)), "blk.0.ffn_up.bias": floats(np.arange(32.0))}
    tensors |= {"blk.0.attn_qkv.weight": floats(qkv.numpy()), "blk.0.ffn_up.weight": floats(up.numpy())}
    for name, shape in {"token_embd": (5, 8), "position_embd": (16, 8), "blk.0.attn_output": (8, 8)}.items():
        tensors[f"{name}.weight"] = floats(matrix(*shape).numpy())
    tensors["blk.0.ffn_down.weight"] = floats(matrix(8, 32).numpy())
    source = write(tmp_path / "m.gguf", gguf_fields("gpt2", **{"attention.layer_norm_epsilon": 1e-5}), tensors)
    convert(source, tmp_path / "out")
    found = load_model(tmp_path / "out")
    assert torch.equal(found["transformer.h.0.attn.c_attn.weight"], qkv.T)
    assert torch.equal(found["transformer.h.0.mlp.c_fc.weight"], up.T)
    assert torch.equal(found["transformer.h.0.mlp.c_proj.weight"], matrix(8, 32).T)
    assert torch.equal(found["transformer.wpe.weight"], matrix(16, 8))
    assert torch.equal(found["transformer.h.0.attn.c_attn.bias"], torch.arange(24.0))
    other = gguf_fields("starcoder", **{"attention.layer_norm_epsilon": 1e-5, "attention.head_count_kv": 1})
    with pytest.raises(InputError, match="has 24 rows, and its fields say"):  # as of a GPT-BigCode with all heads
        convert(write(tmp_path / "o.gguf", other, tensors), tmp_path / "other")


def test_olmos_biases_are_refused(tmp_path: Path) -> None:
    """llama.cpp's converter turns the rows of its queries' and keys' weights, and leaves those of their biases."""
    fields = {key.replace("llama.", "olmo."): value for key, value in llama_fields().items()}
    fields |= {"general.architecture": "olmo", "olmo.attention.layer_norm_epsilon": 1e-5}
    fields.pop("olmo.attention.layer_norm_rms_epsilon")
    tensors = {name: each for name, each in llama_tensors(llama_weights()).items() if "norm" not in name}
    convert(write(tmp_path / "m.gguf", fields, tensors), tmp_path / "out")
    tensors |= {f"blk.{i}.attn_{each}.bias": floats(np.zeros(32)) for i in range(LAYERS) for each in "qo"}
    with pytest.raises(InputError, match="blk.0.attn_q.bias: has its rows in an unknown order"):
        convert(write(tmp_path / "b.gguf", fields, tensors), tmp_path / "biased")


def test_norms_of_gemma_are_one_less(tmp_path: Path) -> None:
    tensors = {f"blk.0.{n}.weight": floats(matrix(8, 8).numpy()) for n in ("attn_q", "attn_output")}
    tensors |= {f"blk.0.{n}.weight": floats(matrix(4, 8).numpy()) for n in ("attn_k", "attn_v")}
    tensors |= {f"blk.0.{n}.weight": floats(matrix(16, 8).numpy()) for n in ("ffn_gate", "ffn_up")}
    tensors |= {"blk.0.ffn_down.weight": floats(matrix(8, 16).numpy())}
    tensors |= {"token_embd.weight": floats(matrix(5, 8).numpy())}
    tensors |= vectors("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")
    names = {"attention.layer_norm_rms_epsilon": 1e-6, "feed_forward_length": 16, "attention.head_count_kv": 1}
    source = write(tmp_path / "m.gguf", gguf_fields("gemma", **names), tensors)
    convert(source, tmp_path / "out")
    found = load_model(tmp_path / "out")
    assert torch.equal(found["model.norm.weight"], torch.full((8,), -0.5))
    assert torch.equal(found["model.layers.0.post_attention_layernorm.weight"], torch.full((8,), 1.5))
    assert torch.equal(found["model.embed_tokens.weight"], matrix(5, 8))


def test_the_kernels_of_lfm2_are_of_one_channel(tmp_path: Path) -> None:
    """Its layers without heads of keys are convolutions of each channel."""
    fields = {"attention.layer_norm_rms_epsilon": 1e-5, "feed_forward_length": 16, "shortconv.l_cache": 3}
    tensors = vectors("token_embd_norm.weight", *(f"blk.{i}.{n}_norm.weight" for i in (0, 1) for n in ("attn", "ffn")))
    tensors |= vectors("blk.1.attn_q_norm.weight", "blk.1.attn_k_norm.weight", size=4)
    shapes = {f"blk.{i}.ffn_{n}": (16, 8) for i in (0, 1) for n in ("gate", "up")} | {"token_embd": (5, 8)}
    shapes |= {"blk.0.ffn_down": (8, 16), "blk.1.ffn_down": (8, 16), "blk.0.shortconv.in_proj": (24, 8)}
    shapes |= {"blk.0.shortconv.out_proj": (8, 8), "blk.0.shortconv.conv": (8, 3)}
    shapes |= {"blk.1.attn_q": (8, 8), "blk.1.attn_k": (4, 8), "blk.1.attn_v": (4, 8), "blk.1.attn_output": (8, 8)}
    tensors |= {f"{name}.weight": floats(matrix(*shape).numpy()) for name, shape in shapes.items()}

    def of_heads(*heads: int) -> Path:
        counts = {"block_count": 2, "attention.head_count_kv": [*heads]}
        return write(tmp_path / "m.gguf", gguf_fields("lfm2", **fields, **counts), tensors)

    convert(of_heads(0, 1), tmp_path / "out")
    assert torch.equal(load_model(tmp_path / "out")["model.layers.0.conv.conv.weight"], matrix(8, 3)[:, None])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["conv", "full_attention"] and config["num_key_value_heads"] == 1
    for heads in ((0, 0), (1, 2), (1,)):
        with pytest.raises(InputError, match=r"numbers of heads that LFM2 does not have|has 1 values of"):
            read(of_heads(*heads))


def test_mtp_layers(tmp_path: Path) -> None:
    """Those of EXAONE with experts, here without: in its files they have numbers of their own and share modules."""
    fields: dict[str, Any] = {"attention.layer_norm_rms_epsilon": 1e-5, "feed_forward_length": 16}
    fields |= {f"expert_{name}": 2 for name in ("count", "used_count", "feed_forward_length", "shared_count")}
    fields |= {"expert_weights_norm": True, "leading_dense_block_count": 3, "attention.sliding_window": 4}
    shapes = {f"ffn_{n}": (16, 8) for n in ("gate", "up")} | {"ffn_down": (8, 16), "nextn.eh_proj": (8, 16)}
    shapes |= {f"attn_{n}": (8, 8) for n in ("q", "k", "v", "output")}
    norms = ["attn_norm", "ffn_norm", "nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm"]

    def written(blocks: int, mtp: int, without: str = "none") -> Path:
        tensors = vectors("output_norm.weight") | {"token_embd.weight": floats(matrix(5, 8).numpy())}
        for i in range(blocks):
            named = {f"blk.{i}.{name}.weight": floats(matrix(*shape).numpy()) for name, shape in shapes.items()}
            named |= vectors(*(f"blk.{i}.{name}.weight" for name in norms))
            named |= vectors(*(f"blk.{i}.attn_{n}_norm.weight" for n in "qk"), size=4)
            tensors |= {name: W for name, W in named.items() if i >= blocks - mtp or ".nextn." not in name}
        tensors = {name: W for name, W in tensors.items() if not name.startswith(without)}
        counts = {"block_count": blocks, "nextn_predict_layers": mtp}
        return write(tmp_path / "m.gguf", gguf_fields("exaone-moe", **fields, **counts), tensors)

    view = as_transformers(open_checkpoint(written(2, 1))).checkpoint
    ours = {name for name in view if name.startswith("mtp.")}
    kinds = {"mtp.layers.0.self_attn.q_proj.weight", "mtp.layers.0.mlp.up_proj.weight", "mtp.norm.weight"}
    assert ours >= kinds and torch.equal(view["mtp.fc.weight"], matrix(8, 16)) and len(ours) == 15
    assert view.config["num_hidden_layers"] == view.config["num_nextn_predict_layers"] == 1
    view = as_transformers(open_checkpoint(written(2, 1, without="blk.1."))).checkpoint  # as llama.cpp reads it too
    assert view.config["num_hidden_layers"] == 1 and "num_nextn_predict_layers" not in view.config
    assert not any(name.startswith("mtp.") for name in view)
    for file, message in {
        (2, 2): "has 2 layers, and 2 of them are MTP layers",
        (2, 1, "blk.1.nextn.enorm"): "model.layers.1.enorm.weight: is missing",
        (3, 2): "mtp.fc.weight: is shared by all MTP layers",
    }.items():
        with pytest.raises(InputError, match=re.escape(message)):
            read(written(*file))


def test_the_numbers_of_apertus_activation_are_in_fields(tmp_path: Path) -> None:
    numbers = {"alpha_n": [-0.5, 0.25], "alpha_p": [1.5, 2.5], "beta": [0.5, 0.5], "eps": [-0.125, -0.25]}
    fields = {key.replace("llama.", "apertus."): value for key, value in llama_fields().items()}
    fields |= {"general.architecture": "apertus"} | {f"xielu.{name}": values for name, values in numbers.items()}
    tensors = {name: each for name, each in llama_tensors(llama_weights()).items() if "ffn_gate" not in name}
    tensors |= vectors(*(f"blk.{i}.attn_{n}_norm.weight" for i in range(LAYERS) for n in "qk"), size=WIDTH // HEADS)
    convert(write(tmp_path / "m.gguf", fields, tensors), tmp_path / "out")
    found = load_model(tmp_path / "out")
    for name, values in numbers.items():
        shape = (1,) if name.startswith("alpha") else ()
        for i, value in enumerate(values):
            assert torch.equal(found[f"model.layers.{i}.mlp.act_fn.{name}"], torch.full(shape, value)), name
    for value in (None, 0.5, [0.5], ["a", "b"], "ab", [1, 2]):
        damaged = {key: each for key, each in fields.items() if key != "xielu.beta"}
        damaged |= {} if value is None else {"xielu.beta": value}
        with pytest.raises(InputError, match=r"has no xielu.beta with a number for each of 2 layers"):
            read(write(tmp_path / "d.gguf", damaged, tensors))


def t5_of_2019(layers: int = 2) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return fields and tensors of an encoder without gates; only its first layer has distances' biases."""
    names = {"attention.layer_norm_rms_epsilon": 1e-6, "feed_forward_length": 16, "attention.key_length": 4}
    fields = gguf_fields("t5encoder", **names | {"block_count": layers})
    shapes = {"token_embd": (5, 8), "enc.blk.0.attn_rel_b": (32, 2)}
    for i in range(layers):
        shapes |= {f"enc.blk.{i}.attn_{name}": (8, 8) for name in "qkvo"}
        shapes |= {f"enc.blk.{i}.ffn_up": (16, 8), f"enc.blk.{i}.ffn_down": (8, 16)}
    tensors = {f"{name}.weight": floats(matrix(*shape).numpy()) for name, shape in shapes.items()}
    norms = (f"enc.blk.{i}.{name}_norm.weight" for i in range(layers) for name in ("attn", "ffn"))
    return fields, tensors | vectors("enc.output_norm.weight", *norms)


def test_a_t5_of_2019(tmp_path: Path) -> None:
    convert(write(tmp_path / "m.gguf", *t5_of_2019()), tmp_path / "out")
    found, config = load_model(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    layer = "encoder.block.1.layer.1.DenseReluDense"
    assert torch.equal(found[f"{layer}.wi.weight"], matrix(16, 8)) and f"{layer}.wi_1.weight" not in found
    assert (config["architectures"], config["feed_forward_proj"]) == (["T5EncoderModel"], "relu")


# What is wrong with it -> the error
NO_T5: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no distances": (lambda t: t.pop("enc.blk.0.attn_rel_b.weight"), "no tensor enc.blk.0.attn_rel_b.weight"),
    "distances of another layer": (
        lambda t: t.update({"enc.blk.2.attn_rel_b.weight": t["enc.blk.0.attn_rel_b.weight"]}),
        "encoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight: is of a layer that has no such tensor",
    ),
    "no norm": (lambda t: t.pop("enc.blk.0.attn_norm.weight"), "block.0.layer.0.layer_norm.weight: is missing"),
    "no last norm": (lambda t: t.pop("enc.output_norm.weight"), "enc.output_norm: is missing"),
}


@pytest.mark.parametrize("case", NO_T5)
def test_no_t5(tmp_path: Path, case: str) -> None:
    damage, message = NO_T5[case]
    fields, tensors = t5_of_2019(3)
    damage(tensors)
    with pytest.raises(InputError, match=re.escape(message)):
        read(write(tmp_path / "m.gguf", fields, tensors))


# Architecture -> what its file says, and why no config.json says so
NO_CONFIG: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], str]] = {
    "mpt": ({"attention.layer_norm_epsilon": 1e-5}, {"blk.0.ffn_up.weight": (32, 8)}, "has no ALiBi of 8"),
    "mpt with biases": (
        {"attention.layer_norm_epsilon": 1e-5, "attention.max_alibi_bias": 8.0},
        {"blk.0.ffn_up.weight": (32, 8), "blk.0.ffn_up.bias": (32,)},
        "has biases",
    ),
    "mpt of another width": (
        {"attention.layer_norm_epsilon": 1e-5, "attention.max_alibi_bias": 8.0},
        {"blk.0.ffn_up.weight": (24, 8)},
        "of another width",
    ),
    "modern-bert": (
        {"feed_forward_length": 16, "attention.sliding_window": 8, "attention.layer_norm_epsilon": 1e-5}
        | {"attention.layer_norm_rms_epsilon": 1e-6},
        {},
        "as epsilons of norms, not one",
    ),
    "gemma3n": (
        {"attention.layer_norm_rms_epsilon": 1e-6, "feed_forward_length": 16, "attention.sliding_window": 8}
        | {"final_logit_softcapping": 30.0, "embedding_length_per_layer_input": 4, "attention.shared_kv_layers": 0}
        | {"altup.active_idx": 0, "altup.num_inputs": 4, "activation_sparsity_scale": [1.6]},
        {"blk.0.laurel_l.weight": (4, 8), "per_layer_token_embd.weight": (5, 4), "altup_proj.weight": (3, 8, 8)},
        "has 1.6 as gemma3n.activation_sparsity_scale",
    ),
}


@pytest.mark.parametrize("case", NO_CONFIG)
def test_no_config(tmp_path: Path, case: str) -> None:
    values, shapes, message = NO_CONFIG[case]
    tensors = {name: floats(np.zeros(shape)) for name, shape in {"token_embd.weight": (5, 8), **shapes}.items()}
    with pytest.raises(InputError, match=re.escape(message)):
        read(write(tmp_path / "m.gguf", gguf_fields(case.split()[0], **values), tensors))


def test_commands_that_take_a_base_see_the_names_of_transformers(tmp_path: Path, run: Run) -> None:
    weights = llama_weights()
    source = write_llama(tmp_path / "m.gguf", weights)
    convert(source, tmp_path / "hf")
    for base, out in ((source, "a"), (tmp_path / "hf", "b")):
        assert run("init", base, "-o", tmp_path / out, "--target", "all-linear").exit_code == 0
    one, two = (load_model(tmp_path / name) for name in "ab")
    assert one.keys() == two.keys() and all(torch.equal(W, two[name]) for name, W in one.items())
    assert "14 of 14 modules are in" in run("inspect", tmp_path / "a", "--base", source).stdout
    assert re.search(r"^LoRA on: .*self_attn\.v_proj in layers 0-\d+$", run("count", source).stdout, re.MULTILINE)
    refused = run("init", source, "-o", tmp_path / "c", "--method", "pissa", "--residual", tmp_path / "d")
    assert refused.exit_code == 3 and "no residual can be written in GGUF" in refused.stderr


def test_no_peft_adapter_has_the_names_of_a_gguf_file(tmp_path: Path, run: Run) -> None:
    """Of an architecture in no table two models can be compared, but no adapter of them would be read by PEFT."""
    weights = llama_weights()
    name = "model.layers.1.self_attn.q_proj.weight"
    tuned = {**weights, name: weights[name] + torch.outer(torch.arange(32.0), torch.ones(32)) / 256}
    unknown = {"general__architecture": "newest"}
    one, two = (write_llama(tmp_path / f"{i}.gguf", w, **unknown) for i, w in enumerate((weights, tuned)))
    assert run("diff", one, two).exit_code == 0
    adapter = write_peft(tmp_path / "a", {name.removesuffix(".weight"): (torch.ones(1, 32), torch.ones(32, 1))})
    for command in (("extract", one, two), ("convert", adapter, "--to", "peft", "--base", one)):
        refused = run(*command, "-o", tmp_path / "out")
        assert refused.exit_code == 3 and "the architecture 'newest', whose names" in refused.stderr
        assert "use the model in transformers' format" in refused.stderr and not (tmp_path / "out").exists()


def test_a_folder_of_gguf_parts_is_a_base(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "m.gguf", llama_weights())
    adapter = write_peft(tmp_path / "a", {"model.layers.1.self_attn.q_proj": (torch.ones(1, 32), torch.ones(32, 1))})
    loratool.merge(source, adapter, tmp_path / "parts", undo=False, max_shard_size=20_000)
    assert len([*(tmp_path / "parts").iterdir()]) > 1
    for base, out in ((source, "one"), (tmp_path / "parts", "two")):
        loratool.convert(adapter, tmp_path / f"{out}.gguf", to="gguf", base=base)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_extract_takes_gguf_models_in_16_or_32_bits(tmp_path: Path, run: Run) -> None:
    weights = llama_weights()
    name = "model.layers.1.self_attn.q_proj.weight"
    tuned = {**weights, name: weights[name] + torch.outer(torch.arange(32.0), torch.ones(32)) / 256}
    base, other = write_llama(tmp_path / "m.gguf", weights), write_llama(tmp_path / "n.gguf", tuned)
    convert(base, tmp_path / "hf")
    for one, out in ((base, "a"), (tmp_path / "hf", "b")):
        done = run("extract", one, other, "-o", tmp_path / out, "--rank", "1")
        assert done.exit_code == 0, done.stderr
    found, same = (load_model(tmp_path / each) for each in "ab")
    path = f"base_model.model.{name.removesuffix('.weight')}"
    assert {*found} == {*same} == {f"{path}.lora_A.weight", f"{path}.lora_B.weight"}
    delta = found[f"{path}.lora_B.weight"] @ found[f"{path}.lora_A.weight"]
    assert torch.allclose(delta, tuned[name] - weights[name], atol=1e-5)
    tensors = llama_tensors(tuned)
    tensors["blk.0.attn_v.weight"], _ = q8_0(WIDTH // 2, WIDTH, 2)
    coded = write(tmp_path / "q.gguf", llama_fields(), tensors)
    refused = run("extract", base, coded, "-o", tmp_path / "c")
    assert refused.exit_code == 3 and "so its rounding errors would be extracted" in refused.stderr


def test_a_split_model(tmp_path: Path) -> None:
    weights, tensors = llama_weights(), llama_tensors(llama_weights(), "BF16")
    names = [*tensors]
    for number, own in enumerate((names[::2], names[1::2])):
        fields = {**(llama_fields() if number == 0 else {}), "split.no": number, "split.count": 2}
        path = tmp_path / f"m-{number + 1:05d}-of-00002.gguf"
        write(path, fields, {name: tensors[name] for name in own})
    convert(tmp_path / "m-00001-of-00002.gguf", tmp_path / "out", dtype="fp32")
    assert all(torch.equal(W, weights[name]) for name, W in load_model(tmp_path / "out").items())
    (tmp_path / "whole").mkdir()
    found = diff(tmp_path, write_llama(tmp_path / "whole" / "w.gguf", weights, "BF16"))
    assert found.same and found.equal == len(names)


def test_diff_names_the_codes(tmp_path: Path, run: Run) -> None:
    weights = llama_weights()
    fields, tensors = llama_fields(), llama_tensors(weights)
    tensors["blk.0.attn_v.weight"], numbers = q8_0(WIDTH // 2, WIDTH, 2)
    coded = write(tmp_path / "q.gguf", fields, tensors)
    (row,) = diff(write_model(tmp_path / "hf", weights, {"model_type": "llama"}), coded).tensors
    assert (row.name, row.dtype_a, row.dtype_b) == ("model.layers.0.self_attn.v_proj.weight", "F32", "Q8_0")
    W = weights["model.layers.0.self_attn.v_proj.weight"].double()
    assert row.largest == pytest.approx(float((torch.tensor(numbers) - W).abs().max()))


EXPERTS, INSIDE = 3, 4  # experts of the small models below, and the width inside each


def experts_of(architecture: str, **values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return fields and tensors of one layer with experts, whose gates and ups are stacks."""
    fields = gguf_fields(
        architecture,
        **{"attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4},
        **{"feed_forward_length": INSIDE, "expert_count": EXPERTS, "expert_used_count": 2} | values,
    )
    tensors = vectors("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")
    shapes = {"token_embd": (5, 8), "output": (5, 8), "blk.0.ffn_gate_inp": (EXPERTS, 8)}
    shapes |= {f"blk.0.attn_{name}": (8, 8) for name in ("q", "k", "v", "output")}
    tensors |= {f"{name}.weight": floats(matrix(*shape).numpy()) for name, shape in shapes.items()}
    for i, (name, shape) in enumerate(STACKS.items()):
        tensors[f"blk.0.{name}.weight"] = floats(stack(i, *shape).numpy())
    return fields, tensors


STACKS = {"ffn_gate_exps": (INSIDE, 8), "ffn_up_exps": (INSIDE, 8), "ffn_down_exps": (8, INSIDE)}


def stack(seed: int, rows: int, columns: int) -> Tensor:
    return torch.arange(EXPERTS * rows * columns, dtype=torch.float32).view(EXPERTS, rows, columns) + 1000 * seed


def test_a_stack_of_experts_is_their_matrices(tmp_path: Path) -> None:
    found = read(write(tmp_path / "m.gguf", *experts_of("llama")))
    for i, name in enumerate(("w1", "w3", "w2")):
        for expert in range(EXPERTS):
            W = found[f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"]
            assert torch.equal(W, stack(i, *[*STACKS.values()][i])[expert])
    assert torch.equal(found["model.layers.0.block_sparse_moe.gate.weight"], matrix(EXPERTS, 8))


GRANITE = {"attention.scale": 0.5, "embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0}


def test_two_stacks_are_the_halves_of_one(tmp_path: Path) -> None:
    found = read(write(tmp_path / "m.gguf", *experts_of("granitemoe", **GRANITE)))
    gate, up = (stack(i, INSIDE, 8) for i in (0, 1))
    assert torch.equal(found["model.layers.0.block_sparse_moe.input_linear.weight"], torch.cat([gate, up], 1))


HALVES: dict[str, tuple[str, tuple[int, ...] | None, str]] = {
    "another number of experts": ("ffn_up_exps", (EXPERTS + 1, INSIDE, 8), "and blk.0.ffn_gate_exps.weight"),
    "other columns": ("ffn_up_exps", (EXPERTS, INSIDE, 6), "is"),
    "more rows": ("ffn_up_exps", (EXPERTS, INSIDE + 2, 8), "where 5 rows of"),
    "one half": ("ffn_up_exps", None, "where 2 rows of model.layers.0.block_sparse_moe.input_linear.weight belong"),
    "no two halves": ("ffn_up_exps", (EXPERTS, INSIDE + 1, 8), "it belongs to another model"),
}


@pytest.mark.parametrize("case", HALVES)
def test_halves_that_do_not_fit(tmp_path: Path, case: str) -> None:
    name, shape, message = HALVES[case]
    fields, tensors = experts_of("granitemoe", **GRANITE)
    del tensors[f"blk.0.{name}.weight"]
    if shape:
        tensors[f"blk.0.{name}.weight"] = floats(np.zeros(shape))
    with pytest.raises(InputError, match=re.escape(message)):
        read(write(tmp_path / "m.gguf", fields, tensors))


def test_one_half_twice(tmp_path: Path) -> None:
    """A layer's number with zeros before it is the same layer's."""
    fields, tensors = experts_of("granitemoe", **GRANITE)
    tensors["blk.00.ffn_gate_exps.weight"] = tensors.pop("blk.0.ffn_up_exps.weight")
    with pytest.raises(InputError, match=r"is missing other parts of model\.layers\.0\.block_sparse_moe\.input_linear"):
        read(write(tmp_path / "m.gguf", fields, tensors))


def test_the_halves_of_latent_attention(tmp_path: Path) -> None:
    """Keys are (head, latent, key) in GGUF and values (head, value, latent); transformers has both head by head."""
    heads, key, value, latent, rotated = 2, 3, 5, 4, 2
    keys = torch.arange(heads * latent * key, dtype=torch.float32).view(heads, latent, key)
    values = torch.arange(heads * value * latent, dtype=torch.float32).view(heads, value, latent) + 1000
    fields = gguf_fields(
        "deepseek2",
        **{"feed_forward_length": 12, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4},
        **{"attention.head_count_kv": 1, "attention.kv_lora_rank": latent, "rope.dimension_count": rotated},
        **{"attention.key_length_mla": key + rotated, "attention.value_length_mla": value},
        **{"attention.key_length": latent + rotated, "attention.value_length": latent},
        **{"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 4, "expert_shared_count": 1},
        **{"leading_dense_block_count": 1, "expert_weights_scale": 1.0},
    )
    tensors = vectors("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight")
    tensors |= vectors("blk.0.attn_kv_a_norm.weight", size=latent)
    shapes = {"token_embd": (5, 8), "output": (5, 8), "blk.0.attn_q": (heads * (key + rotated), 8)}
    shapes |= {"blk.0.attn_kv_a_mqa": (latent + rotated, 8), "blk.0.attn_output": (8, heads * value)}
    shapes |= {"blk.0.ffn_gate": (12, 8), "blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12)}
    tensors |= {f"{name}.weight": floats(matrix(*shape).numpy()) for name, shape in shapes.items()}
    tensors |= {"blk.0.attn_k_b.weight": floats(keys.numpy()), "blk.0.attn_v_b.weight": floats(values.numpy())}
    found = read(write(tmp_path / "m.gguf", fields, tensors))["model.layers.0.self_attn.kv_b_proj.weight"]
    assert torch.equal(found, torch.cat([torch.cat([keys[h].T, values[h]]) for h in range(heads)]))


def test_a_scale_that_is_a_tensor_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Gemma 4 has one for each expert: transformers multiplies by it elsewhere, so that it is not in the weight."""
    table = ARCHITECTURES["llama"]
    row = Weight("blk.{n}.ffn_down_exps.scale", "model.layers.{n}.block_sparse_moe.scales", bare=True)
    fields, tensors = experts_of("llama", **{"feed_forward_length": 32})
    for name in ("gate", "up"):
        tensors[f"blk.0.ffn_{name}_exps.weight"] = floats(np.zeros((EXPERTS, 32, 8)))
    codes, expected = q8_0(EXPERTS * 8, 32, 1)
    tensors["blk.0.ffn_down_exps.weight"] = (codes[0], (EXPERTS, 8, 32), codes[2])
    tensors["blk.0.ffn_down_exps.scale"] = floats(np.array([2.0, 3.0, 4.0]))
    source, down = write(tmp_path / "m.gguf", fields, tensors), "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    assert torch.equal(read(source)[down], torch.from_numpy(3.0 * expected[8:16]))
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(table, weights=(*table.weights, row)))
    found = read(source)
    assert torch.equal(found[down], torch.from_numpy(expected[8:16]))
    assert found["model.layers.0.block_sparse_moe.scales"].tolist() == [2.0, 3.0, 4.0]


def test_columns_of_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = ARCHITECTURES["llama"]
    weights = (replace(each, columns="even" if each.gguf.endswith("ffn_down") else "") for each in table.weights)
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(table, weights=tuple(weights)))
    with pytest.raises(InputError, match="has only some of the columns"):
        read(write_llama(tmp_path / "m.gguf", llama_weights()))


@pytest.mark.parametrize(
    ("model_type", "module"),
    [
        ("dbrx", "transformer.blocks.0.ffn.experts.mlp.w1"),
        ("mamba", "backbone.layers.0.mixer.A_log"),
        ("mamba", "backbone.layers.0.mixer.conv1d"),
        ("mamba2", "backbone.layers.0.mixer.norm"),
        ("gemma3n_text", "model.altup_projections.0"),
    ],
)
def test_no_adapter_is_of_what_has_another_shape_or_other_numbers(model_type: str, module: str) -> None:
    """A change of A_log adds nothing to -exp(A_log); the rows of such tensors are for whole models alone."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "num_experts": 4}
    assert GgufModel.of_config({"model_type": model_type, **heads}, "it").locate(module) == (None, [])


def test_rotary_factors_that_are_too_many(tmp_path: Path) -> None:
    tensors = llama_tensors(llama_weights()) | {"rope_freqs.weight": floats(np.ones(4), "F16")}
    with pytest.raises(InputError, match="where a short one of F32 belongs") as refused:
        read(write(tmp_path / "m.gguf", llama_fields(), tensors))
    assert refused.value.culprit == "rope_freqs.weight"
