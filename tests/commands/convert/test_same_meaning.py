"""Hold `diff` and `combine` to what modules mean: one adapter in two conventions is one change, in every family."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import any_widths, few, only_families, slow
from lib.files import lycoris_files
from lib.models.image_layouts import MODELS
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.architectures.families import FAMILIES
from loratool.architectures.families.lookup import Located, names_of, parts_of
from loratool.errors import InputError, NeedsFlag

RANK = 3
FORMATS = ("kohya", "diffusers", "comfy", "peft")


def factors(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, columns, generator=made), torch.randn(rows, RANK, generator=made)


def rows_of(located: Located, columns: int) -> int:
    """Return rows that a module of the family can have, more than one kind where the table has several."""
    told = next((ratio for end, ratio in located.family.ratios.items() if located.path.endswith(end)), 0)
    for ratio in [told] if told else [each for each, _ in located.rows if each] + [6, 7]:
        if parts_of(located, columns, ratio * columns):
            return ratio * columns
    raise AssertionError(f"{located.path} has no rows")


def start_of(key: str, path: Path, count: int) -> Path:
    """Write modules from all over the family's table, in kohya's convention, with a scale of its own."""
    family = FAMILIES[key]
    columns = next((n for width in family.widths if width.ends == ("",) for n in width.columns), 12)
    maker = [each for each in names_of(family, 2).values() if each.maker == (each.path,)]
    tensors: dict[str, Tensor] = {}
    for i, located in enumerate(maker[:: max(1, len(maker) // count)]):
        A, B = factors(rows_of(located, columns), columns, i)
        flat = f"lora_unet_{located.path.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B, f"{flat}.alpha": torch.tensor(1.5)}
    save_file(tensors, path)
    return path


def in_all_formats(start: Path, folder: Path) -> dict[str, Path]:
    made = {}
    for to in FORMATS:
        made[to] = folder / (to if to == "peft" else f"{to}.safetensors")
        loratool.convert(start, made[to], to=to)
    return made


# One of each way in which names and rows of two formats differ
DIFFERING = "ernie_image flux2 hidream hunyuan_video15 kandinsky5 omnigen qwen_image qwen_image21 sd1".split()


@pytest.mark.parametrize("count", [6, slow(40)])
@pytest.mark.parametrize("key", few((key for key, each in FAMILIES.items() if each.components[0].kohya), *DIFFERING))
def test_one_adapter_in_two_formats_is_one_change(key: str, count: int, tmp_path: Path) -> None:
    with only_families(key), any_widths(key):  # some of the others have modules of this one
        check_one_change(key, count, tmp_path)


def check_one_change(key: str, count: int, tmp_path: Path) -> None:
    files = {"start": start_of(key, tmp_path / "a.safetensors", count)}
    files |= in_all_formats(files["start"], tmp_path)
    for one, two in itertools.combinations(files, 2):
        found = loratool.diff(files[one], files[two])
        assert found.distance <= 1e-12 * found.norm_a, (one, two)
        assert f"{found.cosine:.3f}" == "1.000" and not found.only_a and not found.only_b
    for one, two in (("kohya", "diffusers"), ("peft", "comfy")):
        out = tmp_path / f"{one}-{two}.safetensors"
        loratool.combine([(files[one], 0.75), (files[two], 0.25)], out)
        again = loratool.diff(files["start"], out)
        assert again.relative < 1e-6 and not again.only_a and not again.only_b, (one, two)


CONVENTIONS = [
    (prefix, naming)
    for naming in ("maker", "diffusers")
    for prefix in ("lora_unet_", "diffusion_model.", "transformer.", "lycoris_", "")
]
# kind -> what makes the tensors of a layer
VALUES = {
    "full": lycoris_files.full,
    "ia3 in": lycoris_files.ia3_in,
    "ia3 out": lycoris_files.ia3_out,
    "norm": lycoris_files.norm,
    "loha and bias": lambda n, *shape: {**lycoris_files.loha(n, *shape), "diff_b": n(shape[0])},
}
ROWS = ("diff", "diff_b", "w_norm", "b_norm", "weight")  # roles whose rows are the layer's


def values_of(path: Path, family: str, kind: str, prefix: str, naming: str) -> Path:
    """Write values of all layers that can have them; factors that are not LoRA's only where no row is moved."""
    tensors = {}
    for i, layer in enumerate(MODELS[family][0]):
        whole = len(layer.diffusers) == 1 and not layer.swapped
        # nothing but its columns tells whether the halves of this one are swapped
        fits = (len(layer.shape) == 1) == (kind == "norm") and (
            kind != "ia3 out" or "context_block.ada" not in layer.maker
        )
        if layer.component != "unet" or not layer.bias or not fits or (kind == "loha and bias" and not whole):
            continue
        roles = VALUES[kind](lycoris_files.Numbers(torch.float32, i), *layer.shape)
        for module, rows in [(layer.maker, range(layer.shape[0]))] if naming == "maker" else layer.pieces():
            name = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
            for role, tensor in roles.items():
                own = tensor.reshape(-1) if role == "weight" else tensor
                moved = role in ROWS and kind != "ia3 in"
                tensors[f"{name}.{role}"] = own[list(rows)] if moved else own.clone()
    save_file(tensors, path)
    return path


EVERY = [(f, k) for f in MODELS for k in VALUES if k != "norm" or f in ("sdxl", "sd1")]
SOME = {("flux", "full"), ("sd3", "loha and bias"), ("sdxl", "norm"), ("sd1", "ia3 out")}


