"""Rename an image adapter's updates without factors: differences and new values, also of biases, and (IA)3.

A fused module's rows go to its parts, so that two spellings of one adapter can be compared. For `convert`, the rows of
differences and new values go to the modules of any format.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.formats.format import Format
from ..adapters.updates.add import AddDelta
from ..adapters.updates.diff import Diff
from ..adapters.updates.ia3 import IA3
from ..adapters.updates.replace import ReplaceTensor
from ..adapters.updates.update import Update, UpdateSpec
from ..architectures.components import component_of
from ..architectures.families import ENCODERS, FAMILIES
from ..architectures.families.lookup import Span, locate, names_scale, parts_of
from ..architectures.families.table import CONTROL_NORMS, DENOISERS, ModelFamily
from ..architectures.image import SCALE
from ..binding.modules.image_modules import SourceModule, dotted_path, settle_components
from ..errors import InputError
from ..files.dtypes import TensorSpec
from ..numerics.arrays import Numbers, recast
from ..numerics.forms import FORMS, Bits, holding
from .lazy import Made, Tensors
from .log import NO_LOSS, Loss
from .module_map import TargetModule, plan_target_modules


@dataclass(frozen=True)
class ValueModule:
    """An update without factors, of a module's weight or bias."""

    source: SourceModule  # with the path of the module
    end: str  # `.bias` after that path, or nothing
    columns: int  # of the module's matrix; 0 if unknown

    @property
    def is_matrix(self) -> bool:
        """Return whether it changes a matrix or a kernel."""
        return len(self.source.update.shape) > 1


def read_value_modules(adapter: Adapter, kinds: Collection[type[Update]] = (Diff, IA3)) -> list[ValueModule]:
    """Return the updates of some kinds without factors whose names contain a module's path."""
    values = []
    for module, update in adapter.updates.items():
        component, path = component_of(module)
        flat = adapter.flattened or "." not in path
        owner = path.removesuffix("_bias" if flat else ".bias")
        dotted = dotted_path(owner) if flat else owner.removesuffix(SCALE)
        if update.cls in kinds and dotted is not None:
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


def settle_values(values: Iterable[ValueModule], family: ModelFamily) -> list[ValueModule]:
    """Return the values with the family's components, as `settle_components`."""
    every = list(values)
    settled = settle_components((value.source for value in every), family)
    return [replace(value, source=source) for value, source in zip(every, settled, strict=True)]


CARRIED = (Diff, ReplaceTensor, AddDelta)  # kinds that `convert` carries to formats with names for them


def end_of(value: ValueModule, family: str, to: Format, adapter: Adapter) -> str | None:
    """Return how a format names an update of a kind in CARRIED, a key of `Format.value_ends`; None if it cannot.

    Args:
        family: a key of FAMILIES.
    """
    source, update = value.source, value.source.update
    table = FAMILIES[family] if source.component in DENOISERS else None
    located = locate(table, source.path) if table else None
    if table and located is None:
        return None
    if value.end and update.cls is ReplaceTensor:
        return None
    if value.end and "bias" in to.value_ends:
        owner = adapter.updates.get(source.module[: -len(value.end)])
        return "bias" if owner and owner.rank else None
    if value.end:
        return "diff_b" if "diff_b" in to.value_ends else None
    names = located.names(to.naming(family)) if located else ()
    if table and to.flattened and any(names_scale(table, path) for path in names):
        return None  # programs have flattened names of tensors that end in `.weight` alone
    if update.cls is ReplaceTensor and "norm" in to.value_ends:
        has_loader = table is not None and bool(table.control_input)  # of a family's control adapters
        is_norm = located is not None and all(path.endswith(CONTROL_NORMS) for path in located.diffusers)
        return "norm" if has_loader and is_norm else None
    end = "set" if update.cls is ReplaceTensor else "diff" if len(update.shape) > 1 else "w_norm"
    return end if end in to.value_ends else None


