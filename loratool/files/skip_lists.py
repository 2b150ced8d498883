"""Edit what configs and metadata say of quantized weights, for an output where some of them are plain numbers again.

A runtime that is not told takes plain numbers for codes, or waits for scales that are not in the file. Each
quantization method has a list of the modules that it leaves alone, under a name of its own and with its own rule of
matching. One spelling satisfies them all: the module's full path, as it stands on disk without `.weight`, and beside it

- the name that transformers gives the module, where that is another (`model.language_model.` of multimodal models);
- the name of the fused matrix, for the runtimes that ask for it and not for its members (SGLang for AWQ, bitsandbytes
  and GPTQ). It never stands alone;
- for experts, the path of the module that holds all experts of a layer, instead of a line for each matrix.

An entry that matches nothing does no harm. Which modules belong together, `close_under_fusion` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..architectures.fusion_groups import experts_module, fused_paths
from ..architectures.renames import canonical
from ..errors import InputError
from .quantized import CONFIG_FIELDS, LISTING, find_declared

# Edits what a quantization config says of single modules: (the config, the modules' names) -> the config.
Edit = Callable[[Mapping[str, Any], Sequence[str]], dict[str, Any]]


@dataclass(frozen=True)
class SkipList:
    """Name the place in a method's config that says which modules have plain weights."""

    fields: str  # names of the list, separated by blanks: those that are there grow, else the first is made; or none
    regexes: bool = False  # an entry may be a regular expression behind `re:`
    edit: Edit | None = None  # what else the config says, module by module


