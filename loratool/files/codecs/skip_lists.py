"""Edit the description of quantized weights in configs and metadata, for an output where some are plain again.

With an old description a runtime treats plain numbers as codes, or waits for scales that are not in the file. Each
quantization method has a list of modules to skip, with its own name and its own rule of matching. These entries satisfy
all methods: the module's full path on disk without `.weight`, and in addition

- transformers' name for the module, if it differs (`model.language_model.` of multimodal models);
- the name of the fused matrix, for runtimes that look it up instead of its members (SGLang for AWQ, bitsandbytes and
  GPTQ). It is never the only entry;
- for experts, the path of the module with all experts of a layer, instead of an entry for each matrix.

An entry that matches nothing does no harm. `close_under_fusion` determines which modules belong together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...architectures.fusion_groups import experts_module, fused_paths
from ...architectures.renames import canonical
from ...architectures.ties import DECODER_HEADS, MASKED_HEAD_OF
from ...errors import InputError
from .quantized import CONFIG_FIELDS, LISTING, find_declared

# Edits a quantization config's entries of single modules: (the config, the modules' names) -> the config
Edit = Callable[[Mapping[str, Any], Sequence[str]], dict[str, Any]]

_Kind = TypeVar("_Kind", list[Any], dict[str, Any])

_BLOCKS = "modules_in_block_to_quantize"


@dataclass(frozen=True)
class SkipList:
    """The fields of a method's config that list modules with plain weights."""

    fields: str  # names of the list, separated by blanks: existing ones are extended, else the first is added; or none
    regexes: bool = False  # an entry may be a regular expression after `re:`
    edit: Edit | None = None  # edits entries for single modules elsewhere in the config


