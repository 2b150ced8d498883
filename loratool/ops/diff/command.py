"""`diff` compares two adapters in factor space, or two checkpoints tensor by tensor; the files tell which they are."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...adapters.adapter import Adapter
from ...adapters.formats import FORMATS, holds_adapter
from ...adapters.updates.update import UpdateSpec
from ...binding.model_pairs import pair_tensors
from ...binding.placement import Placement
from ...binding.resolve import bind
from ...binding.selection import Selection
from ...binding.shared_tensors import bindable, stored_names
from ...binding.ties import find_tie
from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint, read_config
from ...files.gguf_model import with_names_of_one
from ...files.tensor_compare import Comparison, compare
from ...files.tensor_ref import TensorRef, require_finite, squared_norm
from ...numerics.factored_svd import FactoredSVD, amplification
from ...reports.report import Report
from ...reports.writing import command_line
from ...streaming.workers import Progress, choose_device, map_in_order
from ..arguments import Layers, Patterns, StrPath, Words, checked
from ..convert.in_memory import by_meaning
from ..inputs import open_adapters, open_model, parse_adapters
from ..machine import require_ieee
from .adapters import (
    SAME,
    ModuleDiff,
    Phi,
    ValueDiff,
    compare_modules,
    compare_values,
    mean_phi,
    pair_modules,
    total_distances,
)
from .related import require_known_names, require_two_of_one_model

READ = 1 << 22  # numbers of a base read at a time


# Fields of adapter_config.json that say nothing of the deltas, or what the modules say.
NO_DIFFERENCE = ("target_modules", "inference_mode", "peft_version", "r", "lora_alpha", "rank_pattern", "alpha_pattern")


# the fields of PEFT's LoraConfig whose defaults are neither false nor empty
PEFT_DEFAULTS = {
    "bias": "none",
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}


@dataclass(frozen=True)
class AdapterDiff(Report):
    """Two adapters, module by module and as a whole.

    Attributes:
        only_a, only_b: modules of one side only.
        ranks_a, ranks_b: rank -> how many modules have it.
        fields: a field of the configs that differs -> the two values.
        norm_a, norm_b, distance, cosine: of all factors together.
        relative: the distance over the larger norm.
        phi: the mean over the modules whose ranks are the commonest.
        worst: the largest relative distance of any module or tensor, 1 if it is on one side only.
        left_out: what --drop left out of both.
        above: what `worst` is above, of --fail-above.
    """

    shown_by: ClassVar[str] = "adapters_document.adapters_document"
    rows: ClassVar[str] = "modules"

    a: str
    b: str
    base: str | None
    modules: tuple[ModuleDiff, ...]
    values: tuple[ValueDiff, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    ranks_a: Mapping[int, int]
    ranks_b: Mapping[int, int]
    fields: Mapping[str, tuple[Any, Any]]
    norm_a: float
    norm_b: float
    distance: float
    relative: float
    cosine: float
    phi: Phi | None
    worst: float
    same: bool
    left_out: tuple[str, ...] = ()
    kind: str = "adapters"
    above: float | None = None


@dataclass(frozen=True)
class TensorDiff:
    """A tensor that differs between two checkpoints; of quantized weights the numbers are compared, not the codes.

    Attributes:
        dtype_a, dtype_b: of a quantized weight, that of its codes.
        relative: ||B - A|| / max(||A||, ||B||); 1 if the shapes differ or nan or inf came or went.
        largest: the largest absolute difference; None if the shapes differ.
        steps: the most ulps between two values; None for float64 and if the types or the shapes differ.
        changed: how many values differ.
        odd: how many are nan or inf on one side and not so on the other.
        codec_a, codec_b: the format of a quantized weight, None for a plain tensor.
    """

    name: str
    dtype_a: str
    dtype_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    relative: float
    largest: float | None
    steps: int | None
    changed: int
    odd: int
    codec_a: str | None = None
    codec_b: str | None = None


@dataclass(frozen=True)
class CheckpointDiff(Report):
    """Two checkpoints, tensor by tensor.

    Attributes:
        tensors: those that differ.
        equal: how many do not.
        relative: over all tensors of both sides.
        worst: the largest of any tensor, 1 if it is on one side only or its shape differs.
        above: what `worst` is above, of --fail-above.
    """

    shown_by: ClassVar[str] = "models_document.models_document"
    rows: ClassVar[str] = "tensors"

    a: str
    b: str
    tensors: tuple[TensorDiff, ...]
    equal: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    relative: float
    worst: float
    same: bool
    kind: str = "checkpoints"
    above: float | None = None


@checked
@require_ieee
def diff(
    a: StrPath,
    b: StrPath,
    *,
    base: StrPath | None = None,
    target: Patterns = (),
    exclude: Patterns = (),
    layers: Layers | None = None,
    drop: Words = (),
    alpha: float | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> AdapterDiff | CheckpointDiff:
    """Compare two adapters of any readable formats, ranks and targets, or two checkpoints.

    Args:
        base: the model under two adapters, for the size of their deltas and the LoRA paper's amplification factor.
        target, exclude: patterns of module paths (`selection.Selection`), one or a list.
        layers: numbers of layers: "0-15,20", range(16) or a list.
        drop: keys of DROP_CHOICES, of what is left out of two adapters.
        alpha: for adapter files without an alpha.

    Raises:
        InputError: one is an adapter and the other is not, or their shapes are of different models.
    """
    selection = Selection.parse(target, exclude, layers)
    with ExitStack() as opened:
        kinds = [holds_adapter(path) for path in (a, b)]
        if kinds[0] != kinds[1]:
            which = (b, a) if kinds[0] else (a, b)
            large, small = (os.fspath(path) for path in which)
            raise InputError(
                f"is a model, and {small} is an adapter; diff compares two of a kind",
                culprit=large,
                remedy=f"to hold the adapter against the model: {command_line('inspect', small, '--base', large)}",
            )
        if not kinds[0]:
            if base is not None or alpha is not None or drop:
                raise UsageError("--base, --drop and --alpha are for two adapters, and these are two models")
            sides = [open_checkpoint(path) for path in (a, b)]
            for side in sides:
                opened.callback(side.close)
            one, two = with_names_of_one(sides)
            return _diff_checkpoints((os.fspath(a), os.fspath(b)), one, two, selection, progress)
        config = None if base is None else read_config(base)
        adapters = open_adapters(parse_adapters([a, b], drop), alpha, opened, config, has_base_option=base is None)
        if len({each.format for each in adapters}) > 1:
            adapters = [FORMATS[each.format].in_other_names(each) for each in adapters]
        modules = [module for adapter in adapters for module in adapter.updates]
        comparable, aliases = by_meaning(adapters, selection)
        require_two_of_one_model(*comparable)
        selection.require_used([*modules, *aliases], " or ".join(adapter.name for adapter in adapters))
        first, second = (_selected(adapter, selection, aliases) for adapter in comparable)
        if not first.updates and not second.updates:
            raise InputError("neither adapter has a module that is selected")
        model = None if base is None else open_model(base, "--base is the model under the two", opened)
        return _diff_adapters(first, second, model, os.fspath(base) if base else None, choose_device(device), progress)


def _selected(adapter: Adapter, selection: Selection, aliases: Mapping[str, tuple[str, ...]]) -> Adapter:
    updates = {m: update for m, update in adapter.updates.items() if selection.selects(m, *aliases.get(m, ()))}
    return replace(adapter, updates=updates)


def _diff_adapters(
    a: Adapter,
    b: Adapter,
    base: Checkpoint | None,
    base_name: str | None,
    device: torch.device,
    progress: Progress | None,
) -> AdapterDiff:
    aligned = pair_modules(a, b)
    require_known_names(a, b, aligned)
    weights = [_weights(base, adapter) if base else {} for adapter in (a, b)]
    modules: list[ModuleDiff] = []
    by_name = {name: (one, two) for name, one, two in aligned}
    for found, svd_a, svd_b in compare_modules(a, b, aligned, device, progress):
        spec_a, spec_b = by_name[found.name]
        size_a, factor_a = _relative_to_base(weights[0], spec_a, svd_a)
        size_b, factor_b = _relative_to_base(weights[1], spec_b, svd_b)
        modules.append(replace(found, size_a=size_a, size_b=size_b, amplification_a=factor_a, amplification_b=factor_b))
    order = {name: i for i, (name, _, _) in enumerate(aligned)}
    modules.sort(key=lambda m: order[m.name])
    values = compare_values(a, b, aligned)
    norm_a, norm_b, between, cosine = total_distances(modules)
    largest = max(norm_a, norm_b)
    worst = max([m.relative for m in modules] + [v.relative for v in values], default=0.0)
    return AdapterDiff(
        a=a.name,
        b=b.name,
        base=base_name,
        modules=tuple(modules),
        values=tuple(values),
        only_a=tuple(name for name, one, two in aligned if two is None),
        only_b=tuple(name for name, one, two in aligned if one is None),
        ranks_a=_ranks(a),
        ranks_b=_ranks(b),
        fields=_fields(a, b),
        norm_a=norm_a,
        norm_b=norm_b,
        distance=between,
        relative=between / largest if largest else 0.0,
        cosine=cosine,
        phi=mean_phi(modules),
        worst=worst,
        same=all(m.same for m in modules) and all(v.relative <= (SAME if v.kind == "add" else 0) for v in values),
        left_out=(*a.left_out, *b.left_out),
    )


def _ranks(adapter: Adapter) -> dict[int, int]:
    ranks = [update.rank for update in adapter.updates.values() if update.rank]
    return {rank: ranks.count(rank) for rank in sorted(set(ranks))}


def _fields(a: Adapter, b: Adapter) -> dict[str, tuple[Any, Any]]:
    """Return the fields of the configs that differ, but for ranks and targets, which the modules tell."""
    one, two = a.config.extra, b.config.extra
    found: dict[str, tuple[Any, Any]] = {"format": (a.format, b.format)} if a.format != b.format else {}
    found |= {"alpha": (a.config.alpha, b.config.alpha)} if a.config.alpha != b.config.alpha else {}
    if one and two:
        keys = [key for key in dict.fromkeys([*one, *two]) if key not in NO_DIFFERENCE]
        printed = {key: (_printable(key, one.get(key)), _printable(key, two.get(key))) for key in keys}
        found |= {key: (x, y) for key, (x, y) in printed.items() if x != y}
    return found


def _printable(key: str, value: Any) -> Any:
    """Return a field's value, None for nothing and for a false that is what nothing means; as text if it holds NaN or
    Infinity, which are no JSON."""
    text = json.dumps(value)
    if re.search(r"NaN|Infinity", text):
        return text
    return value if value is False and key in PEFT_DEFAULTS else value or None


def _weights(base: Checkpoint, adapter: Adapter) -> dict[str, list[tuple[TensorRef, Placement]]]:
    """Return the base's tensors under each module; raise what `bind` raises if the two do not belong together."""
    tie = find_tie(base)
    specs, coded = bindable(base, tie)
    binding = bind(specs, base.configs, [(adapter, 1.0)], Selection(), coded)
    found: dict[str, list[tuple[TensorRef, Placement]]] = {}
    stored = stored_names(base, tie)
    for name, placements in binding.placements.items():
        for placement in placements:
            found.setdefault(placement.update.module, []).append((base.ref(stored.get(name, name)), placement))
    return found


