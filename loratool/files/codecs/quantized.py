"""Find the tensors of a checkpoint that are codes of a quantized weight, by the tensors beside them.

Quantization is decided per tensor, not per checkpoint: gpt-oss quantizes only its experts, and a config may describe
weights that are not in the file. A float8 weight without a scale beside it is a plain cast: its codes are its values.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..dtypes import BLOCK_TYPES, FLOAT8, TORCH_FLOATS, TensorSpec

# The 8-bit floats that codes may be: those that are read as numbers, and AMD's.
FP8_CODES = frozenset((*FLOAT8, "F8_E4M3FNUZ", "F8_E5M2FNUZ"))

INT8, BYTES, WORDS = frozenset(("I8",)), frozenset(("U8", "I8")), frozenset(("I32", "U32"))

CODES = FP8_CODES | BYTES | WORDS


@dataclass(frozen=True)
class Coding:
    """The tensors of a weight in a format, as suffixes of their names after the path without `.weight`."""

    format: str
    codes: str  # the suffix of the codes' name
    marks: str  # suffixes, separated by blanks; if there are any, one of them must exist
    others: str  # suffixes, separated by blanks, that may exist
    dtypes: frozenset[str]  # the dtypes that the codes may have
    bits: int | None  # per weight; 0: the config has the number; None: the headers cannot tell
    why: str = ""  # why no codec can read it

    def weight(self, path: str) -> str:
        """Return the weight's name in an unquantized model."""
        return f"{path}.weight" if self.codes.startswith(".") else path


_NF4 = ".weight.nested_absmax .weight.nested_quant_map .weight.quant_state.bitsandbytes__nf4 "

_NF4 += ".weight.quant_state.bitsandbytes__fp4"

_PACKED = ".weight_shape .weight_global_scale .input_global_scale .weight_zero_point .weight_g_idx .input_scale"

_FP_QUANT = ".act_global_scale .backward_hadamard_matrix"

_4OVER6 = ".quantized_weight_amax .quantized_weight_metadata"

