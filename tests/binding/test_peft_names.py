"""Hold names to those that PEFT finds: it loads in full what extract and init write, or they say what to leave out."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_model, weights, write_model
from safetensors.torch import load_file, save_file
from tiny import build, perturb, tables

import loratool
from loratool import InputError, NeedsFlag
from loratool.architectures.peft import BARE_ROUTERS, REFUSED, RESHAPED, STACKED_BY_PEFT
from loratool.architectures.renames import RENAMES
from loratool.binding.peft_names import exclude_all, namer
from loratool.binding.selection import parse_patterns
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

# (table of classes, model type): one of each way in which the file's names are not the model's, or PEFT makes of them
# something else -> what is left out by --exclude, as the end of a pattern
FAMILIES = {
    ("image", "llava"): "",
    ("causal", "granitemoe"): "",
    ("causal", "deepseek_v3"): r"shared_experts\.up_proj$",
    ("causal", "jamba"): r"experts\.\d+\.up_proj$",
    ("causal", "falcon_mamba"): "",
    ("causal", "git"): "",
}


def with_what_is_named(make: Any, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the report, and the names of the refusal, which have to be enough."""
    try:
        return make(**options), ()
    except NeedsFlag as error:
        words = shlex.split(error.remedy or "")
        assert words[:2] == ["add", "--exclude"], error
        named = parse_patterns([word for flag, word in pairwise(words) if flag == "--exclude"])
        return make(exclude=named, **options), named


def loaded(kind: Any, base: Path, adapter: Path) -> Any:
    """Load the model with the adapter, of which PEFT has missed nothing and left nothing."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(kind.from_pretrained(base), adapter)
    result = model.load_adapter(adapter, "again")
    assert not result.missing_keys and not result.unexpected_keys
    return model


def without(tuned: Path, base: Path, left_out: Any) -> None:
    """Take back what the report says is not in the adapter."""
    before, after = load_model(base), load_model(tuned)
    for file in tuned.glob("*.safetensors*"):
        file.unlink()
    tensors = {**after, **{name: before[name] for name in left_out}}
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})


def check(kind: Any, model: Any, folder: Path, every: bool = False) -> tuple[str, ...]:
    """Check that the adapter, merged by PEFT and by us, makes the tuned model; return what had to be excluded."""
    base, tuned = folder / "base", folder / "tuned"
    model.save_pretrained(base)
    perturb(model, every)
    model.save_pretrained(tuned)
    own = kind.from_pretrained(tuned).state_dict()
    if own.keys() != model.state_dict().keys() or any(
        not torch.allclose(own[name], W) for name, W in model.state_dict().items() if W.is_floating_point()
    ):
        pytest.skip("transformers does not read its own file back")
    paths, allow = (base, tuned, folder / "adapter"), ("unrelated",)  # weights of 0 change by 1
    report, excluded = with_what_is_named(lambda **o: loratool.extract(*paths, allow=allow, **o), rank=8)
    without(tuned, base, report.left_out)
    loratool.merge(base, folder / "adapter", folder / "merged", undo=False)
    ours, disk = load_model(folder / "merged"), load_model(tuned)
    plain, wanted = (kind.from_pretrained(path).state_dict() for path in (base, tuned))
    found = loaded(kind, base, folder / "adapter").merge_and_unload().state_dict()
    for one, other, before in ((found, wanted, plain), (ours, disk, load_model(base))):
        for name in [name for name, W in other.items() if W.is_floating_point()]:
            change = float((other[name] - before[name]).norm())
            assert float((one[name] - other[name]).norm()) < 1e-5 * max(change, 1e-2), name
    with_what_is_named(lambda **o: loratool.init(base, folder / "start", **o), rank=1)
    loaded(kind, base, folder / "start")
    return excluded


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
def test_peft_makes_the_tuned_model_of_it(family: tuple[str, str], tmp_path: Path) -> None:
    expected, excluded = FAMILIES[family], check(*build(*family), tmp_path)
    assert any(pattern.endswith(expected) for pattern in excluded) if expected else not excluded


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("family", tables(), ids="-".join)
def test_every_type_is_right_or_refused(family: tuple[str, str], every: bool, tmp_path: Path) -> None:
    """every: with all tensors of two dimensions and more, embeddings and routers too."""
    try:
        kind, model = build(*family)
        model.save_pretrained(tmp_path / "base")
        kind.from_pretrained(tmp_path / "base")
    except Exception as error:
        pytest.skip(f"cannot be made so small: {error}")
    try:
        check(kind, model, tmp_path, every)
    except InputError as error:
        assert "no adapter of a" in error.message
        assert not (tmp_path / "adapter").exists()


def test_experts_that_did_not_all_change(tmp_path: Path) -> None:
    """PEFT makes a stack of all, and has no factors for the one that stayed as it was."""
    kind, model = build("causal", "mixtral")
    model.save_pretrained(tmp_path / "base")
    perturb(model, every=False)
    model.save_pretrained(tmp_path / "tuned")
    same = {n: W for n, W in load_model(tmp_path / "base").items() if "experts.1.w2" in n}
    save_file({**load_model(tmp_path / "tuned"), **same}, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    paths = tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter"
    report, excluded = with_what_is_named(lambda **o: loratool.extract(*paths, **o), rank=2)
    assert excluded and set(report.left_out) == {n for n in load_model(paths[0]) if ".experts." in n and n not in same}
    loaded(kind, *paths[::2])


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
        factored = loaded(kind, paths[0], tmp_path / "lora").eval()
        whole = loaded(kind, paths[0], tmp_path / "full").merge_and_unload().eval()
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
    with pytest.raises(InputError, match=r"(?s)single file of an image model that is not known.*diffusers folder"):
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
        ({}, "module.a.weight", "a.weight"),
    ],
)
def test_the_names_are_the_declared_classs(config: dict[str, Any], file: str, model: str, tmp_path: Path) -> None:
    base = open_checkpoint(write_model(tmp_path, {file: weights(2, 2)}, config))
    assert namer(base)(file) == model
    base.close()


def test_one_pattern_for_what_differs_in_numbers() -> None:
    """Only whole numbers of a path are joined: w1 is not w2; the last name alone serves where nothing else has it."""
    experts = [f"m.{i}.experts.{e}.w{w}" for i in range(3) for e in range(2) for w in (1, 2)]
    assert exclude_all(experts, ["m.0.up"]) == "--exclude w1 --exclude w2"
    some = exclude_all(experts, ["m.0.shared.w1"])
    assert shlex.split(some) == ["--exclude", r"re:^m\.\d+\.experts\.\d+\.w1$", "--exclude", "w2"]
    assert exclude_all(["m.0.a"], ["m.1.a"]) == "--exclude m.0.a"


def test_what_is_refused_has_no_names_in_the_tables() -> None:
    assert not REFUSED.keys() & {*RENAMES, *RESHAPED, *STACKED_BY_PEFT, *BARE_ROUTERS} - {
        "dots3_note",
        "dots3_note_text",
    }
