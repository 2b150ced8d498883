"""Convert adapters that diffusers, peft and loralib wrote, and let them load the result: the model computes the same.

The models are tiny here, with the topology of SD 1.5, SDXL and Flux.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, only_families, slow, spread
from lib.models.diffusers_models import FILE, LOADERS, clip, compute, diffusers, peft, pipelines, unet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool
from loratool.architectures.families.unet import diffusers_to_sgm

single_file = pytest.importorskip("diffusers.loaders.single_file_utils")


TEXT = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "out_proj", "fc1"], "init_lora_weights": False}


def adapt_text(model: Any) -> Any:
    model.peft_config = {"default": peft.LoraConfig(**TEXT)}
    return peft.inject_adapter_in_model(peft.LoraConfig(**TEXT), model)


def layers(model: nn.Module) -> list[str]:
    """List each third layer: all kinds in all blocks. (`test_image_tables` has every name.)"""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][::3]


def write(folder: Path, family: str, **config: Any) -> tuple[Path, Tensor]:
    """Write an adapter that diffusers saved, with its alphas; return also the model's output with it."""
    model, text = unet(family), adapt_text(clip())
    torch.manual_seed(2)
    lora = {"r": 4, "lora_alpha": 3, "init_lora_weights": False, "target_modules": layers(model), **config}
    model.add_adapter(peft.LoraConfig(**lora))
    getattr(pipelines, LOADERS[family]).save_lora_weights(
        folder,
        unet_lora_layers=peft.get_peft_model_state_dict(model),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(text),
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=text.peft_config["default"].to_dict(),
    )
    return folder / FILE, compute(model, text)


def loaded(path: Path, family: str) -> Tensor:
    """Return the model's output with an adapter file that diffusers loads."""
    model, text, loader = unet(family), clip(), getattr(pipelines, LOADERS[family])
    state, alphas, metadata = loader.lora_state_dict(
        str(path), return_lora_metadata=True, unet_config=model.config if family == "sdxl" else None
    )
    loader.load_lora_into_unet(state, network_alphas=alphas, unet=model, metadata=metadata)
    loader.load_lora_into_text_encoder(state, alphas, text_encoder=text, metadata=metadata)
    assert len([name for name in text.state_dict() if "lora_" in name]) == 12
    return compute(model, text)


MIXED = {"rank_pattern": {"conv1": 2, "attn1.to_q": 3}, "alpha_pattern": {"attn2.to_k": 5}}


@pytest.mark.parametrize("family", spread(LOADERS, 1))
def test_every_way_there_and_back_as_diffusers_loads_it(family: str, tmp_path: Path) -> None:
    """Mixed ranks and alphas; the factors' bytes, the names of the UNet, and what it computes, bit for bit."""
    start, expected = write(tmp_path / "a", family, **MIXED)
    assert torch.equal(loaded(start, family), expected)  # the oracle with itself
    assert not torch.allclose(compute(unet(family), clip()), expected, atol=1e-2)
    for to in ("kohya", "comfy"):
        one, two = tmp_path / f"{to}.safetensors", tmp_path / f"{to}-back.safetensors"
        report = loratool.convert(start, one, to=to)
        # SD 2 has all modules of such a small SD 1, under the same names
        assert report.family == {"sd1": None}.get(family, family) and not report.dropped
        assert {row.how for row in report.modules} == {"exact"}
        loratool.convert(one, two, to="diffusers")
        before, after = load_file(start), load_file(two)
        if to != "diffusers":  # readers of the others know a CLIP's layers as transformers 4 named them
            before = {
                k.replace("text_encoder.encoder", "text_encoder.text_model.encoder"): t for k, t in before.items()
            }
        assert set(after) == set(before) and all(torch.equal(after[k], t) for k, t in before.items())
        assert torch.equal(loaded(two, family), expected)


