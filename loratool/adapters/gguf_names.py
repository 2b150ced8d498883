"""Give an adapter the names and rows of a GGUF file's tensors, or those of transformers' modules.

Nothing is written: the result's file computes its tensors when they are asked for, from the source's by moving whole
rows of B, so that every number stays as it is. A matrix of transformers can be several tensors in GGUF (gate and up),
and single experts are one stack there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..architectures.experts import PEFT_TAKES_AS_PLAIN, expert_part
from ..architectures.fused_rows import nested_configs
from ..architectures.gguf import ARCHITECTURES, architecture_of
from ..architectures.gguf.table import ROW_ORDERS, Architecture, Facts, Weight, text_fields
from ..architectures.prefixes import CONTAINER_PREFIXES, module_path
from ..architectures.renames import canonical
from ..errors import InputError
from ..files.dtypes import TORCH_FLOATS, TensorSpec, safetensors_name
from ..files.gguf_file import GgufFile
from ..files.virtual import VirtualFile
from .adapter import Adapter
from .placed_factors import Place, have_one_A, lay_A, lay_B, place_pairs, starts
from .updates.dora import DoRA
from .updates.experts import Experts
from .updates.low_rank import LowRank
from .updates.update import Stack, UpdateSpec

if TYPE_CHECKING:
    from torch import Tensor

    Pair = tuple[Tensor, Tensor]  # A (E, r, in) and B (E, out, r)

ARCHITECTURE = "general.architecture"  # the field of a GGUF file that says it
EMBEDDING = "token_embd"  # the one weight that GGUF's adapters have transposed
HEAD = "output"
STACK = "_exps"  # how the names of stacks of experts end


@dataclass(frozen=True)
class GgufModel:
    """Hold what of a model decides the names and rows of its GGUF file."""

    architecture: Architecture
    facts: Facts
    model_types: tuple[str, ...]  # of config.json and the configs nested in it
    width: int = 0  # of its hidden states; 0 if it is not known
    inside: str = "model."  # what the language model's paths begin with in the class

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
            what = config.get("model_type") or "model without a model_type"
            known = ", ".join(kind for each in ARCHITECTURES.values() for kind in (*each.model_types, *each.wrappers))
            raise InputError(
                f"is a {what}, whose names and rows in GGUF are in no table (there are {known})", culprit=name
            )
        facts, fields = Facts.of_config(config), text_fields(config)
        if lacking := architecture.lacks(facts):
            raise InputError(f"its config.json does not tell its {' and '.join(lacking)}", culprit=name)
        width = next((value for key in ("hidden_size", "n_embd") if type(value := fields.get(key)) is int), 0)
        types = tuple(nested_configs(config))
        wrapped = config["model_type"] in architecture.wrappers
        return cls(architecture, facts, types, width, "model.language_model." if wrapped else "model.")

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any], modules: Collection[str]) -> GgufModel | None:
        """Return it by the fields of a GGUF file, or None if they do not tell what the rows of its modules need."""
        architecture = ARCHITECTURES.get(str(fields.get(ARCHITECTURE)))
        if architecture is None:
            return None
        facts = Facts.of_metadata(architecture.key, fields)
        own = [found[0] for m in modules if (found := architecture.find(m) or architecture.find(f"{m}.weight"))]
        if architecture.lacks(facts, own):
            return None
        width = fields.get(f"{architecture.key}.embedding_length")
        return cls(architecture, facts, architecture.model_types, width if type(width) is int else 0)

    @property
    def is_head_tied(self) -> bool:
        """Return whether llama.cpp computes a head by the embedding; of an encoder it computes none."""
        return self.facts.tied and self.architecture.key != "bert"

    @functools.cached_property
    def _layers(self) -> dict[int | None, dict[str, list[Part]]]:
        return {}

    def _parts_of(self, path: str) -> list[Part]:
        """Return the GGUF tensors that have the rows of a module of transformers, in any of its names; or none."""
        number = re.search(r"\.(\d{1,6})(?:\.|$)", path)
        layer = int(number[1]) if number else None
        if layer not in self._layers:
            self._layers[layer] = self._index(layer)
        found, plain = self._layers[layer], self._in_class(path)
        prefixes = [prefix + "." for prefix in CONTAINER_PREFIXES]
        text = re.sub(r"^(model\.)?language_model\.(model\.)?(?!lm_head)", "model.", plain)  # of one with a tower
        ways = [plain, text, *(p + plain for p in prefixes), *(plain.removeprefix(p) for p in prefixes)]
        return next((found[way] for way in ways if way in found), [])

    def locate(self, module: str) -> tuple[int | None, list[Part]]:
        """Return the GGUF tensors that have the rows of a module, and which expert's it is of a stack there."""
        expert = expert_part(canonical(module, self.model_types), self.model_types)
        if expert is None:
            return None, self._parts_of(module)
        return expert.expert, [part for part in self._parts_of(expert.fused) if part.slot == expert.part]

    def parts_with(self, tensor: str) -> tuple[str, list[Part]] | None:
        """Return the module of transformers that a GGUF tensor's path is of, and all of its parts."""
        known = self.architecture.find(tensor) or self.architecture.find(f"{tensor}.weight")
        if known is None:
            return None
        if known[1] not in self._layers:
            self._layers[known[1]] = self._index(known[1])
        found = self._layers[known[1]].items()
        return next(((path, parts) for path, parts in found if any(part.module == tensor for part in parts)), None)

    def _in_class(self, path: str) -> str:
        """Return a path as transformers' class has it, of which a language model may be a part."""
        found = canonical(path, self.model_types)
        is_plain = found.startswith("model.") and not found.startswith(self.inside)
        return self.inside + found.removeprefix("model.") if is_plain else found

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

    def columns(self, facts: Facts, columns: int, culprit: str) -> list[int] | None:
        """Return which of the module's columns each of its own is; None if they are the same."""
        if not self.weight.columns:
            return None
        try:
            return ROW_ORDERS[self.weight.columns].numbers(facts, columns)
        except ValueError as error:
            raise InputError(f"{error}: it is of another model", culprit=culprit) from None


