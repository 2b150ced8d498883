"""Hold folders of training runs to the adapter that is chosen in them, and to what is said of the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, weights, write_model, write_peft
from torch import Tensor

import loratool
from loratool.adapters.formats import holds_adapter, open_adapter
from loratool.errors import InputError

Q = "model.layers.0.self_attn.q_proj"


def write_run(folder: Path, *names: str) -> dict[str, Tensor]:
    """Write a checkpoint of each name, as transformers' Trainer leaves them, and return each one's delta."""
    deltas = {}
    for seed, name in enumerate(names):
        A, B = factors(6, 4, 2, seed=seed)
        write_peft(folder / name, {Q: (A, B)})
        (folder / name / "optimizer.pt").write_bytes(b"")
        deltas[name] = B.double() @ A.double()
    return deltas


def test_the_newest_checkpoint(tmp_path: Path, run: Callable[..., Any]) -> None:
    """The highest number, not the last name."""
    deltas, W = write_run(tmp_path / "run", "checkpoint-900", "checkpoint-1000", "checkpoint-200"), weights(6, 4)
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    write_model(tmp_path / "base", {f"{Q}.weight": W}, {"model_type": "llama"})
    assert holds_adapter(tmp_path / "run")
    report = loratool.merge(tmp_path / "base", tmp_path / "run", tmp_path / "out", undo=False)
    assert report.adapters[0].name == str(tmp_path / "run" / "checkpoint-1000")
    assert torch.equal(load_model(tmp_path / "out")[f"{Q}.weight"], (W.double() + deltas["checkpoint-1000"]).float())
    verbs = (
        ["inspect"],
        ["convert", "--to", "peft", "-o", tmp_path / "c"],
        ["resize", "--rank", 1, "-o", tmp_path / "r"],
    )
    for verb, *options in verbs:
        found = run(verb, tmp_path / "run", *options)
        assert "read from checkpoint-1000, the newest of 3 checkpoints" in found.stdout + found.stderr, verb
    named = open_adapter(tmp_path / "run" / "checkpoint-200")
    assert named.name.endswith("checkpoint-200") and not named.notes


def test_an_adapter_of_its_own_comes_first(tmp_path: Path) -> None:
    write_run(tmp_path, "run", "run/checkpoint-5", "run/checkpoint-10")
    adapter = open_adapter(tmp_path / "run")
    assert adapter.file.path.parent == tmp_path / "run" and not adapter.notes


@pytest.mark.parametrize("others", [("reward",), ("epoch_1",), ("checkpoint-best",)])
def test_what_is_not_one_run_is_refused(others: tuple[str, ...], tmp_path: Path) -> None:
    write_run(tmp_path / "run", "checkpoint-5", "checkpoint-10", *others)
    with pytest.raises(InputError, match="several adapters"):
        open_adapter(tmp_path / "run")


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "checkpoint-5", "checkpoint-10")
    (tmp_path / "run" / "checkpoint-10" / "adapter_model.safetensors").unlink()
    (tmp_path / "run" / "checkpoint-10" / "optimizer.pt").unlink()
    with pytest.raises(InputError, match=r"checkpoint-10: holds no weights"):
        open_adapter(tmp_path / "run")


@pytest.mark.parametrize("names", [("checkpoint-5",), ("checkpoint-5", "checkpoint-10")])
@pytest.mark.parametrize("later", ["empty", "without its config", "dangling"])
def test_a_later_checkpoint_without_an_adapter_is_told(names: tuple[str, ...], later: str, tmp_path: Path) -> None:
    """A run that ended while it saved leaves one, and the one before it is not the newest."""
    write_run(tmp_path, *names, *(["checkpoint-20"] if later == "without its config" else []))
    newest = tmp_path / "checkpoint-20"
    if later == "empty":
        newest.mkdir()
    elif later == "dangling":
        newest.symlink_to(tmp_path / "gone")
    else:
        (newest / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=rf"later checkpoint than {names[-1]}, checkpoint-20") as refused:
        open_adapter(tmp_path)
    assert refused.value.remedy and str(tmp_path / names[-1]) in refused.value.remedy
    assert not open_adapter(tmp_path / names[-1]).notes


@pytest.mark.parametrize("other", ["adapter_model.bin", "adapter_model.pt"])
def test_two_files_of_one_adapter(other: str, tmp_path: Path) -> None:
    """PEFT reads safetensors first."""
    write_run(tmp_path, "a")
    torch.save({"x": torch.zeros(1)}, tmp_path / "a" / other)
    adapter = open_adapter(tmp_path / "a")
    assert adapter.file.path.name == "adapter_model.safetensors"
    assert adapter.notes == (f"{other} beside adapter_model.safetensors is not read",)
    assert not open_adapter(tmp_path / "a" / "adapter_model.safetensors").notes


def test_epochs_of_torchtune(tmp_path: Path) -> None:
    q = "layers.0.attn.v_proj"
    for epoch in (0, 1):
        (tmp_path / f"epoch_{epoch}").mkdir()
        A, B = factors(6, 4, 2, seed=epoch)
        torch.save({f"{q}.lora_a.weight": A, f"{q}.lora_b.weight": B}, tmp_path / f"epoch_{epoch}" / "adapter_model.pt")
    adapter = open_adapter(tmp_path, 2.0)
    assert adapter.file.path.parent.name == "epoch_1" and adapter.format == "torchtune"


def test_a_model_beside_an_adapter(tmp_path: Path) -> None:
    """torchtune puts the merged model's shards there."""
    write_model(
        tmp_path / "epoch_0", {f"{Q}.weight": weights(6, 4), "x": weights(2)}, {"model_type": "llama"}, shards=2
    )
    write_run(tmp_path, "epoch_0")
    with pytest.raises(InputError, match="a model, and an adapter beside it") as error:
        open_adapter(tmp_path / "epoch_0")
    assert error.value.remedy and error.value.remedy.endswith("adapter_model.safetensors")
    assert open_adapter(tmp_path / "epoch_0" / "adapter_model.safetensors").updates


@pytest.mark.slow
def test_a_run_of_transformers(tmp_path: Path) -> None:
    """A Trainer's own folder, whose last checkpoint PEFT merges; TRL, LLaMA-Factory and axolotl leave the same."""
    pytest.importorskip("accelerate", reason="needs accelerate, which is in the extra `oracles`")
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokens = {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **tokens))
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"]))
    data = [{"input_ids": torch.randint(11, (6,)), "labels": torch.randint(11, (6,))} for _ in range(12)]
    said = {"max_steps": 12, "save_steps": 2, "learning_rate": 0.1, "report_to": [], "use_cpu": True, "seed": 0}
    arguments = transformers.TrainingArguments(tmp_path / "run", per_device_train_batch_size=1, **said)
    transformers.Trainer(wrapped, arguments, train_dataset=data).train()
    assert {each.name for each in (tmp_path / "run").iterdir()} >= {"checkpoint-2", "checkpoint-10", "checkpoint-12"}
    loratool.merge(tmp_path / "base", tmp_path / "run", tmp_path / "out", undo=False)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "checkpoint-12").merge_and_unload().state_dict()
    found = load_model(tmp_path / "out")
    assert all(torch.allclose(found[key], merged[key], rtol=1e-6, atol=1e-7) for key in found)
    assert not torch.equal(found[f"{Q}.weight"], load_model(tmp_path / "base")[f"{Q}.weight"])
