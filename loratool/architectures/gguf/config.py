"""Rebuild a model's config.json from the fields of its GGUF file, by the rows of `CONFIGS`."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import InputError
from ..ties import GGUF_EMBEDDING, GGUF_HEAD
from .config_table import CONFIGS, IMPLIED, KINDS, MTP_LAYERS, OPTIONAL, SAME_AS, SIZES, TOKENS, USUAL, Config

CONTEXT_BEFORE = "original_max_position_embeddings"

PATTERN = "attention.sliding_window_pattern"

RECURRENT = "attention.recurrent_layers"

ROTATING = "attention.rope_pattern"

GATINGS = {1: "softmax", 2: "sigmoid"}  # expert_gating_func -> expert_selection_fn

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"

MTP = "nextn_predict_layers"  # the number of MTP layers, which are the last ones

DEFAULT_THETA = 10000.0  # llama.cpp's value for a file without one

OLMO3_THETA = 500000.0

QWEN_EVERY, QWEN_SECTIONS = 4, (11, 11, 10, 0)  # llama.cpp's and the classes' values for a file without them

MPT_ALIBI = 8.0

MODERN_BERT_EVERY = 3  # llama.cpp's value for a file without one

# Other fields of the rotary scaling of Llama 3.1 to 3.3, of which GGUF stores only the factors
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

LLAMA4 = LLAMA3 | {"high_freq_factor": 1.0}  # of Llama 4

LLAMA4_UNNORMED = 128  # the number of experts for which llama.cpp does not norm the queries and keys of Llama 4

GLM52_CONTEXT = 1 << 20  # the context from which llama.cpp has an own pattern of indexers for a file without one


@dataclass(frozen=True)
class GgufFields:
    """The fields and tensors of a GGUF file that describe its model."""

    name: str  # of the file, for messages
    architecture: str
    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]  # of its tensors
    numbers: Callable[[str], Sequence[float]]  # short tensor -> its numbers
    used: set[str] = field(default_factory=set)  # keys that were read

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key of the architecture.

        Raises:
            InputError: the value differs between layers.
        """
        value = self.each(key)
        if not isinstance(value, tuple):
            return default if value is None else value
        if len(set(value)) != 1:
            raise InputError(f"has a {self.architecture}.{key} for each layer: {value[:8]}", culprit=self.name)
        return value[0]

    def each(self, key: str) -> Any:
        """Return the value of a key, or a tuple of the layers' values if they differ; None without the key."""
        self.used.add(key)
        value = self.fields.get(f"{self.architecture}.{key}")
        if value is None:
            return None
        is_array = isinstance(value, Sequence) and not isinstance(value, str)
        values = tuple(value) if is_array else (value,)
        kinds = next((kinds for kinds, keys in KINDS.items() if key in keys), (int,))
        if not all(type(each) in kinds and _is_sane(each) for each in values):
            raise InputError(f"has {value!r} as {self.architecture}.{key}", culprit=self.name)
        return tuple(map(_shortest, values)) if is_array else _shortest(value)

    def need(self, key: str) -> Any:
        """Return the value of a key; raise InputError if it is missing."""
        value = self.get(key, self.get(SAME_AS[key]) if key in SAME_AS else None)
        if value is None and key == "attention.key_length":
            value = self.need("embedding_length") // max(1, self.need("attention.head_count"))
        if value is None:
            raise InputError(f"has no field {self.architecture}.{key}", culprit=self.name)
        return value

    def has(self, tensor: str) -> bool:
        return tensor in self.shapes

    def main_layers(self) -> int:
        """Return the number of layers without MTP layers.

        Raises:
            InputError: none is left.
        """
        layers, mtp = self.need("block_count"), self.get(MTP, 0) if self.architecture in MTP_LAYERS else 0
        if mtp and mtp >= layers:
            raise InputError(f"has {layers} layers, and {mtp} of them are MTP layers", culprit=self.name)
        return int(layers - mtp)

    def is_marked(self, mark: str) -> bool:
        """Return whether a tensor or a key has this name."""
        return self.has(mark) or bool(self.get(mark))

    def size(self, tensor: str, dimension: int) -> int:
        """Return the size of a tensor; raise InputError if the tensor is missing."""
        shape = self.shapes.get(tensor)
        if shape is None or dimension >= len(shape):
            raise InputError(f"has no tensor {tensor} of so many dimensions", culprit=self.name)
        return shape[dimension]


def rebuild_config(model: GgufFields) -> dict[str, Any]:
    """Return the config.json of a GGUF file's model; empty if its architecture is not in CONFIGS.

    Raises:
        InputError: a field is missing, or has a value that config.json cannot express.
    """
    rows = CONFIGS.get(model.architecture)
    if rows is None:
        return {}
    layers = model.main_layers()
    last = layers - 1
    table = next(row for row in rows if not row.mark or model.is_marked(row.mark.format(last=last)))
    _require_sizes(model, table)
    config: dict[str, Any] = {"architectures": [table.architecture], "model_type": table.model_type}
    keys = {name: key for name, key in table.keys.items() if key not in OPTIONAL or model.each(key) is not None}
    config |= {name: model.need(key) for name, key in keys.items()}
    config |= {name: model.size(*place) for name, place in table.sizes.items()}
    config |= {name: model.has(tensor.format(last=last)) for name, tensor in table.has.items()}
    config["vocab_size"] = model.size(GGUF_EMBEDDING, 0)
    config["tie_word_embeddings"] = GGUF_HEAD not in model.shapes
    config |= table.constants
    if layers < model.need("block_count"):
        config |= _mtp(model, layers)
    config |= {name: _token(model, key) for name, key in TOKENS.items()}
    if table.rotates:
        config |= _rotary(model, table)
    if table.window_every:
        config["layer_types"] = _layer_kinds(model, table.window_every, config)
    if table.nested:
        config |= RULES[table.nested](model, config)
    _require_told(model, table)
    return config


