"""Read what each trainer writes for an image model: its prefix, its suffixes, its naming, and its way of saying alpha.

The names are literals, taken from the trainers' code, which each row names; the change is the same in all rows of a
kind, so that its merge is compared with the plain spelling's bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_model, spread
from lib.models.image_layouts import FLUX, base_of, write_folder, write_single
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, LoratoolError, NeedsFlag, UsageError
from loratool.adapters.formats import open_adapter

PROJ, OUT = "double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0"  # one module in two namings
FLAT, FLAT_OUT = PROJ.replace(".", "_"), OUT.replace(".", "_")
NORM = "double_blocks.0.img_attn.norm.query_norm"
RANK = 4
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2, "target_modules": ["proj"]}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


A, B, BIAS = numbers(RANK, 8), numbers(8, RANK, seed=1), numbers(8, seed=2)
MAGNITUDE = numbers(8, seed=3).abs() + 1
W1, W2 = numbers(2, 2, seed=4), numbers(4, 4, seed=5)
DIFF, SCALE = numbers(4, seed=6), numbers(4, seed=7)
PEFT, DOWN = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")


def pair(module: str, ends: tuple[str, str] = PEFT, **more: Tensor) -> dict[str, Tensor]:
    """Return a module's factors, and tensors behind further ends of its name."""
    tensors = {f"{module}{ends[0]}": A, f"{module}{ends[1]}": B}
    return {**tensors, **{f"{module}.{end.replace('__', '.')}": tensor for end, tensor in more.items()}}


TWO = torch.tensor(2.0)
LOKR = {".lokr_w1": W1, ".lokr_w2": W2, ".alpha": TWO}


@dataclass(frozen=True)
class Case:
    """A file of a trainer, and what is expected of it."""

    tensors: Mapping[str, Tensor]
    updates: Mapping[str, tuple[str, float]]  # module as it is read -> kind and scale
    config: Mapping[str, Any] | None = None  # of adapter_config.json beside it
    metadata: Mapping[str, str] = field(default_factory=dict)


def one(tensors: Mapping[str, Tensor], module: str, scale: float = 1.0, kind: str = "lora", **more: Any) -> Case:
    return Case(tensors, {module: (kind, scale)}, **more)


# `save_lora_adapter` of diffusers: the fields of LoraConfig.to_dict()
OWN_METADATA = {"lora_adapter_metadata": json.dumps({**CONFIG, "lora_bias": False, "rank_pattern": {}})}
PIPELINE_METADATA = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in CONFIG.items()})}

