"""Hold torchtune's adapters to its own conversion of whole models: `torchtune/models/convert_weights.py`."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import load_model, oracle_folder, weights, write_model
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool.adapters.formats import open_adapter
from loratool.adapters.stacked import stack_factors
from loratool.errors import InputError, NeedsFlag

# Two layers of 4 heads of 4, of which keys have 2
CONFIG = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "head_dim": 4}
SHAPES = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}
NAMES = "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1", "mlp.w3", "mlp.w2"
THEIRS = dict(zip(SHAPES, NAMES, strict=True))


def base(kind: str) -> dict[str, Tensor]:
    found = {f"model.layers.{i}.{n}.weight": weights(*s, seed=i) for i in range(2) for n, s in SHAPES.items()}
    found["lm_head.weight"] = weights(11, 16)
    if kind == "phi3":
        for i in range(2):
            at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            found[f"{at}.qkv_proj.weight"] = torch.cat([found.pop(f"{at}.{x}_proj.weight") for x in "qkv"])
            found[f"{mlp}.gate_up_proj.weight"] = torch.cat(
                [found.pop(f"{mlp}.{x}_proj.weight") for x in ("gate", "up")]
            )
    return found


def write_adapter(folder: Path, dora: bool = False, **config: Any) -> dict[str, Tensor]:
    """Write adapter_model.pt of rank 2 and what torchtune puts beside it, and return its tensors."""
    folder.mkdir()
    modules = [f"layers.{i}.{THEIRS[n]}" for i in range(2) for n in SHAPES] + ["output"]
    shapes = [s for _ in range(2) for s in SHAPES.values()] + [(11, 16)]
    tensors = {}
    for seed, (module, (out, inp)) in enumerate(zip(modules, shapes, strict=True)):
        tensors[f"{module}.lora_a.weight"] = weights(2, inp, seed=seed)
        tensors[f"{module}.lora_b.weight"] = weights(out, 2, seed=seed + 50)
        if dora:
            tensors[f"{module}.magnitude"] = weights(out, seed=seed + 90).abs() + 0.05
    torch.save(tensors, folder / "adapter_model.pt")
    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return tensors


def merged(W: Tensor, tensors: dict[str, Tensor], module: str) -> Tensor:
    """Return the weight that torchtune's LoRALinear or DoRALinear computes with, in float64."""
    A, B, m = (tensors.get(f"{module}.{end}") for end in ("lora_a.weight", "lora_b.weight", "magnitude"))
    assert A is not None and B is not None
    V = W.double() + 1.5 * B.double() @ A.double()
    return V if m is None else (m.double() / V.norm(dim=1))[:, None] * V


