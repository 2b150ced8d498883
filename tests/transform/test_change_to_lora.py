"""Hold DoRA as plain LoRA (`convert --plain --base`) against peft's own merge, and the optimum of a dense SVD."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, weights, write_model, write_peft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool
from loratool import InputError, NeedsFlag, UsageError
from loratool.adapters.formats import open_adapter
from loratool.numerics.tensors import tensor_of


class Net(nn.Module):
    """Two linear layers and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v, self.conv = nn.Linear(8, 10), nn.Linear(8, 6), nn.Conv2d(3, 5, 3)


def trained(tmp_path: Path, targets: list[str], seed: int = 0) -> tuple[Path, Path, dict[str, Tensor]]:
    """Return a base, peft's DoRA adapter of rank 2 and scale 1.5, and the deltas of its merge."""
    from peft import LoraConfig, get_peft_model

    base = {name: t.clone() for name, t in Net().state_dict().items()}
    write_model(tmp_path / "base", base, {})
    live = get_peft_model(
        Net(), LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_dora=True, init_lora_weights=False)
    )
    g = torch.Generator().manual_seed(seed)
    for name, parameter in live.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=g)
    live.save_pretrained(tmp_path / "dora")
    merged = live.merge_and_unload().state_dict()
    changes = {
        name.removesuffix(".weight"): merged[name].double() - base[name].double() for name in base if "weight" in name
    }
    return tmp_path / "base", tmp_path / "dora", {name: changes[name].flatten(1) for name in targets}


def change(path: Path, module: str) -> Tensor:
    adapter = open_adapter(path)
    update: Any = adapter.load(adapter.updates[module])
    D: Tensor = update.scale * tensor_of(update.B).double().flatten(1) @ tensor_of(update.A).double().flatten(1)
    return D


def test_at_full_rank_it_is_pefts_merge(tmp_path: Path) -> None:
    base, dora, changes = trained(tmp_path, ["q", "v", "conv"])
    report = loratool.convert(dora, tmp_path / "b", to="peft", plain=True, base=base, rank=10)
    for module, D in changes.items():
        assert torch.allclose(change(tmp_path / "b", module), D, atol=1e-6)
    assert all(row.error < 1e-6 and row.alpha == row.rank == min(changes[row.name].shape) for row in report.modules)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert not config["use_dora"] and config["lora_alpha"] == config["r"]
    assert not any("magnitude" in name for name in load_model(tmp_path / "b"))


def test_peft_loads_it(tmp_path: Path) -> None:
    from peft import PeftModel

    base, dora, changes = trained(tmp_path, ["q", "conv"])
    loratool.convert(dora, tmp_path / "b", to="peft", plain=True, base=base, rank=8)
    before = Net().state_dict()
    merged = PeftModel.from_pretrained(Net(), str(tmp_path / "b")).merge_and_unload().state_dict()
    for module, D in changes.items():
        name = f"{module}.weight"
        assert torch.allclose((merged[name] - before[name]).flatten(1).double(), D, atol=1e-6)


