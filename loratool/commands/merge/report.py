"""Report a merge: a row for each changed tensor, the share of the delta that rounding kept, and warnings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ...adapters.adapter import UNREAD, Adapter
from ...binding.merge.coded_bases import sizes_of_ways
from ...binding.merge.merge_plan import MergePlan
from ...binding.modules.module_weights import by_component
from ...binding.ties.stale_copies import stale_notes
from ...files.codecs.quantized import is_marker
from ...files.dtypes import FLOAT8
from ...files.output.output import Output
from ...numerics.rounding_stats import RoundingStats
from ...views.merge import AdapterReport, MergeReport, TensorReport
from ...views.parts.numbers import KEPT_ENOUGH, kept_share
from ..collector import without_gc

HALF = 0.5  # the share of the delta that survives rounding, below which requantizing is not worth it

# Type that loses much -> what to do
WIDER = {
    "BF16": "merge with --dtype fp16 or fp32, or ",
    "F16": "merge with --dtype fp32, or ",
    **dict.fromkeys(FLOAT8, "merge with --dtype bf16 --no-undo, or "),
}

NARROW = ("F8_", "F6_", "F4")  # begin the names of types of 8 bits or fewer


@without_gc
def build_report(
    plan: MergePlan,
    output: Output,
    base: str,
    stats: Mapping[str, list[RoundingStats]],
    undo_bytes: int | None,
    dry_run: bool,
) -> MergeReport:
    """Build the report of a merge.

    Args:
        stats: tensor -> the statistics of its blocks; empty in a dry run.
    """
    weights = [plan.written.get(name, name) for name in output.specs]
    names = [name for name in weights if name in plan.requested or name in plan.added or name in plan.untied]
    rows = [_row(plan, output, name, stats.get(name, [])) for name in names]
    kept_sum = _sum(block.kept for blocks in stats.values() for block in blocks)
    total = _ratio(kept_sum, _sum(block.change_squared for blocks in stats.values() for block in blocks))
    beside = plan.edits.beside.keys() - plan.written.keys()
    changed = {name for name, placements in plan.requested.items() if placements}
    warnings = [*plan.warnings, *stale_notes(plan.base, changed), *_warnings(plan, output, rows, total)]
    for name in dict.fromkeys(weights):  # which items of several tensors do not keep in order
        not_finite = sum(block.not_finite for block in stats.get(name, ()))
        if not_finite:
            warnings.append(f"{name}: {not_finite} weights of the base are inf or nan; they are copied unchanged")
    return MergeReport(
        base=base,
        out=str(output.path),
        dry_run=dry_run,
        nbytes=output.nbytes,
        adapters=tuple(
            AdapterReport(a.name, a.format, w, len(a.updates), _read_hash(a), by_component(a.module_weights))
            for a, w in plan.adapters
        ),
        tensors=tuple(rows),
        changed=None if dry_run else sum(_is_changed(plan, row) for row in rows),
        kept=total,
        copied=len(output.specs) - len(plan.written) - len(beside),
        undo=str(output.undo) if output.undo else None,
        undo_bytes=undo_bytes,
        left_out=plan.excluded,
        files=tuple(file.name for file in output.files),
        not_copied=output.not_copied,
        warnings=tuple(warnings),
        quantized="like" if plan.like else plan.way,
        base_nbytes=sum(spec.nbytes for spec in plan.base.stored.values()),
        sizes={} if plan.like else sizes_of_ways(plan),
        decoded=len(set(plan.written.values()) - set(names)),
        left_behind=output.left_behind,
        notes=plan.notes,
    )


def _read_hash(adapter: Adapter) -> str:
    return "" if adapter.sha256 == UNREAD else adapter.sha256


def _is_changed(plan: MergePlan, row: TensorReport) -> bool:
    """Return whether a tensor differs from the base. One without statistics was replaced."""
    return 0 not in row.shape and (row.name not in plan.base.specs or row.changed != 0)


def _row(plan: MergePlan, output: Output, name: str, blocks: Sequence[RoundingStats]) -> TensorReport:
    spec, holder = plan.sources[name].spec, plan.like or plan.base
    if name in plan.coded:
        dtype, stored = holder.weights[name].kind, holder.weights[name].tensors
    else:
        spec, stored = output.specs[name], (name,)
        dtype = spec.dtype
    base_weight = plan.base.weights.get(name)
    was = base_weight.kind if base_weight else plan.base.specs[name].dtype if name in plan.base.specs else ""
    updates = {id(p.update): (p.weight, p.update) for p in plan.requested.get(name, ())}.values()
    kinds = (
        [update.kind for _, update in updates] + ["untied"] * (name in plan.untied) + ["added"] * (name in plan.added)
    )
    relative, changed, kept_part = _block_measures(spec.size, blocks) if blocks else (None, None, None)
    return TensorReport(
        name=name,
        shape=spec.shape,
        dtype=dtype,
        update="+".join(dict.fromkeys(kinds)),
        rank=sum(update.rank for _, update in updates),
        scales=tuple(weight * update.scale for weight, update in updates),
        relative=relative,
        changed=changed,
        kept=kept_part,
        source_dtype=was,
        nbytes=sum(output.specs[each].nbytes for each in stored),
        missed=_missed(blocks) if name in plan.recoded else None,
    )


def _missed(blocks: Sequence[RoundingStats]) -> float | None:
    """Return `missed` of a tensor."""
    asked, moved = (_sum(getattr(b, field) for b in blocks) for field in ("change_squared", "moved_squared"))
    missed = _ratio(asked + moved - 2 * _sum(block.kept for block in blocks), asked)
    return None if missed is None else math.sqrt(max(0.0, missed))


def _block_measures(size: int, blocks: Sequence[RoundingStats]) -> tuple[float | None, float, float | None]:
    """Return `relative`, `changed` and `kept` of a tensor with `size` weights."""
    delta_squared = _sum(block.change_squared for block in blocks)
    relative = _ratio(delta_squared, _sum(block.base_squared for block in blocks))
    return (
        None if relative is None else math.sqrt(relative),
        sum(block.changed for block in blocks) / size,
        _ratio(_sum(block.kept for block in blocks), delta_squared),
    )


def _sum(values: Iterable[float]) -> float:
    """Return the exactly rounded sum, which does not depend on the order of blocks. inf if a block overflows."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return math.inf


