"""Group modules as people see a model: by what its blocks hold, each module counted once."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest

from loratool.views.parts import quantities as q
from loratool.views.parts.columns import choose_columns, lay_out, text_width
from loratool.views.parts.document import Column, Row, TextTable, text_of
from loratool.views.parts.numbers import measure, share
from loratool.views.parts.places import find_place
from loratool.views.parts.rows import MAX_GROUPS, Category, Issue, Measure, far_from_siblings, times
from loratool.views.parts.table import GroupColumns, make_table

WIDTHS = (60, 80, 120)


@dataclass(frozen=True)
class Module:
    name: str
    shape: str
    norm: float | None
    rank: int = 16


COLUMNS = (
    Category[Module](q.SHAPE, lambda m: m.shape, priority=6, right=True),
    Category[Module](q.RANK, lambda m: str(m.rank), priority=5, right=True, alone=True),
    Measure[Module](q.DELTA, lambda m: m.norm, measure, priority=1, watched=True, drawn=True),
)


def llama(layers: int = 32) -> Iterator[Module]:
    kinds = {"self_attn": "q_proj k_proj v_proj o_proj", "mlp": "gate_proj up_proj down_proj"}
    norms = random.Random(0)
    for layer in range(layers):
        for parent, names in kinds.items():
            for name in names.split():
                norm = (0.5 + layer / layers) * norms.uniform(0.9, 1.1)
                yield Module(f"model.layers.{layer}.{parent}.{name}", f"{len(parent)}x64", norm)


def deepseek() -> Iterator[Module]:
    """27 - 10 layers, of which the first is dense; the others have 64 experts and shared ones."""
    norms = random.Random(1)
    for layer in range(17):
        names = [f"self_attn.{name}" for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
        mlps = ["mlp"] if layer == 0 else [f"mlp.experts.{e}" for e in range(64)] + ["mlp.shared_experts"]
        names += [f"{mlp}.{name}" for mlp in mlps for name in ("gate_proj", "up_proj", "down_proj")]
        yield from (Module(f"model.layers.{layer}.{name}", "8x8", norms.uniform(0.08, 0.1)) for name in names)


# diffusers' UNet of SDXL: how many transformer blocks each of its attentions has
ATTENTIONS = {
    "down_blocks_1_attentions_": (2, 2),
    "down_blocks_2_attentions_": (2, 10),
    "mid_block_attentions_": (1, 10),
    "up_blocks_0_attentions_": (3, 10),
    "up_blocks_1_attentions_": (3, 2),
}
IN_A_BLOCK = [f"attn{i}_to_{p}" for i in (1, 2) for p in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]


def sdxl() -> Iterator[Module]:
    norms = random.Random(2)
    names = []
    for prefix, (attentions, blocks) in ATTENTIONS.items():
        for i in range(attentions):
            names += [f"lora_unet_{prefix}{i}_{end}" for end in ("proj_in", "proj_out")]
            inner = f"lora_unet_{prefix}{i}_transformer_blocks_"
            names += [f"{inner}{b}_{end}" for b in range(blocks) for end in IN_A_BLOCK]
    for te, layers in (("te1", 12), ("te2", 32)):
        ends = [f"self_attn_{p}_proj" for p in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
        names += [f"lora_{te}_text_model_encoder_layers_{i}_{end}" for i in range(layers) for end in ends]
    yield from (Module(name, "64x64", norms.uniform(0.02, 0.04)) for name in names)


MODELS = {"llama": (list(llama()), 224), "deepseek": (list(deepseek()), 3191), "sdxl": (list(sdxl()), 986)}


def table(modules: Sequence[Module], verbose: bool = False) -> TextTable:
    return make_table(modules, COLUMNS, GroupColumns(layers=2, by_layer=3, count=4), find_issue=issue, verbose=verbose)


def issue(module: Module) -> Issue | None:
    return Issue(1, "delta is 0") if module.norm == 0 else None


def counted(found: TextTable) -> int:
    titles = [column.title for column in found.columns]
    at = titles.index("count") if "count" in titles else None
    counts = [1 if at is None else int(str(row.cells[at]).replace(",", "")) for row in found.rows]
    return sum(counts) + sum(len(row.issues) for row in found.rows)


@pytest.mark.parametrize("name", MODELS)
class TestModels:
    def test_every_module_is_counted_once(self, name: str) -> None:
        modules, count = MODELS[name]
        assert len(modules) == count
        found = table(modules)
        assert counted(found) == count and len(found.rows) <= MAX_GROUPS
        assert not any(row.issues for row in found.rows)

    @pytest.mark.parametrize("width", WIDTHS)
    @pytest.mark.parametrize("plain", [False, True])
    def test_no_line_is_wider_and_no_name_is_cut(self, name: str, width: int, plain: bool) -> None:
        found = table(MODELS[name][0])
        lines = [text_of(spans) for spans in lay_out(found, width, plain, 20)]
        assert max(map(text_width, lines)) <= width and len(lines) <= 20
        starts = {line.split("  ")[0] for line in lines}
        assert {str(row.cells[0]) for row in found.rows} <= starts
        assert not plain or all(line.isascii() for line in lines)

    def test_with_verbose_each_has_a_line_with_its_whole_name(self, name: str) -> None:
        modules, count = MODELS[name]
        lines = lay_out(table(modules, verbose=True))
        assert len(lines) == count + 1
        names = sorted((m.name for m in modules), key=lambda name: re.sub(r"\d+", lambda n: n[0].zfill(9), name))
        assert [text_of(spans).split()[0] for spans in lines[1:]] == names

    def test_the_faults_that_are_planted_are_found_and_no_other(self, name: str) -> None:
        modules, count = list(MODELS[name][0]), MODELS[name][1]
        places = [7, count // 2, count - 2]
        for place, factor in zip(places, (6.0, 1 / 12, 0.0), strict=True):
            modules[place] = replace(modules[place], norm=(modules[place].norm or 0) * factor)
        modules[30] = replace(modules[30], rank=32)
        found = table(modules)
        told = {issue.name: issue.reason for row in found.rows for issue in row.issues}
        assert set(told) == {modules[i].name for i in (*places, 30)} and counted(found) == count
        assert re.match(r"[45678]\.\d\dx ", told[modules[7].name])
        assert re.match(r"1/(\d\.\d\d|1\d\.\d) of ", told[modules[places[1]].name])
        assert told[modules[places[2]].name] == "delta is 0" and told[modules[30].name] == "rank 32, else 16"


def test_the_rows_of_a_model_stand_as_it_runs() -> None:
    names = [str(row.cells[0]) for row in table(MODELS["deepseek"][0]).rows]
    attention = ["self_attn.q_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.o_proj"]
    assert names[:4] == attention and names[4:7] == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names[7:10] == [f"mlp.shared_experts.{end}" for end in ("gate_proj", "up_proj", "down_proj")]
    assert names[10:] == [f"mlp.experts.{{0-63}}.{end}" for end in ("gate_proj", "up_proj", "down_proj")]
    assert [row.cells[0] for row in table(MODELS["sdxl"][0]).rows] == [
        "unet attn1", "unet attn2", "unet ff", "unet proj_in, proj_out",
        "te1 self_attn", "te1 mlp", "te2 self_attn", "te2 mlp",
    ]  # fmt: skip


def test_two_stacks_have_names_of_their_own() -> None:
    modules = [Module(f"model.{stack}.layers.{i}.fc1", "8x8", 1.0) for stack in ("encoder", "decoder") for i in (0, 1)]
    assert [row.cells[:2] for row in table(modules).rows] == [("encoder fc1", "0-1"), ("decoder fc1", "0-1")]


def test_embeddings_come_first_and_norms_and_head_last() -> None:
    names = ["lm_head", "model.norm", "model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    found = table([Module(name, "8x8", 1.0) for name in names])
    assert [row.cells[0] for row in found.rows] == ["model.embed_tokens", "mlp.up_proj", "model.norm", "lm_head"]


def test_what_more_than_a_third_have_is_no_outlier() -> None:
    modules = [replace(m, norm=0.0) if i % 2 else m for i, m in enumerate(m for m in llama() if "q_proj" in m.name)]
    found = table(modules)
    assert [row.issues for row in found.rows] == [()] and counted(found) == 32


def test_issues_that_have_no_room_are_counted() -> None:
    modules = [replace(m, norm=0.0) if i % 4 == 0 else m for i, m in enumerate(llama())]
    lines = [text_of(spans) for spans in lay_out(table(modules), 80, room=12)]
    assert len(lines) == 12 and sum(line.startswith("! model") for line in lines) == 3
    assert lines[-1] == "! and 53 more: -v shows them"
    assert sum(text_of(spans).startswith("! model") for spans in lay_out(table(modules), 80)) == 56


def test_what_is_far_from_the_median() -> None:
    spread = [math.exp((i - 10) / 20) for i in range(21)]  # from 0.6 to 1.6 times the median
    assert far_from_siblings(spread) == {}
    assert far_from_siblings([*spread, 40.0]).keys() == {21}
    assert far_from_siblings([1.0, 1.0, 9.0]) == {}, "too few for a median to mean anything"
    assert far_from_siblings([*spread, 0.0, None]) == {}, "what has no logarithm is told by itself"
    assert times(6.4) == "6.40x" and times(1 / 12) == "1/12.0 of"


def test_a_trend_over_depth_neither_counts_nor_hides_anything() -> None:
    rising = [0.5 + i / 24 for i in range(24)]
    steep = [2.0**i for i in range(0, 12)]
    assert far_from_siblings(rising, by_depth=True) == far_from_siblings(steep, by_depth=True) == {}
    for place in range(24):
        for factor in (6.0, 1 / 6):
            planted = [*rising[:place], rising[place] * factor, *rising[place + 1 :]]
            assert far_from_siblings(planted, by_depth=True).keys() == {place}


def test_columns_are_chosen_by_priority_as_long_as_they_fit() -> None:
    assert choose_columns([10, 5, 20, 5], [0, 0, 1, 2], 30) == [0, 1, 3], "a later one may still fit"
    assert choose_columns([40, 5], [0, 0], 30) == [0], "the name is always there"


@pytest.mark.parametrize(
    ("name", "stack", "layer", "tail", "parent"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers", 3, "self_attn.q_proj", "self_attn"),
        ("transformer.h.11.attn.c_attn", "h", 11, "attn.c_attn", "attn"),
        ("encoder.block.2.layer.1.DenseReluDense.wi_0", "encoder.block", 2, "DenseReluDense.wi_0", "DenseReluDense"),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q", "", None, "attn1_to_q", "attn1"),
        ("lora_unet_input_blocks_4_1_proj_in", "", None, "proj_in", "input_blocks"),
        ("lora_unet_down_blocks_0_resnets_1_conv1", "", None, "conv1", "resnets"),
        ("lora_unet_double_blocks_7_img_attn_qkv", "double_blocks", 7, "img_attn_qkv", "img_attn"),
        ("unet/up_blocks.0.attentions.2.transformer_blocks.9.ff.net.0.proj.weight", "", None, "ff.net.#.proj", "ff"),
        ("blk.5.ffn_up.weight", "blk", 5, "ffn_up", ""),
    ],
)
def test_where_a_module_stands(name: str, stack: str, layer: int | None, tail: str, parent: str) -> None:
    place = find_place(name)
    assert (place.stack, place.layer, "#".join(place.tail).strip("._"), place.parent) == (stack, layer, tail, parent)


def test_the_strip_is_over_layers_and_its_title_has_its_scale() -> None:
    found = make_table(
        [Module(f"model.layers.{i}.mlp.up_proj", "8x8", i / 1000) for i in range(48)],
        [Measure[Module](q.DELTA_OVER_W, lambda m: m.norm, share, priority=1, drawn=True)],
        GroupColumns(by_layer=2),
    )
    lines = [text_of(spans) for spans in lay_out(found, 80)]
    assert "by layer (█ 4.70%)" in lines[0] and "▁▁▁▂▂▂▃▃▃▄▄▄▅▅▅▆▆▆▇▇▇███" in lines[1]
    assert "@ 4.70%" in text_of(lay_out(found, 80, plain=True)[0])
    assert "by layer" not in text_of(lay_out(found)[0]), "a pipe gets no pictures"


def test_what_is_odd_in_one_way_or_another_leaves_no_group_behind() -> None:
    """Of four modules each is alone with a rank or a scale of its own."""
    columns = [
        Category[Module](
            q.Quantity(f"field {i}", "a word"),
            lambda m, i=i: "odd" if m.name.endswith(f"{i}.x") else "same",  # type: ignore[misc]
            alone=True,
        )
        for i in range(4)
    ]
    modules = [Module(f"layers.{i}.x", "8x8", 1.0) for i in range(4)]
    found = make_table(modules, columns)
    assert counted(found) == 4


@pytest.mark.parametrize("width", [40, 60])
def test_words_wider_than_a_line_stand_below_their_rows_and_the_names_stay(width: int) -> None:
    told = "the change is 50 times what it should be, and its sign is the other one"
    columns = (Column("module"), Column("what", 0, False), Column("layers", 1, False))
    rows = (Row(("q_proj", told, "0-31")), Row(("k_proj", told, "0-31")), Row(("v_proj", "it is not there", "17")))
    lines = [text_of(spans) for spans in lay_out(TextTable(columns, rows), width)]
    assert [line for line in lines if not line.startswith(" ")] == [
        "module  layers", "q_proj  0-31", "k_proj  0-31", "v_proj  17"
    ]  # fmt: skip
    assert max(map(text_width, lines)) <= width
    below = " ".join(line.strip() for line in lines if line.startswith(" "))
    assert below == f"{told} it is not there", "what holds for both is told once"
