"""Hold litgpt's adapters to its own merge, and its files to what is read of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_model, oracle_folder, weights, write_model
from torch import Tensor

import loratool
from loratool.adapters.formats import open_adapter
from loratool.errors import InputError, UsageError

HYPERPARAMETERS = {
    "checkpoint_dir": "checkpoints/org/tiny", "lora_r": 2, "lora_alpha": 3, "lora_dropout": 0.05, "lora_query": "true",
    "lora_key": "false", "lora_value": "true", "lora_projection": "true", "lora_mlp": "true", "lora_head": "true",
    "precision": "null", "train": "\n  epochs: 1\n  lora_r: 99",
}  # fmt: skip
MODEL = {"head_size": 4, "n_head": 4, "n_query_groups": 2, "n_embd": 16, "mlp_class_name": "LLaMAMLP", "name": "tiny"}
SIZES = {"q": 16, "k": 8, "v": 8}

# litgpt's own LoRA model of a base in transformers' names: its files, and what it merges to, in those names again
LITGPT = """
import sys; sys.path.insert(0, sys.argv[1])
import torch, yaml
from pathlib import Path
from safetensors.torch import load_file
from litgpt.lora import GPT, Config, lora_filter, merge_lora_weights
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama
from litgpt.utils import save_config
torch.manual_seed(0)
out, alike = Path(sys.argv[2]), sys.argv[3] == "alike"
lora = {"lora_r": 2, "lora_alpha": 3, "lora_dropout": 0.0, "lora_query": True, "lora_key": alike, "lora_value": True,
        "lora_projection": True, "lora_mlp": True, "lora_head": True}
