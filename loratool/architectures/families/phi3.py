"""Name the projections that Phi 3 fuses, in Phi 3's and in Llama's spelling."""

from __future__ import annotations

from .table import Block, Fused, ModelFamily

FAMILY = ModelFamily(
    key="phi3",
    title="Phi 3",
    blocks=(
        Block(
            "*",
            "*",
            {
                "self_attn.qkv_proj": Fused(
                    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("queries", None, None)
                ),
                "mlp.gate_up_proj": Fused(("mlp.gate_proj", "mlp.up_proj")),
            },
        ),
    ),
)
