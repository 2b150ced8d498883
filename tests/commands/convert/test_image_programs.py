"""Hold what is written for image programs to their own code: the weights that they make are those of a merge.

`lib/oracles/image_programs.py` runs the programs. The models are diffusers', at tiny widths, with an adapter on every
linear layer, no two of which share an A; PEFT's merge, or its formula, is what all must give.
"""

from __future__ import annotations

import functools
import importlib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FIXTURES
from lib.files import lycoris_files
from lib.models import diffusers_models, dit_models, every_denoiser
from lib.models.dit_spellings import Subject, merged_by_peft, telling_widths
from lib.oracles import image_programs as programs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool
from loratool import InputError, NeedsFlag
from loratool.adapters.formats import open_adapter
from loratool.architectures.families import FAMILIES
from loratool.architectures.families.lookup import locate
from loratool.architectures.families.table import Naming
from loratool.architectures.runtimes.image_programs import IMAGE_RUNTIMES
from loratool.transform.for_image_program import divides_otherwise, is_known_kind

pytestmark = pytest.mark.slow

NAMES = {Naming.MAKER: "maker", Naming.DIFFUSERS: "diffusers", Naming.COMFY: "comfy"}
NEAR = 1e-6  # of float32's sums


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with telling_widths():
        yield
    torch.set_num_threads(threads)


def cases(runtime: str) -> list[str]:
    return [case for case in dit_models.MODELS if dit_models.family_of(case) in IMAGE_RUNTIMES[runtime].families]


def written(subject: Subject, adapter: Path, runtime: str) -> tuple[Path, frozenset[str]]:
    """Convert an adapter for a program; return also the modules that had to be excluded, by diffusers' paths."""
    out, base = subject.place(".safetensors"), subject.base_in("component")
    options: dict[str, list[str]] = {}
    try:
        loratool.convert(adapter, out, runtime=runtime, base=base)
    except NeedsFlag as error:
        assert error.asks_for("--exclude"), error
        options = {"exclude": [word for word in shlex.split(error.flags) if word != "--exclude"]}
        loratool.convert(adapter, out, runtime=runtime, base=base, **options)
    report = loratool.convert(adapter, subject.place(".safetensors"), runtime=runtime, base=base, **options)
    return out, frozenset(module.removeprefix("transformer.") for module in report.dropped)


def expected(subject: Subject, naming: str, excluded: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """Return the merged weights in a naming, without the changes of some modules."""
    kept = {n: subject.base[n] if n.removesuffix(".weight") in excluded else W for n, W in subject.fused.items()}
    return subject.renamed(naming, kept)


def require_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=0, atol=NEAR * float(tensor.abs().max()))


def naming_in_comfy(subject: Subject) -> str:
    return "comfy" if "comfy" in subject.namings else "maker"


@pytest.mark.parametrize("case", cases("comfyui"))
def test_comfyui_applies_what_is_written_for_it(case: str, tmp_path: Path) -> None:
    subject = Subject(case, tmp_path).other
    naming = naming_in_comfy(subject)
    out, excluded = written(subject, subject.adapter("diffusers"), "comfyui")
    assert not excluded
    found, _, unused = programs.comfyui(load_file(out), subject.renamed(naming, subject.base))
    assert not unused
    require_equal(found, expected(subject, naming))


def dora_of(subject: Subject, folder: Path) -> Path:
    """Write the subject's adapter as DoRA along the outputs, with magnitudes of their own."""
    tensors, g = load_file(subject.adapter("diffusers")), torch.Generator().manual_seed(5)
    for path, (_, B) in subject.factors.items():
        norms = subject.base[f"{path}.weight"].norm(dim=1)
        tensors[f"transformer.{path}.lora_magnitude_vector"] = norms * (1 + 0.2 * torch.randn(len(B), generator=g))
    save_file(tensors, folder / "dora.safetensors")
    return folder / "dora.safetensors"


