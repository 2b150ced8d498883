"""`diff` compares adapters in factor space, or two checkpoints tensor by tensor; the files tell which they are."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
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
from ...numerics.overlaps import Overlaps, stacked
from ...reports.report import Report
from ...reports.writing import command_line
from ...streaming.workers import Progress, choose_device, map_in_order
from ..arguments import Layers, Patterns, StrPath, Words, checked
from ..convert.in_memory import by_meaning
from ..inputs import open_adapters, open_model, parse_adapters
from ..machine import require_ieee
from .adapters import ModuleDiff, Phi, ValueDiff, compare_modules, compare_values, is_same_value, mean_phi
from .aligned import AlignedModule, align_modules
from .configs import count_ranks, differing_fields
from .related import require_known_names, require_of_one_model
from .several import AdaptersDiff, diff_several
from .shared import shared_of

READ = 1 << 22  # numbers of a base read at a time


@dataclass(frozen=True)
class AdapterDiff(Report):
    """Two adapters, module by module and as a whole.

    Attributes:
        only_a, only_b: modules of one side only.
        ranks_a, ranks_b: rank -> how many modules have it.
        fields: a field of the configs that differs -> the two values.
        norm_a, norm_b, distance, cosine: of all factors together.
        relative: the distance over the larger norm.
        interference: of all factors together (`numerics.overlaps`) over the sum of their singular values: 0 if they
            share no direction, 1 if they are equal; None without factors.
        random_interference: about what it would be if their directions were random.
        relation: what that means, a key of MEANINGS.
        inputs, outputs: the share of their energy that reads what the other reads, and that writes what it writes.
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
    fields: Mapping[str, tuple[Any, ...]]
    norm_a: float
    norm_b: float
    distance: float
    relative: float
    cosine: float
    interference: float | None
    random_interference: float | None
    relation: str | None
    inputs: float | None
    outputs: float | None
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
    *others: StrPath,
    base: StrPath | None = None,
    target: Patterns = (),
    exclude: Patterns = (),
    layers: Layers | None = None,
    drop: Words = (),
    alpha: float | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> AdapterDiff | AdaptersDiff | CheckpointDiff:
    """Compare adapters of any readable formats, ranks and targets, or two checkpoints.

    Args:
        others: more adapters: with three or more the report is of what they share, else of how two differ.
        base: the model under two adapters, for the size of their deltas and the LoRA paper's amplification factor.
        target, exclude: patterns of module paths (`selection.Selection`), one or a list.
        layers: numbers of layers: "0-15,20", range(16) or a list.
        drop: keys of DROP_CHOICES, of what is left out of the adapters.
        alpha: for adapter files without an alpha.

    Raises:
        UsageError: three or more with a base, or of which some are models.
        InputError: one is an adapter and the other is not, or their shapes are of different models.
    """
    selection = Selection.parse(target, exclude, layers)
    paths = [os.fspath(path) for path in (a, b, *others)]
    with ExitStack() as opened:
        if not _are_adapters(paths):
            if base is not None or alpha is not None or drop:
                raise UsageError("--base, --drop and --alpha are for adapters, and these are two models")
            sides = [open_checkpoint(path) for path in paths]
            for side in sides:
                opened.callback(side.close)
            one, two = with_names_of_one(sides)
            return _diff_checkpoints((paths[0], paths[1]), one, two, selection, progress)
        if others and base is not None:
            raise UsageError("--base is for two adapters: with each two of several, call diff again")
        config = None if base is None else read_config(base)
        adapters = open_adapters(
            parse_adapters(paths, drop), alpha, opened, config, has_base_option=base is None and not others
        )
        if len({each.format for each in adapters}) > 1:
            adapters = [FORMATS[each.format].in_other_names(each) for each in adapters]
        modules = [module for adapter in adapters for module in adapter.updates]
        comparable, aliases = by_meaning(adapters, selection)
        require_of_one_model(comparable)
        selection.require_used([*modules, *aliases], " or ".join(adapter.name for adapter in adapters))
        selected = [_selected(adapter, selection, aliases) for adapter in comparable]
        if not any(each.updates for each in selected):
            raise InputError(f"{'no' if others else 'neither'} adapter has a module that is selected")
        aligned = align_modules(selected)
        require_known_names(selected, aligned)
        if others:
            return diff_several(selected, aligned, choose_device(device), progress)
        model = None if base is None else open_model(base, "--base is the model under the two", opened)
        first, second = selected
        return _diff_adapters(
            first, second, aligned, model, os.fspath(base) if base else None, choose_device(device), progress
        )


