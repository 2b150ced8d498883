"""Read and write PEFT's `adapter_config.json`, and refuse fields that make an adapter something other than LoRA.

A single file can have its config in its metadata: ours as `loratool`, diffusers' as `lora_adapter_metadata`, with the
component's name before each field. Defined by huggingface/peft: `peft/tuners/lora/config.py`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ...architectures.config_tensors import MAX_LAYERS
from ...errors import InputError, UsageError, brief, shell_word, with_article
from ...files.folder.model_folder import read_json_file
from ...files.weights_file import WeightsFile
from ..config import AdapterConfig, is_in_listed_module, named_base
from ..patterns import endings
from ..updates import peft_methods
from ..updates.add import AddDelta
from ..updates.replace import ReplaceTensor
from ..updates.rows import ReplaceRows
from ..updates.update import UpdateSpec
from .content import NewModule
from .other_methods import METHOD_FIELDS, READ, method_of_peft_type, peft_type
from .run_states import verl_fields

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")

# Fields that determine the scale, given the rank
SCALING = ("lora_alpha", "alpha_pattern", "use_rslora")

# Fields that hold integers, fields that hold booleans, and fields that nest such fields: also MLX's and AdapterHub's
RANKS = ("r", "rank", "init_r", "target_r")
FLAGS = ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias")
NESTED = ("rank_pattern", "lora_parameters", "config")

# PEFT lists all of these; a classifier has some of them, depending on its class.
CLASSIFIERS = ("classifier", "score", "qa_outputs")

# Initializations that change the base: on the original base the adapter is wrong by the size of its factors.
BASE_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")


def find_config(file: WeightsFile) -> tuple[dict[str, Any], str]:
    """Return the config's fields and the component that prefixes the keys (empty except in diffusers' files).

    The metadata has precedence over the file beside it; without either, the fields are {"peft_type": "LORA"}. Ranks
    written as floats become integers, and flags written as 0 or 1 become booleans.
    """
    fields, component = _find_config(file)
    return {name: _as_meant(name, value) for name, value in fields.items()}, component


def _as_meant(name: str, value: Any) -> Any:
    if name in NESTED and isinstance(value, dict):
        return {each: _as_meant("r" if name == "rank_pattern" else each, inner) for each, inner in value.items()}
    if name in RANKS and isinstance(value, float) and value.is_integer():
        return int(value)
    return bool(value) if name in FLAGS and value in (0, 1) else value


def _find_config(file: WeightsFile) -> tuple[dict[str, Any], str]:
    metadata = file.metadata or {}
    if "loratool" in metadata:
        stored = _parse_metadata(file, "loratool").get("adapter_config")
        if isinstance(stored, dict):
            return stored, ""
    if "lora_adapter_metadata" in metadata:
        flat = _parse_metadata(file, "lora_adapter_metadata")
        if not any("." in key for key in flat):  # of `save_lora_adapter`, which is called on the component itself
            refuse_other_config(file, flat)
            return flat, ""
        components = sorted({key.partition(".")[0] for key in flat})
        if len(components) != 1:
            raise InputError(
                f"holds adapters of several components ({', '.join(components)})",
                culprit=str(file.path),
                remedy="split the file by component first",
            )
        fields = {key.partition(".")[2]: value for key, value in flat.items()}
        refuse_other_config(file, fields)
        return {"peft_type": "LORA", **fields}, components[0]
    beside = next((folder / CONFIG_NAME for folder in file.folders if (folder / CONFIG_NAME).is_file()), None)
    return (read_json_file(beside), "") if beside else (verl_fields(file) or {"peft_type": "LORA"}, "")


def config_beside(file: WeightsFile) -> dict[str, Any]:
    """Return the fields of the config beside a file of image modules; empty without a config.

    diffusion-pipe saves a config beside its `adapter_model.safetensors`, which has ComfyUI's names. Beside a file of
    another name, a config is unrelated: no loader of such files reads it.
    """
    beside = file.path.parent / CONFIG_NAME
    return read_json_file(beside) if file.path.name in WEIGHTS_NAMES and beside.is_file() else {}


def refuse_other_config(file: WeightsFile, fields: Mapping[str, Any]) -> None:
    """Raise InputError if a config beside a file scales differently from `fields` of its metadata."""
    beside = config_beside(file)
    for field in SCALING if beside else ():
        stored, other = fields.get(field) or None, beside.get(field) or None
        if stored != other and (field != "lora_alpha" or None not in (stored, other)):
            raise InputError(
                f"its metadata sets {field} to {stored!r}, and the {CONFIG_NAME} beside it to {other!r}",
                culprit=str(file.path),
                remedy="neither says which of them its trainer meant: remove the wrong one",
            )


def _parse_metadata(file: WeightsFile, key: str) -> dict[str, Any]:
    try:
        value = json.loads((file.metadata or {})[key])
    except (ValueError, RecursionError) as error:
        raise InputError(f"its metadata {key} is not JSON: {error}", culprit=str(file.path)) from error
    if not isinstance(value, dict):
        raise InputError(f"its metadata {key} is not a JSON object", culprit=str(file.path))
    return value


def parse_config(name: str, fields: Mapping[str, Any], alpha: float | None) -> AdapterConfig:
    """Check a config's fields and return those that decide rank and scale.

    Raises:
        InputError: the config is of a method that is not read, or a field has a wrong type.
        UsageError: `alpha` contradicts the config.
    """
    if "lora_parameters" in fields or "fine_tune_type" in fields:
        raise InputError(
            f"its {CONFIG_NAME} is MLX's, but its tensors are not",
            culprit=name,
            remedy="put the config that PEFT wrote beside them",
        )
    kind = peft_type(fields)
    if kind is None:
        raise InputError(
            f"its {CONFIG_NAME} does not name a peft_type", culprit=name, remedy="set it to LORA if it is LoRA"
        )
    if kind not in READ:
        method = method_of_peft_type(str(kind))
        field = next((each for each, key in METHOD_FIELDS.items() if key == kind and fields.get(each)), None)
        what = f"is {with_article(str(kind))} adapter{f' (its config sets {field})' if field else ''}"
        raise InputError(f"{what}, which {method.reason}", culprit=name, remedy=method.remedy)
    peft_method = peft_methods().get(kind)
    named = peft_method.alpha if peft_method else "lora_alpha"
    stored = _number(name, fields, named, (int, float)) if named else None
    if alpha is not None and stored is not None and alpha != stored:
        weighed = f"{name}:{alpha / (stored or 1):g}"
        raise UsageError(
            f"--alpha {alpha:g} contradicts the config's {named} {stored:g}",
            culprit=name,
            remedy=f"leave --alpha out; to change the adapter's strength, give it a weight: {shell_word(weighed)}"
            if stored
            else None,
        )
    prunes = peft_method is not None and peft_method.prunes
    return AdapterConfig(
        rank=None if prunes else _number(name, fields, "r", (int,)),
        alpha=stored if stored is not None else alpha,
        use_rslora=peft_method is None and bool(_flag(name, fields, "use_rslora")),  # only LoRA's config has this field
        rank_pattern={} if prunes else _pattern(name, fields, "rank_pattern"),
        alpha_pattern=_pattern(name, fields, "alpha_pattern"),
        fan_in_fan_out=_flag(name, fields, "fan_in_fan_out"),
        base_model=named_base(fields.get("base_model_name_or_path")),
        peft=dict(fields),
        layers=_layers(name, kind, fields.get("layer_replication")),
    )


def _layers(name: str, kind: str, ranges: Any) -> tuple[int, ...]:
    """Return the numbers of the base's layers in PEFT's ranges [start, stop], which end before `stop`."""
    if not ranges:
        return ()
    if kind not in ("LORA", "ADALORA"):
        raise InputError(f"its config sets layer_replication, which {with_article(kind)} adapter has not", culprit=name)
    is_list = isinstance(ranges, list) and all(isinstance(each, list) and len(each) == 2 for each in ranges)
    if not is_list or not all(type(n) is int for each in ranges for n in each):
        raise InputError(f"its config sets layer_replication to {brief(ranges)}, not to ranges of layers", culprit=name)
    for start, stop in ranges:
        if not 0 <= start < stop:
            raise InputError(f"its config's layer_replication has no layer in {brief([start, stop])}", culprit=name)
    if sum(stop - start for start, stop in ranges) > MAX_LAYERS:
        raise InputError(f"its config's layer_replication has more than {MAX_LAYERS:,} layers", culprit=name)
    return tuple(number for start, stop in ranges for number in range(start, stop))


def _flag(name: str, fields: Mapping[str, Any], field: str) -> bool | None:
    value = fields.get(field)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"its config sets {field} to {value!r}, neither true nor false", culprit=name)
    return value


def _number(name: str, fields: Mapping[str, Any], field: str, types: tuple[type, ...]) -> Any:
    value = fields.get(field)
    if value is not None and not _is_number(value, types):
        expected = "a number" if float in types else "a whole number"
        raise InputError(f"its config sets {field} to {brief(value)}, which is not {expected}", culprit=name)
    return value


def _is_number(value: Any, types: tuple[type, ...] = (int, float)) -> bool:
    """Return whether float64 can hold the value; Python's JSON also parses NaN, Infinity and integers of any length."""
    return type(value) in types and -1e300 < value < 1e300


