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
from lib.models.tiny import shrink
from safetensors.torch import load_file, save_file
from transformers.models.auto import modeling_auto

import loratool
from loratool.architectures.classifiers import CLASSES, classes_of_tasks, classifier_class

AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
MAPPINGS = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "images": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "sounds": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "choices": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
}
# Families whose class for images depends on the config, or whose head is not transformers'
LEFT_OUT = {"perceiver", "shieldgemma2", "timm_wrapper"}
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
ENCODERS = ("modernbert", "electra", "xlm-roberta")
TOKENS = torch.arange(3, 15).view(2, 6)
# (model type, task, the auto class of the base)
CASES = [
    *((kind, "SEQ_CLS", "AutoModelForCausalLM" if kind in GENERATIVE else "AutoModel") for kind in MODELS),
    *((kind, "QUESTION_ANS", "AutoModel") for kind in MODELS),  # transformers loads no LlamaForCausalLM as its class
    *(
        (kind, task, "AutoModelForCausalLM" if kind in GENERATIVE else "AutoModelForMaskedLM")
        for task in ("TOKEN_CLS", "FEATURE_EXTRACTION")
        for kind in MODELS
    ),
]
QUICK = [("roberta", "SEQ_CLS"), ("bert", "TOKEN_CLS"), ("llama", "SEQ_CLS"), ("distilbert", "QUESTION_ANS")]


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS))
    kept = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return torch.cat([found[name].flatten() for name in kept if name in found])


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
    model = cls.from_pretrained(tmp_path / "base", **({"num_labels": 3} if task.endswith("CLS") else {}))
    saved = {"modules_to_save": ["pooler", "classifier"]} if kind == "deberta-v2" and task == "SEQ_CLS" else {}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type=task, target_modules=targets, **saved)).eval()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data.normal_(0, 0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    was = (tmp_path / "base" / "config.json").read_bytes()
    report = loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found, loading = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert found.config.num_labels == model.config.num_labels and found.config.architectures == [type(model).__name__]
    assert any(f"config.json names {type(model).__name__}" in note for note in report.notes)
    untrained = {key for key in loading["missing_keys"] if task != "SEQ_CLS" and "pooler." in key}
    assert loading["missing_keys"] == untrained and not loading["mismatched_keys"]  # those poolers do not count
    beside = cls.from_pretrained(tmp_path / "base", output_loading_info=True)[1]["unexpected_keys"]
    assert loading["unexpected_keys"] == beside  # the base's own head, which transformers leaves out of a classifier
    wanted = answer(wrapped.merge_and_unload())
    assert torch.allclose(answer(found.eval()), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    loratool.unmerge(tmp_path / "out", tmp_path / "adapter", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == was


@pytest.mark.slow
@pytest.mark.parametrize("kind", "gemma3 qwen3_5 gemma3_text mistral opt modernbert electra xlm-roberta".split())
def test_other_families_and_models_inside_of_others(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind)
    shrink(config)
    for each in (config, getattr(config, "text_config", config)):
        each.pad_token_id = 0
    base = transformers.AutoModelForImageTextToText if kind in ("gemma3", "qwen3_5") else None
    base = base or (transformers.AutoModelForMaskedLM if kind in ENCODERS else transformers.AutoModelForCausalLM)
    base.from_config(config).save_pretrained(tmp_path / "base")
    cls = transformers.AutoModelForSequenceClassification
    wanted = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
    wrapped = peft.get_peft_model(cls.from_pretrained(tmp_path / "base", num_labels=3), wanted).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found, loading = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    theirs = answer(wrapped)
    assert torch.allclose(answer(found.eval()), theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    inner = json.loads((tmp_path / "out" / "config.json").read_text()).get("text_config", {})
    assert not inner.keys() & {"architectures", "id2label"}


@pytest.mark.slow
@pytest.mark.parametrize("base", ["AutoModel", "AutoModelForMaskedImageModeling"])
def test_a_classifier_of_images_needs_no_task(base: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model("vit", intermediate_size=24, encoder_stride=4, **sizes)
    getattr(transformers, base).from_config(config).save_pretrained(tmp_path / "base")
    cls = transformers.AutoModelForImageClassification
    model = cls.from_pretrained(tmp_path / "base", num_labels=5)
    wanted = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])
    wrapped = peft.get_peft_model(model, wanted).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    loratool.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found, loading = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and found.config.architectures == [type(model).__name__]
    with torch.no_grad():
        pixels = torch.randn(2, 3, 16, 16)
        logits, theirs = (each.eval()(pixel_values=pixels).logits for each in (found, wrapped))
    assert torch.allclose(logits, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.slow
def test_a_model_of_features_is_verified_and_merged_into_again(tmp_path: Path) -> None:
    sizes, targets = MODELS["llama"]
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, "tie_word_embeddings": True}))
    base.save_pretrained(tmp_path / "base")
    for task in ("FEATURE_EXTRACTION", "CAUSAL_LM"):
        model = transformers.AutoModel if task == "FEATURE_EXTRACTION" else transformers.AutoModelForCausalLM
        config = peft.LoraConfig(r=2, task_type=task, target_modules=targets, init_lora_weights=False)
        peft.get_peft_model(model.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / task)
    loratool.merge(tmp_path / "base", tmp_path / "FEATURE_EXTRACTION", tmp_path / "out")
    assert loratool.verify(tmp_path / "base", tmp_path / "FEATURE_EXTRACTION", tmp_path / "out").status == "proven"
    loratool.merge(tmp_path / "out", tmp_path / "CAUSAL_LM", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["LlamaModel"]
    loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)[1]
    assert not loading["missing_keys"]
    loratool.unmerge(tmp_path / "again", tmp_path / "CAUSAL_LM", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


@pytest.mark.parametrize("task", CLASSES)
def test_the_classes_are_those_of_transformers(task: str) -> None:
    named = {kind: name if isinstance(name, str) else name[0] for kind, name in MAPPINGS[task].items()}
    ours = {kind: classifier_class(kind, "", task) for kind in CLASSES[task] if kind in named}
    assert ours == {kind: named[kind] for kind in ours}
    assert named.keys() - ours.keys() <= LEFT_OUT


def merge_head(
    folder: Path,
    config: dict[str, Any],
    head: str = "score.weight",
    *,
    rows: int = 3,
    out: str = "out",
    architecture: str | None = None,
    labels: tuple[str, ...] = (),
    **fields: Any,
) -> tuple[Any, Any]:
    """Merge a classifier's adapter; return the report and the config that it writes."""
    base = {"model.layers.0.mlp.up_proj.weight": weights(12, 8)}
    write_model(folder / "base", base, config)
    A, B = torch.ones(2, 8), torch.ones(12, 2)
    saved = ["classifier", "score", "qa_outputs"]
    write_peft(folder / "a", {"model.layers.0.mlp.up_proj": (A, B)}, modules_to_save=saved, **fields)
    file = folder / "a" / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.{head}": weights(rows, 8)}, file)
    report = loratool.merge(folder / "base", folder / "a", folder / out, architecture=architecture, labels=labels)
    written = folder / out / "config.json"
    return report, json.loads(written.read_text()) if written.exists() else None


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


UNKNOWN = "set its architectures to the class that the adapter was trained for"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**LLAMA, "model_type": "strange"}, "LlamaForCausalLM"),
        ({**LLAMA, "architectures": ["MyLlama"]}, "MyLlama"),
        ({"model_type": "strange", "text_config": {}}, "no class"),
    ],
)
def test_a_class_that_is_not_known_stays_with_a_warning(config: Any, named: str, tmp_path: Path) -> None:
    report, written = merge_head(tmp_path, config, task_type="SEQ_CLS")
    assert written == config
    options = "and id2label for its 3 labels (--architecture NAME, --labels A,B,...)"
    assert f"score.weight: config.json names {named}; {UNKNOWN}, {options}" in report.warnings
    report, written = merge_head(tmp_path / "said", config, task_type="SEQ_CLS", architecture="Mine", labels=[*"abc"])
    assert not any("config.json" in warning for warning in report.warnings)
    assert written["architectures"] == ["Mine"] and written["label2id"] == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize("task", ["CAUSAL_LM", None, ["SEQ_CLS"], 3])
