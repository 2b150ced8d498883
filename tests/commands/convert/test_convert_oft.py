"""Hold OFT that becomes PEFT's against PEFT, which loads it and merges it in float64.

OneTrainer's is also held to its own formulas, written here in torch, and these to its own code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_model, slow
from lib.files.lycoris_files import Numbers, Roles, peft_of, write_lycoris
from lib.models.converted_sources import LANGUAGE
from lib.oracles.image_programs import onetrainer_oft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import InputError, LoratoolError, NeedsFlag, UsageError

peft = pytest.importorskip("peft")

BLOCK = "down_blocks.1.attentions.0"
LINEAR, FED = f"{BLOCK}.transformer_blocks.0.attn1.to_q", f"{BLOCK}.transformer_blocks.0.ff.net.2"
KERNEL, POINT, FIRST = "down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0.conv_shortcut", "conv_in"
# path -> shape of its weight
UNET = {
    LINEAR: (12, 24),
    FED: (12, 48),
    f"{BLOCK}.proj_in": (24, 24),  # linear in SDXL, a convolution in SD 1
    KERNEL: (10, 8, 3, 3),
    POINT: (10, 24, 1, 1),
    FIRST: (8, 4, 3, 3),
}


def nested(shapes: Mapping[str, tuple[int, ...]], made: Mapping[str, Tensor]) -> torch.nn.Module:
    """Return a model of float64 with layers of these paths."""
    root = torch.nn.Module()
    for path, shape in shapes.items():
        *owners, last = path.split(".")
        owner = root
        for name in owners:
            if not hasattr(owner, name):
                owner.add_module(name, torch.nn.Module())
            owner = getattr(owner, name)
        is_linear = len(shape) == 2
        layer = torch.nn.Linear(shape[1], shape[0]) if is_linear else torch.nn.Conv2d(shape[1], shape[0], shape[2:])
        layer.double().weight.data = made[f"{path}.weight"].clone()
        owner.add_module(last, layer)
    return root


def base_of(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    n = Numbers(torch.float64, 7)
    made = {f"{path}.weight": n(*shape) for path, shape in shapes.items()}
    save_file(made, folder / "base.safetensors")
    return made


def pefts(folder: Path, shapes: Mapping[str, tuple[int, ...]], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of PEFT's merge of a folder, which has every tensor that PEFT expects."""
    model = peft.PeftModel.from_pretrained(nested(shapes, base), folder)
    said = peft.get_peft_model_state_dict(model)
    assert said.keys() == load_file(folder / "adapter_model.safetensors").keys()
    merged = model.merge_and_unload().state_dict()
    return {name: merged[name] for name in base}


def ours(folder: Path, adapter: Path) -> dict[str, Tensor]:
    loratool.merge(folder / "base.safetensors", adapter, folder / "merged.safetensors", force=True, undo=False)
    return load_file(folder / "merged.safetensors")


def farthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    """Return the largest distance of two merges over the change."""
    return max(float((x - other[name]).norm() / (x - base[name]).norm()) for name, x in one.items())


