"""Hold the benchmark of combined tasks to PEFT, with a small model in the place of the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import combine_tasks
from benchmarks.combine_tasks import Bench, main, texts
from benchmarks.quantized_quality import model_of, read, token_losses
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

TASKS = {
    "counting": lambda: [" ".join(str(n + i) for i in range(9)) for n in range(3000)],
    "letters": lambda: ["ab" * (n % 7) + "c" * n for n in range(200)],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a Llama of random weights, and tasks that take no time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    for name, value in {"TASKS": TASKS, "STEPS": 6, "WINDOWS": 2, "RANK": 4}.items():
        monkeypatch.setattr(combine_tasks, name, value)
    original = tmp_path / "original"
    original.mkdir()
    characters = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    characters.pre_tokenizer, characters.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=characters).save_pretrained(original)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    weights = LlamaForCausalLM(config).state_dict()
    del weights["lm_head.weight"]
    save_file(weights, original / "model.safetensors", metadata={"format": "pt"})
    (original / "config.json").write_text(json.dumps(config.to_dict()))
    return tmp_path


def test_the_exact_sum_is_both_adapters_in_peft(folder: Path) -> None:
    from peft import PeftModel

    bench = Bench(folder)
    shares = bench.combined("cat", 1.0)
    model = PeftModel.from_pretrained(model_of(bench.original, read(bench.original)), bench.adapter("counting"))
    model.load_adapter(bench.adapter("letters"), "letters")
    model.base_model.set_adapter(["default", "letters"])
    expected = {task: token_losses(model, texts(bench.original, task)[1]) for task in TASKS}
    assert shares == pytest.approx(bench.shares(expected), rel=1e-3)
    assert bench.shares(bench.base) == [0, 0]
    assert bench.shares(bench.alone["letters"])[1] == 1


def test_each_method_has_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(combine_tasks, "COMBINE_METHODS", ["cat", "ties"])
    main(folder)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == list(TASKS)
    assert [line.split("|")[1].strip() for line in lines[-2:]] == ["cat", "ties"]
    assert all(cell.strip() for cell in lines[-1].split("|")[1:-1])
    _, _, _, _, compressed, truncated, _ = lines[-2].split("|")
    assert not compressed.strip() and truncated.strip()