@dataclass(frozen=True)
class _Made:
    """An update under its new name, and what makes its factors."""

    module: str
    source: UpdateSpec  # lends the scale and, as one of others, the types
    shape: tuple[int, int, int, int]  # experts, out, rank, in
    dtype: str
    load: Callable[[], Pair]
    detail: Stack | None
    transposed: bool | None
    magnitude: Callable[[], Tensor] | None = None  # of DoRA: one number for each row

    def spec(self) -> UpdateSpec:
        key = f"{self.module}.weight"
        E, out, rank, width = self.shape
        cls = Experts if self.detail else LowRank
        specs = {"A": TensorSpec(self.dtype, (E * rank, width)), "B": TensorSpec(self.dtype, (out, rank * E))}
        tensors = {"A": f"{key}.lora_a", "B": f"{key}.lora_b"}
        scale, base = self.source.scale, self.source.base
        spec = UpdateSpec(cls, self.module, tensors, specs, scale, self.transposed, self.detail, base)
        if self.magnitude is None:
            return spec
        stored = self.source.specs["magnitude"]
        return DoRA.of(spec, f"{key}.magnitude", TensorSpec(stored.dtype, (out,)), along_inputs=False)


def has_own_names(adapter: Adapter) -> bool:
    """Return whether an adapter has the names of a GGUF file."""
    key = adapter.config.extra.get(ARCHITECTURE)
    own = ARCHITECTURES.get(str(key))
    return key is not None and (own is None or any(m.startswith("blk.") or own.find(m) for m in adapter.updates))


