"""Give an adapter the names and rows of a GGUF file's tensors, or those of transformers' modules.

Nothing is written: the result's file computes its tensors when they are asked for, from the source's by moving whole
rows of B, so that every number stays as it is. A matrix of transformers can be several tensors in GGUF (gate and up),
and single experts are one stack there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..architectures.experts import expert_part
from ..architectures.fused_rows import nested_configs
from ..architectures.gguf import ARCHITECTURES, architecture_of
from ..architectures.gguf.table import ROW_ORDERS, Architecture, Facts, Weight
from ..architectures.prefixes import CONTAINER_PREFIXES, module_path
from ..architectures.renames import canonical
from ..errors import InputError
from ..files.dtypes import SAFETENSORS, TORCH_FLOATS, TensorSpec
from ..files.virtual import VirtualFile
from .adapter import Adapter
from .updates.experts import Experts
from .updates.low_rank import LowRank
from .updates.update import Stack, UpdateSpec

if TYPE_CHECKING:
    from torch import Tensor

    Pair = tuple[Tensor, Tensor]  # A (E, r, in) and B (E, out, r)

EMBEDDING = "token_embd"  # the one weight that GGUF's adapters have transposed
HEAD = "output"


@dataclass(frozen=True)
class GgufModel:
    """What of a model decides the names and rows of its GGUF file."""

    architecture: Architecture
    facts: Facts
    model_types: tuple[str, ...]  # of config.json and the configs nested in it
    width: int = 0  # of its hidden states; 0 if it is not known

    @classmethod
    def of_config(cls, config: Mapping[str, Any], name: str) -> GgufModel:
        """Return it by a config.json.

        Args:
            name: of the model, for messages.

        Raises:
            InputError: no table has the architecture, or the config does not tell what it needs.
        """
        architecture = architecture_of(config)
        if architecture is None:
            raise InputError(
                f"is a {config.get('model_type') or 'model without a model_type'}, whose names and rows in GGUF are in "
                f"no table (there are {', '.join(ARCHITECTURES)})",
                culprit=name,
            )
        facts, fields = Facts.of_config(config), {**config, **config.get("text_config", {})}
        if lacking := architecture.lacks(facts):
            raise InputError(f"its config.json does not tell its {' and '.join(lacking)}", culprit=name)
        width = next((value for key in ("hidden_size", "n_embd") if type(value := fields.get(key)) is int), 0)
        return cls(architecture, facts, tuple(nested_configs(config)), width)

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> GgufModel | None:
        """Return it by the fields of a GGUF file, or None if they do not tell."""
        architecture = ARCHITECTURES.get(str(fields.get("general.architecture")))
        if architecture is None:
            return None
        facts = Facts.of_metadata(architecture.key, fields)
        return None if architecture.lacks(facts) else cls(architecture, facts, architecture.model_types)

    @functools.cached_property
    def _layers(self) -> dict[int | None, dict[str, list[Part]]]:
        return {}

    def parts_of(self, path: str) -> list[Part]:
        """Return the GGUF tensors that have the rows of a module of transformers, in any of its names; or none."""
        number = re.search(r"\.(\d{1,6})(?:\.|$)", path)
        layer = int(number[1]) if number else None
        if layer not in self._layers:
            self._layers[layer] = self._index(layer)
        found, plain = self._layers[layer], canonical(path, self.model_types)
        prefixes = [prefix + "." for prefix in CONTAINER_PREFIXES]
        ways = [plain, *(p + plain for p in prefixes), *(plain.removeprefix(p) for p in prefixes)]
        return next((found[way] for way in ways if way in found), [])

    def parts_with(self, tensor: str) -> tuple[str, list[Part]] | None:
        """Return the module of transformers that a GGUF tensor's path is of, and all of its parts."""
        known = self.architecture.find(tensor) or self.architecture.find(f"{tensor}.weight")
        if known is None:
            return None
        if known[1] not in self._layers:
            self._layers[known[1]] = self._index(known[1])
        found = self._layers[known[1]].items()
        return next(((path, parts) for path, parts in found if any(part.module == tensor for part in parts)), None)

    def _index(self, layer: int | None) -> dict[str, list[Part]]:
        """Return the parts of each module of a layer, or of those beside the layers, by its name in the class."""
        index: dict[str, list[Part]] = {}
        for weight in self.architecture.weights:
            if ("{n}" in weight.hf) != (layer is not None) or weight.gguf.endswith(".bias"):
                continue
            path, module = (name.replace("{n}", str(layer)) for name in (weight.hf, weight.gguf))
            slot, slots = 0, 1
            if "{e}" in path:
                expert = expert_part(path.replace("{e}", "0"), self.model_types)
                if expert is None:
                    continue  # of another model of the architecture
                path, slot, slots = expert.fused, expert.part, expert.parts
            else:
                path = module_path(canonical(path if weight.bare else f"{path}.weight", self.model_types))
            index.setdefault(path, []).append(Part(weight, module_path(module), slot, slots))
        return index


