"""Find the tensors of a GGUF file that have the rows of transformers' modules, by their names.

A matrix of transformers can be several tensors there (gate and up), and single experts are one stack.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..architectures.experts import expert_part
from ..architectures.fused_rows import nested_configs
from ..architectures.gguf import ARCHITECTURES, architecture_of
from ..architectures.gguf.table import ROW_ORDERS, Architecture, Facts, Weight
from ..architectures.heads import text_fields
from ..architectures.prefixes import CONTAINER_PREFIXES, module_path
from ..architectures.renames import canonical
from ..errors import InputError, with_article

ARCHITECTURE = "general.architecture"  # the field of a GGUF file that names it
EMBEDDING = "token_embd"  # the only weight that GGUF's adapters store transposed
HEAD = "output"
STACK = "_exps"  # suffix of the names of stacks of experts

BASE = "pass the model in transformers' format as --base"


@dataclass(frozen=True)
class GgufModel:
    """The properties of a model that decide the names and rows of its GGUF file."""

    architecture: Architecture
    facts: Facts
    model_types: tuple[str, ...]  # of config.json and the configs nested in it
    width: int = 0  # of its hidden states; 0 if unknown
    inside: str = "model."  # prefix of the language model's paths in the class

    @classmethod
    def of_config(cls, config: Mapping[str, Any], name: str) -> GgufModel:
        """Return the model of a config.json.

        Args:
            name: the model's name, for messages.

        Raises:
            InputError: no table has the architecture, or the config lacks a field that the table needs.
        """
        architecture = architecture_of(config)
        if architecture is None:
            what = with_article(str(config.get("model_type") or "model without a model_type"))
            known = ", ".join(kind for each in ARCHITECTURES.values() for kind in (*each.model_types, *each.wrappers))
            raise InputError(f"is {what}, whose names and rows in GGUF are unknown (known are {known})", culprit=name)
        facts, fields = Facts.of_config(config), text_fields(config)
        if lacking := architecture.missing_facts(facts):
            raise InputError(f"its config.json does not tell its {' and '.join(lacking)}", culprit=name)
        width = next((value for key in ("hidden_size", "n_embd") if type(value := fields.get(key)) is int), 0)
        types = tuple(nested_configs(config))
        wrapped = config["model_type"] in architecture.wrappers
        return cls(architecture, facts, types, width, "model.language_model." if wrapped else "model.")

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any], modules: Collection[str]) -> GgufModel | None:
        """Return the model of a GGUF file's fields; None if they lack a number that the rows of its modules need."""
        architecture = ARCHITECTURES.get(str(fields.get(ARCHITECTURE)))
        if architecture is None:
            return None
        facts = Facts.of_metadata(architecture.key, fields)
        weights = [row[0] for m in modules if (row := architecture.find(m) or architecture.find(f"{m}.weight"))]
        if architecture.missing_facts(facts, weights):
            return None
        width = fields.get(f"{architecture.key}.embedding_length")
        return cls(architecture, facts, architecture.model_types, width if type(width) is int else 0)

    @property
    def is_head_tied(self) -> bool:
        """Return whether llama.cpp computes the head with the embedding; for an encoder it computes no head."""
        return self.facts.tied and self.architecture.key != "bert"

    @functools.cached_property
    def _layers(self) -> dict[int | None, dict[str, list[Part]]]:
        return {}

    def _parts_of(self, path: str) -> list[Part]:
        """Return the GGUF tensors that have the rows of a module of transformers, under any of its names."""
        number = re.search(r"\.(\d{1,6})(?:\.|$)", path)
        layer = int(number[1]) if number else None
        if layer not in self._layers:
            self._layers[layer] = self._index(layer)
        parts, plain = self._layers[layer], self._in_class(path)
        prefixes = [prefix + "." for prefix in CONTAINER_PREFIXES]
        text = re.sub(r"^(model\.)?language_model\.(model\.)?(?!lm_head)", "model.", plain)  # of a model with a tower
        ways = [plain, text, *(p + plain for p in prefixes), *(plain.removeprefix(p) for p in prefixes)]
        return next((parts[way] for way in ways if way in parts), [])

    def locate(self, module: str) -> tuple[int | None, list[Part]]:
        """Return the GGUF tensors that have the rows of a module, and its expert's number if they are stacks."""
        expert = expert_part(canonical(module, self.model_types), self.model_types)
        if expert is None:
            return None, self._parts_of(module)
        return expert.expert, [part for part in self._parts_of(expert.fused) if part.slot == expert.part]

    def parts_with(self, tensor: str) -> tuple[str, list[Part]] | None:
        """Return the module of transformers that a GGUF tensor belongs to, and all parts of the module.

        Raises:
            InputError: it belongs to several modules, each of another model type.
        """
        known = self.architecture.find(tensor) or self.architecture.find(f"{tensor}.weight")
        if known is None:
            return None
        if known[1] not in self._layers:
            self._layers[known[1]] = self._index(known[1])
        in_layer = self._layers[known[1]].items()
        found = [(path, parts) for path, parts in in_layer if any(part.module == tensor for part in parts)]
        if len(found) > 1:
            paths = " or ".join(path for path, _ in found)
            raise InputError(f"is {paths}: {self.architecture.key} does not tell which", culprit=tensor, remedy=BASE)
        return found[0] if found else None

    def _in_class(self, path: str) -> str:
        """Return a path as transformers' class has it; the language model may be a part of the class."""
        name = canonical(path, self.model_types)
        is_plain = name.startswith("model.") and not name.startswith(self.inside)
        return self.inside + name.removeprefix("model.") if is_plain else name

    def _has(self, weight: Weight) -> bool:
        """Return whether models of its types and with its experts have a weight of the table."""
        of_type = not weight.types or not {*weight.types}.isdisjoint(self.model_types)
        return of_type and weight.dense is not bool(self.facts.experts)

    def _index(self, layer: int | None) -> dict[str, list[Part]]:
        """Return the parts of each module of a layer (None: outside the layers), by its name in the class."""
        index: dict[str, list[Part]] = {}
        for weight in self.architecture.weights:
            if ("{n}" in weight.hf) != (layer is not None) or weight.gguf.endswith(".bias"):
                continue
            if weight.shape or weight.change == "minus exp" or not self._has(weight):
                continue
            path, module = (name.replace("{n}", str(layer)) for name in (weight.hf, weight.gguf))
            slot, slots = 0, 1
            if "{e}" in path:
                expert = expert_part(path.replace("{e}", "0"), self.model_types)
                if expert is None:
                    continue  # a tensor of another model of the architecture
                path, slot, slots = self._in_class(expert.fused), expert.part, expert.parts
            else:
                path = module_path(self._in_class(path if weight.bare else f"{path}.weight"))
            index.setdefault(path, []).append(Part(weight, module_path(module), slot, slots))
        return index


