"""Hold init against peft and torch.linalg, with peft training what it wrote, and against merge and unmerge."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, bits, factors, load_model, weights, write_model, write_peft
from safetensors.torch import load_file
from torch import Tensor

import loratool
from loratool import InputError, MachineError, NeedsFlag, UsageError
from loratool.commands.init.methods import INITS
from loratool.numerics.svd import least_triplets

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
CHANGING = [name for name, row in INITS.items() if row.mutates_base]
# a weight of each kind that an adapter can have factors for
KINDS = {
    "model.layers.0.self_attn.q_proj.weight": weights(24, 20, seed=1),
    "model.embed_tokens.weight": weights(40, 24, seed=2),
    "model.patch.weight": weights(12, 6, 3, 3, seed=3),
    "model.layers.0.mlp.experts.gate_up_proj": weights(3, 32, 24, seed=4),
    "model.layers.0.mlp.experts.down_proj": weights(3, 24, 16, seed=5),
    "lm_head.weight": weights(40, 24, seed=6),
    "model.norm.weight": weights(24, seed=7),
}
EVERY = ["all-linear", "embed_tokens", "patch", "re:experts", "lm_head"]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() - other.detach().double()).norm() / other.detach().double().norm())


def change(tensors: dict[str, Tensor], module: str) -> Tensor:
    """Return B A of a linear module as an adapter file has it."""
    A, B = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return B @ A


def start(folder: Path, base: Path, method: str, **options: Any) -> Any:
    """Write an adapter to folder/adapter, with the residual in folder/residual where the method leaves one."""
    if INITS[method].mutates_base:
        options = {"residual": folder / "residual", **options}
    if method == "mica" and options.get("target") == EVERY:  # PEFT has none for these
        options = {"exclude": ["patch", "re:experts"], **options}
    return loratool.init(base, folder / "adapter", method=method, **options)


def base_of(folder: Path, base: Path) -> Path:
    return folder / "residual" if (folder / "residual").exists() else base


class TestLeastTriplets:
    @pytest.mark.parametrize("shape", [(40, 30), (30, 40), (33, 33)])
    def test_they_are_the_last_of_the_full_svd(self, shape: tuple[int, int]) -> None:
        W = weights(*shape)
        U, S, V = map(torch.from_numpy, least_triplets(W.numpy(), 5))
        full = torch.linalg.svd(W.double(), full_matrices=False)
        assert torch.allclose(S, full.S[-5:], rtol=1e-6)
        assert torch.allclose((U.double() * S) @ V.double().T, (full.U[:, -5:] * full.S[-5:]) @ full.Vh[-5:], atol=1e-8)

    @pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
    def test_of_a_matrix_without_full_rank_they_are_orthonormal_still(self, shape: tuple[int, int]) -> None:
        W = weights(shape[0], 4) @ weights(4, shape[1], seed=1)
        U, S, V = map(torch.from_numpy, least_triplets(W.numpy(), 6))
        assert float(S.max()) < 1e-6
        for side in (U, V):
            assert torch.allclose(side.T @ side, torch.eye(6), atol=1e-5)


class TestAgainstPeft:
    """B A and the residual are PEFT's own, on the fixtures."""

    def wrapped(self, folder: Path, method: Any, targets: list[str], rank: int) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=method)
        return get_peft_model(model, config)

    @pytest.mark.parametrize("method", ["pissa", "olora", "mica"])
    def test_linear(self, method: str, tmp_path: Path) -> None:
        base = FIXTURES / "llama" / "base"
        target = ["q_proj", "down_proj"]
        start(tmp_path, base, method, rank=4, alpha=8, target=target, **self.wide(method))
        ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        result, original = load_model(base_of(tmp_path, base)), load_model(base)
        for name, module in self.wrapped(base, method, target, 4).named_modules():
            if hasattr(module, "lora_A"):
                path = name.removeprefix("base_model.model.")
                A, B = module.lora_A.default.weight.double(), module.lora_B.default.weight.double()
                residual = module.base_layer.weight
                if method == "mica":
                    found = ours[f"base_model.model.{path}.lora_B.weight"].double()
                    assert distance(found @ found.T, B @ B.T) < 1e-4 and not A.any()
                    assert torch.equal(bits(result[f"{path}.weight"]), bits(original[f"{path}.weight"]))
                else:
                    assert distance(change(ours, path), B @ A) < 1e-4
                    assert distance(result[f"{path}.weight"], residual) < 1e-5

    def wide(self, method: str) -> dict[str, Any]:
        return {"dtype": "fp32", "undo": False} if INITS[method].mutates_base else {}

    def test_conv1d_pissa(self, tmp_path: Path) -> None:
        base = FIXTURES / "gpt2" / "base"
        start(tmp_path, base, "pissa", rank=4, alpha=8, target=["c_attn"], **self.wide("pissa"))
        ours, result = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), load_model(tmp_path / "residual")
        checked = 0
        for name, module in self.wrapped(base, "pissa", ["c_attn"], 4).named_modules():
            if hasattr(module, "lora_A"):
                path = name.removeprefix("base_model.model.")
                A, B = module.lora_A.default.weight.double(), module.lora_B.default.weight.double()
                assert distance(change(ours, path), B @ A) < 1e-4
                key = next(key for key in result if key.endswith(path.removeprefix("transformer.") + ".weight"))
                assert distance(result[key], module.base_layer.weight) < 1e-5
                checked += 1
        assert checked

    def test_conv1d_olora_is_the_qr_of_the_layer_and_not_of_its_storage(self, tmp_path: Path) -> None:
        """PEFT factors the stored (in, out) as if it were (out, in)."""
        base = FIXTURES / "gpt2" / "base"
        start(tmp_path, base, "olora", rank=4, target=["c_fc"])
        ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        checked = 0
        for name, W in load_model(base).items():
            if name.endswith("c_fc.weight"):
                Q, R = torch.linalg.qr(W.T.double())
                key = next(k for k in ours if name.removesuffix(".weight") in k and "lora_A" in k)
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                assert distance(change(ours, module), Q[:, :4] @ R[:4]) < 1e-5
                checked += 1
        assert checked

    def test_milora_is_the_end_of_the_svd(self, tmp_path: Path) -> None:
        """PEFT has no MiLoRA; this is its definition."""
        base = FIXTURES / "llama" / "base"
        start(tmp_path, base, "milora", rank=4, alpha=2, target=["up_proj"])
        ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        for name, W in load_model(base).items():
            if name.endswith("up_proj.weight"):
                U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
                expected = (U[:, -4:] * S[-4:]) @ Vh[-4:]
                assert distance(change(ours, name.removesuffix(".weight")) * 0.5, expected) < 1e-4

    @pytest.mark.parametrize("method", ["lora", "gaussian"])
    def test_what_is_random_has_pefts_distribution(self, method: str, tmp_path: Path) -> None:
        from peft import LoraConfig, get_peft_model

        base = write_model(tmp_path / "base", {"proj.weight": weights(64, 4096)})
        loratool.init(base, tmp_path / "adapter", method=method, rank=16)
        ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        layer = torch.nn.ModuleDict({"proj": torch.nn.Linear(4096, 64)})
        config = LoraConfig(r=16, target_modules=["proj"], init_lora_weights=True if method == "lora" else method)
        theirs = get_peft_model(layer, config).base_model.model.proj.lora_A.default.weight.detach()
        A = ours["base_model.model.proj.lora_A.weight"]
        assert A.shape == theirs.shape and not ours["base_model.model.proj.lora_B.weight"].any()
        assert abs(A.std() / theirs.std() - 1) < 0.02 and abs(A.mean()) < 0.02 * A.std()
        assert abs(A.abs().max() / theirs.abs().max() - 1) < (0.001 if method == "lora" else 0.3)


