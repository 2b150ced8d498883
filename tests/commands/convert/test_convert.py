"""Hold convert: literal names on both sides, factors byte for byte, ways back, and merges that come out the same."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, SHARED, factors, load_model, needs_shared, weights, write_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag, UsageError

pytestmark = pytest.mark.usefixtures("narrow")

# (kohya, diffusers, ComfyUI) -> (out, in, *kernel), of one family each
SDXL = {
    (
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
        "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_q",
    ): (8, 8),
    (
        "lora_unet_output_blocks_2_2_conv",
        "unet.up_blocks.0.upsamplers.0.conv",
        "diffusion_model.output_blocks.2.2.conv",
    ): (8, 8, 3, 3),
    (
        "lora_te1_text_model_encoder_layers_3_self_attn_out_proj",
        "text_encoder.text_model.encoder.layers.3.self_attn.out_proj",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.3.self_attn.out_proj",
    ): (8, 8),
    (
        "lora_te2_text_model_encoder_layers_31_mlp_fc2",
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.31.mlp.fc2",
    ): (8, 32),
}
SD1 = {
    (
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k",
        "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
        "diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k",
    ): (8, 768),
    (
        "lora_unet_up_blocks_0_upsamplers_0_conv",
        "unet.up_blocks.0.upsamplers.0.conv",
        "diffusion_model.output_blocks.2.1.conv",
    ): (8, 8, 3, 3),
    (
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
    ): (32, 8),
}
FLUX = {
    (
        "lora_unet_double_blocks_18_img_attn_proj",
        "transformer.transformer_blocks.18.attn.to_out.0",
        "diffusion_model.double_blocks.18.img_attn.proj",
    ): (6, 6),
    (
        "lora_unet_single_blocks_37_linear2",
        "transformer.single_transformer_blocks.37.proj_out",
        "diffusion_model.single_blocks.37.linear2",
    ): (6, 30),
    (
        "lora_unet_time_in_in_layer",
        "transformer.time_text_embed.timestep_embedder.linear_1",
        "diffusion_model.time_in.in_layer",
    ): (6, 4),
    (
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    ): (8, 6),
}
# A width of 1536, of which SD 3 is known where all of the names could be Flux's too.
SD3 = {
    (
        "lora_unet_joint_blocks_22_x_block_attn_proj",
        "transformer.transformer_blocks.22.attn.to_out.0",
        "diffusion_model.joint_blocks.22.x_block.attn.proj",
    ): (6, 1536),
    (
        "lora_unet_joint_blocks_3_context_block_mlp_fc2",
        "transformer.transformer_blocks.3.ff_context.net.2",
        "diffusion_model.joint_blocks.3.context_block.mlp.fc2",
    ): (6, 24),
    (
        "lora_unet_context_embedder",
        "transformer.context_embedder",
        "diffusion_model.context_embedder",
    ): (6, 8),
    (
        "lora_unet_x_embedder_proj",
        "transformer.pos_embed.proj",
        "diffusion_model.x_embedder.proj",
    ): (6, 4, 2, 2),
    (
        "lora_te2_text_model_encoder_layers_31_mlp_fc2",
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.31.mlp.fc2",
    ): (8, 32),
    (
        "lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_0",
        "text_encoder_3.encoder.block.23.layer.1.DenseReluDense.wi_0",
        "text_encoders.t5xxl.transformer.encoder.block.23.layer.1.DenseReluDense.wi_0",
    ): (8, 6),
}
FAMILIES = {"sdxl": SDXL, "sd1": SD1, "flux": FLUX, "sd3": SD3}
ENDS = {"kohya": ("lora_down", "lora_up"), "diffusers": ("lora_A", "lora_B"), "comfy": ("lora_down", "lora_up")}
FORMATS = tuple(ENDS)
ALPHA = 3.0
METADATA = {
    f"{component}.{key}": value
    for component in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    for key, value in (("r", 4), ("lora_alpha", ALPHA))
}


def make(path: Path, family: str, form: str, dtype: torch.dtype = torch.float16) -> Path:
    """Write an adapter of rank 4 and alpha 3 in this format, by hand."""
    tensors, metadata = {}, {"format": "pt"}
    for seed, (names, shape) in enumerate(FAMILIES[family].items()):
        name = names[FORMATS.index(form)]
        A, B = factors(shape[0], math.prod(shape[1:]), 4, seed=seed, dtype=dtype)
        down, up = ENDS[form]
        tensors[f"{name}.{down}.weight"] = A.reshape(4, *shape[1:])
        tensors[f"{name}.{up}.weight"] = B.reshape(shape[0], 4, *[1] * (len(shape) - 2))
        if form == "diffusers":
            metadata["lora_adapter_metadata"] = json.dumps(METADATA)
        else:
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path, metadata)
    return path


def equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return set(one) == set(two) and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("to", FORMATS)
def test_names_and_bytes(family: str, source: str, to: str, tmp_path: Path) -> None:
    """Every pair of formats: the other's names, its alphas, and the very factors; there and back is the file."""
    start = make(tmp_path / "a.safetensors", family, source)
    report = loratool.convert(start, tmp_path / "b.safetensors", to=to, architecture=family)
    assert report.family == family and all(m.how == "exact" and m.alpha == ALPHA for m in report.modules)
    expected = make(tmp_path / "expected.safetensors", family, to)
    assert equal(load_file(tmp_path / "b.safetensors"), load_file(expected))
    if to == "diffusers":
        with safe_open(tmp_path / "b.safetensors", "pt") as file:
            fields = json.loads(file.metadata()["lora_adapter_metadata"])
        assert {v for k, v in fields.items() if k.endswith(".lora_alpha")} == {ALPHA}
    loratool.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to=source, architecture=family)
    assert equal(load_file(tmp_path / "c.safetensors"), load_file(start))