@pytest.mark.parametrize("layout", ["component", "model.diffusion_model."])
@pytest.mark.parametrize("case", ["flux", "wan", "qwen_image", "sd3", "hunyuan_video"])
class TestDoraForComfyUI:
    def test_it_acts_as_a_merge_at_any_strength(self, case: str, layout: str, tmp_path: Path) -> None:
        subject = Subject(case, tmp_path).other
        naming, adapter, base = naming_in_comfy(subject), dora_of(subject, tmp_path), subject.base_in(layout)
        loratool.convert(adapter, tmp_path / "out.safetensors", runtime="comfyui", base=base)
        plain, wanted = subject.renamed(naming, subject.base), subject.merged(adapter, "component")
        merged = subject.renamed(naming, subject.read(wanted, "component"))
        for strength in (1.0, 0.5):
            found, _, unused = programs.comfyui(load_file(tmp_path / "out.safetensors"), plain, strength=strength)
            assert not unused
            require_equal(found, {n: W + strength * (merged[n] - W) for n, W in plain.items()})

    def test_its_spelling_alone_does_not(self, case: str, layout: str, tmp_path: Path) -> None:
        subject = Subject(case, tmp_path).other
        naming, adapter = naming_in_comfy(subject), dora_of(subject, tmp_path)
        base = subject.base_in(layout)
        report = loratool.convert(adapter, tmp_path / "out.safetensors", to="comfy", base=base)
        assert any("--for comfyui" in note for note in report.notes)
        found, _, _ = programs.comfyui(load_file(tmp_path / "out.safetensors"), subject.renamed(naming, subject.base))
        merged = subject.renamed(naming, subject.read(subject.merged(adapter, "component"), "component"))
        assert max(float((found[n] - W).abs().max() / W.abs().max()) for n, W in merged.items()) > 0.01

    def test_the_file_is_for_it_alone(self, case: str, layout: str, tmp_path: Path) -> None:
        subject = Subject(case, tmp_path)
        adapter, base = dora_of(subject, tmp_path), subject.base_in(layout)
        loratool.convert(adapter, tmp_path / "out.safetensors", runtime="comfyui", base=base)
        with safe_open(tmp_path / "out.safetensors", "pt") as file:
            assert file.metadata()["loratool_only_for"] == "comfyui"
        with pytest.raises(InputError, match="is only for comfyui"):
            loratool.merge(base, tmp_path / "out.safetensors", tmp_path / "merged.safetensors")
        with pytest.raises(NeedsFlag, match="base=BASE"):
            loratool.convert(adapter, tmp_path / "other.safetensors", runtime="comfyui")


@pytest.mark.parametrize("case", cases("diffusers"))
def test_diffusers_applies_what_is_written_for_it(case: str, tmp_path: Path) -> None:
    subject = Subject(case, tmp_path).other
    out, excluded = written(subject, subject.adapter("diffusers"), "diffusers")
    assert not excluded
    model = dit_models.build(case)
    programs.diffusers_loads(out, subject.family.key, model)
    require_equal(merged_by_peft(model), expected(subject, "diffusers"))


@pytest.mark.parametrize("case", [case for case in cases("musubi") if case != "hunyuan_video/framepack"])
def test_musubi_applies_what_is_written_for_it(case: str, tmp_path: Path) -> None:
    subject = Subject(case, tmp_path).other
    naming = NAMES[subject.family.kohya]
    out, excluded = written(subject, subject.adapter("diffusers"), "musubi")
    save_file(
        {n: t.contiguous() for n, t in subject.renamed(naming, subject.base).items()}, tmp_path / "base.safetensors"
    )
    found = programs.musubi(tmp_path / "base.safetensors", load_file(out))
    require_equal(found, expected(subject, naming, excluded))


@pytest.mark.parametrize(
    "case", [case for case in cases("sd-scripts") if dit_models.family_of(case) in programs.CLASSES]
)
def test_sd_scripts_applies_what_is_written_for_it(case: str, tmp_path: Path) -> None:
    subject = Subject(case, tmp_path).other
    naming = NAMES[subject.family.kohya]
    out, excluded = written(subject, subject.adapter("diffusers"), "sd-scripts")
    found = programs.sd_scripts(subject.family.key, subject.renamed(naming, subject.base), load_file(out))
    wanted = expected(subject, naming, excluded)
    assert {name for name, tensor in wanted.items() if name.endswith(".weight") and tensor.dim() == 2} == found.keys()
    require_equal(found, {name: wanted[name] for name in found})


def digitless(name: str) -> str:
    return re.sub(r"\d+", "N", name)


