"""Hold MLX's adapters against mlx-lm itself: what it trains is merged as it fuses it, and it loads what we write.

`mlx` and `mlx-lm` are in the extra `oracles`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROGRAMS, factors, load_model, oracle_folder, write_peft
from lib.models import tiny
from safetensors.torch import load_file, save_file

import loratool
from loratool.architectures.mlx_names import MLX, ONE_BY_ONE

pytest.importorskip("mlx_lm", reason="needs mlx-lm, which is in the extra `oracles`")

from lib.models.mlx_models import answers, fused, loaded, make_base, numbers, train

pytestmark = pytest.mark.slow

TEXT = """afmoe apertus cohere cohere2 deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5 ernie4_5_moe exaone exaone4
    exaone_moe falcon_mamba gemma gemma2 gemma3_text gemma4_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2
    gpt_neox gptj granite granitemoe granitemoehybrid helium hunyuan_v1_dense internlm3 iquestcoder jamba laguna lfm2
    lfm2_moe llama mamba mamba2 mellum minimax_m2 ministral3 mistral mixtral nemotron nemotron_h olmo2 olmo3 olmoe phi
    phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next seed_oss smollm3 stablelm starcoder2""".split()
IMAGE = """gemma3 gemma4 llama4 llava minimax_m3_vl mistral3 mistral4 qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl
    qwen3_vl_moe""".split()
CASES = [*(("causal", each) for each in TEXT), *(("image", each) for each in IMAGE)]
# no forward pass of two layers (a cache of each kind of layer is asked for)
UNASKED = {"cohere2", "lfm2", "llama4"}
CLOSE = 1e-6  # of weights of about 0.1, in float32


def worst(one: dict[str, Any], two: dict[str, Any]) -> float:
    assert one.keys() == two.keys()
    return max(float(abs(one[name] - two[name]).max()) for name in one)


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    table, model_type = request.param
    assert model_type in MLX
    return make_base(table, model_type, tmp_path / "base")


@pytest.mark.parametrize("base", CASES, ids=[name for _, name in CASES], indirect=True)
def test_all_layers_are_merged_and_written_as_mlx_lm_has_them(tmp_path: Path, base: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    adapter = train(base, tmp_path / "a")
    theirs = fused(base, adapter)
    loratool.merge(base, adapter, tmp_path / "merged", dtype="fp32", undo=False)
    assert worst(numbers(theirs), numbers(loaded(tmp_path / "merged"))) < CLOSE
    try:
        loratool.convert(adapter, tmp_path / "peft", to="peft", base=base)
    except loratool.NeedsFlag as error:  # modules whose class PEFT cannot load under the file's names
        assert "would not load" in error.message
        return
    loratool.merge(base, tmp_path / "peft", tmp_path / "again", dtype="fp32", undo=False)
    one, two = load_model(tmp_path / "merged"), load_model(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)
    report = loratool.convert(tmp_path / "peft", tmp_path / "back", to="mlx", base=base)
    assert {row.how for row in report.modules} == {"exact"}
    made, former = (load_file(folder / "adapters.safetensors") for folder in (tmp_path / "back", adapter))
    assert made.keys() == former.keys()
    assert all(torch.equal(made[name], former[name]) for name in made)
    wrapped = loaded(base)
    load_adapters(wrapped, str(tmp_path / "back"))  # strict
    if json.loads((base / "config.json").read_text())["model_type"] not in UNASKED:
        ours, said = answers(wrapped), answers(theirs)
        assert abs(ours - said).max() < 2e-5 * abs(said).max()


KINDS = {
    "dora": ("dora", None),
    "dora of an embedding": ("dora", ["model.embed_tokens", "self_attn.q_proj"]),
    "embedding": ("lora", ["model.embed_tokens", "self_attn.v_proj"]),
    "full": ("full", None),
}


@pytest.mark.parametrize("base", [("causal", "llama"), ("causal", "gemma3_text")], ids=["llama", "tied"], indirect=True)
@pytest.mark.parametrize("case", KINDS)
def test_every_kind_is_merged_as_mlx_lm_fuses_it(tmp_path: Path, base: Path, case: str) -> None:

    adapter = train(base, tmp_path / "a", *KINDS[case])
    loratool.merge(base, adapter, tmp_path / "merged", dtype="fp32", undo=False)
    theirs, merged = fused(base, adapter), loaded(tmp_path / "merged")
    assert worst(numbers(theirs), numbers(merged)) < CLOSE
    said = answers(theirs)
    assert abs(answers(merged) - said).max() < 2e-5 * abs(said).max()


@pytest.mark.parametrize("quantized", [False, True], ids=["16 bits", "affine"])
@pytest.mark.parametrize(
    "base",
    [("causal", "llama"), ("causal", "gpt2"), ("causal", "gpt_neox"), ("causal", "mixtral"), ("causal", "qwen3_moe"),
     ("image", "gemma3"), ("image", "qwen2_vl")],
    ids=lambda case: case[1] if isinstance(case, tuple) else None,
    indirect=True,
)  # fmt: skip
def test_folders_of_mlx_take_its_adapters_and_peft_s(tmp_path: Path, base: Path, quantized: bool) -> None:
    from mlx_lm.utils import dequantize_model, quantize_model, save_model
    from mlx_lm.utils import load_model as load

    model, config = load(base)
    if quantized:
        model, config = quantize_model(model, config, 32, 4)
    save_model(tmp_path / "mlx", model)
    (tmp_path / "mlx" / "config.json").write_text(json.dumps(config))
    adapter = train(base, tmp_path / "a")
    theirs = numbers(fused(tmp_path / "mlx", adapter, quantized))
    loratool.convert(adapter, tmp_path / "peft", to="peft", base=base)
    for each in (adapter, tmp_path / "peft"):
        loratool.merge(tmp_path / "mlx", each, tmp_path / "merged", dtype="fp32", undo=False, force=True)
        merged = loaded(tmp_path / "merged")
        assert worst(theirs, numbers(dequantize_model(merged) if quantized else merged)) < CLOSE


@pytest.mark.parametrize(
    "base", [("causal", each) for each in sorted(ONE_BY_ONE)], ids=sorted(ONE_BY_ONE), indirect=True
)
def test_experts_come_back_one_by_one(tmp_path: Path, base: Path) -> None:
    """What was the hub's, loaded and saved by mlx-lm, is what transformers loads again."""
    import transformers
    from mlx_lm.utils import save_model

    save_model(tmp_path / "mlx", loaded(base))
    shutil.copy(base / "config.json", tmp_path / "mlx" / "config.json")
    loratool.convert_model(tmp_path / "mlx", tmp_path / "out", dtype="fp32")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, told = load(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not any(told.values())
    one, two = model.state_dict(), load(base, dtype=torch.float32).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_unequal_scales_and_ranks_answer_as_peft_s(tmp_path: Path) -> None:
    """mlx-lm takes the one scale and rank of our file, and its model says what the merged model says."""
    from mlx_lm.tuner.utils import load_adapters

    base = make_base("causal", "llama", tmp_path / "base")
    q, up = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    modules = {q: factors(64, 64, 4), up: factors(96, 64, 2, seed=1)}
    pattern = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 3}}
    peft = write_peft(
        tmp_path / "peft", {name: (A, 9 * B) for name, (A, B) in modules.items()}, lora_alpha=5, **pattern
    )
    loratool.convert(peft, tmp_path / "mlx", to="mlx", base=base)
    loratool.merge(base, peft, tmp_path / "merged", dtype="fp32", undo=False)
    model = loaded(base)
    load_adapters(model, str(tmp_path / "mlx"))
    merged = answers(loaded(tmp_path / "merged"))
    assert abs(answers(model) - merged).max() < 1e-5 * abs(merged).max() < abs(answers(loaded(base)) - merged).max()


