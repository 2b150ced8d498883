"""Hold that transformers loads a merged folder exactly as its base: tokenizer, templates, code, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loratool

transformers: Any = pytest.importorskip("transformers", minversion="5.0")
peft: Any = pytest.importorskip("peft", minversion="0.19")

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class TinyConfig(LlamaConfig):
    model_type = "tiny-of-a-test"


class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig

    def forward(self, *args, **options):
        found = super().forward(*args, **options)
        found.logits = found.logits * self.config.factor
        return found
"""

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "a", "b", "c", "user", "tool"]

TEMPLATES = {"default": "{% for m in messages %}user {{ m['content'] }} {% endfor %}", "tool_use": "tool {{ tools }}"}


def write_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a model of a class of its own, with all that transformers saves beside one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder.parent / "modules"))
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
        factor=0.5,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=2)
    model.save_pretrained(folder)
    (folder / "modeling_tiny.py").write_text(CODE)
    names = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    text = (folder / "config.json").read_text()
    text = text.replace('"model_type": "llama"', '"model_type": "tiny-of-a-test"')
    (folder / "config.json").write_text(text.replace("{", '{"auto_map": ' + str(names).replace("'", '"') + ",", 1))
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=123).save_pretrained(folder)
    return folder


def test_a_merged_folder_loads_as_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", monkeypatch)
    load = transformers.AutoModelForCausalLM.from_pretrained
    wrapped = peft.get_peft_model(
        load(base, trust_remote_code=True),
        peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    report = loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert report.left_behind == ()
    tokens = [transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "out")]
    assert tokens[1]("a b c")["input_ids"] == [4, 5, 6] == tokens[0]("a b c")["input_ids"]
    assert tokens[1].chat_template == tokens[0].chat_template == TEMPLATES
    chat = [{"role": "user", "content": "b"}]
    assert tokens[1].apply_chat_template(chat, tokenize=False) == "user b "
    assert transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out").sampling_rate == 123
    model, info = load(tmp_path / "out", trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__ == "TinyForCausalLM" and not any(info.values())
    assert model.generation_config.max_new_tokens == 3
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        ours, theirs = model(ids).logits, wrapped.merge_and_unload()(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
