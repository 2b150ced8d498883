"""Merge into classes of transformers that split, join or rename what the file has, as PEFT does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_model, write_model
from lib.models.reshaped_models import hold, transformers, wrapped
from lib.models.tiny import build, perturb, shrink
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import InputError, NeedsFlag


def deepseek_ocr2(config: Any) -> None:
    text = config.text_config
    text.mlp_layer_types, text.num_experts_per_tok = ["dense", "sparse"], 2


def dory(config: Any) -> None:
    config.n_input_layers = config.n_recurrent_layers = config.n_output_layers = 1
    config.num_hidden_layers, config.layer_types = 3, ["sliding_attention", "full_attention", "sliding_attention"]


DOTS3 = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48, "vocab_size": 320}
DOTS3 |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4}
DOTS3 |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 24, "index_head_dim": 16}
DOTS3 |= {"q_lora_rank": 32, "kv_lora_rank": 32, "num_experts_per_tok": 2, "pad_token_id": 0}


def dots3_note(config: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "moe_intermediate_size": 48, "adapter_in_dim": 64, "pyramid_num_routed": [-1, 4]}
    audio = {**sizes, "adapter_input_size": 64, "feature_size": 16, "downsample_hidden_size": 16}
    towers = {"vision_config": {**vision, "adapter_out_dim": 64}, "audio_config": {**audio, "adapter_out_dim": 64}}
    return type(config)(text_config=DOTS3, **towers)


def dots3_note_text(config: Any) -> Any:
    return type(config)(**DOTS3)


def ernie4_5_vl_moe(config: Any) -> None:
    text = config.text_config
    text.head_dim, text.moe_intermediate_size, text.moe_num_experts = 16, [48, 32], 3
    text.rope_parameters |= {"mrope_section": [2, 3, 3]}


def inkling2(config: Any) -> None:
    config.get_text_config().unpadded_vocab_size = 300


def minimax_m3_vl(config: Any) -> None:
    config.merged_hidden_size, config.projector_hidden_size = 64, 48
    config.text_config.mlp_layer_types = ["dense", "sparse"]


def sapiens2(config: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return type(config)(**sizes, image_size=28, patch_size=14)


def step3p7(config: Any) -> None:
    config.vision_config.mlp_ratio = config.vision_config.intermediate_size / config.vision_config.hidden_size


def dinov2(config: Any) -> Any:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28}
    return type(config)(**sizes, use_swiglu_ffn=True)


def mistral_large4(config: Any) -> None:
    config.text_config.head_dim = config.text_config.qk_rope_head_dim


def molmo2(config: Any) -> None:
    config.adapter_config.vision_feature_layer = [1, 0]


def radio(config: Any) -> None:
    config.patch_dim, config.max_img_size = 3 * config.patch_size**2, 28


def tipsv2(config: Any) -> Any:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "image_size": 28, "patch_size": 14, "mlp_ratio": 2}
    text = {**sizes, "intermediate_size": 96, "vocab_size": 320}
    return type(config)(text_config=text, vision_config=vision)


Fix = Callable[[Any], Any]  # changes a config in place, or returns another

# model type -> table of classes or the class, what makes its config fit, the modules that get no factors
CASES: dict[str, tuple[str, Fix, str]] = {
    "blip": ("image", vars, r"predictions\.decoder"),
    "cohere_asr": ("CohereAsrForConditionalGeneration", vars, "$^"),
    "deepseek_ocr2": ("DeepseekOcr2ForConditionalGeneration", deepseek_ocr2, "$^"),
    "dinov2": ("Dinov2Model", dinov2, "$^"),
    "dory": ("causal", dory, "$^"),
    "dots3_note": ("Dots3NoteForConditionalGeneration", dots3_note, "$^"),
    "dots3_note_text": ("Dots3NoteForCausalLM", dots3_note_text, "$^"),
    "ernie4_5_vl_moe": ("Ernie4_5_VLMoeForConditionalGeneration", ernie4_5_vl_moe, r"_moe\.gate\b"),
    "gte": ("GteModel", vars, "$^"),
    "hrm_text": ("causal", vars, "$^"),
    "inkling2": ("image", inkling2, r"experts\.gate_up_proj"),
    "inkling2_loop_text": ("causal", inkling2, r"experts\.gate_up_proj"),
    "inkling2_text": ("causal", inkling2, r"experts\.gate_up_proj"),
    "inkling_text": ("causal", vars, "$^"),
    "jina_embeddings_v3": ("JinaEmbeddingsV3Model", vars, "$^"),
    "kimi_k25": ("image", vars, r"vision_tower.*\.[qk]_proj"),
    "lara_mini": ("causal", vars, "$^"),
    "minimax_m3_vl": ("image", minimax_m3_vl, "$^"),
    "mistral_large4": ("MistralLarge4ForConditionalGeneration", mistral_large4, r"vision_tower.*\.[qk]_proj"),
    "molmo2": ("Molmo2ForConditionalGeneration", molmo2, "$^"),
    "nomic_bert": ("NomicBertModel", vars, "$^"),
    "pi0": ("image", vars, "$^"),
    "qianfan_ocr": ("image", vars, "$^"),
    "radio": ("RadioModel", radio, "$^"),
    "sarvam_moe": ("causal", vars, "$^"),
    "sapiens2": ("Sapiens2Model", sapiens2, "$^"),
    "step3p7": ("image", step3p7, r"vision_model.*\.[qk]_proj"),
    "timesfm2_5": ("TimesFm2_5ModelForPrediction", vars, "$^"),
    "tipsv2": ("Tipsv2Model", tipsv2, "$^"),
    "unlimited_ocr": ("image", vars, "$^"),
}

# One of each mechanism: rows of a fused matrix, a matrix of several, and names that are only others
QUICK = {"sarvam_moe", "minimax_m3_vl", "gte", "dory"}


def make(model_type: str) -> tuple[Any, Any]:
    """Return (class, model) of a case, with random weights."""
    table, fix, _ = CASES[model_type]
    if table in ("causal", "image"):
        kind, model = build(table, model_type)
        config = model.config
    else:
        kind = getattr(transformers, table)
        config = kind.config_class()
        shrink(config)
    fixed = fix(config)
    config = fixed if isinstance(fixed, transformers.PreTrainedConfig) else config
    torch.manual_seed(0)
    return kind, kind._from_config(config).float()


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=[] if t in QUICK else pytest.mark.slow) for t in CASES])
def test_merge_is_pefts(model_type: str, tmp_path: Path) -> None:
    hold(*make(model_type), tmp_path, CASES[model_type][2])


def built(name: str) -> tuple[Any, Any]:
    kind = getattr(transformers, name)
    config = kind.config_class()
    shrink(config)
    torch.manual_seed(0)
    return kind, kind._from_config(config).float()


HEADS = """BlipForConditionalGeneration FlaubertWithLMHeadModel FNetForMaskedLM GteForMaskedLM IBertForMaskedLM
    JinaEmbeddingsV3ForMaskedLM LayoutLMForMaskedLM MraForMaskedLM NomicBertForMaskedLM SqueezeBertForMaskedLM
    TapasForMaskedLM YosoForMaskedLM""".split()


@pytest.mark.parametrize("name", [HEADS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in HEADS[1:])])
def test_a_head_is_written_apart_from_its_embedding(name: str, tmp_path: Path) -> None:
    """PEFT's merge changes both; the answers of base and adapter are of one changed side."""
    kind, model = built(name)
    model.save_pretrained(tmp_path / "base")
    adapter = wrapped(kind.from_pretrained(tmp_path / "base"), with_head=True).eval()
    adapter.save_pretrained(tmp_path / "adapter")
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    merged, loading = kind.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values())
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": torch.arange(10, 26)[None], **({"pixel_values": pixels} if name.startswith("Blip") else {})}
    with torch.no_grad():
        found, wanted = (each(**inputs).logits for each in (merged.eval(), adapter))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def dory_blocks(name: str) -> str:
    """Return the name with attention and MLP as two layers; what is of the pair as a whole has no other name."""
    found = re.search(r"layers\.(\d+)\.(self_attn|mlp)\b", name)
    return name.replace(found[0], f"layers.{2 * int(found[1]) + (found[2] == 'mlp')}.mixer") if found else name


