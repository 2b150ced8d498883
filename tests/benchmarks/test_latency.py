"""Hold the latency benchmark to its models: GPT-2, the same with LoRA merged and beside it, of the paper's sizes."""

from __future__ import annotations

import pytest
import torch
from benchmarks import latency
from benchmarks.latency import GPT2, MERGED, METHODS, Extra, make_extras
from torch import Tensor, nn

TINY = {"layers": 3, "d": 32, "heads": 4, "vocabulary": 50, "positions": 40}
TOKENS = torch.arange(60).view(3, 20) % 50


@pytest.fixture
def model() -> GPT2:
    torch.manual_seed(0)
    return GPT2(**TINY).double()


def plain(model: GPT2) -> Tensor:
    return model(TOKENS, [Extra() for _ in model.blocks])


@torch.no_grad()
def test_merged_and_unmerged_lora_are_one_model(model: GPT2) -> None:
    extras = make_extras(model, "11M")
    merged, unmerged = (model(TOKENS, extras[name]) for name in (MERGED, "LoRA, unmerged"))
    assert torch.allclose(merged, unmerged, rtol=1e-12, atol=1e-12)
    assert (merged - plain(model)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_a_part_whose_last_matrix_is_zero_changes_nothing(model: GPT2, name: str) -> None:
    """One that is not zero does, in every block."""
    parts = make_extras(model, "0.5M")[name]
    expected = plain(model)
    for i in range(len(parts)):
        alone = [part if i == j else Extra() for j, part in enumerate(parts)]
        assert (model(TOKENS, alone) - expected).abs().max() > 1e-4
    for key, parameter in parts.named_parameters():
        if ".up." in key or ".B_" in key:
            parameter.zero_()
    assert torch.equal(model(TOKENS, parts), expected)


@torch.no_grad()
def test_without_any_part_it_is_transformers_gpt2(model: GPT2) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_positions=40, n_embd=32, n_layer=3, n_head=4)
    theirs = GPT2LMHeadModel(config).double().eval()
    renames = {"transformer.": "", "h.": "blocks.", "attn.c_": "c_", "mlp.c_fc": "c_fc", "mlp.c_proj": "c_out"}
    tensors = {}
    for key, tensor in theirs.state_dict().items():
        for old, new in renames.items():
            key = key.replace(old, new)
        tensors[key] = tensor.T if ".c_" in key and tensor.dim() == 2 else tensor
    del tensors["lm_head.weight"]
    model.load_state_dict(tensors)
    assert torch.allclose(plain(model), theirs(TOKENS).logits[:, -1], rtol=1e-9, atol=1e-9)


def test_the_papers_sizes() -> None:
    """Tables 1 and 3, by the formulas of section 5.1: 2 d r + r + d an adapter, 2 d a LayerNorm."""
    with torch.device("meta"):
        model = GPT2(latency.LAYERS, latency.WIDTH, latency.HEADS, latency.VOCABULARY, latency.POSITIONS)
        parts = {(name, size): nn.ModuleList(make(1024, r) for _ in range(24))
                 for name, (make, ranks) in METHODS.items() for size, r in ranks.items()}  # fmt: skip
    count = {key: sum(p.numel() for p in part.parameters()) for key, part in parts.items()}
    assert sum(p.numel() for p in model.parameters()) == 354_823_168
    assert count["Adapter^H", "11M"] == 48 * (2 * 1024 * 112 + 112 + 1024) == 11_064_576
    assert count["Adapter^L", "11M"] == 24 * (2 * 1024 * 224 + 224 + 1024) + 24 * 2 * 1024 == 11_089_152
    assert count["LoRA, unmerged", "11M"] == 2 * 48 * 1024 * 112
    assert all(round(n / 1e6, 1) == 0.5 for (_, size), n in count.items() if size == "0.5M")


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("LAYERS", 1), ("WIDTH", 16), ("HEADS", 2), ("VOCABULARY", 20)):
        monkeypatch.setattr(latency, name, value)
    monkeypatch.setattr(
        latency, "PAPER", {(1, 8, "11M"): {MERGED: 2.0, "Adapter^L": 3.0}, (2, 8, "0.5M"): {MERGED: 1.0}}
    )
    latency.main(2, "cpu", 60)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 + 2 * 4 and all(line.count("|") == 9 for line in lines[2:])
    assert lines[4].startswith("| 1 x 8 | 11M | LoRA, merged |") and lines[4].endswith("|  | 2.0 |  |")
    assert lines[6].startswith("| 1 x 8 | 11M | Adapter^L |") and lines[6].endswith("% | 3.0 | +50.0 % |")
    latency.main(1, "cpu", 0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 + 4 + 1 and "skipped: about" in lines[-1]
