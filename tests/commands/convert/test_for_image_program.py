"""Hold `convert --for` and `inspect --for` of image programs: what is refused, said and asked, and DoRA's magnitudes.

`test_image_programs.py` runs the programs themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratool
from loratool import InputError, NeedsFlag, UsageError
from loratool.adapters.formats import loaded_by
from loratool.architectures.runtimes.image_programs import IMAGE_RUNTIMES
from loratool.views.inspect_runtime import Finding

SDXL = FIXTURES / "sdxl" / "adapter.safetensors"
PREFIX = "lora_unet_double_blocks_0_img_attn_proj"


def findings(adapter: Path, runtime: str, **options: Any) -> dict[str, Finding]:
    return {each.what: each for each in loratool.inspect_for(adapter, runtime=runtime, **options).findings}


def flux(folder: Path, *, alpha: float = 2.0, name: str = PREFIX, **more: torch.Tensor) -> Path:
    """Write an adapter of one layer of Flux, of its real size, in kohya's names."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 3072, generator=g),
        f"{name}.lora_up.weight": torch.randn(3072, 4, generator=g) * 0.1,
        f"{name}.alpha": torch.tensor(alpha),
        **{f"{name}.{role}": tensor for role, tensor in more.items()},
    }
    save_file(tensors, folder / "a.safetensors")
    return folder / "a.safetensors"


def flux_base(folder: Path) -> tuple[Path, torch.Tensor]:
    W = torch.randn(3072, 3072, generator=torch.Generator().manual_seed(1)) * 0.02
    save_file({"double_blocks.0.img_attn.proj.weight": W}, folder / "base.safetensors")
    return folder / "base.safetensors", W


@pytest.mark.parametrize("key", IMAGE_RUNTIMES)
def test_sdxl_is_written_for_each_that_loads_it(key: str, tmp_path: Path) -> None:
    """In the format that the program reads; what it reads itself has no finding."""
    out, row = tmp_path / "b.safetensors", IMAGE_RUNTIMES[key]
    if "sdxl" not in row.families:
        with pytest.raises(InputError, match=r"is of SDXL, and .* loads adapters of"):
            loratool.convert(SDXL, out, runtime=key, base=FIXTURES / "sdxl" / "base.safetensors")
        return
    report = loratool.convert(SDXL, out, runtime=key)
    assert report.runtime == key and report.to == loaded_by(key).key and not report.notes
    assert findings(out, key) == {}
    with pytest.raises(UsageError, match="exclude each other"):
        loratool.convert(SDXL, out, runtime=key, to="kohya")


def test_each_program_is_for_its_models(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='runtime="vllm" is for adapters of language models'):
        loratool.convert(SDXL, tmp_path / "b", runtime="vllm")
    llama = FIXTURES / "llama" / "adapter"
    with pytest.raises(InputError, match="is not an adapter of a known image model"):
        loratool.convert(llama, tmp_path / "b.safetensors", runtime="comfyui")
    with pytest.raises(InputError, match="is not an adapter of a known image model"):
        loratool.inspect_for(llama, runtime="comfyui")


def test_modules_outside_of_the_blocks_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {**load_file(flux(tmp_path)), **load_file(flux(tmp_path, name="lora_unet_img_in"))}
    tensors["lora_unet_img_in.lora_down.weight"] = torch.ones(4, 64)
    save_file(tensors, tmp_path / "a.safetensors")
    assert findings(tmp_path / "a.safetensors", "musubi")["never"].modules == ("lora_unet_img_in",)
    with pytest.raises(NeedsFlag, match="musubi-tuner does not load 1 modules") as raised:
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", runtime="musubi")
    assert raised.value.flags == "--exclude img_in" or "lora_unet_img_in" in str(raised.value.flags)
    options: dict[str, Any] = {"exclude": ["lora_unet_img_in"]}
    loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", runtime="musubi", **options)
    assert {name.partition(".")[0] for name in load_file(tmp_path / "b.safetensors")} == {PREFIX}
    loratool.convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", runtime="sd-scripts")
    assert len(load_file(tmp_path / "c.safetensors")) == 6


