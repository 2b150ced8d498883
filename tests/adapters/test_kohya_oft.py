"""Hold kohya's OFT of Flux: fused modules rotate q, k, v and the MLP each for itself, in any layout of the base."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from lib.files.lycoris_files import Numbers
from lib.oracles.image_programs import sd_scripts_oft_flux
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import InputError

WIDTH, MLP, BLOCKS, ALPHA = 24, 96, 4, 2.0**-6
QKV, LINEAR1 = [WIDTH] * 3, [WIDTH] * 3 + [MLP]
# module of the maker's base -> the sizes of its parts, and their modules in diffusers
MODULES: Mapping[str, tuple[list[int], list[str]]] = {
    "double_blocks.0.img_attn.qkv": (QKV, [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]),
    "double_blocks.0.txt_attn.qkv": (QKV, [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"]),
    "double_blocks.0.img_attn.proj": ([WIDTH], ["transformer_blocks.0.attn.to_out.0"]),
    "double_blocks.0.img_mlp.0": ([MLP], ["transformer_blocks.0.ff.net.0.proj"]),
    "single_blocks.10.linear1": (
        LINEAR1,
        [f"single_transformer_blocks.10.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
    ),
}


def weights() -> dict[str, Tensor]:
    n = Numbers(torch.float32)
    return {module: n(sum(sizes), WIDTH) for module, (sizes, _) in MODULES.items()}


def adapter(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    n, tensors = Numbers(torch.float32), {}
    for module, (sizes, _) in MODULES.items():
        name = f"oft_unet_{module.replace('.', '_')}"
        tensors |= {
            f"{name}.oft_blocks.{k}": n(BLOCKS, size // BLOCKS, size // BLOCKS, size=0.1)
            for k, size in enumerate(sizes)
        }
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, folder / "a.safetensors")
    return folder / "a.safetensors", tensors


def rotated(weight: Tensor, blocks: Tensor) -> Tensor:
    """Return the rows of one part by the formulas of sd-scripts, in float64."""
    X, W = blocks.double(), weight.double()
    Q = X - X.mT
    bound, norm = ALPHA * len(W), Q.norm()
    Q = Q * ((norm.clamp(max=bound) + 1e-8) / (norm + 1e-8))
    unit = torch.eye(Q.shape[1], dtype=torch.float64)
    R = (unit + Q) @ torch.linalg.inv(unit - Q)
    return (R.mT @ W.reshape(len(R), -1, W.shape[1])).reshape(W.shape)


def parts(module: str, x: Tensor) -> list[Tensor]:
    return list(x.split(MODULES[module][0]))


@pytest.mark.parametrize("layout", ["maker", "diffusers"])
def test_parts_in_both_layouts(tmp_path: Path, layout: str) -> None:
    base, (file, tensors) = weights(), adapter(tmp_path)
    wanted, stored = {}, {}
    for module, (_, theirs) in MODULES.items():
        blocks = [tensors[f"oft_unet_{module.replace('.', '_')}.oft_blocks.{k}"] for k in range(len(theirs))]
        turned = [rotated(*each) for each in zip(parts(module, base[module]), blocks, strict=True)]
        names = [module] if layout == "maker" else theirs
        wanted |= dict(zip(names, [torch.cat(turned)] if layout == "maker" else turned, strict=True))
        stored |= dict(zip(names, [base[module]] if layout == "maker" else parts(module, base[module]), strict=True))
    model, merged, back = (tmp_path / f"{name}.safetensors" for name in ("model", "merged", "back"))
    save_file({f"{name}.weight": x.contiguous() for name, x in stored.items()}, model)
    loratool.merge(model, file, merged)
    found = load_file(merged)
    for name, x in wanted.items():
        assert torch.equal(found[f"{name}.weight"], x.float()) and not torch.equal(x.float(), stored[name])
    assert loratool.verify(model, file, merged).status == "proven"
    loratool.unmerge(merged, file, back)
    assert back.read_bytes() == model.read_bytes()


@pytest.mark.parametrize("lost", ["double_blocks_0_img_attn_qkv.oft_blocks.1", "single_blocks_10_linear1.oft_blocks.3"])
def test_a_missing_part(tmp_path: Path, lost: str) -> None:
    file, tensors = adapter(tmp_path)
    del tensors[f"oft_unet_{lost}"]
    save_file(tensors, file)
    with pytest.raises(InputError, match="has the parts .* of oft_blocks"):
        loratool.inspect(file)


@pytest.mark.slow
def test_the_formulas_are_those_of_sd_scripts(tmp_path: Path) -> None:
    base, (_, tensors) = weights(), adapter(tmp_path)
    for module, (sizes, _) in MODULES.items():
        name = f"oft_unet_{module.replace('.', '_')}."
        own = {key.removeprefix(name): x for key, x in tensors.items() if key.startswith(name)}
        theirs = sd_scripts_oft_flux(base[module], own, BLOCKS, ALPHA, sizes)
        edges = [0, *accumulate(sizes)]
        ours = [rotated(base[module][edges[k] : edges[k + 1]], own[f"oft_blocks.{k}"]) for k in range(len(sizes))]
        assert float((torch.cat(ours) - theirs).abs().max()) < 3e-6 < 0.01 < float((theirs - base[module]).abs().max())
