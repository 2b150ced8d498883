"""Find the projections of its block that a linear layer computes, in any family's names.

The projections have Llama's names. A fused matrix has several, in the order of their rows in its output.
"""

from __future__ import annotations

PROJECTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_QKV = ("q_proj", "k_proj", "v_proj")

# the end of a module's path -> its projections; the longest end counts
PROJECTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("q_proj query query_proj to_q q_lin wq q_attn q".split(), ("q_proj",)),
    **dict.fromkeys("k_proj key key_proj to_k k_lin wk k".split(), ("k_proj",)),
    **dict.fromkeys("v_proj value value_proj to_v v_lin wv v".split(), ("v_proj",)),
    **dict.fromkeys(
        """o_proj out_proj out_lin o attention.output.dense crossattention.output.dense attn.c_proj
        crossattention.c_proj attention.dense self_attention.dense self_attn.dense attn.proj attn.Wo attention.wo
        to_out.0""".split(),
        ("o_proj",),
    ),
    **dict.fromkeys("gate_proj w1 wi_0".split(), ("gate_proj",)),
    **dict.fromkeys("up_proj w3 wi wi_1 fc1 fc_in c_fc lin1 dense_h_to_4h intermediate.dense".split(), ("up_proj",)),
    **dict.fromkeys(
        "down_proj w2 fc2 fc_out lin2 dense_4h_to_h output.dense mlp.c_proj mlp.Wo DenseReluDense.wo".split(),
        ("down_proj",),
    ),
    **dict.fromkeys("c_attn qkv_proj qkv query_key_value Wqkv wqkv W_pack".split(), _QKV),
    "crossattention.c_attn": _QKV[1:],
    "gate_up_proj": ("gate_proj", "up_proj"),
}

# Ends of the paths of fused matrices whose projections follow each other; with another name the order may differ
FUSED = ("self_attn.qkv_proj", "mlp.gate_up_proj")


def projections(path: str) -> tuple[str, ...]:
    """Return the projections that a module computes; empty if its name is unknown."""
    parts = path.split(".")
    for length in (3, 2, 1):
        row = PROJECTIONS.get(".".join(parts[-length:]))
        if row:
            return row
    return ()
