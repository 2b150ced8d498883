"""Map an adapter's factors to the modules that a runtime loads: a module's factors, some of its rows, or an expert's.

A runtime looks up modules by the names of transformers' class or of the base's files, and has experts one by one or as
a stack. The map only selects numbers of the adapter, so nothing is rounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.stacked import factor_forms
from ..adapters.updates.experts import Experts
from ..adapters.updates.low_rank import LowRank
from ..adapters.updates.update import UpdateSpec
from ..architectures.classes import text_model_at
from ..architectures.experts import (
    INTERLEAVED_EXPERTS,
    PARTS_OF_STACKS,
    PEFT_TAKES_AS_PLAIN,
    TRANSPOSED_EXPERTS,
    expert_part,
)
from ..architectures.heads import halves_of_pairs, heads_of
from ..architectures.prefixes import module_path
from ..architectures.projections import FUSED, projections
from ..architectures.renames import canonical
from ..architectures.runtimes.runtime import EXPERTS, Runtime, Served
from ..binding.modules.placement import Match, place_update
from ..binding.modules.resolve import resolve_modules, strip_wrappers
from ..binding.names.class_names import ClassNames
from ..binding.ties.shared_tensors import bindable
from ..binding.ties.ties import find_tie
from ..binding.weights.model_weights import model_weights
from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..numerics.arrays import Numbers
from ..numerics.forms import F32, Form, holding
from .fused_qkv import qkv_rows
from .refusals import cannot_convert
from .to_class import module_of_matches


@dataclass(frozen=True)
class ServedModule:
    """A module of a runtime, and the part of an adapter's update that holds its factors."""

    path: str
    update: UpdateSpec | None  # None for zeros
    shape: tuple[int, ...]  # (out, in); (experts, out, in) of a stack
    rank: int
    scale: float
    form: Form
    transposed: bool = False  # an embedding
    expert: int | None = None  # of the update, if the update is a stack and this module is not
    matrix_transposed: bool = False  # the update's matrix is (in, out)
    rows: slice = field(default_factory=lambda: slice(None))  # of the update's matrix
    heads: int = 0  # reorder the rows of so many heads from rotary pairs to halves; 0 for unchanged rows

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.update.module,) if self.update else ()

    @property
    def slices(self) -> tuple[tuple[str, int, int, int | None], ...]:
        """The rows of the update's change, over all experts, in this module (as `Made.slices`); empty for all."""
        if self.update is None or self.shape == self.update.shape:
            return ()
        out = self.update.shape[-2]
        first, stop, _ = (slice(None) if self.matrix_transposed else self.rows).indices(out)
        start = (self.expert or 0) * out
        return ((self.update.module, start + first, start + stop, None if self.matrix_transposed or self.heads else 0),)

    @property
    def stack(self) -> bool:
        return len(self.shape) == 3

    def zeros(self, path: str, shape: tuple[int, ...]) -> ServedModule:
        """Return a module of zeros with the same rank and scale."""
        return ServedModule(path, None, shape, self.rank, self.scale, self.form)


class Factors:
    """Loader of the factors of modules, which caches one update."""

    def __init__(self, source: Adapter) -> None:
        self._source = source
        self._last: tuple[UpdateSpec, LowRank | Experts] | None = None

    def __call__(self, module: ServedModule) -> tuple[Numbers, Numbers]:
        """Return B (out, r) and A (r, in) without the scale; for a stack (E, out, r) and (E, r, in)."""
        experts, (out, width) = module.shape[:-2], module.shape[-2:]
        if module.update is None:
            shapes = (*experts, out, module.rank), (*experts, module.rank, width)
            B, A = (Numbers(np.zeros(shape, module.form.bits_type), module.form) for shape in shapes)
            return B, A
        if self._last is None or self._last[0] is not module.update:
            loaded = self._source.load(module.update)
            assert isinstance(loaded, LowRank | Experts)
            self._last = module.update, loaded
        update = self._last[1]
        if isinstance(update, Experts) and module.expert is None:
            rank = len(update.A) // update.experts
            bits = update.B.bits.reshape(-1, rank, update.experts).transpose(2, 0, 1)
            return Numbers(bits, update.B.form), update.A.reshape(update.experts, rank, -1)
        pair = update.matrix(module.expert)
        assert isinstance(pair, LowRank)
        B, A = (pair.A.T, pair.B.T) if module.matrix_transposed else (pair.B, pair.A)
        B = B[module.rows]
        return (B[halves_of_pairs(module.heads, len(B))] if module.heads else B), A


