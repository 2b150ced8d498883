"""Account for every name and shape of real Flux adapters: each converts, and comes back as it was.

All sizes but the ranks are a 48th, which keeps Flux's proportions.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import SHARED, needs_shared, spread, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool

pytestmark = [needs_shared, pytest.mark.usefixtures("narrow")]
FOLDER = SHARED / "keylists"
# list -> its own convention, how many modules it has, in its spelling and in the other one
LISTS = {
    "flux_lora_kohya_format": ("kohya", 304, 494),
    "flux_lora_kohya_with_te1_format": ("kohya", 376, 566),
    "flux_lora_diffusers_format": ("diffusers", 494, 304),
    "flux_lora_diffusers_base_model_format": ("peft", 381, 191),
}
WIDTH = 3072 // 48


def tensors(name: str) -> dict[str, Tensor]:
    shapes = json.loads((FOLDER / f"{name}.json").read_text())
    g = torch.Generator().manual_seed(0)
    sizes = {k: [d if d % 48 else d // 48 for d in shape] for k, shape in shapes.items()}
    return {k: torch.randn(s, generator=g).half() * 0.02 if s else torch.tensor(8.0) for k, s in sizes.items()}


def flux(path: Path) -> Path:
    """Write a Flux of that width and a CLIP in one file, under their own names (flux/model.py of Black Forest Labs)."""
    d = WIDTH
    double = {"qkv": (3 * d, d), "proj": (d, d)}
    shapes = {f"double_blocks.{i}.{side}_attn.{n}": s for i in range(19) for side in ("img", "txt")
              for n, s in double.items()}  # fmt: skip
    for i in range(19):
        for side in ("img", "txt"):
            shapes[f"double_blocks.{i}.{side}_mlp.0"] = (4 * d, d)
            shapes[f"double_blocks.{i}.{side}_mlp.2"] = (d, 4 * d)
            shapes[f"double_blocks.{i}.{side}_mod.lin"] = (6 * d, d)
    for i in range(38):
        shapes[f"single_blocks.{i}.linear1"], shapes[f"single_blocks.{i}.linear2"] = (7 * d, d), (d, 5 * d)
        shapes[f"single_blocks.{i}.modulation.lin"] = (3 * d, d)
    shapes["final_layer.linear"] = (64, d)
    base = {f"model.diffusion_model.{name}.weight": weights(*shape, seed=i)
            for i, (name, shape) in enumerate(shapes.items())}  # fmt: skip
    clip = {f"self_attn.{x}_proj": (16, 16) for x in ("q", "k", "v", "out")} | {
        "mlp.fc1": (64, 16),
        "mlp.fc2": (16, 64),
    }
    for i in range(12):
        prefix = f"text_encoders.clip_l.transformer.text_model.encoder.layers.{i}"
        base |= {f"{prefix}.{name}.weight": weights(*shape, seed=i) for name, shape in clip.items()}
    save_file(base, path)
    return path


@pytest.mark.parametrize("name", spread(LISTS, 2))
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """Through the format that fuses or splits otherwise, every name, shape and value of the list comes back."""
    own, count, others = LISTS[name]
    before = tensors(name)
    save_file(before, tmp_path / "a.safetensors")
    alpha, other = (8.0 if own == "peft" else None), "diffusers" if own == "kohya" else "kohya"
    report = loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=other, alpha=alpha)
    assert report.family == "flux" and len(report.modules) == others and not report.dropped
    sources = {module for row in report.modules for module in row.sources}
    ends = (".lora_down.weight", ".lora_A.weight")
    prefix = "base_model.model." if own == "peft" else ""
    assert sources == {k.removeprefix(prefix)[: -len(e)] for k in before for e in ends if k.endswith(e)}
    assert len(sources) == count
    loratool.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to=own)
    after = load_file(tmp_path / "c.safetensors")
    assert set(after) == set(before)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor), key


@pytest.mark.parametrize("name", spread(LISTS, 2))
def test_all_of_it_merges(name: str, tmp_path: Path) -> None:
    own, _, _ = LISTS[name]
    save_file(tensors(name), tmp_path / "a.safetensors")
    base, alpha = flux(tmp_path / "base.safetensors"), 8.0 if own == "peft" else None
    report = loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors", alpha=alpha, undo=False)
    assert not report.left_out and len({row.name for row in report.tensors}) in (304, 376, 191)


def test_the_lokr_list_merges(tmp_path: Path) -> None:
    """Its names of Flux; its shapes are of no Flux, so that they are those of this one here."""
    names, d = json.loads((FOLDER / "flux_lokr_bfl_format.json").read_text()), WIDTH
    base = flux(tmp_path / "base.safetensors")
    shapes = {name: tensor.shape for name, tensor in load_file(base).items()}
    made = {}
    for i, name in enumerate(names):
        module, _, role = name.rpartition(".")
        rows, columns = shapes[f"model.{module}.weight"]
        sizes = {"lokr_w1": (4, 4), "lokr_w2": (rows // 4, columns // 4), "alpha": ()}
        made[name] = weights(*sizes[role], seed=i) if sizes[role] else torch.tensor(1.0)
    save_file(made, tmp_path / "a.safetensors")
    report = loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "out.safetensors", undo=False)
    assert {row.name for row in report.tensors} == {f"model.{name.rpartition('.')[0]}.weight" for name in names}
    merged, name = load_file(tmp_path / "out.safetensors"), "diffusion_model.double_blocks.0.img_attn.qkv"
    W, D = load_file(base)[f"model.{name}.weight"], torch.kron(made[f"{name}.lokr_w1"], made[f"{name}.lokr_w2"])
    assert W.shape == (3 * d, d) and torch.allclose(merged[f"model.{name}.weight"], W + D)


@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfy", "peft"])
def test_cloneofsimos_file(to: str, tmp_path: Path) -> None:
    """A real file of an SD 1.5: all of it, its very factors, under each format's names."""
    file = SHARED / "cloneofsimo-lora" / "analog_svd_rank4.safetensors"
    inspected = loratool.inspect(file)
    assert inspected.modules == 192 and not inspected.problems  # type: ignore[union-attr]
    drop = ["text_encoder*"] if to == "peft" else []
    out = tmp_path / to if to == "peft" else tmp_path / "b.safetensors"
    report = loratool.convert(file, out, to=to, exclude=drop)
    assert report.family == "sd1" and {row.how for row in report.modules} == {"exact"}
    assert len(report.modules) == (144 if drop else 192)
    before, after = load_file(file), load_file(out / "adapter_model.safetensors" if to == "peft" else out)
    factors = {k: t for k, t in after.items() if t.dim() > 1}
    stored = [t for k, t in before.items() if not drop or k.startswith("unet:")]
    assert len(factors) == len(stored)
    assert sorted(hash_of(t) for t in factors.values()) == sorted(hash_of(t) for t in stored)


def hash_of(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_loralibs_first_file() -> None:
    """microsoft/LoRA's own checkpoint of roberta-base: inspected as it is, its alpha being nowhere."""
    inspected = loratool.inspect(SHARED / "microsoft-lora-roberta-mnli" / "roberta_base_lora_mnli.bin")
    assert inspected.format == "loralib" and inspected.modules == 28  # type: ignore[union-attr]
    assert any("alpha" in line for line in inspected.problems)  # type: ignore[union-attr]
