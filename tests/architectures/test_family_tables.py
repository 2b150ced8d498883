"""Hold the tables of image families to diffusers' classes, and see each family found by its names alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, factors, write_peft

import loratool
from loratool.architectures.components import DENOISER_PREFIXES, component_of
from loratool.architectures.families import FAMILIES
from loratool.architectures.families.detect import detect
from loratool.architectures.families.lookup import locate, names_of, to_diffusers
from loratool.architectures.families.table import Fused, ModelFamily, Rows, Run
from loratool.architectures.image import image_modules

REFERENCE = ROOT.parent / "shared" / "reference" / "dit" / "tables"
TABLES = {key: family for key, family in FAMILIES.items() if not family.up_attention}
NAMINGS = ("maker", "diffusers", "comfy")

# Small models of each class that together have every module; where a family is not here, diffusers has no class.
CLASSES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "allegro": [("AllegroTransformer3DModel", {"num_layers": 1})],
    "anima": [("CosmosTransformer3DModel", {"num_layers": 1, "extra_pos_embed_type": None})],
    "auraflow": [("AuraFlowTransformer2DModel", {"num_mmdit_layers": 1, "num_single_dit_layers": 1})],
    "bria": [("BriaTransformer2DModel", {"num_layers": 1, "num_single_layers": 1})],
    "bria_fibo": [("BriaFiboTransformer2DModel", {"num_layers": 1, "num_single_layers": 1})],
    "chroma": [("ChromaTransformer2DModel", {"num_layers": 1, "num_single_layers": 1})],
    "cogvideox": [
        (
            "CogVideoXTransformer3DModel",
            {
                "num_layers": 1,
                "ofs_embed_dim": 512,
                "use_rotary_positional_embeddings": True,
                "use_learned_positional_embeddings": True,
            },
        ),
    ],
    "cogview4": [("CogView4Transformer2DModel", {"num_layers": 1})],
    "cosmos1": [("CosmosTransformer3DModel", {"num_layers": 1})],
    "cosmos_predict2": [("CosmosTransformer3DModel", {"num_layers": 1, "extra_pos_embed_type": None})],
    "ernie_image": [("ErnieImageTransformer2DModel", {"num_layers": 1})],
    "flux": [("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True})],
    "flux2": [("Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1})],
    "flux3": [("Flux3Transformer2DModel", {})],
    "glm_image": [("GlmImageTransformer2DModel", {"num_layers": 1})],
    "hidream": [
        (
            "HiDreamImageTransformer2DModel",
            {"patch_size": 2, "num_layers": 1, "num_single_layers": 1, "caption_channels": [8, 8], "text_emb_dim": 8},
        ),
    ],
    "hunyuan_dit": [
        ("HunyuanDiT2DModel", {"num_layers": 4, "in_channels": 4, "patch_size": 2, "hidden_size": 1408}),
    ],
    "hunyuan_image": [
        (
            "HunyuanImageTransformer2DModel",
            {
                "num_layers": 1,
                "num_single_layers": 1,
                "text_embed_2_dim": 8,
                "guidance_embeds": True,
                "use_meanflow": True,
            },
        ),
    ],
    "hunyuan_video": [
        ("HunyuanVideoTransformer3DModel", {"num_layers": 1, "num_single_layers": 1}),
        (
            "HunyuanVideoFramepackTransformer3DModel",
            {"num_layers": 1, "num_single_layers": 1, "has_image_proj": True, "has_clean_x_embedder": True},
        ),
    ],
    "hunyuan_video15": [("HunyuanVideo15Transformer3DModel", {"num_layers": 1})],
    "ideogram4": [("Ideogram4Transformer2DModel", {"num_layers": 1})],
    "kandinsky5": [
        ("Kandinsky5Transformer3DModel",
         {"num_text_blocks": 1, "num_visual_blocks": 1, "model_dim": 1792, "ff_dim": 7168}),
    ],
    "krea2": [("Krea2Transformer2DModel", {"num_layers": 1})],
    "longcat_image": [("LongCatImageTransformer2DModel", {"num_layers": 1, "num_single_layers": 1})],
    "ltx": [("LTXVideoTransformer3DModel", {"num_layers": 1})],
    "ltx2": [
        ("LTX2VideoTransformer3DModel", {"num_layers": 1}),
        (
            "LTX2VideoTransformer3DModel",
            {
                "num_layers": 1,
                "gated_attn": True,
                "cross_attn_mod": True,
                "audio_gated_attn": True,
                "audio_cross_attn_mod": True,
                "use_prompt_embeddings": False,
            },
        ),
    ],
    "lumina2": [("Lumina2Transformer2DModel", {"num_layers": 1})],
    "minimax_h3": [("MiniMaxH3Transformer3DModel", {"num_layers": 1})],
    "mochi": [("MochiTransformer3DModel", {"num_layers": 2})],
    "omnigen": [
        (
            "OmniGenTransformer2DModel",
            {
                "num_layers": 1,
                "rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "type": "su"},
            },
        ),
    ],
    "ovis_image": [("OvisImageTransformer2DModel", {"num_layers": 1, "num_single_layers": 1})],
    "pixart": [("PixArtTransformer2DModel", {"num_layers": 1, "caption_channels": 8})],
    "prx": [("PRXTransformer2DModel", {"depth": 1})],
    "qwen_image": [("QwenImageTransformer2DModel", {"num_layers": 1, "use_additional_t_cond": True})],
    "qwen_image21": [("QwenImage21Transformer2DModel", {"num_layers": 1})],
    "sana": [("SanaTransformer2DModel", {"num_layers": 1})],
    "sd3": [
        ("SD3Transformer2DModel", {"num_layers": 2, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}),
    ],
    "wan": [
        ("WanTransformer3DModel", {"num_layers": 1, "image_dim": 8, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 4}),
        ("WanVACETransformer3DModel", {"num_layers": 2, "vace_layers": [0, 1]}),
        ("WanAnimateTransformer3DModel", {"num_layers": 5}),
        ("SkyReelsV2Transformer3DModel", {"num_layers": 1, "num_attention_heads": 12, "ffn_dim": 8960}),
        ("ChronoEditTransformer3DModel", {"num_layers": 1}),
        ("AnyFlowFARTransformer3DModel", {"num_layers": 1}),
        ("HeliosTransformer3DModel", {"num_layers": 1}),
    ],
    "ace_step": [("AceStepTransformer1DModel", {"num_hidden_layers": 1})],
    "bria_fibo2": [("BriaFibo2Transformer2DModel", {"n_layers": 1, "injection_layer_ids": (0,)})],
    "cogview3": [("CogView3PlusTransformer2DModel", {"num_layers": 1})],
    "cosmos3": [
        (
            "Cosmos3OmniTransformer",
            {"num_hidden_layers": 1, "action_gen": True, "action_dim": 32, "sound_gen": True, "sound_dim": 64},
        ),
    ],
    "dit": [("DiTTransformer2DModel", {"num_layers": 1})],
    "easyanimate": [
        ("EasyAnimateTransformer3DModel", {"in_channels": 16, "out_channels": 16, "patch_size": 2, "num_layers": 1}),
    ],
    "joyimage": [
        ("JoyImageEditTransformer3DModel", {"num_layers": 1}),
        ("JoyImageEditPlusTransformer3DModel", {"num_layers": 1}),
    ],
    "kandinsky6": [("Kandinsky6Transformer3DModel", {"num_text_blocks": 1, "num_visual_blocks": 1})],
    "kandinsky6_sr": [("Kandinsky6SRTransformer3DModel", {"num_visual_blocks": 1})],
    "latte": [
        (
            "LatteTransformer3DModel",
            {
                "attention_head_dim": 72,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 1,
                "patch_size": 2,
                "caption_channels": 4096,
                "cross_attention_dim": 1152,
                "norm_type": "ada_norm_single",
            },
        ),
    ],
    "longcat_audio": [("LongCatAudioDiTTransformer", {"dit_depth": 1})],
    "lumina_next": [("LuminaNextDiT2DModel", {"num_layers": 1, "num_kv_heads": 8})],
    "minimax_music3": [("MiniMaxMusic3Transformer1DModel", {"num_layers": 1})],
    "motif_video": [
        ("MotifVideoTransformer3DModel", {"num_layers": 1, "num_single_layers": 1, "image_embed_dim": 1152}),
        (
            "MotifVideoTransformer3DModel",
            {
                "num_layers": 1,
                "num_single_layers": 1,
                "enable_text_cross_attention_dual": True,
                "enable_text_cross_attention_single": True,
            },
        ),
    ],
    "nucleus_image": [("NucleusMoEImageTransformer2DModel", {"num_layers": 5})],
    "sana_video": [("SanaVideoTransformer3DModel", {"num_layers": 1})],
    "sana_wm": [("SanaWMTransformer3DModel", {"num_layers": 4})],
    "stable_audio": [("StableAudioDiTModel", {"num_layers": 1})],
    "stable_audio3": [("StableAudio3DiTModel", {"depth": 1})],
    "wan_animate2": [("WanAnimate2Transformer3DModel", {"num_layers": 1})],
    "z_image": [("ZImageTransformer2DModel", {"n_layers": 1, "n_refiner_layers": 1})],
}  # fmt: skip
QUICK = ("cogvideox", "flux2", "wan")


# The classes that are made here with other widths than their models have, diffusers' defaults or small ones
OTHER_WIDTHS = "anima cogview4 cosmos_predict2 hunyuan_dit hunyuan_image lumina2 pixart sd3".split()


def absolute(stem: str, name: str) -> str:
    return ".".join(each for each in (stem, name) if each)


def runs(stem: str, rows: Rows) -> tuple[tuple[tuple[str, int, int], ...], tuple[object, ...]]:
    """Return ((diffusers' module, part, parts), ...) and the rule of sizes of what a name stands for."""
    fused = rows if isinstance(rows, Fused) else Fused((rows,))
    plain = [run if isinstance(run, Run) else Run(run) for run in fused.runs]
    return tuple((absolute(stem, run.module), run.part, run.parts) for run in plain), fused.sizes


def modules_of(family: ModelFamily) -> dict[str, set[tuple[Any, ...]]]:
    """Return maker's module, with `{i}` -> what it can be of diffusers'."""
    found = {name: {runs("", rows)} for name, rows in {**family.outside, **{n: n for n in family.alike}}.items()}
    for block in family.blocks:
        for name, rows in {**block.names, **{n: n for n in block.alike}}.items():
            ratio = {runs(block.diffusers, other) for end, (_, other) in block.by_ratio.items() if end == name}
            found[absolute(block.maker, name)] = {runs(block.diffusers, rows), *ratio}
    return found


def tensors_of(family: ModelFamily) -> dict[str, str]:
    """Return maker's tensor, with `{i}` -> diffusers', of those that are no module's weight in both."""
    blocks = [(absolute(b.maker, own), absolute(b.diffusers, t)) for b in family.blocks for own, t in b.tensors.items()]
    return dict(blocks) | dict(family.outside_tensors)


def paths_of(family: ModelFamily, naming: str) -> list[str]:
    """Return the names of two blocks of each stack, and of all that is outside."""
    return sorted({name for located in names_of(family).values() for name in getattr(located, naming)})


def widths_of(family: ModelFamily, path: str) -> tuple[int, ...]:
    """Return the numbers of columns that a module has in the known models; none where the table does not say."""
    names = [f".{name}" for name in to_diffusers(family, path)]
    return next((w.columns for w in family.widths if any(name.endswith(w.ends) for name in names)), ())


def shape_of(family: ModelFamily, path: str) -> tuple[int, int]:
    """Make a shape that the family's table does not exclude."""
    columns = next(iter(widths_of(family, path)), 8)
    return next((ratio * columns for end, ratio in family.ratios.items() if path.endswith(end)), 7), columns


# Tensors that a family's table says it has not
WITHOUT_NAMES = {"wan": ("motion_encoder.",), "cosmos3": ("embed_tokens.", "lm_head.")}


@pytest.mark.parametrize("key", [key if key in QUICK else pytest.param(key, marks=pytest.mark.slow) for key in CLASSES])
def test_a_table_has_just_the_tensors_of_diffusers_class(key: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    family = FAMILIES[key]
    stems = sorted({block.diffusers for block in family.blocks}, key=len, reverse=True)
    numbered = [(re.compile(re.escape(stem).replace(r"\{i\}", r"\d+") + r"\."), f"{stem}.") for stem in stems]
    there: set[str] = set()
    for name, config in CLASSES[key]:
        with torch.device("meta"):
            model = getattr(diffusers, name)(**config)
        for tensor, value in model.state_dict().items():
            is_real = value.ndim == 2 and key not in OTHER_WIDTHS
            known = widths_of(family, tensor.removesuffix(".weight")) if is_real else ()
            assert not known or value.shape[1] in known, tensor
            pattern, stem = next(((p, s) for p, s in numbered if p.match(tensor)), (re.compile(""), ""))
            there.add(pattern.sub(lambda _, stem=stem: stem, tensor, count=1))
    assert family.diffusers_class in {name for name, _ in CLASSES[key]}
    modules = {module for each in modules_of(family).values() for parts, _ in each for module, _, _ in parts}
    others = set(tensors_of(family).values())
    covered = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")} | others
    assert {name for name in there - covered if not name.startswith(WITHOUT_NAMES.get(key, ()))} == set()
    assert {module for module in modules if f"{module}.weight" not in there} == set()
    assert others - there == set()


def test_every_class_is_tried() -> None:
    assert {key for key, each in TABLES.items() if each.diffusers_class and not each.up_attention} == CLASSES.keys()


# What nothing in the denoiser tells: Anima has Cosmos-Predict2's, and a text conditioner beside it.
BASES = {"anima": "cosmos_predict2"}


@pytest.mark.parametrize("key", TABLES)
def test_a_base_is_recognized_under_every_prefix(key: str) -> None:
    family = FAMILIES[key]
    for naming in NAMINGS:
        modules = {path: shape_of(family, path) for path in paths_of(family, naming)}
        for prefix in (*DENOISER_PREFIXES, "transformer/"):
            found = image_modules({f"{prefix}{path}.weight": shape for path, shape in modules.items()}).family
            assert found is FAMILIES[BASES.get(key, key)], f"{prefix}, {naming}: {found and found.key}"


def test_anima_is_told_by_its_text_conditioner() -> None:
    family = FAMILIES["anima"]
    for prefix in ("net.", "", "model.diffusion_model.", "diffusion_model."):
        names = [*paths_of(family, "maker"), "llm_adapter.blocks.0.cross_attn.q_proj"]
        found = image_modules({f"{prefix}{name}.weight": shape_of(family, name) for name in names})
        assert found.family is family
        for module in (
            "diffusion_model.llm_adapter.blocks.0.cross_attn.q_proj",
            "text_conditioner.blocks.0.cross_attn.q_proj",
        ):
            component, path = component_of(module)
            assert component == "text_conditioner" and found.find(component, path)
    folder = {f"transformer/{name}.weight": shape_of(family, name) for name in paths_of(family, "diffusers")}
    assert image_modules(folder).family is FAMILIES["cosmos_predict2"]
    assert image_modules(folder | {"text_conditioner/embed.weight": (8, 8)}).family is family


# Families of the same names, of which the first counts
ADAPTERS = {"cosmos_predict2": "anima"}


@pytest.mark.parametrize("key", TABLES)
def test_an_adapter_of_all_modules_tells_its_family(key: str) -> None:
    family = FAMILIES[key]
    for naming in NAMINGS:
        modules = [("unet", path, shape_of(family, path)) for path in paths_of(family, naming)]
        assert next(iter(detect(modules))) is FAMILIES[ADAPTERS.get(key, key)], naming
        flat = [("unet", path.replace(".", "_"), shape) for _, path, shape in modules]
        assert next(iter(detect(flat))) is FAMILIES[ADAPTERS.get(key, key)], naming


Shapes = dict[str, tuple[int, int]]

# what an adapter has of a known model -> modules with their shapes, and the families that can have them
PARTS: dict[str, tuple[Shapes, set[str]]] = {
    # As wide as Flux, whose double blocks have these names.
    "Klein 4B, blocks": (
        {f"transformer_blocks.{i}.attn.to_q": (3072, 3072) for i in range(5)}
        | {f"single_transformer_blocks.{i}.attn.to_qkv_mlp_proj": (27648, 3072) for i in range(20)},
        {"flux2"},
    ),
    # The last block of Flux 2, whose width this is too.
    "Qwen-Image 2.1, a block": ({"transformer_blocks.7.attn.to_out.0": (4096, 4096)}, {"flux2", "qwen_image21"}),
    "Qwen-Image, outside": (
        {"img_in": (3072, 64), "txt_in": (3072, 3584), "norm_out.linear": (6144, 3072)},
        {"qwen_image"},  # the maker's names of Flux, and diffusers'
    ),
    "Z-Image, outside": ({"cap_embedder.1": (3840, 2560), "final_layer.linear": (64, 3840)}, {"z_image"}),
    "Mochi, text": ({"transformer_blocks.0.ff_context.net.0.proj": (8192, 1536)}, {"mochi", "sd3"}),
    # AuraFlow's last block.
    "HunyuanVideo, a block": (
        {"single_transformer_blocks.31.attn.to_k": (3072, 3072)},
        {"auraflow", "bria", "bria_fibo", "chroma", "flux", "hunyuan_video", "longcat_image", "motif_video"},
    ),
    "SD 1, middle": ({"middle_block.2.in_layers.2": (1280, 1280)}, {"sd1", "sd2", "sdxl"}),
    "SDXL, outside": ({"label_emb.0.0": (1280, 2816)}, {"sdxl"}),
    "LTX-2, audio": ({"transformer_blocks.0.audio_attn1.to_q": (2048, 2048)}, {"ltx2"}),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_of_each_family_that_can_have_it(part: str) -> None:
    """What a family has as well is never taken for its own, where a real model of another has it."""
    shapes, families = PARTS[part]
    assert {family.key for family in detect(("unet", path, shape) for path, shape in shapes.items())} == families


@pytest.mark.parametrize(
    "names",
    [
        ("blocks.0.self_attn.q_proj", "blocks.0.cross_attn.q_proj"),
        ("blocks.0.ffn.0",),
        ("transformer_blocks.0.ff.net.0.proj",),
        ("img_in",),
    ],
    ids=["Anima", "Wan", "Flux", "Flux, outside"],
)
def test_a_peft_adapter_of_no_known_size_keeps_its_names(names: tuple[str, ...], tmp_path: Path) -> None:
    start = write_peft(tmp_path / "a", {name: factors(12, 4, 2) for name in names})
    report = loratool.convert(start, tmp_path / "b", to="peft")
    assert {row.name for row in report.modules} == {*names} and report.family is None  # type: ignore[union-attr]


# Tensors of models that are none of these: language models, and others of images, by transformers and timm
OTHERS = """
model.embed_tokens model.layers.0.self_attn.q_proj model.layers.0.mlp.gate_proj model.layers.0.input_layernorm lm_head
model.norm model.layers.0.self_attn.q_norm model.layers.0.block_sparse_moe.experts.0.w1
model.layers.0.mlp.shared_experts.up_proj transformer.wte transformer.h.0.attn.c_attn transformer.h.0.mlp.c_fc
transformer.h.0.ln_1 transformer.ln_f gpt_neox.layers.0.attention.query_key_value gpt_neox.layers.0.mlp.dense_h_to_4h
gpt_neox.embed_in embed_out transformer.word_embeddings transformer.encoder.layers.0.self_attention.query_key_value
transformer.output_layer transformer.encoder.layers.0.mlp.dense_h_to_4h transformer.encoder.final_layernorm
transformer.embedding.word_embeddings bert.embeddings.word_embeddings bert.encoder.layer.0.attention.self.query
bert.pooler.dense bert.encoder.layer.0.output.dense shared encoder.block.0.layer.0.SelfAttention.q
encoder.block.0.layer.1.DenseReluDense.wi_0 encoder.final_layer_norm decoder.block.0.layer.1.EncDecAttention.q
model.encoder.layers.0.fc1 model.decoder.layers.0.encoder_attn.k_proj text_model.encoder.layers.0.self_attn.q_proj
vision_model.embeddings.patch_embedding visual_projection logit_scale backbone.layers.0.mixer.in_proj
backbone.layers.0.mixer.x_proj backbone.embeddings backbone.norm_f model.layers.0.mamba.dt_proj patch_embed.proj
blocks.0.attn.qkv blocks.0.attn.proj blocks.0.mlp.fc1 blocks.0.norm1 cls_token pos_embed head norm
layers.0.blocks.0.attn.qkv layers.0.downsample.reduction stem.0 stages.0.blocks.0.conv_dw layer1.0.conv1 fc
vit.embeddings.cls_token vit.encoder.layer.0.attention.attention.query vit.layernorm classifier
visual.blocks.0.attn.qkv visual.merger.mlp.0 visual.patch_embed.proj model.visual.blocks.0.mlp.gate_proj
language_model.model.layers.0.self_attn.q_proj multi_modal_projector.linear_1
vision_tower.transformer.layers.0.attention.q_proj model.layers.0.self_attn.qkv_proj model.layers.0.mlp.gate_up_proj
score roberta.encoder.layer.0.intermediate.dense encoder.down.0.block.0.conv1 decoder.up_blocks.0.resnets.0.conv1
quant_conv post_quant_conv encoder.mid.attn_1.q
"""


@pytest.mark.parametrize("key", TABLES)
def test_a_mark_is_in_no_other_model(key: str) -> None:
    others = [name for name in OTHERS.split() if any(mark in f"{name}.weight" for mark in FAMILIES[key].marks)]
    assert others == [] and FAMILIES[key].marks


def test_no_language_model_is_an_image_model() -> None:
    names = [name for name in OTHERS.split() if "text_model" not in name]  # of CLIP, which is read as a text encoder
    assert not image_modules({f"{name}.weight": (8, 8) for name in names})


@pytest.mark.parametrize(
    "names",
    [("blocks.0.attn.qkv", "blocks.0.attn.proj"), ("layers.0.mlp.gate_proj",), ("layers.0.feed_forward.w1",)],
    ids=["timm", "transformers", "Meta"],
)
def test_modules_of_many_models_tell_no_family(names: tuple[str, ...], tmp_path: Path) -> None:
    """PixArt, ERNIE-Image and Lumina 2 have them, and transformers that are no image model's."""
    modules = {name: factors(12, 4, 2) for name in names}
    assert loratool.convert(write_peft(tmp_path / "a", modules), tmp_path / "b", to="peft").family is None
    assert detect(("unet", name, (12, 4)) for name in names)


def test_a_number_is_found_at_once_whatever_it_is() -> None:
    for number in (0, 59, 12345):
        found = locate(FAMILIES["cosmos1"], f"blocks.block{number}.blocks.2.block.layer1")
        assert found and found.diffusers == (f"transformer_blocks.{number}.ff.net.0.proj",)
    assert locate(FAMILIES["wan"], "blocks.x.ffn.0") is None and locate(FAMILIES["wan"], "blocks.00.ffn.0") is None


# Tensors that ComfyUI's own files call otherwise than the makers', with what they are of
COMFY = {
    ("hunyuan_video", "double_blocks.3.img_attn.qkv"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("hunyuan_video15", "double_blocks.3.txt_attn_qkv"): ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("qwen_image21", "transformer_blocks.3.img_mlp.gate_up"): ("img_mlp.gate_layer", "img_mlp.proj"),
    ("cogvideox", "blocks.3.ff_proj"): ("ff.net.0.proj",),
}


@pytest.mark.parametrize(("key", "name"), COMFY)
def test_comfyui_names(key: str, name: str) -> None:
    found = locate(FAMILIES[key], name)
    assert found and found.diffusers == tuple(f"transformer_blocks.3.{each}" for each in COMFY[key, name])


# How the reference writes that rows change places -> (which of the modules, part, parts) in the maker's order
TAKES = {
    "[[1, 0]]": ((0, 1, 2), (0, 0, 2)),
    "[[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]": ((0, 0, 2), (1, 0, 2), (0, 1, 2), (1, 1, 2)),
}


def expected_rows(row: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return maker's module -> its runs and sizes, from a row of the reference."""
    makers, modules = row["original"], row["diffusers"]
    if len(makers) > 1:
        return {name: (((modules[0], i, len(makers)),), ()) for i, name in enumerate(makers)}
    if "take" in row:
        return {makers[0]: (tuple((modules[of], part, parts) for of, part, parts in TAKES[str(row["take"])]), ())}
    rule = row.get("split", "equal")
    sizes = () if rule == "equal" else tuple({"cols": 1, "rest": None, "rest/2": None}[each] for each in rule)
    return {makers[0]: (tuple((module, 0, 1) for module in modules), sizes)}


# Tables that have more than their reference. FramePack is of HunyuanVideo's, and LongCat has Flux's names in ComfyUI.
APART = ("framepack", "longcat_image")
MORE = {
    "hunyuan_video": {"clean_x_embedder.", "image_projection."},
    "qwen_image": {"time_text_embed.addition_t_embedding"},
    # of Animate, AnyFlow and Helios
    "wan": {
        "condition_embedder.delta_embedder.",
        "face_",
        "far_patch_embedding",
        "norm_out.",
        "patch_long",
        "patch_mid",
        "patch_short",
        "pose_patch_embedding",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted(each for each in REFERENCE.glob("[a-z]*.json") if each.stem not in APART), ids=lambda path: path.stem
)
def test_a_table_is_the_references(path: Path) -> None:
    reference = json.loads(path.read_text())
    family = FAMILIES[path.stem]
    expected: dict[str, set[tuple[Any, ...]]] = {}
    tensors = {}

    def numbered(text: str) -> str:
        return re.sub(r"^caption_projection\.\d+\.", "caption_projection.{i}.", text)

    for row in reference["modules"]:
        for name, (parts, sizes) in expected_rows(row).items():
            each = (tuple((numbered(module), part, whole) for module, part, whole in parts), sizes)
            expected.setdefault(numbered(name), set()).add(each)
    for row in reference["tensors"]:
        (maker,), (own,) = row["original"], row["diffusers"]
        if maker.endswith(".weight") and own.endswith(".weight"):
            expected[maker.removesuffix(".weight")] = {(((own.removesuffix(".weight"), 0, 1),), ())}
        else:
            tensors[maker] = own
    more = tuple(MORE.get(path.stem, ()))
    found = {name: each for name, each in modules_of(family).items() if not (more and name.startswith(more))}
    named = {name: own for name, own in tensors_of(family).items() if not (more and name.startswith(more))}
    norms = {name for name in found if f"{name}.scale" in tensors}  # in both, as some files call them `.weight`
    assert {name: each for name, each in found.items() if name not in norms} == expected
    assert named == tensors and set(family.unused) >= set(reference["dropped"])
    assert family.diffusers_class == (reference["diffusers"]["class"] or "")
