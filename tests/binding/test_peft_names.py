"""Hold names to those that PEFT finds: it loads in full what extract and init write, or they say what to leave out."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, weights, write_model, write_peft
from lib.models.language_families import with_adapter
from lib.models.tiny import build, perturb
from safetensors.torch import load_file, save_file

import loratool
from loratool import InputError
from loratool.architectures.peft import BARE_ROUTERS, REFUSED, RESHAPED, STACKED_BY_PEFT
from loratool.architectures.renames import RENAMES
from loratool.binding.names.class_names import ClassNames
from loratool.binding.names.peft_names import exclude_all
from loratool.files.checkpoint import open_checkpoint

LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {"model_type": "llama"},
    "vision_config": {"model_type": "clip_vision_model"},
}
VED = {
    "model_type": "vision-encoder-decoder",
    "architectures": ["VisionEncoderDecoderModel"],
    "encoder": {"model_type": "vit"},
    "decoder": {"model_type": "bert"},
}
pytestmark = pytest.mark.filterwarnings("ignore")


def test_experts_that_did_not_all_change(tmp_path: Path) -> None:
    """They are one parameter of the class, and the factors of what stayed are zero."""
    kind, model = build("causal", "mixtral")
    model.save_pretrained(tmp_path / "base")
    perturb(model, every=False)
    model.save_pretrained(tmp_path / "tuned")
    same = {n: W for n, W in load_model(tmp_path / "base").items() if "experts.1.w2" in n}
    save_file({**load_model(tmp_path / "tuned"), **same}, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    paths = tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter"
    loratool.extract(*paths, rank=4)
    wanted, found = kind.from_pretrained(paths[1]), with_adapter(kind, *paths[::2]).merge_and_unload()
    for name, W in wanted.state_dict().items():
        assert torch.allclose(found.state_dict()[name], W, atol=1e-5), name


def test_stacks_that_loading_turns(tmp_path: Path) -> None:
    """Released files of Qwen3-VL-MoE have them as (expert, in, out), and transformers 5.24 writes (expert, out, in)."""
    kind, model = build("image", "qwen3_vl_moe")
    model.save_pretrained(tmp_path / "base")
    perturb(model, every=False)
    model.save_pretrained(tmp_path / "tuned")
    wanted = kind.from_pretrained(tmp_path / "tuned").state_dict()
    for name in ("base", "tuned"):
        tensors = load_model(tmp_path / name)
        turned = {n: W.mT.contiguous() if ".experts." in n else W for n, W in tensors.items()}
        save_file(turned, tmp_path / name / "model.safetensors", {"format": "pt"})
    loratool.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=8)
    found = with_adapter(kind, tmp_path / "base", tmp_path / "adapter").merge_and_unload().state_dict()
    assert all(torch.allclose(found[name], W, atol=1e-6) for name, W in wanted.items() if W.is_floating_point())
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", undo=False)
    merged = load_model(tmp_path / "merged")
    assert all(torch.allclose(merged[name], W, atol=1e-6) for name, W in load_model(tmp_path / "tuned").items())


@pytest.mark.parametrize("model_type", ["camembert", "xlm-roberta", "bert"])
def test_a_tied_head_inside_another_module(model_type: str, tmp_path: Path) -> None:
    """PEFT's forward adds the factors to the embedding and to the head; its merge adds both to the one matrix."""
    kind, model = build("causal", model_type)
    model.save_pretrained(tmp_path / "base")
    W = model.get_input_embeddings().weight
    with torch.no_grad():
        D = weights(W.shape[0], 2, seed=1) @ weights(2, W.shape[1], seed=2)
        W += D * (0.5 * W.norm() / D.norm())
    model.save_pretrained(tmp_path / "tuned")
    paths, ids = (tmp_path / "base", tmp_path / "tuned"), torch.arange(4, 20)[None]
    report = loratool.extract(*paths, tmp_path / "lora", rank=2)
    assert any("--embed full" in line for line in report.warnings)
    loratool.extract(*paths, tmp_path / "full", embed="full")
    with torch.no_grad():
        before, after = (kind.from_pretrained(path).eval()(input_ids=ids).logits for path in paths)
        factored = with_adapter(kind, paths[0], tmp_path / "lora").eval()
        whole = with_adapter(kind, paths[0], tmp_path / "full").merge_and_unload().eval()
        for found in (factored, whole):
            assert float((found(input_ids=ids).logits - after).norm()) < 1e-4 * float((after - before).norm())


