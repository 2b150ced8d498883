"""Map tensors of a file to modules of the class, where one tensor has several modules' rows or the other way round.

transformers 5 splits a fused matrix of a file into modules on loading, or fuses matrices into one; LoRA adapts the
modules. Some matrices are also loaded in another order of rows, so that no range of rows is a module. They are listed
too, so that they can be recognized by name. The stacks of MLX's folders are parts of those of the class.

Source: the converters with `Chunk(dim=0)`, `Split(dim=0)` and `Concatenate` of `transformers.conversion_mapping` of
5.24, and the sizes of the modules in the classes for `Split`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import InputError
from .experts import TRANSPOSED_EXPERTS
from .heads import first_count
from .mlx_names import Share, find_share
from .renames import canonical

Configs = Mapping[str, Mapping[str, Any]]  # model_type -> config.json or a config nested in it
Shares = Callable[[Mapping[str, Any], int], tuple[int, ...]]  # (config of the type, all rows) -> rows of each part


@dataclass(frozen=True)
class FusedRows:
    """A fused matrix on one side, with the rows of several matrices on the other side."""

    fused: str  # the end of the fused matrix's canonical path (`renames.canonical`)
    parts: tuple[str, ...]  # the ends of the separate matrices' paths, in the order of their rows
    shares: Shares
    stored: Literal["fused", "parts"] = "fused"  # the file's form; the class has the other
    permuted: tuple[str, ...] = ()  # the parts with another order of rows in the class than in the file


@dataclass(frozen=True)
class RowPart:
    """Rows of a tensor of the file that are rows of a module of the class."""

    module: str  # path in the class; with `.bias` if the tensor is one
    start: int  # rows [start, stop) of the tensor
    stop: int
    skip: int  # they are rows [skip, skip + stop - start) of the module
    module_rows: int  # number of rows of the module
    permuted: bool = False  # the module has them in another order


def _equal(parts: int) -> Shares:
    def shares(config: Mapping[str, Any], rows: int) -> tuple[int, ...]:
        return (rows // parts,) * parts

    return shares


def _count(config: Mapping[str, Any], field: str) -> int:
    """Return a field that is a positive count; raise KeyError if it is not: a class may have another default."""
    if not (value := first_count(config, field)):
        raise KeyError(field)
    return value


def _grouped_heads(config: Mapping[str, Any], rows: int) -> tuple[int, ...]:
    queries, keys = _count(config, "num_attention_heads"), _count(config, "num_key_value_heads")
    size = rows // (queries + 2 * keys)
    return queries * size, keys * size, keys * size


def _delta_net(config: Mapping[str, Any], rows: int) -> tuple[int, ...]:
    heads = _count(config, "linear_num_value_heads")
    keys = _count(config, "linear_num_key_heads") * _count(config, "linear_key_head_dim")
    values = heads * _count(config, "linear_value_head_dim")
    return 2 * keys + values, values, heads, heads


def _qkv(module: str) -> tuple[str, str, str]:
    return (f"{module}.q_proj", f"{module}.k_proj", f"{module}.v_proj")


_ENCODER_QKV = _qkv("self_attn")

_ROTARY = ("self_attn.q_proj", "self_attn.k_proj")

_INTERLEAVED_EXPERTS = FusedRows(
    "experts.w13", ("experts.gate_up_proj",), _equal(1), permuted=("experts.gate_up_proj",)
)

_DINOV2 = (FusedRows("mlp.weights_in", ("mlp.gate_proj", "mlp.up_proj"), _equal(2)),)

# model_type, of config.json or of a config nested in it -> its matrices
FUSED_ROWS: dict[str, tuple[FusedRows, ...]] = {
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "gte": (
        FusedRows("attention.qkv_proj", _ENCODER_QKV, _equal(3)),
        FusedRows("mlp.up_gate_proj", ("mlp.up_proj", "mlp.gate_proj"), _equal(2)),
    ),
    "hrm_text": (
        FusedRows("attn.gqkv_proj", ("self_attn.gate_proj", *_ENCODER_QKV), _equal(4)),
        FusedRows("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), _equal(2)),
    ),
    **dict.fromkeys("inkling2 inkling2_loop inkling2_loop_text inkling2_text".split(), (_INTERLEAVED_EXPERTS,)),
    "inkling_mm_model": (
        _INTERLEAVED_EXPERTS,
        FusedRows("shared_w13", ("gate_proj", "up_proj"), _equal(2), permuted=("gate_proj", "up_proj")),
        FusedRows("mlp.w13_dn", ("mlp.gate_proj", "mlp.up_proj"), _equal(2), permuted=("mlp.gate_proj", "mlp.up_proj")),
    ),
    "jina_embeddings_v3": (FusedRows("mixer.Wqkv", _ENCODER_QKV, _equal(3)),),
    "kimi_k25": (FusedRows("wqkv", _qkv("attn"), _equal(3), permuted=("attn.q_proj", "attn.k_proj")),),
    "lara_mini": (
        FusedRows(
            "linear_attn.in_proj",
            tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")),
            _delta_net,
        ),
    ),
    "minimax_m3_vl": (FusedRows("gate_up_proj", ("gate_proj", "up_proj"), _equal(2), "parts"),),
    "mistral_large4": tuple(  # in the tower: the language model has other names
        FusedRows(f"attention.w{part}", (f"attention.{part}_proj",), _equal(1), permuted=(f"attention.{part}_proj",))
        for part in "qk"
    ),
    "molmo2_text": (
        FusedRows("self_attn.att_proj", _ENCODER_QKV, _grouped_heads),
        FusedRows("mlp.ff_proj", ("mlp.up_proj", "mlp.gate_proj"), _equal(2)),
    ),
    "nomic_bert": (FusedRows("attn.Wqkv", _ENCODER_QKV, _equal(3)),),
    "qianfan_ocr": (FusedRows("attn.qkv", _qkv("attention"), _equal(3)),),
    "radio": (FusedRows("attn.qkv", _qkv("attention"), _equal(3)),),
    "sapiens2": (FusedRows("ffn.w12", ("mlp.gate_proj", "mlp.up_proj"), _equal(2)),),
    "sarvam_moe": (FusedRows("self_attn.query_key_value", _ENCODER_QKV, _grouped_heads),),
    "step3p7": (
        FusedRows("mlp.experts.gate_up_proj", ("moe.gate_proj", "moe.up_proj"), _equal(2), "parts"),
        FusedRows("self_attn.in_proj", _ENCODER_QKV, _equal(3), permuted=_ROTARY),
    ),
    "tipsv2": (
        FusedRows("self_attn.in_proj", _ENCODER_QKV, _equal(3)),
        FusedRows("attn.qkv", _qkv("attention"), _equal(3)),
        FusedRows("mlp.w12", ("mlp.gate_proj", "mlp.up_proj"), _equal(2)),
    ),
    "unlimited_ocr": (FusedRows("self_attn.qkv_proj", _ENCODER_QKV, _equal(3)),),
}


def nested_configs(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a config.json and its nested configs by model type, the outer config first."""
    configs: dict[str, dict[str, Any]] = {}
    for nested in (config, *config.values()):
        model_type = nested.get("model_type") if isinstance(nested, dict) else None
        if isinstance(model_type, str):
            configs.setdefault(model_type, nested)
    return configs