def test_without_a_task_a_head_of_several_classes_gets_its_labels_and_a_warning(task: Any, tmp_path: Path) -> None:
    report, written = merge_head(tmp_path, LLAMA, task_type=task)
    assert written == {**LLAMA, **LABELS}
    both = "LlamaForSequenceClassification or LlamaForTokenClassification"
    assert any(f"{UNKNOWN}: {both} (--architecture NAME)" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("kind", "head", "name"),
    [
        ("llama", "qa_outputs.weight", "LlamaForQuestionAnswering"),
        ("xlnet", "qa_outputs.weight", "XLNetForQuestionAnsweringSimple"),
        ("roberta", "classifier.out_proj.weight", "RobertaForSequenceClassification"),
        ("vit", "classifier.weight", "ViTForImageClassification"),
        ("resnet", "classifier.1.weight", "ResNetForImageClassification"),
        ("gptj", "score.weight", "GPTJForSequenceClassification"),
        ("wav2vec2", "classifier.weight", None),  # of a whole recording or of each frame
    ],
)
def test_without_a_task_the_head_tells(kind: str, head: str, name: str | None, tmp_path: Path) -> None:
    report, written = merge_head(tmp_path, {"model_type": kind}, head)
    assert written.get("architectures") == ([name] if name else None)
    assert any(UNKNOWN in warning for warning in report.warnings) == (name is None)