@pytest.mark.usefixtures("few_families")
class TestFlux:
    """Fused in kohya's files, split in diffusers'."""

    def fused(
        self, path: Path, A: Tensor, B: Tensor, alpha: float, block: str = "double_blocks_0_img_attn_qkv"
    ) -> Path:
        name = f"lora_unet_{block}"
        save_file(
            {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(alpha)}, path
        )
        return path

    def change(self, path: Path, name: str) -> Tensor:
        tensors = load_file(path)
        down, up = next((d, u) for d, u in ENDS.values() if f"{name}.{d}.weight" in tensors)
        A, B = tensors[f"{name}.{down}.weight"].double(), tensors[f"{name}.{up}.weight"].double()
        if f"{name}.alpha" in tensors:
            return B @ A * float(tensors[f"{name}.alpha"]) / len(A)
        with safe_open(path, "pt") as file:
            fields = json.loads(file.metadata()["lora_adapter_metadata"])
        component, _, rest = name.partition(".")
        pattern = "^" + rest.replace(".", r"\.")
        alpha = fields[f"{component}.alpha_pattern"].get(pattern, fields[f"{component}.lora_alpha"])
        return B @ A * alpha / len(A)

    def test_a_dense_qkv_splits_by_rows(self, tmp_path: Path) -> None:
        A, B = factors(18, 6, 4)
        source = self.fused(tmp_path / "a.safetensors", A, B, 2.0)
        report = loratool.convert(source, tmp_path / "b.safetensors", to="diffusers")
        assert [m.how for m in report.modules] == ["split"] * 3 and {m.rank for m in report.modules} == {4}
        D = 0.5 * B.double() @ A.double()
        for i, x in enumerate("qkv"):
            part = self.change(tmp_path / "b.safetensors", f"transformer.transformer_blocks.0.attn.to_{x}")
            assert torch.allclose(part, D[6 * i : 6 * i + 6], atol=1e-12)
        loratool.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya")
        assert equal(load_file(tmp_path / "c.safetensors"), load_file(source))  # one A for all three: rank 4 again

    def test_a_sparse_qkv_comes_apart_and_together(self, tmp_path: Path) -> None:
        """split_qkv training saves ranks 2, 3 and 1 so; alpha / rank is what every reader takes."""
        parts = [factors(6, 6, r, seed=r) for r in (2, 3, 1)]
        source = self.fused(
            tmp_path / "a.safetensors", torch.cat([A for A, _ in parts]), torch.block_diag(*[B for _, B in parts]), 3.0
        )
        report = loratool.convert(source, tmp_path / "b.safetensors", to="diffusers")
        assert [m.rank for m in report.modules] == [2, 3, 1]
        for (A, B), x in zip(parts, "qkv", strict=True):
            part = self.change(tmp_path / "b.safetensors", f"transformer.transformer_blocks.0.attn.to_{x}")
            assert torch.allclose(part, 0.5 * B.double() @ A.double(), atol=1e-12)
        loratool.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya")
        assert equal(load_file(tmp_path / "c.safetensors"), load_file(source))

    def test_linear1_with_parts_missing_and_scales_that_differ(self, tmp_path: Path) -> None:
        stem = "transformer.single_transformer_blocks.5"
        q, mlp = factors(6, 6, 2), factors(24, 6, 3, seed=1)
        tensors = {f"{stem}.attn.to_q.lora_A.weight": q[0], f"{stem}.attn.to_q.lora_B.weight": q[1]}
        tensors |= {f"{stem}.proj_mlp.lora_A.weight": mlp[0], f"{stem}.proj_mlp.lora_B.weight": mlp[1]}
        fields = {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.rank_pattern": {"proj_mlp": 3}}
        save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(fields)})
        (row,) = loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="kohya").modules
        assert row.how == "rounded" and row.rank == 5 and len(row.sources) == 2  # 4 / 3 is no float32
        D = self.change(tmp_path / "b.safetensors", "lora_unet_single_blocks_5_linear1")
        assert D.shape == (42, 6) and not D[6:18].any()
        assert torch.allclose(D[:6], 2 * q[1].double() @ q[0].double(), atol=1e-8)
        assert torch.allclose(D[18:], 4 / 3 * mlp[1].double() @ mlp[0].double(), atol=1e-8)
        true = torch.cat(
            [2 * q[1].double() @ q[0].double(), torch.zeros(12, 6), 4 / 3 * mlp[1].double() @ mlp[0].double()]
        )
        assert math.isclose(row.error, float((D - true).norm() / true.norm()), rel_tol=1e-3) and 0 < row.error < 1e-7

    def test_the_final_layer_swaps_its_halves(self, tmp_path: Path) -> None:
        A, B = factors(12, 6, 2)
        source = self.fused(tmp_path / "a.safetensors", A, B, 2.0, "final_layer_adaLN_modulation_1")
        loratool.convert(source, tmp_path / "b.safetensors", to="diffusers")
        D = self.change(tmp_path / "b.safetensors", "transformer.norm_out.linear")
        assert torch.equal(D, torch.cat([B[6:], B[:6]]).double() @ A.double())
        loratool.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya")
        assert equal(load_file(tmp_path / "c.safetensors"), load_file(source))

    def test_a_merge_of_either_is_the_same(self, tmp_path: Path) -> None:
        shapes = {"double_blocks.0.img_attn.qkv.weight": (18, 6), "final_layer.adaLN_modulation.1.weight": (12, 6)}
        save_file({n: weights(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}, tmp_path / "base.safetensors")
        tensors = {}
        for block, rows in (("double_blocks_0_img_attn_qkv", 18), ("final_layer_adaLN_modulation_1", 12)):
            A, B = factors(rows, 6, 4, seed=rows)
            tensors |= {f"lora_unet_{block}.lora_down.weight": A, f"lora_unet_{block}.lora_up.weight": B}
        save_file(tensors, tmp_path / "a.safetensors")
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
        merged = []
        for x in "ab":
            loratool.merge(
                tmp_path / "base.safetensors", tmp_path / f"{x}.safetensors", tmp_path / f"m{x}.safetensors", undo=False
            )
            merged.append(load_model(tmp_path / f"m{x}.safetensors"))
        assert equal(*merged)

    @needs_shared
    @pytest.mark.parametrize(
        "name", ["flux_lora_kohya_format", "flux_lora_kohya_with_te1_format", "flux_lora_diffusers_format"]
    )
    def test_real_files_there_and_back(self, name: str, tmp_path: Path) -> None:
        shapes = json.loads((SHARED / "keylists" / f"{name}.json").read_text())
        g, first = torch.Generator().manual_seed(0), re.compile(r"(blocks|layers)[._]0[._]")
        tensors = {k: torch.randn(s, generator=g).half() * 0.02 for k, s in shapes.items() if first.search(k) and s}
        tensors |= {k: torch.tensor(4.0) for k, s in shapes.items() if first.search(k) and not s}
        save_file(tensors, tmp_path / "a.safetensors")
        to, back = ("kohya", "diffusers") if "diffusers" in name else ("diffusers", "kohya")
        report = loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=to)
        assert len(report.modules) > 10 and not report.dropped
        loratool.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to=back)
        assert loratool.diff(tmp_path / "a.safetensors", tmp_path / "c.safetensors").same


