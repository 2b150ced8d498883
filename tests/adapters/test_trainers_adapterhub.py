"""Hold AdapterHub's LoRA to what `adapters` computes with it, and its variants to a refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, oracle_folder, weights, write_model
from torch import Tensor

import loratool
from loratool.adapters.formats import open_adapter
from loratool.errors import InputError, UsageError

LORA = {
    "architecture": "lora", "composition_mode": "add", "r": 2, "alpha": 3, "attn_matrices": ["q", "v"],
    "use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None,
}  # fmt: skip

# Makes a small model with random LoRA in `adapters`, saves both, and the model with the adapter merged
ADAPTERS = """
import sys; sys.path.insert(0, sys.argv[1])
import json, torch, adapters, transformers
from pathlib import Path
torch.manual_seed(0)
out, name, sizes, fields = Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]), json.loads(sys.argv[5])
model = getattr(transformers, name + "Model")(getattr(transformers, name + "Config")(**sizes, vocab_size=11))
model.save_pretrained(out / "base")
adapters.init(model)
model.add_adapter("mine", config=adapters.LoRAConfig(**fields))
for key, each in model.named_parameters():
    if "lora_" in key:
        torch.nn.init.normal_(each)
model.save_adapter(str(out / "adapter"), "mine")
model.double()
model.merge_adapter("mine")
torch.save({key: each for key, each in model.state_dict().items() if ".loras." not in key}, out / "after.pt")
"""


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_adapter.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"config": {**LORA, **config}, "version": "adapters.1.3.0"}))
    return folder


def pair(module: str, out: int, inp: int, rank: int = 2) -> dict[str, Tensor]:
    A, B = factors(out, inp, rank)
    return {f"{module}.loras.mine.lora_A": A, f"{module}.loras.mine.lora_B": B}


QUERY = "encoder.layer.0.attention.self.query"


class TestReading:
    def test_a_merge(self, tmp_path: Path) -> None:
        adapter, W = write_adapter(tmp_path / "adapter", pair(QUERY, 6, 4)), weights(6, 4, seed=1)
        write_model(tmp_path / "base", {f"bert.{QUERY}.weight": W}, {"model_type": "bert"})
        loratool.merge(tmp_path / "base", adapter, tmp_path / "out", undo=False)
        A, B = (side.double() for side in factors(6, 4, 2))
        found = load_model(tmp_path / "out")[f"bert.{QUERY}.weight"]
        assert torch.equal(found, (W.double() + 1.5 * B @ A).float())

    @pytest.mark.parametrize("matrices", [["q", "v"], ["k"], ["q", "k", "v"]])
    def test_slices_of_gpt2(self, matrices: list[str], tmp_path: Path) -> None:
        """`F.conv1d(A, B, groups=n)`, its rows padded to those of q, k and v."""
        n, name = len(matrices), "transformer.h.0.attn.c_attn"
        A, _ = factors(4, 4, 2 * n)
        B = weights(4 * n, 2)
        adapter = write_adapter(
            tmp_path / "adapter", {f"{name}.loras.x.lora_A": A, f"{name}.loras.x.lora_B": B}, attn_matrices=matrices
        )
        delta = torch.nn.functional.conv1d(A.double()[None], B.double()[..., None], groups=n)[0]
        expected = torch.zeros(3, 4, 4, dtype=torch.float64)
        expected[[x in matrices for x in "qkv"]] = delta.view(n, 4, 4)
        W = weights(4, 12, seed=1)
        write_model(tmp_path / "base", {f"{name}.weight": W}, {"model_type": "gpt2"})
        loratool.merge(tmp_path / "base", adapter, tmp_path / "out", undo=False)
        found = load_model(tmp_path / "out")[f"{name}.weight"]
        assert torch.equal(found, (W.double() + 1.5 * expected.view(12, 4).T).float())
        loratool.convert(adapter, tmp_path / "peft", to="peft")
        fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        assert fields["rank_pattern"] == {r"^transformer\.h\.0\.attn\.c_attn": 2 * n}
        one, two = (open_adapter(each).updates[name].scale for each in (adapter, tmp_path / "peft"))
        assert one == two == 1.5

    def test_inspect_and_resize(self, tmp_path: Path, run: Any) -> None:
        adapter = write_adapter(tmp_path / "adapter", pair(QUERY, 6, 4))
        (adapter / "pytorch_model_head.bin").write_bytes(b"")
        found = run("inspect", adapter)
        assert found.exit_code == 0 and "adapterhub" in found.stdout and "is a head and is not read" in found.stdout
        found = run("resize", adapter, "--rank", 1, "-o", tmp_path / "out")
        assert found.exit_code == 4 and "--to peft" in found.stderr
        assert run("resize", adapter, "--rank", 1, "--to", "peft", "-o", tmp_path / "out").exit_code == 0

    def test_alpha(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="contradicts"):
            open_adapter(write_adapter(tmp_path / "adapter", pair(QUERY, 6, 4)), 5.0)


@pytest.mark.parametrize(
    ("config", "extra", "message"),
    [
        ({"use_dora": True}, {}, "variant of LoRA"),
        ({"use_gating": True}, {}, "variant of LoRA"),
        ({"vera_d": 0.1}, {}, "variant of LoRA"),
        ({"composition_mode": "scale", "r": 1}, {}, "variant of LoRA"),
        ({"architecture": "mtl_lora"}, {}, "variant of LoRA"),
        ({"r": None}, {}, "no usable r, alpha or attn_matrices"),
        ({"alpha": None}, {}, "no usable r, alpha or attn_matrices"),
        ({"alpha": "8"}, {}, "no usable r, alpha or attn_matrices"),
        ({"r": 3}, {}, "the config says rank 3"),
        ({}, {f"{QUERY}.loras.mine.gate.weight": weights(1, 4)}, "is not a LoRA tensor"),
        ({}, pair("encoder.layer.0.attention.self.key".replace("mine", "other"), 6, 4) | {
            f"{QUERY}.loras.other.lora_A": weights(2, 4), f"{QUERY}.loras.other.lora_B": weights(6, 2)
        }, "several adapters"),
        ({"attn_matrices": ["q", "k", "v"]}, pair("h.0.attn.c_attn", 8, 4), "not a MergedLinear"),
    ],
)  # fmt: skip
def test_what_is_refused(config: dict[str, Any], extra: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", {**pair(QUERY, 6, 4), **extra}, **config)
    with pytest.raises(InputError, match=message):
        open_adapter(adapter)


def test_without_a_config_it_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", pair(QUERY, 6, 4))
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="LoRA without a config, in AdapterHub's format"):
        open_adapter(adapter / "pytorch_adapter.bin")


BERT = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
GPT2 = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "sizes", "fields"),
    [
        ("Roberta", BERT, {"r": 2, "alpha": 3}),
        ("GPT2", GPT2, {"r": 2, "alpha": 3, "attn_matrices": ["q", "k", "v"], "intermediate_lora": True}),
        ("GPT2", GPT2, {"r": 2, "alpha": 3, "attn_matrices": ["k"], "output_lora": True}),
    ],
)
def test_as_adapters_merges_it(model: str, sizes: dict[str, int], fields: dict[str, Any], tmp_path: Path) -> None:
    folder = oracle_folder("adapters_1.3.0", "adapters==1.3.0 transformers==4.57.6 huggingface_hub==0.36.0")
    argv = [sys.executable, "-c", ADAPTERS, folder, str(tmp_path), model, json.dumps(sizes), json.dumps(fields)]
    made = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", undo=False)
    found, after = load_model(tmp_path / "out"), torch.load(tmp_path / "after.pt")
    before = load_model(tmp_path / "base")
    assert sum(not torch.equal(found[key], before[key]) for key in found) >= 2
    for key, W in found.items():
        assert torch.allclose(W.double(), after[key].double(), rtol=1e-6, atol=1e-7), key
