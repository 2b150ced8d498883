"""Build tiny models of transformers, of any type: its default config with every size cut down, by the fields' names."""

from __future__ import annotations

from typing import Any

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
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
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
    "num_nextn_predict_layers": 0,
    "mtp_num_hidden_layers": 0,
}


def shrink(config: Any) -> None:
    """Cut a config in place: layer lists to two layers, token ids to the vocabulary."""
    layers = next((vars(config)[n] for n in ("num_hidden_layers", "num_layers") if n in vars(config)), None)
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value)
        elif (name in SIZES and type(value) is int) or (name == "head_dim" and value is None):
            setattr(config, name, SIZES[name])
        elif name.endswith(("_token_id", "_token_index")) and type(value) is int and value >= 320:
            setattr(config, name, 3)
        elif name.endswith("_token_id") and isinstance(value, list):
            setattr(config, name, [min(v, 3) for v in value])
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            setattr(config, name, (kinds * 2)[:2] if len(kinds) < 3 else kinds[:2])
        elif isinstance(value, list) and len(value) == layers:
            setattr(config, name, value[:2])
        elif isinstance(value, dict) and "mrope_section" in value:
            value["mrope_section"] = [2, 3, 3]


def tables() -> list[tuple[str, str]]:
    """List (table of classes, model type) of every language model."""
    from transformers.models.auto import modeling_auto as auto

    causal, image = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return [*(("causal", each) for each in causal), *(("image", each) for each in image)]


def build(table: str, model_type: str) -> tuple[Any, Any]:
    """Return (class, model) of a type, with random weights."""
    import torch
    import transformers
    from transformers.models.auto import modeling_auto as auto

    causal, image = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    name = (causal if table == "causal" else image)[model_type]
    kind = getattr(transformers, name if isinstance(name, str) else name[0])
    config = transformers.AutoConfig.for_model(model_type)
    if kind.config_class is not None and not isinstance(config, kind.config_class):
        config = config.get_text_config()
    shrink(config)
    if "is_decoder" in vars(config):
        config.is_decoder = True
    torch.manual_seed(0)
    return kind, kind._from_config(config).float()


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
    inner.load_state_dict(ours[type(inner)].state_dict())
    return other


def perturb(model: Any, every: bool) -> None:
    """Change every linear layer and stack of experts by rank 2, by half of its norm; `every`: all that are no vectors.

    A matrix that is used twice stays: PEFT merges the updates of both sides of a tie into it.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    names: dict[int, list[str]] = {}
    for name, W in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(W), []).append(name)
    layers = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    linear = {id(getattr(module, "weight", None)) for module in layers}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, W in model.named_parameters():
            stack = W.dim() == 3 and "expert" in name
            if len(names[id(W)]) > 1 or not (id(W) in linear or stack or (every and W.dim() > 1)):
                continue
            rows = W if stack else W.flatten(1)
            left = torch.randn(*rows.shape[:-1], 2, generator=generator)
            D = (left @ torch.randn(*rows.shape[:-2], 2, rows.shape[-1], generator=generator)).reshape(W.shape)
            W += D * (0.5 * max(float(W.norm()), 1.0) / D.norm())
