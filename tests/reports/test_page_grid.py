"""The grid of a page: each row stands once, in the column of its layer and the row of its kind."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from loratool.reports.page.grid import NOWHERE, Grid, make_grids
from loratool.reports.rows import make_items


def grids(names: Sequence[str], layers: Sequence[Sequence[int]] | None = None) -> list[Grid]:
    return make_grids(make_items(names, str, (), lambda _: None), layers)


def read(grid: Grid, names: Sequence[str]) -> dict[tuple[str, str], str]:
    """Return (column, row) -> name."""
    return {(grid.columns[x], grid.rows[y]): names[i] for i, x, y in grid.cells}


def test_a_language_model_has_a_column_a_layer_in_their_order() -> None:
    names = [f"model.layers.{i}.{kind}.weight" for i in (10, 2, 0) for kind in ("mlp.down_proj", "self_attn.q_proj")]
    (grid,) = grids([*names, "lm_head.weight"])
    assert (grid.x, grid.y) == ("layer", "kind")
    assert grid.columns == (NOWHERE, "0", "2", "10")
    assert grid.rows == ("self_attn.q_proj", "mlp.down_proj", "lm_head")
    assert read(grid, [*names, "lm_head.weight"])["2", "mlp.down_proj"] == "model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize(("count", "parts"), [(3, 1), (4, 2)])
def test_modules_that_a_layer_has_many_of_are_a_part_with_a_row_a_number(count: int, parts: int) -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(2) for e in range(count)]
    names += [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    found = grids(names)
    assert len(found) == parts
    assert sum(len(grid.cells) for grid in found) == len(names)
    if parts == 2:
        experts, others = found
        assert (experts.label, experts.y) == ("mlp.experts.*.up_proj", "expert")
        assert experts.rows == ("0", "1", "2", "3")
        assert others.rows == ("self_attn.q_proj",)
        assert read(experts, names)["1", "3"] == "model.layers.1.mlp.experts.3.up_proj"
    else:
        assert "mlp.experts.2.up_proj" in found[0].rows


@pytest.mark.parametrize("flat", [False, True])
def test_a_unet_has_its_blocks_as_columns_and_each_text_encoder_is_a_part(flat: bool) -> None:
    blocks = ["down_blocks.1.attentions.0", "down_blocks.2.attentions.1", "mid_block.attentions.0"]
    names = [f"unet/{b}.transformer_blocks.0.attn1.{kind}" for b in blocks for kind in ("to_q", "to_out.0")]
    names += [f"text_encoder/text_model.encoder.layers.{i}.self_attn.q_proj" for i in range(2)]
    if flat:
        kohya = {"unet/": "lora_unet_", "text_encoder/": "lora_te1_"}
        names = [kohya[n.partition("/")[0] + "/"] + n.partition("/")[2].replace(".", "_") for n in names]
    unet, encoder = grids(names)
    assert unet.x == "block"
    assert unet.columns == ("down 1.0.0", "down 2.1.0", "mid 0.0")
    assert unet.rows == (("attn1_to_q", "attn1_to_out_0") if flat else ("attn1.to_q", "attn1.to_out.0"))
    assert encoder.x == "layer" and encoder.columns == ("0", "1") and encoder.label


def test_a_row_of_several_layers_has_a_cell_in_each() -> None:
    names = ["blk.{0..2}.ffn_down.weight", "blk.{3,5}.ffn_down.weight", "token_embd.weight"]
    (grid,) = grids(names, [(0, 1, 2), (3, 5), ()])
    assert grid.columns == (NOWHERE, "0", "1", "2", "3", "5")
    assert read(grid, names) == {
        **{(str(i), "ffn_down"): names[0] for i in range(3)},
        **{(str(i), "ffn_down"): names[1] for i in (3, 5)},
        (NOWHERE, "token_embd"): names[2],
    }


def test_every_row_has_a_cell_whatever_its_name() -> None:
    names = ["", ".", "7", "a.b", "{", "x.{0..1}", "layers.3", "layers.3.4.5", "\x00", "a" * 4000, "unet/", "..1.."]
    found = grids(names)
    assert sorted(i for grid in found for i, _, _ in grid.cells) == list(range(len(names)))
    for grid in found:
        assert all(x < len(grid.columns) and y < len(grid.rows) for _, x, y in grid.cells)
