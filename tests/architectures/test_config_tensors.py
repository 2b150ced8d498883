"""Hold names and shapes of each family against transformers' model on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from lib.models.configs import DEBERTA, ENCODERS, GPT2, GROUPED, REAL, SMALL, small

from loratool.architectures.config_tensors import CONFIG_FAMILIES, tensor_shapes
from loratool.architectures.projections import PROJECTION_NAMES, PROJECTIONS, projections
from loratool.errors import InputError


def theirs(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return `named_parameters` of the class that the config names, or of the family's usual one."""
    fields = {key: value for key, value in config.items() if key not in ("model_type", "n_ctx")}
    family = CONFIG_FAMILIES[config["model_type"]]
    usual = family.bare if config["model_type"] in ENCODERS else family.lm
    made = transformers.AutoConfig.for_model(config["model_type"], **fields)
    with torch.device("meta"):
        model = getattr(transformers, config.get("architectures", [usual])[0])(made)
    model.tie_weights()
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("model_type", CONFIG_FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["bare", "lm"])
def test_each_class_of_each_family(model_type: str, kind: str, tied: bool) -> None:
    named = getattr(CONFIG_FAMILIES[model_type], kind)
    config = {**small(model_type), "architectures": [named], "tie_word_embeddings": tied}
    assert tensor_shapes(config) == theirs(config)


@pytest.mark.parametrize("model_type", CONFIG_FAMILIES)
@pytest.mark.parametrize(
    "more",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 24},
        {"add_cross_attention": True, "is_decoder": True},
    ],
    ids=lambda more: next(iter(more)),
)
def test_fields_that_change_a_family(model_type: str, more: dict[str, Any]) -> None:
    config = {**small(model_type), **more}
    assert tensor_shapes(config) == theirs(config)


@pytest.mark.parametrize(
    "config",
    [
        DEBERTA,
        {**DEBERTA, "share_att_key": False},
        {**DEBERTA, "share_att_key": False, "pos_att_type": ["c2p"], "embedding_size": 16, "type_vocab_size": 2},
        {**DEBERTA, "position_biased_input": True, "norm_rel_ebd": "none", "attention_head_size": 16},
        {**DEBERTA, "legacy": False, "position_buckets": -1},
        {**DEBERTA, "position_buckets": -1, "max_relative_positions": 7, "relative_attention": False},
        {**DEBERTA, "position_buckets": -1, "max_relative_positions": 7},
        {**GPT2, "n_inner": 80},
        {**GPT2, "architectures": ["GPT2Model"], "n_embd": 48, "n_head": 3},
        {"model_type": "llama", **GROUPED, "num_key_value_heads": None},
        {"model_type": "qwen2", **GROUPED, "num_key_value_heads": None},
        {"model_type": "phi3", **GROUPED, "num_key_value_heads": None},
        {"model_type": "gpt2", **SMALL},  # the common spelling; intermediate_size means nothing to this family
    ],
)
def test_fields_of_one_family(config: dict[str, Any]) -> None:
    assert tensor_shapes(config) == theirs(config)


@pytest.mark.parametrize("model_type", CONFIG_FAMILIES)
def test_defaults_of_fields_left_out(model_type: str) -> None:
    """One layer of whatever size the family's config class starts with."""
    config = {"model_type": model_type, "n_layer" if model_type == "gpt2" else "num_hidden_layers": 1}
    assert tensor_shapes(config) == theirs(config)


@pytest.mark.parametrize("name", REAL)
def test_real_models(name: str) -> None:
    assert tensor_shapes(REAL[name]) == theirs(REAL[name])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "falcon"}, r"(?s)'falcon' is not among .*name the checkpoint"),
        ({"model_type": ["llama"]}, "is not among"),
        ({"model_type": None}, "names no model_type"),
        ({"hidden_size": "32"}, "hidden_size: config.json says '32'"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"num_key_value_heads": 2.0}, "num_key_value_heads"),
    ],
)
def test_a_config_that_is_none(change: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        tensor_shapes({**small("llama"), **change})


@pytest.mark.parametrize("model_type", CONFIG_FAMILIES)
def test_every_linear_layer_of_a_known_family_has_its_role(model_type: str) -> None:
    paths = {name.removesuffix(".weight") for name, shape in tensor_shapes(small(model_type)).items() if len(shape) > 1}
    inside = [path for path in paths if ".0." in path and not path.endswith("mlp.gate")]
    found = [role for path in inside for role in projections(path)]
    gated = [] if model_type in (*ENCODERS, "gpt2") else ["gate_proj"]
    assert sorted(found) == sorted([role for role in PROJECTION_NAMES if role != "gate_proj"] + gated)
    assert all(set(roles) <= set(PROJECTION_NAMES) for roles in PROJECTIONS.values())