def triangles(seed: int, width: int, size: int, count: int | None = None, spread: float = 0.2) -> Tensor:
    return Numbers(torch.float32, seed)(count or width // size, size * (size - 1) // 2, size=spread)


def onetrainers(base: Mapping[str, Tensor], numbers: Mapping[str, Tensor], scaled: bool) -> dict[str, Tensor]:
    """Return what OneTrainer's layers are equal to, by its formulas in float64.

    Its linear layers turn the input, "...rk,rkc->...rc" with R, and its convolutions the weight, "ork,rkc->orc".
    """
    merged = {}
    for path, value in numbers.items():
        W = base[f"{path}.weight"]
        size = (1 + math.isqrt(1 + 8 * value.shape[1])) // 2
        Q = torch.zeros(len(value), size, size, dtype=torch.float64)
        i, j = torch.triu_indices(size, size, 1)
        Q[:, i, j] = value.double() / (2 * math.sqrt(size - 1) if scaled else 1)
        Q = Q - Q.mT
        R = torch.eye(size, dtype=torch.float64) + 2 * (Q + Q @ Q + Q @ Q @ Q) + Q @ Q @ Q @ Q
        rows = W.reshape(len(W), -1, size)
        R = R.expand(rows.shape[1], size, size)
        turned = torch.einsum("ork,rkc->orc", rows, R) if W.dim() > 2 else torch.einsum("orc,rkc->ork", rows, R)
        merged[f"{path}.weight"] = turned.reshape(W.shape)
    return merged


SIZES = {LINEAR: 4, FED: 4, f"{BLOCK}.proj_in": 4, KERNEL: 4, POINT: 4, FIRST: 4}
# PEFT takes the nearest divisor, as OneTrainer does: of 24, 48, 72 it is 8, of 36 it is 9
NEAREST = {**dict.fromkeys(SIZES, 8), FIRST: 9}


@pytest.mark.parametrize("container", ["kohya", slow("dotted")])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("sizes", "shares"), [(SIZES, False), (NEAREST, False), (SIZES, True)])
def test_onetrainers(tmp_path: Path, container: str, scaled: bool, sizes: Mapping[str, int], shares: bool) -> None:
    base = base_of(tmp_path, UNET)
    widths = {path: math.prod(shape[1:]) for path, shape in UNET.items()}
    numbers = {p: triangles(i, widths[p], size, 1 if shares else None) for i, (p, size) in enumerate(sizes.items())}
    roles: dict[str, Roles] = {path: {"oft_R.weight": value} for path, value in numbers.items()}
    for of_module in roles.values() if scaled else ():
        of_module["oft_R.scaled_oft"] = torch.tensor(True)
    source = write_lycoris(tmp_path / "a.safetensors", roles, container)
    report: Any = loratool.convert(source, tmp_path / "out", to="peft", architecture="sdxl")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["oft_block_size"], config["r"], config["block_share"]) == (sizes[LINEAR], 0, shares)
    wanted = onetrainers(base, numbers, scaled)
    theirs = pefts(tmp_path / "out", UNET, base)
    assert farthest(wanted, theirs, base) < (1e-7 if scaled else 1e-14)  # float32 rounds what is divided
    assert farthest(ours(tmp_path, source), theirs, base) < (1e-7 if scaled else 1e-14)
    assert farthest(ours(tmp_path, tmp_path / "out"), theirs, base) < 1e-14
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for row in report.modules:
        value = found[f"base_model.model.{row.name}.oft_R.weight"]
        is_turned = len(UNET[row.name]) > 2
        assert (row.rank, row.alpha) == (0, 0.0)
        if scaled:
            Q, before = (x.double() for x in (value, numbers[row.name]))
            exact = before / (2 * math.sqrt(sizes[row.name] - 1)) * (-1 if is_turned else 1)
            assert row.how == ("folded" if torch.equal(Q, exact) else "rounded") and row.error < 6e-8
            assert float((Q - exact).norm() / exact.norm()) == pytest.approx(row.error, rel=0.2)
        else:
            assert (row.how, row.error) == ("folded" if is_turned else "exact", 0.0)
            assert torch.equal(value, -numbers[row.name] if is_turned else numbers[row.name])


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("sizes", "shares"), [(SIZES, False), (NEAREST, False), (SIZES, True)])
def test_the_formulas_are_onetrainers(tmp_path: Path, scaled: bool, sizes: Mapping[str, int], shares: bool) -> None:
    for number, (path, size) in enumerate(sizes.items()):
        base = base_of(tmp_path, {path: UNET[path]})
        value = triangles(number, math.prod(UNET[path][1:]), size, 1 if shares else None)
        wanted = onetrainer_oft(base[f"{path}.weight"], value, size, shares, scaled)
        found = onetrainers(base, {path: value}, scaled)[f"{path}.weight"]
        assert float((found - wanted).abs().max()) < 1e-13 < float((found - base[f"{path}.weight"]).abs().max())


