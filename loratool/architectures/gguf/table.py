"""Define the rows of the tables: `Architecture`, `Weight`, and the orders of rows (`RowOrder`).

All functions count rows of one matrix; a stack of experts has the same order in each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..heads import LARGEST, first_count, heads_of, pairs_of_halves, text_fields
from ..ties import UNTIED_BY_DEFAULT

# Facts beside the heads -> the fields of config.json, of which the first that is there tells it
_FIELDS = {
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "nope": ("qk_nope_head_dim",),
    "value_size": ("v_head_dim",),
    "linear_keys": ("linear_num_key_heads",),
    "linear_values": ("linear_num_value_heads",),
    "linear_key_size": ("linear_key_head_dim",),
    "linear_value_size": ("linear_value_head_dim",),
}


@dataclass(frozen=True)
class Facts:
    """The facts of one model that the orders of its rows follow from; 0 for what is not known."""

    heads: int = 0  # of the queries
    kv_heads: int = 0  # of the keys and values
    experts: int = 0
    nope: int = 0  # rows of each head's keys without position (multi-head latent attention)
    value_size: int = 0  # rows of each head's values there
    linear_keys: int = 0  # heads of the keys of linear attention
    linear_values: int = 0
    linear_key_size: int = 0  # rows of each
    linear_value_size: int = 0
    tied: bool = False  # the head is the embedding, and the file has it once

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Facts:
        """Return those that a config.json tells, the one of the nested language model first."""
        fields, heads = text_fields(config), heads_of(config)
        found = {fact: first_count(fields, *names) for fact, names in _FIELDS.items()}
        tied = fields.get("tie_word_embeddings", fields.get("model_type") not in UNTIED_BY_DEFAULT)
        return cls(heads.queries, heads.keys, **found, tied=tied is True)

    @classmethod
    def of_metadata(cls, key: str, fields: Mapping[str, Any]) -> Facts:
        """Return those that the fields of a GGUF file of the architecture `key` tell."""

        def number(name: str, default: int = 0) -> int:
            value = fields.get(f"{key}.{name}", default)
            each = [*value] if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            found = each[0] if each and each.count(each[0]) == len(each) else 0  # one for each layer, if all are alike
            return found if type(found) is int and 0 < found < LARGEST else 0

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
    """Say which rows of a weight of transformers a GGUF tensor has, in its order."""

    # (facts, rows of the weight) -> their numbers; ValueError if there cannot be so many rows
    numbers: Callable[[Facts, int], list[int]]
    needs: tuple[str, ...] = ()  # fields of Facts
    parts: int = 1  # GGUF tensors of equal size that have the rows of one weight


@dataclass(frozen=True)
class Weight:
    """Name one weight in both files. `{n}` is a layer, `{e}` an expert of those that GGUF stacks.

    Names are paths of modules: `.weight` and `.bias` follow in both. Of a parameter that has no module in
    transformers, `bare`, both are the whole names.
    """

    gguf: str
    hf: str  # as transformers' files have it
    rows: str = ""  # key of ROW_ORDERS; empty if they are the same
    columns: str = ""  # the same of its columns
    turned: bool = False  # transformers' files store it as (in, out), a stack as (experts, in, out)
    heads: bool = False  # GGUF has a matrix for each head, one after the other
    crossed: bool = False  # and each is (in, out)
    bare: bool = False
    change: str = ""  # what else is done to its numbers: a key of CHANGES; adapters have none of these tensors


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures."""

    key: str  # of general.architecture
    model_types: tuple[str, ...]  # `model_type` of the config.json whose models it is for
    weights: tuple[Weight, ...]
    wrappers: tuple[str, ...] = ()  # the same of models with a tower beside such a language model

    def find(self, tensor: str) -> tuple[Weight, int | None] | None:
        """Return the row of a GGUF module's path, or of a whole name, and its layer."""
        number = re.match(r"blk\.(\d{1,6})\.", tensor)
        template = tensor if number is None else "blk.{n}." + tensor[number.end() :]
        weight = next((each for each in self.weights if each.gguf == template), None)
        return None if weight is None else (weight, int(number[1]) if number else None)

    def lacks(self, facts: Facts, weights: Iterable[Weight] | None = None) -> tuple[str, ...]:
        """Return the facts that orders need, of all its weights or of some, and that are not known."""
        used = {order for each in (self.weights if weights is None else weights) for order in (each.rows, each.columns)}
        needed = {name for order in used - {""} for name in ROW_ORDERS[order].needs}
        return tuple(sorted(name for name in needed if not getattr(facts, name)))