def plan_carried(
    source: Adapter, values: Mapping[str, Sequence[ValueModule]], family: str, to: Format, factors: Collection[str]
) -> dict[str, Made]:
    """Return an image adapter's updates without factors as those of a format's modules.

    Args:
        values: as `end_of` -> those of it.
        family: a key of FAMILIES.
        factors: the modules that have factors in the output.

    Raises:
        InputError: rows do not fit, or a module has two changes.
    """
    planned: dict[str, Made] = {}
    vectors: set[str] = set()
    for end in ("diff", "set", "norm", "w_norm", "diff_b", "bias"):
        of_module = {value.source.module: value for value in values.get(end, ())}
        for target in plan_target_modules([_as_matrix(each) for each in of_module.values()], family, to.naming(family)):
            owner = to.module_name(target.component, target.path, family)
            is_scale = target.component in DENOISERS and names_scale(FAMILIES[family], target.path)
            is_bias = end in ("diff_b", "bias")
            vectors |= {owner} if end == "w_norm" else set()
            name = f"{owner}.bias" if is_bias else f"{owner}{SCALE}" if is_scale and not to.flattened else owner
            if name in planned or (name in factors and not is_bias):
                raise InputError("has two changes in the adapter, of which programs apply one", culprit=name)
            if end == "bias" and owner not in factors:
                raise InputError("is a bias beside factors, and its module has none there", culprit=name)
            suffix = to.value_ends["b_norm" if end == "diff_b" and owner in vectors else end]
            planned[name] = _carried(source, target, of_module, name, f"{name if not is_bias else owner}.{suffix}")
    return planned


def _as_matrix(value: ValueModule) -> SourceModule:
    """Return a source module whose update has the shape of the module's matrix, which its rows depend on."""
    source = value.source
    if value.is_matrix:
        return source
    ((role, spec),) = source.update.specs.items()
    columns = value.columns or 1
    shaped = replace(source.update, specs={role: replace(spec, shape=(spec.size, columns))})
    return replace(source, update=shaped)


def _carried(source: Adapter, target: TargetModule, values: Mapping[str, ValueModule], name: str, tensor: str) -> Made:
    """Return the update of a target module, of the rows of its sources; a difference has zeros for all others."""
    updates = [values[part.source.module].source.update for part in target.parts]
    kinds = {update.cls for update in updates}
    covered = sum(part.stop - part.start for part in target.parts)
    if len(kinds) > 1 or (ReplaceTensor in kinds and covered < target.rows):
        raise InputError("is fused there, and only some of its rows have a new value in the adapter", culprit=name)
    ((_, first),) = updates[0].specs.items()
    form = holding(*(FORMS[spec.dtype] for update in updates for spec in update.specs.values()))
    shape = (target.rows, *first.shape[1:])
    is_bias = tensor.endswith(".bias")
    role, cls = ("value", updates[0].cls) if is_bias or ReplaceTensor in kinds else ("diff", Diff)
    cls = AddDelta if is_bias else cls
    scales = {update.scale for update in updates}
    if len(scales) > 1:
        raise InputError("is fused there, and its biases have several scales", culprit=name)
    update = UpdateSpec(cls, name, {role: tensor}, {role: TensorSpec(form.name, shape)}, scales.pop(), False)

    def make() -> tuple[Tensors, Loss]:
        bits: Bits = np.zeros(shape, form.bits_type)
        for part, of_part in zip(target.parts, updates, strict=True):
            ((_, key),) = of_part.tensors.items()
            stop = part.target_start + part.stop - part.start
            bits[part.target_start : stop] = recast(source.file.numbers(key), form).bits[part.start : part.stop]
        return {role: Numbers(bits, form)}, NO_LOSS

    parts = tuple(dict.fromkeys(part.source.module for part in target.parts))
    return Made(update, make, parts, target.how, numbers=False)
