"""Hold A -> B -> A over all pairs of formats, for each family of models: the same delta bit for bit, the same merge.

The names on all sides are literal. Factors are small integers, so that every product of theirs is exact: two files
have the same delta if and only if scale * B @ A is the same in float64, however a module is fused or split there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, any_widths, load_model, only_families, slow, weights
from lib.oracles.reference import scale_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Module:
    """A module by diffusers', kohya's and ComfyUI's names; the base's tensor and its first row there. fused: under the
    latter two names the whole tensor is meant. swap: its halves have changed places against diffusers'.
    """

    diffusers: str
    kohya: str
    comfy: str
    tensor: str
    shape: Shape
    row: int = 0
    fused: bool = False
    swap: bool = False


def dotted(path: str, own: str, shape: Shape, flat: str = "") -> Module:
    """Return a UNet's module; `flat` where kohya does not flatten the model's own path."""
    kohya = f"lora_unet_{(flat or own).replace('.', '_')}"
    return Module(f"unet.{path}", kohya, f"diffusion_model.{own}", f"model.diffusion_model.{own}.weight", shape)


def dit(path: str, own: str, shape: Shape, swap: bool = False) -> Module:
    kohya, tensor = f"lora_unet_{own.replace('.', '_')}", f"model.diffusion_model.{own}.weight"
    return Module(f"transformer.{path}", kohya, f"diffusion_model.{own}", tensor, shape, swap=swap)


def parts(paths: str, names: str, own: str, widths: Sequence[int]) -> list[Module]:
    """Return several of diffusers' modules (`paths` has a place for each of `names`) that are one in the model."""
    made, row = [], 0
    for name, rows in zip(names.split(), widths, strict=True):
        each = dit(paths.format(name), own, (rows, D))
        made.append(Module(each.diffusers, each.kohya, each.comfy, each.tensor, each.shape, row, fused=True))
        row += rows
    return made


def text(names: tuple[str, str, str], path: str, tensor: str, shape: Shape, row: int = 0) -> Module:
    """Return the modules of an encoder. names: of the encoder in diffusers, kohya and ComfyUI."""
    component, flat, clip = names
    kohya = f"lora_{flat}_{path.replace('.', '_')}"
    return Module(f"{component}.{path}", kohya, f"text_encoders.{clip}.transformer.{path}", tensor, shape, row)


D = 6
LAYERS, BLOCK, T5 = "text_model.encoder.layers", "transformer_blocks.0", "encoder.block.23.layer.1.DenseReluDense.wi_0"
SD1_TEXT, SD2_TEXT = ("text_encoder", "te", "clip_l"), ("text_encoder", "te", "clip_h")
CLIP_L, CLIP_G = ("text_encoder", "te1", "clip_l"), ("text_encoder_2", "te2", "clip_g")


def first_unet(width: int) -> list[Module]:
    """List the UNet modules of SD 1 and SD 2: diffusers' path, sgm's, the shape. kohya has diffusers' there."""
    modules: list[tuple[str, str, Shape]] = [
        ("conv_in", "input_blocks.0.0", (8, 4, 3, 3)),
        ("time_embedding.linear_2", "time_embed.2", (8, 8)),
        ("down_blocks.0.attentions.1.proj_in", "input_blocks.2.1.proj_in", (8, 8, 1, 1)),
        (f"down_blocks.0.attentions.1.{BLOCK}.attn2.to_k", f"input_blocks.2.1.{BLOCK}.attn2.to_k", (8, width)),
        ("down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op", (8, 8, 3, 3)),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1", (8, 16)),
        (f"mid_block.attentions.0.{BLOCK}.ff.net.0.proj", f"middle_block.1.{BLOCK}.ff.net.0.proj", (64, 8)),
        (f"up_blocks.1.attentions.0.{BLOCK}.attn1.to_out.0", f"output_blocks.3.1.{BLOCK}.attn1.to_out.0", (8, 8)),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv", (8, 8, 3, 3)),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv", (8, 8, 3, 3)),
        ("up_blocks.3.resnets.2.conv_shortcut", "output_blocks.11.0.skip_connection", (8, 16, 1, 1)),
    ]
    return [dotted(path, own, shape, path) for path, own, shape in modules]


