"""Tables that map a GGUF file's fields and shapes to the config.json of the same model in transformers.

A row of `CONFIGS` maps fields to fields. Its constants are values that are fixed in llama.cpp's graph of the
architecture and differ from the default of transformers' class. Fields that a GGUF file lacks, such as dropout, keep
the class's default. Sources: llama.cpp's `set_gguf_parameters` in `conversion/`, `load_arch_hparams` in `src/models/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# Fields of the tokenizer for single tokens -> their fields in config.json; None if the file lacks them
TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}

# Key -> the key that llama.cpp reads if it is missing
SAME_AS = {"attention.head_count_kv": "attention.head_count"}

# Keys that a file may lack: llama.cpp's default is the class's default
OPTIONAL = frozenset(
    """attn_logit_softcapping final_logit_softcapping attention.sliding_window attention.clamp_kqv
    embedding_scale residual_scale attention.q_lora_rank expert_weights_scale expert_group_count
    expert_group_used_count decoder_start_token_id hidden_activation moe_latent_size""".split()
)

# Keys whose values follow from shapes or from other keys, or that do not describe the model
IMPLIED = frozenset(
    """vocab_size context_length feed_forward_length expert_shared_feed_forward_length attention.value_length
    attention.value_length_swa rope.scaling.original_context_length rope.scaling.finetuned rope.scaling.attn_factor
    tensor_data_layout pooling_type""".split()
)

# Keys with their values in all classes whose row has no other
USUAL = {"attention.causal": True, "expert_gating_func": 1, "expert_weights_scale": 1.0}

# Type of value -> the keys with such values; the others are integers
KINDS: dict[tuple[type, ...], frozenset[str]] = {
    (str,): frozenset({"rope.scaling.type", "hidden_activation"}),
    (bool,): frozenset(
        """expert_weights_norm use_parallel_residual attention.sliding_window_pattern attention.indexer.types
        attention.rope_pattern ssm.dt_b_c_rms""".split()
    ),
    (float, int): frozenset(
        """attention.layer_norm_rms_epsilon attention.layer_norm_epsilon attention.clamp_kqv attention.scale
        attention.max_alibi_bias attention.value_scale
        attn_logit_softcapping final_logit_softcapping logit_scale embedding_scale residual_scale expert_weights_scale
        rope.freq_base rope.freq_base_swa rope.scale_linear rope.scaling.factor rope.scaling.attn_factor
        rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
        rope.scaling.yarn_log_multiplier attention.temperature_scale""".split()
    ),
}


@dataclass(frozen=True)
class Config:
    """Rules to derive one model type's config.json from a GGUF file. In tensor names, `{last}` is the last layer."""

    model_type: str
    architecture: str  # the class
    keys: Mapping[str, str]  # field -> key in the file, without the architecture's name
    mark: str = ""  # a tensor or key that identifies this type among several of its architecture
    sizes: Mapping[str, tuple[str, int]] = field(default_factory=dict)  # field -> tensor and dimension
    has: Mapping[str, str] = field(default_factory=dict)  # field -> tensor; the field is true if the tensor is present
    constants: Mapping[str, Any] = field(default_factory=dict)
    rotates: bool = True  # has rotary embeddings
    theta: str = "rope_theta"
    partial: str = ""  # the field for the fraction of each head that rotates
    scaling: Mapping[str, Any] = field(default_factory=dict)  # constants beside those of the rotary scaling
    window_every: int = 0  # all layers but every n-th attend to a window; 0 if no layer does
    granted: Mapping[str, Any] = field(default_factory=dict)  # keys with the only values that the class supports
    own_heads: bool = False  # its rule computes the sizes of heads, which are not width / heads
    nested: str = ""  # a key of `config.RULES`: a function for fields that need several keys


SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
}

INNER = {"intermediate_size": "feed_forward_length"}

CONTEXT = {"max_position_embeddings": "context_length"}

KV = {"num_key_value_heads": "attention.head_count_kv"}

RMS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}

HEAD_DIM = {"head_dim": "attention.key_length"}

DECODER = SIZES | INNER | CONTEXT | KV | RMS

LAYER_NORM = SIZES | INNER | CONTEXT | KV | {"layer_norm_eps": "attention.layer_norm_epsilon"}

WINDOW = {"sliding_window": "attention.sliding_window"}

MIXTRAL = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}

QWEN_MOE = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}

ROUTED = {
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}

LATENT = {
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
    "v_head_dim": "attention.value_length_mla",
}

DEEPSEEK = SIZES | INNER | CONTEXT | RMS | ROUTED | LATENT