def _exclude_dynamically(declared: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Exclude modules in GPTQModel's `dynamic`: regular expressions, of which the first that matches counts."""
    patterns: dict[str, Any] = {rf"-:{re.escape(name)}(?:\.|$)": {} for name in names}
    return {**declared, "dynamic": patterns | dict(declared.get("dynamic") or {})}


def _leave_blocks(declared: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Also remove full paths from `modules_in_block_to_quantize`; kinds of modules (self_attn.q_proj) stay there."""
    blocks = declared.get("modules_in_block_to_quantize")
    if isinstance(blocks, list):
        kept = [[n for n in each if n not in names] if isinstance(each, list) else each for each in blocks]
        blocks = [each for each in kept if each and each not in names]
        declared = {**declared, "modules_in_block_to_quantize": blocks}
    return _exclude_dynamically(declared, names)


def _set_16_bits(declared: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    plain = {name: {"bits": 16, "data_type": "float"} for name in names}
    return {**declared, "extra_config": {**(declared.get("extra_config") or {}), **plain}}


def _drop_entries(declared: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Remove the modules' own entries, and those within the experts' modules that are among them."""
    gone = set(names)
    return {key: value for key, value in declared.items() if key not in gone and experts_module(key) not in gone}


def _drop_layers(declared: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Remove modules from modelopt's `quantized_layers`, which has one entry a module in its mixed precision."""
    layers = declared.get("quantized_layers")
    return (
        {**declared, "quantized_layers": _drop_entries(layers, names)} if isinstance(layers, Mapping) else {**declared}
    )


def _set_no_config(declared: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Set torchao's config of these modules to null, where its configs are by module."""
    changed: dict[str, Any] = {}
    for key, value in declared.items():
        if key in ("module_fqn_to_config", "fqn_to_config") and isinstance(value, Mapping):
            changed[key] = {**value, **dict.fromkeys(names)}
        else:
            changed[key] = _set_no_config(value, names) if isinstance(value, Mapping) else value
    return changed


_BY_FIELD = SkipList("modules_to_not_convert")

# method -> its list. Sources: the config classes of transformers 5.24, vLLM 0.33, SGLang 0.5.23, mlx-lm 0.32.2.
SKIP_LISTS: dict[str, SkipList] = {
    "fp8": SkipList("modules_to_not_convert ignored_layers"),  # MiniMax has the second name alone
    "fbgemm_fp8": _BY_FIELD,
    "mxfp4": _BY_FIELD,
    "compressed-tensors": SkipList("ignore", regexes=True),
    "modelopt": SkipList("ignore exclude_modules", edit=_drop_layers),  # the second in hf_quant_config.json
    "bitsandbytes": SkipList("llm_int8_skip_modules"),
    "gptq": SkipList("", edit=_leave_blocks),
    "awq": _BY_FIELD,
    "torchao": SkipList("modules_to_not_convert", edit=_set_no_config),
    "auto-round": SkipList("", edit=_set_16_bits),
    "quark": SkipList("exclude"),
    "MLX": SkipList("", edit=_drop_entries),  # the tensors tell; an entry without them is an error
    "quanto": _BY_FIELD,
    "eetq": _BY_FIELD,
    "bitnet": _BY_FIELD,
    "vptq": _BY_FIELD,
    "higgs": _BY_FIELD,
    "spqr": _BY_FIELD,
    "sinq": _BY_FIELD,
    "hqq": SkipList("skip_modules"),
    "aqlm": SkipList("linear_weights_not_to_quantize"),
}

# other names of methods -> the one in `SKIP_LISTS`
METHOD_NAMES = {
    "compressed_tensors": "compressed-tensors",
    "auto_round": "auto-round",
    "intel/auto-round": "auto-round",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "modelopt_fp4": "modelopt",
    "modelopt_mixed": "modelopt",
}


def find_skip_list(method: str) -> SkipList | None:
    """Return where configs of a quantization method list modules with plain weights; None if that is not known."""
    return SKIP_LISTS.get(METHOD_NAMES.get(method, method))


def extend_skip_lists(
    config: Mapping[str, Any],
    method: str,
    modules: Collection[str],
    plain: Collection[str] = (),
    model_types: Collection[str] = (),
) -> dict[str, Any]:
    """Return a config that says that some modules have plain weights; nothing else in it changes.

    Existing entries keep their order, new ones follow sorted, and nothing stands there twice. A missing, null or empty
    list means the runtime's own default, which a list replaces: it then gets all modules with plain weights.

    Args:
        config: config.json's content, in which every quantization config is extended; or, if it declares none, a
            quantization config itself, like that in quantize_config.json.
        method: the quantization method, as `declared_method` or `CONFIG_FILES` tell.
        modules: full paths on disk, without `.weight`, of the modules whose weights were codes and are plain now;
            closed under `close_under_fusion`. If nothing coded is left, the config must go: `without_quantization`.
        plain: those of all other modules with plain weights of two dimensions or more: head, routers, vision tower, ...
        model_types: those of config.json, for transformers' names.

    Raises:
        InputError: no list is known for the method.
    """
    skip_list = find_skip_list(method)
    if skip_list is None:
        message = f"no skip list is known for {method}: a runtime could not be told which modules are plain now"
        raise InputError(message, culprit="quantization_config", remedy="dequantize the whole model instead")
    names = skip_names(modules, model_types)
    others = skip_names(plain, model_types)
    return _extend(config, skip_list, names, others)


def skip_names(modules: Collection[str], model_types: Collection[str] = ()) -> list[str]:
    """Return all names, sorted, under which runtimes look for modules in a skip list: see the module's docstring."""
    paths = {experts_module(module) or module for module in modules}
    spelled = (each for path in paths for each in _spellings(path, model_types))
    names = {experts_module(name) or name for name in spelled}
    return sorted(names.union(fused_paths(names)))


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without quantization configs, in the configs nested in it too."""
    kept = {k: v for k, v in config.items() if k not in CONFIG_FIELDS or not (v is None or isinstance(v, Mapping))}
    return {key: without_quantization(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def quantizes_kv_cache(declared: Mapping[str, Any]) -> bool:
    """Return whether a quantization config quantizes keys and values too: scales for them mean nothing without it."""
    inner = declared.get("quantization")
    places = (declared, inner) if isinstance(inner, Mapping) else (declared,)
    return any(place.get(field) for place in places for field in ("kv_cache_scheme", "kv_cache_quant_algo"))


def plain_metadata(metadata: Mapping[str, str], modules: Collection[str]) -> dict[str, str]:
    """Return a safetensors file's metadata that says that some modules have plain weights.

    ComfyUI's `_quantization_metadata` loses their layers, and goes with the last one. torchao has an entry a tensor,
    which stays and says what it is: torchao leaves out tensors that it has no entry for.

    Raises:
        InputError: ComfyUI's entry is no JSON with layers.
    """
    changed = dict(metadata)
    if LISTING in metadata:
        try:
            listing = json.loads(metadata[LISTING])
            layers = {key: value for key, value in listing["layers"].items() if not _is_listed(key, modules)}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError("is no JSON object with layers", culprit=LISTING) from error
        del changed[LISTING]
        changed |= {LISTING: json.dumps({**listing, "layers": layers})} if layers else {}
    if "tensor_names" in metadata:
        tensors = (name for module in modules for name in (module, f"{module}.weight"))
        changed |= {name: json.dumps({"_type": "Tensor"}) for name in tensors if name in metadata}
    return changed


_DENOISER = "model.diffusion_model."  # which ComfyUI's list may leave out


def _is_listed(layer: str, modules: Collection[str]) -> bool:
    return layer in modules or f"{_DENOISER}{layer}" in modules


_TREE, _MAPPED = "model.language_model.", "language_model.model."


def _spellings(path: str, model_types: Collection[str]) -> tuple[str, ...]:
    """Return a path as it is on disk, in transformers 5, and in multimodal models of vLLM and of transformers 4."""
    tree = canonical(path, model_types)
    mapped = _MAPPED + tree.removeprefix(_TREE) if tree.startswith(_TREE) else tree
    return path, tree, mapped


def _extend(config: Mapping[str, Any], skip_list: SkipList, names: list[str], others: list[str]) -> dict[str, Any]:
    """Extend every quantization config in a config: each is a mapping that holds no other."""
    if not find_declared(config):
        return _extend_list(config, skip_list, names, others)
    return {
        key: _extend(value, skip_list, names, others)
        if isinstance(value, Mapping) and value and (key in CONFIG_FIELDS or find_declared(value))
        else value
        for key, value in config.items()
    }


def _extend_list(
    declared: Mapping[str, Any], skip_list: SkipList, names: list[str], others: list[str]
) -> dict[str, Any]:
    changed = skip_list.edit(declared, names) if skip_list.edit else dict(declared)
    fields = skip_list.fields.split()
    found = [field for field in fields if declared.get(field)]
    if not found:
        names = sorted({*names, *others})
        # hf_quant_config.json does not name its method, and has modelopt's second field
        found = [f for f in fields if f in declared] or (fields[:1] if "quant_method" in declared else fields[-1:])
    if skip_list.regexes:
        names = names + [rf"re:{re.escape(name)}\..*" for name in names if name == experts_module(name)]
    return changed | {field: list(dict.fromkeys([*(declared.get(field) or ()), *names])) for field in found}