config = Config(name="tiny", n_layer=2, n_embd=16, n_head=4, n_query_groups=4 if alike else 2, head_size=4, bias=False,
    vocab_size=11, padded_vocab_size=11, block_size=8, intermediate_size=24, norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP", rotary_percentage=1.0, parallel_residual=False, **lora)
base = {}
copy_weights_hf_llama(config, {}, base, load_file(out / "base" / "model.safetensors"))
model = GPT(config)
model.load_state_dict(base, strict=False)
for key, each in model.named_parameters():
    if "lora_" in key:
        torch.nn.init.normal_(each)
(out / "adapter").mkdir()
factors = {k: v for k, v in model.state_dict().items() if lora_filter(k, v)}
torch.save({"model": factors}, out / "adapter/lit_model.pth.lora")
(out / "adapter/hyperparameters.yaml").write_text(yaml.dump({**lora, "checkpoint_dir": "x/y", "train": {"epochs": 1}}))
save_config(config, out / "adapter")
model.double()
merge_lora_weights(model)
merged, again = {k.replace("linear.", ""): v for k, v in model.state_dict().items() if not lora_filter(k, v)}, {}
copy_weights_llama(config, again, merged)
torch.save(again, out / "after.pt")
"""


def base(key: int = 8) -> dict[str, Tensor]:
    shapes = {
        "self_attn.q_proj": (16, 16), "self_attn.k_proj": (key, 16), "self_attn.v_proj": (key, 16),
        "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
        "input_layernorm": (16,), "post_attention_layernorm": (16,),
    }  # fmt: skip
    found = {f"model.layers.{i}.{n}.weight": weights(*s, seed=i) for i in range(2) for n, s in shapes.items()}
    outside = {"model.embed_tokens.weight": weights(11, 16), "model.norm.weight": weights(16)}
    return {**found, **outside, "lm_head.weight": weights(11, 16, seed=3)}


def write_adapter(folder: Path, extra: dict[str, Tensor] | None = None, **said: Any) -> dict[str, Tensor]:
    """Write an adapter of q, v and what else litgpt adapts, and the YAML files beside it, and return its tensors."""
    folder.mkdir()
    shapes = {"attn.proj": (16, 16), "mlp.fc_1": (24, 16), "mlp.fc_2": (24, 16), "mlp.proj": (16, 24)}
    tensors = {"lm_head.lora_A": weights(2, 16), "lm_head.lora_B": weights(11, 2)}
    for i in range(2):
        stem = f"transformer.h.{i}"
        tensors |= {
            f"{stem}.attn.qkv.lora_A": weights(4, 16, seed=i),
            f"{stem}.attn.qkv.lora_B": weights(24, 2, seed=i),
        }
        for name, (out, inp) in shapes.items():
            tensors |= {f"{stem}.{name}.lora_A": weights(2, inp), f"{stem}.{name}.lora_B": weights(out, 2)}
    torch.save({"model": {**tensors, **(extra or {})}}, folder / "lit_model.pth.lora")
    for file, fields in (("hyperparameters.yaml", HYPERPARAMETERS), ("model_config.yaml", MODEL)):
        lines = [f"{key}: {said.get(key, value)}" for key, value in fields.items()]
        (folder / file).write_text("\n".join(lines) + "\n")
    return tensors


def test_a_merge(tmp_path: Path) -> None:
    tensors, W = write_adapter(tmp_path / "a"), base()
    write_model(tmp_path / "base", W, {"model_type": "llama"})
    loratool.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", undo=False)
    found = load_model(tmp_path / "out")
    A, B = (tensors[f"transformer.h.1.attn.qkv.lora_{side}"].double() for side in "AB")
    deltas = {"q": B[:16] @ A[:2], "k": torch.zeros(8, 16), "v": B[16:] @ A[2:]}
    for each, delta in deltas.items():
        name = f"model.layers.1.self_attn.{each}_proj.weight"
        assert torch.equal(found[name], (W[name].double() + 1.5 * delta).float())
    A, B = (tensors[f"transformer.h.0.mlp.fc_2.lora_{side}"].double() for side in "AB")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[name], (W[name].double() + 1.5 * B @ A).float())


def test_alpha(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    with pytest.raises(UsageError, match="contradicts"):
        open_adapter(tmp_path / "a", 4.0)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"mlp_class_name": "GptNeoxMLP"}, "whose mlp_class_name is GptNeoxMLP"),
        ({"lora_r": "'2'"}, "does not say lora_r"),
        ({"lora_r": 3}, "4 rows, not 3 \\+ 3 of q, v"),
        ({"lora_key": "true"}, "4 rows, not 2 \\+ 2 \\+ 2"),
        ({"lora_key": "maybe"}, "which of q, k and v"),
        ({"lora_query": "false", "lora_value": "false"}, "which are not adapted"),
        ({"n_query_groups": 4}, "24 rows, not 16 \\+ 16"),
        ({"head_size": -4}, "does not say head_size"),
    ],
)
def test_what_does_not_fit_is_refused(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", **said)
    with pytest.raises(InputError, match=message):
        open_adapter(tmp_path / "a")


def test_a_lora_of_tomorrow_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    with (tmp_path / "a" / "hyperparameters.yaml").open("a") as file:
        file.write("lora_dora: true\n")
    with pytest.raises(InputError, match="sets lora_dora, which is not known"):
        open_adapter(tmp_path / "a")


@pytest.mark.parametrize("name", ["transformer.h.0.mlp.experts.0.fc_1", "transformer.h.0.mlp.fc", "transformer.wte"])
def test_unknown_names_are_refused(name: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", {f"{name}.lora_A": weights(2, 16)})
    with pytest.raises(InputError, match="not a tensor of a litgpt model of Llama's shape"):
        open_adapter(tmp_path / "a")


def test_the_fused_layer_of_older_versions_is_refused(tmp_path: Path) -> None:
    """Before 0.5.5 its LoRA met other rows if q, k and v all had it than if one had not."""
    write_adapter(tmp_path / "a", {"transformer.h.0.attn.attn.lora_A": weights(4, 16)})
    with pytest.raises(InputError, match=r"is of litgpt before 0\.5\.5") as caught:
        open_adapter(tmp_path / "a")
    assert "loratool extract BASE MODEL" in str(caught.value.remedy)


@pytest.mark.parametrize("file", ["hyperparameters.yaml", "model_config.yaml"])
def test_damaged_settings_are_refused(file: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    path = tmp_path / "a" / file
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not text"):
        open_adapter(tmp_path / "a")
    path.write_bytes(b"#" * (1 << 20) + b"##")
    with pytest.raises(InputError, match="too long"):
        open_adapter(tmp_path / "a")
    path.unlink()
    with pytest.raises(InputError, match=f"no {file}"):
        open_adapter(tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["alike", "grouped"])
def test_as_litgpt_merges_it(heads: str, tmp_path: Path) -> None:
    folder = oracle_folder(
        "litgpt_0.5.13", "litgpt==0.5.13 lightning lightning-utilities torchmetrics jsonargparse pytorch-lightning"
    )
    write_model(tmp_path / "base", base(16 if heads == "alike" else 8), {"model_type": "llama"})
    argv = [sys.executable, "-c", LITGPT, folder, str(tmp_path), heads]
    made = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", undo=False)
    found, after = load_model(tmp_path / "out"), torch.load(tmp_path / "after.pt")
    assert found.keys() == after.keys()
    before = load_model(tmp_path / "base")
    assert sum(not torch.equal(found[key], before[key]) for key in found) == 15 - 2 * (heads == "grouped")
    for key, each in found.items():
        assert torch.allclose(each.double(), after[key].double(), rtol=1e-6, atol=1e-6), key