# The first row that matches is used.
CODINGS = (
    Coding("bitsandbytes 4-bit", ".weight", ".weight.absmax .weight.quant_map", _NF4, BYTES, 4),
    Coding("bitsandbytes int8", ".weight", ".SCB", ".weight_format", INT8, 8),
    Coding("ComfyUI 8-bit", ".weight", ".comfy_quant", ".weight_scale .input_scale", FP8_CODES | INT8, 8),
    Coding("ComfyUI 4-bit", ".weight", ".comfy_quant", ".weight_scale .weight_scale_2 .input_scale", BYTES, 4),
    Coding("ComfyUI scaled fp8", ".weight", ".scale_weight", ".scale_input", FP8_CODES | INT8, 8),
    Coding("modelopt nvfp4", ".weight", ".weight_scale_2", ".weight_scale .input_scale", BYTES, 4),
    Coding(
        "fp8",
        ".weight",
        ".weight_scale_inv .weight_scale .qscale_weight .scale",
        ".input_scale .qscale_act",
        FP8_CODES,
        8,
    ),
    Coding("int8", ".weight", ".weight_scale_inv .weight_scale", ".input_scale .weight_zero_point", INT8, 8),
    Coding("DeepSeek fp4", ".weight", ".scale", "", INT8, 4),
    Coding("EETQ int8", ".weight", ".weight_scales", "", INT8, 8, "its columns are in the order of a GPU's kernel"),
    Coding("HIGGS", ".weight", ".tables2", ".scales .tables", frozenset(("I16",)), None),
    Coding("SpQR", ".dense_weights", ".row_offsets", ".col_vals .in_perm", frozenset(("I64",)), None),
    Coding("FP-Quant", ".qweight", ".forward_hadamard_matrix .weight_global_scale", f".scales {_FP_QUANT}", BYTES, 4),
    Coding("4over6", ".quantized_weight_values", ".quantized_weight_scale_factors", _4OVER6, BYTES, None),
    Coding("MLX", ".weight", ".scales", ".biases .global_scale", WORDS, 0),
    Coding("compressed-tensors 4-bit", ".weight_packed", "", f".weight_scale {_PACKED}", BYTES, 4),
    Coding("compressed-tensors", ".weight_packed", "", f".weight_scale {_PACKED}", WORDS, 0),
    Coding("GPTQ", ".qweight", ".g_idx", ".qzeros .scales", WORDS, 0),
    Coding("AWQ or GPTQ", ".qweight", "", ".scales .qzeros", WORDS, 0),
    Coding("mxfp4", "_blocks", "_scales", "", BYTES, 4),
    Coding("quanto", ".weight._data", ".weight._scale", ".weight._shift .input_scale .output_scale", CODES, None),
    Coding("quanto", ".weight._data._data", ".weight._scale", ".weight._shift .input_scale .output_scale", CODES, None),
    Coding("torchao", "._weight_qdata", "._weight_scale", "._weight_zero_point", FP8_CODES | INT8, 8),
    Coding("torchao", "._weight_qdata", "._weight_scale", "._weight_zero_point ._weight_scale_and_zero", CODES, None),
    Coding(
        "torchao int4 in tiles",
        "._weight_qdata",
        "._weight_scale_and_zero",
        "._weight_act_pre_scale",
        WORDS,
        4,
        "the file does not say whether a GPU of NVIDIA or of AMD packed it, in other orders",
    ),
    Coding("SINQ", ".W_q", ".meta .scale2", ".scale .zero .nbits .group_size .shape .axis .packing", CODES, None),
    Coding("HQQ", ".W_q", ".scale .zero", ".nbits .group_size .shape .axis .packing", CODES, None),
    Coding("AQLM", ".codes", ".codebooks", ".scales", CODES | {"I16"}, None),
    Coding("VPTQ", ".indices", ".centroids", ".res_centroids .weight_scale .weight_bias .perm", CODES | {"I16"}, None),
    Coding("exl3", ".trellis", ".suh .svh .su .sv", ".mcg .mul1", CODES | {"I16"}, None),
    Coding("fp8", "", "_scale_inv _scale", "_input_scale", FP8_CODES, 8),
    Coding("int8", "", "_scale_inv _scale", "_input_scale", INT8, 8),
    Coding("4-bit", "", "_weight_scale _scale", "_weight_scale_2 _input_scale", BYTES, 4),
)

_OF_DTYPE = {dtype: tuple(c for c in CODINGS if dtype in c.dtypes) for dtype in CODES | {"I16", "I64"}}

# Formats that no codec reads, some of them only in a kind that it does not -> what dequantizes them
DEQUANTIZERS = {
    "EETQ int8": "EETQ (its layers give their weights for the identity)",
    "HIGGS": "transformers (model.dequantize(), with flute)",
    "SINQ": "sinq (SINQLinear.dequantize)",
    "AQLM": "aqlm (aqlm.utils._dequantize_weight)",
    "VPTQ": "vptq (vptq.ops.quant_gemm.dequant)",
    "SpQR": "spqr_quant (QuantizedLinear.dequantize)",
    "exl3": "exllamav3 (LinearEXL3.get_weight_tensor)",
    "4over6": "fouroversix (dequantize)",
    "quanto": "optimum-quanto (weight.dequantize())",
    "torchao int4 in tiles": "torchao, on the GPU that packed it (its layers give their weights for the identity)",
    **dict.fromkeys(("ComfyUI 8-bit", "ComfyUI 4-bit", "ComfyUI"), "comfy-kitchen (QuantizedTensor.dequantize)"),
}

# A float8 tensor beside a scale, and one in a list of quantized layers, without a row in CODINGS
UNKNOWN = Coding("an unknown fp8 format", ".weight", "", "", FP8_CODES, 8)

LISTED = Coding("ComfyUI", ".weight", "", "", CODES, None)

# ComfyUI's scale, also beside weights of 16 bits: there it is 1, or the weight is not a plain number.
DUMMY_SCALE = ".scale_weight"

SCALED_FLOAT = Coding("ComfyUI scaled weights", ".weight", DUMMY_SCALE, ".scale_input", frozenset(TORCH_FLOATS), None)

