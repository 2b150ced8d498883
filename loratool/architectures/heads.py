"""Tell how many attention heads a model has by its config.json, and in which order their rows are for the rotation.

transformers rotates row i of a head with row i + half: a head is its two halves (x0, x1, ..., y0, y1, ...). llama.cpp's
`LLAMA_ROPE_TYPE_NORM`, torchtune's and Meta's own files rotate row 2i with the next: pairs (x0, y0, x1, y1, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LARGEST = 1 << 16  # no model has as many heads or experts, or rows of a head

# Fields of config.json, of which the first that is there counts
QUERIES = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")

# model_type -> the field with which KEYS count; without it all queries share one head unless `multi_query` is false
MULTI_QUERY = {"falcon": "new_decoder_architecture", "gpt_bigcode": None}


@dataclass(frozen=True)
class Heads:
    """The heads of a model; 0 for what is not known."""

    queries: int = 0
    keys: int = 0  # and of the values
    size: int = 0  # rows of each


def heads_of(config: Mapping[str, Any]) -> Heads:
    """Return what a config.json tells of the heads, the one of the nested language model first."""
    fields = text_fields(config)
    queries, model_type = first_count(fields, *QUERIES), str(fields.get("model_type"))
    size = first_count(fields, "head_dim") or (first_count(fields, "hidden_size") // queries if queries else 0)
    if model_type in MULTI_QUERY and not fields.get(MULTI_QUERY[model_type] or ""):
        return Heads(queries, 1 if fields.get("multi_query", True) else queries, size)
    says_keys = any(fields.get(name) for name in KEYS)
    return Heads(queries, first_count(fields, *KEYS) if says_keys else queries, size)


def text_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json, those of the language model nested in it first."""
    text = config.get("text_config")
    return {**config, **(text if isinstance(text, Mapping) else {})}


def first_count(fields: Mapping[str, Any], *names: str) -> int:
    """Return the first of some fields that is there; 0 if none is, or if it counts nothing."""
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
