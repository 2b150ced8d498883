"""The rows of the tables: `Architecture`, `Weight`, and the orders of rows (`RowOrder`).

All functions count rows of one matrix; every matrix of a stack of experts has the same order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..heads import LARGEST, first_count, heads_of, pairs_of_halves, text_fields
from ..ties import UNTIED_BY_DEFAULT

# Facts other than heads -> fields of config.json; the first one present counts
_FIELDS = {
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "nope": ("qk_nope_head_dim",),
    "value_size": ("v_head_dim",),
    "linear_keys": ("linear_num_key_heads",),
    "linear_values": ("linear_num_value_heads",),
    "linear_key_size": ("linear_key_head_dim",),
    "linear_value_size": ("linear_value_head_dim",),
}


_ROPE = ("rope_parameters", "rope_scaling")  # fields of config.json for rotation

_GLM_PART = 0.5  # the fraction of a head that rotates, for a config without one: GLM's, the only one it counts for


@dataclass(frozen=True)
class Facts:
    """The numbers of a model that determine the orders of its rows; 0 if unknown."""

    heads: int = 0  # of the queries
    kv_heads: int = 0  # of the keys and values
    experts: int = 0
    nope: int = 0  # rows of each head's keys without position (multi-head latent attention)
    value_size: int = 0  # rows of each head's values (multi-head latent attention)
    linear_keys: int = 0  # heads of the keys of linear attention
    linear_values: int = 0
    linear_key_size: int = 0  # rows of each
    linear_value_size: int = 0
    head_size: int = 0  # rows of each head of the queries and keys
    rotated: int = 0  # of these, rows with a position
    sections: bool = False  # several positions for each token (M-RoPE)
    tied: bool = False  # the head is the embedding, stored once

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Facts:
        """Return the facts of a config.json; a nested language model has precedence."""
        fields, heads = text_fields(config), heads_of(config)
        facts = {fact: first_count(fields, *names) for fact, names in _FIELDS.items()}
        tied = fields.get("tie_word_embeddings", fields.get("model_type") not in UNTIED_BY_DEFAULT)
        rope = next((each for name in _ROPE if isinstance(each := fields.get(name), Mapping)), {})
        part = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", _GLM_PART))
        rotated = int(heads.size * part) if isinstance(part, int | float) and 0 < part <= 1 else 0
        sections = "mrope_section" in rope
        return cls(
            heads.queries,
            heads.keys,
            **facts,
            head_size=heads.size,
            rotated=rotated,
            sections=sections,
            tied=tied is True,
        )

    @classmethod
    def of_metadata(cls, key: str, fields: Mapping[str, Any]) -> Facts:
        """Return the facts in the fields of a GGUF file of the architecture `key`."""

        def number(name: str, default: int = 0) -> int:
            value = fields.get(f"{key}.{name}", default)
            in_layers = [*value] if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            in_layers = [each for each in in_layers if each != 0]  # layers without attention have no heads
            common = in_layers[0] if in_layers and in_layers.count(in_layers[0]) == len(in_layers) else 0
            return common if type(common) is int and 0 < common < LARGEST else 0

        heads, values = number("attention.head_count"), number("attention.value_length_mla")
        nope = max(0, number("attention.key_length_mla") - number("rope.dimension_count")) if values else 0
        linear_values = number("ssm.time_step_rank")
        return cls(
            heads,
            number("attention.head_count_kv", heads),
            number("expert_count"),
            nope,
            values,
            number("ssm.group_count"),
            linear_values,
            number("ssm.state_size"),
            number("ssm.inner_size") // linear_values if linear_values else 0,
            number("attention.key_length", number("embedding_length") // heads if heads else 0),
            number("rope.dimension_count"),
            f"{key}.rope.dimension_sections" in fields,
        )

    def metadata(self, key: str) -> dict[str, int]:
        """Return the fields from which `of_metadata` reads heads and experts."""
        named = {
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "expert_count": self.experts,
            "ssm.group_count": self.linear_keys,
            "ssm.time_step_rank": self.linear_values,
            "ssm.state_size": self.linear_key_size,
            "ssm.inner_size": self.linear_values * self.linear_value_size,
        }
        return {f"{key}.{name}": value for name, value in named.items() if value}


@dataclass(frozen=True)
class RowOrder:
    """The rows of a weight of transformers that a GGUF tensor has, in its order."""

    # (facts, number of rows of the weight) -> row numbers; ValueError for an impossible number of rows
    numbers: Callable[[Facts, int], list[int]]
    needs: tuple[str, ...] = ()  # fields of Facts
    # (facts, number of rows of the GGUF tensor) -> number of rows of the weight, whose other rows are in other tensors
    whole: Callable[[Facts, int], int] = lambda facts, rows: rows


@dataclass(frozen=True)
class Weight:
    """The names of one weight in both files. `{n}` is a layer, `{e}` an expert of those that GGUF stacks.

    Names are paths of modules: `.weight` and `.bias` follow in both. For a parameter without a module in transformers
    (`bare`), both are full names.
    """

    gguf: str
    hf: str  # the name in transformers' files
    rows: str = ""  # key of ROW_ORDERS; empty if the order is the same
    columns: str = ""  # the same for columns
    transposed: bool = False  # transformers' files store it as (in, out), a stack as (experts, in, out)
    heads: bool = False  # GGUF has a matrix for each head, one after the other
    heads_transposed: bool = False  # each matrix of a head is (in, out)
    bare: bool = False
    shape: str = ""  # how transformers has the same numbers: a key of SHAPES; adapters have no such tensors
    change: str = ""  # how its numbers change: a key of CHANGES; adapters have no such tensors
    types: tuple[str, ...] = ()  # the only model types that have it; empty if all do
    dense: bool | None = None  # only in models without experts, or, if False, only in those with experts


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures."""

    key: str  # of general.architecture
    model_types: tuple[str, ...]  # values of `model_type` in config.json
    weights: tuple[Weight, ...]
    wrappers: tuple[str, ...] = ()  # values of `model_type` of models with a tower beside such a language model

    def find(self, tensor: str) -> tuple[Weight, int | None] | None:
        """Return the row for a GGUF module's path, or a full name, and its layer."""
        number = re.match(r"((?:enc\.|dec\.)?blk\.)(\d{1,6})\.", tensor)
        template = tensor if number is None else f"{number[1]}{{n}}.{tensor[number.end() :]}"
        weight = next((each for each in self.weights if each.gguf == template), None)
        return None if weight is None else (weight, int(number[2]) if number else None)

    def missing_facts(self, facts: Facts, weights: Iterable[Weight] | None = None) -> tuple[str, ...]:
        """Return the unknown facts that the orders of `weights` (by default all) need."""
        used = {order for each in (self.weights if weights is None else weights) for order in (each.rows, each.columns)}
        needed = {name for order in used - {""} for name in ROW_ORDERS[order].needs}
        return tuple(sorted(name for name in needed if not getattr(facts, name)))