INDEXER = {
    "index_n_heads": "attention.indexer.head_count",
    "index_head_dim": "attention.indexer.key_length",
    "index_topk": "attention.indexer.top_k",
}

GEMMA2 = DECODER | HEAD_DIM | WINDOW | {"final_logit_softcapping": "final_logit_softcapping"}

LFM2 = SIZES | INNER | CONTEXT | {"norm_eps": "attention.layer_norm_rms_epsilon", "conv_L_cache": "shortconv.l_cache"}

GPT2 = {
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}

GRANITE = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}

SHARED_WIDTH = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}

# Layers of linear attention beside others
QWEN_LINEAR = Config(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    SIZES
    | CONTEXT
    | KV
    | RMS
    | HEAD_DIM
    | {
        "linear_conv_kernel_dim": "ssm.conv_kernel",
        "linear_key_head_dim": "ssm.state_size",
        "linear_num_key_heads": "ssm.group_count",
        "linear_num_value_heads": "ssm.time_step_rank",
    },
    partial="partial_rotary_factor",
    nested="qwen-linear",
)

MAMBA = Config(
    "mamba",
    "MambaForCausalLM",
    {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
        "conv_kernel": "ssm.conv_kernel",
        "state_size": "ssm.state_size",
        "time_step_rank": "ssm.time_step_rank",
    },
    rotates=False,
    own_heads=True,
    nested="mamba",
)

NEMOTRON_H = Config(
    "nemotron_h",
    "NemotronHForCausalLM",
    SIZES
    | CONTEXT
    | HEAD_DIM
    | {
        "conv_kernel": "ssm.conv_kernel",
        "ssm_state_size": "ssm.state_size",
        "n_groups": "ssm.group_count",
        "mamba_num_heads": "ssm.time_step_rank",
        "n_group": "expert_group_count",
        "topk_group": "expert_group_used_count",
    },
    rotates=False,
    own_heads=True,
    nested="nemotron-h",
)

# mT5 too: what differs is its config alone
T5 = Config(
    "t5",
    "T5ForConditionalGeneration",
    {
        "d_model": "embedding_length",
        "d_ff": "feed_forward_length",
        "d_kv": "attention.key_length",
        "num_layers": "block_count",
        "num_heads": "attention.head_count",
        "layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
        "decoder_start_token_id": "decoder_start_token_id",
    },
    sizes={"relative_attention_num_buckets": ("enc.blk.0.attn_rel_b.weight", 0)},
    rotates=False,
    nested="t5",
)

MOSAIC = {
    "d_model": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "max_seq_len": "context_length",
}

QUERY_BIAS = {"attention_bias": "blk.0.attn_q.bias"}

MLP_BIAS = {"mlp_bias": "blk.0.ffn_up.bias"}

MODERN_BERT = Config(
    "modernbert",
    "ModernBertModel",
    SIZES | INNER | CONTEXT | {"local_attention": "attention.sliding_window", "hidden_activation": "hidden_activation"},
    has={"attention_bias": "blk.0.attn_qkv.bias", "norm_bias": "output_norm.bias"} | MLP_BIAS,
    theta="global_rope_theta",
    granted={"attention.causal": False},
    nested="modern-bert",
)

