"""Run `inspect`: describe a checkpoint from headers alone, or call `inspect_adapter`.

Names that differ only in numbers are one group, so that a model of 90,000 tensors has a short table. Nothing here may
import torch or numpy: the command is done before they would have loaded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...adapters.config import named_base
from ...adapters.formats import holds_adapter, open_adapter, open_other
from ...adapters.formats.other_methods import OTHER_METHODS, OUTCOMES, OtherMethod, describe_bottlenecks, find_marks
from ...adapters.formats.peft_config import CONFIG_NAME
from ...architectures.numbered_names import split_numbers, with_ranges
from ...architectures.roles import weight_role
from ...binding.ties.ties import head_is_missing
from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint, plain_dtype, read_config
from ...files.codecs.quantized import Coded, is_marker
from ...files.containers.gguf_file import GgufFile
from ...files.dtypes import FLOATS, TensorSpec
from ...files.folder.side_files import is_patch
from ...files.folder.weight_changes import find_change
from ...files.hub.cache import by_ranges, place_named, reading_little
from ...files.weights_file import WeightsFile, require_unchanged
from ...views.inspect_delta import DeltaInspection
from ...views.inspect_model import CheckpointReport, Group, MethodReport
from ...views.inspect_patch import PatchInspection
from .call import Inspect

if TYPE_CHECKING:
    from ...views.inspect_adapter import AdapterInspection

R = TypeVar("R", "CheckpointReport", "AdapterInspection", "MethodReport")


def run_inspect(
    call: Inspect,
) -> CheckpointReport | AdapterInspection | MethodReport | PatchInspection | DeltaInspection:
    """Describe a checkpoint, an adapter or the output of another method. The tensors' names decide which it is."""
    found = place_named(call.path)
    if is_patch(found):
        _refuse_options(call.path, "is a patch", call.base, call.alpha)
        if call.digest:
            raise UsageError("is a patch, whose index has the digests of both models", culprit=os.fspath(call.path))
        from .patches import inspect_patch

        return inspect_patch(call.path)
    if _is_delta(found):
        _refuse_options(call.path, "is a patch of another program", call.base, call.alpha)
        from .patches import inspect_delta

        return inspect_delta(found)
    place = call.path if call.digest else by_ranges(call.path)
    if not holds_adapter(place):
        checkpoint = open_checkpoint(place)
        try:
            _refuse_options(call.path, "is a checkpoint", call.base, None)
            return _with_digest(_inspect_checkpoint(checkpoint, os.fspath(call.path)), checkpoint.shards, call)
        finally:
            checkpoint.close()
    if other := open_other(call.path):
        file, fields, key, method = other
        with closing(file):
            _refuse_options(call.path, f"holds {method.title}", call.base, call.alpha)
            report = _inspect_method(os.fspath(call.path), file, fields, key, method)
            return _with_digest(report, file.members, call)
    adapter = open_adapter(
        call.path,
        call.alpha,
        lenient=True,
        model=None if call.base is None else read_config(call.base),
        deeper=True,
    )
    try:
        from .adapter import inspect_adapter

        with reading_little():  # of the base
            inspection = inspect_adapter(adapter, call.base)
        return _with_digest(inspection, adapter.file.members, call)
    finally:
        adapter.file.close()


def _is_delta(path: Path) -> bool:
    """Return whether a path is a patch of another program; what cannot be read is none."""
    with suppress(InputError):
        return path.exists() and find_change(path) is not None
    return False


def _with_digest(report: R, files: Iterable[WeightsFile], call: Inspect) -> R:
    """Return a report with the digest of these files, if it was asked for."""
    if not call.digest:
        return report
    from ...streaming.digests import digest_of_files

    opened = [*files]
    digest = digest_of_files(opened, call.progress)
    require_unchanged(opened)
    return replace(report, digest=digest)


def _refuse_options(path: str | os.PathLike[str], what: str, base: object, alpha: object) -> None:
    for option, value in (("--base", base), ("--alpha", alpha)):
        if value is not None:
            raise UsageError(f"{what}; {option} is for adapters", culprit=os.fspath(path))


def _inspect_method(
    path: str, file: WeightsFile, fields: Mapping[str, Any], key: str, method: OtherMethod
) -> MethodReport:
    base = named_base(fields.get("base_model_name_or_path") or fields.get("model_name"))
    places = {(file.storage(name), spec): name for name, spec in reversed(file.specs.items())}
    specs = {n: spec for n, spec in file.specs.items() if not spec.size or places[file.storage(n), spec] == n}
    notes = [describe_bottlenecks(file.specs)] if key == "BOTTLENECK" else []
    if len(specs) < len(file.specs):  # a torch file's names can share their bytes
        notes.append(f"{len(file.specs) - len(specs)} more names refer to these tensors")
    _, *more = [*find_marks(file.specs)] or [key]  # `method` is the first one's
    notes += [f"it also holds tensors of {OTHER_METHODS[kind].title}" for kind in more]
    verdict = f"{OUTCOMES[method.outcome]}: {method.title}, which {method.reason}"
    return MethodReport(
        path=path,
        method=key,
        title=method.title,
        outcome=method.outcome,
        verdict=f"{verdict}; {method.remedy}" if method.remedy else verdict,
        groups=tuple(_plain_groups(specs)),
        tensors=len(specs),
        parameters=sum(spec.size for spec in specs.values()),
        nbytes=sum(spec.nbytes for spec in specs.values()),
        base_model=base,
        notes=tuple(note for note in notes if note),
        metadata=file.metadata or {},
    )