def test_gpt_oss_s_interleaved_stacks(tmp_path: Path) -> None:
    """The hub's MXFP4 blocks of gate and up alternate by rows; mlx-lm has two stacks, and adds to them in bfloat16."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model as load
    from mlx_lm.utils import save_model

    _, model = tiny.build("causal", "gpt_oss")
    base = tmp_path / "base"
    model.save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        words, scales = mx.quantize(mx.array(tensors.pop(name).mT.numpy()), 32, 4, mode="mxfp4")
        blocks = np.array(words).view(np.uint8).reshape(*words.shape[:2], -1, 16)
        tensors |= {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(np.array(scales))}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "mxfp4"}, "rope_theta": 10000.0}
    (base / "config.json").write_text(json.dumps(config))
    other, config = load(base)
    save_model(tmp_path / "mlx", other)
    (tmp_path / "mlx" / "config.json").write_text(json.dumps(config))
    adapter = train(base, tmp_path / "a")
    theirs = numbers(fused(base, adapter, True))
    for model in (base, tmp_path / "mlx"):
        loratool.merge(model, adapter, tmp_path / "merged", dtype="fp32", undo=False, force=True)
        for name, W in load_model(tmp_path / "merged").items():
            owner, _, last = name.removesuffix(".weight").rpartition(".")
            if not owner.endswith("experts") or "bias" in last:
                continue
            hubs = {"gate_proj": W.mT[:, ::2], "up_proj": W.mT[:, 1::2]} if last == "gate_up_proj" else {last: W.mT}
            for part, found in hubs.items() if model is base else ((last, W),):
                said = theirs[f"{owner}.{part}.weight"]
                assert found.shape == said.shape and (abs(found.numpy() - said) <= 2**-7 * abs(said) + 1e-3).all()


def test_an_archive_of_2023_is_merged_as_its_trainer_fuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-examples' `lora/` trained, saved and fused before mlx-lm did; it has a fixed scale, which the file lacks."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    if not (PROGRAMS / "mlx-examples").is_dir():
        pytest.skip(f"needs a checkout of ml-explore/mlx-examples in {PROGRAMS}")
    monkeypatch.syspath_prepend(PROGRAMS / "mlx-examples/lora")
    import models

    base = make_base("causal", "mistral", tmp_path / "base")
    model = models.Model(models.ModelArgs.from_dict(json.loads((base / "config.json").read_text())))
    model.load_weights(str(base / "model.safetensors"))
    model.freeze()
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            wrapped = models.LoRALinear.from_linear(layer.self_attn[name], rank=4)
            wrapped.lora_b = mx.random.normal((wrapped.lora_b.shape[1], 4)).T  # as an optimizer may leave it
            layer.self_attn[name] = wrapped
    (tmp_path / "a").mkdir()
    mx.savez(str(tmp_path / "a/adapters.npz"), **dict(tree_flatten(model.trainable_parameters())))
    scale = model.model.layers[0].self_attn.q_proj.scale
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            layer.self_attn[name] = layer.self_attn[name].to_linear()
    loratool.merge(base, tmp_path / "a", tmp_path / "merged", alpha=4 * scale, dtype="fp32", undo=False)
    merged = load_model(tmp_path / "merged")
    theirs = {name: torch.tensor(array.tolist()) for name, array in tree_flatten(model.parameters())}
    assert merged.keys() == theirs.keys() and scale == 20
    for name, W in theirs.items():
        assert torch.allclose(merged[name].float(), W, rtol=1e-5, atol=1e-5 * scale), name


@pytest.mark.parametrize(
    ("oracle", "file", "package"),
    [("mlx_vlm_old", "trainer", "mlx-vlm==0.1.0"), ("mlx_vlm", "trainer/peft", "mlx-vlm==0.7.10")],
)
def test_an_adapter_of_mlx_vlm_is_merged_as_its_layer_answers(
    tmp_path: Path, oracle: str, file: str, package: str
) -> None:
    """Of the version whose alpha is the scale, and of one that divides it by the rank."""
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten

    source = Path(oracle_folder(oracle, package)) / f"mlx_vlm/{file}/lora.py"
    spec = importlib.util.spec_from_file_location("mlx_vlm_lora", source)
    assert spec is not None and spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    q = "language_model.model.layers.0.self_attn.q_proj"
    linear = nn.Linear(12, 6, bias=False)
    layer = theirs.LoRaLayer(linear, rank=4, alpha=10.0)
    layer.B = mx.random.normal((4, 6))
    layer.original_layer.freeze()
    (tmp_path / "a").mkdir()
    trained = {f"{q}.{name}": each for name, each in tree_flatten(layer.trainable_parameters())}
    mx.save_safetensors(str(tmp_path / "a/adapters.safetensors"), trained)
    (tmp_path / "a/adapter_config.json").write_text(json.dumps({"rank": 4, "alpha": 10.0, "dropout": 0.0}))
    mx.save_safetensors(str(tmp_path / "base.safetensors"), {f"{q}.weight": linear.weight})
    with pytest.raises(loratool.NeedsFlag) as caught:
        loratool.merge(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "out.safetensors", undo=False)
    before, since = (float(each) for each in re.findall(r"--alpha (\d+)", str(caught.value.remedy)))
    alpha = before if oracle == "mlx_vlm_old" else since
    loratool.merge(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "out.safetensors", alpha=alpha, undo=False)
    found = load_file(tmp_path / "out.safetensors")[f"{q}.weight"]
    expected = torch.tensor(layer(mx.eye(12)).T.tolist())
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", [("causal", "llama")], ids=["llama"], indirect=True)
def test_a_head_that_peft_saved_with_its_weight_answers_as_its_merge(tmp_path: Path, base: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    W, query = load_model(base), "model.layers.0.self_attn.q_proj"
    pairs = {name: factors(*W[f"{name}.weight"].shape, 2) for name in ("lm_head", query)}
    adapter = write_peft(tmp_path / "a", pairs)
    tensors = load_file(adapter / "adapter_model.safetensors")
    under = {"base_model.model.lm_head.base_layer.weight": W["lm_head.weight"]}
    save_file(tensors | under, adapter / "adapter_model.safetensors")
    loratool.convert(adapter, tmp_path / "mlx", to="mlx", base=base)
    loratool.merge(base, adapter, tmp_path / "merged", dtype="fp32", undo=False)
    wrapped = loaded(base)
    load_adapters(wrapped, str(tmp_path / "mlx"))
    theirs, ours = answers(wrapped), answers(loaded(tmp_path / "merged"))
    assert abs(ours - theirs).max() < 2e-5 * abs(theirs).max()