def by_kind(facts: Facts, rows: int) -> list[int]:
    """Return the order that puts all queries first, then keys, then values, from rows in groups of heads."""
    queries = facts.heads // facts.kv_heads if facts.kv_heads else 0
    units = facts.kv_heads * (queries + 2)
    if not queries or facts.heads % facts.kv_heads or rows % units:
        raise ValueError(f"{rows} rows are not those of {facts.heads} heads and {facts.kv_heads} of the keys")
    size = rows // units
    kinds = (range(queries), (queries,), (queries + 1,))
    return [
        (group * (queries + 2) + unit) * size + i
        for units_of in kinds
        for group in range(facts.kv_heads)
        for unit in units_of
        for i in range(size)
    ]


def every_other(first: int, rows: int) -> list[int]:
    """Return every second row, beginning with `first`."""
    if rows % 2:
        raise ValueError(f"{rows} rows are not pairs")
    return list(range(first, rows, 2))


def half(which: int, rows: int) -> list[int]:
    """Return the first or the second half of the rows."""
    if rows % 2:
        raise ValueError(f"{rows} rows do not make two halves")
    return list(range(which * rows // 2, (which + 1) * rows // 2))


def halves_if_sections(facts: Facts, rows: int) -> list[int]:
    """Return the order that turns the pairs of each head's rotated rows into halves, in models with M-RoPE alone."""
    if not facts.sections:
        return list(range(rows))
    size, rotated = facts.head_size, facts.rotated
    if not size or rows % size or not 0 < rotated <= size or rotated % 2:
        raise ValueError(f"{rows} rows are not those of heads of {size}, of which {rotated} rotate")
    order = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, size)]
    return [head + i for head in range(0, rows, size) for i in order]


def twice(facts: Facts, rows: int) -> int:
    """Return the number of rows of which a tensor has one half."""
    return 2 * rows


def of_heads(facts: Facts, rows: int, values: bool) -> list[int]:
    """Return the rows of all heads' keys without position, or values, in multi-head latent attention."""
    size = facts.nope + facts.value_size
    if rows != facts.heads * size:
        raise ValueError(f"{rows} rows are not those of {facts.heads} heads of {facts.nope} and {facts.value_size}")
    numbers = range(facts.nope, size) if values else range(facts.nope)
    return [head * size + i for head in range(facts.heads) for i in numbers]


