"""Hold the renames against tiny models of transformers, whose `save_pretrained` writes the historical names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratool.architectures.experts import EXPERTS, TRANSPOSED_EXPERTS, ExpertPart, expert_part
from loratool.architectures.fused_rows import FUSED_ROWS, row_parts
from loratool.architectures.renames import ALONE, RENAMES, canonical

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 32,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
DEEPSEEK = {
    **TEXT,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
QWEN_MOE = {
    **TEXT,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
MIXTRAL = {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}
VIT = {**VISION, "num_channels": 3}
CLIP = {"model_type": "clip_vision_model", **VISION}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
LLAMA = {"model_type": "llama", **TEXT}
QWEN_VL_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}

# (class of the model, class of its config, the config): families whose names on disk are not those of the model
FAMILIES = {
    "aria": (
        "AriaForConditionalGeneration",
        "AriaConfig",
        {
            "text_config": {"model_type": "aria_text", **TEXT, "moe_num_experts": 4, "moe_topk": 2},
            "vision_config": {"model_type": "idefics3_vision", **VISION},
            "projector_patch_to_query_dict": {4: 2},
        },
    ),
    "aya_vision": (
        "AyaVisionForConditionalGeneration",
        "AyaVisionConfig",
        {"text_config": {"model_type": "cohere2", **TEXT}, "vision_config": SIGLIP},
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", DEEPSEEK),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK),
    "dinov2": ("Dinov2Model", "Dinov2Config", VIT),
    "dots1": ("Dots1ForCausalLM", "Dots1Config", {**DEEPSEEK, "n_shared_experts": 1}),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": {"model_type": "gemma3_text", **TEXT}, "vision_config": SIGLIP, "mm_tokens_per_image": 4},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {k: v for k, v in TEXT.items() if k not in ("head_dim", "num_key_value_heads")},
    ),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", MIXTRAL),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config", {**QWEN_MOE, "moe_topk": [2, 2]}),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **TEXT,
            "num_experts": 4,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {
            **TEXT,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"],
        },
    ),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", {"text_config": LLAMA, "vision_config": CLIP}),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": {"model_type": "mistral", **TEXT},
            "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 8},
        },
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", MIXTRAL),
    "mllama": (
        "MllamaForConditionalGeneration",
        "MllamaConfig",
        {
            "text_config": {
                "model_type": "mllama_text_model",
                **TEXT,
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "vision_output_dim": 32,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1]],
                "max_num_tiles": 1,
            },
        },
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **TEXT,
            "layers_block_type": ["mamba", "moe", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "n_groups": 1,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "num_experts_per_tok": 2,
        },
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", QWEN_MOE),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        {
            "text_config": {"model_type": "gemma", **TEXT},
            "vision_config": {**SIGLIP, "projection_dim": 16},
            "projection_dim": 16,
        },
    ),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", MIXTRAL),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"text_config": {**TEXT, "rope_parameters": ROPE}, "vision_config": QWEN_VL_VISION},
    ),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", QWEN_MOE),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
        },
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN_MOE),
    "segformer": (
        "SegformerForImageClassification",
        "SegformerConfig",
        {"depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "num_encoder_blocks": 2},
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
}

# Families of 3-D experts whose files have the names of the model
FUSED = {
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", MIXTRAL),
    "llama4_text": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**MIXTRAL, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
    ),
    "openai_privacy_filter": ("OpenAIPrivacyFilterModel", "OpenAIPrivacyFilterConfig", MIXTRAL),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "text_config": {**QWEN_MOE, "rope_parameters": ROPE},
            "vision_config": {**QWEN_VL_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        },
    ),
}

# Weights that are joined or permuted while loading in ways that no table has: what of the name stays apart.
INKLING2 = r"attn_res|attention_input|message_input|middle_cycle"
RESHAPED = {
    "bailing_hybrid": "conv1d",
    "ernie4_5_vl_moe": r"mlp\.(gate|moe_statics|experts|text_moe|vision_moe)\b",
    "glm5_next": "conv1d",
    "glm5_next_text": "conv1d",
    "inkling2": INKLING2,
    "inkling2_loop": INKLING2,
    "inkling2_loop_text": INKLING2,
    "inkling2_text": INKLING2,
    "kimi_linear": "conv1d",
    "molmo2": r"wte|embed_tokens",
    "molmo2_text": r"wte|embed_tokens",
    "olmo_hybrid": "conv1d",
    "vit_msn": r"^(vit\.)?layers\.",  # transformers writes the classifier's body without its `vit.`
}


def build(transformers, family):
    model, config, values = {**FAMILIES, **FUSED}[family]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**{"tie_word_embeddings": False, **values}))


def configs_of(config) -> dict[str, dict[str, Any]]:
    """Return a config and the configs in it by model type."""
    nested = [value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")]
    inner = {model_type: each for value in nested for model_type, each in configs_of(value).items()}
    return {config.model_type: config.to_dict(), **inner}


def types_of(config) -> set[str]:
    return set(configs_of(config))


def joined(name: str, types: Collection[str]) -> str:
    part = expert_part(name, types)
    return part.fused if part else canonical(name, types)


def in_class(name: str, shape: Sequence[int], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, int | None]:
    """Return the parameters of the class that have rows of a tensor of the file -> how many they have, if known."""
    rows = row_parts(name, tuple(configs), configs, shape[-2:][0]) if len(shape) else ()
    stack, bias = len(shape) == 3, name.endswith("bias")
    return {part.module + ("" if stack or bias else ".weight"): part.module_rows for part in rows} or {
        joined(name, configs): None
    }


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers", minversion="5.0")
    module.logging.set_verbosity_error()
    return module


@pytest.fixture(scope="module")
def saved(transformers, tmp_path_factory):
    """Return family -> (model types, the model's tensors, the file's tensors)."""

    def save(family):
        model = build(transformers, family)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        return types_of(model.config), model.state_dict(), load_file(folder / "model.safetensors")

    return save


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_files_and_models_get_the_models_names(saved, family):
    types, model, disk = saved(family)
    assert family in types
    assert set(disk) != set(model), "nothing to rename: the family proves nothing"
    assert {joined(name, types) for name in disk} == set(model)
    assert {canonical(name, types) for name in model} == set(model)
    for name in [*disk, *model]:
        once = canonical(name, types)
        assert canonical(once, types) == once
        if once.endswith(".weight") and name.endswith(".weight"):  # not where a tensor becomes a bare parameter
            assert canonical(name.removesuffix(".weight"), types) == once.removesuffix(".weight")
    for name, tensor in disk.items():
        part = expert_part(name, types)
        if part is None:
            assert torch.equal(model[canonical(name, types)], tensor), name
            continue
        matrix = model[part.fused][part.expert]  # (parts * n, in)
        n = matrix.shape[0] // part.parts
        assert torch.equal(matrix[part.part * n : (part.part + 1) * n], tensor), name
        assert expert_part(name.removesuffix(".weight"), types) == part


@pytest.mark.parametrize("family", sorted({"aria", *FUSED}))
def test_the_orientation_of_experts(saved, family):
    types, model, disk = saved(family)
    transposed = bool(types & TRANSPOSED_EXPERTS)
    assert transposed == (family != "qwen3_vl_moe")
    gate_ups = {name: tensor for name, tensor in model.items() if name.endswith("experts.gate_up_proj")}
    assert gate_ups
    for name, tensor in gate_ups.items():
        assert tensor.shape == ((4, 16, 48) if transposed else (4, 48, 16))
        assert model[name.replace("gate_up", "down")].shape == ((4, 24, 16) if transposed else (4, 16, 24))
    assert {canonical(name, types) for name in disk} == set(model)


def test_transformers_reads_either_layout_of_qwen3_vl_moe(transformers, tmp_path):
    model = build(transformers, "qwen3_vl_moe")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    turned = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in load_file(file).items()}
    save_file(turned, file, metadata={"format": "pt"})
    read = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted({*RENAMES, *EXPERTS, *ALONE, *FUSED_ROWS}))
def test_every_type_with_its_default_config(transformers, model_type):
    """On the meta device: names and shapes only."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    )
    found = next((table[model_type] for table in tables if model_type in table), None)
    if found is None:
        pytest.skip("not a model of its own")
    try:
        config = transformers.AutoConfig.for_model(model_type)
        with torch.device("meta"):
            model = getattr(transformers, found if isinstance(found, str) else found[0])._from_config(config)
    except Exception as error:
        pytest.skip(f"the default config does not build: {error}")
    configs, state = configs_of(config), model.state_dict()
    types = set(configs)
    disk = revert_weight_conversion(model, dict(state))
    for name in [*disk, *state]:
        assert canonical(canonical(name, types), types) == canonical(name, types)
    assert len({canonical(name, types) for name in state}) == len(state)
    assert len({canonical(name, types) for name in disk}) == len(disk)
    found = {key: rows for name, W in disk.items() for key, rows in in_class(name, W.shape, configs).items()}
    names = {canonical(name, types): W for name, W in state.items()}
    assert all(names[key].shape[-2:][0] == rows for key, rows in found.items() if rows and key in names)
    left = found.keys() ^ names.keys()
    left = {name for name in left if not re.search(RESHAPED.get(model_type, "$^"), name)}
    assert not left


