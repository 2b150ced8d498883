"""Hold what is collected of a sentence encoder's inputs to sums over its sentences, and its file to `gguf`'s reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks import moments_quality
from benchmarks.moments_quality import main, moments, write_imatrix

pytestmark = pytest.mark.slow

LINES = ["the rose is red", "and so the sun", "winter", "rose and sun and rose and so the end"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a BERT of random weights, and a copy that is a little away."""
    from transformers import BertConfig, BertModel, BertTokenizer

    base, tuned = (tmp_path_factory.mktemp(name) for name in ("base", "tuned"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for line in LINES for word in line.split()})]
    words += [chr(ord("a") + i) for i in range(26)] + [f"##{chr(ord('a') + i)}" for i in range(26)]
    (base / "vocab.txt").write_text("\n".join(dict.fromkeys(words)))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3
    )
    model = BertModel(config)
    for folder in (base, tuned):
        model.save_pretrained(folder)
        BertTokenizer(str(base / "vocab.txt")).save_pretrained(folder)
        for parameter in model.parameters():
            parameter.data += 0.005 * torch.randn_like(parameter)
    return base, tuned


@torch.no_grad()
def test_moments_are_sums_over_tokens_without_padding(models: tuple[Path, Path]) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(models[0]), AutoModel.from_pretrained(models[0]).eval()
    found = moments(models[0], LINES)
    inputs = [model(**tokenizer(line, return_tensors="pt"), output_hidden_states=True).hidden_states for line in LINES]
    for layer in range(2):
        states = torch.cat([hidden[layer][0] for hidden in inputs]).double()
        for part in ("query", "key", "value"):
            total, count = found[f"encoder.layer.{layer}.attention.self.{part}"]
            assert count == len(states)
            assert torch.allclose(total, (states**2).sum(0), rtol=1e-5)
    assert len(found) == 2 * 6


def test_the_file_has_the_names_and_shapes_of_llama_cpp(models: tuple[Path, Path], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    found = moments(models[0], LINES)
    write_imatrix(tmp_path / "imatrix.gguf", found)
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")
    weights = {f"blk.{layer}.{part}.weight" for layer in range(2) for part in parts}
    assert tensors.keys() == {f"{weight}.{end}" for weight in weights for end in ("in_sum2", "counts")}
    total, count = found["encoder.layer.1.output.dense"]
    assert list(tensors["blk.1.ffn_down.weight.in_sum2"].shape) == [40, 1]
    assert torch.equal(torch.tensor(tensors["blk.1.ffn_down.weight.in_sum2"].data[0]), total.float())
    assert tensors["blk.1.ffn_down.weight.counts"].data.tolist() == [[count]]


def test_each_rank_has_a_line_without_the_file_and_with_it(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    for name, value in {"RANKS": (2, 24), "COLLECTED": 8, "HELD_OUT": 5}.items():  # of 24 is every matrix
        monkeypatch.setattr(moments_quality, name, value)
    main(*models)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["2", "no"], ["2", "yes"], ["24", "no"], ["24", "yes"]]
    assert rows[0][2:] != rows[1][2:]
    assert [row[2:] for row in rows[2:]] == [["100.0%", "100.0%"]] * 2