def _mtp(model: GgufFields, layers: int) -> dict[str, Any]:
    """Return the number of layers without MTP layers, and that of those; llama.cpp also runs files without these."""
    is_there = any(name.startswith(f"blk.{layers}.") for name in model.shapes)
    count = MTP_LAYERS[model.architecture].count
    return {"num_hidden_layers": layers} | ({count: model.get(MTP)} if count and is_there else {})


def _require_told(model: GgufFields, row: Config) -> None:
    """Raise InputError for a field that the class does not support and config.json cannot express."""
    start, usual = f"{model.architecture}.", dict(USUAL)
    heads = model.need("attention.head_count")
    if not {"num_key_value_heads", "num_kv_heads"} & row.keys.keys() and not row.own_heads:
        usual["attention.head_count_kv"] = heads
    if "head_dim" not in row.keys and not row.own_heads:
        usual["attention.key_length"] = model.need("embedding_length") // heads
    granted = {**usual, **row.granted}
    for key in (key.removeprefix(start) for key in model.fields if key.startswith(start)):
        value = _shortest(model.fields[start + key])
        if key in row.keys.values() or key in IMPLIED or value == granted.get(key, value if key in model.used else 0):
            continue
        why = (
            f"but {row.architecture} always has {granted[key]}"
            if key in granted
            else "for which config.json has no known field"
        )
        raise InputError(f"has {value!r} as {start}{key}, {why}", culprit=model.name)


def _require_sizes(model: GgufFields, row: Config) -> None:
    """Raise InputError for impossible sizes, which would break later computation."""
    has_heads = SIZES["num_attention_heads"] in row.keys.values()
    for key in (*SIZES.values(), "attention.key_length") if has_heads else ("embedding_length", "block_count"):
        value = model.need(key)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise InputError(f"has {value!r} as {model.architecture}.{key}", culprit=model.name)
    if model.need("block_count") > len(model.shapes):
        raise InputError(f"has fewer tensors than layers ({model.need('block_count')})", culprit=model.name)


def _token(model: GgufFields, key: str) -> int | None:
    """Return a token's number; None without one."""
    value = model.fields.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 32):
        raise InputError(f"has {value!r} as {key}", culprit=model.name)
    return value


def _is_sane(value: Any) -> bool:
    return isinstance(value, str) or 0 <= value < 1 << 62


def _shortest(value: Any) -> Any:
    """Return a 32-bit number as the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06."""
    if not isinstance(value, float):
        return value
    bits = struct.pack("<f", value)
    if struct.unpack("<f", bits)[0] != value:
        return value
    return next(short for digits in range(1, 18) if struct.pack("<f", short := float(f"{value:.{digits}g}")) == bits)


def _rotary(model: GgufFields, row: Config) -> dict[str, Any]:
    """Return the fields of the rotary embedding, under transformers 4's names, which 5 reads too."""
    rotated, head = model.get("rope.dimension_count"), model.need("attention.key_length")
    theta = model.get("rope.freq_base", DEFAULT_THETA)
    if not 0 < theta < math.inf:
        raise InputError(f"has {theta!r} as {model.architecture}.rope.freq_base", culprit=model.name)
    config = {row.theta: theta}
    if rotated not in (None, head) and not row.partial and "rope.dimension_count" not in row.keys.values():
        raise InputError(f"rotates {rotated} numbers of a head's {head}", culprit=model.name)
    if row.partial:
        config[row.partial] = (rotated or head) / head
    scaling = _scaling(model, row, theta, rotated or head)
    return config | ({"rope_scaling": {**scaling, **row.scaling}} if scaling else {})


def _scaling(model: GgufFields, row: Config, theta: float, rotated: int) -> dict[str, Any]:
    """Return the rotary scaling; empty without one.

    Raises:
        InputError: its kind or its factors are unknown.
    """
    kind, factor = model.get("rope.scaling.type"), model.get("rope.scaling.factor", model.get("rope.scale_linear"))
    if model.has(LONG):
        return _longrope(model, row)
    if model.has(FREQUENCIES):
        return _llama3(model, theta, rotated)
    if kind == "yarn":
        keys = {
            "factor": "rope.scaling.factor",
            "original_max_position_embeddings": "rope.scaling.original_context_length",
            "attention_factor": "rope.scaling.yarn_attn_factor",
            "beta_fast": "rope.scaling.yarn_beta_fast",
            "beta_slow": "rope.scaling.yarn_beta_slow",
        }
        return {"rope_type": "yarn"} | {
            name: value for name, key in keys.items() if (value := model.get(key)) is not None
        }
    if kind in (None, "linear") and factor not in (None, 0, 1.0):
        return {"rope_type": "linear", "factor": factor}
    if kind not in (None, "none", "linear"):
        raise InputError(f"has rotary scaling of the kind {kind!r} without its factors", culprit=model.name)
    return {}


def _longrope(model: GgufFields, row: Config) -> dict[str, Any]:
    """Return the scaling with factors for short and long texts, under the name of its kind that Phi 3 reads."""
    factors = {"long_factor": LONG, "short_factor": SHORT}
    scaling: dict[str, Any] = {name: [*map(_shortest, model.numbers(tensor))] for name, tensor in factors.items()}
    model.get("rope.scaling.attn_factor")  # marked as used: it follows from both lengths of texts
    context = model.get("rope.scaling.original_context_length", model.need("context_length"))
    beside = {} if CONTEXT_BEFORE in row.keys else {CONTEXT_BEFORE: context}
    return {"type": "longrope", **scaling, **beside}