def in_names_of_file(adapter: Adapter, file: GgufFile, has_head: bool) -> Adapter:
    """Return an adapter of any names under those of a model in a GGUF file; what has no place there stays as it is.

    Args:
        has_head: the file has a head of its own, or its embedding is one, which a merge can untie.

    Raises:
        InputError: the adapter is for another architecture, or the names of the file's are in no table.
    """
    if has_own_names(adapter):
        key = adapter.config.extra[ARCHITECTURE]
        if key != file.architecture:
            message = f"is for {key}, and {file.path.name} is {file.architecture}"
            raise InputError(message, culprit=adapter.name, remedy="is this the adapter's base?")
        return adapter
    model = GgufModel.of_fields(file.fields, [module_path(name) for name in file.specs])
    if model is None:
        why = "its fields do not tell" if file.architecture in ARCHITECTURES else "are in no table"
        message = f"is {file.architecture or 'of no architecture'}, whose names and rows in transformers {why}"
        raise InputError(message, culprit=str(file.path), remedy="pass the model in transformers' format")
    return to_gguf_names(adapter, replace(model, facts=replace(model.facts, tied=not has_head)))[0]


def to_gguf_names(adapter: Adapter, model: GgufModel) -> tuple[Adapter, dict[str, tuple[str, ...]]]:
    """Return an adapter with the names of transformers under those of the model's GGUF file.

    Returns:
        The adapter, and for each of its new modules those that it is made of; `unfit_modules` stay as they are.

    Raises:
        InputError: a module has the rows of another model, or is there twice.
    """
    made: list[_Made] = []
    single: dict[str, dict[int, tuple[Part, UpdateSpec]]] = {}
    kept: dict[str, UpdateSpec] = {}
    for module, update in adapter.updates.items():
        expert, parts = model.locate(module)
        if _misfit(update, expert, parts, model.facts.tied):
            kept[module] = update
        elif expert is None:
            made += [_part_of(adapter, update, part, model) for part in parts]
        elif expert >= model.facts.experts:
            raise InputError(f"is an expert of a model that has {model.facts.experts}", culprit=module)
        elif single.setdefault(parts[0].module, {}).setdefault(expert, (parts[0], update))[1] is not update:
            raise InputError(f"of {adapter.name} is there twice", culprit=module)
    origins: dict[str, tuple[str, ...]] = {each.module: (each.source.module,) for each in made}
    for each in made:
        if origins[each.module] != (each.source.module,) or each.module in single:
            raise InputError(f"of {adapter.name} is there twice, as {each.module}", culprit=each.source.module)
    made += [_stack_of(adapter, each, model.facts.experts) for each in single.values()]
    origins |= {name: tuple(u.module for _, u in each.values()) for name, each in single.items()}
    return _renamed(adapter, made, kept), origins


def unfit_modules(adapter: Adapter, model: GgufModel) -> dict[str, list[str]]:
    """Return the modules that a GGUF adapter for the model cannot have, by what they are."""
    found: dict[str, list[str]] = {}
    for module, update in adapter.updates.items():
        expert, parts = model.locate(module)
        reason = _misfit(update, expert, parts, model.facts.tied)
        if reason is None and any(part.weight.heads for part in parts):
            reason = "a matrix for each head there, which llama.cpp multiplies without LoRA"
        if reason is None and model.is_head_tied and any(part.module == EMBEDDING for part in parts):
            reason = "an embedding that is the head too, where llama.cpp stops at its factors"
        if reason:
            found.setdefault(reason, []).append(module)
    return found


