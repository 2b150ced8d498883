"""Hold the conversion of denoisers: diffusers' own converters give the same tensors, the way back gives the same bytes,
and what cannot be renamed in full is refused by name.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits, load_model, run_command, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag, UsageError

pytestmark = [pytest.mark.filterwarnings("ignore")]

WIDTH = 8
QKV, ADDED, SINGLE = (
    [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")],
    [f"transformer_blocks.0.attn.add_{name}_proj" for name in "qkv"],
    [f"single_transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
)
# A Flux of one block of each kind and a part of what is outside: shapes under the maker's names, then what diffusers
# makes of them
FLUX = {
    "double_blocks.0.img_attn.qkv.weight": (3 * WIDTH, WIDTH),
    "double_blocks.0.img_attn.qkv.bias": (3 * WIDTH,),
    "double_blocks.0.txt_attn.qkv.weight": (3 * WIDTH, WIDTH),
    "double_blocks.0.img_attn.norm.query_norm.scale": (4,),
    "double_blocks.0.img_mlp.0.weight": (4 * WIDTH, WIDTH),
    "single_blocks.0.linear1.weight": (7 * WIDTH, WIDTH),
    "single_blocks.0.linear1.bias": (7 * WIDTH,),
    "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
    "img_in.weight": (WIDTH, 4),
    "time_in.in_layer.weight": (WIDTH, 6),
    "vector_in.in_layer.weight": (WIDTH, 6),
}


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {name: weights(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(FLUX.items())}


def as_diffusers(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is said above of FLUX, by torch alone."""
    found = {
        "transformer_blocks.0.attn.norm_q.weight": own["double_blocks.0.img_attn.norm.query_norm.scale"],
        "transformer_blocks.0.ff.net.0.proj.weight": own["double_blocks.0.img_mlp.0.weight"],
        "x_embedder.weight": own["img_in.weight"],
        "time_text_embed.timestep_embedder.linear_1.weight": own["time_in.in_layer.weight"],
        "time_text_embed.text_embedder.linear_1.weight": own["vector_in.in_layer.weight"],
    }
    shift, scale = own["final_layer.adaLN_modulation.1.weight"].split(WIDTH)
    found["norm_out.linear.weight"] = torch.cat([scale.clone(), shift.clone()])
    for fused, names, sizes in (
        ("double_blocks.0.img_attn.qkv", QKV, [WIDTH] * 3),
        ("double_blocks.0.txt_attn.qkv", ADDED, [WIDTH] * 3),
        ("single_blocks.0.linear1", SINGLE, [*[WIDTH] * 3, 4 * WIDTH]),
    ):
        for leaf in ("weight", "bias"):
            if f"{fused}.{leaf}" in own:
                parts = own[f"{fused}.{leaf}"].split(sizes)
                found |= {f"{name}.{leaf}": part.clone() for name, part in zip(names, parts, strict=True)}
    return found


def require_equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (two[name].dtype, two[name].shape), name
        raw = [(x.view(torch.uint8) if x.itemsize == 1 else bits(x.reshape(-1))) for x in (tensor, two[name])]
        assert torch.equal(*raw), name


def save(path: Path, state: Mapping[str, Tensor], **metadata: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, {"format": "pt", **metadata})
    return path


