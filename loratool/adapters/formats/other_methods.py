"""Recognize files of other methods than LoRA, and describe what can be done with them.

A merge refuses such a file with the reason, and `inspect` describes it; both use one table. A method is recognized by
PEFT's `peft_type`, or by a mark in the names of its tensors. Sources of the names: peft
(`peft/utils/save_and_load.py`), of AdapterHub's adapters (`adapters/loading.py`: `M.adapters.NAME.adapter_down.0`),
the code of Lin et al. (zlinao/VGLM: `adapter_block.mixadapter.0.project_down`), and the state of a Segment
Anything with LoRA (JamesQFreeman/Sam_LoRA: `_LoRA_qkv`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ...architectures.numbered_names import split_numbers
from ...errors import InputError
from ..updates import peft_methods
from .extras import find_extras

EXTRACT_REMEDY = "merge it with the tool that wrote it; then `loratool extract` makes an adapter from the merged model"

# the supported values of `peft_type`
READ = ("LORA", "TRAINABLE_TOKENS", "LN_TUNING", *peft_methods())

# outcome -> its text in a report
OUTCOMES = {
    "merged": "can be merged",
    "extracted": "can be extracted, not merged",
    "neither": "can be neither merged nor extracted",
}


@dataclass(frozen=True)
class OtherMethod:
    """A method that is not LoRA, or a file of LoRA that no format claims."""

    title: str
    outcome: str  # a key of OUTCOMES
    reason: str  # follows "which" in a message
    marks: tuple[str, ...] = ()  # prefixes of a part of a tensor's name, after a dot
    remedy: str | None = None  # the way to the outcome


_INPUTS = "adds inputs, and no weight could hold them"

_KEYS = "adds keys and values to every layer, and no weight could hold them"

_MIXES = "mixes matrices depending on its input, and no weight could hold that"

_UNSUPPORTED = "is not supported yet"

_EXTRACT = "`loratool extract BASE MODEL` makes an adapter of the change"

_BY_PEFT = f"merge it with peft (merge_and_unload), save the model, and {_EXTRACT}"

_BY_PEFT_THERE = _BY_PEFT.replace(" (merge_and_unload)", " (merge_and_unload) where it was trained", 1)

_ONE_BY_ONE = "each of the adapters that it chooses from can be merged by itself"

_BY_ADAPTERS = (
    "merge it with adapters (merge_adapter, exact for LoRA), save the model without its .loras. tensors, and "
    + _EXTRACT
)

# peft_type, or a similar key for a method that PEFT lacks -> the method. Of several marks the first row counts.
OTHER_METHODS = {
    "BOTTLENECK": OtherMethod(
        "a bottleneck adapter (Houlsby, Lin, Pfeiffer, Rücklé)",
        "neither",
        "adds layers, and no weight could hold them",
        ("adapter_down", "adapter_up.weight", "mixadapter.", "invertible_adapters."),
    ),
    "PREFIX_TUNING": OtherMethod("prefix tuning", "neither", _KEYS, ("prefix_tunings.", "prefix_gates.")),
    "CARTRIDGE": OtherMethod("Cartridge", "neither", _KEYS),
    "PROMPT_TUNING": OtherMethod("prompt tuning", "neither", _INPUTS, ("prompt_tunings.",)),
    "MULTITASK_PROMPT_TUNING": OtherMethod("multitask prompt tuning", "neither", _INPUTS),
    "P_TUNING": OtherMethod("P-tuning", "neither", _INPUTS),
    "CPT": OtherMethod("context-aware prompt tuning", "neither", _INPUTS),
    "ADAPTION_PROMPT": OtherMethod(
        "LLaMA-Adapter", "neither", "adds inputs to its layers, and no weight could hold them"
    ),
    "PROMPT": OtherMethod("prompt or prefix tuning", "neither", _INPUTS, ("prompt_embeddings",)),
    "REFT": OtherMethod("ReFT", "neither", "edits hidden states, and no weight could hold that", ("refts.",)),
    "XLORA": OtherMethod("X-LoRA", "neither", _MIXES, ("internal_xlora_classifier.",), _ONE_BY_ONE),
    "ARROW": OtherMethod("Arrow", "neither", _MIXES, (), _ONE_BY_ONE),
    "LORAMOE": OtherMethod("LoRAMoE or HydraLoRA", "neither", _MIXES),
    "LILY": OtherMethod("Lily", "neither", _MIXES, ("lily_A.", "lily_B.", "lily_router.")),
    "POLY": OtherMethod(
        "Poly",
        "neither",
        "mixes matrices depending on the task of its input, and no weight could hold that",
        ("poly_lora_", "poly_router."),
    ),
    "ALORA": OtherMethod(
        "an activated LoRA (aLoRA)", "neither", "acts on a part of the prompt only, and no weight could hold that"
    ),
    "SHADOW": OtherMethod(
        "Shadow",
        "neither",
        "runs a second network beside the layers, and no weight could hold that",
        ("shadow_update_gate.", "shadow_backbone."),
    ),
    "QALORA": OtherMethod(
        "QA-LoRA",
        "neither",
        "takes averages of groups of its inputs, and PEFT, which defines it, merges it nowhere",
        (),
        "if each lora_A is as wide as its layer, peft made it plain LoRA: set use_qalora to false in the config",
    ),
    "LORAS": OtherMethod(
        "a variant of LoRA ((IA)3, VeRA, DoRA, gates), or LoRA without a config, in AdapterHub's format",
        "extracted",
        _UNSUPPORTED,
        ("loras.",),
        _BY_ADAPTERS,
    ),
    "KASA": OtherMethod(
        "KaSA",
        "extracted",
        "removes the smallest singular parts of each weight, and what an SVD finds differs by machine",
        ("lora_diag",),
        _BY_PEFT,
    ),
    "OSF": OtherMethod(
        "OSF",
        "extracted",
        "replaces the smallest singular parts of each weight, and what an SVD finds differs by machine",
        ("osf_svd_params.",),
        _BY_PEFT,
    ),
    "FROD": OtherMethod(
        "FRoD",
        "extracted",
        "solves equations as wide as each weight, and the result differs by machine",
        ("frod_lambda_", "frod_V."),
        _BY_PEFT,
    ),
    "PSOFT": OtherMethod(
        "PSOFT",
        "extracted",
        "turns the largest singular vectors of each weight, and their signs, which decide, differ by machine",
        ("psoft_R.",),
        _BY_PEFT_THERE,
    ),
    "ADAMSS": OtherMethod(
        "AdaMSS",
        "extracted",
        "changes clusters of rows that a search finds in each weight, and they are not in the file",
        ("adamss_",),
        _BY_PEFT_THERE,
    ),
    "SAM": OtherMethod(
        "a variant of LoRA for Segment Anything",
        "neither",
        _UNSUPPORTED,
        ("linear_a_q", "linear_b_q", "linear_a_v", "linear_b_v"),
    ),
}

# A file with only LoRA tensors that no format claims.
UNKNOWN_LORA = OtherMethod("LoRA in a form that is not known", "neither", _UNSUPPORTED)

_UNKNOWN = OtherMethod(
    "", "neither", "is not supported", (), "if its own library can merge it into a model, `loratool extract` reads that"
)

# A state dict of trained biases, as BitFit saves it.
BIASES = OtherMethod(
    "only biases (BitFit)",
    "merged",
    "need a config that says what they are",
    (),
    "put complete biases, which replace the base's, into a file adapter_model.safetensors beside an "
    'adapter_config.json of {"peft_type": "LORA"}; add changes to the base\'s biases first, and `loratool extract BASE '
    "MODEL` keeps the sum exactly",
)

# A file with only extras.
EMBEDDINGS = OtherMethod("only embeddings of tokens (textual inversion)", "neither", _INPUTS)

# A field of PEFT's config that is set (not null, false or empty) -> a key of OTHER_METHODS
METHOD_FIELDS = {
    "alora_invocation_tokens": "ALORA",
    "arrow_config": "ARROW",
    "kasa_config": "KASA",
    "lora_nums": "LORAMOE",
    "use_qalora": "QALORA",
}

# AdapterHub's `architecture` -> a key of OTHER_METHODS, for configs of tensors without a mark.
_ARCHITECTURES = {"": "BOTTLENECK", "lora": "LORAS", "mtl_lora": "LORAS", "reft": "REFT"}

# Fields of AdapterHub's LoRA config that make it another method. Its DoRA also multiplies the bias, and the sum that it
# normalizes is not the one that it multiplies (`adapters/methods/lora.py`).
_VARIANT_FIELDS = ("use_gating", "use_dora", "vera_d", "vera_b")


def method_of_peft_type(kind: str) -> OtherMethod:
    """Return the method of a `peft_type`; if it is not in the table, a method with that title."""
    return OTHER_METHODS.get(kind) or replace(_UNKNOWN, title=kind)


def find_marks(names: Iterable[str]) -> dict[str, str]:
    """Return key of OTHER_METHODS -> the first name with one of its marks, in the table's order."""
    names = list(names)
    text = "\n".join(f".{name}" for name in names)  # one search instead of one per name is faster
    return {
        kind: next(name for name in names if f".{mark}" in f".{name}")
        for kind, method in OTHER_METHODS.items()
        for mark in reversed(method.marks)
        if f".{mark}" in text
    }