DEEP = "transformer_blocks.9.attn2.to_k"
SD1_BASE, SD2_BASE = f"cond_stage_model.transformer.{LAYERS}", "cond_stage_model.model.transformer.resblocks"
XL_L, XL_G = f"conditioner.embedders.0.transformer.{LAYERS}", "conditioner.embedders.1.model.transformer.resblocks"
FAMILIES: dict[str, list[Module]] = {
    "sd1": [
        *first_unet(768),
        text(SD1_TEXT, f"{LAYERS}.11.self_attn.k_proj", f"{SD1_BASE}.11.self_attn.k_proj.weight", (8, 8)),
        text(SD1_TEXT, f"{LAYERS}.0.mlp.fc1", f"{SD1_BASE}.0.mlp.fc1.weight", (32, 8)),
    ],
    "sd2": [
        *first_unet(1024),
        text(SD2_TEXT, f"{LAYERS}.22.self_attn.k_proj", f"{SD2_BASE}.22.attn.in_proj_weight", (8, 1024), 8),
        text(SD2_TEXT, f"{LAYERS}.0.mlp.fc1", f"{SD2_BASE}.0.mlp.c_fc.weight", (8, 1024)),
    ],
    "sdxl": [
        dotted("add_embedding.linear_1", "label_emb.0.0", (8, 16)),
        dotted("down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2", (8, 8, 3, 3)),
        dotted("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in", (8, 8)),
        dotted(f"down_blocks.2.attentions.1.{DEEP}", f"input_blocks.8.1.{DEEP}", (8, 12)),
        dotted("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv", (8, 8, 3, 3)),
        dotted("up_blocks.2.resnets.0.conv2", "output_blocks.6.0.out_layers.3", (8, 8, 3, 3)),
        text(CLIP_L, f"{LAYERS}.0.mlp.fc2", f"{XL_L}.0.mlp.fc2.weight", (8, 32)),
        text(CLIP_G, f"{LAYERS}.31.mlp.fc1", f"{XL_G}.31.mlp.c_fc.weight", (48, 12)),
        text(CLIP_G, f"{LAYERS}.0.self_attn.v_proj", f"{XL_G}.0.attn.in_proj_weight", (12, 12), 24),
    ],
    "flux": [
        dit("transformer_blocks.18.attn.to_out.0", "double_blocks.18.img_attn.proj", (D, D)),
        dit("transformer_blocks.0.ff_context.net.2", "double_blocks.0.txt_mlp.2", (D, 4 * D)),
        dit("transformer_blocks.0.norm1.linear", "double_blocks.0.img_mod.lin", (6 * D, D)),
        dit("single_transformer_blocks.37.proj_out", "single_blocks.37.linear2", (D, 5 * D)),
        dit("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer", (D, D)),
        dit("norm_out.linear", "final_layer.adaLN_modulation.1", (2 * D, D), swap=True),
        *parts("transformer_blocks.0.attn.{}", "to_q to_k to_v", "double_blocks.0.img_attn.qkv", [D] * 3),
        *parts(
            "single_transformer_blocks.0.{}",
            "attn.to_q attn.to_k attn.to_v proj_mlp",
            "single_blocks.0.linear1",
            [D, D, D, 4 * D],
        ),
        text(CLIP_L, f"{LAYERS}.0.mlp.fc2", f"text_encoders.clip_l.transformer.{LAYERS}.0.mlp.fc2.weight", (8, 32)),
        text(("text_encoder_2", "te3", "t5xxl"), T5, f"text_encoders.t5xxl.transformer.{T5}.weight", (8, 8)),
    ],
    "sd3": [
        dit("transformer_blocks.23.ff.net.0.proj", "joint_blocks.23.x_block.mlp.fc1", (4 * D, D)),
        dit("transformer_blocks.0.attn.to_add_out", "joint_blocks.0.context_block.attn.proj", (D, D)),
        dit("transformer_blocks.0.norm1_context.linear", "joint_blocks.0.context_block.adaLN_modulation.1", (6 * D, D)),
        dit(
            "transformer_blocks.23.norm1_context.linear",
            "joint_blocks.23.context_block.adaLN_modulation.1",
            (2 * D, D),
            swap=True,
        ),
        dit("pos_embed.proj", "x_embedder.proj", (D, 4, 2, 2)),
        dit("norm_out.linear", "final_layer.adaLN_modulation.1", (2 * D, D), swap=True),
        *parts("transformer_blocks.0.attn2.{}", "to_q to_k to_v", "joint_blocks.0.x_block.attn2.qkv", [D] * 3),
        text(CLIP_G, f"{LAYERS}.31.mlp.fc2", f"text_encoders.clip_g.transformer.{LAYERS}.31.mlp.fc2.weight", (8, 32)),
        text(("text_encoder_3", "te3", "t5xxl"), T5, f"text_encoders.t5xxl.transformer.{T5}.weight", (8, 8)),
    ],
}
WITH_TEXT, ALONE = ("kohya", "diffusers", "comfy"), ("kohya", "diffusers", "comfy", "peft")
ALPHA = 2.5