def of_groups(facts: Facts, rows: int, gates: bool) -> list[int]:
    """Return the rows of all queries, then keys, then values, or those of the gates.

    Qwen3-Next's matrix has these four kinds for each key head, one head after the other.
    """
    keys, size = facts.linear_keys, facts.linear_key_size
    values = facts.linear_values // keys * facts.linear_value_size if keys else 0
    if not values or rows != (unit := 2 * (size + values)) * keys:
        raise ValueError(f"{rows} rows are not those of {keys} heads of keys and {facts.linear_values} of values")
    kinds = (0, size), (size, 2 * size), (2 * size, 2 * size + values), (2 * size + values, unit)
    chosen = kinds[3:] if gates else kinds[:3]
    return [key * unit + i for start, end in chosen for key in range(keys) for i in range(start, end)]


def grouped_rows(facts: Facts, rows: int) -> int:
    """Return the number of rows of the matrix of `of_groups`."""
    return 2 * (facts.linear_keys * facts.linear_key_size + facts.linear_values * facts.linear_value_size)


def tile(facts: Facts, rows: int, size: int, before: int = 0) -> list[int]:
    """Return the order that alternates between key heads; the rows before are unchanged.

    Linear attention orders value heads by key head, while ggml repeats the sequence of key heads.
    """
    keys, per_key = facts.linear_keys, facts.linear_values // facts.linear_keys if facts.linear_keys else 0
    if not per_key or rows != before + keys * per_key * size:
        raise ValueError(f"{rows} rows are not those of {facts.linear_values} heads of values")
    turns = [(key * per_key + turn) * size + i for turn in range(per_key) for key in range(keys) for i in range(size)]
    return [*range(before), *(before + number for number in turns)]


_LINEAR = ("linear_keys", "linear_values", "linear_key_size", "linear_value_size")

ROW_ORDERS: dict[str, RowOrder] = {
    "queries": RowOrder(lambda facts, rows: pairs_of_halves(facts.heads, rows), ("heads",)),
    "keys": RowOrder(lambda facts, rows: pairs_of_halves(facts.kv_heads, rows), ("kv_heads",)),
    "halves if sections": RowOrder(halves_if_sections),
    "qkv": RowOrder(by_kind, ("heads", "kv_heads")),
    "latent keys": RowOrder(lambda facts, rows: of_heads(facts, rows, False), ("heads", "nope", "value_size")),
    "latent values": RowOrder(lambda facts, rows: of_heads(facts, rows, True), ("heads", "nope", "value_size")),
    "linear heads": RowOrder(lambda facts, rows: tile(facts, rows, 1), _LINEAR),
    "linear values": RowOrder(lambda facts, rows: tile(facts, rows, facts.linear_value_size), _LINEAR),
    "linear qkv": RowOrder(
        lambda facts, rows: tile(facts, rows, facts.linear_value_size, 2 * facts.linear_keys * facts.linear_key_size),
        _LINEAR,
    ),
    "linear groups": RowOrder(lambda facts, rows: of_groups(facts, rows, False), _LINEAR, grouped_rows),
    "linear gates": RowOrder(lambda facts, rows: of_groups(facts, rows, True), _LINEAR, grouped_rows),
    "even": RowOrder(lambda _, rows: every_other(0, rows), whole=twice),
    "odd": RowOrder(lambda _, rows: every_other(1, rows), whole=twice),
    "first half": RowOrder(lambda _, rows: half(0, rows), whole=twice),
    "second half": RowOrder(lambda _, rows: half(1, rows), whole=twice),
}

# Modules that every file has, if its architecture has a row for them
NEEDED = (
    *("token_embd", "output_norm", "position_embd", "token_embd_norm", "token_types"),
    *("enc.output_norm", "dec.output_norm", "altup_proj", "altup_unembd_proj"),
)

# Last names of tensors with inputs of the model's width (last dimension), and with outputs of it (first dimension)
READS = frozenset(
    """token_embd output output_norm attn_norm ffn_norm post_attention_norm post_ffw_norm attn_q attn_k attn_v attn_qkv
    attn_q_a attn_kv_a_mqa ffn_gate ffn_up ffn_gate_inp ffn_gate_exps ffn_up_exps ffn_gate_shexp ffn_up_shexp
    enorm hnorm shared_head_norm shared_head_head embed_tokens""".split()
)
WRITES = frozenset("attn_output ffn_down ffn_down_exps ffn_down_shexp eh_proj".split())

# Prefixes of transformers' modules that no GGUF file has: BERT's
NOT_IN_GGUF = ("pooler.",)

# Other shapes of the numbers of a matrix
SHAPES = {
    "experts": "one matrix with the rows of all experts",
    "heads": "(1, 1, heads, 1)",
    "kernel": "(channels, 1, width), of a convolution over each channel",
    "vector": "one dimension",
}

# Functions from the numbers of transformers' tensor to those of GGUF's
CHANGES = {"plus one": "w + 1, of Gemma's norms", "minus exp": "-exp(w), of Mamba's A_log"}