def test_by_default_its_own_rank_and_the_optimum_of_it(tmp_path: Path, run: Callable[..., Any]) -> None:
    base, dora, changes = trained(tmp_path, ["q", "v"])
    result = run("convert", dora, "--to", "peft", "--plain", "--base", base, "-o", tmp_path / "b", "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)["report"]["modules"]}
    for module, D in changes.items():
        S = torch.linalg.svdvals(D)
        best = float(S[2:].norm() / S.norm())
        error = float((change(tmp_path / "b", module) - D).norm() / D.norm())
        assert rows[module]["rank"] == 2 and rows[module]["how"] == "truncated"
        assert math.isclose(rows[module]["error"], error, rel_tol=1e-4) and math.isclose(error, best, rel_tol=1e-4)
    told = run("convert", dora, "--to", "peft", "--plain", "--base", base, "-o", tmp_path / "c")
    largest = 100 * max(row["error"] for row in rows.values())
    said = re.search(r"2 truncated: the largest error is (.*)%\n", told.stdout)
    assert said and math.isclose(float(said[1]), largest, rel_tol=5e-3)


@pytest.mark.parametrize(
    "options", [{"to": "peft", "plain": True}, {"runtime": "vllm"}, {"runtime": "transformers", "rank": 1}]
)
def test_a_large_loss_is_a_warning_weighted_by_size(options: dict[str, Any], tmp_path: Path) -> None:
    shapes = {f"model.layers.0.self_attn.{end}": size for end, size in (("q_proj", 5.0), ("o_proj", 0.5))}
    pairs = {module: factors(8, 8, 2, seed=i) for i, module in enumerate(shapes)}
    W = {module: weights(8, 8, seed=i) * size for i, (module, size) in enumerate(shapes.items())}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 1}
    base = write_model(tmp_path / "base", {f"{module}.weight": tensor for module, tensor in W.items()}, config)
    start, changes = write_peft(tmp_path / "a", pairs, use_dora=True), dict[str, Tensor]()
    tensors = load_file(start / "adapter_model.safetensors")
    for module, (A, B) in pairs.items():
        m = W[module].norm(dim=1) * torch.linspace(0.5, 1.5, 8)
        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = m
        V = W[module].double() + B.double() @ A.double()
        changes[module] = (m.double() / V.norm(dim=1))[:, None] * V - W[module].double()
    save_file(tensors, start / "adapter_model.safetensors")
    report: Any = loratool.convert(start, tmp_path / "b", base=base, **options)
    (warning,) = report.warnings
    lost = {module: float((change(tmp_path / "b", module) - D).norm()) for module, D in changes.items()}
    in_all = math.hypot(*lost.values()) / math.hypot(*(float(D.norm()) for D in changes.values()))
    worst = max(lost, key=lambda module: lost[module] / float(changes[module].norm()))
    said = re.fullmatch(
        r"2 of 2 modules lose more than 5% of their change: ([\d.]+)% is lost in all, ([\d.]+)% in (\S+); "
        r"a higher --rank loses less, a merge nothing",
        warning,
    )
    assert said and said[3] == worst
    assert math.isclose(float(said[1]), 100 * in_all, rel_tol=5e-3)
    assert math.isclose(float(said[2]), 100 * lost[worst] / float(changes[worst].norm()), rel_tol=5e-3)


def test_what_the_warning_proposes_ends_it(tmp_path: Path, run: Callable[..., Any]) -> None:
    base, dora, _ = trained(tmp_path, ["q", "v"])
    command = ("convert", dora, "--to", "peft", "--plain", "--base", base, "-o", tmp_path / "b", "--force")
    first, again = run(*command), run(*command, "--rank", 6)
    assert first.exit_code == again.exit_code == 0
    assert "warning: 1 of 2 modules lose more than 5% of their change" in first.stderr and "warning" not in again.stderr


def test_a_rounding_that_loses_much_is_one_too(tmp_path: Path) -> None:
    """Factors below float16's smallest numbers."""
    A, B = factors(8, 8, 2)
    start = write_peft(tmp_path / "a", {"q": (A * 2e-8, B), "v": factors(8, 8, 2, seed=1)})
    report: Any = loratool.convert(start, tmp_path / "b", to="peft", dtype="fp16")
    assert (
        report.warnings
        and report.warnings[0].startswith("1 of 2 modules lose")
        and "in q; --dtype fp32" in report.warnings[0]
    )
    assert not loratool.convert(start, tmp_path / "c", to="peft", dtype="fp32").warnings