@pytest.mark.parametrize("bounds", [{LINEAR: 0.3, FED: 0.3}, {LINEAR: 0.3}, {LINEAR: 0.3, FED: 0.2}, {}])
@pytest.mark.parametrize("scaled", [False, True])
def test_settings_of_musubis_forks(tmp_path: Path, bounds: Mapping[str, float], scaled: bool) -> None:
    """One bound for all modules is the config's; others are multiplied out. PEFT has its bound in float32."""
    shapes = {path: UNET[path] for path in (LINEAR, FED)}
    base, roles = base_of(tmp_path, shapes), dict[str, Roles]()
    for i, (path, shape) in enumerate(shapes.items()):
        said = {"oft_coft": path in bounds, "coft_eps": bounds.get(path, 6e-5), "scaled_oft": scaled}
        settings = {f"{name}_metadata": torch.tensor(float(value)) for name, value in said.items()}
        roles[path] = {"oft_R.weight": triangles(i, shape[1], 4), "alpha": torch.tensor(4.0), **settings}
    source = write_lycoris(tmp_path / "a.safetensors", roles)
    loratool.convert(source, tmp_path / "out", to="peft", architecture="sdxl")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["coft"] == (len({*bounds.values()}) == 1 and len(bounds) == 2 and not scaled)
    theirs = pefts(tmp_path / "out", shapes, base)
    assert farthest(ours(tmp_path, source), theirs, base) < 1e-7
    assert farthest(ours(tmp_path, tmp_path / "out"), theirs, base) < 1e-7


def test_parts_of_a_fused_module_turn_alike(tmp_path: Path) -> None:
    """Of Flux in ComfyUI's names."""
    stem, parts = "transformer_blocks.0.attn", ("to_q", "to_k", "to_v")
    shapes = {f"{stem}.{part}": (3072, 3072) for part in parts}
    value = triangles(0, 3072, 8)
    save_file({"diffusion_model.double_blocks.0.img_attn.qkv.oft_R.weight": value}, tmp_path / "a.safetensors")
    report: Any = loratool.convert(tmp_path / "a.safetensors", tmp_path / "out", to="peft", architecture="flux")
    assert {row.name for row in report.modules} == {*shapes} and {row.how for row in report.modules} == {"split"}
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(found[f"base_model.model.{path}.oft_R.weight"], value) for path in shapes)
    assert len(found) == 3


def test_of_a_language_model_in_its_classes_names(tmp_path: Path) -> None:
    """PEFT's own keeps its tensors and settings; of one class the other's model has no `model.`."""
    transformers = pytest.importorskip("transformers")
    source = LANGUAGE["oft"].write(tmp_path / "oft")
    config = json.loads((source.adapter / "adapter_config.json").read_text())
    config |= {"r": 0, "use_cayley_neumann": False, "layers_to_transform": [0, 1]}
    (source.adapter / "adapter_config.json").write_text(json.dumps(config))
    report: Any = loratool.convert(
        source.adapter, tmp_path / "out", to="peft", base=source.base, architecture="LlamaModel"
    )
    assert {(row.how, row.error) for row in report.modules} == {("exact", 0.0)}
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    kept = ("peft_type", "r", "oft_block_size", "use_cayley_neumann", "peft_version")
    assert [said[key] for key in kept] == [config[key] for key in kept]
    assert said["target_modules"] == sorted(row.name for row in report.modules) and "lora_alpha" not in said
    model = transformers.LlamaModel.from_pretrained(source.base, dtype=torch.float64)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    loratool.merge(source.base, source.adapter, tmp_path / "merged", undo=False)
    merged = {name.removeprefix("model."): x for name, x in load_model(tmp_path / "merged").items()}
    changed = [name for name, x in theirs.items() if not torch.equal(x, before[name])]
    assert len(changed) == len(report.modules)
    for name in changed:
        assert (theirs[name] - merged[name]).norm() < 1e-6 * (theirs[name] - before[name]).norm()


