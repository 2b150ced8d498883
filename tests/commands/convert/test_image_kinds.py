"""Merge every kind of update into image models, in either naming on either layout, and take it back.

A module that the other layout fuses or splits changes the rows that are its: the bits are those of `dense_oracle.py`,
cut and joined by hand (`image_layouts.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import load_model, slow
from lib.files import lycoris_files as files
from lib.files.lycoris_files import Base, Numbers, Roles
from lib.models.image_layouts import (
    MODELS,
    Layer,
    base_of,
    diffusers_names,
    folder_of,
    maker_names,
    piece_of,
    write_folder,
    write_single,
)
from lib.oracles.dense_oracle import lycoris_updates, merged_codes
from lib.oracles.fractions_oracle import count_wrong
from safetensors.torch import save_file

import loratool
from loratool.errors import InputError, NeedsFlag

BF16, FP32 = torch.bfloat16, torch.float32
Make = Callable[..., Roles]

LINEAR: dict[str, Make] = {
    "lora": files.lora,
    "loha": files.loha,
    "lokr full": files.lokr,
    "lokr both": files.lokr_both,
    "full": files.full,
    "ia3 in": files.ia3_in,
    "ia3 out": files.ia3_out,
    "dora": files.dora(files.lora),
    "dora loha": files.dora(files.loha),
    "dora lokr": files.dora(files.lokr_both),
    "glora added": files.glora_added,
}
CONV: dict[str, Make] = {
    **LINEAR,
    "lora_mid": files.lora_mid,
    "loha tucker": files.loha_tucker,
    "lokr tucker": files.lokr_tucker,
    "dora in": files.dora(files.lora, inputs=True),
    "dora lora_mid in": files.dora(files.lora_mid, inputs=True),
    "dora loha tucker in": files.dora(files.loha_tucker, inputs=True),
}
# naming and container -> component -> prefix
PREFIXES: dict[str, dict[str, str]] = {
    "kohya": {"unet": "lora_unet_", "text_encoder_2": "lora_te2_"},
    "dotted": {"unet": "diffusion_model.", "text_encoder_2": "text_encoders.clip_g.transformer."},
}


def kinds_of(layer: Layer, kind: str | int) -> Make:
    """Return what makes the tensors of a layer: of a kind where the layer can have it, else of one like it."""
    if len(layer.shape) == 1:
        return files.norm if layer.bias else lambda n, *shape: {"w_norm": n(*shape, size=0.05)}
    every = CONV if len(layer.shape) > 2 else LINEAR
    name = (
        kind
        if isinstance(kind, str) and kind in every
        else [*every][(0 if isinstance(kind, str) else kind) % len(every)]
    )
    if name == "full" and not layer.bias:
        return files.diff_alone
    return every[name]


def check(folder: Path, family: str, kind: str | int, naming: str, container: str, dtype: torch.dtype = BF16) -> None:
    """Merge an adapter of all layers into both layouts, hold the bits, verify, unmerge.

    kind: of all modules, or a number from which on each has another.
    """
    layers = MODELS[family][0]
    bases = {layer.maker: base_of(layer, dtype, i) for i, layer in enumerate(layers)}
    tensors, single, split = {}, dict[str, list[int]](), dict[str, list[int]]()
    for i, layer in enumerate(layers):
        base, make = bases[layer.maker], kinds_of(layer, kind if isinstance(kind, str) else kind + i)
        modules = [(layer.maker, list(range(layer.shape[0])))] if naming == "maker" else [*layer.pieces()]
        codes = {end: [0] * getattr(base, end).numel() for end in maker_names(layer)}
        for j, (module, rows) in enumerate(modules):
            own = piece_of(base, rows)
            roles = make(Numbers(FP32, 100 * i + j), *own.weight.shape)
            for role, tensor in roles.items():
                path = module.replace(".", "_") if container == "kohya" else module
                tensors[f"{PREFIXES[container][layer.component]}{path}.{role}"] = tensor
            found = merged_codes(own, lycoris_updates(roles, tuple(own.weight.shape)))
            for end in codes:
                columns = getattr(own, end).numel() // len(rows)
                for at, row in enumerate(rows):
                    value = found[f"{own.path}.{end}"][at * columns : (at + 1) * columns]
                    codes[end][row * columns : (row + 1) * columns] = value
        for end, name in maker_names(layer).items():
            single[name] = codes[end]
        for module, rows in layer.pieces():
            for end, name in diffusers_names(family, layer, module).items():
                columns = len(codes[end]) // layer.shape[0]
                split[name] = [c for row in rows for c in codes[end][row * columns : (row + 1) * columns]]
    adapter = folder / "adapter.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, adapter)
    for name, write, wanted in (("single", write_single, single), ("folder", write_folder, split)):
        base_path = write(folder / (f"{name}.safetensors" if name == "single" else name), family, bases)
        out = folder / f"out-{base_path.name}"
        loratool.merge(base_path, adapter, out, undo=True)
        merged = read(out, family)
        assert {key for key, codes in wanted.items() if count_wrong(merged[key], codes)} == set(), name
        assert merged.keys() == wanted.keys()
        assert loratool.verify(base_path, adapter, out).status == "proven"
        back = folder / f"back-{base_path.name}"
        loratool.unmerge(out, adapter, back)
        assert {p.relative_to(back): p.read_bytes() for p in weights_in(back)} == {
            p.relative_to(base_path): p.read_bytes() for p in weights_in(base_path)
        }


def weights_in(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*/*.safetensors"))


def read(path: Path, family: str) -> dict[str, torch.Tensor]:
    if path.is_file():
        return load_model(path)
    folders = {folder_of(family, layer.component) for layer in MODELS[family][0]}
    return {f"{folder}/{name}": t for folder in folders for name, t in load_model(path / folder).items()}


@pytest.mark.parametrize("naming", ["maker", "diffusers"])
@pytest.mark.parametrize(
    ("family", "container"), [("flux", "kohya"), slow("sd3", "dotted"), slow("sdxl", "kohya"), ("sd1", "dotted")]
)
def test_each_module_of_another_kind(family: str, naming: str, container: str, tmp_path: Path) -> None:
    check(tmp_path, family, 1, naming, container)


EVERY = sorted({*LINEAR, *CONV})
CASES = [
    (family, kind, naming, container)
    for (family, (layers, _)), kind in itertools.product(MODELS.items(), EVERY)
    for naming, container in itertools.product(("maker", "diffusers"), PREFIXES)
    if kind in LINEAR or any(len(layer.shape) > 2 for layer in layers)
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind", "naming", "container"), CASES)
def test_every_kind(family: str, kind: str, naming: str, container: str, tmp_path: Path) -> None:
    check(tmp_path, family, kind, naming, container)


class TestDoRAAlongInputs:
    """Its norms are of all rows of the module that it was trained on."""

    QKV = next(layer for layer in MODELS["flux"][0] if layer.maker.endswith("img_attn.qkv"))

    def adapter(self, folder: Path, module: str, *shape: int) -> Path:
        roles = files.dora(files.loha, inputs=True)(Numbers(FP32), *shape)
        save_file(
            {f"lora_unet_{module.replace('.', '_')}.{role}": x for role, x in roles.items()}, folder / "a.safetensors"
        )
        return folder / "a.safetensors"

    def bases(self) -> dict[str, Base]:
        return {layer.maker: base_of(layer, FP32, i) for i, layer in enumerate(MODELS["flux"][0])}

    @pytest.mark.parametrize("weight", [1.0, 0.5])
    @pytest.mark.parametrize("diffusers", ["norm_out.linear", QKV.diffusers[1]])
    def test_rows_of_a_fused_matrix_get_the_bytes_of_their_own(
        self, diffusers: str, weight: float, tmp_path: Path
    ) -> None:
        layer = next(each for each in MODELS["flux"][0] if diffusers in each.diffusers)
        rows = dict(layer.pieces())[diffusers]
        adapter = self.adapter(tmp_path, diffusers, len(rows), 8)
        single = write_single(tmp_path / "base.safetensors", "flux", self.bases())
        merged = {}
        for base in (single, write_folder(tmp_path / "base", "flux", self.bases())):
            out = tmp_path / f"out-{base.name}"
            loratool.merge(base, (adapter, weight), out)
            merged[base.name] = read(out, "flux")
            assert loratool.verify(base, (adapter, weight), out).status == "proven"
            loratool.unmerge(out, (adapter, weight), back := tmp_path / f"back-{base.name}")
            assert [each.read_bytes() for each in weights_in(back)] == [each.read_bytes() for each in weights_in(base)]
        fused = merged["base.safetensors"][f"model.diffusion_model.{layer.maker}.weight"]
        assert torch.equal(fused[rows], merged["base"][f"transformer/{diffusers}.weight"])
        W = self.bases()[layer.maker].weight
        assert not torch.equal(fused[rows], W[rows])
        others = [row for row in range(len(W)) if row not in rows]
        assert torch.equal(fused[others], W[others])

    def test_the_whole_is_refused_on_its_parts(self, tmp_path: Path) -> None:
        adapter = self.adapter(tmp_path, self.QKV.maker, 24, 8)
        base = write_folder(tmp_path / "base", "flux", self.bases())
        with pytest.raises(InputError, match="norms are those of the complete module") as refused:
            loratool.merge(base, adapter, tmp_path / "out")
        assert refused.value.remedy and "single files" in refused.value.remedy
        single = write_single(tmp_path / "base.safetensors", "flux", self.bases())
        loratool.merge(single, adapter, tmp_path / "out.safetensors")


def test_a_norm_of_another_component_is_listed(tmp_path: Path) -> None:
    """The base is the first text encoder alone, which has that path."""
    layer = "text_model.encoder.layers.0"
    tensors = {f"{layer}.{name}": torch.ones(8) for name in ("layer_norm1.weight", "mlp.fc2.bias")}
    save_file({**tensors, f"{layer}.mlp.fc2.weight": torch.ones(8, 8)}, tmp_path / "base.safetensors")
    stem = layer.replace(".", "_")
    values = {f"lora_te1_{stem}_mlp_fc2.diff_b": torch.ones(8), f"lora_te2_{stem}_layer_norm1.w_norm": torch.ones(8)}
    save_file(values, tmp_path / "a.safetensors")
    base, adapter, out = (tmp_path / f"{name}.safetensors" for name in ("base", "a", "out"))
    with pytest.raises(NeedsFlag, match="1 of 2 modules are not in the base") as flagged:
        loratool.merge(base, adapter, out)
    assert flagged.value.remedy == "to exclude them: --exclude 'lora_te2_*'"
    loratool.merge(base, adapter, out, exclude=["lora_te2_*"])
    merged = load_model(out)
    assert torch.equal(merged[f"{layer}.mlp.fc2.bias"], torch.full((8,), 2.0))
    assert torch.equal(merged[f"{layer}.layer_norm1.weight"], torch.ones(8))