def row_parts(name: str, model_types: Collection[str], configs: Configs, rows: int) -> tuple[RowPart, ...]:
    """Return the modules of the class whose rows a tensor of the file has; () if it is neither fused nor a part.

    Args:
        name: the tensor's name in the file, without wrappers, or its module's path.
        model_types: those of config.json and its nested configs.
        configs: these configs, by type.
        rows: number of rows of the tensor, or of one expert in a stack.

    Raises:
        InputError: the rows do not follow from the config.
    """
    if (share := _mlx_share(name, model_types)) and rows:
        size = rows * share.parts
        return (RowPart(share.stack, 0, rows, share.part * rows, size, share.interleaved),)
    tables = [(model_type, table) for model_type in model_types for table in FUSED_ROWS.get(model_type, ())]
    path = canonical(name, model_types) if tables else name
    ending = ".bias" if path.endswith("bias") else ""
    path = re.sub(r"[._](weight|bias)$", "", path)  # nn.MultiheadAttention has an `in_proj_weight`
    for model_type, table in tables:
        if table.stored == "fused" and _ends(path, table.fused):
            shares = _sizes(table, model_type, configs, rows, name)
            front = path.removesuffix(table.fused)
            starts = [sum(shares[:i]) for i in range(len(shares))]
            return tuple(
                RowPart(front + part + ending, start, start + size, 0, size, part in table.permuted)
                for part, start, size in zip(table.parts, starts, shares, strict=True)
            )
        for index, part in enumerate(table.parts if table.stored == "parts" else ()):
            if _ends(path, part):
                shares = _sizes(table, model_type, configs, rows * len(table.parts), name)
                module = path.removesuffix(part) + table.fused + ending
                return (RowPart(module, 0, rows, sum(shares[:index]), sum(shares)),)
    return ()


def _mlx_share(name: str, model_types: Collection[str]) -> Share | None:
    """Return the share of the class's stack that one of MLX's stacks is; None for any other tensor.

    For a class with stacks of (expert, in, out), the share is not a run of rows.
    """
    if not name.endswith(".weight") or not ("experts." in name or "switch_" in name):  # most are neither
        return None
    path = canonical(name.removesuffix(".weight"), model_types)
    share = find_share(path, model_types)
    if share is None or share.stack == path:
        return None
    is_transposed = share.parts > 1 and not TRANSPOSED_EXPERTS.isdisjoint(model_types)
    return replace(share, interleaved=True) if is_transposed else share


def _ends(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")


def _sizes(fused: FusedRows, model_type: str, configs: Configs, rows: int, name: str) -> tuple[int, ...]:
    parts = ", ".join(part.rpartition(".")[2] for part in fused.parts)
    try:
        shares = fused.shares(configs.get(model_type, {}), rows)
    except KeyError as error:
        raise InputError(
            f"has the rows of {parts}, but the config of the {model_type} does not tell how many of each",
            culprit=name,
            remedy=f"give the base's config.json its {error.args[0]}",
        ) from None
    if sum(shares) != rows or not all(shares):
        raise InputError(
            f"has {rows} rows, but the config of the {model_type} gives {' + '.join(map(str, shares))} ({parts})",
            culprit=name,
            remedy="is the config.json this model's?",
        )
    return shares
