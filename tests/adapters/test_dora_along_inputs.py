"""Hold DoRA along the inputs, as LyCORIS and OneTrainer had it: `dora_scale` (1, in), columns normed and not rows.

The reference is lycoris' formula (`lycoris/modules/locon.py`, apply_weight_decompose, wd_on_output=False): dense, in
float64, without its epsilon.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED, factors, needs_shared, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import NeedsFlag
from loratool.adapters.formats import open_adapter
from loratool.architectures.families import ENCODERS, FAMILIES
from loratool.architectures.families.lookup import names_of

NAME = "transformer_blocks.0.attn.to_q"
KOHYA, COMFY = f"lora_transformer_{NAME.replace('.', '_')}", "diffusion_model.double_blocks.0.img_attn.proj"
OUT, IN, RANK = 9, 6, 3
ALPHA = 1.5


def magnitude(width: int = IN) -> Tensor:
    return weights(width, seed=3).abs() + 0.1


def write(path: Path, scale: Tensor | None = None, name: str = KOHYA) -> Path:
    A, B = factors(OUT, IN, RANK)
    scale = magnitude().reshape(1, IN) if scale is None else scale
    tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(ALPHA)}
    save_file({**tensors, f"{name}.dora_scale": scale}, path)
    return path


def base(path: Path, name: str = f"{NAME}.weight", rows: int = OUT) -> Path:
    single = {"single_transformer_blocks.0.proj_out.weight": weights(IN, 5 * IN)}  # which makes it Flux
    save_file({name: weights(rows, IN), **(single if name.startswith("transformer_blocks") else {})}, path)
    return path


def dense(W: Tensor, weight: float = 1.0) -> Tensor:
    A, B = (side.double() for side in factors(OUT, IN, RANK))
    V = W.double() + ALPHA / RANK * B @ A
    return W.double() + weight * (V * magnitude().double() / V.norm(dim=0) - W.double())


@pytest.mark.parametrize("weight", [1.0, 0.5, -0.25])
def test_a_merge_is_lycoris_and_comes_off(weight: float, tmp_path: Path) -> None:
    file, start = write(tmp_path / "a.safetensors"), base(tmp_path / "base.safetensors")
    loratool.merge(start, (file, weight), tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")[f"{NAME}.weight"]
    assert torch.allclose(found.double(), dense(weights(OUT, IN), weight), atol=1e-8, rtol=1e-6)
    assert loratool.verify(start, [(file, weight)], tmp_path / "out.safetensors").status == "proven"
    loratool.unmerge(tmp_path / "out.safetensors", (file, weight), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == start.read_bytes()


def test_a_square_one_is_told_by_its_magnitudes_shape(tmp_path: Path) -> None:
    A, B = factors(IN, IN, RANK)
    for shape, dim in (((1, IN), 0), ((IN, 1), 1)):
        tensors = {f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B}
        save_file({**tensors, f"{KOHYA}.dora_scale": magnitude().reshape(shape)}, tmp_path / "a.safetensors")
        start = base(tmp_path / "base.safetensors", rows=IN)
        out = tmp_path / f"out{dim}.safetensors"
        loratool.merge(start, tmp_path / "a.safetensors", out, undo=False)
        V = weights(IN, IN).double() + B.double() @ A.double()
        expected = V * magnitude().double().reshape(shape) / V.norm(dim=dim, keepdim=True)
        assert torch.allclose(load_file(out)[f"{NAME}.weight"].double(), expected, atol=1e-8, rtol=1e-6)


def test_lycoris_computes_the_same(tmp_path: Path) -> None:
    """LyCORIS' own layer, saved by it, where it is installed."""
    locon = pytest.importorskip("lycoris.modules.locon", exc_type=ImportError)
    layer = torch.nn.Linear(IN, OUT, bias=False)
    layer.weight.data = weights(OUT, IN)
    module = locon.LoConModule("x", layer, 1.0, RANK, ALPHA, weight_decompose=True, wd_on_out=False)
    for side, value in zip((module.lora_down, module.lora_up), factors(OUT, IN, RANK), strict=True):
        side.weight.data = value
    module.dora_scale.data = magnitude().reshape(1, IN)
    state = {f"{KOHYA}.{k}": t.detach().clone().contiguous() for k, t in module.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    start = base(tmp_path / "base.safetensors")
    loratool.merge(start, tmp_path / "a.safetensors", tmp_path / "out.safetensors", undo=False)
    theirs, _ = module.get_merged_weight(multiplier=1.0)
    assert torch.allclose(load_file(tmp_path / "out.safetensors")[f"{NAME}.weight"], theirs, atol=1e-6)


@pytest.mark.usefixtures("narrow")
def test_conversions(tmp_path: Path) -> None:
    """kohya's and ComfyUI's formats hold it, and the others do not; as plain LoRA it goes to all, with its error."""
    kohya = "lora_unet_double_blocks_0_img_attn_proj"
    file = write(tmp_path / "a.safetensors", name=kohya)
    before = load_file(file)
    for to, name in (("comfy", COMFY), ("kohya", kohya)):
        (row,) = loratool.convert(file, tmp_path / f"{to}.safetensors", to=to).modules
        found = load_file(tmp_path / f"{to}.safetensors")
        assert row.how == "exact" and row.error == 0
        assert {k.replace(name, kohya): t.shape for k, t in found.items()} == {k: t.shape for k, t in before.items()}
        assert all(torch.equal(t, before[k.replace(name, kohya)]) for k, t in found.items())
    start = base(tmp_path / "base.safetensors", "double_blocks.0.img_attn.proj.weight")
    loratool.merge(start, file, tmp_path / "m.safetensors", undo=False)
    merged = load_file(tmp_path / "m.safetensors")
    for to in ("diffusers", "peft", "loralib"):
        out = tmp_path / to if to == "peft" else tmp_path / f"{to}.safetensors"
        with pytest.raises(NeedsFlag, match=r"is DoRA.*\n.*plain=True, base"):
            loratool.convert(file, out, to=to)
        (row,) = loratool.convert(file, out, to=to, plain=True, base=start, rank=IN).modules
        assert row.error < 1e-3  # of full rank, which is measured by a difference of squares
        again = tmp_path / f"m-{to}.safetensors"
        loratool.merge(start, out, again, undo=False, alpha=row.alpha if to == "loralib" else None)
        for key, tensor in load_file(again).items():
            assert torch.allclose(tensor, merged[key], atol=1e-6)


@pytest.mark.usefixtures("narrow")
def test_a_part_of_a_fused_tensor_has_its_own_norms(tmp_path: Path) -> None:
    """Its norms are over the rows of q alone."""
    file = write(tmp_path / "a.safetensors")
    start = base(tmp_path / "base.safetensors", "double_blocks.0.img_attn.qkv.weight", 3 * OUT)
    loratool.merge(start, file, tmp_path / "out.safetensors")
    (W,), (merged,) = (load_file(tmp_path / f"{name}.safetensors").values() for name in ("base", "out"))
    assert torch.allclose(merged[:OUT].double(), dense(W[:OUT]), rtol=1e-6)
    assert torch.equal(merged[OUT:], W[OUT:])
    with pytest.raises(NeedsFlag, match="is fused there"):
        loratool.convert(file, tmp_path / "k.safetensors", to="kohya")


def test_a_whole_that_the_base_has_in_parts_is_refused(tmp_path: Path, run: Callable[..., Any]) -> None:
    """A fused matrix on a split base; the remedy is the conversion to the split format."""
    file = write(tmp_path / "a.safetensors", name="lora_unet_double_blocks_0_img_attn_qkv")
    parts = {f"transformer_blocks.0.attn.to_{x}.weight": weights(OUT // 3, IN) for x in "qkv"}
    save_file({**parts, "single_transformer_blocks.0.proj_out.weight": weights(IN, 5 * IN)}, tmp_path / "b.safetensors")
    result = run("merge", tmp_path / "b.safetensors", file, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 3 and "to_q.weight: is a part of lora_unet_double_blocks_0_img_attn_qkv" in result.stderr
    assert "as single files have fused ones" in result.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_inspect_and_resize(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors")
    found = loratool.inspect(file, base=base(tmp_path / "base.safetensors"))
    assert found.coverage.bound == 1 and not found.problems  # type: ignore[union-attr]
    loratool.resize(file, tmp_path / "b.safetensors", rank=RANK)
    one, two = load_file(file), load_file(tmp_path / "b.safetensors")
    assert torch.equal(two[f"{KOHYA}.dora_scale"], one[f"{KOHYA}.dora_scale"])
    D, E = (
        (t[f"{KOHYA}.lora_up.weight"] @ t[f"{KOHYA}.lora_down.weight"]) * float(t[f"{KOHYA}.alpha"]) for t in (one, two)
    )
    assert torch.allclose(D, E, atol=1e-6)


def flux_pipeline(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A diffusers folder whose matrices are those that the adapter changes (their names by the list's own)."""
    names = {flat: each.path for f in (*FAMILIES.values(), *ENCODERS.values()) for flat, each in names_of(f).items()}
    parts = {"lora_transformer_": "transformer", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
    weights_of: dict[str, dict[str, Tensor]] = {}
    for key in (k for k in tensors if k.endswith(".lora_up.weight")):
        module = key.removesuffix(".lora_up.weight")
        prefix = next(p for p in parts if module.startswith(p))
        shape = (len(tensors[key]), tensors[f"{module}.lora_down.weight"].shape[1])
        own = weights_of.setdefault(parts[prefix], {})
        own[f"{names[module.removeprefix(prefix)]}.weight"] = weights(*shape, seed=len(own))
    for part, own in weights_of.items():
        (path / part).mkdir(parents=True)
        name = "diffusion_pytorch_model" if part == "transformer" else "model"
        save_file(own, path / part / f"{name}.safetensors")
        (path / part / "config.json").write_text("{}")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"]}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@needs_shared
def test_the_real_list(tmp_path: Path) -> None:
    """OneTrainer's names of all linear layers of a Flux and its text encoders: a diffusers pipeline uses every key.

    As plain LoRA it goes into the formats that cannot hold it. Sizes are a 48th; of the blocks the first of each.
    """
    shapes = json.loads((SHARED / "keylists" / "flux_dora_onetrainer_format.json").read_text())
    g = torch.Generator().manual_seed(0)
    kept = {k: s for k, s in shapes.items() if not (m := re.search(r"_(?:blocks?|layers)_(\d+)_", k)) or m[1] == "0"}
    sizes = {k: [64 if d == 4096 else d if d % 48 else d // 48 for d in s] for k, s in kept.items()}
    tensors = {k: torch.rand(s, generator=g) + 0.1 if s else torch.tensor(2.0) for k, s in sizes.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = open_adapter(tmp_path / "a.safetensors")
    assert all(u.along_inputs for u in adapter.updates.values()) and 4 * len(adapter.updates) == len(tensors) == 96
    start = flux_pipeline(tmp_path / "base", tensors)
    report = loratool.merge(start, tmp_path / "a.safetensors", tmp_path / "out", undo=False)
    assert len(report.tensors) == len(adapter.updates) and not report.left_out
    for to in ("kohya", "diffusers"):
        out = tmp_path / f"{to}.safetensors"
        converted = loratool.convert(tmp_path / "a.safetensors", out, to=to, plain=True, base=start, rank=8)
        assert not converted.dropped and all(row.how != "exact" and row.error for row in converted.modules)
        sources = {module for row in converted.modules for module in row.sources}
        assert sources == set(adapter.updates)
