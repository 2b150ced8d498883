"""Ask the skip lists of configs as the runtimes do: each function says whether a runtime keeps a module in 16 bits.

vLLM and SGLang do not run here. Their rules are written anew, from the files that the functions name (vLLM 0.33, SGLang
0.5.23); where versions differ, the stricter rule stands. transformers and compressed-tensors are asked themselves.

A runtime asks for its own modules: `qkv_proj` where a file has q, k and v, and one `experts` for all of a layer's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatch
from typing import Any

import pytest

Declared = Mapping[str, Any]
# The fused names of a runtime's model class -> the members on disk
Packed = Mapping[str, Collection[str]]


class SchemesDiffer(Exception):
    """Some members of a fused matrix are kept and others not: the runtime refuses to load."""


def _members(asked: str, packed: Packed) -> list[str]:
    block, _, last = asked.rpartition(".")
    return [f"{block}.{member}".lstrip(".") for member in packed.get(last, (last,))]


def _all_or_none(kept: list[bool]) -> bool:
    if any(kept) != all(kept):
        raise SchemesDiffer
    return all(kept)


def _is_path_within(entry: str, asked: str) -> bool:
    """The entry's parts stand in a row among the parts of the path."""
    return f".{entry}." in f".{asked}."


def _listed(declared: Declared) -> list[str]:
    return declared.get("ignored_layers") or declared.get("modules_to_not_convert") or []


def vllm_fp8(asked: str, declared: Declared, packed: Packed) -> bool:
    """vllm/model_executor/layers/quantization/utils/quant_utils.py, `is_layer_skipped`."""
    return _vllm_exact(asked, _listed(declared), packed)


def _vllm_exact(asked: str, listed: list[str], packed: Packed) -> bool:
    if "experts" in asked and asked.rpartition(".")[2] not in packed:
        return any(asked in entry for entry in listed if "experts" in entry)
    return _all_or_none([member in listed for member in _members(asked, packed)])


def vllm_awq(asked: str, declared: Declared, packed: Packed) -> bool:
    """The same with `skip_with_substr`, as awq.py and awq_marlin.py ask; an empty list would be inferred."""
    listed = _listed(declared)
    return _all_or_none([any(entry in member for entry in listed) for member in _members(asked, packed)])


def vllm_compressed(asked: str, declared: Declared, packed: Packed) -> bool:
    """compressed_tensors/utils.py, `should_ignore_layer`; of experts, the first one's names are asked."""

    def matches(path: str) -> bool:
        return any(
            re.match(entry[3:], path) is not None if entry.startswith("re:") else entry == path for entry in ignore
        )

    ignore = declared.get("ignore") or []
    if asked.endswith(".experts"):
        return _all_or_none([matches(f"{asked}.0.{part}") for part in ("gate_proj", "up_proj", "down_proj")])
    return matches(asked) or _all_or_none([matches(member) for member in _members(asked, packed)])


def vllm_modelopt(asked: str, declared: Declared, packed: Packed) -> bool:
    """modelopt.py, `is_layer_excluded`: exact, then substring, then wildcard."""
    ignore = declared.get("ignore") or []
    contains = any(entry != asked and entry in asked for entry in ignore)
    return _vllm_exact(asked, ignore, packed) or contains or any(fnmatch(asked, entry) for entry in ignore)


def gptqmodel(asked: str, declared: Declared, packed: Packed) -> bool:
    """vllm utils/gptq_utils.py, `get_dynamic_override`, which SGLang has too: asked by fused name, the first counts."""
    for pattern in declared.get("dynamic") or {}:
        if re.match(pattern[2:] if pattern[:2] in ("-:", "+:") else pattern, asked):
            return str(pattern).startswith("-:")
    return False


def vllm_torchao(asked: str, declared: Declared, packed: Packed) -> bool:
    """torchao.py, `should_skip`: asked by fused name."""
    return any(_is_path_within(entry, asked) for entry in _listed(declared))