@pytest.mark.parametrize("options", [{"rename": ["*=x.*"]}, {"exclude": "*.0.*"}, {}])
def test_pefts_own_under_other_names(tmp_path: Path, options: Mapping[str, Any]) -> None:
    source = LANGUAGE["oft"].write(tmp_path / "oft")
    loratool.convert(source.adapter, tmp_path / "out", to="peft", **options)
    before, after = (load_file(each / "adapter_model.safetensors") for each in (source.adapter, tmp_path / "out"))
    renamed = {name.replace("base_model.model.", f"base_model.model.{'x.' * ('rename' in options)}") for name in before}
    assert after.keys() == {name for name in renamed if "exclude" not in options or ".0." not in name}
    assert all(torch.equal(x, before[name.replace(".x.", ".")]) for name, x in after.items())
    said, config = (
        json.loads((each / "adapter_config.json").read_text()) for each in (tmp_path / "out", source.adapter)
    )
    paths = [name.removeprefix("base_model.model.").removesuffix(".oft_R.weight") for name in after]
    config = {key: value for key, value in config.items() if key != "lora_alpha"}  # OFT has none
    assert said == {**config, "target_modules": sorted(paths)} | ({"lora_alpha": 6} if not options else {})


MODULE = f"lora_unet_{LINEAR.replace('.', '_')}"
OTHER = f"lora_unet_{FED.replace('.', '_')}"


def lora() -> Roles:
    return {f"{OTHER}.lora_down.weight": torch.ones(2, 48), f"{OTHER}.lora_up.weight": torch.ones(12, 2)}


def oft(module: str = MODULE, width: int = 24, size: int = 4, count: int | None = None) -> Roles:
    return {f"{module}.oft_R.weight": triangles(0, width, size, count)}