@pytest.mark.parametrize("family", LOADERS)
def test_diffusers_loads_our_kohya_files(family: str, tmp_path: Path) -> None:
    """One alpha for all of the UNet: diffusers 0.42 loses those of the attentions' projections if they differ."""
    start, expected = write(tmp_path / "a", family)
    loratool.convert(start, tmp_path / "b.safetensors", to="kohya")
    assert torch.equal(loaded(tmp_path / "b.safetensors", family), expected)


@pytest.mark.parametrize("family", LOADERS)
def test_kohya_to_diffusers_as_diffusers_converts_it(family: str, tmp_path: Path) -> None:
    """Each weight and each alpha of a kohya file, by diffusers' own converter."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    start, _ = write(tmp_path / "a", family, **MIXED)
    loratool.convert(start, tmp_path / "kohya.safetensors", to="kohya")
    loratool.convert(tmp_path / "kohya.safetensors", tmp_path / "ours.safetensors", to="diffusers")
    config = unet(family).config if family == "sdxl" else None
    state, alphas = getattr(pipelines, LOADERS[family]).lora_state_dict(
        str(tmp_path / "kohya.safetensors"), unet_config=config
    )
    theirs = convert_unet_state_dict_to_peft({k: t for k, t in state.items() if k.startswith("unet.")})
    ours = {k: t for k, t in load_file(tmp_path / "ours.safetensors").items() if k.startswith("unet.")}
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], t) for k, t in theirs.items())
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    patterns = {k.lstrip("^").replace("\\", ""): a for k, a in fields["unet.alpha_pattern"].items()}
    parsed = {peft_name(k): a for k, a in alphas.items() if k.startswith("unet.")}
    assert {k: patterns.get(k, fields["unet.lora_alpha"]) for k in parsed} == parsed
    assert len(parsed) == len(ours) // 2 and len(set(parsed.values())) == 2


def peft_name(key: str) -> str:
    """Return a module's path from diffusers' name of its alpha, which has the old processors' names."""
    path = key.removeprefix("unet.").removesuffix(".alpha").removesuffix(".weight").removesuffix(".down")
    path = path.removesuffix(".lora").replace(".processor.", ".").removesuffix("_lora")
    return path + ".0" if path.endswith(".to_out") else path


def test_what_diffusers_writes_for_kohya(tmp_path: Path) -> None:
    """Its only writer of that format has SD 1's names, and alphas that are the ranks."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    start, _ = write(tmp_path / "a", "sd1", lora_alpha=4)
    own = {k: t for k, t in load_file(start).items() if k.startswith("unet.")}
    theirs = {k: t.contiguous() for k, t in convert_state_dict_to_kohya(own).items()}
    save_file(theirs, tmp_path / "theirs.safetensors")
    loratool.convert(start, tmp_path / "ours.safetensors", to="kohya")
    ours = {k: t for k, t in load_file(tmp_path / "ours.safetensors").items() if k.startswith("lora_unet_")}
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], t) for k, t in theirs.items() if t.shape)
    assert all(ours[k] == t == 4 for k, t in theirs.items() if not t.shape)
    loratool.convert(tmp_path / "theirs.safetensors", tmp_path / "back.safetensors", to="diffusers")
    back = load_file(tmp_path / "back.safetensors")
    assert set(back) == set(own) and all(torch.equal(back[k], t) for k, t in own.items())


@pytest.mark.parametrize(("family", "dora"), [("sd1", True), slow("sdxl", False)])
def test_peft_loads_our_folder(family: str, dora: bool, tmp_path: Path) -> None:
    """The UNet's part as PEFT's own adapter, also by way of kohya's spelling."""
    start, _ = write(tmp_path / "a", family, use_dora=dora, **MIXED)
    loratool.convert(start, tmp_path / "k.safetensors", to="kohya")
    expected = None
    for i, source in enumerate((start, tmp_path / "k.safetensors")):
        loratool.convert(source, tmp_path / str(i), to="peft", exclude=["lora_te*" if i else "text_encoder*"])
        model = peft.PeftModel.from_pretrained(unet(family), tmp_path / str(i)).eval()
        found = compute(model.base_model.model, clip())
        if expected is None:
            live = unet(family)
            getattr(pipelines, LOADERS[family]).load_lora_into_unet(
                *lora_state(start, family), unet=live, metadata=metadata_of(start)
            )
            expected = compute(live, clip())
        assert torch.equal(found, expected)