def sglang_fp8(asked: str, declared: Declared, packed: Packed) -> bool:
    """sglang/srt/layers/quantization/utils.py, `is_layer_skipped` and `_module_path_match`."""
    listed = _listed(declared)
    kept = _all_or_none([any(_is_path_within(entry, m) for entry in listed) for m in _members(asked, packed)])
    return kept or ("experts" in asked and any(asked in entry for entry in listed if "experts" in entry))


def sglang_compressed(asked: str, declared: Declared, packed: Packed) -> bool:
    """compressed_tensors/utils.py, `should_ignore_layer`: an entry may be a part of the path."""

    def matches(path: str) -> bool:
        return any(
            re.match(entry[3:], path) is not None if entry.startswith("re:") else entry.lower() in path.lower()
            for entry in ignore
        )

    ignore = declared.get("ignore") or []
    return matches(asked) if asked in ignore else _all_or_none([matches(m) for m in _members(asked, packed)])


def sglang_modelopt(asked: str, declared: Declared, packed: Packed) -> bool:
    """modelopt_quant.py, `is_layer_excluded`: wildcards on the whole path or on one part of it."""
    ignore = declared.get("ignore") or []
    if not asked.endswith(".experts") and sglang_fp8(asked, {"modules_to_not_convert": ignore}, packed):
        return True
    latent = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
    for entry in ignore:
        pattern, end = entry.replace(".", r"\.").replace("*", ".*"), entry.rpartition(".")[2]
        if any(re.fullmatch(pattern, part) for part in (asked, *asked.split("."))):
            return True
        if end in latent and end in asked.rpartition(".")[2]:
            return True
    return False


def sglang_bitsandbytes(asked: str, declared: Declared, packed: Packed) -> bool:
    """bitsandbytes.py, `is_layer_skipped_bnb`: asked by fused name; experts are never kept."""
    if asked.endswith(".experts"):
        return False
    parts = asked.split(".")
    starts = {".".join(parts[: i + 1]) for i in range(len(parts))}
    return not starts.union(parts).isdisjoint(declared.get("llm_int8_skip_modules") or [])


def sglang_awq(asked: str, declared: Declared, packed: Packed) -> bool:
    """awq.py, `is_layer_skipped_awq`: asked by fused name."""
    return any(entry in asked for entry in _listed(declared))


def transformers_list(asked: str, declared: Declared, packed: Packed) -> bool:
    """The function that most of transformers' quantizers ask."""
    pytest.importorskip("transformers", minversion="5.20")
    from transformers.quantizers.quantizers_utils import should_convert_module

    listed = declared.get("llm_int8_skip_modules") or declared.get("modules_to_not_convert")
    return not should_convert_module(asked, listed or [])


def compressed_tensors(asked: str, declared: Declared, packed: Packed) -> bool:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.utils.match import is_match
    from torch import nn

    return not is_match(asked, nn.Linear(1, 1), ["Linear"], declared.get("ignore") or [])


Matcher = Callable[[str, Declared, Packed], bool]

# method -> those who ask its list with a name of their own, and those who ask with transformers' names
RUNTIMES: dict[str, list[Matcher]] = {
    "fp8": [vllm_fp8, sglang_fp8],
    "compressed-tensors": [vllm_compressed, sglang_compressed],
    "modelopt": [vllm_modelopt, sglang_modelopt],
    "gptq": [gptqmodel],
    "awq": [vllm_awq, sglang_awq],
    "torchao": [vllm_torchao],
    "bitsandbytes": [sglang_bitsandbytes],
}
LIBRARIES: dict[str, list[Matcher]] = {
    "fp8": [transformers_list],
    "fbgemm_fp8": [transformers_list],
    "mxfp4": [transformers_list],
    "compressed-tensors": [compressed_tensors],
    "gptq": [gptqmodel],
    "awq": [transformers_list],
    "torchao": [transformers_list],
    "bitsandbytes": [transformers_list],
}
