"""Convert an adapter to the names and rows of a GGUF file's tensors, or of transformers' modules.

Nothing is written: the resulting adapter computes its tensors when they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..architectures.gguf import ARCHITECTURES
from ..architectures.prefixes import module_path
from ..errors import InputError
from ..files.containers.gguf_file import GgufFile
from ..files.containers.virtual import VirtualFile
from .adapter import Adapter
from .gguf_factors import MadeUpdate, joined_parts, part_of, stack_of_singles
from .gguf_parts import ARCHITECTURE, EMBEDDING, HEAD, STACK, GgufModel, Part
from .updates.dora import DoRA
from .updates.experts import Experts
from .updates.low_rank import LowRank
from .updates.update import UpdateSpec

if TYPE_CHECKING:
    from ..numerics.arrays import Numbers


def has_own_names(adapter: Adapter) -> bool:
    """Return whether an adapter has the names of a GGUF file."""
    key = adapter.config.other_fields.get(ARCHITECTURE)
    architecture = ARCHITECTURES.get(str(key))
    return key is not None and (
        architecture is None or any(m.startswith("blk.") or architecture.find(m) for m in adapter.updates)
    )


def in_names_of_file(adapter: Adapter, file: GgufFile, has_head: bool) -> Adapter:
    """Return an adapter of any names under the names of a GGUF file; modules without a place in it are unchanged.

    Args:
        has_head: the file has a separate head, or its embedding is one, which a merge can untie.

    Raises:
        InputError: the adapter is for another architecture, or no table has the names of the file's architecture.
    """
    if has_own_names(adapter):
        key = adapter.config.other_fields[ARCHITECTURE]
        if key != file.architecture:
            message = f"is for {key}, and {file.path.name} is {file.architecture}"
            raise InputError(message, culprit=adapter.name, remedy="is this the adapter's base?")
        return adapter
    model = GgufModel.of_fields(file.fields, [module_path(name) for name in file.specs])
    if model is None:
        why = "are not determined by its fields" if file.architecture in ARCHITECTURES else "are unknown"
        message = f"is {file.architecture or 'of no architecture'}, whose names and rows in transformers {why}"
        raise InputError(message, culprit=str(file.path), remedy="pass the model in transformers' format")
    return to_gguf_names(adapter, replace(model, facts=replace(model.facts, tied=not has_head)))[0]


def to_gguf_names(adapter: Adapter, model: GgufModel) -> tuple[Adapter, dict[str, tuple[str, ...]]]:
    """Return an adapter of transformers' names under the names of the model's GGUF file.

    Returns:
        The adapter, and each new module with the modules that it is made of; `unfit_modules` are unchanged.

    Raises:
        InputError: as `gguf_updates`.
    """
    updates, origins = gguf_updates(adapter, model)
    used = {module for parts in origins.values() for module in parts}
    unfit = {module: update for module, update in adapter.updates.items() if module not in used}
    return _renamed(adapter, updates, unfit), origins


def gguf_updates(adapter: Adapter, model: GgufModel) -> tuple[list[MadeUpdate], dict[str, tuple[str, ...]]]:
    """Return the updates of a GGUF adapter, and each new module with the modules it is made of, except `unfit_modules`.

    Raises:
        InputError: a module has the rows of another model, or occurs twice.
    """
    updates: list[MadeUpdate] = []
    single: dict[str, dict[int, tuple[Part, UpdateSpec]]] = {}
    for module, update in adapter.updates.items():
        expert, parts = model.locate(module)
        if _misfit(update, expert, parts, model.facts.tied):
            continue
        if expert is None:
            updates += [part_of(adapter, update, part, model) for part in parts]
        elif expert >= model.facts.experts:
            raise InputError(f"is an expert, and the model has only {model.facts.experts}", culprit=module)
        elif single.setdefault(parts[0].module, {}).setdefault(expert, (parts[0], update))[1] is not update:
            raise InputError(f"of {adapter.name} is there twice", culprit=module)
    origins: dict[str, tuple[str, ...]] = {each.module: (each.source.module,) for each in updates}
    for update_of_file in updates:
        module, source = update_of_file.module, update_of_file.source.module
        if origins[module] != (source,) or module in single:
            raise InputError(f"of {adapter.name} is there twice, as {module}", culprit=source)
    updates += [stack_of_singles(adapter, each, model.facts.experts) for each in single.values()]
    origins |= {name: tuple(u.module for _, u in each.values()) for name, each in single.items()}
    return updates, origins


def unfit_modules(adapter: Adapter, model: GgufModel) -> dict[str, list[str]]:
    """Return the modules that a GGUF adapter for the model cannot have, by reason."""
    by_reason: dict[str, list[str]] = {}
    for module, update in adapter.updates.items():
        expert, parts = model.locate(module)
        reason = _misfit(update, expert, parts, model.facts.tied)
        if reason is None and any(part.weight.heads for part in parts):
            reason = "a matrix for each head there, which llama.cpp multiplies without LoRA"
        if reason is None and model.is_head_tied and any(part.module == EMBEDDING for part in parts):
            reason = "an embedding that is also the head: llama.cpp stops at its factors"
        if reason:
            by_reason.setdefault(reason, []).append(module)
    return by_reason


def _misfit(update: UpdateSpec, expert: int | None, parts: Sequence[Part], tied: bool) -> str | None:
    """Return why an update of these tensors, or of one expert in them, has no place in GGUF; None if it has one."""
    inner = update.cls.without_norm(update)
    if inner.cls not in (LowRank, Experts) or len(inner.shape) != 2 + inner.cls.stack or update.along_inputs:
        return f"{update.kind} is not LoRA of a matrix"
    if not parts:
        return "no weight that its table knows"
    if inner.cls.stack != (parts[0].module.endswith(STACK) and expert is None):
        return "no stack of experts, as the file has one there"
    if expert is not None and update.cls is not LowRank:
        return f"{update.kind} of one expert, but its stack takes only plain LoRA"
    if tied and parts[0].module == HEAD:
        return "a head that is tied to the embedding, which the file has once"
    if update.base and (parts[0].weight.rows or parts[0].weight.columns):
        return "the weight under its factors is stored with other rows"
    if update.cls is DoRA and any(part.weight.heads for part in parts):
        return "DoRA of a weight that has a matrix for each head there"
    return None


def to_model_names(adapter: Adapter, model: GgufModel) -> Adapter:
    """Return an adapter of a GGUF file's names under the names of transformers' modules.

    Raises:
        InputError: a tensor is not in the table, or has the rows of another model.
    """
    groups: dict[str, list[tuple[Part, UpdateSpec]]] = {}
    parts_of: dict[str, list[Part]] = {}
    for module, update in adapter.updates.items():
        located = model.parts_with(module)
        if located is None:
            raise InputError(f"of {adapter.name} is not a known weight of {model.architecture.key}", culprit=module)
        path, parts_of[path] = located[0], located[1]
        part = next(each for each in parts_of[path] if each.module == module)
        if reason := _misfit(update, None, [part], False):
            raise InputError(f"of {adapter.name} has no place in transformers: {reason}", culprit=module)
        groups.setdefault(path, []).append((part, update))
    return _renamed(
        adapter, [joined_parts(adapter, path, members, parts_of[path], model) for path, members in groups.items()], {}
    )


def _renamed(adapter: Adapter, renamed: Sequence[MadeUpdate], unfit: Mapping[str, UpdateSpec]) -> Adapter:
    """Return the adapter with its updates replaced by `renamed`, except those in `unfit`."""
    updates = {each.module: each.spec() for each in renamed}
    specs = {name: u.specs[role] for u in updates.values() for role, name in u.tensors.items()}
    by_name = {name: each for each in renamed for name in updates[each.module].tensors.values()}
    copied = {name for update in unfit.values() for name in update.stored}
    copied |= {update.base for update in updates.values() if update.base}
    specs |= {name: adapter.file.specs[name] for name in copied}
    last: list[dict[str, Numbers]] = [{}]  # one module's, assigned at once: a merge loads in several threads

    def load(name: str) -> Numbers:
        if name in copied:
            return adapter.file.numbers(name)
        part = by_name[name]
        tensors = updates[part.module].tensors
        if part.magnitude and name == tensors["magnitude"]:
            return part.magnitude()
        pair = last[0]
        if name not in pair:
            last[0] = pair = {tensors[role]: side for role, side in part.load().items()}
        return pair[name]

    file = VirtualFile(adapter.file, specs, load, adapter.file.metadata or {})
    return replace(adapter, file=file, updates={**updates, **unfit}, flattened=False)