# family -> sd-scripts' network, and what makes its model, of its real size where the code has no other
SD_MODELS: dict[str, tuple[str, str]] = {
    "flux": ("lora_flux", "flux_models.Flux(flux_models.configs['dev'].params)"),
    "chroma": ("lora_flux", "chroma_models.Chroma(chroma_models.chroma_params)"),
    "sd3": (
        "lora_sd3",
        "sd3_models.create_sd3_mmdit(sd3_models.SD3Params(patch_size=2, depth=24, num_patches=36864, "
        "pos_embed_max_size=192, adm_in_channels=2048, qk_norm=None, x_block_self_attn_layers=[], "
        "context_embedder_in_features=4096, context_embedder_out_features=1536, model_type='medium'))",
    ),
    "lumina2": ("lora_lumina", "lumina_models.NextDiT_2B_GQA_patch2_Adaln_Refiner()"),
    "hunyuan_image": ("lora_hunyuan_image", "hunyuan_image_models.HYImageDiffusionTransformer()"),
    "anima": (
        "lora_anima",
        "anima_models.Anima(240, 240, 128, 16, 16, 2, 1, model_channels=2048, num_blocks=28, num_heads=16, "
        "pos_emb_cls='rope3d', use_adaln_lora=True)",
    ),
}
MUSUBI_MODELS: dict[str, tuple[str, str, str]] = {
    "wan": ("lora_wan", "wan.modules.model", "WanModel(dim=64, ffn_dim=128, num_heads=4, num_layers=2, text_dim=32)"),
    "flux": ("lora_flux", "flux.flux_models", "Flux(configs_flux_dev_context.params)"),
    "flux2": ("lora_flux_2", "flux_2.flux2_models", "Flux2(Flux2Params())"),
    "qwen_image": ("lora_qwen_image", "qwen_image.qwen_image_model", "QwenImageTransformer2DModel(num_layers=2)"),
    "z_image": ("lora_zimage", "zimage.zimage_model", "ZImageTransformer2DModel(n_layers=2)"),
    "hunyuan_video": (
        "lora",
        "hunyuan_model.models",
        "HYVideoDiffusionTransformer(4096, 768, attn_mode='torch', mm_double_blocks_depth=2, "
        "mm_single_blocks_depth=2, guidance_embed=True)",
    ),
    "hunyuan_video15": (
        "lora_hv_1_5",
        "hunyuan_video_1_5.hunyuan_video_1_5_models",
        "HunyuanVideo_1_5_DiffusionTransformer()",
    ),
    "kandinsky5": ("lora_kandinsky", "kandinsky5.models.dit", "DiffusionTransformer3D()"),
    "ideogram4": ("lora_ideogram4", "ideogram4.ideogram4_model", "Ideogram4Transformer(Ideogram4Config(num_layers=2))"),
    "krea2": (
        "lora_krea2",
        "krea2.krea2_mmdit",
        "SingleStreamDiT(SingleMMDiTConfig(features=512, tdim=64, txtdim=64, heads=4, multiplier=4, layers=2, patch=2, "
        "channels=16, txtlayers=2, txtheads=4, txtkvheads=4))",
    ),
}


def looked_for(model: nn.Module, network_of: Callable[[dict[str, Tensor]], Any]) -> tuple[set[str], set[str]]:
    """Return the names of a model's layers, and of those among them that a network of its weights adapts."""
    layers = {f"lora_unet_{n.replace('.', '_')}": m for n, m in model.named_modules() if is_layer(m)}
    state = {}
    for name, layer in layers.items():
        out, inputs = layer.weight.shape[:2]
        state |= {f"{name}.lora_down.weight": torch.empty(1, inputs), f"{name}.lora_up.weight": torch.empty(out, 1)}
        state[f"{name}.alpha"] = torch.tensor(1.0, device="cpu")
    return {*layers}, {lora.lora_name for lora in network_of(state).unet_loras}


