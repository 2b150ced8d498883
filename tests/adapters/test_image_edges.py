"""Hold image adapters as they are found: alphas of every kind, damaged pairs, names twice or converted wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, slow, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag
from loratool.adapters.formats import open_adapter
from loratool.numerics.tensors import tensor_of

pytestmark = pytest.mark.usefixtures("narrow")

KOHYA = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_q"
COMFY = "diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_q"
DIFFUSERS = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_q"
TENSOR = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_q.weight"
RANK = 4


def write(path: Path, name: str = KOHYA, alpha: Tensor | None = None, **more: Tensor) -> Path:
    A, B = factors(8, 6, RANK)
    ends = (".lora_A.weight", ".lora_B.weight") if name == DIFFUSERS else (".lora_down.weight", ".lora_up.weight")
    own = {name + end: side for end, side in zip(ends, (A, B), strict=True)}
    save_file({**own, **({f"{name}.alpha": alpha} if alpha is not None else {}), **more}, path)
    return path


def base(path: Path, shape: tuple[int, ...] = (8, 6)) -> Path:
    save_file({TENSOR: weights(*shape)}, path)
    return path


def merged(tmp_path: Path, adapter: Path) -> Tensor:
    loratool.merge(base(tmp_path / "base.safetensors"), adapter, tmp_path / "m.safetensors", undo=False, force=True)
    return load_model(tmp_path / "m.safetensors")[TENSOR]


# What an alpha is stored as -> the scale that it makes of rank 4
ALPHAS: dict[str, tuple[Tensor | None, float]] = {
    "missing": (None, 1.0),
    "a number": (torch.tensor(2.0), 0.5),
    "of one element": (torch.tensor([2.0]), 0.5),
    "an integer": (torch.tensor(2), 0.5),
    "rounded to bf16": (torch.tensor(0.1, dtype=torch.bfloat16), 0.10009765625 / 4),
    "in fp16": (torch.tensor(0.1, dtype=torch.float16), 0.0999755859375 / 4),
    "in fp64": (torch.tensor(0.1, dtype=torch.float64), 0.1 / 4),
    "negative": (torch.tensor(-1.0), -0.25),
}


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", [KOHYA, slow(COMFY)])
def test_alphas(name: str, alpha: str, tmp_path: Path) -> None:
    """The merged delta stays the same by way of every other format."""
    stored, scale = ALPHAS[alpha]
    start, (A, B) = write(tmp_path / "a.safetensors", name, stored), factors(8, 6, RANK)
    expected = (weights(8, 6).double() + scale * B.double() @ A.double()).float()
    found = merged(tmp_path, start)
    assert torch.equal(found, expected)
    for to in ("kohya", "comfy", "diffusers", "peft"):
        out = tmp_path / to if to == "peft" else tmp_path / f"{to}.safetensors"
        (row,) = loratool.convert(start, out, to=to).modules
        rounds = alpha == "in fp64" and to in ("kohya", "comfy")  # whose alphas are fp32
        assert (row.how, row.error > 0) == (("rounded", True) if rounds else ("exact", False))
        assert row.error < 2**-24
        assert (
            torch.allclose(merged(tmp_path, out), expected, atol=1e-7)
            if rounds
            else torch.equal(merged(tmp_path, out), expected)
        )


class TestZero:
    """kohya's trainer takes a zero alpha for the rank, ComfyUI takes it for what it is."""

    def test_kohyas_means_the_rank(self, tmp_path: Path) -> None:
        start = write(tmp_path / "a.safetensors", KOHYA, torch.tensor(0.0))
        A, B = factors(8, 6, RANK)
        expected = (weights(8, 6).double() + B.double() @ A.double()).float()
        assert torch.equal(merged(tmp_path, start), expected)
        loratool.convert(start, tmp_path / "b.safetensors", to="comfy")
        assert load_file(tmp_path / "b.safetensors")[f"{COMFY}.alpha"] == RANK
        assert torch.equal(merged(tmp_path, tmp_path / "b.safetensors"), expected)

    def test_comfys_is_no_change(self, tmp_path: Path) -> None:
        start = write(tmp_path / "a.safetensors", COMFY, torch.tensor(0.0))
        assert torch.equal(merged(tmp_path, start), weights(8, 6))
        for to in ("kohya", "diffusers", "comfy"):
            (row,) = loratool.convert(start, tmp_path / f"{to}.safetensors", to=to).modules
            assert row.how == ("folded" if to == "kohya" else "exact") and row.error == 0
            assert torch.equal(merged(tmp_path, tmp_path / f"{to}.safetensors"), weights(8, 6))
        assert load_file(tmp_path / "kohya.safetensors")[f"{KOHYA}.alpha"] == RANK

    @pytest.mark.usefixtures("few_families")
    def test_factors_of_a_fresh_start_survive(self, tmp_path: Path) -> None:
        """B is zero before the first step, A is not: all ranks of both stay, where a fused module splits too."""
        A = factors(8, 6, RANK)[0]
        for name, rows in ((KOHYA, 8), ("lora_unet_double_blocks_0_img_attn_qkv", 18)):
            start = tmp_path / "a.safetensors"
            save_file({f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": torch.zeros(rows, RANK)}, start)
            loratool.convert(start, tmp_path / "b.safetensors", to="diffusers", force=True)
            loratool.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya", force=True)
            back = load_file(tmp_path / "c.safetensors")
            assert torch.equal(back[f"{name}.lora_down.weight"], A)
            assert back[f"{name}.lora_up.weight"].shape == (rows, RANK) and not back[f"{name}.lora_up.weight"].any()


@pytest.mark.parametrize("alpha", [torch.tensor([1.0, 2.0]), torch.tensor(float("nan")), torch.tensor(float("inf"))])
@pytest.mark.parametrize("name", [KOHYA, COMFY])
def test_what_is_no_alpha_is_named(name: str, alpha: Tensor, tmp_path: Path, run: Callable[..., Any]) -> None:
    start = write(tmp_path / "a.safetensors", name, alpha)
    result = run("convert", start, "--to", "diffusers", "-o", tmp_path / "b.safetensors")
    assert result.exit_code == 3 and f"{name}.alpha" in result.stderr
    assert not (tmp_path / "b.safetensors").exists()


def refused(tensors: Mapping[str, Tensor], tmp_path: Path, match: str) -> None:
    """Check that a conversion and a merge refuse it, without a trace of either."""
    save_file(dict(tensors), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=match):
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
    with pytest.raises(InputError, match=match):
        loratool.merge(base(tmp_path / "base.safetensors"), tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "base.safetensors"]


@pytest.mark.parametrize("name", [KOHYA, COMFY])
@pytest.mark.parametrize("end", ["lora_down", "lora_up"])
def test_half_a_pair(name: str, end: str, tmp_path: Path) -> None:
    other = "lora_up" if end == "lora_down" else "lora_down"
    A, B = factors(8, 6, RANK)
    whole = {f"{COMFY}2.lora_down.weight": A.clone(), f"{COMFY}2.lora_up.weight": B.clone()} if name == COMFY else {}
    tensors = {f"{name}.{end}.weight": A if end == "lora_down" else B, **whole}
    refused(tensors, tmp_path, rf"{name}.{end}.weight: has no partner: the {'B' if other == 'lora_up' else 'A'} factor")


def test_an_alpha_alone(tmp_path: Path) -> None:
    save_file({f"{KOHYA}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=rf"{KOHYA}.alpha: has no lora_down and lora_up"):
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")


def test_ranks_that_differ_within_a_pair(tmp_path: Path) -> None:
    (A, _), (_, B) = factors(8, 6, 4), factors(8, 6, 3)
    refused({f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B}, tmp_path, "do not share a rank")


@pytest.mark.parametrize("name", [KOHYA, COMFY, DIFFUSERS])
def test_a_square_pair_is_what_its_names_say(name: str, tmp_path: Path) -> None:
    """Rank 8 on 8 x 8: the shapes fit both ways round; down and A are read as A."""
    A, B = weights(8, 8, seed=1), weights(8, 8, seed=2)
    ends = (".lora_A.weight", ".lora_B.weight") if name == DIFFUSERS else (".lora_down.weight", ".lora_up.weight")
    save_file({name + ends[0]: A, name + ends[1]: B}, tmp_path / "a.safetensors")
    W = weights(8, 8, seed=3)
    save_file({TENSOR: W}, tmp_path / "base.safetensors")
    for to in ("kohya", "diffusers"):
        loratool.convert(tmp_path / "a.safetensors", tmp_path / f"{to}.safetensors", to=to)
    for file in ("a", "kohya", "diffusers"):
        out = tmp_path / f"m-{file}.safetensors"
        loratool.merge(tmp_path / "base.safetensors", tmp_path / f"{file}.safetensors", out, undo=False)
        assert torch.equal(load_file(out)[TENSOR], (W.double() + B.double() @ A.double()).float())


def test_a_pair_the_other_way_round(tmp_path: Path) -> None:
    A, B = factors(8, 6, RANK)
    tensors = {f"{KOHYA}.lora_down.weight": A.T.contiguous(), f"{KOHYA}.lora_up.weight": B.T.contiguous()}
    refused(tensors, tmp_path, rf"{KOHYA}: A is \(6, 4\) and B is \(4, 8\): they do not share a rank")


class TestTwice:
    """One module under two names, which are one after renaming: refused by the name, never added twice."""

    OTHERS = (
        "lora_unet_input_blocks_2_1_transformer_blocks_0_attn2_to_q",
        "lora_unet_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_q",
    )

    @pytest.mark.parametrize("other", OTHERS)
    def test_two_names(self, other: str, tmp_path: Path) -> None:
        A, B = factors(8, 6, RANK, seed=1)
        more = {f"{other}.lora_down.weight": A, f"{other}.lora_up.weight": B}
        start = write(tmp_path / "a.safetensors", KOHYA, **more)
        with pytest.raises(InputError, match="two modules of the adapter would become this one"):
            loratool.convert(start, tmp_path / "b.safetensors", to="diffusers")
        with pytest.raises(InputError, match=f"{KOHYA}.*both bind|both bind.*{KOHYA}|{other} .*both bind to it"):
            merged(tmp_path, start)

    def test_two_spellings_of_one_factor(self, tmp_path: Path) -> None:
        more = {f"{DIFFUSERS}.lora.down.weight": factors(8, 6, RANK, seed=1)[0]}
        with pytest.raises(InputError, match="is the same as"):
            open_adapter(write(tmp_path / "a.safetensors", DIFFUSERS, **more))

    @pytest.mark.parametrize("to", ["kohya", "diffusers", "comfy"])
    def test_a_whole_and_its_part(self, to: str, tmp_path: Path) -> None:
        """Flux's fused qkv beside a q of its own."""
        tensors = {}
        for name, rows in (("double_blocks_0_img_attn_qkv", 18), ("transformer_blocks_0_attn_to_q", 6)):
            A, B = factors(rows, 6, RANK)
            tensors |= {f"lora_unet_{name}.lora_down.weight": A, f"lora_unet_{name}.lora_up.weight": B}
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(InputError, match="two modules of the adapter would become this one"):
            loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=to)


def test_a_doubled_prefix(tmp_path: Path) -> None:
    """Published files have `lora_unet_unet_`: the module is that of one `lora_unet_`."""
    start = write(tmp_path / "a.safetensors", KOHYA.replace("lora_unet_", "lora_unet_unet_"), torch.tensor(2.0))
    right = write(tmp_path / "b.safetensors", KOHYA, torch.tensor(2.0))
    assert torch.equal(merged(tmp_path, start), merged(tmp_path, right))
    for to in ("kohya", "diffusers"):
        for file in (start, right):
            loratool.convert(file, file.with_name(f"{file.stem}-{to}.safetensors"), to=to)
        one, two = (load_file(file.with_name(f"{file.stem}-{to}.safetensors")) for file in (start, right))
        assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)
    found = loratool.inspect(start, base=tmp_path / "base.safetensors")
    assert found.coverage.bound == 1 and not found.problems  # type: ignore[union-attr]


@pytest.mark.usefixtures("few_families")
class TestFused:
    """Ranks do not grow by a way through split modules and back."""

    NAME = "lora_unet_double_blocks_0_img_attn_qkv"

    def back(self, A: Tensor, B: Tensor, tmp_path: Path) -> tuple[set[str], dict[str, Tensor]]:
        """The split modules' last names, and the tensors that come back."""
        start = tmp_path / "a.safetensors"
        save_file({f"{self.NAME}.lora_down.weight": A, f"{self.NAME}.lora_up.weight": B}, start)
        report = loratool.convert(start, tmp_path / "b.safetensors", to="diffusers")
        assert not report.dropped
        loratool.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya")
        names = {row.name.rpartition(".")[2] for row in report.modules}
        return names, load_file(tmp_path / "c.safetensors")

    def test_some_ranks_reach_one_part_alone(self, tmp_path: Path) -> None:
        A, B = factors(18, 6, RANK)
        B[6:, 0], B[:12, 3] = 0, 0
        names, tensors = self.back(A, B, tmp_path)
        assert names == {"to_q", "to_k", "to_v"}
        assert torch.equal(tensors[f"{self.NAME}.lora_down.weight"], A)
        assert torch.equal(tensors[f"{self.NAME}.lora_up.weight"], B)

    def test_parts_that_never_had_an_adapter_are_not_made_up(self, tmp_path: Path) -> None:
        """Fusing q and v alone leaves rows of zeros for k."""
        (Aq, Bq), (Av, Bv) = factors(6, 6, 2), factors(6, 6, 3, seed=1)
        A, B = torch.cat([Aq, Av]), torch.zeros(18, 5)
        B[:6, :2], B[12:, 2:] = Bq, Bv
        names, tensors = self.back(A, B, tmp_path)
        assert names == {"to_q", "to_v"}
        assert torch.equal(tensors[f"{self.NAME}.lora_down.weight"], A)
        assert torch.equal(tensors[f"{self.NAME}.lora_up.weight"], B)


def test_metadata_goes_along(tmp_path: Path) -> None:
    """Whatever no conversion touches; the hashes and ranks of the former tensors do not."""
    from safetensors import safe_open

    A, B = factors(8, 6, RANK)
    former = {"ss_tag_frequency": "{}", "modelspec.title": "x", "ss_network_dim": "128", "sshs_model_hash": "0" * 64}
    own = {f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B}
    save_file(own, tmp_path / "a.safetensors", former)
    source = tmp_path / "a.safetensors"
    for to, dim in (("diffusers", None), ("comfy", "4"), ("loralib", None)):
        loratool.convert(source, tmp_path / f"{to}.safetensors", to=to)
        with safe_open(tmp_path / f"{to}.safetensors", "pt") as file:
            found = file.metadata()
        assert found["ss_tag_frequency"] == "{}" and found["modelspec.title"] == "x"
        assert "sshs_model_hash" not in found and found.get("ss_network_dim") == dim
        source = tmp_path / f"{to}.safetensors"


def test_a_text_encoder_alone(tmp_path: Path) -> None:
    """Through PEFT, whose names do not say a component, and back."""
    A, B = factors(8, 6, RANK)
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    loratool.convert(tmp_path / "a.safetensors", tmp_path / "b", to="peft")
    loratool.convert(tmp_path / "b", tmp_path / "c", to="peft", plain=True)  # a language model's way
    loratool.convert(tmp_path / "b", tmp_path / "d.safetensors", to="kohya")
    back = load_file(tmp_path / "d.safetensors")
    assert set(back) == set(tensors) and all(torch.equal(back[k], t) for k, t in tensors.items())


def shaped(shapes: Mapping[str, tuple[int, int]], path: Path, kohya: bool = False) -> Path:
    ends = (".lora_down.weight", ".lora_up.weight") if kohya else (".lora_A.weight", ".lora_B.weight")
    tensors = {}
    for seed, (name, (out, inp)) in enumerate(shapes.items()):
        tensors |= dict(zip((name + end for end in ends), factors(out, inp, 2, seed), strict=True))
    save_file(tensors, path)
    return path


class TestWhoseItIs:
    def test_flux_2_is_no_flux(self, tmp_path: Path) -> None:
        """It has blocks of the same names, with other rows to each input."""
        stem = "diffusion_model."
        second = {"double_blocks.7.img_attn.qkv": (24, 8), "double_blocks.7.img_mlp.0": (48, 8)}
        second |= {"single_blocks.47.linear1": (72, 8), "single_blocks.47.linear2": (8, 32)}
        first = {f"double_blocks.{i}.img_mlp.0": (32, 8) for i in range(19)}
        first |= {f"single_blocks.{i}.linear1": (56, 8) for i in range(38)} | {"single_blocks.37.linear2": (8, 40)}
        a, b = (
            shaped({stem + name: shape for name, shape in each.items()}, tmp_path / f"{i}.safetensors")
            for i, each in enumerate((first, second))
        )
        for file, family in ((a, "flux"), (b, "flux2")):
            for to in ("kohya", "diffusers"):
                report = loratool.convert(file, tmp_path / "o.safetensors", to=to, force=True)
                assert report.family == family  # type: ignore[union-attr]

    def test_what_several_models_have_is_asked_for(self, tmp_path: Path) -> None:
        """Sana-Video has Sana's modules in diffusers' names, and no files of kohya's."""
        names = {f"transformer.transformer_blocks.{i}.attn2.to_q": (2240, 2240) for i in range(20)}
        a = shaped(names, tmp_path / "a.safetensors")
        with pytest.raises(NeedsFlag, match='architecture="sana"'):
            loratool.convert(a, tmp_path / "b.safetensors", to="kohya")
        report: Any = loratool.convert(a, tmp_path / "b.safetensors", to="kohya", architecture="sana")
        assert report.family == "sana" and report.notes == ()

    def test_what_fits_flux_and_bria_is_fluxs(self, tmp_path: Path) -> None:
        """Bria has Flux's modules in diffusers' names, and no files of kohya's."""
        names = {
            f"transformer.{stem}.{i}.attn.to_q": (3072, 3072)
            for stem, count in (("transformer_blocks", 19), ("single_transformer_blocks", 38))
            for i in range(count)
        }
        names["transformer.single_transformer_blocks.37.proj_out"] = (3072, 15360)
        a = shaped(names, tmp_path / "a.safetensors")
        report: Any = loratool.convert(a, tmp_path / "b.safetensors", to="kohya")
        assert report.family is None and "are also of Bria 3 and Bria FIBO" in report.notes[0]
        report = loratool.convert(a, tmp_path / "b.safetensors", to="kohya", architecture="flux", force=True)
        assert report.family == "flux" and report.notes == ()
        assert loratool.convert(a, tmp_path / "c.safetensors", to="diffusers").notes == ()

    @pytest.mark.parametrize("number", ["9" * 5000, "007", "1_0"])
    @pytest.mark.parametrize("stem", ["transformer.transformer_blocks.{}.attn.to_q", "unet.input_blocks.{}.1.proj_in"])
    def test_no_number_of_a_block(self, stem: str, number: str, tmp_path: Path, run: Callable[..., Any]) -> None:
        a = shaped({stem.format(number): (8, 8)}, tmp_path / "a.safetensors")
        save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(24, 8)}, tmp_path / "base.safetensors")
        out = tmp_path / "o.safetensors"
        assert run("convert", a, "--to", "kohya", "-o", out).exit_code in (3, 4)
        assert run("merge", tmp_path / "base.safetensors", a, "-o", out).exit_code == 3 and not out.exists()
        assert run("diff", a, a).exit_code == 0

    def test_the_number_of_blocks_tells(self, tmp_path: Path) -> None:
        """HunyuanVideo has more blocks than Flux, under the same names of diffusers and others of its maker."""
        name, a = "transformer.transformer_blocks.{}.ff.net.0.proj", tmp_path / "a.safetensors"
        for blocks, family in ((19, "flux"), (20, "hunyuan_video")):
            shapes = {name.format(i): (32, 8) for i in range(blocks)}
            shapes |= {f"transformer.single_transformer_blocks.{i}.proj_mlp": (32, 8) for i in range(2 * blocks)}
            report = loratool.convert(shaped(shapes, a), tmp_path / f"{family}.safetensors", to="kohya")
            assert report.family == family  # type: ignore[union-attr]
        shaped({name.format(i): (32, 8) for i in (0, 19)}, a)
        assert loratool.convert(a, tmp_path / "b.safetensors", to="kohya").family == "hunyuan_video"  # type: ignore[union-attr]
        shaped({name.format(i): (32, 8) for i in (0, 18)}, a)  # of both
        with pytest.raises(
            NeedsFlag, match=r'Flux or of HunyuanVideo.*\n.*architecture="flux" or architecture="hunyuan_video"'
        ):
            loratool.convert(a, tmp_path / "x.safetensors", to="kohya")
        a = shaped({name.format(0): (32, 8)}, tmp_path / "a.safetensors")
        with pytest.raises(NeedsFlag, match=r"(?s)of Flux or of .*architecture=.flux"):
            loratool.convert(a, tmp_path / "x.safetensors", to="kohya")
        base = {"single_blocks.0.linear1.weight": torch.zeros(56, 8), "double_blocks.0.img_mlp.0.weight": torch.ones(4)}
        save_file(base, tmp_path / "base.safetensors")
        loratool.convert(a, tmp_path / "x.safetensors", to="kohya", base=tmp_path / "base.safetensors")
        assert "lora_unet_double_blocks_0_img_mlp_0.alpha" in load_file(tmp_path / "x.safetensors")

    def test_what_is_dropped_still_tells(self, tmp_path: Path) -> None:
        te2 = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
        shapes = {"lora_unet_output_blocks_2_2_conv": (8, 8), te2: (32, 8), te2.replace("te2", "te1"): (32, 8)}
        a = shaped(shapes, tmp_path / "a.safetensors", True)
        report = loratool.convert(a, tmp_path / "b.safetensors", to="kohya", exclude=["lora_te2*"])
        names = {name.split(".")[0] for name in load_file(tmp_path / "b.safetensors")}
        assert report.family == "sdxl" and names == shapes.keys() - {te2}  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("lora_te_text_model_encoder_layers_0_mlp_fc1", (3072, 768)),
            ("lora_te1_text_model_encoder_layers_0_mlp_fc1", (3072, 768)),
            ("lora_te2_text_model_encoder_layers_0_mlp_fc1", (5120, 1280)),
            ("lora_te2_text_model_encoder_layers_0_mlp_fc2", (1280, 5120)),
            ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", (64, 64)),
        ],
    )
    def test_a_text_encoder_alone_keeps_its_number(self, name: str, shape: tuple[int, int], tmp_path: Path) -> None:
        a = shaped({name: shape}, tmp_path / "a.safetensors", True)
        ways = [["kohya"]]
        ways += [["comfy", "kohya"], ["diffusers", "kohya"]] if "te1" not in name else []  # whose names say `CLIP-L`
        ways += [["peft", "kohya"]] if "te3" not in name and "te1" not in name else []
        for way in ways:
            source = a
            for i, to in enumerate(way):
                out = tmp_path / f"{i}-{to}" if to == "peft" else tmp_path / f"{i}-{to}.safetensors"
                loratool.convert(source, out, to=to, force=True)
                source = out
            assert {key.split(".")[0] for key in load_file(source)} == {name}, way

    def test_a_t5_is_written_and_its_reader_said_to_be_missing(self, tmp_path: Path) -> None:
        shapes = {"lora_unet_double_blocks_0_img_attn_proj": (8, 8)}
        shapes |= {"lora_te3_encoder_block_0_layer_0_SelfAttention_q": (8, 8)}
        a = shaped(shapes, tmp_path / "a.safetensors", True)
        report = loratool.convert(a, tmp_path / "b.safetensors", to="diffusers")
        assert "diffusers loads no adapter of a T5: 1 modules" in str(report.notes)  # type: ignore[union-attr]
        assert not loratool.convert(a, tmp_path / "c.safetensors", to="comfy").notes  # type: ignore[union-attr]


