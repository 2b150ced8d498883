"""Align the modules of adapters by common names, for all formats and classes, and load their changes as SVDs.

Modules of equal shapes are computed together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import TypeVar

import numpy as np

from ...adapters.adapter import Adapter
from ...adapters.stacked import load_stacked_factors
from ...adapters.updates.update import UpdateSpec
from ...architectures.components import component_of
from ...architectures.prefixes import CONTAINER_PREFIXES, KOHYA_COMPONENTS
from ...architectures.renames import RENAMES, canonical
from ...binding.modules.resolve import strip_wrappers
from ...binding.weights.model_pairs import missing_prefix
from ...errors import InputError
from ...numerics.arrays import Array, Device, like_of, sent
from ...numerics.factored_svd import FactoredSVD, factored_svd, in_common_bases
from ...numerics.linalg import padded
from ...numerics.overlaps import Overlaps, overlaps
from ...streaming.parallel import Progress, keep_freed_memory, map_in_order, worker_count

T = TypeVar("T")

BATCH = 1 << 18  # numbers of each kind of small matrices that a worker holds at a time

MOST = 16  # modules at a time, so that the workers have enough of them


@dataclass(frozen=True)
class AlignedModule:
    """A module's common name, and each adapter's update of it. None for an adapter without one."""

    name: str
    updates: tuple[UpdateSpec | None, ...]

    @property
    def factored(self) -> tuple[UpdateSpec | None, ...]:
        """The updates that have factors."""
        return tuple(each if each and each.rank else None for each in self.updates)


def align_modules(adapters: Sequence[Adapter]) -> list[AlignedModule]:
    """Align the updates of adapters by common names, in the order of the first adapter and then of the others.

    Names are paths without wrappers, of current transformers. If an adapter has flattened names, all are flattened, and
    kohya's prefixes become components. If an adapter has few names of the first, renames of its model type are tried,
    and prefixes that only one of them has.
    """
    flat = any(each.flattened for each in adapters)
    sides = [_by_key(adapter, flat, ()) for adapter in adapters]
    first = sides[0]
    if any(len(first.keys() & other.keys()) * 2 < min(len(first), len(other)) for other in sides[1:]):
        tried = [[_by_key(each, flat, types) for each in adapters] for types in ((), *((t,) for t in RENAMES))]
        sides = max(tried, key=_count_matches)
    names = dict.fromkeys(sides[0])
    for i, side in enumerate(sides[1:], 1):
        heads = KOHYA_COMPONENTS.values() if flat else {path.split(".")[0] + "." for path in {*names, *side}}
        prefix = missing_prefix(set(names), set(side), heads)
        if prefix is not None and _is_one_component(*prefix):
            longer, shorter = prefix
            renamed = {longer + path.removeprefix(shorter): update for path, update in side.items()}
            sides[i] = renamed if len(renamed) == len(side) else side
        names |= dict.fromkeys(sides[i])
    return [AlignedModule(name, tuple(side.get(name) for side in sides)) for name in names]


def _count_matches(sides: Sequence[Mapping[str, UpdateSpec]]) -> int:
    """Count the names that have an update in the first and another adapter. 0 if their shapes differ."""
    first, total = sides[0], 0
    for other in sides[1:]:
        pairs = [(first[name], other[name]) for name in first.keys() & other.keys()]
        total += len(pairs) if all(a.shape == b.shape for a, b in pairs) else 0
    return total


def _is_one_component(first: str, second: str) -> bool:
    """Return whether two prefixes can be one component: not an encoder and a decoder, nor two text encoders."""
    if not (first and second):
        return True
    components = [component_of(f"{prefix[:-1]}.")[0] for prefix in (first, second)]
    are_known = all(
        component or prefix[:-1] in CONTAINER_PREFIXES
        for component, prefix in zip(components, (first, second), strict=True)
    )
    return are_known and len({*components} - {None}) < 2


def _by_key(adapter: Adapter, flat: bool, types: tuple[str, ...]) -> dict[str, UpdateSpec]:
    updates = {_key(module, adapter, flat, types): spec for module, spec in adapter.updates.items()}
    if len(updates) < len(adapter.updates):
        raise InputError("has two modules whose names differ only in wrappers", culprit=adapter.name)
    return updates


def _key(module: str, adapter: Adapter, flat: bool, types: tuple[str, ...]) -> str:
    if adapter.flattened:
        prefix = next((p for p in KOHYA_COMPONENTS if module.startswith(p)), "")
        return KOHYA_COMPONENTS.get(prefix, "") + module.removeprefix(prefix)
    path = canonical(strip_wrappers(module), types)
    return path.replace(".", "_") if flat else path


@dataclass(frozen=True)
class LoadedModule:
    """A module with factors in some adapter: the SVD of each change, a stack (E, ...), and their overlaps.

    An adapter without factors for the module has an SVD of rank 0.
    """

    module: AlignedModule
    changes: tuple[FactoredSVD, ...]  # in common bases of their columns and rows
    overlaps: Overlaps  # of the stack's matrices together
    sides: tuple[int, int]  # (out, in)
    load: Callable[[int], FactoredSVD]  # of one adapter's change, with all its outputs and inputs


def measure_modules(
    adapters: Sequence[Adapter],
    aligned: Sequence[AlignedModule],
    device: Device,
    progress: Progress | None,
    measure: Callable[[LoadedModule], T],
) -> list[T]:
    """Return `measure` of every module that has factors in some adapter, computed by workers.

    Modules of equal shapes come one after the other.

    Raises:
        InputError: the shapes of two changes differ, or a factor has nan or inf.
    """
    factored = [module for module in aligned if any(module.factored)]
    for module in factored:
        _require_one_shape(adapters, module)
    like, reading = like_of(device), threading.Lock()  # converted adapters keep the last module that was asked for

    def load(module: AlignedModule, i: int) -> FactoredSVD:
        update = module.factored[i]
        assert update
        with reading:
            sides = load_stacked_factors(adapters[i], update)
        return factored_svd(*(sent(side, like) for side in sides))

    def work(batch: Sequence[AlignedModule]) -> list[T]:
        changes, sides = _changes(adapters, batch, like, reading)
        together = overlaps(changes, sides).total(1)
        svds = [tuple(FactoredSVD(each.U[i], each.S[i], each.V[i]) for each in changes) for i in range(len(batch))]
        return [
            measure(LoadedModule(module, module_svds, together.member(i), sides, partial(load, module)))
            for i, (module, module_svds) in enumerate(zip(batch, svds, strict=True))
        ]

    batches, results = list(_batches(factored)), list[T]()
    rank = max((sum(update.rank for update in module.factored if update) for module in factored), default=0)
    keep_freed_memory()
    done, total = 0, sum(map(_nbytes, factored))
    with closing(map_in_order(work, batches, worker_count(device, rank))) as measured:
        for batch, rows in zip(batches, measured, strict=True):
            results += rows
            done += sum(map(_nbytes, batch))
            if progress:
                progress(done, total)
    return results


def _require_one_shape(adapters: Sequence[Adapter], module: AlignedModule) -> None:
    having = [(adapter, update) for adapter, update in zip(adapters, module.factored, strict=True) if update]
    for (a, first), (b, second) in combinations(having, 2):
        if not _fit_together(first, second):
            raise InputError(
                f"is {first.shape} in {a.name} and {second.shape} in {b.name}: they belong to different models",
                culprit=module.name,
            )


def _fit_together(first: UpdateSpec, second: UpdateSpec) -> bool:
    """Return whether two updates can be of the same tensor. One of them may have flattened its kernel."""
    if first.shape == second.shape or first.cls.stack or second.cls.stack:
        return first.shape == second.shape
    kinds = {each.cls.without_norm(each).cls for each in (first, second)}
    return len(kinds) > 1 and (first.cls.fits(first, second.shape) or second.cls.fits(second, first.shape))


def _nbytes(module: AlignedModule) -> int:
    return sum(spec.nbytes for update in module.updates if update for spec in update.specs.values())


def _batches(modules: Sequence[AlignedModule]) -> Iterator[list[AlignedModule]]:
    """Group modules whose factors have equal shapes, up to a limit of memory."""
    groups: dict[object, list[AlignedModule]] = {}
    for module in modules:
        groups.setdefault(tuple(map(_shapes, module.factored)), []).append(module)
    for group in groups.values():
        updates = [update for update in group[0].factored if update]
        numbers = updates[0].experts * sum(update.rank for update in updates) ** 2
        count = max(1, min(MOST, BATCH // numbers))
        for start in range(0, len(group), count):
            yield group[start : start + count]


def _shapes(update: UpdateSpec | None) -> tuple[object, ...]:
    if not update:
        return ()
    inner = update.cls.without_norm(update)
    return (inner.cls, inner.experts, *sorted((role, each.shape) for role, each in inner.specs.items()))


def _changes(
    adapters: Sequence[Adapter], batch: Sequence[AlignedModule], like: Array, reading: threading.Lock
) -> tuple[tuple[FactoredSVD, ...], tuple[int, int]]:
    """Return the SVDs of each adapter's changes of N modules, (N, E, ...), in common bases, and the modules' sides.

    An adapter without changes has rank 0.
    """
    having = [i for i, update in enumerate(batch[0].factored) if update]
    small = []
    for module in batch:
        with reading:
            pairs = [load_stacked_factors(adapters[i], update) for i, update in enumerate(module.factored) if update]
        small.append(in_common_bases([(sent(B, like), sent(A, like)) for B, A in pairs]))
    sides = pairs[0][0].shape[-2], pairs[0][1].shape[-1]
    # where two adapters have the same factors, the bases of all are smaller
    p, q = max(each[0][0].shape[-2] for each in small), max(each[0][1].shape[-1] for each in small)
    svds = {}
    for i, cores in zip(having, zip(*small, strict=True), strict=True):
        B = np.stack([padded(left, -2, p) for left, _ in cores])
        A = np.stack([padded(right, -1, q) for _, right in cores])
        svds[i] = factored_svd(B, A)
    nothing = svds[having[0]].nothing()
    return tuple(svds.get(i, nothing) for i in range(len(adapters))), sides
