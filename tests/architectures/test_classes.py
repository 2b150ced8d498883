"""Hold the classes and their paths to those that transformers builds."""

from __future__ import annotations

from typing import Any

import pytest
from lib.models.tiny import shrink

from loratool.architectures.backbones import BACKBONES
from loratool.architectures.classes import classes_of

pytestmark = pytest.mark.filterwarnings("ignore")
MAPPINGS = "IMAGE_TEXT_TO_TEXT MULTIMODAL_LM SEQ_TO_SEQ_CAUSAL_LM CAUSAL_LM MASKED_LM".split()

# One of each way in which a class has its paths
REPRESENTATIVES = """llama gpt2 bert roberta albert t5 bart llava gemma3 qwen2_vl llama4 mllama blip-2 idefics3
    minimax_m3_vl""".split()


def main_classes() -> dict[str, list[str]]:
    """Map each model type to its classes with a language model's head."""
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, list[str]] = {}
    for mapping in MAPPINGS:
        for kind, name in getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            found.setdefault(kind, []).append(name if isinstance(name, str) else name[0])
    return {kind: list(dict.fromkeys(names)) for kind, names in found.items()}


def state(name: str, config: Any) -> tuple[set[str], Any]:
    """Return the names of a class's tensors, and the config that it has."""
    import torch
    import transformers

    kind = getattr(transformers, name)
    if kind.config_class is not None and not isinstance(config, kind.config_class):
        config = config.get_text_config()
    if "is_decoder" in vars(config):
        config.is_decoder = name.endswith(("CausalLM", "LMHeadModel"))
    with torch.device("meta"):
        return set(kind(config).state_dict()), config


def is_new(name: str) -> bool:
    """Return whether a class may have a tensor that the main one has not: a task's head, a pooler."""
    heads = "score classifier qa_outputs pre_classifier classification_head sequence_summary logits_proj head dense"
    return name.partition(".")[0] in {*heads.split(), "pooler"} or ".pooler." in name


def check(kind: str, main: str) -> None:
    import transformers

    try:
        config = transformers.AutoConfig.for_model(kind)
        shrink(config)
        whole, config = state(main, config)
    except Exception as error:
        pytest.skip(f"cannot be made so small: {error}")
    if config.model_type == kind and kind != "gpt-sw3":
        known = classes_of({**config.to_dict(), "architectures": [main]})
        assert all(known[main].path(name) == name for name in whole) if known else kind.endswith("encoder-decoder")
    else:  # the type is that of a model with a tower, the class that of its text model
        known = {}
    for name, found in known.items():
        if name != main and not (kind == "qwen2_5_omni" and "Text" not in name):  # which have no config alone
            there, _ = state(name, config)
            assert {found.path(each) for each in whole} - {""} <= there, name
            decoder = main.endswith("ForCausalLM") and any(each.startswith(("encoder.", "model.enc")) for each in there)
            assert decoder or {found.path(each) for each in whole} >= {e for e in there if not is_new(e)}, name


@pytest.mark.parametrize("kind", REPRESENTATIVES)
def test_the_paths_are_those_of_the_class(kind: str) -> None:
    check(kind, main_classes()[kind][0])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "main"), [(kind, main) for kind, mains in main_classes().items() for main in mains])
def test_the_paths_of_every_class(kind: str, main: str) -> None:
    check(kind, main)


def wrapper(kind: str, declared: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": kind, "architectures": [declared], **fields}


OPT = {"text_config": {"model_type": "opt"}}
THINKER = {"thinker_config": {"text_config": {"model_type": "qwen2_5_omni_text"}}}


@pytest.mark.parametrize(
    ("config", "name", "whole", "path"),
    [
        (wrapper("llava", "LlavaForConditionalGeneration"), "LlamaForCausalLM", "lm_head.weight", "lm_head.weight"),
        (
            wrapper("llava", "LlavaModel"),
            "LlavaForConditionalGeneration",
            "model.vision_tower.x",
            "model.vision_tower.x",
        ),
        (wrapper("llava", "LlavaModel"), "LlavaModel", "model.vision_tower.x", "vision_tower.x"),
        (
            wrapper("blip-2", "Blip2ForConditionalGeneration", **OPT),
            "OPTForCausalLM",
            "language_model.lm_head",
            "lm_head",
        ),
        (wrapper("qwen2_5_omni", "Qwen2_5OmniModel", **THINKER), "Qwen2_5OmniThinkerTextModel", "talker.x", ""),
        (wrapper("bert", "BertForPreTraining"), "BertForMaskedLM", "cls.seq_relationship.weight", ""),
        (wrapper("bert", "BertForPreTraining"), "BertForPreTraining", "bert.pooler.dense", "bert.pooler.dense"),
        (wrapper("bert", "BertForMaskedLM"), "BertForMaskedLM", "bert.pooler.dense", ""),
        (wrapper("llama", "LlamaForSequenceClassification"), "LlamaForCausalLM", "score.weight", ""),
        (
            wrapper("llama", "LlamaForSequenceClassification"),
            "LlamaForSequenceClassification",
            "score.weight",
            "score.weight",
        ),
    ],
)
def test_what_no_model_that_is_built_shows(config: dict[str, Any], name: str, whole: str, path: str) -> None:
    assert classes_of(config)[name].path(whole) == path


def test_no_classes_are_known_of_two_models_in_one_or_none() -> None:
    assert not classes_of({}) and not classes_of({"model_type": "vision-encoder-decoder"})


@pytest.mark.slow
def test_every_type_with_other_classes_has_its_backbone_where_transformers_says() -> None:
    """That is where the modules are, but for T5 and the like, whose main class has no backbone."""
    import transformers

    own = "encoder-decoder longt5 mt5 switch_transformers t5 umt5".split()
    inner = "Llama4ForCausalLM", "MllamaForCausalLM"  # whose backbone is `model`, as their names in a wrapper are not
    for kind, mains in main_classes().items():
        for main in mains if kind not in own else ():
            prefix = getattr(transformers, main).base_model_prefix
            known = classes_of({"model_type": kind, "architectures": [main]})
            assert len(known) < 2 or main in inner or prefix == BACKBONES.get(kind, "model"), kind


def test_a_module_moves_as_its_tensors() -> None:
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    found = classes_of({**config, "text_config": {"model_type": "llama"}})["LlamaForCausalLM"]
    assert found.path("lm_head") == "lm_head" and found.path("lm_head.weight") == "lm_head.weight"
    assert found.path("model.language_model.norm") == "model.norm" and not found.path("lm_head_of_another.weight")
