"""Derive a model's tensors and shapes from its config.json, with a literal table for each family.

Names, shapes and defaults of missing config fields are those of transformers 5.24 (`named_parameters()` and the config
classes). A tied matrix is listed once, under the embedding's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError

# (name, dimensions as keys of `_sizes`, flags of `_flags` that must all be set for the tensor to exist)
ShapeRows = tuple[tuple[str, ...], ...]

MAX_LAYERS = 10_000  # a config with more is damaged
MAX_SIZE = 1 << 40

# Suffixes of classes with a language model's head, which is the same within a family.
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")


@dataclass(frozen=True)
class Family:
    """The tensors of a model family, with and without the head of a language model."""

    bare: str  # the class without the head
    lm: str  # the class with it
    prefix: str  # before the names of the bare class's tensors in `lm`
    defaults: Mapping[str, Any]  # of config.json's fields, by their common names
    tensors: ShapeRows  # outside the blocks
    block: str  # the path of the blocks, without their number
    blocks: ShapeRows  # in each block
    lm_only: ShapeRows  # only in `lm`
    bare_only: ShapeRows = ()  # only in `bare`
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # common name -> this family's; the first set
    headless: bool = False  # a config without a class means `bare`


def _layer_norm(name: str, flag: str = "") -> ShapeRows:
    return tuple((f"{name}.{last}", "d", *flag.split()) for last in ("weight", "bias"))


def _linear(name: str, out: str, inp: str, *flags: str) -> ShapeRows:
    return ((f"{name}.weight", f"{out} {inp}", *flags), (f"{name}.bias", out, *flags))


_GPT2 = Family(
    bare="GPT2Model",
    lm="GPT2LMHeadModel",
    prefix="transformer.",
    names={
        "hidden_size": ("n_embd", "hidden_size"),
        "num_hidden_layers": ("n_layer", "num_hidden_layers"),
        "num_attention_heads": ("n_head", "num_attention_heads"),
        "max_position_embeddings": ("n_positions", "max_position_embeddings"),
        "intermediate_size": ("n_inner",),
    },
    defaults={
        "vocab_size": 50257,
        "max_position_embeddings": 1024,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "tie_word_embeddings": True,
    },
    tensors=(("wte.weight", "v d"), ("wpe.weight", "n d"), *_layer_norm("ln_f")),
    block="h",
    blocks=(  # Conv1D: the weight is (in, out)
        *_layer_norm("ln_1"),
        ("attn.c_attn.weight", "d 3d"),
        ("attn.c_attn.bias", "3d"),
        ("attn.c_proj.weight", "d d"),
        ("attn.c_proj.bias", "d"),
        *_layer_norm("ln_2"),
        ("crossattention.c_attn.weight", "d 2d", "add_cross_attention"),
        ("crossattention.c_attn.bias", "2d", "add_cross_attention"),
        ("crossattention.q_attn.weight", "d d", "add_cross_attention"),
        ("crossattention.q_attn.bias", "d", "add_cross_attention"),
        ("crossattention.c_proj.weight", "d d", "add_cross_attention"),
        ("crossattention.c_proj.bias", "d", "add_cross_attention"),
        *_layer_norm("ln_cross_attn", "add_cross_attention"),
        ("mlp.c_fc.weight", "d i"),
        ("mlp.c_fc.bias", "i"),
        ("mlp.c_proj.weight", "i d"),
        ("mlp.c_proj.bias", "d"),
    ),
    lm_only=(("lm_head.weight", "v d", "untied"),),
)

_BERT_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "tie_word_embeddings": True,
}

_BERT_TENSORS: ShapeRows = (
    ("embeddings.word_embeddings.weight", "v d"),
    ("embeddings.position_embeddings.weight", "n d"),
    ("embeddings.token_type_embeddings.weight", "t d"),
    *_layer_norm("embeddings.LayerNorm"),
)

_BERT_MLP: ShapeRows = (
    *_linear("intermediate.dense", "i", "d"),
    *_linear("output.dense", "d", "i"),
    *_layer_norm("output.LayerNorm"),
)

_BERT_BLOCK: ShapeRows = (
    *_linear("attention.self.query", "d", "d"),
    *_linear("attention.self.key", "d", "d"),
    *_linear("attention.self.value", "d", "d"),
    *_linear("attention.output.dense", "d", "d"),
    *_layer_norm("attention.output.LayerNorm"),
    *_linear("crossattention.self.query", "d", "d", "add_cross_attention"),
    *_linear("crossattention.self.key", "d", "d", "add_cross_attention"),
    *_linear("crossattention.self.value", "d", "d", "add_cross_attention"),
    *_linear("crossattention.output.dense", "d", "d", "add_cross_attention"),
    *_layer_norm("crossattention.output.LayerNorm", "add_cross_attention"),
    *_BERT_MLP,
)

_BERT = Family(
    bare="BertModel",
    lm="BertForMaskedLM",
    prefix="bert.",
    headless=True,
    defaults=_BERT_DEFAULTS,
    tensors=_BERT_TENSORS,
    block="encoder.layer",
    blocks=_BERT_BLOCK,
    bare_only=_linear("pooler.dense", "d", "d"),
    lm_only=(
        *_linear("cls.predictions.transform.dense", "d", "d"),
        *_layer_norm("cls.predictions.transform.LayerNorm"),
        ("cls.predictions.bias", "v"),
        ("cls.predictions.decoder.weight", "v d", "untied"),
        ("cls.predictions.decoder.bias", "v", "untied"),
    ),
)

_ROBERTA = Family(
    bare="RobertaModel",
    lm="RobertaForMaskedLM",
    prefix="roberta.",
    headless=True,
    defaults={**_BERT_DEFAULTS, "vocab_size": 50265},
    tensors=_BERT_TENSORS,
    block="encoder.layer",
    blocks=_BERT_BLOCK,
    bare_only=_linear("pooler.dense", "d", "d"),
    lm_only=(
        *_linear("lm_head.dense", "d", "d"),
        *_layer_norm("lm_head.layer_norm"),
        ("lm_head.bias", "v"),
        ("lm_head.decoder.weight", "v d", "untied"),
        ("lm_head.decoder.bias", "v", "untied"),
    ),
)

_DEBERTA = Family(
    bare="DebertaV2Model",
    lm="DebertaV2ForMaskedLM",
    prefix="deberta.",
    headless=True,
    names={"head_dim": ("attention_head_size",)},
    defaults={
        **_BERT_DEFAULTS,
        "vocab_size": 128100,
        "hidden_size": 1536,
        "num_hidden_layers": 24,
        "num_attention_heads": 24,
        "intermediate_size": 6144,
        "type_vocab_size": 0,
    },
    tensors=(
        ("embeddings.word_embeddings.weight", "v emb"),
        ("embeddings.position_embeddings.weight", "n emb", "position_biased_input"),
        ("embeddings.token_type_embeddings.weight", "t emb", "token_types"),
        ("embeddings.embed_proj.weight", "d emb", "embed_proj"),
        *_layer_norm("embeddings.LayerNorm"),
        ("encoder.rel_embeddings.weight", "rel d", "relative_attention"),
        *_layer_norm("encoder.LayerNorm", "norm_rel_ebd"),
        ("encoder.conv.conv.weight", "d group k", "conv"),
        ("encoder.conv.conv.bias", "d", "conv"),
        *_layer_norm("encoder.conv.LayerNorm", "conv"),
    ),
    block="encoder.layer",
    blocks=(
        *_linear("attention.self.query_proj", "q", "d"),
        *_linear("attention.self.key_proj", "q", "d"),
        *_linear("attention.self.value_proj", "q", "d"),
        *_linear("attention.self.pos_key_proj", "q", "d", "relative_attention", "pos_key_proj"),
        *_linear("attention.self.pos_query_proj", "q", "d", "relative_attention", "pos_query_proj"),
        *_linear("attention.output.dense", "d", "d"),
        *_layer_norm("attention.output.LayerNorm"),
        *_BERT_MLP,
    ),
    lm_only=(
        ("cls.predictions.transform.dense.weight", "emb d", "legacy"),
        ("cls.predictions.transform.dense.bias", "emb", "legacy"),
        ("cls.predictions.transform.LayerNorm.weight", "emb", "legacy"),
        ("cls.predictions.transform.LayerNorm.bias", "emb", "legacy"),
        ("cls.predictions.bias", "v", "legacy"),
        ("cls.predictions.decoder.weight", "v emb", "legacy", "untied"),
        ("cls.predictions.decoder.bias", "v", "legacy", "untied"),
        *_linear("lm_predictions.lm_head.dense", "d", "d", "new_head"),
        *_layer_norm("lm_predictions.lm_head.LayerNorm", "new_head"),
        ("lm_predictions.lm_head.bias", "v", "new_head"),
    ),
)

_LLAMA_TENSORS: ShapeRows = (("embed_tokens.weight", "v d"), ("norm.weight", "d"))
_LLAMA_HEAD: ShapeRows = (("lm_head.weight", "v d", "untied"),)
_NORMS: ShapeRows = (("input_layernorm.weight", "d"), ("post_attention_layernorm.weight", "d"))

_ATTENTION: ShapeRows = (
    ("self_attn.q_proj.weight", "q d"),
    ("self_attn.k_proj.weight", "kv d"),
    ("self_attn.v_proj.weight", "kv d"),
    ("self_attn.o_proj.weight", "d q"),
)

_QKV_BIASES = (("self_attn.q_proj.bias", "q"), ("self_attn.k_proj.bias", "kv"), ("self_attn.v_proj.bias", "kv"))
_ATTENTION_BIASES: ShapeRows = tuple((*row, "attention_bias") for row in (*_QKV_BIASES, ("self_attn.o_proj.bias", "d")))
_HEAD_NORMS: ShapeRows = (("self_attn.q_norm.weight", "h"), ("self_attn.k_norm.weight", "h"))
_MLP: ShapeRows = (("mlp.gate_proj.weight", "i d"), ("mlp.up_proj.weight", "i d"), ("mlp.down_proj.weight", "d i"))

_MLP_BIASES: ShapeRows = (
    ("mlp.gate_proj.bias", "i", "mlp_bias"),
    ("mlp.up_proj.bias", "i", "mlp_bias"),
    ("mlp.down_proj.bias", "d", "mlp_bias"),
)

_GEMMA_NORMS: ShapeRows = (("pre_feedforward_layernorm.weight", "d"), ("post_feedforward_layernorm.weight", "d"))


def _decoder(name: str, blocks: ShapeRows, **defaults: Any) -> Family:
    """Return a family built like Llama; `defaults` replace Llama's."""
    return Family(
        bare=f"{name}Model",
        lm=f"{name.removesuffix('Text')}ForCausalLM",
        prefix="model.",
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            **defaults,
        },
        tensors=_LLAMA_TENSORS,
        block="layers",
        blocks=blocks,
        lm_only=_LLAMA_HEAD,
    )


_QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768, "num_key_value_heads": 32}
_GEMMA = {"vocab_size": 256000, "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}

_GEMMA2 = {
    **_GEMMA,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}

# model_type in config.json -> its tensors
CONFIG_FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "bert": _BERT,
    "roberta": _ROBERTA,
    "deberta-v2": _DEBERTA,
    "llama": _decoder("Llama", (*_NORMS, *_ATTENTION, *_ATTENTION_BIASES, *_MLP, *_MLP_BIASES)),
    "mistral": _decoder(
        "Mistral",
        (*_NORMS, *_ATTENTION, *_MLP),
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    "mixtral": _decoder(
        "Mixtral",
        (
            *_NORMS,
            *_ATTENTION,
            ("mlp.gate.weight", "e d"),
            ("mlp.experts.gate_up_proj", "e 2i d"),
            ("mlp.experts.down_proj", "e d i"),
        ),
        intermediate_size=14336,
        num_key_value_heads=8,
        num_local_experts=8,
        max_position_embeddings=131072,
    ),
    "qwen2": _decoder("Qwen2", (*_NORMS, *_ATTENTION, *_QKV_BIASES, *_MLP), **_QWEN),
    "qwen3": _decoder(
        "Qwen3", (*_NORMS, *_ATTENTION, *_ATTENTION_BIASES, *_HEAD_NORMS, *_MLP), **{**_QWEN, "head_dim": 128}
    ),
    "gemma": _decoder(
        "Gemma",
        (*_NORMS, *_ATTENTION, *_ATTENTION_BIASES, *_MLP),
        **{
            **_GEMMA,
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
    ),
    "gemma2": _decoder("Gemma2", (*_NORMS, *_GEMMA_NORMS, *_ATTENTION, *_ATTENTION_BIASES, *_MLP), **_GEMMA2),
    "gemma3_text": _decoder(
        "Gemma3Text",
        (*_NORMS, *_GEMMA_NORMS, *_ATTENTION, *_ATTENTION_BIASES, *_HEAD_NORMS, *_MLP),
        **{**_GEMMA2, "vocab_size": 262208, "max_position_embeddings": 131072},
    ),
    "phi3": _decoder(
        "Phi3",
        (
            *_NORMS,
            ("self_attn.qkv_proj.weight", "qkv d"),
            ("self_attn.o_proj.weight", "d q"),
            ("mlp.gate_up_proj.weight", "2i d"),
            ("mlp.down_proj.weight", "d i"),
        ),
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        max_position_embeddings=4096,
    ),
}


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every parameter of the class that `model_class` names.

    A class with another head counts as the bare class, because the tables lack its head.

    Raises:
        InputError: the family has no table, or a field of the config is not a valid size.
    """
    model_type = config.get("model_type")
    if model_type is None:
        raise InputError(
            "names no model_type", culprit="config.json", remedy="name a model's config.json or checkpoint"
        )
    family = CONFIG_FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise InputError(
            f"the family {str(model_type)[:40]!r} is not among those known by config.json alone "
            f"({', '.join(CONFIG_FAMILIES)})",
            remedy="name the checkpoint: its shapes are enough for any family",
        )
    sizes, layers = _sizes(config, family)
    flags = _flags(config, family, sizes)

    def shapes_of(rows: ShapeRows, prefix: str = "") -> dict[str, tuple[int, ...]]:
        present = [(name, dims) for name, dims, *needs in rows if flags.issuperset(needs)]
        return {prefix + name: tuple(sizes[d] for d in dims.split()) for name, dims in present}

    is_lm = model_class(config) == family.lm
    prefix = family.prefix if is_lm else ""
    shapes = shapes_of(family.tensors, prefix)
    for i in range(layers):
        shapes |= shapes_of(family.blocks, f"{prefix}{family.block}.{i}.")
    return shapes | shapes_of(family.lm_only if is_lm else family.bare_only)


def model_class(config: Mapping[str, Any]) -> str:
    """Return the class whose tensors are listed: `Family.bare` or `Family.lm` of the config's family."""
    family, named = CONFIG_FAMILIES[config["model_type"]], declared_class(config)
    if not named:
        return family.bare if family.headless else family.lm
    return family.lm if named.endswith(LANGUAGE_MODELS) else family.bare


def tied_head(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the names of the embedding and of the head tied to it; None if the class has no tied head."""
    family = CONFIG_FAMILIES[config["model_type"]]
    flags = _flags(config, family, _sizes(config, family)[0])
    heads = [
        name for name, _, *needs in family.lm_only if "untied" in needs and flags.issuperset({*needs} - {"untied"})
    ]
    if model_class(config) != family.lm or "untied" in flags or not heads:
        return None
    return family.prefix + family.tensors[0][0], heads[0]


def declared_class(config: Mapping[str, Any]) -> str:
    """Return the first of the config's `architectures`, or an empty string."""
    listed = config.get("architectures")
    return listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""


def config_field(config: Mapping[str, Any], family: Family, name: str) -> Any:
    """Return the value of a field by its common name; null means the default, as in transformers."""
    spellings = family.names.get(name, (name,))
    value = next((config[each] for each in spellings if config.get(each) is not None), None)
    return family.defaults.get(name) if value is None else value


def _size(config: Mapping[str, Any], family: Family, name: str, default: int | None = None, minimum: int = 1) -> int:
    value = config_field(config, family, name)
    value = default if value is None else value
    if type(value) is not int or not minimum <= value <= MAX_SIZE:
        raise InputError(f"config.json says {value!r}, which is not a size", culprit=family.names.get(name, (name,))[0])
    return value


def _sizes(config: Mapping[str, Any], family: Family) -> tuple[dict[str, int], int]:
    """Return the dimensions by the tables' names, and the number of layers."""

    def size(name: str, default: int | None = None, minimum: int = 1) -> int:
        return _size(config, family, name, default, minimum)

    layers, d, heads = size("num_hidden_layers"), size("hidden_size"), size("num_attention_heads")
    if layers > MAX_LAYERS:
        raise InputError(f"config.json says {layers} layers", culprit="num_hidden_layers")
    no_groups = config.get("num_key_value_heads", heads) is None  # null is not the family's default here
    kv_heads = heads if no_groups else size("num_key_value_heads", heads)
    h = size("head_dim", max(1, d // heads))
    i, n = size("intermediate_size", 4 * d), size("max_position_embeddings")
    buckets, farthest = config.get("position_buckets"), config.get("max_relative_positions")
    span = next((v for v in (buckets, farthest) if type(v) is int and v > 0), n)
    sizes = {"d": d, "2d": 2 * d, "3d": 3 * d, "v": size("vocab_size"), "n": n, "i": i, "2i": 2 * i}
    sizes |= {"h": h, "q": heads * h, "kv": kv_heads * h, "qkv": (heads + 2 * kv_heads) * h, "rel": 2 * span}
    sizes |= {"t": size("type_vocab_size", 0, minimum=0), "e": size("num_local_experts", 1)}
    sizes |= {"emb": size("embedding_size", d), "k": size("conv_kernel_size", 0, minimum=0)}
    return sizes | {"group": d // size("conv_groups", 1)}, layers


def _flags(config: Mapping[str, Any], family: Family, sizes: Mapping[str, int]) -> frozenset[str]:
    """Return the flags that this config sets; the tables use them for optional tensors."""
    kinds = config.get("pos_att_type") or ()
    kinds = kinds if isinstance(kinds, (str, list)) else ()
    norms = config.get("norm_rel_ebd")
    separate_keys = not config.get("share_att_key")
    flags = {
        "untied": not config_field(config, family, "tie_word_embeddings"),
        "attention_bias": config.get("attention_bias"),
        "mlp_bias": config.get("mlp_bias"),
        "add_cross_attention": config.get("add_cross_attention"),
        "position_biased_input": config.get("position_biased_input", True),
        "token_types": sizes["t"],
        "embed_proj": sizes["emb"] != sizes["d"],
        "relative_attention": config.get("relative_attention"),
        "norm_rel_ebd": isinstance(norms, str) and "layer_norm" in [part.strip() for part in norms.lower().split("|")],
        "pos_key_proj": separate_keys and "c2p" in kinds,
        "pos_query_proj": separate_keys and "p2c" in kinds,
        "conv": sizes["k"],
        "legacy": config.get("legacy", True),
        "new_head": not config.get("legacy", True),
    }
    return frozenset(name for name, value in flags.items() if value)
