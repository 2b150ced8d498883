"""Merge adapters of image models, in every format, into single-file bases: each is the dense sum on the right rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import factors, load_model, weights
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag
from loratool.architectures.families.unet import diffusers_to_sgm, sgm_to_diffusers
from loratool.architectures.image import image_modules

UNET, TE1, TE2 = "model.diffusion_model.", "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
SDXL = {
    f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3),
    f"{UNET}input_blocks.1.0.in_layers.2.weight": (8, 8, 3, 3),
    f"{UNET}input_blocks.1.0.emb_layers.1.weight": (8, 16),
    f"{UNET}input_blocks.3.0.op.weight": (8, 8, 3, 3),
    f"{UNET}input_blocks.4.1.proj_in.weight": (8, 8),
    f"{UNET}input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    f"{UNET}input_blocks.4.1.transformer_blocks.0.ff.net.0.proj.weight": (64, 8),
    f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_out.0.weight": (8, 8),
    f"{UNET}output_blocks.2.2.conv.weight": (8, 8, 3, 3),
    f"{UNET}output_blocks.5.0.skip_connection.weight": (8, 16, 1, 1),
    f"{TE1}text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
    f"{TE1}text_model.encoder.layers.0.mlp.fc1.weight": (32, 8),
    f"{TE2}transformer.resblocks.0.attn.in_proj_weight": (36, 12),
    f"{TE2}transformer.resblocks.0.attn.out_proj.weight": (12, 12),
    f"{TE2}transformer.resblocks.0.mlp.c_fc.weight": (48, 12),
    "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
}
# kohya's name, diffusers' name -> the tensor and the first of its rows
NAMES = {
    (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    ): (UNET + "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight", 0, 8),
    (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    ): (UNET + "input_blocks.4.1.transformer_blocks.0.ff.net.0.proj.weight", 0, 64),
    (
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    ): (UNET + "middle_block.1.transformer_blocks.0.attn2.to_out.0.weight", 0, 8),
    (
        "lora_unet_input_blocks_1_0_in_layers_2",
        "unet.down_blocks.0.resnets.0.conv1",
    ): (UNET + "input_blocks.1.0.in_layers.2.weight", 0, 8),
    (
        "lora_unet_input_blocks_1_0_emb_layers_1",
        "unet.down_blocks.0.resnets.0.time_emb_proj",
    ): (UNET + "input_blocks.1.0.emb_layers.1.weight", 0, 8),
    (
        "lora_unet_input_blocks_3_0_op",
        "unet.down_blocks.0.downsamplers.0.conv",
    ): (UNET + "input_blocks.3.0.op.weight", 0, 8),
    (
        "lora_unet_output_blocks_2_2_conv",
        "unet.up_blocks.0.upsamplers.0.conv",
    ): (UNET + "output_blocks.2.2.conv.weight", 0, 8),
    (
        "lora_unet_output_blocks_5_0_skip_connection",
        "unet.up_blocks.1.resnets.2.conv_shortcut",
    ): (UNET + "output_blocks.5.0.skip_connection.weight", 0, 8),
    (
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ): (TE1 + "text_model.encoder.layers.0.mlp.fc1.weight", 0, 32),
    (
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
    ): (TE2 + "transformer.resblocks.0.attn.in_proj_weight", 0, 12),
    (
        "lora_te2_text_model_encoder_layers_0_self_attn_v_proj",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.v_proj",
    ): (TE2 + "transformer.resblocks.0.attn.in_proj_weight", 24, 36),
    (
        "lora_te2_text_model_encoder_layers_0_self_attn_out_proj",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj",
    ): (TE2 + "transformer.resblocks.0.attn.out_proj.weight", 0, 12),
}


def base_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    save_file({name: weights(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}, path)
    return path


def pair(shape: tuple[int, ...], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, in, kernel), B (out, rank, 1s)."""
    A, B = factors(shape[0], math.prod(shape[1:]), rank, seed=seed)
    return A.reshape(rank, *shape[1:]), B.reshape(shape[0], rank, *[1] * (len(shape) - 2))