# model type -> the name in a release of what transformers writes
RELEASED: dict[str, Callable[[str], str]] = {
    "dory": dory_blocks,
    "kimi_k25": lambda name: name.replace("language_model.model.blocks.", "language_model.model.layers."),
    "qianfan_ocr": lambda name: name.replace("language_model.model.encoder.layers.", "language_model.model.layers."),
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", RELEASED)
def test_the_names_of_the_release(model_type: str, tmp_path: Path) -> None:
    def rename(base: Path) -> None:
        written = load_file(base / "model.safetensors")
        released = {RELEASED[model_type](name): W for name, W in written.items()}
        assert released.keys() != written.keys()
        save_file(released, base / "model.safetensors", metadata={"format": "pt"})

    hold(*make(model_type), tmp_path, CASES[model_type][2], rename)


def test_dora_of_rows_takes_the_norms_of_these_rows(tmp_path: Path) -> None:
    hold(*make("hrm_text"), tmp_path, use_dora=True)


def test_rows_in_another_order_are_refused_by_name(tmp_path: Path) -> None:
    _, model = make("kimi_k25")
    model.save_pretrained(tmp_path / "base")
    wrapped(model).save_pretrained(tmp_path / "adapter")
    with pytest.raises(NeedsFlag, match="in another order than transformers' class has them") as error:
        loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert error.value.remedy == "to exclude them: --exclude k_proj,q_proj"


def adapter_of(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.model.layers.0.self_attn.{name.replace('__', '.')}": W for name, W in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


SARVAM = {"model_type": "sarvam_moe", "num_attention_heads": 4, "num_key_value_heads": 2}
FUSED = {"model.layers.0.attention.query_key_value.weight": torch.zeros(64, 8)}


@pytest.mark.parametrize(
    ("config", "rows", "said"),
    [
        (SARVAM, 48, r"\(48, 2\) .*base weight is \(64, 8\), and it is 32 of its rows"),
        ({**SARVAM, "num_attention_heads": 7}, 32, "has 64 rows, but the config of the sarvam_moe gives"),
        ({"model_type": "sarvam_moe"}, 32, "does not tell how many of each"),
    ],
)
def test_rows_that_do_not_fit_are_refused(config: dict[str, Any], rows: int, said: str, tmp_path: Path) -> None:
    factors = {"q_proj__lora_A__weight": torch.ones(2, 8), "q_proj__lora_B__weight": torch.ones(rows, 2)}
    adapter = adapter_of(tmp_path / "adapter", **factors)
    with pytest.raises(InputError, match=said):
        loratool.merge(write_model(tmp_path / "base", FUSED, config), [adapter], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_bias_that_is_replaced_is_some_rows_of_a_fused_one(tmp_path: Path) -> None:
    base = {**FUSED, "model.layers.0.attention.query_key_value.bias": torch.zeros(64)}
    factors = {"q_proj__lora_A__weight": torch.ones(2, 8), "q_proj__lora_B__weight": torch.ones(32, 2)}
    adapter = adapter_of(tmp_path / "adapter", **factors, q_proj__bias=torch.ones(32))
    loratool.merge(write_model(tmp_path / "base", base, SARVAM), [adapter], tmp_path / "merged")
    found = load_model(tmp_path / "merged")["model.layers.0.attention.query_key_value.bias"]
    assert found.tolist() == [1.0] * 32 + [0.0] * 32


def test_biases_that_are_rows_of_a_fused_one(tmp_path: Path) -> None:
    """What extract keeps of them exactly is put into their rows, and taken out of them."""
    _, model = build("masked", "gte")
    base, tuned, adapter, merged = (tmp_path / name for name in ("base", "tuned", "adapter", "merged"))
    model.save_pretrained(base)
    perturb(model, every=False)
    with torch.no_grad():
        for name, b in model.named_parameters():
            if name.endswith(("k_proj.bias", "v_proj.bias")):
                b += torch.randn(b.shape, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tuned)
    report = loratool.extract(base, tuned, adapter, rank=8, allow=("unrelated",))
    assert any(name.endswith("k_proj.bias") for name in report.exact)
    loratool.merge(base, [adapter], merged)
    found, wanted = load_model(merged), load_model(tuned)
    assert all(torch.allclose(found[name], W, rtol=1e-4, atol=1e-5) for name, W in wanted.items())
    assert loratool.verify(base, [adapter], merged).status == "proven"
    loratool.unmerge(merged, [adapter], tmp_path / "again")
    plain = load_model(base)
    assert all(torch.equal(W, plain[name]) for name, W in load_model(tmp_path / "again").items())
    loratool.merge(base, [(adapter, 0.5)], tmp_path / "half")
    biases = {name: W for name, W in load_model(tmp_path / "half").items() if name.endswith("qkv_proj.bias")}
    assert biases and all(torch.allclose(b, (plain[n] + wanted[n]) / 2, atol=1e-6) for n, b in biases.items())
