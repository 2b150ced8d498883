"""Convert changes without factors: full differences, norms, biases and new weights, as ComfyUI and diffusers read them.

A layer's numbers are in the maker's rows; diffusers' modules have some of them (`image_layouts.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_model
from lib.files import lycoris_files as files
from lib.files.lycoris_files import Numbers
from lib.models.image_layouts import MODELS, Layer, base_of, write_folder, write_single
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag

FP32 = torch.float32
FLUX = [layer for layer in MODELS["flux"][0] if layer.component == "unet"]
QKV, SINGLE, IN, FINAL = FLUX[0], FLUX[4], FLUX[6], FLUX[7]
NORM = FLUX[8]


def differences(layers: list[Layer], naming: str, prefix: str) -> dict[str, Tensor]:
    """Return differences of weights and biases, of norms too, under the names of a trainer."""
    tensors = {}
    for i, layer in enumerate(layers):
        change = files.full(Numbers(FP32, i), *layer.shape)
        modules = [(layer.maker, list(range(layer.shape[0])))] if naming == "maker" else [*layer.pieces()]
        for module, rows in modules:
            path = module.replace(".", "_") if prefix.endswith("_") else module
            ends = {"diff": change["diff"], **({"diff_b": change["diff_b"]} if layer.bias else {})}
            if len(layer.shape) == 1:
                ends = {"w_norm": change["diff"], **({"b_norm": change["diff_b"]} if layer.bias else {})}
            scale = ".scale" if naming == "maker" and layer.ends[0] == ".scale" else ""
            tensors |= {f"{prefix}{path}{scale}.{end}": x[rows].clone() for end, x in ends.items()}
    return tensors


def bases(folder: Path, family: str = "flux") -> Iterator[Path]:
    weights = {layer.maker: base_of(layer, FP32, i) for i, layer in enumerate(MODELS[family][0])}
    yield write_single(folder / "single.safetensors", family, weights)
    yield write_folder(folder / "folder", family, weights)


def merged(base: Path, adapter: Path, **options: Any) -> dict[str, Tensor]:
    out = adapter.with_name(f"{adapter.stem}-{base.stem}{base.suffix}")
    loratool.merge(base, adapter, out, undo=False, **options)
    return load_model(out if base.is_file() else out / "transformer")


@pytest.mark.parametrize("to", ["kohya", "comfy"])
@pytest.mark.parametrize(("naming", "prefix"), [("maker", "diffusion_model."), ("diffusers", "transformer.")])
def test_a_file_of_differences_alone(naming: str, prefix: str, to: str, tmp_path: Path) -> None:
    layers = FLUX if to == "comfy" else FLUX[:-2]
    wanted = differences(layers, "maker", "lora_unet_" if to == "kohya" else "diffusion_model.")
    save_file(differences(layers, naming, prefix), tmp_path / "a.safetensors")
    report = loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=to, architecture="flux")
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], x) for name, x in wanted.items())
    assert report.family == "flux" and {row.rank for row in report.modules} == {0} and not report.dropped  # type: ignore[union-attr]
    for base in bases(tmp_path):
        one, two = (merged(base, tmp_path / f"{name}.safetensors") for name in "ab")
        assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


def test_a_difference_of_some_rows_is_zero_in_the_others(tmp_path: Path) -> None:
    (module, rows), *_ = QKV.pieces()
    change = Numbers(FP32)(len(rows), QKV.shape[1])
    save_file({f"transformer.{module}.diff": change}, tmp_path / "a.safetensors")
    loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="comfy", architecture="flux")
    ((name, found),) = load_file(tmp_path / "b.safetensors").items()
    assert name == f"diffusion_model.{QKV.maker}.diff"
    assert torch.equal(found[rows], change) and not found[len(rows) :].any()


def control(folder: Path, inputs: int = IN.shape[1]) -> tuple[Path, dict[str, Tensor]]:
    """Write an adapter like Black Forest Labs' control ones: factors, biases beside them, and new weights of norms."""
    tensors = {}
    for i, layer in enumerate(FLUX):
        n = Numbers(FP32, i)
        if len(layer.shape) == 1:
            tensors[f"{layer.maker}.scale"] = n(*layer.shape)
            continue
        lora = files.lora(n, layer.shape[0], inputs if layer is IN else layer.shape[1])
        tensors |= {
            f"{layer.maker}.lora_{side}.weight": lora[f"lora_{word}.weight"]
            for side, word in (("A", "down"), ("B", "up"))
        }
        tensors[f"{layer.maker}.lora_B.bias"] = n(layer.shape[0])
    save_file(tensors, folder / "a.safetensors")
    return folder / "a.safetensors", tensors


def test_a_control_adapter_for_comfyui(tmp_path: Path) -> None:
    adapter, tensors = control(tmp_path)
    loratool.convert(adapter, tmp_path / "b.safetensors", to="comfy", architecture="flux")
    found = load_file(tmp_path / "b.safetensors")
    for name, tensor in tensors.items():
        ends = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight", ".lora_B.bias": ".diff_b"}
        end = next((end for end in ends if name.endswith(end)), "")
        there = f"diffusion_model.{name.removesuffix(end)}{ends.get(end, '.set_weight')}"
        assert torch.equal(found[there], tensor), there
    for base in bases(tmp_path):
        one, two = (merged(base, tmp_path / f"{name}.safetensors") for name in "ab")
        assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