def test_a_pattern_that_drops_nothing_is_a_typo(tmp_path: Path) -> None:
    for pattern in ("nonsense", "lora_te*"):
        with pytest.raises(InputError, match=f"""exclude(=| )"?{re.escape(pattern)}"?: names no module"""):
            loratool.convert(
                write(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", to="comfy", exclude=[pattern]
            )
    with pytest.raises(InputError, match="nothing is left to convert"):
        loratool.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="comfy", exclude=["*"])


@pytest.mark.parametrize("alpha", [1e-46, 1e39])
@pytest.mark.parametrize("to", ["kohya", "comfy"])
def test_an_alpha_that_float32_cannot_hold_goes_into_the_factors(alpha: float, to: str, tmp_path: Path) -> None:
    start = write(tmp_path / "a.safetensors", alpha=torch.tensor(alpha, dtype=torch.float64))
    A, B = load_file(start)[f"{KOHYA}.lora_down.weight"], load_file(start)[f"{KOHYA}.lora_up.weight"]
    small = B * 1e-30 if alpha > 1 else B * 1e30
    save_file({**load_file(start), f"{KOHYA}.lora_up.weight": small}, start)
    loratool.convert(start, tmp_path / "b.safetensors", to=to)
    (update,) = (adapter := open_adapter(tmp_path / "b.safetensors")).updates.values()
    loaded: Any = adapter.load(update)
    found = loaded.scale * tensor_of(loaded.B).double() @ tensor_of(loaded.A).double()
    expected = alpha / RANK * small.double() @ A.double()
    assert torch.allclose(found / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-6)