def _misfit(update: UpdateSpec, expert: int | None, parts: Sequence[Part], tied: bool) -> str | None:
    """Return why an update of these tensors, or of one expert's matrix in them, has no place in GGUF, or None."""
    inner = update.cls.without_norm(update)
    if inner.cls not in (LowRank, Experts) or len(inner.shape) != 2 + inner.cls.stack or update.along_inputs:
        return f"{update.kind} is no LoRA of a matrix"
    if not parts:
        return "no weight that its table knows"
    if inner.cls.stack != (parts[0].module.endswith(STACK) and expert is None):
        return "no stack of experts, as the file has one there"
    if expert is not None and update.cls is not LowRank:
        return f"{update.kind} of one expert, whose stack takes plain LoRA alone"
    if tied and parts[0].module == HEAD:
        return "a head that is tied to the embedding, which the file has once"
    if update.base and (parts[0].weight.rows or parts[0].weight.columns):
        return "the weight under its factors is stored with other rows"
    if update.cls is DoRA and any(part.weight.heads for part in parts):
        return "DoRA of what is a matrix for each head there"
    return None


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
        if reason := _misfit(update, None, [part], False):
            raise InputError(f"of {adapter.name} has no place in transformers: {reason}", culprit=module)
        groups.setdefault(path, []).append((part, update))
    return _renamed(adapter, [_joined(adapter, path, own, whole[path], model) for path, own in groups.items()], {})


def _renamed(adapter: Adapter, made: Sequence[_Made], kept: Mapping[str, UpdateSpec]) -> Adapter:
    """Return the adapter with these updates in the place of its own, but for those that are kept."""
    updates = {each.module: each.spec() for each in made}
    specs = {name: u.specs[role] for u in updates.values() for role, name in u.tensors.items()}
    by_name = {name: each for each in made for name in updates[each.module].tensors.values()}
    own = {name for update in kept.values() for name in update.stored}
    own |= {update.base for update in updates.values() if update.base}
    specs |= {name: adapter.file.specs[name] for name in own}
    last: list[dict[str, Tensor]] = [{}]  # one module's, put there at once: a merge loads in several threads

    def load(name: str) -> Tensor:
        if name in own:
            return adapter.file.tensor(name)
        each = by_name[name]
        tensors = updates[each.module].tensors
        if each.magnitude and name == tensors["magnitude"]:
            return each.magnitude()
        pair = last[0]
        if name not in pair:
            A, B = each.load()
            last[0] = pair = {tensors["A"]: lay_A(A), tensors["B"]: lay_B(B)}
        return pair[name]

    file = VirtualFile(adapter.file, specs, load, adapter.file.metadata or {})
    return replace(adapter, file=file, updates={**updates, **kept}, flattened=False)


def _pair(adapter: Adapter, update: UpdateSpec) -> Pair:
    """Load factors as stacks of matrices, of one for a linear layer, in their stored types."""
    loaded = adapter.load(update.cls.without_norm(update))
    assert isinstance(loaded, LowRank | Experts)
    E, rank = update.experts, update.rank
    return loaded.A.view(E, rank, -1), loaded.B.view(-1, rank, E).permute(2, 0, 1)


def _dtype(updates: Sequence[UpdateSpec]) -> str:
    """Return the type that holds the factors of all."""
    import torch

    from .stacked import factor_dtypes

    stored = [dtype for update in updates for dtype in factor_dtypes(update)]
    return safetensors_name(functools.reduce(torch.promote_types, stored))


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
    columns, heads = part.columns(model.facts, width, update.module), model.facts.heads
    dtype = _dtype([update])

    def load() -> Pair:
        A, B = _typed(_pair(adapter, update), dtype)
        A, B = (B.mT, A.mT) if turned else (A, B)
        if part.weight.heads:
            A, B = A.expand(heads, -1, -1), B[:, numbers].view(heads, -1, B.shape[2])
            return (B.mT, A.mT) if part.weight.crossed else (A, B)
        return A if columns is None else A[:, :, columns], B[:, numbers]

    detail = Stack(E, turned=False) if update.cls.stack else None
    shape = E, len(numbers), update.rank, width
    if part.weight.heads:  # one matrix of transformers
        sides = len(numbers) // heads, width
        out, width = reversed(sides) if part.weight.crossed else sides
        detail, shape = Stack(heads, turned=False), (heads, out, update.rank, width)

    def magnitude() -> Tensor:
        return adapter.file.tensor(update.tensors["magnitude"]).flatten()[numbers]

    decomposed = magnitude if update.cls is DoRA else None
    return _Made(part.module, update, shape, dtype, load, detail, part.module == EMBEDDING, decomposed)