def test_peft_takes_one_component(tmp_path: Path, run: Callable[..., Any]) -> None:
    source = make(tmp_path / "a.safetensors", "sdxl", "kohya", torch.float32)
    out = tmp_path / "peft"
    refused = run("convert", source, "--to", "peft", "-o", out)
    assert refused.exit_code == 4 and not out.exists()
    flag = shlex.split(refused.stderr.rpartition("hint: add --exclude ")[2])[0]
    assert run("convert", source, "--to", "peft", "-o", out, "--exclude", flag).exit_code == 0
    found = loratool.inspect(out)
    assert found.rank == 4 and found.alpha == ALPHA and found.modules == 2  # type: ignore[union-attr]
    tensors = load_file(out / "adapter_model.safetensors")
    assert "base_model.model.up_blocks.0.upsamplers.0.conv.lora_A.weight" in tensors


class TestSD3:
    def joint(self, path: Path, **modules: tuple[int, int]) -> Path:
        tensors = {}
        for i, (name, shape) in enumerate(modules.items()):
            A, B = factors(*shape, 2, seed=i)
            tensors |= {f"lora_unet_{name}.lora_down.weight": A, f"lora_unet_{name}.lora_up.weight": B}
        save_file(tensors, path)
        return path

    def test_a_fused_qkv_and_the_last_block(self, tmp_path: Path) -> None:
        """The last block's context goes nowhere, so that its modulation has a shift and a scale alone.

        diffusers has them the other way round.
        """
        start = self.joint(tmp_path / "a.safetensors", joint_blocks_0_context_block_attn_qkv=(18, 6),
                           joint_blocks_0_context_block_adaLN_modulation_1=(36, 6),
                           joint_blocks_1_context_block_adaLN_modulation_1=(12, 6),
                           joint_blocks_1_x_block_attn2_qkv=(18, 6))  # fmt: skip
        report = loratool.convert(start, tmp_path / "b.safetensors", to="diffusers")
        assert report.family == "sd3"
        hows = {m.name.removeprefix("transformer.transformer_blocks."): m.how for m in report.modules}
        assert hows == {
            **{f"0.attn.add_{x}_proj": "split" for x in "qkv"}, **{f"1.attn2.to_{x}": "split" for x in "qkv"},
            "0.norm1_context.linear": "exact", "1.norm1_context.linear": "swapped",
        }  # fmt: skip
        found = load_file(tmp_path / "b.safetensors")
        _, B = factors(12, 6, 2, seed=2)
        name = "transformer.transformer_blocks.1.norm1_context.linear"
        assert torch.equal(found[f"{name}.lora_B.weight"], torch.cat([B[6:], B[:6]]))
        loratool.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya", architecture="sd3")
        again = load_file(tmp_path / "c.safetensors")
        raw = load_file(start)
        assert all(torch.equal(again[k], raw[k]) for k in raw)

    def test_a_merge_of_either_is_the_same(self, tmp_path: Path) -> None:
        shapes = {"joint_blocks.0.context_block.attn.qkv": (18, 6),
                  "joint_blocks.1.context_block.adaLN_modulation.1": (12, 6)}  # fmt: skip
        start = self.joint(tmp_path / "a.safetensors", **{n.replace(".", "_"): s for n, s in shapes.items()})
        loratool.convert(start, tmp_path / "b.safetensors", to="diffusers")
        base = {f"{n}.weight": weights(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
        save_file(base, tmp_path / "base.safetensors")
        merged = []
        for x in "ab":
            loratool.merge(tmp_path / "base.safetensors", tmp_path / f"{x}.safetensors", tmp_path / "m.safetensors",
                           undo=False, force=True)  # fmt: skip
            merged.append(load_model(tmp_path / "m.safetensors"))
        assert equal(*merged)


class TestNames:
    def dotted(self, path: Path, *names: str, shape: tuple[int, int] = (8, 8)) -> Path:
        A, B = factors(*shape, 2)
        save_file({f"{n}.{end}": t.clone() for n in names for end, t in
                   (("lora_A.weight", A), ("lora_B.weight", B))}, path)  # fmt: skip
        return path

    @pytest.mark.parametrize(
        "names",
        [
            ["transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.mlp_of_images.net.0.proj"],
            ["transformer.transformer_blocks.0.attn9.to_q"],
            ["transformer.single_transformer_blocks.0.attn9.to_q"],
        ],
    )
    def test_another_models_blocks_are_no_fluxs(self, names: list[str], tmp_path: Path) -> None:
        """Half of a name that is known is no reason to guess the rest."""
        with pytest.raises(InputError, match="not an adapter of a known image model"):
            loratool.convert(self.dotted(tmp_path / "a.safetensors", *names), tmp_path / "b.safetensors", to="kohya")

    def test_a_head_that_is_called_as_fluxs_is_none(self, tmp_path: Path) -> None:
        """Whisper's."""
        start = write_peft(
            tmp_path / "a", {f"model.{x}": factors(8, 8, 2) for x in ("q_proj",)} | {"proj_out": factors(9, 8, 2)}
        )
        assert loratool.convert(start, tmp_path / "b", to="peft").family is None

    def test_what_no_unet_has_is_dropped_only_by_name(self, tmp_path: Path) -> None:
        known, motion = (f"unet.down_blocks.0.{x}" for x in
                         ("attentions.0.transformer_blocks.0.attn1.to_q", "motion_modules.0.proj_in"))  # fmt: skip
        start = self.dotted(tmp_path / "a.safetensors", known, motion)
        with pytest.raises(NeedsFlag, match=f'exclude="{motion}"'):
            loratool.convert(start, tmp_path / "b.safetensors", to="kohya")
        report = loratool.convert(start, tmp_path / "b.safetensors", to="kohya", exclude=[motion])
        assert report.dropped == (motion,) and len(report.modules) == 1

    @pytest.mark.parametrize("to", ["kohya", "comfy"])
    def test_text_encoders_as_transformers_5_has_them(self, to: str, tmp_path: Path) -> None:
        start = self.dotted(tmp_path / "a.safetensors", "text_encoder.encoder.layers.0.mlp.fc1")
        (row,) = loratool.convert(start, tmp_path / "b.safetensors", to=to).modules
        assert row.name.replace("_", ".").endswith("text.model.encoder.layers.0.mlp.fc1")
        twice = self.dotted(tmp_path / "c.safetensors", "text_encoder.encoder.layers.0.mlp.fc1",
                            "text_encoder.text_model.encoder.layers.0.mlp.fc1")  # fmt: skip
        with pytest.raises(InputError, match="two modules"):
            loratool.convert(twice, tmp_path / "d.safetensors", to=to)

    @pytest.mark.parametrize("to", ["kohya", "comfy"])
    def test_xlabs_attention_is_the_first_rows_of_linear1(self, to: str, tmp_path: Path) -> None:
        A, B = factors(18, 6, 2)
        stem = "single_blocks.3.processor.qkv_lora"
        save_file({f"{stem}.down.weight": A, f"{stem}.up.weight": B}, tmp_path / "a.safetensors")
        (row,) = loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=to).modules
        assert row.name.replace("_", ".").endswith("single.blocks.3.linear1") and row.how == "fused"
        up = load_file(tmp_path / "b.safetensors")[f"{row.name}.lora_up.weight"]
        assert up.shape == (42, 2) and torch.equal(up[:18], B) and not up[18:].any()

    @pytest.mark.usefixtures("few_families")
    @pytest.mark.parametrize("rows", [16, 19])
    def test_rows_that_are_no_thirds(self, rows: int, tmp_path: Path) -> None:
        A, B = factors(rows, 6, 2)
        name, stem = "lora_unet_double_blocks_0_img_attn_qkv", "transformer.single_transformer_blocks.0.attn"
        save_file({f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}, tmp_path / "a.safetensors")
        with pytest.raises(InputError, match=f"{name}: has {rows} rows"):
            loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
        parts = self.dotted(tmp_path / "c.safetensors", f"{stem}.to_q", f"{stem}.to_k", shape=(rows, 6))
        with pytest.raises(InputError, match="too many for its part"):
            loratool.convert(parts, tmp_path / "b.safetensors", to="kohya")
        assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfy"])
def test_a_language_model_is_refused(to: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing can load it"):
        loratool.convert(FIXTURES / "llama" / "adapter", tmp_path / "out.safetensors", to=to)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_unknown_or_double(tmp_path: Path) -> None:
    source = make(tmp_path / "a.safetensors", "sd1", "kohya")
    tensors = load_file(source)
    A, B = factors(8, 8, 4, dtype=torch.float16)
    strange = {"lora_unet_some_thing.lora_down.weight": A, "lora_unet_some_thing.lora_up.weight": B}
    save_file({**tensors, **strange}, tmp_path / "b.safetensors")
    with pytest.raises(NeedsFlag, match="lora_unet_some_thing"):
        loratool.convert(tmp_path / "b.safetensors", tmp_path / "out.safetensors", to="diffusers")
    report = loratool.convert(
        tmp_path / "b.safetensors", tmp_path / "out.safetensors", to="diffusers", exclude=["lora_unet_some_thing"]
    )
    assert report.dropped == ("lora_unet_some_thing",)
    name = "lora_unet_input_blocks_2_1_transformer_blocks_0_attn2_to_k"
    sides = {end: t.clone() for k, t in tensors.items() for end in ENDS["kohya"] if f"attn2_to_k.{end}" in k}
    twice = {f"{name}.{end}.weight": t for end, t in sides.items()}
    save_file({**tensors, **twice}, tmp_path / "c.safetensors")
    with pytest.raises(InputError, match="two modules"):
        loratool.convert(tmp_path / "c.safetensors", tmp_path / "d.safetensors", to="diffusers")


def test_options(tmp_path: Path) -> None:
    source = make(tmp_path / "a.safetensors", "sd1", "kohya")
    loratool.convert(source, tmp_path / "b.safetensors", to="comfy", dtype="fp32")
    assert {t.dtype for t in load_file(tmp_path / "b.safetensors").values()} == {torch.float32}
    assert loratool.convert(source, tmp_path / "c.safetensors", to="comfy", dry_run=True).parameters
    assert not (tmp_path / "c.safetensors").exists()
    with pytest.raises(UsageError, match="single files"):
        loratool.convert(source, tmp_path / "folder", to="kohya")
    with pytest.raises(UsageError, match="none of"):
        loratool.convert(source, tmp_path / "x.safetensors", to="what")
    with pytest.raises(UsageError, match="overwrite an input"):
        loratool.convert(source, source, to="comfy", force=True)


def test_doras_of_several_families_have_the_shapes_of_the_format(tmp_path: Path) -> None:
    """Where the files of all of them are the same, none is named, and the tensors are those of any."""
    owner, tensors = "lora_unet_down_blocks_1", dict[str, Tensor]()
    for name, kernel in (("attentions_0_transformer_blocks_0_attn1_to_q", ()), ("resnets_0_conv1", (3, 3))):
        A, B = factors(320, 320, 4)
        ones = (1,) * len(kernel)
        tensors[f"{owner}_{name}.lora_down.weight"] = A.reshape(4, 320, *ones).expand(4, 320, *kernel).contiguous()
        tensors[f"{owner}_{name}.lora_up.weight"] = B.reshape(320, 4, *ones)
        tensors[f"{owner}_{name}.dora_scale"] = torch.ones(320, 1, *ones)
        tensors[f"{owner}_{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "a.safetensors")
    for to, out in (("peft", tmp_path / "b"), ("diffusers", tmp_path / "b.safetensors")):
        report: Any = loratool.convert(tmp_path / "a.safetensors", out, to=to)
        assert report.family is None
        shapes = {name: tuple(t.shape) for name, t in load_model(out).items() if "magnitude" in name}
        assert sorted(shapes.values()) == [(1, 320, 1, 1), (320,)]


def test_the_metadata_is_the_formats_own(tmp_path: Path) -> None:
    tensors = load_file(make(tmp_path / "a.safetensors", "sdxl", "kohya"))
    save_file(tensors, tmp_path / "a.safetensors", {"ss_network_module": "networks.lora"})
    for to in ("kohya", "comfy"):
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=to, force=True)
        with safe_open(tmp_path / "b.safetensors", "pt") as file:
            assert "format" not in file.metadata()


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj", "diffusers"),
        ("diffusion_model.double_blocks.0.img_attn.proj", "peft"),
        *(("model.layers.0.mlp.up", to) for to in ("kohya", "comfy", "diffusers", "peft")),
    ],
)
def test_whole_changes_alone_have_nothing_to_convert(name: str, to: str, tmp_path: Path) -> None:
    """The reason is the file's, not the model's, which may be known; and the remedy is a way to LoRA."""
    save_file({f"{name}.diff": torch.ones(4, 4), f"{name}.diff_b": torch.ones(4)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"(?s)has no (low-rank )?factors to convert.*extract\(BASE, MERGED\)"):
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=to)
