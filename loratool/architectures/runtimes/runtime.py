"""Define what is known of a runtime: what it reads of an adapter, and what it does with the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
    "yes": "it applies it",
    "class": "that depends on the class that it serves",
    "refuses": "it refuses the adapter, or crashes when the adapter is first used",
    "ignores": "it drops it without a word",
    "misreads": "it takes it for something else and answers wrongly without a word",
}

Names = Literal["class", "file"]


@dataclass(frozen=True)
class Served:
    """What a runtime makes of one class of models."""

    name: str
    embeddings: bool = True  # it applies LoRA to the embedding and the head
    stacks: bool = False  # experts are one stack; else one by one
    towers: bool = False  # it applies LoRA to what is beside the language model
    note: str = ""


@dataclass(frozen=True)
class Runtime:
    """One program that loads adapters."""

    key: str  # for --for
    title: str
    version: str  # that was checked
    checked: Literal["run", "read"]  # its own functions were run, or its source was read
    format: str  # a key of FORMATS
    reads: Mapping[str, str]  # each of FEATURES -> one of OUTCOMES
    miss: str  # of OUTCOMES, of a tensor whose module it does not have
    names: Names = "file"  # whose module paths it looks up: those of transformers' class, or those of the base's files
    modules: str = ".*"  # expression that the path of every module has to match
    renames: tuple[tuple[str, str], ...] = ()  # (expression, replacement), applied to the paths in order
    one_rank: bool = False
    max_rank: int | None = None
    groups: tuple[tuple[str, ...], ...] = ()  # last names of modules that it needs all of, where it has one
    every_layer: bool = False  # a kind of module has to be in every layer
    targets: Literal["paths", "last names"] = "paths"  # in target_modules
    # by the name of the class in config.json; where it is no class of these, none is known
    classes: Mapping[str, Served] = field(default_factory=dict)
    without: frozenset[str] = frozenset()  # classes that it serves without adapters

    def served(self, config: Mapping[str, Any]) -> Served | None:
        """Return what it makes of the class of a model; None for a class that is not known."""
        declared = config.get("architectures")
        name = declared[0] if isinstance(declared, list) and declared and isinstance(declared[0], str) else ""
        return self.classes.get(name) if self.classes else Served(name, towers=self.reads["towers"] == "yes")