def refused_tensor(tensor: str, name: str) -> InputError:
    """Return the error for a tensor of adapter `name` that is not of LoRA; a mark names the method."""
    kind = next(iter(find_marks([tensor])), None)
    remedy = EXTRACT_REMEDY
    if kind:
        method = OTHER_METHODS[kind]
        return InputError(f"is a tensor of {method.title}, which {method.reason}", culprit=tensor, remedy=remedy)
    return InputError(
        f"is not a LoRA tensor; {name} does more than LoRA, which is not supported yet", culprit=tensor, remedy=remedy
    )


def peft_type(fields: Mapping[str, Any]) -> Any:
    """Return the method that a config names: a `peft_type`, a key of OTHER_METHODS, or None."""
    kind = fields.get("peft_type")
    if found := next((method for field, method in METHOD_FIELDS.items() if fields.get(field)), None):
        return found if kind in (None, *READ) else kind
    if kind is None and isinstance(nested := fields.get("config"), dict):  # AdapterHub nests a config
        architecture = str(nested.get("architecture") or "")
        if is_adapterhub_lora(fields):
            return "LORA"
        return _ARCHITECTURES.get(architecture, architecture.upper())
    return "LORA" if kind is None and "r" in fields else kind


def is_adapterhub_lora(fields: Mapping[str, Any]) -> bool:
    """Return whether a config is AdapterHub's of plain LoRA."""
    config = fields.get("config")
    if not isinstance(config, dict) or any(config.get(field) for field in _VARIANT_FIELDS):
        return False
    return config.get("architecture") == "lora" and config.get("composition_mode") == "add"