def is_layer(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv2d", "Conv3d")


def require_row(case: str, runtime: str, tmp_path: Path, every: set[str], adapted: set[str]) -> None:
    """Require that a row's expression selects the layers that a program's network adapts, under our names."""
    subject = Subject(case, tmp_path)
    expression = IMAGE_RUNTIMES[runtime].modules.get(subject.family.key, ".*")
    paths = [name.removesuffix(".weight") for name in subject.namings[NAMES[subject.family.kohya]]]
    ours = {digitless(f"lora_unet_{path.replace('.', '_')}"): path for path in paths}
    known = {digitless(name) for name in every}
    layers = {flat: path for flat, path in ours.items() if flat in known}
    names = {digitless(name) for name in adapted}
    assert {flat for flat, path in layers.items() if re.fullmatch(expression, path)} == names & layers.keys()
    assert names <= layers.keys() or subject.family.key == "anima"


@pytest.mark.parametrize("family", SD_MODELS)
def test_the_rows_of_sd_scripts_are_its_networks(family: str, tmp_path: Path) -> None:
    programs.find_program("sd-scripts")
    name, expression = SD_MODELS[family]
    module = expression.partition(".")[0]
    space = {module: importlib.import_module(f"library.{module}")}
    network = importlib.import_module(f"networks.{name}")
    encoders = [nn.Module()] if family in ("lumina2", "anima") else []

    def network_of(state: dict[str, Tensor]) -> Any:
        return network.create_network_from_weights(1.0, None, None, encoders, model, weights_sd=state)[0]

    with torch.device("meta"):
        model = eval(expression, space)
        found = looked_for(model, network_of)
    require_row(family, "sd-scripts", tmp_path, *found)


@pytest.mark.parametrize("family", MUSUBI_MODELS)
def test_the_rows_of_musubi_are_its_networks(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs.find_program("musubi", "src")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")  # a module of Wan's asks for it
    name, module, expression = MUSUBI_MODELS[family]
    network = importlib.import_module(f"musubi_tuner.networks.{name}")
    space = vars(importlib.import_module(f"musubi_tuner.{module}"))

    def network_of(state: dict[str, Tensor]) -> Any:
        return network.create_arch_network_from_weights(1.0, state, unet=model)

    with torch.device("meta"):
        model = eval(expression, dict(space))
        found = looked_for(model, network_of)
    require_row(family, "musubi", tmp_path, *found)


@pytest.mark.parametrize("case", cases("comfyui"))
def test_comfyui_reads_kohyas_names_too(case: str, tmp_path: Path) -> None:
    """Except where it has names of its own, which `inspect --for comfyui` tells."""
    subject = Subject(case, tmp_path).other
    naming, out = naming_in_comfy(subject), subject.place(".safetensors")
    report = loratool.convert(subject.adapter("diffusers"), out, to="kohya", base=subject.base_in("component"))
    found, _, unused = programs.comfyui(load_file(out), subject.renamed(naming, subject.base))
    findings = loratool.inspect_for(out, runtime="comfyui", base=subject.base_in("component")).findings
    assert {name.partition(".")[0] for name in unused} == {module for each in findings for module in each.modules}
    assert any("--for comfyui" in note for note in report.notes) == bool(findings)
    if not findings:
        require_equal(found, expected(subject, naming))


@pytest.mark.parametrize("program", ["comfyui", "forge"])
@pytest.mark.parametrize("kind", [kind for kind in lycoris_files.KINDS if kind != "boft"])
def test_kinds_in_comfyui_and_forge(kind: str, program: str, tmp_path: Path) -> None:
    """Those of the row are applied as a merge applies them, and others are not."""
    layer, _ = lycoris_files.KINDS[kind]
    base = lycoris_files.base_of(layer, torch.float32)
    adapter = lycoris_files.write_lycoris(
        tmp_path / "a.safetensors", {base.path: lycoris_files.roles_of(kind, base.dtype)}
    )
    loratool.merge(base.write(tmp_path / "b.safetensors"), adapter, tmp_path / "m.safetensors", undo=False)
    merged, plain = load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "b.safetensors")
    apply = programs.comfyui if program == "comfyui" else functools.partial(programs.forge, config=UNETS["sd1"])
    try:
        found, _, _ = apply(load_file(adapter), plain)
    except RuntimeError:  # Forge stops at LoKr's core, and ComfyUI leaves the weight as it is
        found = plain
    off = max(float((found[n] - W).abs().max() / (W - plain[n]).abs().max().clamp(min=1e-9)) for n, W in merged.items())
    opened, row = open_adapter(adapter), IMAGE_RUNTIMES[program]
    with closing(opened.file):
        updates = opened.updates.values()
        is_applied = all(is_known_kind(row, each) and not divides_otherwise(row, each) for each in updates)
    assert is_applied == (off < 1e-5), off


def test_a_unet_and_two_clips_in_comfyui(tmp_path: Path) -> None:
    adapter, base = FIXTURES / "sdxl" / "adapter.safetensors", tmp_path / "base.safetensors"
    save_file({n: W.float() for n, W in load_file(FIXTURES / "sdxl" / "base.safetensors").items()}, base)
    loratool.convert(adapter, tmp_path / "a.safetensors", runtime="comfyui")
    loratool.merge(base, adapter, tmp_path / "m.safetensors", undo=False)
    plain, merged = ({in_comfyui(n): W for n, W in load_file(p).items()} for p in (base, tmp_path / "m.safetensors"))
    denoiser = {n.removeprefix("diffusion_model."): W for n, W in plain.items() if n.startswith("diffusion_model.")}
    fused, v = "clip_g.transformer.text_model.encoder.layers.0.self_attn.in_proj.weight", slice(64, 96)
    clips = {n: W for n, W in plain.items() if n.startswith("clip_l.")}
    clips[fused.replace("in_proj", "v_proj")] = plain[fused][v]
    found, encoders, unused = programs.comfyui(load_file(tmp_path / "a.safetensors"), denoiser, clips)
    assert not unused and len(encoders) == 2
    require_equal(found, {n: merged[f"diffusion_model.{n}"] for n in denoiser})
    wanted = {n: merged[n] for n in clips if n in merged}
    require_equal(encoders, wanted | {fused.replace("in_proj", "v_proj"): merged[fused][v]})


def in_comfyui(name: str) -> str:
    """Return ComfyUI's name of a tensor of SDXL's single file."""
    name = name.removeprefix("model.").replace("conditioner.embedders.0.", "clip_l.")
    name = name.replace(
        "conditioner.embedders.1.model.transformer.resblocks.", "clip_g.transformer.text_model.encoder.layers."
    )
    return name.replace("attn.in_proj_weight", "self_attn.in_proj.weight")


def text_encoder(kind: str) -> nn.Module:
    """Return a small text encoder of transformers, with the names that ComfyUI has: CLIP's as before 5.6."""
    if kind == "clip":
        return Clip()
    sizes = {"vocab_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    wide = {"hidden_size": 16, "intermediate_size": 24, "pad_token_id": 0}
    if kind == "t5":
        return transformers.T5EncoderModel(transformers.T5Config(vocab_size=8, num_layers=2, **_T5))
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**sizes, **wide), add_pooling_layer=False)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **wide, num_key_value_heads=2)).model