LLAVA_TYPES = ("llava", "llama", "clip_vision_model")
MODULES = [
    # disk and transformers < 4.52, the names of 4.52 and after
    (LLAVA_TYPES, "language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
    (LLAVA_TYPES, "language_model.model.embed_tokens", "model.language_model.embed_tokens"),
    (LLAVA_TYPES, "language_model.lm_head", "lm_head"),
    (LLAVA_TYPES, "model.language_model.model.norm", "model.language_model.norm"),
    (LLAVA_TYPES, "multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
    (
        LLAVA_TYPES,
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
    ),
    (
        LLAVA_TYPES,
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
    ),
    (("llava_next",), "image_newline", "model.image_newline"),
    (
        ("video_llava", "clip_vision_model"),
        "video_tower.vision_model.post_layernorm",
        "model.video_tower.post_layernorm",
    ),
    # an adapter of the text model alone
    (("gemma3", "gemma3_text"), "model.layers.1.self_attn.q_proj", "model.language_model.layers.1.self_attn.q_proj"),
    (("gemma3n", "gemma3n_text"), "model.layers.1.mlp.up_proj", "model.language_model.layers.1.mlp.up_proj"),
    (("llama4", "llama4_text"), "model.layers.1.self_attn.q_proj", "language_model.model.layers.1.self_attn.q_proj"),
    (("gemma3_text",), "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
    (("mllama",), "language_model.model.layers.3.cross_attn.q_proj", "model.language_model.layers.3.cross_attn.q_proj"),
    (("mllama",), "vision_model.transformer.layers.0.mlp.fc1", "model.vision_model.transformer.layers.0.mlp.fc1"),
    (("mistral3", "mistral", "pixtral"), "language_model.lm_head", "lm_head"),
    (("qwen2_vl",), "model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
    (("qwen2_5_vl", "qwen2_5_vl_text"), "visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
    (("qwen2_5_omni",), "visual.blocks.0.attn.proj", "thinker.model.visual.blocks.0.attn.proj"),
    (("qwen2_5_omni",), "thinker.model.layers.0.mlp.up_proj", "thinker.model.language_model.layers.0.mlp.up_proj"),
    (("qwen2_5_omni",), "talker.model.layers.0.mlp.up_proj", "talker.model.layers.0.mlp.up_proj"),
    (("shieldgemma2",), "language_model.model.norm", "model.model.language_model.norm"),
    # the type alone or as a part
    (("clip_text_model",), "text_model.encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc1"),
    (("clip", "clip_text_model"), "text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"),
    (("qwen3_5_text",), "model.language_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    (("qwen3_5", "qwen3_5_text"), "model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
    # paths that end at the renamed part
    (("mixtral",), "model.layers.0.block_sparse_moe", "model.layers.0.mlp"),
    (("mixtral",), "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"),
    (("phimoe",), "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.router.weight"),
    (("granitemoe",), "a.block_sparse_moe.router.layer", "a.block_sparse_moe.router"),
    (("granitemoe",), "a.block_sparse_moe.input_linear", "a.block_sparse_moe.experts.gate_up_proj"),
    (("gpt_neox",), "embed_out", "lm_head"),
    (("nemotron_h",), "backbone.layers.0.mixer.in_proj", "model.layers.0.mixer.in_proj"),
    (("exaone",), "transformer.h.0.attn.attention.out_proj", "model.layers.0.self_attn.o_proj"),
    (("kimi_k25",), "vision_tower.encoder.blocks.0.mlp.fc1", "model.vision_tower.layers.0.mlp.fc2"),
    # attention and MLP as two layers, one model inside another, towers with CLIP's names
    (("dory",), "backbone.layers.3.mixer.up_proj", "model.layers.1.mlp.up_proj"),
    (("dory",), "backbone.layers.2.mixer.g_proj", "model.layers.1.self_attn.gate_proj"),
    (("dory",), "model.layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj"),
    (("pi0",), "model.paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj", "model.dit.layers.0.mlp.up_proj"),
    (("pi0",), "paligemma_with_expert.paligemma.lm_head", "model.vlm.language_model.embed_tokens"),
    (("pi0",), "model.action_in_proj", "embed_action_time.action_in_proj"),
    (("pi0",), "model.action_out_proj", "action_out_proj"),
    (("step3p7",), "vision_model.transformer.resblocks.0.mlp.c_fc", "model.vision_model.layers.0.mlp.fc1"),
    (("unlimited_ocr",), "model.sam_model.blocks.1.norm2", "model.vision_tower.sam_encoder.layers.1.layer_norm2"),
    (
        ("inkling2", "inkling2_text"),
        "model.llm.layers.0.attn.wo_ud",
        "model.language_model.layers.0.self_attn.o_proj.linear",
    ),
    (("inkling2_text",), "model.llm.layers.0.attn.wo_ud", "model.layers.0.self_attn.o_proj.linear"),
    # every type
    (("bert",), "bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
    ((), "bert.embeddings.LayerNorm.beta", "bert.embeddings.LayerNorm.bias"),
    (("a type of tomorrow",), "language_model.model.layers.0.mlp.gate", "language_model.model.layers.0.mlp.gate"),
]


@pytest.mark.parametrize(("types", "path", "expected"), MODULES)
def test_module_paths_of_every_version(types, path, expected):
    assert canonical(path, types) == expected
    assert canonical(expected, frozenset(types)) == expected
    if not path.endswith((".weight", ".gamma", ".beta", ".input_linear")):
        assert canonical(path + ".weight", types) == expected + ".weight"


EXPERT_NAMES = [
    (
        "mixtral",
        "model.layers.0.block_sparse_moe.experts.3.w3.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        3,
        1,
        2,
    ),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w1", "model.layers.0.mlp.experts.gate_up_proj", 3, 0, 2),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight", "model.layers.0.mlp.experts.down_proj", 3, 0, 1),
    ("qwen3_moe", "model.layers.7.mlp.experts.12.up_proj.weight", "model.layers.7.mlp.experts.gate_up_proj", 12, 1, 2),
    ("deepseek_v4", "layers.1.ffn.experts.0.w2.weight", "layers.1.mlp.experts.down_proj", 0, 0, 1),
    ("nemotron_h", "backbone.layers.1.mixer.experts.5.up_proj.weight", "model.layers.1.mixer.experts.up_proj", 5, 0, 1),
    ("kimi_linear", "model.layers.1.block_sparse_moe.experts.5.w1", "model.layers.1.mlp.experts.gate_up_proj", 5, 0, 2),
]


@pytest.mark.parametrize(("model_type", "name", "fused", "expert", "part", "parts"), EXPERT_NAMES)
def test_expert_names(model_type, name, fused, expert, part, parts):
    assert expert_part(name, {model_type}) == ExpertPart(fused, expert, part, parts)
    assert canonical(fused, {model_type}) == fused


@pytest.mark.parametrize(
    "name",
    """model.layers.0.mlp.experts.gate_up_proj model.layers.0.mlp.up_proj.weight model.layers.0.mlp.experts.3
    model.layers.0.mlp.shared_expert.up_proj.weight model.layers.0.mlp.experts.3.up_proj.weight_scale_inv
    model.layers.0.mlp.experts.3.up_proj.bias model.layers.0.mlp.experts.3.w1.weight""".split(),
)
def test_names_that_are_not_one_experts(name):
    assert expert_part(name, {"qwen3_moe"}) is None


def test_a_type_without_the_table_has_no_parts():
    assert expert_part("model.layers.0.mlp.experts.3.up_proj.weight", {"gpt_oss"}) is None


@pytest.mark.parametrize("model_type", sorted(RENAMES))
def test_rows_are_anchored_at_a_part_of_the_path(model_type):
    for pattern, _ in RENAMES[model_type]:
        assert pattern.startswith(("^", r"\b", "(?<")), pattern
        assert pattern.endswith((r"(?=\.|$)", "$", "$)", "))", r"\.", "(?=hc_)")), pattern