# What LyCORIS leaves in kohya's names -> the method that is named, or None where no name tells it
LYCORIS = {
    "q_layer.weight": "T-LoRA",
    "lora_odd": None,
}


@pytest.mark.parametrize("end", LYCORIS)
def test_what_lycoris_adds_is_named_with_a_way_out(end: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    a = write(tmp_path / "a.safetensors", **{f"{KOHYA}.{end}": torch.ones(2, 2)})
    result = run("convert", a, "--to", "comfy", "-o", tmp_path / "out.safetensors")
    said = f"a tensor of {LYCORIS[end]}" if LYCORIS[end] else "not a LoRA tensor"
    assert (
        result.exit_code == 3 and f"{KOHYA}.{end}: is {said}" in result.stderr and "loratool extract" in result.stderr
    )
    if LYCORIS[end]:
        assert LYCORIS[end] in run("inspect", a).stdout  # type: ignore[operator]


def test_pefts_ends_under_kohyas_names(tmp_path: Path) -> None:
    """ComfyUI reads them; of both spellings of one factor neither is right."""
    A, B = factors(8, 6, RANK)
    own = {f"{KOHYA}.lora_A.weight": A, f"{KOHYA}.lora_B.weight": B}
    save_file(own, tmp_path / "a.safetensors")
    assert torch.equal(
        merged(tmp_path, tmp_path / "a.safetensors"), merged(tmp_path, write(tmp_path / "b.safetensors"))
    )
    save_file({**own, f"{KOHYA}.lora_down.weight": A.clone()}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="is the same as"):
        merged(tmp_path, tmp_path / "a.safetensors")


def test_dora_that_the_metadata_announces_and_the_file_lacks(tmp_path: Path) -> None:
    """diffusers would take the base's norms for the magnitude, which is no plain LoRA."""
    A, B = factors(8, 6, RANK)
    fields = {"unet.r": RANK, "unet.lora_alpha": RANK, "unet.use_dora": True}
    own = {f"{DIFFUSERS}.lora_A.weight": A, f"{DIFFUSERS}.lora_B.weight": B}
    save_file(own, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(fields)})
    with pytest.raises(InputError, match="has no magnitude, but the metadata sets use_dora"):
        merged(tmp_path, tmp_path / "a.safetensors")