# kind of text encoder -> ComfyUI's module and class, and the sizes of a small one
_T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
COMFY_ENCODERS = {
    "clip": ("clip_model", "CLIPTextModel", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 24, "hidden_act": "quick_gelu", "max_position_embeddings": 8, "eos_token_id": 2}),
    "t5": ("text_encoders.t5", "T5", {**_T5, "num_layers": 2, "dense_act_fn": "gelu_pytorch_tanh",
           "is_gated_act": True, "model_type": "t5", "vocab_size": 8}),
    "bert": ("text_encoders.bert", "BertModel", {"hidden_size": 16, "layer_norm_eps": 1e-12, "vocab_size": 8,
             "max_position_embeddings": 8, "type_vocab_size": 2, "pad_token_id": 0, "num_hidden_layers": 2,
             "intermediate_size": 24, "num_attention_heads": 2}),
    "llama": ("text_encoders.llama", "Llama2", {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 24,
              "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}),
}  # fmt: skip
# a module of the denoiser
BESIDE = {"hunyuan_dit": "blocks.0.attn1.to_out.0", "hidream": "double_stream_blocks.0.block.attn1.to_out"}
ENCODERS = [(family, name) for family, names in IMAGE_RUNTIMES["comfyui"].components.items() for name in names]


@pytest.mark.parametrize(("family", "name"), ENCODERS)
def test_comfyui_applies_to_text_encoders(family: str, name: str, tmp_path: Path) -> None:
    component = next(each for each in FAMILIES[family].components if each.name == name)
    kind = component.encoder or ("bert" if family == "hunyuan_dit" else "llama")
    encoder = text_encoder(kind)
    inside = "model." if kind == "llama" else ""  # of the causal model
    tensors, weights = adapted(encoder, f"{component.diffusers}{inside}")
    if not component.encoder:  # such names alone are of a language model
        tensors |= {f"transformer.{BESIDE[family]}.lora_{side}.weight": torch.ones(1, 1) for side in "AB"}
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", runtime="comfyui", architecture=family)
    prefix = component.comfy.removeprefix("text_encoders.") + inside
    module, class_name, sizes = COMFY_ENCODERS[kind]
    with torch.device("meta"):
        theirs = programs.comfy_class(module, class_name)(sizes, None, "meta", programs.comfy_operations())
    # of which the prefix has the last module
    stem = prefix.partition(".transformer.")[2]
    assert {f"{stem}{path}" for path in weights} <= theirs.state_dict().keys()
    plain = {f"{prefix}{path}": W for path, W in encoder.state_dict().items()}
    _, found, unused = programs.comfyui(load_file(tmp_path / "b.safetensors"), {}, plain)
    assert all(name.startswith("diffusion_model.") for name in unused)
    require_equal(found, {f"{prefix}{path}": W for path, W in weights.items()})


_DIT = {"hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 4, "depth": 2, "depth_single_blocks": 2, "qkv_bias": True}
_STREAMS = {**_DIT, "axes_dim": [4, 6, 6], "context_in_dim": 16, "in_channels": 16, "theta": 10000}
_HUNYUAN = {**_STREAMS, "vec_in_dim": 8, "image_model": "hunyuan_video", "out_channels": 16, "patch_size": [1, 2, 2]}
_WAN = {"dim": 64, "ffn_dim": 128, "num_heads": 4, "num_layers": 2, "text_dim": 16, "freq_dim": 16}
# case -> ComfyUI's module and class of the denoiser, and a small config of it
COMFY_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flux": ("flux.model", "Flux", {**_STREAMS, "vec_in_dim": 8, "image_model": "flux", "out_channels": 16,
                                    "patch_size": 2, "guidance_embed": True}),
    "chroma": ("chroma.model", "Chroma", {**_STREAMS, "image_model": "chroma", "out_channels": 16, "patch_size": 2,
                                          "in_dim": 64, "out_dim": 64, "hidden_dim": 64, "n_layers": 2}),
    "sd3": ("modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper",
            {"input_size": None, "pos_embed_scaling_factor": None, "pos_embed_offset": None, "pos_embed_max_size": 8,
             "patch_size": 2, "in_channels": 16, "depth": 2, "num_patches": 64, "adm_in_channels": 16,
             "context_embedder_config": {"target": "torch.nn.Linear",
                                         "params": {"in_features": 16, "out_features": 128}}}),
    "wan": ("wan.model", "WanModel", {**_WAN, "model_type": "t2v"}),
    "wan/i2v": ("wan.model", "WanModel", {**_WAN, "model_type": "i2v"}),
    "wan/vace": ("wan.model", "VaceWanModel", {**_WAN, "vace_layers": 2, "vace_in_dim": 96}),
    "qwen_image": ("qwen_image.model", "QwenImageTransformer2DModel", {"num_layers": 2, "image_model": "qwen_image"}),
    "hunyuan_video": ("hunyuan_video.model", "HunyuanVideo",
                      {**_HUNYUAN, "guidance_embed": True, "byt5": False, "meanflow": False}),
    "hunyuan_image": ("hunyuan_video.model", "HunyuanVideo",
                      {**_HUNYUAN, "guidance_embed": False, "byt5": True, "meanflow": False, "vec_in_dim": None,
                       "patch_size": [2, 2], "axes_dim": [8, 8]}),
    "lumina2": ("lumina.model", "NextDiT",
                {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [4, 6, 6],
                 "axes_lens": [8, 8, 8], "qk_norm": True, "image_model": "lumina2"}),
    "auraflow": ("aura.mmdit", "MMDiT", {"max_seq": 64, "n_layers": 6, "cond_seq_dim": 32}),
    "ltx": ("lightricks.model", "LTXVModel", {"num_layers": 2, "image_model": "ltxv"}),
    "hidream": ("hidream.model", "HiDreamImageTransformer2DModel",
                {"patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2, "num_single_layers": 2,
                 "attention_head_dim": 16, "num_attention_heads": 4, "caption_channels": [16, 16], "text_emb_dim": 16,
                 "num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": (4, 6, 6),
                 "max_resolution": (8, 8), "llama_layers": [0, 1], "image_model": "hidream"}),
}  # fmt: skip