@pytest.mark.parametrize("inputs", [64, 128])
def test_comfyui_is_told_the_shape_of_a_wider_input(inputs: int, tmp_path: Path) -> None:
    lora = files.lora(Numbers(FP32), 8, inputs)
    save_file({f"lora_unet_img_in.{end}": x for end, x in lora.items()}, tmp_path / "a.safetensors")
    loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="comfy", architecture="flux")
    found = load_file(tmp_path / "b.safetensors").get("diffusion_model.img_in.reshape_weight")
    assert (found is None) is (inputs == 64) and (found is None or found.tolist() == [8, inputs])
    loratool.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya", architecture="flux")
    again = load_file(tmp_path / "c.safetensors")
    assert torch.equal(again["lora_unet_img_in.lora_up.weight"], lora["lora_up.weight"])
    assert ("lora_unet_img_in.reshape_weight" in again) is (inputs != 64)


def test_a_control_adapter_for_diffusers(tmp_path: Path) -> None:
    adapter, tensors = control(tmp_path)
    loratool.convert(adapter, tmp_path / "b.safetensors", to="diffusers", architecture="flux")
    found = load_file(tmp_path / "b.safetensors")
    for layer in FLUX:
        bias = tensors.get(f"{layer.maker}.lora_B.bias")
        for module, rows in layer.pieces():
            if bias is None:
                assert torch.equal(found[f"transformer.{module}.weight"], tensors[f"{layer.maker}.scale"])
            else:
                assert torch.equal(found[f"transformer.{module}.lora_B.bias"], bias[rows])
    for base in bases(tmp_path):
        one, two = (merged(base, tmp_path / f"{name}.safetensors") for name in "ab")
        assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


def test_what_a_format_has_no_name_for(tmp_path: Path) -> None:
    adapter, _ = control(tmp_path)
    with pytest.raises(NeedsFlag, match="cannot be carried to kohya") as refused:
        loratool.convert(adapter, tmp_path / "b.safetensors", to="kohya", architecture="flux")
    assert refused.value.flags and "query_norm.scale" in refused.value.flags
    save_file(differences([QKV], "maker", "diffusion_model."), tmp_path / "d.safetensors")
    with pytest.raises((InputError, NeedsFlag), match="only whole changes"):
        loratool.convert(tmp_path / "d.safetensors", tmp_path / "b.safetensors", to="diffusers", architecture="flux")


def test_factors_and_a_difference_of_one_module_are_refused(tmp_path: Path) -> None:
    """ComfyUI would apply the difference alone."""
    (q, rows), (k, _), _ = QKV.pieces()
    lora = files.lora(Numbers(FP32), len(rows), QKV.shape[1])
    tensors = {f"transformer.{q}.{end}": x for end, x in lora.items()}
    save_file(
        {**tensors, f"transformer.{k}.diff": Numbers(FP32, 1)(len(rows), QKV.shape[1])}, tmp_path / "a.safetensors"
    )
    with pytest.raises(InputError, match="two changes"):
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="comfy", architecture="flux")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["differences", "control", "wide control"])
def test_comfyui_applies_it(kind: str, tmp_path: Path) -> None:
    programs = pytest.importorskip("lib.oracles.image_programs", reason="has ComfyUI's code")
    if "control" in kind:
        adapter, _ = control(tmp_path, 128 if "wide" in kind else 4)
    else:
        adapter = tmp_path / "a.safetensors"
        save_file(differences(FLUX, "diffusers", "transformer."), adapter)
    loratool.convert(adapter, tmp_path / "b.safetensors", to="comfy", architecture="flux")
    base = next(bases(tmp_path))
    expected, prefix = merged(base, adapter, allow="widen"), "model.diffusion_model."
    denoiser = {name.removeprefix(prefix): tensor for name, tensor in load_file(base).items()}
    found, *_ = programs.comfyui(load_file(tmp_path / "b.safetensors"), denoiser, model_class="Flux")
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[prefix + name], atol=1e-6), name
        assert "control" in kind or not torch.equal(tensor, denoiser[name]) or name.endswith("bias")


def test_diffusers_widens_and_applies_it(tmp_path: Path) -> None:
    """A control adapter for more inputs than the model has, with biases and new weights of norms."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    tensors, n = {}, Numbers(FP32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            inputs = 8 if name == "x_embedder" else module.in_features
            tensors[f"transformer.{name}.lora_A.weight"] = n(3, inputs)
            tensors[f"transformer.{name}.lora_B.weight"] = n(module.out_features, 3)
            tensors[f"transformer.{name}.lora_B.bias"] = n(module.out_features)
        elif name.endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k")):
            tensors[f"transformer.{name}.weight"] = n(*module.weight.shape)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(NeedsFlag, match="x_embedder.weight: has 4 inputs, and an adapter 8"):
        loratool.merge(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    loratool.merge(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out", allow="widen")
    ours = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "out")
    assert (ours.config.in_channels, ours.config.out_channels) == (8, 4)
    pipe = diffusers.FluxPipeline(None, None, None, None, None, None, model)
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    pipe.fuse_lora()
    model.unload_lora()  # of the pipeline it would also take back the norms
    theirs = model.state_dict()
    assert theirs.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.allclose(theirs[name], tensor, atol=1e-5), name
    loratool.unmerge(tmp_path / "out", tmp_path / "a.safetensors", tmp_path / "back")
    for file in (tmp_path / "base").iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