def test_a_conv1d_base_is_turned(tmp_path: Path) -> None:
    """GPT-2 stores (in, out), and its DoRA normalizes the same rows of the (out, in) matrix."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=16))
    model.save_pretrained(tmp_path / "base")
    W = model.state_dict()["transformer.h.0.attn.c_attn.weight"].clone()
    live = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], use_dora=True, init_lora_weights=False))
    live.save_pretrained(tmp_path / "dora")
    D = live.merge_and_unload().state_dict()["transformer.h.0.attn.c_attn.weight"] - W
    loratool.convert(tmp_path / "dora", tmp_path / "b", to="peft", plain=True, base=tmp_path / "base", rank=8)
    assert torch.allclose(change(tmp_path / "b", "transformer.h.0.attn.c_attn"), D.T.double(), atol=1e-6)


class TestImage:
    """kohya's names on the model's own, and Flux's fused rows of a base that has them split."""

    def dora(self, path: Path, name: str, out: int, inp: int) -> tuple[Tensor, Tensor, Tensor]:
        (A, B), m = factors(out, inp, 2), weights(out, seed=7).abs() + 0.1
        tensors = {"lora_down.weight": A, "lora_up.weight": B, "alpha": torch.tensor(3.0), "dora_scale": m.view(-1, 1)}
        save_file({f"{name}.{end}": tensor for end, tensor in tensors.items()}, path)
        return A, B, m

    @pytest.mark.parametrize("to", ["kohya", "diffusers", "comfy", "loralib"])
    def test_merged_it_is_what_dora_is(self, to: str, tmp_path: Path) -> None:
        base = {f"transformer_blocks.0.attn.to_{x}.weight": weights(6, 6, seed=i) for i, x in enumerate("qkv")}
        base["single_transformer_blocks.0.proj_out.weight"] = weights(6, 30)
        save_file(base, tmp_path / "base.safetensors")
        A, B, m = self.dora(tmp_path / "a.safetensors", "lora_unet_double_blocks_0_img_attn_qkv", 18, 6)
        report = loratool.convert(
            tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=to, plain=True, rank=6,
            base=tmp_path / "base.safetensors",
        )  # fmt: skip
        assert {row.how for row in report.modules} == {"rounded"}  # of full rank
        V = torch.cat([base[f"transformer_blocks.0.attn.to_{x}.weight"] for x in "qkv"]).double()
        V += 1.5 * B.double() @ A.double()
        expected = (m.double() / V.norm(dim=1))[:, None] * V
        alpha = 6.0 if to == "loralib" else None
        loratool.merge(tmp_path / "base.safetensors", tmp_path / "b.safetensors", tmp_path / "m.safetensors",
                       undo=False, alpha=alpha)  # fmt: skip
        found = load_file(tmp_path / "m.safetensors")
        merged = torch.cat([found[f"transformer_blocks.0.attn.to_{x}.weight"] for x in "qkv"])
        assert torch.allclose(merged.double(), expected, atol=1e-6)

    def test_the_error_is_that_of_the_modules_it_is_made_of(self, tmp_path: Path) -> None:
        save_file({"double_blocks.0.img_attn.proj.weight": weights(6, 6)}, tmp_path / "base.safetensors")
        A, B, m = self.dora(tmp_path / "a.safetensors", "lora_unet_double_blocks_0_img_attn_proj", 6, 6)
        (row,) = loratool.convert(
            tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="kohya", plain=True,
            base=tmp_path / "base.safetensors",
        ).modules  # fmt: skip
        V = weights(6, 6).double() + 1.5 * B.double() @ A.double()
        S = torch.linalg.svdvals((m.double() / V.norm(dim=1))[:, None] * V - weights(6, 6).double())
        assert row.rank == 2 and math.isclose(row.error, float(S[2:].norm() / S.norm()), rel_tol=1e-4)


def test_what_is_refused(tmp_path: Path, run: Callable[..., Any]) -> None:
    base, dora, _ = trained(tmp_path, ["q"])
    for to in ("peft", "loralib"):
        with pytest.raises(NeedsFlag, match=r"q: is DoRA.*\nadd .*base=BASE"):
            loratool.convert(dora, tmp_path / "b.safetensors", to=to, plain=to == "peft")
    other = write_model(tmp_path / "other", {"k.weight": weights(4, 4)}, {})
    with pytest.raises(InputError, match=r"q: of .*dora is not in .*other"):
        loratool.convert(dora, tmp_path / "b", to="peft", plain=True, base=other)
    with pytest.raises(InputError, match="base must be the model"):
        loratool.convert(dora, tmp_path / "b", to="peft", plain=True, base=dora)
    wrong = write_model(tmp_path / "wrong", {"q.weight": weights(10, 9)}, {})
    with pytest.raises(InputError, match=r"q.weight: .*but the base weight is \(10, 9\)"):
        loratool.convert(dora, tmp_path / "b", to="peft", plain=True, base=wrong)
    nan = write_model(tmp_path / "nan", {"q.weight": torch.full((10, 8), math.nan)}, {})
    with pytest.raises(InputError, match="q: has rows with inf or nan"):
        loratool.convert(dora, tmp_path / "b", to="peft", plain=True, base=nan)
    plain = tmp_path / "plain"
    loratool.convert(dora, plain, to="peft", plain=True, base=base)
    with pytest.raises(UsageError, match="with plain=True for kinds that need the weight"):
        loratool.convert(plain, tmp_path / "b", to="peft", plain=True, base=base)
    with pytest.raises(UsageError, match="base is for the names"):
        loratool.convert(plain, tmp_path / "b.safetensors", to="loralib", base=base)
    assert sorted(path.name for path in tmp_path.glob("b*")) == ["base"]