def other_method(names: Iterable[str], fields: Mapping[str, Any]) -> tuple[str, OtherMethod] | None:
    """Return the key and the method of a file that is not LoRA; None for LoRA and for unknown files.

    A mark has precedence over the config, except for prompts and AdapterHub's LoRA, which only the config shows.
    """
    kind, configured = next(iter(find_marks(names)), None), peft_type(fields)
    if kind == "LORAS" and is_adapterhub_lora(fields):
        return None
    if configured not in (None, *READ) and kind in (None, "PROMPT"):
        kind = str(configured)
    return None if kind is None else (kind, method_of_peft_type(kind))


def is_all_lora(names: Iterable[str]) -> bool:
    """Return whether every name in a file that no format claims contains `lora`."""
    names = list(names)
    return bool(names) and all("lora" in name.lower() for name in names)


def is_biases(names: Iterable[str]) -> bool:
    names = list(names)
    return bool(names) and all(name == "bias" or name.endswith(".bias") for name in names)


def is_embeddings(names: Iterable[str]) -> bool:
    names = list(names)
    return bool(names) and all(find_extras([name]) for name in names)


def describe_bottlenecks(names: Iterable[str]) -> str | None:
    """Describe how many bottlenecks each layer has (two in Houlsby's method), and the layers without any.

    Returns:
        None if there are no bottlenecks, or the layers have different numbers.
    """
    ends = (".adapter_down.", ".project_down.")
    modules = {name.partition(end)[0] for name in names for end in ends if end in name}
    layers = Counter((parts[0], numbers[0]) for parts, numbers in map(split_numbers, modules) if numbers)
    if len(set(layers.values())) != 1:
        return None
    count = next(iter(layers.values()))
    whose = {1: ", as Lin's and Pfeiffer's have", 2: ", as Houlsby's have"}.get(count, "")
    adapted = [-1, *sorted({number for _, number in layers})]
    gaps = [(a + 1, b - 1) for a, b in pairwise(adapted) if b > a + 1]
    dropped = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in gaps)
    without = f"; none in layers {dropped}, as in AdapterDrop" if dropped else ""
    return f"{count} bottleneck{'s' * (count > 1)} in each of {len(layers)} layers{whose}{without}"
