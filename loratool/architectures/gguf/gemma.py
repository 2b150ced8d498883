"""The Gemma architectures. Up to Gemma 3, GGUF adds 1 to the weights of norms, as the model does at run time."""

from __future__ import annotations

from .llama import ATTENTION, ENDS, LAYER, MLP
from .table import Architecture, Weight

PLUS_ONE = "plus one"

# llama.cpp has no separate head for Gemma 1 and 2: their `output` is the embedding
EMBEDDING, NORM, HEAD = ENDS

GEMMA_ENDS = (EMBEDDING, Weight(NORM.gguf, NORM.hf, change=PLUS_ONE))

GEMMA_NORMS = (
    Weight("blk.{n}.attn_norm", f"{LAYER}.input_layernorm", change=PLUS_ONE),
    Weight("blk.{n}.ffn_norm", f"{LAYER}.post_attention_layernorm", change=PLUS_ONE),
)

# Norms before and after both halves of a layer
AROUND = {
    "blk.{n}.attn_norm": f"{LAYER}.input_layernorm",
    "blk.{n}.post_attention_norm": f"{LAYER}.post_attention_layernorm",
    "blk.{n}.ffn_norm": f"{LAYER}.pre_feedforward_layernorm",
    "blk.{n}.post_ffw_norm": f"{LAYER}.post_feedforward_layernorm",
}

QK_NORMS = {
    "blk.{n}.attn_q_norm": f"{LAYER}.self_attn.q_norm",
    "blk.{n}.attn_k_norm": f"{LAYER}.self_attn.k_norm",
}

GEMMA2_NORMS = tuple(Weight(*names, change=PLUS_ONE) for names in AROUND.items())

GEMMA3_NORMS = tuple(Weight(*names, change=PLUS_ONE) for names in (*AROUND.items(), *QK_NORMS.items()))

GEMMA4_NORMS = tuple(Weight(*names) for names in (*AROUND.items(), *QK_NORMS.items()))

# Embeddings of each layer, and the modules between them and the layer
LAYER_INPUTS = (
    Weight("per_layer_token_embd", "model.embed_tokens_per_layer"),
    Weight("per_layer_model_proj", "model.per_layer_model_projection"),
    Weight("per_layer_proj_norm", "model.per_layer_projection_norm"),
    Weight("blk.{n}.inp_gate", f"{LAYER}.per_layer_input_gate"),
    Weight("blk.{n}.proj", f"{LAYER}.per_layer_projection"),
    Weight("blk.{n}.post_norm", f"{LAYER}.post_per_layer_input_norm"),
    Weight("blk.{n}.layer_output_scale.weight", f"{LAYER}.layer_scalar", bare=True),
)

GEMMA4_EXPERTS = (
    Weight("blk.{n}.ffn_gate_inp", f"{LAYER}.router.proj"),
    Weight("blk.{n}.ffn_gate_inp.scale", f"{LAYER}.router.scale", bare=True),
    Weight("blk.{n}.ffn_gate_up_exps.weight", f"{LAYER}.experts.gate_up_proj", bare=True),
    Weight("blk.{n}.ffn_down_exps.weight", f"{LAYER}.experts.down_proj", bare=True),
    Weight("blk.{n}.ffn_down_exps.scale", f"{LAYER}.router.per_expert_scale", bare=True),
    Weight("blk.{n}.pre_ffw_norm_2", f"{LAYER}.pre_feedforward_layernorm_2"),
    Weight("blk.{n}.post_ffw_norm_1", f"{LAYER}.post_feedforward_layernorm_1"),
    Weight("blk.{n}.post_ffw_norm_2", f"{LAYER}.post_feedforward_layernorm_2"),
)

# What Gemma 3n has beside Gemma 4's
GEMMA3N = (
    Weight("altup_proj", "model.altup_projections.{e}"),
    Weight("altup_unembd_proj", "model.altup_unembed_projections.{e}"),
    Weight("blk.{n}.laurel_l", f"{LAYER}.laurel.linear_left"),
    Weight("blk.{n}.laurel_r", f"{LAYER}.laurel.linear_right"),
    Weight("blk.{n}.laurel_post_norm", f"{LAYER}.laurel.post_laurel_norm"),
    Weight("blk.{n}.altup_router", f"{LAYER}.altup.modality_router"),
    Weight("blk.{n}.altup_router_norm", f"{LAYER}.altup.router_norm"),
    Weight("blk.{n}.altup_correct_scale.weight", f"{LAYER}.altup.correct_output_scale", bare=True),
    Weight("blk.{n}.altup_correct_coef", f"{LAYER}.altup.correction_coefs"),
    Weight("blk.{n}.altup_predict_coef", f"{LAYER}.altup.prediction_coefs"),
)

GEMMA_ARCHITECTURES = (
    Architecture("gemma", ("gemma",), (*GEMMA_ENDS, *GEMMA_NORMS, *ATTENTION, *MLP)),
    Architecture("gemma2", ("gemma2",), (*GEMMA_ENDS, *GEMMA2_NORMS, *ATTENTION, *MLP)),
    Architecture("gemma3", ("gemma3_text",), (*GEMMA_ENDS, HEAD, *GEMMA3_NORMS, *ATTENTION, *MLP), ("gemma3",)),
    Architecture("gemma-embedding", ("gemma3_text",), (*GEMMA_ENDS, *GEMMA3_NORMS, *ATTENTION, *MLP)),
    Architecture(
        "gemma3n",
        ("gemma3n_text",),
        (*ENDS, *GEMMA4_NORMS, *ATTENTION, *MLP, *LAYER_INPUTS[:6], *GEMMA3N),
        ("gemma3n",),
    ),
    Architecture(
        "gemma4",
        ("gemma4_text",),
        (*ENDS, *GEMMA4_NORMS, *ATTENTION, *MLP, *LAYER_INPUTS, *GEMMA4_EXPERTS),
        ("gemma4",),
    ),
)