def lora_state(path: Path, family: str) -> tuple[Mapping[str, Tensor], Any]:
    state, alphas = getattr(pipelines, LOADERS[family]).lora_state_dict(str(path))
    return state, alphas


def metadata_of(path: Path) -> Any:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


@pytest.mark.parametrize(("family", "dora"), [slow("sd1", True), ("sdxl", False)])
def test_a_merge_computes_what_diffusers_does(family: str, dora: bool, tmp_path: Path) -> None:
    """Into a single file, under the model's own names: as a model the same as the adapter beside the base."""
    start, expected = write(tmp_path / "a", family, use_dora=dora, **MIXED)
    plain, text = unet(family).state_dict(), clip().state_dict()
    names = {n: single_name(n, family) for n in plain} | {
        n: f"{'cond_stage_model' if family == 'sd1' else 'conditioner.embedders.0'}.transformer.text_model.{n}"
        for n in text
    }
    save_file({names[n]: t.contiguous() for n, t in {**plain, **text}.items()}, tmp_path / "base.safetensors")
    merged = []
    for to in ("diffusers", "kohya", "comfy"):
        loratool.convert(start, tmp_path / f"{to}.safetensors", to=to)
        out = tmp_path / f"merged-{to}.safetensors"
        loratool.merge(tmp_path / "base.safetensors", tmp_path / f"{to}.safetensors", out, undo=False)
        merged.append(load_file(out))
    assert all(set(each) == set(merged[0]) for each in merged)
    assert all(torch.equal(each[n], t) for each in merged for n, t in merged[0].items())
    model, encoder = unet(family), clip()
    model.load_state_dict(single_file.convert_ldm_unet_checkpoint(merged[0], model.config))
    encoder.load_state_dict({n: merged[0][names[n]] for n in text})
    assert torch.allclose(compute(model, encoder), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_merge_into_diffusers_own_folder(tmp_path: Path) -> None:
    """A pipeline that diffusers saved, merged, and loaded by it again."""
    start, expected = write(tmp_path / "a", "sdxl", **MIXED)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    made = diffusers.StableDiffusionXLPipeline(
        unet=unet("sdxl"), text_encoder=clip(), vae=vae, scheduler=diffusers.DDIMScheduler(),
        tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    made.save_pretrained(tmp_path / "base")
    loratool.convert(start, tmp_path / "kohya.safetensors", to="kohya")
    for adapter in (start, tmp_path / "kohya.safetensors"):
        loratool.merge(tmp_path / "base", adapter, tmp_path / "merged", undo=False, force=True)
        found = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "merged")
        assert torch.allclose(compute(found.unet.eval(), found.text_encoder.eval()), expected, atol=1e-4, rtol=1e-4)


def single_name(name: str, family: str) -> str:
    path, _, last = name.rpartition(".")
    attends = family == "sdxl" or not path.startswith("up_blocks.0.")
    return f"model.diffusion_model.{diffusers_to_sgm(path, attends)}.{last}"


def flux() -> Any:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip


def sd3() -> Any:
    """Build the medium kind: the first blocks have a second attention."""
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
        dual_attention_layers=(0, 1), qk_norm="rms_norm",
    ).eval()  # fmt: skip


def compute_transformer(model: Any) -> Tensor:
    g = torch.Generator().manual_seed(3)
    more = {"encoder_hidden_states": torch.randn(1, 5, 12, generator=g), "timestep": torch.tensor([0.5])}
    more["pooled_projections"] = torch.randn(1, 8, generator=g)
    if "guidance_embeds" in model.config:
        ids = {"img_ids": torch.rand(16, 3, generator=g), "txt_ids": torch.zeros(5, 3), "guidance": torch.tensor([2.0])}
        states = torch.randn(1, 16, 4, generator=g)
    else:
        ids, states = {}, torch.randn(1, 4, 8, 8, generator=g)
    with torch.no_grad():
        out: Tensor = model(hidden_states=states, **more, **ids).sample
    return out


