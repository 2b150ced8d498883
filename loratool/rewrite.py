"""A checkpoint written anew: chosen tensors pass through a step by blocks of rows, all else is copied or cast.

This is the streaming that every verb with a model as output shares. It turns an output's layout into
independent items for `runtime.run`, and keeps nothing but the blocks under way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any, BinaryIO

import torch

from .checkpoint import Checkpoint
from .errors import InputError, NeedsFlag
from .numerics.exact import Change, cast_rounded
from .output import Output, OutputFile, open_output
from .runtime import CopyBytes, Item, MapRows, Prepare, Progress, Step, Worker, run
from .tensorfile import TORCH_FLOATS

COPY_ITEM = 1 << 26  # bytes of an untouched range an item: small enough to report progress and to stop
ROWS_ITEM = 1 << 22  # weights of a matrix an item
MIN_ROWS = 256  # of a matrix an item: a step's preparation is as much work as a few rows


def rewrite(
    base: Checkpoint,
    output: Output,
    changed: Collection[str],
    make_step: Callable[[str], Prepare],
    device: torch.device,
    workers: int,
    progress: Progress | None = None,
) -> Generator[tuple[str, list[Any]], None, None]:
    """Write `output`, whose layout is planned, from `base`; yield what the steps return for each piece of a tensor.

    changed: the tensors that go through `make_step(name)`, as matrices of shape[0] rows; the pieces of one tensor
    come in any order. Raises NeedsFlag or InputError where a cast overflows; then, and when the caller closes it
    early, nothing stays.
    """
    output.require_space()
    done = 0
    with open_output(output) as targets:
        items = _items(base, output, changed, make_step, targets)
        for item, results in run(items, lambda: Worker(device), workers):
            if isinstance(item, MapRows) and item.tensor in changed:
                yield item.tensor, results
            elif isinstance(item, MapRows):
                refuse_overflow(item.tensor, results, base, output)
            done += item.nbytes
            if progress:
                progress(done, output.nbytes)


def refuse_overflow(tensor: str, blocks: Collection[Change], base: Checkpoint, output: Output) -> None:
    """Raise for weights that became infinite: NeedsFlag where --dtype fp32 would hold them, else InputError."""
    count, largest = sum(block.overflowed for block in blocks), max((block.largest for block in blocks), default=0.0)
    if not count:
        return
    old, new = base.specs[tensor].dtype, output.specs[tensor].dtype
    message = f"{count} weights become infinite in {new}"
    if largest < torch.finfo(torch.float32).max and new in ("F16", "BF16"):
        raise NeedsFlag(message, culprit=tensor, remedy="add --dtype fp32, which holds them")
    remedy = (
        f"leave out --dtype: {old} holds them" if old != new else "is this the adapter's base, and its alpha right?"
    )
    raise InputError(message, culprit=tensor, remedy=remedy)


def _items(
    base: Checkpoint,
    output: Output,
    changed: Collection[str],
    make_step: Callable[[str], Prepare],
    targets: Mapping[str, BinaryIO],
) -> Iterator[Item]:
    """The work of the whole output, a piece of each file in turn: two threads that write one file wait for its lock."""
    waiting = [_file_items(base, output, file, targets[file.name], changed, make_step) for file in output.files]
    while waiting:
        for source in list(waiting):
            item = next(source, None)
            if item is None:
                waiting.remove(source)
            else:
                yield item


def _file_items(
    base: Checkpoint,
    output: Output,
    file: OutputFile,
    target: BinaryIO,
    changed: Collection[str],
    make_step: Callable[[str], Prepare],
) -> Iterator[Item]:
    """The work of one file in the order of its bytes; neighbours that are copied from neighbours are one item."""
    span: CopyBytes | None = None
    for name, offset in file.begin.items():
        old, new = base.specs[name], output.specs[name]
        copy = CopyBytes(base.shard_of[name].file, base.shard_of[name].begin[name], target, offset, old.nbytes)
        if name in changed and old.size:
            yield from _row_items(base, output, copy, name, old.size // old.shape[0], make_step(name))
        elif old.dtype != new.dtype and old.size:
            yield from _row_items(base, output, copy, name, 1, _prepare_cast)  # any run of numbers
        elif span and span.source is copy.source and span.end == (copy.source_offset, copy.target_offset):
            span = replace(span, nbytes=span.nbytes + copy.nbytes)
        else:
            yield from _copy_items(span)
            span = copy
    yield from _copy_items(span)


def _copy_items(span: CopyBytes | None) -> Iterator[CopyBytes]:
    if span is None:
        return
    for start in range(0, span.nbytes, COPY_ITEM):
        size = min(COPY_ITEM, span.nbytes - start)
        yield CopyBytes(span.source, span.source_offset + start, span.target, span.target_offset + start, size)


def _row_items(
    base: Checkpoint, output: Output, place: CopyBytes, name: str, columns: int, prepare: Prepare
) -> Iterator[MapRows]:
    old, new = (getattr(torch, TORCH_FLOATS[specs[name].dtype]) for specs in (base.specs, output.specs))
    rows = base.specs[name].size // columns
    step = max(MIN_ROWS, ROWS_ITEM // columns)
    for start in range(0, rows, step):
        before = start * columns
        yield MapRows(
            name,
            place.source,
            place.source_offset + before * old.itemsize,
            old,
            place.target,
            place.target_offset + before * new.itemsize,
            new,
            columns,
            start,
            min(start + step, rows),
            prepare,
        )


def _prepare_cast(start: int, stop: int) -> Step:
    return lambda base, row, out, work: cast_rounded(base, out, work)