@pytest.mark.parametrize("case", COMFY_MODELS)
def test_comfyuis_own_models_have_the_names(case: str, tmp_path: Path) -> None:
    """The other tests of ComfyUI take names from our tables."""
    module, name, config = COMFY_MODELS[case]
    make = programs.comfy_class(f"ldm.{module}", name)
    options = {"dtype": None, "device": "meta", "operations": programs.comfy_operations()}
    with torch.device("meta"):
        theirs = {digitless(name) for name in make(**config, **options).state_dict()}
    subject = Subject(case, tmp_path)
    ours = {digitless(name) for name, pieces in subject.namings[naming_in_comfy(subject)].items()
            if pieces[0].name.removesuffix(".weight") in subject.factors}  # fmt: skip
    assert ours <= theirs


def test_comfyuis_wan_animate_has_the_names() -> None:
    options = {"dtype": None, "device": "meta", "operations": programs.comfy_operations()}
    with torch.device("meta"):
        theirs = {
            digitless(name)
            for name in programs.comfy_class("ldm.wan.model_animate", "AnimateWanModel")(**_WAN, **options).state_dict()
        }
    wan, layers = FAMILIES["wan"], every_denoiser.linears(every_denoiser.build("WanAnimateTransformer3DModel", "tiny"))
    located = {path: locate(wan, path) for path in layers}
    ours = {digitless(f"{name}.weight") for each in located.values() if each for name in each.maker}
    assert all(located.values()) and ours <= theirs