def interleaved(W: Tensor, heads: int) -> Tensor:
    """Return halves of heads, x0 x1 y0 y1, interleaved: x0 y0 x1 y1."""
    rows = [
        h * len(W) // heads + x * 2 + half
        for h in range(heads)
        for half in range(2)
        for x in range(len(W) // heads // 2)
    ]
    found = torch.empty_like(W)
    found[torch.tensor(rows)] = W
    return found


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
def test_a_merge(kind: str, dora: bool, tmp_path: Path) -> None:
    """The interleaved base and torchtune's own layer are the base and layer of transformers, rows in another order."""
    tensors, W = write_adapter(tmp_path / "a", dora, model_type=kind), base("llama")
    write_model(tmp_path / "base", base(kind), {**CONFIG, "model_type": kind})
    adapter = tmp_path / "a"
    if kind == "phi3":
        with pytest.raises(InputError, match=r"q_proj, .*; nearest there: model.layers.0.self_attn.qkv_proj"):
            loratool.merge(tmp_path / "base", adapter, tmp_path / "out")
        adapter = tmp_path / "fused"
        loratool.convert(tmp_path / "a", adapter, to="peft", layout="fused", base=tmp_path / "base")
    loratool.merge(tmp_path / "base", adapter, tmp_path / "out", undo=False)
    found = load_model(tmp_path / "out")
    for i in range(2):
        for name in SHAPES:
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(name, 0) if kind == "llama" else 0
            own = W[f"model.layers.{i}.{name}.weight"]
            expected = merged(interleaved(own, heads) if heads else own, tensors, f"layers.{i}.{THEIRS[name]}")
            got = of(found, i, name)
            assert torch.allclose((interleaved(got, heads) if heads else got).double(), expected, rtol=1e-6, atol=1e-9)
    head = merged(W["lm_head.weight"], tensors, "output")
    assert torch.allclose(found["lm_head.weight"].double(), head, rtol=1e-6, atol=1e-9)


def of(found: dict[str, Tensor], layer: int, name: str) -> Tensor:
    """Return a projection's weight, from the rows of a fused one if that is there."""
    key = f"model.layers.{layer}.{name}.weight"
    if key in found:
        return found[key]
    group, _, last = name.partition(".")
    order = ("q_proj", "k_proj", "v_proj") if group == "self_attn" else ("gate_proj", "up_proj")
    sizes = [SHAPES[f"{group}.{each}"][0] for each in order]
    fused = found[f"model.layers.{layer}.{group}.{'qkv_proj' if group == 'self_attn' else 'gate_up_proj'}.weight"]
    return fused.split(sizes)[order.index(last)]


class TestFacts:
    def test_of_a_base(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        """The order of rows is that of the base at hand, else of the config.json beside, else it is asked for."""
        write_adapter(tmp_path / "a")
        with_copy = open_adapter(tmp_path / "a")
        (tmp_path / "a" / "config.json").unlink()
        with pytest.raises(NeedsFlag, match="torchtune's order") as refused:
            open_adapter(tmp_path / "a")
        assert refused.value.remedy and "--base BASE" in refused.value.remedy
        of_base = open_adapter(tmp_path / "a", model=CONFIG)
        for module, update in of_base.updates.items():
            one, two = (stack_factors(each.load(each.updates[module])) for each in (of_base, with_copy))
            assert all(map(np.array_equal, one, two)), update
        found = run("inspect", tmp_path / "a")
        assert found.exit_code == 0 and "in torchtune's order" in found.stdout
        found = run("convert", tmp_path / "a", "--to", "peft", "-o", tmp_path / "out")
        assert found.exit_code == 4 and "--base" in found.stderr
        write_model(tmp_path / "base", base("llama"), CONFIG)
        found = run("convert", tmp_path / "a", "--to", "peft", "-o", tmp_path / "out", "--base", tmp_path / "base")
        assert found.exit_code == 0, found.stderr
        for number, options in enumerate((["--to", "peft"], ["--to", "peft", "--plain"], ["--to", "loralib"])):
            out = tmp_path / f"{number}.safetensors"
            found = run("convert", tmp_path / "a", *options, "-o", out, "--base", tmp_path / "base" / "config.json")
            assert found.exit_code == 0, found.stderr

    def test_it_is_asked_for_only_where_it_helps(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        write_adapter(tmp_path / "a")
        (tmp_path / "a" / "config.json").unlink()
        a, out, bare = tmp_path / "a", tmp_path / "out", write_model(tmp_path / "bare", base("llama"))
        for argv in (
            ("resize", a, "--rank", "1", "--to", "peft", "-o", out),
            ("combine", a, a, "--to", "peft", "-o", out),
            ("inspect", a, "--spectra"),
            ("merge", bare, a, "-o", out),
        ):
            result = run(*argv)
            assert result.exit_code == 3 and "first loratool convert --to peft --base BASE" in result.stderr
        for argv in (("convert", a, "--to", "peft", "-o", out), ("inspect", a, "--for", "vllm"), ("diff", a, a)):
            result = run(*argv)
            assert result.exit_code == 4 and "add --base BASE" in result.stderr
            result = run(*argv, "--base", bare)
            assert result.exit_code == 3 and "add --base" not in result.stderr

    @pytest.mark.parametrize("base", [{"model_type": "qwen2"}, {"num_key_value_heads": 4}, {"model_type": "llava"}])
    def test_another_base_is_refused(self, base: dict[str, Any], tmp_path: Path) -> None:
        write_adapter(tmp_path / "a")
        with pytest.raises(InputError, match="its rows would be in another order"):
            open_adapter(tmp_path / "a", model={**CONFIG, **base})
        open_adapter(tmp_path / "a", model={**CONFIG, "model_type": "mistral"})

    def test_alpha_is_asked_for(self, tmp_path: Path) -> None:
        write_adapter(tmp_path / "a")
        (tmp_path / "a" / "adapter_config.json").unlink()
        with pytest.raises(NeedsFlag, match="alpha"):
            open_adapter(tmp_path / "a")
        assert open_adapter(tmp_path / "a", 3.0).updates["lm_head"].scale == 1.5

    @pytest.mark.parametrize("where", [".", "a"])
    def test_alpha_of_the_recipe(self, where: str, tmp_path: Path) -> None:
        """OmegaConf's dump of the run's config, in the folder of the run."""
        write_adapter(tmp_path / "a")
        (tmp_path / "a" / "adapter_config.json").unlink()
        recipe = {
            "optimizer": {"lora_alpha": 99, "lr": 0.1},
            "model": {"_component_": "torchtune.models.llama3.lora_llama3_8b", "lora_attn_modules": ["q_proj"],
                      "lora_rank": 2, "lora_alpha": 3, "lora_dropout": 0.0, "more": {"lora_alpha": 98}},
            "tokenizer": {"lora_alpha": 97, "path": None},
            "lora_alpha": 96,
        }  # fmt: skip
        (tmp_path / where / "torchtune_config.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        adapter = open_adapter(tmp_path / "a")
        assert adapter.updates["lm_head"].scale == 1.5 and (adapter.config.rank, adapter.config.alpha) == (2, 3)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"model_type": "t5"}, "is of t5"),
            ({"num_attention_heads": None}, "does not say num_attention_heads"),
            ({"num_key_value_heads": 3}, "whose rows do not make 3 heads"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, config: dict[str, Any], message: str, tmp_path: Path) -> None:
        write_adapter(tmp_path / "a", **config)
        with pytest.raises(InputError, match=message):
            open_adapter(tmp_path / "a")

    @pytest.mark.parametrize(
        "module", ["layers.0.attn.q_norm", "decoder.layers.0.attn.q_proj", "layers.0.layer.mlp.w1"]
    )
    def test_unknown_names_are_refused(self, module: str, tmp_path: Path) -> None:
        tensors = write_adapter(tmp_path / "a")
        torch.save({**tensors, f"{module}.lora_a.weight": weights(2, 16)}, tmp_path / "a" / "adapter_model.pt")
        with pytest.raises(InputError, match="not a tensor of a known torchtune model"):
            open_adapter(tmp_path / "a")


class TestExports:
    """torchtune's own export for PEFT, which leaves DoRA's magnitudes and turns Qwen's rows."""

    def export(self, folder: Path, tensors: dict[str, Tensor], kind: str) -> Path:
        folder.mkdir()
        save_file(
            {f"base_model.model.{name}": each for name, each in tensors.items()}, folder / "adapter_model.safetensors"
        )
        fields = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": kind}))
        return folder

    @pytest.mark.parametrize(("kind", "refused"), [("llama", False), ("qwen2", True)])
    def test_of_qwen(self, kind: str, refused: bool, tmp_path: Path) -> None:
        q = "model.layers.0.self_attn.q_proj"
        tensors = {f"{q}.lora_A.weight": weights(2, 16), f"{q}.lora_B.weight": weights(16, 2)}
        adapter = self.export(tmp_path / "a", tensors, kind)
        if refused:
            with pytest.raises(InputError, match=r"(?s)torchtune.*rows") as error:
                open_adapter(adapter)
            assert error.value.remedy and "adapter_model.pt" in error.value.remedy
            fields = json.loads((adapter / "adapter_config.json").read_text())
            (adapter / "adapter_config.json").write_text(json.dumps({**fields, "peft_version": "0.15"}))
        assert open_adapter(adapter).updates[q].scale == 1.5

    def test_of_dora(self, tmp_path: Path) -> None:
        q = "model.layers.0.self_attn.q_proj"
        tensors = {f"{q}.lora_A.weight": weights(2, 16), f"{q}.lora_B.weight": weights(16, 2)}
        adapter = self.export(tmp_path / "a", {**tensors, f"{q}.lora_magnitude_vector": weights(16)}, "llama")
        with pytest.raises(InputError, match=r"magnitude") as error:
            open_adapter(adapter)
        assert error.value.remedy and "adapter_model.pt" in error.value.remedy


def load_module(folder: Path, name: str) -> ModuleType:
    """Load one file of torchtune, which as a whole does not load beside today's torchao."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name.replace('.', '/')}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2"])
def test_as_torchtune_converts_the_model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `hf_to_tune` of the base, its layer's formula, and its `tune_to_hf` of the sum."""
    folder = Path(oracle_folder("torchtune", "torchtune==0.6.1"))
    plain = load_module(folder, "torchtune.models.convert_weights")
    for package in ("torchtune", "torchtune.models"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, "torchtune.models.convert_weights", plain)
    own = plain if kind == "llama" else load_module(folder, f"torchtune.models.{kind}._convert_weights")
    prefix = "" if kind == "llama" else f"{kind}_"
    sizes = {"num_heads": 4, "num_kv_heads": 2, "dim": 16, "head_dim": 4}
    tensors, W = write_adapter(tmp_path / "a", dora=True, model_type=kind), base("llama")
    theirs = getattr(own, f"{prefix}hf_to_tune")(W, **sizes)
    summed = {k: merged(w, tensors, k.removesuffix(".weight")) for k, w in theirs.items()}
    expected = getattr(own, f"{prefix}tune_to_hf")(summed, **sizes)
    write_model(tmp_path / "base", W, {**CONFIG, "model_type": kind})
    loratool.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", undo=False)
    found = load_model(tmp_path / "out")
    assert found.keys() == expected.keys()
    for key, each in found.items():
        assert torch.allclose(each.double(), expected[key], rtol=1e-6, atol=1e-9), key
    if kind == "llama":  # plain LoRA's export is right, and the same adapter
        factors = {k: v for k, v in tensors.items() if not k.endswith("magnitude")}
        exported = plain.tune_to_peft_adapter_weights(factors, **sizes)
        torch.save(factors, tmp_path / "a" / "adapter_model.pt")
        mine = open_adapter(tmp_path / "a").file
        assert {k: v.tolist() for k, v in exported.items()} == {k: mine.tensor(k).tolist() for k in mine.specs}
