"""Hold PEFT's files of older forms, and trainers' own names in them, to what the trainer computes with them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, oracle_folder, weights, write_model, write_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.adapters.formats import open_adapter
from loratool.errors import InputError, NeedsFlag, UsageError

# Makes a small classifier with an old PEFT in `sys.argv[1]`, saves it, its adapter, and the matrix of its fused layer
OLD_PEFT = """
import sys; sys.path.insert(0, sys.argv[1])
import json, torch
from pathlib import Path
from transformers import BloomConfig, BloomForSequenceClassification, GPT2Config, GPT2ForSequenceClassification
from peft import LoraConfig, get_peft_model
torch.manual_seed(0)
out, fields = Path(sys.argv[2]), json.loads(sys.argv[3])
name, = fields["target_modules"]
tokens = dict(vocab_size=11, pad_token_id=0, bos_token_id=0, eos_token_id=0)
if name == "c_attn":
    model = GPT2ForSequenceClassification(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, **tokens))
else:
    model = BloomForSequenceClassification(BloomConfig(n_layer=1, n_head=2, hidden_size=8, **tokens))
model.save_pretrained(out / "base")
tuned = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", lora_dropout=0.0, **fields))
for key, each in tuned.named_parameters():
    if "lora_" in key or "score" in key or key.endswith(".bias"):
        torch.nn.init.normal_(each)
tuned.save_pretrained(out / "adapter")
layer = next(m for n, m in tuned.named_modules() if n.endswith(name))
with torch.no_grad():
    bias, layer.bias.data = layer.bias.data.clone(), torch.zeros_like(layer.bias)
    W = layer.double()(torch.eye(8).double())  # (in, out), as GPT-2 stores it
    W = W if name == "c_attn" else W.T
