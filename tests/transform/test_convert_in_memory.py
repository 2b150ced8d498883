"""Hold --to of resize and combine: one command does what convert and the command do, and merged models prove it."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, load_model, weights, write_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag, UsageError
from loratool.adapters.formats import open_adapter
from loratool.numerics.tensors import tensor_of

SDXL = FIXTURES / "sdxl"
Run = Callable[..., Any]
# A Flux's tensors, with few blocks of few columns
FLUX = {
    "double_blocks.0.img_attn.qkv.weight": (18, 6),
    "double_blocks.0.txt_mlp.0.weight": (24, 6),
    "single_blocks.0.linear1.weight": (42, 6),
    "final_layer.adaLN_modulation.1.weight": (12, 6),
}
BLOCK, SINGLE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"
SPLIT = {f"{BLOCK}.attn.to_q": (6, 6), f"{BLOCK}.attn.to_v": (6, 6), f"{SINGLE}.proj_mlp": (24, 6),
         "transformer.norm_out.linear": (12, 6)}  # fmt: skip
FUSED = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": shape for name, shape in FLUX.items()}


def flux(path: Path) -> Path:
    save_file({name: weights(*shape, seed=i) for i, (name, shape) in enumerate(FLUX.items())}, path)
    return path


def kohya(path: Path, modules: Mapping[str, tuple[int, ...]], alpha: float = 2.0, seed: int = 0) -> Path:
    tensors = {}
    for i, (name, shape) in enumerate(modules.items()):
        A, B = factors(*shape, 3, seed=seed + i)
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(alpha)}
    save_file(tensors, path)
    return path


def diffusers(path: Path, modules: Mapping[str, tuple[int, ...]], seed: int = 50) -> Path:
    tensors, prefixes = {}, {name.partition(".")[0] for name in modules}
    for i, (name, shape) in enumerate(modules.items()):
        A, B = factors(*shape, 2, seed=seed + i)
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    fields = {f"{prefix}.{key}": value for prefix in prefixes for key, value in (("r", 2), ("lora_alpha", 1))}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(fields)})
    return path


def merged(base: Path, adapters: Any, out: Path) -> dict[str, Tensor]:
    loratool.merge(base, adapters, out, undo=False, dtype="fp32")
    found = load_model(out)
    out.unlink()
    return found


def close(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return set(one) == set(two) and all(torch.allclose(one[k], two[k], atol=1e-6) for k in one)


@pytest.mark.usefixtures("few_families")
class TestResize:
    @pytest.mark.parametrize("to", ["kohya", "diffusers", "comfy"])
    def test_it_is_convert_and_then_resize(self, to: str, tmp_path: Path, run: Run) -> None:
        """And the largest rank there is changes nothing in the merged model."""
        start, paths = SDXL / "adapter.safetensors", [tmp_path / f"{x}.safetensors" for x in "abcd"]
        loratool.convert(start, paths[0], to=to)
        loratool.resize(paths[0], paths[1], rank=2)
        result = run("resize", start, "--rank", 2, "--to", to, "-o", paths[2])
        assert result.exit_code == 0
        one, two = (load_file(path) for path in paths[1:3])
        assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)
        loratool.resize(start, paths[3], rank=8, to=to)
        base = SDXL / "base.safetensors"
        assert close(*(merged(base, a, tmp_path / "m.safetensors") for a in (start, paths[3])))

    def test_the_ranks_are_those_of_the_output(self, tmp_path: Path) -> None:
        """Flux's three q, k and v of rank 2 are one module of rank 4 there, and no sum of three."""
        start = diffusers(tmp_path / "a.safetensors", SPLIT)
        report = loratool.resize(start, tmp_path / "b.safetensors", rank=4, to="kohya")
        assert {m.new_rank for m in report.modules} == {4}
        assert {m.rank for m in report.modules if m.name.endswith("qkv")} == {4}
        for name, tensor in load_file(tmp_path / "b.safetensors").items():
            assert not name.endswith("lora_down.weight") or len(tensor) == 4
        base = flux(tmp_path / "base.safetensors")
        assert close(*(merged(base, a, tmp_path / "m.safetensors") for a in (start, tmp_path / "b.safetensors")))

    @pytest.mark.parametrize("to", ["kohya", "diffusers"])
    def test_a_budget_is_kept(self, to: str, tmp_path: Path) -> None:
        start = kohya(tmp_path / "a.safetensors", FUSED)
        report = loratool.resize(start, tmp_path / "b.safetensors", params=400, to=to)
        assert report.parameters == sum(t.numel() for t in load_file(tmp_path / "b.safetensors").values()) <= 400

    def test_formats_that_have_no_place_for_ranks(self, tmp_path: Path, run: Run) -> None:
        """One command does the work of two, and the flags that the errors name are those that help."""
        A, B = factors(6, 8, 2)
        torch.save({"q.lora_A": A, "q.lora_B": B}, tmp_path / "a.bin")
        argv = ["resize", tmp_path / "a.bin", "--rank", 3, "-o", tmp_path / "out"]
        for flag, value in (("--alpha", 3), ("--to", "peft")):
            refused = run(*argv)
            assert refused.exit_code == 4 and flag in refused.stderr
            argv += [flag, value]
        assert run(*argv).exit_code == 0
        adapter = open_adapter(tmp_path / "out")
        update: Any = adapter.load(adapter.updates["q"])
        D = update.scale * tensor_of(update.B).double() @ tensor_of(update.A).double()
        assert update.A.shape == (3, 8) and torch.allclose(D, 1.5 * B.double() @ A.double(), atol=1e-6)
        result = run("resize", tmp_path / "out", "--rank", 2, "--to", "loralib", "-o", tmp_path / "b.safetensors")
        assert result.exit_code == 0 and "make the layers with r=2, lora_alpha=2" in result.stderr
        found = load_file(tmp_path / "b.safetensors")
        assert torch.allclose(found["q.lora_B"].double() @ found["q.lora_A"].double(), D, atol=1e-6)

    def test_what_nothing_could_load_is_refused(self, tmp_path: Path, run: Run) -> None:
        with pytest.raises(InputError, match="nothing can load it as comfy"):
            loratool.resize(FIXTURES / "llama" / "adapter", tmp_path / "a.safetensors", rank=2, to="comfy")
        with pytest.raises(InputError, match=r'first loratool.convert\(..., exclude="lora_te1'):
            loratool.resize(SDXL / "adapter.safetensors", tmp_path / "a", rank=2, to="peft")
        half = diffusers(tmp_path / "dora.safetensors", {f"{BLOCK}.attn.to_q": (6, 6)})
        save_file({**load_file(half), f"{BLOCK}.attn.to_q.lora_magnitude_vector": torch.ones(6)}, half)
        with pytest.raises(
            InputError, match=rf'(?s)only some of its parts are DoRA.*convert\(..., exclude="{BLOCK}.attn.to_q"'
        ):
            loratool.resize(half, tmp_path / "a.safetensors", rank=2, to="kohya")
        half.unlink()
        with pytest.raises(UsageError, match="none of peft, kohya"):
            loratool.resize(SDXL / "adapter.safetensors", tmp_path / "a", rank=2, to="what")
        with pytest.raises(UsageError, match="single files"):
            loratool.resize(SDXL / "adapter.safetensors", tmp_path / "a", rank=2, to="comfy")
        assert not list(tmp_path.iterdir())