# tensors, options -> the error and its text
REFUSED: dict[str, tuple[Roles, dict[str, Any], type[LoratoolError], str]] = {
    "mixed": ({**oft(), **lora()}, {}, NeedsFlag, r"\(lora\) are more than an adapter of PEFT's OFT"),
    "sizes": ({**oft(), **oft(OTHER, 24, 8)}, {}, NeedsFlag, "no one oft_block_size"),
    "shared": ({**oft(count=1), **oft(OTHER, 48, 8, 1)}, {}, NeedsFlag, "no one oft_block_size"),
    "component": (
        {**oft(), **oft("lora_te1_text_model_encoder_layers_0_mlp_fc1", 768, 4)},
        {},
        NeedsFlag,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    ),
    "family": (oft(f"lora_unet_{BLOCK.replace('.', '_')}_proj_in"), {"architecture": None}, NeedsFlag, "can be of"),
    "unknown": (oft("lora_unet_my_layer"), {"architecture": None}, InputError, "not an adapter of a known"),
    "3 axes": (oft("lora_unet_patch_embedding", 64), {"architecture": "wan"}, NeedsFlag, "cannot be carried to peft"),
    "groups": (
        oft("lora_unet_transformer_blocks_0_ff_conv_depth", 9, 3),
        {"architecture": "sana"},
        NeedsFlag,
        "cannot be",
    ),
    "either": (oft("lora_unet_patch_embed_proj", 64), {"architecture": "cogvideox"}, NeedsFlag, "cannot be carried"),
    "part": (
        oft("lora_unet_double_blocks_0_img_mlp_gate_proj", 64),
        {"architecture": "ovis_image"},
        NeedsFlag,
        "cannot be carried",
    ),
    "two": (
        {**oft(), **oft("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q")},
        {},
        InputError,
        "two modules of the adapter would become this one",
    ),
    "dtype": (oft(), {"dtype": "bf16"}, UsageError, "--dtype is for factors"),
    "layout": (oft(), {"layout": "split"}, UsageError, "--layout is for factors"),
    "class": (oft(), {"architecture": "LlamaModel"}, UsageError, "--architecture of an image model"),
    "kohya": ({f"{MODULE}.oft_blocks": torch.ones(3, 4, 4)}, {}, NeedsFlag, "whose change depends on the base"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_pefts_oft_cannot_hold_is_refused(tmp_path: Path, case: str) -> None:
    tensors, options, error, text = REFUSED[case]
    save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(error, match=text):
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "out", to="peft", **{"architecture": "sdxl", **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["oft 0.13", "oft 0.15"])
def test_layouts_that_peft_no_longer_loads(tmp_path: Path, kind: str) -> None:
    source = peft_of(kind, torch.float32).write(tmp_path / "a")
    with pytest.raises(NeedsFlag, match="no longer loads") as refused:
        loratool.convert(source, tmp_path / "out", to="peft")
    assert "--plain --base BASE --rank R" in str(refused.value.remedy)


def test_the_remedy_makes_lora(tmp_path: Path) -> None:
    """Of blocks that PEFT's config cannot have."""
    shapes = {LINEAR: (12, 24), FED: (12, 24)}
    base = base_of(tmp_path, shapes)
    save_file({**oft(), **oft(OTHER, 24, 8)}, tmp_path / "a.safetensors")
    options: dict[str, Any] = {"to": "peft", "plain": True, "base": tmp_path / "base.safetensors", "rank": 12}
    loratool.convert(tmp_path / "a.safetensors", tmp_path / "out", **options)
    theirs = pefts(tmp_path / "out", shapes, base)
    assert farthest(ours(tmp_path, tmp_path / "a.safetensors"), theirs, base) < 1e-6


@pytest.mark.parametrize(
    ("width", "family", "how"), [(768, "sd1", "folded"), (1024, "sd2", "exact"), (2048, "sdxl", "exact")]
)
def test_the_widths_tell_the_family(tmp_path: Path, width: int, family: str, how: str) -> None:
    """SD 1's projections are convolutions."""
    stem = f"lora_unet_{BLOCK.replace('.', '_')}_"
    tensors = {**oft(f"{stem}proj_in", 64), **oft(f"{stem}transformer_blocks_0_attn2_to_k", width)}
    save_file(tensors, tmp_path / "a.safetensors")
    report: Any = loratool.convert(tmp_path / "a.safetensors", tmp_path / "out", to="peft")
    assert report.family == family
    assert {row.name: row.how for row in report.modules}[f"{BLOCK}.proj_in"] == how


@pytest.mark.parametrize("prefix", ["lora_unet_", "oft_unet_"])
def test_rotations_of_outputs_become_lora(tmp_path: Path, prefix: str) -> None:
    """LyCORIS's diag-OFT and kohya's OFT, which PEFT's OFT cannot be."""
    shapes = {LINEAR: (12, 24), FED: (12, 48)}
    base, n = base_of(tmp_path, shapes), Numbers(torch.float32)
    roles: Roles = {}
    for path in shapes:
        module = prefix + path.replace(".", "_")
        roles |= {f"{module}.oft_blocks": n(3, 4, 4, size=0.2), f"{module}.alpha": torch.tensor(0.05)}
    save_file(roles, tmp_path / "a.safetensors")
    with pytest.raises(NeedsFlag) as refused:
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "out", to="peft")
    assert str(refused.value.remedy).startswith("add --plain --rank R --base BASE")
    options: dict[str, Any] = {"to": "peft", "plain": True, "base": tmp_path / "base.safetensors", "rank": 12}
    loratool.convert(tmp_path / "a.safetensors", tmp_path / "out", **options)
    theirs = pefts(tmp_path / "out", shapes, base)
    assert farthest(ours(tmp_path, tmp_path / "a.safetensors"), theirs, base) < 1e-6