score = [each for key, each in tuned.named_parameters() if "score" in key and "original" not in key][0]
torch.save({"weight": W, "bias": bias, "score": score}, out / "after.pt")
"""


def write_merged(folder: Path, enabled: list[bool], rank: int, groups: int, **config: Any) -> tuple[Tensor, Path]:
    """Write a MergedLinear as PEFT before 0.3 does, of slices of 4 rows, and return the delta by its own forward.

    `zero_pad(conv1d(A x, groups))` on the columns of an identity matrix.
    """
    n, scale = sum(enabled), 3.0 / rank
    A, _ = factors(4, 5, rank * n)
    B = weights(4 * n, rank * n // groups, 1)
    after = torch.nn.functional.conv1d(A.double()[None], B.double(), groups=groups)[0]  # (rows, in)
    delta = torch.zeros(4 * len(enabled), 5, dtype=torch.float64)
    delta[torch.tensor(enabled).repeat_interleave(4)] = after * scale
    folder.mkdir()
    name = "base_model.model.h.0.self_attention.query_key_value"
    save_file({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "enable_lora": enabled, "merge_weights": False}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return delta, folder


class TestEnableLora:
    @pytest.mark.parametrize(
        ("enabled", "groups"), [([True, False, True], 2), ([True, True, True], 2), ([True, True, True], 3), ([True], 1)]
    )
    def test_a_merge(self, enabled: list[bool], groups: int, tmp_path: Path) -> None:
        delta, adapter = write_merged(tmp_path / "adapter", enabled, 2, groups)
        W = weights(4 * len(enabled), 5, seed=1)
        name = "transformer.h.0.self_attention.query_key_value.weight"
        write_model(tmp_path / "base", {name: W}, {"model_type": "bloom"})
        loratool.merge(tmp_path / "base", adapter, tmp_path / "out", undo=False)
        assert torch.equal(load_model(tmp_path / "out")[name], (W.double() + delta).float())

    def test_what_is_written_is_todays(self, tmp_path: Path) -> None:
        delta, adapter = write_merged(tmp_path / "adapter", [True, False, True], 2, 2)
        loratool.convert(adapter, tmp_path / "out", to="peft")
        fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (fields["r"], fields["lora_alpha"]) == (4, 6) and not {"enable_lora", "merge_weights"} & fields.keys()
        found = load_model(tmp_path / "out")
        A, B = (found[f"base_model.model.h.0.self_attention.query_key_value.lora_{x}.weight"].double() for x in "AB")
        assert torch.allclose(1.5 * B @ A, delta, rtol=1e-14, atol=0)

    @pytest.mark.parametrize("flag", [True, False])
    def test_what_the_flag_says_of_a_linear_layer_is_no_problem(
        self, flag: bool, tmp_path: Path, run: Callable[..., Any]
    ) -> None:
        """PEFT 0.2 resets `fan_in_fan_out` for such a layer, and saves what its user gave."""
        delta, adapter = write_merged(tmp_path / "adapter", [True, False, True], 2, 2, fan_in_fan_out=flag)
        W, name = weights(12, 5, seed=1), "transformer.h.0.self_attention.query_key_value.weight"
        write_model(tmp_path / "base", {name: W}, {"model_type": "bloom"})
        loratool.merge(tmp_path / "base", adapter, tmp_path / "out", undo=False)
        assert torch.equal(load_model(tmp_path / "out")[name], (W.double() + delta).float())
        assert run("inspect", adapter, "--base", tmp_path / "base", "--strict").exit_code == 0

    def test_alpha(self, tmp_path: Path) -> None:
        _, adapter = write_merged(tmp_path / "adapter", [True, False, True], 2, 2)
        with pytest.raises(UsageError, match="contradicts the config's lora_alpha 3"):
            open_adapter(adapter, 6.0)
        assert open_adapter(adapter, 3.0).updates["h.0.self_attention.query_key_value"].scale == 1.5

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"enable_lora": [True, True, True]}, "rank 2 with 3 of 3 slices"),
            ({"enable_lora": "yes"}, "of true and false"),
            ({"enable_lora": [False]}, "of true and false"),
            ({"enable_lora": [True] * 100_000}, "of at most 16 of true and false"),
            ({"lora_alpha": None}, "no r and lora_alpha"),
            ({"r": 4}, "rank 4 with 2"),
            ({"lora_nums": 2}, "lora_nums"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, config: dict[str, Any], message: str, tmp_path: Path) -> None:
        _, adapter = write_merged(tmp_path / "adapter", [True, False, True], 2, 2, **config)
        with pytest.raises(InputError, match=message):
            open_adapter(adapter)


def test_a_convolution_has_few_groups(tmp_path: Path) -> None:
    """Of as many groups as ranks, the whole B would have the square of the file's numbers."""
    _, adapter = write_merged(tmp_path / "adapter", [True, True, True], 4, 12)
    with pytest.raises(InputError, match="does not divide"):
        open_adapter(adapter)


@pytest.mark.parametrize("prefix", ["base_model.model." * 2, "module.base_model.model._orig_mod.base_model.model.", ""])
def test_prefixes_of_old_files(prefix: str, tmp_path: Path) -> None:
    """A PeftModel that was wrapped again has the prefix twice, and some tools leave it out."""
    A, B = factors(6, 4, 2)
    tensors = {f"{prefix}model.layers.0.self_attn.q_proj.lora_{x}.weight": side for x, side in (("A", A), ("B", B))}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))
    adapter = open_adapter(tmp_path)
    assert set(adapter.updates) == {"model.layers.0.self_attn.q_proj"}
    loratool.convert(tmp_path, tmp_path / "out", to="peft")
    assert set(load_model(tmp_path / "out")) == {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB"
    }