@pytest.mark.parametrize(
    ("family", "kind"), [each if each in SOME else pytest.param(*each, marks=pytest.mark.slow) for each in EVERY]
)
def test_values_in_two_conventions_are_one_change(family: str, kind: str, tmp_path: Path) -> None:
    files = [values_of(tmp_path / f"{i}.safetensors", family, kind, *each) for i, each in enumerate(CONVENTIONS)]
    for one, two in itertools.pairwise([*files, files[0], *files[::2]]):
        found = loratool.diff(one, two)
        assert found.same and not found.only_a and not found.only_b, (one, two)
        assert {value.relative for value in found.values} == {0}
        assert all(module.relative < 1e-12 for module in found.modules)
        assert bool(found.modules) == (kind == "loha and bias")
    changed = load_file(files[-1])
    changed[next(name for name, tensor in changed.items() if tensor.dtype.is_floating_point)] *= 1.5
    save_file(changed, tmp_path / "other.safetensors")
    assert not loratool.diff(files[0], tmp_path / "other.safetensors").same


def test_a_bias_alone_does_not_tell_whether_its_halves_are_swapped(tmp_path: Path) -> None:
    """The last block's modulation has other rows than the others', and only the columns of its matrix tell."""
    path = "joint_blocks.0.context_block.adaLN_modulation.1"
    names = {"kohya": f"lora_unet_{path.replace('.', '_')}", "comfy": f"diffusion_model.{path}"}
    files = {key: tmp_path / f"{key}.safetensors" for key in names}
    for key, name in names.items():
        save_file({f"{name}.diff_b": torch.ones(16)}, files[key])
    with pytest.raises(NeedsFlag) as refused:
        loratool.diff(*files.values())
    assert refused.value.culprit == f"{names['kohya']}_bias" and "--exclude" in (refused.value.remedy or "")


QKV, GATE_UP, OUT = (
    f"model.layers.0.{name}" for name in ("self_attn.qkv_proj", "mlp.gate_up_proj", "self_attn.o_proj")
)


def peft(path: Path, modules: Mapping[str, tuple[Tensor, Tensor]], **more: object) -> Path:
    path.mkdir()
    tensors = {f"{m}.lora_{side}.weight": t for m, pair in modules.items() for side, t in zip("AB", pair, strict=True)}
    save_file({f"base_model.model.{name}": t for name, t in tensors.items()}, path / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": targets, **more}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def fused_and_split(folder: Path) -> tuple[Path, Path]:
    """Phi 3's layout with grouped queries, and Llama's of the same change, cut by hand."""
    A, B = factors(8 + 4 + 4, 8, 0)
    C, D = factors(32, 8, 1)
    out = factors(8, 8, 2)
    block = "model.layers.0"
    parts = {
        f"{block}.self_attn.q_proj": (A, B[:8]),
        f"{block}.self_attn.k_proj": (A, B[8:12]),
        f"{block}.self_attn.v_proj": (A, B[12:]),
        f"{block}.mlp.gate_proj": (C, D[:16]),
        f"{block}.mlp.up_proj": (C, D[16:]),
        OUT: out,
    }
    parts = {name: (a.clone(), b.clone()) for name, (a, b) in parts.items()}
    return peft(folder / "fused", {QKV: (A, B), GATE_UP: (C, D), OUT: out}), peft(folder / "split", parts)


class TestFusedAndSplit:
    def test_diff(self, tmp_path: Path) -> None:
        files = fused_and_split(tmp_path)
        for one, two in (files, files[::-1]):
            found = loratool.diff(one, two)
            assert found.distance <= 1e-12 * found.norm_a and f"{found.cosine:.3f}" == "1.000"
            assert len(found.modules) == 6 and not found.only_a and not found.only_b

    @pytest.mark.parametrize("first", [0, 1])
    def test_combine_has_the_layout_of_the_first(self, first: int, tmp_path: Path) -> None:
        files = fused_and_split(tmp_path)
        one, two = files[first], files[1 - first]
        loratool.combine([(one, 0.5), (two, 0.5)], tmp_path / "out")
        names = {name.split(".lora_")[0] for name in load_file(tmp_path / "out" / "adapter_model.safetensors")}
        assert names == {name.split(".lora_")[0] for name in load_file(one / "adapter_model.safetensors")}
        assert loratool.diff(one, tmp_path / "out").relative < 1e-6

    def test_a_part_alone_stays_that_part(self, tmp_path: Path) -> None:
        fused, _ = fused_and_split(tmp_path)
        B = load_file(fused / "adapter_model.safetensors")[f"base_model.model.{QKV}.lora_B.weight"]
        A = load_file(fused / "adapter_model.safetensors")[f"base_model.model.{QKV}.lora_A.weight"]
        query = peft(tmp_path / "q", {"model.layers.0.self_attn.q_proj": (A, B[:8].clone())})
        found = {module.name.rpartition(".")[2]: module for module in loratool.diff(fused, query).modules}
        assert found["q_proj"].relative <= 1e-12 and found["k_proj"].rank_b == found["v_proj"].rank_b == 0
        loratool.combine([(query, 1.0), (fused, 1.0)], tmp_path / "out")
        names = {name.split(".lora_")[0] for name in load_file(tmp_path / "out" / "adapter_model.safetensors")}
        assert f"base_model.model.{QKV}" not in names and "base_model.model.model.layers.0.self_attn.k_proj" in names

    def test_rows_of_another_model(self, tmp_path: Path) -> None:
        fused, _ = fused_and_split(tmp_path)
        query = peft(tmp_path / "q", {"model.layers.0.self_attn.k_proj": factors(5, 8, 3), QKV: factors(9, 8, 4)})
        with pytest.raises(InputError):
            loratool.diff(fused, query)
