"""The properties of a runtime: what it reads of an adapter, and what it does with the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# Features beyond plain LoRA of one rank and one scale -> their text in the guide's table
FEATURES = {
    "rslora": "rsLoRA",
    "rank_pattern": "unequal ranks",
    "alpha_pattern": "unequal scales",
    "dora": "DoRA",
    "bias": "biases",
    "modules_to_save": "modules_to_save",
    "tokens": "trained tokens",
    "embeddings": "LoRA on embeddings",
    "head": "LoRA on the head",
    "experts": "experts",
    "towers": "towers",
}

# How a runtime handles a feature
OUTCOMES = {
    "yes": "applied",
    "class": "applied if the served class supports it",
    "refuses": "refused, at the latest when the adapter is first used",
    "ignores": "ignored without a warning",
    "misreads": "misread without a warning",
}

# The module paths that a runtime looks up: PEFT's paths in transformers' class with everything that PEFT writes; the
# same paths with factors only; or the paths of the base's files
Names = Literal["whole", "class", "file"]

Renames = tuple[tuple[str, str], ...]  # (expression, replacement), applied to a path in order

# Llama's modules, as an expression: a runtime finds them on any base
LLAMA = r"model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"

EXPERTS = ("gate_proj", "up_proj", "down_proj")

BOTH, EMBEDDING = ("embeddings", "head"), ("embeddings",)


@dataclass(frozen=True)
class Served:
    """The parts of an adapter that a runtime applies to one class of models."""

    heads: tuple[str, ...] = ()  # of FEATURES: LoRA on the embedding, and on the head
    takes_experts: bool = True
    stacks: bool = False  # experts are stacks; else separate
    experts: tuple[str, str, str] = EXPERTS  # the last names of their matrices
    splits: tuple[str, ...] = ()  # last names of modules that it has only as parts
    turns_rotary: bool = False  # it has rows of q and k in halves, where the class has pairs
    towers: bool = False  # modules beside the language model
    renames: Renames = ()
    never: str = ""  # expression for the paths of modules without LoRA; empty for none


@dataclass(frozen=True)
class Runtime:
    """A program that loads adapters."""

    key: str  # for --for
    title: str
    version: str  # that was checked
    checked: Literal["run", "read"]  # its functions were run, or its source was read
    reads: Mapping[str, str]  # each of FEATURES -> one of OUTCOMES
    miss: str  # of OUTCOMES, for a tensor of a missing module
    names: Names = "file"
    # the part of a path that may differ: nothing, the part before the layer's number or before a path of the files, or
    # names that it maps: those before transformers 4.52 (`old_names`), and those of only a class's language model
    prefixes: Literal["exact", "any", "longer", "mapped"] = "exact"
    old_names: str = ""  # expression for the model types whose old names it maps
    modules: str = ".*"  # expression that the path of every module must match
    renames: Renames = ()
    one_rank: bool = False
    half: bool = False  # it stores the factors as float16, B times the scale
    max_ranks: tuple[int, ...] = ()  # values of `rank_flag` if it has one; the largest is the limit; empty for no limit
    default_rank: int = 0  # without that flag
    rank_flag: str = ""
    modelfile: bool = False  # it needs a Modelfile that names the adapter, which is written beside it
    limit: str = ""  # a sentence on what it ignores in every adapter on a base of `limited` quantization
    limited: str = ""  # a `quant_method`
    tower_flag: str = ""  # the flag that enables adapters on towers
    # last name of a module -> modules that must be beside it if the model has them
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    whole_experts: bool = False  # if one expert of a layer is adapted, all experts and all their matrices must be
    every_layer: bool = False  # a kind of module must be in every layer
    targets: Literal["paths", "last names"] = "paths"  # in target_modules
    served: Served = field(default_factory=Served)  # for a class that is not in `classes`
    # by the class in config.json, or `type:class`; others are unknown
    classes: Mapping[str, Served] = field(default_factory=dict)
    without: frozenset[str] = frozenset()  # classes that it serves without adapters


# The norms that a program divides DoRA by: of W + D, as merge does, or of W; "none" if it applies no DoRA
Norms = Literal["sum", "base", "none"]


@dataclass(frozen=True)
class ImageRuntime:
    """A program that loads adapters of image models."""

    key: str  # for --for
    title: str
    version: str  # that was checked
    checked: Literal["run", "read"]  # its functions were run, or its source was read
    dora: Norms  # of DoRA along the outputs
    along_inputs: bool  # it applies DoRA along the inputs
    kinds: frozenset[str]  # of updates beside DoRA that it applies as merge does, if it reads the names
    families: frozenset[str]  # keys of FAMILIES that it loads adapters of
    # kind and end of a tensor's name -> its number of axes, where the kind with it is not applied; 0 for any
    unread: Mapping[tuple[str, str], int] = field(default_factory=dict)
    newer: bool = False  # newer versions load adapters of other families by the same rules
    # key of FAMILIES -> kinds that it applies in adapters of this family alone
    family_kinds: Mapping[str, frozenset[str]] = field(default_factory=dict)
    # key of FAMILIES -> components beside the denoiser that it loads
    components: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # key of FAMILIES -> expression for the paths, in the format's naming, of the denoiser's modules that it adapts
    modules: Mapping[str, str] = field(default_factory=dict)  # if a family is missing: all
    metadata_alpha: bool = False  # it reads alphas in diffusers' metadata
