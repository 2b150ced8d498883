"""The number of a model's attention heads by its config.json, and the orders of their rows for rotation.

transformers rotates row i of a head with row i + half: a head is two halves (x0, x1, ..., y0, y1, ...). llama.cpp's
`LLAMA_ROPE_TYPE_NORM`, torchtune's and Meta's files rotate row 2i with the next: pairs (x0, y0, x1, y1, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LARGEST = 1 << 16  # more heads, experts or rows of a head than any model has

# Fields of config.json; the first one present counts
QUERIES = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")

# model_type -> the field that enables KEYS; without it all queries share one head unless `multi_query` is false
MULTI_QUERY = {"falcon": "new_decoder_architecture", "gpt_bigcode": None}


@dataclass(frozen=True)
class Heads:
    """The heads of a model; 0 if unknown."""

    queries: int = 0
    keys: int = 0  # heads of keys and of values
    size: int = 0  # rows of each head


def heads_of(config: Mapping[str, Any]) -> Heads:
    """Return the heads by a config.json; a nested language model has precedence."""
    fields = text_fields(config)
    queries, model_type = first_count(fields, *QUERIES), str(fields.get("model_type"))
    size = first_count(fields, "head_dim") or (first_count(fields, "hidden_size") // queries if queries else 0)
    if model_type in MULTI_QUERY and not fields.get(MULTI_QUERY[model_type] or ""):
        return Heads(queries, 1 if fields.get("multi_query", True) else queries, size)
    says_keys = any(fields.get(name) for name in KEYS)
    return Heads(queries, first_count(fields, *KEYS) if says_keys else queries, size)


def text_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json; those of a nested language model have precedence."""
    text = config.get("text_config")
    return {**config, **(text if isinstance(text, Mapping) else {})}


def first_count(fields: Mapping[str, Any], *names: str) -> int:
    """Return the first of some fields that is present; 0 if none is, or if it is not a count."""
    value = next((value for name in names if (value := fields.get(name)) is not None), 0)
    return value if type(value) is int and 0 < value < LARGEST else 0


def pairs_of_halves(heads: int, rows: int) -> list[int]:
    """Return the numbers of the rows in the order of pairs, where they are in halves.

    Raises:
        ValueError: so many rows are not those of so many heads.
    """
    half = _half(heads, rows)
    return [2 * head * half + side * half + i for head in range(heads) for i in range(half) for side in (0, 1)]


def halves_of_pairs(heads: int, rows: int) -> list[int]:
    """Return the numbers of the rows in the order of halves, where they are in pairs.

    Raises:
        ValueError: so many rows are not those of so many heads.
    """
    half = _half(heads, rows)
    return [2 * head * half + 2 * i + side for head in range(heads) for side in (0, 1) for i in range(half)]


def _half(heads: int, rows: int) -> int:
    if not heads or not rows or rows % (2 * heads):
        raise ValueError(f"{rows} rows are not those of {heads} heads")
    return rows // heads // 2
