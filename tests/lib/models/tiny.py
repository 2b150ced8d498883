"""Build tiny models of transformers, of any type: its default config with every size cut down, by the fields' names."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

SIZES = {
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "embed_dim": 64,
    "word_embed_proj_dim": 64,
    "embedding_size": 64,
    "emb_dim": 64,
    "projection_dim": 64,
    "projection_size": 64,
    "hidden_dim": 64,
    "out_hidden_size": 64,
    "text_embed_dim": 64,
    "input_hidden_size": 64,
    "output_hidden_size": 64,
    "encoder_hidden_size": 64,
    "cross_attention_hidden_size": 64,
    "llm_hidden_size": 64,
    "out_dim": 64,
    "lm_hidden_size": 64,
    "attention_hidden_size": 64,
    "decoder_hidden_size": 64,
    "proj_dim": 64,
    "vision_output_dim": 64,
    "vision_hidden_size": 64,
    "text_hidden_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "d_ff": 96,
    "n_inner": 96,
    "inner_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "ffn_hidden_size": 96,
    "feed_forward_size": 96,
    "dense_intermediate_size": 96,
    "mlp_hidden_size": 96,
    "mlp_dim": 96,
    "intermediate_size_mlp": 96,
    "shared_intermediate_size": 80,
    "block_ff_dim": 96,
    "moe_intermediate_size": 48,
    "expert_ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 80,
    "moe_shared_expert_intermediate_size": 80,
    "share_expert_dim": 80,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "depth": 2,
    "num_global_layers": 1,
    "num_hidden_groups": 1,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "attention_heads": 4,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "n_head_kv": 2,
    "multi_query_group_num": 2,
    "num_query_groups": 2,
    "head_dim": 16,
    "d_kv": 16,
    "attention_head_dim": 16,
    "attention_head_size": 16,
    "global_head_dim": 16,
    "v_head_dim": 16,
    "qk_head_dim": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "o_lora_rank": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "vocab_size": 320,
    "text_vocab_size": 320,
    "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 16,
    "type_vocab_size": 2,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 3,
    "spatial_merge_size": 1,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_dt_rank": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "ssm_state_size": 8,
    "state_size": 8,
    "n_groups": 1,
    "lru_width": 64,
    "time_step_rank": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_position_embeddings": 16,
    "num_queries": 4,
    "num_latents": 4,
    "resampler_n_latents": 4,
    "resampler_depth": 1,
    "sliding_window": 16,
    "attention_window": 16,
    "laurel_rank": 8,
    "alignment_intermediate_size": 96,
    "projection_intermediate_size": 96,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "projector_hidden_size": 96,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "num_blocks": 2,
    "shape_vocab_size": 24,
    "pronunciation_vocab_size": 24,
    "num_expert_group": 1,
    "unpadded_vocab_size": 300,
    "decoder_vocab_size": 320,
    "rotary_dim": 8,
    "d_head": 16,
    "d_inner": 96,
    "num_nextn_predict_layers": 0,
    "mtp_num_hidden_layers": 0,
}


# model type, of a config or of one inside -> fields that no rule makes small or consistent
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_WIDER = {"per_layer_config": {1: {"head_dim": 32}}}
_ALL_HEADS = {"num_key_value_heads": 4}
_VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
FIELDS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "blt_local_encoder": {"hidden_size_global": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "apertus1p5": {"image_token_offset": 100, "audio_token_offset": 132},
    "apertus1p5_vision_tokenizer": _VQ | {"codebook_size": 32},
    "chameleon": {"vocabulary_map": {"<image>": 5, "IMGIMGA": 6}},
    "chameleon_vqgan": _VQ,
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
        "layer_types": ["full_attention", "full_attention"],
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma_text": _WIDER | {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "dory": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "dots3_note_text": {"head_dim": 24, "per_layer_config": {1: {"num_attention_heads": 2, "num_key_value_heads": 2}}},
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
        "per_layer_config": {},
        "adapter_merge_size": 1,
    },
    "emu3": {"vocabulary_map": {"<|extra_200|>": 5, "<image>": 6, "<|visual token 000000|>": 7}},
    "emu3_vqgan": _VQ,
    "esm": {"vocab_size": 320, "mask_token_id": 3, "pad_token_id": 1},
    "esmc": _ALL_HEADS,
    "florence_vision": {
        "depths": [1, 1],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [32, 64],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
    },
    "ernie4_5_vl_moe_text": {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [3, 3, 2]}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    **dict.fromkeys(["gemma4_text", "gemma4_unified_text"], _WIDER),
    **dict.fromkeys(
        """glm46v_text glm4v_text glm_ocr_text hunyuan_vl_text paddleocr_vl_text
        qwen2_5_omni_text qwen2_5_vl_text qwen2_vl_text""".split(),
        _MROPE,
    ),
    "glm4v_moe_text": {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [1, 1, 2]}},
    "glm5_next_text": {"qk_rope_head_dim": 0, "qk_nope_head_dim": 24},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2", "spatial_target_layers": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "janus_vqgan": _VQ,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "marian": {"decoder_vocab_size": 320},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 32},
    "mistral4": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 128,
            "partial_rotary_factor": 1.0,
        }
    },
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "molmo2_text": {"additional_vocab_size": 8},
    "molmo2_vision": {"image_size": [28, 28], "num_position_embeddings": 4},
    **dict.fromkeys(
        "nemotron3_5_transcribe_asr_audio nemotron3_5_transcribe_word_timestamp nemotron3_diarization_audio".split(),
        _ALL_HEADS,
    ),
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": 64, "hidden_size": 32}},
    "neomme": {"per_layer_config": {1: {"sliding_window": None}}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "perceiver": {"num_latents": 8, "d_latents": 64, "num_self_attends_per_block": 1},
    "qwen4_exp_text": {
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "indexer_head_dim": 16,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 2,
        "hc_lowrank": 16,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16], "hash_seed": 0},
    "step3p5": {
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "wavtokenizer_encoder": {
        "hidden_size": 64,
        "codebook_dim": 64,
        "codebook_size": 32,
        "num_filters": 4,
        "decoder_num_layers": 1,
        "decoder_attention_num_groups": 4,
        "decoder_intermediate_size": 96,
        "upsampling_ratios": [2, 2],
    },
    "xlstm": {"embedding_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_headdim": 16,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}


_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 2}
_DRAFT = {"text_config": _LAYERS | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
# model type -> what its config has to be made with, because the defaults contradict each other
GIVEN = {"gemma4_assistant": _DRAFT, "gemma4_unified_assistant": _DRAFT}


# model type -> why it is not built
NOT_BUILT = {
    **dict.fromkeys(["fast_vlm", "gemma3n", "perception_lm"], "needs the package timm"),
    "inkling_mm_model": "needs the package scipy",
    "shieldgemma2": "transformers does not read its own file back",
}


def shrink(config: Any) -> None:
    """Cut a config in place: layer lists to two layers, token ids to the vocabulary, and what `FIELDS` says."""
    layers = next((vars(config)[n] for n in ("num_hidden_layers", "num_layers") if n in vars(config)), None)
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value)
        elif (name in SIZES and type(value) is int and (value or "per_layer_input" not in name)) or (
            name == "head_dim" and value is None
        ):
            setattr(config, name, SIZES[name])
        elif name.endswith(("_token_id", "_token_index")) and type(value) is int and value >= 320:
            setattr(config, name, 3)
        elif name.endswith("_token_id") and isinstance(value, list):
            setattr(config, name, [min(v, 3) for v in value])
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            setattr(config, name, (kinds * 2)[:2] if len(kinds) < 3 else kinds[:2])
        elif isinstance(value, (list, tuple)) and len(value) == layers:
            setattr(config, name, value[:2])
        elif name == "use_cache":
            config.use_cache = False  # some have caches that two layers do not fill
        elif isinstance(value, dict) and "mrope_section" in value:
            value["mrope_section"] = [2, 3, 3]
    if "kv_lora_rank" in vars(config):
        config.num_key_value_heads = SIZES["num_attention_heads"]
    for name, value in FIELDS.get(config.model_type, {}).items():
        setattr(config, name, value)


@cache
def tables() -> list[tuple[str, str]]:
    """List (table of classes, model type) of every language model; a class stands in one table only."""
    seen: set[Any] = set()
    families = [(table, each) for table, classes in _classes().items() for each in classes]
    return [
        (table, each)
        for table, each in families
        if not ((name := _classes()[table][each], each) in seen or seen.add((name, each)))
    ]


def _classes() -> dict[str, dict[str, Any]]:
    from transformers.models.auto import modeling_auto as auto

    return {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "image": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }


def build(table: str, model_type: str) -> tuple[Any, Any]:
    """Return (class, model) of a type, with random weights."""
    pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("peft", minversion="0.19")
    import torch
    import transformers

    name = _classes()[table][model_type]
    kind = getattr(transformers, name if isinstance(name, str) else name[0])
    config = transformers.AutoConfig.for_model(model_type, **GIVEN.get(model_type, {}))
    if kind.config_class is not None and not isinstance(config, kind.config_class):
        parts = [part for part in vars(config).values() if isinstance(part, kind.config_class)]
        config = parts[0] if parts else config
    shrink(config)
    if "is_decoder" in vars(config):
        config.is_decoder = table == "causal"
    config = type(config).from_dict(config.to_dict())  # with all that is checked or follows when it is read
    torch.manual_seed(0)
    return kind, kind._from_config(config).float()


def stacks(model: Any) -> list[str]:
    """Return the names of the parameters that are stacks of experts' matrices."""
    owners = {name: type(module).__name__ for name, module in model.named_modules()}
    three = [name for name, W in model.named_parameters() if W.dim() == 3]
    return [name for name in three if "expert" in name or "Expert" in owners[name.rpartition(".")[0]]]