@dataclass(frozen=True)
class Part:
    """A GGUF tensor that has rows of a module of transformers."""

    weight: Weight
    module: str  # its path in GGUF
    slot: int = 0  # which of the equal slices of the rows it has, where single experts are stacked
    slots: int = 1

    @property
    def count(self) -> int:
        """How many tensors of its size the module's rows make."""
        return ROW_ORDERS[self.weight.rows].parts if self.weight.rows else self.slots

    def numbers(self, facts: Facts, rows: int, culprit: str) -> list[int]:
        """Return which of the module's rows it has; InputError if there cannot be so many."""
        try:
            if self.weight.rows:
                return ROW_ORDERS[self.weight.rows].numbers(facts, rows)
            if rows % self.slots:
                raise ValueError(f"{rows} rows are not {self.slots} equal slices")
        except ValueError as error:
            raise InputError(f"{error}: it is of another model", culprit=culprit) from None
        size = rows // self.slots
        return list(range(self.slot * size, (self.slot + 1) * size))


@dataclass(frozen=True)
class _Made:
    """An update under its new name, and what makes its factors."""

    module: str
    source: UpdateSpec  # lends the scale and, as one of others, the types
    shape: tuple[int, int, int, int]  # experts, out, rank, in
    dtype: str
    load: Callable[[], Pair]
    is_stack: bool
    transposed: bool | None

    def spec(self, key: str) -> UpdateSpec:
        E, out, rank, width = self.shape
        cls, detail = (Experts, Stack(E)) if self.is_stack else (LowRank, None)
        specs = {"A": TensorSpec(self.dtype, (E * rank, width)), "B": TensorSpec(self.dtype, (out, rank * E))}
        tensors = {"A": f"{key}.lora_a", "B": f"{key}.lora_b"}
        scale = self.source.scale
        return UpdateSpec(cls, self.module, tensors, specs, scale, self.transposed, detail)


def to_gguf_names(adapter: Adapter, model: GgufModel, left_out: Sequence[str] = ()) -> Adapter:
    """Return an adapter with the names of transformers under those of the model's GGUF file.

    Raises:
        InputError: a module is not in the table, is more than plain LoRA, or has the rows of another model.
    """
    made: list[_Made] = []
    single: dict[str, dict[int, tuple[Part, UpdateSpec]]] = {}
    for module, update in adapter.updates.items():
        expert = expert_part(canonical(module, model.model_types), model.model_types)
        parts = model.parts_of(expert.fused if expert else module)
        require_plain(adapter, module, update, parts)
        if expert:
            part = next(each for each in parts if each.slot == expert.part)
            if expert.expert >= model.facts.experts:
                raise InputError(f"is an expert of a model that has {model.facts.experts}", culprit=module)
            if single.setdefault(part.module, {}).setdefault(expert.expert, (part, update))[1] is not update:
                raise InputError(f"of {adapter.name} is there twice", culprit=module)
            continue
        made += [_part_of(adapter, update, part, model) for part in parts]
    made += [_stack_of(adapter, each, model.facts.experts) for each in single.values()]
    twice = {each.module: each.source.module for each in made}
    for each in made:
        if twice[each.module] != each.source.module:
            raise InputError(f"and {twice[each.module]} of {adapter.name} are one tensor in GGUF", culprit=each.module)
    return _renamed(adapter, made)