# general.architecture -> its model types; the first with its mark present counts
CONFIGS: dict[str, tuple[Config, ...]] = {
    "llama": (
        Config("mixtral", "MixtralForCausalLM", DECODER | HEAD_DIM | MIXTRAL, mark="blk.0.ffn_gate_exps.weight"),
        Config(
            "llama",
            "LlamaForCausalLM",
            DECODER | HEAD_DIM,
            has=QUERY_BIAS | MLP_BIAS,
        ),
    ),
    "mistral3": (
        Config(
            "ministral3",
            "Ministral3ForCausalLM",
            DECODER | HEAD_DIM,
            mark="attention.temperature_scale",
            nested="ministral3",
        ),
        Config("mistral", "MistralForCausalLM", DECODER | HEAD_DIM, constants={"sliding_window": None}),
    ),
    "llama4": (
        Config(
            "llama4_text",
            "Llama4ForCausalLM",
            DECODER
            | HEAD_DIM
            | MIXTRAL
            | {
                "intermediate_size_mlp": "feed_forward_length",
                "intermediate_size": "expert_feed_forward_length",
                "interleave_moe_layer_step": "interleave_moe_layer_step",
            },
            has=QUERY_BIAS,
            nested="llama4",
        ),
    ),
    "qwen2": (Config("qwen2", "Qwen2ForCausalLM", DECODER),),
    "qwen3": (Config("qwen3", "Qwen3ForCausalLM", DECODER | HEAD_DIM, has=QUERY_BIAS),),
    "qwen2moe": (
        Config(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            DECODER | QWEN_MOE,
            sizes={"shared_expert_intermediate_size": ("blk.0.ffn_up_shexp.weight", 0)},
            has={"qkv_bias": "blk.0.attn_q.bias"},
            constants={"norm_topk_prob": False},
        ),
    ),
    "qwen3moe": (
        Config(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            DECODER | HEAD_DIM | QWEN_MOE,
            has=QUERY_BIAS,
            constants={"norm_topk_prob": True},
            granted={"expert_weights_norm": True},
        ),
    ),
    "gpt-oss": (
        Config(
            "gpt_oss",
            "GptOssForCausalLM",
            (DECODER | HEAD_DIM | WINDOW | MIXTRAL) | {"intermediate_size": "expert_feed_forward_length"},
            scaling={"truncate": False},
            window_every=2,
        ),
    ),
    "deepseek2": (
        Config(
            "glm4_moe_lite",
            "Glm4MoeLiteForCausalLM",
            DEEPSEEK,
            mark="nextn_predict_layers",  # of DeepSeek's models, the converter drops them
            granted={"attention.head_count_kv": 1, "expert_gating_func": 2},
            own_heads=True,
            nested="glm4-moe-lite",
        ),
        Config(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            DEEPSEEK,
            mark="blk.{last}.exp_probs_b.bias",
            constants={"num_nextn_predict_layers": 0},
            granted={"attention.head_count_kv": 1, "expert_gating_func": 2},
            own_heads=True,
            nested="deepseek",
        ),
        Config(
            "deepseek_v2",
            "DeepseekV2ForCausalLM",
            DEEPSEEK,
            granted={"attention.head_count_kv": 1},
            own_heads=True,
            nested="deepseek",
        ),
    ),
    "deepseek32": (
        Config(
            "deepseek_v32",
            "DeepseekV32ForCausalLM",
            DEEPSEEK | INDEXER,
            granted={"attention.head_count_kv": 1, "expert_gating_func": 2},
            own_heads=True,
            nested="deepseek",
        ),
    ),
    "glm-dsa": (
        Config(
            "glm_moe_dsa",
            "GlmMoeDsaForCausalLM",
            DEEPSEEK | INDEXER,
            granted={"attention.head_count_kv": 1, "expert_gating_func": 2},
            own_heads=True,
            nested="glm-dsa",
        ),
    ),
    "gemma": (Config("gemma", "GemmaForCausalLM", DECODER | HEAD_DIM),),
    "gemma2": (
        Config(
            "gemma2",
            "Gemma2ForCausalLM",
            GEMMA2 | {"attn_logit_softcapping": "attn_logit_softcapping"},
            window_every=2,
            nested="gemma2",
        ),
    ),
    "gemma3": (Config("gemma3_text", "Gemma3ForCausalLM", GEMMA2, window_every=6, nested="gemma3"),),
    "gemma4": (
        Config(
            "gemma4_text",
            "Gemma4ForCausalLM",
            SIZES
            | CONTEXT
            | RMS
            | WINDOW
            | {
                "head_dim": "attention.key_length_swa",
                "global_head_dim": "attention.key_length",
                "final_logit_softcapping": "final_logit_softcapping",
                "num_kv_shared_layers": "attention.shared_kv_layers",
                "hidden_size_per_layer_input": "embedding_length_per_layer_input",
            },
            has={"enable_moe_block": "blk.0.ffn_gate_inp.weight"},
            rotates=False,
            own_heads=True,
            nested="gemma4",
        ),
    ),
    "phi3": (
        Config(
            "phi3",
            "Phi3ForCausalLM",
            DECODER | {"original_max_position_embeddings": "rope.scaling.original_context_length"},
            partial="partial_rotary_factor",
            nested="phi3",
        ),
    ),
    "phimoe": (
        Config(
            "phimoe",
            "PhimoeForCausalLM",
            DECODER | MIXTRAL,
            has=QUERY_BIAS | {"lm_head_bias": "output.bias"},
            nested="phimoe",
        ),
    ),
    "gpt2": (Config("gpt2", "GPT2LMHeadModel", GPT2, sizes={"n_inner": ("blk.0.ffn_up.weight", 0)}, rotates=False),),
    "gptneox": (
        Config(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            SIZES
            | INNER
            | CONTEXT
            | {
                "layer_norm_eps": "attention.layer_norm_epsilon",
                "use_parallel_residual": "use_parallel_residual",
            },
            has={"attention_bias": "blk.0.attn_qkv.bias"},
            theta="rotary_emb_base",
            partial="rotary_pct",
        ),
    ),
    "bert": (
        Config(
            "bert",
            "BertModel",
            SIZES | INNER | CONTEXT | {"layer_norm_eps": "attention.layer_norm_epsilon"},
            sizes={"type_vocab_size": ("token_types.weight", 0)},
            rotates=False,
            granted={"attention.causal": False},
        ),
    ),
    "bloom": (
        Config(
            "bloom",
            "BloomForCausalLM",
            {
                "hidden_size": "embedding_length",
                "n_layer": "block_count",
                "n_head": "attention.head_count",
                "layer_norm_epsilon": "attention.layer_norm_epsilon",
            },
            rotates=False,
        ),
    ),
    "falcon": (
        Config(
            "falcon",
            "FalconForCausalLM",
            SIZES
            | CONTEXT
            | {"num_kv_heads": "attention.head_count_kv", "layer_norm_epsilon": "attention.layer_norm_epsilon"},
            sizes={"ffn_hidden_size": ("blk.0.ffn_up.weight", 0)},
            has={"bias": "blk.0.attn_qkv.bias"},
            constants={"parallel_attn": True, "alibi": False},
            nested="falcon",
        ),
    ),
    "phi2": (
        Config(
            "phi",
            "PhiForCausalLM",
            SIZES | CONTEXT | {"layer_norm_eps": "attention.layer_norm_epsilon"},
            sizes={"intermediate_size": ("blk.0.ffn_up.weight", 0)},
            partial="partial_rotary_factor",
            nested="phi2",
        ),
    ),
    "stablelm": (
        Config(
            "stablelm",
            "StableLmForCausalLM",
            LAYER_NORM | {"use_parallel_residual": "use_parallel_residual"},
            has={"use_qkv_bias": "blk.0.attn_q.bias", "qk_layernorm": "blk.0.attn_q_norm.weight"},
            partial="partial_rotary_factor",
        ),
    ),
    "olmo2": (
        Config(
            "olmo3",
            "Olmo3ForCausalLM",
            DECODER | WINDOW,
            mark="attention.sliding_window",
            window_every=4,
            nested="olmo3",
        ),
        Config("olmo2", "Olmo2ForCausalLM", DECODER),
    ),
    "glm4": (Config("glm4", "Glm4ForCausalLM", DECODER | HEAD_DIM, has=QUERY_BIAS, partial="partial_rotary_factor"),),
    "granite": (
        Config(
            "granite",
            "GraniteForCausalLM",
            DECODER | GRANITE,
            has=QUERY_BIAS | MLP_BIAS,
        ),
    ),
    "command-r": (
        Config(
            "cohere",
            "CohereForCausalLM",
            LAYER_NORM | {"logit_scale": "logit_scale"},
            has=QUERY_BIAS | {"use_qk_norm": "blk.0.attn_q_norm.weight"},
        ),
    ),
    "granitemoe": (
        Config(
            "granitemoeshared",
            "GraniteMoeSharedForCausalLM",
            DECODER | MIXTRAL | GRANITE | {"shared_intermediate_size": "expert_shared_feed_forward_length"},
            mark="blk.0.ffn_up_shexp.weight",
            has=QUERY_BIAS,
        ),
        Config(
            "granitemoe",
            "GraniteMoeForCausalLM",
            DECODER | MIXTRAL | GRANITE,
            has=QUERY_BIAS,
        ),
    ),
    "olmo": (
        Config(
            "olmo",
            "OlmoForCausalLM",
            SIZES | INNER | CONTEXT | KV | {"clip_qkv": "attention.clamp_kqv"},
            has=QUERY_BIAS,
            granted={"attention.layer_norm_epsilon": 1e-5},
        ),
    ),
    "olmoe": (
        Config(
            "olmoe",
            "OlmoeForCausalLM",
            DECODER | {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
            has=QUERY_BIAS,
            constants={"norm_topk_prob": False},
        ),
    ),
    "cohere2": (
        Config(
            "cohere2",
            "Cohere2ForCausalLM",
            LAYER_NORM | HEAD_DIM | WINDOW | {"logit_scale": "logit_scale"},
            has=QUERY_BIAS,
            window_every=4,
        ),
    ),
    "starcoder2": (
        Config(
            "starcoder2",
            "Starcoder2ForCausalLM",
            SIZES | INNER | CONTEXT | KV | {"norm_epsilon": "attention.layer_norm_epsilon"},
            has={"use_bias": "blk.0.attn_q.bias"},
        ),
    ),
    "starcoder": (
        Config(
            "gpt_bigcode",
            "GPTBigCodeForCausalLM",
            GPT2,
            sizes={"n_inner": ("blk.0.ffn_up.weight", 0)},
            constants={"multi_query": True},
            rotates=False,
            granted={"attention.head_count_kv": 1},
        ),
    ),
    "arcee": (Config("arcee", "ArceeForCausalLM", DECODER | HEAD_DIM, has=QUERY_BIAS | MLP_BIAS),),
    "ernie4_5": (Config("ernie4_5", "Ernie4_5ForCausalLM", DECODER | HEAD_DIM, has={"use_bias": "blk.0.attn_q.bias"}),),
    "ernie4_5-moe": (
        Config(
            "ernie4_5_moe",
            "Ernie4_5_MoeForCausalLM",
            DECODER
            | {
                "moe_num_experts": "expert_count",
                "moe_k": "expert_used_count",
                "moe_intermediate_size": "expert_feed_forward_length",
                "moe_num_shared_experts": "expert_shared_count",
                "moe_layer_start_index": "leading_dense_block_count",
                "moe_layer_interval": "interleave_moe_layer_step",
            },
            has={"use_bias": "blk.0.attn_q.bias"},
            constants={"moe_layer_end_index": -1},
        ),
    ),
    "apertus": (Config("apertus", "ApertusForCausalLM", DECODER, has=QUERY_BIAS),),
    "seed_oss": (
        Config(
            "seed_oss",
            "SeedOssForCausalLM",
            DECODER | HEAD_DIM,
            has=QUERY_BIAS | MLP_BIAS | {"attention_out_bias": "blk.0.attn_output.bias"},
        ),
    ),
    "hunyuan-dense": (Config("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", DECODER | HEAD_DIM, has=QUERY_BIAS),),
    "nemotron": (
        Config(
            "nemotron",
            "NemotronForCausalLM",
            SIZES | INNER | CONTEXT | KV | HEAD_DIM | {"norm_eps": "attention.layer_norm_epsilon"},
            has=QUERY_BIAS | MLP_BIAS,
            partial="partial_rotary_factor",
            nested="nemotron",
        ),
    ),
    "exaone4": (Config("exaone4", "Exaone4ForCausalLM", DECODER | WINDOW, window_every=4, nested="exaone4"),),
    "glm4moe": (
        Config(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            DECODER | HEAD_DIM | ROUTED | {"norm_topk_prob": "expert_weights_norm"},
            has=QUERY_BIAS | {"use_qk_norm": "blk.0.attn_q_norm.weight"},
            constants={"num_nextn_predict_layers": 0},
            partial="partial_rotary_factor",
            granted={"expert_gating_func": 2},
        ),
    ),
    "dots1": (
        Config(
            "dots1",
            "Dots1ForCausalLM",
            DECODER | HEAD_DIM | ROUTED | {"norm_topk_prob": "expert_weights_norm"},
            has=QUERY_BIAS,
            granted={"expert_gating_func": 2},
        ),
    ),
    "jais2": (
        Config(
            "jais2",
            "Jais2ForCausalLM",
            LAYER_NORM | HEAD_DIM,
            has=QUERY_BIAS | MLP_BIAS,
        ),
    ),
    "minimax-m2": (
        Config(
            "minimax_m2",
            "MiniMaxM2ForCausalLM",
            DECODER | HEAD_DIM | MIXTRAL | {"intermediate_size": "expert_feed_forward_length"},
            partial="partial_rotary_factor",
        ),
    ),
    "hunyuan-moe": (
        Config(
            "hunyuan_v1_moe",
            "HunYuanMoEV1ForCausalLM",
            DECODER | HEAD_DIM | {"num_experts": "expert_count", "moe_topk": "expert_used_count"},
            has=QUERY_BIAS,
            granted={"expert_shared_count": 1},
            nested="hunyuan-moe",
        ),
    ),
    "exaone-moe": (
        Config(
            "exaone_moe",
            "ExaoneMoeForCausalLM",
            DECODER
            | QWEN_MOE
            | WINDOW
            | {
                "num_shared_experts": "expert_shared_count",
                "n_group": "expert_group_count",
                "topk_group": "expert_group_used_count",
                "norm_topk_prob": "expert_weights_norm",
                "routed_scaling_factor": "expert_weights_scale",
                "first_k_dense_replace": "leading_dense_block_count",
            },
            window_every=4,
        ),
    ),
    "minicpm3": (
        Config(
            "minicpm3",
            "MiniCPM3ForCausalLM",
            DECODER
            | {
                "q_lora_rank": "attention.q_lora_rank",
                "kv_lora_rank": "attention.kv_lora_rank",
                "qk_rope_head_dim": "rope.dimension_count",
            },
            has={"attention_bias": "blk.0.attn_q_a.bias"} | MLP_BIAS,
            own_heads=True,
            nested="minicpm3",
        ),
    ),
    "lfm2": (
        Config(
            "lfm2",
            "Lfm2ForCausalLM",
            LFM2,
            constants={"block_auto_adjust_ff_dim": False},
            own_heads=True,
            nested="lfm2",
        ),
    ),
    "lfm2moe": (
        Config(
            "lfm2_moe",
            "Lfm2MoeForCausalLM",
            LFM2 | QWEN_MOE | {"num_dense_layers": "leading_dense_block_count"},
            has={"use_expert_bias": "blk.{last}.exp_probs_b.bias"},
            granted={"expert_gating_func": 2},
            own_heads=True,
            nested="lfm2",
        ),
    ),
    "granite_swa": (
        Config(
            "granite_swa",
            "GraniteSWAForCausalLM",
            DECODER | GRANITE | WINDOW,
            has=QUERY_BIAS | MLP_BIAS,
            window_every=4,
            nested="granite-swa",
        ),
    ),
    "mellum": (
        Config(
            "mellum",
            "MellumForCausalLM",
            DECODER | HEAD_DIM | QWEN_MOE | WINDOW,
            has=QUERY_BIAS,
            constants={"norm_topk_prob": True},
            rotates=False,
            window_every=4,
            nested="mellum",
        ),
    ),
    "hy_v3": (
        Config(
            "hy_v3",
            "HYV3ForCausalLM",
            DECODER | HEAD_DIM | QWEN_MOE | {"router_scaling_factor": "expert_weights_scale"},
            has=QUERY_BIAS | MLP_BIAS,
            granted={"expert_gating_func": 2, "expert_weights_norm": True},
            nested="hy-v3",
        ),
    ),
    "cohere2moe": (
        Config(
            "cohere2_moe",
            "Cohere2MoeForCausalLM",
            {name: key for name, key in LAYER_NORM.items() if name not in INNER}
            | HEAD_DIM
            | WINDOW
            | {
                "num_experts": "expert_count",
                "num_experts_per_tok": "expert_used_count",
                "intermediate_size": "expert_feed_forward_length",
                "expert_selection_fn": "expert_gating_func",
                "norm_topk_prob": "expert_weights_norm",
                "logit_scale": "logit_scale",
            },
            has=QUERY_BIAS,
            window_every=4,
            nested="cohere2-moe",
        ),
    ),
    "smollm3": (Config("smollm3", "SmolLM3ForCausalLM", DECODER, has=QUERY_BIAS),),
    "qwen3next": (
        replace(
            QWEN_LINEAR,
            model_type="qwen3_next",
            architecture="Qwen3NextForCausalLM",
            keys={**QWEN_LINEAR.keys, **QWEN_MOE, **SHARED_WIDTH, **INNER},
        ),
    ),
    "qwen35": (replace(QWEN_LINEAR, keys={**QWEN_LINEAR.keys, **INNER}),),
    "qwen35moe": (
        replace(
            QWEN_LINEAR,
            model_type="qwen3_5_moe_text",
            architecture="Qwen3_5MoeForCausalLM",
            keys={**QWEN_LINEAR.keys, **QWEN_MOE, **SHARED_WIDTH},
        ),
    ),
    "mamba": (
        replace(MAMBA, model_type="falcon_mamba", architecture="FalconMambaForCausalLM", mark="ssm.dt_b_c_rms"),
        MAMBA,
    ),
    "mamba2": (
        replace(
            MAMBA,
            model_type="mamba2",
            architecture="Mamba2ForCausalLM",
            keys={
                **{name: key for name, key in MAMBA.keys.items() if name != "time_step_rank"},
                "num_heads": "ssm.time_step_rank",
                "n_groups": "ssm.group_count",
            },
        ),
    ),
    "granitehybrid": (
        Config(
            "granitemoehybrid",
            "GraniteMoeHybridForCausalLM",
            SIZES
            | INNER
            | CONTEXT
            | RMS
            | GRANITE
            | MIXTRAL
            | {
                "shared_intermediate_size": "expert_shared_feed_forward_length",
                "mamba_d_conv": "ssm.conv_kernel",
                "mamba_d_state": "ssm.state_size",
                "mamba_n_groups": "ssm.group_count",
                "mamba_n_heads": "ssm.time_step_rank",
            },
            own_heads=True,
            nested="granite-hybrid",
        ),
    ),
    "kimi-linear": (
        Config(
            "kimi_linear",
            "KimiLinearForCausalLM",
            SIZES
            | INNER
            | RMS
            | LATENT
            | {
                "model_max_length": "context_length",
                "linear_head_dim": "kda.head_dim",
                "linear_conv_kernel_dim": "ssm.conv_kernel",
                "moe_intermediate_size": "expert_feed_forward_length",
                "num_experts": "expert_count",
                "num_experts_per_token": "expert_used_count",
                "num_shared_experts": "expert_shared_count",
                "num_expert_group": "expert_group_count",
                "topk_group": "expert_group_used_count",
                "routed_scaling_factor": "expert_weights_scale",
            },
            rotates=False,
            granted={"expert_gating_func": 2},
            own_heads=True,
            nested="kimi-linear",
        ),
    ),
    "nemotron_h": (NEMOTRON_H,),
    "nemotron_h_moe": (
        replace(
            NEMOTRON_H,
            keys={
                **NEMOTRON_H.keys,
                "num_experts_per_tok": "expert_used_count",
                "moe_intermediate_size": "expert_feed_forward_length",
                "moe_shared_expert_intermediate_size": "expert_shared_feed_forward_length",
                "moe_latent_size": "moe_latent_size",
                "n_shared_experts": "expert_shared_count",
                "norm_topk_prob": "expert_weights_norm",
                "routed_scaling_factor": "expert_weights_scale",
            },
        ),
    ),
    "jamba": (
        Config(
            "jamba",
            "JambaForCausalLM",
            SIZES
            | INNER
            | CONTEXT
            | RMS
            | {
                "num_experts": "expert_count",
                "num_experts_per_tok": "expert_used_count",
                "mamba_d_conv": "ssm.conv_kernel",
                "mamba_d_state": "ssm.state_size",
                "mamba_dt_rank": "ssm.time_step_rank",
            },
            rotates=False,
            own_heads=True,
            nested="jamba",
        ),
    ),
    "t5": (
        replace(T5, model_type="umt5", architecture="UMT5ForConditionalGeneration", mark="enc.blk.1.attn_rel_b.weight"),
        T5,
    ),
    "t5encoder": (
        replace(T5, model_type="umt5", architecture="UMT5EncoderModel", mark="enc.blk.1.attn_rel_b.weight"),
        replace(T5, architecture="T5EncoderModel", constants={"is_encoder_decoder": False}),
    ),
    "mpt": (
        Config(
            "mpt",
            "MptForCausalLM",
            MOSAIC | {"layer_norm_epsilon": "attention.layer_norm_epsilon"},
            rotates=False,
            nested="mpt",
        ),
    ),
    "dbrx": (
        Config(
            "dbrx",
            "DbrxForCausalLM",
            MOSAIC,
            granted={"attention.layer_norm_epsilon": 1e-5},
            own_heads=True,
            nested="dbrx",
        ),
    ),
    "mimo2": (
        Config(
            "mimo_v2_flash",
            "MiMoV2FlashForCausalLM",
            SIZES
            | INNER
            | CONTEXT
            | RMS
            | HEAD_DIM
            | WINDOW
            | {
                "n_routed_experts": "expert_count",
                "num_experts_per_tok": "expert_used_count",
                "moe_intermediate_size": "expert_feed_forward_length",
                "n_group": "expert_group_count",
                "topk_group": "expert_group_used_count",
                "v_head_dim": "attention.value_length",
            },
            has=QUERY_BIAS,
            rotates=False,
            granted={"expert_gating_func": 2},
            own_heads=True,
            nested="mimo2",
        ),
    ),
    "gemma3n": (
        Config(
            "gemma3n_text",
            "Gemma3nForCausalLM",
            SIZES
            | CONTEXT
            | KV
            | RMS
            | HEAD_DIM
            | WINDOW
            | {
                "final_logit_softcapping": "final_logit_softcapping",
                "hidden_size_per_layer_input": "embedding_length_per_layer_input",
                "num_kv_shared_layers": "attention.shared_kv_layers",
                "altup_active_idx": "altup.active_idx",
                "altup_num_inputs": "altup.num_inputs",
            },
            sizes={
                "laurel_rank": ("blk.0.laurel_l.weight", 0),
                "vocab_size_per_layer_input": ("per_layer_token_embd.weight", 0),
            },
            window_every=5,
            nested="gemma3n",
        ),
    ),
    "gemma-embedding": (
        Config(
            "gemma3_text",
            "Gemma3TextModel",
            GEMMA2,
            constants={"use_bidirectional_attention": True},
            window_every=6,
            nested="gemma-embedding",
        ),
    ),
    "modern-bert": (
        replace(
            MODERN_BERT,
            architecture="ModernBertForMaskedLM",
            mark="cls.weight",
            has={**MODERN_BERT.has, "classifier_bias": "cls.bias"},
            constants={"decoder_bias": False},
        ),
        MODERN_BERT,
    ),
    "eurobert": (
        Config(
            "eurobert",
            "EuroBertModel",
            DECODER | HEAD_DIM,
            has=QUERY_BIAS | MLP_BIAS,
            granted={"attention.causal": False},
            nested="eurobert",
        ),
    ),
}

# Architecture -> ends of tensors that llama.cpp's converter does not reorder, although it reorders the weights
UNTURNED = {"olmo": ("attn_q.bias", "attn_k.bias")}

# general.architecture -> tensor of each layer in transformers whose number is in a field's array -> (key, its shape)
IN_FIELDS: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "apertus": {
        "model.layers.{n}.mlp.act_fn.alpha_n": ("xielu.alpha_n", (1,)),
        "model.layers.{n}.mlp.act_fn.alpha_p": ("xielu.alpha_p", (1,)),
        "model.layers.{n}.mlp.act_fn.beta": ("xielu.beta", ()),
        "model.layers.{n}.mlp.act_fn.eps": ("xielu.eps", ()),
    },
}