def denoiser(family: str, linear: bool = False) -> list[Module]:
    own = [m for m in FAMILIES[family] if m.diffusers.startswith(("unet.", "transformer."))]
    return [m for m in own if not linear or math.prod(m.shape[2:]) == 1]


def whole_rows(tensor: str, modules: Sequence[Module]) -> int:
    """Return how many rows a tensor of the base has."""
    own = [m for m in modules if m.tensor == tensor]
    return 3 * own[0].shape[0] if tensor.endswith("in_proj_weight") else sum(m.shape[0] for m in own)


def pair(module: Module, seed: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of small integers: sums of their products are exact in any order."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randint(-3, 4, (rank, *module.shape[1:]), generator=g).half()
    B = torch.randint(-3, 4, (module.shape[0], rank, *[1] * (len(module.shape) - 2)), generator=g).half()
    B[0] = 2  # no rank of it is all zero
    return A, B


def rank_of(module: Module, number: int) -> int:
    """Return ranks in turns; scales of one module's slices differ by powers of two, so that folding is exact."""
    return ((4, 2, 8) if module.fused else (4, 3, 7))[number % 3]


def diffusers_file(path: Path, modules: Sequence[Module], rank: int | None = None) -> Path:
    """Write the file to begin with: several ranks, or one, and one alpha; in diffusers' names, by hand."""
    tensors, fields = {}, dict[str, Any]()
    for number, module in enumerate(modules):
        r = rank or rank_of(module, number)
        A, B = pair(module, number, r)
        tensors |= {f"{module.diffusers}.lora_A.weight": A, f"{module.diffusers}.lora_B.weight": B}
        component, _, rest = module.diffusers.partition(".")
        fields |= {f"{component}.r": rank or 4, f"{component}.lora_alpha": ALPHA}
        fields.setdefault(f"{component}.rank_pattern", {})["^" + rest.replace(".", r"\.")] = r
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(fields)})
    return path


def write_base(path: Path, family: str) -> Path:
    modules = FAMILIES[family]
    shapes = {m.tensor: (whole_rows(m.tensor, modules), *m.shape[1:]) for m in modules}
    shapes["first_stage_model.decoder.conv_in.weight"] = (8, 4, 3, 3)
    save_file({name: weights(*shape, seed=i).half() for i, (name, shape) in enumerate(shapes.items())}, path)
    return path


@pytest.fixture(autouse=True)
def _narrow_family(request: pytest.FixtureRequest) -> Iterator[None]:
    """Know the family of a test only, as narrow as its models here."""
    key = request.node.callspec.params.get("family", "flux") if hasattr(request.node, "callspec") else "flux"
    with only_families(key), any_widths(key):
        yield


def convert(source: Path, out: Path, to: str, **options: Any) -> tuple[Path, Any]:
    path = out if to == "peft" else out.with_suffix(".safetensors")
    report = loratool.convert(source, path, to=to, **options)
    return path, report


def raw_factors(path: Path, form: str) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Return (module's name, A, B, scale) of a file as its format defines them, by the official libraries alone."""
    tensors = load_model(path)
    down, up = ("lora_down", "lora_up") if form in ("kohya", "comfy") else ("lora_A", "lora_B")
    end = "" if form == "loralib" else ".weight"
    fields = {}
    if form == "diffusers":
        with safe_open(path, "pt") as file:
            fields = json.loads(file.metadata()["lora_adapter_metadata"])
    for key in (k for k in tensors if k.endswith(f".{down}{end}")):
        name = key.removesuffix(f".{down}{end}")
        A, B = tensors[key], tensors[f"{name}.{up}{end}"]
        name = name.removeprefix("base_model.model.")
        if form == "peft":
            yield name, A, B, scale_of(json.loads((path / "adapter_config.json").read_text()), name, len(A))
        elif form == "diffusers":
            component, _, rest = name.partition(".")
            config = {k.removeprefix(f"{component}."): v for k, v in fields.items() if k.startswith(f"{component}.")}
            yield name, A, B, scale_of(config, rest, len(A))
        else:
            yield name, A, B, 1.0 if form == "loralib" else float(tensors[f"{name}.alpha"]) / len(A)


def spelled(module: Module, form: str) -> str:
    own = {"kohya": module.kohya, "comfy": module.comfy, "diffusers": module.diffusers}
    return own.get(form, module.diffusers.partition(".")[2])


def changes(path: Path, form: str, modules: Sequence[Module]) -> dict[str, Tensor]:
    """Return the delta of each of the base's tensors, dense and exact: every name of the file is one that we expect."""
    names = {spelled(module, form): module for module in reversed(modules)}
    total: dict[str, Tensor] = {}
    for name, A, B, scale in raw_factors(path, form):
        module, own = names[name], form in ("kohya", "comfy")
        D = scale * (B.double().flatten(1) @ A.double().flatten(1))
        D = torch.cat(D.chunk(2)[::-1]) if module.swap and not own else D
        rows, row = whole_rows(module.tensor, modules), 0 if own and module.fused else module.row
        whole = total.setdefault(module.tensor, torch.zeros(rows, D.shape[1], dtype=torch.float64))
        whole[row : row + len(D)] += D
    return total


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)