def check(base: Path, merged: Path, changes: Mapping[str, list[tuple[int, int, Tensor]]]) -> None:
    """Check that each changed tensor is the base's plus these matrices on these rows; the others are bit-equal."""
    one, two = load_model(base), load_model(merged)
    for name, W in one.items():
        expected = W.double().clone()
        for start, stop, D in changes.get(name, []):
            expected[start:stop] += D.reshape(stop - start, *W.shape[1:])
        assert (
            torch.equal(two[name], expected.to(W.dtype))
            if name not in changes
            else torch.allclose(two[name].double(), expected, atol=1e-8)
        )
        assert (name in changes) is not torch.equal(two[name], W), name


def dense(A: Tensor, B: Tensor, scale: float) -> Tensor:
    return scale * B.double().flatten(1) @ A.double().flatten(1)


# spelling -> (what stands for A, for B, whether names are kohya's, whether an alpha follows)
SPELLINGS = {
    "kohya": (".lora_down.weight", ".lora_up.weight", True, True),
    "diffusers": (".lora_A.weight", ".lora_B.weight", False, False),
    "old": (".lora.down.weight", ".lora.up.weight", False, False),
    "older": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", False, False),
    "comfy": (".lora_down.weight", ".lora_up.weight", False, True),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_on_sdxl(spelling: str, tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors", SDXL)
    end_A, end_B, kohya, has_alpha = SPELLINGS[spelling]
    tensors, changes = {}, {}
    for seed, ((flat, dotted), (tensor, start, stop)) in enumerate(NAMES.items()):
        A, B = pair((stop - start, *SDXL[tensor][1:]), 4, seed)
        name = flat if kohya else dotted
        tensors |= {name + end_A: A, name + end_B: B} | ({f"{name}.alpha": torch.tensor(2.0)} if has_alpha else {})
        changes.setdefault(tensor, []).append((start, stop, dense(A, B, 0.5 if has_alpha else 1.0)))
    save_file(tensors, tmp_path / "a.safetensors")
    report = loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    check(base, tmp_path / "out.safetensors", changes)
    assert len(report.tensors) == len(changes) and not report.left_out
    assert loratool.verify(base, [tmp_path / "a.safetensors"], tmp_path / "out.safetensors").status == "proven"
    loratool.unmerge(tmp_path / "out.safetensors", tmp_path / "a.safetensors", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == base.read_bytes()


def test_scales_come_from_the_metadata_by_component(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors", SDXL)
    config = {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": 4, "text_encoder.lora_alpha": 2}
    names = ["unet.down_blocks.0.resnets.0.conv1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"]
    places = [f"{UNET}input_blocks.1.0.in_layers.2.weight", f"{TE1}text_model.encoder.layers.0.mlp.fc1.weight"]
    tensors, changes = {}, {}
    for seed, (name, place, scale) in enumerate(zip(names, places, (2.0, 0.5), strict=True)):
        A, B = pair(SDXL[place], 4, seed)
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        changes[place] = [(0, SDXL[place][0], dense(A, B, scale))]
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    check(base, tmp_path / "out.safetensors", changes)


def test_old_attention_processors(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors", SDXL)
    stem = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    out = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora"
    tensors, changes = {}, {}
    for seed, (name, place) in enumerate(
        {
            stem: "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
            out: "middle_block.1.transformer_blocks.0.attn2.to_out.0",
        }.items()
    ):
        A, B = factors(8, 8, 4, seed=seed)
        tensors |= {f"{name}.down.weight": A, f"{name}.up.weight": B}
        changes[f"{UNET}{place}.weight"] = [(0, 8, dense(A, B, 1.0))]
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    check(base, tmp_path / "out.safetensors", changes)


FLUX = {
    "double_blocks.0.img_attn.qkv.weight": (18, 6),
    "double_blocks.0.img_attn.proj.weight": (6, 6),
    "double_blocks.0.txt_mlp.0.weight": (24, 6),
    "single_blocks.0.linear1.weight": (42, 6),
    "single_blocks.0.linear2.weight": (6, 30),
    "single_blocks.0.modulation.lin.weight": (18, 6),
    "img_in.weight": (6, 4),
    "final_layer.adaLN_modulation.1.weight": (12, 6),
}
FLUX_DIFFUSERS = {
    "transformer_blocks.0.attn.to_q.weight": (6, 6),
    "transformer_blocks.0.attn.to_k.weight": (6, 6),
    "transformer_blocks.0.attn.to_v.weight": (6, 6),
    "transformer_blocks.0.attn.to_out.0.weight": (6, 6),
    "single_transformer_blocks.0.attn.to_q.weight": (6, 6),
    "single_transformer_blocks.0.attn.to_k.weight": (6, 6),
    "single_transformer_blocks.0.attn.to_v.weight": (6, 6),
    "single_transformer_blocks.0.proj_mlp.weight": (24, 6),
    "x_embedder.weight": (6, 4),
    "norm_out.linear.weight": (12, 6),
}


@pytest.mark.parametrize("prefix", ["", UNET])
def test_split_names_on_flux_are_rows(prefix: str, tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors", {prefix + name: shape for name, shape in FLUX.items()})
    names = {
        "transformer.transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv", 6, 12),
        "transformer.transformer_blocks.0.attn.to_out.0": ("double_blocks.0.img_attn.proj", 0, 6),
        "transformer.transformer_blocks.0.ff_context.net.0.proj": ("double_blocks.0.txt_mlp.0", 0, 24),
        "transformer.single_transformer_blocks.0.attn.to_v": ("single_blocks.0.linear1", 12, 18),
        "transformer.single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1", 18, 42),
        "transformer.single_transformer_blocks.0.proj_out": ("single_blocks.0.linear2", 0, 6),
        "transformer.x_embedder": ("img_in", 0, 6),
    }
    tensors, changes = {}, {}
    for seed, (name, (place, start, stop)) in enumerate(names.items()):
        tensor = f"{place}.weight"
        A, B = factors(stop - start, FLUX[tensor][1], 2, seed=seed)
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        changes.setdefault(prefix + tensor, []).append((start, stop, dense(A, B, 1.0)))
    A, B = factors(12, 6, 2, seed=99)
    tensors |= {"transformer.norm_out.linear.lora_A.weight": A, "transformer.norm_out.linear.lora_B.weight": B}
    D = dense(A, B, 1.0)  # (scale, shift) there, (shift, scale) here
    changes[f"{prefix}final_layer.adaLN_modulation.1.weight"] = [(0, 12, torch.cat([D[6:], D[:6]]))]
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    check(base, tmp_path / "out.safetensors", changes)
    loratool.unmerge(tmp_path / "out.safetensors", tmp_path / "a.safetensors", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == base.read_bytes()


def test_fused_names_on_diffusers_flux_are_several_tensors(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors", FLUX_DIFFUSERS)
    tensors, changes = {}, {}
    parts = {
        "double_blocks_0_img_attn_qkv": ["transformer_blocks.0.attn.to_" + x for x in "qkv"],
        "single_blocks_0_linear1": [
            *["single_transformer_blocks.0.attn.to_" + x for x in "qkv"],
            "single_transformer_blocks.0.proj_mlp",
        ],
    }
    for seed, (name, places) in enumerate(parts.items()):
        sizes = [FLUX_DIFFUSERS[f"{place}.weight"][0] for place in places]
        A, B = factors(sum(sizes), 6, 3, seed=seed)
        tensors |= {f"lora_unet_{name}.lora_down.weight": A, f"lora_unet_{name}.lora_up.weight": B}
        for place, D in zip(places, dense(A, B, 1.0).split(sizes), strict=True):
            changes[f"{place}.weight"] = [(0, len(D), D)]
    A, B = factors(12, 6, 2, seed=9)
    tensors |= {
        "lora_unet_final_layer_adaLN_modulation_1.lora_down.weight": A,
        "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight": B,
    }
    D = dense(A, B, 1.0)
    changes["norm_out.linear.weight"] = [(0, 12, torch.cat([D[6:], D[:6]]))]
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    check(base, tmp_path / "out.safetensors", changes)


SD3 = {
    "joint_blocks.0.x_block.attn.qkv.weight": (18, 6),
    "joint_blocks.0.x_block.attn2.qkv.weight": (18, 6),
    "joint_blocks.0.context_block.attn.qkv.weight": (18, 6),
    "joint_blocks.0.context_block.attn.proj.weight": (6, 6),
    "joint_blocks.0.x_block.mlp.fc1.weight": (24, 6),
    "joint_blocks.0.context_block.adaLN_modulation.1.weight": (36, 6),
    "joint_blocks.1.context_block.adaLN_modulation.1.weight": (12, 6),
    "x_embedder.proj.weight": (6, 4, 2, 2),
    "context_embedder.weight": (6, 10),
    "final_layer.adaLN_modulation.1.weight": (12, 6),
}
# diffusers' name -> Stability's, the first and the last of its rows there, whether its halves are swapped
SD3_NAMES = {
    "transformer_blocks.0.attn.to_k": ("joint_blocks.0.x_block.attn.qkv", 6, 12, False),
    "transformer_blocks.0.attn2.to_v": ("joint_blocks.0.x_block.attn2.qkv", 12, 18, False),
    "transformer_blocks.0.attn.add_q_proj": ("joint_blocks.0.context_block.attn.qkv", 0, 6, False),
    "transformer_blocks.0.attn.to_add_out": ("joint_blocks.0.context_block.attn.proj", 0, 6, False),
    "transformer_blocks.0.ff.net.0.proj": ("joint_blocks.0.x_block.mlp.fc1", 0, 24, False),
    "transformer_blocks.0.norm1_context.linear": ("joint_blocks.0.context_block.adaLN_modulation.1", 0, 36, False),
    "transformer_blocks.1.norm1_context.linear": ("joint_blocks.1.context_block.adaLN_modulation.1", 0, 12, True),
    "pos_embed.proj": ("x_embedder.proj", 0, 6, False),
    "context_embedder": ("context_embedder", 0, 6, False),
    "norm_out.linear": ("final_layer.adaLN_modulation.1", 0, 12, True),
}


def swap(D: Tensor) -> Tensor:
    return torch.cat([D[len(D) // 2 :], D[: len(D) // 2]])


@pytest.mark.parametrize("prefix", ["", UNET])
def test_diffusers_names_on_sd3(prefix: str, tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors", {prefix + name: shape for name, shape in SD3.items()})
    tensors, changes = {}, {}
    for seed, (name, (place, start, stop, swapped)) in enumerate(SD3_NAMES.items()):
        A, B = pair((stop - start, *SD3[f"{place}.weight"][1:]), 2, seed)
        tensors |= {f"transformer.{name}.lora_A.weight": A, f"transformer.{name}.lora_B.weight": B}
        D = dense(A, B, 1.0)
        changes.setdefault(f"{prefix}{place}.weight", []).append((start, stop, swap(D) if swapped else D))
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    check(base, tmp_path / "out.safetensors", changes)
    assert loratool.verify(base, [tmp_path / "a.safetensors"], tmp_path / "out.safetensors").status == "proven"
    loratool.unmerge(tmp_path / "out.safetensors", tmp_path / "a.safetensors", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == base.read_bytes()


def test_kohyas_names_on_diffusers_sd3(tmp_path: Path) -> None:
    shapes = {f"transformer_blocks.0.attn.to_{x}.weight": (6, 6) for x in "qkv"}
    shapes |= {f"transformer_blocks.{i}.norm1_context.linear.weight": (36 - 24 * i, 6) for i in (0, 1)}
    base = base_file(tmp_path / "base.safetensors", shapes)
    places = {
        "joint_blocks_0_x_block_attn_qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "joint_blocks_0_context_block_adaLN_modulation_1": ["transformer_blocks.0.norm1_context.linear"],
        "joint_blocks_1_context_block_adaLN_modulation_1": ["transformer_blocks.1.norm1_context.linear"],
    }
    tensors, changes = {}, {}
    for seed, (name, own) in enumerate(places.items()):
        sizes = [shapes[f"{place}.weight"][0] for place in own]
        A, B = factors(sum(sizes), 6, 2, seed=seed)
        tensors |= {f"lora_unet_{name}.lora_down.weight": A, f"lora_unet_{name}.lora_up.weight": B}
        D = dense(A, B, 1.0)
        for place, part in zip(own, (swap(D) if name.startswith("joint_blocks_1") else D).split(sizes), strict=True):
            changes[f"{place}.weight"] = [(0, len(part), part)]
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    check(base, tmp_path / "out.safetensors", changes)


def test_xlabs(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors", FLUX)
    names = {
        "double_blocks.0.processor.qkv_lora1": ("double_blocks.0.img_attn.qkv.weight", 0, 18),
        "double_blocks.0.processor.proj_lora1": ("double_blocks.0.img_attn.proj.weight", 0, 6),
        "single_blocks.0.processor.qkv_lora": ("single_blocks.0.linear1.weight", 0, 18),
        "single_blocks.0.processor.proj_lora": ("single_blocks.0.linear2.weight", 0, 6),
    }
    tensors, changes = {}, {}
    for seed, (name, (place, start, stop)) in enumerate(names.items()):
        A, B = factors(stop - start, FLUX[place][1], 2, seed=seed)
        tensors |= {f"{name}.down.weight": A, f"{name}.up.weight": B}
        changes[place] = [(start, stop, dense(A, B, 1.0))]
    save_file(tensors, tmp_path / "a.safetensors")
    assert loratool.inspect(tmp_path / "a.safetensors").format == "diffusers"  # type: ignore[union-attr]
    loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    check(base, tmp_path / "out.safetensors", changes)


def test_a_unet_folder_takes_sgm_names(tmp_path: Path) -> None:
    shapes = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight": (8, 8),
        "up_blocks.0.upsamplers.0.conv.weight": (8, 8, 3, 3),
    }
    base = base_file(tmp_path / "base.safetensors", shapes)
    names = ["input_blocks_4_1_transformer_blocks_0_attn1_to_q", "output_blocks_2_2_conv"]
    tensors, changes = {}, {}
    for seed, (name, (place, shape)) in enumerate(zip(names, shapes.items(), strict=True)):
        A, B = pair(shape, 2, seed)
        tensors |= {f"lora_unet_{name}.lora_down.weight": A, f"lora_unet_{name}.lora_up.weight": B}
        changes[place] = [(0, 8, dense(A, B, 1.0))]
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    check(base, tmp_path / "out.safetensors", changes)


def test_what_has_no_place_is_named(tmp_path: Path) -> None:
    """A text encoder's module never lands in the other one, nor a UNet's in the VAE."""
    base = base_file(tmp_path / "base.safetensors", {n: s for n, s in SDXL.items() if not n.startswith(TE2)})
    A, B = factors(8, 8, 4)
    name = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    other = "lora_unet_input_blocks_4_1_proj_in"
    save_file(
        {f"{n}.{end}": t.clone() for n in (name, other) for end, t in (("lora_down.weight", A), ("lora_up.weight", B))},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(NeedsFlag, match="te2"):
        loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    wide, _ = factors(8, 9, 4)
    save_file({f"{other}.lora_down.weight": wide, f"{other}.lora_up.weight": B}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"proj_in"):
        loratool.merge(base, tmp_path / "b.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# A few of the pairs that two independent generators agree on
PAIRS = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks.1.0.in_layers.0": "down_blocks.0.resnets.0.norm1",
    "input_blocks.8.0.skip_connection": "down_blocks.2.resnets.1.conv_shortcut",
    "input_blocks.6.0.op": "down_blocks.1.downsamplers.0.conv",
    "middle_block.0.out_layers.3": "mid_block.resnets.0.conv2",
    "middle_block.1.proj_out": "mid_block.attentions.0.proj_out",
    "middle_block.2.emb_layers.1": "mid_block.resnets.1.time_emb_proj",
    "output_blocks.0.0.in_layers.2": "up_blocks.0.resnets.0.conv1",
    "output_blocks.5.1.norm": "up_blocks.1.attentions.2.norm",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "out.2": "conv_out",
}


@pytest.mark.parametrize("sgm", PAIRS)
def test_names_of_a_unet(sgm: str) -> None:
    assert sgm_to_diffusers(sgm) == PAIRS[sgm] and diffusers_to_sgm(PAIRS[sgm]) == sgm
    assert sgm_to_diffusers("output_blocks.2.1.conv") == "up_blocks.0.upsamplers.0.conv"


def test_a_language_model_is_no_image_model() -> None:
    assert not image_modules(
        {"model.layers.0.self_attn.q_proj.weight": (4, 4), "transformer.h.0.attn.c_attn.weight": (4, 12)}
    )