def _are_adapters(paths: Sequence[str]) -> bool:
    """Return whether all are adapters, or two are models.

    Raises:
        InputError: some are adapters and others are not.
        UsageError: there are more models than two.
    """
    kinds = [holds_adapter(path) for path in paths]
    if any(kinds) and not all(kinds):
        large, small = paths[kinds.index(False)], paths[kinds.index(True)]
        raise InputError(
            f"is a model, and {small} is an adapter; diff compares two of a kind",
            culprit=large,
            remedy=f"to hold the adapter against the model: {command_line('inspect', small, '--base', large)}",
        )
    if not all(kinds) and len(paths) > 2:
        raise UsageError(f"these are {len(paths)} models, and diff compares two; of adapters it takes any number")
    return all(kinds)


def _selected(adapter: Adapter, selection: Selection, aliases: Mapping[str, tuple[str, ...]]) -> Adapter:
    updates = {m: update for m, update in adapter.updates.items() if selection.selects(m, *aliases.get(m, ()))}
    return replace(adapter, updates=updates)


def _diff_adapters(
    a: Adapter,
    b: Adapter,
    aligned: Sequence[AlignedModule],
    base: Checkpoint | None,
    base_name: str | None,
    device: torch.device,
    progress: Progress | None,
) -> AdapterDiff:
    weights = [_weights(base, adapter) if base else {} for adapter in (a, b)]
    modules, overlaps = list[ModuleDiff](), list[Overlaps]()
    for found, loaded in compare_modules(a, b, aligned, device, progress):
        of_base = [
            _relative_to_base(*each) for each in zip(weights, loaded.module.factored, loaded.changes, strict=True)
        ]
        (size_a, factor_a), (size_b, factor_b) = of_base
        modules.append(replace(found, size_a=size_a, size_b=size_b, amplification_a=factor_a, amplification_b=factor_b))
        overlaps.append(loaded.overlaps)
    order = {module.name: i for i, module in enumerate(aligned)}
    modules.sort(key=lambda m: order[m.name])
    values = compare_values(a, b, aligned)
    total = stacked(overlaps).total() if overlaps else None
    pair = shared_of(overlaps).pairs[0] if overlaps else None
    norm_a, norm_b = total.norms.tolist() if total else (0.0, 0.0)
    worst = max([m.relative for m in modules] + [v.relative for v in values], default=0.0)
    return AdapterDiff(
        a=a.name,
        b=b.name,
        base=base_name,
        modules=tuple(modules),
        values=tuple(values),
        only_a=tuple(module.name for module in aligned if not module.updates[1]),
        only_b=tuple(module.name for module in aligned if not module.updates[0]),
        ranks_a=count_ranks(a),
        ranks_b=count_ranks(b),
        fields=differing_fields((a, b)),
        norm_a=norm_a,
        norm_b=norm_b,
        distance=float(total.distances[0, 1]) if total else 0.0,
        relative=float(total.relatives[0, 1]) if total else 0.0,
        cosine=pair.cosine if pair else 0.0,
        interference=pair.interference if pair else None,
        random_interference=pair.random_interference if pair else None,
        relation=pair.relation if pair else None,
        inputs=pair.inputs if pair else None,
        outputs=pair.outputs if pair else None,
        phi=mean_phi(modules),
        worst=worst,
        same=all(m.same for m in modules) and all(is_same_value(v.kind, v.relative) for v in values),
        left_out=(*a.left_out, *b.left_out),
    )


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
    weights: Mapping[str, list[tuple[TensorRef, Placement]]], spec: UpdateSpec | None, svd: FactoredSVD
) -> tuple[float | None, float | None]:
    """Return ||D|| / ||W||, and the amplification factor if W is one whole matrix; None without a base."""
    if spec is None or spec.module not in weights:
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