def digest(path: Path) -> str:
    """Return a hash of all tensors of a model, by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(load_model(path).items()):
        total.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def merged(base: Path, adapter: Path, out: Path, alpha: float | None = None) -> str:
    loratool.merge(base, adapter, out, alpha=alpha, undo=False, force=True)
    return digest(out)


@pytest.mark.parametrize(
    ("family", "forms"),
    [(family, WITH_TEXT) if family in ("sdxl", "flux") else slow(family, WITH_TEXT) for family in FAMILIES]
    + [(family, ALONE) if family == "sd3" else slow(family, ALONE) for family in FAMILIES],
    ids=lambda value: {WITH_TEXT: "all", ALONE: "denoiser"}.get(value),
)
def test_all_pairs(family: str, forms: tuple[str, ...], tmp_path: Path) -> None:
    """From one file to each format, from each to each, and back: one delta, one merged model."""
    modules = FAMILIES[family] if forms == WITH_TEXT else denoiser(family)
    base, start = write_base(tmp_path / "base.safetensors", family), diffusers_file(tmp_path / "0.safetensors", modules)
    expected, model = changes(start, "diffusers", modules), merged(base, start, tmp_path / "m.safetensors")
    assert model != digest(base)
    for one in forms:
        first, report = convert(start, tmp_path / one, one)
        assert report.family == family and not report.dropped and not any(row.error for row in report.modules)
        assert same(changes(first, one, modules), expected)
        assert merged(base, first, tmp_path / "m.safetensors") == model
        for two in forms:
            if forms == ALONE and "peft" not in (one, two):
                continue  # a pair of the others, which have it with the text encoders
            second, report = convert(first, tmp_path / f"{one}-{two}", two)
            assert not report.dropped and same(changes(second, two, modules), expected)
            back, _ = convert(second, tmp_path / f"{one}-{two}-{one}", one)
            assert same(changes(back, one, modules), expected)
            assert merged(base, back, tmp_path / "m.safetensors") == model
            if not any(module.fused for module in modules):  # where modules stay one, the very factors come back
                assert same(load_model(back), load_model(first))


@pytest.mark.parametrize("family", FAMILIES)
def test_by_way_of_loralib(family: str, tmp_path: Path) -> None:
    """Linear layers, whose scale is in the factors: a file of an image model without alphas means a scale of 1."""
    modules, form = denoiser(family, linear=True), "loralib"
    base = write_base(tmp_path / "base.safetensors", family)
    start = diffusers_file(tmp_path / "0.safetensors", modules, rank=4)
    expected, model = changes(start, "diffusers", modules), merged(base, start, tmp_path / "m.safetensors")
    for one in ALONE:
        first, _ = convert(start, tmp_path / one, one)
        lora, report = convert(first, tmp_path / f"{one}-l", form)
        assert "r=4, lora_alpha=4" in report.notes[0] and same(changes(lora, form, modules), expected)
        assert merged(base, lora, tmp_path / "m.safetensors") == model
        back, _ = convert(lora, tmp_path / f"{one}-l-{one}", one)
        assert same(changes(back, one, modules), expected)
        assert merged(base, back, tmp_path / "m.safetensors") == model


# A spelling that is read and not written -> what of a module's names makes up a tensor's, and the ends of its pair
DOWN_UP, A_B = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
READ_ONLY = {
    "diffusers before 0.22": ("{m.diffusers}", (".lora.down.weight", ".lora.up.weight")),
    "diffusers, linear_layer": ("{m.diffusers}", (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")),
    "diffusers, an adapter's name": ("{m.diffusers}", (".lora_A.default.weight", ".lora_B.default.weight")),
    "ComfyUI with PEFT's ends": ("{m.comfy}", A_B),
    "ai-toolkit": ("{m.diffusers}", A_B),
    "doubled": ("lora_unet_{m.kohya}", DOWN_UP),
}


def rename(name: str, template: str, module: Module) -> str:
    if name == "doubled":
        return module.kohya.replace("lora_unet_", "lora_unet_unet_")
    return template.format(m=module)


@pytest.mark.parametrize(
    ("family", "spelling"),
    [("sdxl", each) for each in READ_ONLY]
    + [("flux", each) if each == "doubled" else slow("flux", each) for each in READ_ONLY],
)
def test_what_is_only_read(family: str, spelling: str, tmp_path: Path) -> None:
    """Without an alpha anywhere the scale is 1: it converts as the same file in diffusers' names does."""
    template, (down, up) = READ_ONLY[spelling]
    modules = [m for m in FAMILIES[family] if not (m.fused and ("comfy" in template or "kohya" in template))]
    tensors, plain = {}, {}
    for number, module in enumerate(modules):
        A, B = pair(module, number, 4)
        name = rename(spelling, template, module)
        own = "comfy" in template or "kohya" in template
        flipped = torch.cat(B.chunk(2)[::-1]) if module.swap and own else B
        tensors |= {name + down: A, name + up: flipped}
        plain |= {f"{module.diffusers}.lora_A.weight": A.clone(), f"{module.diffusers}.lora_B.weight": B.clone()}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(plain, tmp_path / "b.safetensors")
    base = write_base(tmp_path / "base.safetensors", family)
    model = merged(base, tmp_path / "b.safetensors", tmp_path / "m.safetensors")
    assert merged(base, tmp_path / "a.safetensors", tmp_path / "m.safetensors") == model != digest(base)
    for form in WITH_TEXT:
        first, report = convert(tmp_path / "a.safetensors", tmp_path / f"a-{form}", form)
        second, _ = convert(tmp_path / "b.safetensors", tmp_path / f"b-{form}", form)
        assert not report.dropped and report.family == family
        assert same(load_file(first), load_file(second))
        assert merged(base, first, tmp_path / "m.safetensors") == model