WRITERS: dict[str, Case] = {
    "sd-scripts": one(pair(f"lora_unet_{FLAT}", DOWN, alpha=TWO), f"lora_unet_{FLAT}", 0.5),
    "musubi-tuner, converted to other": one(pair(f"diffusion_model.{PROJ}"), f"diffusion_model.{PROJ}"),
    "OneTrainer DIFFUSERS": one(pair(f"transformer.{OUT}"), f"transformer.{OUT}"),
    "OneTrainer ORIGINAL": one(pair(PROJ, alpha=TWO), PROJ, 0.5),
    "OneTrainer COMFY": one(pair(f"diffusion_model.{PROJ}", alpha=TWO), f"diffusion_model.{PROJ}", 0.5),
    "OneTrainer LEGACY": one(
        pair(f"lora_transformer_{FLAT_OUT}", DOWN, alpha=TWO), f"lora_transformer_{FLAT_OUT}", 0.5
    ),
    "OneTrainer ORIGINAL of Anima": one(pair(f"net.{PROJ}", alpha=TWO), f"net.{PROJ}", 0.5),
    "ai-toolkit": one(pair(f"transformer.{OUT}"), f"transformer.{OUT}"),
    "ai-toolkit, newer models": one(pair(f"diffusion_model.{OUT}"), f"diffusion_model.{OUT}"),
    "ai-toolkit, DoRA": one(pair(f"transformer.{OUT}", magnitude=MAGNITUDE), f"transformer.{OUT}", kind="dora"),
    "ai-toolkit, LoKr": one({f"transformer.{OUT}{e}": t for e, t in LOKR.items()}, f"transformer.{OUT}", kind="lokr"),
    "ai-toolkit, old LoKr": one(
        {f"lycoris_{FLAT_OUT}{e}": t for e, t in LOKR.items()}, f"lycoris_{FLAT_OUT}", kind="lokr"
    ),
    "diffusion-pipe": one(pair(f"diffusion_model.{PROJ}"), f"diffusion_model.{PROJ}", 0.5, config=CONFIG),
    "diffusion-pipe, HunyuanVideo": one(pair(f"transformer.{PROJ}"), f"transformer.{PROJ}", 0.5, config=CONFIG),
    "diffusion-pipe, LoKr": one(
        {f"diffusion_model.{PROJ}.lokr_w1": W1, f"diffusion_model.{PROJ}.lokr_w2": W2},
        f"diffusion_model.{PROJ}",
        0.5,
        "lokr",
        config={"peft_type": "LOKR", "r": RANK, "alpha": 2, "target_modules": ["proj"]},
    ),
    "SimpleTuner, LyCORIS": one(pair(f"lycoris_{FLAT_OUT}", DOWN, alpha=TWO), f"lycoris_{FLAT_OUT}", 0.5),
    "diffusers' scripts": one(
        pair(f"transformer.{OUT}"), f"transformer.{OUT}", 0.5, metadata=PIPELINE_METADATA
    ),
    "diffusers' scripts before metadata": one(pair(f"transformer.{OUT}"), f"transformer.{OUT}"),
    "diffusers' scripts, lora_bias": Case(
        pair(f"transformer.{OUT}", lora_B__bias=BIAS),
        {f"transformer.{OUT}.bias": ("add", 0.5), f"transformer.{OUT}": ("lora", 0.5)},
        metadata=PIPELINE_METADATA,
    ),
    "save_lora_adapter": one(pair(OUT), OUT, 0.5, metadata=OWN_METADATA),
    "save_lora_adapter before metadata": one(pair(OUT), OUT),
    "save_lora_adapter, DoRA": one(
        pair(OUT, lora_magnitude_vector=MAGNITUDE), OUT, 1.0, "dora"
    ),
    "PEFT's save_pretrained": one(pair(f"base_model.model.{OUT}"), OUT, 0.5, config=CONFIG),
    "PixArt's scripts": one(pair(f"unet.base_model.model.{OUT}"), f"unet.base_model.model.{OUT}"),
    "fal's trainer of Kontext": one(pair(f"base_model.model.{PROJ}"), PROJ),
    "Qwen-Image-Lightning": one(pair(OUT, DOWN, alpha=TWO), OUT, 0.5),
    "DiffSynth-Studio": one(pair(OUT, (".lora_A.default.weight", ".lora_B.default.weight")), OUT),
    "Genmo": one(pair(PROJ, (".lora_A", ".lora_B")), PROJ),
    "XLabs": one(pair("double_blocks.0.processor.proj_lora1", (".down.weight", ".up.weight")), PROJ),
    "VideoX-Fun": one(pair(f"lora_unet__{FLAT}", DOWN, alpha=TWO), f"lora_unet__{FLAT}", 0.5),
    "LyCORIS": one(pair(f"lora_unet_{FLAT_OUT}", DOWN, alpha=TWO), f"lora_unet_{FLAT_OUT}", 0.5),
    "invoke-training, PEFT": one(pair(f"base_model.model.{OUT}"), OUT, 0.5, config=CONFIG),
    "Black Forest Labs' control": Case(
        {**pair(PROJ, lora_B__bias=BIAS), f"{NORM}.scale": SCALE},
        {f"{PROJ}.bias": ("add", 1.0), PROJ: ("lora", 1.0), f"{NORM}.scale": ("replace", 1.0)},
    ),
    "lightx2v": Case(
        {**pair(f"diffusion_model.{PROJ}", DOWN, diff_b=BIAS), f"diffusion_model.{NORM}.diff": DIFF},
        {
            f"diffusion_model.{PROJ}.bias": ("diff", 1.0),
            f"diffusion_model.{PROJ}": ("lora", 1.0),
            f"diffusion_model.{NORM}": ("diff", 1.0),
        },
    ),
    "ComfyUI's Save LoRA": Case(
        {**pair(f"diffusion_model.{PROJ}", DOWN), f"diffusion_model.{NORM}.set_weight": SCALE},
        {f"diffusion_model.{PROJ}": ("lora", 1.0), f"diffusion_model.{NORM}": ("replace", 1.0)},
    ),
}  # fmt: skip