def require_plain(adapter: Adapter, module: str, update: UpdateSpec, parts: Sequence[Part]) -> None:
    """Raise InputError for a module that has no rows in the GGUF file, or an update that is not plain LoRA."""
    if update.cls not in (LowRank, Experts) or len(update.shape) != 2 + update.cls.stack:
        raise InputError(
            f"of {adapter.name} is {update.kind}: in GGUF's names there is plain LoRA alone", culprit=module
        )
    if not parts:
        raise InputError(f"of {adapter.name} is no weight of the GGUF file that its table knows", culprit=module)
    if any(part.weight.heads for part in parts):
        raise InputError(
            f"of {adapter.name} is in GGUF a matrix for each head ({' and '.join(part.module for part in parts)}), "
            "which llama.cpp multiplies without LoRA",
            culprit=module,
        )


def to_model_names(adapter: Adapter, model: GgufModel) -> Adapter:
    """Return an adapter with the names of a GGUF file under those of transformers' modules.

    Raises:
        InputError: a tensor is not in the table, or has the rows of another model.
    """
    groups: dict[str, list[tuple[Part, UpdateSpec]]] = {}
    whole: dict[str, list[Part]] = {}
    for module, update in adapter.updates.items():
        found = model.parts_with(module)
        if found is None:
            raise InputError(
                f"of {adapter.name} is no weight of {model.architecture.key} that its table knows", culprit=module
            )
        path, whole[path] = found[0], found[1]
        part = next(each for each in whole[path] if each.module == module)
        require_plain(adapter, module, update, [part])
        groups.setdefault(path, []).append((part, update))
    return _renamed(adapter, [_joined(adapter, path, own, whole[path], model) for path, own in groups.items()])


def _renamed(adapter: Adapter, made: Sequence[_Made]) -> Adapter:
    """Return the adapter with these updates in the place of its own."""
    updates = {each.module: each.spec(each.module) for each in made}
    specs = {name: u.specs[role] for u in updates.values() for role, name in u.tensors.items()}
    by_name = {name: each for each in made for name in updates[each.module].tensors.values()}
    last: dict[str, Tensor] = {}

    def load(name: str) -> Tensor:
        if name not in last:
            last.clear()
            each = by_name[name]
            A, B = each.load()
            tensors = updates[each.module].tensors
            last[tensors["A"]] = A.flatten(0, 1).contiguous()
            last[tensors["B"]] = B.permute(1, 2, 0).flatten(1).contiguous()
        return last[name]

    file = VirtualFile(adapter.file, specs, load, adapter.file.metadata or {})
    return replace(adapter, file=file, updates=updates, flattened=False)


def _pair(adapter: Adapter, update: UpdateSpec) -> Pair:
    """Load factors as stacks of matrices, of one for a linear layer, in their stored types."""
    loaded = adapter.load(update)
    assert isinstance(loaded, LowRank | Experts)
    E, rank = update.experts, update.rank
    return loaded.A.view(E, rank, -1), loaded.B.view(-1, rank, E).permute(2, 0, 1)


def _dtype(updates: Sequence[UpdateSpec]) -> str:
    """Return the type that holds the factors of all."""
    import torch

    stored = [getattr(torch, TORCH_FLOATS.get(u.specs[r].dtype, "float64")) for u in updates for r in "AB"]
    return SAFETENSORS[str(functools.reduce(torch.promote_types, stored)).removeprefix("torch.")]


def _typed(pair: Pair, dtype: str) -> Pair:
    import torch

    wanted: torch.dtype = getattr(torch, TORCH_FLOATS[dtype])
    return pair[0].to(wanted), pair[1].to(wanted)


def _part_of(adapter: Adapter, update: UpdateSpec, part: Part, model: GgufModel) -> _Made:
    """Return the rows of a module that are a GGUF tensor."""
    E, out, width = (update.experts, *update.shape[-2:])
    turned = _labels_are_swapped(adapter, update, part, model)
    out, width = (width, out) if turned else (out, width)
    numbers = part.numbers(model.facts, out, update.module)
    dtype = _dtype([update])

    def load() -> Pair:
        A, B = _typed(_pair(adapter, update), dtype)
        A, B = (B.mT, A.mT) if turned else (A, B)
        return A, B[:, numbers]

    transposed = part.module == EMBEDDING
    shape = E, len(numbers), update.rank, width
    return _Made(part.module, update, shape, dtype, load, update.cls.stack, transposed)