def folder(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    path.mkdir(parents=True)
    save(path / "diffusion_pytorch_model.safetensors", state)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_rows_move_as_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    own = tensors(dtype) | {"img_in.weight": weights(WIDTH, 4, dtype=torch.float32)}  # mixed types stay mixed
    there = loratool.convert_model(save(tmp_path / "a.safetensors", own), tmp_path / "transformer", to="diffusers")
    require_equal(load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"), as_diffusers(own))
    assert (there.family, there.renamed, there.regrouped, there.copied) == ("flux", 5, 18, 23)
    assert there.warnings == ("to load it, diffusers needs the config.json of its FluxTransformer2DModel beside it",)
    back = loratool.convert_model(tmp_path / "transformer", tmp_path / "b.safetensors", to="single-file")
    require_equal(load_file(tmp_path / "b.safetensors"), own)
    assert (back.renamed, back.regrouped, back.warnings) == (5, 6, ())


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model.model."])
def test_prefixes_go(tmp_path: Path, prefix: str) -> None:
    own = tensors()
    base = save(tmp_path / "a.safetensors", {prefix + name: tensor for name, tensor in own.items()})
    loratool.convert_model(base, tmp_path / "bare.safetensors", to="single-file")
    require_equal(load_file(tmp_path / "bare.safetensors"), own)
    loratool.convert_model(base, tmp_path / "diffusers.safetensors", to="diffusers")
    require_equal(load_file(tmp_path / "diffusers.safetensors"), as_diffusers(own))


def test_shards_casts_and_metadata(tmp_path: Path) -> None:
    own = tensors(torch.float32)
    base = save(tmp_path / "a.safetensors", own, **{"modelspec.title": "mine", "modelspec.hash_sha256": "0x1"})
    out = tmp_path / "transformer"
    plan = loratool.convert_model(base, out, to="diffusers", dtype="fp16", max_shard_size=1000, dry_run=True)
    assert not out.exists()
    report = loratool.convert_model(base, out, to="diffusers", dtype="fp16", max_shard_size=1000)
    index = json.loads((out / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert plan.files == report.files == tuple(sorted(set(index["weight_map"].values()))) and len(report.files) > 2
    assert json.loads(index["metadata"]["loratool"]) == {"verb": "convert", "dtype": "F16", "to": "diffusers"}
    with safe_open(out / report.files[0], "pt") as file:
        assert file.metadata() == {"format": "pt", "modelspec.title": "mine"}
    expected = {name: tensor.to(torch.float16) for name, tensor in as_diffusers(own).items()}
    found = {name: tensor for each in report.files for name, tensor in load_file(out / each).items()}
    require_equal(found, expected)
    # the same bytes with any number of threads
    loratool.convert_model(base, tmp_path / "again", to="diffusers", dtype="fp16", max_shard_size=1000, workers=1)
    for each in report.files:
        assert (out / each).read_bytes() == (tmp_path / "again" / each).read_bytes()
    loratool.convert_model(out, tmp_path / "back.safetensors", to="single-file")
    require_equal(load_file(tmp_path / "back.safetensors"), {n: t.to(torch.float16) for n, t in own.items()})
    with pytest.raises(NeedsFlag, match="add force=True"):
        loratool.convert_model(base, out, to="diffusers")
    with pytest.raises(UsageError, match="needs a folder"):
        loratool.convert_model(out, tmp_path / "c.safetensors", to="single-file", max_shard_size=1000)
    with pytest.raises(UsageError, match='to="single-file" writes a file'):
        loratool.convert_model(out, tmp_path / "c", to="single-file")


def test_config_and_license_stay_with_the_folder(tmp_path: Path) -> None:
    base = folder(tmp_path / "a", as_diffusers(tensors()), {"_class_name": "FluxTransformer2DModel"})
    (base / "LICENSE.md").write_text("mine")
    (base / "notes.rtf").write_text("")
    report = loratool.convert_model(base, tmp_path / "b", to="diffusers", dtype="fp32")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "config.json", "LICENSE.md", "diffusion_pytorch_model.safetensors"
    }  # fmt: skip
    assert (report.not_copied, report.warnings, report.regrouped) == (("notes.rtf",), (), 0)
    # of another model than the file it stands beside
    (base / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    file = save(base / "flux.safetensors", tensors())
    assert (
        loratool.convert_model(file, tmp_path / "c", to="diffusers").warnings
        and not (tmp_path / "c" / "config.json").exists()
    )
    (base / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert (
        not loratool.convert_model(file, tmp_path / "d", to="diffusers").warnings
        and (tmp_path / "d" / "config.json").exists()
    )


def test_torch_files_and_means(tmp_path: Path) -> None:
    own = tensors()
    torch.save({**own, **{f"model_ema.{i}": tensor + 1 for i, tensor in enumerate(own.values())}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="is not in the tables of Flux"):
        loratool.convert_model(tmp_path / "a.pt", tmp_path / "t", to="diffusers")
    report = loratool.convert_model(tmp_path / "a.pt", tmp_path / "t", to="diffusers", drop=["ema"])
    require_equal(load_model(tmp_path / "t"), as_diffusers(own))
    assert report.source_format == "torch" and len(report.left_out) == len(own)


def test_other_components_are_dropped_on_demand(tmp_path: Path) -> None:
    own = tensors()
    beside = {"text_encoders.clip_l.transformer.text_model.final_layer_norm.weight": weights(4), "vae.x": weights(4)}
    base = save(tmp_path / "a.safetensors", {**{f"model.diffusion_model.{n}": t for n, t in own.items()}, **beside})
    for to in ("diffusers", "single-file"):
        with pytest.raises(NeedsFlag, match=r"2 tensors beside its denoiser \(text_encoders\.\*, vae\.\*\)") as found:
            loratool.convert_model(base, tmp_path / "b.safetensors", to=to)
        assert found.value.remedy and found.value.remedy.startswith("add --drop components")
        report = loratool.convert_model(base, tmp_path / f"{to}.safetensors", to=to, drop=["components"])
        assert set(report.left_out) == beside.keys()
    require_equal(load_file(tmp_path / "single-file.safetensors"), own)
    with pytest.raises(UsageError, match="components"):
        loratool.convert_model(base, tmp_path / "b.safetensors", to="torch", drop=["components"])


REMOVED = object()
QKV_WEIGHT = "double_blocks.0.img_attn.qkv.weight"
# what is changed of the tensors -> the refusal, of the maker's file and of diffusers'
MAKER: list[tuple[dict[str, Any], str]] = [
    (
        {"double_blocks.0.other.weight": (8, 8)},
        r"double_blocks\.0\.other\.weight: is not in the tables of Flux: its other",
    ),
    (
        {"double_blocks.0.a": (8,), "double_blocks.0.b": (8,)},
        r"is not in the tables of Flux \(nor are others, 2 in all: ",
    ),
    ({QKV_WEIGHT: (25, 8)}, r"img_attn\.qkv\.weight: has 25 rows, which are not those of .*to_q and .*of 8 columns"),
    ({QKV_WEIGHT: (0, 8)}, r"img_attn\.qkv\.weight: has no numbers"),
    ({"single_blocks.0.linear1.bias": (8,)}, r"single_blocks\.0\.linear1\.bias: has 8 rows"),
    ({"transformer_blocks.0.attn.norm_q.weight": (4,)}, r"is transformer_blocks\.0\.attn\.norm_q\.weight, and so is"),
    ({"transformer_blocks.0.attn.to_q.weight": (8, 8)}, r"is transformer_blocks\.0\.attn\.to_q\.weight, and so is"),
    ({QKV_WEIGHT: torch.zeros(24, 8, dtype=torch.float8_e4m3fn), f"{QKV_WEIGHT[:-7]}.scale_weight": ()}, "quantized"),
]
DIFFUSERS: list[tuple[dict[str, Any], str]] = [
    (
        {f"{QKV[1]}.weight": REMOVED},
        r"is a part of double_blocks\.0\.img_attn\.qkv\.weight, but .*to_k\.weight is missing",
    ),
    ({f"{QKV[1]}.bias": REMOVED}, r"is a part of double_blocks\.0\.img_attn\.qkv\.bias, but .*to_k\.bias is missing"),
    ({f"{QKV[1]}.weight": (16, 8)}, r"cannot become double_blocks\.0\.img_attn\.qkv, of 8 columns and these rows"),
    ({f"{QKV[1]}.weight": (8, 7)}, r"is \(8, 7\) and .*to_q\.weight is \(8, 8\), and both are rows of double_blocks"),
    (
        {f"{SINGLE[3]}.bias": ()},
        r"is \(\) and .*to_q\.bias is \(8,\), and both are rows of single_blocks\.0\.linear1\.bias",
    ),
    ({f"{SINGLE[3]}.weight": (32,)}, r"is \(32,\) and .*to_q\.weight is \(8, 8\), and both are rows of single_blocks"),
    ({f"{SINGLE[0]}.weight": (16, 8)}, r"cannot become single_blocks\.0\.linear1"),
    ({f"{QKV[1]}.weight": torch.zeros(8, 8)}, r"is BF16, but .*to_k\.weight is F32, and both become rows of double_"),
    ({"norm_out.linear.weight": (17, 8)}, r"the maker's tensors have 16 of its rows and not 17"),
]


def changed(state: dict[str, Tensor], change: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, value in change.items():
        new = value if isinstance(value, Tensor) else None if value is REMOVED else torch.ones(value).bfloat16()
        state = {**state, name: new} if new is not None else {n: t for n, t in state.items() if n != name}
    return state


@pytest.mark.parametrize(("change", "message"), MAKER, ids=range(len(MAKER)))
def test_the_makers_tensors_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    base = save(tmp_path / "a.safetensors", changed(tensors(), change))
    with pytest.raises(InputError, match=message):
        loratool.convert_model(base, tmp_path / "out", to="diffusers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "message"), DIFFUSERS, ids=range(len(DIFFUSERS)))
def test_diffusers_tensors_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    base = folder(tmp_path / "a", changed(as_diffusers(tensors()), change))
    with pytest.raises(InputError, match=message):
        loratool.convert_model(base, tmp_path / "out.safetensors", to="single-file")
    assert not (tmp_path / "out.safetensors").exists()


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    language = folder(tmp_path / "lm", {"model.layers.0.self_attn.q_proj.weight": weights(8, 8)})
    with pytest.raises(InputError, match="has no known denoiser"):
        loratool.convert_model(language, tmp_path / "out", to="diffusers")
    folder(tmp_path / "pipe" / "transformer", as_diffusers(tensors()))
    (tmp_path / "pipe" / "model_index.json").write_text('{"transformer": ["diffusers", "FluxTransformer2DModel"]}')
    with pytest.raises(InputError, match="is a pipeline") as found:
        loratool.convert_model(tmp_path / "pipe", tmp_path / "out.safetensors", to="single-file")
    assert found.value.remedy == f"pass {tmp_path / 'pipe' / 'transformer'}"
    tokens = {"model.diffusion_model.llm_adapter.blocks.0.x.weight": weights(4)}
    predict2 = {"blocks.0.adaln_modulation_self_attn.1.weight": (8, 8), "blocks.0.self_attn.q_proj.weight": (8, 2048)}
    anima = {f"model.diffusion_model.{name}": weights(*shape) for name, shape in predict2.items()} | tokens
    with pytest.raises(NeedsFlag, match=r"1 tensors beside its denoiser \(model\.diffusion_model\.llm_adapter\.\*\)"):
        loratool.convert_model(save(tmp_path / "anima.safetensors", anima), tmp_path / "out", to="diffusers")
    # one layer a block, as a distilled UNet has them: sgm's numbers would be those of other blocks
    unet = {f"down_blocks.0.resnets.0.conv{i}.weight": weights(4, 4, 3, 3) for i in (1, 2)}
    with pytest.raises(InputError, match=r"has no down_blocks\.0\.resnets\.1\.conv1 beside it"):
        loratool.convert_model(folder(tmp_path / "unet", unet), tmp_path / "out.safetensors", to="single-file")
    label = {f"input_blocks.{i}.0.in_layers.2.weight": weights(4, 4, 3, 3) for i in (1, 2)}
    label["label_emb.0.0.weight"] = weights(4, 2048)
    with pytest.raises(InputError, match="2048 columns and not 2816"):
        loratool.convert_model(save(tmp_path / "u.safetensors", label), tmp_path / "out", to="diffusers")


def test_names_of_two_families_need_the_config(tmp_path: Path) -> None:
    """PixArt's width is its own, but Allegro lists fewer modules that are not there."""
    state = {f"transformer_blocks.0.attn1.to_{x}.weight": weights(8, 1152) for x in "qkv"}
    state |= {
        "transformer_blocks.0.scale_shift_table": weights(6, 8),
        "adaln_single.emb.timestep_embedder.linear_1.weight": weights(8, 8),
        "scale_shift_table": weights(2, 8),
    }
    base = folder(tmp_path / "a", state)
    with pytest.raises(InputError, match="can be PixArt or Allegro|can be Allegro or PixArt") as found:
        loratool.convert_model(base, tmp_path / "b.safetensors", to="single-file")
    assert found.value.remedy == "put the model's config.json beside it"
    (base / "config.json").write_text('{"_class_name": "PixArtTransformer2DModel"}')
    assert loratool.convert_model(base, tmp_path / "b.safetensors", to="single-file").family == "pixart"
    assert "blocks.0.attn.qkv.weight" in load_file(tmp_path / "b.safetensors")


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    base = save(tmp_path / "a.safetensors", tensors())
    result = run_command("convert", base, "--to", "diffusers", "-o", tmp_path / "t")
    assert result.exit_code == 0
    assert "5 tensors of Flux renamed, 18 split or concatenated" in result.stdout
    result = run_command("convert", base, "--to", "single-file", "-o", tmp_path / "t", "--json")
    assert result.exit_code == 2 and json.loads(result.stdout)["error"]["remedy"] == "name a .safetensors file with -o"


# family, and after a slash its variant -> diffusers' converter, and its constants that fit the published sizes alone
CONVERTERS: dict[str, tuple[str, dict[str, str]]] = {
    "flux": ("flux_transformer_checkpoint", {"inner_dim = 3072": "inner_dim = 16"}),
    "flux2": ("flux2_transformer_checkpoint", {}),
    "flux2/klein": ("flux2_transformer_checkpoint", {}),
    "flux3": ("flux3_transformer_checkpoint", {}),
    "chroma": ("chroma_transformer_checkpoint", {"inner_dim = 3072": "inner_dim = 16"}),
    "sd3": ("sd3_transformer_checkpoint", {}),
    "sd3/3.5-medium": ("sd3_transformer_checkpoint", {}),
    "qwen_image21": ("qwen_image21_transformer_checkpoint", {}),
    "z_image": ("z_image_transformer_checkpoint", {}),
    "lumina2": ("lumina2", {"q_dim = 2304": "q_dim = 24", "v_dim = 768": "v_dim = 8"}),
    "hidream": ("hidream_transformer", {}),
    "wan": ("wan_transformer", {}),
    "wan/i2v": ("wan_transformer", {}),
    "wan/flf2v": ("wan_transformer", {}),
    "wan/vace": ("wan_transformer", {}),
    "wan_animate2": ("wan_animate_2_transformer", {}),
    "hunyuan_video": ("hunyuan_video_transformer", {"hidden_size = 3072": "hidden_size = 16"}),
    "hunyuan_video/i2v": ("hunyuan_video_transformer", {"hidden_size = 3072": "hidden_size = 16"}),
    "ltx": ("ltx_transformer_checkpoint", {}),
    "ltx2": ("ltx2_transformer", {}),
    "ltx2/2.3": ("ltx2_transformer", {}),
    "mochi": ("mochi_transformer_checkpoint", {"num_layers = 48": "num_layers = 3"}),
    "auraflow": ("auraflow_transformer_checkpoint", {}),
    "sana": ("sana_transformer", {}),
    # which empties the dict before it looks there which table is the right one
    "cosmos1": (
        "cosmos_transformer_checkpoint",
        {'to_q.0.weight" in checkpoint:': 'to_q.0.weight" in converted_state_dict:'},
    ),
    "cosmos_predict2": ("cosmos_transformer_checkpoint", {}),
    "krea2": ("krea2_transformer_checkpoint", {}),
    "minimax_h3": ("minimax_h3_transformer_checkpoint", {}),
    "ernie_image": ("ernie_image_transformer_checkpoint", {}),
}


# What diffusers 0.42.1's converters leave under the maker's name or give another one, by a bug
NOT_CONVERTED = {
    "wan/flf2v": ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    "ltx2/2.3": ("prompt_adaln", "audio_prompt_adaln"),
}


QUICK = ("flux", "sd3/3.5-medium", "krea2", "hunyuan_dit")  # one of each way to move rows


def cases() -> list[Any]:
    try:
        from lib.models.dit_models import MODELS
    except pytest.skip.Exception:  # without diffusers
        return []
    return [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in MODELS]


@pytest.mark.parametrize("case", cases())
def test_diffusers_models_go_there_and_back(tmp_path: Path, case: str) -> None:
    from lib.models.dit_models import build, family_of

    model = build(case).bfloat16()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    if case == "hunyuan_video/framepack":
        with pytest.raises(InputError, match="is FramePack; its maker uses diffusers' names"):
            loratool.convert_model(tmp_path / "transformer", tmp_path / "single.safetensors", to="single-file")
        return
    there = loratool.convert_model(tmp_path / "transformer", tmp_path / "single.safetensors", to="single-file")
    assert there.family == family_of(case) or (case, there.family) == ("anima", "cosmos_predict2")
    single = load_file(tmp_path / "single.safetensors")
    back = loratool.convert_model(tmp_path / "single.safetensors", tmp_path / "back", to="diffusers")
    # which only their real widths tell from PixArt and CogView 4
    assert back.family == there.family or case in ("allegro", "cogview3")
    require_equal(load_model(tmp_path / "back"), state)
    if case in CONVERTERS:
        theirs = converted(case, single, dict(model.config))
        bugs = NOT_CONVERTED.get(case, ())
        require_equal(*({n: t for n, t in each.items() if not n.startswith(bugs)} for each in (theirs, state)))
        assert not bugs or theirs.keys() != state.keys()


def converted(case: str, single: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what diffusers' converter of a single file gives, for a model of our sizes."""
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    name, constants = CONVERTERS[case]
    name = f"convert_{name}_to_diffusers"
    source = inspect.getsource(getattr(utils, name))
    for published, ours in constants.items():
        assert published in source
        source = source.replace(published, ours)
    space = dict(vars(utils))
    exec(source, space)
    state = {f"net.{name}": tensor for name, tensor in single.items()} if case == "cosmos1" else dict(single)
    if case == "sana":  # which takes these from the file without asking, and drops them
        state |= {"pos_embed": torch.zeros(1), "y_embedder.y_embedding": torch.zeros(1)}
    found: dict[str, Tensor] = space[name](state, **({"config": config} if case == "minimax_h3" else {}))
    return found


# ComfyUI's `HunyuanVideo.process_unet_state_dict` (comfy/supported_models.py): the maker's text -> its own, in order
COMFY = {
    "txt_in.t_embedder.mlp.0.": "txt_in.t_embedder.in_layer.",
    "txt_in.t_embedder.mlp.2.": "txt_in.t_embedder.out_layer.",
    "txt_in.c_embedder.linear_1.": "txt_in.c_embedder.in_layer.",
    "txt_in.c_embedder.linear_2.": "txt_in.c_embedder.out_layer.",
    "_mod.linear.": "_mod.lin.",
    "_attn_qkv.": "_attn.qkv.",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.2.",
    "_attn_q_norm.weight": "_attn.norm.query_norm.scale",
    "_attn_k_norm.weight": "_attn.norm.key_norm.scale",
    ".q_norm.weight": ".norm.query_norm.scale",
    ".k_norm.weight": ".norm.key_norm.scale",
    "_attn_proj.": "_attn.proj.",
    ".modulation.linear.": ".modulation.lin.",
    "_in.mlp.2.": "_in.out_layer.",
    "_in.mlp.0.": "_in.in_layer.",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["hunyuan_video", "hunyuan_image/distilled"])
def test_comfys_own_names_are_read(tmp_path: Path, case: str) -> None:
    from lib.models.dit_models import build

    state = dict(build(case).state_dict())
    loratool.convert_model(folder(tmp_path / "t", state), tmp_path / "a.safetensors", to="single-file")
    own = load_file(tmp_path / "a.safetensors")
    theirs = {}
    for name, tensor in own.items():
        for text, other in COMFY.items():
            name = name.replace(text, other)
        theirs[f"model.model.{name}"] = tensor
    base = save(tmp_path / "b.safetensors", theirs)
    loratool.convert_model(base, tmp_path / "c.safetensors", to="single-file")
    require_equal(load_file(tmp_path / "c.safetensors"), own)
    loratool.convert_model(base, tmp_path / "d.safetensors", to="diffusers")
    require_equal(load_file(tmp_path / "d.safetensors"), state)


@pytest.mark.parametrize("family", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl"])
def test_unets_go_there_and_back(tmp_path: Path, family: str) -> None:
    diffusers_models = pytest.importorskip("diffusers_models")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = diffusers_models.SD1 if family == "sd1" else diffusers_models.SDXL
    label = {"projection_class_embeddings_input_dim": 2816} if family == "sdxl" else {}
    model = diffusers_models.diffusers.UNet2DConditionModel(**{**config, **label})
    model.save_pretrained(tmp_path / "unet")
    loratool.convert_model(tmp_path / "unet", tmp_path / "a.safetensors", to="single-file")
    single = load_file(tmp_path / "a.safetensors")
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in single.items()}
    theirs = utils.convert_ldm_unet_checkpoint(prefixed, dict(model.config))
    require_equal(theirs, model.state_dict())
    loratool.convert_model(save(tmp_path / "b.safetensors", prefixed), tmp_path / "back", to="diffusers")
    require_equal(load_model(tmp_path / "back"), model.state_dict())
