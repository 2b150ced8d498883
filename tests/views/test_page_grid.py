"""The grid of a page: each row stands once, in the column of its layer and the row of its kind."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from loratool.views.page.grid import NOWHERE, Grid, make_grids
from loratool.views.parts.rows import make_items


def grids(names: Sequence[str], members: Sequence[Sequence[str]] | None = None) -> list[Grid]:
    return make_grids(make_items(names, names, (), lambda _: None), members)


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


def test_a_row_of_several_modules_has_a_cell_in_each_of_their_layers() -> None:
    rows = {
        "decoder.block.{0..2}.layer.0.q.weight": [f"decoder.block.{i}.layer.0.q.weight" for i in range(3)],
        "decoder.block.{0..1}.layer.{0..4}.n": [f"decoder.block.{i}.layer.{j}.n" for i in range(2) for j in range(5)],
        "encoder.block.{3,5}.layer.0.q.weight": [f"encoder.block.{i}.layer.0.q.weight" for i in (3, 5)],
        "shared.weight": ["shared.weight"],
    }
    names = list(rows)
    decoder, encoder, others = grids(names, list(rows.values()))
    assert read(decoder, names) == {
        **{(str(i), "layer.0.q"): names[0] for i in range(3)},
        **{(str(i), "layer.{0-4}.n"): names[1] for i in range(2)},
    }
    assert read(encoder, names) == {(str(i), "layer.0.q"): names[2] for i in (3, 5)}
    assert read(others, names) == {(NOWHERE, "shared"): names[3]}


def test_a_row_of_several_modules_of_a_unet_has_a_cell_in_each_of_their_blocks() -> None:
    names = ["input_blocks.{1..2}.{0..1}.in_layers.2", "output_blocks.7.0.in_layers.2"]
    (grid,) = grids(names, [[f"input_blocks.{i}.{j}.in_layers.2" for i in (1, 2) for j in (0, 1)], [names[1]]])
    blocks = ("input 1.0", "input 1.1", "input 2.0", "input 2.1")
    assert read(grid, names) == {
        **{(block, "in_layers.2"): names[0] for block in blocks},
        ("output 7.0", "in_layers.2"): names[1],
    }


HIDING = {  # names of one kind in one block or layer -> their rows
    ("layers.0.a.weight", "layers.0.a", "layers.00.a", "layers.0.b"): None,
    ("h.0.q", "h.00.q", "h.0.h.0.q"): None,
    ("unet.down.0.x.1.spatial.0.q", "unet.down.0.x.1.temporal.0.q"): (
        "down.*.x.*.spatial.*.q",
        "down.*.x.*.temporal.*.q",
    ),
    ("lora_unet_down_0_x_1_q", "lora_unet_down_0_y_1_q"): ("down_*_x_*_q", "down_*_y_*_q"),
    ("encoder.up_blocks.0.conv", "encoder.down_blocks.0.conv"): (
        "encoder.up_blocks.*.conv",
        "encoder.down_blocks.*.conv",
    ),
    tuple(f"h.0.e.{number}.q" for number in ("0", "1", "2", "3", "03")): None,
}


@pytest.mark.parametrize("names", HIDING)
def test_no_cell_hides_another(names: tuple[str, ...]) -> None:
    found = grids(names)
    assert sum(len(read(grid, names)) for grid in found) == len(names)
    if rows := HIDING[names]:
        assert found[0].rows == rows


def test_every_row_has_a_cell_whatever_its_name() -> None:
    names = ["", ".", "7", "a.b", "{", "x.{0..1}", "layers.3", "layers.3.4.5", "\x00", "a" * 4000, "unet/", "..1.."]
    found = grids(names)
    assert sorted(i for grid in found for i, _, _ in grid.cells) == list(range(len(names)))
    for grid in found:
        assert all(x < len(grid.columns) and y < len(grid.rows) for _, x, y in grid.cells)
