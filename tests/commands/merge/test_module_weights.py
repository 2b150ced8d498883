"""Hold weights of modules, by component and by pattern, against adapters that were split or scaled by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, load_model, weights, write_model, write_peft
from peft.utils import merge_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, UsageError
from loratool.adapters.formats import open_adapter
from loratool.binding.modules.module_weights import resolve_weights, weight_of
from loratool.numerics.tensors import tensor_of

Run = Callable[..., Any]
SDXL = FIXTURES / "sdxl"
KOHYA, DIFFUSERS = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
FUSED = {"lora_unet_double_blocks_0_img_attn_qkv": (18, 6)}
SPLIT = {f"transformer.transformer_blocks.0.attn.to_{x}": (6, 6) for x in "qkv"}
MODULES = [
    f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {f"{module}.weight": weights(12, 10, seed=i, dtype=torch.bfloat16) for i, module in enumerate(MODULES)}
    return write_model(tmp_path / "base", tensors, {"model_type": "llama"})


def adapter(path: Path, modules: Sequence[str] = MODULES, seed: int = 0) -> Path:
    return write_peft(path, {m: factors(12, 10, 3, seed + MODULES.index(m)) for m in modules})


def same(one: Path, two: Path) -> bool:
    a, b = load_model(one), load_model(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lora(path: Path, modules: Mapping[str, tuple[int, int]], ends: tuple[str, str], seed: int = 0) -> Path:
    """Write a single file; `modules` maps a name to its rows and columns."""
    tensors = {}
    for i, (name, shape) in enumerate(modules.items()):
        tensors |= {f"{name}.{end}": x for end, x in zip(ends, factors(*shape, 2, seed + i), strict=True)}
    save_file(tensors, path)
    return path


def index_of(undo: Path) -> dict[str, Any]:
    data = undo.read_bytes()
    at, length, *_ = struct.unpack("<QQ32s8s", data[-56:])
    found: dict[str, Any] = json.loads(data[at : at + length])
    return found


# entries after the path -> the weight of each of MODULES
CASES: dict[str, list[float]] = {
    ":0.5,q_proj=2": [2, 0.5, 0.5] * 2,
    ":0.5,attention=-1,*.layers.1.*=0": [-1, -1, 0.5, 0, 0, 0],
    ":*.layers.1.*=0,attention=-1": [-1, -1, 1, -1, -1, 0],
    r":-0.5,re:layers\.[0,1]\.mlp=3,self_attn.v_proj=0.25": [-0.5, 0.25, 3] * 2,
    ":0,model.layers.0.mlp.up_proj=1": [0, 0, 1, 0, 0, 0],
}


class TestMerge:
    @pytest.mark.parametrize("text", CASES)
    def test_it_is_the_merge_of_split_adapters(self, text: str, base: Path, tmp_path: Path, run: Run) -> None:
        whole, weighed = adapter(tmp_path / "a"), dict(zip(MODULES, CASES[text], strict=True))
        of = {w: [m for m in MODULES if weighed[m] == w] for w in weighed.values()}
        split = [(adapter(tmp_path / f"a{i}", found), w) for i, (w, found) in enumerate(of.items())]
        loratool.merge(base, split, tmp_path / "two")
        merged = tmp_path / "one"
        assert run("merge", base, f"{whole}{text}", "-o", merged).exit_code == 0
        assert same(merged, tmp_path / "two")
        one, plain = load_model(merged), load_model(base)
        assert all(torch.equal(one[f"{m}.weight"], plain[f"{m}.weight"]) == (w == 0) for m, w in weighed.items())

    @pytest.mark.parametrize("text", list(CASES)[2:4])
    def test_verify_and_unmerge_take_the_same_words(self, text: str, base: Path, tmp_path: Path, run: Run) -> None:
        whole, merged, plain = adapter(tmp_path / "a"), tmp_path / "merged", load_model(base)
        assert run("merge", base, f"{whole}{text}", "-o", merged).exit_code == 0
        assert run("verify", base, f"{whole}{text}", merged).exit_code == 0
        assert run("verify", base, whole, merged).exit_code == 1
        refused = run("unmerge", merged, f"{whole}:0.5", "-o", tmp_path / "back")
        weight = text[1:] if text[1] != "*" else f"1,{text[1:]}"
        assert refused.exit_code == 3 and f"was merged with weight {weight}, not 0.5" in refused.stderr
        assert run("unmerge", merged, f"{whole}{text}", "-o", tmp_path / "back").exit_code == 0
        assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
        assert run("unmerge", merged, f"{whole}{text}", "--approximate", "-o", tmp_path / "near").exit_code == 0
        assert all(torch.allclose(load_model(tmp_path / "near")[n], plain[n], atol=1e-3) for n in plain)

    def test_it_is_the_merge_with_scaled_alphas(self, tmp_path: Path) -> None:
        """Powers of two, so that the alphas of a single file hold them to the bit."""
        tensors = load_file(SDXL / "adapter.safetensors")
        for name in tensors:
            if name.endswith(".alpha"):
                tensors[name] *= 4.0 if "lora_te" in name else 0.5 if "input_blocks" in name else 2.0
        save_file(tensors, tmp_path / "scaled.safetensors")
        base, out = SDXL / "base.safetensors", [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
        loratool.merge(base, tmp_path / "scaled.safetensors", out[0], undo=False)
        given = {"te": 4, "lora_unet_input_*": 0.5}
        report = loratool.merge(base, (SDXL / "adapter.safetensors", 2, given), out[1], undo=False)
        assert same(*out)
        assert report.adapters[0].components == {
            "text_encoder": 4.0,
            "text_encoder_2": 4.0,
            "lora_unet_input_*": 0.5,
        }

    def test_the_bases_names_weigh_what_the_adapter_has_fused(self, tmp_path: Path) -> None:
        """Flux's qkv of a kohya file on a folder whose to_q is a tensor of its own, and a part of it at that."""
        block = "transformer_blocks.0.attn"
        shapes = {f"{block}.to_{x}.weight": (6, 6) for x in "qkv"} | {
            "single_transformer_blocks.0.attn.to_k.weight": (6, 6)
        }
        folder = tmp_path / "base"
        (folder / "transformer").mkdir(parents=True)
        (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": ["", ""]}')
        (folder / "transformer" / "config.json").write_text("{}")
        W = {name: weights(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
        save_file(W, folder / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        A, B = factors(18, 6, 2)
        lora(tmp_path / "a.safetensors", FUSED, KOHYA)
        given = {"*qkv": 3, "attn.to_k": 0, "re:to_v$": -2}
        loratool.merge(folder, (tmp_path / "a.safetensors", 1, given), tmp_path / "out")
        found = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
        for i, (x, weight) in enumerate({"q": 3, "k": 0, "v": -2}.items()):
            name, rows = f"{block}.to_{x}.weight", slice(6 * i, 6 * i + 6)
            wanted = W[name].double() + weight * (B[rows].double() @ A.double())
            assert torch.allclose(found[name].double(), wanted, atol=1e-8)
        assert torch.equal(found[f"{block}.to_k.weight"], W[f"{block}.to_k.weight"])
        loratool.unmerge(tmp_path / "out", (tmp_path / "a.safetensors", 1, given), tmp_path / "back")
        assert same(tmp_path / "back" / "transformer", folder / "transformer")

    def test_a_start_has_the_weights_of_its_adapter(self, base: Path, tmp_path: Path) -> None:
        """One of the patterns names a bias, of which the start has none."""
        start = adapter(tmp_path / "start", MODULES[:2], 40)
        write_peft(tmp_path / "a", {m: factors(12, 10, 3, i) for i, m in enumerate(MODULES[:2])},
                   init_lora_weights="pissa", bias="all")  # fmt: skip
        file = tmp_path / "a" / "adapter_model.safetensors"
        bias = {f"base_model.model.{MODULES[2]}.bias": torch.ones(12)}
        save_file({**load_file(file), **bias}, file, {"format": "pt"})
        tensors = load_model(base) | {f"{MODULES[2]}.bias": torch.zeros(12)}
        write_model(tmp_path / "biased", {n: t.float() for n, t in tensors.items()}, {"model_type": "llama"})
        given = (tmp_path / "a", 1, {"q_proj": 0.5, "up_proj": 0.25})
        loratool.merge(tmp_path / "biased", given, tmp_path / "out", initial=start)
        found = load_model(tmp_path / "out")
        for i, (module, weight) in enumerate(zip(MODULES[:2], (0.5, 1.0), strict=True)):
            D = [B.double() @ A.double() for A, B in (factors(12, 10, 3, seed) for seed in (i, 40 + i))]
            wanted = tensors[f"{module}.weight"].double() + weight * (D[0] - D[1])
            assert torch.allclose(found[f"{module}.weight"].double(), wanted, atol=1e-7)
        assert torch.equal(found[f"{MODULES[2]}.bias"], torch.full((12,), 0.25))
        both = [given, (start, -1, {name: -weight for name, weight in given[2].items()})]
        loratool.unmerge(tmp_path / "out", both, tmp_path / "back")
        assert same(tmp_path / "back", tmp_path / "biased")

    def test_what_the_undo_file_says(self, base: Path, tmp_path: Path) -> None:
        """Without a pattern it is what it was before there were any."""
        entries: dict[str, tuple[Path, Path, Mapping[str, float], dict[str, object]]] = {
            "patterns": (base, adapter(tmp_path / "a"), {"q_proj": 2, "attention": 0.5},
                         {"module_weights": [["q_proj", 2], ["attention", 0.5]]}),
            "components": (SDXL / "base.safetensors", SDXL / "adapter.safetensors", {"te": 2},
                           {"components": {"text_encoder": 2, "text_encoder_2": 2}}),
            "both": (SDXL / "base.safetensors", SDXL / "adapter.safetensors", {"*fc1": 3, "te": 2, "unet": 1},
                     {"module_weights": [["*fc1", 3], ["te1", 2], ["te2", 2], ["unet", 1]]}),
        }  # fmt: skip
        for name, (model, path, given, says) in entries.items():
            out = tmp_path / f"{name}.safetensors"
            loratool.merge(model / "model.safetensors" if model.is_dir() else model, (path, 1, given), out)
            (entry,) = index_of(out.with_suffix(".undo"))["adapters"]
            assert {key: entry[key] for key in entry if key in ("components", "module_weights")} == says
            with safe_open(out, "pt") as file:
                (facts,) = json.loads(file.metadata()["loratool"])["adapters"]
            assert facts == {key: value for key, value in entry.items() if key != "name"}


class TestEntries:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"te": 2, "te1": 3}, {"te1": 3, "te2": 2, "unet": 1}),
            ({"te1": 3, "te": 2}, {"te1": 3, "te2": 2, "unet": 1}),
            ({"te1": 3, "*q_proj": 4, "te": 2}, {"te1": 4, "te2": 2, "unet": 1}),
            ({"*q_proj": 4, "te1": 3}, {"te1": 3, "te2": 4, "unet": 1}),
            ({"te2": 5, "unet": 0, "*": 7}, {"te1": 7, "te2": 7, "unet": 7}),
            ({"*": 7, "te": -1}, {"te1": -1, "te2": -1, "unet": 7}),
        ],
    )
    def test_the_last_that_matches_wins_and_narrow_components_over_wide_ones(
        self, given: dict[str, float], expected: dict[str, float], tmp_path: Path
    ) -> None:
        modules = {"te1": "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
                   "te2": "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
                   "unet": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"}  # fmt: skip
        opened = open_adapter(lora(tmp_path / "a.safetensors", dict.fromkeys(modules.values(), (4, 4)), KOHYA))
        object.__setattr__(opened, "module_weights", resolve_weights(opened, given))
        assert {key: weight_of(opened, 1, module) for key, module in modules.items()} == expected
        opened.file.close()

    def test_other_words_for_the_same_are_the_same(self, tmp_path: Path) -> None:
        base, a = SDXL / "base.safetensors", SDXL / "adapter.safetensors"
        for name, given in {
            "one": {"te": 2, "unet": 0.5, "*fc1": 1},
            "two": {"unet": 0.5, "te2": 2, "te1": 2, "*fc1": 1},
        }.items():
            loratool.merge(base, (a, 1, given), tmp_path / f"{name}.safetensors")
        assert same(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
        assert (tmp_path / "one.undo").read_bytes() == (tmp_path / "two.undo").read_bytes()
        loratool.unmerge(
            tmp_path / "one.safetensors",
            (a, 1, {"te2": 2, "te": 2, "unet": 0.5, "*fc1": 1}),
            tmp_path / "back.safetensors",
        )

    def test_what_weighs_nothing_or_too_much_is_refused(self, base: Path, tmp_path: Path, run: Run) -> None:
        """Of its own adapter: the base and the other adapter have the module."""
        a, b = adapter(tmp_path / "a", MODULES[:2]), adapter(tmp_path / "b")
        for command in (["merge", base], ["unmerge", "--approximate", base], ["combine"]):
            result = run(*command, b, f"{a}:0.5,up_proj=0.25", "-o", tmp_path / "out")
            assert result.exit_code == 2, result.stderr
            assert "a: has no module that up_proj=0.25 matches" in result.stderr and "q_proj" in result.stderr
        assert run("verify", base, f"{a}:0.5,up_proj=0.25", base).exit_code == 2
        for pattern, says in {"re:(": "is not a regular expression", "re:": "too large"}.items():
            with pytest.raises(UsageError, match=says):
                loratool.merge(base, (write_peft(tmp_path / "c", {MODULES[0]: factors(12, 10, 3)}, lora_alpha=30), 1,
                                      {pattern: 1e308}), tmp_path / "out")  # fmt: skip
        assert not (tmp_path / "out").exists()

    def test_a_selection_and_weights(self, base: Path, tmp_path: Path) -> None:
        """A pattern may weigh what --target leaves out."""
        a = adapter(tmp_path / "a")
        loratool.merge(base, (a, 1, {"v_proj": 0.5, "*.layers.0.*": 2}), tmp_path / "one", target=["q_proj"])
        loratool.merge(base, (a, 1, {"re:0.*q_proj": 2}), tmp_path / "two", target=["q_proj"])
        assert same(tmp_path / "one", tmp_path / "two")


def sums(out: Path) -> dict[str, Tensor]:
    """Return the delta of each module of a PEFT folder or a file, alphas heeded."""
    opened = open_adapter(out)
    loaded: dict[str, Any] = {module: opened.load(update) for module, update in opened.updates.items() if update.rank}
    sides = {module: [tensor_of(side).double() for side in (update.B, update.A)] for module, update in loaded.items()}
    return {module: opened.updates[module].scale * B @ A for module, (B, A) in sides.items()}


class TestCombine:
    @pytest.mark.parametrize("method", ["cat", "ties", "magnitude"])
    def test_it_is_pefts_with_each_modules_weights(self, method: str, tmp_path: Path) -> None:
        a, b = adapter(tmp_path / "a"), adapter(tmp_path / "b", MODULES[1:], 20)
        given = [(a, 0.5, {"attention": -2, "*.layers.1.*": 1}), (b, 3, {"v_proj": 0})]
        report = loratool.combine(given, tmp_path / "out", method=method, rank=10, rank_method="truncate")
        assert report.weights == (0.5, 3) and report.components == ({"attention": -2, "*.layers.1.*": 1}, {"v_proj": 0})
        found, D = sums(tmp_path / "out"), [sums(a), sums(b)]
        for module, one, two in zip(MODULES, [-2, -2, 0.5, 1, 1, 1], [None, 0, 3, 3, 0, 3], strict=True):
            pairs = [(each[module], w) for each, w in zip(D, (one, two), strict=True) if w is not None]
            deltas, w = [delta for delta, _ in pairs], torch.tensor([w for _, w in pairs], dtype=torch.float64)
            if method == "cat":
                wanted = merge_utils.task_arithmetic(deltas, w)
            else:
                wanted = {"ties": merge_utils.ties, "magnitude": merge_utils.magnitude_prune}[method](deltas, w, 0.5)
            assert torch.allclose(found[module], wanted, atol=1e-6 * float(deltas[0].norm()))

    @pytest.mark.parametrize("turned", [False, True])
    def test_components_of_two_formats(self, turned: bool, tmp_path: Path) -> None:
        """The weights are by the names of each file, before it is converted; a merge of both agrees."""
        loratool.convert(SDXL / "adapter.safetensors", tmp_path / "d.safetensors", to="diffusers")
        given = [(SDXL / "adapter.safetensors", 0.5, {"te": -1, "*input_blocks*": 2}),
                 (tmp_path / "d.safetensors", 1, {"unet": 0, "unet.conv_in": 3, "fc1": 4})]  # fmt: skip
        modules = open_adapter(tmp_path / "d.safetensors").updates
        given[1] = (
            given[1][0],
            1,
            {name: w for name, w in given[1][2].items() if name != "unet.conv_in" or name in modules},
        )
        given = given[::-1] if turned else given
        loratool.combine(given, tmp_path / "c.safetensors")
        outs = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
        for adapters, out in zip(([tmp_path / "c.safetensors"], given), outs, strict=True):
            loratool.merge(SDXL / "base.safetensors", adapters, out, undo=False, dtype="fp32")
        one, two = map(load_model, outs)
        assert all(torch.allclose(one[name], two[name], atol=1e-7) for name in two)
        assert not all(torch.equal(one[n], W.float()) for n, W in load_model(SDXL / "base.safetensors").items())

    def test_modules_with_other_weights_are_not_fused(self, tmp_path: Path, run: Run) -> None:
        a = lora(tmp_path / "a.safetensors", FUSED, KOHYA)
        b = lora(tmp_path / "b.safetensors", SPLIT, DIFFUSERS, 5)
        out = tmp_path / "c.safetensors"
        refused = run("combine", a, f"{b}:1,to_k=0.5", "-o", out)
        assert refused.exit_code == 3 and "which have the weights 1 and 0.5" in refused.stderr and not out.exists()
        assert run("combine", a, f"{b}:1,to_k=0.5,*attn.to_?=0.5", "-o", out).exit_code == 0
        D = {**sums(a), **sums(b)}
        parts = torch.cat([D[name] for name in SPLIT])
        assert torch.allclose(sums(out)[next(iter(FUSED))], D[next(iter(FUSED))] + 0.5 * parts, atol=1e-7)
        assert run("combine", f"{b}:1,to_k=0.5", f"{a}:2", "-o", out, "--force").exit_code == 0
        for i, name in enumerate(SPLIT):
            wanted = (0.5 if name.endswith("to_k") else 1) * D[name] + 2 * D[next(iter(FUSED))][6 * i : 6 * i + 6]
            assert torch.allclose(sums(out)[name], wanted, atol=1e-7)

    def test_a_language_models_fused_modules(self, tmp_path: Path, run: Run) -> None:
        """Their parts are of the file's one; the other's parts keep weights of their own only where they stay apart."""
        stem = "model.layers.0.self_attn"
        parts = {f"{stem}.{x}_proj": factors(8, 10, 2, i) for i, x in enumerate("qkv")}
        split, fused = write_peft(tmp_path / "split", parts), tmp_path / "fused"
        A, B = factors(24, 10, 3, 7)
        write_peft(fused, {f"{stem}.qkv_proj": (A, B)})
        weighed = f"{split}:2,q_proj=-1"
        assert run("combine", weighed, f"{fused}:0.5,qkv_proj=4", "-o", tmp_path / "out").exit_code == 0
        found = sums(tmp_path / "out")
        for i, ((module, (a, b)), w) in enumerate(zip(parts.items(), (-1, 2, 2), strict=True)):
            wanted = w * b.double() @ a.double() + 4 * B[8 * i : 8 * i + 8].double() @ A.double()
            assert torch.allclose(found[module], wanted, atol=1e-7)
        refused = run("combine", fused, weighed, "-o", tmp_path / "other")
        assert refused.exit_code == 3 and "which have the weights -1 and 2" in refused.stderr

    def test_a_bias_has_the_weight_of_its_module(self, tmp_path: Path) -> None:
        """In merge and in combine, for a lora_bias as for one that was trained whole."""
        model = {
            "x.q.weight": weights(6, 5),
            "x.q.bias": torch.zeros(6),
            "x.v.weight": weights(6, 5),
            "x.v.bias": torch.zeros(6),
        }
        base = write_model(tmp_path / "base", model)
        a = write_peft(tmp_path / "a", {f"x.{m}": factors(6, 5, 2) for m in "qv"}, lora_bias=True)
        file = a / "adapter_model.safetensors"
        bias = {f"base_model.model.x.{m}.lora_B.bias": torch.ones(6) for m in "qv"}
        save_file({**load_file(file), **bias}, file, {"format": "pt"})
        loratool.merge(base, (a, 1, {"q": -0.5}), tmp_path / "one")
        loratool.combine((a, 1, {"q": -0.5}), tmp_path / "c")
        loratool.merge(base, tmp_path / "c", tmp_path / "two")
        for out in ("one", "two"):
            found = load_model(tmp_path / out)
            assert torch.equal(found["x.q.bias"], torch.full((6,), -0.5)) and torch.equal(
                found["x.v.bias"], torch.ones(6)
            )

    def test_values_average_where_their_weights_sum_to_1(self, tmp_path: Path, run: Run) -> None:
        for name, value in (("a", 1.0), ("b", 5.0)):
            path = write_peft(tmp_path / name, {"x.q": factors(6, 5, 2)}, modules_to_save=["head"])
            file = path / "adapter_model.safetensors"
            save_file({**load_file(file), "base_model.model.x.head.weight": torch.full((3, 5), value)}, file)
        a, b = tmp_path / "a", tmp_path / "b"
        assert run("combine", f"{a}:2,head=0.75", f"{b}:3,head=0.25", "-o", tmp_path / "c").exit_code == 0
        found = load_file(tmp_path / "c" / "adapter_model.safetensors")["base_model.model.x.head.weight"]
        assert torch.equal(found, torch.full((3, 5), 2.0))
        assert run("combine", f"{a}:0.5,head=2", f"{b}:0.5", "-o", tmp_path / "d").exit_code == 4


class TestTarget:
    def test_only_these_are_combined_and_the_others_are_listed(self, tmp_path: Path, run: Run) -> None:
        a, b = adapter(tmp_path / "a"), adapter(tmp_path / "b", MODULES, 20)
        result = run(
            "combine",
            a,
            f"{b}:-0.5",
            "--target",
            "q_proj,mlp",
            "--exclude",
            "*.1.mlp.*",
            "-o",
            tmp_path / "c",
            "--json",
        )
        assert result.exit_code == 0
        report, D, found = json.loads(result.stdout)["report"], [sums(a), sums(b)], sums(tmp_path / "c")
        wanted = {m for m in MODULES if "q_proj" in m} | {MODULES[2]}
        assert found.keys() == wanted and set(report["left_out"]) == set(MODULES) - wanted
        assert all(torch.allclose(found[m], D[0][m] - 0.5 * D[1][m], atol=1e-7) for m in wanted)
        refused = run("combine", a, b, "--target", "down_proj", "-o", tmp_path / "d")
        assert refused.exit_code == 3 and "--target down_proj: names no module of" in refused.stderr

    @pytest.mark.parametrize("target", ["lora_unet_double_blocks_0_img_attn_qkv", "*attn.to_?"])
    def test_the_names_of_either_file_select(self, target: str, tmp_path: Path) -> None:
        """And what the output has fused is selected with all that it is made of, or refused."""
        others = {"lora_unet_double_blocks_0_txt_mlp_0": (24, 6)}
        a = lora(tmp_path / "a.safetensors", {**FUSED, **others}, KOHYA)
        b = lora(tmp_path / "b.safetensors", SPLIT, DIFFUSERS, 5)
        report = loratool.combine([a, b], tmp_path / "c.safetensors", target=[target])
        assert [row.name for row in report.modules] == list(FUSED) and report.left_out == tuple(others)
        turned = loratool.combine([b, a], tmp_path / "d.safetensors", target=[target])
        assert {row.name for row in turned.modules} == SPLIT.keys()
        assert {row.name for row in loratool.combine([b, a], tmp_path / "e.safetensors", target=["to_q"]).modules} == {
            "transformer.transformer_blocks.0.attn.to_q"
        }
        with pytest.raises(InputError, match="target selects only some"):
            loratool.combine([a, b], tmp_path / "f.safetensors", target=["to_q"])