def by_kind(facts: Facts, rows: int) -> list[int]:
    """Return the order in which the rows of queries, keys and values of each group of heads come kind by kind."""
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
    """Return every second row."""
    if rows % 2:
        raise ValueError(f"{rows} rows are not two by two")
    return list(range(first, rows, 2))


def half(which: int, rows: int) -> list[int]:
    """Return the first half of the rows, or the second."""
    if rows % 2:
        raise ValueError(f"{rows} rows are no two halves")
    return list(range(which * rows // 2, (which + 1) * rows // 2))


def of_heads(facts: Facts, rows: int, values: bool) -> list[int]:
    """Return the rows of each head's keys without position, or of its values, of multi-head latent attention."""
    size = facts.nope + facts.value_size
    if rows != facts.heads * size:
        raise ValueError(f"{rows} rows are not those of {facts.heads} heads of {facts.nope} and {facts.value_size}")
    own = range(facts.nope, size) if values else range(facts.nope)
    return [head * size + i for head in range(facts.heads) for i in own]


def tile(facts: Facts, rows: int, size: int, before: int = 0) -> list[int]:
    """Return the order in which the value heads of each key head take turns, after rows that stay where they are.

    Linear attention has them key head by key head, and ggml repeats the key heads one after the other.
    """
    keys, each = facts.linear_keys, facts.linear_values // facts.linear_keys if facts.linear_keys else 0
    if not each or rows != before + keys * each * size:
        raise ValueError(f"{rows} rows are not those of {facts.linear_values} heads of values")
    turns = [(key * each + turn) * size + i for turn in range(each) for key in range(keys) for i in range(size)]
    return [*range(before), *(before + number for number in turns)]


_LINEAR = ("linear_keys", "linear_values", "linear_key_size", "linear_value_size")

ROW_ORDERS: dict[str, RowOrder] = {
    "queries": RowOrder(lambda facts, rows: pairs_of_halves(facts.heads, rows), ("heads",)),
    "keys": RowOrder(lambda facts, rows: pairs_of_halves(facts.kv_heads, rows), ("kv_heads",)),
    "qkv": RowOrder(by_kind, ("heads", "kv_heads")),
    "latent keys": RowOrder(lambda facts, rows: of_heads(facts, rows, False), ("heads", "nope", "value_size")),
    "latent values": RowOrder(lambda facts, rows: of_heads(facts, rows, True), ("heads", "nope", "value_size")),
    "linear heads": RowOrder(lambda facts, rows: tile(facts, rows, 1), _LINEAR),
    "linear values": RowOrder(lambda facts, rows: tile(facts, rows, facts.linear_value_size), _LINEAR),
    "linear qkv": RowOrder(
        lambda facts, rows: tile(facts, rows, facts.linear_value_size, 2 * facts.linear_keys * facts.linear_key_size),
        _LINEAR,
    ),
    "even": RowOrder(lambda _, rows: every_other(0, rows), parts=2),
    "odd": RowOrder(lambda _, rows: every_other(1, rows), parts=2),
    "first half": RowOrder(lambda _, rows: half(0, rows), parts=2),
    "second half": RowOrder(lambda _, rows: half(1, rows), parts=2),
}

# Modules that every file has of those that its architecture has a row for
NEEDED = ("token_embd", "output_norm", "position_embd", "token_embd_norm", "token_types")

# Last names of tensors that read states of the model's width (their last dimension), and that write them (the first)
READS = frozenset(
    """token_embd output output_norm attn_norm ffn_norm post_attention_norm post_ffw_norm attn_q attn_k attn_v attn_qkv
    attn_q_a attn_kv_a_mqa ffn_gate ffn_up ffn_gate_inp ffn_gate_exps ffn_up_exps ffn_gate_shexp ffn_up_shexp""".split()
)
WRITES = frozenset("attn_output ffn_down ffn_down_exps ffn_down_shexp".split())

# What the names of those modules of transformers begin with that no file has: BERT's
NOT_IN_GGUF = ("pooler.",)

# What the numbers of a GGUF tensor are of those of transformers
CHANGES = {"plus one": "w + 1, of Gemma's norms", "minus exp": "-exp(w), of Mamba's A_log"}