def _relative_to_base(
    weights: Mapping[str, list[tuple[TensorRef, Placement]]], spec: UpdateSpec | None, svd: FactoredSVD | None
) -> tuple[float | None, float | None]:
    """Return ||D|| / ||W||, and the amplification factor if W is one whole matrix; None without a base."""
    if spec is None or svd is None or spec.module not in weights:
        return None, None
    found = weights[spec.module]
    sources = {source.name: source for source, _ in found}
    for source in sources.values():
        require_finite(source)
    norm = math.sqrt(math.fsum(map(squared_norm, sources.values())))
    size = float(torch.linalg.vector_norm(svd.S)) / norm if norm else None
    source, placement = found[0]
    if len(found) > 1 or len(svd.S) > 1 or placement.stop - placement.start != placement.rows:
        return size, None
    U, S, V = svd.U[0].cpu(), svd.S[0].cpu(), svd.V[0].cpu()
    delta = FactoredSVD(V, S, U) if placement.transposed else FactoredSVD(U, S, V)  # stored as (in, out)
    factor = amplification(delta, source.blocks(READ), spec.rank)
    return size, factor if math.isfinite(factor) else None


def _diff_checkpoints(
    names: tuple[str, str], a: Checkpoint, b: Checkpoint, selection: Selection, progress: Progress | None
) -> CheckpointDiff:
    pairs = pair_tensors(a, b)
    modules = [*map(_module_of, (*pairs.both, *pairs.only_base, *pairs.only_tuned))]
    selection.require_used(modules, " or ".join(names))
    both = {name: sides for name, sides in pairs.both.items() if selection.selects(_module_of(name))}
    only_a, only_b = (
        tuple(n for n in side if selection.selects(_module_of(n))) for side in (pairs.only_base, pairs.only_tuned)
    )
    if not (both or only_a or only_b):
        raise InputError("neither model has a tensor that is selected")
    codes = {**a.formats, **b.formats}
    _refuse_codes(names, codes, (*only_a, *only_b))
    rows, equal, norms, done = [], 0, [], 0
    total = sum(one.spec.nbytes for one, _ in both.values())
    with closing(map_in_order(_compare, both.values(), 2)) as compared:
        for (name, (one, two)), found in zip(both.items(), compared, strict=True):
            done += one.spec.nbytes
            if progress:
                progress(done, total)
            if found is not None and name not in codes:
                norms.append(found.norms)
            if found is not None and found.equal:
                equal += 1
            else:
                _refuse_codes(names, codes, (name,))
                rows.append(_tensor_diff(name, one, two, found))
    totals = [math.hypot(*side) for side in zip(*norms, strict=True)] if norms else [0.0, 0.0, 0.0]
    worst = max((row.relative for row in rows), default=0.0)
    return CheckpointDiff(
        a=names[0],
        b=names[1],
        tensors=tuple(rows),
        equal=equal,
        only_a=only_a,
        only_b=only_b,
        relative=_relative(*totals),
        worst=max(worst, 1.0) if only_a or only_b else worst,
        same=not (rows or only_a or only_b),
    )


