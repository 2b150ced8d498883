"""Describe the output of `apply`: the files of a model, whose frames are known before its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from ...durable.fileio import write_at
from ...errors import UsageError
from ...files.output.output import CONTAINERS, Output, OutputFile
from ...files.output.paths import check_output_name
from ...files.weights_file import WeightsFile
from ...patches.model_files import ModelFile, ModelFiles
from ...views.apply import AppliedTensor
from ..arguments import parse_paths
from ..cards import described_call, input_word
from .call import Apply


def choose_output_path(call: Apply, files: ModelFiles) -> tuple[Path, bool]:
    """Return the output's path, and whether it is a file; raise UsageError if the model is not what OUT is."""
    container = files.files[0].container
    ending = next(
        (each for each in CONTAINERS[container] if files.files[0].name.endswith(each)), CONTAINERS[container][0]
    )
    if call.out is None:
        return Path(f"patched{ending}" if files.is_file else "patched"), files.is_file
    path, is_file = check_output_name(call.out, container)
    if is_file is not files.is_file:
        what = "is a file, and the model that is made is a folder" if is_file else "is a folder, and the model a file"
        remedy = "name a folder with -o" if is_file else f"name a file that ends in {ending} with -o"
        raise UsageError(what, culprit=str(path), remedy=remedy)
    return path, is_file


def describe_output(
    path: Path,
    files: ModelFiles,
    side: Mapping[str, bytes],
    inputs: Sequence[WeightsFile],
    call: Apply,
    patches: Mapping[str, str],
) -> Output:
    """Return the output.

    Args:
        inputs: files that must not change until it is written, nor before it is resumed.
        patches: for the journal: a word -> what identifies a patch.
    """
    made = tuple(
        OutputFile(path.name if files.is_file else file.name, file.frame[: file.head], file.begin, file.nbytes)
        for file in files.files
    )
    described = described_call(call, [input_word(call.base), *map(input_word, parse_paths(call.patches))])
    return Output(
        path=path,
        is_file=files.is_file,
        specs=files.specs,
        files=made,
        extras=side,
        side_files={},
        left_behind=(),
        inputs=tuple(inputs),
        call={**described, **patches},
        resume=call.resume,
    )


def changed_tensors(files: ModelFiles, sizes: Iterable[Mapping[str, float]]) -> tuple[AppliedTensor, ...]:
    """Return a row for each tensor that patches change.

    Args:
        sizes: of each patch: a tensor -> what the patch has of it.
    """
    total = Counter[str]()
    for each in sizes:
        total.update(each)
    return tuple(
        AppliedTensor(name, spec.dtype, spec.nbytes, round(total[name]))
        for name, spec in files.specs.items()
        if name in total
    )


def write_frame(target: BinaryIO, file: ModelFile) -> None:
    """Write all bytes of a file that are of no tensor."""
    done = 0
    for first, length in file.gaps():
        write_at(target, memoryview(file.frame)[done : done + length], first)
        done += length