def _ratio(x: float, y: float) -> float | None:
    """Return x / y, or None if y is 0 or one of them is not finite."""
    return x / y if y and math.isfinite(x) and math.isfinite(y) else None


def _warnings(plan: MergePlan, output: Output, rows: Sequence[TensorReport], kept: float | None) -> list[str]:
    warnings = [*_rounding_warning(plan, rows, kept or 0.0)]
    unchanged = [row.name for row in rows if row.changed == 0]
    if unchanged:
        stay = "tensor is unchanged: its" if len(unchanged) == 1 else "tensors are unchanged: their"
        names = unchanged[0] + ", ..." * (len(unchanged) > 1)
        warnings.append(f"{len(unchanged):,} {stay} delta is zero or rounds away: {names}")
    narrow = _narrow_tensors(plan, output)
    if narrow and output.specs != plan.base.stored:
        warnings.append(f"{len(narrow)} tensors of {output.specs[narrow[0]].dtype} keep their dtype: {narrow[0]}, ...")
    return warnings


def _rounding_warning(plan: MergePlan, rows: Sequence[TensorReport], kept: float) -> Iterator[str]:
    """Yield a warning if rounding loses a part of the delta. `kept` is the total share that is kept."""
    weak = [row for row in rows if row.kept is not None and row.kept < KEPT_ENOUGH]
    if not weak:
        return
    worst = min(weak, key=lambda row: row.kept or 0.0)
    least = f"{kept_share(worst.kept or 0.0)} in {worst.name}"
    if plan.recoded:
        better = "; to keep all, merge the original with --like, or use --quantized mixed" if kept < HALF else ""
        yield f"the codes keep {kept_share(kept)} of the delta in all, {least}{better}"
        return
    yield (
        f"rounding to {worst.dtype} loses part of the delta in {len(weak):,} of {len(rows):,} tensors: "
        f"{kept_share(kept)} is kept in all, {least}; {WIDER.get(worst.dtype, '')}keep the adapter separate"
    )


def _narrow_tensors(plan: MergePlan, output: Output) -> list[str]:
    """Return the plain tensors of the output with numbers of 8 bits or fewer."""
    models = [each for each in (plan.base, plan.like) if each]
    codes = {tensor for each in models for weight in each.weights.values() for tensor in weight.tensors}
    return [
        name
        for name, spec in output.specs.items()
        if spec.dtype.startswith(NARROW) and not (name in codes or name in plan.base.formats or is_marker(name))
    ]
