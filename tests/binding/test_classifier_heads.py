"""Hold a classifier's adapter on a plain base: the output loads as the classifier, by transformers and against peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import weights, write_model, write_peft
from safetensors.torch import load_file, save_file
from transformers.models.auto import modeling_auto

import loratool
from loratool.architectures.classifiers import STEMS, TASKS, classifier_class

AUTO = {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification"}
MAPPINGS = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
DECODER = {**SIZES, "num_key_value_heads": 1, "pad_token_id": 0, "tie_word_embeddings": False}
# model type -> its config and the modules with LoRA
MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bert": (SIZES, ["query", "value"]),
    "roberta": (SIZES, ["query", "value"]),
    "distilbert": ({"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "vocab_size": 32}, ["q_lin", "v_lin"]),
    "deberta-v2": (SIZES, ["query_proj", "value_proj"]),
    "llama": (DECODER, ["q_proj", "down_proj"]),
    "qwen2": (DECODER, ["q_proj", "down_proj"]),
    "gpt2": ({"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "pad_token_id": 0}, ["c_attn"]),
}
GENERATIVE = ("llama", "qwen2", "gpt2")
TOKENS = torch.arange(3, 15).view(2, 6)
# (model type, task, the auto class of the base)
CASES = [
    *((kind, "SEQ_CLS", "AutoModelForCausalLM" if kind in GENERATIVE else "AutoModel") for kind in MODELS),
    *((kind, "TOKEN_CLS", "AutoModelForCausalLM" if kind in GENERATIVE else "AutoModelForMaskedLM") for kind in MODELS),
]
QUICK = [("roberta", "SEQ_CLS"), ("bert", "TOKEN_CLS"), ("llama", "SEQ_CLS")]


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
        return logits


@pytest.mark.parametrize(
    ("kind", "task", "base"),
    [case if case[:2] in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_it_loads_as_the_classifier_and_answers_as_peft_does(kind: str, task: str, base: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes, targets = MODELS[kind]
    config = transformers.AutoConfig.for_model(kind, **sizes)
    getattr(transformers, base).from_config(config).save_pretrained(tmp_path / "base")
    cls = getattr(transformers, AUTO[task])
    model = cls.from_pretrained(tmp_path / "base", num_labels=3)
    saved = {"modules_to_save": ["pooler", "classifier"]} if kind == "deberta-v2" and task == "SEQ_CLS" else {}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type=task, target_modules=targets, **saved)).eval()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data.normal_(0, 0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    was = (tmp_path / "base" / "config.json").read_bytes()
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found, loading = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert found.config.num_labels == 3 and found.config.architectures == [type(model).__name__]
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    beside = cls.from_pretrained(tmp_path / "base", output_loading_info=True)[1]["unexpected_keys"]
    assert loading["unexpected_keys"] == beside  # the base's own head, which transformers leaves out of a classifier
    wanted = answer(wrapped.merge_and_unload())
    assert torch.allclose(answer(found.eval()), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    loratool.unmerge(tmp_path / "out", tmp_path / "adapter", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == was


@pytest.mark.parametrize("task", TASKS)
def test_the_classes_are_those_of_transformers(task: str) -> None:
    ours = {family: classifier_class(family, "", task) for family in STEMS[task] if family in MAPPINGS[task]}
    assert ours == {family: MAPPINGS[task][family] for family in ours}
    assert len(ours) > 80


def merge_head(folder: Path, config: dict[str, Any], head: str = "score.weight", **fields: Any) -> tuple[Any, Any]:
    """Merge a three-label classifier; return the report and the config that it writes."""
    base = {"model.layers.0.mlp.up_proj.weight": weights(12, 8)}
    write_model(folder / "base", base, config)
    A, B = torch.ones(2, 8), torch.ones(12, 2)
    write_peft(folder / "a", {"model.layers.0.mlp.up_proj": (A, B)}, modules_to_save=["classifier", "score"], **fields)
    file = folder / "a" / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.{head}": weights(3, 8)}, file)
    report = loratool.merge(folder / "base", folder / "a", folder / "out")
    return report, json.loads((folder / "out" / "config.json").read_text())


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
LABELS = {
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
}


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ({}, {**LLAMA, "architectures": ["LlamaForSequenceClassification"], **LABELS}),
        ({"num_labels": 2}, {**LLAMA, "architectures": ["LlamaForSequenceClassification"], "num_labels": 3, **LABELS}),
        (
            {"id2label": {"0": "a", "1": "b", "2": "c"}},
            {**LLAMA, "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}},
        ),
        ({"id2label": ["a"], "label2id": 4}, {**LLAMA, "architectures": ["LlamaForSequenceClassification"], **LABELS}),
    ],
    ids=["nothing", "another number", "their names", "nonsense"],
)
def test_labels_are_as_many_as_the_head_has_rows(said: Any, written: Any, tmp_path: Path) -> None:
    report, config = merge_head(tmp_path, {**LLAMA, **said}, task_type="SEQ_CLS")
    assert config == written
    assert not any("class" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**LLAMA, "model_type": "strange"}, "LlamaForCausalLM"),
        ({**LLAMA, "architectures": ["MyLlama"]}, "MyLlama"),
        ({"model_type": "gemma3", "text_config": {}}, "no class"),
    ],
)
def test_a_class_that_is_not_known_stays_with_a_warning(config: Any, named: str, tmp_path: Path) -> None:
    report, written = merge_head(tmp_path, config, task_type="SEQ_CLS")
    assert written == config
    line = f"score.weight: config.json names {named}; load the model with the class that the adapter was trained for"
    assert line in report.warnings


@pytest.mark.parametrize("task", ["CAUSAL_LM", None, ["SEQ_CLS"], 3])
def test_another_task_says_nothing_of_a_class(task: Any, tmp_path: Path) -> None:
    report, written = merge_head(tmp_path, LLAMA, task_type=task)
    assert written == LLAMA
    assert not any("class" in warning for warning in report.warnings)