def write(folder: Path, case: Case) -> Path:
    """Write a case as a folder."""
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in case.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", dict(case.metadata))
    if case.config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(case.config))
    return folder


@pytest.mark.parametrize("writer", WRITERS)
def test_a_writers_file_is_read(writer: str, tmp_path: Path) -> None:
    case = WRITERS[writer]
    adapter = open_adapter(write(tmp_path / "a", case))
    adapter.file.close()
    assert {module: (spec.kind, spec.scale) for module, spec in adapter.updates.items()} == case.updates
    used = {tensor for spec in adapter.updates.values() for tensor in spec.tensors.values()}
    assert used == {tensor for tensor in case.tensors if not tensor.endswith(".alpha")}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return Flux as a single file and as a folder."""
    folder = tmp_path_factory.mktemp("bases")
    weights = {layer.maker: base_of(layer, torch.float32, i) for i, layer in enumerate(FLUX)}
    return write_single(folder / "b.safetensors", "flux", weights), write_folder(folder / "b", "flux", weights)


def merged(base: Path, adapter: Path, out: Path) -> dict[str, Tensor]:
    loratool.merge(base, adapter, out, undo=False)
    return load_model(out / "transformer" if out.is_dir() else out)


def plain(case: Case) -> dict[str, Tensor]:
    """Return the same change in the names of sd-scripts and LyCORIS, whose bits other tests hold."""
    tensors: dict[str, Tensor] = {}
    for kind, scale in case.updates.values():
        own = {
            "lora": {"lora_down.weight": A, "lora_up.weight": B, "alpha": torch.tensor(scale * RANK)},
            "dora": {"lora_down.weight": A, "lora_up.weight": B, "dora_scale": MAGNITUDE.reshape(8, 1)},
            "lokr": {"lokr_w1": W1 * scale, "lokr_w2": W2},
            "add": {"diff_b": BIAS * scale},
            "diff": {},
            "replace": {},
        }[kind]
        tensors |= {f"lora_unet_{FLAT}.{end}": tensor.clone() for end, tensor in own.items()}
    if any(name.endswith(".diff_b") for name in case.tensors):
        tensors[f"lora_unet_{FLAT}.diff_b"] = BIAS.clone()
    if any(name.endswith(".diff") for name in case.tensors):
        tensors[f"lora_unet_{NORM.replace('.', '_')}.diff"] = DIFF.clone()
    return tensors


@pytest.mark.parametrize("writer", spread(WRITERS, 16))
def test_a_writers_file_is_merged(writer: str, bases: tuple[Path, Path], tmp_path: Path) -> None:
    case = WRITERS[writer]
    adapter = write(tmp_path / "a", case)
    save_file(plain(case), tmp_path / "plain.safetensors")
    replaced = any(kind == "replace" for kind, _ in case.updates.values())
    norms = (f"model.diffusion_model.{NORM}.scale", "transformer_blocks.0.attn.norm_q.weight")
    for base, norm in zip(bases, norms, strict=True):
        usual = merged(base, tmp_path / "plain.safetensors", tmp_path / f"plain-{base.name}")
        if replaced:
            usual[norm] = SCALE
        found = merged(base, adapter, tmp_path / f"out-{base.name}")
        assert found.keys() == usual.keys()
        assert [name for name, tensor in usual.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize(
    "writer", ["save_lora_adapter, DoRA", "Black Forest Labs' control", "fal's trainer of Kontext"]
)
def test_a_file_without_a_config_gets_one_when_it_is_resized(
    writer: str, bases: tuple[Path, Path], tmp_path: Path
) -> None:
    """PEFT reads neither magnitudes nor biases that its config does not announce."""
    adapter = write(tmp_path / "a", WRITERS[writer])
    loratool.resize(adapter, tmp_path / "r", rank=RANK)
    usual, found = (merged(bases[0], each, tmp_path / f"{each.name}.safetensors") for each in (adapter, tmp_path / "r"))
    assert all(torch.allclose(found[name], tensor, atol=1e-5) for name, tensor in usual.items())


def test_a_bias_of_fused_rows_is_added_and_taken_back(bases: tuple[Path, Path], tmp_path: Path) -> None:
    """diffusers' to_k is rows 8 to 16 of the single file's qkv, and its bias too."""
    module = "transformer.transformer_blocks.0.attn.to_k"
    adapter = write(tmp_path / "a", Case(pair(module, lora_B__bias=BIAS), {}))
    out = tmp_path / "m.safetensors"
    loratool.merge(bases[0], adapter, out, undo=True)
    name = "model.diffusion_model.double_blocks.0.img_attn.qkv.bias"
    before, after = load_model(bases[0])[name], load_model(out)[name]
    assert torch.equal(after[8:16], before[8:16] + BIAS)
    assert torch.equal(after[:8], before[:8]) and torch.equal(after[16:], before[16:])
    loratool.unmerge(out, adapter, out=tmp_path / "u.safetensors")
    assert torch.equal(load_model(tmp_path / "u.safetensors")[name], before)


# file -> the error, what it says and its exit code
REFUSED: dict[str, tuple[Case, type[LoratoolError], str]] = {
    "half a pair": (Case({f"{PROJ}.lora_A.weight": A}, {}), InputError, rf"{PROJ}\.lora_A\.weight: has no partner"),
    "half a pair of Genmo's": (Case({f"{PROJ}.lora_B": B}, {}), InputError, rf"{PROJ}\.lora_B: has no partner"),
    "a bias without factors": (
        Case({f"transformer.{OUT}.lora_B.bias": BIAS, **pair(f"transformer.{FLAT_OUT}")}, {}),
        InputError,
        r"lora_B\.bias: has no partner",
    ),
    "two alphas": (
        Case(pair(f"diffusion_model.{PROJ}", alpha=torch.tensor(4.0)), {}, CONFIG),
        InputError,
        rf"{PROJ}\.alpha: is 4, but the config says 2",
    ),
    "an alpha of rsLoRA": (
        Case(pair(f"diffusion_model.{PROJ}", alpha=TWO), {}, {**CONFIG, "use_rslora": True}),
        InputError,
        r"divided by the root of the rank",
    ),
    "an alpha of the metadata's": (
        Case(pair(f"transformer.{OUT}", alpha=torch.tensor(4.0)), {}, None, PIPELINE_METADATA),
        InputError,
        rf"{OUT}\.alpha: is 4, but the config says 2",
    ),
    "a config of another rank": (
        Case(pair(f"diffusion_model.{PROJ}"), {}, {**CONFIG, "r": 8}),
        InputError,
        r"rank",
    ),
    "a suffix that is not known": (
        Case({**pair(f"diffusion_model.{PROJ}"), f"diffusion_model.{PROJ}.lora_C": A}, {}),
        InputError,
        r"lora_C: is not a LoRA tensor",
    ),
    "a base that has grown": (
        Case({**pair(f"diffusion_model.{PROJ}"), f"diffusion_model.{PROJ}.reshape_weight": torch.tensor([8, 12])}, {}),
        InputError,
        r"reshape_weight: is a tensor of ComfyUI's LoRA of a model that has grown",
    ),
    "a language model's in loralib": (
        Case(pair("model.layers.0.self_attn.q_proj", (".lora_A", ".lora_B")), {}),
        NeedsFlag,
        r"pass alpha",
    ),
    "another model's net": (Case(pair("net.encoder.0.fc"), {}), NeedsFlag, r"pass alpha"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_file_does_not_say_or_says_twice(what: str, tmp_path: Path) -> None:
    case, error, match = REFUSED[what]
    with pytest.raises(error, match=match):
        open_adapter(write(tmp_path / "a", case))


# Bare paths of other models: to take one for an image model's would be to take alpha for the rank
OTHERS = {
    "Llama": "model.layers.0.self_attn.q_proj",
    "Llama, its backbone": "layers.0.mlp.down_proj",
    "GPT-2": "transformer.h.0.attn.c_attn",
    "MPT": "transformer.blocks.0.attn.out_proj",
    "ChatGLM": "transformer.encoder.layers.0.self_attention.query_key_value",
    "MPT, its backbone": "blocks.0.attn.out_proj",
    "timm's ViT": "blocks.0.attn.qkv",
    "Meta's Llama": "layers.0.feed_forward.w1",
    "MiniCPM-V": "llm.model.layers.0.self_attn.q_proj",
    "embeddings": "embed_tokens",
    "T5": "encoder.block.0.layer.0.SelfAttention.q",
    "CLIP": "text_model.encoder.layers.0.self_attn.q_proj",
}


@pytest.mark.parametrize("model", OTHERS)
@pytest.mark.parametrize("ends", [PEFT, (".lora_A", ".lora_B")])
def test_other_models_files_must_say_alpha(model: str, ends: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(NeedsFlag, match=r"pass alpha"):
        open_adapter(write(tmp_path / "a", Case(pair(OTHERS[model], ends), {})))


def test_an_alpha_that_was_given_must_not_contradict_the_config(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", WRITERS["diffusion-pipe"])
    with pytest.raises(UsageError, match=r"alpha=3 contradicts the config's 2"):
        open_adapter(folder, alpha=3.0)
    open_adapter(folder, alpha=2.0).file.close()


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model."])
@pytest.mark.parametrize("others", [{"lora_alpha": 3}, {"use_rslora": True}, {"alpha_pattern": {"proj": 3}}])
def test_metadata_must_not_contradict_the_config_beside(prefix: str, others: Mapping[str, Any], tmp_path: Path) -> None:
    metadata = PIPELINE_METADATA if prefix == "transformer." else OWN_METADATA
    folder = write(tmp_path / "a", one(pair(f"{prefix}{PROJ}"), PROJ, config=CONFIG, metadata=metadata))
    open_adapter(folder).file.close()
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **others}))
    with pytest.raises(InputError, match=f"its metadata sets {next(iter(others))} to .* beside it to") as found:
        open_adapter(folder)
    assert found.value.remedy and found.value.remedy.endswith("remove the wrong one")


def test_what_only_the_config_has_is_said(tmp_path: Path) -> None:
    case = one(pair(f"diffusion_model.{PROJ}"), PROJ, config={**CONFIG, "modules_to_save": ["img_in"]})
    adapter = open_adapter(write(tmp_path / "a", case))
    adapter.file.close()
    assert adapter.missing == ("the config's modules_to_save names img_in, but the file has no tensors of it",)


def test_two_prefixes_of_one_module(bases: tuple[Path, Path], tmp_path: Path) -> None:
    case = Case({**pair(f"diffusion_model.{PROJ}"), **pair(f"transformer.{PROJ}")}, {})
    with pytest.raises(InputError, match="both bind to it"):
        merged(bases[0], write(tmp_path / "a", case), tmp_path / "m.safetensors")


CONTROL = {**pair(PROJ, lora_B__bias=BIAS), **{f"img_in.lora_{side}.weight": x for side, x in
           (("A", numbers(RANK, 8, seed=8)), ("B", numbers(8, RANK, seed=9)))}, f"{NORM}.scale": SCALE}  # fmt: skip


@pytest.mark.parametrize("i", [0, 1])
def test_a_control_lora_needs_a_base_of_more_inputs(
    i: int, bases: tuple[Path, Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    adapter = write(tmp_path / "a", Case(CONTROL, {}))
    result = run("merge", bases[i], adapter, "-o", tmp_path / "m")
    assert result.exit_code == 4 and ("img_in.weight", "x_embedder.weight")[i] in result.stderr
    assert "has 4 inputs, and an adapter 8" in result.stderr and "--allow widen" in result.stderr
    assert not (tmp_path / "m").exists()


def copied(base: Path, folder: Path) -> Path:
    to = folder / "copy" / base.name
    to.parent.mkdir()
    return shutil.copytree(base, to) if base.is_dir() else Path(shutil.copy(base, to))


@pytest.mark.parametrize("i", [0, 1])
def test_a_widened_base_is_as_if_it_had_columns_of_zeros(i: int, bases: tuple[Path, Path], tmp_path: Path) -> None:
    """The bytes are those of a merge into a base that was padded by hand; unmerge gives the plain base's."""
    base, adapter = copied(bases[i], tmp_path), write(tmp_path / "a", Case(CONTROL, {}))
    files = [base] if base.is_file() else sorted(each for each in base.rglob("*") if each.is_file())
    former = {each.relative_to(base): each.read_bytes() for each in files}
    config = base / "transformer" / "config.json"
    if base.is_dir():
        config.write_text(json.dumps({"_class_name": "FluxTransformer2DModel", "in_channels": 4}))
        former[config.relative_to(base)] = config.read_bytes()
    out, back = (tmp_path / (f"{name}.safetensors" if base.is_file() else name) for name in ("out", "back"))
    loratool.merge(base, adapter, out, allow="widen")
    weights = base if base.is_file() else next((base / "transformer").glob("*.safetensors"))
    by_hand, name = load_file(weights), ("model.diffusion_model.img_in.weight", "x_embedder.weight")[i]
    by_hand[name] = torch.cat([by_hand[name], torch.zeros(8, 4, dtype=by_hand[name].dtype)], 1)
    save_file(by_hand, tmp_path / "padded.safetensors")
    usual = merged(tmp_path / "padded.safetensors", adapter, tmp_path / "usual.safetensors")
    found = load_file(out if base.is_file() else out / "transformer" / weights.name)
    assert found[name].shape == (8, 8) and all(torch.equal(found[each], tensor) for each, tensor in usual.items())
    assert loratool.verify(base, adapter, out).status == "proven"
    assert loratool.verify(base, adapter, base).status == "wrong"
    if base.is_dir():
        written = json.loads((out / "transformer" / "config.json").read_text())
        assert (written["in_channels"], written["out_channels"]) == (8, 4)
    loratool.unmerge(out, adapter, back)
    assert {each: (back / each if base.is_dir() else back).read_bytes() for each in former} == former
    loratool.merge(out, {adapter: -1.0}, tmp_path / (f"again{out.suffix}"), undo=False)  # a wide base needs no flag