@pytest.mark.slow
class TestOldPeft:
    @pytest.mark.parametrize(
        ("version", "fields"),
        [
            ("0.1.0", {"enable_lora": [True, False, True], "bias": "lora_only"}),
            ("0.2.0", {"enable_lora": [True, False, True], "bias": "lora_only"}),
            ("0.2.0", {"enable_lora": [True, True, True], "modules_to_save": ["score"], "bias": "lora_only"}),
            ("0.2.0", {"enable_lora": [True, False, True], "target_modules": ["query_key_value"], "bias": "all"}),
            (
                "0.2.0",
                {
                    "enable_lora": [True, True, True],
                    "target_modules": ["query_key_value"],
                    "fan_in_fan_out": True,
                    "bias": "all",
                },
            ),
            ("0.3.0", {"modules_to_save": ["score"], "bias": "lora_only"}),
            ("0.4.0", {"modules_to_save": ["score"], "bias": "all"}),
            ("0.4.0", {"modules_to_save": ["score"], "target_modules": ["query_key_value"], "bias": "all"}),
        ],
    )
    def test_its_files(self, version: str, fields: dict[str, Any], tmp_path: Path) -> None:
        folder = oracle_folder(f"peft_{version}", f"peft=={version}")
        name = fields.get("target_modules", ["c_attn"])[0]
        given = {"r": 2, "lora_alpha": 3, "target_modules": [name], "fan_in_fan_out": name == "c_attn", **fields}
        argv = [sys.executable, "-c", OLD_PEFT, folder, str(tmp_path), json.dumps(given)]
        made = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr[-2000:]
        loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", undo=False)
        found, after = load_model(tmp_path / "out"), torch.load(tmp_path / "after.pt")
        (weight,) = (W.double() for key, W in found.items() if key.endswith(f"{name}.weight"))
        assert torch.allclose(weight, after["weight"], atol=1e-6, rtol=1e-6)
        (bias,) = (b for key, b in found.items() if key.endswith(f"{name}.bias"))
        assert torch.equal(bias, after["bias"])
        assert torch.equal(found["score.weight"], after["score"])