# The tensors of a single file, and what diffusers calls the first of them
SINGLE = {
    "blocks.0.attn1.to_q": {"blocks.0.self_attn.q.weight": (8, 8), "time_projection.1.weight": (48, 8)},
    "layers.0.attention.to_q": {
        "layers.0.attention.qkv.weight": (24, 8),
        "layers.0.adaLN_modulation.0.weight": (32, 8),
        "noise_refiner.0.attention.qkv.weight": (24, 8),
    },
    "proj_in": {"patchify_proj.weight": (8, 8), "transformer_blocks.0.attn1.to_q.weight": (8, 8)},
    "transformer_blocks.0.img_mod.1": {f"transformer_blocks.0.{x}_mod.1.weight": (8, 8) for x in ("img", "txt")},
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("module", SINGLE)
def test_single_files_with_their_makers_names(module: str, prefix: str, tmp_path: Path) -> None:
    """PEFT's adapters are of diffusers' class: of Wan, Z-Image, LTX and Qwen-Image."""
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    tensors = {prefix + name: weights(*shape) for name, shape in SINGLE[module].items()}
    save_file(tensors, base)
    save_file({name: W * 1.1 for name, W in tensors.items()}, tuned)
    calls: tuple[Callable[..., Any], ...] = (
        lambda: loratool.extract(base, tuned, tmp_path / "a", to="peft"),
        lambda: loratool.init(base, tmp_path / "a", rank=2, to="peft"),
    )
    for call in calls:
        call()
        names = load_file(tmp_path / "a" / "adapter_model.safetensors")
        assert f"base_model.model.{module}.lora_A.weight" in names
        assert (tmp_path / "a" / "adapter_config.json").exists()
        shutil.rmtree(tmp_path / "a")


def test_a_single_file_of_an_unknown_image_model(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    save_file({"model.diffusion_model.stages.0.mix.weight": weights(8, 8)}, base)
    with pytest.raises(InputError, match=r"(?s)single file of an unknown image model.*diffusers folder"):
        loratool.init(base, tmp_path / "a", rank=2)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("config", "file", "model"),
    [
        (LLAVA, "language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        (LLAVA | {"architectures": ["LlavaModel"]}, "language_model.model.norm.weight", "language_model.norm.weight"),
        (VED, "encoder.encoder.layer.0.output.dense.weight", "encoder.layers.0.mlp.fc2.weight"),
        (VED, "decoder.bert.encoder.layer.0.output.dense.weight", "decoder.bert.encoder.layer.0.output.dense.weight"),
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "h.0.ln_1.weight",
            "transformer.h.0.ln_1.weight",
        ),
        (
            {"model_type": "dinov2", "architectures": ["Dinov2Model"]},
            "encoder.layer.0.attention.output.dense.weight",
            "encoder.layer.0.attention.o_proj.weight",
        ),
        (
            {"model_type": "sapiens2", "architectures": ["Sapiens2Model"]},
            "blocks.0.attn.proj.weight",
            "model.layer.0.attention.o_proj.weight",
        ),
        ({}, "module.a.weight", "a.weight"),
    ],
)
def test_the_names_are_the_declared_classs(config: dict[str, Any], file: str, model: str, tmp_path: Path) -> None:
    base = open_checkpoint(write_model(tmp_path, {file: weights(2, 2)}, config))
    assert ClassNames(base)(file) == model
    base.close()


def test_one_pattern_for_what_differs_in_numbers() -> None:
    """Only whole numbers of a path are joined: w1 is not w2; the last name alone serves where nothing else has it."""
    experts = [f"m.{i}.experts.{e}.w{w}" for i in range(3) for e in range(2) for w in (1, 2)]
    assert exclude_all(experts, ["m.0.up"]) == "--exclude w1 --exclude w2"
    some = exclude_all(experts, ["m.0.shared.w1"])
    assert shlex.split(some) == ["--exclude", r"re:^m\.\d+\.experts\.\d+\.w1$", "--exclude", "w2"]
    assert exclude_all(["m.0.a"], ["m.1.a"]) == "--exclude m.0.a"


def test_what_is_refused_has_no_names_in_the_tables() -> None:
    assert not REFUSED.keys() & {*RENAMES, *RESHAPED, *STACKED_BY_PEFT, *BARE_ROUTERS}


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_families_of_which_no_adapter_loads(model_type: str, tmp_path: Path) -> None:
    tensors = {"model.layers.0.q_proj.weight": weights(12, 8)}
    base = write_model(tmp_path / "base", tensors, {"model_type": model_type})
    tuned = write_model(tmp_path / "tuned", {n: 1.01 * W for n, W in tensors.items()}, {"model_type": model_type})
    adapter, out = write_peft(tmp_path / "adapter", {"model.layers.0.q_proj": factors(12, 8, 1)}), tmp_path / "out"
    for command in (
        lambda: loratool.init(base, out, rank=1),
        lambda: loratool.extract(base, tuned, out, rank=1),
        lambda: loratool.convert(adapter, out, to="peft", base=base),
    ):
        with pytest.raises(InputError, match=f"no adapter of a {model_type} would load"):
            command()
    assert not out.exists()
    loratool.merge(base, adapter, out)
