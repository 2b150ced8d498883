"""Add a family in one table and one row, and see it in convert and merge; hold every table to itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.architectures.families import ENCODERS, FAMILIES, LAYOUTS, lookup
from loratool.architectures.families.detect import detect
from loratool.architectures.families.lookup import locate, names_of, parts_of
from loratool.architectures.families.table import Block, Component, Fused, ModelFamily, Run, swapped

WIDTH, RANK = 6, 2
TOY = ModelFamily(
    key="toy",
    title="Toy",
    blocks=(
        Block(
            "stages.{i}",
            "transformer_layers.{i}",
            {
                "mix.qkv": Fused(("attn.to_q", "attn.to_k", "attn.to_v"), (1, None, None)),
                "wide": Fused(("proj_in", "proj_gate"), (2, None)),
                "mod": swapped("norm.linear"),
                "shift": "norm3.linear",
                "up": Fused((Run("ff.net.0.proj", 1, 2),)),
                "gate": Fused((Run("ff.net.0.proj", 0, 2),)),
            },
            aliases={"mix_kv": Fused(("attn.to_k", "attn.to_v"))},
            by_ratio={"shift": (1, "norm3.linear_1")},
            alike=("out",),
        ),
        # Rows that take turns: the first and third quarter are one module's, the others another's.
        Block(
            "tails.{i}",
            "transformer_layers.{i}",
            {
                "0": Fused(
                    (Run("norm1.lin", 0, 2), Run("norm2.lin", 0, 2), Run("norm1.lin", 1, 2), Run("norm2.lin", 1, 2))
                )
            },
        ),
    ),
    outside={"start": "x_embedder"},
    outside_aliases={"begin": "x_embedder"},
    components=(Component("unet", "lora_unet_", "diffusion_model.", "transformer."),),
    marks=("stages.", "transformer_layers."),
    ratios={".wide": 5},
    kohya_version="toy_v0",
)
# The maker's modules with their rows, of two blocks
MAKER = {
    "start": 6,
    **{f"stages.{i}.{name}": rows for i in (0, 1) for name, rows in
       {"mix.qkv": 6 + 4 + 4, "wide": 12 + 18, "mod": 8, "up": 5, "gate": 5, "out": 6}.items()},
    "stages.0.shift": 12,
    "stages.1.shift": 6,  # as many as columns: the last block's is another module
    **{f"tails.{i}.0": 8 for i in (0, 1)},
}  # fmt: skip


def split(whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut the maker's matrices into diffusers', by hand."""
    found = {"x_embedder": whole["start"]}
    for i in (0, 1):
        qkv, wide, mod = (whole[f"stages.{i}.{name}"] for name in ("mix.qkv", "wide", "mod"))
        tail = whole[f"tails.{i}.0"]
        parts = {
            "attn.to_q": qkv[:6],
            "attn.to_k": qkv[6:10],
            "attn.to_v": qkv[10:],
            "proj_in": wide[:12],
            "proj_gate": wide[12:],
            "norm.linear": torch.cat([mod[4:], mod[:4]]),
            "ff.net.0.proj": torch.cat([whole[f"stages.{i}.gate"], whole[f"stages.{i}.up"]]),
            "out": whole[f"stages.{i}.out"],
            "norm3.linear_1" if i else "norm3.linear": whole[f"stages.{i}.shift"],
            "norm1.lin": torch.cat([tail[:2], tail[4:6]]),
            "norm2.lin": torch.cat([tail[2:4], tail[6:]]),
        }
        found |= {f"transformer_layers.{i}.{name}": rows for name, rows in parts.items()}
    return found