def test_a_widened_base_in_place(bases: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = copied(bases[0], tmp_path), write(tmp_path / "a", Case(CONTROL, {}))
    former = base.read_bytes()
    with pytest.raises(LoratoolError, match="in place"):
        loratool.merge(base, adapter, in_place=True, allow="widen")
    assert base.read_bytes() == former


def test_a_config_that_says_another_number_of_inputs(bases: tuple[Path, Path], tmp_path: Path) -> None:
    base = copied(bases[1], tmp_path)
    (base / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel", "in_channels": 6}')
    with pytest.raises(InputError, match="has 4 inputs, and in_channels of its config.json is 6"):
        loratool.merge(base, write(tmp_path / "a", Case(CONTROL, {})), tmp_path / "m", allow="widen")


# Wan's modules under diffusers' names, with what tells the family
WAN = {
    "condition_embedder.time_proj.weight": (48, 8),
    "patch_embedding.weight": (8, 4, 1, 2, 2),
    "blocks.0.norm2.weight": (8,),
    "blocks.0.norm2.bias": (8,),
    "blocks.0.attn1.norm_q.weight": (8,),
    "blocks.0.attn1.to_q.weight": (8, 8),
    "blocks.0.attn1.to_q.bias": (8,),
}
SELF_Q = "blocks.0.self_attn.q"
# ai-toolkit's file of both denoisers, and lightx2v's with differences of norms and of a convolution
OF_WAN: dict[str, tuple[dict[str, Tensor], tuple[dict[str, Tensor], ...]]] = {
    "ai-toolkit": (
        {
            **pair(f"diffusion_model.transformer_1.{SELF_Q}"),
            **pair(f"diffusion_model.transformer_2.{SELF_Q}"),
        },
        ({"blocks.0.attn1.to_q.weight": B @ A}, {"blocks.0.attn1.to_q.weight": B @ A}),
    ),
    "lightx2v": (
        {
            **pair(f"diffusion_model.{SELF_Q}", DOWN, diff_b=BIAS),
            "diffusion_model.blocks.0.norm3.diff": BIAS,
            "diffusion_model.blocks.0.norm3.diff_b": MAGNITUDE,
            "diffusion_model.blocks.0.self_attn.norm_q.diff": BIAS,
            "diffusion_model.patch_embedding.diff": numbers(8, 4, 1, 2, 2, seed=9),
        },
        (
            {
                "blocks.0.attn1.to_q.weight": B @ A,
                "blocks.0.attn1.to_q.bias": BIAS,
                "blocks.0.norm2.weight": BIAS,
                "blocks.0.norm2.bias": MAGNITUDE,
                "blocks.0.attn1.norm_q.weight": BIAS,
                "patch_embedding.weight": numbers(8, 4, 1, 2, 2, seed=9),
            },
            {},
        ),
    ),
    "DiffSynth-Studio": (
        pair(SELF_Q, (".lora_A.default.weight", ".lora_B.default.weight")),
        ({"blocks.0.attn1.to_q.weight": B @ A}, {}),
    ),
    "diffusers, the second": (
        pair("transformer_2.blocks.0.attn1.to_q"),
        ({}, {"blocks.0.attn1.to_q.weight": B @ A}),
    ),
}


@pytest.mark.parametrize("writer", OF_WAN)
def test_wans_two_denoisers(writer: str, tmp_path: Path) -> None:
    tensors, changes = OF_WAN[writer]
    base, parts = tmp_path / "b", ("transformer", "transformer_2")
    base.mkdir()
    (base / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **{p: ["", ""] for p in parts}}))
    for seed, part in enumerate(parts):
        (base / part).mkdir()
        (base / part / "config.json").write_text("{}")
        own = {name: numbers(*shape, seed=10 + seed) for name, shape in WAN.items()}
        save_file(own, base / part / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    loratool.merge(base, write(tmp_path / "a", Case(tensors, {})), tmp_path / "m", undo=False)
    for part, changed in zip(parts, changes, strict=True):
        before, after = load_model(base / part), load_model(tmp_path / "m" / part)
        assert {name for name in before if not torch.equal(before[name], after[name])} == changed.keys()
        for name, change in changed.items():
            assert torch.allclose(after[name], before[name] + change, atol=1e-5)