# ComfyUI's tensor in files whose float8 weights have scales
SCALED_FILE = "scaled_fp8"

# Scales of the cache of keys and values
CACHE_SCALES = (".k_scale", ".v_scale")

# Keys of a safetensors file's metadata that name its quantized tensors: ComfyUI's layers, torchao's tensors.
LISTING = "_quantization_metadata"

CODED_METADATA = (LISTING, "tensor_names")

# Files of tools that do not write their quantization into config.json -> the method
CONFIG_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_map.json": "optimum-quanto",
}

# Files that are obsolete beside a model without codes
QUANTIZERS = (*CONFIG_FILES, "recipe.yaml")

CONFIG_FIELDS = ("quantization_config", "compression_config", "quantization")

STRATEGIES = {"channel": [1, 0], "tensor": [0, 0]}  # compressed-tensors' -> the block

Blocks = tuple[tuple[int, int], ...]  # rows and columns that have one scale, 0 for all of them

DEPTH = 3  # levels of configs within config.json, like the text_config of a thinker_config


@dataclass(frozen=True)
class Coded:
    """A weight that is stored as codes."""

    format: str  # the `format` of a row of CODINGS
    tensors: tuple[str, ...]  # names of all its stored tensors, the codes first
    spec: TensorSpec  # of the codes
    size: int | None  # the weight's number of elements; None: the headers cannot tell
    fault: str = ""  # why it cannot be read


def remedy_of(form: str) -> str:
    """Return what to do about a weight whose codes cannot be read. form: a `Coded.format`."""
    package = DEQUANTIZERS.get(form)
    return "pass the original model in 16 or 32 bits" + (f", or dequantize it with {package}" if package else "")


def find_coded(
    specs: Mapping[str, TensorSpec], declared: Mapping[str, Any], listed: Collection[str] = ()
) -> dict[str, Coded]:
    """Find the quantized weights of a checkpoint, by their names in an unquantized model.

    Args:
        declared: the quantization config, from `find_declared`.
        listed: the layers in the files' metadata, from `listed_layers`.
    """
    coded: dict[str, Coded] = {}
    beside = _companions(specs) if any(spec.dtype in FP8_CODES for spec in specs.values()) else {}
    for name, spec in specs.items():
        if spec.dtype in BLOCK_TYPES:
            coded[name] = Coded(f"GGUF {spec.dtype}", (name,), spec, spec.size)
            continue
        fitting = (_fit(coding, name, specs) for coding in _OF_DTYPE.get(spec.dtype, ()))
        path, coding = next(filter(None, fitting), ("", None))
        module = name.removesuffix(".weight")
        if coding is None and name.endswith(".weight") and module in listed and spec.dtype in CODES:
            path, coding = module, LISTED
        elif coding is None and spec.dtype in FP8_CODES and "scale" not in name.rpartition(".")[2].lower():
            ends = " ".join(each.removeprefix(module) for each in beside.get(module, ()) if each != name)
            if ends or declared:
                path, coding = module, replace(UNKNOWN, codes=name.removeprefix(module), marks=ends)
        if coding is not None:
            coded[coding.weight(path)] = coded_as(coding, path, name, specs, declared)
    return coded


def is_marker(name: str) -> bool:
    """Return whether a tensor outside all quantized weights is a mark of quantization, not a parameter."""
    return name.rpartition(".")[2] == SCALED_FILE or name.endswith((DUMMY_SCALE, *CACHE_SCALES))


