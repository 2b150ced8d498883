"""Models whose layers can be repeated: where the layers are, and which fields of config.json speak of each of them.

PEFT's `layer_replication` repeats layers of a base under new numbers (`replicate_layers` in
`peft/tuners/tuners_utils.py`). A copy works like its layer if the model's class looks at no number of a layer, except
in these fields. All types here were checked in transformers 5.24.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import InputError, brief
from .backbones import BACKBONES

# Types whose layers differ in nothing but their tensors and what the fields below say
TYPES = frozenset(
    """apertus arcee bert bert-generation bitnet bloom camembert codegen cohere cohere2 ctrl data2vec-text deberta
    deberta-v2 electra ernie ernie4_5 exaone4 falcon flex_olmo gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode
    gpt_neox gpt_oss gptj granite granitemoe granitemoeshared helium hunyuan_v1_dense hyperclovax jais2 jetmoe layoutlm
    llama megatron-bert ministral3 mistral mixtral nanochat nemotron olmo olmo2 olmo3 olmoe persimmon phi phi3
    qwen2 qwen2_moe qwen3 qwen3_moe rembert roberta roberta-prelayernorm roformer seed_oss smollm3 stablelm starcoder2
    xlm-roberta xlm-roberta-xl""".split()
)

# Fields that hold the number of layers, and fields that hold a value for each layer
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LISTS = ("layer_types", "no_rope_layers")

# A type -> the list without which its class computes the kind of a layer from its number
_NEEDED = {
    **dict.fromkeys("cohere2 exaone4 gemma2 gemma3_text gpt_oss olmo3".split(), "layer_types"),
    "smollm3": "no_rope_layers",
}

# Fields with which the number of a layer matters, unless their value is this or a list takes their place
_BY_NUMBER = {
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "use_sliding_window": (False, "layer_types"),
}


def find_layers(names: Iterable[str], model_type: str | None) -> tuple[str, int] | None:
    """Return the path of the layers that PEFT would repeat, with a dot at the end, and how many there are.

    They are the backbone's "layers", "encoder.layer" or "h". Return None if there are none, or if their numbers do not
    rise from 0.
    """
    prefixes = "|".join(dict.fromkeys(filter(None, ("model", "bert", BACKBONES.get(model_type or "")))))
    pattern = re.compile(rf"((?:(?:{prefixes})\.)*(?:layers|encoder\.layer|h)\.)(0|[1-9]\d{{0,8}})\.")
    found: dict[str, set[int]] = {}
    for match in filter(None, map(pattern.match, names)):
        found.setdefault(match[1], set()).add(int(match[2]))
    if len(found) != 1:
        return None
    [(path, numbers)] = found.items()
    return (path, len(numbers)) if max(numbers) + 1 == len(numbers) else None


def with_layers(config: Mapping[str, Any], count: int, numbers: Sequence[int]) -> dict[str, Any]:
    """Return the config.json of a model with other layers.

    Args:
        count: how many layers the files of the former model have.
        numbers: of the former layers, in the order of the new ones.

    Raises:
        InputError: the class may look at the number of a layer, or the config contradicts the files.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in TYPES:
        raise InputError(f"layers of a model of type {brief(model_type)} may depend on their number")
    counts = [field for field in _COUNTS if field in config]
    lists = [field for field in LISTS if config.get(field) is not None]
    for field in counts:
        if type(config[field]) is not int or config[field] != count:
            raise InputError(f"config.json sets {field} to {brief(config[field])}, and the files have {count} layers")
    for field in lists:
        if not isinstance(config[field], list) or len(config[field]) != count:
            raise InputError(f"config.json has no {field} of {count} layers, as many as the files have")
    if model_type in _NEEDED and _NEEDED[model_type] not in lists:
        raise InputError(f"config.json has no {_NEEDED[model_type]}, so that the kind of a layer follows its number")
    for field, (neutral, instead) in _BY_NUMBER.items():
        if config.get(field, neutral) not in (neutral, None) and instead not in lists:
            raise InputError(f"config.json sets {field}, with which a layer depends on its number")
    repeated = {field: [config[field][number] for number in numbers] for field in lists}
    return {**config, **dict.fromkeys(counts or _COUNTS[:1], len(numbers)), **repeated}