@dataclass(frozen=True)
class _Weight:
    """A tensor that is a weight by itself, or a quantized weight with all of its tensors."""

    spec: TensorSpec  # as in `Group`
    size: int | None  # numbers; None where the headers do not tell
    nbytes: int = field(compare=False)  # bitsandbytes has digits of a number in a companion, more or fewer
    codec: str | None = None
    dimensions: int = 0  # of the weight


def _inspect_checkpoint(checkpoint: Checkpoint, path: str) -> CheckpointReport:
    weights, first = [*_weights(checkpoint)], next(iter(checkpoint.shards), None)
    dtypes: Counter[str] = Counter()
    for _, weight in weights:
        dtypes[weight.spec.dtype] += weight.size or 0
    parameters, nbytes = sum(dtypes.values()), sum(weight.nbytes for _, weight in weights)
    uncounted = sum(coded.size is None for coded in checkpoint.coded.values())
    return CheckpointReport(
        path=path,
        model_type=checkpoint.model_type,
        files=tuple(shard.place for shard in checkpoint.shards),
        groups=tuple(_groups(weights)),
        tensors=len(weights),
        parameters=parameters,
        nbytes=nbytes,
        dtypes={dtype: size for dtype, size in dtypes.most_common() if size or not checkpoint.coded},
        tied=head_is_missing(checkpoint),
        quantization=checkpoint.quantized,
        uncounted=uncounted,
        metadata={str(key): str(value) for key, value in checkpoint.metadata.items()},
        fields=first.described_fields() if isinstance(first, GgufFile) else {},
        notes=tuple(_notes(checkpoint)),
        bits=nbytes * 8 / parameters if parameters and not uncounted else None,
    )


def _weights(checkpoint: Checkpoint) -> Iterator[tuple[str, _Weight]]:
    """Yield every weight under its name, in the order of the files."""
    unread = {coded.tensors[0]: (name, coded) for name, coded in checkpoint.coded.items()}
    companions = {tensor for coded in checkpoint.coded.values() for tensor in coded.tensors[1:]} - unread.keys()
    for name, spec in checkpoint.specs.items():
        stored = checkpoint.weights.get(name)
        if stored:
            parts = tuple(checkpoint.stored[tensor] for tensor in stored.tensors)
            yield name, _coded_weight(spec.shape, parts, stored.kind)
        elif name in unread:
            weight, coded = unread[name]
            yield weight, _unread_weight(checkpoint, coded)
        elif name not in companions:
            plain = _plain_weight(spec)
            yield name, replace(plain, size=0) if is_marker(name) else plain


@lru_cache(maxsize=1024)
def _plain_weight(spec: TensorSpec) -> _Weight:
    """Return a plain weight, cached: a mixture of experts has tens of thousands of equal ones."""
    return _Weight(spec, spec.size, spec.nbytes, None, len(spec.shape))


@lru_cache(maxsize=1024)
def _coded_weight(shape: tuple[int, ...], parts: tuple[TensorSpec, ...], codec: str) -> _Weight:
    """Return a coded weight, cached. parts: its stored tensors, the codes first."""
    codes, nbytes = TensorSpec(parts[0].dtype, shape), sum(part.nbytes for part in parts)
    return _Weight(codes, codes.size, nbytes, codec, len(shape))


def _unread_weight(checkpoint: Checkpoint, coded: Coded) -> _Weight:
    nbytes = sum(checkpoint.stored[tensor].nbytes for tensor in coded.tensors)
    dimensions = min(max(len(coded.spec.shape), 2), 3)  # codes may have others than the weight
    return _Weight(coded.spec, coded.size, nbytes, coded.format, dimensions)


def _notes(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.weights:
        plain = " or ".join(dict.fromkeys(plain_dtype(part) for part in checkpoint.models if part.weights))
        yield f"a merge dequantizes the weights that it changes to {plain}, and keeps the codes of others"
    yield from dict.fromkeys(weight.note for weight in checkpoint.weights.values() if weight.note)
    for part in checkpoint.models:
        if (part.folder / CONFIG_NAME).is_file():
            yield f"{part.prefix}{CONFIG_NAME} is beside a model that has no adapter: it is not read"
    for name, coded in checkpoint.coded.items():
        if coded.fault:
            yield f"{name} cannot be read: {coded.fault}"


def _plain_groups(specs: Mapping[str, TensorSpec]) -> Iterator[Group]:
    return _groups((name, _plain_weight(spec)) for name, spec in specs.items())


def _groups(weights: Iterable[tuple[str, _Weight]]) -> Iterator[Group]:
    """Group weights whose names differ only in numbers, in the order of each group's first one."""
    members: dict[tuple[tuple[str, ...], _Weight], list[tuple[tuple[int, ...], int]]] = {}
    for name, weight in weights:
        parts, numbers = split_numbers(name)
        members.setdefault((parts, weight), []).append((numbers, weight.nbytes))
    for (parts, weight), group in members.items():
        parameters, nbytes = len(group) * (weight.size or 0), sum(size for _, size in group)
        yield Group(
            name=with_ranges(parts, [numbers for numbers, _ in group]),
            dtype=weight.spec.dtype,
            shape=weight.spec.shape,
            tensors=len(group),
            parameters=parameters,
            nbytes=nbytes,
            role=_target("0".join(parts), weight),
            codec=weight.codec,
            bits=nbytes * 8 / parameters if parameters else None,
        )


def _target(name: str, weight: _Weight) -> str:
    if not name.endswith(".weight") and "expert" not in name:
        return ""
    is_numbers = weight.codec is not None or weight.spec.dtype in FLOATS
    return weight_role(name.removesuffix(".weight"), weight.dimensions, is_numbers)