class TestCombine:
    @pytest.mark.parametrize("to", [None, "kohya", "diffusers", "comfy"])
    @pytest.mark.parametrize("turned", [False, True])
    def test_two_formats_meet_by_what_their_modules_mean(self, to: str | None, turned: bool, tmp_path: Path) -> None:
        """A fused kohya's and a split diffusers' are the sum that a merge of both makes, each module once."""
        one, two = kohya(tmp_path / "a.safetensors", FUSED), diffusers(tmp_path / "b.safetensors", SPLIT)
        terms = [(two, -0.5), (one, 0.75)] if turned else [(one, 0.75), (two, -0.5)]
        report = loratool.combine(terms, tmp_path / "c.safetensors", to=to)
        fused = to in ("kohya", "comfy") or (to is None and not turned)
        assert len(report.modules) == (4 if fused else 3 + 1 + 4 + 1)
        assert open_adapter(tmp_path / "c.safetensors").format == (to or ("kohya" if fused else "diffusers"))
        base = flux(tmp_path / "base.safetensors")
        assert close(*(merged(base, a, tmp_path / "m.safetensors") for a in (terms, tmp_path / "c.safetensors")))

    def test_two_spellings_of_one_format(self, tmp_path: Path, run: Run) -> None:
        """kohya's files of SDXL have sgm's names or diffusers'."""
        names = ["lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
                 "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q"]  # fmt: skip
        files = [kohya(tmp_path / f"{i}.safetensors", {n: (8, 8)}, seed=i) for i, n in enumerate(names)]
        report = loratool.combine(files, tmp_path / "c.safetensors")
        assert [(m.name, m.ranks) for m in report.modules] == [(names[0], (3, 3))]
        A, B = load_file(tmp_path / "c.safetensors"), [factors(8, 8, 3, seed=i) for i in (0, 1)]
        D = A[f"{names[0]}.lora_up.weight"].double() @ A[f"{names[0]}.lora_down.weight"].double()
        assert torch.allclose(D, sum(2 / 3 * b.double() @ a.double() for a, b in B), atol=1e-6)
        te = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
        files.append(kohya(tmp_path / "2.safetensors", {names[1]: (8, 8), te: (32, 8)}))
        for pattern in (te, "lora_te*"):
            result = run("combine", *files, "--exclude", pattern, "-o", tmp_path / "d.safetensors", "--force")
            assert result.exit_code == 0 and f"excluded: {te}" in result.stdout
            assert not any(te in name for name in load_file(tmp_path / "d.safetensors"))
        assert run("combine", *files, "--exclude", "what", "-o", tmp_path / "e.safetensors").exit_code == 3

    def test_of_two_families_they_are_refused(self, tmp_path: Path) -> None:
        one = kohya(tmp_path / "a.safetensors", FUSED)
        with pytest.raises(InputError, match=r"is of SDXL, .*a\.safetensors of Flux: they have no base in common"):
            loratool.combine([one, SDXL / "adapter.safetensors"], tmp_path / "c.safetensors", to="kohya")

    def test_a_text_encoder_goes_by_the_other_ones_family(self, tmp_path: Path) -> None:
        """Alone it could be SD 1's, whose only encoder has no number in kohya's names."""
        layer = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
        te = diffusers(tmp_path / "b.safetensors", {layer: (32, 8)})
        one = kohya(tmp_path / "a.safetensors", FUSED)
        loratool.combine([one, te], tmp_path / "c.safetensors")
        assert "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha" in load_file(tmp_path / "c.safetensors")

    def test_a_language_models_two_formats(self, tmp_path: Path, run: Run) -> None:
        (A, B), other = factors(6, 8, 2), write_peft(tmp_path / "a", {"q": factors(6, 8, 3, seed=1)}, lora_alpha=3)
        torch.save({"q.lora_A": A, "q.lora_B": B}, tmp_path / "b.bin")
        for order in ((other, tmp_path / "b.bin"), (tmp_path / "b.bin", other)):
            argv = ["combine", *order, "--alpha", 4, "-o", tmp_path / "out", "--force"]
            result = run(*argv)
            if order[0] != other:
                assert result.exit_code == 4 and "add --to peft" in result.stderr
                result = run(*argv, "--to", "peft")
            assert result.exit_code == 0
            found: Any = open_adapter(tmp_path / "out").load(open_adapter(tmp_path / "out").updates["q"])
            (A2, B2), D = factors(6, 8, 3, seed=1), torch.from_numpy(found.scale * found.B.wide() @ found.A.wide())
            assert torch.allclose(D, 2 * B.double() @ A.double() + B2.double() @ A2.double(), atol=1e-6)
        refused = run("combine", other, SDXL / "adapter.safetensors", "-o", tmp_path / "c")
        assert refused.exit_code == 3 and "is of SDXL, " in refused.stderr and "no known image model" in refused.stderr

    def test_what_one_component_cannot_hold_can_be_excluded(self, tmp_path: Path) -> None:
        start = [SDXL / "adapter.safetensors"] * 2
        with pytest.raises(NeedsFlag, match="add exclude=.lora_te"):
            loratool.combine(start, tmp_path / "out", to="peft")
        report = loratool.combine(start, tmp_path / "out", to="peft", exclude=["lora_te*"])
        assert report.left_out and not any("lora_te" in module.name for module in report.modules)
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"

    def test_of_a_gguf_file_nothing_is_left_out_but_by_name(self, tmp_path: Path) -> None:
        """Its own names are not those of the output, in which all of its modules are."""
        start, base = FIXTURES / "llama" / "adapter", FIXTURES / "llama" / "base"
        loratool.convert(start, tmp_path / "a.gguf", to="gguf", base=base)
        assert loratool.combine([start, tmp_path / "a.gguf"], tmp_path / "b").left_out == ()

    def test_only_convert_takes_the_base_of_mlx_lms_own_model(self, tmp_path: Path) -> None:
        own = tmp_path / "own"
        own.mkdir()
        stack = {
            f"model.layers.0.mlp.switch_mlp.up_proj.lora_{x}": weights(3, *s)
            for x, s in zip("ab", ((2, 6), (4, 2)), strict=True)
        }
        save_file(stack, own / "adapters.safetensors")
        lora = {"rank": 2, "scale": 2.0, "dropout": 0.0}
        (own / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": lora}))
        other = write_peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": factors(8, 8, 2)})
        for run, options in ((loratool.combine, {"to": "peft"}), (loratool.resize, {"to": "peft", "rank": 1})):
            with pytest.raises(InputError, match=r"first loratool.convert\(..., base=BASE\)"):
                run([own, other] if run is loratool.combine else own, tmp_path / "b", **options)


class TestInit:
    BASE = SDXL / "base.safetensors"
    Q = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"

    @pytest.mark.parametrize("to", [None, "diffusers", "comfy"])
    def test_an_image_base(self, to: str | None, tmp_path: Path, run: Run) -> None:
        """A start changes nothing; and trained, each factor is where the merge puts it."""
        out, target = tmp_path / "a.safetensors", ["to_q", "in_layers.2", "fc1", "attn"]
        report = loratool.init(self.BASE, out, rank=2, target=target, to=to, alpha=1.0)
        found = load_file(out)
        assert len(report.modules) == 4 and report.parameters == sum(tensor.numel() for tensor in found.values())
        prefix = {None: "lora_unet_", "diffusers": "unet.", "comfy": "diffusion_model."}[to]
        assert any(name.startswith(prefix) for name in found)
        before = load_model(self.BASE)
        assert close(merged(self.BASE, out, tmp_path / "m.safetensors"), {k: v.float() for k, v in before.items()})
        adapter = open_adapter(out)
        assert {(u.rank, u.scale) for u in adapter.updates.values()} == {(2, 0.5)}
        trained = {
            name: torch.ones_like(t) if name.endswith(("lora_B.weight", "lora_up.weight")) else t
            for name, t in found.items()
        }
        metadata = adapter.file.metadata
        save_file(trained, tmp_path / "b.safetensors", metadata)
        after = merged(self.BASE, tmp_path / "b.safetensors", tmp_path / "m.safetensors")
        module = next(module for module in adapter.updates if module.replace("_", ".").endswith("attn1.to.q"))
        A = trained[adapter.updates[module].tensors["A"]]
        W = before[f"model.diffusion_model.{self.Q}.weight"].float()
        assert torch.allclose(after[f"model.diffusion_model.{self.Q}.weight"], W + 0.5 * A.sum(0), atol=1e-6)
        bigg = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
        assert not torch.equal(after[bigg], before[bigg].float())

    def test_a_denoiser_alone(self, tmp_path: Path) -> None:
        """A Flux by its makers' names is a trainer's of kohya's kind, one by diffusers' names PEFT's."""
        loratool.init(flux(tmp_path / "own.safetensors"), tmp_path / "a.safetensors", target=["qkv"], rank=2)
        assert "lora_unet_double_blocks_0_img_attn_qkv.alpha" in load_file(tmp_path / "a.safetensors")
        names = {f"transformer_blocks.0.attn.to_{x}.weight": weights(6, 6) for x in "qkv"}
        save_file({**names, "single_transformer_blocks.0.proj_out.weight": weights(6, 30)}, tmp_path / "b.safetensors")
        loratool.init(tmp_path / "b.safetensors", tmp_path / "b", target=["to_q"], rank=2)
        assert (tmp_path / "b" / "adapter_config.json").is_file()
        loratool.init(tmp_path / "b.safetensors", tmp_path / "c.safetensors", target=["to_q"], rank=2, to="comfy")
        found = load_file(tmp_path / "c.safetensors")
        assert found["diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight"].shape == (18, 2)

    def test_dora_has_the_bases_norms(self, tmp_path: Path) -> None:
        loratool.init(self.BASE, tmp_path / "a.safetensors", rank=2, target=["to_q", "in_layers.2"], dora=True)
        found, base = load_file(tmp_path / "a.safetensors"), load_model(self.BASE)
        name = f"lora_unet_{self.Q.replace('.', '_')}.dora_scale"
        norms = base[f"model.diffusion_model.{self.Q}.weight"].float().norm(dim=1, keepdim=True)
        assert (
            torch.allclose(found[name], norms) and found["lora_unet_input_blocks_5_0_in_layers_2.dora_scale"].dim() == 4
        )

    def test_loralib_of_a_language_model(self, tmp_path: Path, run: Run) -> None:
        base, out = FIXTURES / "llama" / "base", tmp_path / "a.safetensors"
        result = run("init", base, "--target", "q_proj", "--rank", 2, "--rslora", "--to", "loralib", "-o", out)
        assert result.exit_code == 0 and "make the layers with r=2, lora_alpha=2.82843" in result.stderr
        loratool.init(base, tmp_path / "b", target=["q_proj"], rank=2)
        peft = load_model(tmp_path / "b")
        for name, tensor in load_file(out).items():
            assert torch.equal(tensor, peft[f"base_model.model.{name}.weight"])

    @pytest.mark.parametrize(
        ("base", "options", "says"),
        [
            ("llama/base", {"to": "kohya"}, "not an image model: nothing can load it as kohya"),
            ("llama/base", {"to": "what"}, "none of peft"),
            ("llama/base", {"to": "loralib", "dora": True}, "cannot hold DoRA"),
            ("llama/base", {"to": "loralib", "method": "pissa"}, "pissa needs PEFT's format"),
            ("llama/base", {"to": "loralib", "method": "mica"}, "mica needs PEFT's format"),
            ("sdxl/base.safetensors", {"to": "peft"}, "adapters are for one"),
            ("sdxl/base.safetensors", {"to": "loralib"}, "adapters are for one"),
        ],
    )
    def test_what_is_refused(self, base: str, options: dict[str, Any], says: str, tmp_path: Path) -> None:
        with pytest.raises((InputError, UsageError), match=says):
            loratool.init(FIXTURES / base, tmp_path / "a.safetensors", **options)
        assert not list(tmp_path.iterdir())


def one_in_all_conventions(start: Path, folder: Path) -> list[Path]:
    for to in ("kohya", "diffusers", "comfy"):
        loratool.convert(start, folder / f"{to}.safetensors", to=to)
    return [start, *(folder / f"{to}.safetensors" for to in ("kohya", "diffusers", "comfy"))]


@pytest.mark.usefixtures("few_families")
class TestDiff:
    """One adapter in two formats has no difference, and the mean of both is the adapter."""

    @pytest.mark.parametrize("start", ["sdxl", "fused", "split"])
    def test_one_adapter_in_two_conventions_is_the_same(self, start: str, tmp_path: Path) -> None:
        starts = {
            "sdxl": lambda path: SDXL / "adapter.safetensors",
            "fused": lambda path: kohya(path, FUSED),
            "split": lambda path: diffusers(path, SPLIT),
        }
        files = one_in_all_conventions(starts[start](tmp_path / "a.safetensors"), tmp_path)
        for a, b in itertools.permutations(files, 2):
            report: Any = loratool.diff(a, b)
            assert report.same and report.worst < 1e-6 and not (report.only_a or report.only_b), (a, b)
            loratool.combine({a: 0.5, b: 0.5}, tmp_path / "mean.safetensors", force=True)
            assert loratool.diff(tmp_path / "mean.safetensors", a).same, (a, b)
        for order in (files, files[::-1]):
            of_all: Any = loratool.diff(*order)
            assert len(order) > 2 and of_all.same and of_all.worst < 1e-6 and not any(of_all.lacking)
            assert all(pair.relation == "alike" for pair in of_all.shared.pairs)

    @pytest.mark.parametrize("turned", [False, True])
    def test_the_numbers_are_those_of_the_merged_models(self, turned: bool, tmp_path: Path) -> None:
        """Another adapter in the other convention, which lacks some of a fused module's parts; both ways round."""
        base = flux(tmp_path / "base.safetensors")
        pair = [kohya(tmp_path / "a.safetensors", FUSED), diffusers(tmp_path / "b.safetensors", SPLIT)]
        pair = pair[::-1] if turned else pair
        report: Any = loratool.diff(*pair, base=base)
        before = {name: tensor.double() for name, tensor in load_model(base).items()}
        changes = []
        for each in pair:
            after = merged(base, each, tmp_path / "m.safetensors")
            changes.append(torch.cat([(after[name].double() - before[name]).flatten() for name in before]))
        one, two = changes
        assert report.norm_a == pytest.approx(float(one.norm()), rel=1e-5)
        assert report.norm_b == pytest.approx(float(two.norm()), rel=1e-5)
        assert report.distance == pytest.approx(float((two - one).norm()), rel=1e-5)
        assert report.cosine == pytest.approx(float(one @ two / one.norm() / two.norm()), abs=1e-5)
        lacking = f"{BLOCK}.attn.to_k"
        assert lacking in (report.only_b if turned else report.only_a)
        assert all(m.size_a or m.size_b for m in report.modules)

    def test_a_module_is_selected_by_any_of_its_names(self, tmp_path: Path, run: Run) -> None:
        files = one_in_all_conventions(kohya(tmp_path / "a.safetensors", FUSED), tmp_path)[1:3]
        names = [f"{BLOCK}.attn.to_q", "lora_unet_double_blocks_0_img_attn_qkv"]
        assert [m.name for m in loratool.diff(*files, target=names[:1]).modules] == names[:1]  # type: ignore[union-attr]
        assert len(loratool.diff(*files, target=names[1:]).modules) == 3  # type: ignore[union-attr]
        rest = loratool.diff(*files, exclude=names[1:])
        assert rest.same and not any(".attn.to_" in m.name and BLOCK in m.name for m in rest.modules)  # type: ignore[union-attr]
        assert run("diff", *files, "--target", "what").exit_code == 3

    def test_dora_of_two_conventions(self, tmp_path: Path) -> None:
        names = ("lora_unet_double_blocks_0_img_attn_proj", f"{BLOCK}.attn.to_out.0")
        (A, B), m = factors(6, 6, 2), torch.rand(6) + 1
        one = {"lora_down.weight": A, "lora_up.weight": B, "dora_scale": m.view(6, 1), "alpha": torch.tensor(2.0)}
        two = {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": m}
        for (end, tensors), name in zip((("a", one), ("b", two)), names, strict=True):
            save_file({f"{name}.{key}": t for key, t in tensors.items()}, tmp_path / f"{end}.safetensors")
        pair = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        report: Any = loratool.diff(*pair)
        assert report.same and [(v.kind, v.relative) for v in report.values] == [("dora", 0.0)]
        two["lora_magnitude_vector"] = m * 2
        save_file({f"{names[1]}.{key}": t for key, t in two.items()}, pair[1])
        assert loratool.diff(*pair).worst == pytest.approx(0.5)

    def test_what_has_no_known_meaning_is_refused_or_excluded(self, tmp_path: Path, run: Run) -> None:
        start = kohya(tmp_path / "a.safetensors", {**FUSED, "lora_unet_what_is_it": (6, 6)})
        other = diffusers(tmp_path / "b.safetensors", SPLIT)
        refused = run("diff", start, other)
        assert refused.exit_code == 4 and "lora_unet_what_is_it" in refused.stderr
        option = shlex.split(refused.stderr.splitlines()[-1].partition("add ")[2])
        assert run("diff", start, other, *option).exit_code == 0
        blocks = kohya(tmp_path / "c.safetensors", {f"lora_unet_blocks_0_{x}": (6, 6) for x in ("ffn_0", "q")})
        names = diffusers(tmp_path / "d.safetensors", {f"transformer.blocks.0.{x}": (6, 6) for x in ("ffn.0", "to_q")})
        refused = run("diff", blocks, names)
        assert refused.exit_code == 3 and "the image model is unknown" in refused.stderr

    def test_of_an_unknown_model_equal_names_meet_and_are_not_summed(self, tmp_path: Path, run: Run) -> None:
        """ComfyUI's prefix and diffusers' before the same paths: which loader takes the sum nobody knows."""
        pair = [
            diffusers(tmp_path / f"{head}.safetensors", {f"{head}.blocks.0.to_{x}": (6, 6) for x in "qk"})
            for head in ("diffusion_model", "transformer")
        ]
        assert loratool.diff(*pair).same
        refused = run("combine", *pair, "-o", tmp_path / "out.safetensors")
        assert refused.exit_code == 3 and "is in the peft format, " in refused.stderr and "comfy's" in refused.stderr

    def test_two_models_are_two_whatever_is_selected(self) -> None:
        with pytest.raises(InputError, match=r"its layers are in transformer\.h, not model\.layers"):
            loratool.diff(FIXTURES / "llama" / "adapter", FIXTURES / "gpt2" / "adapter", target=["q_proj"])

    @pytest.mark.parametrize("ends", [("encoder", "decoder"), ("text_encoder", "text_encoder_2")])
    def test_two_parts_of_a_model_are_never_one(self, ends: tuple[str, str], tmp_path: Path) -> None:
        layer = "block.0.layer.0.SelfAttention.q"
        pair = [
            write_peft(tmp_path / end, {f"{end}.{layer}": factors(6, 6, 2)}, base_model_name_or_path="t5")
            for end in ends
        ]
        report: Any = loratool.diff(*pair)
        assert report.cosine == 0 and len(report.only_a) == len(report.only_b) == 1