def _llama3(model: GgufFields, theta: float, rotated: int) -> dict[str, Any]:
    """Return the scaling of Llama 3 or 4 if the file's factors are those."""
    stored = model.numbers(FREQUENCIES)
    for fields in (LLAMA3, LLAMA4):
        scaling = {"rope_type": "llama3", "factor": _shortest(max(stored, default=1.0)), **fields}
        expected = [_llama3_factor(scaling, 2 * math.pi * theta ** (2 * i / rotated)) for i in range(rotated // 2)]
        if len(stored) == len(expected) and all(abs(a - b) <= 1e-4 * b for a, b in zip(stored, expected, strict=True)):
            return scaling
    raise InputError(f"has factors of rotary frequencies ({FREQUENCIES}) that are not Llama 3's", culprit=model.name)


def _llama3_factor(scaling: Mapping[str, Any], wavelength: float) -> float:
    """Return the divisor of a frequency (transformers: modeling_rope_utils.py)."""
    low, high, context = (float(scaling[name]) for name in LLAMA3)
    turns = context / wavelength
    smooth = min(1.0, max(0.0, (turns - low) / (high - low))) if high > low else float(turns > low)
    return 1 / ((1 - smooth) / float(scaling["factor"]) + smooth)


def _deepseek(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of latent attention, and the fields on the choice of experts."""
    rotated = config["qk_rope_head_dim"]
    fields = {
        "num_key_value_heads": config["num_attention_heads"],
        "qk_nope_head_dim": model.need("attention.key_length_mla") - rotated,
        "norm_topk_prob": model.get("expert_weights_norm", False),
        "q_lora_rank": config.get("q_lora_rank"),
        "routed_scaling_factor": config.get("routed_scaling_factor", 1.0),
    }
    groups = config.get("n_group", 1)
    if config["model_type"] == "deepseek_v2":
        fields["topk_method"] = "group_limited_greedy" if groups > 1 else "greedy"
    else:
        fields |= {"n_group": groups, "topk_group": config.get("topk_group", 1)}
    multiplier = model.get("rope.scaling.yarn_log_multiplier")
    if multiplier is not None and "rope_scaling" in config:
        mscale = _shortest(struct.unpack("<f", struct.pack("<f", multiplier / 0.1))[0])
        fields["rope_scaling"] = config["rope_scaling"] | {"mscale": mscale, "mscale_all_dim": mscale}
    return fields


def _glm4_moe_lite(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return DeepSeek's fields, and which layers have experts."""
    dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    return _deepseek(model, config) | {"mlp_layer_types": ["dense" if i < dense else "sparse" for i in range(layers)]}


def _glm_dsa(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return DeepSeek's fields, and which layers have an indexer."""
    rotated, layers = config["qk_rope_head_dim"], config["num_hidden_layers"]
    size = model.need("attention.key_length") - config["kv_lora_rank"]
    if size != rotated:
        raise InputError(f"rotates {rotated} numbers of a head's {size}", culprit=model.name)
    key, full = "attention.indexer.types", [True] * layers
    if model.each(key) is not None or model.need("context_length") >= GLM52_CONTEXT:
        full = _of_layers(model, key, layers)
    return _deepseek(model, config) | {"indexer_types": ["full" if each else "shared" for each in full]}


# Numbers of layers of models with attention scaled by hidden size / heads, not by the head's size
WIDE_SCALE = {"gemma2": 46, "gemma3_text": 62}


def _gemma2(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    wide = config["num_hidden_layers"] == WIDE_SCALE[config["model_type"]]
    scale = config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"]
    return {"query_pre_attn_scalar": scale}


def _gemma3(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Gemma 2, and the frequency of layers with a window."""
    return _gemma2(model, config) | {"rope_local_base_freq": model.get("rope.freq_base_swa", DEFAULT_THETA)}


def _layer_kinds(model: GgufFields, every: int, config: Mapping[str, Any]) -> list[str]:
    """Return the kind of each layer: all but every `every`-th attend to a window, unless the file differs."""
    layers, pattern = config["num_hidden_layers"], model.fields.get(f"{model.architecture}.{PATTERN}")
    if isinstance(pattern, Sequence) and not isinstance(pattern, str):
        windowed = model.each(PATTERN)
        if len(windowed) != layers:
            raise InputError(f"has {len(windowed)} values of {PATTERN} for {layers} layers", culprit=model.name)
    else:
        model.used.add(PATTERN)
        if pattern is not None and (type(pattern) is not int or not 0 <= pattern < 1 << 31):
            raise InputError(f"has {pattern!r} as {model.architecture}.{PATTERN}", culprit=model.name)
        every = every if pattern is None else int(pattern)
        windowed = [every == 0 or (i + 1) % every != 0 for i in range(layers)]
    has_window = model.get("attention.sliding_window") != 0 and ("sliding_window" in config or every == 2)
    return ["sliding_attention" if each and has_window else "full_attention" for each in windowed]


def _gemma4(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Gemma 4's fields for each layer, and its two rotary embeddings."""
    layers, shared = config["num_hidden_layers"], config["num_kv_shared_layers"]
    windowed = model.each("attention.sliding_window_pattern")
    if not isinstance(windowed, tuple) or len(windowed) != layers:
        raise InputError("has no sliding_window_pattern with a value for each layer", culprit=model.name)
    widths = {"rope.dimension_count": "attention.key_length", "rope.dimension_count_swa": "attention.key_length_swa"}
    for rotated, width in widths.items():
        if model.get(rotated, model.need(width)) != model.need(width):
            raise InputError(
                f"rotates {model.get(rotated)} numbers of a head's {model.need(width)}", culprit=model.name
            )
    inner, heads = (
        _of_layers(model, "feed_forward_length", layers),
        _of_layers(model, "attention.head_count_kv", layers),
    )
    wide = [1 + (i >= layers - shared) for i in range(layers)]
    doubled = len(set(inner)) > 1
    if doubled and any(each != inner[0] * factor for each, factor in zip(inner, wide, strict=True)):
        raise InputError(f"has layers of widths that Gemma 4 does not have: {inner[:8]}", culprit=model.name)
    kinds = {
        kind: sorted({n for n, each in zip(heads, windowed, strict=True) if each is kind}) for kind in (True, False)
    }
    if any(len(values) > 1 for values in kinds.values()):
        raise InputError(
            f"has layers with numbers of heads that Gemma 4 does not have: {heads[:8]}", culprit=model.name
        )
    full = [i for i in range(layers) if not windowed[i]]
    config = {
        "layer_types": ["sliding_attention" if each else "full_attention" for each in windowed],
        "intermediate_size": inner[0],
        "use_double_wide_mlp": doubled,
        "num_key_value_heads": (kinds[True] or kinds[False])[0],
        "num_global_key_value_heads": (kinds[False] or kinds[True])[0],
        "attention_k_eq_v": any(model.has(f"blk.{i}.attn_k.weight") for i in full)
        and not any(model.has(f"blk.{i}.attn_v.weight") for i in full),
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": model.get("rope.freq_base", DEFAULT_THETA),
                "partial_rotary_factor": _rotated_part(model),
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": model.get("rope.freq_base_swa", DEFAULT_THETA),
            },
        },
    }  # fmt: skip
    if model.has("per_layer_token_embd.weight"):
        config["vocab_size_per_layer_input"] = model.size("per_layer_token_embd.weight", 0)
    if model.get("expert_count"):
        names = {"num_experts": "expert_count", "top_k_experts": "expert_used_count"}
        names["moe_intermediate_size"] = "expert_feed_forward_length"
        config |= {name: model.need(key) for name, key in names.items()}
    return config


def _of_layers(model: GgufFields, key: str, layers: int) -> list[Any]:
    """Return the value of a key for each layer."""
    value = model.each(key)
    values = [*value] if isinstance(value, tuple) else [model.need(key)] * layers
    if len(values) != layers:
        raise InputError(f"has {len(values)} values of {key} for {layers} layers", culprit=model.name)
    return values


def _rotated_part(model: GgufFields) -> float:
    """Return the fraction of each head that rotates: the other frequencies are divided by 1e30."""
    factors = model.numbers(FREQUENCIES) if model.has(FREQUENCIES) else (1.0,)
    rotated = sum(each == 1 for each in factors)
    if any(each not in (1, factors[-1]) for each in factors) or 1 in factors[rotated:]:
        raise InputError(
            f"has factors of rotary frequencies ({FREQUENCIES}) that are not Gemma 4's", culprit=model.name
        )
    return rotated / len(factors)


def _phi2(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of key heads, derived from the rows: Phi 2's converter does not store it."""
    head = config["hidden_size"] // config["num_attention_heads"]
    return {"num_key_value_heads": model.size("blk.0.attn_k.weight", 0) // max(1, head)}


def _falcon(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of Falcon's block, one of three: newer ones have groups of heads, the newest has two norms."""
    heads, norms = config["num_kv_heads"], 2 if model.has("blk.0.attn_norm_2.weight") else 1
    newer = norms == 2 or heads not in (1, config["num_attention_heads"])
    fields: dict[str, Any] = {"new_decoder_architecture": newer, "multi_query": newer or heads == 1}
    return fields | {"num_ln_in_parallel_attn": norms if newer else None}


def _exaone4(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields for layers without a window, if the file has no window: then all layers are rotated."""
    return {} if config.get("sliding_window") else {"sliding_window": None, "sliding_window_pattern": None}


def _llama4(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether queries and keys are normed, which llama.cpp tells by the number of experts.

    Raises:
        InputError: no layer has a window; which of them rotate is not in the file.
    """
    if model.get("attention.sliding_window") == 0:
        raise InputError("has no windows, for which config.json has no known fields", culprit=model.name)
    return {"use_qk_norm": config["num_local_experts"] != LLAMA4_UNNORMED}


def _lfm2(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the kind of each layer: one without heads of keys is a convolution."""
    size = config["hidden_size"] // config["num_attention_heads"]
    heads = _of_layers(model, "attention.head_count_kv", config["num_hidden_layers"])
    if len({*heads} - {0}) != 1:
        raise InputError(f"has layers with numbers of heads that LFM2 does not have: {heads[:8]}", culprit=model.name)
    if model.need("attention.key_length") != size:
        raise InputError(f"has heads of {model.need('attention.key_length')}, not of {size}", culprit=model.name)
    return {
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if each else "conv" for each in heads],
        "conv_bias": any(model.has(f"blk.{i}.shortconv.in_proj.bias") for i in range(len(heads))),
    }


def _minicpm3(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of latent attention, those of the values derived from the rows: the file has no field."""
    heads, rows = config["num_attention_heads"], model.size("blk.0.attn_kv_b.weight", 0)
    unrotated = model.need("attention.key_length") - config["qk_rope_head_dim"]
    if rows % heads or not 0 < unrotated < rows // heads:
        raise InputError(f"has {rows} rows for {heads} heads of {unrotated}", culprit="blk.0.attn_kv_b.weight")
    return {"qk_nope_head_dim": unrotated, "v_head_dim": rows // heads - unrotated}


def _ministral3(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary scaling with the scale of attention for long texts; llama.cpp takes 1 for its `mscale`."""
    if config.get("rope_scaling", {}).get("rope_type") != "yarn":
        raise InputError("scales attention for long texts without YaRN", culprit=model.name)
    model.need("rope.scaling.original_context_length")
    scaling = config["rope_scaling"] | {"llama_4_scaling_beta": model.need("attention.temperature_scale")}
    multiplier = model.get("rope.scaling.yarn_log_multiplier")
    return {"rope_scaling": scaling | ({"mscale": 1.0, "mscale_all_dim": multiplier} if multiplier else {})}


def _nemotron(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    model.get("attention.layer_norm_rms_epsilon")  # marked as used: it repeats the other epsilon
    return {}


def _phimoe(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the window.

    Raises:
        InputError: the file has factors for long texts, but not the scales of attention that belong to them.
    """
    if "rope_scaling" in config:
        raise InputError(
            "has rotary scaling without its short_mscale and long_mscale, which no GGUF file has", culprit=model.name
        )
    return {"sliding_window": model.get("attention.sliding_window") or None}


def _olmo3(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return no more fields; transformers 5 uses this frequency only for the layers with a window."""
    if {config["rope_theta"], model.get("rope.freq_base_swa", config["rope_theta"])} != {OLMO3_THETA}:
        raise InputError(f"has rotary frequencies of another base than {OLMO3_THETA:g}, Olmo 3's", culprit=model.name)
    return {}


def _hunyuan_moe(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return no more fields; in the class, each expert and the shared one have the width of the layer."""
    width = config["intermediate_size"]
    for key in ("expert_feed_forward_length", "expert_shared_feed_forward_length"):
        if model.get(key, width) != width:
            raise InputError(f"has experts of another width than its layers' {width}", culprit=model.name)
    return {}


def _qwen_linear(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the kinds of layers, the sizes of linear attention, and the parts of several positions' rotation."""
    layers, heads = config["num_hidden_layers"], config["linear_num_value_heads"]
    every = model.get("full_attention_interval", QWEN_EVERY)
    if not every > 0 or not heads > 0 or model.need("ssm.inner_size") % heads:
        raise InputError("has sizes of linear attention that Qwen does not have", culprit=model.name)
    linear = [(i + 1) % every != 0 for i in range(layers)]
    if f"{model.architecture}.{RECURRENT}" in model.fields:
        linear = _flags(model, RECURRENT, model.need("block_count"))[:layers]
    fields: dict[str, Any] = {
        "linear_value_head_dim": model.need("ssm.inner_size") // heads,
        "layer_types": ["linear_attention" if each else "full_attention" for each in linear],
        "attention_bias": any(model.has(f"blk.{i}.attn_q.bias") for i in range(layers)),
    }
    sections = model.each("rope.dimension_sections")
    if isinstance(sections, tuple) and sections != QWEN_SECTIONS:
        fields["rope_scaling"] = {"rope_type": "default", "mrope_section": [*sections[:3]]}
    return fields


def _mixer(model: GgufFields, config: Mapping[str, Any], last: str) -> dict[str, Any]:
    """Return the fields of Mamba's mixers, under names that begin as the class's do.

    Args:
        last: the path of a layer with a mixer.
    """
    width, inner = config["hidden_size"], model.need("ssm.inner_size")
    if not inner or inner % width:
        raise InputError(f"has mixers of the width {inner}, which is no multiple of {width}", culprit=model.name)
    biases = {name: model.has(f"{last}.{tensor}.bias") for name, tensor in (("conv", "ssm_conv1d"), ("proj", "ssm_in"))}
    return {"expand": inner // width, **{f"{name}_bias": value for name, value in biases.items()}}


def _mamba(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the widths and biases of the mixers; llama.cpp's converter writes no heads of attention for these."""
    if model.get("attention.head_count"):
        raise InputError("has heads of attention, which Mamba has not", culprit=model.name)
    model.get("ssm.dt_b_c_rms")  # marked as used: it tells the class
    mixer = _mixer(model, config, "blk.0")
    fields = {"expand": mixer["expand"], "use_conv_bias": mixer["conv_bias"], "use_bias": mixer["proj_bias"]}
    return fields if model.architecture == "mamba" else fields | {"head_dim": _mixer_head(model, config["num_heads"])}


def _mixer_head(model: GgufFields, heads: int) -> int:
    """Return the width of a mixer's heads."""
    inner: int = model.need("ssm.inner_size")
    if inner % max(1, heads):
        raise InputError(f"has mixers whose width is no multiple of their {heads} heads", culprit=model.name)
    return inner // max(1, heads)


def _attends(model: GgufFields, layers: int) -> tuple[list[bool], int]:
    """Return whether each layer attends, and the number of heads of the keys where one does."""
    heads = _of_layers(model, "attention.head_count_kv", layers)
    counts = {*heads} - {0}
    if len(counts) != 1 or 0 not in heads:
        raise InputError(f"has {heads[:8]} heads of the keys, not one number and 0 for mixers", culprit=model.name)
    return [each > 0 for each in heads], counts.pop()


def _granite_hybrid(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the kinds of layers and the fields of the mixers; the file tells no length of texts without positions."""
    attends, heads = _attends(model, config["num_hidden_layers"])
    mixer = _mixer(model, config, f"blk.{attends.index(False)}")
    rotates = model.fields.get(f"{model.architecture}.rope.scaling.finetuned") is True
    return {
        "layer_types": ["attention" if each else "mamba" for each in attends],
        "num_key_value_heads": heads,
        "attention_bias": model.has(f"blk.{attends.index(True)}.attn_q.bias"),
        "position_embedding_type": "rope" if rotates else None,
        "mamba_d_head": _mixer_head(model, config["mamba_n_heads"]),
    } | {f"mamba_{name}": value for name, value in mixer.items()}


def _nemotron_h(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the kinds of layers, each with one half of a usual layer, and the fields of the mixers."""
    layers = config["num_hidden_layers"]
    attends, heads = _attends(model, layers)
    routed, fed = ([model.has(f"blk.{i}.{name}.weight") for i in range(layers)] for name in ("ffn_gate_inp", "ffn_up"))
    kinds = [
        "*" if attends[i] else "E" if routed[i] else "-" if fed[i] else "M" if model.has(f"blk.{i}.ssm_a") else ""
        for i in range(layers)
    ]
    if "" in kinds or "M" not in kinds:
        raise InputError("has layers of a kind that Nemotron-H does not have", culprit=model.name)
    mixer = _mixer(model, config, f"blk.{kinds.index('M')}")
    for key in ("rope.freq_base", "rope.dimension_count"):
        model.get(key)  # marked as used: the class has no positions
    fields = {
        "hybrid_override_pattern": "".join(kinds),
        "num_key_value_heads": heads,
        "attention_bias": model.has(f"blk.{attends.index(True)}.attn_q.bias"),
        "mamba_head_dim": _mixer_head(model, config["mamba_num_heads"]),
        "use_bias": mixer["proj_bias"],
        "use_conv_bias": mixer["conv_bias"],
        "expand": mixer["expand"],
        "layer_norm_epsilon": _epsilon(model),
    }
    if "-" in kinds:
        block = f"blk.{kinds.index('-')}"
        fields["intermediate_size"] = model.size(f"{block}.ffn_up.weight", 0)
        fields["mlp_bias"] = model.has(f"{block}.ffn_up.bias")
    experts = model.get("expert_count")
    return fields if experts is None else fields | {"n_routed_experts": experts}


def _kimi_linear(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the kinds of layers, and the sizes of latent and of linear attention."""
    attends, _ = _attends(model, config["num_hidden_layers"])
    dense = model.get("leading_dense_block_count", 0)
    model.get("rope.freq_base")  # marked as used: the class has no positions
    return {
        "layer_types": ["full_attention" if each else "linear_attention" for each in attends],
        "mlp_layer_types": ["dense" if i < dense else "sparse" for i in range(len(attends))],
        "num_key_value_heads": config["num_attention_heads"],
        "qk_nope_head_dim": model.need("attention.key_length_mla") - config["qk_rope_head_dim"],
        "q_lora_rank": config.get("q_lora_rank"),
        "linear_num_heads": model.size(f"blk.{attends.index(False)}.ssm_beta.weight", 0),
    }


def _jamba(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the mixers, and which layers attend and which have experts: each n-th."""
    layers = config["num_hidden_layers"]
    attends, heads = _attends(model, layers)
    mixer = _mixer(model, config, f"blk.{attends.index(False)}")
    fields = {"num_key_value_heads": heads} | {f"mamba_{name}": value for name, value in mixer.items()}
    routed = [model.has(f"blk.{i}.ffn_gate_inp.weight") for i in range(layers)]
    for name, chosen in {"attn_layer": attends, "expert_layer": routed}.items():
        ways = ((n, chosen.index(True)) for n in range(1, layers + 1) if True in chosen)
        way = next((way for way in ways if [i % way[0] == way[1] for i in range(layers)] == chosen), None)
        if way is None:
            raise InputError(f"has layers of a kind that are not each n-th ({name})", culprit=model.name)
        fields |= {f"{name}_period": way[0], f"{name}_offset": way[1]}
    return fields


def _t5(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the decoder, and the activation: llama.cpp has one with a gate and one without."""
    buckets = config["relative_attention_num_buckets"]
    same = {
        "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        "attention.relative_buckets_count": buckets,
    }
    for key, value in same.items():
        if model.get(key, value) != value:
            raise InputError(f"has {model.get(key)} as {model.architecture}.{key}, not {value}", culprit=model.name)
    gated = model.has("enc.blk.0.ffn_gate.weight")
    fields = {"feed_forward_proj": "gated-gelu" if gated else "relu"}
    if model.architecture == "t5encoder":
        return fields
    if model.has("dec.blk.0.ffn_gate.weight") is not gated or model.size("dec.blk.0.attn_rel_b.weight", 0) != buckets:
        raise InputError("has a decoder of another kind than its encoder", culprit=model.name)
    layers = model.get("decoder_block_count", config["num_layers"])
    if layers > len(model.shapes):
        raise InputError(f"has fewer tensors than decoder layers ({layers})", culprit=model.name)
    return fields | {"num_decoder_layers": layers}


def _mpt(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of attention; the class has no biases, one ratio of widths and one strength of ALiBi."""
    if any(name.startswith("blk.0.") and name.endswith(".bias") for name in model.shapes):
        raise InputError("has biases, which MptForCausalLM does not have", culprit=model.name)
    if model.get("attention.max_alibi_bias", 0.0) != MPT_ALIBI:
        raise InputError(f"has no ALiBi of {MPT_ALIBI:g}, which MptForCausalLM always has", culprit=model.name)
    if model.size("blk.0.ffn_up.weight", 0) != 4 * config["d_model"]:
        raise InputError("has layers of another width than MptForCausalLM's, 4 times the model's", culprit=model.name)
    return {"attn_config": {"clip_qkv": model.get("attention.clamp_kqv")}}


def _dbrx(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    attention = {"kv_n_heads": model.need("attention.head_count_kv"), "rope_theta": config["rope_theta"]}
    experts = {"ffn_hidden_size": "feed_forward_length", "moe_num_experts": "expert_count"}
    experts["moe_top_k"] = "expert_used_count"
    return {
        "attn_config": attention | {"clip_qkv": model.get("attention.clamp_kqv")},
        "ffn_config": {name: model.need(key) for name, key in experts.items()} | {"hidden_size": config["d_model"]},
    }


def _mimo2(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the kinds of layers, their heads and rotary embeddings."""
    layers = config["num_hidden_layers"]
    windowed = _flags(model, PATTERN, model.need("block_count"))[:layers]
    heads = _of_layers(model, "attention.head_count_kv", model.need("block_count"))[:layers]
    heads_of = [n // (1 + each) for n, each in zip(heads, windowed, strict=True)]
    if len({*heads_of}) != 1 or heads != [heads_of[0] * (1 + each) for each in windowed]:
        raise InputError(f"has layers with numbers of heads that MiMo 2 does not have: {heads[:8]}", culprit=model.name)
    for i, each in enumerate(windowed):
        if model.has(f"blk.{i}.attn_sinks.weight") is not each:
            raise InputError("has sinks where MiMo 2 has none, or none where it has", culprit=f"blk.{i}.attn_sinks")
    head = config["head_dim"]
    rotated = model.get("rope.dimension_count", head) / head
    thetas = {"full_attention": "rope.freq_base", "sliding_attention": "rope.freq_base_swa"}
    return {
        "num_key_value_heads": heads_of[0],
        "layer_types": ["sliding_attention" if each else "full_attention" for each in windowed],
        "mlp_layer_types": _kinds_of_mlps(model, config),
        "attention_value_scale": model.get("attention.value_scale", 1.0),
        "sliding_window": model.need("attention.sliding_window")
        + 1,  # in the files on the Hub without the token itself
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": model.need(key), "partial_rotary_factor": rotated}
            for kind, key in thetas.items()
        },
    }


def _flags(model: GgufFields, key: str, layers: int) -> list[bool]:
    """Return the value of a key for each layer, which are numbers or booleans."""
    model.used.add(key)
    values = model.fields.get(f"{model.architecture}.{key}")
    if not isinstance(values, Sequence) or len(values) != layers or any(each not in (0, 1) for each in values):
        raise InputError(f"has no {model.architecture}.{key} with 0 or 1 for each layer", culprit=model.name)
    return [*map(bool, values)]


def _gemma3n(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Gemma 3n's fields for each layer, and the frequency of layers with a window.

    llama.cpp's converter adds rows of zeros to the embeddings of each layer, for the tokens of images and sounds.
    """
    layers, inputs = config["num_hidden_layers"], config["altup_num_inputs"]
    if inputs != model.size("altup_proj.weight", 0) + 1:
        raise InputError(f"has {inputs} as gemma3n.altup.num_inputs, and other matrices", culprit=model.name)
    return {
        "intermediate_size": _of_layers(model, "feed_forward_length", layers),
        "activation_sparsity_pattern": [*map(_quantile, _sparsity(model, layers))],
        "rope_local_base_freq": model.get("rope.freq_base_swa", DEFAULT_THETA),
    }


def _sparsity(model: GgufFields, layers: int) -> Sequence[float]:
    """Return how many deviations above the mean each layer's activations count from; minus infinity if all do."""
    key = "activation_sparsity_scale"
    model.used.add(key)
    values = model.fields.get(f"{model.architecture}.{key}")
    if not isinstance(values, Sequence) or len(values) != layers or not all(type(each) is float for each in values):
        raise InputError(f"has no {model.architecture}.{key} with a number for each layer", culprit=model.name)
    for each in values:
        if _quantile(each) is None:
            raise InputError(f"has {_shortest(each)!r} as {model.architecture}.{key}", culprit=model.name)
    return values


def _quantile(deviations: float) -> float | None:
    """Return the part of a normal distribution that is below, as a decimal; None if it has more than 6 digits."""
    if deviations == -math.inf:
        return 0.0
    below = (1 + math.erf(deviations / math.sqrt(2))) / 2
    density = math.exp(-deviations * deviations / 2) / math.sqrt(2 * math.pi)
    parts = (round(below, digits) for digits in range(1, 7))
    return next((part for part in parts if 0 < part < 1 and abs(part - below) < 1e-6 * density), None)


def _gemma_embedding(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Gemma 3's fields; llama.cpp scales attention by the heads' size in all of these models."""
    local = model.get("rope.freq_base_swa", DEFAULT_THETA)
    return {"query_pre_attn_scalar": config["head_dim"], "rope_local_base_freq": local}


def _modern_bert(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layers with a window, the two epsilons' value, and the pooling before a classifier."""
    if model.need("attention.sliding_window") == 0:
        raise InputError("has no layers with a window, which ModernBERT always has", culprit=model.name)
    model.used.add(PATTERN)
    every = model.fields.get(f"{model.architecture}.{PATTERN}", MODERN_BERT_EVERY)
    if type(every) is not int or every < 1:
        raise InputError(f"has {every!r} as {model.architecture}.{PATTERN}", culprit=model.name)
    return {
        "norm_eps": _epsilon(model),
        "global_attn_every_n_layers": every,
        "local_rope_theta": model.need("rope.freq_base_swa"),
        "sep_token_id": _token(model, "tokenizer.ggml.seperator_token_id"),
    } | _pooling(model, {1: "mean", 2: "cls"})


def _epsilon(model: GgufFields) -> float:
    """Return the epsilon of the norms, which the file has under one of two names, or both."""
    found = {model.get(f"attention.layer_norm_{name}epsilon") for name in ("", "rms_")} - {None}
    if len(found) != 1:
        raise InputError(f"has {found or 'none'} as epsilons of norms, not one", culprit=model.name)
    return float(found.pop())


def _eurobert(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    mask = _token(model, "tokenizer.ggml.mask_token_id")
    fields = {"tie_word_embeddings": False} if mask is None else {"tie_word_embeddings": False, "mask_token_id": mask}
    return fields | _pooling(model, {1: "mean"})


def _pooling(model: GgufFields, names: Mapping[int, str]) -> dict[str, Any]:
    """Return the field for the pooling before a classifier, if the file has one."""
    kind = model.get("classifier.pooling_type")
    if kind is not None and kind not in names:
        raise InputError(f"has {kind!r} as {model.architecture}.classifier.pooling_type", culprit=model.name)
    return {} if kind is None else {"classifier_pooling": names[kind]}


def _granite_swa(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base of each layer's frequencies: 0 if it does not rotate. The converter writes one base for all."""
    if f"{model.architecture}.{ROTATING}" not in model.fields:
        return {}
    rotating = _flags(model, ROTATING, config["num_hidden_layers"])
    return {"layer_rope_theta": [config["rope_theta"] if each else 0.0 for each in rotating]}


def _mellum(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the two rotary embeddings: only layers without a window have a scaling."""
    theta = model.get("rope.freq_base", DEFAULT_THETA)
    scaling = _scaling(model, CONFIGS["mellum"][0], theta, config["head_dim"])
    windowed = {"rope_type": "default", "rope_theta": model.get("rope.freq_base_swa", theta)}
    full = {"rope_type": "default", "rope_theta": theta} | scaling
    return {"rope_parameters": {"full_attention": full, "sliding_attention": windowed}}


def _kinds_of_mlps(model: GgufFields, config: Mapping[str, Any]) -> list[str]:
    """Return which layers have experts."""
    layers = range(config["num_hidden_layers"])
    return ["sparse" if model.has(f"blk.{i}.ffn_gate_inp.weight") else "dense" for i in layers]


def _hy_v3(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "mlp_layer_types": _kinds_of_mlps(model, config),
        "num_shared_experts": _shared_experts(model, config["moe_intermediate_size"]),
    }


def _shared_experts(model: GgufFields, width: int) -> int:
    """Return the number of shared experts, which are one of a multiple of the others' width."""
    shared = model.get("expert_shared_feed_forward_length", 0)
    if not width or shared % width:
        raise InputError(f"has shared experts of the width {shared}, no multiple of {width}", culprit=model.name)
    return int(shared // width)


def _cohere2_moe(model: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return which layers have experts, how these are chosen, and the number of shared ones.

    llama.cpp rotates all layers without experts, which is what the class does by default.
    """
    kinds, gating, dense = (
        _kinds_of_mlps(model, config),
        model.get("expert_gating_func", 2),
        "leading_dense_block_count",
    )
    if gating not in GATINGS or sorted(kinds) != kinds or kinds.count("dense") != model.get(dense, 0):
        raise InputError("has layers or experts that Cohere 2 does not have", culprit=model.name)
    shared = _shared_experts(model, config["intermediate_size"])
    if model.get("expert_shared_count", 0) != shared:
        raise InputError(f"has another number of shared experts than {shared}, by their width", culprit=model.name)
    return {
        "mlp_layer_types": kinds,
        "expert_selection_fn": GATINGS[gating],
        "num_shared_experts": shared,
        "prefix_dense_intermediate_size": model.size("blk.0.ffn_up.weight", 0) if "dense" in kinds else None,
    }


# Rows' `nested` -> (the file's model, the config so far) -> more fields
RULES: dict[str, Callable[[GgufFields, Mapping[str, Any]], dict[str, Any]]] = {
    "dbrx": _dbrx,
    "cohere2-moe": _cohere2_moe,
    "deepseek": _deepseek,
    "eurobert": _eurobert,
    "exaone4": _exaone4,
    "falcon": _falcon,
    "gemma-embedding": _gemma_embedding,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "glm-dsa": _glm_dsa,
    "glm4-moe-lite": _glm4_moe_lite,
    "granite-hybrid": _granite_hybrid,
    "granite-swa": _granite_swa,
    "hunyuan-moe": _hunyuan_moe,
    "hy-v3": _hy_v3,
    "jamba": _jamba,
    "kimi-linear": _kimi_linear,
    "lfm2": _lfm2,
    "llama4": _llama4,
    "mamba": _mamba,
    "mellum": _mellum,
    "mimo2": _mimo2,
    "minicpm3": _minicpm3,
    "ministral3": _ministral3,
    "modern-bert": _modern_bert,
    "mpt": _mpt,
    "nemotron": _nemotron,
    "nemotron-h": _nemotron_h,
    "olmo3": _olmo3,
    "phi3": lambda model, config: {"sliding_window": model.get("attention.sliding_window") or None},
    "phi2": _phi2,
    "phimoe": _phimoe,
    "qwen-linear": _qwen_linear,
    "t5": _t5,
}