def _pattern(name: str, fields: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = fields.get(field) or {}
    if not isinstance(value, dict) or not all(map(_is_number, value.values())):
        raise InputError(f"its config's {field} does not map names to numbers", culprit=name)
    return value


def base_mutating_init(config: AdapterConfig) -> str | None:
    """Return the base-mutating init of the adapter or one of its components; None if there is none."""
    init = next(iter(config.base_mutating_inits.values()), config.peft.get("init_lora_weights"))
    return init if isinstance(init, str) and init.lower().startswith(BASE_MUTATING_INITS) else None


def base_mutating_init_of(config: AdapterConfig, module: str) -> str | None:
    """Return the base-mutating init of the component that `module` is in; None if there is none."""
    return (
        config.base_mutating_inits.get(module.partition(".")[0])
        if config.base_mutating_inits
        else base_mutating_init(config)
    )


def target_parameter(
    config: AdapterConfig, module: str, place: int, places: int, declared: Sequence[str]
) -> str | None:
    """Return the bare parameter that factors at `module` belong to; None for the module's weight.

    PEFT wraps a module once for each parameter, in the order in which its class declares them. So the keys of the
    first have the most `base_layer` in them (`peft/tuners/lora/model.py:_inject_parameters`).

    Args:
        place: number of the wrapper, from the first.
        places: number of wrappers that the module has in the file.
        declared: parameters in the order in which classes declare them.

    Raises:
        InputError: the config names another number of parameters than the file has, or their order is unknown.
    """
    listed = config.peft.get("target_parameters")
    if not listed:
        return None
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise InputError("the config's target_parameters are not a list of names", culprit=module)
    of_owners = config.parameters
    numbered = sorted(each for end in endings(module) if end for each in of_owners.get(end, ()))
    owned = list(dict.fromkeys(parameter for _, parameter in numbered))
    bare = [parameter for _, parameter in of_owners.get("", ())]
    # a bare name targets every module that has such a parameter, except those listed with their path
    names = owned if len(owned) == places else list(dict.fromkeys((*owned, *bare)))
    if not names or config.targets.has(module):
        return None
    if len(names) < places or (len(names) > places and places > 1):
        raise InputError(
            f"the config targets {len(names)} parameters here ({', '.join(names)}), the file has {places}",
            culprit=module,
        )
    if len(names) > places:
        raise InputError(f"could be the factors of any of {', '.join(names)}", culprit=module)
    if len(names) == 1:
        return names[0]
    unknown = [name for name in names if name not in declared]
    if unknown:
        raise InputError(
            f"has factors of {', '.join(names)}; the order in which the model's class declares them "
            f"tells which are whose, and it is unknown for {unknown[0]}",
            culprit=module,
        )
    return sorted(names, key=declared.index)[place]


def announced_but_absent(config: AdapterConfig, updates: Mapping[str, UpdateSpec]) -> tuple[str, ...]:
    """Return a sentence for everything that the config lists and the file lacks.

    Biases are not checked, because only the base shows which modules have one.
    """
    kinds = {cls: [m for m, u in updates.items() if u.cls is cls] for cls in (ReplaceTensor, ReplaceRows, AddDelta)}
    lines = []
    saved = config.peft.get("modules_to_save")
    entries = [each for each in saved if isinstance(each, str)] if isinstance(saved, list) else []
    absent = [each for each in entries if not any(is_in_listed_module(each, m) for m in kinds[ReplaceTensor])]
    if len(absent) < len(entries):
        absent = [each for each in absent if each not in CLASSIFIERS]
    lines += [f"the config's modules_to_save names {each}, but the file has no tensors of it" for each in absent]
    tokens = config.peft.get("trainable_token_indices")
    if tokens and not kinds[ReplaceRows]:
        lines.append("the config sets trainable_token_indices, but the file has no rows for them")
    elif isinstance(tokens, dict):
        trained = {k for k in tokens if any(m == k or m.endswith(f".{k}") for m in kinds[ReplaceRows])}
        equal = [tokens[k] for k in trained]  # PEFT saves only one of several tied modules
        rowless = [k for k, rows in tokens.items() if k not in trained and rows not in equal]
        lines += [f"the config's trainable_token_indices name {k}, but the file has no rows for it" for k in rowless]
    if config.peft.get("lora_bias") and not kinds[AddDelta]:
        lines.append("the config sets lora_bias, but the file has no lora_B.bias")
    return tuple(lines)


def listed_as_parameters(updates: Iterable[UpdateSpec]) -> set[str]:
    """Return the targets that the config lists as parameters: stacks of experts, and weights marked as such."""
    return {update.target for update in updates if update.cls.stack or update.parameter}


def lora_config(modules: Mapping[str, int], parameters: Mapping[str, int], **fields: Any) -> dict[str, Any]:
    """Return the config of an adapter of modules and bare parameters (experts), given their ranks.

    The most frequent rank is `r`, the others are patterns. alpha is the rank everywhere, so that the scale is 1.
    `fields` replace or add others.
    """
    ranks = {**modules, **parameters}
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        **fields,
    }
    # PEFT before 0.19 ordered the factors of experts differently; shapes do not show it if a matrix is square
    return {**config, "target_parameters": sorted(parameters), "peft_version": "0.19.0"} if parameters else config


def config_of(modules: Mapping[str, tuple[int, float]], stacks: Collection[str] = ()) -> dict[str, Any]:
    """Return the config for modules with these (rank, alpha).

    Args:
        stacks: the names among them that are parameters (stacks of experts), not modules.
    """
    ranks = {name: rank for name, (rank, _) in modules.items()}
    config = lora_config({n: r for n, r in ranks.items() if n not in stacks}, {n: ranks[n] for n in sorted(stacks)})
    common = Counter(alpha for _, alpha in modules.values()).most_common(1)[0][0]
    patterns = {f"^{re.escape(name)}": alpha for name, (_, alpha) in modules.items() if alpha != common}
    return {**config, "lora_alpha": common, "alpha_pattern": patterns}


def config_of_component(modules: Mapping[str, NewModule]) -> dict[str, Any]:
    """Return the config for the modules of one component of an image model; either all or none are DoRA."""
    init = next((module.init for module in modules.values() if module.init), True)
    both = {name: (module.rank, module.alpha) for name, module in modules.items()}
    dora = any(module.dora for module in modules.values())
    return {**config_of(both), "use_dora": dora, "init_lora_weights": init}
