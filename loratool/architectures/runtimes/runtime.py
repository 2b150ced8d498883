"""Define what is known of a runtime: what it reads of an adapter, and what it does with the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# What an adapter may have beside plain LoRA of one rank and one scale, with the words of the guide's table
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

# What a runtime does with a feature
OUTCOMES = {
    "yes": "applied",
    "class": "applied or not, as the class that is served has it",
    "refuses": "refused, at the latest when the adapter is first used",
    "ignores": "dropped without a word",
    "misreads": "taken for something else without a word",
}

# Whose module paths a runtime looks up: PEFT's in transformers' class, and all that PEFT writes; the same paths and
# factors alone; or those of the base's files
Names = Literal["whole", "class", "file"]

Renames = tuple[tuple[str, str], ...]  # (expression, replacement), applied to a path in order

# Llama's modules, as an expression: no base is needed to know that a runtime finds them
LLAMA = r"model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"

EXPERTS = ("gate_proj", "up_proj", "down_proj")

BOTH, EMBEDDING = ("embeddings", "head"), ("embeddings",)


@dataclass(frozen=True)
class Served:
    """Say what a runtime applies of one class of models."""

    heads: tuple[str, ...] = ()  # of FEATURES: LoRA on the embedding, and on the head
    takes_experts: bool = True
    stacks: bool = False  # experts are stacks; else one by one
    experts: tuple[str, str, str] = EXPERTS  # the last names of their matrices
    splits: tuple[str, ...] = ()  # last names of modules that it knows the parts of alone
    turns_rotary: bool = False  # it has the rows of q and k in the order of halves, and the class pairs
    towers: bool = False  # what is beside the language model
    renames: Renames = ()
    never: str = ""  # expression that the paths match of modules without LoRA; empty for none


@dataclass(frozen=True)
class Runtime:
    """One program that loads adapters."""

    key: str  # for --for
    title: str
    version: str  # that was checked
    checked: Literal["run", "read"]  # its own functions were run, or its source was read
    reads: Mapping[str, str]  # each of FEATURES -> one of OUTCOMES
    miss: str  # of OUTCOMES, of a tensor whose module it does not have
    names: Names = "file"
    # what of a path may be otherwise: nothing, what is before the layer's number or before a path of the files, or what
    # it maps: names of before transformers 4.52 (`old_names`) and, of a class, those of its language model alone
    prefixes: Literal["exact", "any", "longer", "mapped"] = "exact"
    old_names: str = ""  # expression of the model types of which it maps them
    modules: str = ".*"  # expression that the path of every module has to match
    renames: Renames = ()
    one_rank: bool = False
    half: bool = False  # it has the factors as float16, B times the scale
    max_ranks: tuple[int, ...] = ()  # values of `rank_flag` if it has one, the largest the limit; empty for no limit
    default_rank: int = 0  # without that flag
    rank_flag: str = ""
    modelfile: bool = False  # it is told of a file by one more, which is written beside
    limit: str = ""  # a sentence on what it leaves out of every adapter on a base of `limited` quantization
    limited: str = ""  # a `quant_method`
    tower_flag: str = ""  # without which towers are left as they are
    # last name of a module -> those that have to be beside it where the model has them
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    whole_experts: bool = False  # it needs all experts of a layer, and all of their matrices, where it has one
    every_layer: bool = False  # a kind of module has to be in every layer
    targets: Literal["paths", "last names"] = "paths"  # in target_modules
    served: Served = field(default_factory=Served)  # of a class that is not in `classes`
    # by the class in config.json, or `type:class`; others are not known
    classes: Mapping[str, Served] = field(default_factory=dict)
    without: frozenset[str] = frozenset()  # classes that it serves without adapters