def write_lora_in_saved(folder: Path, **changed: Tensor) -> dict[str, Tensor]:
    """Write the names that PEFT 0.3 to 0.5 save where `modules_to_save` has a module with targets in it."""
    stem = "base_model.model.classifier"
    A, B = factors(4, 4, 2)
    pair = {".dense.lora_A.weight": A, ".dense.lora_B.weight": B}
    tensors = {
        f"{stem}.dense.weight": weights(4, 4, seed=5),
        f"{stem}.dense.bias": weights(4, seed=6),
        f"{stem}.out_proj.weight": weights(3, 4, seed=7),
        **{f"{stem}{name}": each for name, each in pair.items()},
        **{f"{stem}.modules_to_save{name}": each.clone() for name, each in pair.items()},
        **{f"{stem}.original_module{name}": each + 1 for name, each in pair.items()},
        **changed,
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["dense"], "modules_to_save": ["classifier", "norm"]}
    fields |= {"peft_type": "LORA", "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return tensors


class TestLoraInSaved:
    """PEFT 0.21 loads such a file without the factors inside: loratool's copy in the current form has them."""

    def test_a_merge(self, tmp_path: Path) -> None:
        tensors = write_lora_in_saved(tmp_path / "a")
        names = ("dense.weight", "dense.bias", "out_proj.weight")
        trained = [tensors[f"base_model.model.classifier.{name}"] for name in names]
        base = {f"classifier.{name}": 0 * each for name, each in zip(names, trained, strict=True)}
        write_model(tmp_path / "base", base)
        A, B = factors(4, 4, 2)
        W = (trained[0].double() + 1.5 * B.double() @ A.double()).float()
        loratool.convert(tmp_path / "a", tmp_path / "b", to="peft")
        for adapter in "ab":
            loratool.merge(tmp_path / "base", tmp_path / adapter, tmp_path / "out", undo=False, force=True)
            found = load_model(tmp_path / "out")
            assert torch.equal(found["classifier.dense.weight"], W)
            assert all(torch.equal(found[f"classifier.{names[i]}"], trained[i]) for i in (1, 2))
        fields = json.loads((tmp_path / "b/adapter_config.json").read_text())
        assert fields["modules_to_save"] == ["classifier.out_proj", "norm"]
        assert {name for name in load_model(tmp_path / "b") if ".dense." in name} == {
            f"base_model.model.classifier.dense.{end}"
            for end in ("base_layer.weight", "base_layer.bias", "lora_A.weight", "lora_B.weight")
        }

    def test_copies_that_differ_are_refused(self, tmp_path: Path) -> None:
        name = "base_model.model.classifier.modules_to_save.dense.lora_A.weight"
        write_lora_in_saved(tmp_path / "a", **{name: weights(2, 4, seed=8)})
        with pytest.raises(InputError, match="but its values differ"):
            open_adapter(tmp_path / "a")


# Trains LoRA inside a module to save with an old PEFT, and saves what its model answers
OLD_SAVED = """
import sys; sys.path.insert(0, sys.argv[1])
import transformers, torch
from pathlib import Path
from torch import nn
from safetensors.torch import load_file, save_file
from peft import LoraConfig, get_peft_model
out = Path(sys.argv[2])
class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 3)
    def forward(self, x):
        return self.out_proj(torch.tanh(self.dense(x)))
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.score, self.config = nn.Linear(8, 8), Head(), {"model_type": "x"}
    def forward(self, x):
        return self.score(torch.relu(self.dense(x)))
torch.manual_seed(0)
model, x = Model(), torch.randn(4, 8)
(out / "base").mkdir(exist_ok=True)
if len(sys.argv) > 3:
    from peft import PeftModel
    from safetensors.torch import load_file
    model.load_state_dict(load_file(out / "base/model.safetensors"))
    tuned = PeftModel.from_pretrained(model, sys.argv[3])
else:
    save_file(model.state_dict(), out / "base/model.safetensors")
    config = LoraConfig(r=2, lora_alpha=3, lora_dropout=0.0, target_modules=["dense"], modules_to_save=["score"])
    tuned = get_peft_model(model, config)
    for each in tuned.parameters():
        if each.requires_grad:
            each.data = torch.randn_like(each)
    tuned.save_pretrained(out / "adapter")
torch.save({"x": x, "y": tuned.eval()(x).detach()}, out / "answers.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.3.0", "0.4.0", "0.5.0"])
def test_lora_in_saved_modules_answers_as_the_old_peft_and_todays_do(version: str, tmp_path: Path) -> None:
    def answers(*argv: str) -> tuple[Tensor, Tensor]:
        made = subprocess.run([sys.executable, "-c", OLD_SAVED, *argv], capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr[-2000:]
        saved = torch.load(tmp_path / "answers.pt")
        return saved["x"], saved["y"]

    x, y = answers(oracle_folder(f"peft_{version}", f"peft=={version}"), str(tmp_path))
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", undo=False)
    W = load_model(tmp_path / "out")
    hidden = torch.relu(x @ W["dense.weight"].T + W["dense.bias"])
    hidden = torch.tanh(hidden @ W["score.dense.weight"].T + W["score.dense.bias"])
    assert torch.allclose(hidden @ W["score.out_proj.weight"].T + W["score.out_proj.bias"], y, atol=1e-5)
    loratool.convert(tmp_path / "adapter", tmp_path / "today", to="peft")
    assert torch.allclose(answers("", str(tmp_path), str(tmp_path / "today"))[1], y, atol=1e-5)
    assert not torch.allclose(answers("", str(tmp_path), str(tmp_path / "adapter"))[1], y, atol=1e-1)


def test_lora_in_a_saved_module_needs_a_base_with_it(tmp_path: Path) -> None:
    """A head without LoRA is added to a base; the error for one with LoRA says what to do, and that is enough."""
    A, B, score, W = weights(2, 8), weights(3, 2), weights(3, 8, seed=1), weights(6, 8, seed=2)
    tensors = {"score.weight": score, "score.lora_A.weight": A, "score.lora_B.weight": B}
    adapter = write_peft(tmp_path / "adapter", {"dense": (A, weights(6, 2))}, modules_to_save=["score"], lora_alpha=4)
    path = adapter / "adapter_model.safetensors"
    save_file({f"base_model.model.{name}": each for name, each in tensors.items()} | load_file(path), path)
    write_model(tmp_path / "base", {"dense.weight": W})
    with pytest.raises(NeedsFlag, match="score: the adapter has its weight, and LoRA on it: first save the base as"):
        loratool.merge(tmp_path / "base", adapter, tmp_path / "out", undo=False)
    write_model(tmp_path / "headed", {"dense.weight": W, "score.weight": torch.zeros(3, 8)})
    loratool.merge(tmp_path / "headed", adapter, tmp_path / "out", undo=False)
    merged = load_model(tmp_path / "out")
    assert torch.equal(merged["score.weight"], (score.double() + 2 * B.double() @ A.double()).float())
