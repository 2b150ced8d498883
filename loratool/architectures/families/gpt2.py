"""Name the projections that GPT-2 fuses, in GPT-2's and in Llama's spelling."""

from __future__ import annotations

from .table import Block, Fused, ModelFamily

FAMILY = ModelFamily(
    key="gpt2",
    title="GPT-2",
    blocks=(Block("*", "*", {"attn.c_attn": Fused(("attn.q_proj", "attn.k_proj", "attn.v_proj"), (1, 1, 1))}),),
    conv1d=("attn.c_attn",),
)