def test_alphas_beside_the_tensors_are_told(tmp_path: Path) -> None:
    report = loratool.convert(SDXL, tmp_path / "b.safetensors", to="diffusers")
    (note,) = report.notes
    assert "only in the metadata" in note and "loratool convert --plain" in note
    assert findings(tmp_path / "b.safetensors", "diffusers") == {}
    assert findings(tmp_path / "b.safetensors", "comfyui").keys() == {"format", "scale"}
    loratool.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", runtime="comfyui")
    loratool.convert(SDXL, tmp_path / "d.safetensors", runtime="comfyui")
    found, wanted = load_file(tmp_path / "c.safetensors"), load_file(tmp_path / "d.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_family_that_names_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    loratool.convert(flux(tmp_path), tmp_path / "b.safetensors", to="diffusers")
    with pytest.raises(NeedsFlag) as raised:
        loratool.inspect_for(tmp_path / "b.safetensors", runtime="comfyui")
    assert raised.value.flags == "--base BASE"


def test_kinds_are_told(tmp_path: Path) -> None:
    tensors = {f"{PREFIX}.hada_w{i}_{side}": torch.ones(3072, 2) for i in "12" for side in "a"}
    tensors |= {f"{PREFIX}.hada_w{i}_b": torch.ones(2, 3072) for i in "12"} | {f"{PREFIX}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert findings(tmp_path / "a.safetensors", "comfyui") == {}
    assert findings(tmp_path / "a.safetensors", "sd-scripts")["kind"].modules == (PREFIX,)


VALUES = {
    "diff": {"diff": torch.ones(3072, 3072)},
    "diff_b": {"diff_b": torch.ones(3072)},
    "set_weight": {"set_weight": torch.ones(3072, 3072)},
}


@pytest.mark.parametrize("role", VALUES)
@pytest.mark.parametrize("key", IMAGE_RUNTIMES)
def test_what_has_no_factors_is_for_programs_that_apply_it(key: str, role: str, tmp_path: Path) -> None:
    """Beside LoRA of another layer; the other programs read the names of the factors alone, without a word."""
    adapter, other, out = flux(tmp_path), PREFIX.replace("img", "txt"), tmp_path / "b.safetensors"
    tensors = {f"{other}.{end}": tensor for end, tensor in VALUES[role].items()}
    save_file({**load_file(adapter), **tensors}, adapter)
    applied = {"comfyui": {*VALUES}, "forge": {"diff", "diff_b"}}
    if role in applied.get(key, ()):
        report = loratool.convert(adapter, out, runtime=key, architecture="flux")
        assert any(name.endswith(f".{role}") for name in load_file(out)) and not report.dropped
        return
    with pytest.raises(NeedsFlag, match=other) as raised:
        loratool.convert(adapter, out, runtime=key, architecture="flux")
    assert not out.exists() and raised.value.flags
    excluded = raised.value.flags.removeprefix("--exclude ").split(",")
    assert len(loratool.convert(adapter, out, runtime=key, architecture="flux", exclude=excluded).modules) == 1
    save_file(tensors, adapter)
    with pytest.raises(InputError):
        loratool.convert(adapter, out, runtime=key, architecture="flux", force=True)


def test_a_language_model_has_other_names_in_comfyui(tmp_path: Path) -> None:
    adapter, out = flux(tmp_path, name="transformer.transformer_blocks.0.attn.to_out.0"), tmp_path / "b.safetensors"
    text = "text_encoder.model.language_model.layers.0.self_attn.q_proj"
    tensors = {f"{text}.lora_down.weight": torch.ones(2, 8), f"{text}.lora_up.weight": torch.ones(8, 2)}
    save_file({**load_file(adapter), **tensors, f"{text}.alpha": torch.tensor(2.0)}, adapter)
    with pytest.raises(NeedsFlag, match="of text_encoder, whose adapters it does not load"):
        loratool.convert(adapter, out, runtime="comfyui", architecture="qwen_image")


def test_the_encoder_of_a_newer_family_is_written_with_a_note(tmp_path: Path) -> None:
    adapter = flux(tmp_path, name="lora_te_layers_0_self_attn_q_proj")
    tensors = load_file(adapter)
    unet = "lora_unet_blocks_0_self_attn_q_proj"
    tensors |= {f"{unet}.lora_down.weight": torch.ones(2, 2048), f"{unet}.lora_up.weight": torch.ones(2048, 2)}
    save_file({**tensors, f"{unet}.alpha": torch.tensor(2.0)}, adapter)
    out = tmp_path / "b.safetensors"
    report = loratool.convert(adapter, out, runtime="comfyui", architecture="anima")
    assert any("newer ones were not checked" in note for note in report.notes)
    assert any(name.startswith("text_encoders.qwen3_06b.transformer.model.layers.0.") for name in load_file(out))


class TestDora:
    def test_its_magnitudes_are_for_the_norms_of_the_base(self, tmp_path: Path) -> None:
        """m (||W|| + eps) / ||W + D||, from dense float64."""
        m = torch.rand(3072, 1, generator=torch.Generator().manual_seed(2)) + 0.5
        adapter, (base, W) = flux(tmp_path, dora_scale=m), flux_base(tmp_path)
        report = loratool.convert(adapter, tmp_path / "b.safetensors", runtime="comfyui", base=base)
        assert any("only for this program" in note for note in report.notes)
        found, stored = load_file(tmp_path / "b.safetensors"), load_file(adapter)
        D = 0.5 * stored[f"{PREFIX}.lora_up.weight"].double() @ stored[f"{PREFIX}.lora_down.weight"].double()
        norms = [x.norm(dim=1, keepdim=True) for x in (W.double(), W.double() + D)]
        wanted = m.double() * (norms[0] + 2**-23) / norms[1]
        scale = found["diffusion_model.double_blocks.0.img_attn.proj.dora_scale"]
        torch.testing.assert_close(scale.double(), wanted, rtol=2**-24 + 2**-35, atol=0)
        with safe_open(tmp_path / "b.safetensors", "pt") as file:
            assert file.metadata()["loratool_only_for"] == "comfyui"
        assert findings(tmp_path / "b.safetensors", "comfyui") == {}
        for act in (
            lambda: loratool.merge(base, tmp_path / "b.safetensors", tmp_path / "m.safetensors"),
            lambda: loratool.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya"),
        ):
            with pytest.raises(InputError, match="is only for comfyui"):
                act()

    def test_it_asks_for_the_base(self, tmp_path: Path) -> None:
        adapter = flux(tmp_path, dora_scale=torch.ones(3072, 1))
        assert findings(adapter, "comfyui")["dora"].outcome == "misreads"
        for key in ("comfyui", "forge"):
            with pytest.raises(NeedsFlag, match="norm of the base's weight") as raised:
                loratool.convert(adapter, tmp_path / "b.safetensors", runtime=key)
            assert raised.value.flags == "--base BASE" and "plain=True" in str(raised.value)

    def test_along_the_inputs_it_is_the_same_there(self, tmp_path: Path) -> None:
        adapter = flux(tmp_path, dora_scale=torch.ones(1, 3072))
        assert findings(adapter, "comfyui") == {} and findings(adapter, "sd-scripts").keys() == {"dora"}
        loratool.convert(adapter, tmp_path / "b.safetensors", runtime="comfyui")
        assert load_file(tmp_path / "b.safetensors")[
            "diffusion_model.double_blocks.0.img_attn.proj.dora_scale"
        ].shape == (1, 3072)

    def test_it_becomes_lora_for_a_program_without_it(self, tmp_path: Path) -> None:
        m = torch.rand(3072, 1, generator=torch.Generator().manual_seed(2)) + 0.5
        adapter, (base, _) = flux(tmp_path, dora_scale=m), flux_base(tmp_path)
        assert findings(adapter, "musubi")["dora"].outcome == "ignores"
        assert findings(adapter, "invokeai")["dora"].outcome == "misreads"
        with pytest.raises(NeedsFlag, match="base=BASE"):
            loratool.convert(adapter, tmp_path / "b.safetensors", runtime="musubi")
        report = loratool.convert(adapter, tmp_path / "b.safetensors", runtime="musubi", base=base, rank=8)
        assert not any("dora" in name for name in load_file(tmp_path / "b.safetensors"))
        assert report.modules[0].how == "truncated" and report.warnings

    def test_plain_stays_plain(self, tmp_path: Path) -> None:
        adapter, (base, _) = flux(tmp_path, dora_scale=torch.ones(3072, 1)), flux_base(tmp_path)
        loratool.convert(adapter, tmp_path / "b.safetensors", runtime="comfyui", base=base, plain=True, rank=8)
        assert not any("dora" in name for name in load_file(tmp_path / "b.safetensors"))


def test_the_command_lines(run: Any, tmp_path: Path) -> None:
    adapter = flux(tmp_path, dora_scale=torch.ones(3072, 1))
    result = run("convert", adapter, "--for", "comfyui", "-o", tmp_path / "b.safetensors")
    assert result.exit_code == 4 and "--base BASE" in result.stderr
    result = run("inspect", adapter, "--for", "comfyui", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["report"]["findings"][0]["what"] == "dora"
    result = run("inspect", adapter, "--for", "diffusers")
    assert result.exit_code == 1 and "the format is kohya" in result.stdout
