"""Tell which matrices of a block a runtime keeps as one, so that all of them are coded or none is.

vLLM and SGLang stack q, k and v, gate and up, or all experts of a layer into one matrix with one scheme. A file has
the members; the runtime's module has the fused name and asks the skip lists for it or for its members.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

# The name of the fused matrix, its members: the last parts of their paths, beside each other in one block.
# Source: `packed_modules_mapping` of the models of vLLM 0.33 and vllm-omni, and the names that SGLang 0.5.23 has.
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

EXPERTS = "experts"  # the module whose matrices, of all experts, are one group

# One parameter of GraniteMoE has a part of all experts, and stands where others have their `experts`.
STACKED_EXPERTS = frozenset({"input_linear", "output_linear"})


def _widest_groups() -> dict[str, str]:
    """Return member -> a name that all members have which any two rows of `FUSED` with a common one tie."""
    group: dict[str, str] = {}
    for _, members in FUSED:
        tied = {group.get(member, member) for member in members}
        group |= dict.fromkeys(members, min(tied))
        group = {member: min(tied) if name in tied else name for member, name in group.items()}
    return group


_GROUP_OF = _widest_groups()


def close_under_fusion(touched: Collection[str], coded: Collection[str]) -> dict[str, str]:
    """Return the coded modules that must be rewritten with the touched ones -> the touched one that asks for it.

    The table's rows overlap (k and v may be fused with q, or alone), and which of them a runtime uses is not known
    from names: the group is the widest, since a member more is only a larger file. One touched expert asks for all
    experts of its layer.

    Args:
        touched: module paths, coded or not, with or without the folder of a pipeline's component.
        coded: the paths of all modules whose weights are codes.
    """
    inside, touched_in = set(touched), dict[tuple[str, str], str]()
    for module in sorted(touched):
        touched_in.setdefault(_group(module), module)
    others = (module for module in coded if module not in inside)
    return {module: touched_in[group] for module in others if (group := _group(module)) in touched_in}


def experts_module(module: str) -> str | None:
    """Return the path of the module that holds a layer's experts, for itself and for one of its matrices."""
    path, found, _ = f".{module}.".rpartition(f".{EXPERTS}.")
    return f"{path}.{EXPERTS}"[1:] if found else None


def fused_paths(modules: Collection[str]) -> Iterator[str]:
    """Yield the paths of the fused matrices whose members are all there: of overlapping rows, the widest."""
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
    """Return the block that a module's group is in and the group's name; a module in no group is alone in its own."""
    experts = experts_module(module)
    if experts:
        return experts, EXPERTS
    block, _, last = module.rpartition(".")
    return (block, EXPERTS) if last in STACKED_EXPERTS else (block, _GROUP_OF.get(last, last))