class TestStartsAtTheBase:
    @pytest.mark.parametrize("method", INITS)
    @pytest.mark.parametrize("rslora", [False, True])
    def test_base_and_adapter_are_the_base(self, method: str, rslora: bool, tmp_path: Path) -> None:
        """Every method, every kind of weight, by our merge, which other tests hold against PEFT's."""
        base = write_model(tmp_path / "base", KINDS, LLAMA)
        start(tmp_path, base, method, rank=4, alpha=3, target=EVERY, rslora=rslora)
        if method in ("lora", "gaussian"):  # of an embedding's and any other's factors one is 0
            adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
            assert sum(not t.any() for t in adapter.values()) == len(adapter) // 2
        loratool.merge(base_of(tmp_path, base), tmp_path / "adapter", tmp_path / "merged")
        merged = load_model(tmp_path / "merged")
        for name, W in KINDS.items():
            assert distance(merged[name], W) < 3e-7, name

    @pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
    def test_square_experts(self, family: str, tmp_path: Path) -> None:
        W = weights(3, 16, 16)
        base = write_model(tmp_path / "base", {"model.layers.0.mlp.experts.down_proj": W}, {"model_type": family})
        start(tmp_path, base, "pissa", rank=4, target=["down_proj"])
        loratool.merge(tmp_path / "residual", tmp_path / "adapter", tmp_path / "merged")
        assert distance(load_model(tmp_path / "merged")["model.layers.0.mlp.experts.down_proj"], W) < 3e-7

    @pytest.mark.parametrize("size", [1e-30, 1e25])
    @pytest.mark.parametrize("method", CHANGING)
    def test_where_squares_leave_float32(self, size: float, method: str, tmp_path: Path) -> None:
        W = (weights(24, 24) * size).bfloat16()
        base = write_model(tmp_path / "base", {"q.weight": W})
        (m,) = start(tmp_path, base, method, rank=4).modules
        R = load_model(tmp_path / "residual")["q.weight"]
        D = change(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), "q")
        expected = float((R.double() + D - W.double()).norm() / W.double().norm())
        assert math.isclose(m.error, expected, rel_tol=1e-3) and 1e-4 < m.error < 1e-2

    @pytest.mark.parametrize("method", CHANGING)
    def test_the_residual_lacks_what_the_factors_have(self, method: str, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", KINDS, LLAMA)
        report = start(tmp_path, base, method, rank=4, target=EVERY)
        residual = load_model(tmp_path / "residual")
        assert {m.name for m in report.modules} == set(KINDS) - {"model.norm.weight"}
        for name, W in KINDS.items():
            assert torch.equal(residual[name], W) is (name == "model.norm.weight")
        assert report.residual.error < 1e-7
        worst = max(m.error for m in report.modules)
        assert report.residual.error <= worst < 1e-7

    def test_the_reported_error_is_the_one_that_there_is(self, tmp_path: Path) -> None:
        """B A is formed densely here, in bf16."""
        base = FIXTURES / "llama" / "base"
        report = start(tmp_path, base, "pissa", rank=4)
        residual, W = load_model(tmp_path / "residual"), load_model(base)
        ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        wrong = norm = 0.0
        for m in report.modules:
            error = residual[m.name].double() + change(ours, m.name.removesuffix(".weight")) - W[m.name].double()
            assert math.isclose(m.error, float(error.norm() / W[m.name].double().norm()), rel_tol=1e-4)
            wrong, norm = wrong + float(error.square().sum()), norm + float(W[m.name].double().square().sum())
        assert math.isclose(report.residual.error, math.sqrt(wrong / norm), rel_tol=1e-4)
        assert 1e-3 < report.residual.error < 2e-3 and "--dtype fp32 --no-undo" in report.warnings[0]


class TestTraining:
    """PEFT loads the folder, trains it by real steps and saves; our merge of that equals PEFT's forward pass."""

    @pytest.mark.parametrize(
        ("model", "method", "options"),
        [
            ("llama", "lora", {}),
            ("llama", "gaussian", {"dora": True}),
            ("llama", "pissa", {"rslora": True}),
            ("llama", "olora", {"dora": True, "alpha": 3}),
            ("llama", "mica", {}),
            ("gpt2", "lora", {"dora": True, "target": ["all-linear", "wte"]}),
            ("gpt2", "pissa", {"target": ["c_attn", "c_proj"], "rank_pattern": {"c_attn": 6}}),
            ("gpt2", "milora", {}),
            ("llama", "orthogonal", {}),
        ],
    )
    def test_steps(self, model: str, method: str, options: dict[str, Any], tmp_path: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = FIXTURES / model / "base"
        if INITS[method].mutates_base:
            options = {**options, "dtype": "fp32", "undo": False}
        start(tmp_path, base, method, rank=4, **options)
        foundation = base_of(tmp_path, base)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        loaded = AutoModelForCausalLM.from_pretrained(foundation, dtype=torch.float32)
        trained = PeftModel.from_pretrained(loaded, tmp_path / "adapter", is_trainable=True)
        ids = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert distance(trained(ids).logits, plain(ids).logits) < 2e-5
        parameters = {n: p for n, p in trained.named_parameters() if p.requires_grad}
        assert any("lora_B" in n for n in parameters) is (method != "mica")
        optimizer = torch.optim.AdamW(parameters.values(), lr=2e-3)
        losses = []
        for _ in range(3):
            loss = trained(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        assert losses[-1] < losses[0]
        trained.save_pretrained(tmp_path / "trained")
        loratool.merge(foundation, tmp_path / "trained", tmp_path / "merged", dtype="fp32", undo=False)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        with torch.no_grad():
            expected = trained(ids).logits
            assert distance(plain(ids).logits, expected) > 1e-4
            assert distance(merged(ids).logits, expected) < 2e-5
        if INITS[method].mutates_base and not options.get("dora"):
            initial = tmp_path / "residual" / "initial_adapter"
            loratool.merge(base, tmp_path / "trained", tmp_path / "whole", initial=initial, dtype="fp32", undo=False)
            whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
            with torch.no_grad():
                assert distance(whole(ids).logits, expected) < 2e-5

    @pytest.mark.parametrize(
        ("family", "options"),
        [
            ("Llama4", {"num_local_experts": 2, "intermediate_size_mlp": 48}),
            ("GptOss", {"num_local_experts": 2, "layer_types": ["full_attention"]}),
            ("GptOss", {"num_local_experts": 2, "layer_types": ["full_attention"], "intermediate_size": 32}),
            ("Mixtral", {"num_local_experts": 2, "intermediate_size": 32}),
        ],
    )
    @pytest.mark.parametrize("target", [["all-linear"], ["re:experts"]])
    def test_experts(self, family: str, options: dict[str, Any], target: list[str], tmp_path: Path) -> None:
        """Both orientations of stacks, square ones too, and experts that the file has one by one."""
        import transformers
        from peft import PeftModel

        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        sizes |= {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 90,
            "num_experts_per_tok": 1,
            "pad_token_id": 0,
        }
        config = getattr(transformers, "Llama4TextConfig" if family == "Llama4" else f"{family}Config")
        kind = getattr(transformers, f"{family}ForCausalLM")
        torch.manual_seed(0)
        kind(config(**{**sizes, **options})).save_pretrained(tmp_path / "base")
        start(tmp_path, tmp_path / "base", "pissa", rank=2, target=target, dtype="fp32", undo=False)
        plain, loaded = (kind.from_pretrained(tmp_path / name).eval() for name in ("base", "residual"))
        trained = PeftModel.from_pretrained(loaded, tmp_path / "adapter", is_trainable=True).eval()
        ids = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert distance(trained(ids).logits, plain(ids).logits) < 2e-5
        with pytest.raises(UsageError, match="not support DoRA for experts"):
            loratool.init(tmp_path / "base", tmp_path / "dora", target=["re:experts"], rank=2, dora=True)
        loratool.merge(tmp_path / "residual", tmp_path / "adapter", tmp_path / "merged", undo=False)
        merged = kind.from_pretrained(tmp_path / "merged").eval()
        with torch.no_grad():
            assert distance(merged(ids).logits, plain(ids).logits) < 2e-5

    @pytest.mark.parametrize("model", ["llama", "gpt2"])
    def test_a_file_of_the_backbone_alone(self, model: str, tmp_path: Path) -> None:
        """The hub has gpt2 and bloom so: the class puts its prefix before the names, and so must the adapter."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base, prefix = FIXTURES / model / "base", {"llama": "model.", "gpt2": "transformer."}[model]
        config = json.loads((base / "config.json").read_text())
        short = {name.removeprefix(prefix): W for name, W in load_model(base).items()}
        bare = write_model(tmp_path / "base", short, config)
        start(tmp_path, bare, "pissa", rank=4, dtype="fp32", undo=False)
        plain, loaded = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            for folder in (base, tmp_path / "residual")
        )
        trained = PeftModel.from_pretrained(loaded, tmp_path / "adapter")
        ids = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert distance(trained(ids).logits, plain(ids).logits) < 2e-5
        loratool.merge(tmp_path / "residual", tmp_path / "adapter", tmp_path / "merged", undo=False)
        assert all(distance(W, short[name]) < 1e-6 for name, W in load_model(tmp_path / "merged").items())
        (bare / "config.json").write_text(json.dumps({**config, "architectures": [f"{model.title()}Model"]}))
        loratool.init(bare, tmp_path / "own", rank=4)
        keys = load_file(tmp_path / "own" / "adapter_model.safetensors")
        assert not any(key.startswith(f"base_model.model.{prefix}") for key in keys)

    @pytest.mark.parametrize("family", ["ViT", "Gemma3"])
    def test_the_names_are_those_of_transformers_5(self, family: str, tmp_path: Path) -> None:
        """Files keep historical names, which the class has no longer: PEFT would find none, or not load them."""
        import transformers
        from peft import PeftModel

        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        picture = {**sizes, "image_size": 28, "patch_size": 14}
        text = {**sizes, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 90}
        options = picture if family == "ViT" else {"text_config": text, "vision_config": picture}
        ending = "ForImageClassification" if family == "ViT" else "ForConditionalGeneration"
        kind = getattr(transformers, family + ending)
        kind(getattr(transformers, f"{family}Config")(**options)).save_pretrained(tmp_path / "base")
        start(tmp_path, tmp_path / "base", "pissa", rank=2, dtype="fp32", undo=False)
        plain, loaded = (kind.from_pretrained(tmp_path / name).state_dict() for name in ("base", "residual"))
        assert any(not torch.equal(plain[name], W) for name, W in loaded.items())
        model = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "residual"), tmp_path / "adapter")
        for name, W in model.merge_and_unload().state_dict().items():
            assert torch.allclose(W, plain[name], atol=1e-6), name

    @pytest.mark.parametrize(
        ("config", "task"),
        [
            ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "CAUSAL_LM"),
            ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "SEQ_2_SEQ_LM"),
            ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, None),
            ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, None),
            ({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}, None),
        ],
    )
    def test_the_task_type(self, config: dict[str, Any], task: str | None, tmp_path: Path) -> None:
        """PEFT's SEQ_2_SEQ_LM passes `input_ids`, which Whisper does not take, and drops `pixel_values`."""
        base = write_model(tmp_path / "base", {"layers.0.q_proj.weight": weights(8, 8)}, config)
        loratool.init(base, tmp_path / "a", rank=2)
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] == task

    def test_peft_takes_every_kind_of_layer_with_dora(self, tmp_path: Path) -> None:
        """The magnitudes' shapes are PEFT's: of a convolution and an embedding too."""
        from peft import PeftModel

        class Net(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed_tokens = torch.nn.Embedding(20, 12)
                self.patch = torch.nn.Conv2d(3, 12, 3, bias=False)
                self.proj = torch.nn.Linear(12, 16, bias=False)

        torch.manual_seed(0)
        net = Net()
        base = write_model(tmp_path / "base", net.state_dict(), {})
        loratool.init(base, tmp_path / "adapter", rank=3, target=["embed_tokens", "patch", "proj"], dora=True)
        loaded = PeftModel.from_pretrained(net, tmp_path / "adapter")
        layers = loaded.base_model.model
        for name in ("embed_tokens", "patch", "proj"):
            layer = getattr(layers, name)
            m = layer.lora_magnitude_vector.default.weight
            W = layer.base_layer.weight
            norms = (W.T if name == "embed_tokens" else W).flatten(1).norm(dim=1)
            assert torch.allclose(m.flatten(), norms, rtol=1e-6)


class TestTheSameEverywhere:
    # sha256 of the adapter's weights for the fixture; a change of these breaks a promise
    PINNED = {"lora": "4fd53c17374a4da4", "gaussian": "61ae004c1b5800d2"}  # noqa: RUF012

    @pytest.mark.parametrize("method", PINNED)
    def test_pinned_bytes(self, method: str, tmp_path: Path) -> None:
        loratool.init(FIXTURES / "llama" / "base", tmp_path / "adapter", method=method, rank=4)
        data = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
        assert hashlib.sha256(data).hexdigest()[:16] == self.PINNED[method]

    @pytest.mark.parametrize("method", INITS)
    def test_neither_selection_nor_layout_shows(self, method: str, tmp_path: Path) -> None:
        one = write_model(tmp_path / "one", KINDS, LLAMA)
        two = write_model(tmp_path / "two", dict(reversed(KINDS.items())), LLAMA, shards=3)
        start(tmp_path / "a", self.made(one, tmp_path / "a"), method, rank=4, target=EVERY)
        start(tmp_path / "b", self.made(two, tmp_path / "b"), method, rank=4, target=["q_proj", "lm_head"])
        first, second = (load_file(tmp_path / x / "adapter" / "adapter_model.safetensors") for x in "ab")
        assert set(second) < set(first)
        for key, tensor in second.items():
            assert torch.equal(tensor, first[key])

    @pytest.mark.parametrize("method", INITS)
    def test_the_arrays_of_gpus_give_the_same(
        self, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those are torch's tensors, here on the CPU."""
        base = write_model(tmp_path / "base", {**KINDS, "model.layers.1.mlp.up_proj.weight": weights(700, 620)}, LLAMA)
        options = {"rank": 4, "target": ["all-linear", "lm_head"], "dora": method != "mica"}
        start(tmp_path / "a", self.made(base, tmp_path / "a"), method, **options)
        monkeypatch.setattr("loratool.commands.init.starter.like_of", lambda _: torch.empty(0, dtype=torch.float64))
        start(tmp_path / "b", self.made(base, tmp_path / "b"), method, **options)
        first, second = (load_file(tmp_path / x / "adapter" / "adapter_model.safetensors") for x in "ab")
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            side = key.replace("lora_A", "lora_B")
            if side != key:
                assert torch.allclose(first[side] @ tensor, second[side] @ second[key], atol=1e-5)
            elif "lora_B" not in key:
                assert torch.allclose(tensor, second[key])

    def made(self, base: Path, folder: Path) -> Path:
        folder.mkdir()
        return base

    @pytest.mark.parametrize("method", ["lora", "gaussian", "orthogonal"])
    def test_the_seed_shows_and_modules_differ(self, method: str, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", {"a.q.weight": weights(8, 8), "b.q.weight": weights(8, 8)})
        for seed in (0, 1):
            loratool.init(base, tmp_path / str(seed), method=method, rank=4, seed=seed)
        first, second = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "01")
        A = [t["base_model.model.a.q.lora_A.weight"] for t in (first, second)]
        assert not torch.equal(*A) and not torch.equal(A[0], first["base_model.model.b.q.lora_A.weight"])


class TestResidual:
    @pytest.mark.parametrize("method", CHANGING)
    def test_it_can_be_undone(self, method: str, tmp_path: Path) -> None:
        base = FIXTURES / "llama" / "base"
        start(tmp_path, base, method, rank=4)
        residual = tmp_path / "residual"
        loratool.unmerge(residual, (residual / "initial_adapter", -1.0), tmp_path / "restored")
        for path in base.iterdir():
            assert (tmp_path / "restored" / path.name).read_bytes() == path.read_bytes(), path.name
        assert {p.name for p in (tmp_path / "restored").iterdir()} == {p.name for p in base.iterdir()}

    def test_it_says_what_it_is(self, tmp_path: Path) -> None:
        base = FIXTURES / "llama" / "base"
        start(tmp_path, base, "pissa", rank=4)
        index = json.loads((tmp_path / "residual" / "model.safetensors.index.json").read_text())
        said = json.loads(index["metadata"]["loratool"])
        shards = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in base.glob("*.safetensors")}
        assert said["verb"] == "init" and said["residual"] == {"method": "pissa", "of": shards}
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["init_lora_weights"] is True
        assert config["base_model_name_or_path"] == str(tmp_path / "residual")

    def test_on_another_base_the_adapter_is_refused(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        base = FIXTURES / "llama" / "base"
        start(tmp_path, base, "pissa", rank=4)
        out = tmp_path / "out"
        refused = run("merge", base, tmp_path / "adapter", "-o", out)
        assert refused.exit_code == 4 and "--initial" in refused.stderr and not out.exists()
        flag = refused.stderr.split("--initial ")[1].split(",")[0].strip()
        assert run("merge", base, tmp_path / "adapter", "--initial", flag, "-o", out).exit_code == 0
        assert all(torch.equal(a, load_model(base)[n]) for n, a in load_model(out).items())
        copy = shutil.copytree(tmp_path / "residual", tmp_path / "copy")
        assert run("merge", copy, tmp_path / "adapter", "-o", tmp_path / "plain").exit_code == 0

    def test_force_replaces_a_residual(self, tmp_path: Path) -> None:
        base = FIXTURES / "llama" / "base"
        start(tmp_path, base, "pissa", rank=4)
        with pytest.raises(NeedsFlag, match="exists already"):
            start(tmp_path, base, "pissa", rank=4)
        start(tmp_path, base, "olora", rank=4, force=True)
        assert "olora" in (tmp_path / "residual" / "model.safetensors.index.json").read_text()

    def test_a_base_where_the_start_would_lie(self, tmp_path: Path) -> None:
        base = shutil.copytree(FIXTURES / "llama" / "base", tmp_path / "r.loratool-scratch")
        with pytest.raises(UsageError, match="holds an input, and would be emptied"):
            loratool.init(base, tmp_path / "a", method="pissa", rank=2, residual=tmp_path / "r")
        assert (base / "config.json").exists()
        with pytest.raises(UsageError, match="separate folders"):
            loratool.init(FIXTURES / "llama" / "base", base / "a", method="pissa", rank=2, residual=tmp_path / "r")

    @pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
    def test_what_a_kill_leaves_is_taken_over(self, tmp_path: Path) -> None:
        """Between the start and the residual, where the start lies in a folder of its own."""
        base = FIXTURES / "llama" / "base"
        command = ["init", str(base), "-o", str(tmp_path / "a"), "--method", "pissa", "--rank", "2"]
        command += ["--residual", str(tmp_path / "residual")]
        killed = f"""
            import os, signal
            from loratool.cli import main
            from loratool.commands.init.command import _Initialization
            _Initialization._subtract = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            main({command!r})
        """
        result = subprocess.run([sys.executable, "-c", textwrap.dedent(killed)])
        assert result.returncode == -signal.SIGKILL
        assert [p.name for p in tmp_path.iterdir()] == ["residual.loratool-scratch"]
        loratool.init(base, tmp_path / "a", method="pissa", rank=2, residual=tmp_path / "residual")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "residual"]

    @pytest.mark.parametrize("place", ["out", "out/residual", "link/residual"])
    def test_neither_output_takes_the_others_place(self, place: str, tmp_path: Path) -> None:
        """A residual within an empty OUT would go with the folder that OUT replaces."""
        (tmp_path / "out").mkdir()
        (tmp_path / "link").symlink_to("out")
        with pytest.raises(UsageError, match="separate folders"):
            loratool.init(
                FIXTURES / "llama" / "base", tmp_path / "out", method="pissa", rank=2, residual=tmp_path / place
            )
        assert not any((tmp_path / "out").iterdir())

    def test_a_relative_residual_is_known_from_anywhere(
        self, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its name in the adapter is what keeps merge from putting that onto the original."""
        base = FIXTURES / "llama" / "base"
        monkeypatch.chdir(tmp_path)
        assert run("init", base, "--method", "pissa", "--rank", 2, "--residual", "r", "-o", "a").exit_code == 0
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert run("merge", base, "../a", "-o", "m").exit_code == 4

    def test_a_dry_run_tells_the_size(self, tmp_path: Path) -> None:
        base = FIXTURES / "llama" / "base"
        options = {"rank": 2, "dtype": "torch.float32", "undo": False}
        planned = start(tmp_path, base, "pissa", dry_run=True, **options).residual.nbytes
        start(tmp_path, base, "pissa", **options)
        assert planned == sum(t.nbytes for t in load_model(tmp_path / "residual").values())

    def test_a_tied_embedding_leaves_the_head(self, tmp_path: Path) -> None:
        """PEFT's own PiSSA takes the factors out of both and puts them back into one."""
        tensors = {n: t for n, t in KINDS.items() if n != "lm_head.weight"}
        base = write_model(tmp_path / "base", tensors, {**LLAMA, "tie_word_embeddings": True})
        report = start(tmp_path, base, "pissa", rank=4, target=["embed_tokens"])
        residual = load_model(tmp_path / "residual")
        assert torch.equal(residual["lm_head.weight"], KINDS["model.embed_tokens.weight"])
        assert json.loads((tmp_path / "residual" / "config.json").read_text())["tie_word_embeddings"] is False
        assert any("shares the matrix" in line for line in report.warnings)


class TestRanks:
    def test_patterns_and_alpha(self, tmp_path: Path) -> None:
        base = FIXTURES / "llama" / "base"
        report = loratool.init(base, tmp_path / "a", rank=4, rank_pattern={"q_proj": 2, "mlp": 6}, alpha=8)
        for m in report.modules:
            assert m.rank == (2 if "q_proj" in m.name else 6 if "mlp" in m.name else 4) and m.scale == 8 / m.rank
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert config["lora_alpha"] == 8 and not config["alpha_pattern"]
        assert {config["r"], *config["rank_pattern"].values()} == {2, 4, 6}

    @pytest.mark.parametrize("dora", [False, True])
    def test_a_budget_gives_the_largest_rank(self, dora: bool, tmp_path: Path) -> None:
        base = FIXTURES / "llama" / "base"
        report = loratool.init(base, tmp_path / "a", params=30_000, dora=dora)
        tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
        used = sum(t.numel() for t in tensors.values())
        (rank,) = {m.rank for m in report.modules}
        step = sum(t.numel() for key, t in tensors.items() if "magnitude" not in key) // rank
        assert used == report.parameters == sum(m.parameters for m in report.modules)
        assert used <= 30_000 < used + step

    def test_a_large_budget_ends_at_the_matrices(self, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", {"a.q.weight": weights(8, 30), "b.q.weight": weights(20, 30)})
        assert {m.rank for m in loratool.init(base, tmp_path / "a", params=10**9).modules} == {8}

    def test_without_a_target_it_is_every_linear_layer_but_the_head(self, tmp_path: Path) -> None:
        """PEFT's `target_modules="all-linear"` takes no stacks of experts and no convolutions."""
        base = write_model(tmp_path / "base", KINDS, LLAMA)
        assert [m.name for m in loratool.init(base, tmp_path / "a").modules] == [next(iter(KINDS))]

    def test_what_peft_cannot_wrap_is_no_target(self, tmp_path: Path) -> None:
        """Bare parameters and nn.MultiheadAttention; routers, which all-linear leaves out, have to be named."""
        names = {
            "model.layers.0.mlp.experts.gate_up_proj": (2, 8, 16),
            "model.layers.0.mlp.experts.gate_up_proj_bias": (2, 16),
            "model.layers.0.mlp.router.weight": (2, 8),
            "model.layers.0.mixer.A_log": (8, 4),
            "model.head.attention.in_proj_weight": (24, 8),
            "model.head.attention.out_proj.weight": (8, 8),
            "model.layers.0.self_attn.out_proj.weight": (8, 8),
        }
        base = write_model(tmp_path / "base", {name: weights(*shape) for name, shape in names.items()}, LLAMA)
        attention = "model.layers.0.self_attn.out_proj.weight"
        assert [m.name for m in loratool.init(base, tmp_path / "a", rank=2).modules] == [attention]
        named = loratool.init(base, tmp_path / "b", rank=2, target=["router", "re:experts"])
        assert {m.name.rpartition("mlp.")[2] for m in named.modules} == {"router.weight", "experts.gate_up_proj"}
        for pattern in ("A_log", "attention.out_proj", "gate_up_proj_bias"):
            with pytest.raises(InputError, match="names no weight"):
                loratool.init(base, tmp_path / "c", rank=2, target=[pattern])

    def test_single_experts_are_targets_by_several_patterns(self, tmp_path: Path) -> None:
        names = [f"model.layers.0.mlp.experts.{e}.{part}_proj.weight" for e in range(2) for part in ("gate", "up")]
        names += ["model.layers.0.mlp.shared_experts.down_proj.weight"]
        config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 1}
        base = write_model(tmp_path / "base", {name: weights(8, 8) for name in names}, config)
        stack = "model.layers.0.mlp.experts.gate_up_proj"
        target = ["gate_proj", "up_proj", "all-linear"]
        report = loratool.init(base, tmp_path / "a", rank=2, target=target)
        assert [m.name for m in report.modules] == [stack, names[-1]]
        with pytest.raises(UsageError, match="select both or neither"):
            loratool.init(base, tmp_path / "b", rank=2, target=target[:1])
        with pytest.raises(
            UsageError, match='not support DoRA for experts\nadd exclude=\["gate_up_proj", "down_proj"\]$'
        ):
            loratool.init(base, tmp_path / "b", rank=2, target=target, dora=True)

    def test_of_a_mamba_peft_leaves_two_out(self, tmp_path: Path) -> None:
        names = [f"backbone.layers.0.mixer.{name}.weight" for name in ("in_proj", "out_proj", "x_proj")]
        base = write_model(tmp_path / "base", {name: weights(8, 8) for name in names}, {"model_type": "mamba"})
        assert [m.name for m in loratool.init(base, tmp_path / "a", rank=2).modules] == [names[0], names[2]]

    def test_a_single_file(self, tmp_path: Path) -> None:
        base = FIXTURES / "llama" / "base"
        loratool.init(base, tmp_path / "a.safetensors", method="gaussian", rank=4)
        loratool.merge(base, tmp_path / "a.safetensors", tmp_path / "merged")
        assert all(torch.equal(t, load_model(base)[n]) for n, t in load_model(tmp_path / "merged").items())


class TestRefusals:
    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        return write_model(tmp_path / "base", KINDS, LLAMA)

    @pytest.mark.parametrize(
        ("arguments", "code", "words"),
        [
            (["--target", "q_prj"], 3, "q_proj"),
            (["--target", "norm"], 3, "names no weight"),
            (["--exclude", "re:."], 3, "--exclude"),
            (["--rank", "21"], 2, "q_proj=20"),
            (["--rank", "18", "--target", "re:experts"], 2, "down_proj=16"),
            (["--rank", "0"], 2, "0"),
            (["--alpha", "0"], 2, "alpha must be between"),
            (["--alpha", "-1"], 2, "alpha must be between"),
            (["--alpha", "nan"], 2, "nan is not a finite number"),
            (["--method", "orthogonal", "--rank", "3"], 2, "even"),
            (["--method", "eva"], 2, "activations"),
            (["--method", "lora_ga"], 2, "gradients"),
            (["--method", "loftq"], 2, "quantizer"),
            (["--method", "what"], 2, "pissa"),
            (["--method", "pissa"], 4, "--residual"),
            (["--residual", "r"], 2, "does not change the base"),
            (["--dtype", "fp32"], 2, "residual"),
            (["--method", "pissa", "--residual", "r", "--dtype", "bf16"], 4, "--no-undo"),
            (["--method", "pissa", "--residual", "r.safetensors"], 2, "folder"),
            (["--method", "pissa", "--residual", "adapter"], 2, "separate folders"),
            (["--params", "10"], 2, "rank 1"),
            (["--params", "4M", "--rank", "4"], 2, "exclude each other"),
            (["--rank-pattern", "v_proj=4"], 2, "v_proj"),
            (["--rank-pattern", "v_proj"], 2, "PATTERN=RANK"),
            (["--dora", "--target", "re:experts"], 2, "DoRA"),
            (["--dora", "--method", "mica"], 2, "DoRA with mica"),
            (["--method", "mica", "--target", "re:experts"], 2, "not support mica for experts"),
            (["--method", "mica", "--target", "patch"], 2, "not support mica"),
        ],
    )
    def test_one_clear_line(
        self,
        base: Path,
        run: Callable[..., Any],
        arguments: list[str],
        code: int,
        words: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(base.parent)
        result = run("init", base, "-o", "adapter", *arguments)
        assert result.exit_code == code and words in result.stderr
        assert {p.name for p in base.parent.iterdir()} == {"base"}

    def test_the_flag_that_is_named_suffices(
        self, base: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(base.parent)
        assert run("init", base, "--method", "pissa", "--residual", "r").exit_code == 0
        arguments = ["--method", "pissa", "--residual", "s", "--dtype", "bf16", "--no-undo", "-o", "b"]
        assert run("init", base, *arguments).exit_code == 0
        assert {t.dtype for t in load_model(Path("s")).values()} == {torch.bfloat16}

    @pytest.mark.parametrize("method", ["pissa", "olora"])
    def test_nan_in_the_base(self, method: str, tmp_path: Path) -> None:
        tensors = {"a.q.weight": weights(8, 8), "b.q.weight": weights(8, 8)}
        tensors["b.q.weight"][3, 3] = math.nan
        base = write_model(tmp_path / "base", tensors)
        with pytest.raises(InputError, match="nan") as error:
            start(tmp_path, base, method, rank=4)
        assert error.value.culprit == "b.q.weight" and {p.name for p in tmp_path.iterdir()} == {"base"}
        loratool.init(base, tmp_path / "adapter", rank=4)  # which need not read it

    def test_an_adapter_is_no_base(self, tmp_path: Path) -> None:
        adapter = write_peft(tmp_path / "a", {"q_proj": factors(8, 8, 2)})
        with pytest.raises(InputError, match="is an adapter"):
            loratool.init(adapter, tmp_path / "b")

    def test_a_dump_of_a_peft_model_is_no_base(self, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", {"layers.0.q_proj.base_layer.weight": weights(8, 8)})
        with pytest.raises(InputError, match="PeftModel"):
            loratool.init(base, tmp_path / "a", rank=2)

    def test_a_full_disk_is_found_before_the_factors(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Either may be full: the adapter's output may be on another disk than the residual's."""
        real = shutil.disk_usage
        base = FIXTURES / "llama" / "base"
        for full in ("one", "two"):
            for name in ("one", "two"):
                (tmp_path / name).mkdir(exist_ok=True)
            here = tmp_path / full
            usage = lambda p, here=here: real(p)._replace(free=0 if p == here else 10**12)  # noqa: E731
            monkeypatch.setattr(shutil, "disk_usage", usage)
            with pytest.raises(MachineError):
                loratool.init(base, tmp_path / "one" / "a", method="pissa", rank=2, residual=tmp_path / "two" / "r")
            assert not any((tmp_path / "one").iterdir()) and not any((tmp_path / "two").iterdir())

    @pytest.mark.parametrize("excluded", ["w3", "experts.1.w2"])
    def test_a_part_of_the_experts(self, excluded: str, tmp_path: Path) -> None:
        """The class has gate and up of all experts in one parameter."""
        path = "model.layers.0.block_sparse_moe.experts"
        tensors = {f"{path}.{e}.{w}.weight": weights(8, 8) for e in range(2) for w in ("w1", "w2", "w3")}
        base = write_model(tmp_path / "base", tensors, {"model_type": "mixtral"})
        with pytest.raises(UsageError, match="single parameter of the class"):
            loratool.init(base, tmp_path / "a", rank=2, target=["experts"], exclude=[excluded])
        for pattern in ("experts", "w2", "down_proj", "mlp.experts.down_proj"):
            made = loratool.init(base, tmp_path / pattern, rank=2, target=[pattern], rslora=True).modules
            names = [each.name.rpartition(".")[2] for each in made]
            assert names == (["gate_up_proj", "down_proj"] if pattern == "experts" else ["down_proj"])

    def test_ranks_of_parts_of_the_experts(self, tmp_path: Path) -> None:
        path = "model.layers.0.mlp.experts"
        names = [f"{path}.{e}.{part}_proj.weight" for e in range(2) for part in ("gate", "up", "down")]
        base = write_model(tmp_path / "base", {name: weights(8, 8) for name in names}, {"model_type": "qwen3_moe"})
        for patterns in ({"gate_proj": 2, "up_proj": 3}, {r"re:experts\.0\.": 2}):
            with pytest.raises(UsageError, match="one parameter of the class"):
                loratool.init(base, tmp_path / "a", target=["experts"], rank_pattern=patterns)
        made = loratool.init(base, tmp_path / "a", target=["experts"], rank_pattern={"gate_proj": 2, "up_proj": 2})
        assert [(each.name.rpartition(".")[2], each.rank) for each in made.modules] == [
            ("gate_up_proj", 2),
            ("down_proj", 8),
        ]

    def test_experts_that_the_file_has_not_all_of(self, tmp_path: Path) -> None:
        names = [f"model.layers.0.mlp.experts.{e}.{part}_proj.weight" for e in (0, 2) for part in ("up", "down")]
        tensors = {**{name: weights(8, 8) for name in names}, "model.layers.0.self_attn.q_proj.weight": weights(8, 8)}
        report = loratool.init(
            write_model(tmp_path / "base", tensors, {"model_type": "qwen3_moe"}), tmp_path / "a", rank=2
        )
        assert [each.name.rpartition(".")[0][-6:] for each in report.modules] == ["q_proj"]
        assert {name.rpartition(".")[2]: what[:7] for name, what in report.left_out.items()} == {
            "gate_up_proj": "weights",
            "down_proj": "weights",
        }

    def test_two_tensors_that_are_one_weight(self, tmp_path: Path) -> None:
        attention = "model.layers.0.attention"
        config = {"model_type": "sarvam_moe", "num_attention_heads": 2, "num_key_value_heads": 1}
        tensors = {f"{attention}.query_key_value.weight": weights(32, 8), f"{attention}.q_proj.weight": weights(16, 8)}
        base = write_model(tmp_path / "base", tensors, config)
        with pytest.raises(InputError, match="one weight of the class"):
            loratool.init(base, tmp_path / "a", rank=2)
        adapter = write_peft(tmp_path / "b", {"model.layers.0.self_attn.q_proj": factors(16, 8, 2)})
        with pytest.raises(InputError, match="could be any of"):
            loratool.merge(base, [adapter], tmp_path / "out")

    def test_the_output_exists(self, base: Path, tmp_path: Path) -> None:
        loratool.init(base, tmp_path / "a")
        with pytest.raises(NeedsFlag, match="exists"):
            loratool.init(base, tmp_path / "a")
        loratool.init(base, tmp_path / "a", force=True)

    def test_zero_and_empty_weights(self, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", {"a.q.weight": torch.zeros(8, 8), "b.q.weight": torch.zeros(0, 8)})
        for method in INITS:
            report = start(tmp_path / method, TestTheSameEverywhere().made(base, tmp_path / method), method, rank=4)
            assert [m.name for m in report.modules] == ["a.q.weight"]
            loratool.merge(base_of(tmp_path / method, base), tmp_path / method / "adapter", tmp_path / method / "m")
            assert distance_zero(load_model(tmp_path / method / "m")["a.q.weight"])

    def test_a_dry_run_writes_nothing(self, base: Path, tmp_path: Path) -> None:
        for method in INITS:
            report = start(tmp_path, base, method, rank=4, dry_run=True)
            assert report.dry_run and report.parameters and {p.name for p in tmp_path.iterdir()} == {"base"}

    def test_arguments_of_the_library(self, base: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="rank"):
            loratool.init(base, tmp_path / "a", rank=-1)
        with pytest.raises(UsageError, match="dtype"):
            loratool.init(base, tmp_path / "a", dtype="int8")

    @pytest.mark.parametrize(
        "wrong",
        [
            {"rank": 4.0},
            {"rank": True},
            {"rank_pattern": {"q_proj": 0}},
            {"rank_pattern": {"q_proj": -3}},
            {"params": math.nan},
            {"params": 0},
            {"params": 10, "rank_pattern": {"q_proj": 4}},
            {"alpha": math.inf},
            {"alpha": 1e-320},
            {"alpha": "8"},
        ],
    )
    def test_odd_numbers(self, base: Path, wrong: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(UsageError):
            loratool.init(base, tmp_path / "a", target=["q_proj"], **wrong)
        assert not (tmp_path / "a").exists()

    def test_the_rank_that_is_named_suffices(self, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", {"a.q.weight": weights(7, 8), "b.q.weight": weights(1, 8)})
        for rank, remedy in ((8, 'rank_pattern={"a.q": 6}'), (2, 'exclude="b.q"')):
            with pytest.raises(UsageError) as error:
                loratool.init(base, tmp_path / "a", method="orthogonal", rank=rank, target=["q"])
            assert remedy in str(error.value)
        with pytest.raises(UsageError, match="rank 2 of these targets needs 48"):
            loratool.init(base, tmp_path / "a", method="orthogonal", params=47, target=["q"])


def distance_zero(x: Tensor) -> bool:
    return float(x.abs().max()) < 1e-6