@dataclass(frozen=True)
class Part:
    """A GGUF tensor that has rows of a module of transformers."""

    weight: Weight
    module: str  # its path in GGUF
    slot: int = 0  # the number of its slice of the rows, where single experts are stacked
    slots: int = 1

    def whole(self, facts: Facts, rows: int) -> int:
        """Return the number of the module's rows if the tensor has `rows`."""
        return ROW_ORDERS[self.weight.rows].whole(facts, rows) if self.weight.rows else self.slots * rows

    def numbers(self, facts: Facts, rows: int, culprit: str) -> list[int]:
        """Return the numbers of the module's rows that it has; raise InputError if `rows` is impossible."""
        try:
            if self.weight.rows:
                return ROW_ORDERS[self.weight.rows].numbers(facts, rows)
            if rows % self.slots:
                raise ValueError(f"{rows} rows are not {self.slots} equal slices")
        except ValueError as error:
            raise InputError(f"{error}: it belongs to another model", culprit=culprit) from None
        size = rows // self.slots
        return list(range(self.slot * size, (self.slot + 1) * size))

    def columns(self, facts: Facts, columns: int, culprit: str) -> list[int] | None:
        """Return the number of the module's column for each of its columns; None if the order is the same."""
        if not self.weight.columns:
            return None
        try:
            return ROW_ORDERS[self.weight.columns].numbers(facts, columns)
        except ValueError as error:
            raise InputError(f"{error}: it belongs to another model", culprit=culprit) from None