TRANSFORMERS = {"flux": (flux, "FluxLoraLoaderMixin"), "sd3": (sd3, "SD3LoraLoaderMixin")}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_transformers_adapter_there_and_back(family: str, tmp_path: Path) -> None:
    """kohya and ComfyUI fuse: what diffusers saved and loads again computes the same, also as PEFT's folder."""
    make, loader = TRANSFORMERS[family]
    model = make()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    config = {"r": 4, "lora_alpha": 3, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 3}}
    torch.manual_seed(2)
    model.add_adapter(peft.LoraConfig(**config, target_modules=names, init_lora_weights=False))
    getattr(pipelines, loader).save_lora_weights(
        tmp_path / "a",
        transformer_lora_layers=peft.get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    start, expected = tmp_path / "a" / FILE, compute_transformer(model)

    def loaded(path: Path) -> Tensor:
        again = make()
        state, *_, metadata = getattr(pipelines, loader).lora_state_dict(str(path), return_lora_metadata=True)
        again.load_lora_adapter(state, metadata=metadata)
        return compute_transformer(again)

    assert torch.equal(loaded(start), expected)  # the oracle with itself
    assert not torch.allclose(compute_transformer(make()), expected, atol=1e-2)
    for to in ("kohya", "comfy"):
        one, two = tmp_path / f"{to}.safetensors", tmp_path / f"{to}-back.safetensors"
        report = loratool.convert(start, one, to=to, architecture=family)
        assert report.family == family and {row.how for row in report.modules} == {"exact", "fused", "swapped"}
        assert not report.dropped and not any(row.error for row in report.modules)
        loratool.convert(one, two, to="diffusers")
        before, after = load_file(start), load_file(two)
        assert {k: t.shape for k, t in before.items()} == {k: t.shape for k, t in after.items()}
        assert torch.allclose(loaded(two), expected, atol=1e-5)
        loratool.convert(one, tmp_path / f"{to}-peft", to="peft")
        live = peft.PeftModel.from_pretrained(make(), tmp_path / f"{to}-peft").base_model.model
        assert torch.allclose(compute_transformer(live), expected, atol=1e-5)


# Flux's own sizes, by which diffusers' converter of kohya's files splits them
D = 3072
KOHYA_FLUX = {
    "double_blocks_0_img_attn_qkv": (3 * D, D),
    "double_blocks_0_txt_attn_qkv": (3 * D, D),
    "double_blocks_0_img_attn_proj": (D, D),
    "double_blocks_0_txt_attn_proj": (D, D),
    "double_blocks_0_img_mlp_0": (4 * D, D),
    "double_blocks_0_img_mlp_2": (D, 4 * D),
    "double_blocks_0_txt_mlp_0": (4 * D, D),
    "double_blocks_0_txt_mlp_2": (D, 4 * D),
    "double_blocks_0_img_mod_lin": (6 * D, D),
    "double_blocks_0_txt_mod_lin": (6 * D, D),
    "single_blocks_0_linear1": (7 * D, D),
    "single_blocks_0_linear2": (D, 5 * D),
    "single_blocks_0_modulation_lin": (3 * D, D),
}


@pytest.mark.parametrize("sparse", [False, True])
def test_kohyas_flux_as_diffusers_converts_it(sparse: bool, tmp_path: Path) -> None:
    """The factors' products, as diffusers folds the scale into them; what is in blocks comes apart there and here."""
    tensors = {}
    for seed, (name, (rows, width)) in enumerate(KOHYA_FLUX.items()):
        parts = {"qkv": 3, "linear1": 4}.get(name.rpartition("_")[2], 1)
        A, B = factors(rows, width, 4, seed=seed, dtype=torch.bfloat16)
        if sparse and parts > 1:
            A, sizes = A[:parts], [D] * 3 + [4 * D] * (parts == 4)
            B = torch.block_diag(*[b[:, :1].float() for b in B.split(sizes)]).bfloat16()
        stem = f"lora_unet_{name}"
        tensors |= {f"{stem}.lora_down.weight": A.contiguous(), f"{stem}.lora_up.weight": B.contiguous()}
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
    theirs = pipelines.FluxLoraLoaderMixin.lora_state_dict(str(tmp_path / "a.safetensors"))
    ours = load_file(tmp_path / "b.safetensors")
    assert set(ours) == set(theirs)
    fields = metadata_of(tmp_path / "b.safetensors")
    patterns = {k.lstrip("^").replace("\\", ""): a for k, a in fields["transformer.alpha_pattern"].items()}
    for name in (k.removesuffix(".lora_A.weight") for k in ours if k.endswith("A.weight")):
        (A, B), (C, E) = (
            (each[f"{name}.lora_A.weight"].double(), each[f"{name}.lora_B.weight"].double()) for each in (ours, theirs)
        )
        assert A.shape == C.shape and B.shape == E.shape
        alpha = patterns.get(name.removeprefix("transformer."), fields["transformer.lora_alpha"])
        x = torch.randn(A.shape[1], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(alpha / len(A) * (B @ (A @ x)), E @ (C @ x), rtol=1e-2, atol=1e-4)  # theirs are bf16
        if alpha in (len(A) / 2, len(A), len(A) * 2):
            assert torch.equal(alpha / len(A) * (B @ (A @ x)), E @ (C @ x))


class TestLoralib:
    """loralib's own layers, saved by its own function, as peft computes with what we made of the file."""

    def net(self) -> nn.Module:
        loralib = pytest.importorskip("loralib")
        torch.manual_seed(0)
        net = nn.Sequential()
        net.add_module("embed_tokens", loralib.Embedding(16, 8, r=2, lora_alpha=5))
        net.add_module("q", loralib.Linear(8, 6, r=2, lora_alpha=5))
        net.add_module("c_attn", loralib.MergedLinear(6, 12, r=2, lora_alpha=5, enable_lora=[True, False, True]))
        net.add_module("head", nn.Linear(12, 3))
        for name, tensor in net.named_parameters():
            if "lora_" in name:
                nn.init.normal_(tensor)
        return net.train()  # where its changes are beside the weights

    def plain(self, net: nn.Module) -> nn.Module:
        made = nn.Sequential()
        for name, old in net.named_children():
            new = nn.Embedding(16, 8) if name == "embed_tokens" else nn.Linear(old.in_features, old.out_features)
            own = {k: t for k, t in old.state_dict().items() if "lora_" not in k}
            new.load_state_dict(own)
            made.add_module(name, new)
        return made

    def test_peft_computes_the_same(self, tmp_path: Path) -> None:
        loralib = pytest.importorskip("loralib")
        net, x = self.net(), torch.arange(16)
        torch.save(loralib.lora_state_dict(net), tmp_path / "a.pt")
        loratool.convert(tmp_path / "a.pt", tmp_path / "b", to="peft", alpha=5.0, enable_lora=(True, False, True))
        model = peft.PeftModel.from_pretrained(self.plain(net), tmp_path / "b")
        assert not torch.allclose(self.plain(net)(x), net(x), atol=1e-2)
        assert torch.allclose(model(x), net(x), atol=1e-5)

    def test_it_loads_what_we_write(self, tmp_path: Path) -> None:
        """PEFT's adapter in loralib's layers."""
        loralib = pytest.importorskip("loralib")
        torch.manual_seed(0)
        base = nn.Sequential()
        base.add_module("q", nn.Linear(8, 6))
        base.add_module("v", nn.Linear(6, 4))
        state = {k: t.clone() for k, t in base.state_dict().items()}
        config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q", "v"], init_lora_weights=False)
        model = peft.get_peft_model(base, config)
        model.save_pretrained(tmp_path / "a")
        report = loratool.convert(tmp_path / "a", tmp_path / "b.safetensors", to="loralib")
        assert "r=3, lora_alpha=7" in report.notes[0]
        theirs = nn.Sequential()
        theirs.add_module("q", loralib.Linear(8, 6, r=3, lora_alpha=7))
        theirs.add_module("v", loralib.Linear(6, 4, r=3, lora_alpha=7))
        missing = theirs.load_state_dict({**state, **load_file(tmp_path / "b.safetensors")}, strict=True)
        assert not missing.unexpected_keys
        x = torch.randn(5, 8)
        assert torch.allclose(theirs(x), model(x), atol=1e-6)


SDXL = "input_blocks.4.1.transformer_blocks.1.attn1.to_q"


def comfyui(W: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what ComfyUI makes of a weight, by `comfy/weight_adapter/{lora,base}.py`, which read no metadata."""
    x = {
        end: t.double() for name, t in tensors.items() for end in (*ROLES, "alpha", "dora_scale") if name.endswith(end)
    }
    up, down = (next(x[end] for end in ROLES[i::2] if end in x) for i in (0, 1))
    D = up @ down * (float(x["alpha"]) / len(down) if "alpha" in x else 1.0)
    if "dora_scale" not in x:
        return W + D
    along_outputs = len(x["dora_scale"]) == len(W)
    norm = W.norm(dim=1, keepdim=True) if along_outputs else (W + D).norm(dim=0, keepdim=True)
    return (W + D) * x["dora_scale"] / norm


ROLES = ("lora_up.weight", "lora_down.weight", "lora_B.weight", "lora_A.weight")


class TestWhatComfyUIAppliesOtherwise:
    """It is said in a note exactly where ComfyUI's formula is another than what the file says, with what mends it."""

    @pytest.mark.parametrize("to", ["kohya", "comfy", "diffusers"])
    @pytest.mark.parametrize("kind", ["alpha is the rank", "another alpha", "DoRA of outputs", "DoRA of inputs"])
    def test_a_note_says_so(self, kind: str, to: str, tmp_path: Path) -> None:
        (A, B), W = factors(8, 8, 4), torch.randn(8, 8).double()
        name = f"lora_unet_{SDXL.replace('.', '_')}"
        alpha = torch.tensor(4.0 if "rank" in kind else 3.0)
        tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": alpha}
        shape = (8, 1) if "outputs" in kind else (1, 8)
        tensors |= {f"{name}.dora_scale": torch.rand(shape) + 0.5} if "DoRA" in kind else {}
        save_file(tensors, tmp_path / "a.safetensors")
        save_file({f"model.diffusion_model.{SDXL}.weight": W}, tmp_path / "base.safetensors")
        if to == "diffusers" and "DoRA" in kind:
            remedies = ("--plain --base BASE",)  # its magnitudes are none that ComfyUI's formula has
            found = self.converted(tmp_path, to)[0] if "outputs" in kind else remedies
        else:
            remedies, same = self.converted(tmp_path, to)
            assert bool(remedies) == (not same)
            found = remedies
        for remedy in found:
            options = {"base": tmp_path / "base.safetensors"} if "--base" in remedy else {}
            assert self.converted(tmp_path, to, plain=True, rank=8, **options) == ((), True)
        assert bool(found) == ("outputs" in kind or (to == "diffusers" and kind != "alpha is the rank"))

    def converted(self, folder: Path, to: Any, **options: Any) -> tuple[tuple[str, ...], bool]:
        """Return the flags that notes on ComfyUI name, and whether it makes of the file what it says."""
        out = folder / "out.safetensors"
        with only_families("sdxl"):
            report: Any = loratool.convert(folder / "a.safetensors", out, to=to, force=True, **options)
            loratool.merge(folder / "base.safetensors", out, folder / "m.safetensors", undo=False, force=True)
        (W,), (merged,) = (load_file(folder / f"{each}.safetensors").values() for each in ("base", "m"))
        notes = [note for note in report.notes if "ComfyUI" in note]
        remedies = tuple(note.partition("`loratool convert ")[2].partition("`")[0] for note in notes)
        return remedies, torch.allclose(comfyui(W, load_file(out)), merged, rtol=1e-9, atol=1e-9)
