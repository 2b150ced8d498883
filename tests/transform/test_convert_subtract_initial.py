"""Convert image adapters that began as factors of the base (PiSSA and its like); peft trains, diffusers loads them.

On the base itself such an adapter is wrong as plain LoRA, by far more than its delta.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import few
from lib.models.diffusers_models import FILE, LOADERS, clip, compute, peft, pipelines, unet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, LoratoolError, NeedsFlag, UsageError

TARGETS = ["attn1.to_q", "attn1.to_k", "attn2.to_v", "ff.net.0.proj"]


def saved(folder: Path, model: Any) -> Path:
    loader = getattr(pipelines, LOADERS["sdxl"])
    layers, config = peft.get_peft_model_state_dict(model), model.peft_config["default"].to_dict()
    loader.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
    return folder / FILE


@pytest.fixture(params=["pissa", "olora"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Tensor]:
    """Return the file before training and after it, and the model's output then."""
    model = unet("sdxl")
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=request.param, target_modules=TARGETS))
    start = saved(tmp_path / "start", model)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return start, saved(tmp_path / "end", model), compute(model, clip())


def computed(path: Path) -> Tensor:
    """Return diffusers' output with a file on the original base."""
    live, loader = unet("sdxl"), getattr(pipelines, LOADERS["sdxl"])
    state, alphas, metadata = loader.lora_state_dict(str(path), return_lora_metadata=True, unet_config=live.config)
    loader.load_lora_into_unet(state, network_alphas=alphas, unet=live, metadata=metadata)
    return compute(live, clip())


def test_what_says_how_it_began_goes_on_saying_it(trained: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    _, end, expected = trained
    assert torch.allclose(computed(end), expected, atol=1e-5)  # the oracle with itself
    loratool.convert(end, tmp_path / "peft", to="peft")
    model = peft.PeftModel.from_pretrained(unet("sdxl"), tmp_path / "peft").eval()
    assert torch.allclose(compute(model.base_model.model, clip()), expected, atol=1e-5)
    loratool.convert(tmp_path / "peft", tmp_path / "back.safetensors", to="diffusers")
    before, after = load_file(end), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.allclose(computed(tmp_path / "back.safetensors"), expected, atol=1e-5)


@pytest.mark.parametrize("to", ["kohya", "comfy"])
def test_what_cannot_say_it_gets_no_plain_lora_of_it(
    to: str, trained: tuple[Path, Path, Tensor], tmp_path: Path
) -> None:
    start, end, expected = trained
    out = tmp_path / "out.safetensors"
    loratool.convert(end, tmp_path / "peft", to="peft")
    uses: list[Callable[[], object]] = [
        lambda: loratool.convert(end, out, to=to),
        lambda: loratool.convert(tmp_path / "peft", out, to="loralib"),
        lambda: loratool.convert(end, tmp_path / "plain", to="peft", plain=True),
        lambda: loratool.resize(end, out, rank=4, to=to),
        lambda: loratool.combine([end, end], out, to=to),
    ]
    for use in uses:
        with pytest.raises(LoratoolError, match="was initialized with .*, which changed the base"):
            use()
        assert not out.exists() and not (tmp_path / "plain").exists()
    rows = loratool.convert(end, out, to=to, plain=True, initial=start).modules
    assert {row.rank for row in rows} == {8}
    loratool.convert(out, tmp_path / "plain.safetensors", to="diffusers")
    assert torch.allclose(computed(tmp_path / "plain.safetensors"), expected, atol=1e-5)
    assert not torch.allclose(compute(unet("sdxl"), clip()), expected, atol=1e-4)
    with pytest.raises(UsageError, match="the adapter itself"):
        loratool.convert(end, out, to=to, plain=True, initial=end, force=True)


def both(folder: Path, first: str | bool, second: str | bool) -> tuple[Path, Path, Tensor]:
    """Return a UNet and a text encoder, each with its own init: before training, after it, and their outputs."""
    model, text = unet("sdxl"), clip()
    common = {"r": 4, "lora_alpha": 4}
    model.add_adapter(peft.LoraConfig(**common, init_lora_weights=first, target_modules=TARGETS))
    own = peft.LoraConfig(**common, init_lora_weights=second, target_modules=["q_proj", "fc1"])
    text.peft_config = {"default": own}
    text = peft.inject_adapter_in_model(own, text)

    def written(name: str) -> Path:
        getattr(pipelines, LOADERS["sd1"]).save_lora_weights(
            folder / name,
            unet_lora_layers=peft.get_peft_model_state_dict(model),
            text_encoder_lora_layers=peft.get_peft_model_state_dict(text),
            unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
            text_encoder_lora_adapter_metadata=text.peft_config["default"].to_dict(),
        )
        return folder / name / FILE

    start = written("start")
    torch.manual_seed(5)
    with torch.no_grad():
        for part in (model, text):
            for name, parameter in part.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.02 * torch.randn_like(parameter))
    return start, written("end"), compute(model, text)


def computed_by_both(path: Path) -> Tensor:
    live, text, loader = unet("sdxl"), clip(), getattr(pipelines, LOADERS["sdxl"])
    state, alphas, metadata = loader.lora_state_dict(str(path), return_lora_metadata=True, unet_config=live.config)
    loader.load_lora_into_unet(state, network_alphas=alphas, unet=live, metadata=metadata)
    loader.load_lora_into_text_encoder(state, alphas, text_encoder=text, metadata=metadata)
    return compute(live, text)