def _labels_are_swapped(adapter: Adapter, update: UpdateSpec, part: Part, model: GgufModel) -> bool:
    """Return whether A and B are those of the transposed matrix.

    PEFT up to 0.18 took every stack of experts as (experts, in, out), and takes Llama 4's so still (PR 3083). The width
    of the model tells which side is which; of an embedding, too, where a format has it as a linear layer.
    """
    out, width = update.shape[-2:]
    ends_in_model = part.module == EMBEDDING or part.module.endswith(f"down{STACK}")
    if not (update.cls.stack or part.module == EMBEDDING) or not model.width or update.transposed:
        return False
    inner, outer = (out, width) if ends_in_model else (width, out)
    if model.width not in (inner, outer):
        raise InputError(
            f"of {adapter.name} is {update.shape}, of which no side has the model's width {model.width}",
            culprit=update.module,
        )
    version = re.match(r"0\.(\d+)", str(adapter.config.extra.get("peft_version")))
    if inner == outer and version and int(version[1]) < 19 and not part.weight.turned:
        raise InputError(
            f"of {adapter.name} has square experts and is of PEFT {version[0]}, which took them as (in, out)",
            culprit=update.module,
            remedy="merge it into the model of transformers",
        )
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
    shape, dtype = (experts, first.shape[0], max(update.rank for update in updates), first.shape[1]), _dtype(updates)

    def load() -> Pair:
        pairs = ((_typed(_pair(adapter, u), dtype), Place(expert=number)) for number, (_, u) in single.items())
        return place_pairs(pairs, shape)

    return _Made(part.module, first, shape, dtype, load, Stack(experts, turned=False), False)


def _joined(
    adapter: Adapter, path: str, own: Sequence[tuple[Part, UpdateSpec]], parts: Sequence[Part], model: GgufModel
) -> _Made:
    """Return the module of transformers that some GGUF tensors are the rows of; those that are not there are zero.

    Tensors with one A, as gate and up of one matrix have, give that A; else the ranks stand side by side.
    """
    (_, first), updates = own[0], [update for _, update in own]
    E, (out, width) = first.experts, first.shape[-2:]
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
    alike = have_one_A(adapter.file, [update.tensors["A"] for update in updates])
    firsts = starts([update.rank for update in updates], alike)
    places = [
        Place(start, part.numbers(model.facts, rows, update.module))
        for (part, update), start in zip(own, firsts, strict=True)
    ]
    columns = own[0][0].columns(model.facts, width, first.module)
    rank, dtype = first.rank if alike else sum(update.rank for update in updates), _dtype(updates)

    def load() -> Pair:
        import torch

        pairs = (_typed(_pair(adapter, update), dtype) for update in updates)
        A, B = place_pairs(zip(pairs, places, strict=True), (E, rows, rank, width))
        if columns is not None:
            ours, A = A, torch.empty_like(A)
            A[:, :, columns] = ours
        return (B.mT, A.mT) if swapped else (A, B)

    # a layer of transformers may store (in, out) whatever GGUF does; PEFT takes Llama 4's for (out, in) all the same
    turned = own[0][0].weight.turned
    swapped = first.cls.stack and turned and bool(PEFT_TAKES_AS_PLAIN.intersection(model.model_types))
    detail = Stack(E, turned=turned and not swapped) if first.cls.stack else None
    shape = (E, width, rank, rows) if swapped else (E, rows, rank, width)
    return _Made(path, first, shape, dtype, load, detail, True if first.transposed else None)