def unchanged_modules(updates: Mapping[str, UpdateSpec]) -> list[ServedModule]:
    """Return the modules under the adapter's names, with its layout of experts."""
    return [_module(module, update) for module, update in updates.items()]


def _module(path: str, update: UpdateSpec) -> ServedModule:
    form = holding(*factor_forms(update)) if "A" in update.specs else F32  # as it is expanded
    return ServedModule(path, update, update.shape, update.rank, update.scale, form, bool(update.transposed))


class BaseModules:
    """The modules of a base, experts one by one, under the names of transformers' class or of its files."""

    def __init__(self, base: Checkpoint, runtime: Runtime, served: Served) -> None:
        self.base = base
        self._runtime, self._served = runtime, served
        self._in_model = ClassNames(base) if runtime.names == "class" else None

    def of_adapter(self, source: Adapter, updates: Mapping[str, UpdateSpec]) -> Iterator[ServedModule]:
        """Yield the modules of an adapter's updates; those that already have the runtime's names stay unchanged.

        Raises:
            NeedsFlag: a module is not in the base.
            InputError: a shape differs from the base's, or a module of the class is not in the files.
        """
        specs, _ = bindable(self.base, find_tie(self.base))
        matches, absent = resolve_modules(specs, source.only(updates), self.base.configs)
        if unsupported := [module for module in absent if not self.is_of_runtime(module, updates[module])]:
            raise cannot_convert(source.name, f"are not in {self.base.path}", unsupported, among=updates)
        yield from unchanged_modules({module: updates[module] for module in absent})
        for module, matched in matches.items():
            update, types = updates[module], self.base.model_types
            for match in matched:
                placed = place_update(source, module, 1.0, match, specs, types, matches)
            if update.cls.stack or matched[0].expert is not None or self._part(matched[0]):
                in_file = len(specs[matched[0].name].shape) == 3
                matrix_transposed = in_file and not placed[0].transposed and not TRANSPOSED_EXPERTS.isdisjoint(types)
                yield from self._experts(update, matched, in_file, matrix_transposed)
            else:
                yield _module(self._path(module, matched), update)

    def is_of_runtime(self, module: str, update: UpdateSpec) -> bool:
        """Return whether a module that is not in the base is one of the runtime's, by its path and shape."""
        return not self._served.stacks and self.runtime_shapes.get(module) == update.shape

    def _path(self, module: str, matches: Sequence[Match]) -> str:
        if self._in_model:
            return module_path(self._in_model(module_of_matches(self.base, module, matches)))
        if matches[0].rows:
            message = f"is rows of {matches[0].name}, whose name in a runtime is unknown here"
            raise InputError(message, culprit=module)
        return module_path(strip_wrappers(matches[0].name))

    def _part(self, match: Match) -> bool:
        """Return whether a tensor of the files is one expert of a stack of the class."""
        return self._in_model is not None and expert_part(match.name, self.base.model_types) is not None

    def _experts(
        self, update: UpdateSpec, matches: Sequence[Match], in_file: bool, matrix_transposed: bool
    ) -> Iterator[ServedModule]:
        """Yield a module for each projection of each expert that an update of a stack, or of one expert, changes.

        Args:
            in_file: the files have a stack.
            matrix_transposed: the update's matrices are (in, out).
        """
        out, width = update.shape[:-3:-1] if matrix_transposed else update.shape[-2:]
        template = replace(_module("", update), shape=(out, width), matrix_transposed=matrix_transposed)
        for match in matches:
            for expert, names in self._expert_paths(match, update, in_file):
                is_part = update.cls.stack and match.parts > 1
                parts, count = (match.parts if is_part else len(names)), out // (match.parts if is_part else len(names))
                for part, path in enumerate(names, match.part if is_part else 0):
                    interleaved = parts > 1 and not INTERLEAVED_EXPERTS.isdisjoint(self.base.model_types)
                    rows = slice(part, None, parts) if interleaved else slice(part * count, (part + 1) * count)
                    of_stack = expert if update.cls.stack else None
                    yield replace(template, path=path, shape=(count, width), expert=of_stack, rows=rows)

    def _expert_paths(self, match: Match, update: UpdateSpec, in_file: bool) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Yield the number of each expert that a match covers, and the paths of its modules."""
        part = expert_part(match.name, self.base.model_types)
        if part and self._in_model:
            owner, last = self._in_model(part.fused).rsplit(".", 1)
            yield part.expert, (f"{owner}.{part.expert}.{PARTS_OF_STACKS[last][part.part]}",)
        elif not in_file:
            yield match.expert or 0, (module_path(strip_wrappers(match.name)),)
        else:
            owner, last = self._stack(match.name)
            if last not in PARTS_OF_STACKS:
                raise InputError("is a stack of experts whose rows are unknown here", culprit=match.name)
            names = PARTS_OF_STACKS[last]
            if match.parts > 1 and not update.cls.stack:
                names = names[match.part : match.part + 1]
            numbers: Iterable[int] = range(update.experts) if match.expert is None else (match.expert,)
            for expert in numbers:
                yield expert, tuple(f"{owner}.{expert}.{name}" for name in names)

    def _stack(self, name: str) -> tuple[str, str]:
        """Return the path of the experts that a tensor of the files stacks, and the parameter's name in the class."""
        if self._in_model:
            path = self._in_model(name)
        else:
            path = module_path(strip_wrappers(name))
            path = path if ".experts." in path else module_path(canonical(name, self.base.model_types))
        owner, _, last = path.rpartition(".")
        return owner, last

    @cached_property
    def _weights(self) -> list[tuple[str, tuple[int, ...]]]:
        """The path and the shape of each linear layer, and of each stack as (E, out, in)."""
        weights: list[tuple[str, tuple[int, ...]]] = []
        as_stored = not PEFT_TAKES_AS_PLAIN.isdisjoint(self.base.model_types)  # PEFT has (E, in, out)
        for weight in model_weights(self.base, self._in_model):
            if weight.kind.startswith("experts"):
                path = weight.in_model if self._in_model else ".".join(self._stack(weight.name))
                E, out, inp = weight.sizes
                weights.append((path, (E, inp, out) if as_stored else (E, out, inp)))
            elif weight.role in ("linear", "head") and weight.in_model.endswith(".weight"):
                weights.append((module_path(strip_wrappers(weight.in_model)), weight.sizes[1:]))
        return weights

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each linear layer, experts one by one, by its path."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path, shape in self._weights:
            owner, _, last = path.rpartition(".")
            names = PARTS_OF_STACKS.get(last, ())
            for expert in range(shape[0]) if len(shape) == 3 else ():
                shapes |= {f"{owner}.{expert}.{name}": (shape[1] // len(names), shape[2]) for name in names}
            shapes |= {path: shape} if len(shape) == 2 else {}
        return shapes

    @cached_property
    def runtime_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each linear layer by the runtime's path; without fused layers whose rows the config lacks."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path, shape in self.shapes.items():
            module = ServedModule(path, None, shape, 1, 1.0, F32)
            with suppress(InputError):
                parts = as_served(self._runtime, self._served, module, self.base.config)
                shapes |= {part.path: part.shape for part in parts}
        return shapes

    def beside(self, modules: Mapping[str, ServedModule], needs: Mapping[str, Sequence[str]]) -> Iterator[ServedModule]:
        """Yield zeros for the modules that must be beside these."""
        for path, module in modules.items():
            owner, _, last = path.rpartition(".")
            for name in needs.get(last, ()) if ".experts." not in path else ():
                yield from self._zeros(f"{owner}.{name}", module, modules)

    def experts(self, modules: Mapping[str, ServedModule]) -> Iterator[ServedModule]:
        """Yield zeros for all experts, and all of their matrices, of layers with one of these modules."""
        owners = {path.partition(".experts.")[0]: module for path, module in modules.items() if ".experts." in path}
        for path in self.shapes if owners else ():
            owner, mark, _ = path.partition(".experts.")
            if mark and owner in owners:
                yield from self._zeros(path, owners[owner], modules)

    def layers(self, modules: Mapping[str, ServedModule]) -> Iterator[ServedModule]:
        """Yield zeros for the modules of other layers with the same names."""
        kinds = {_without_layer(path): module for path, module in modules.items() if _without_layer(path) != path}
        for path in (*self.shapes, *self.runtime_shapes):
            if module := kinds.get(_without_layer(path)):
                yield from self._zeros(path, module, modules)

    def stacks(self, modules: Mapping[str, ServedModule]) -> Iterator[ServedModule]:
        """Yield zeros for the other stacks of layers with one of these stacks."""
        owners = {path.rpartition(".")[0]: module for path, module in modules.items() if module.stack}
        for path, shape in self._weights if owners else ():
            owner, _, last = path.rpartition(".")
            if owner in owners and last in PARTS_OF_STACKS and path not in modules:
                yield owners[owner].zeros(path, shape)

    def _zeros(self, path: str, module: ServedModule, modules: Mapping[str, ServedModule]) -> Iterator[ServedModule]:
        shape = self.shapes.get(path) or self.runtime_shapes.get(path)
        if path not in modules and shape:
            yield module.zeros(path, shape)


def as_served(
    runtime: Runtime, served: Served, module: ServedModule, config: Mapping[str, Any]
) -> tuple[ServedModule, ...]:
    """Return a module under the runtime's name, split if the runtime only looks up the parts of a fused module.

    Args:
        config: of the base.

    Raises:
        InputError: the config lacks the rows of a part.
    """
    owner, _, last = module.path.rpartition(".")
    fused = projections(last) if f"{owner.rpartition('.')[2]}.{last}" in FUSED else ()
    renamed = replace(module, path=_renamed(runtime, served, module.path))
    known = is_looked_up(runtime, renamed.path) and last not in served.splits
    if known and served.turns_rotary and f"{module.path}.".startswith(text_model_at(config) or ""):
        heads = heads_of(config)
        pairs = {"q_proj": heads.queries, "k_proj": heads.keys}.get(last)
        if pairs is not None and (not pairs or module.shape[0] % (2 * pairs)):
            message = f"has {module.shape[0]} rows, and by the base's config.json {pairs} heads, which tell its order"
            raise InputError(message, culprit=module.path)
        return (replace(renamed, heads=pairs or 0),)
    if known or not fused:
        return (renamed,)
    half, parts, start = module.shape[0] // 2, [], 0
    rows = qkv_rows(config) if "qkv" in last else dict.fromkeys(fused, half)
    for name in fused:
        count = rows.get(name, 0)
        path = _renamed(runtime, served, f"{owner}.{name}")
        parts.append(replace(module, path=path, shape=(count, module.shape[1]), rows=slice(start, start + count)))
        start += count
    if start != module.shape[0]:
        message = f"has {module.shape[0]} rows, and by the base's config.json its parts have {start}"
        raise InputError(message, culprit=module.path)
    return tuple(parts)


def _renamed(runtime: Runtime, served: Served, path: str) -> str:
    if match := re.fullmatch(r"(.*\.experts\.\d+\.)(\w+)", path):
        path = match[1] + dict(zip(EXPERTS, served.experts, strict=True)).get(match[2], match[2])
    for pattern, replacement in (*served.renames, *runtime.renames):
        path = re.sub(pattern, replacement, path)
    return path


def is_looked_up(runtime: Runtime, path: str) -> bool:
    """Return whether a runtime looks up a module of this path."""
    return re.fullmatch(runtime.modules, path) is not None


def _without_layer(path: str) -> str:
    return re.sub(r"\blayers\.\d+\.", "layers.*.", path, count=1)