def _companions(specs: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
    """Return the tensors beside each weight except biases, by the weight's path: in its module, or named after it.

    Plain weights have no such tensors, so scales are found whatever a tool calls them.
    """
    companions: dict[str, list[str]] = {}
    for name in specs:
        parent, _, last = name.rpartition(".")
        if last not in ("weight", "bias"):
            companions.setdefault(parent, []).append(name)
        if "scale" in last.lower():
            path = name[: name.lower().rindex("scale")].rstrip("._").removesuffix(".weight")
            companions.setdefault(path, []).extend([name] if path != parent else [])
    return companions


def with_coded(specs: Mapping[str, TensorSpec], coded: Mapping[str, Coded]) -> dict[str, TensorSpec]:
    """Add a base's quantized weights to its tensors, under the names that updates use."""
    return {**specs, **{name: each.spec for name, each in coded.items()}}


def coded_as(
    coding: Coding, path: str, name: str, specs: Mapping[str, TensorSpec], declared: Mapping[str, Any]
) -> Coded:
    """Describe the weight at `path`, stored in a format with its codes in the tensor `name`."""
    beside = [path + end for end in f"{coding.marks} {coding.others}".split()]
    bits = _declared_bits(declared, path) if coding.bits == 0 else coding.bits
    spec = specs[name]
    size = spec.size if spec.dtype in TORCH_FLOATS else spec.nbytes * 8 // bits if bits else None
    return Coded(coding.format, (name, *(each for each in beside if each in specs)), spec, size, coding.why)


def _fit(coding: Coding, name: str, specs: Mapping[str, TensorSpec]) -> tuple[str, Coding] | None:
    """Return the weight's path and the format if the tensor `name` is codes in this format, else None."""
    if not name.endswith(coding.codes):
        return None
    path = name.removesuffix(coding.codes)
    marks = coding.marks.split()
    return (path, coding) if not marks or any(path + end in specs for end in marks) else None


def listed_layers(metadata: Mapping[str, str]) -> frozenset[str]:
    """Read the modules that a file's `_quantization_metadata` lists, like ComfyUI's comfy/utils.py."""
    try:
        layers = json.loads(metadata.get(LISTING, "{}"))["layers"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return frozenset()
    return frozenset(layers) if isinstance(layers, Mapping) else frozenset()


def find_declared(config: Mapping[str, Any], depth: int = DEPTH) -> Mapping[str, Any]:
    """Find the quantization config in a config or in the configs within it; empty if there is none."""
    for field in CONFIG_FIELDS:
        value = config.get(field)
        if isinstance(value, Mapping) and value:
            return value
    parts = (value for value in config.values() if isinstance(value, Mapping)) if depth else ()
    return next(filter(None, (find_declared(part, depth - 1) for part in parts)), {})


def declared_method(declared: Mapping[str, Any]) -> str | None:
    """Return a quantization config's name for its method; None if the config is empty."""
    if not declared:
        return None
    for field in ("quant_method", "quant_algo", "quant_type"):
        if isinstance(declared.get(field), str):
            return str(declared[field])
    if declared.get("load_in_4bit") or declared.get("load_in_8bit"):
        return "bitsandbytes"
    return "MLX" if {"bits", "group_size"} <= declared.keys() else "unnamed"


def _declared_bits(declared: Mapping[str, Any], path: str) -> int | None:
    """Read the bits per weight from the config of GPTQ, AWQ, MLX (by module too) or compressed-tensors.

    Return None if the config has none, or several that differ.
    """
    groups = declared.get("config_groups")
    weights = (
        [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    )
    places = [declared.get(path), declared, *weights]
    stated = [
        value
        for place in places
        if isinstance(place, Mapping)
        for field in ("bits", "w_bit", "num_bits")
        if type(value := place.get(field)) is int and 0 < value <= 32
    ]
    if not isinstance(declared.get(path), Mapping) and len(set(stated)) > 1:
        return None
    return stated[0] if stated else None


def stated_blocks(declared: Mapping[str, Any]) -> Blocks:
    """Read the blocks that a config names: of transformers' fp8, and of compressed-tensors' groups."""
    groups = declared.get("config_groups")
    schemes = groups.values() if isinstance(groups, Mapping) else ()
    weights = (scheme.get("weights") for scheme in schemes if isinstance(scheme, Mapping))
    blocks = [declared.get("weight_block_size")]
    for group in (weight for weight in weights if isinstance(weight, Mapping)):
        blocks += [
            group.get("block_structure"),
            [1, group.get("group_size")],
            STRATEGIES.get(str(group.get("strategy"))),
        ]
    pairs = [pair for pair in blocks if isinstance(pair, list) and len(pair) == 2]
    return tuple((high, wide) for high, wide in pairs if type(high) is type(wide) is int and min(high, wide) >= 0)