def _refuse_codes(models: tuple[str, str], codes: Mapping[str, str], differing: Iterable[str]) -> None:
    """Raise InputError if what differs is stored as codes: their distance is not that of the weights."""
    for name in differing:
        if name in codes:
            raise InputError(
                f"differs and is quantized ({codes[name]}) in {' or '.join(models)}, in codes that cannot be read",
                culprit=name,
                remedy="pass the models in 16 or 32 bits, or leave the quantized weights out with --exclude",
            )


def _module_of(name: str) -> str:
    return name.removesuffix(".weight")


def _compare(sides: tuple[TensorRef, TensorRef]) -> Comparison | None:
    """Compare two tensors; None if their shapes differ."""
    one, two = sides
    return compare(one, two) if one.spec.shape == two.spec.shape else None


def _tensor_diff(name: str, one: TensorRef, two: TensorRef, found: Comparison | None) -> TensorDiff:
    row = TensorDiff(
        name=name,
        dtype_a=one.parts.codes_spec.dtype if one.parts else one.file.stored_type(one.name),
        dtype_b=two.parts.codes_spec.dtype if two.parts else two.file.stored_type(two.name),
        shape_a=one.spec.shape,
        shape_b=two.spec.shape,
        relative=1.0,
        largest=None,
        steps=None,
        changed=max(one.spec.size, two.spec.size),
        odd=0,
        codec_a=one.weight.kind if one.weight else None,
        codec_b=two.weight.kind if two.weight else None,
    )
    if found is None:
        return row
    relative = _relative(*found.norms)
    if found.not_finite or (found.changed and not relative):
        relative = max(relative, 1.0)  # nan, inf, or values that are no numbers
    return replace(
        row,
        relative=relative,
        largest=found.largest,
        steps=found.max_ulps,
        changed=found.changed,
        odd=found.not_finite,
    )


def _relative(one: float, two: float, between: float) -> float:
    """Return the distance over the larger norm: 2 for opposites, since their difference is twice as large as either."""
    largest = max(one, two)
    return between / largest if largest else 0.0