def of_class(name: str, model: Any) -> Any:
    """Return a model of another class with the weights of `model`, wherever it has a module of the same class."""
    import copy

    import torch
    import transformers

    kind = getattr(transformers, name)
    config = copy.deepcopy(model.config)
    torch.manual_seed(0)  # of what `model` has not, such as a classifier's head
    fits = kind.config_class is None or isinstance(config, kind.config_class)
    other = kind._from_config(config if fits else config.get_text_config()).float()
    ours = {type(each): each for each in reversed(list(model.modules()))}
    inner = other if type(other) in ours else next(each for each in other.modules() if type(each) in ours)
    there = other.state_dict()
    heads = {key: W for key, W in model.state_dict().items() if key in there and there[key].shape == W.shape}
    other.load_state_dict(heads, strict=False)
    inner.load_state_dict(ours[type(inner)].state_dict(), strict=False)
    if hasattr(other, "transformer") and hasattr(other.transformer, "decoder"):  # T5's class has no backbone to copy
        other.transformer.load_state_dict(model.state_dict(), strict=False)
    return other


def perturb(model: Any, every: bool) -> None:
    """Change every linear layer and stack of experts by rank 2, by half of its norm; `every`: all that are no vectors.

    Without `every` a matrix that is used twice stays.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    names: dict[int, list[str]] = {}
    for name, W in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(W), []).append(name)
    layers = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    linear = {id(getattr(module, "weight", None)) for module in layers}
    experts, generator = set(stacks(model)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, W in model.named_parameters():
            stack = name in experts
            if not ((every and W.dim() > 1) or (len(names[id(W)]) == 1 and (id(W) in linear or stack))):
                continue
            rows = W if stack else W.flatten(1)
            left = torch.randn(*rows.shape[:-1], 2, generator=generator)
            D = (left @ torch.randn(*rows.shape[:-2], 2, rows.shape[-1], generator=generator)).reshape(W.shape)
            W += D * (0.5 * max(float(W.norm()), 1.0) / D.norm())
