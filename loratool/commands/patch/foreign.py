"""Write the difference of two models in the dialect of another program."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...files.checkpoint import Checkpoint
from ...files.digest import tensors_of
from ...files.dtypes import TensorSpec
from ...files.output.output import naming_output
from ...files.output.paths import check_output_path
from ...files.weights_file import paths_of, require_unchanged
from ...patches.dialects.patch import TensorPair
from ...patches.dialects.table import DIALECTS, write_foreign_patch
from ...patches.sources import ModelSource, TensorSource
from ...views.foreign_patch import ForeignPatchReport
from .call import Patch
from .target import PatchTarget

PART = 1 << 20  # bytes that are read at a time

OF_LORATOOL = ("adapter", "one_way", "fast", "resume", "dry_run")  # options of loratool's own patches


def write_foreign(call: Patch, base: Checkpoint, target: PatchTarget) -> ForeignPatchReport:
    """Write the patch.

    Raises:
        InputError: the dialect cannot say the change of a tensor.
        UsageError: an option is not of this dialect.
    """
    dialect = call.to or ""
    wrong = next((name for name in OF_LORATOOL if getattr(call, name)), None)
    if wrong:
        word = f"--{wrong.replace('_', '-')}"
        raise UsageError("is for patches of loratool", culprit=word, remedy=f"leave out {word} or --to")
    if call.out is None:
        raise UsageError("needs a name for the output", culprit="--to", remedy="name it with -o")
    path, is_file = Path(call.out), dialect == "trl"
    check_output_path(path, is_file, [*paths_of(base.shards), *target.paths], call.force)
    options: dict[str, Any] = {name: getattr(call, name) for name in ("step", "encoding", "checksum")}
    options = {name: value for name, value in options.items() if value is not None}
    known = inspect.signature(DIALECTS[dialect].write or write_foreign_patch).parameters
    if unknown := next((name for name in options if name not in known), None):
        raise UsageError(f"{dialect} has no such option", culprit=f"--{unknown}", remedy=f"leave out --{unknown}")
    if dialect == "arc_v2":
        options["files"] = {name: file.path.name for name, file in base.shard_of.items()}
        named = [part.index[0] for part in base.models if part.index]
        beside = {name: base.folder / name for name in ("config.json", *named)}
        options["beside"] = {name: place for name, place in beside.items() if place.is_file()}
    with naming_output(path):
        written = write_foreign_patch(dialect, _pairs(base, target), path, **options)
    require_unchanged((*base.shards, *target.opened))
    return ForeignPatchReport(
        base=os.fspath(call.base),
        tuned=target.name,
        out=str(path),
        dry_run=False,
        dialect=dialect,
        nbytes=written.nbytes,
        model_nbytes=sum(spec.nbytes for spec in target.files.specs.values()),
        changed=written.changed,
        unchanged=len(target.files.specs) - len(written.changed),
    )


def _pairs(base: Checkpoint, target: PatchTarget) -> Iterator[TensorPair]:
    """Yield the tensors of both models: those of the target in the order of its files, then those that it lacks."""
    source, counted = ModelSource(base), target.files.specs
    for file in target.files.files:
        for name, spec in file.specs.items():
            if name in counted:
                was = base.stored.get(name)
                yield TensorPair(
                    name, was, spec, partial(_read, source, name, was), partial(_read, target.source, name, spec)
                )
    for name, holder in tensors_of(base.shards).items():
        if name not in counted:
            spec = holder.specs[name]
            yield TensorPair(name, spec, None, partial(_read, source, name, spec), partial(_read, source, name, None))


def _read(source: TensorSource, name: str, spec: TensorSpec | None) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, none without a spec; each part overwrites the one before."""
    nbytes = spec.nbytes if spec else 0
    buffer = memoryview(bytearray(min(PART, nbytes)))
    for first in range(0, nbytes, PART):
        part = buffer[: nbytes - first]
        source.read(name, first, part)
        yield part