CLASSIFIER = {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}
THEIRS = {"id2label": {"0": "x", "1": "y", "2": "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}


@pytest.mark.parametrize("beside", [False, True], ids=["in adapter_config.json", "in a config.json beside it"])
def test_the_adapters_labels_win(beside: bool, tmp_path: Path) -> None:
    said = {"label2id": {"z": 2, "x": 0, "y": 1}, "problem_type": "multi_label_classification"}
    kept = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    if beside:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "config.json").write_text(json.dumps(said))
    report, written = merge_head(tmp_path, {**CLASSIFIER, **kept}, "classifier.weight", **({} if beside else said))
    assert written == {**CLASSIFIER, **THEIRS, "problem_type": "multi_label_classification"}
    assert any("3 labels, x, y, z" in note for note in report.notes)


def test_the_class_in_a_config_beside_the_adapter_tells(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps({"architectures": ["LlamaForTokenClassification"]}))
    assert merge_head(tmp_path, LLAMA)[1]["architectures"] == ["LlamaForTokenClassification"]


@pytest.mark.parametrize("rows", [1, 2, 12])
def test_labels_are_written_as_transformers_writes_them(rows: int, tmp_path: Path) -> None:
    config = transformers.BertConfig(num_labels=rows)
    config.save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "config.json").read_text())
    _, ours = merge_head(tmp_path, {"model_type": "bert"}, "classifier.weight", rows=rows, task_type="SEQ_CLS")
    for key in ("id2label", "label2id"):
        assert list(ours.get(key, {}).items()) == list(theirs.get(key, {}).items())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"labels": ["a", "b"]}, "score.weight: has 3 rows, and labels names 2"),
        ({"labels": ["a", "b", "a"]}, "score.weight: labels names a label twice"),
        ({"architecture": "LlamaForSequenceClasification"}, "LlamaForSequenceClasification: is not a class of a llama"),
        ({"architecture": "no class"}, "no class: is not the name of a class"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused(choice: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(loratool.InputError) as error:
        merge_head(tmp_path, LLAMA, **choice)
    assert message in str(error.value)
    if "architecture" in choice and " " not in choice["architecture"]:
        assert "LlamaForSequenceClassification" in str(error.value.remedy)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("shape", [(), (0, 8)])
def test_a_head_without_rows_is_refused(shape: tuple[int, ...], has_config: bool, tmp_path: Path) -> None:
    merge_head(tmp_path, LLAMA)
    if not has_config:
        (tmp_path / "base" / "config.json").unlink()
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.score.weight": torch.ones(shape)}, path)
    with pytest.raises(loratool.InputError, match="score.weight: is a head without rows"):
        loratool.merge(tmp_path / "base", tmp_path / "a", tmp_path / "other")


def test_a_class_can_be_chosen_without_a_head_and_labels_cannot(tmp_path: Path) -> None:
    up = "model.layers.0.mlp.up_proj"
    write_model(tmp_path / "base", {f"{up}.weight": weights(12, 8)}, LLAMA)
    write_peft(tmp_path / "a", {up: (torch.ones(2, 8), torch.ones(12, 2))}, task_type="SEQ_CLS")
    report = loratool.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", architecture="LlamaModel")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaModel"]
    assert any("its weights will be random" in warning for warning in report.warnings)
    with pytest.raises(loratool.InputError, match="has no head of a classifier"):
        loratool.merge(tmp_path / "base", tmp_path / "a", tmp_path / "other", labels=["a"])


def test_a_layer_beside_the_head_that_nobody_has_is_announced(tmp_path: Path) -> None:
    report, _ = merge_head(tmp_path, {"model_type": "bert"}, "classifier.weight", task_type="SEQ_CLS")
    assert any(line.startswith("BertForSequenceClassification has layers under names") for line in report.warnings)


def test_a_single_file_says_that_its_config_is_missing(tmp_path: Path) -> None:
    report, _ = merge_head(tmp_path, LLAMA, task_type="SEQ_CLS", out="out.safetensors")
    assert any("the base's config is wrong about the class and its labels" in line for line in report.warnings)


def test_every_family_knows_its_classes() -> None:
    assert classes_of_tasks("bert")[0] == "BertForSequenceClassification"
    assert not classes_of_tasks(None)
