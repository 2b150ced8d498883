"""Compare two models tensor by tensor. Quantized weights are dequantized and compared as numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace

from ...binding.modules.selection import Selection
from ...binding.weights.model_pairs import pair_tensors
from ...errors import InputError
from ...files.checkpoint import Checkpoint
from ...files.tensor_compare import Comparison, compare
from ...files.tensor_ref import TensorRef
from ...streaming.parallel import Progress, map_in_order
from ...views.diff_models import CheckpointDiff, TensorDiff


def diff_models(
    names: tuple[str, str], a: Checkpoint, b: Checkpoint, selection: Selection, progress: Progress | None
) -> CheckpointDiff:
    """Compare two open models. `names` are their names for messages.

    Raises:
        InputError: nothing is selected, or tensors differ whose codes cannot be read.
    """
    pairs = pair_tensors(a, b)
    modules = [*map(_module_of, (*pairs.both, *pairs.only_base, *pairs.only_tuned))]
    selection.require_used(modules, " or ".join(names))
    both = {name: sides for name, sides in pairs.both.items() if selection.selects(_module_of(name))}
    only_a, only_b = (
        tuple(n for n in side if selection.selects(_module_of(n))) for side in (pairs.only_base, pairs.only_tuned)
    )
    if not (both or only_a or only_b):
        raise InputError("neither model has a selected tensor")
    codes = {**a.formats, **b.formats}
    _refuse_codes(names, codes, (*only_a, *only_b))
    rows, equal, norms, done = [], 0, [], 0
    total = sum(first.spec.nbytes for first, _ in both.values())
    with closing(map_in_order(_compare, both.values(), 2)) as compared:
        for (name, (first, second)), comparison in zip(both.items(), compared, strict=True):
            done += first.spec.nbytes
            if progress:
                progress(done, total)
            row = None
            if comparison is not None and comparison.equal:
                equal += 1
            else:
                _refuse_codes(names, codes, (name,))
                row = _tensor_diff(name, first, second, comparison)
                rows.append(row)
            if comparison is not None and name not in codes and (row is None or row.relative is not None):
                norms.append(comparison.norms)
    totals = [math.hypot(*side) for side in zip(*norms, strict=True)]
    return CheckpointDiff(
        a=names[0],
        b=names[1],
        tensors=tuple(rows),
        equal=equal,
        only_a=only_a,
        only_b=only_b,
        relative=_relative(*totals) if norms else None,
        worst=max((row.relative for row in rows if row.relative is not None), default=0.0 if norms else None),
        same=not (rows or only_a or only_b),
        compared=len(norms),
    )


def _refuse_codes(models: tuple[str, str], codes: Mapping[str, str], differing: Iterable[str]) -> None:
    """Raise InputError if tensors of unreadable codes differ: the distance of codes is not that of weights."""
    for name in differing:
        if name in codes:
            raise InputError(
                f"differs, and its codes ({codes[name]}) in {' or '.join(models)} cannot be read",
                culprit=name,
                remedy="pass the models in 16 or 32 bits, or --exclude the quantized weights",
            )


def _module_of(name: str) -> str:
    return name.removesuffix(".weight")


def _compare(sides: tuple[TensorRef, TensorRef]) -> Comparison | None:
    """Compare two tensors. None if their shapes differ."""
    first, second = sides
    return compare(first, second) if first.spec.shape == second.spec.shape else None


def _tensor_diff(name: str, first: TensorRef, second: TensorRef, comparison: Comparison | None) -> TensorDiff:
    row = TensorDiff(
        name=name,
        dtype_a=first.parts.codes_spec.dtype if first.parts else first.file.stored_type(first.name),
        dtype_b=second.parts.codes_spec.dtype if second.parts else second.file.stored_type(second.name),
        shape_a=first.spec.shape,
        shape_b=second.spec.shape,
        relative=None,
        largest=None,
        steps=None,
        changed=None,
        odd=0,
        codec_a=first.weight.kind if first.weight else None,
        codec_b=second.weight.kind if second.weight else None,
    )
    if comparison is None:
        return row
    if comparison.largest is None:
        return replace(row, changed=comparison.changed if first.spec.dtype == second.spec.dtype else None)
    if comparison.not_finite:
        return replace(row, changed=comparison.changed, odd=comparison.not_finite)
    return replace(
        row,
        relative=_relative(*comparison.norms),
        largest=comparison.largest,
        steps=comparison.max_ulps,
        changed=comparison.changed,
    )


def _relative(first: float, second: float, between: float) -> float:
    """Return the distance over the larger norm. It is 2 for opposite tensors."""
    largest = max(first, second)
    return between / largest if largest else 0.0