def _labels_are_swapped(adapter: Adapter, update: UpdateSpec, part: Part, model: GgufModel) -> bool:
    """Return whether A and B are those of the transposed matrix.

    PEFT up to 0.18 took every stack of experts as (experts, in, out), and takes Llama 4's so still (PR 3083). The width
    of the model tells which side is which.
    """
    if not update.cls.stack or not model.width:
        return False
    _, out, width = update.shape
    inner, outer = (out, width) if "down" in part.module else (width, out)
    if model.width not in (inner, outer):
        raise InputError(
            f"of {adapter.name} is {update.shape}, of which neither side has the model's {model.width} inputs",
            culprit=update.module,
        )
    if inner == outer:
        version = re.match(r"0\.(\d+)", str(adapter.config.extra.get("peft_version")))
        if version and int(version[1]) < 19 and not part.weight.turned:
            raise InputError(
                f"of {adapter.name} has square experts and is of PEFT {version[0]}, which took them as (in, out)",
                culprit=update.module,
                remedy="merge it into the model of transformers",
            )
        return False
    return inner != model.width


def _stack_of(adapter: Adapter, single: Mapping[int, tuple[Part, UpdateSpec]], experts: int) -> _Made:
    """Return the stack of single experts; those that the adapter lacks are zero, and so are ranks that others have."""
    (part, first), *_ = single.values()
    updates = [update for _, update in single.values()]
    for update in updates:
        if update.shape != first.shape:
            raise InputError(f"is {update.shape}, and {first.module} {first.shape}", culprit=update.module)
        if update.scale != first.scale:
            raise InputError(
                f"has the scale {update.scale:g}, and {first.module}, of the same stack, {first.scale:g}",
                culprit=update.module,
                remedy="convert it with --plain first, which puts the scales into the factors",
            )
    (out, width), rank, dtype = first.shape, max(update.rank for update in updates), _dtype(updates)

    def load() -> Pair:
        import torch

        kind: torch.dtype = getattr(torch, TORCH_FLOATS[dtype])
        A, B = torch.zeros(experts, rank, width, dtype=kind), torch.zeros(experts, out, rank, dtype=kind)
        for expert, (_, update) in single.items():
            own_A, own_B = _typed(_pair(adapter, update), dtype)
            A[expert, : update.rank], B[expert, :, : update.rank] = own_A[0], own_B[0]
        return A, B

    return _Made(part.module, first, (experts, out, rank, width), dtype, load, True, False)


def _joined(
    adapter: Adapter, path: str, own: Sequence[tuple[Part, UpdateSpec]], parts: Sequence[Part], model: GgufModel
) -> _Made:
    """Return the module of transformers that some GGUF tensors are the rows of; those that are not there are zero.

    Tensors with one A, as gate and up of one matrix have, give that A; else the ranks stand side by side.
    """
    (_, first), updates = own[0], [update for _, update in own]
    E, (out, width), stacked = first.experts, first.shape[-2:], first.cls.stack
    for update in updates:
        if update.cls is not first.cls or update.shape != first.shape:
            raise InputError(f"is {update.shape}, and {first.module} {first.shape}", culprit=update.module)
        if update.scale != first.scale:
            raise InputError(
                f"and {first.module} are one matrix of transformers, and have the scales {update.scale:g} and "
                f"{first.scale:g}",
                culprit=update.module,
                remedy="merge it into a GGUF file",
            )
    rows = out * own[0][0].count
    numbers = [part.numbers(model.facts, rows, update.module) for part, update in own]
    keys = [update.tensors["A"] for update in updates]
    alike = all(
        adapter.file.specs[key] == adapter.file.specs[keys[0]] and adapter.file.read(key) == adapter.file.read(keys[0])
        for key in keys[1:]
    )
    rank, dtype = first.rank if alike else sum(update.rank for update in updates), _dtype(updates)

    def load() -> Pair:
        import torch

        pairs = [_typed(_pair(adapter, update), dtype) for update in updates]
        A = pairs[0][0] if alike else torch.cat([A for A, _ in pairs], dim=1)
        B = torch.zeros(E, rows, rank, dtype=A.dtype)
        start = 0
        for index, (_, side) in zip(numbers, pairs, strict=True):
            B[:, index, start : start + side.shape[2]] = side
            start += 0 if alike else side.shape[2]
        return A, B

    # a layer of transformers may store (in, out) whatever GGUF does
    transposed = True if first.transposed else None
    return _Made(path, first, (E, rows, rank, width), dtype, load, stacked, transposed)
