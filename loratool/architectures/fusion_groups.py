"""Groups of matrices in a block that a runtime fuses, so that all or none of them are quantized.

vLLM and SGLang stack q, k and v, gate and up, or all experts of a layer into one matrix with one scheme. A file has
the members; the runtime's module has the fused name and looks up this name or its members' in the skip lists.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

# (name of the fused matrix, its members): last parts of paths in the same block.
# Source: `packed_modules_mapping` of the models of vLLM 0.33 and vllm-omni, and the names in SGLang 0.5.23.
FUSED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("qkv_proj", ("query", "key", "value")),
    ("to_qkv", ("to_q", "to_k", "to_v")),
    ("kv_proj", ("k_proj", "v_proj")),  # cross attention: Whisper
    ("in_proj_qkvg", ("q_proj", "k_proj", "v_proj", "g_proj")),  # OLMo hybrid
    ("qkvb_proj", ("q_proj", "k_proj", "v_proj", "b_proj")),  # Bailing v3
    ("in_proj_qkvgfab", ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj")),  # Kimi K3
    ("in_proj_gfab", ("g_proj", "f_a_proj", "b_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("w13", ("w1", "w3")),  # InternLM2, LFM2, Z-Image
    ("gate_up_proj", ("c_fc_0", "c_fc_1")),  # Exaone
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),  # DeepSeek V2 and V3, Kimi K2 in vLLM
    ("fused_qkv_a_proj_with_mqa", ("q_a_proj", "kv_a_proj_with_mqa")),  # in SGLang
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),  # Qwen3.5
    ("in_proj_ba", ("in_proj_b", "in_proj_a")),
    ("fused_wqa_wkv", ("wq_a", "wkv")),  # DeepSeek V4
    ("fused_wkv_wgate", ("wkv", "wgate")),
)

EXPERTS = "experts"  # the module whose matrices of all experts are one group

# GraniteMoE has parameters of all experts in the place of other models' `experts`.
STACKED_EXPERTS = frozenset({"input_linear", "output_linear"})


def _widest_groups() -> dict[str, str]:
    """Return member -> name of its widest group: rows of `FUSED` with a common member are one group."""
    group: dict[str, str] = {}
    for _, members in FUSED:
        tied = {group.get(member, member) for member in members}
        group |= dict.fromkeys(members, min(tied))
        group = {member: min(tied) if name in tied else name for member, name in group.items()}
    return group


_GROUP_OF = _widest_groups()


def close_under_fusion(touched: Collection[str], coded: Collection[str]) -> dict[str, str]:
    """Return the quantized modules that must be rewritten with the touched ones -> the touched module that causes it.

    The table's rows overlap (k and v may be fused with q, or without), and names do not show which row a runtime uses.
    So the group is the widest, since an extra member only makes the file larger. One touched expert causes the rewrite
    of all experts of its layer.

    Args:
        touched: module paths, quantized or not, with or without the folder of a pipeline's component.
        coded: the paths of all modules with quantized weights.
    """
    inside, touched_in = set(touched), dict[tuple[str, str], str]()
    for module in sorted(touched):
        touched_in.setdefault(_group(module), module)
    others = (module for module in coded if module not in inside)
    return {module: touched_in[group] for module in others if (group := _group(module)) in touched_in}


def experts_module(module: str) -> str | None:
    """Return the path of the module with a layer's experts, given its path or that of one of its matrices."""
    path, marker, _ = f".{module}.".rpartition(f".{EXPERTS}.")
    return f"{path}.{EXPERTS}"[1:] if marker else None


def fused_paths(modules: Collection[str]) -> Iterator[str]:
    """Yield the paths of the fused matrices with all members present; of overlapping rows, the widest."""
    blocks: dict[str, set[str]] = {}
    for module in modules:
        block, _, last = module.rpartition(".")
        if last in _GROUP_OF:
            blocks.setdefault(block, set()).add(last)
    for block, names in blocks.items():
        rows = [(fused, set(members)) for fused, members in FUSED if names.issuperset(members)]
        for fused, members in rows:
            if not any(members < wider for _, wider in rows):
                yield f"{block}.{fused}" if block else fused


def _group(module: str) -> tuple[str, str]:
    """Return the block and the name of a module's group; a module without a group is a group by itself."""
    experts = experts_module(module)
    if experts:
        return experts, EXPERTS
    block, _, last = module.rpartition(".")
    return (block, EXPERTS) if last in STACKED_EXPERTS else (block, _GROUP_OF.get(last, last))