@pytest.mark.parametrize(("family", "made"), [("sd1", "original_unet.UNet2DConditionModel(64, 8, 768)"),
                                             ("sdxl", "sdxl_original_unet.SdxlUNet2DConditionModel()")])  # fmt: skip
def test_the_rows_of_sd_scripts_are_its_unets(family: str, made: str) -> None:
    programs.find_program("sd-scripts")
    module = made.partition(".")[0]
    network = importlib.import_module("networks.lora")
    encoders = [nn.Module() for _ in IMAGE_RUNTIMES["sd-scripts"].components[family]]
    with torch.device("meta"):
        model = eval(made, {module: importlib.import_module(f"library.{module}")})
        every, adapted = looked_for(
            model,
            lambda state: network.create_network_from_weights(1.0, None, None, encoders, model, weights_sd=state)[0],
        )
    paths = {f"lora_unet_{n.replace('.', '_')}": n for n, m in model.named_modules() if is_layer(m)}
    expression = IMAGE_RUNTIMES["sd-scripts"].modules[family]
    assert {flat for flat, path in paths.items() if re.fullmatch(expression, path)} == adapted < every


# case -> Forge's module and class of the denoiser, the repository that it knows the model by, and a small config
FORGE_MODELS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "flux": ("flux", "IntegratedFluxTransformer2DModel", "black-forest-labs/FLUX.1-dev",
             {**_STREAMS, "vec_in_dim": 8, "guidance_embed": True}),
    "chroma": ("chroma", "IntegratedChromaTransformer2DModel", "Chroma",
               {**_STREAMS, "vec_in_dim": 8, "guidance_out_dim": 64, "guidance_hidden_dim": 64,
                "guidance_n_layers": 2}),
    "sd3": ("mmditx", "MMDiTX", "stabilityai/stable-diffusion-3-medium-diffusers",
            COMFY_MODELS["sd3"][2] | {"input_size": None}),
}  # fmt: skip


@pytest.mark.parametrize("case", [case for case in cases("forge") if case in FORGE_MODELS])
def test_forge_applies_what_is_written_for_it(case: str, tmp_path: Path) -> None:
    subject = Subject(case, tmp_path).other
    out, excluded = written(subject, subject.adapter("diffusers"), "forge")
    assert not excluded
    plain = subject.renamed("maker", subject.base)
    *_, repository, config = FORGE_MODELS[case]
    found, _, unused = programs.forge(load_file(out), plain, config=config, repository=repository)
    assert not unused
    require_equal(found, expected(subject, "maker"))


@pytest.mark.parametrize("case", FORGE_MODELS)
def test_dora_for_forge_acts_as_a_merge_at_any_strength(case: str, tmp_path: Path) -> None:
    subject = Subject(case, tmp_path).other
    adapter, out = dora_of(subject, tmp_path), tmp_path / "out.safetensors"
    loratool.convert(adapter, out, runtime="forge", base=subject.base_in("component"))
    plain, wanted = subject.renamed("maker", subject.base), subject.merged(adapter, "component")
    merged = subject.renamed("maker", subject.read(wanted, "component"))
    *_, repository, config = FORGE_MODELS[case]
    for strength in (1.0, 0.5):
        found, _, unused = programs.forge(
            load_file(out), plain, config=config, repository=repository, strength=strength
        )
        assert not unused
        require_equal(found, {n: W + strength * (merged[n] - W) for n, W in plain.items()})


@pytest.mark.parametrize("case", FORGE_MODELS)
def test_forges_own_models_have_the_names(case: str, tmp_path: Path) -> None:
    module, name, _, config = FORGE_MODELS[case]
    with torch.device("meta"):
        theirs = {digitless(name) for name in programs.forge_class(module, name)(**config).state_dict()}
    subject = Subject(case, tmp_path)
    ours = {digitless(name) for name, pieces in subject.namings["maker"].items()
            if pieces[0].name.removesuffix(".weight") in subject.factors}  # fmt: skip
    assert ours <= theirs