@pytest.mark.parametrize(
    "starts", few([("pissa", True), (True, "pissa"), ("pissa", "olora"), ("olora", "OLoRA")], (True, "pissa"))
)
def test_each_component_keeps_its_own_start(starts: tuple[str | bool, str | bool], tmp_path: Path) -> None:
    start, end, expected = both(tmp_path, *starts)
    assert torch.allclose(computed_by_both(end), expected, atol=1e-5)  # the oracle with itself
    uses: list[Callable[[Path], object]] = [
        lambda out: loratool.convert(end, out, to="diffusers"),
        lambda out: loratool.resize(end, out, rank=4),
        lambda out: loratool.combine([end], out),
    ]
    for i, use in enumerate(uses):
        use(tmp_path / f"{i}.safetensors")
        assert torch.allclose(computed_by_both(tmp_path / f"{i}.safetensors"), expected, atol=1e-4)
    loratool.convert(end, tmp_path / "plain.safetensors", to="diffusers", plain=True, initial=start)
    assert torch.allclose(computed_by_both(tmp_path / "plain.safetensors"), expected, atol=1e-5)
    kept = [name for name, began in zip(("unet.*", "text_encoder.*"), starts, strict=True) if began is True]
    if kept:  # what is left is plain
        other = {"unet.*": "text_encoder.*", "text_encoder.*": "unet.*"}[kept[0]]
        loratool.convert(end, tmp_path / "k.safetensors", to="kohya", exclude=[other])
    with pytest.raises(NeedsFlag, match="was initialized with"):
        loratool.convert(end, tmp_path / "l.safetensors", to="kohya")
    assert any("initialized with" in note for note in loratool.inspect(end).notes)


def test_starts_of_other_components_have_no_base_together(tmp_path: Path) -> None:
    """A part of either would be plain, and the sum has one word for each."""
    (_, one, _), (_, other, _) = both(tmp_path / "a", "pissa", True), both(tmp_path / "b", True, "pissa")
    with pytest.raises(InputError, match="they do not share a base"):
        loratool.combine([one, other], tmp_path / "out.safetensors", rank=4)
    loratool.combine([one, one], tmp_path / "out.safetensors", rank=4)


def test_a_start_of_more_modules_than_the_adapter_has(tmp_path: Path) -> None:
    """Its other modules were not taken away when the rest was trained."""
    start, end, _ = both(tmp_path, "pissa", "pissa")
    with safe_open(end, "pt") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    own = {key: tensor for key, tensor in load_file(end).items() if key.startswith("unet.")}
    alone = tmp_path / "alone.safetensors"
    fields = {key: value for key, value in fields.items() if key.startswith("unet.")}
    save_file(own, alone, {"lora_adapter_metadata": json.dumps(fields)})
    expected = computed(alone)
    loratool.convert(alone, tmp_path / "plain.safetensors", to="diffusers", plain=True, initial=start)
    assert torch.allclose(computed(tmp_path / "plain.safetensors"), expected, atol=1e-5)
    live = unet("sdxl")
    base = {**live.state_dict(), "text_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(12, 12)}
    save_file(base, tmp_path / "base.safetensors")
    loratool.merge(tmp_path / "base.safetensors", alone, tmp_path / "out.safetensors", initial=start)
    merged = load_file(tmp_path / "out.safetensors")
    assert torch.equal(merged.pop("text_model.encoder.layers.0.self_attn.q_proj.weight"), torch.ones(12, 12))
    live.load_state_dict(merged)
    assert torch.allclose(compute(live, clip()), expected, atol=1e-5)


def test_a_merge_asks_for_the_start(trained: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    start, end, expected = trained
    live = unet("sdxl")
    save_file(live.state_dict(), tmp_path / "base.safetensors")
    with pytest.raises(NeedsFlag, match="initial"):
        loratool.merge(tmp_path / "base.safetensors", end, tmp_path / "out.safetensors")
    loratool.merge(tmp_path / "base.safetensors", end, tmp_path / "out.safetensors", initial=start)
    live.load_state_dict(load_file(tmp_path / "out.safetensors"))
    assert torch.allclose(compute(live, clip()), expected, atol=1e-5)
    assert any("initialized with" in note for note in loratool.inspect(end).notes)


def test_every_verb_that_takes_it_as_it_is_keeps_the_word(trained: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    """Without another convention: the same rank, and a sum of one."""
    _, end, expected = trained
    uses: list[Callable[[Path], object]] = [
        lambda out: loratool.resize(end, out, rank=4),
        lambda out: loratool.combine([end], out),
    ]
    for use in uses:
        out = tmp_path / "out.safetensors"
        if b'init_lora_weights": "olora"' in end.read_bytes().replace(b"\\", b""):
            with pytest.raises(InputError, match="alpha = rank"):
                use(out)
            continue
        use(out)
        assert torch.allclose(computed(out), expected, atol=1e-4)
        out.unlink()
    with pytest.raises(InputError, match="at another rank"):
        loratool.resize(end, tmp_path / "out.safetensors", rank=3)