@pytest.mark.usefixtures("few_families")
def test_what_is_no_block_can_be_dropped(tmp_path: Path) -> None:
    """Guidance layers that are no Flux's, beside blocks that are."""
    names = {"lora_unet_double_blocks_0_img_attn_qkv": (24, 8), "lora_unet_distilled_guidance_layer_in_proj": (8, 4)}
    a = shaped(names, tmp_path / "a.safetensors", True)
    with pytest.raises(NeedsFlag, match="distilled_guidance_layer_in_proj"):
        loratool.convert(a, tmp_path / "b.safetensors", to="diffusers")
    report = loratool.convert(a, tmp_path / "b.safetensors", to="diffusers", exclude=["*distilled*"])
    assert report.family == "flux"  # type: ignore[union-attr]
    dotted = {
        "transformer.transformer_blocks.0.attn.to_q": (8, 8),
        "transformer.distilled_guidance_layer.in_proj": (8, 4),
    }
    b = shaped(dotted, tmp_path / "c.safetensors")
    report = loratool.convert(b, tmp_path / "d.safetensors", to="kohya", exclude=["*distilled*"])
    assert report.dropped == ("transformer.distilled_guidance_layer.in_proj",)  # type: ignore[union-attr]


def test_a_second_spelling_of_kohyas_is_brought_together(tmp_path: Path) -> None:
    """No loader takes both in one file."""
    one = shaped({KOHYA: (8, 6)}, tmp_path / "a.safetensors", True)
    other = shaped({KOHYA.replace("to_q", "to_k"): (8, 6)}, tmp_path / "b.safetensors")
    loratool.combine([one, other], tmp_path / "out.safetensors")
    ends = {key.partition(".")[2] for key in load_file(tmp_path / "out.safetensors")}
    assert ends == {"lora_down.weight", "lora_up.weight", "alpha"}