def adapted(model: nn.Module, prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return LoRA of every layer in diffusers' spelling, of two ranks, and the weights that it makes."""
    g, tensors, weights = torch.Generator().manual_seed(7), dict[str, Tensor](), dict[str, Tensor]()
    for count, (path, layer) in enumerate((n, m) for n, m in model.named_modules() if is_layer(m)):
        W = layer.weight.detach()
        A = torch.randn(3 + count % 2, *W.shape[1:], generator=g)
        B = torch.randn(len(W), len(A), *(1 for _ in W.shape[2:]), generator=g) * 0.05
        tensors |= {f"{prefix}{path}.lora_A.weight": A, f"{prefix}{path}.lora_B.weight": B}
        weights[f"{path}.weight"] = W + (B.flatten(1) @ A.flatten(1)).reshape(W.shape)
    return tensors, weights


@dataclass(frozen=True)
class UNetCase:
    """A UNet and its text encoders with an adapter, by their components."""

    models: Mapping[str, nn.Module]
    wanted: Mapping[str, Mapping[str, Tensor]]
    adapter: Path


class Clip(nn.Module):
    """A text encoder with the names of transformers up to 5.5, which the programs have."""

    def __init__(self) -> None:
        super().__init__()
        self.text_model = diffusers_models.clip()


def unet_case(family: str, folder: Path) -> UNetCase:
    models = {"unet": diffusers_models.unet(family), "text_encoder": Clip()}
    if family == "sdxl":
        models["text_encoder_2"] = Clip()
    made = {name: adapted(model, f"{name}.") for name, model in models.items()}
    save_file({n: t for tensors, _ in made.values() for n, t in tensors.items()}, folder / "adapter.safetensors")
    return UNetCase(models, {name: weights for name, (_, weights) in made.items()}, folder / "adapter.safetensors")


UNETS = {
    "sd1": {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 2, 2], "transformer_depth": [1] * 6 + [0] * 2,
            "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1},
    "sdxl": {"num_res_blocks": [2] * 3, "channel_mult": [1, 2, 2], "transformer_depth": [0, 0, 1, 1, 2, 2],
             "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "transformer_depth_middle": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", UNETS)
def test_forge_applies_unets_and_clips(family: str, tmp_path: Path) -> None:
    case, out = unet_case(family, tmp_path), tmp_path / "out.safetensors"
    loratool.convert(case.adapter, out, runtime="forge")
    names = programs.forge_unet_names(UNETS[family])
    unet = {names.get(n, n): W for n, W in case.models["unet"].state_dict().items()}
    clips = {"text_encoder": "clip_l.transformer.", "text_encoder_2": "clip_g.transformer."}
    encoders = {clips[key] + n: W for key, model in case.models.items() if key in clips
                for n, W in model.state_dict().items()}  # fmt: skip
    found, texts, unused = programs.forge(load_file(out), unet, encoders, config=UNETS[family])
    assert not unused
    require_equal(found, {names[n]: W for n, W in case.wanted["unet"].items()})
    for key in clips.keys() & case.wanted.keys():
        require_equal(texts, {clips[key] + n: W for n, W in case.wanted[key].items()})


@pytest.mark.parametrize("family", UNETS)
def test_invokeai_applies_unets_and_clips(family: str, tmp_path: Path) -> None:
    case, out = unet_case(family, tmp_path), tmp_path / "out.safetensors"
    with pytest.raises(NeedsFlag, match="outside of the blocks") as error:
        loratool.convert(case.adapter, out, runtime="invokeai")
    excluded = [word for word in shlex.split(error.value.flags) if word != "--exclude"]
    dropped = loratool.convert(case.adapter, out, runtime="invokeai", exclude=excluded).dropped
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if family == "sdxl" else "lora_te_",
                "text_encoder_2": "lora_te2_"}  # fmt: skip
    base = "sdxl" if family == "sdxl" else "sd-1"
    found, unused = programs.invokeai(out, base, {prefixes[key]: model for key, model in case.models.items()})
    assert not unused
    for (key, wanted), weights in zip(case.wanted.items(), found, strict=True):
        plain = case.models[key].state_dict()
        require_equal(weights, {n: plain[n] if f"{key}.{n.removesuffix('.weight')}" in dropped else W
                                for n, W in wanted.items()})  # fmt: skip


def test_invokeai_applies_flux(tmp_path: Path) -> None:
    subject = Subject("flux", tmp_path).other
    out, excluded = written(subject, subject.adapter("diffusers"), "invokeai")
    assert excluded
    plain = subject.renamed("maker", subject.base)
    model = programs.invokeai_flux(plain)
    (found,), unused = programs.invokeai(out, "flux", {"lora_transformer-": model})
    assert not unused
    require_equal(found, expected(subject, "maker", excluded))