@dataclass(frozen=True)
class MtpLayers:
    """The MTP layers of an architecture, which GGUF has after the others, as transformers' files have them."""

    # In paths, {n} is the layer's number among these, and {layer} its number among all
    path: str = "model.layers.{layer}"
    names: Mapping[str, str] = field(default_factory=dict)  # module -> another path; all share one without a number
    count: str = "num_nextn_predict_layers"  # the field of config.json with their number; empty if it has none


_SHARED_MTP = {
    "eh_proj": "mtp.fc",
    "enorm": "mtp.pre_fc_norm_embedding",
    "hnorm": "mtp.pre_fc_norm_hidden",
    "shared_head.norm": "mtp.norm",
}

# general.architecture -> its MTP layers
MTP_LAYERS = {
    **dict.fromkeys(("glm4moe", "deepseek2", "deepseek32", "glm-dsa", "cohere2moe"), MtpLayers()),
    "exaone-moe": MtpLayers("mtp.layers.{n}", _SHARED_MTP),
    "hy_v3": MtpLayers(names={"shared_head.norm": "model.layers.{layer}.final_layernorm"}),
    "mimo2": MtpLayers(
        "model.mtp.layers.{n}", {"post_attention_layernorm": "model.mtp.layers.{n}.pre_mlp_layernorm"}, count=""
    ),
    "qwen3next": MtpLayers("mtp.layers.{n}", _SHARED_MTP, count=""),
    **dict.fromkeys(("qwen35", "qwen35moe"), MtpLayers("mtp.layers.{n}", _SHARED_MTP, "mtp_num_hidden_layers")),
}

# Classes without a head, in whose files the names of the tables lack `model.`
HEADLESS = ("EuroBertModel", "Gemma3TextModel", "ModernBertModel")

# Model type -> end of a module's name -> whether only the first layer has it; if not, only the others have
OF_THE_FIRST: dict[str, dict[str, bool]] = {
    "modernbert": {"attn_norm": False},
    "t5": {"relative_attention_bias": True},
}

_T5_OF_2019 = {
    f"{path}.DenseReluDense.wi_1": f"{path}.DenseReluDense.wi"
    for path in ("encoder.block.{n}.layer.1", "decoder.block.{n}.layer.2")
}

# general.architecture -> (field of config.json that gives a weight another name than the first in the tables, both
# names)
INSTEAD = {
    "falcon": (
        ("num_ln_in_parallel_attn", 2),
        {"transformer.h.{n}.input_layernorm": "transformer.h.{n}.ln_mlp"},
    ),
    **dict.fromkeys(("t5", "t5encoder"), (("feed_forward_proj", "relu"), _T5_OF_2019)),
}