def _exclude_dynamically(declared: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Exclude modules in GPTQModel's `dynamic`: regular expressions, of which the first match counts.

    Full paths of these modules are removed from `modules_in_block_to_quantize`; kinds of modules (self_attn.q_proj)
    stay.
    """
    patterns: dict[str, Any] = {rf"-:{re.escape(name)}(?:\.|$)": {} for name in names}
    changed = {**declared, "dynamic": patterns | _entry(declared, "dynamic", dict)}
    blocks, gone = _entry(declared, _BLOCKS, list), set(names)
    if blocks:
        remaining = [[n for n in each if n not in gone] if isinstance(each, list) else each for each in blocks]
        changed[_BLOCKS] = [each for each in remaining if each and (isinstance(each, list) or each not in gone)]
    return changed


def _set_16_bits(declared: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    plain = {name: {"bits": 16, "data_type": "float"} for name in names}
    return {**declared, "extra_config": _entry(declared, "extra_config", dict) | plain}


def _drop_entries(declared: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Remove the entries of modules, and entries inside experts' modules that are among them."""
    gone = set(names)
    return {key: value for key, value in declared.items() if key not in gone and experts_module(key) not in gone}


def _drop_layers(declared: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Remove modules from modelopt's `quantized_layers`, which has an entry per module in mixed precision."""
    layers = _entry(declared, "quantized_layers", dict)
    return {**declared, "quantized_layers": _drop_entries(layers, names)} if layers else dict(declared)


def _set_no_config(declared: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Set torchao's config of these modules to null, if it has configs by module."""
    changed: dict[str, Any] = {}
    for key, value in declared.items():
        if key in ("module_fqn_to_config", "fqn_to_config") and isinstance(value, Mapping):
            changed[key] = {**value, **dict.fromkeys(names)}
        else:
            changed[key] = _set_no_config(value, names) if isinstance(value, Mapping) else value
    return changed


def _entry(declared: Mapping[str, Any], field: str, kind: type[_Kind]) -> _Kind:
    """Return a field's value, empty if it is missing or null; raise InputError if it is of another type."""
    value = declared.get(field)
    if value is not None and not isinstance(value, kind):
        raise InputError(f"is not a {kind.__name__}", culprit=f"quantization config: {field}")
    return value if value is not None else kind()


_BY_FIELD = SkipList("modules_to_not_convert")

# method -> its list. Sources: the config classes of transformers 5.24, vLLM 0.33, SGLang 0.5.23, mlx-lm 0.32.2.
SKIP_LISTS: dict[str, SkipList] = {
    "fp8": SkipList("modules_to_not_convert ignored_layers"),  # MiniMax has the second name alone
    "fbgemm_fp8": _BY_FIELD,
    "mxfp4": _BY_FIELD,
    "compressed-tensors": SkipList("ignore", regexes=True),
    "modelopt": SkipList("ignore exclude_modules", edit=_drop_layers),  # the second in hf_quant_config.json
    "bitsandbytes": SkipList("llm_int8_skip_modules"),
    "gptq": SkipList("", edit=_exclude_dynamically),
    "awq": _BY_FIELD,
    "torchao": SkipList("modules_to_not_convert", edit=_set_no_config),
    "auto-round": SkipList("", edit=_set_16_bits),
    "quark": SkipList("exclude"),
    "MLX": SkipList("", edit=_drop_entries),  # the tensors decide; an entry without tensors is an error
    "quanto": _BY_FIELD,
    "optimum-quanto": SkipList("", edit=_drop_entries),  # quantization_map.json has an entry for each module
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
    # modelopt's `quant_algo`, which hf_quant_config.json has in place of a method
    **dict.fromkeys(
        """modelopt_fp4 modelopt_mixed FP8 FP8_PER_CHANNEL_PER_TOKEN FP8_PB_WO NVFP4 W4A16_NVFP4 MXFP8
        MIXED_PRECISION""".split(),
        "modelopt",
    ),
}


def find_skip_list(method: str) -> SkipList | None:
    """Return the fields in which a quantization method's config lists plain modules; None if unknown."""
    return SKIP_LISTS.get(METHOD_NAMES.get(method, method))


def extend_skip_lists(
    config: Mapping[str, Any],
    method: str,
    modules: Collection[str],
    plain: Collection[str],
    coded: Collection[str],
    model_types: Collection[str] = (),
) -> dict[str, Any]:
    """Return a config that lists some modules as plain; nothing else in it changes.

    Existing entries keep their order, new ones follow sorted, without duplicates. A missing, null or empty list means
    the runtime's default, which a list replaces. So a new list gets all modules with plain weights, and the head, which
    is in the default but not in a file with tied weights.

    All paths are full paths on disk, without `.weight`, and in a pipeline without the component's folder.

    Args:
        config: config.json's content, in which every quantization config is extended; or, if it has none, a
            quantization config itself, like that in quantize_config.json.
        method: the quantization method, from `declared_method` or `CONFIG_FILES`.
        modules: modules whose weights were codes and are plain now; closed under `close_under_fusion`.
        plain: all other modules with plain weights of two dimensions or more: head, routers, vision tower, ...
        coded: modules whose weights stay codes. If there are none, use `without_quantization` instead.
        model_types: those of config.json, for transformers' names.

    Raises:
        InputError: no list is known for the method, or its value is not a list.
    """
    skip_list = find_skip_list(method)
    if skip_list is None:
        message = f"no skip list is known for {method}: no runtime could know which modules are plain now"
        raise InputError(message, culprit="quantization_config", remedy="dequantize the whole model instead")
    heads = {DECODER_HEADS.get(each, MASKED_HEAD_OF.get(each, "lm_head")) for each in model_types or ("",)}
    heads = {head for head in heads if not any(f".{module}".endswith(f".{head}") for module in coded)}
    experts = {experts_module(module) for module in coded} - {None}  # their plain biases do not matter
    others = heads.union(module for module in plain if experts_module(module) not in experts)
    return _extend(config, skip_list, skip_names(modules, model_types), skip_names(others, model_types))


def skip_names(modules: Collection[str], model_types: Collection[str] = ()) -> list[str]:
    """Return all names, sorted, that runtimes look up in a skip list; see the module's docstring."""
    paths = {experts_module(module) or module for module in modules}
    spelled = (each for path in paths for each in _spellings(path, model_types))
    names = {experts_module(name) or name for name in spelled}
    return sorted(names.union(fused_paths(names)))


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without quantization configs, including those of nested configs."""
    remaining = {k: v for k, v in config.items() if k not in CONFIG_FIELDS or not (v is None or isinstance(v, Mapping))}
    return {
        key: without_quantization(value) if isinstance(value, Mapping) else value for key, value in remaining.items()
    }


def quantizes_kv_cache(declared: Mapping[str, Any]) -> bool:
    """Return whether a quantization config quantizes keys and values too; their scales are useless without it."""
    inner = declared.get("quantization")
    places = (declared, inner) if isinstance(inner, Mapping) else (declared,)
    return any(place.get(field) for place in places for field in ("kv_cache_scheme", "kv_cache_quant_algo"))


def plain_metadata(metadata: Mapping[str, str], modules: Collection[str]) -> dict[str, str]:
    """Return a safetensors file's metadata that describes some modules as plain.

    Their layers are removed from ComfyUI's `_quantization_metadata`, and the key with the last one. torchao's metadata
    keep an entry for each tensor, which then describes the plain tensor: torchao ignores tensors without an entry.

    Raises:
        InputError: ComfyUI's entry is not JSON with layers.
    """
    changed = dict(metadata)
    if LISTING in metadata:
        try:
            listing = json.loads(metadata[LISTING])
            layers = {key: value for key, value in listing["layers"].items() if not _is_listed(key, modules)}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError("is not a JSON object with layers", culprit=LISTING) from error
        del changed[LISTING]
        changed |= {LISTING: json.dumps({**listing, "layers": layers})} if layers else {}
    if "tensor_names" in metadata:
        tensors = (name for module in modules for name in (module, f"{module}.weight"))
        changed |= {name: json.dumps({"_type": "Tensor"}) for name in tensors if name in metadata}
    return changed


_DENOISER = "model.diffusion_model."  # a prefix that ComfyUI's list may omit


def _is_listed(layer: str, modules: Collection[str]) -> bool:
    return layer in modules or f"{_DENOISER}{layer}" in modules


_TREE, _MAPPED = "model.language_model.", "language_model.model."


def _spellings(path: str, model_types: Collection[str]) -> tuple[str, ...]:
    """Return a path on disk, in transformers 5, and in multimodal models of vLLM and of transformers 4."""
    tree = canonical(path, model_types)
    mapped = _MAPPED + tree.removeprefix(_TREE) if tree.startswith(_TREE) else tree
    return path, tree, mapped


def _extend(config: Mapping[str, Any], skip_list: SkipList, names: list[str], others: list[str]) -> dict[str, Any]:
    """Extend every quantization config in a config."""
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
    lists = {field: _entry(declared, field, list) for field in fields if field in declared}
    if any(lists.values()):
        lists = {field: listed for field, listed in lists.items() if listed}
    elif fields:
        names = sorted({*names, *others})
        # hf_quant_config.json has no method, but modelopt's second field
        lists = lists or {fields[0 if "quant_method" in declared else -1]: []}
    if skip_list.regexes:
        names = names + [rf"re:{re.escape(name)}\..*" for name in names if name == experts_module(name)]
    for field, listed in lists.items():
        known = {entry for entry in listed if isinstance(entry, str)}
        changed[field] = listed + [name for name in names if name not in known]
    return changed


@dataclass(frozen=True)
class Note:
    """A runtime's problem with an output in which some modules of a method are plain."""

    method: str
    text: str
    parts: str = ""  # it holds where a module's path has one of these parts, separated by blanks; empty: always


# A layer of BitNet rounds its inputs to 8 bits, and a plain one does not
BITNET = "it is another model than the base: layers with plain numbers do not round their inputs to 8 bits"

NOTES = (
    Note(
        "mxfp4",
        "vLLM and SGLang take experts for mxfp4 whatever the list says: this output is for transformers; "
        "a dequantized one is for all three",
        "experts",
    ),
    Note(
        "modelopt",
        "transformers has no quantizer for modelopt and takes codes for weights: this output is for vLLM, SGLang and "
        "TensorRT-LLM",
    ),
    Note(
        "modelopt",
        "SGLang leaves this projection of one layer plain in all layers: this output is not for SGLang unless all "
        "layers changed",
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj",
    ),
    Note(
        "compressed-tensors",
        "transformers takes the experts of all layers for codes where codes are packed (4 bits): this output is for "
        "vLLM and SGLang",
        "experts",
    ),
    Note("bitsandbytes", "vLLM 0.33 does not read bitsandbytes"),
    Note("bitsandbytes", "SGLang takes all experts for bitsandbytes codes: this output is for transformers", "experts"),
    Note("torchao", "vLLM takes all experts of torchao for codes: this output is for transformers", "experts"),
    Note("gptq", "transformers reads it with GPTQModel, which is untested"),
    Note("awq", "transformers reads it with a package that is untested"),
    Note("auto-round", "loading is untested in every runtime"),
    Note("quark", "loading is untested in every runtime"),
    Note("MLX", "only MLX reads it"),
    Note("bitnet", BITNET),
    Note(
        "hqq",
        "transformers skips modules of HQQ by their kind, in all layers: this output is not for it unless all layers "
        "changed; a dequantized one is",
    ),
)


def mixed_notes(method: str, modules: Collection[str]) -> tuple[str, ...]:
    """Return the notes of a report on an output in which these modules were codes and are plain now."""
    method = METHOD_NAMES.get(method, method)
    parts = {part for module in modules for part in module.split(".")}
    notes = (note for note in NOTES if note.method == method)
    return tuple(note.text for note in notes if not note.parts or parts & set(note.parts.split()))