def factors(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make a pair of small whole numbers, whose products are exact."""
    made = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(-4, 5, shape, generator=made).float() for shape in ((RANK, WIDTH), (rows, RANK)))  # type: ignore[return-value]


def deltas(path: Path, prefix: str, flat: bool = False) -> dict[str, Tensor]:
    """Return module -> scale * B A of a file, whatever its suffixes."""
    file, found = load_file(path), {}
    for key in file:
        for down, up in ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")):
            if key.endswith(down):
                module = key.removesuffix(down)
                scale = float(file[f"{module}.alpha"]) / len(file[key]) if f"{module}.alpha" in file else 1.0
                found[module.removeprefix(prefix)] = scale * file[module + up].double() @ file[key].double()
    return found


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", TOY)


def kohya_file(path: Path) -> Path:
    tensors = {}
    for i, (name, rows) in enumerate(MAKER.items()):
        A, B = factors(rows, i)
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {
            f"{flat}.lora_down.weight": A,
            f"{flat}.lora_up.weight": B,
            f"{flat}.alpha": torch.tensor(float(RANK)),
        }
    save_file(tensors, path)
    return path


@pytest.mark.usefixtures("toy")
class TestToy:
    def test_convert_there_and_back(self, tmp_path: Path) -> None:
        start = kohya_file(tmp_path / "a.safetensors")
        whole = deltas(start, "lora_unet_")
        dotted = {name: whole[name.replace(".", "_")] for name in MAKER}
        loratool.convert(start, tmp_path / "b.safetensors", to="diffusers")
        there = deltas(tmp_path / "b.safetensors", "transformer.")
        expected = split(dotted)
        assert there.keys() == expected.keys()
        assert [n for n in expected if not torch.equal(there[n], expected[n])] == []
        loratool.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya")
        back = deltas(tmp_path / "c.safetensors", "lora_unet_")
        assert back.keys() == whole.keys() and all(torch.equal(back[name], whole[name]) for name in whole)
        loratool.convert(tmp_path / "b.safetensors", tmp_path / "d.safetensors", to="comfy")
        comfy = deltas(tmp_path / "d.safetensors", "diffusion_model.")
        assert comfy.keys() == dotted.keys() and all(torch.equal(comfy[name], dotted[name]) for name in dotted)

    @pytest.mark.parametrize("maker_base", [True, False])
    @pytest.mark.parametrize("maker_adapter", [True, False])
    def test_merge(self, maker_base: bool, maker_adapter: bool, tmp_path: Path) -> None:
        weights = {name: torch.full((rows, WIDTH), float(i)) for i, (name, rows) in enumerate(MAKER.items())}
        parts = weights if maker_base else {name: rows.contiguous() for name, rows in split(weights).items()}
        save_file({f"{name}.weight": rows for name, rows in parts.items()}, tmp_path / "base.safetensors")
        adapter = kohya_file(tmp_path / "a.safetensors")
        whole = deltas(adapter, "lora_unet_")
        if not maker_adapter:
            loratool.convert(adapter, tmp_path / "b.safetensors", to="diffusers")
            adapter = tmp_path / "b.safetensors"
        loratool.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors", undo=False)
        expected = {name: rows + whole[name.replace(".", "_")].float() for name, rows in weights.items()}
        expected = expected if maker_base else split(expected)
        merged = load_file(tmp_path / "out.safetensors")
        assert merged.keys() == {f"{name}.weight" for name in expected}
        assert all(torch.equal(merged[f"{name}.weight"], expected[name]) for name in expected)


# Norms that change places between the namings, which only the other names in a file tell
TWO_MEANINGS = {("hunyuan_dit", "blocks.{i}.norm2"), ("hunyuan_dit", "blocks.{i}.norm3")}
TABLES = {family.key: family for family in (*FAMILIES.values(), *ENCODERS.values(), TOY)}


@pytest.mark.parametrize("key", TABLES)
def test_a_table_is_a_bijection(key: str) -> None:
    """Every row of diffusers' modules is a row of just one of the maker's, and every name finds itself."""
    family = TABLES[key]
    if not family.up_attention:
        for name in (name for names in lookup._index(family).values() for name in names):
            path = name.template.replace("{i}", "7")
            found = locate(family, path)
            if (key, name.template) not in TWO_MEANINGS:
                assert found and found.path == path, f"{path} is two modules, with its dots or flattened"
    parts: Counter[tuple[str, int, int]] = Counter()
    flat: dict[str, tuple[str, object]] = {}
    for located in names_of(family).values():
        again = locate(family, located.path)
        assert again == located and set(located.maker) and set(located.diffusers)
        assert flat.setdefault(located.path.replace(".", "_"), (located.path, located.rows))[1] == located.rows
        for name in located.diffusers:
            found = locate(family, name)
            assert found and found.diffusers == (name,)
        for name in located.maker:
            found = locate(family, name)
            assert found and found.maker == (name,) and set(found.diffusers) & set(located.diffusers)
        if located.maker == (located.path,) and located.path not in located.diffusers:
            _, fused = located.rows[-1]
            runs = [run if isinstance(run, Run) else Run(run) for run in fused.runs]
            parts.update((run.module, run.part, run.parts) for run in runs)
            assert len(fused.sizes) in (0, len(runs))
    assert all(count == 1 for count in parts.values()), parts.most_common(3)
    for module, _, whole in parts:
        assert all((module, part, whole) in parts for part in range(whole))
    assert family.components == () or family.components[0].name == "unet"


@pytest.mark.parametrize("key", TABLES)
def test_rows_add_up(key: str) -> None:
    """From the maker's rows to diffusers' and back, the spans are the same."""
    family, columns = TABLES[key], 12
    for located in names_of(family).values():
        for rows in (columns * ratio for ratio in (1, 2, 3, 6, 7)):
            spans = parts_of(located, columns, rows)
            if spans is None:
                continue
            assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])] and spans[-1].stop == rows
            assert all(s.skip >= 0 and s.skip + s.stop - s.start <= s.module_rows for s in spans)
            assert parts_of(located, columns, known={span.module: span.module_rows for span in spans}) == spans


def test_what_no_shape_has_is_not_guessed() -> None:
    qkv = locate(FAMILIES["flux"], "double_blocks.0.img_attn.qkv")
    phi = locate(LAYOUTS["phi3"], "model.layers.0.self_attn.qkv_proj")
    assert qkv and phi
    assert parts_of(qkv, 8, 25) is None and parts_of(qkv, 8) is None
    assert parts_of(qkv, 8, known={"transformer_blocks.0.attn.to_q": 8, "transformer_blocks.0.attn.to_k": 4}) is None
    assert parts_of(phi, 8, 16) is None and parts_of(phi, 8, 16, queries=9) is None
    assert [span.module_rows for span in parts_of(phi, 8, 16, queries=8) or ()] == [8, 4, 4]


@pytest.mark.usefixtures("toy")
def test_a_family_is_detected_by_its_names_in_any_naming() -> None:
    maker = [("unet", name, (rows, WIDTH)) for name, rows in MAKER.items()]
    assert [family.key for family in detect(maker)] == ["toy"]
    assert [family.key for family in detect([(c, n.replace(".", "_"), s) for c, n, s in maker])] == ["toy"]
    aliases = [("unet", "begin", (6, 6)), ("unet", "stages.1.mix_kv", (8, 6))]
    assert [family.key for family in detect(aliases)] == ["toy"]
    assert detect([*maker, ("unet", "stages.0.other", (6, 6))]) == ()
