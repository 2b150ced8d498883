"""--architecture: PEFT loads into another class of the same weights what extract and init write for it, in full."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from conftest import FIXTURES, weights, write_model
from language_families import with_what_is_named
from tiny import build, of_class, perturb, tables

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
    ("causal", "llama"): "LlamaForSequenceClassification",
    ("causal", "gpt2"): "GPT2Model",
    ("causal", "bert"): "BertForMaskedLM",
}


def check(family: tuple[str, str], name: str, folder: Path) -> loratool.ExtractReport:
    from peft import PeftModel

    _, model = build(*family)
    plain = of_class(name, model)
    model.save_pretrained(folder / "base")
    before = {key: W.clone() for key, W in plain.state_dict().items()}
    perturb(model, every=False)
    model.save_pretrained(folder / "tuned")
    wanted = of_class(name, model).state_dict()
    same = {"allow": ("unrelated",), "architecture": name}
    paths = folder / "base", folder / "tuned", folder / "adapter"
    report, _ = with_what_is_named(lambda **o: loratool.extract(*paths, rank=8, **same, **o))
    start = folder / "base", folder / "start"
    with_what_is_named(lambda **o: loratool.init(*start, rank=1, architecture=name, **o))
    for adapter in ("adapter", "start"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), folder / adapter)
        result = loaded.load_adapter(folder / adapter, "again")
        assert not result.missing_keys and not result.unexpected_keys
        found = loaded.merge_and_unload().state_dict()
        for key, W in (wanted if adapter == "adapter" else before).items():
            if key in found and key.partition(".")[0] not in ("score", "classifier") and W.is_floating_point():
                change = float((W - before[key]).norm())
                assert float((found[key] - W).norm()) < 1e-5 * max(change, 1e-2), key
    return report


@pytest.mark.slow
@pytest.mark.parametrize("family", tables(), ids="-".join)
def test_peft_wraps_every_class(family: tuple[str, str], tmp_path: Path) -> None:
    try:
        kind, model = build(*family)
    except Exception as error:
        pytest.skip(f"cannot be made so small: {error}")
    names = classes_of({**model.config.to_dict(), "architectures": [kind.__name__]})
    for name in [name for name in names if name != kind.__name__]:
        try:
            of_class(name, model)
        except Exception as error:
            pytest.skip(f"{name} cannot be made so small: {error}")
        try:
            check(family, name, tmp_path / name)
        except InputError as error:
            assert "no adapter of a" in error.message or "nothing else is left" in error.message


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
def test_peft_wraps_the_class_that_is_named(family: tuple[str, str], tmp_path: Path) -> None:
    report = check(family, FAMILIES[family], tmp_path)
    left = {name for name in report.left_out if "vision" in name or "visual" in name}
    assert bool(left) == (family[0] == "image" and not FAMILIES[family].startswith("Mistral3"))
    assert not left or any(f"{FAMILIES[family]} has no " in line for line in report.warnings)


def test_a_class_that_there_is_not(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"model.layers.0.mlp.up_proj.weight": weights(8, 8)}, LLAMA)
    with pytest.raises(UsageError, match="no class of") as error:
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
