"""The modules of Megatron-Core's language models under transformers' names, and the order of their fused rows.

A group of queries that share a key is one block of rows in `linear_qkv`: its queries, their gates if the model has
some, its key, its value. `linear_fc1` has gate, then up. Source: the bridges of NVIDIA-NeMo/Megatron-Bridge of August
2026, `src/megatron/bridge/models/*/*_bridge.py` and `models/conversion/param_mapping.py`. NeMo 2 and ms-swift use the
same modules of NVIDIA/Megatron-LM.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .heads import Heads

QKV, GATE_UP, IN_PROJ = "self_attention.linear_qkv", "linear_fc1", "self_attention.in_proj"

# A module in a layer -> its name in transformers. MLP modules are in `_OWNERS`.
_ATTENTION = {
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.linear_q_proj": "self_attn.q_proj",
    "self_attention.linear_q_down_proj": "self_attn.q_a_proj",
    "self_attention.linear_q_up_proj": "self_attn.q_b_proj",
    "self_attention.linear_kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
    "self_attention.out_proj": "linear_attn.out_proj",
}

# Modules whose inputs are cut over the ranks of tensor parallelism; the others' outputs are
CUT_INPUTS = ("linear_proj", "linear_fc2", "out_proj")

# Modules of NeMo 1 -> Megatron-Core's
NEMO_1 = {
    "self_attention.adapter_layer.lora_kqv_adapter": QKV,
    "self_attention.adapter_layer.lora_dense_attention_adapter": "self_attention.linear_proj",
    "mlp.adapter_layer.lora_hto4h_adapter": "mlp.linear_fc1",
    "mlp.adapter_layer.lora_4htoh_adapter": "mlp.linear_fc2",
}


@dataclass(frozen=True)
class LayerNames:
    """The names of a model type's MLP modules, relative to a layer."""

    experts: str = "mlp.experts"  # "" if the rows of its experts have another order
    shared: str = "mlp.shared_experts"
    router: str = "mlp.gate"
    gate: str = "gate_proj"  # "" if the MLP has no gate
    up: str = "up_proj"
    down: str = "down_proj"
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    gated_queries: bool = False  # q_proj has the rows of a head's query, then those of its gate
    linear_attention: str = ""  # "separate" or "grouped": linear attention's matrices, and the order of their rows


DEFAULT = LayerNames()

# model_type -> its names. Of `qwen2_moe`, the registry of Megatron-Bridge has none; its names are those of ms-swift.
LAYER_NAMES: dict[str, LayerNames] = {
    **dict.fromkeys(
        """llama mistral qwen2 qwen3 gemma gemma2 gemma3_text mimo qwen3_moe olmoe deepseek_v2 deepseek_v3 kimi_k2
        ernie4_5_moe glm4_moe_lite""".split(),
        DEFAULT,
    ),
    "qwen2_moe": LayerNames(shared="mlp.shared_expert"),
    "nemotron": LayerNames(gate=""),
    "minimax_m2": LayerNames(
        experts="block_sparse_moe.experts", router="block_sparse_moe.gate", expert_names=("w1", "w3", "w2")
    ),
    "gpt_oss": LayerNames(experts="", router="mlp.router"),
    "qwen3_next": LayerNames(shared="mlp.shared_expert", gated_queries=True, linear_attention="grouped"),
    "qwen3_5_text": LayerNames(gated_queries=True, linear_attention="separate"),
    "qwen3_5_moe_text": LayerNames(shared="mlp.shared_expert", gated_queries=True, linear_attention="separate"),
}

Runs = tuple[tuple[int, int], ...]  # (first, stop) of rows, in the order of the matrix that they make


def plain_path(module: str, names: LayerNames) -> str | None:
    """Return the path in a layer of a module that is one matrix in transformers too; None for any other."""
    owners = {"mlp": "mlp", "mlp.shared_experts": names.shared}
    owner, _, last = module.rpartition(".")
    if module in _ATTENTION:
        return _ATTENTION[module]
    if module == "mlp.router":
        return names.router
    if owner in owners and (last == "linear_fc2" or (last == GATE_UP and not names.gate)):
        return f"{owners[owner]}.{names.down if last == 'linear_fc2' else names.up}"
    return None


