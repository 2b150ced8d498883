"""Rename an image adapter's updates without factors to diffusers' names: differences, also of biases, and (IA)3.

A fused module's rows go to its parts, so that two spellings of one adapter can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.updates.diff import Diff
from ..adapters.updates.ia3 import IA3
from ..architectures.components import component_of
from ..architectures.families import ENCODERS, FAMILIES
from ..architectures.families.lookup import Span, locate, parts_of
from ..architectures.families.table import DENOISERS
from ..binding.modules.image_modules import SourceModule, dotted_path
from ..files.dtypes import TensorSpec
from ..numerics.arrays import Numbers
from .lazy import Made, Tensors
from .log import NO_LOSS, Loss


@dataclass(frozen=True)
class ValueModule:
    """An update without factors, of a module's weight or bias."""

    source: SourceModule  # with the path of the module
    end: str  # `.bias` after that path, or nothing
    columns: int  # of the module's matrix; 0 if unknown


def read_value_modules(adapter: Adapter) -> list[ValueModule]:
    """Return the differences and (IA)3 vectors whose names contain a module's path."""
    values = []
    for module, update in adapter.updates.items():
        component, path = component_of(module)
        flat = adapter.flattened or "." not in path
        owner = path.removesuffix("_bias" if flat else ".bias")
        dotted = dotted_path(owner) if flat else owner
        if update.cls in (Diff, IA3) and dotted is not None:
            component = component or ("text_encoder" if dotted.startswith("text_model.") else "unet")
            matrix = adapter.updates.get(module[: len(module) - len(path) + len(owner)], update)
            columns = matrix.cls.flat(matrix)[1] if len(matrix.shape) > 1 else None
            values.append(
                ValueModule(
                    SourceModule(module, update, component, dotted), ".bias" if owner != path else "", columns or 0
                )
            )
    return values


def rows_by_module(value: ValueModule, family: str) -> dict[str, list[Span]] | None:
    """Return diffusers' modules of an update, each with its rows; no rows for a vector of the inputs.

    Returns:
        None if the family has no such module, or if the rows depend on the columns of its matrix and these are unknown.
    """
    source = value.source
    tables = [FAMILIES[family]] if source.component in DENOISERS else [*ENCODERS.values()]
    located = next(filter(None, (locate(table, source.path) for table in tables)), None)
    if located is None:
        return None
    rows, _ = source.update.cls.flat(source.update)
    if rows is None:
        return {module: [] for module in located.diffusers}
    ratio = next((ratio for end, ratio in located.family.ratios.items() if located.path.endswith(end)), 0)
    columns = value.columns or (rows // ratio if ratio else 0)
    if not columns and any(known_ratio for known_ratio, _ in located.rows):
        return None
    spans_of: dict[str, list[Span]] = {}
    for span in parts_of(located, columns, rows) or ():
        spans_of.setdefault(span.module, []).append(span)
    return spans_of or None


def plan_values(source: Adapter, modules: Mapping[str, tuple[ValueModule, Sequence[Span]]]) -> dict[str, Made]:
    """Return updates without factors under new names.

    Args:
        modules: new name -> its value module, and its rows there; no rows for all.
    """
    planned = {}
    for name, (value, spans) in modules.items():
        update = value.source.update
        ((role, key),) = update.tensors.items()
        shape = update.specs[role].shape if update.cls is Diff else (update.specs[role].size,)
        order = sorted(spans, key=lambda span: span.skip)
        size = sum(span.stop - span.start for span in order) if order else shape[0]
        spec = TensorSpec(update.specs[role].dtype, (size, *shape[1:]))
        new = replace(update, module=name, tensors={role: f"{name}.{role}"}, specs={role: spec})

        def make(
            role: str = role, key: str = key, shape: tuple[int, ...] = shape, order: Sequence[Span] = order
        ) -> tuple[Tensors, Loss]:
            value = source.file.numbers(key).reshape(*shape)
            if order:
                bits = np.concatenate([value.bits[span.start : span.stop] for span in order])
                value = Numbers(bits, value.form)
            return {role: value}, NO_LOSS

        planned[name] = Made(new, make, (value.source.module,), "split" if order else "exact", numbers=False)
    return planned