CONFIGS = {
    "broken": "{",
    "another method's": '{"peft_type": "LOHA"}',
    "AdapterHub's": '{"config": {"architecture": null}}',
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_strangers_config_beside_an_image_adapter(config: str, tmp_path: Path) -> None:
    """Its names say what it is, and inspect sees what merge does."""
    (tmp_path / "adapter_config.json").write_text(CONFIGS[config])
    for name in (KOHYA, DIFFUSERS):
        assert loratool.inspect(write(tmp_path / "a.safetensors", name)).kind == "adapter"
    fields = {f"{part}.{key}": RANK for part in ("unet", "text_encoder") for key in ("r", "lora_alpha")}
    tensors = load_file(write(tmp_path / "a.safetensors", DIFFUSERS))
    tensors |= {key.replace("unet", "text_encoder"): tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "b.safetensors", {"lora_adapter_metadata": json.dumps(fields)})
    assert loratool.inspect(tmp_path / "b.safetensors").kind == "adapter"


def test_three_text_encoders_are_sd3s(tmp_path: Path) -> None:
    names = {f"lora_te{i}_text_model_encoder_layers_0_mlp_fc1": (32, 8) for i in (1, 2)}
    a = shaped({**names, "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (8, 8)}, tmp_path / "a.safetensors", True)
    report = loratool.convert(a, tmp_path / "b.safetensors", to="kohya")
    assert report.family == "sd3"  # type: ignore[union-attr]
