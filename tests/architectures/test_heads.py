"""Hold the heads that config.json tells, and the two orders of a head's rows, over written examples."""

from __future__ import annotations

from typing import Any

import pytest

from loratool.architectures.heads import Heads, halves_of_pairs, heads_of, pairs_of_halves


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Heads()),
        ({"num_attention_heads": 4, "hidden_size": 12}, Heads(4, 4, 3)),
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 12, "head_dim": 8}, Heads(4, 2, 8)),
        ({"num_attention_heads": 9, "text_config": {"num_attention_heads": 4}}, Heads(4, 4)),
        ({"n_head": 4}, Heads(4, 4)),
        ({"num_attention_heads": 4, "num_key_value_heads": "2"}, Heads(4)),
        ({"num_attention_heads": True, "head_dim": 1 << 40}, Heads()),
        ({"model_type": "falcon", "num_attention_heads": 4, "num_kv_heads": 4}, Heads(4, 1)),
        ({"model_type": "falcon", "num_attention_heads": 4, "num_kv_heads": 2, "multi_query": False}, Heads(4, 4)),
        (
            {"model_type": "falcon", "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True},
            Heads(4, 2),
        ),
        ({"model_type": "gpt_bigcode", "n_head": 4}, Heads(4, 1)),
        ({"model_type": "gpt_bigcode", "n_head": 4, "multi_query": False}, Heads(4, 4)),
    ],
)
def test_heads_are_those_that_config_json_tells(config: dict[str, Any], expected: Heads) -> None:
    assert heads_of(config) == expected


def test_rows_of_two_heads_change_their_order_both_ways() -> None:
    halves = ["x0", "x1", "y0", "y1", "v0", "v1", "w0", "w1"]
    pairs = ["x0", "y0", "x1", "y1", "v0", "w0", "v1", "w1"]
    assert [halves[i] for i in pairs_of_halves(2, 8)] == pairs
    assert [pairs[i] for i in halves_of_pairs(2, 8)] == halves


@pytest.mark.parametrize(("heads", "rows"), [(0, 8), (3, 8), (2, 6), (1, 0)])
def test_rows_that_are_no_heads_have_no_order(heads: int, rows: int) -> None:
    for order in (pairs_of_halves, halves_of_pairs):
        with pytest.raises(ValueError, match=f"{rows} rows are not those of {heads} heads"):
            order(heads, rows)