def gate_up_paths(module: str, names: LayerNames) -> tuple[str, str] | None:
    """Return the paths in a layer of gate and up, of a dense or a shared `linear_fc1` with both; else None."""
    owner = {"mlp.linear_fc1": "mlp", "mlp.shared_experts.linear_fc1": names.shared}.get(module)
    return (f"{owner}.{names.gate}", f"{owner}.{names.up}") if owner and names.gate else None


def group_rows(heads: Heads, gated: bool) -> dict[str, Runs]:
    """Return the rows of q, k and v in a fused matrix: by group, its queries, their gates, its key and its value.

    Raises:
        ValueError: the queries do not divide into groups.
    """
    if not heads.keys or not heads.size or heads.queries % heads.keys:
        raise ValueError(f"{heads.queries} heads are not those of {heads.keys} groups")
    return _group_rows(heads, gated)


@lru_cache(maxsize=64)
def _group_rows(heads: Heads, gated: bool) -> dict[str, Runs]:
    each, size = heads.queries // heads.keys, heads.size
    block = (each * (1 + gated) + 2) * size
    q, k, v = [], [], []
    for start in range(0, heads.keys * block, block):
        if gated:
            for head in range(start, start + each * size, size):
                q += [(head, head + size), (head + each * size, head + each * size + size)]
        else:
            q.append((start, start + each * size))
        k.append((start + block - 2 * size, start + block - size))
        v.append((start + block - size, start + block))
    return {"q": tuple(q), "k": tuple(k), "v": tuple(v)}


@lru_cache(maxsize=256)
def gate_up_rows(rows: int, ranks: int = 1) -> tuple[Runs, Runs]:
    """Return the rows of gate and of up in a matrix of each rank's gate, then its up, rank after rank.

    Raises:
        ValueError: the rows do not divide.
    """
    if rows % (2 * ranks):
        raise ValueError(f"{rows} rows are not those of gate and up on {ranks} ranks")
    size = rows // (2 * ranks)
    starts = range(0, rows, 2 * size)
    return tuple((at, at + size) for at in starts), tuple((at + size, at + 2 * size) for at in starts)


@lru_cache(maxsize=256)
def joined_halves(rows: int, ranks: int) -> Runs:
    """Return the rows in order of a matrix saved as if it were gate and up: each rank's first half, then its second.

    Raises:
        ValueError: the rows do not divide.
    """
    if rows % (2 * ranks):
        raise ValueError(f"{rows} rows are not those of {ranks} ranks")
    size = rows // (2 * ranks)
    return tuple((at, at + size) for rank in range(ranks) for at in (rank * size, (ranks + rank) * size))


@dataclass(frozen=True)
class LinearHeads:
    """The heads of linear attention (Gated DeltaNet)."""

    keys: int
    key_size: int
    values: int
    value_size: int


@lru_cache(maxsize=64)
def linear_attention_rows(heads: LinearHeads, ranks: int, kind: str) -> dict[str, Runs]:
    """Return the rows of linear attention's matrices in a fused one: each rank's q, k, v, z, b, a, rank after rank.

    Args:
        kind: "separate": qkv, z, b and a; "grouped": qkvz and ba, each with all rows of a key's head together.

    Raises:
        ValueError: the heads do not divide by the ranks, or the values by the keys.
    """
    if not heads.keys or heads.values % heads.keys or heads.keys % ranks:
        raise ValueError(f"{heads.values} heads of values and {heads.keys} of keys are not those of {ranks} ranks")
    per_rank, each = heads.keys // ranks, heads.values // heads.keys
    sizes = {
        "q": heads.key_size,
        "k": heads.key_size,
        "v": each * heads.value_size,
        "z": each * heads.value_size,
        "b": each,
        "a": each,
    }
    starts: dict[str, list[tuple[int, int]]] = {part: [] for part in sizes}
    at = 0
    for _ in range(ranks):
        for part, size in sizes.items():
            starts[part] += [(at + head * size, at + head * size + size) for head in range(per_rank)]
            at += per_rank * size
    if kind == "grouped":
        return {
            name: tuple(starts[part][head] for head in range(heads.keys) for part in name) for name in ("qkvz", "ba")
        }
    return {
        "qkv": tuple(run for part in "qkv" for run in starts[part]),
        **{part: tuple(starts[part]) for part in "zba"},
    }


def row_count(runs: Runs) -> int:
    return sum(stop - first for first, stop in runs)
