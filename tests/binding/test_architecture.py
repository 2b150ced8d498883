"""--architecture: PEFT loads into another class of the same weights what extract and init write for it, in full."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, few, load_model, weights, write_model
from lib.models.language_families import with_what_is_named, without
from lib.models.tiny import NOT_BUILT, build, of_class, perturb, tables

import loratool
from loratool import InputError, UsageError
from loratool.architectures.classes import classes_of

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
pytestmark = pytest.mark.filterwarnings("ignore")

# (table of classes, model type) -> the class: one of each way in which its paths are others than the declared one's
FAMILIES = {
    ("image", "llava"): "LlamaForCausalLM",
    ("image", "gemma3"): "Gemma3ForCausalLM",
    ("image", "qwen2_vl"): "Qwen2VLTextModel",
    ("image", "llama4"): "Llama4ForCausalLM",
    ("image", "mllama"): "MllamaForCausalLM",
    ("image", "mistral3"): "Mistral3Model",
    ("image", "paligemma"): "GemmaModel",
    ("causal", "llama"): "LlamaForSequenceClassification",
    ("causal", "gpt2"): "GPT2Model",
    ("causal", "bert"): "BertForMaskedLM",
}


def check(family: tuple[str, str], name: str, folder: Path) -> loratool.ExtractReport:
    """Check that PEFT makes of the class and the adapter what the class with the tuned weights is."""
    from peft import PeftModel

    kind, model = build(*family)
    base, tuned, adapter, start = (folder / each for each in ("base", "tuned", "adapter", "start"))
    model.save_pretrained(base)
    perturb(model, every=False)
    model.save_pretrained(tuned)
    same = {"allow": ("unrelated",), "architecture": name}
    report, _ = with_what_is_named(lambda **o: loratool.extract(base, tuned, adapter, rank=8, **same, **o))
    with_what_is_named(lambda **o: loratool.init(base, start, rank=1, architecture=name, **o))
    known = classes_of({**model.config.to_dict(), "architectures": [kind.__name__]})[name]
    there = {*model.state_dict(), *load_model(tuned)}
    without(kind, model, folder, [each if each in there else known.in_main_class(each) for each in report.left_out])
    loratool.merge(base, adapter, folder / "merged", undo=False)
    ours, disk = load_model(folder / "merged"), load_model(tuned)
    assert all(torch.allclose(ours[key], W, rtol=1e-4, atol=1e-6) for key, W in disk.items())
    plain = of_class(name, kind.from_pretrained(base))
    before, wanted = plain.state_dict(), of_class(name, kind.from_pretrained(tuned)).state_dict()
    for path, after in ((start, before), (adapter, wanted)):
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), path)
        result = loaded.load_adapter(path, "again")
        assert not result.missing_keys and not result.unexpected_keys
        found = loaded.merge_and_unload().state_dict()
        for key, W in after.items():
            change = float((W.double() - before[key].double()).norm())
            assert float((found[key].double() - W.double()).norm()) < 1e-5 * max(change, 1e-2), key
    return report


@pytest.mark.slow
@pytest.mark.parametrize("family", tables(), ids="-".join)
def test_peft_wraps_every_class(family: tuple[str, str], tmp_path: Path) -> None:
    if family[1] in NOT_BUILT:
        pytest.skip(NOT_BUILT[family[1]])
    kind, model = build(*family)
    model.save_pretrained(tmp_path / "base")
    again = kind.from_pretrained(tmp_path / "base").state_dict()
    if not all(key in again and torch.equal(again[key], W) for key, W in model.state_dict().items()):
        pytest.skip("transformers does not read its own file back")
    if family[0] == "causal" and any(field.endswith("encoder_layers") for field in model.config.to_dict()):
        pytest.skip("it is the decoder alone, of which there is no other class")
    names = classes_of({**model.config.to_dict(), "architectures": [kind.__name__]})
    not_made = []
    for name in [name for name in names if name != kind.__name__]:
        try:
            other = of_class(name, model)
        except Exception as error:
            not_made.append(f"{name} ({error})")
            continue
        head = other.get_output_embeddings()
        tied = head is not None and head.weight is other.get_input_embeddings().weight
        if tied and not torch.equal(head.weight, model.get_output_embeddings().weight):
            not_made.append(f"{name} (it ties the head that {kind.__name__} keeps apart)")
            continue
        try:
            check(family, name, tmp_path / name)
        except InputError as error:
            assert "no adapter of a" in error.message or "nothing else is left" in error.message
    if not_made:
        pytest.skip(f"all of {len(names) - 1} but these, which cannot be made of it: {', '.join(not_made)}")


@pytest.mark.parametrize(
    "family",
    few(FAMILIES, ("image", "gemma3"), ("image", "mistral3"), ("causal", "gpt2"), ("causal", "bert")),
    ids="-".join,
)
def test_peft_wraps_the_class_that_is_named(family: tuple[str, str], tmp_path: Path) -> None:
    report = check(family, FAMILIES[family], tmp_path)
    left = {name for name in report.left_out if "vision" in name or "visual" in name}
    assert bool(left) == (family[0] == "image" and not FAMILIES[family].startswith("Mistral3"))
    assert not left or any(f"{FAMILIES[family]} has no " in line for line in report.warnings)


def test_a_class_that_there_is_not(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"model.layers.0.mlp.up_proj.weight": weights(8, 8)}, LLAMA)
    with pytest.raises(UsageError, match="has no class of|not a class of") as error:
        loratool.init(base, tmp_path / "a", architecture="LlamaForCasualLM")
    assert error.value.culprit == "LlamaForCasualLM"
    assert (error.value.remedy or "").startswith("there are LlamaForCausalLM, LlamaModel, LlamaForSequenceClass")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("architecture", "task"), [(None, "CAUSAL_LM"), ("LlamaModel", None), ("LlamaForSequenceClassification", None)]
)
def test_the_task_is_the_chosen_classs(architecture: str | None, task: str | None, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"model.layers.0.mlp.up_proj.weight": weights(8, 8)}, LLAMA)
    loratool.init(base, tmp_path / "a", rank=2, architecture=architecture)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["task_type"] == task
    assert config["target_modules"] == [("" if architecture == "LlamaModel" else "model.") + "layers.0.mlp.up_proj"]


def test_an_image_model_has_no_other_class(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is for language models"):
        loratool.init(FIXTURES / "sdxl" / "base.safetensors", tmp_path / "a.safetensors", architecture="LlamaModel")
