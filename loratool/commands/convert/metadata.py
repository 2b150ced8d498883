"""Edit the metadata of a safetensors file: a new header before the same bytes of tensors, in the same order.

Hashes of the tensors stay valid. sd-scripts' legacy hash covers the keys `ss_*` of the header, and is removed if one of
these changes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from difflib import get_close_matches
from pathlib import Path

from ...adapters.formats.content import ONLY_FOR
from ...durable.fileio import copy_range, require_free_space, write_at
from ...durable.partial import partial_file
from ...errors import InputError, UsageError, shell_word
from ...files.checkpoint import open_weights
from ...files.codecs.quantized import CODED_METADATA
from ...files.containers.safetensors_file import LEGACY_HASH, TensorFile, edited_header, is_hash
from ...files.hub.cache import resolve
from ...files.output.output import naming_output
from ...files.output.paths import check_output_name, check_output_path
from ...files.weights_file import require_unchanged
from ...streaming.parallel import Progress
from ...streaming.ranks import current_job
from ...streaming.rewrite import COPY_ITEM
from ...views.metadata import MetadataChange, MetadataReport
from ..arguments import parse_words
from .call import EditMetadata

# Keys by which readers know what the tensors mean, or which commands made them
READ = ("format", "loratool", ONLY_FOR, "lora_adapter_metadata", *CODED_METADATA)


def run_edit_metadata(call: EditMetadata) -> MetadataReport:
    """Edit the metadata of a safetensors file. The tensors are copied byte for byte."""
    new, gone = call.set or {}, parse_words(call.unset)
    current_job().exit_unless_rank0()
    place, is_file = check_output_name("converted.safetensors" if call.out is None else call.out)
    if not is_file:
        raise UsageError("is the name of a folder", culprit=str(place), remedy="name a file: X.safetensors")
    with closing(_open_one(call.source)) as file:
        former = file.metadata or {}
        _check(file, new, gone)
        stale = [LEGACY_HASH] if any(key.startswith("ss_") for key in (*new, *gone)) and LEGACY_HASH in former else []
        header = edited_header(file.header, {*gone, *stale}, new)
        size = len(header) + file.nbytes - file.data_start
        exists = check_output_path(place, True, [file.path], call.force, dry_run=call.dry_run)
        require_free_space(place.absolute().parent, size)
        if not call.dry_run:
            with naming_output(place):
                _write(file, header, place, call.progress)
        edited = dict.fromkeys((*new, *gone, *stale))
        changes = tuple(MetadataChange(key, former.get(key), new.get(key)) for key in edited)
        unchanged = len(former.keys() - edited)
        return MetadataReport(os.fspath(call.source), str(place), call.dry_run, changes, unchanged, size, exists=exists)


def _open_one(source: str | os.PathLike[str]) -> TensorFile:
    path = resolve(source)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            message = f"holds {len(files)} safetensors files; the metadata of one can be edited"
            raise InputError(message, culprit=os.fspath(source), remedy="name a file in it" if files else None)
        (path,) = files
    file = open_weights(path)
    if not isinstance(file, TensorFile):
        file.close()
        raise InputError("is not a safetensors file; only these have metadata", culprit=str(path))
    return file


def _check(file: TensorFile, new: Mapping[str, str], gone: Sequence[str]) -> None:
    former = file.metadata or {}
    for key in (*new, *gone):
        alias = former.get(key) in file.specs or new.get(key) in file.specs
        if key in READ or alias:
            why = "names a tensor" if alias else "describes the tensors"
            raise UsageError(f"{why}, so it cannot be edited", culprit=key)
        if key in new and key in gone:
            raise UsageError("is both set and unset", culprit=key)
        if key in new and is_hash(key):
            raise UsageError("is a hash of the tensors, and these do not change", culprit=key, remedy="unset it")
        try:
            (key + new.get(key, "")).encode()
        except UnicodeEncodeError:
            raise UsageError("is not valid UTF-8", culprit=ascii(key)) from None
    for key in gone:
        if key not in former:
            near = [shell_word(each) for each in get_close_matches(key, former, 1)]
            raise UsageError(
                f"is not a key of the metadata of {file.path.name}",
                culprit=key,
                remedy=f"did you mean {near[0]}?" if near else "loratool inspect FILE --metadata lists them",
            )


def _write(file: TensorFile, header: bytes, place: Path, progress: Progress | None) -> None:
    data = file.nbytes - file.data_start
    with partial_file(place) as target:
        write_at(target, memoryview(header), 0)
        for start in range(0, data, COPY_ITEM):
            length = min(COPY_ITEM, data - start)
            copy_range(file.file, file.data_start + start, target, len(header) + start, length)
            if progress:
                progress(start + length, data)
        require_unchanged([file])
