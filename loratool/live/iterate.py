"""`iter_merged`: a merged model as names and tensors, one by one, without a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..binding.merge.coded_bases import plan_codes
from ..binding.merge.merge_plan import MergePlan, plan_merge
from ..binding.modules.selection import Selection
from ..commands import calls
from ..commands.adapter_requests import Adapters, parse_adapters
from ..commands.arguments import StrPath, checked, dtype_word, parse_words
from ..commands.inputs import open_inputs, require_residual_base, subtract_initial
from ..commands.machine import require_ieee
from ..errors import InputError
from ..files.dtypes import DTYPE_NAMES, MERGE_DTYPES, TensorSpec
from ..files.output.plan import plan_output
from ..files.tensor_ref import TensorRef, require_finite
from ..numerics.arrays import Numbers
from ..numerics.forms import FORMS
from ..numerics.rounding_stats import RoundingStats, cast_rounded
from ..numerics.workspace import Workspace
from ..streaming.apply import plan_changed_tensors
from ..streaming.parallel import worker_count
from ..streaming.rewrite import ChangedTensor, RowRange
from ..streaming.segment import UpdateLoader
from ..streaming.workers import run_threads

CAST = 1 << 20  # numbers cast at a time


@checked
@require_ieee
def iter_merged(
    base: StrPath,
    adapters: Adapters,
    *,
    dtype: calls.MergeDtype = "keep",
    target: calls.Target = (),
    exclude: calls.Exclude = (),
    layers: calls.OfLayers = None,
    drop: calls.Drop = (),
    alpha: calls.Alpha = None,
    tied: Literal["untie", "share", "refuse"] = "untie",
    initial: StrPath | None = None,
    residual_base: bool = False,
    workers: calls.Workers = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of a merged model, in the order of its files, and write no file.

    The bytes are those that `merge` writes with the same arguments. One tensor is in memory at a time.

    Args:
        base: the model's file or folder; no GGUF model.
        adapters: one adapter or several, as `merge` takes them.
        tied: what to do if an adapter changes only one side of tied weights, as in `merge`.
        initial: the adapter before training, to be subtracted.
        residual_base: the base is the residual of a PiSSA-like initialization.

    Raises:
        UsageError, InputError, NeedsFlag: the merge is not possible; before the first tensor, except an overflow.
    """
    opened = ExitStack()
    try:
        requests = parse_adapters(adapters, parse_words(drop))
        checkpoint, weighted = open_inputs(base, requests, alpha, opened)
        if checkpoint.is_gguf:
            message, remedy = "is a GGUF model, whose blocks are no tensors", "merge it into a file"
            raise InputError(message, culprit=os.fspath(base), remedy=remedy)
        if initial is None:
            require_residual_base(checkpoint, weighted)
        weighted = subtract_initial(weighted, initial, residual_base, opened)
        selection = Selection.parse(target, exclude, layers)
        plan = plan_codes(plan_merge(checkpoint, weighted, selection, tied), "mixed", MERGE_DTYPES[dtype_word(dtype)])
        place = (Path("merged"), False, "", plan.written, MERGE_DTYPES[dtype_word(dtype)], None, plan.edits)
        specs = plan_output(checkpoint, *place).specs
        for name, spec in specs.items():
            if spec.dtype not in DTYPE_NAMES:
                raise InputError(f"is {spec.dtype}, which torch has no type for", culprit=name)
        for name in plan.changed:
            if plan.sources[name].file not in checkpoint.shards:
                require_finite(plan.sources[name])
    except BaseException:
        opened.close()
        raise
    return _tensors(plan, specs, opened, workers or worker_count())


def _tensors(
    plan: MergePlan, specs: Mapping[str, TensorSpec], opened: ExitStack, workers: int
) -> Iterator[tuple[str, Tensor]]:
    with opened:
        sources = plan.stored_sources(specs)
        changed = plan_changed_tensors(plan, UpdateLoader(), record=False)
        for name, spec in specs.items():
            yield name, require_ieee(_tensor)(sources[name], spec, changed.get(name), workers)


def _tensor(source: TensorRef, spec: TensorSpec, changed: ChangedTensor | None, workers: int) -> Tensor:
    """Return a tensor of the output."""
    out = torch.empty(spec.shape, dtype=getattr(torch, DTYPE_NAMES[spec.dtype]))
    flat = out.view(-1).view(torch.uint8).numpy()
    is_cast = source.weight or source.spec.dtype != spec.dtype
    if spec.size and (changed or is_cast):
        _fill(source, Numbers(flat.view(FORMS[spec.dtype].bits_type), FORMS[spec.dtype]), changed, workers)
    elif spec.size:
        source.file.read_bytes(source.name, 0, flat.data)
    return out


def _fill(source: TensorRef, out: Numbers, changed: ChangedTensor | None, workers: int) -> None:
    """Compute the numbers of a tensor, by blocks of rows."""
    rows = changed.rows if changed else out.size
    columns = out.size // rows
    source, done = source.as_stored(out.form.name), 0
    blocks: list[tuple[int, int, RowRange | None]] = []
    for part in (*changed.ranges(), None) if changed else (None,):
        assert part is None or isinstance(part, RowRange)
        blocks += _cut(done, part.start if part else rows, max(1, CAST // columns), None)
        if part:
            blocks += _cut(part.start, part.stop, part.item_rows, part)
            done = part.stop
    work = partial(_Worker, source, out, columns)
    with closing(run_threads(enumerate(blocks), work, workers if len(blocks) > 1 else 1, ahead=1)) as runs:
        overflowed = sum(count for _, _, count in runs)
    if overflowed:
        what = f"{overflowed} weights become infinite in {out.form.name}"
        raise InputError(what, culprit=source.name, remedy='dtype="fp32" holds them, or is this the adapter\'s base?')


def _cut(start: int, stop: int, step: int, part: RowRange | None) -> list[tuple[int, int, RowRange | None]]:
    return [(row, min(row + step, stop), part) for row in range(start, stop, step)]


class _Worker:
    """Computes one block after another, and returns how many weights overflow."""

    def __init__(self, source: TensorRef, out: Numbers, columns: int) -> None:
        self._source, self._out, self._columns = source, out, columns
        self._work = Workspace()

    def __call__(self, block: tuple[int, int, RowRange | None]) -> int:
        start, stop, part = block
        base = Numbers.empty(self._source.form, stop - start, self._columns)
        out = self._out[start * self._columns : stop * self._columns].reshape(*base.shape)
        self._source.read(start, base)
        done = part.prepare(start, stop)(base, 0, out, self._work) if part else cast_rounded(base, out, self._work)
        assert isinstance(done, RoundingStats)
        return done.overflowed