def test_xlabs(tmp_path: Path) -> None:
    """Its names of a Flux's attentions (x-flux/src/flux/modules/layers.py): linear1's first rows alone."""
    names = {
        "double_blocks.3.processor.qkv_lora1": ("double_blocks.3.img_attn.qkv", (3 * D, D)),
        "double_blocks.3.processor.proj_lora2": ("double_blocks.3.txt_attn.proj", (D, D)),
        "single_blocks.4.processor.qkv_lora": ("single_blocks.4.linear1", (3 * D, D)),
        "single_blocks.4.processor.proj_lora": ("single_blocks.4.linear2", (D, 5 * D)),
    }
    tensors, shapes, expected = {}, {}, {}
    for seed, (name, (own, shape)) in enumerate(names.items()):
        A, B = pair(Module("", "", "", "", shape), seed, 4)
        tensors |= {f"{name}.down.weight": A, f"{name}.up.weight": B}
        shapes[f"model.diffusion_model.{own}.weight"] = shape
        expected[own] = B.double() @ A.double()
    shapes["model.diffusion_model.single_blocks.4.linear1.weight"] = (7 * D, D)
    save_file(tensors, tmp_path / "a.safetensors")
    base = tmp_path / "base.safetensors"
    save_file({n: weights(*s, seed=i).half() for i, (n, s) in enumerate(shapes.items())}, base)
    model = merged(base, tmp_path / "a.safetensors", tmp_path / "m.safetensors")
    for one in ALONE:
        first, _ = convert(tmp_path / "a.safetensors", tmp_path / one, one)
        assert merged(base, first, tmp_path / "m.safetensors") == model
    for name, A, B, scale in raw_factors(tmp_path / "comfy.safetensors", "comfy"):
        D_own = scale * B.double() @ A.double()
        want = expected[name.removeprefix("diffusion_model.")]
        assert torch.equal(D_own[: len(want)], want) and not D_own[len(want) :].any()


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_language_model(model: str, tmp_path: Path) -> None:
    """PEFT's folder, its file, and loralib's where there is one alpha: tensors bit for bit, and the same merge."""
    start, base = FIXTURES / model / "adapter", FIXTURES / model / "base"
    expected, before = merged(base, start, tmp_path / "m"), load_model(start)
    ways = [("peft", "file.safetensors"), ("peft", "folder")]
    if model == "llama":
        ways += [("loralib", "lora.safetensors"), ("peft", "again")]
    source, alpha = start, None
    for to, name in ways:
        loratool.convert(source, tmp_path / name, to=to, alpha=alpha)
        source, alpha = tmp_path / name, 16.0 if to == "loralib" else None
        assert merged(base, source, tmp_path / "m", alpha=alpha) == expected
        if to == "peft":
            assert same(load_model(source), before)
